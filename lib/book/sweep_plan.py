"""Which points a sweep has: the product of the typed values, each checked, each with a name.

A point's name is a hash of what its result rests on (the chapter's parts as `stale` lists them,
every parameter, the profile), so the same point has the same name in every sweep.
"""

import csv
import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from lib.book import params, places, stale
from lib.errors import BookError

MAX_POINTS = 10_000


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `key` names it; `values` holds every parameter of the chapter."""

    key: str
    values: dict[str, params.Value]


@dataclass(frozen=True)
class Plan:
    """A sweep before it starts. `axes`: the parameters with more than one value, in order.

    files: parameter → file or folder of this machine that its value names. repeated: how many
    points were equal to an earlier one and are run once.
    """

    slug: str
    profile: str
    axes: dict[str, list[params.Value]]
    points: list[Point]
    parts: dict[str, str]
    repeated: int = 0
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same for the same points, so that the same command finds its sweep again."""
        keys = json.dumps(sorted(point.key for point in self.points))
        return "s" + hashlib.sha256(keys.encode()).hexdigest()[:10]

    @property
    def fixed(self) -> dict[str, params.Value]:
        """The parameters that are the same in every point."""
        values = self.points[0].values
        return {name: value for name, value in values.items() if name not in self.axes}


def make(
    book: Path,
    slug: str,
    notebook: nbformat.NotebookNode,
    typed: list[str],
    seeds: int | None = None,
    profile: str = "default",
) -> Plan:
    """The plan of a sweep; `typed` holds `name=a,b,c` strings.

    seeds: that many values of the chapter's `seed`, counted from its own. Raises BookError for
    anything that `book run` would refuse in one of the points.
    """
    known = params.read_parameters(notebook, f"chapters/{slug}.ipynb")
    profiles = notebook.metadata.get("book", {}).get("profiles", {})
    lists = [_listed(item) for item in typed]
    if seeds is not None:
        base = params.chosen_values(known, profiles, profile, [])
        lists.append(_seeds(slug, known, base, typed, seeds))
    count = math.prod(map(len, lists))
    if count > MAX_POINTS:
        raise BookError(f"{count} points are too many for one sweep; at most {MAX_POINTS}")
    parts = stale.parts(book, slug, notebook)
    found: dict[str, Point] = {}
    files: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    for items in itertools.product(*lists):
        values = params.chosen_values(known, profiles, profile, list(items))
        named = dict(values)
        for name, value in values.items():
            # A typed path is absolute by now; a name of a model is not.
            if params.names_a_file(known[name]) and value[:1] == "/" and Path(value).exists():
                if value not in digests:
                    digests[value] = content_digest(Path(value))
                    files.setdefault(name, []).append(value)
                named[name] = digests[value]
        key = point_key(parts, named, profile)
        found.setdefault(key, Point(key, values))
    points = list(found.values())
    axes = {name: list(dict.fromkeys(point.values[name] for point in points)) for name in known}
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    return Plan(slug, profile, axes, points, parts, count - len(points), files)


def point_key(parts: dict[str, str], values: dict, profile: str) -> str:
    """The name of a point: `p` and 12 hex digits."""
    text = json.dumps([parts, values, profile], sort_keys=True)
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _listed(item: str) -> list[str]:
    """`a=1,2` as `["a=1", "a=2"]`. A text with a comma stands in double quotes."""
    name, equals, text = item.partition("=")
    if not equals:
        return [item]  # `chosen_values` says what is wrong with it
    try:
        values = next(csv.reader([text], strict=True), None) or [""]
    except csv.Error:
        raise BookError(f"-p {item}: a quote is not closed, or stands inside a value") from None
    return [f"{name}={value}" for value in values]


def _seeds(slug: str, known: dict, base: dict, typed: list[str], seeds: int) -> list[str]:
    if "seed" not in known or known["seed"].type != "int":
        raise BookError(f"--seeds: chapter {slug} has no whole-number parameter seed")
    if any(item.partition("=")[0].strip() == "seed" for item in typed):
        raise BookError("--seeds and -p seed: give one of them")
    if seeds < 1:
        raise BookError(f"--seeds {seeds}: give 1 or more")
    return [f"seed={base['seed'] + step}" for step in range(seeds)]


def content_digest(path: Path) -> str:
    """What a file holds, or all files of a folder: a name of its content, wherever it lies."""
    total = hashlib.sha256()
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as file:
                total.update(each.relative_to(path).as_posix().encode())
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def typed_of(values: dict[str, params.Value]) -> list[str]:
    """Values as `book run -p` takes them; they parse back to the same values."""
    return [f"{name}={value}" for name, value in values.items()]


def label(values: dict[str, params.Value], axes: dict) -> str:
    """A point in words: `n 4, mode fine`."""
    return ", ".join(f"{name} {values[name]}" for name in axes) or "the only point"


def read_chapter(book: Path, chapter: str) -> tuple[str, nbformat.NotebookNode]:
    """The slug of a chapter and its notebook."""
    path = places.chapter_path(book, chapter)
    return path.stem, places.read_notebook(path)
