"""A sequential recommender and the shoppers it learns from (see make_recommender.py).

Shoppers draw on known preferences: 12 tastes of 25 items each, 300 items. A shopper has one or two
tastes and keeps to one for a few steps at a time; within a taste an item tends to be followed by
one of three fixed successors; one step in ten is any item, by popularity. So what a latent of the
recommender ought to mean is known: a taste, or a place within one.
"""

import numpy as np
import torch
from torch import Tensor, nn

TASTES, PER_TASTE, LENGTH = 12, 25, 20
ITEMS = TASTES * PER_TASTE


def shoppers(n: int, seed: int) -> Tensor:
    """Sequences of items: int64 [n, LENGTH]. Item i is of taste i // PER_TASTE."""
    world = np.random.default_rng(0)  # the same successors and popularity for every seed
    successors = world.integers(PER_TASTE, size=(ITEMS, 3))
    popular = 1 / np.arange(1, PER_TASTE + 1)
    popular /= popular.sum()
    rng = np.random.default_rng(seed)
    out = np.empty((n, LENGTH), np.int64)
    for row in out:
        own = rng.choice(TASTES, size=rng.integers(1, 3), replace=False)
        taste = rng.choice(own)
        for t in range(LENGTH):
            if rng.random() < 0.15:
                taste = rng.choice(own)
            if rng.random() < 0.1:
                row[t] = rng.integers(ITEMS)
            elif t and row[t - 1] // PER_TASTE == taste and rng.random() < 0.7:
                row[t] = taste * PER_TASTE + rng.choice(successors[row[t - 1]])
            else:
                row[t] = taste * PER_TASTE + rng.choice(PER_TASTE, p=popular)
    return torch.from_numpy(out)


class Recommender(nn.Module):
    """SASRec in small: items and places embedded, two causal blocks, scores by the item table."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2):
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.items.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)

    def state(self, seen: Tensor) -> Tensor:
        """The representation before the prediction: [n, time] items -> [n, time, width]."""
        n = seen.shape[1]
        mask = torch.full((n, n), float("-inf"), device=seen.device).triu(1)
        x = self.items(seen) + self.places.weight[:n]
        return self.norm(self.blocks(x, mask=mask, is_causal=True))

    def forward(self, seen: Tensor, fn=None) -> Tensor:
        """Scores of every item as the next: [n, time, ITEMS]; ``fn`` changes the state first."""
        h = self.state(seen)
        return (h if fn is None else fn(h)) @ self.items.weight.T


def hit_rate(scores: Tensor, target: Tensor, k: int = 10) -> float:
    """HR@k: how often the next item is among the k best. scores [..., ITEMS], target [...]."""
    return float((scores.topk(k, dim=-1).indices == target[..., None]).any(-1).float().mean())
