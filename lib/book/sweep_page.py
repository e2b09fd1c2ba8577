"""The result page of a sweep: one HTML file that fetches nothing and needs no script.

Claims by parameter first, then each claim as a heat map over two parameters with every run one
click away, then the points, then what was the same in all of them.
"""

import itertools
import json
import statistics

from lib.book.sweep_table import number

MAX_MARKS = 20_000  # links to runs in the heat maps; the points' table always has them


def html(state: dict, records: dict[str, dict]) -> str:
    """The page as text. state: `sweep.json`. records: key → record of each finished point."""
    from jinja2 import Environment, StrictUndefined

    from lib.book import sweep_template

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    axes = {name: _ordered(values) for name, values in state["axes"].items()}
    points = [_point(point, records.get(point["key"])) for point in state["points"]]
    claims = claims_of(records.values())
    marks = len(claims) * len(points) <= MAX_MARKS
    maps = [heat_map(name, axes, points, marks) for name in claims]
    maps.sort(key=lambda each: each["order"])  # what a parameter changes comes first
    states = [point["state"] for point in points]
    return environment.from_string(sweep_template.PAGE).render(
        style=sweep_template.STYLE, state=state, axes=axes, points=points,
        ok=states.count("ok"), failed=states.count("failed"),
        running=state["state"] == "running", seconds=sum(p["seconds"] or 0 for p in points),
        overview=[_overview((each["paper"], each["says"]), axes, points) for each in maps],
        maps=[each for each in maps if each["order"] < 2],
        constant=[each for each in maps if each["order"] == 2],
        versions=_versions(records.values()) or state["versions"],
        machines=sorted({_machine(record["machine"]) for record in records.values()}),
        text=text,
    )  # fmt: skip


def text(value) -> str:
    """A parameter's value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _ordered(values: list) -> list:
    """Numbers by size, words as they were typed."""
    return values if any(isinstance(value, str) for value in values) else sorted(values)


def _point(point: dict, record: dict | None) -> dict:
    """A point with its claims by `(paper, says)` and the link to its run."""
    found = {(claim["paper"], claim["says"]): claim for claim in (record or {}).get("claims", [])}
    held = sum(bool(claim["holds"]) for claim in found.values())
    link = f"../../{point['run']}/notebook.html" if point["run"] else None
    label = ", ".join(f"{name} {text(value)}" for name, value in point["parameters"].items())
    return point | {
        "claims": found, "held": held, "link": link, "label": label or "the only point",
        "peak_gib": (record or {}).get("peak_gib"),
    }  # fmt: skip


def claims_of(records) -> list[tuple[str, str]]:
    """`(paper, says)` of every claim that any of the records has, in the chapter's order."""
    found: dict[tuple[str, str], None] = {}
    for record in records:
        found |= dict.fromkeys((claim["paper"], claim["says"]) for claim in record["claims"])
    return list(found)


def _overview(name: tuple, axes: dict, points: list[dict]) -> dict:
    """In how many points the claim held: of all, and of those with each value of each axis."""
    groups = [_held(name, points)]
    for axis, values in axes.items():
        for value in values:
            groups.append(_held(name, [p for p in points if p["parameters"][axis] == value]))
    return {"paper": name[0], "says": name[1], "groups": groups}


def _held(name: tuple, points: list[dict]) -> dict:
    verdicts = [bool(p["claims"][name]["holds"]) for p in points if name in p["claims"]]
    held, total = sum(verdicts), len(verdicts)
    return {"held": held, "total": total, "part": _level(held / total) if total else None}


def _level(part: float) -> int:
    """Which of the page's eleven colours stands for a part of the whole."""
    return round(10 * part)


def heat_map(name: tuple, axes: dict, points: list[dict], marks: bool = True) -> dict:
    """One claim over the two axes with the most values; the others give one map each value.

    Runs that differ in `seed` alone share a cell. `order`: 0 where the verdict differs between
    runs, 1 where what was measured does, 2 where nothing does.
    """
    spread = sorted((axis for axis in axes if axis != "seed"), key=lambda axis: -len(axes[axis]))
    if not spread and axes:
        spread = ["seed"]
    x, y, *rest = [*spread, None, None] if len(spread) < 2 else spread
    rest = [axis for axis in rest if axis]
    numbers = {}
    for point in points:
        if name in point["claims"]:
            numbers[point["key"]] = number(point["claims"][name]["ours"])
    claims = [p["claims"][name] for p in points if name in p["claims"]]
    verdicts, said = {bool(c["holds"]) for c in claims}, {str(c["ours"]) for c in claims}
    known = [value for value in numbers.values() if value is not None]
    low, high = (min(known), max(known)) if known else (0, 0)
    tables = []
    for values in itertools.product(*(axes[axis] for axis in rest)):
        where = dict(zip(rest, values, strict=True))
        lines = []
        for row in axes.get(y, [None]):
            cells = []
            for column in axes.get(x, [None]):
                at = where | ({x: column} if x else {}) | ({y: row} if y else {})
                here = [p for p in points if all(p["parameters"][n] == v for n, v in at.items())]
                cells.append(_cell(name, here, numbers, low, high, marks))
            lines.append({"value": row, "cells": cells})
        title = ", ".join(f"{axis} {text(value)}" for axis, value in where.items())
        tables.append({"title": title, "lines": lines})
    return {
        "paper": name[0], "says": name[1], "x": x, "y": y, "columns": axes.get(x, [None]),
        "tables": tables, "low": low, "high": high, "valued": low < high,
        "order": 0 if len(verdicts) > 1 else 1 if len(said) > 1 else 2,
        "held": True in verdicts, "ours": claims[0]["ours"], "reported": claims[0]["paper_value"],
    }  # fmt: skip


def _cell(name: tuple, here: list[dict], numbers: dict, low, high, marks: bool) -> dict:
    """What a cell says: how many held, the value, its place between `low` and `high`."""
    claims = [(point, point["claims"][name]) for point in here if name in point["claims"]]
    cell = _held(name, here) | {
        "said": "", "depth": None, "marks": [],
        "open": sum(point["state"] not in ("ok", "failed") for point in here),
        "failed": sum(point["state"] == "failed" for point in here),
    }  # fmt: skip
    if not claims:
        return cell
    values = [numbers[point["key"]] for point, _ in claims]
    if len(claims) == 1:
        cell["said"] = str(claims[0][1]["ours"])
    elif None not in values:
        cell["said"] = f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"
    if None not in values and low < high:
        cell["depth"] = _level((statistics.mean(values) - low) / (high - low))
    if marks:
        cell["marks"] = [
            {"link": point["link"], "holds": bool(claim["holds"]),
             "title": f"{point['label']}: {'held' if claim['holds'] else 'not held'}, "
                      f"{claim['ours']}"}
            for point, claim in claims
        ]  # fmt: skip
    return cell


def _versions(records) -> dict[str, str]:
    """Package → its version, or its versions where runs had different ones."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record["versions"].items():
            found.setdefault(package, {})[version] = None
    return {package: " and ".join(versions) for package, versions in found.items()}


def _machine(machine: dict) -> str:
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}"
