"""The execution report: what each chapter takes to run, and what its stored outputs came from."""

from dataclasses import dataclass
from html import escape

PROFILES = ("smoke", "default", "full")


@dataclass(frozen=True)
class Row:
    """One chapter of the report.

    facts: the notebook's metadata `book`; stale: why its outputs are stale, empty where fresh.
    """

    title: str
    page: str
    facts: dict
    stale: list[str]


def execution_html(rows: list[Row]) -> str:
    """The report as HTML: totals, a table of the chapters, and the versions that they ran with."""
    if not rows:
        return "<p>No chapter is written yet.</p>"
    head = ("Chapter", "Outputs", "Last run", *(name.capitalize() for name in PROFILES))
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(_row(row) for row in rows)
    table = f'<table class="execution"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="execution-report">{_tiles(rows)}{table}{_versions(rows)}</div>'


def _tiles(rows: list[Row]) -> str:
    runs = [row.facts.get("measured", {}).get("default", {}) for row in rows]
    numbers = {
        "chapters": (len(rows), "chapters"),
        "fresh": (sum(not row.stale for row in rows), "fresh"),
        "seconds": (f"{sum(run.get('seconds', 0) for run in runs):.0f} s", "all, by default"),
        "memory": (f"{max(run.get('peak_gib', 0) for run in runs):.1f} GiB", "most memory"),
    }
    tiles = (
        f'<div class="tile"><dd id="n-{name}">{number}</dd><dt>{label}</dt></div>'
        for name, (number, label) in numbers.items()
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _row(row: Row) -> str:
    measured = row.facts.get("measured", {})
    state = '<span class="verdict held">✓ fresh</span>'
    if row.stale:
        why = escape(", ".join(row.stale))
        state = f'<span class="verdict failed">✗ stale</span> <span class="why">{why}</span>'
    cells = {
        "outputs": state,
        "last run": escape(row.facts.get("last_run", {}).get("date", "never")),
        **{name: _cost(measured.get(name)) for name in PROFILES},
    }
    data = "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in cells.items())
    link = f'<a href="{escape(row.page)}">{escape(row.title)}</a>'
    return f'<tr><th scope="row">{link}</th>{data}</tr>'


def _cost(run: dict | None) -> str:
    if not run:
        return '<span class="why">not measured</span>'
    return f"{run['seconds']:.0f} s, {run['peak_gib']:.1f} GiB"


def _versions(rows: list[Row]) -> str:
    """Chapters that ran with the same versions share a paragraph."""
    together: dict[tuple, list[str]] = {}
    for row in rows:
        versions = row.facts.get("last_run", {}).get("versions", {})
        # Python first, the packages by name
        ordered = sorted(versions.items(), key=lambda item: (item[0] != "python", item[0]))
        together.setdefault(tuple(ordered), []).append(row.title)
    parts = []
    for versions, titles in together.items():
        who = "All chapters" if len(together) == 1 else escape("; ".join(titles))
        what = ", ".join(f"{escape(name)}&nbsp;{escape(number)}" for name, number in versions)
        parts.append(f'<p class="versions"><b>{who}</b>: {what or "no versions stored"}.</p>')
    return "".join(parts)
