"""Garments on photographs: scenes with boxes, a small detector, and its average precision.

    python data/test_time/own_scenes.py [--seeds 0 1 2] [--scratch DIR]

A scene is a crop of a real photograph, 64 × 64 pixels, with one to four tinted Fashion-MNIST
garments of six kinds on it. The detector is anchor-free: each cell of an 8 × 8 grid says which kind
of garment has its middle nearby, if any, and how far the four sides of its box are. Training
scenes, unlabelled target scenes and test scenes share no garment and no part of a photograph.
Trains one detector a seed, keeps seed 0's as ``scenes_detector.safetensors``; about 4 minutes of
one thread.
"""

import argparse
import sys
import tempfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets  # noqa: E402

SIDE, STRIDE = 64, 8
CELLS = SIDE // STRIDE
GARMENTS = {0: "T-shirt", 1: "trouser", 3: "dress", 7: "sneaker", 8: "bag", 9: "boot"}
NAMES = tuple(GARMENTS.values())
NOTHING = len(NAMES)  # the class of a cell with no garment
MOST = 4  # garments a scene

# --- scenes --------------------------------------------------------------------------------------

# Which garments, and which columns of every photograph, as shares
_PARTS = {"source": (0.0, 0.6), "target": (0.6, 0.8), "test": (0.8, 1.0)}


@cache
def _material(part: str) -> tuple[list[Tensor], list[Tensor]]:
    """Garments of each kind, [n, 28, 28] in [0, 1]; strips of photographs, [3, height, width]."""
    found = datasets.fashion_mnist()
    x = np.concatenate([found["x_train"], found["x_test"]])
    y = np.concatenate([found["y_train"], found["y_test"]])
    begin, end = _PARTS[part]
    garments = []
    for kind in GARMENTS:
        own = torch.tensor(x[y == kind]).float() / 255
        garments.append(own[int(begin * len(own)) : int(end * len(own))])
    strips = []
    for photo in datasets.photos().values():
        whole = torch.tensor(photo).permute(2, 0, 1)[None].float() / 255
        width = whole.shape[-1]
        strip = whole[..., int(begin * width) : int(end * width)]
        # Smaller, so that a crop of 64 pixels shows more than texture
        strips.append(F.interpolate(strip, scale_factor=0.75, mode="area")[0])
    return garments, strips


