"""Makes quamba_mamba.safetensors and quamba_results.json: a small Mamba, and what 8 bits do to it.

A byte-level Mamba (Gu and Dao, arXiv 2312.00752) of half a million weights is trained on the first
nine tenths of Moby Dick, once for each seed, on ``lib.kernels.selective_scan``. Weights are
named as in ``transformers``' MambaForCausalLM. Then every site of a block is quantized with static
scales, as Quamba does (Chiang et al., arXiv 2410.13229) and naively, and the loss on the last tenth
is stored. About eight minutes for seed 0, four for the others on one core; resumable.

    python data/quantization/make_quamba.py --seeds 0 1 2 --scratch /tmp/quamba
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets  # noqa: E402
from lib.kernels.fake_quant import fake_quantize, scale_of  # noqa: E402
from lib.kernels.hadamard import transform  # noqa: E402
from lib.kernels.selective_scan import selective_scan  # noqa: E402

D, INNER, STATE, RANK, LAYERS, KERNEL = 128, 256, 16, 8, 4, 4
LENGTH, BATCH, RATE = 256, 8, 4e-3
STEPS = (900, 300, 300)  # of seeds 0, 1, 2: the first is shipped, and trained three times as long
SITES = ("in", "conv", "z", "x", "low", "dt", "B", "C", "y")  # of a block, as they run
SHARE = 0.99999  # of x that the percentile keeps
METHODS = ("static", "dynamic", "clipped x", "Hadamard y", "Quamba")
BITS = (8, 6, 4)
N_CALIBRATE, N_TEST = 16, 32  # stretches


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Moby Dick in bytes: the first nine tenths to train and calibrate on, the rest to test on."""
    ids = torch.tensor(list(datasets.moby_dick().encode()), dtype=torch.uint8).long()
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def pieces(ids: torch.Tensor, n: int, seed: int, length: int = LENGTH) -> torch.Tensor:
    """``n`` random stretches of ``length`` + 1 bytes: [n, length + 1]."""
    g = torch.Generator().manual_seed(seed)
    at = torch.randint(len(ids) - length - 1, (n,), generator=g)
    return torch.stack([ids[a : a + length + 1] for a in at])


