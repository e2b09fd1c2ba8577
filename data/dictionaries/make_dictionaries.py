"""Train the dictionaries of the chapter and measure them on held-out passages.

Six variants, one of half the size and one of block 12, three seeds each, on activations after block
15 that make_activations.py captured. Every (variant, seed) is kept in --work when it is done, so an
interrupted run goes on; --collect then writes, beside this file, variants.json (all measures)
and <variant>.safetensors (the first seed of four, int8 with a step a row).

    python data/dictionaries/make_dictionaries.py --activations FOLDER --work FOLDER
    python data/dictionaries/make_dictionaries.py --work FOLDER --collect

About 15 minutes on one core.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import choices  # noqa: E402
import make_activations  # noqa: E402

from lib import dictionaries as D  # noqa: E402
from lib import hooks, models  # noqa: E402

SITE, EARLIER, M, K, SEEDS = "resid_post.15", "resid_post.12", 1152, 32, 3
STEPS, MOST, NORM = 400, 128, 0.002  # steps; most latents and weight of L_AFA in top-AFA
SPLICED = 8  # held-out passages in which the loss is measured
SHIPPED = ("topk", "gradient", "mutual", "afa")
VARIANTS = ("topk", "gradient", "mutual", "feature", "zipf", "half", "earlier", "afa")


def fit(variant, data, seed):
    """One dictionary: (sae, choice it is used with, choice that needs the gradient or None)."""
    x, g = data["x"], data["g"]
    common = dict(steps=STEPS, seed=seed)
    if variant == "gradient":
        sae, log = D.train(x, M, choices.by_gradient(K), extra=g, **common)
        return sae, log, D.topk(K)
    if variant in ("mutual", "zipf"):
        weak = choices.zipf_weak if variant == "zipf" else None
        sae, log = D.train(x, M, D.mutual(K), weak=weak, **common)
        return sae, log, D.mutual(K)
    if variant == "feature":  # half of the steps by mutual choice, then budgets on Zipf's law
        sae, log = D.train(
            x, M, D.mutual(K), weak=choices.zipf_weak, **common | {"steps": STEPS // 2}
        )
        share = choices.zipf_shares(log["rate"], K)
        choice = D.by_latent(share)
        sae, log = D.train(x, M, choice, begin=sae, **common | {"steps": STEPS // 2})
        return sae | {"share": share}, log, choice
    if variant == "afa":

        def penalty(sae, u, chosen):
            return NORM * choices.norm_gap(u, chosen, sae["b_dec"]).mean()

        sae, log = D.train(x, M, choices.top_afa(MOST), penalty=penalty, batch=512, **common)
        return sae, log, choices.top_afa(MOST)
    m = M // 2 if variant == "half" else M
    sae, log = D.train(data["x_earlier"] if variant == "earlier" else x, m, D.topk(K), **common)
    return sae, log, D.topk(K)


def measure(variant, sae, choice, data, model):
    """What variants.json keeps of one dictionary."""
    held = data["held_earlier"] if variant == "earlier" else data["held"]
    chosen = D.encode(sae, held, choice)
    back, rate = D.decode(sae, chosen), D.rates(chosen, len(sae["b_enc"]))
    per_token = chosen.starts.diff().float()
    row = {
        "m": len(sae["b_enc"]),
        "ev": D.explained_variance(held, back),
        "l0": D.l0(chosen),
        "l0_sd": per_token.std().item(),
        "dead": (rate == 0).float().mean().item(),
        "rate": [round(r, 6) for r in rate.sort(descending=True).values.tolist()],
    }
    if variant in ("topk", "gradient"):
        ids = data["ids"][:SPLICED]
        g = data["held_g"][: ids[:, 1:].numel()]
        for name, fn in {
            "spliced": D.splice(sae, choice),
            "spliced_by_gradient": D.splice(sae, choices.by_gradient(K), g),
        }.items():
            row[name] = D.spliced_loss(model, ids, SITE, fn, batch=SPLICED).mean().item()
        row["steering"] = steering(model, sae, rate, data["ids"][SPLICED:])
    return row


@torch.inference_mode()
def steering(model, sae, rate, ids, n_latents=24, n_contexts=4, length=12, strength=0.5):
    """Mean KL (nats) from the plain next-token distribution when a latent's direction is added.

    The same length for all latents: ``strength`` times the mean centred norm of a token, at the
    last position of contexts that have nothing to do with the latent.
    """
    alive = (rate > 0).nonzero().flatten()
    picked = alive[
        torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))[:n_latents]
    ]
    contexts = ids[:n_contexts, :length].to(model.device)
    plain = model(contexts).logits[:, -1].log_softmax(-1)
    length_added = strength * sae["scale"] * sae["W_dec"].shape[1] ** 0.5
    kls = []
    for latent in picked.tolist():
        with hooks.edit(model, SITE, hooks.add(length_added * sae["W_dec"][latent]), positions=-1):
            moved = model(contexts).logits[:, -1].log_softmax(-1)
        kls.append((plain.exp() * (plain - moved)).sum(-1).mean().item())
    return sum(kls) / len(kls)


def collect(work, out):
    rows = {}
    for path in sorted(work.glob("*.json")):
        variant, _, seed = path.stem.rpartition("-")
        rows.setdefault(variant, {})[seed] = json.loads(path.read_text())
    (out / "variants.json").write_text(json.dumps(rows, indent=None, separators=(",", ":")) + "\n")
    for variant in SHIPPED:
        save_file(
            D.pack(load_file(work / f"{variant}-0.safetensors")), out / f"{variant}.safetensors"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after so long")
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.work, args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    load, folder = make_activations.load, args.activations
    data = {
        "x": load(folder, SITE), "g": load(folder, "gradient"), "x_earlier": load(folder, EARLIER),
    }  # fmt: skip
    keep = D.ordinary(data["x"])
    data = {name: x[keep] for name, x in data.items()}
    whole, data["held_g"] = load(folder, SITE, "held"), load(folder, "gradient", "held")
    keep = D.ordinary(whole)
    data["held"], data["held_earlier"] = whole[keep], load(folder, EARLIER, "held")[keep]
    data["ids"] = torch.cat([load_file(p)["ids"] for p in sorted(folder.glob("held-*"))]).long()
    model = models.load("smollm2")[0]
    base = args.work / "base-0.json"
    if not base.exists():
        ids, mean = data["ids"][:SPLICED], data["x"].mean(0)

        def to_mean(x):
            return torch.where(D.ordinary(x)[..., None], mean, x)

        row = {
            "whole": D.spliced_loss(model, ids, SITE).mean().item(),
            "ablated": D.spliced_loss(model, ids, SITE, to_mean).mean().item(),
            "tokens": len(data["x"]),
            "held_tokens": len(data["held"]),
        }
        base.write_text(json.dumps(row))
    for seed in args.seeds:
        for variant in args.variants:
            path = args.work / f"{variant}-{seed}.json"
            if path.exists():
                continue
            if time.monotonic() - began > 60 * args.minutes:
                return
            sae, log, choice = fit(variant, data, seed)
            row = measure(variant, sae, choice, data, model)
            save_file({k: v.contiguous() for k, v in sae.items()}, path.with_suffix(".safetensors"))
            path.write_text(json.dumps(row))
            shown = {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
            print(variant, seed, shown, f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
