"""The table of a sweep: a row for each claim of each point, as Parquet and as CSV."""

import io
import re
from pathlib import Path

from lib.book import places
from lib.errors import BookError

NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+−]?\d+)?")
FACTS = ("point", "state", "run", "seconds", "peak_gib", "tries", "error")
CLAIM = ("paper", "says", "paper_value", "ours", "value", "holds")


def number(ours: str) -> float | None:
    """The first number in what was measured: `0.87` of `0.87 ± 0.02`; None where there is none.

    A number in a name, as in `L18H6`, is none.
    """
    found = NUMBER.search(str(ours))
    if not found:
        return None
    return float(found.group().replace(",", "").replace("−", "-"))


def rows(state: dict, records: dict[str, dict]) -> list[dict]:
    """One dict for each claim of each point, in order; a point without claims has one row.

    records: key → record of each finished point. The parameters come under their own names, after
    `FACTS` and before `CLAIM`; one that has the name of such a column gets `parameter_` before it.
    """
    found = []
    for point in state["points"]:
        record = records.get(point["key"], {})
        facts = {
            "point": point["key"], "state": point["state"], "run": point["run"],
            "seconds": record.get("seconds"), "peak_gib": record.get("peak_gib"),
            "tries": point["tries"], "error": point["error"],
        }  # fmt: skip
        for name, value in (state["fixed"] | point["parameters"]).items():
            facts[f"parameter_{name}" if name in (*FACTS, *CLAIM) else name] = value
        empty = dict.fromkeys(CLAIM)
        for claim in record.get("claims", []) or [empty]:
            value = number(claim["ours"]) if claim["ours"] is not None else None
            found.append(facts | {name: claim.get(name) for name in CLAIM} | {"value": value})
    return found


def write(found: list[dict], folder: Path) -> None:
    """Write `table.csv` and `table.parquet`, each whole."""
    import pandas

    frame = pandas.DataFrame(found)
    kinds = {"seconds": "float64", "peak_gib": "float64", "value": "float64", "holds": "boolean"}
    kinds |= dict.fromkeys(("run", "error", "paper", "says", "paper_value", "ours"), "string")
    frame = frame.astype(kinds)
    places.write_whole(folder / "table.csv", frame.to_csv(index=False, lineterminator="\n"))
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    fresh = folder / ".table.parquet.tmp"
    try:
        fresh.write_bytes(buffer.getvalue())
        fresh.replace(folder / "table.parquet")
    except OSError as error:
        raise BookError(f"cannot write {folder / 'table.parquet'}: {error.strerror}") from None
