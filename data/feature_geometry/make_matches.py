"""Match the latents of make_saes.py across layers, models and seeds, and keep the numbers.

    python data/feature_geometry/make_matches.py     # after make_saes.py; about 6 minutes; resumes
writes matches.json beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))
from make_lossy import effective  # noqa: E402
from make_saes import LAYERS, WORK, dense, load, stream  # noqa: E402

from lib import checkpoint, matching  # noqa: E402

COMPARED = (0, 5, 11, 13, 15, 29)  # SmolLM2's side of the grid against MiniLM's six layers


def mates(r, alive_a, alive_b, least=0.1):
    """Pairs by activation correlation r [n, m]: every B keeps the A that fits it best.

    As Lan et al. do it: each latent of A takes its best latent of B, pairs below `least` are
    dropped, and of several A that want one B the best stays. Returns indices (a, b).
    """
    r = r.masked_fill(~alive_a[:, None], -1).masked_fill(~alive_b, -1)
    best, b = r.max(1)
    order = best.argsort(descending=True)
    taken, pairs = set(), []
    for a in order.tolist():
        if best[a] >= least and int(b[a]) not in taken:
            taken.add(int(b[a]))
            pairs.append((a, int(b[a])))
    return torch.tensor(pairs).reshape(-1, 2).T


def svcca(x, y, keep=20):
    """Mean canonical correlation of the first `keep` principal directions of x and y [n, d]."""
    parts = []
    for z in (x, y):
        u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        parts.append(u[:, :keep])  # orthonormal columns, so no inverse is needed
    return float(torch.linalg.svdvals(parts[0].T @ parts[1]).mean())


def rsa(x, y):
    """Spearman correlation of the two sets' pairwise cosines, [n, d] each."""
    at = torch.triu_indices(len(x), len(x), 1)
    ranks = []
    for z in (x, y):
        z = torch.nn.functional.normalize(z - z.mean(0), dim=1)
        ranks.append(rankdata((z @ z.T)[at[0], at[1]].numpy()))
    return float(np.corrcoef(*ranks)[0, 1])


def compare(sae_a, sae_b, z_a, z_b, shuffles=5, seed=0, with_rsa=True):
    """Similarity of two dictionaries paired by the codes z [samples, latents] of the same words."""
    alive = [(z > 0).sum(0) >= 5 for z in (z_a, z_b)]
    a, b = mates(matching.correlations(z_a, z_b), *alive)
    x, y = sae_a["W_dec"][a], sae_b["W_dec"][b]
    g = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(b), generator=g) for _ in range(shuffles)]
    found = dict(pairs=len(a), svcca=svcca(x, y))
    found["svcca_shuffled"] = [svcca(x, y[order]) for order in orders]
    if with_rsa:
        found |= dict(rsa=rsa(x, y), rsa_shuffled=[rsa(x, y[order]) for order in orders])
    return found


def fold(sae):
    """Thresholds into the weights (Balagansky et al., eq. 5): every threshold becomes 1."""
    theta = sae["theta"]
    folded = dict(W_enc=sae["W_enc"] / theta[:, None], b_enc=sae["b_enc"] / theta)
    return folded | dict(W_dec=sae["W_dec"] * theta[:, None])


def match(sae_a, sae_b, folded=True):
    """Latent i of A goes with `match(...)[i]` of B: least squared distance of all parameters."""
    a, b = (fold(s) if folded else s for s in (sae_a, sae_b))
    cost = matching.costs(*((a[n], b[n]) for n in ("W_enc", "W_dec", "b_enc")))
    return matching.assign(cost, maximise=False)


def predict(sae_a, sae_b, pairing, z, folded=True):
    """The hidden state at B from codes z [n, latents] at A."""
    if folded:
        z = z / sae_a["theta"]
    moved = torch.zeros_like(z)
    moved[:, pairing] = z
    if folded:
        moved = moved * sae_b["theta"]
    return moved @ sae_b["W_dec"] + sae_b["b_dec"]