def scenes(n: int, part: str = "source", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw scenes.

    Args:
        part: ``"source"``, ``"target"`` or ``"test"``; they share no garment and no photograph's
            columns.

    Returns:
        images float32 [n, 3, 64, 64] in [0, 1]; boxes float32 [n, 4 garments, 4], x0, y0, x1, y1 in
        pixels; kinds int64 [n, 4 garments], −1 where there is no garment.
    """
    garments, strips = _material(part)
    g = torch.Generator().manual_seed(1000 * seed + list(_PARTS).index(part))
    images = torch.empty(n, 3, SIDE, SIDE)
    boxes, kinds = torch.zeros(n, MOST, 4), torch.full((n, MOST), -1)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=g))

    for i in range(n):
        strip = strips[draw(len(strips))]
        top, left = draw(strip.shape[1] - SIDE + 1), draw(strip.shape[2] - SIDE + 1)
        image = strip[:, top : top + SIDE, left : left + SIDE].clone()
        placed = 0
        for _ in range(draw(MOST + 1, 1)):
            kind, side = draw(len(NAMES)), draw(31, 18)
            garment = garments[kind][draw(len(garments[kind]))]
            garment = F.interpolate(garment[None, None], size=(side, side), mode="area")[0, 0]
            if draw(2):
                garment = garment.flip(1)
            tint = 0.35 + 0.65 * torch.rand(3, 1, 1, generator=g)
            x, y = draw(SIDE - side + 1), draw(SIDE - side + 1)
            cover = (4 * garment).clamp(0, 1)
            rows, columns = ((cover > 0.5).any(d).nonzero()[:, 0] for d in (1, 0))
            box = torch.tensor(
                [x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]
            ).float()
            if placed and float(iou(box[None], boxes[i, :placed]).max()) > 0.1:
                continue
            spot = image[:, y : y + side, x : x + side]
            spot += cover * (tint * (0.25 + 0.75 * garment) - spot)
            boxes[i, placed], kinds[i, placed] = box, kind
            placed += 1
        images[i] = image
    return images, boxes, kinds


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes a and b [..., 4], entry by entry (they broadcast)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-6)


# --- the detector --------------------------------------------------------------------------------


class Detector(nn.Module):
    """Five 3 × 3 convolutions with batch norm (``norm1`` to ``norm5``), then two 1 × 1 heads.

    ``features(x)``: [n, 3, 64, 64] to [n, 64, 8, 8]; ``kind`` gives logits of six garments and of
    nothing, ``sides`` the distances from a cell's middle to the four sides, as logs of strides.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths, strides = (3, 16, 32, 64, 64, 64), (2, 2, 2, 1, 1)
        for i, stride in enumerate(strides, start=1):
            layers[f"conv{i}"] = nn.Conv2d(widths[i - 1], widths[i], 3, stride, 1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(widths[i])
            layers[f"relu{i}"] = nn.ReLU()
        self.features = nn.Sequential(layers)
        self.kind = nn.Conv2d(64, len(NAMES) + 1, 1)
        self.sides = nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, 64 cells, 7] and boxes in pixels [n, 64 cells, 4]."""
        return self.read(self.features(x))

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads say of ``features`` [n, 64, 8, 8]; see ``forward``."""
        logits = self.kind(features).flatten(2).transpose(1, 2)
        reach = self.sides(features).flatten(2).transpose(1, 2).clamp(-4, 3).exp() * STRIDE
        middle = middles().to(reach)
        return logits, torch.cat([middle - reach[..., :2], middle + reach[..., 2:]], -1)


@cache
def middles() -> Tensor:
    """The middle of every cell, x and y in pixels: [64 cells, 2]."""
    at = STRIDE * (torch.arange(CELLS) + 0.5)
    return torch.stack([at.repeat(CELLS), at.repeat_interleave(CELLS)], -1)


def assign(boxes: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Which garment a cell stands for: the smallest whose inner half holds the cell's middle, or
    that has its own middle in the cell.

    Args:
        boxes: [n, garments, 4]; kinds: [n, garments], −1 for none.

    Returns:
        the garment's number, [n, 64 cells], −1 for none; its kind, [n, 64 cells], ``NOTHING`` for
        none.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    off = (middles().to(boxes)[None, :, None] - centre[:, None]).abs()  # [n, cell, garment, 2]
    reach = (size / 4).clamp(min=STRIDE / 2)[:, None]
    inside = (off <= reach).all(-1) & (kinds >= 0)[:, None]
    area = torch.where(inside, size.prod(-1)[:, None], torch.inf)
    if not area.shape[-1]:
        none = torch.full(area.shape[:2], -1, device=boxes.device)
        return none, torch.full_like(none, NOTHING)
    which = torch.where(inside.any(-1), area.argmin(-1), -1)
    return which, torch.where(which >= 0, kinds.gather(1, which.clamp(min=0)), NOTHING)


def detection_loss(logits: Tensor, found: Tensor, boxes: Tensor, kinds: Tensor) -> Tensor:
    """Cross entropy of every cell's kind, and −log IoU of the boxes of cells with a garment."""
    which, wanted = assign(boxes, kinds)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    some = which >= 0
    if some.any():
        true = boxes.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 4))
        overlap = iou(found[some], true[some])
        loss = loss - 0.2 * (overlap + 0.01).log().mean()
    return loss


