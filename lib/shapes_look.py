"""What a picture of the shapes world shows, whatever it comes from; ``look`` tells.

First the background, then the pixels that are not it, their colours, the pieces that hang together,
and of each piece the drawn template that it overlaps most. Where the evidence is thin it says None
and does not guess.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from lib.errors import BookError
from lib.shapes import BACKGROUNDS, COLOURS, DARK, HORIZON, SHAPES, SIZES, ground, stamp

SIDE = 64  # pictures of another size are brought to this one first
_NAMES = tuple(COLOURS)
_TONES = np.array(list(COLOURS.values()), np.float32)  # [colour, 3]
_BLURS = (0.0, 1.0, 1.7)  # of the templates, in pixels
# Overlap with a template, and lead on the next shape, that settle a shape; blur makes all alike.
_FIT, _MARGINS = 0.72, (0.03, 0.03, 0.05)
_LEAST = 36  # pixels: half of the smallest thing; less is a speck
_GRID = 24  # side of the normalized pieces that are compared with templates
_REACH = 1.6  # the grid's half side, in radii of a disc of the piece's area


@dataclass(frozen=True)
class Found:
    """A thing seen in a picture; None is what cannot be told.

    ``x``, ``y``: its centre, in sides of the picture, ``y`` downwards. ``across``: its width, in
    sides. ``area``: share of the picture. ``overlap``: of the best template, 0 to 1. ``margin``:
    how far the next best shape is behind. ``colours``: shares of its pixels, by colour. ``mask``:
    bool [64, 64].
    """

    shape: str | None
    colour: str | None
    size: str | None
    texture: str | None
    x: float
    y: float
    across: float
    area: float
    overlap: float
    margin: float
    colours: dict[str, float]
    mask: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class Seen:
    """``match``: share of the picture that looks like the background that it resembles most.
    ``specks``: share of the picture that is neither background nor a thing."""

    things: tuple[Found, ...]
    background: str | None
    match: float
    specks: float


# --- background and pixels ------------------------------------------------------------------------


@lru_cache
def _grounds() -> np.ndarray:
    """[background, 3, SIDE, SIDE]."""
    return np.stack([ground(name, SIDE) for name in BACKGROUNDS])


def _noise(image: np.ndarray) -> float:
    """Standard deviation of what differs from pixel to pixel; edges, being few, count little."""
    twice = image[:, :, 1:-1] - (image[:, :, :-2] + image[:, :, 2:]) / 2
    return float(np.median(abs(twice))) / 0.6745 / 1.5**0.5


def _background(image: np.ndarray) -> tuple[int, float, bool]:
    """Number of the background, share of pixels like it, and whether both is plain to see."""
    far = np.sqrt(((image[None] - _grounds()) ** 2).sum(1))  # [background, SIDE, SIDE]
    like = np.exp(-((far / 0.16) ** 2))
    votes = like.mean((1, 2))
    best, second = np.argsort(-votes)[:2]
    rows = like[best].mean(1)
    halves = rows[: SIDE // 2].mean(), rows[-SIDE // 4 :].mean()
    sure = votes[best] > 0.2 and votes[best] - votes[second] > 0.04 and min(halves) > 0.08
    return int(best), float(votes[best]), bool(sure)


def _to_colours(image: np.ndarray) -> np.ndarray:
    """Distance of every pixel from the line of each colour's tones, full to dark: [colour, …]."""
    flat = image.reshape(3, -1)
    norms = (_TONES**2).sum(1)[:, None]
    along = np.clip(_TONES @ flat / norms, DARK, 1)  # [colour, pixel]
    square = (flat**2).sum(0) - 2 * along * (_TONES @ flat) + along**2 * norms
    return np.sqrt(np.maximum(square, 0)).reshape(-1, SIDE, SIDE)


def _own_ground(image: np.ndarray, background: int) -> np.ndarray:
    """The background in this picture's own tones, which may be off a little: [3, SIDE, SIDE]."""
    tones = _grounds()[background].copy()
    edge = round(HORIZON * SIDE)
    for half in (slice(0, edge), slice(edge, SIDE)):
        off = image[:, half] - tones[:, half]
        near = np.sqrt((off**2).sum(0)) < 0.25
        if near.sum() > 0.15 * near.size:
            tones[:, half] += np.median(off[:, near], 1)[:, None, None]
    return tones


