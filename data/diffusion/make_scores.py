"""Score the samplers on prompts of every kind, three seeds: makes scores.json.

    python data/diffusion/make_scores.py [--seeds 3] [--threads 2] [--only unet-fast]

Shares are of pictures but for ``things`` and ``leak``, which are of things that were asked for;
``agree`` is the share of the scorer's sure things that ``lib.shapes_reader`` sees alike.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib import diffusion, shapes_reader, shapes_score, shapes_text  # noqa: E402

KINDS = dict(single=72, two=72, three=24, relation=24, count=24, background=24, size=24, texture=24)
FEW = ("single", "two")  # kinds of prompts for few steps
STEPS = {"unet": (20, 8, 4, 2), "unet-fast": (4, 2, 1), "flow": (20,)}
FULL = 20  # steps from which on all kinds are scored
UNGUIDED = ("unet-fast",)  # their guidance is in the weights


def agree(images, seen) -> tuple[int, int]:
    """Of the things that the scorer is sure of: how many the reader sees at the same place with
    the same shape and colour, and how many there are."""
    same = total = 0
    for mine, other in zip(seen, shapes_reader.look(images), strict=True):
        for thing in mine.things:
            if thing.shape is None or thing.colour is None:
                continue
            total += 1
            same += any(
                t.shape == thing.shape
                and t.colour == thing.colour
                and abs(t.x - thing.x) + abs(t.y - thing.y) < 0.15
                for t in other.things
            )
    return same, total


def measure(pipe, kind: str, n: int, seed: int, **how) -> dict:
    prompts = shapes_text.prompts(kind, n, 100 + seed)
    images = diffusion.draw(pipe, prompts, 100 + seed, **how)
    rows = shapes_score.score(images, prompts)
    things = [thing for row in rows for thing in row["things"]]
    same, total = agree(images, [row["seen"] for row in rows])
    found = {
        "all": np.mean([bool(row["all"]) for row in rows]),
        "things": np.mean([bool(thing["both"]) for thing in things]),
        "missing": np.mean([row["missing"] > 0 for row in rows]),
        "extra": np.mean([row["extra"] > 0 for row in rows]),
        "swapped": np.mean([bool(row["swapped"]) for row in rows]),
        "leak": np.mean([thing["leak"] or 0.0 for thing in things]),
        "sure": np.mean([bool(row["sure"]) for row in rows]),
        "agree": same / max(total, 1),
    }
    return {key: round(float(value), 4) for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = HERE / "scores.json"
    rows = []
    for name in args.only:
        pipe = diffusion.pipeline(name)
        for steps in STEPS[name]:
            how = dict(steps=steps, guidance=1.0 if name in UNGUIDED else None)
            for kind in KINDS if steps >= FULL else FEW:
                for seed in range(args.seeds):
                    row = {"sampler": name, "steps": steps, "kind": kind, "seed": seed}
                    row["prompts"] = KINDS[kind]
                    rows.append(row | measure(pipe, kind, row["prompts"], seed, **how))
                print(rows[-1], flush=True)
    if path.exists():
        rows += [r for r in json.loads(path.read_text())["rows"] if r["sampler"] not in args.only]
    order = {name: i for i, name in enumerate([*STEPS, *KINDS])}
    rows.sort(key=lambda r: (order[r["sampler"]], -r["steps"], order[r["kind"]], r["seed"]))
    text = ",\n  ".join(map(json.dumps, rows))
    path.write_text(f'{{"rows": [\n  {text}\n]}}\n')


if __name__ == "__main__":
    main()
