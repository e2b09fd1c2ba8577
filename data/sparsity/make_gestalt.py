"""Makes gestalt_results.json and gestalt_vits.safetensors: five small vision transformers on
Fashion-MNIST (untrained, supervised, masked autoencoder, that one finetuned to classify, finetuned
so with a spatial Top-K) and what each sees of figures that only the whole picture decides, after
"From Local Cues to Global Percepts" (arXiv 2506.00718). About 6 minutes a seed on one core;
resumable.

    python data/sparsity/make_gestalt.py --scratch /tmp/gestalt --seeds 0 1 2
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets  # noqa: E402

SIDE, PATCH, WIDTH, LAYERS = 32, 4, 64, 3
TOKENS = (SIDE // PATCH) ** 2
KEPT = 0.2  # of a channel's positions, under Top-K
STEPS = {"mae": 900, "supervised": 400, "finetuned": 200, "finetuned, Top-K": 200}


# --- networks -----------------------------------------------------------------------------------


def spatial_topk(x: Tensor, share: float) -> Tensor:
    """Each channel of x [n, tokens, d] keeps its largest values by size, in ``share`` of the
    positions; the rest becomes zero."""
    k = max(1, round(share * x.shape[1]))
    floor = x.abs().topk(k, dim=1).values[:, -1:]
    return x * (x.abs() >= floor)


class Block(nn.Module):
    """Attention (with Top-K on what enters it, if ``share`` is below 1) and a ReLU MLP."""

    def __init__(self, width: int = WIDTH, heads: int = 4):
        super().__init__()
        self.heads, self.share = heads, 1.0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        if self.share < 1:
            inner = spatial_topk(inner, self.share)
        n, t, d = x.shape
        q, k, v = self.qkv(inner).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(z)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Encoder, a head for classes and a one-block decoder that only the masked autoencoder uses."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.mask = nn.Parameter(torch.zeros(WIDTH))
        self.place_out = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.decoder, self.norm_out = Block(), nn.LayerNorm(WIDTH)
        self.pixels = nn.Linear(WIDTH, PATCH**2)

    def states(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """The tokens after each block (the last one normed): each [n, kept, d]. ``keep`` [n, kept]
        are the positions that are not masked."""
        x = self.embed(patches(images)) + self.place
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, WIDTH))
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        found[-1] = self.norm(x)
        return found

    def classify(self, images: Tensor) -> Tensor:
        """Logits [n, 10] from the mean over tokens."""
        return self.head(self.states(images)[-1].mean(1))

    def fill_in(self, images: Tensor, keep: Tensor) -> Tensor:
        """Every patch as the decoder draws it from the kept ones: [n, tokens, patch²]."""
        seen = self.states(images, keep)[-1]
        x = self.mask.expand(len(images), TOKENS, WIDTH)
        x = x.scatter(1, keep[..., None].expand(-1, -1, WIDTH), seen) + self.place_out
        return self.pixels(self.norm_out(self.decoder(x)))


def patches(images: Tensor) -> Tensor:
    """Images [n, 32, 32] with values from 0 to 1, as centred patches [n, tokens, patch²]."""
    return F.unfold(images[:, None] - 0.5, PATCH, stride=PATCH).transpose(1, 2)


def set_topk(net: ViT, share: float) -> ViT:
    """The same network with this share of positions kept in every block; 1 turns Top-K off."""
    for block in net.blocks:
        block.share = share
    return net


# --- training -----------------------------------------------------------------------------------


def garments(part: str = "train") -> tuple[Tensor, Tensor]:
    """Fashion-MNIST on 32 × 32 pixels, values from 0 to 1, and its classes."""
    data = datasets.fashion_mnist()
    x = torch.from_numpy(data[f"x_{part}"]).float() / 255
    return F.pad(x, (2, 2, 2, 2)), torch.from_numpy(data[f"y_{part}"]).long()


def augmented(images: Tensor, g: torch.Generator) -> Tensor:
    """Shifted by up to two pixels, mirrored half of the time, inverted half of the time: light on
    dark says nothing about what is figure."""
    n = len(images)
    dy, dx = torch.randint(-2, 3, (2, n), generator=g)
    rows = (torch.arange(SIDE) + dy[:, None]) % SIDE
    columns = (torch.arange(SIDE) + dx[:, None]) % SIDE
    mirror = torch.rand(n, generator=g) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    moved = images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    invert = (torch.rand(n, generator=g) < 0.5)[:, None, None]
    return torch.where(invert, 1 - moved, moved)


def train(net: ViT, kind: str, images: Tensor, classes: Tensor, seed: int) -> None:
    """In place, AdamW with a cosine; ``kind`` is a key of ``STEPS``."""
    g = torch.Generator().manual_seed(1000 + seed)
    steps, mae = STEPS[kind], kind == "mae"
    rate = 2e-3 if mae or kind == "supervised" else 5e-4
    opt = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
            )
        drawn = torch.randint(len(images), (128,), generator=g)
        batch = augmented(images[drawn], g)
        if mae:
            order = torch.rand(len(batch), TOKENS, generator=g).argsort(1)
            keep, hidden = order[:, : TOKENS // 4], order[:, TOKENS // 4 :]
            error = (net.fill_in(batch, keep) - patches(batch)).square().mean(-1)
            loss = error.gather(1, hidden).mean()
        else:
            loss = F.cross_entropy(net.classify(batch), classes[drawn])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if step % 200 == 199:
            print(f"seed {seed} {kind} step {step + 1} loss {loss.item():.4f}", flush=True)


def networks(seed: int, scratch: Path) -> dict[str, ViT]:
    """The five networks of one seed, trained or read back."""
    images, classes = garments()
    found = {"untrained": ViT(seed)}
    start = {"supervised": None, "mae": None, "finetuned": "mae", "finetuned, Top-K": "mae"}
    for kind, parent in start.items():
        net = ViT(seed)
        if parent:
            net.load_state_dict(found[parent].state_dict())
        set_topk(net, KEPT if "Top-K" in kind else 1.0)
        file = scratch / f"{kind.replace(', ', '_')}_{seed}.safetensors"
        if file.exists():
            net.load_state_dict(load_file(file))
        else:
            train(net, kind, images, classes, seed)
            save_file(net.state_dict(), file)
        found[kind] = net
    return {k: v.eval() for k, v in found.items()}


# --- odd one out --------------------------------------------------------------------------------


def framed(images: Tensor, block: int = 8, width: int = 1) -> Tensor:
    """A grey frame, ``width`` pixels wide, inside every block: it hides the seams of moved blocks,
    and lies over intact images too. images [..., side, side]."""
    inside = torch.arange(images.shape[-1]) % block
    line = (inside < width) | (inside >= block - width)
    return torch.where(line[:, None] | line[None], torch.tensor(0.5), images)


def displaced(image: Tensor, swaps: int, g: torch.Generator, block: int = 8) -> Tensor:
    """``swaps`` pairs of an image's blocks have changed places (all sixteen with 8): the same
    pieces, other relations between them. image [..., side, side]."""
    m = image.shape[-1] // block
    order = torch.arange(m * m)
    chosen = torch.randperm(m * m, generator=g)[: 2 * swaps]
    order[chosen] = order[chosen.view(2, -1).flip(0).flatten()]
    cells = image.unflatten(-1, (m, block)).unflatten(-3, (m, block)).movedim(-2, -3)
    cells = cells.flatten(-4, -3)[..., order, :, :].unflatten(-3, (m, m))
    return cells.movedim(-3, -2).flatten(-4, -3).flatten(-2, -1)


def triplets(images: Tensor, swaps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The two forms of the test: [n, 3, 32, 32] each, the odd one first.

    ``one intact``: an image and two displacements of it. ``one displaced``: one displacement and
    two intact views; all three shifted by up to two pixels and of other contrast.
    """
    g = torch.Generator().manual_seed(seed)
    one_intact, one_displaced = [], []
    for image in images:
        image = 1 - image if torch.rand((), generator=g) < 0.5 else image
        one_intact.append(
            torch.stack([image, displaced(image, swaps, g), displaced(image, swaps, g)])
        )
        views = []
        for _ in range(3):
            shift = torch.randint(-2, 3, (2,), generator=g).tolist()
            contrast = 0.8 + 0.2 * torch.rand((), generator=g)
            views.append(0.5 + (image.roll(shift, (0, 1)) - 0.5) * contrast)
        one_displaced.append(torch.stack([displaced(views[0], swaps, g), *views[1:]]))
    return framed(torch.stack(one_intact)), framed(torch.stack(one_displaced))


