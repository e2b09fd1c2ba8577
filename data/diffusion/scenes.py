"""Captioned scenes as the samplers' training sees them: latents, and the text encoder's states.

Made once, in shards of a scratch folder: each holds 16,384 scenes, the wide one 8,192 pictures of
64 × 128 (two scenes side by side under one caption). Float16.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import diffusion, shapes

SHARD, WIDE = 16_384, 8_192
KINDS = (shapes.SHAPES, shapes.COLOURS, shapes.TEXTURES)


def wide(n: int, seed: int):
    """Scenes of two halves: pictures' scenes [(left, right)], and one scene that says both."""
    rng, pairs, said = random.Random(seed), [], []
    lefts = shapes.sample(n, seed, counts=(1, 1), related=0)
    rights = shapes.sample(n, seed + 1, counts=(1, 1), related=0)
    for left, right in zip(lefts, rights, strict=True):
        right = replace(right, background=left.background)
        empty = rng.random()
        if empty < 0.2:
            left = replace(left, things=())
        elif empty < 0.4:
            right = replace(right, things=())
        things = left.things + right.things
        told = ()
        if left.things and right.things and rng.random() < 0.4:
            i, j = rng.randrange(len(left.things)), rng.randrange(len(right.things))
            a, b = things[i], things[len(left.things) + j]
            looks = [(t.shape, t.colour) for t in things]
            alone = all(looks.count((t.shape, t.colour)) == 1 for t in (a, b))
            if alone and abs(a.y - b.y) <= 0.8 * (1 + b.x - a.x) and 1 + b.x - a.x >= 0.24:
                told = ((i, "left of", len(left.things) + j),)
                if rng.random() < 0.5:
                    told = ((len(left.things) + j, "right of", i),)
        pairs.append((left, right))
        said.append(shapes.Scene(things, left.background, told))
    return pairs, said


