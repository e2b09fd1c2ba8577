"""Subjects for personalization: things with a look of their own, which no caption can describe.

A subject has two colours in a pattern; ``reference`` shows it once, ``likeness`` says how far other
pictures show the same one.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import BookError
from lib.shapes import BACKGROUNDS, COLOURS, SIZES, ground, inside
from lib.shapes_look import prepare

SHAPES = ("circle", "square", "triangle", "heart", "star")  # those with room for a pattern
PATTERNS = ("half", "quarters", "rim", "core")
_MARKS = ("circle", "square", "cross")


@dataclass(frozen=True)
class Subject:
    """``shape`` in ``colour``; ``second`` on its right half, its rim, its core (of shape ``mark``)
    or two of its quarters."""

    shape: str
    colour: str
    second: str
    pattern: str
    mark: str = ""


@lru_cache
def _subjects() -> list[Subject]:
    """All there are, in an order without system; among them no two that look alike."""
    # A star's rim looks like its core, and a rim like a core that has the thing's own shape.
    looks = [(s, p, "") for s in SHAPES for p in PATTERNS[:3] if (s, p) != ("star", "rim")]
    # A star's core is too small to tell its form.
    looks += [(s, "core", mark) for s in SHAPES[:-1] for mark in _MARKS if mark != s]
    looks.append(("star", "core", "circle"))
    pairs = list(permutations(COLOURS, 2))
    found = [Subject(s, *pair, p, mark) for pair in pairs for s, p, mark in looks]
    # Halves are told from left to right; quarters are the same with their colours exchanged.
    found = [f for f in found if f.pattern != "quarters" or f.colour < f.second]
    random.Random(0).shuffle(found)
    return found


def subject(seed: int) -> Subject:
    """A subject; the same seed gives the same one, seeds 0 to 999 all different ones."""
    return _subjects()[seed % len(_subjects())]


def _parts(subject: Subject, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points have the first and which the second colour: bool [2, …]; 2 across, at 0."""
    whole = inside(subject.shape, x, y)
    if subject.pattern == "half":
        other = np.broadcast_to(x > 0, whole.shape)
    elif subject.pattern == "quarters":
        other = (x > 0) != (y > 0)
    elif subject.pattern == "rim":
        low = dict(triangle=0.28, heart=-0.05).get(subject.shape, 0.0)  # its middle
        other = ~inside(subject.shape, x / 0.62, (y - low) / 0.62 + low)
    else:
        low = dict(triangle=0.3, heart=-0.05).get(subject.shape, 0.0)
        wide = 0.42 if subject.shape in ("triangle", "star") else 0.55
        other = inside(subject.mark, x / wide, (y - low) / wide)
    return np.stack([whole & ~other, whole & other])


def _cover(subject, across: float, x: float, y: float, size: int, fine: int = 4) -> np.ndarray:
    """Share of each pixel in the first and the second colour: float32 [2, size, size]."""
    at = (np.arange(fine * size) + 0.5) / fine
    parts = _parts(subject, (at - x)[None] * 2 / across, (at - y)[:, None] * 2 / across)
    return parts.reshape(2, size, fine, size, fine).mean((2, 4), dtype=np.float32)


def reference(
    subject: Subject,
    seed: int,
    background: str | None = None,
    size: int = 64,
    scale: str = "large",
) -> tuple[Tensor, Tensor]:
    """A picture of a subject at a place of its own.

    Args:
        seed: of the place, and of the background where ``background`` is None.
        size: the picture's side in pixels.
        scale: one of ``shapes.SIZES``.

    Returns:
        image float32 [3, size, size] in [0, 1], mask float32 [size, size] in [0, 1].

    Raises:
        BookError: an unknown background or scale.
    """
    if scale not in SIZES:
        raise BookError(f"scale {scale!r} is unknown; give one of {', '.join(SIZES)}")
    rng = random.Random(seed)
    drawn = rng.choice(list(BACKGROUNDS))
    half = 0.56 * SIZES[scale] + 0.5 / 64
    x, y = rng.uniform(half, 1 - half) * size, rng.uniform(half, 1 - half) * size
    parts = _cover(subject, SIZES[scale] * size, x, y, size)
    tones = np.array([COLOURS[subject.colour], COLOURS[subject.second]], np.float32)
    picture = ground(background or drawn, size) * (1 - parts.sum(0))
    picture = picture + np.einsum("kc,khw->chw", tones, parts)
    return torch.from_numpy(picture).clamp(0, 1), torch.from_numpy(parts.sum(0))


