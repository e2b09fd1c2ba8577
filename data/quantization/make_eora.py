"""Makes frontier_eora.json and eora_task.json: low-rank compensation of SmolLM2 rounded to 3 bits
or pruned 2:4, by plain SVD and by EoRA (arXiv 2410.21271), calibrated on prose or on a task.

The task is small sums told in words, several in a row. About 20 minutes on one shared core; a
finished row is kept and not made again.

    python data/quantization/make_eora.py --scratch /tmp/eora
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import own_setting  # noqa: E402

from lib import metrics, models, quantization  # noqa: E402

RANKS = (8, 32)
BITS, GROUP = 3, 64
NAMES = "Mary John Tom James Dan Anna Alice Bob Sarah Emma Jack Paul".split()
THINGS = "apples books coins pens balls cards keys eggs".split()


def sums(tokenizer, seed: int, n: int = 4, length: int = own_setting.LENGTH):
    """``n`` texts of word problems with their answers: ids [n, length], and which tokens are
    answers, bool [n, length]."""
    rng = random.Random(seed)
    rows, marks = [], []
    for _ in range(n):
        ids, answer = [], []
        while len(ids) < length:
            name, thing, op = rng.choice(NAMES), rng.choice(THINGS), rng.choice("+-")
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            a = a + b if op == "-" else a
            did, left = ("buys", "now") if op == "+" else ("loses", "left")
            asked = f"Q: {name} has {a} {thing} and {did} {b}. How many {thing} are {left}?\nA:"
            said = f" {a} {op} {b} = {a + b if op == '+' else a - b}\n"
            parts = [tokenizer(t, add_special_tokens=False).input_ids for t in (asked, said)]
            ids += parts[0] + parts[1]
            answer += [False] * len(parts[0]) + [True] * len(parts[1])
        rows.append(ids[:length])
        marks.append(answer[:length])
    return torch.tensor(rows), torch.tensor(marks)


@torch.inference_mode()
def answer_losses(model, ids, marks) -> list[float]:
    """Mean loss on the answers in the second half of each text, after several shown: [n]."""
    found = []
    for row, mark in zip(ids, marks, strict=True):
        logits = model(row[None]).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        late = mark[1:] & (torch.arange(1, len(row)) >= len(row) // 2)
        found.append(float(loss[late].mean()))
    return found


def two_of_four(weight, second):
    """2:4 pruning by Wanda's score |w| · ‖x‖ (arXiv 2306.11695): two of four neighbours stay."""
    score = (weight.abs() * second.diagonal().sqrt()).view(len(weight), -1, 4)
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(2).indices, True)
    return weight * keep.view_as(weight)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    model, tokenizer = models.load("smollm2", device="cpu")
    layers = quantization.linears(model)
    ids = own_setting.held_out(tokenizer)
    task = sums(tokenizer, seed=1000)
    paths = {k: HERE / f"{k}.json" for k in ("frontier_eora", "eora_task")}
    rows = {k: json.loads(p.read_text()) if p.is_file() else [] for k, p in paths.items()}

    def has(kind, method, setting, seed):
        return any(
            (r["method"], r["setting"], r["seed"]) == (method, setting, seed) for r in rows[kind]
        )

    def task_too(base, rank):
        return base == "2:4" and rank in (0, max(RANKS))

    def judge(method, base, rank, seed, weights):
        """Rows of one model: perplexity on prose; the loss on sums at the larger rank only."""
        setting = f"{base} r{rank}" if rank else base
        with quantization.swapped(model, weights):
            if not has("frontier_eora", method, setting, seed):
                found = metrics.losses(model, ids)
                size = {
                    n: own_setting.stored_bytes(m.weight.shape, BITS, GROUP, rank=rank)
                    if base == "W3 g64"
                    else m.weight.numel() * 9 / 8 + 2 * rank * sum(m.weight.shape)
                    for n, m in layers.items()
                }
                row = own_setting.frontier_row(method, setting, seed, found, size)
                rows["frontier_eora"].append(row)
                print(row, flush=True)
            if task_too(base, rank) and not has("eora_task", method, setting, seed):
                found = [round(x, 5) for x in answer_losses(model, *task)]
                row = dict(method=method, setting=setting, seed=seed, losses=found)
                rows["eora_task"].append(row)
                print(row, flush=True)
        for kind, path in paths.items():
            path.write_text(json.dumps(rows[kind], indent=0))

    def wanted(method, base, rank, seed):
        setting = f"{base} r{rank}" if rank else base
        return not has("frontier_eora", method, setting, seed) or (
            task_too(base, rank) and not has("eora_task", method, setting, seed)
        )

    if not has("eora_task", "plain", "16 bits", 0):
        found = [round(x, 5) for x in answer_losses(model, *task)]
        rows["eora_task"].append(dict(method="plain", setting="16 bits", seed=0, losses=found))
    for seed in args.seeds:
        for base in ("W3 g64", "2:4"):
            fixed = base == "W3 g64" and seed > 0  # rounding to nearest and its SVD have no seed
            plan = [] if fixed else [("none", 0, None), *(("SVD", r, None) for r in RANKS)]
            plan += [("EoRA", r, "prose") for r in RANKS]
            plan += [("EoRA, task", RANKS[-1], "task")] if base == "2:4" else []
            plan = [p for p in plan if wanted(p[0], base, p[1], seed)]
            if not plan:
                continue
            prose = own_setting.moments(model, tokenizer, seed, args.scratch)
            if base == "W3 g64":
                squeezed = {
                    n: quantization.nearest(m.weight, BITS, GROUP) for n, m in layers.items()
                }
            else:
                squeezed = {n: two_of_four(m.weight, prose[n].second) for n, m in layers.items()}
            for text in dict.fromkeys(p[2] for p in plan):
                steps = [p for p in plan if p[2] == text]
                read = prose
                if text == "task":
                    read = quantization.calibrate(model, sums(tokenizer, seed, 8)[0])
                factors = {}
                if any(rank for _, rank, _ in steps):
                    for n, m in layers.items():
                        second = None if text is None else read[n].second
                        factors[n] = quantization.low_rank(
                            m.weight - squeezed[n], max(RANKS), second
                        )
                for method, rank, _ in steps:
                    weights = squeezed
                    if rank:
                        weights = {
                            n: w + factors[n][0][:, :rank] @ factors[n][1][:rank]
                            for n, w in squeezed.items()
                        }
                    judge(method, base, rank, seed, weights)


if __name__ == "__main__":
    main()
