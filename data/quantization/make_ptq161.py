"""Makes ptq161_results.json, ptq161_scales.safetensors and frontier_ptq161.json.

SmolLM2's 210 block linears at about 1.7 bits (PTQ1.61, arXiv 2502.13179) and at the same or twice
that by plain binarization, round-to-nearest and GPTQ. For each seed, which draws the calibration
text: the mask alone, the mask with scales learned block by block, and both after quantization
preprocessing. About twelve minutes a seed on one core; a finished stage is kept.

    python data/quantization/make_ptq161.py --seeds 0 1 2 --scratch /tmp/ptq161
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import own_setting  # noqa: E402

from lib import metrics, models, quantization  # noqa: E402

KEEP, SEQUENCES = 0.2, 8
LENGTH, SHORT = 256, 128  # tokens a sequence that are read, and that the scales learn from
EPOCHS, RATE = 3, 3e-2  # of the scales, by block: the best of four rates on three blocks
RANK, STEPS, LORA_RATE = 16, 40, 2e-3  # of the restorative adapters


def salient(peak: torch.Tensor, keep: float = KEEP) -> torch.Tensor:
    """bool [in]: the share of input channels with the largest activations (section 3.2)."""
    kept = round(keep * len(peak))
    mask = torch.zeros(len(peak), dtype=torch.bool, device=peak.device)
    mask[peak.argsort(descending=True)[:kept]] = True
    return mask


def split(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a matrix becomes: ``high``, its salient columns at 4 bits (zero elsewhere), ``sign`` of
    the others about their row's ``mean`` (zero on salient ones), and the ``scale`` of each row."""
    rest = weight[:, ~mask]
    high, sign = torch.zeros_like(weight), torch.zeros_like(weight)
    if mask.any():
        high[:, mask] = quantization.nearest(weight[:, mask], 4)
    mean = rest.mean(1, keepdim=True) if rest.shape[1] else weight[:, :1] * 0
    sign[:, ~mask] = torch.where(rest >= mean, 1.0, -1.0)
    scale = (rest - mean).abs().mean(1, keepdim=True) if rest.shape[1] else mean
    return dict(high=high, sign=sign, mean=mean * ~mask, scale=scale)


def join(parts: dict, rows=1.0, columns=1.0, scale=None) -> torch.Tensor:
    """The matrix: ``high`` + (``rows`` × ``columns``) ∘ (scale · sign + mean), equation 9."""
    scale = parts["scale"] if scale is None else scale
    return parts["high"] + rows * (scale * parts["sign"] + parts["mean"]) * columns


def bits(shape, keep: float = KEEP, learned: bool = True) -> float:
    """Stored bits a weight of [out, in]: codes, four 16-bit numbers a row (scale and minimum of the
    salient part, scale and mean of the rest), the mask, a 16-bit factor for each binary column."""
    rows, columns = shape
    kept = round(keep * columns)
    total = rows * (4 * kept + columns - kept) + 64 * rows + columns * (keep > 0)
    return (total + 16 * (columns - kept) * learned) / (rows * columns)