_WIDE = 0.3  # distance of colours at which closeness has fallen to 1/e
_ACROSS = tuple(12 * 1.09**k for k in range(12))  # pixels of 64: 12 to 31
_SHIFTS = tuple((x / 3, y / 3) for x in (0, -1, 1) for y in (0, -1, 1))
_PATCH = 41


@lru_cache(maxsize=32)
def _templates(subject: Subject) -> tuple[Tensor, Tensor]:
    """How close a drawing is to each of the two colours, at every width and shift within a pixel:
    float32 [width, shift, 2, _PATCH, _PATCH]; an edge counts as if what is beside were 0.7 off.
    And of the unshifted ones the Fourier transform, for correlations: [2, width, …]."""
    middle = _PATCH / 2
    covers = [
        [_cover(subject, across, middle + x, middle + y, _PATCH, 3) for x, y in _SHIFTS]
        for across in _ACROSS
    ]
    away = 0.7 * (1 - torch.from_numpy(np.array(covers)))
    drawn = torch.exp(-away.square() / _WIDE**2) - np.exp(-((0.7 / _WIDE) ** 2))
    return drawn, torch.fft.rfft2(drawn[:, 0].transpose(0, 1), s=(63 + _PATCH,) * 2).conj()


def _jaccard(common: Tensor, seen: Tensor, drawn: Tensor, axis: int) -> Tensor:
    """Geometric mean over the two colours (``axis``) of what picture and drawing have in common."""
    return (common / (seen + drawn - common)).clamp(0, 1).prod(axis).sqrt()


def _boxes(sums: Tensor, box: int) -> Tensor:
    """Sums over the boxes around the 64 × 64 places, from the sums up to every corner."""
    low = _PATCH // 2 - box // 2
    first, last = slice(low, low + 64), slice(low + box, low + box + 64)
    rows = sums[..., last, :] - sums[..., first, :]
    return rows[..., last] - rows[..., first]


def likeness(images: Tensor, subject: Subject) -> Tensor:
    """How far pictures show a subject, at its best place and width: float32 [n] in [0, 1].

    For each of its two colours the overlap of where the picture has it and where a drawing does
    (what both have, by what either has); the geometric mean of both. About 0.95 on a clean
    drawing, near 0 where one of the colours is missing.

    Args:
        images: float [n, 3, 64, 64] in [0, 1], or another side, which is brought to 64.

    Raises:
        BookError: images of another form, or that hold NaN.
    """
    parts = prepare(images).split(32)  # what all places and widths have in common: 1 MB a picture
    return torch.cat([_likeness(part, subject) for part in parts])


def _likeness(images: Tensor, subject: Subject) -> Tensor:
    tones = torch.tensor([COLOURS[subject.colour], COLOURS[subject.second]])
    away = (images[:, None] - tones[None, :, :, None, None]).square().sum(2)  # [n, 2, 64, 64]
    near = F.pad(torch.exp(-away / _WIDE**2), [_PATCH // 2] * 4)
    drawn, waves = _templates(subject)
    powers = drawn.square().sum((-2, -1))  # [width, shift, 2]

    # At every place, unshifted; then at the best place with all shifts and the widths beside.
    common = torch.fft.irfft2(torch.fft.rfft2(near)[:, :, None] * waves, s=near.shape[-2:])
    common = common[..., :64, :64]
    boxes = [2 * min(round(0.6 * across) + 2, _PATCH // 2) + 1 for across in _ACROSS]
    sums = F.pad(near.square(), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)  # up to every corner
    seen = torch.stack([_boxes(sums, box) for box in boxes], 2)
    coarse = _jaccard(common, seen, powers[:, 0].T[None, :, :, None, None], 1)
    found = torch.zeros(len(images))
    for i, at in enumerate(coarse.flatten(1).argmax(1).tolist()):
        width, row, column = at // 64**2, at // 64 % 64, at % 64
        patch = near[i, :, row : row + _PATCH, column : column + _PATCH]
        around = slice(max(width - 1, 0), width + 2)
        both = (patch * drawn[around]).sum((-2, -1))  # [width, shift, 2]
        power = seen[i, :, around, row, column].T[:, None]
        found[i] = _jaccard(both, power, powers[around], 2).max()
    return found
