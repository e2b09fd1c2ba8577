"""`book compare A B` for two sweeps: the points that both have, the claims that flipped first."""

from pathlib import Path

from lib.book import record, sweep_page, sweep_state
from lib.book.compare import ABSENT, differences
from lib.book.status import table
from lib.errors import BookError


def text(book: Path, a: Path, b: Path) -> str:
    """The comparison of the sweeps in the folders `a` and `b`."""
    left, right = load(book, a), load(book, b)
    fixed = {
        name: (left["fixed"].get(name, ABSENT), right["fixed"].get(name, ABSENT))
        for name in [*left["fixed"], *right["fixed"]]
        if name not in left["axes"] and name not in right["axes"]
    }
    blocks = [_heading(left, right), *_claims(left, right, set(fixed))]
    sides = [{name: pair[side] for name, pair in fixed.items()} for side in (0, 1)]
    blocks.append(differences("parameters", *sides))
    sides = [
        {name: ", ".join(map(sweep_page.text, values)) for name, values in each["axes"].items()}
        for each in (left, right)
    ]
    blocks.append(differences("varied", *sides))
    blocks.append(differences("versions", left["versions"], right["versions"]))
    return "\n\n".join(blocks)


def load(book: Path, folder: Path) -> dict:
    """The state of a sweep, with `runs`: the record of each finished point, by its key."""
    state = sweep_state.read(folder)
    runs = {}
    for point in state["points"]:
        if point["state"] == "ok":
            runs[point["key"]] = record.read(folder.parent.parent / point["run"])
    return state | {"runs": runs}


def _heading(left: dict, right: dict) -> str:
    rows = [("", "A", "B")]
    for name in ("sweep", "chapter", "profile", "state"):
        rows.append((name, str(left[name]), str(right[name])))
    finished, held = [], []
    for each in (left, right):
        finished.append(f"{len(each['runs'])} of {len(each['points'])}")
        found = [claim for run in each["runs"].values() for claim in run["claims"]]
        held.append("{} of {}".format(*record.score(found)))
    return table([*rows, ("points finished", *finished), ("claims held", *held)])


def _by_place(each: dict, leave: set[str]) -> dict[tuple, dict]:
    """Records by the values that tell points apart; `leave` holds the parameters that do not."""
    found = {}
    for run in each["runs"].values():
        values = {name: value for name, value in run["parameters"].items() if name not in leave}
        found[tuple(sorted(values.items()))] = run
    return found


def _claims(left: dict, right: dict, leave: set[str]) -> list[str]:
    """Flips and gaps one by one, then each claim's count over the points that both have."""
    a, b = _by_place(left, leave), _by_place(right, leave)
    both = [place for place in a if place in b]
    only = f"points in both: {len(both)}; only in A: {len(a) - len(both)}"
    only += f"; only in B: {len(b) - len(both)}"
    if not both:
        raise BookError(f"sweeps {left['sweep']} and {right['sweep']} have no finished point alike")
    flips, gaps, counts = [], [], {}
    for place in both:
        label = ", ".join(
            f"{name} {sweep_page.text(value)}" for name, value in place
            if name in left["axes"] or name in right["axes"]
        )  # fmt: skip
        sides = [_named(a[place]), _named(b[place])]
        for name in dict.fromkeys([*sides[0], *sides[1]]):
            pair = [side.get(name) for side in sides]
            count = counts.setdefault(name, [0, 0, 0])
            for index, claim in enumerate(pair):
                count[index] += bool(claim and claim["holds"])
            count[2] += 1
            ours = tuple(claim["ours"] if claim else ABSENT for claim in pair)
            if None in pair:
                side = "B" if pair[0] is None else "A"
                gaps.append((f"only in {side}", label, name[0], *ours, name[1]))
            elif pair[0]["holds"] != pair[1]["holds"]:
                words = [
                    f"{'held' if claim['holds'] else 'not held'}: {claim['ours']}" for claim in pair
                ]
                flips.append(("FLIPPED", label, name[0], *words, name[1]))
    total = sum(count[2] for count in counts.values())
    blocks = [f"{only}\nclaims: {len(flips)} flipped of {total}"]
    if flips or gaps:
        blocks.append(table([("", "point", "paper", "A", "B", "claim"), *flips, *gaps]))
    rows = [
        (name[0], f"{count[0]} of {count[2]}", f"{count[1]} of {count[2]}", name[1])
        for name, count in counts.items()
    ]
    if rows:
        blocks.append("held\n" + table([("paper", "A", "B", "claim"), *rows]))
    return blocks


def _named(run: dict) -> dict[tuple[str, str], dict]:
    return {(claim["paper"], claim["says"]): claim for claim in run["claims"]}
