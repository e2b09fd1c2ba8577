"""The shapes world: pictures of one to four flat things whose every prompt can be checked exactly.

``sample`` draws scenes, ``draw`` paints one, ``caption`` says in plain English what is in it;
``parse`` reads such a caption back and ``words`` finds its words. What a picture of unknown
origin shows, ``lib.shapes_score`` tells.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (0.90, 0.08, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.10),
    "green": (0.08, 0.62, 0.18),
    "cyan": (0.08, 0.82, 0.90),
    "blue": (0.10, 0.20, 0.92),
    "purple": (0.52, 0.10, 0.74),
    "pink": (1.00, 0.38, 0.76),
}
SIZES = {"small": 15 / 64, "medium": 20 / 64, "large": 27 / 64}  # across, in sides of the picture
TEXTURES = ("plain", "striped", "dotted")
DARK = 0.5  # stripes and dots are the thing's own colour times this
# Upper and lower tone, which meet at the horizon; a plain ground has one.
BACKGROUNDS = {
    "white": ((1.00, 1.00, 1.00),) * 2,
    "grey": ((0.60, 0.60, 0.60),) * 2,
    "black": ((0.03, 0.03, 0.03),) * 2,
    "beach": ((0.72, 0.87, 0.96), (0.93, 0.85, 0.66)),
    "meadow": ((0.72, 0.87, 0.96), (0.62, 0.78, 0.46)),
    "night": ((0.08, 0.09, 0.20), (0.15, 0.19, 0.16)),
    "snow": ((0.74, 0.78, 0.84), (0.97, 0.98, 1.00)),
}
HORIZON = 0.6
RELATIONS = ("left of", "right of", "above", "below")
WEIGHTS = (0.35, 0.40, 0.15, 0.10)  # of one, two, three and four things in a scene


@dataclass(frozen=True)
class Thing:
    """``x`` and ``y`` are the centre, in sides of the picture, ``y`` downwards."""

    shape: str
    colour: str
    size: str = "medium"
    texture: str = "plain"
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Scene:
    """``relations`` are those that the caption says: (i, relation, j), true of the places."""

    things: tuple[Thing, ...]
    background: str = "white"
    relations: tuple[tuple[int, str, int], ...] = ()


def _known(kind: str, word: str, names) -> None:
    if word not in names:
        raise BookError(f"{kind} {word!r} is unknown; give one of {', '.join(names)}")


# --- drawing --------------------------------------------------------------------------------------

_TURN = np.arange(10) * math.pi / 5
_STAR = np.where(np.arange(10) % 2, 0.48, 1.12)[:, None] * np.stack(
    [np.sin(_TURN), -np.cos(_TURN)], 1
)
_TRIANGLE = np.array([(0.0, -1.0), (1.08, 0.88), (-1.08, 0.88)])


def _polygon(x, y, corners):
    """Even-odd rule."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points belong to a shape that is 2 across, centred at 0, ``y`` downwards: bool."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return _polygon(x, y, _TRIANGLE)
    if shape == "star":
        return _polygon(x, y - 0.08, _STAR)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "ring":
        return abs(x * x + y * y - 0.6525) <= 0.3975  # between radius 0.505 and 1.025
    u, v = 1.14 * x, 0.14 - 1.12 * y  # the heart: (u² + v² - 1)³ ≤ u² v³
    return (u * u + v * v - 1) ** 3 <= u * u * v**3


