"""Prompts of the shapes world read back: what they want, where their words stand, and test sets.

``parse`` reads every caption that ``lib.shapes.caption`` makes, and plain variations of it.
"""

import random
import re
from dataclasses import dataclass, field
from itertools import permutations

from lib.errors import BookError
from lib.shapes import BACKGROUNDS, COLOURS, RELATIONS, SAID, SHAPES, Scene, holds, plural

Span = tuple[int, int]


@dataclass(frozen=True)
class Want:
    """A thing that a prompt asks for; None is what it leaves open.

    ``spans`` says where its words stand in the prompt, [begin, end) in characters: ``"shape"`` is
    the noun; ``"colour"``, ``"size"``, ``"texture"`` and ``"number"`` where they are said. Things
    that are counted together share their words.
    """

    shape: str
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    spans: dict[str, Span] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for; ``background`` None where it names none, ``where`` its span."""

    things: tuple[Want, ...]
    background: str | None = None
    relations: tuple[tuple[int, str, int], ...] = ()
    text: str = field(default="", compare=False)
    where: Span | None = field(default=None, compare=False)


def _phrases() -> dict[tuple[str, ...], tuple[str, object]]:
    """Every run of words that means something: words -> (kind, value)."""
    said: dict[str, tuple[str, object]] = {}
    for shape in SHAPES:
        said[shape] = ("shape", shape)
        said[plural(shape)] = ("plural", shape)
    for colour in COLOURS:
        said[colour] = ("colour", colour)
    for kind, words in {
        ("size", "small"): "small, little, tiny",
        ("size", "medium"): "medium, medium sized",
        ("size", "large"): "large, big, huge",
        ("texture", "plain"): "plain",
        ("texture", "striped"): "striped, stripy",
        ("texture", "dotted"): "dotted, spotted",
        ("after", "striped"): "with stripes",
        ("after", "dotted"): "with dots, with spots",
        ("relation", "left of"): "to the left of, on the left of, left of",
        ("relation", "right of"): "to the right of, on the right of, right of",
        ("relation", "above"): "above, over, on top of",
        ("relation", "below"): "below, under, underneath, beneath",
        ("background", "beach"): "on a beach, on the beach, at a beach, at the beach",
        ("background", "meadow"): "in a meadow, in the meadow, on a meadow, on the meadow",
        ("background", "night"): "at night, in the night, by night",
        ("background", "snow"): "on snow, in snow, on the snow, in the snow",
        ("number", 1): "a, an, one, the, 1",
        ("number", 2): "two, 2",
        ("number", 3): "three, 3",
        ("number", 4): "four, 4",
        ("join", None): "and, with, together with, next to, beside, near",
        ("opening", None): "a picture of, a drawing of, an image of, a photo of, a painting of, "
        "there is, there are",
    }.items():
        said |= dict.fromkeys(words.split(", "), kind)
    for tone in ("white", "grey", "gray", "black"):
        kind = ("background", tone.replace("gray", "grey"))
        for words in ("on a {} background", "on {}", "against a {} background"):
            said[words.format(tone)] = kind
    found = {tuple(words.split()): kind for words, kind in said.items()}
    return found | {(mark,): ("join", None) for mark in ",.;"}


_PHRASES = _phrases()
_LONGEST = max(map(len, _PHRASES))


def parse(prompt: str) -> Wanted:
    """What a prompt asks for: things in the order of the text, background, relations.

    A relation binds the things named just before and just after it.

    Raises:
        BookError: a word that the world does not know, or one that stands where it means nothing.
    """
    tokens = list(re.finditer(r"[^\s,.;]+|[,.;]", prompt.lower().replace("-", " ")))
    words = [token[0] for token in tokens]
    things: list[Want] = []
    relations: list[tuple[int, str, int]] = []
    background, where, relation = None, None, None
    last: list[int] = []  # the things named last, which a relation or "with dots" follows
    open_: dict[str, tuple[object, Span]] = {}  # said, and waiting for its noun

    def wrong(why: str) -> BookError:
        return BookError(f"prompt {prompt!r}: {why}")

    at = 0
    while at < len(words):
        for length in range(min(_LONGEST, len(words) - at), 0, -1):
            if tuple(words[at : at + length]) in _PHRASES:
                break
        else:
            raise wrong(
                f"{words[at]!r} is no word of the shapes world here; it knows "
                f"{', '.join(SHAPES)} in {', '.join(COLOURS)}"
            )
        kind, value = _PHRASES[tuple(words[at : at + length])]
        span = (tokens[at].start(), tokens[at + length - 1].end())
        text = prompt[slice(*span)]
        at += length
        if kind in ("shape", "plural"):
            number, _ = open_.get("number", (1, None))
            if kind == "plural" and number == 1:
                raise wrong(f"say how many {text}: two, three or four")
            said = {k: v for k, (v, _) in open_.items() if k != "number"}
            spans = {k: s for k, (_, s) in open_.items()} | {"shape": span}
            before, last = last, list(range(len(things), len(things) + number))
            things += [Want(value, **said, spans=spans) for _ in last]
            if relation:
                relations += [(i, relation, j) for i in before for j in last]
            open_, relation = {}, None
        elif kind in ("colour", "size", "texture", "number"):
            if kind in open_:
                raise wrong(f"{text!r} follows {prompt[slice(*open_[kind][1])]!r} before a shape")
            open_[kind] = (value, span)
        elif open_:
            first = prompt[slice(*next(iter(open_.values()))[1])]
            raise wrong(f"{first!r} belongs to no shape, {text!r} follows")
        elif kind == "after":
            if not last or things[last[0]].texture:
                raise wrong(f"{text!r} belongs to no shape")
            for i in last:
                t = things[i]
                spans = t.spans | {"texture": span}
                things[i] = Want(t.shape, t.colour, t.size, value, spans=spans)
        elif kind == "relation":
            if not last or relation:
                raise wrong(f"{text!r} needs a shape before and after it")
            relation = value
        elif kind == "background":
            if background not in (None, value):
                raise wrong(f"it names two backgrounds, {background} and {value}")
            background, where = value, span
    if open_ or relation:
        raise wrong("it ends before its last shape")
    if not 1 <= len(things) <= 4:
        raise wrong(f"it names {len(things) or 'no'} things; a picture has one to four")
    return Wanted(tuple(things), background, tuple(relations), prompt, where)


def _fits(want: Want, thing) -> bool:
    return all(
        getattr(want, kind) in (None, getattr(thing, kind))
        for kind in ("shape", "colour", "size", "texture")
    )


def words(caption: str, scene: Scene | None = None) -> list[dict[str, Span]]:
    """Where each thing's words stand in a caption: ``Want.spans``, one dict a thing.

    Args:
        scene: puts the dicts in the order of its things; without it they have the caption's.

    Raises:
        BookError: a caption that cannot be read, or that does not tell of this scene.
    """
    wanted = parse(caption)
    if scene is None:
        return [want.spans for want in wanted.things]
    if len(wanted.things) == len(scene.things):
        for order in permutations(range(len(scene.things))):  # order[k]: the thing that k tells of
            told = [scene.things[k] for k in order]
            if all(map(_fits, wanted.things, told)) and all(
                holds(told[i], relation, told[j]) for i, relation, j in wanted.relations
            ):
                spans = [want.spans for want in wanted.things]
                return [spans[order.index(i)] for i in range(len(order))]
    raise BookError(f"caption {caption!r} does not tell of this scene")


_PROMPTS = {
    "single": "{0}",
    "two": "{0} and {1}",
    "three": "{0}, {1} and {2}",
    "relation": "{0} {turn} {1}",
    "count": "{turn} {colour} {many}",
    "size": "a {turn} {colour} {shape}",
    "texture": "a {turn} {colour} {shape}",
    "background": "{0} {turn}",
}
_TURNS = {
    "relation": [SAID[relation][0] for relation in RELATIONS],
    "count": ["two", "three", "four"],
    "size": ["small", "large"],
    "texture": ["striped", "dotted"],
    "background": [SAID[background][0] for background in BACKGROUNDS],
}


def prompts(kind: str, n: int, seed: int, among=None) -> list[str]:
    """A test set: ``n`` prompts of one kind, in one plain wording, the looks about equally often.

    Args:
        kind: ``"single"`` (a red circle), ``"two"`` (a red circle and a blue square: another shape
            and another colour), ``"three"``, ``"relation"``, ``"count"`` (two to four alike),
            ``"size"``, ``"texture"`` or ``"background"``.
        among: the (shape, colour) pairs to draw from, or with ``"two"`` and ``"relation"`` pairs
            of such pairs, for tests of what a model was not shown; by default all.

    Raises:
        BookError: another kind, fewer than one prompt, or pairs that cannot make such a prompt.
    """
    if kind not in _PROMPTS:
        raise BookError(f"prompts of kind {kind!r} are unknown; give one of {', '.join(_PROMPTS)}")
    if n < 1:
        raise BookError(f"prompts needs at least one, not {n}")
    rng = random.Random(seed)
    looks = [(s, c) for s in SHAPES for c in COLOURS] if among is None else list(among)
    each = {"two": 2, "relation": 2, "three": 3}.get(kind, 1)
    together = bool(looks) and not isinstance(looks[0][0], str)
    if not looks or (together and each != 2):
        raise BookError(f"prompts of kind {kind!r} draw among (shape, colour) pairs, at least one")

    def deck(cards):
        while True:
            yield from rng.sample(list(cards), len(cards))

    drawn, turns = deck(looks), deck(_TURNS.get(kind, [""]))

    def group() -> list[tuple[str, str]]:
        if together:
            return rng.sample(list(next(drawn)), 2)
        found: list[tuple[str, str]] = []
        for _ in range(20 * len(looks)):
            look = next(drawn)
            if all(look[0] != other[0] and look[1] != other[1] for other in found):
                found.append(look)
            if len(found) == each:
                return found
        raise BookError(f"prompts of kind {kind!r} need {each} looks without a shape in common")

    texts = []
    for _ in range(n):
        looked = group()
        named = [f"{'an' if colour == 'orange' else 'a'} {colour} {s}" for s, colour in looked]
        shape, colour = looked[0]
        said = dict(turn=next(turns), shape=shape, colour=colour, many=plural(shape))
        texts.append(_PROMPTS[kind].format(*named, **said))
    return texts
