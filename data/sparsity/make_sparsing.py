"""What the Sparsing Law (Luo et al., arXiv 2411.02335) is tested on: sparsing_*.json.

    python data/sparsity/make_sparsing.py train 0      # every small model of one seed, resumable
    python data/sparsity/make_sparsing.py smollm2 0    # four rules on SmolLM2, one draw of passages
    python data/sparsity/make_sparsing.py table        # sparsing_results.json of what is there

The small models are byte-level Llamas of ``small_lm``, trained at a constant rate (the paper
measures before any decay) and measured on the way. One idle thread: 6 minutes a seed,
then one.
"""

import argparse
import json
import math
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import small_lm
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, datasets, hooks, metrics, models  # noqa: E402

WATCHED = (25, 50, 100, 150, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1500, 1800, 2100, 2400)
GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # CETTs at which shares are stored
WIDTHS = ((32, 16), (64, 4), (96, 2), (128, 1))  # width, layers: some 260,000 weights in the blocks
SCALES = ((32, 2), (64, 4))  # one width-depth ratio, 8 times the weights
FAMILY = {(32, 2, "relu"): 2400, (32, 2, "silu"): 2400}  # how many steps each is trained for
FAMILY |= {(width, layers, "relu"): 400 for width, layers in ((32, 16), (96, 2), (128, 1))}
FAMILY |= {(64, 4, "relu"): 800, (64, 4, "silu"): 800}


# --- the metric -----------------------------------------------------------------------------------


def mlps(model) -> list:
    return [m for m in model.modules() if hasattr(m, "down_proj")]