def odd_one_out(features: Tensor) -> Tensor:
    """Of three vectors, the one least like the other two by cosine: features [n, 3, d] -> [n]."""
    unit = F.normalize(features, dim=-1)
    return (unit @ unit.transpose(1, 2)).sum(-1).argmin(-1)


def disrt(net: ViT, sets: Tensor) -> list[float]:
    """Share of triplets in which the odd one is found, by layer (mean over tokens)."""
    n = len(sets)
    return [
        float((odd_one_out(s.mean(1).view(n, 3, -1)) == 0).float().mean())
        for s in net.states(sets.flatten(0, 1))
    ]


# --- figures whose parts say nothing ------------------------------------------------------------


def _grid(fine: int = 4) -> tuple[Tensor, Tensor]:
    at = (torch.arange(SIDE * fine) + 0.5) / fine
    return at[:, None].expand(-1, len(at)), at[None].expand(len(at), -1)


def _coarse(x: Tensor, fine: int = 4) -> Tensor:
    return F.avg_pool2d(x.float()[None, None], fine)[0, 0]


def kanizsa(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Four discs with a quarter cut out, on 32 × 32 pixels: the cuts face each other (``figure``)
    or away (``control``), and the control with the square's outline drawn (``outline``); and which
    tokens the outline crosses where figure and control are blank: bool [n, tokens]."""
    g = torch.Generator().manual_seed(seed)
    y, x = _grid()
    found = {"figure": [], "control": [], "outline": []}
    gaps = []
    for _ in range(n):
        side = 15 + 4 * torch.rand((), generator=g)
        radius = 3.2 + 1.0 * torch.rand((), generator=g)
        cy, cx = 16 + 2 * torch.rand(2, generator=g) - 1
        low, high = torch.stack([cy, cx]) - side / 2, torch.stack([cy, cx]) + side / 2
        inducers = {
            "figure": torch.zeros_like(y, dtype=bool),
            "control": torch.zeros_like(y, dtype=bool),
        }
        for v in (0, 1):
            for h in (0, 1):
                py, px = (low, high)[v][0], (low, high)[h][1]
                disc = (y - py) ** 2 + (x - px) ** 2 < radius**2
                inward = ((y > py) == (v == 0)) & ((x > px) == (h == 0))
                outward = ((y < py) == (v == 0)) & ((x < px) == (h == 0))
                inducers["figure"] |= disc & ~inward
                inducers["control"] |= disc & ~outward
        in_square = (y > low[0]) & (y < high[0]) & (x > low[1]) & (x < high[1])
        inner = (y > low[0] + 1) & (y < high[0] - 1) & (x > low[1] + 1) & (x < high[1] - 1)
        line = _coarse(in_square & ~inner)
        drawn = {k: _coarse(v) for k, v in inducers.items()}
        drawn["outline"] = torch.maximum(drawn["control"], 0.5 * line)
        invert = torch.rand((), generator=g) < 0.5
        for k, v in drawn.items():
            found[k].append(1 - v if invert else v)
        blank = (_tokens(drawn["figure"]).amax(-1) == 0) & (_tokens(drawn["control"]).amax(-1) == 0)
        gaps.append(blank & (_tokens(line).sum(-1) > 1.5))
    return {k: torch.stack(v) for k, v in found.items()}, torch.stack(gaps)


def _tokens(image: Tensor) -> Tensor:
    """Pixels of each patch of one image: [tokens, patch²]."""
    return F.unfold(image[None, None], PATCH, stride=PATCH)[0].T


def completion(net: ViT | None, n: int, seed: int) -> list[float]:
    """How much of what a drawn outline does to a blank patch's token the illusory one does, by
    layer: 1 as a drawn line, 0 nothing. The direction is found on half of the figures."""
    figures, gaps = kanizsa(n, seed)
    states = {k: net.states(v) for k, v in figures.items()}
    rows = torch.arange(n) < n // 2
    found = []
    for layer in range(LAYERS):
        learn, test = gaps & rows[:, None], gaps & ~rows[:, None]
        s = {k: v[layer] for k, v in states.items()}
        direction = (s["outline"][learn] - s["control"][learn]).mean(0)
        effect = {k: float((s[k][test] - s["control"][test]).mean(0) @ direction) for k in s}
        found.append(effect["figure"] / effect["outline"])
    return found


def silhouettes(images: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Flat garments of any size and place, lighter or darker than their ground, every other one
    larger than its ground, so that the rarer grey is no clue: images [n, 32, 32] and each token's
    share of figure [n, tokens]."""
    g = torch.Generator().manual_seed(seed)
    drawn, covered = [], []
    while len(drawn) < n:
        i = int(torch.randint(len(images), (), generator=g))
        size = int(torch.randint(16, 44, (), generator=g))
        small = F.interpolate(images[i, 2:-2, 2:-2][None, None], size=(size, size), mode="bilinear")
        top, left = torch.randint(min(0, SIDE - size), max(0, SIDE - size) + 1, (2,), generator=g)
        room = (int(left), SIDE - size - int(left), int(top), SIDE - size - int(top))
        shape = F.pad((small[0, 0] > 0.15).float(), room)  # a negative room crops
        low = 0.2 if len(drawn) % 2 else 0.5
        if low < shape.mean() < low + 0.3:
            drawn.append(_two_greys(shape, g, light=len(drawn) % 4 < 2))
            covered.append(_tokens(shape).mean(-1))
    return torch.stack(drawn), torch.stack(covered)


def _two_greys(shape: Tensor, g: torch.Generator, light: bool) -> Tensor:
    low, high = 0.3 * torch.rand((), generator=g), 1 - 0.3 * torch.rand((), generator=g)
    on, off = (high, low) if light else (low, high)
    return off + (on - off) * shape


def convex(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two halves of equal area; three lobes of the border bulge out of one. Images [n, 32, 32] and
    whether the left half is the convex one."""
    g = torch.Generator().manual_seed(seed)
    y, x = _grid()
    drawn, left = [], []
    for _ in range(n):
        lobes = 2 + int(torch.randint(0, 3, (), generator=g))
        phase, depth = torch.rand((), generator=g), 4 + 3 * torch.rand((), generator=g)
        bulge = torch.sin(math.pi * ((y / SIDE * lobes + phase) % 1))  # half circles, then a cusp
        side = x < 16 + depth * (bulge - 2 / math.pi)
        is_left = bool(torch.rand((), generator=g) < 0.5)
        shape = _coarse(side if is_left else side.flip(1))
        drawn.append(_two_greys(shape, g, light=len(drawn) % 2 == 0))
        left.append(is_left)
    return torch.stack(drawn), torch.tensor(left)


def border_pairs(n: int, seed: int, bands: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same vertical edge in two surroundings: the border of a square on its left, or of one of
    the other grey on its right. With ``bands`` of the square's grey along the upper and the lower
    rim both greys cover as much. Images [n, 32, 32] each, and the token left of the edge's middle
    [n]; the one right of it is the next."""
    g = torch.Generator().manual_seed(seed)
    first, second, tokens = [], [], []
    for _ in range(n):
        size = int(torch.randint(10, 15, (), generator=g))
        edge = PATCH * int(torch.randint(3, 6, (), generator=g))
        row = int(torch.randint(3, 5, (), generator=g))
        top = row * PATCH + 2 - size // 2 + int(torch.randint(-1, 2, (), generator=g))
        on_left, on_right = torch.zeros(2, SIDE, SIDE)
        on_left[top : top + size, max(edge - size, 1) : edge] = 1
        on_right[top : top + size, edge : min(edge + size, SIDE - 1)] = 1
        for shape in (on_left, on_right) if bands else ():
            band = round((SIDE**2 / 2 - float(shape.sum())) / (2 * SIDE))
            shape[:band] = shape[SIDE - band :] = 1
        dark, light = 0.3 * torch.rand((), generator=g), 1 - 0.3 * torch.rand((), generator=g)
        a, b = (light, dark) if torch.rand((), generator=g) < 0.5 else (dark, light)
        first.append(b + (a - b) * on_left)
        second.append(a + (b - a) * on_right)
        tokens.append(row * (SIDE // PATCH) + edge // PATCH - 1)
    return torch.stack(first), torch.stack(second), torch.tensor(tokens)


def figure_direction(states: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of figure (token all in the shape) against ground (none of it), each
    position weighted so that place alone says nothing: weights [d] and bias."""
    use = (covered > 0.99) | (covered < 0.01)
    label = (covered > 0.5).float()
    share = (label * use).sum(0) / use.sum(0).clamp(min=1)
    weight = use * torch.where(
        label > 0, 1 / share.clamp(min=0.02), 1 / (1 - share).clamp(min=0.02)
    )
    weight = weight * ((share > 0.05) & (share < 0.95))
    x, y, w = states[use], label[use], weight[use]
    mean, scale = x.mean(0), x.std(0) + 1e-4
    x = (x - mean) / scale
    beta = torch.zeros(x.shape[1] + 1, requires_grad=True)
    opt = torch.optim.LBFGS([beta], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        z = x @ beta[:-1] + beta[-1]
        found = F.binary_cross_entropy_with_logits(z, y, w) / w.mean() + 1e-3 * beta.square().sum()
        found.backward()
        return found

    opt.step(loss)
    beta = beta.detach()
    return beta[:-1] / scale, beta[-1] - (beta[:-1] * mean / scale).sum()


def figure_ground(states_of, images: Tensor, n: int, seed: int) -> dict[str, float]:
    """Shares, chance one half, from ``states_of(images) -> [n, tokens, d]``: of a new silhouette's
    tokens told right (mean over figure and ground, and over places), of bipartite pictures whose
    convex half is the more figure-like, and of edges whose owner is told by the surroundings, with
    the square the smaller area and with equal areas."""
    drawn, covered = silhouettes(images, 2 * n, seed)
    states = states_of(drawn)
    w, b = figure_direction(states[:n], covered[:n])
    score = states[n:] @ w + b
    rest = covered[n:]
    is_figure, is_ground = rest > 0.99, rest < 0.01
    right = []
    for place in range(TOKENS):  # where both occur, so that the place is no clue
        figure, ground = score[is_figure[:, place], place], score[is_ground[:, place], place]
        if min(len(figure), len(ground)) >= 5:
            right += [(figure > 0).float().mean(), (ground < 0).float().mean()]
    pictures, left = convex(n, seed)
    score = (states_of(pictures) @ w).view(n, SIDE // PATCH, SIDE // PATCH)
    lean = score[:, :, 1:3].mean((1, 2)) - score[:, :, 5:7].mean((1, 2))  # tokens of one grey
    lean = torch.where(left, lean, -lean)
    found = {"silhouettes": float(torch.stack(right).mean()), "convexity": _above(lean)}
    for name, bands in (("border ownership", False), ("border ownership, equal areas", True)):
        *pairs, at = border_pairs(n, seed, bands)
        scores = [
            (states_of(pictures) @ w)[torch.arange(n)[:, None], at[:, None] + torch.arange(2)]
            for pictures in pairs
        ]
        left_of_edge, right_of_edge = (scores[0] - scores[1]).T
        found[name] = _above(left_of_edge - right_of_edge)
    return found


def _above(x: Tensor) -> float:
    """Share above zero, ties counted half."""
    x = torch.where(x.abs() < 1e-4, 0.0, x)
    return float((x > 0).float().mean() + 0.5 * (x == 0).float().mean())


# --- everything about one seed ------------------------------------------------------------------


def pixel_states(images: Tensor) -> Tensor:
    """A token's own pixels: the network that looks at no other patch."""
    return patches(images)


@torch.no_grad()
def accuracy(net: ViT, images: Tensor, classes: Tensor) -> float:
    right = [
        (net.classify(x).argmax(-1) == y).float()
        for x, y in zip(images.split(200), classes.split(200), strict=True)
    ]
    return float(torch.cat(right).mean())


def measured(seed: int, scratch: Path, n: int) -> dict:
    images, classes = garments("test")
    g = torch.Generator().manual_seed(seed)
    images_drawn = images[torch.randperm(len(images), generator=g)[:n]]
    nets = networks(seed, scratch)
    after = set_topk(ViT(seed), KEPT)
    after.load_state_dict(nets["finetuned"].state_dict())
    nets["finetuned, then Top-K"] = after.eval()
    row = {"seed": seed, "networks": {}}
    sets = {s: triplets(images_drawn, s, 10 * seed + s) for s in (1, 2, 4, 8)}
    forms = ("one intact", "one displaced")
    with torch.no_grad():
        for name, net in nets.items():
            mine = {"accuracy": round(accuracy(net, images, classes), 4), "disrt": {}}
            for i, form in enumerate(forms):
                mine["disrt"][form] = {
                    str(s): [round(v, 4) for v in disrt(net, both[i])] for s, both in sets.items()
                }
            mine["completion"] = [round(v, 4) for v in completion(net, n, seed)]
            with torch.enable_grad():
                found = figure_ground(
                    lambda x, net=net: net.states(x)[-1].detach(), images, n, seed
                )
            mine["figure_ground"] = {k: round(v, 4) for k, v in found.items()}
            row["networks"][name] = mine
            print(seed, name, json.dumps(mine), flush=True)
        row["pixels"] = {
            "disrt": {
                form: {
                    str(s): round(
                        float((odd_one_out(both[i].flatten(2) - 0.5) == 0).float().mean()), 4
                    )
                    for s, both in sets.items()
                }
                for i, form in enumerate(forms)
            }
        }
    found = figure_ground(pixel_states, images, n, seed)
    row["pixels"]["figure_ground"] = {k: round(v, 4) for k, v in found.items()}
    print(seed, "pixels", json.dumps(row["pixels"]), flush=True)
    return row


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/gestalt"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=400, help="triplets, figures and pictures a test")
    parser.add_argument("--train-only", action="store_true")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)
    for seed in args.seeds:
        nets = networks(seed, args.scratch)
        file = args.scratch / f"row_{seed}.json"
        if args.train_only or file.exists():
            continue
        file.write_text(json.dumps(measured(seed, args.scratch, args.n)))
        print("seed", seed, "measured", flush=True)
        del nets
    rows = [args.scratch / f"row_{s}.json" for s in (0, 1, 2)]
    if all(r.exists() for r in rows):
        out = HERE / "gestalt_results.json"
        out.write_text(json.dumps({"seeds": [json.loads(r.read_text()) for r in rows]}) + "\n")
        weights = {}
        for kind, net in networks(0, args.scratch).items():
            if kind == "untrained":
                continue
            for name, value in net.state_dict().items():
                if kind == "mae" or not name.startswith(
                    ("mask", "place_out", "decoder", "norm_out", "pixels")
                ):
                    weights[f"{kind}.{name}"] = value.half()
        save_file(weights, HERE / "gestalt_vits.safetensors")
        print("wrote", out.name)


if __name__ == "__main__":
    main()
