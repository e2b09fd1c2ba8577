"""Make text.safetensors: what whitens the text encoder's states over captions of the shapes world.

    python data/diffusion/make_text.py

A quarter of a state's energy is one vector that all words share, and a few directions hold most of
the rest. Behind ``(state − mean) · whiten`` every direction of the captions is as long as any other
(the shortest, under a tenth of the mean variance, are shrunk), so that a sampler tells words apart
from its first steps on.
"""

import torch
from safetensors.torch import save_file
from scenes import SHARD, states
from training import HERE

from lib import shapes

FLOOR = 0.1  # of the mean variance

if __name__ == "__main__":
    captions = [shapes.caption(s, i) for i, s in enumerate(shapes.sample(SHARD, 10))]
    rows = states(captions, whitened=False)[0].double()
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(rows.T))
    whiten = axes @ torch.diag((variances + FLOOR * variances.mean()).rsqrt()) @ axes.T
    save_file(
        {"mean": mean.half(), "whiten": whiten.half().contiguous()}, HERE / "text.safetensors"
    )
    (HERE / "text.safetensors").chmod(0o644)
