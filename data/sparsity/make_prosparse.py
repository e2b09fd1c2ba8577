"""ProSparse (Song et al., arXiv 2402.13516) on small models and on SmolLM2: prosparse_*.

    python data/sparsity/make_prosparse.py small 0     # five continued trainings of one seed
    python data/sparsity/make_prosparse.py smollm2 0   # one repaired SmolLM2, one draw of text
    python data/sparsity/make_prosparse.py table       # JSON of what is there

Both resume. Small: the SiLU model of ``make_sparsing`` (64 wide, 4 layers, 800 steps), 200 steps
more. SmolLM2: every MLP gets ReLU and a low-rank repair that is fitted, layer after layer, to the
output of the original; the repair folds into the weights, so the result is a plain Llama with
another activation. One idle thread: 2 minutes a seed of either.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import make_sparsing
import numpy as np
import small_lm
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, datasets, metrics, models  # noqa: E402

FINAL = 2.0  # λ_S of the small models, in nats per unit of mean |h|, summed over layers
PEAKS = (0.05, 0.25, 0.5, 1.0, 1.0)  # λ_1 … λ_S, as multiples of λ_S
ENDS = (0.2, 0.4, 0.6, 0.8, 1.0)  # T_1 … T_S, as shares of all steps
FREE = 0.1  # the share of the steps before any regularization: substitution alone
STEPS = 200
SHIFTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # thresholds t of FATReLU


def factor(step: int, steps: int, kind: str, final: float) -> float:
    """λ at a step (from 0): "none", "fixed", or "progressive", flat and then along sine curves."""
    at = (step + 1) / steps
    if kind == "none" or at <= FREE:
        return 0.0
    if kind == "fixed":
        return final
    stage = next(i for i, end in enumerate(ENDS) if at <= end + 1e-9)
    if stage == 0:
        return final * PEAKS[0]
    low, high = PEAKS[stage - 1], PEAKS[stage]
    share = (at - ENDS[stage - 1]) / (ENDS[stage] - ENDS[stage - 1])
    return final * (low + (high - low) * (math.sin(math.pi * (share - 0.5)) + 1) / 2)


# --- small models ---------------------------------------------------------------------------------

VARIANTS = {  # method: activation, schedule, λ_S as a multiple of FINAL
    "SiLU": ("silu", "none", 0.0),
    "ReLU": ("relu", "none", 0.0),
    "fixed L1, half": ("relu", "fixed", 0.5),
    "fixed L1": ("relu", "fixed", 1.0),
    "ProSparse": ("relu", "progressive", 1.0),
}


def continued(method: str, seed: int, base: Path, final: float, steps: int = STEPS) -> dict:
    """One variant: trained on from the SiLU model, then measured."""
    act, kind, times = VARIANTS[method]
    ids, rest = small_lm.corpus()
    test = small_lm.pieces(rest, 16, 4321)
    make_sparsing.grow((64, 4, "silu"), seed, ids, test, base)
    model = small_lm.llama(64, 4, 256, act, seed)
    model.load_state_dict(checkpoint.load(base / f"silu_64x4_{seed}.safetensors")["model"])
    sizes, curve = [], []

    def keep(module, args):
        if module.training:
            sizes.append(args[0].abs().mean())

    def penalty(step):
        total = sum(sizes)
        sizes.clear()
        return factor(step, steps, kind, final * times) * total

    @torch.no_grad()
    def watch(step, _):
        model.eval()
        with make_sparsing.skipping(model, "value", [0.0] * 4) as kept:
            loss = small_lm.loss_of(model, test).item()
        curve.append([step, round(loss, 5), round(float(np.mean(kept)), 5)])

    handles = [m.down_proj.register_forward_pre_hook(keep) for m in make_sparsing.mlps(model)]
    watch(0, None)
    small_lm.train(
        model, ids, steps, seed + 1000, rate=2e-3, penalty=penalty, watch=watch, every=25
    )
    for handle in handles:
        handle.remove()
    shifted = []
    for t in SHIFTS:
        with make_sparsing.skipping(model, "value", [t] * 4) as kept:
            loss = small_lm.held_out(model, rest)
        shifted.append([t, round(loss, 5), round(float(np.mean(kept)), 5)])
    last = make_sparsing.measured(model, test)
    row = {"method": method, "seed": seed, "loss": shifted[0][1], "share": shifted[0][2]}
    return row | {"ppl1": last["share1"], "shifted": shifted, "curve": curve}


def small(seed: int, scratch: Path, base: Path) -> None:
    for method in VARIANTS:
        path = scratch / f"small_{method.replace(', ', '_').replace(' ', '_')}_{seed}.json"
        if not path.exists():
            row = continued(method, seed, base, FINAL)
            print(row["method"], row["loss"], row["share"], row["ppl1"], flush=True)
            path.write_text(json.dumps(row))


# --- SmolLM2 --------------------------------------------------------------------------------------

RANK = 24
TEXTS, LENGTH = 8, 256  # passages to fit on
FIT_STEPS, BATCH = 60, 256
STRENGTH = 0.02  # λ_S, see ``repaired``


def repaired(
    mlp, x: Tensor, goal: Tensor, kind: str, final: float, seed: int, steps: int = 0
) -> dict:
    """Low-rank repair of one MLP with ReLU, so that it maps x [n, d] to goal [n, d].

    The loss is the mean over tokens of ‖y − goal‖² / (‖goal‖² + its median), so that the few very
    long tokens do not decide alone, and λ times mean |h| in units of what the plain swap has.

    Returns:
        for gate, up and down: {"gate.a" [out, r], "gate.b" [r, in], …}, and the scales
        "gate.scale", "up.scale" [d_mlp]; the new weight is scale · (W + a b).
    """
    steps = steps or FIT_STEPS
    g = torch.Generator().manual_seed(seed)
    gate, up, down = (getattr(mlp, f"{k}_proj").weight.detach() for k in ("gate", "up", "down"))
    with torch.no_grad():
        gates, ups = x @ gate.T, x @ up.T
        unit = (torch.relu(gates) * ups).abs().mean()
        weight = 1 / (goal.square().sum(-1) + goal.square().sum(-1).median())
    parts = {}
    for name, w in (("gate", gate), ("up", up), ("down", down)):
        parts[f"{name}.a"] = torch.zeros(w.shape[0], RANK)
        parts[f"{name}.b"] = torch.randn(RANK, w.shape[1], generator=g) / w.shape[1] ** 0.5
    parts |= {f"{name}.scale": torch.ones(len(gate)) for name in ("gate", "up")}
    parts = {k: p.to(x).requires_grad_() for k, p in parts.items()}
    opt = torch.optim.Adam(parts.values(), lr=5e-3)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 5e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        at = torch.randint(len(x), (BATCH,), generator=g).to(x.device)
        xs = x[at]
        a = parts["gate.scale"] * (gates[at] + xs @ parts["gate.b"].T @ parts["gate.a"].T)
        b = parts["up.scale"] * (ups[at] + xs @ parts["up.b"].T @ parts["up.a"].T)
        h = torch.relu(a) * b
        y = h @ down.T + h @ parts["down.b"].T @ parts["down.a"].T
        error = ((y - goal[at]).square().sum(-1) * weight[at]).mean()
        total = error + factor(step, steps, kind, final) * h.abs().mean() / unit
        opt.zero_grad()
        total.backward()
        opt.step()
    return {k: p.detach() for k, p in parts.items()}


@torch.no_grad()
def fold(mlp, parts: dict) -> None:
    """Put a repair into the weights of one MLP, and ReLU in place of its activation."""
    for name in ("gate", "up", "down"):
        weight = getattr(mlp, f"{name}_proj").weight
        weight += parts[f"{name}.a"].to(weight) @ parts[f"{name}.b"].to(weight)
        if name != "down":
            weight *= parts[f"{name}.scale"].to(weight)[:, None]
    mlp.act_fn = torch.nn.ReLU()


def fit(kind: str, final: float, seed: int, state: Path, layers: int = 30) -> list[dict]:
    """Repairs of every layer; the streams of the original and of the new model run side by side,
    and each layer is asked for what brings the second back to the first."""
    model, tokenizer = models.load("smollm2")
    ids = datasets.passages(tokenizer, "calibration", TEXTS, LENGTH, seed)
    kept = checkpoint.load(state) if state.exists() else {"parts": []}
    parts = kept["parts"]
    core = model.model
    with torch.no_grad():
        old = new = core.embed_tokens(ids)
        turn = core.rotary_emb(old, torch.arange(LENGTH)[None])
    if parts:
        old, new = kept["old"], kept["new"]
    for layer in list(core.layers)[len(parts) : layers]:

        @torch.no_grad()
        def attended(stream, layer=layer):
            read = [
                layer.self_attn(
                    layer.input_layernorm(s), position_embeddings=turn, attention_mask=None
                )
                for s in stream.split(4)
            ]
            return stream + torch.cat([r[0] for r in read])

        with torch.no_grad():
            old_mid, new_mid = attended(old), attended(new)
            old = old_mid + layer.mlp(layer.post_attention_layernorm(old_mid))
            x = layer.post_attention_layernorm(new_mid)
        goal = old - new_mid
        found = repaired(layer.mlp, x.flatten(0, 1), goal.flatten(0, 1), kind, final, seed)
        mlp = copy.deepcopy(layer.mlp)
        fold(mlp, found)
        with torch.no_grad():
            change = mlp(x)
            h = torch.relu(mlp.gate_proj(x))
        drift = ((new_mid + change - old).norm(dim=-1) / old.norm(dim=-1)).median().item()
        off = ((change - goal).norm(dim=-1) / goal.norm(dim=-1)).median().item()
        new = new_mid + change
        parts.append(found)
        print(
            len(parts),
            f"error {off:.3f}, drift {drift:.3f}, active {(h > 0).float().mean():.3f}",
            flush=True,
        )
        checkpoint.save(state, {"parts": parts, "old": old, "new": new})
    return parts


@contextmanager
def swapped(model, parts: list | None):
    """SmolLM2 with ReLU and, where given, the repairs; weights and activation go back on exit."""
    mlps = make_sparsing.mlps(model)
    was = [(m.act_fn, [p.detach().clone() for p in m.parameters()]) for m in mlps]
    try:
        for i, mlp in enumerate(mlps):
            if parts is None:
                mlp.act_fn = torch.nn.ReLU()
            else:
                fold(mlp, parts[i])
        yield model
    finally:
        with torch.no_grad():
            for mlp, (act, weights) in zip(mlps, was, strict=True):
                mlp.act_fn = act
                for p, w in zip(mlp.parameters(), weights, strict=True):
                    p.copy_(w)


SMOLLM2_SHIFTS = (0.0, 0.05, 0.1)


def megabytes(share: float) -> float:
    """Block weights that SmolLM2 reads for one token, in float32 and 10⁶ bytes: attention and gate
    whole, up and down for a share of the neurons."""
    attention, matrix = 2 * 576 * (576 + 192), 576 * 1536
    return round(30 * 4 * (attention + matrix * (1 + 2 * share)) / 1e6, 2)


def smollm2(seed: int, scratch: Path) -> list[dict]:
    """Losses on each of the chapter's held-out passages, the share of neurons that are not zero."""
    parts = fit("progressive", STRENGTH, seed, scratch / f"smollm2_{seed}.safetensors")
    model, tokenizer = models.load("smollm2")
    ids = datasets.passages(tokenizer, "held out", 4, 256, seed=1851)
    plans = [("ProSparse", parts, t) for t in SMOLLM2_SHIFTS]
    plans += [("dense", None, None), ("ReLU swap", None, 0.0)] * (seed == 0)
    rows = []
    for name, repair, t in plans:
        with ExitStack() as stack:
            kept = [1.0]
            if t is not None:
                stack.enter_context(swapped(model, repair))
                kept = stack.enter_context(make_sparsing.skipping(model, "value", [t] * 30))
            losses = [round(x, 5) for x in metrics.losses(model, ids)]
        share = round(float(np.mean(kept)), 5)
        rows.append({"method": name, "seed": seed, "t": t, "losses": losses, "share": share})
        print(rows[-1], flush=True)
    return rows


