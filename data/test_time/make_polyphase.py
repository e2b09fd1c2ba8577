"""Makes polyphase_runs.json and polyphase_nets.safetensors: small vision transformers on garments
in a frame with room to move, plain and with polyphase anchoring (after Ding et al., arXiv
2306.07470), and what shifts, crops, flips and affine maps do to their answers.

    python make_polyphase.py [--scratch DIR] [--seconds 340]

Resumable: a run that is cut off goes on where it stopped. About ten minutes of one thread.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import vision

HERE = Path(__file__).parent
SIDE, ROOM, PATCH = 32, 6, 8  # pixels: the frame, the black rim around a garment, a patch
SEEDS = (0, 1, 2)
EPOCHS = 6
VARIANTS = {  # what each network is made with
    "plain": dict(kind="vit"),
    "plain, shifted in training": dict(kind="vit"),
    "anchoring alone": dict(kind="vit", anchored=True),
    "convolution alone": dict(kind="vit", circular=True),
    "anchored": dict(kind="vit", anchored=True, circular=True),
    "Twins": dict(kind="twins"),
    "anchored Twins": dict(kind="twins", anchored=True, circular=True),
}


# --- the method ---------------------------------------------------------------------------------


def polyphase_norms(x: Tensor, p: int) -> Tensor:
    """Squared L2 norm of each of the p² polyphases of x [n, h, w, c]: [n, p²], in float64."""
    n, h, w, c = x.shape
    grid = x.detach().double().reshape(n, h // p, p, w // p, p, c)
    return grid.square().sum((1, 3, 5)).flatten(1)


def anchor(x: Tensor, p: int) -> Tensor:
    """Polyphase anchoring: roll each map of x [n, h, w, c] so that, of its p² polyphases (every
    p-th row and column), the one of largest norm comes to stand at the corners of the patches."""
    at = polyphase_norms(x, p).argmax(1)
    return rolled(x, -(at // p), -(at % p))


def rolled(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """x [n, h, w, c], each map rolled by its own ``down`` [n] and ``right`` [n], circularly."""
    n, h, w, _ = x.shape
    rows = (torch.arange(h) - down[:, None]) % h
    columns = (torch.arange(w) - right[:, None]) % w
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def patches(x: Tensor, p: int) -> Tensor:
    """x [n, h, w, c] in patches of p × p: [n, h / p, w / p, p² c]."""
    n, h, w, c = x.shape
    cut = x.reshape(n, h // p, p, w // p, p, c).transpose(2, 3)
    return cut.reshape(n, h // p, w // p, p * p * c)


class Places(nn.Module):
    """Position by a depth-wise 3 × 3 convolution that is added to the map [n, h, w, c]."""

    def __init__(self, width: int, circular: bool):
        super().__init__()
        mode = "circular" if circular else "zeros"
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention and MLP on a map [n, h, w, c]. ``reach`` 1: all tokens see all; ``window``: each
    sees its window of reach × reach; ``subsampled``: all see one key for each reach × reach."""

    def __init__(self, width: int, heads: int, kind="all", reach=1, anchored=False):
        super().__init__()
        self.heads, self.kind, self.reach, self.anchored = heads, kind, reach, anchored
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.subsample = nn.Linear(reach * reach * width, width) if kind == "subsampled" else None
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.anchored and self.reach > 1:
            x = anchor(x, self.reach)
        n, h, w, c = x.shape
        tokens = self.norm1(x)
        seen = self.subsample(patches(tokens, self.reach)) if self.subsample else tokens
        if self.kind == "window":
            tokens = patches(tokens, self.reach).reshape(-1, self.reach**2, c)
            seen = tokens
        tokens = tokens.reshape(*(tokens.shape[:1] if self.kind == "window" else (n,)), -1, c)
        seen = seen.reshape(len(tokens), -1, c)
        split = (self.heads, c // self.heads)
        q = self.query(tokens).unflatten(-1, split).transpose(1, 2)
        k, v = (
            t.unflatten(-1, split).transpose(1, 2) for t in self.key_value(seen).chunk(2, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.kind == "window":
            r = self.reach
            mixed = mixed.reshape(n, h // r, w // r, r, r, c).transpose(2, 3)
        x = x + self.out(mixed.reshape(n, h, w, c))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """A small vision transformer on images [n, 1, 32, 32], its tokens averaged into the logits.

    Args:
        kind: ``"vit"`` (16 tokens, three blocks of full attention) or ``"twins"`` (64 tokens with
            window and subsampled attention, then 16 tokens with the same).
        anchored: polyphase anchoring before every patch embedding and subsampled attention.
        circular: the depth-wise convolution wraps round. A plain ``vit`` has learned positions in
            its place; a plain ``twins`` has the convolution, padded with zeros.
    """

    def __init__(self, kind="vit", anchored=False, circular=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.anchored = anchored
        stages = [(PATCH, 48, 4, [("all", 1)] * 3)]
        if kind == "twins":
            two = [("window", 4), ("subsampled", 2)], [("window", 2), ("subsampled", 2)]
            stages = [(4, 32, 2, two[0]), (2, 64, 4, two[1])]
        self.cuts = [cut for cut, *_ in stages]
        self.embed, self.norms, self.places, self.stages = (nn.ModuleList() for _ in range(4))
        before, side, self.position = 1, SIDE, None
        for cut, width, heads, blocks in stages:
            side //= cut
            self.embed.append(nn.Linear(cut * cut * before, width))
            self.norms.append(nn.LayerNorm(width))
            learned = kind == "vit" and not circular
            self.places.append(nn.Identity() if learned else Places(width, circular))
            if learned:
                self.position = nn.Parameter(0.02 * torch.randn(side, side, width))
            self.stages.append(
                nn.ModuleList(Block(width, heads, what, r, anchored) for what, r in blocks)
            )
            before = width
        self.norm, self.head = nn.LayerNorm(before), nn.Linear(before, 10)

    def features(self, x: Tensor) -> Tensor:
        """The map of the last tokens: [n, rows, columns, width]."""
        x = x.permute(0, 2, 3, 1) / 0.35
        for cut, embed, norm, place, blocks in zip(
            self.cuts, self.embed, self.norms, self.places, self.stages, strict=True
        ):
            x = anchor(x, cut) if self.anchored else x
            x = place(norm(embed(patches(x, cut))))
            x = x if self.position is None else x + self.position
            for block in blocks:
                x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((1, 2)))


# --- the images and what is done to them --------------------------------------------------------


def framed(x: Tensor) -> Tensor:
    """Garments [n, 1, 28, 28] at 20 pixels in the middle of a black frame: [n, 1, 32, 32]."""
    small = F.interpolate(x, size=SIDE - 2 * ROOM, mode="bilinear", antialias=True)
    return F.pad(small.clamp(0, 1), [ROOM] * 4)


def shifted(x: Tensor, generator: torch.Generator, most: int = ROOM) -> Tensor:
    """Each image rolled by a draw of its own: −most … most pixels down and right."""
    draw = torch.randint(-most, most + 1, (2, len(x)), generator=generator)
    return rolled(x.permute(0, 2, 3, 1), *draw).permute(0, 3, 1, 2)


def sampled(x: Tensor, maps: Tensor) -> Tensor:
    """Images pulled through affine maps [n, 2, 3] of coordinates in [−1, 1]; black outside."""
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def moved(x: Tensor, pixels: Tensor) -> Tensor:
    """Images moved by ``pixels`` [n, 2] (right, down), whole or not; black comes in."""
    maps = torch.eye(2).repeat(len(x), 1, 1)
    return sampled(x, torch.cat([maps, -pixels[:, :, None] * 2 / SIDE], 2))


def affine(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 30°, moved by up to a tenth, scaled by 0.8–1.2, sheared by up to 10°."""
    angle, right, down, scale, shear = 2 * torch.rand(5, len(x), generator=generator) - 1
    angle, shear, scale = angle * math.pi / 6, shear * math.pi / 18, 1 / (1 + 0.2 * scale)
    cos, sin, tan = angle.cos() * scale, angle.sin() * scale, shear.tan()
    top = torch.stack([cos, cos * tan - sin, 0.2 * right], 1)
    bottom = torch.stack([sin, sin * tan + cos, 0.2 * down], 1)
    return sampled(x, torch.stack([top, bottom], 1))


def transformed(x: Tensor, how: str, seed: int) -> Tensor:
    """x [n, 1, 32, 32] under one of the tests, each image with its own draw."""
    g = torch.Generator().manual_seed(seed)
    if how == "shift":
        return shifted(x, g)
    if how == "crop":  # pad by 10 and cut 32 out: up to four of a garment's 20 pixels are lost
        return moved(x, torch.randint(-10, 11, (len(x), 2), generator=g).float())
    if how == "fraction":  # a shift by parts of a pixel, interpolated
        return moved(x, 2 * ROOM * torch.rand(len(x), 2, generator=g) - ROOM)
    if how == "flip":
        return x.flip(3)
    if how == "affine":
        return affine(x, g)
    return x


TESTS = ("none", "shift", "crop", "flip", "affine", "fraction")


@torch.no_grad()
def measured(net: Net, x: Tensor, y: Tensor, seed: int) -> dict:
    """Accuracy and consistency under every test, the worst of 49 shifts, and the largest change of
    a logit under shifts. Consistency: both of two draws get the same answer, right or wrong."""
    found = {"accuracy": {}, "consistency": {}}
    for how in TESTS:
        first, second = (
            vision.logits(net, transformed(x, how, 1000 * (draw + 1) + seed)).argmax(-1)
            for draw in (0, 1)
        )
        found["accuracy"][how] = round(float((first == y).float().mean()), 4)
        # A flip has one outcome: it is compared with the picture as it was.
        second = vision.logits(net, x).argmax(-1) if how in ("flip", "none") else second
        found["consistency"][how] = round(float((first == second).float().mean()), 4)
    few, right, still = x[:300], torch.ones(300, dtype=torch.bool), vision.logits(net, x[:300])
    changes = []
    for down in range(-ROOM, ROOM + 1, 2):
        for across in range(-ROOM, ROOM + 1, 2):
            out = vision.logits(net, few.roll((down, across), (2, 3)))
            right &= out.argmax(-1) == y[:300]
            changes.append(float((out - still).abs().max()))
    found["worst of 49 shifts"] = round(float(right.float().mean()), 4)
    found["largest change of a logit"] = float(f"{max(changes):.2e}")
    return found


# --- training -----------------------------------------------------------------------------------


def made(name: str, seed: int) -> Net:
    return Net(**VARIANTS[name], seed=seed)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "polyphase")
    parser.add_argument("--seconds", type=float, default=340.0, help="start no run after so many")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    x_train, y_train, x_test, y_test = (t.cpu() for t in vision.images("fashion_mnist"))
    x_train, x_test = framed(x_train), framed(x_test)
    for name in VARIANTS:
        for seed in SEEDS:
            file = args.scratch / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}.json"
            if file.exists() or time.monotonic() - begun > args.seconds:
                continue
            net = made(name, seed)
            augment = shifted if "shifted" in name else None
            losses = vision.train(
                net, x_train, y_train, epochs=EPOCHS, rate=2e-3, decay=0.05, seed=seed,
                augment=augment,
            )  # fmt: skip
            row = dict(network=name, seed=seed, loss=round(losses[-1], 4))
            row |= measured(net, x_test, y_test, seed)
            save_file(
                {k: v.half() for k, v in net.state_dict().items()}, file.with_suffix(".safetensors")
            )
            file.write_text(json.dumps(row))
            print(round(time.monotonic() - begun), json.dumps(row), flush=True)
    files = sorted(args.scratch.glob("*.json"))
    if len(files) < len(VARIANTS) * len(SEEDS):
        print(len(files), "runs done; start again for the rest")
        return
    rows = [json.loads(f.read_text()) for f in files]
    rows.sort(key=lambda row: (list(VARIANTS).index(row["network"]), row["seed"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "polyphase_runs.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')
    weights = {
        f"{name}.{k}": v
        for name in ("plain", "anchored")
        for k, v in load_file(args.scratch / f"{name}_0.safetensors").items()
    }
    save_file(weights, HERE / "polyphase_nets.safetensors")
    print("wrote polyphase_runs.json and polyphase_nets.safetensors")


if __name__ == "__main__":
    main()
