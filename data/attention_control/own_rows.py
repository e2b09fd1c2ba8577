"""What the makers of this folder share: their arguments, results that are made once, rows."""

import argparse
import json
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def arguments(doc: str, name: str, prompts: int, meaning: str) -> argparse.ArgumentParser:
    """What every maker takes; ``name`` is the scratch folder's."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=prompts, help=meaning)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / name)
    return parser


def begin(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with threads set and the scratch folder there."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    return args


def once(path: Path, make):
    """What ``make()`` gives, as JSON; it is not made again while the file is there. Throw the
    scratch folder away when a sampler has changed."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def write(name: str, head: dict, rows: list[dict]) -> None:
    """``<name>_rows.json`` beside this file, a line a row."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (HERE / f"{name}_rows.json").write_text(f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n')
    print(f"wrote {name}_rows.json ({len(rows)} rows)")