def table(scratch: Path) -> None:
    """prosparse_results.json and frontier_prosparse.json."""

    def read(pattern):
        return [json.loads(p.read_text()) for p in sorted(scratch.glob(pattern))]

    big = [r for rows in read("smollm2_*.json") for r in rows]
    found = {"shifts": SHIFTS, "small": read("small_*.json"), "smollm2": big}
    text = json.dumps(found).replace("}, {", "},\n{")
    (HERE / "prosparse_results.json").write_text(text + "\n")
    rows = [
        {
            "method": r["method"],
            "setting": f"t = {r['t']:g}",
            "seed": r["seed"],
            "mlp_share": round(r["share"], 4),
            "megabytes": megabytes(r["share"]),
            "seconds": None,
            "perplexity": round(math.exp(np.mean(r["losses"])), 4),
        }
        for r in big
        if r["method"] in ("ProSparse", "ReLU swap")
    ]
    (HERE / "frontier_prosparse.json").write_text(json.dumps(rows, indent=1) + "\n")
    print({k: len(v) for k, v in found.items()}, len(rows))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("small", "smollm2", "table"))
    parser.add_argument("seed", type=int, nargs="?", default=0)
    tmp = Path(tempfile.gettempdir())
    parser.add_argument("--scratch", type=Path, default=tmp / "sparsity_prosparse")
    parser.add_argument("--base", type=Path, default=tmp / "sparsity_sparsing")
    args = parser.parse_args(argv)
    for folder in (args.scratch, args.base):
        folder.mkdir(parents=True, exist_ok=True)
    if args.what == "small":
        small(args.seed, args.scratch, args.base)
    elif args.what == "table":
        table(args.scratch)
    elif not (path := args.scratch / f"smollm2_{args.seed}.json").exists():
        path.write_text(json.dumps(smollm2(args.seed, args.scratch)))


if __name__ == "__main__":
    main()
