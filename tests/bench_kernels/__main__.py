"""``python -m tests.bench_kernels [NAME …] [--store]``: one table a kernel; JSON beside it."""

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import tests.bench_kernels as bench
from lib.models import DATA
from tests.bench_kernels.common import machine

NAMES = [
    m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in ("common", "__main__")
]


def table(name: str, rows: list[dict]) -> str:
    lines = [f"\n{name}", f"{'shape':34} {'way':34} {'ms':>9} {'ratio':>7} {'of limit':>9}  error"]
    for row in rows:
        limits = [row[k] for k in ("of bandwidth", "of peak") if k in row]
        limit = f"{max(limits):8.0%}" if limits else ""
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        more = ", ".join(f"{v:.3g} {k}" for k, v in row["more"].items())
        lines.append(
            f"{row['shape']:34} {row['way']:34} {1000 * row['seconds']:9.3f} {row['ratio']:6.2f}× "
            f"{limit:>9}  {error:8} {more} {row['note']}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_kernels", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--store", action="store_true", help="keep the result as the book's own")
    wanted = parser.parse_args()
    unknown = set(wanted.names) - set(NAMES)
    if unknown:
        parser.error(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    folder = DATA / "kernels" if wanted.store else Path("_build/bench")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"
    found = json.loads(file.read_text()) if wanted.names and file.is_file() else {"kernels": {}}
    found["machine"] = machine()
    print("{name}, {cores} threads".format(**found["machine"]), end="; ")
    print("reads {:.1f} GB/s, ".format(found["machine"]["bytes a second"] / 1e9), end="")
    print("{:.0f} Gflop/s in float32".format(found["machine"]["flops a second"] / 1e9))
    for name in wanted.names or NAMES:
        module = importlib.import_module(f"tests.bench_kernels.{name}")
        rows = [row.record(found["machine"]) for row in module.rows()]
        found["kernels"][name] = {"about": module.__doc__.strip().split("\n")[0], "rows": rows}
        print(table(name, rows), flush=True)
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
