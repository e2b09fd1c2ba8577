"""Shift-and-add products at batch 1 against bfloat16; errors on real weights and inputs."""

import torch

from lib.kernels import shift_add
from lib.kernels.lookup import TILE
from lib.kernels.lut import Planes
from tests.bench_kernels.common import Row
from tests.bench_kernels.lut import SHAPES, add_ways, give_error, measured, real_errors, words


def rows() -> list[Row]:
    found = []
    for m, n in SHAPES:
        ways, nbytes = {}, {}
        for bits in (2, 3, 4):
            add_ways(
                ways, nbytes, f"ShiftAddLLM, {bits} bits", _binary(m, n, bits), shift_add.mv, n
            )
        for bits in (3, 4):
            add_ways(ways, nbytes, f"DenseShift, {bits} bits", _dense(m, n, bits), shift_add.mv, n)
        found += measured(m, n, ways, nbytes)
    errors = {}
    for b in (2, 3, 4):
        name = f"ShiftAddLLM, {b} bits"
        errors[name] = real_errors(lambda w, x, b=b: shift_add.pack(w, b), shift_add.mv)
    for b in (3, 4):
        name = f"DenseShift, {b} bits"
        errors[name] = real_errors(lambda w, x, b=b: shift_add.pack_dense_shift(w, b), shift_add.mv)
    for row in found:
        if row.way in errors:
            give_error(row, errors[row.way])
    return found


def _binary(m, n, bits, span=4):
    def make(count=1):
        tiles, blocks = m // TILE, n // 32
        scales = torch.randint(70, 110, (tiles, blocks // span, bits, TILE), dtype=torch.uint8)
        none = scales.new_empty(tiles, 0, 1, TILE)
        return [
            Planes(words((tiles, blocks, bits, TILE)), scales.clone(), none, m, n, span, False)
            for _ in range(count)
        ]

    return make


def _dense(m, n, bits):
    def make(count=1):
        shape = (m // TILE, -(-n // (32 // bits)), 1, TILE)
        scales = torch.full((m // TILE, TILE), 90, dtype=torch.uint8)
        return [shift_add.Shifts(words(shape), scales.clone(), m, n, bits) for _ in range(count)]

    return make