def _tone(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where a texture is dark, 0 elsewhere; ``x``, ``y`` from the centre, in 64ths of a side."""
    if texture == "striped":
        return np.broadcast_to((y + 1.75) % 7 < 3.5, np.broadcast_shapes(x.shape, y.shape))
    row = np.floor(y / 6 + 0.5)
    along = (x + 4 * (row % 2) + 4) % 8 - 4
    return along**2 + (y - 6 * row) ** 2 < 2.1**2


@lru_cache(maxsize=20_000)
def stamp(shape: str, across: float, texture: str, dx: float, dy: float, unit: float, fine: int):
    """Cover and darkness [side, side] of a thing ``across`` pixels wide whose centre lies ``dx``,
    ``dy`` pixels right of and below the middle pixel's upper left corner. ``unit``: pixels to a
    64th of the picture, in which textures are measured; ``fine``: samples to a pixel's side."""
    reach = math.ceil(0.6 * across) + 1
    at = (np.arange(2 * reach * fine) + 0.5) / fine - reach
    x, y = (at - dx)[None], (at - dy)[:, None]
    cover = inside(shape, x * 2 / across, y * 2 / across).astype(np.float32)
    blocks = (2 * reach, fine, 2 * reach, fine)
    dark = np.zeros((2 * reach, 2 * reach), np.float32)
    if texture != "plain":
        dark = (cover * _tone(texture, x / unit, y / unit)).reshape(blocks).mean((1, 3))
    return cover.reshape(blocks).mean((1, 3)), dark


def ground(background: str, size: int = 64) -> np.ndarray:
    """The picture without things: float32 [3, size, size]."""
    _known("background", background, BACKGROUNDS)
    above, below = np.array(BACKGROUNDS[background], np.float32)
    share = np.clip(np.arange(size) + 1 - HORIZON * size, 0, 1).astype(np.float32)  # below it
    column = above[:, None] * (1 - share) + below[:, None] * share
    return np.repeat(column[:, :, None], size, 2)


def draw(scene: Scene, size: int = 64) -> tuple[Tensor, Tensor]:
    """Paint a scene, smooth at the edges; a later thing covers an earlier one.

    Args:
        size: the picture's side in pixels.

    Returns:
        image float32 [3, size, size] in [0, 1], masks float32 [n_things, size, size] in [0, 1]:
        the share of each pixel in which a thing shows.

    Raises:
        BookError: an unknown shape, colour, size, texture or background.
    """
    image = ground(scene.background, size)
    masks = np.zeros((len(scene.things), size, size), np.float32)
    fine = 4 if size > 40 else 6
    for i, thing in enumerate(scene.things):
        for kind, names in _KINDS.items():
            _known(kind, getattr(thing, kind), names)
        # Centres lie on a grid of a quarter of a pixel, so that stamps can be used again.
        cx, cy = (round(4 * size * at) / 4 for at in (thing.x, thing.y))
        column, row = math.floor(cx), math.floor(cy)
        across = SIZES[thing.size] * size
        cover, dark = stamp(
            thing.shape, across, thing.texture, cx - column, cy - row, size / 64, fine
        )
        reach = len(cover) // 2
        top, left = row - reach, column - reach
        rows = slice(max(top, 0), min(top + 2 * reach, size))
        columns = slice(max(left, 0), min(left + 2 * reach, size))
        part = (slice(rows.start - top, rows.stop - top),)
        part += (slice(columns.start - left, columns.stop - left),)
        cover, dark = cover[part], dark[part]
        colour = np.array(COLOURS[thing.colour], np.float32)[:, None, None]
        image[:, rows, columns] *= 1 - cover
        image[:, rows, columns] += colour * (cover - (1 - DARK) * dark)
        masks[:i, rows, columns] *= 1 - cover
        masks[i, rows, columns] = cover
    return torch.from_numpy(image).clamp(0, 1), torch.from_numpy(masks)


def pictures(scenes, size: int = 64) -> Tensor:
    """The images of many scenes: float32 [n, 3, size, size]."""
    return torch.stack([draw(scene, size)[0] for scene in scenes])


_KINDS = dict(shape=SHAPES, colour=COLOURS, size=SIZES, texture=TEXTURES)

# --- sampling -------------------------------------------------------------------------------------


def holds(a, relation: str, b) -> bool:
    """Whether ``a`` is left of (right of, above, below) ``b``: clearly, and more that than not.

    ``a`` and ``b`` are anything with a centre ``x``, ``y`` in sides of the picture.
    """
    _known("relation", relation, RELATIONS)
    dx, dy = b.x - a.x, b.y - a.y
    along, other = (dx, dy) if relation in RELATIONS[:2] else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along >= 0.12 and along >= 0.75 * abs(other)


def _place(things: list[Thing], rng: random.Random) -> list[Thing]:
    """Give every thing a centre: inside the picture, boxes at least a pixel of 64 apart."""
    gap, edge = 1.5 / 64, 0.5 / 64
    for _ in range(8):
        placed: list[Thing] = []
        for thing in things:
            half = 0.56 * SIZES[thing.size]
            low, high = half + edge, 1 - half - edge
            for _ in range(25):
                x, y = rng.uniform(low, high), rng.uniform(low, high)
                if all(
                    max(abs(x - o.x), abs(y - o.y)) >= half + 0.56 * SIZES[o.size] + gap
                    for o in placed
                ):
                    placed.append(replace(thing, x=x, y=y))
                    break
            else:
                break
        if len(placed) == len(things):
            return placed
    # Four large ones leave no room for chance: a quarter of the picture each.
    quarters = rng.sample([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)], len(things))
    placed = []
    for thing, (x, y) in zip(things, quarters, strict=True):
        slack = max(0.25 - 0.56 * SIZES[thing.size] - edge, 0)
        x, y = (at + rng.uniform(-slack, slack) for at in (x, y))
        placed.append(replace(thing, x=x, y=y))
    return placed


def _barred(things, without) -> bool:
    looks = [(t.shape, t.colour) for t in things]
    for item in without:
        if isinstance(item[0], str):
            if tuple(item) in looks:
                return True
        elif any({a, b} == set(map(tuple, item)) for a, b in combinations(looks, 2)):
            return True
    return False