def fresh(seed: int) -> dict[str, torch.Tensor]:
    """Weights before training, drawn as Mamba's authors draw them."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape, bound):
        return (torch.rand(*shape, generator=g) * 2 - 1) * bound

    w = {
        "embeddings.weight": torch.randn(256, D, generator=g) * 0.02,
        "norm_f.weight": torch.ones(D),
    }
    for i in range(LAYERS):
        step = torch.exp(torch.rand(INNER, generator=g) * math.log(100)) * 1e-3  # 0.001 to 0.1
        w |= {
            f"layers.{i}.norm.weight": torch.ones(D),
            f"layers.{i}.mixer.in_proj.weight": uniform(2 * INNER, D, bound=D**-0.5),
            f"layers.{i}.mixer.conv1d.weight": uniform(INNER, 1, KERNEL, bound=KERNEL**-0.5),
            f"layers.{i}.mixer.conv1d.bias": torch.zeros(INNER),
            f"layers.{i}.mixer.x_proj.weight": uniform(RANK + 2 * STATE, INNER, bound=INNER**-0.5),
            f"layers.{i}.mixer.dt_proj.weight": uniform(INNER, RANK, bound=RANK**-0.5),
            f"layers.{i}.mixer.dt_proj.bias": step + torch.log(-torch.expm1(-step)),
            f"layers.{i}.mixer.A_log": torch.arange(1.0, STATE + 1).log().repeat(INNER, 1),
            f"layers.{i}.mixer.D": torch.ones(INNER),
            f"layers.{i}.mixer.out_proj.weight": uniform(D, INNER, bound=(INNER * LAYERS) ** -0.5),
        }
    return w


def forward(w: dict, ids: torch.Tensor, at=lambda layer, site, x: x) -> torch.Tensor:
    """Logits [batch, length, 256] of ids [batch, length].

    ``at(layer, site, x)`` is called at every site of ``SITES`` with the activation, channels last,
    and what it returns goes on: to look at activations, or to round them.
    """
    stream = w["embeddings.weight"][ids]
    for i in range(LAYERS):
        m = {k.split("mixer.")[1]: v for k, v in w.items() if k.startswith(f"layers.{i}.mixer.")}
        u = at(i, "in", F.rms_norm(stream, (D,), w[f"layers.{i}.norm.weight"], 1e-5))
        x, z = (u @ m["in_proj.weight"].T).chunk(2, -1)
        x, z = at(i, "conv", x), at(i, "z", z)
        x = F.pad(x.transpose(1, 2), (KERNEL - 1, 0))
        x = F.silu(F.conv1d(x, m["conv1d.weight"], m["conv1d.bias"], groups=INNER))
        x = at(i, "x", x.transpose(1, 2))
        low, b, c = (x @ m["x_proj.weight"].T).split([RANK, STATE, STATE], -1)
        dt = at(i, "low", low) @ m["dt_proj.weight"].T + m["dt_proj.bias"]
        dt, b, c = F.softplus(at(i, "dt", dt)), at(i, "B", b), at(i, "C", c)
        y, _ = selective_scan(
            *(t.transpose(1, 2) for t in (x, dt)), -m["A_log"].exp(),
            *(t.transpose(1, 2) for t in (b, c)), m["D"], z.transpose(1, 2), softplus=False,
        )  # fmt: skip
        stream = stream + at(i, "y", y.transpose(1, 2)) @ m["out_proj.weight"].T
    stream = F.rms_norm(stream, (D,), w["norm_f.weight"], 1e-5)
    return stream @ w["embeddings.weight"].T


def loss(w: dict, batch: torch.Tensor, at=lambda layer, site, x: x) -> torch.Tensor:
    """Mean nats a byte of ``batch`` [n, length + 1]."""
    logits = forward(w, batch[:, :-1], at)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(seed: int, scratch: Path, start: float, minutes: float) -> dict | None:
    """Trained weights, or None where ``minutes`` from ``start`` were not enough: call it again."""
    done = scratch / f"mamba_{seed}.safetensors"
    if done.is_file():
        return load_file(done)
    partial = scratch / f"partial_{seed}.safetensors"
    ids, _ = corpus()
    w = {k: v.requires_grad_() for k, v in fresh(seed).items()}
    plain = [k for k in w if w[k].dim() < 2 or "A_log" in k or "embed" in k]
    groups = [{"params": [w[k] for k in plain], "weight_decay": 0.0},
              {"params": [w[k] for k in w if k not in plain], "weight_decay": 0.1}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    first, steps = 0, STEPS[min(seed, 2)]
    if partial.is_file():
        saved = load_file(partial)
        first = int(saved["step"])
        for k, v in w.items():
            v.data.copy_(saved[f"w.{k}"])
            moments = dict(exp_avg=saved[f"m.{k}"], exp_avg_sq=saved[f"v.{k}"])
            optimizer.state[v] = dict(step=torch.tensor(float(first)), **moments)
    for step in range(first, steps):
        share = step / steps
        rate = RATE * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(w, pieces(ids, BATCH, 10_000 * seed + step))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(
                f"seed {seed} step {step}: {value.item():.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
        late = time.time() - start > 60 * minutes
        if late or step % 100 == 99:
            state = {"step": torch.tensor(step + 1)}
            for k, v in w.items():
                o = optimizer.state[v]
                state |= {f"w.{k}": v.detach(), f"m.{k}": o["exp_avg"], f"v.{k}": o["exp_avg_sq"]}
            save_file(state, partial)
        if late:
            print(f"seed {seed}: stopped after step {step}; run again", flush=True)
            return None
    # What is measured is what is shipped.
    w = {k: v.detach().half().float() for k, v in w.items()}
    save_file(w, done)
    partial.unlink(missing_ok=True)
    return w


# --- eight bits -----------------------------------------------------------------------------------


def collect(w: dict, batch: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """What every site holds on ``batch``: (layer, site) -> [n, length, channels]."""
    seen = {}

    def look(layer, site, x):
        seen[layer, site] = x
        return x

    with torch.no_grad():
        forward(w, batch[:, :-1], look)
    return seen


def scales(seen: dict, bits: int, share: float = SHARE) -> dict:
    """Static scales, one a tensor: (layer, site) -> [] by the largest magnitude; under ("x", share)
    that of the percentile, under ("y", "rotated") that of the Hadamard transform."""
    found = {}
    for (layer, site), x in seen.items():
        found[layer, site] = scale_of(x, f"int{bits}")[0]
        if site == "x":
            found[layer, "clipped x"] = scale_of(x, f"int{bits}", by="percentile", share=share)[0]
        if site == "y":
            found[layer, "Hadamard y"] = scale_of(transform(x), f"int{bits}")[0]
    return found


def rounded_weights(w: dict, bits: int, rotated: bool) -> dict:
    """Every matrix of the blocks, A and D included, on ``bits`` with one scale; embedding and norms
    as they are. ``rotated``: the output projection as W Hᵀ, for inputs H y."""
    found = {}
    for name, v in w.items():
        if rotated and "out_proj" in name:
            v = transform(v)
        keep = "embed" in name or "norm" in name or name.endswith("bias")
        found[name] = v if keep else fake_quantize(v, f"int{bits}")
    return found


def rounding(method: str, known: dict, bits: int, only: str | None = None):
    """An ``at`` for ``forward`` that rounds every site (or ``only`` one) as ``method`` does."""

    def at(layer, site, x):
        if only not in (None, site):
            return x
        scale = known[layer, site]
        if site == "x" and method in ("clipped x", "Quamba"):
            scale = known[layer, "clipped x"]
        if site == "y" and method in ("Hadamard y", "Quamba"):
            x, scale = transform(x), known[layer, "Hadamard y"]
        return fake_quantize(x, f"int{bits}", scale=None if method == "dynamic" else scale)

    return at


@torch.no_grad()
def quantized_loss(w, batch, method, known, bits, only=None) -> float:
    """Nats a byte with weights and activations on ``bits``; ``only``: one site, no weights."""
    new = w if only else rounded_weights(w, bits, method in ("Hadamard y", "Quamba"))
    return loss(new, batch, rounding(method, known, bits, only)).item()


def measure(w: dict, seed: int) -> dict:
    """Losses of every method and number of bits, of every site alone, and how far sites reach."""
    ids, test = corpus()
    seen, batch = collect(w, pieces(ids, N_CALIBRATE, 77 + seed)), pieces(test, N_TEST, 7)
    rows = [dict(seed=seed, method="none", bits=32, loss=loss(w, batch).item())]
    alone = []
    for bits in BITS:
        known = scales(seen, bits)
        for method in METHODS:
            value = quantized_loss(w, batch, method, known, bits)
            rows.append(dict(seed=seed, method=method, bits=bits, loss=value))
        for site in SITES if bits == 4 else ():
            value = quantized_loss(w, batch, "static", known, bits, site)
            alone.append(dict(seed=seed, site=site, bits=bits, loss=value))
    reach = []
    for (layer, site), x in seen.items():
        views = {site: x} | ({"rotated y": transform(x)} if site == "y" else {})
        for name, v in views.items():
            size = v.abs().flatten()
            most = size.kthvalue(math.ceil(SHARE * len(size))).values
            rms = v.square().mean().sqrt()
            reach.append(dict(seed=seed, layer=layer, site=name, peak=(size.max() / rms).item(),
                              percentile=(most / rms).item()))  # fmt: skip
    return dict(rows=rows, alone=alone, reach=reach)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quamba"))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    start, found = time.time(), {}
    for seed in args.seeds:
        w = train(seed, args.scratch, start, args.minutes)
        if w is None:
            return
        path = args.scratch / f"measured_{seed}.json"
        if not path.is_file():
            if time.time() - start > 60 * args.minutes:
                return
            path.write_text(json.dumps(measure(w, seed)))
        measured = json.loads(path.read_text())
        print(f"seed {seed}: {measured['rows'][0]['loss']:.4f} nats a byte", flush=True)
        for name, rows in measured.items():
            found[name] = found.get(name, []) + rows
    for rows in found.values():
        for row in rows:
            row |= {k: round(v, 5) for k, v in row.items() if isinstance(v, float)}
    (HERE / "quamba_results.json").write_text(json.dumps(found, indent=1) + "\n")
    plain = {r["seed"]: math.exp(r["loss"]) for r in found["rows"] if r["method"] == "none"}
    count = sum(v.numel() for k, v in w.items() if "mixer" in k and not k.endswith("bias"))
    frontier = [
        dict(
            method=r["method"],
            setting=f"W{r['bits']}A{r['bits']}",
            seed=r["seed"],
            bits=r["bits"],
            megabytes=round(r["bits"] * count / 8e6, 4),
            activation_bits=r["bits"],
            perplexity=round(math.exp(r["loss"]), 4),
            model="mamba",
            plain=round(plain[r["seed"]], 4),
        )
        for r in found["rows"]
        if r["method"] in ("static", "Quamba")
    ]
    (HERE / "frontier_quamba.json").write_text(json.dumps(frontier, indent=1) + "\n")
    first = load_file(args.scratch / f"mamba_{args.seeds[0]}.safetensors")
    save_file({k: v.half() for k, v in first.items()}, HERE / "quamba_mamba.safetensors")


if __name__ == "__main__":
    main()