def _to_mixtures(image: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Distance from the line between each colour and the background: [colour, SIDE, SIDE]."""
    line = _TONES[:, :, None, None] - tones  # [colour, 3, SIDE, SIDE]
    norms, off = (line**2).sum(1), image - tones
    share = np.clip((line * off).sum(1) / norms, 0.4, 1)
    return np.sqrt(((off - share[:, None] * line) ** 2).sum(1))


def _to_ground(image: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Distance from the background; near its horizon from the nearer of both tones."""
    far = np.sqrt(((image - tones) ** 2).sum(0))
    middle = round(HORIZON * SIDE)
    edge = slice(middle - 6, middle + 7)
    for row in (0, -1):
        other = np.sqrt(((image[:, edge] - tones[:, row, :1][:, None]) ** 2).sum(0))
        far[edge] = np.minimum(far[edge], other)
    return far


_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
_BLOCK = np.ones((3, 3), np.float32)


def _texture(image: np.ndarray, mask: np.ndarray, tone: int) -> str | None:
    """Dark and light rows are stripes, dark places are dots; both are told by how much of the
    darkness changes from row to row. None where that lies between, or nothing can be seen."""
    pure = _TONES[tone]
    dark = (1 - np.tensordot(pure, image, 1) / (pure @ pure)) / (1 - DARK)
    inner = ndimage.binary_erosion(mask, _CROSS)
    deep = ndimage.binary_erosion(inner, _CROSS)  # where no edge darkens a plain thing
    deep = deep if deep.sum() >= 16 else inner
    share = (dark[deep] > 0.4).mean() if deep.sum() >= 12 else 1.0
    if not 0.08 <= share <= 0.9:
        return "plain" if share < 0.05 else None
    values, rows = dark[inner], np.nonzero(inner)[0]
    means = ndimage.mean(values, rows, np.unique(rows))
    weights = np.unique(rows, return_counts=True)[1]
    explained = np.average((means - values.mean()) ** 2, weights=weights) / values.var()
    if 0.62 < explained < 0.75:
        return None
    return "striped" if explained > 0.7 else "dotted"


def _segment(image: np.ndarray, tones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cover [SIDE, SIDE], 0 on the background to 1 on things, and the colour's number, -1 for
    none, of every pixel.

    A pixel at an edge is a mixture, which a third colour may look like: colours are read where
    neighbours agree, and carried from there to the edge.
    """
    off, lines = _to_ground(image, tones), _to_colours(image)
    nearest = np.minimum(lines, _to_mixtures(image, tones)).argmin(0)
    clear = (lines.min(0) < 0.75 * off) & (lines.min(0) < 0.35)
    label = np.where(clear, nearest, -1)
    core = np.full(label.shape, -1)
    for colour in np.unique(label[clear]):
        here = (label == colour).astype(np.float32)
        core[(here > 0) & (ndimage.convolve(here, _BLOCK, mode="constant") >= 5)] = colour
    if (core < 0).all():
        return np.zeros((SIDE, SIDE), np.float32), core
    away, (rows, columns) = ndimage.distance_transform_edt(core < 0, return_indices=True)
    colour = np.where(away <= 3, core[rows, columns], -1)
    own = np.take_along_axis(lines, np.maximum(colour, 0)[None], 0)[0]
    cover = np.where(colour >= 0, off / (off + own + 1e-6), 0).astype(np.float32)
    # Where a thing's colour is off a little it still covers. And on a dark ground a fading edge
    # looks like a dark tone, which a plain thing lacks: there only its one tone counts.
    for tone in np.unique(core[core >= 0]):
        regions, many = ndimage.label((cover > 0.5) & (colour == tone), _BLOCK)
        for number in range(1, many + 1):
            region = regions == number
            inner = ndimage.binary_erosion(region, _CROSS)
            if inner.sum() < 9:
                continue
            if _texture(image, region, tone) == "plain":
                usual = np.median(image[:, inner], 1)[:, None, None]
                away = np.sqrt(((image - usual) ** 2).sum(0))
            else:
                away = np.maximum(own - np.median(own[inner]), 0)
            near = ndimage.binary_dilation(region, _BLOCK > 0, 2) & (colour == tone)
            cover[near] = (off / (off + away + 1e-6))[near]
    return cover, colour


# --- pieces and shapes ----------------------------------------------------------------------------


def _normalize(pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covers [n, h, w] moved and scaled to one centre and area: [n, GRID, GRID]; centres [n, 2]
    as x, y, in pixels, and areas [n]."""
    n, height, width = pieces.shape
    areas = pieces.sum((1, 2))
    x = (pieces.sum(1) * (np.arange(width) + 0.5)).sum(1) / areas
    y = (pieces.sum(2) * (np.arange(height) + 0.5)).sum(1) / areas
    half = _REACH * np.sqrt(areas / np.pi)
    at = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1)[None]
    xs, ys = (x[:, None] + half[:, None] * at), (y[:, None] + half[:, None] * at)
    grid = np.stack(
        [
            np.broadcast_to((xs * 2 / width - 1)[:, None, :], (n, _GRID, _GRID)),
            np.broadcast_to((ys * 2 / height - 1)[:, :, None], (n, _GRID, _GRID)),
        ],
        -1,
    ).astype(np.float32)
    moved = F.grid_sample(
        torch.from_numpy(pieces)[:, None], torch.from_numpy(grid), align_corners=False
    )
    return moved[:, 0].numpy(), np.stack([x, y], 1), areas


@lru_cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalized covers [shape, blur, k, GRID²] of every shape, drawn in all sizes and at places
    within a pixel; by shape the area of a thing 1 across [shape], and where its centre lies from
    its middle, in units of it [shape, 2]."""
    covers, areas, centres = [], [], []
    for shape in SHAPES:
        stamps = []
        for across in (*SIZES.values(), 0.6):
            for dx, dy in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                cover, _ = stamp(shape, across * SIDE, "plain", dx, dy, 1.0, 4)
                stamps.append(np.pad(cover, (64 - len(cover)) // 2))
        sharp = np.stack(stamps).astype(np.float32)
        blurred = [ndimage.gaussian_filter(sharp, (0, spread, spread)) for spread in _BLURS]
        moved, middle, area = _normalize(np.concatenate(blurred))
        covers.append(moved.reshape(len(_BLURS), len(sharp), -1))
        at = len(sharp) - 4  # sharp, the widest, and in the middle
        areas.append(area[at] / (0.6 * SIDE) ** 2)
        centres.append((32 - middle[at]) / (0.6 * SIDE))
    return np.stack(covers), np.array(areas), np.array(centres)


def _overlaps(moved: np.ndarray) -> np.ndarray:
    """Normalized pieces [n, GRID, GRID] against every template: best overlap [n, shape, blur]."""
    covers = _templates()[0]
    flat = moved.reshape(len(moved), -1)
    found = []
    for piece in flat:
        common = np.minimum(piece, covers).sum(-1)
        found.append((common / (piece.sum() + covers.sum(-1) - common)).max(-1))
    return np.stack(found)


def _cuts(cover: np.ndarray, colour: np.ndarray) -> list[list[list[np.ndarray]]]:
    """For every region that stands alone, the ways to read it: as one thing, as one a colour, as
    those that a few pixels' erosion parts. A way is a list of masks [SIDE, SIDE]."""
    regions, many = ndimage.label(cover > 0.5, np.ones((3, 3)))
    found = []
    for number in range(1, many + 1):
        region = regions == number
        if region.sum() < _LEAST:
            continue
        ways = [[region]]
        tones, counts = np.unique(colour[region], return_counts=True)
        tones = tones[counts >= _LEAST]
        if len(tones) > 1:
            parts = []
            for tone in tones:
                pieces, of = ndimage.label(region & (colour == tone), np.ones((3, 3)))
                parts += [pieces == k for k in range(1, of + 1)]
            ways.append([part for part in parts if part.sum() >= _LEAST])
        worn = region
        for _ in range(5):
            worn = ndimage.binary_erosion(worn, _CROSS)
            kernels, _ = ndimage.label(worn)
            kept = [k for k, size in enumerate(np.bincount(kernels.ravel())) if k and size >= 9]
            if not kept:
                break
            if len(kept) > 1:
                seeds = np.where(np.isin(kernels, kept), kernels, 0)
                rows, columns = ndimage.distance_transform_edt(
                    seeds == 0, return_distances=False, return_indices=True
                )
                owner = np.where(region, seeds[rows, columns], 0)
                parts = [owner == k for k in kept]
                ways.append([part for part in parts if part.sum() >= _LEAST])
        found.append([way for way in ways if way])
    return found


def _soft(cover: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A piece with its smooth edge, which the things beside it keep where it is theirs."""
    rim = ndimage.binary_dilation(mask, np.ones((3, 3)), 2) & (cover <= 0.5)
    return np.where(mask | rim, cover, 0)


def _nearest_size(across: float) -> str | None:
    """None where it lies in the middle between two sizes."""
    logs = sorted((abs(np.log(across / size)), name) for name, size in SIZES.items())
    return logs[0][1] if logs[1][0] - logs[0][0] > 0.05 else None


def _thing(image, cover, colour, mask, overlaps, centre, area) -> Found:
    best, second = np.argsort(-overlaps.max(1))[:2]
    overlap = float(overlaps[best].max())
    margin = overlap - float(overlaps[second].max())
    sure = overlap >= _FIT and margin >= _MARGINS[overlaps[best].argmax()]
    across = float(np.sqrt(area / _templates()[1][best]))
    x, y = centre + (across * _templates()[2][best] if sure else 0)
    tones, counts = np.unique(colour[mask & (colour >= 0)], return_counts=True)
    order = np.argsort(-counts)
    shares = {_NAMES[tones[k]]: float(counts[k] / counts.sum()) for k in order}
    tone = tones[order[0]]
    return Found(
        shape=SHAPES[best] if sure else None,
        colour=_NAMES[tone] if counts.max() >= 0.6 * counts.sum() else None,
        size=_nearest_size(across / SIDE) if sure else None,
        texture=_texture(image, mask & (colour == tone), tone),
        x=float(x / SIDE),
        y=float(y / SIDE),
        across=across / SIDE,
        area=float(area / SIDE**2),
        overlap=overlap,
        margin=margin,
        colours=shares,
        mask=torch.from_numpy(mask),
    )


def _look(image: np.ndarray) -> Seen:
    """One picture [3, SIDE, SIDE]."""
    noise = _noise(image)
    if noise > 0.03:
        spread = 0.7 if noise < 0.08 else 1.0
        image = ndimage.gaussian_filter(image, (0, spread, spread))
    background, match, sure = _background(image)
    tones = _own_ground(image, background)
    cover, colour = _segment(image, tones)
    regions = _cuts(cover, colour)
    masks = [mask for ways in regions for way in ways for mask in way]
    things, seen = [], np.zeros((SIDE, SIDE), bool)
    if masks:
        soft = np.stack([_soft(cover, mask) for mask in masks]).astype(np.float32)
        moved, centres, areas = _normalize(soft)
        overlaps = _overlaps(moved)
        at = 0
        for ways in regions:
            worth, choice = -1.0, []
            for k, way in enumerate(ways):
                rows = range(at, at + len(way))
                at += len(way)
                value = np.average(overlaps[rows].max((1, 2)), weights=areas[rows])
                if value + (0.03 if k == 0 else 0) > worth:  # as one, unless parts fit better
                    worth, choice = value + (0.03 if k == 0 else 0), rows
            for k in choice:
                seen |= masks[k]
                things.append(
                    _thing(image, cover, colour, masks[k], overlaps[k], centres[k], areas[k])
                )
    apart = (_to_ground(image, tones) > 0.25) & ~ndimage.binary_dilation(seen, _CROSS, 2)
    name = list(BACKGROUNDS)[background] if sure else None
    things.sort(key=lambda thing: -thing.area)
    return Seen(tuple(things), name, match, float(apart.mean()))


def prepare(images: Tensor) -> Tensor:
    """Pictures of any size as float32 [n, 3, 64, 64] in [0, 1] on the CPU; refuses other things."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise BookError(
            "pictures are float images [n, 3, side, side] in [0, 1], not "
            f"{images.dtype} of shape {list(images.shape)}"
        )
    images = images.detach().float().cpu()
    if images.isnan().any():
        raise BookError("pictures are float images in [0, 1]; these hold NaN")
    if images.shape[-2:] != (SIDE, SIDE):
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return images.clamp(0, 1)


def look(images: Tensor) -> list[Seen]:
    """What pictures show, about 6 ms each.

    Args:
        images: float [n, 3, side, side] in [0, 1] (what lies outside is clipped), on any device.

    Returns:
        one ``Seen`` a picture, its things from the largest to the smallest.

    Raises:
        BookError: images of another form, or that hold NaN.
    """
    return [_look(image) for image in prepare(images).numpy()]