@torch.no_grad()
def states(captions: list[str], batch: int = 256, whitened: bool = True) -> tuple[Tensor, Tensor]:
    """States float16 [tokens of all captions, 384] without the padding, and where each begins
    int64 [n + 1]; captions that recur are read once."""
    encoder, tokenizer = diffusion.text_encoder(whitened)
    unique = sorted(set(captions), key=lambda c: (len(c), c))
    found: dict[str, Tensor] = {}
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        ids = tokenizer(part, padding=True, truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(ids).last_hidden_state.half()
        for caption, row, length in zip(part, out, (ids != 0).sum(1).tolist(), strict=True):
            found[caption] = row[:length]
    lengths = torch.tensor([len(found[c]) for c in captions])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat([found[c] for c in captions]), start


def scenes_of(seed: int, is_wide: bool):
    """(What is painted, what is said) of a shard: scenes, or pairs of scenes where it is wide."""
    if is_wide:
        return wide(WIDE, 10_000 + seed)
    scenes = shapes.sample(SHARD, 20_000 + seed)
    return scenes, scenes


def make_states(path: Path, seed: int, is_wide: bool) -> None:
    _, said = scenes_of(seed, is_wide)
    rows, begin = states([shapes.caption(scene, seed * SHARD + i) for i, scene in enumerate(said)])
    _write(path, {"states": rows, "begin": begin})


@torch.no_grad()
def make_latents(path: Path, seed: int, is_wide: bool) -> None:
    encoder, latents = diffusion.autoencoder(), []
    painted, _ = scenes_of(seed, is_wide)
    for start in range(0, len(painted), 64):
        part = painted[start : start + 64]
        halves = zip(*part, strict=True) if is_wide else [part]
        pixels = torch.cat([shapes.pictures(half) for half in halves], 3)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(encoder.encode(pixels * 2 - 1).latent_dist.mean.half())
    _write(path, {"latents": torch.cat(latents)})


def layout(scene: shapes.Scene) -> Tensor:
    """What lies where on a grid of 8 × 8: shares of each shape, colour and texture, and of none
    of them, uint8 [21, 8, 8], 255 for all of a cell."""
    _, masks = shapes.draw(scene)
    covers = masks.unflatten(2, (8, 8)).unflatten(1, (8, 8)).mean((2, 4))
    found = []
    for names, kind in zip(KINDS, ("shape", "colour", "texture"), strict=True):
        shares = torch.zeros(len(names) + 1, 8, 8)
        for thing, cover in zip(scene.things, covers, strict=True):
            shares[1 + list(names).index(getattr(thing, kind))] += cover
        shares[0] = 1 - shares.sum(0)
        found.append(shares)
    return (torch.cat(found).clamp(0, 1) * 255).round().byte()


def make_layouts(path: Path, seed: int, is_wide: bool) -> None:
    painted, _ = scenes_of(seed, is_wide)
    if is_wide:
        rows = [torch.cat([layout(half) for half in pair], 2) for pair in painted]
    else:
        rows = [layout(scene) for scene in painted]
    _write(path, {"layouts": torch.stack(rows)})


class Reader(nn.Module):
    """Says from a sampler's inner states what lies where: a second task, in training alone.

    Learning to generate is slow to find out what the words are about; to name what a hidden state
    shows, beside it, speeds that up (as REPA does with a vision model's features, Yu et al.,
    arXiv 2410.06940). Here the scene itself is known.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 21)
        )

    def forward(self, hidden: Tensor, layouts: Tensor) -> Tensor:
        """Cross-entropy, nats a cell, of states [n, places, width] and layouts [n, 21, h, w]."""
        shares = layouts.flatten(2).mT.float() / 255
        loss = hidden.new_zeros((), dtype=torch.float32)
        said = self.layers(hidden).float()
        sizes = [len(names) + 1 for names in KINDS]
        for guess, share in zip(said.split(sizes, 2), shares.split(sizes, 2), strict=True):
            loss = loss - (share * guess.log_softmax(2)).sum(2).mean()
        return loss


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)


@torch.no_grad()
def make_pictures(path: Path, seed: int, is_wide: bool) -> None:
    pixels = shapes.pictures(scenes_of(seed, is_wide)[0])
    _write(path, {"pictures": (pixels * 255).round().byte()})


MAKERS = {"states": make_states, "latents": make_latents, "layouts": make_layouts}


class Batch(NamedTuple):
    """Latents [n, 4, 16, 16 or 32], states [n, TOKENS, 384], their mean [n, 384], float32; layouts
    and, where they were asked for, pictures [n, 3, 64, 64], uint8."""

    latents: Tensor
    text: Tensor
    pooled: Tensor
    layouts: Tensor
    pictures: Tensor | None


class Scenes:
    """``shards`` shards, or the wide one, in ``folder``; made if missing."""

    def __init__(self, folder: Path, shards: int = 1, wide: bool = False, pictures: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.parts = []
        for seed in range(1 if wide else shards):
            part = {}
            for kind, make in (
                MAKERS | {"pictures": make_pictures} if pictures else MAKERS
            ).items():
                path = folder / f"{'wide' if wide else seed}_{kind}.safetensors"
                if not path.exists():
                    make(path, seed, wide)
                part |= load_file(path)
            self.parts.append(part)
        encoder, tokenizer = diffusion.text_encoder()
        ids = tokenizer("", return_tensors="pt").input_ids
        self.empty = encoder(ids).last_hidden_state[0]

    def batch(self, n: int, g: torch.Generator, drop: float = 0.1) -> Batch:
        """Scenes of one shard at random; the caption of ``drop`` of them is empty, for guidance."""
        which = torch.randint(len(self.parts), (1,), generator=g).item()
        part = self.parts[which]
        rows = torch.randint(len(part["latents"]), (n,), generator=g)
        gone = torch.rand(n, generator=g) < drop
        text, pooled = torch.zeros(n, diffusion.TOKENS, 384), torch.zeros(n, 384)
        for i, row in enumerate(rows.tolist()):
            a, b = part["begin"][row : row + 2].tolist()
            own = self.empty if gone[i] else part["states"][a:b].float()
            text[i, : len(own)] = own
            pooled[i] = own.mean(0)
        pictures = part["pictures"][rows] if "pictures" in part else None
        return Batch(part["latents"][rows].float(), text, pooled, part["layouts"][rows], pictures)
