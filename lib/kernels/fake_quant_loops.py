"""Fake quantization's kernels for ``fake_quant``, which has their specification and their door.

All take rows [n, m] with a scale and a zero point (``shift``) a row, and a ``Grid`` of codes. A
group of 32 is one short row, a whole tensor one long one, so the work is shared out in pieces of
rows (Numba) or in tiles (Triton), and sums over a row are added up from pieces.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.kernels.dispatch import OPTIONS, jit, njit, prange, tl

TINY = torch.finfo(torch.float32).tiny  # the smallest scale: its reciprocal is still finite
constexpr = tl.constexpr if tl else int  # an annotation only
CHUNK = 4096  # numbers that one thread takes at a time


class Grid(NamedTuple):
    """The codes of a format: lowest and highest; mantissa bits (-1: whole numbers), exponents."""

    low: float
    high: float
    mantissa: int = -1
    least: int = 0
    most: int = 0


def cpu_forward(rows, scale, shift, grid):
    x = rows.detach().float().contiguous()
    y = torch.empty_like(x)
    _apply(x.numpy(), scale.detach().numpy(), shift.detach().numpy(), *_numbers(grid), y.numpy())
    return y.to(rows.dtype)


def cpu_ranged(rows, grid):
    x = rows.detach().float().contiguous()
    y, scale, shift = torch.empty_like(x), torch.empty(len(x)), torch.empty(len(x))
    _ranged(x.numpy(), *_numbers(grid), y.numpy(), scale.numpy(), shift.numpy())
    return y.to(rows.dtype), scale, shift


def cpu_backward(rows, scale, shift, grid, gradient):
    x, g = rows.detach().float().contiguous(), gradient.float()
    out, pieces = torch.empty_like(x), -(-x.shape[1] // CHUNK)
    sums = torch.empty(2, len(x), pieces)
    _pull(
        x.numpy(), scale.detach().numpy(), shift.detach().numpy(), *_numbers(grid), g.numpy(),
        out.numpy(), sums.numpy(),
    )  # fmt: skip
    return out.to(gradient.dtype), *sums.sum(2)


def _numbers(grid: Grid) -> tuple:
    """In the types that keep the loops in 32 bits."""
    return np.float32(grid.low), np.float32(grid.high), *map(np.int32, grid[2:])


# No reassociation in these: rounding must see the very product that torch rounds.
EXACT = OPTIONS | {"fastmath": False}


@njit(**EXACT)
def _round(v, mantissa, least, most):
    if mantissa < 0:
        return np.rint(v)
    exponent = min(max(((np.float32(v).view(np.int32) >> 23) & 255) - 127, least), most) - mantissa
    step = np.int32((127 + exponent) << 23).view(np.float32)  # powers of two, by their bits
    inverse = np.int32((127 - exponent) << 23).view(np.float32)
    return np.rint(v * inverse) * step


@njit(**EXACT)
def _line(x, y, i, start, stop, scale, zero, low, high, mantissa, least, most):
    inverse = np.float32(1) / scale
    for j in range(start, stop):
        q = _round(x[i, j] * inverse, mantissa, least, most) + zero
        q = low if q < low else (high if q > high else q)  # leaves NaN alone
        y[i, j] = (q - zero) * scale


@njit(parallel=True, **EXACT)
def _apply(x, scale, shift, low, high, mantissa, least, most, y):
    rows, columns = x.shape
    pieces = -(-columns // CHUNK)
    for t in prange(rows * pieces):
        i, start = t // pieces, t % pieces * CHUNK
        stop = min(start + CHUNK, columns)
        _line(x, y, i, start, stop, scale[i], shift[i], low, high, mantissa, least, most)


@njit(parallel=True, **EXACT)
def _ranged(x, low, high, mantissa, least, most, y, scale, shift):
    rows, columns = x.shape
    bits = x.view(np.int32)
    for i in prange(rows):
        # As integers in the order of the floats, because those maxima run in vector registers;
        # NaN is beyond infinity there, so that the range shows what spoils it.
        top, bottom = np.int32(0), np.int32(0)
        for j in range(columns):
            key = np.int32(bits[i, j] ^ ((bits[i, j] >> 31) & 0x7FFFFFFF))
            top, bottom = max(top, key), min(bottom, key)
        least_x = np.int32(bottom ^ ((bottom >> 31) & 0x7FFFFFFF)).view(np.float32)
        most_x = np.int32(top).view(np.float32)
        reach = most_x - least_x if low == 0 else (most_x if most_x > -least_x else -least_x)
        s = max(reach / high, np.float32(TINY))
        if not reach < np.float32(np.inf) or not most_x - least_x >= 0:
            s = np.float32(np.nan)
        z = np.rint(-least_x / s) if low == 0 else np.float32(0)
        scale[i], shift[i] = s, z
        _line(x, y, i, 0, columns, s, z, low, high, mantissa, least, most)


@njit(parallel=True, **OPTIONS)
def _pull(x, scale, shift, low, high, mantissa, least, most, g, out, sums):
    rows, columns = x.shape
    pieces = sums.shape[2]
    for t in prange(rows * pieces):
        i, piece = t // pieces, t % pieces
        s, z = scale[i], shift[i]
        inverse, for_scale, clipped = np.float32(1) / s, np.float32(0), np.float32(0)
        for j in range(piece * CHUNK, min((piece + 1) * CHUNK, columns)):
            v = x[i, j] * inverse
            free = _round(v, mantissa, least, most) + z
            q = low if free < low else (high if free > high else free)
            inside = free == q
            out[i, j] = g[i, j] if inside else np.float32(0)
            for_scale += (q - z - (v if inside else np.float32(0))) * g[i, j]
            clipped += np.float32(0) if inside else g[i, j]
        sums[0, i, piece], sums[1, i, piece] = for_scale, -s * clipped


@jit
def _round_triton(v, mantissa: constexpr, least: constexpr, most: constexpr):
    big: tl.constexpr = 12582912.0  # 1.5 · 2^23: adding it rounds to whole numbers, ties to even
    if mantissa < 0:
        return (v + big) - big
    exponent = ((v.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.minimum(tl.maximum(exponent, least), most) - mantissa
    step = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return ((v * inverse + big) - big) * step


@jit
def _reciprocal_triton(s):
    return tl.div_rn(s * 0 + 1.0, s)  # rounded as torch does; `/` is a bit or two off on a GPU


@jit
def _quantized_triton(
    v, zero, low: constexpr, high: constexpr,
    mantissa: constexpr, least: constexpr, most: constexpr,
):  # fmt: skip
    """The code before clipping, and after it; NaN stays."""
    free = _round_triton(v, mantissa, least, most) + zero
    clipped = tl.where(free < low, low, tl.where(free > high, high, free))
    return free, clipped


@jit
def _apply_triton(
    x, scale, shift, y, rows, columns, low: constexpr, high: constexpr,
    mantissa: constexpr, least: constexpr, most: constexpr, R: constexpr, C: constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    j = tl.program_id(1) * C + tl.arange(0, C)
    at = i[:, None] * columns + j[None, :]
    here = (i[:, None] < rows) & (j[None, :] < columns)
    s = tl.load(scale + i, mask=i < rows, other=1.0)[:, None]
    z = tl.load(shift + i, mask=i < rows, other=0.0)[:, None]
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * _reciprocal_triton(s)
    _, q = _quantized_triton(v, z, low, high, mantissa, least, most)
    tl.store(y + at, ((q - z) * s).to(y.dtype.element_ty), mask=here)


@jit
def _ranged_triton(
    x, y, scale, shift, rows, columns, low: constexpr, high: constexpr, tiny: constexpr,
    mantissa: constexpr, least: constexpr, most: constexpr, R: constexpr, C: constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    j = tl.arange(0, C)
    at = i[:, None] * columns + j[None, :]
    here = (i[:, None] < rows) & (j[None, :] < columns)
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    top = tl.max(value, axis=1)  # a maximum may pass NaN over: it is looked for apart
    bottom = tl.min(value, axis=1)
    spoilt = tl.max((value - value != 0).to(tl.int32), axis=1)  # NaN and infinity alone
    if low < 0:
        reach = tl.maximum(top, -bottom)
    else:
        bottom = tl.minimum(bottom, 0.0)
        reach = tl.maximum(top, 0.0) - bottom
    s = tl.maximum(tl.div_rn(reach, reach * 0 + high), tiny)
    s = tl.where((spoilt > 0) | (reach == float("inf")), float("nan"), s)
    z = tl.zeros_like(s)
    if low == 0:
        z = _round_triton(tl.div_rn(-bottom, s), -1, 0, 0)
    tl.store(scale + i, s, mask=i < rows)
    tl.store(shift + i, z, mask=i < rows)
    v = value * _reciprocal_triton(s)[:, None]
    _, q = _quantized_triton(v, z[:, None], low, high, mantissa, least, most)
    tl.store(y + at, ((q - z[:, None]) * s[:, None]).to(y.dtype.element_ty), mask=here)


@jit
def _pull_triton(
    x, scale, shift, g, out, for_scale, for_zero, rows, columns, pieces,
    low: constexpr, high: constexpr,
    mantissa: constexpr, least: constexpr, most: constexpr, R: constexpr, C: constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    j = tl.program_id(1) * C + tl.arange(0, C)
    at = i[:, None] * columns + j[None, :]
    here = (i[:, None] < rows) & (j[None, :] < columns)
    s = tl.load(scale + i, mask=i < rows, other=1.0)[:, None]
    z = tl.load(shift + i, mask=i < rows, other=0.0)[:, None]
    slope = tl.load(g + at, mask=here, other=0.0)
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * _reciprocal_triton(s)
    free, q = _quantized_triton(v, z, low, high, mantissa, least, most)
    inside = free == q
    tl.store(out + at, tl.where(inside, slope, 0.0).to(out.dtype.element_ty), mask=here)
    wide = slope.to(tl.float32)
    # Sums of pieces, added up by the caller: no atomics, so the same result in every run.
    place = i * pieces + tl.program_id(1)
    part = tl.sum(tl.where(here, (q - z - tl.where(inside, v, 0.0)) * wide, 0.0), axis=1)
    tl.store(for_scale + place, part, mask=i < rows)
    part = tl.sum(tl.where(here & (free != q), -s * wide, 0.0), axis=1)
    tl.store(for_zero + place, part, mask=i < rows)


def _tiles(rows: Tensor, widest: int = 1024) -> tuple[tuple[int, int], dict]:
    """Launch grid and block sizes: about 2,048 numbers a program."""
    n, m = rows.shape
    columns = min(1 << (m - 1).bit_length(), widest)
    height = max(1, min(2048 // columns, 1 << (n - 1).bit_length()))
    # A product fused with the addition that rounds would round something else than torch does.
    exact = {"enable_fp_fusion": False}
    return (-(-n // height), -(-m // columns)), {"R": height, "C": columns} | exact


def triton_forward(rows, scale, shift, grid):
    launch, blocks = _tiles(rows)
    rows, y = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    scale, shift = scale.contiguous(), shift.contiguous()
    _apply_triton[launch](rows, scale, shift, y, *rows.shape, *grid, **blocks)
    return y


def triton_ranged(rows, grid):
    launch, blocks = _tiles(rows, 16384)
    rows, y = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    scale, shift = torch.empty(2, len(rows), device=rows.device)
    _ranged_triton[launch](rows, y, scale, shift, *rows.shape, *grid[:2], TINY, *grid[2:], **blocks)
    return y, scale, shift


def triton_backward(rows, scale, shift, grid, gradient):
    launch, blocks = _tiles(rows)
    rows, out = rows.contiguous(), torch.empty_like(gradient)
    scale, shift = scale.contiguous(), shift.contiguous()
    sums = torch.empty(2, len(rows), launch[1], device=rows.device)
    _pull_triton[launch](
        rows, scale, shift, gradient, out, *sums, *rows.shape, launch[1], *grid, **blocks
    )
    return out, *sums.sum(2)