def sample(
    n: int, seed: int, counts=WEIGHTS, without=(), same: float = 0.2, related: float = 0.4
) -> list[Scene]:
    """``n`` scenes of one to four things that do not overlap; any combination occurs.

    Args:
        counts: weights of one, two, three and four things.
        without: what no scene may show, for tests of composition: (shape, colour) pairs, and
            pairs of such pairs, which then are never together.
        same: chance that the things of a scene of several are alike, place apart.
        related: chance that a scene of several things tells a relation that its caption says.

    Raises:
        BookError: fewer than one scene, or weights of another form.
    """
    if n < 1 or not 1 <= len(counts) <= 4 or min(counts) < 0 or sum(counts) <= 0:
        raise BookError("sample takes n ≥ 1 and weights of one, two, three and four things")
    rng = random.Random(seed)
    names, tones = list(COLOURS), list(BACKGROUNDS)
    scenes: list[Scene] = []

    def look() -> Thing:
        size = rng.choices(list(SIZES), (0.2, 0.6, 0.2))[0]
        texture = rng.choices(TEXTURES, (0.7, 0.15, 0.15))[0]
        return Thing(rng.choice(SHAPES), rng.choice(names), size, texture)

    while len(scenes) < n:
        count = rng.choices(range(1, len(counts) + 1), counts)[0]
        things = [look()] * count if rng.random() < same else [look() for _ in range(count)]
        if _barred(things, without):
            continue
        things = _place(things, rng)
        looks = [(t.shape, t.colour) for t in things]
        told = ()
        if rng.random() < related:
            clear = [
                (i, r, j)
                for i, j in permutations(range(count), 2)
                for r in RELATIONS
                if looks.count(looks[i]) == looks.count(looks[j]) == 1
                and holds(things[i], r, things[j])
                and _clearly(things[i], things[j])
            ]
            told = (rng.choice(clear),) if clear else ()
        tone = "white" if rng.random() < 0.42 else rng.choice(tones)
        scenes.append(Scene(tuple(things), tone, told))
    return scenes


def _clearly(a: Thing, b: Thing) -> bool:
    """No near diagonal, where one of two relations would be said and the other be as true."""
    dx, dy = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return dx <= 0.8 * dy


# --- captions -------------------------------------------------------------------------------------

_NUMBERS = ("a", "two", "three", "four")
SAID = {  # ways to say an attribute, the plainest first
    "small": ("small", "small", "little"),
    "large": ("large", "large", "big"),
    "left of": ("to the left of", "to the left of", "left of"),
    "right of": ("to the right of", "to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "below", "under"),
    "white": ("on a white background", "on white"),
    "grey": ("on a grey background", "on grey"),
    "black": ("on a black background", "on black"),
    "beach": ("on a beach", "at the beach"),
    "meadow": ("in a meadow", "on a meadow"),
    "night": ("at night", "in the night"),
    "snow": ("on snow", "in the snow"),
}
_OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")


def plural(shape: str) -> str:
    """ "crosses", "stars"."""
    return shape + ("es" if shape == "cross" else "s")


def _noun_phrase(group: list[Thing], rng: random.Random) -> str:
    """What is said of things of one shape and colour: only what is true of all of them."""
    first = group[0]
    size = first.size if all(t.size == first.size for t in group) else "medium"
    texture = first.texture if all(t.texture == first.texture for t in group) else "plain"
    colour = first.colour if rng.random() < 0.87 else ""
    size = rng.choice(SAID[size]) if size != "medium" and rng.random() < 0.9 else ""
    texture = texture if texture != "plain" and rng.random() < 0.9 else ""
    after, middle = "", [texture, colour]
    if texture and rng.random() < 0.25:
        after, middle[0] = f" with {dict(striped='stripes', dotted='dots')[texture]}", ""
    elif rng.random() < 0.3:
        middle.reverse()
    noun = first.shape if len(group) == 1 else plural(first.shape)
    phrase = " ".join(filter(None, [size, *middle, noun])) + after
    number = _NUMBERS[len(group) - 1]
    if number == "a" and phrase[0] in "aeiou":
        number = "an"
    return f"{number} {phrase}"


def caption(scene: Scene, seed: int) -> str:
    """Say in plain English what a scene shows; everything said is true of it.

    Things of one shape and colour are counted ("two red squares"); a size other than medium, a
    texture other than plain and the colour are said mostly, ``scene.relations`` always. A
    background that is not said is white; any other is always said.
    """
    rng = random.Random(seed)
    groups: dict[tuple, list[int]] = {}
    for i, thing in enumerate(scene.things):
        groups.setdefault((thing.shape, thing.colour), []).append(i)
    parts = {
        members[0]: _noun_phrase([scene.things[i] for i in members], rng)
        for members in groups.values()
    }
    order = list(parts)
    rng.shuffle(order)
    told = [r for r in scene.relations if r[0] in parts and r[2] in parts][:1]
    for i, relation, j in told:
        order = [k for k in order if k not in (i, j)]
        parts[i] = f"{parts[i]} {rng.choice(SAID[relation])} {parts[j]}"
        order.append(i)  # last, so that nothing follows that could seem to belong to it
    said = [parts[k] for k in order]
    if len(said) == 2 and not told:
        text = rng.choice((" and ", " and ", " and ", " next to ", " with ")).join(said)
    elif len(said) > 1:
        last = ", and " if told else rng.choice((" and ", ", and "))
        text = ", ".join(said[:-1]) + last + said[-1]
    else:
        text = said[0]
    if scene.background != "white" or rng.random() < 0.08:
        where = rng.choice(SAID[scene.background])
        text = rng.choice((f"{text} {where}", f"{text}, {where}", f"{where}, {text}"))
        if text.startswith(where):
            return text
    return rng.choice(_OPENINGS) + text
