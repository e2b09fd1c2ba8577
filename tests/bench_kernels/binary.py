"""Binary weights with a fifth of the channels at 4 bits, batch 1, against bfloat16; errors too."""

import torch

from lib.kernels import binary
from lib.kernels.lookup import TILE
from lib.kernels.lut import Planes
from tests.bench_kernels.common import Row
from tests.bench_kernels.lut import SHAPES, add_ways, give_error, measured, real_errors, words


def rows() -> list[Row]:
    found = []
    for m, n in SHAPES:
        ways, nbytes = {}, {}
        add_ways(ways, nbytes, "PTQ1.61's storage", _make(m, n), binary.mv, n)
        found += measured(m, n, ways, nbytes)
    # The paper learns its scales against the block's output; these are the closed forms.
    errors = real_errors(lambda w, x: binary.pack(w, x.abs().mean(0)), binary.mv)
    none = real_errors(lambda w, x: binary.pack(w, x.abs().mean(0), 0), binary.mv)
    for row in found:
        if row.way == "PTQ1.61's storage":
            give_error(row, errors)
            row.more["on MiniLM's, all binary"] = none["minilm"]
    return found


def _make(m, n, share=0.2):
    kept = round(share * n)

    def part(columns, bits):
        tiles, blocks = m // TILE, -(-columns // 32)
        scales = torch.rand(tiles, 1, 1, TILE).half()
        held = words((tiles, blocks, bits, TILE))
        return Planes(held, scales, scales.clone(), m, columns, blocks, True)

    def make(count=1):
        return [
            binary.Binary(part(kept, 4), part(n - kept, 1), torch.randperm(n).int())
            for _ in range(count)
        ]

    return make
