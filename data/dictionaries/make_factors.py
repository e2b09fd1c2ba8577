"""Steer by SNMF features, dictionary latents and mean differences; eight concepts, three seeds.

Needs topk-<seed>.safetensors of make_dictionaries.py.

    python data/dictionaries/make_factors.py --work FOLDER        # about 4 minutes on one core
writes factors.json beside this file.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import factors as F  # noqa: E402

from lib import dictionaries as D  # noqa: E402
from lib import models  # noqa: E402

LAYER, FEATURES, SEEDS = 15, 100, 3


def prepare(model, tokenizer):
    """Prompts [n, pos] of one length, activations of all sentences, and who they belong to."""
    data = F.concepts()
    ids = [tokenizer(p).input_ids for p in data["prompts"]]
    short = min(map(len, ids))
    prompts = torch.tensor([i[-short:] for i in ids]).to(model.device)
    texts = [s for c in data["concepts"].values() for s in c["sentences"]]
    acts, owner = F.tokens_of(
        model, tokenizer, texts, [f"mlp_hidden.{LAYER}", f"resid_post.{LAYER}"]
    )
    words = {
        name: [tokenizer(f" {w}").input_ids[0] for w in c["words"]]
        for name, c in data["concepts"].items()
    }
    return prompts, acts, owner, words


def split(n_concepts, seed):
    """Which sentences are fitted on: bool [texts], and the concept of each: [texts]."""
    g = torch.Generator().manual_seed(seed)
    fit = torch.cat([torch.randperm(12, generator=g) < F.FIT for _ in range(n_concepts)])
    return fit, torch.arange(n_concepts).repeat_interleave(12)


def directions(acts, owner, fit, concept, sae, down, seed):
    """For every concept, directions in the stream, and AUCs of three scores on held-out texts."""
    hidden, stream = (acts[f"{kind}.{LAYER}"] for kind in ("mlp_hidden", "resid_post"))
    mine = fit[owner]
    Z = F.snmf(hidden[mine].T, FEATURES, seed=seed)[0]
    by_factor = F.by_text(F.coefficients(hidden.T, Z), owner)
    f = D.dense(D.encode(sae, stream, D.topk(32)), len(sae["b_enc"]))
    by_latent = F.by_text(f.T, owner)
    out = []
    for c in range(int(concept.max()) + 1):
        label = concept == c
        own, other = mine & label[owner], mine & ~label[owner]
        gap = hidden[own].mean(0) - hidden[other].mean(0)
        z = F.best_feature(by_factor[:, fit], label[fit])
        i = F.best_feature(by_latent[:, fit], label[fit])
        test = {"SNMF": by_factor[z], "SAE": by_latent[i]}
        test["mean difference"] = F.by_text((gap @ hidden.T)[None], owner)[0]
        way = {"SNMF": down @ Z[:, z], "SAE": sae["W_dec"][i], "mean difference": down @ gap}
        aucs = {name: F.auc(scores[~fit], label[~fit]) for name, scores in test.items()}
        way["mean difference, stream"] = stream[own].mean(0) - stream[other].mean(0)
        out.append((way, aucs))
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    model, tokenizer = models.load("smollm2")
    prompts, acts, owner, words = prepare(model, tokenizer)
    norm = acts[f"resid_post.{LAYER}"].norm(dim=1).mean()
    down = model.model.layers[LAYER].mlp.down_proj.weight
    for seed in args.seeds:
        path = args.work / f"factors-{seed}.done"
        if path.exists():
            continue
        fit, concept = split(len(words), seed)
        sae = load_file(args.work / f"topk-{seed}.safetensors")
        found = directions(acts, owner, fit, concept, sae, down, seed)
        g, rows = torch.Generator().manual_seed(seed), []
        for (way, aucs), (name, ids) in zip(found, words.items(), strict=True):
            way["random"] = torch.randn(len(down), generator=g)
            gains = {
                method: F.steer(model, prompts, ids, f"resid_post.{LAYER}", v, norm)
                for method, v in way.items()
            }
            rows.append({"seed": seed, "concept": name, "gain": gains, "auc": aucs})
            print(seed, name, {k: round(v, 2) for k, v in gains.items()}, aucs, flush=True)
        path.write_text(json.dumps(rows))
    parts = [args.work / f"factors-{seed}.done" for seed in range(SEEDS)]
    if all(part.exists() for part in parts):
        rows = [row for part in parts for row in json.loads(part.read_text())]
        (args.out / "factors.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