def explained(guess, x):
    return float(1 - (guess - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def matched(z_a, z_b, pairing):
    """Mean correlation of matched latents that both fire."""
    both = ((z_a > 0).sum(0) >= 5) & ((z_b > 0).sum(0) >= 5)[pairing]
    r = matching.correlations(z_a, z_b)[torch.arange(len(pairing)), pairing]
    return float(r[both].mean())


def step(layer, seed, rows, above=1):
    """One pair of layers of SmolLM2: how well codes at `layer` say what comes at layer + above."""
    a, b = (load("smollm2", i, seed) for i in (layer, layer + above))
    x_a, x_b = (stream("smollm2", i, "test")[rows] for i in (layer, layer + above))
    z_a, z_b = dense(a, x_a), dense(b, x_b)
    g = torch.Generator().manual_seed(seed)
    pairings = {"folded": match(a, b), "unfolded": match(a, b, folded=False)}
    pairings["random"] = torch.randperm(len(a["theta"]), generator=g)
    pairings["correlation"] = matching.assign(matching.correlations(z_a, z_b))
    found = dict(layer=layer, above=above, seed=seed, copy=explained(x_a, x_b))
    found["own"] = explained(z_b @ b["W_dec"] + b["b_dec"], x_b)
    for name, pairing in pairings.items():
        folded = name not in ("unfolded", "random")
        found[f"r {name}"] = matched(z_a, z_b, pairing)
        found[f"explains {name}"] = explained(predict(a, b, pairing, z_a, folded), x_b)
    if above > 1:  # through the layers in between
        through = [load("smollm2", i, seed) for i in range(layer, layer + above + 1)]
        steps = [match(p, q) for p, q in zip(through, through[1:], strict=False)]
        chained = matching.compose(*steps)
        found["r composed"] = matched(z_a, z_b, chained)
        found["explains composed"] = explained(predict(a, b, chained, z_a), x_b)
        found["same pairs"] = float((chained == pairings["folded"]).float().mean())
    return found


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    path = HERE / "matches.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    rows = torch.arange(0, 48 * 127, 4)  # every fourth held-out token

    def keep(name, value):
        records[name] = value
        path.write_text(json.dumps(records) + "\n")
        print(name, value if len(str(value)) < 300 else "", flush=True)

    if "effective" not in records:
        found = []
        for layer in LAYERS:
            z = dense(load("smollm2", layer), stream("smollm2", layer, "test"))
            found.append(float(effective(z)))
        keep("effective", dict(layer=LAYERS, count=found))
    if "steps" not in records:
        jobs = [(i, 0, 1) for i in LAYERS if i + 1 in LAYERS]
        jobs += [(i, s, 1) for i in (14, 15) for s in (1, 2)] + [(14, s, 2) for s in range(3)]
        keep("steps", [step(layer, seed, rows, above) for layer, seed, above in jobs])
    words = checkpoint.load(WORK / "words.train.safetensors")
    thirds = [torch.arange(i, len(words), 3)[:12000] for i in range(3)]
    if "seeds" not in records:
        found = []
        for seed in range(3):
            a, b = load("smollm2", 15, seed), load("minilm", 3, seed)
            z_a = dense(a, stream("smollm2", 15, "train")[words[thirds[seed]]])
            z_b = dense(b, stream("minilm", 3, "train")[thirds[seed]])
            found.append(compare(a, b, z_a, z_b))
            other = load("smollm2", 15, (seed + 1) % 3)
            z_c = dense(other, stream("smollm2", 15, "train")[words[thirds[seed]]])
            found[-1]["retrained"] = compare(a, other, z_a, z_c)
        keep("seeds", found)
    if "grid" not in records:
        found = []
        saes = [load("minilm", j) for j in range(6)]
        theirs = [stream("minilm", j, "train") for j in range(6)]
        for layer in COMPARED:
            a, x = load("smollm2", layer), stream("smollm2", layer, "train")[words]
            for part, rows in enumerate(thirds):
                z_a = dense(a, x[rows[:3000]])
                for j in range(6):
                    z_b = dense(saes[j], theirs[j][rows[:3000]])
                    one = compare(a, saes[j], z_a, z_b, shuffles=1, with_rsa=False)
                    found.append(dict(layer=layer, other=j, part=part) | one)
        keep("grid", found)


if __name__ == "__main__":
    main()