def distance(ours: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Mean squared error minus the logarithm of the mean cosine of tokens (equations 5 and 6)."""
    return F.mse_loss(ours, goal) - F.cosine_similarity(ours, goal, dim=-1).mean().abs().log()


def learn(block, parts: dict, entering, goals, run, epochs=EPOCHS, rate=RATE):
    """Scales of one block, trained against its outputs (equation 7).

    Args:
        parts: name of a linear -> ``split``.
        entering: [n, pos, d], what the quantized blocks before it give.
        goals: two [n, pos, d]: the plain block on the plain input, and on ``entering``.
        run: ``run(block, weights, x)``.

    Returns:
        (name -> dict(scale, rows, columns)), and the loss of every epoch.
    """
    learned = {
        name: dict(
            scale=torch.ones_like(p["scale"]),
            rows=torch.ones_like(p["scale"]),
            columns=torch.ones_like(p["high"][:1]),
        )
        for name, p in parts.items()
    }
    flat = [v.requires_grad_() for one in learned.values() for v in one.values()]
    optimizer = torch.optim.AdamW(flat, lr=rate, weight_decay=0)
    total = epochs * len(entering)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))
    history = []
    for _ in range(epochs):
        losses = []
        for i in range(len(entering)):
            weights = {n: weight_of(parts[n], learned[n]) for n in parts}
            ours = run(block, weights, entering[i : i + 1])
            loss = sum(distance(ours, goal[i : i + 1]) for goal in goals)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
    return {n: {k: v.detach() for k, v in one.items()} for n, one in learned.items()}, history


def weight_of(parts: dict, learned: dict) -> torch.Tensor:
    scale = parts["scale"] * learned["scale"]
    return join(parts, learned["rows"], learned["columns"], scale)


class Blocks:
    """The model's decoder blocks, run one at a time on hidden states [n, pos, d]."""

    def __init__(self, model, pos: int):
        self.model, self.layers = model, model.model.layers
        where = torch.arange(pos, device=model.device)[None]
        empty = torch.zeros(1, pos, model.config.hidden_size, device=model.device)
        self.rotary = model.model.rotary_emb(empty, where)

    def __call__(self, block, weights, x):
        given = {f"{n}.weight": w for n, w in weights.items()}
        how = dict(position_embeddings=self.rotary)  # no mask: causal by itself
        out = torch.func.functional_call(block, given, (x,), how)
        return out[0] if isinstance(out, tuple) else out


def ptq161(model, ids, moments, weights: dict, epochs=EPOCHS, say=print) -> tuple[dict, dict]:
    """Weights of all blocks with learned scales; and the scales (float16, as stored), by name.

    ``weights``: what is quantized (the model's own, or preprocessed ones); the goal is the output
    of blocks with these weights.
    """
    run = Blocks(model, ids.shape[1])
    plain = model.model.embed_tokens(ids)
    entering, found, scales = plain.clone(), {}, {}
    for i, block in enumerate(run.layers):
        prefix = f"model.layers.{i}."
        own = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
        parts = {n: split(w, salient(moments[prefix + n].peak)) for n, w in own.items()}
        with torch.no_grad():
            plain, goal = (
                torch.cat([run(block, own, x[None]) for x in b]) for b in (plain, entering)
            )
        learned, history = learn(block, parts, entering, (plain, goal), run, epochs)
        learned = {n: {k: v.half().float() for k, v in one.items()} for n, one in learned.items()}
        new = {n: weight_of(parts[n], learned[n]) for n in parts}
        with torch.no_grad():
            entering = torch.cat([run(block, new, x[None]) for x in entering])
        found |= {prefix + n: w for n, w in new.items()}
        scales |= {prefix + n: one for n, one in learned.items()}
        say(f"block {i}: loss {history[0]:.3f} to {history[-1]:.3f}")
    return found, scales


def analytic(model, moments, keep=KEEP) -> dict[str, torch.Tensor]:
    """The mask and closed-form scales; ``keep`` 0: plain binarization about the mean."""
    return {
        n: join(split(m.weight, salient(moments[n].peak, keep)))
        for n, m in quantization.linears(model).items()
    }


def binarized(model) -> dict[str, torch.Tensor]:
    """α sign(w) with α = mean |w| of a row (equation 2): one bit, no mask."""
    return {
        n: m.weight.abs().mean(1, keepdim=True) * torch.where(m.weight >= 0, 1.0, -1.0)
        for n, m in quantization.linears(model).items()
    }


def restore(model, tokenizer, weights: dict, seed: int, steps=STEPS, rate=LORA_RATE, say=print):
    """Quantization preprocessing: adapters trained on text with the quantized ``weights`` frozen,
    and merged into them (section 3.4). Returns new weights, in full precision."""
    text = own_setting.calibration(tokenizer, 1000 + seed, steps, SHORT)
    g = torch.Generator().manual_seed(seed)
    adapters, handles = {}, []
    for name, module in quantization.linears(model).items():
        a = torch.randn(RANK, module.in_features, generator=g) / module.in_features**0.5
        a, b = a.to(model.device), module.weight.new_zeros(module.out_features, RANK)
        adapters[name] = (a.requires_grad_(), b.requires_grad_())

        def add(_, args, out, a=a, b=b):
            return out + (args[0] @ a.T) @ b.T

        handles.append(module.register_forward_hook(add))
    optimizer = torch.optim.AdamW(
        [p for pair in adapters.values() for p in pair], lr=rate, weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=0.1
    )
    try:
        with quantization.swapped(model, weights):
            for step in range(steps):
                ids = text[step : step + 1].to(model.device)
                logits = model(ids).logits[0, :-1].float()
                loss = F.cross_entropy(logits, ids[0, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 8 == 0:
                    say(f"restoring, step {step}: {loss.item():.3f}")
    finally:
        for handle in handles:
            handle.remove()
    return {n: (weights[n] + b @ a).detach() for n, (a, b) in adapters.items()}


def stages(model, tokenizer, seed, scratch, say):
    """(method, setting, mean bits, weights) one after the other."""
    linears = quantization.linears(model)
    ids = own_setting.calibration(tokenizer, seed, SEQUENCES, LENGTH)
    own = {n: m.weight for n, m in linears.items()}
    shapes = [w.shape for w in own.values()]
    count = sum(w.numel() for w in own.values())

    def mean(f):
        return sum(f(s) * s[0] * s[1] for s in shapes) / count

    def plain(number, group=None):
        return mean(lambda s: 8 * own_setting.stored_bytes(s, number, group) / (s[0] * s[1]))

    cached = None

    def moments():
        nonlocal cached
        cached = cached or quantization.calibrate(model, ids)
        return cached

    def gptq():
        return {n: quantization.gptq(w, moments()[n].second, 2) for n, w in own.items()}

    def masked(keep):
        return mean(lambda s: bits(s, keep, False))

    if seed == 0:
        yield "full precision", "16 bits", 16.0, lambda: own
        yield "binarized", "W1", mean(lambda s: 1 + 16 / s[1]), lambda: binarized(model)
        yield (
            "RTN",
            "W2, a row",
            plain(2),
            lambda: {n: quantization.nearest(w, 2) for n, w in own.items()},
        )
    yield "GPTQ", "W2, a row", plain(2), gptq
    yield "mask", "closed form", masked(KEEP), lambda: analytic(model, moments())

    def learned():
        found, scales = ptq161(model, ids[:, :SHORT], moments(), own, say=say)
        flat = {f"{n}.{k}": v.half() for n, one in scales.items() for k, v in one.items()}
        save_file(flat, scratch / f"scales_{seed}.safetensors")
        save_file({n: w.half() for n, w in found.items()}, scratch / f"learned_{seed}.safetensors")
        return found

    yield "mask, learned", "no preprocessing", mean(bits), learned

    def restored():
        start = load_file(scratch / f"learned_{seed}.safetensors")
        new = restore(model, tokenizer, {n: w.float() for n, w in start.items()}, seed, say=say)
        save_file({n: w.half() for n, w in new.items()}, scratch / f"restored_{seed}.safetensors")
        return new

    yield "restored", "16 bits, preprocessed", 16.0, restored

    def prepared():
        new = load_file(scratch / f"restored_{seed}.safetensors")
        return {n: w.float() for n, w in new.items()}

    def twice():
        with quantization.swapped(model, prepared()):
            again = quantization.calibrate(model, ids[:, :SHORT])
            return ptq161(model, ids[:, :SHORT], again, prepared(), say=say)[0]

    yield "PTQ1.61", "preprocessed", mean(bits), twice

    def rtn():
        return {n: quantization.nearest(w, 2) for n, w in prepared().items()}

    yield "RTN, preprocessed", "W2, a row", plain(2), rtn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/ptq161"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no stage after so many")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    start = time.time()
    model, tokenizer = models.load("smollm2")
    held_out = own_setting.held_out(tokenizer).to(model.device)
    weights = sum(m.weight.numel() for m in quantization.linears(model).values())
    rows = []
    for seed in args.seeds:
        for method, setting, b, make in stages(
            model, tokenizer, seed, args.scratch, lambda t: print(t, flush=True)
        ):
            kept = args.scratch / f"{method.replace(' ', '_').replace('%', '')}_{seed}.json"
            if not kept.is_file():
                if time.time() - start > 60 * args.minutes:
                    print("stopped; run again to go on")
                    return
                with quantization.swapped(model, make()):
                    ppl = metrics.perplexity(model, held_out)
                kept.write_text(json.dumps(dict(method=method, setting=setting, seed=seed, bits=b,
                                                perplexity=ppl)))  # fmt: skip
                print(
                    f"seed {seed}: {method}, {b:.3f} bits, {ppl:.1f}, {time.time() - start:.0f} s",
                    flush=True,
                )
            rows.append(json.loads(kept.read_text()))
    for row in rows:
        row["bits"], row["perplexity"] = round(row["bits"], 4), float(f"{row['perplexity']:.5g}")
    (HERE / "ptq161_results.json").write_text(json.dumps(dict(rows=rows), indent=1) + "\n")
    names = {
        "binarized": "binary",
        "mask": "mask, closed form",
        "mask, learned": "PTQ1.61, not preprocessed",
        "PTQ1.61": "PTQ1.61",
        "GPTQ": "GPTQ, a row",
    }
    frontier = [
        dict(
            method=names[r["method"]],
            setting=f"W{r['bits']:.2f}",
            seed=r["seed"],
            bits=r["bits"],
            megabytes=round(r["bits"] * weights / 8e6, 3),
            activation_bits=16,
            perplexity=r["perplexity"],
        )
        for r in rows
        if r["method"] in names
    ]
    (HERE / "frontier_ptq161.json").write_text(json.dumps(frontier, indent=1) + "\n")
    shipped, flat = (
        HERE / "ptq161_scales.safetensors",
        load_file(args.scratch / "scales_0.safetensors"),
    )
    ids = own_setting.calibration(tokenizer, 0, SEQUENCES, LENGTH)
    for n, m in quantization.calibrate(model, ids).items():
        flat[f"{n}.columns"][:, salient(m.peak)] = 0  # which the factor of no binary column is
    save_file(flat, shipped)
    print(f"{len(rows)} rows, {shipped.stat().st_size / 1e6:.2f} MB of scales")


if __name__ == "__main__":
    main()