def train_detector(seed: int, n: int = 4000, epochs: int = 16, batch: int = 32) -> Detector:
    """A detector trained on ``n`` clear source scenes, mirrored at random."""
    net, (images, boxes, kinds) = Detector(seed), scenes(n, "source", seed)
    steps = epochs * -(-n // batch)
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    g = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=g).split(batch):
            xb, bb = images[rows], boxes[rows]
            if torch.rand((), generator=g) < 0.5:
                xb, bb = mirrored(xb, bb)
            loss = detection_loss(*net(xb), bb, kinds[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            fall.step()
    return net.eval()


def mirrored(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Images and their boxes, left and right exchanged."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return images.flip(-1), torch.stack([SIDE - x1, y0, SIDE - x0, y1], -1)


# --- detections and their worth ------------------------------------------------------------------


@torch.no_grad()
def detections(logits: Tensor, found: Tensor, most: int = 12, overlap: float = 0.5) -> dict:
    """Non-maximum suppression within each kind: of boxes that overlap, the surest stays.

    Args:
        logits: [n, 64 cells, 7]; found: boxes [n, 64 cells, 4].

    Returns:
        ``boxes`` [n, most, 4], ``kinds`` and ``scores`` [n, most], surest first; ``cells``, the
        cell of each; a score of 0 means that there were fewer.
    """
    scores, kinds = logits.softmax(-1)[..., :NOTHING].max(-1)
    scores, rows, kept = scores.clone(), torch.arange(len(scores)), []
    for _ in range(most):
        best, at = scores.max(1)
        box, kind = found[rows, at], kinds[rows, at]
        kept.append((box, kind, best, at))
        same = (kinds == kind[:, None]) & (iou(found, box[:, None]) > overlap)
        scores[same] = 0.0
        scores[rows, at] = 0.0
    boxes, kinds, scores, cells = (torch.stack(x, 1) for x in zip(*kept, strict=True))
    return dict(boxes=boxes, kinds=kinds, scores=scores, cells=cells)


def average_precision(found: dict, boxes: Tensor, kinds: Tensor, overlap: float = 0.5) -> float:
    """mAP@0.5 in %: the area under precision over recall, averaged over the garments there.

    A detection is right if a garment of its kind, not yet taken by a surer one, overlaps it by
    ``overlap`` or more (the best overlap counts).

    Args:
        found: what ``detections`` gives for n scenes; boxes [n, 4, 4] and kinds [n, 4]: the truth.
    """
    overlaps = iou(found["boxes"][:, :, None], boxes[:, None])  # [n, most, garments]
    match = found["kinds"][:, :, None] == kinds[:, None]
    overlaps = torch.where(match, overlaps, 0.0).numpy()
    scores, guess = found["scores"].numpy(), found["kinds"].numpy()
    taken, right = np.zeros(kinds.shape, bool), np.zeros(scores.shape, bool)
    rows = np.arange(len(scores))
    for j in range(scores.shape[1]):  # surest first, so that it takes its garment first
        free = np.where(taken, 0.0, overlaps[:, j])
        at = free.argmax(1)
        right[:, j] = (free[rows, at] >= overlap) & (scores[:, j] > 0)
        taken[rows[right[:, j]], at[right[:, j]]] = True
    areas = []
    for kind in range(len(NAMES)):
        true = int((kinds == kind).sum())
        if not true:
            continue
        mine = (guess == kind) & (scores > 0)
        order = np.argsort(-scores[mine], kind="stable")
        hits = right[mine][order].cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        # The best precision at this recall or beyond, as is usual
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append((precision * right[mine][order]).sum() / true)
    return float(100 * np.mean(areas))


@torch.no_grad()
def evaluate(net: Detector, images: Tensor, boxes: Tensor, kinds: Tensor) -> float:
    """mAP@0.5 in % of ``net``, in the mode it is in, on scenes in batches of 100."""
    parts = [detections(*net(xb)) for xb in images.split(100)]
    found = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    return average_precision(found, boxes, kinds)


def detector(seed: int, scratch: Path) -> Detector:
    """The detector of a seed, trained once and kept in ``scratch``."""
    kept = Path(scratch) / f"detector_{seed}.safetensors"
    if kept.exists():
        net = Detector(seed)
        net.load_state_dict(load_file(kept))
        return net.eval()
    net = train_detector(seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), kept)
    return net


def arguments(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """``seeds`` and ``scratch`` of a script on these scenes, which then computes on one thread."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    default = Path(tempfile.gettempdir()) / "test_time_scenes"
    parser.add_argument("--scratch", type=Path, default=default)
    torch.set_num_threads(1)  # sums in one order: the same numbers every time
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    test = scenes(500, "test", 0)
    for seed in args.seeds:
        net = detector(seed, args.scratch)
        print(f"seed {seed}: mAP@0.5 {evaluate(net, *test):.1f} % on clear test scenes", flush=True)
        if seed == 0:
            small = {
                k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()
            }
            save_file(small, HERE / "scenes_detector.safetensors")


if __name__ == "__main__":
    main()
