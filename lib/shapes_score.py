"""How far pictures show what a prompt of the shapes world asked for, from ``lib.shapes_look``."""

from collections.abc import Callable, Sequence
from itertools import permutations

from torch import Tensor

from lib.errors import BookError
from lib.shapes import holds
from lib.shapes_look import Found, Seen, look
from lib.shapes_text import Want, Wanted, parse

_SPECKS = 0.01  # share of a picture that may be neither background nor thing
_WORTH = dict(shape=2.0, colour=1.5, size=0.2, texture=0.2)


def _assign(wanted: Wanted, things: tuple[Found, ...]) -> list[Found | None]:
    """For every wanted thing the one found that is most likely meant; none twice."""
    pool: list[Found | None] = list(things[:6])
    pool += [None] * (len(wanted.things) - len(pool))
    worth = [[_worth(want, thing) for thing in pool] for want in wanted.things]

    def total(order: tuple[int, ...]) -> float:
        taken = [pool[i] for i in order]
        related = sum(_related(taken, relation) for relation in wanted.relations)
        return sum(row[i] for row, i in zip(worth, order, strict=True)) + 0.5 * related

    best = max(permutations(range(len(pool)), len(wanted.things)), key=total)
    return [pool[i] for i in best]


def _worth(want: Want, thing: Found | None) -> float:
    right = {kind for kind in _WORTH if getattr(want, kind) == getattr(thing, kind, "") is not None}
    return sum(_WORTH[kind] for kind in right) + ({"shape", "colour"} <= right)


def _related(order, relation) -> bool:
    i, name, j = relation
    return order[i] is not None and order[j] is not None and holds(order[i], name, order[j])


def judge(seen: Seen, wanted: Wanted) -> dict:
    """How far what was seen is what was wanted: a row of ``score``."""
    order = _assign(wanted, seen.things)
    said = {want.colour for want in wanted.things if want.colour}
    rows = []
    for want, thing in zip(wanted.things, order, strict=True):
        row: dict = {"want": want, "found": thing, "leak": None}
        for kind in _WORTH:
            value = getattr(want, kind)
            row[kind] = None if value is None else getattr(thing, kind, None) == value
        row["both"] = row["shape"] and row["colour"] is not False
        if thing is not None:
            others = said - {want.colour}
            row["leak"] = sum(share for c, share in thing.colours.items() if c in others)
        rows.append(row)
    off = [row for row in rows if row["shape"] and row["colour"] is False]
    result = {
        "things": rows,
        "count": len(seen.things) == len(wanted.things),
        "missing": sum(not row["shape"] for row in rows),
        "extra": max(len(seen.things) - len(wanted.things), 0),
        "swapped": len(off) > 1 and all(row["found"].colour in said for row in off),
        "relation": None,
        "background": None,
        "sure": seen.background is not None
        and seen.specks < _SPECKS
        and all(t.shape is not None and t.colour is not None for t in seen.things),
        "seen": seen,
    }
    if wanted.relations:
        result["relation"] = all(
            rows[i]["both"] and rows[j]["both"] and _related(order, (i, name, j))
            for i, name, j in wanted.relations
        )
    if wanted.background is not None:
        result["background"] = seen.background == wanted.background
    result["all"] = (
        result["count"]
        and seen.specks < _SPECKS
        and result["relation"] is not False
        and result["background"] is not False
        and all(row["both"] and False not in (row["size"], row["texture"]) for row in rows)
    )
    return result


def score(
    images: Tensor,
    wanted: str | Wanted | Sequence[str | Wanted],
    by: Callable[[Tensor], list[Seen]] = look,
) -> list[dict]:
    """Judge pictures against their prompts.

    Args:
        images: as for ``look``.
        wanted: a prompt, or what ``parse`` makes of one; one for all pictures or one for each.
        by: who looks; ``shapes_reader.look`` gives a trained network's opinion.

    Returns:
        a row a picture. ``all``: everything that the prompt says is there, and nothing besides;
        ``count``: as many things as wanted; ``missing``, ``extra``: how many are; ``swapped``: two
        or more stand in each other's colours; ``relation`` and ``background`` right, None where
        the prompt says nothing; ``sure``: nothing in the picture was hard to tell; ``seen``: what
        ``look`` saw. ``things`` has a row for each wanted thing: ``found`` is the one taken for it
        or None; ``shape`` (it is present), ``colour``, ``both``, ``size``, ``texture`` right, None
        where unsaid; ``leak``: share of its pixels in other wanted things' colours.

    Raises:
        BookError: as ``look`` and ``parse``; pictures and prompts that differ in number.
    """
    seen = by(images)
    if isinstance(wanted, (str, Wanted)):
        wanted = [wanted] * len(seen)
    if len(wanted) != len(seen):
        raise BookError(f"score needs a prompt a picture, not {len(wanted)} for {len(seen)}")
    read = [parse(w) if isinstance(w, str) else w for w in wanted]
    return [judge(s, w) for s, w in zip(seen, read, strict=True)]
