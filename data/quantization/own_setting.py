"""What the scripts of this folder and the chapter share: which text calibrates, which text judges,
and how many bytes a quantized layer takes.

All methods are compared on these: SmolLM2, the linear layers of its blocks, perplexity on four
passages from the last fifth of Moby Dick. Calibration text comes from the first seven tenths.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets, quantization  # noqa: E402

LENGTH = 256  # tokens a sequence
WEIGHTS = 106_168_320  # of the linear layers in SmolLM2's 30 blocks


def calibration(tokenizer, seed: int, n: int = 8, length: int = LENGTH) -> Tensor:
    """``n`` passages to calibrate on, drawn by ``seed``: ids [n, length]."""
    return datasets.passages(tokenizer, "calibration", n, length, seed)


def held_out(tokenizer, n: int = 4, length: int = LENGTH) -> Tensor:
    """The same ``n`` passages to judge by each time: ids [n, length]."""
    return datasets.passages(tokenizer, "held out", n, length, seed=1851)


def stored_bytes(
    shape, bits: float, group: int | None = None, symmetric: bool = False, rank: int = 0
) -> float:
    """Bytes of one quantized weight [out, in]: codes, a 16-bit scale for every group (None: a row),
    a zero point of ``bits`` where codes are not symmetric, and 16-bit factors of ``rank``."""
    rows, columns = shape
    parts = rows * math.ceil(columns / (group or columns))
    zero = 0 if symmetric else bits
    total = rows * columns * bits + parts * (16 + zero) + 16 * rank * (rows + columns)
    return total / 8


def frontier_row(method, setting, seed, found, stored, activation_bits=16) -> dict:
    """One row of the chapter's frontier: ``found`` losses by passage, ``stored`` bytes by layer."""
    total = sum(stored.values())
    return dict(
        method=method,
        setting=setting,
        seed=seed,
        bits=round(8 * total / WEIGHTS, 4),
        megabytes=round(total / 1e6, 3),
        activation_bits=activation_bits,
        perplexity=round(math.exp(sum(found) / len(found)), 4),
        losses=[round(x, 5) for x in found],
    )


def moments(model, tokenizer, seed: int, scratch: Path) -> dict[str, quantization.Moments]:
    """``quantization.calibrate`` on the calibration text of ``seed``, kept in ``scratch``."""
    path = scratch / f"moments_{seed}.safetensors"
    if not path.is_file():
        found = quantization.calibrate(model, calibration(tokenizer, seed))
        parts, first = {}, {}
        for name, m in found.items():
            owner = first.setdefault(id(m.second), name)  # q, k and v share one
            parts[f"{name}|owner|{owner}"] = torch.tensor(m.n)
            if owner == name:
                parts |= {
                    f"{name}|second": m.second,
                    f"{name}|peak": m.peak,
                    f"{name}|mean": m.mean,
                }
        scratch.mkdir(parents=True, exist_ok=True)
        save_file(parts, path)
    kept, found = load_file(path), {}
    for key, n in kept.items():
        name, kind, *owner = key.split("|")
        if kind == "owner":
            arrays = (kept[f"{owner[0]}|{part}"] for part in ("second", "peak", "mean"))
            found[name] = quantization.Moments(*arrays, int(n))
    return {name: found[name] for name in quantization.linears(model)}
