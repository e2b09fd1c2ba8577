"""The state of a sweep, as `sweep.json` keeps it: how it begins, and how an earlier one is read."""

import datetime
import json
from pathlib import Path

import nbformat

from lib.book import compare, places, record
from lib.book.sweep_plan import Plan, Point
from lib.errors import BookError


def begun(book: Path, plan: Plan, notebook: nbformat.NotebookNode) -> dict:
    """The state of a sweep of which nothing has run."""
    source = record.source_state(book) | {"parts": plan.parts}
    peaks = notebook.metadata.get("book", {}).get("measured", {})
    peak = (peaks.get(plan.profile) or peaks.get("default") or {}).get("peak_gib")
    return {
        "sweep": plan.id, "chapter": plan.slug, "profile": plan.profile, "state": "running",
        "started": now(), "ended": None, "scheduler": None, "peak_gib": peak,
        "axes": plan.axes, "fixed": plan.fixed, "files": plan.files,
        "versions": record.versions(), "machine": record.machine(), "source": source,
        "points": [
            {"key": point.key, "parameters": {name: point.values[name] for name in plan.axes},
             "state": "waiting", "run": None, "tries": 0, "seconds": None, "error": None}
            for point in plan.points
        ],
    }  # fmt: skip


def folder_of(book: Path, name: str) -> Path:
    """The folder of a sweep. Raises BookError, with the nearest ids, where there is none."""
    folder = compare.sweep_folder(book, name)
    if folder is None:
        known = sorted(path.parent.name for path in book.glob("runs/*/sweeps/*/sweep.json"))
        raise BookError(f"no sweep {name!r}{places.nearest(name, known)}")
    return folder


def resumed(folder: Path) -> tuple[Plan, bytes, dict]:
    """The plan of an earlier sweep, what its points run, and its state."""
    state = read(folder)
    points = [Point(each["key"], state["fixed"] | each["parameters"]) for each in state["points"]]
    plan = Plan(
        state["chapter"], state["profile"], state["axes"], points, state["source"]["parts"],
        files=state["files"],
    )  # fmt: skip
    try:
        return plan, (folder / "source.zip").read_bytes(), state
    except OSError:
        if all(each["state"] == "ok" for each in state["points"]):
            return plan, b"", state
        raise BookError(f"{folder / 'source.zip'} is gone: start the sweep anew") from None


def read(folder: Path) -> dict:
    """The state of the sweep in `folder`. Raises BookError where it cannot be read."""
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BookError(f"{folder} has no readable sweep.json: {error}") from None


def now() -> str:
    """The time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
