"""Walsh–Hadamard transform of float32 rows, normalised, against the dense product.

The dense product is ``torch.mm`` with the transposed matrix kept in memory. "two products" is what
torch can do better: H_4096 = H_64 ⊗ H_64, two small products. ``torchao``'s butterflies are its
SpinQuant ones. Bytes: each row read and written once. Errors: the largest, against float64, for
inputs from N(0, 1).
"""

import contextlib
import io
import sys

import torch

from lib.kernels import hadamard
from lib.kernels.dispatch import using
from tests.bench_kernels.common import Row, compare, race


def ways(x: torch.Tensor) -> dict:
    rows, n = x.shape
    dense = (hadamard.matrix(n) / n**0.5).T.contiguous()

    def reference():
        with using("reference"):
            return hadamard.transform(x)

    found = {
        "dense product": lambda: x @ dense,
        "ours, Numba": lambda: hadamard.transform(x),
        "reference": reference,
    }
    half = n.bit_length() // 2
    if n == 1 << (2 * half):
        small = hadamard.matrix(1 << half) / n**0.25
        shape = (rows, 1 << half, 1 << half)
        found["two products"] = lambda: (small @ (x.view(shape) @ small)).view(rows, n)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from torchao.prototype.spinquant import hadamard_utils as peer
        block, m = peer.get_hadK(n)
        block = None if block is None else block.float()
        found["torchao"] = lambda: peer.matmul_hadU_slow(x, block, m)
    except ImportError:
        print("hadamard: torchao is not installed", file=sys.stderr)
    return found


def rows() -> list[Row]:
    torch.manual_seed(0)
    found = []
    for n, counts in ((4096, (1, 16, 256)), (1536, (1, 256)), (576, (1, 256))):
        h = hadamard.matrix(n, dtype=torch.float64) / n**0.5
        for count in counts:
            x = torch.randn(count, n)
            exact = x.double() @ h.T
            all_ways = ways(x)
            times = compare(race(all_ways, rounds=9, seconds=5), "dense product")
            for way, (seconds, ratio) in times.items():
                # torchao's block is another Hadamard matrix: no error to speak of
                own = way == "torchao" and n != 4096
                error = None if own else (all_ways[way]() - exact).abs().max().item()
                found.append(
                    Row(
                        shape=f"{count} × {n}",
                        way=way,
                        seconds=seconds,
                        ratio=ratio,
                        baseline="dense product",
                        bytes=8.0 * x.numel(),
                        error=error,
                    )
                )
    return found
