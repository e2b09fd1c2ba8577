"""Split the error of the TopK dictionaries into a linear and a nonlinear part; three seeds.

Needs the activations of make_activations.py and what make_dictionaries.py left in its --work.

    python data/dictionaries/make_dark.py --activations FOLDER --work FOLDER     # 6 minutes
writes dark.json (measures) and dark.safetensors (the linear map of the first seed) beside this.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import choices  # noqa: E402
import make_activations  # noqa: E402
from make_dictionaries import EARLIER, MOST, SEEDS, SITE, SPLICED, K, M  # noqa: E402

from lib import dictionaries as D  # noqa: E402
from lib import models  # noqa: E402

PURSUED, TESTED, FITTED = 4000, 1000, 25_000  # tokens


def ridge(x, y, weight=1e-4):
    """The affine map [d + 1, e] that predicts y from x in least squares."""
    one = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    gram = one.T @ one
    gram += weight * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, one.T @ y.double()).float()


def apply(x, map):
    return x @ map[:-1] + map[-1]


def r2(y, guess):
    """Explained share of the variance of y [n] or [n, d]."""
    return 1 - float((y - guess).square().sum() / (y - y.mean(0)).square().sum())


def pursue(sae, x, k=K):
    """Gradient pursuit: k latents one by one, all values moved along the gradient after each.

    At inference, with the decoder alone; x [n, d]. Returns the reconstruction.
    """
    u = x / sae["scale"] - sae["b_dec"]
    W, n = sae["W_dec"], torch.arange(len(x))
    f = u.new_zeros(len(u), len(W))
    mask = torch.zeros_like(f, dtype=torch.bool)
    residual = u
    for _ in range(k):
        slope = residual @ W.T
        mask[n, slope.masked_fill(mask, -torch.inf).argmax(1)] = True
        move = torch.where(mask, slope, 0)
        reach = move @ W
        step = (move * slope).sum(1) / reach.square().sum(1).clamp(min=1e-8)
        f = (f + step[:, None] * move).clamp(min=0)
        residual = u - f @ W
    return (f @ W + sae["b_dec"]) * sae["scale"]


def measure(seed, data, work, model):
    saes = {
        name: load_file(work / f"{name}-{seed}.safetensors") for name in ("topk", "half", "earlier")
    }
    choice = D.topk(K)
    x, held = data["x"][:FITTED], data["held"]
    row, norms_of = {}, {}
    for name in ("half", "topk"):
        e, e_held = (z - D.reconstruct(saes[name], z, choice) for z in (x, held))
        map = ridge(x, e)
        nonlinear = e_held - apply(held, map)
        by_norm = ridge(x, e.square().sum(1, keepdim=True))
        norms_of[name] = e_held.norm(dim=1)
        row[name] = {
            "m": len(saes[name]["b_enc"]),
            "fvu": 1 - D.explained_variance(held, held - e_held),
            "r2_vector": r2(e_held, apply(held, map)),
            "r2_norm": r2(e_held.square().sum(1, keepdim=True), apply(held, by_norm)),
            "fvu_nonlinear": float(nonlinear.square().sum() / (held - held.mean(0)).square().sum()),
        }
    both = torch.stack([norms_of["half"], norms_of["topk"]])
    row["r_half_topk"] = float(torch.corrcoef(both)[0, 1])
    sae = saes["topk"]
    row |= spliced(sae, map, choice, data, model)
    afa = load_file(work / f"afa-{seed}.safetensors")
    for name, one, way in (("topk", sae, choice), ("afa", afa, choices.top_afa(MOST))):
        row[f"{name}_norm_gap"], row[f"{name}_epsilon"] = norms(one, way, held)
    # Dictionaries of the two parts of the error.
    for name, parts in {
        "linear": (apply(x, map), apply(held, map)),
        "nonlinear": (e - apply(x, map), nonlinear),
    }.items():
        small, _ = D.train(parts[0], M // 4, choice, steps=200, seed=seed)
        row[f"ev_on_{name}"] = D.explained_variance(
            parts[1], D.reconstruct(small, parts[1], choice)
        )
    # Two remedies, on the same few tokens, against the encoder as it is.
    fit, test = x[:PURSUED], held[:TESTED]
    early = [
        D.reconstruct(saes["earlier"], z, choice)
        for z in (data["x_earlier"][:PURSUED], data["held_earlier"][:TESTED])
    ]
    ways = {"encoder": D.reconstruct, "pursuit": lambda sae, z, choice: pursue(sae, z)}
    variance = (test - test.mean(0)).square().sum()
    for way, back in ways.items():
        errors = [z - back(sae, z, choice) for z in (fit, test)]
        left = errors[1] - apply(test, ridge(fit, errors[0], 1e-2))
        row[f"{way}_fvu"] = float(errors[1].square().sum() / variance)
        row[f"{way}_nonlinear"] = float(left.square().sum() / variance)
        if way == "encoder":
            both = [torch.cat(pair, 1) for pair in zip((fit, test), early, strict=True)]
            left = errors[1] - apply(both[1], ridge(both[0], errors[0], 1e-2))
            row["earlier_nonlinear"] = float(left.square().sum() / variance)
    return row, map


def norms(sae, choice, x):
    """Mean |‖f‖ / ‖u − b‖ − 1| over tokens, and the least ε that the norms of f and x̂ allow."""
    chosen = D.encode(sae, x, choice)

    def total(v):
        return torch.segment_reduce(v, "sum", offsets=chosen.starts, initial=0)

    square, one = total(chosen.values.square()), total(chosen.values)
    u = x / sae["scale"] - sae["b_dec"]
    back = D.decode(sae, chosen) / sae["scale"] - sae["b_dec"]
    gap = (square.sqrt() / u.norm(dim=1) - 1).abs().mean()
    least = (back.square().sum(1) - square).abs() / (one.square() - square).clamp(min=1e-6)
    return gap.item(), least.mean().item()


def spliced(sae, map, choice, data, model):
    """Losses with the whole error, and with either part of it alone left in."""
    ids = data["ids"][:SPLICED]

    def leave(part):
        def fn(x):
            flat = x.flatten(0, -2).clone()
            keep = D.ordinary(flat)
            own = flat[keep]
            back, linear = D.reconstruct(sae, own, choice), apply(own, map)
            flat[keep] = {"linear": own - linear, "nonlinear": back + linear, "all": back}[part]
            return flat.view_as(x)

        return fn

    parts = ("all", "linear", "nonlinear")
    return {
        f"loss_{p}": D.spliced_loss(model, ids, SITE, leave(p), batch=SPLICED).mean().item()
        for p in parts
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    load, folder = make_activations.load, args.activations
    data = {"ids": torch.cat([load_file(p)["ids"] for p in sorted(folder.glob("held-*"))]).long()}
    for name, split in (("x", "train"), ("held", "held")):
        whole = load(folder, SITE, split, FITTED + 1000)
        keep = D.ordinary(whole)
        data[name] = whole[keep]
        early = "x_earlier" if name == "x" else "held_earlier"
        data[early] = load(folder, EARLIER, split, FITTED + 1000)[keep]
    model = models.load("smollm2")[0]
    for seed in args.seeds:
        path = args.work / f"dark-{seed}.done"
        if path.exists():
            continue
        row, map = measure(seed, data, args.work, model)
        if not seed:
            save_file({"map": map.half().contiguous()}, args.out / "dark.safetensors")
        path.write_text(json.dumps(row))
        print(seed, row, flush=True)
    if not all((args.work / f"dark-{s}.done").exists() for s in range(SEEDS)):
        return
    rows = [json.loads((args.work / f"dark-{s}.done").read_text()) for s in range(SEEDS)]
    (args.out / "dark.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
