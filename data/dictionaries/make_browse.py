"""Passages of Moby Dick that excite latents of the TopK dictionary most, for the browser.

Latents are taken where the automatic label of the chapter is easy and where it is not: 40 drawn
evenly from those that speak for 0.05 to 5 % of tokens, in the order of their rates.

    python data/dictionaries/make_browse.py --activations FOLDER      # a minute
writes browse.json beside this file, from topk.safetensors.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from make_dictionaries import SITE, K  # noqa: E402

from lib import dictionaries as D  # noqa: E402
from lib import models  # noqa: E402

LATENTS, PASSAGES, BEFORE, AFTER = 40, 6, 10, 4


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    sae = D.unpack(load_file(args.out / "topk.safetensors"))
    tokenizer = models.load("smollm2")[1]
    acts, ids = [], []
    for path in sorted(args.activations.glob("train-*.safetensors")):
        piece = load_file(path)
        x = piece[SITE].float()
        flat = x.flatten(0, 1)
        f = D.dense(D.encode(sae, flat, D.topk(K)), len(sae["b_enc"]))
        f[~D.ordinary(flat)] = 0
        acts.append(f.half().view(*x.shape[:2], -1))
        ids.append(piece["ids"])
    f, ids = torch.cat(acts), torch.cat(ids)
    rate = (f > 0).flatten(0, 1).float().mean(0)
    fit = ((rate > 5e-4) & (rate < 0.05)).nonzero().flatten()
    fit = fit[rate[fit].argsort()]
    chosen = fit[torch.linspace(0, len(fit) - 1, LATENTS).long()].tolist()
    rows = []
    for latent in chosen:
        own = f[..., latent].float()
        peak, where = own.max(1)
        passages = []
        for p in peak.topk(PASSAGES).indices.tolist():
            at = int(where[p])
            part = slice(max(0, at - BEFORE), at + AFTER + 1)
            passages.append({
                "tokens": [tokenizer.decode([t]) for t in ids[p, part].tolist()],
                "values": [round(v, 1) for v in own[p, part].tolist()],
            })  # fmt: skip
        rows.append({"latent": latent, "rate": round(float(rate[latent]), 5), "passages": passages})
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    (args.out / "browse.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