@torch.no_grad()
def cett_curve(
    h: Tensor, down: Tensor, levels: int = 40, top: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and the cumulative error of tail truncation at each, for one layer.

    Args:
        h: what the down projection reads, [tokens, d_mlp].
        down: its weight [d_model, d_mlp].
        levels: how many quantiles; evenly spaced, or with ``top`` > 1 denser towards the longest.

    Returns:
        eps [levels], quantiles of ‖n_i‖ over neurons and tokens, rising from 0; cett [levels], the
        mean over tokens of ‖Σ_{‖n_i‖ < ε} n_i‖ / ‖Σ n_i‖.
    """
    size = h.abs() * down.norm(dim=0)
    whole = (h @ down.T).norm(dim=-1).clamp_min(1e-9)
    values = size[size > 0].sort().values
    at = torch.linspace(0, len(values) - 1, levels, dtype=torch.float64)
    if top > 1:
        at = (1 - (1 - at / at[-1]) ** top) * at[-1]
    at = at.long()
    eps = values[at]
    eps[0] = 0.0
    cett = [((h * (size < e)) @ down.T).norm(dim=-1).div(whole).mean().item() for e in eps]
    return eps.cpu().numpy(), np.maximum.accumulate(cett)


@contextmanager
def skipping(model, rule: str, cuts: list):
    """Leave neurons out of every MLP and count those that stay.

    ``"neuron"`` drops i where ‖n_i‖ = |h_i| ‖w_down,i‖ < cuts[layer] (CETT's rule); ``"value"``
    where |a_i| = |act(W_gate x)_i| < cuts[layer] (FAT-ε, where all cuts are equal); ``"top-k"``
    keeps the share cuts[layer] of the largest |a_i| of each token; ``"neuron top-k"`` of ‖n_i‖.

    Yields:
        a list that fills with one share of kept neurons a layer and forward; zeros are not kept.
    """
    kept = []

    def skip(x, scale, cut):
        size = x.abs() * scale
        if rule.endswith("top-k"):
            cut = size.topk(max(1, round(cut * size.shape[-1])), dim=-1).values[..., -1:]
        keep = (size >= cut) & (size > 0)
        kept.append(keep.float().mean().item())
        return x * keep

    with ExitStack() as stack:
        for mlp, cut in zip(mlps(model), cuts, strict=True):
            if rule.startswith("neuron"):
                scale = mlp.down_proj.weight.detach().norm(dim=0)
                handle = mlp.down_proj.register_forward_pre_hook(
                    lambda _, args, scale=scale, cut=cut: skip(args[0], scale, cut)
                )
            else:
                handle = mlp.act_fn.register_forward_hook(
                    lambda _, args, out, cut=cut: skip(out, 1.0, cut)
                )
            stack.callback(handle.remove)
        yield kept


def cuts_at(cett: float, curves: list) -> list[float]:
    """The threshold of every layer at which its error is ``cett``."""
    return [float(np.interp(cett, c, e)) for e, c in curves]


def ppl_sparsity(loss, model, curves, percents=(1,), rounds: int = 9) -> list[dict]:
    """CETT-PPL-p%: the largest CETT at which perplexity rises by at most p %, by bisection.

    Args:
        loss: ``loss()``, the mean next-token loss of ``model`` in nats.
        curves: ``cett_curve`` of every layer.

    Returns:
        for every p: {"p", "cett", "share"}, the share of neurons kept.
    """
    dense, found = loss(), []
    for p in percents:
        low, high, share = 0.0, 1.0, None
        for _ in range(rounds):
            cett = (low + high) / 2
            with skipping(model, "neuron", cuts_at(cett, curves)) as kept:
                fits = loss() <= dense + math.log1p(p / 100)
            if fits:
                low, share = cett, float(np.mean(kept))
            else:
                high = cett
        if share is None:
            with skipping(model, "neuron", [0.0] * len(curves)) as kept:
                loss()
            share = float(np.mean(kept))
        found.append({"p": p, "cett": round(low, 5), "share": round(share, 5)})
    return found


@torch.no_grad()
def curves_of(model, ids: Tensor, levels: int = 40, top: int = 1) -> list:
    """``cett_curve`` of every layer on ids [n, pos]."""
    h = hooks.read(model, ids, ["mlp_hidden"])
    downs = [m.down_proj.weight for m in mlps(model)]
    pairs = zip(h.values(), downs, strict=True)
    return [cett_curve(x.flatten(0, 1), w, levels, top) for x, w in pairs]


# --- small models ---------------------------------------------------------------------------------


def measured(model, test: Tensor, percents=(1,)) -> dict:
    """Loss, PPL-p% shares and, for ReLU, the share that is not zero anyway; test [n, pos + 1]."""
    model.eval()

    @torch.no_grad()
    def loss():
        return small_lm.loss_of(model, test).item()

    curves, shares = curves_of(model, test[:, :-1]), []
    found = ppl_sparsity(loss, model, curves, percents)
    for cett in GRID:
        with skipping(model, "neuron", cuts_at(cett, curves)) as kept:
            loss()
        shares.append(round(float(np.mean(kept)), 5))
    with skipping(model, "value", [0.0] * len(mlps(model))) as kept:
        value = loss()
    row = {"loss": round(value, 5), "nonzero": round(float(np.mean(kept)), 5), "shares": shares}
    row |= {f"share{r['p']}": r["share"] for r in found} | {
        f"cett{r['p']}": r["cett"] for r in found
    }
    return row


def grow(shape: tuple, seed: int, ids: Tensor, test: Tensor, scratch: Path) -> None:
    """Train one model at a constant rate after a warm-up; keeps rows and weights in ``scratch``."""
    width, layers, act = shape
    stem = f"{act}_{width}x{layers}_{seed}"
    if (scratch / f"{stem}.json").exists():
        return
    model = small_lm.llama(width, layers, 4 * width, act, seed)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    state, first, rows = scratch / f"{stem}.safetensors", 0, []
    if state.exists():
        kept = checkpoint.load(state)
        first, rows = kept["step"], kept["rows"]
        model.load_state_dict(kept["model"])
        groups = opt.state_dict()["param_groups"]
        opt.load_state_dict({"state": kept["opt"], "param_groups": groups})
    steps = FAMILY[shape]
    for step in range(first, steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30)
        model.train()
        loss = small_lm.loss_of(model, small_lm.pieces(ids, 16, seed * 1_000_003 + step))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step + 1 in WATCHED:
            last = step + 1 == steps
            row = {"width": width, "layers": layers, "act": act, "seed": seed, "step": step + 1}
            rows.append(row | measured(model, test, (1, 5, 10) if last else (1,)))
            tree = {"step": step + 1, "rows": rows, "model": dict(model.state_dict())}
            checkpoint.save(state, tree | {"opt": opt.state_dict()["state"]})
    print(rows[-1], flush=True)
    (scratch / f"{stem}.json").write_text(json.dumps(rows))


def train(seed: int, scratch: Path) -> None:
    ids, rest = small_lm.corpus()
    test = small_lm.pieces(rest, 16, 4321)
    for shape in FAMILY:
        grow(shape, seed, ids, test, scratch)


# --- SmolLM2 --------------------------------------------------------------------------------------

CETTS = (0.05, 0.1, 0.15, 0.2)  # above, 20 quantiles are too coarse for the last layers
KEPT = (0.8, 0.65, 0.5, 0.35)


@torch.no_grad()
def rules(seed: int) -> list[dict]:
    """Loss and share of four rules on SmolLM2; thresholds, shares and losses on the same text, as
    in the paper: 2 held-out passages of 128 tokens."""
    model, tokenizer = models.load("smollm2")
    ids = datasets.passages(tokenizer, "held out", 2, 128, seed=100 + seed)
    dense = float(np.mean(metrics.losses(model, ids)))
    rows = [{"rule": "dense", "seed": seed, "knob": 0.0, "loss": round(dense, 5), "share": 1.0}]
    layers = mlps(model)
    curves = curves_of(model, ids, levels=20)
    x = hooks.read(model, ids, ["mlp_in"]).values()
    values = torch.cat(
        [m.act_fn(m.gate_proj(v)).abs().flatten() for m, v in zip(layers, x, strict=True)]
    )
    values = values.sort().values
    plans = [("CETT", "neuron", c, cuts_at(c, curves)) for c in CETTS]
    plans += [("top-k", "top-k", k, [k] * len(layers)) for k in KEPT]
    plans += [("neuron top-k", "neuron top-k", k, [k] * len(layers)) for k in KEPT]
    for k in KEPT:
        eps = values[int((1 - k) * len(values))].item()
        plans.append(("FAT-ε", "value", round(eps, 6), [eps] * len(layers)))
    for name, rule, knob, cuts in plans:
        with skipping(model, rule, cuts) as kept:
            loss = float(np.mean(metrics.losses(model, ids)))
        share = round(float(np.mean(kept)), 5)
        rows.append(
            {"rule": name, "seed": seed, "knob": knob, "loss": round(loss, 5), "share": share}
        )
        print(rows[-1], flush=True)
    return rows


def table(scratch: Path) -> None:
    """sparsing_results.json: {"small": rows, "smollm2": rows} of what ``scratch`` holds."""
    family = [f"{act}_{width}x{layers}" for width, layers, act in FAMILY]
    found = {
        "grid": GRID,
        "small": [r for f in family for p in sorted(scratch.glob(f"{f}_?.json")) for r in read(p)],
        "smollm2": [r for p in sorted(scratch.glob("smollm2_?.json")) for r in read(p)],
    }
    text = json.dumps(found, ensure_ascii=False).replace("}, {", "},\n{")
    (HERE / "sparsing_results.json").write_text(text + "\n")
    print({k: len(v) for k, v in found.items()})


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "smollm2", "table"))
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sparsity_sparsing"
    )
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        train(args.seed, args.scratch)
    elif args.what == "table":
        table(args.scratch)
    elif not (path := args.scratch / f"smollm2_{args.seed}.json").exists():
        path.write_text(json.dumps(rules(args.seed)))


if __name__ == "__main__":
    main()
