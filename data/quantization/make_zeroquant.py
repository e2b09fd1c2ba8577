"""Makes zeroquant_sensitivity.json and frontier_zeroquant.json: rounding weights or activations of
SmolLM2 and MiniLM, and what GPTQ and a low-rank correction win back (ZeroQuant-V2, 2303.08302).

Every loss is stored per held-out passage; MiniLM's is the turn of its sentence vectors. Rounding to
the nearest has no seed; GPTQ is calibrated on three draws of text. About 25 minutes on one shared
core; a finished row is kept and not made again.

    python data/quantization/make_zeroquant.py --scratch /tmp/zeroquant
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import own_setting  # noqa: E402

from lib import metrics, models, quantization  # noqa: E402
from lib.datasets import moby_dick  # noqa: E402

RANK = 8
SENSITIVITY = [  # (bits of weights, bits of activations, activations' scale)
    (16, 16, "token"), (8, 16, "token"), (6, 16, "token"), (5, 16, "token"), (4, 16, "token"),
    (16, 8, "token"), (16, 6, "token"), (16, 5, "token"), (16, 4, "token"), (16, 8, "tensor"),
    (8, 8, "token"), (4, 8, "token"),
]  # fmt: skip
RTN_ONLY = [(6, None), (5, None), (4, 64), (3, 32), (3, 16)]  # more sizes for the frontier
COMPARED = [(4, None), (3, 64), (2, 32)]  # bits and group, with GPTQ and LoRC


def sentences(tokenizer, n: int = 128, words: int = 24):
    """``n`` stretches of the last fifth of Moby Dick as inputs of MiniLM."""
    said = moby_dick()[int(0.8 * len(moby_dick())) :].split()
    cuts = [" ".join(said[i : i + words]) for i in range(0, 3 * n * words, 3 * words)][:n]
    return tokenizer(cuts, padding=True, truncation=True, return_tensors="pt")


@torch.inference_mode()
def embedded(model, inputs) -> torch.Tensor:
    """MiniLM's sentence vectors, means over tokens, of unit length: [n, d]."""
    states = model(**inputs).last_hidden_state
    mask = inputs.attention_mask[..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def rounded(model, bits, group=None):
    """The weights of all linears, rounded to the nearest."""
    found = quantization.linears(model).items()
    return {name: quantization.nearest(m.weight, bits, group) for name, m in found}


def rounded_by_gptq(model, tokenizer, bits, group, seed, scratch: Path):
    """GPTQ's weights of all linears; every block is kept in ``scratch`` as it is done."""
    read, found = own_setting.moments(model, tokenizer, seed, scratch), {}
    for i in range(len(model.model.layers)):
        path = scratch / f"gptq_{bits}_{group}_{seed}_{i}.safetensors"
        if not path.is_file():
            own = {n: m for n, m in quantization.linears(model).items() if f".layers.{i}." in n}
            new = {
                n: quantization.gptq(m.weight, read[n].second, bits, group) for n, m in own.items()
            }
            save_file(new, path)
        found |= load_file(path)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    smollm2, tokenizer = models.load("smollm2", device="cpu")
    minilm, words = models.load("minilm", device="cpu")
    ids = own_setting.held_out(tokenizer)
    inputs = sentences(words)
    plain = embedded(minilm, inputs)

    def judge(model):
        """In four parts: SmolLM2's loss on a passage; how far MiniLM's vectors turn, 1 - cosine."""
        if model is smollm2:
            return metrics.losses(model, ids)
        return (1 - (embedded(model, inputs) * plain).sum(-1)).view(4, -1).mean(1).tolist()

    path = HERE / "zeroquant_sensitivity.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for name, model in (("smollm2", smollm2), ("minilm", minilm)):
        for w, a, per in SENSITIVITY:
            key = dict(model=name, weight_bits=w, activation_bits=a, per=per)
            if any(key.items() <= row.items() for row in rows):
                continue
            with ExitStack() as stack:
                if w < 16:
                    stack.enter_context(quantization.swapped(model, rounded(model, w)))
                if a < 16:
                    stack.enter_context(quantization.rounded_inputs(model, a, per))
                rows.append(key | dict(losses=[round(x, 5) for x in judge(model)]))
            print(rows[-1], flush=True)
            path.write_text(json.dumps(rows, indent=0))

    path = HERE / "frontier_zeroquant.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    layers = quantization.linears(smollm2)
    done = {(row["method"], row["setting"], row["seed"]) for row in rows}

    def record(method, bits, group, seed, weights, rank=0):
        setting = f"W{bits}" + (f" g{group}" if group else "")
        with quantization.swapped(smollm2, weights):
            found = metrics.losses(smollm2, ids)
        size = {
            k: own_setting.stored_bytes(m.weight.shape, bits, group, rank=rank)
            for k, m in layers.items()
        }
        rows.append(own_setting.frontier_row(method, setting, seed, found, size))
        print(rows[-1], flush=True)
        path.write_text(json.dumps(rows, indent=0))

    def corrected(weights):
        """LoRC: the error's best rank-8 approximation added to the quantized weights."""
        found = {}
        for name, w in weights.items():
            u, v = quantization.low_rank(layers[name].weight - w, RANK)
            found[name] = w + u @ v
        return found

    def todo(method, bits, group, seed):
        return (method, f"W{bits}" + (f" g{group}" if group else ""), seed) not in done

    for bits, group in COMPARED + RTN_ONLY:
        pending = [m for m in ("RTN", "RTN + LoRC") if todo(m, bits, group, 0)]
        if (bits, group) in RTN_ONLY:
            pending = pending[:1] if "RTN" in pending else []
        if not pending:
            continue
        weights = rounded(smollm2, bits, group)
        if "RTN" in pending:
            record("RTN", bits, group, 0, weights)
        if "RTN + LoRC" in pending:
            record("RTN + LoRC", bits, group, 0, corrected(weights), RANK)
    jobs = [(bits, group, seed) for bits, group in COMPARED for seed in args.seeds]
    for bits, group, seed in sorted(jobs, key=lambda job: (job[0] != 3, job[2], -job[0])):
        pending = [m for m in ("GPTQ", "GPTQ + LoRC") if todo(m, bits, group, seed)]
        if not pending:
            continue
        weights = rounded_by_gptq(smollm2, tokenizer, bits, group, seed, args.scratch)
        if "GPTQ" in pending:
            record("GPTQ", bits, group, seed, weights)
        if "GPTQ + LoRC" in pending:
            record("GPTQ + LoRC", bits, group, seed, corrected(weights), RANK)


if __name__ == "__main__":
    main()
