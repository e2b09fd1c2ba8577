"""`book compare A B`: two runs or two sweeps side by side, the claims that flipped first."""

from pathlib import Path

from lib.book import params, places, record
from lib.book.status import table
from lib.errors import BookError

ABSENT = "–"


def text(book: Path, a: str, b: str) -> str:
    """The comparison of two runs; each is a run's id, its folder, or a chapter's slug.

    Or of two sweeps, each an id or a folder. Raises BookError where one of them is none of these.
    """
    sweeps = [sweep_folder(book, name) for name in (a, b)]
    if all(sweeps):
        from lib.book import sweep_compare

        return sweep_compare.text(book, *sweeps)
    if any(sweeps):
        load(book, b if sweeps[0] else a)  # where it is nothing at all, that is the error
        raise BookError("compare two runs or two sweeps, not one of each")
    left, right = load(book, a), load(book, b)
    blocks = [_heading(left, right), _claims(left, right)]
    for title, name in (("parameters", "parameters"), ("versions", "versions")):
        blocks.append(differences(title, left[name], right[name]))
    return "\n\n".join(block for block in blocks if block)


def sweep_folder(book: Path, name: str) -> Path | None:
    """The folder of the sweep `name` (its id, the beginning of its id, or its folder), or None."""
    folder = Path(name).expanduser()
    folder = folder.parent if folder.name == "sweep.json" else folder
    if (folder / "sweep.json").is_file():
        return folder.resolve()
    known = {path.parent.name: path.parent for path in book.glob("runs/*/sweeps/*/sweep.json")}
    matches = [each for each in known if each == name] or [
        each for each in known if len(name) > 1 and each.startswith(name)
    ]
    if (book / "chapters" / f"{name}.ipynb").is_file():
        return None  # a chapter named like the beginning of an id
    if len(matches) > 1:
        raise BookError(f"{name!r} begins {len(matches)} sweep ids, say more of it")
    return known[matches[0]] if matches else None


def load(book: Path, name: str) -> dict:
    """The record of a run: of the folder or id `name`, or of the chapter's stored outputs."""
    folder = Path(name).expanduser()
    if folder.name == "run.json":
        folder = folder.parent
    if (folder / "run.json").is_file():
        return _complete(record.read(folder), folder.name)
    if (book / "chapters" / f"{name}.ipynb").is_file():
        return _stored(book, name)
    runs = {path.parent.name: path.parent for path in (book / "runs").glob("*/*/run.json")}
    matches = [run for run in runs if run == name] or [run for run in runs if run.startswith(name)]
    if len(matches) == 1:
        return _complete(record.read(runs[matches[0]]), matches[0])
    if matches:
        raise BookError(f"{name!r} begins {len(matches)} run ids, say more of it: {matches[0]}, …")
    hint = places.nearest(name, sorted(runs)[::-1] + places.slugs(book))
    raise BookError(f"no run or chapter {name!r}{hint}")


def _complete(facts: dict, label: str) -> dict:
    """A record with every field that a comparison reads, also from an interrupted run."""
    empty = {"chapter": label, "parameters": {}, "versions": {}, "claims": [], "status": "unknown"}
    return empty | facts | {"label": label}


def _stored(book: Path, slug: str) -> dict:
    notebook = places.read_notebook(book / "chapters" / f"{slug}.ipynb")
    run = notebook.metadata.get("book", {}).get("last_run")
    if not run:
        raise BookError(f"chapter {slug} has no stored run: `book run {slug} --store` makes one")
    parameters = params.read_parameters(notebook, f"chapters/{slug}.ipynb")
    return run | {
        "label": f"{slug}, stored {run['date']}",
        "chapter": slug,
        "status": "ok",
        "profile": "default",
        "parameters": {name: parameter.default for name, parameter in parameters.items()},
        "claims": record.claims(notebook),
    }


def _heading(left: dict, right: dict) -> str:
    rows = [("", "A", "B")]
    for name in ("label", "chapter", "status", "profile", "seconds", "peak_gib"):
        rows.append((name, str(left.get(name, ABSENT)), str(right.get(name, ABSENT))))
    for run in (left, right):
        held, total = record.score(run["claims"])
        run["score"] = f"{held} of {total}"
    return table([*rows, ("claims held", left["score"], right["score"])])


def _claims(left: dict, right: dict) -> str:
    """All claims: flipped ones first, then those only one run has, then the rest in order."""
    sides = [
        {(claim["paper"], claim["says"]): claim for claim in run["claims"]} for run in (left, right)
    ]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    if not names:
        return "no claims in either run"
    rows = []
    for name in names:
        a, b = (side.get(name) for side in sides)
        change, order = "", 2
        if a is None or b is None:
            change, order = f"only in {'A' if b is None else 'B'}", 1
        elif a["holds"] != b["holds"]:
            change, order = "FLIPPED", 0
        rows.append((order, (change, name[0], _side(a), _side(b), name[1])))
    rows.sort(key=lambda row: row[0])
    flipped = sum(order == 0 for order, _ in rows)
    title = f"claims: {flipped} flipped of {len(rows)}"
    return title + "\n" + table([("", "paper", "A", "B", "claim"), *(cells for _, cells in rows)])


def _side(claim: dict | None) -> str:
    if claim is None:
        return ABSENT
    return f"{'held' if claim['holds'] else 'not held'}: {claim['ours']}"


def differences(title: str, left: dict, right: dict) -> str:
    """The names whose values differ, as a table under `title`; a line where none does."""
    rows = [
        (name, str(left.get(name, ABSENT)), str(right.get(name, ABSENT)))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]
    if not rows:
        return f"{title}: the same"
    return f"{title} that differ\n" + table([("", "A", "B"), *rows])
