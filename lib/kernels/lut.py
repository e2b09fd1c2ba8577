"""Lookup-table GEMV: weights as bit planes, products as table lookups (SAIL, T-MAC, LUT-GEMM).

A weight of q bits is a sum over its bits, w = s Σ_b 2^b β_b + z with β_b in {−1, +1}, so a row's
product is y = Σ_g s_g Σ_b 2^b Σ_{c in g} β_b(c) x_c + z_g Σ_{c in g} x_c. Four activations have
only 16 signed sums: build them once for x, then every row reads each of its planes four columns at
a time, with a lookup and an addition where a product would stand (LUT-GEMM, arXiv 2206.09557;
T-MAC, arXiv 2407.00088). SAIL (arXiv 2509.25853) does the same inside a cache whose SRAM computes,
with the roles swapped: its tables hold sums of weights and bits of activations index them, so a
batch shares a table. Here a batch shares the reading of the weights, and each vector has tables.

A library has nothing for 1, 2, 3, 5, 6 or 7 bits; for 4 and 8 take torch's packed products, which
are faster. One product reads q·m·n/8 bytes and does q·m·n/4 lookups, 16 of them an instruction
(``lookup``), in float32: no rounding of activations or tables. Lookups, not memory, set the limit
(two cores reach about 40 % of the bandwidth), so every further vector of a batch costs as much as
the first. The GPU kernel has no tables to win with, since a GPU multiplies as fast as it looks up:
it adds ±x from the bits.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.errors import BookError
from lib.kernels import lookup
from lib.kernels.dispatch import check, dispatch, jit, refuse_gradient, tl
from lib.kernels.lookup import TILE

constexpr = tl.constexpr if tl else int
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AT_ONCE = 32  # vectors whose tables a cache holds
MANY = 512  # vectors from which unpacking and a dense product are as quick


@dataclass(frozen=True)
class Planes:
    """A matrix [rows, columns] of signs with scales; rows are padded to 64, columns to 32.

    Attributes:
        words: int32 [tiles, blocks, planes, 64]: for 64 rows a tile and 32 columns a block, bit k
            of a word says + at column 32·block + k. Plane 0 is the most significant.
        scales: float16 or uint8 (a power of two, see ``power``) [tiles, groups, scales, 64]: one a
            group if plane p counts 2^(planes − 1 − p) times; else as many for each plane, summed.
        offsets: like scales [tiles, groups, 1, 64], times the group's sum of x; or no groups.
        rows, columns: of the matrix.
        span: blocks in a group.
        doubling: whether the planes count as the bits of a number.
    """

    words: Tensor
    scales: Tensor
    offsets: Tensor
    rows: int
    columns: int
    span: int
    doubling: bool

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.offsets.nbytes

    @property
    def bits(self) -> float:
        """Bits of storage a weight, all counted."""
        return 8 * self.nbytes / max(1, self.rows * self.columns)

    @cached_property
    def arrays(self) -> tuple:
        """What the Numba kernel takes; a float16 as its 16 bits."""
        stored = (self.scales, self.offsets)
        halves = self.scales.dtype == torch.float16
        return self.words.numpy(), *((s.view(torch.int16) if halves else s).numpy() for s in stored)


def pack(weight: Tensor, bits: int, group: int = 128) -> Planes:
    """Round to the nearest of 2^bits levels between a group's minimum and maximum.

    Uniform asymmetric: s = (max − min) / (2^bits − 1), w ≈ s · round((w − min) / s) + min, stored
    as the signs of its bits with scale s/2 and offset min + s (2^bits − 1)/2, both float16.

    Args:
        weight: [rows, columns], floating; finite.
        bits: 1 to 8. At 1 bit the only levels are the extremes, worse than nothing on real weights:
            there take ``binary`` or ``shift_add``, whose levels are means.
        group: columns that share scale and offset, a multiple of 32; the last may be shorter.

    Raises:
        BookError: a wrong shape, dtype, number; a weight that is not finite or beyond float16.
    """
    check_weight(weight, group)
    if bits not in range(1, 9):
        raise BookError(f"bits is {bits}; it must be a whole number from 1 to 8")
    groups = split(weight.float(), group)  # [rows, groups, group]; nothing but zeros is padding
    inside = split(torch.ones_like(weight, dtype=torch.bool), group)
    low = groups.masked_fill(~inside, torch.inf).amin(-1)
    high = groups.masked_fill(~inside, -torch.inf).amax(-1)
    levels = 2**bits - 1
    scale = ((high - low) / levels / 2).half()
    middle = ((high + low) / 2).half()
    step = torch.where(scale == 0, 1, 2 * scale.float())
    code = ((groups - middle.float()[..., None]) / step[..., None] + levels / 2).round()
    code = code.clamp(0, levels).int().flatten(1)[:, : weight.shape[1]]
    order = torch.arange(bits - 1, -1, -1, device=weight.device)
    signs = (code[..., None] >> order & 1).bool()
    return build(signs, scale[..., None], middle, group, doubling=True)


def mv(packed: Planes, x: Tensor) -> Tensor:
    """The product of a packed matrix with a vector, or with each vector of a small batch.

    Args:
        packed: from a ``pack`` of this package.
        x: [..., columns], float32, bfloat16 or float16, on the same device. The sums are float32.

    Returns:
        [..., rows], in x's dtype. A value that is not finite spreads as in the sum over planes:
        NaN to every row, infinity to infinity or, where planes disagree in sign, to NaN.

    Raises:
        BookError: a wrong shape, dtype or device; a gradient wanted of x.
    """
    flat = check_input(x, packed.words, packed.columns)
    if len(flat) > MANY:
        y = F.linear(flat.float(), unpack(packed))
    else:
        y = dispatch(flat, _reference, _cpu, _triton, worth=packed.words.numel() > 0)(packed, flat)
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def unpack(packed: Planes) -> Tensor:
    """The matrix that is stored: float32 [rows, columns]."""
    scale, offset = _wide(packed)
    matrix = sum(_signs(packed, p) * scale[:, :, p, None] for p in range(packed.words.shape[2]))
    return (matrix + offset[..., None]).flatten(1)[: packed.rows, : packed.columns]


# --- packing, shared with shift_add and binary ----------------------------------------------------


def build(signs: Tensor, scales: Tensor, offsets: Tensor | None, group: int, doubling: bool):
    """Planes from their parts.

    Args:
        signs: bool [rows, columns, planes].
        scales: float16 or uint8 [rows, groups, scales].
        offsets: [rows, groups], or None for none.
        group: columns that share a scale.
    """
    rows, columns, n_planes = signs.shape
    tiles, blocks = -(-rows // TILE), -(-columns // 32)
    signs = F.pad(signs, (0, 0, 0, 32 * blocks - columns, 0, TILE * tiles - rows))
    bit = 1 << torch.arange(32, device=signs.device)
    words = signs.view(tiles, TILE, blocks, 32, n_planes).mul(bit[:, None]).sum(3)  # int64
    words = words.to(torch.int32).permute(0, 2, 3, 1).contiguous()  # the top bit becomes the sign
    if offsets is None:
        offsets = scales.new_empty(rows, 0)
    tiled = [
        F.pad(part, (0, 0, 0, 0, 0, TILE * tiles - rows))
        .view(tiles, TILE, *part.shape[1:])
        .permute(0, 2, 3, 1)
        .contiguous()
        for part in (scales, offsets[..., None])
    ]
    return Planes(words, *tiled, rows, columns, group // 32, doubling)


def split(x: Tensor, group: int) -> Tensor:
    """[rows, columns] to [rows, groups, group], the last group padded with zeros."""
    x = F.pad(x, (0, -x.shape[1] % group))
    return x.view(len(x), x.shape[1] // group, group)


def power(byte: Tensor) -> Tensor:
    """A stored power of two as float32: sign and 7 bits e for ±2^(e − 95), 0 where e = 0."""
    e = (byte & 127).int()
    value = torch.ldexp(torch.ones_like(e, dtype=torch.float32), e - 95)
    return torch.where(e == 0, 0, torch.where(byte > 127, -value, value))


def check_weight(weight: Tensor, group: int) -> None:
    check(weight=(weight, "rows columns", (*FLOATS, torch.float64)))
    if not isinstance(group, int) or group < 32 or group % 32:
        raise BookError(f"group is {group}; it must be a multiple of 32 columns")
    refuse_gradient("packing", [weight])
    if weight.numel() and not weight.abs().max() < 65504:
        raise BookError("weight holds NaN, infinity or values beyond float16; it must be finite")


def check_input(x: Tensor, words: Tensor, columns: int) -> Tensor:
    """x as [batch, columns]; a BookError where it does not fit."""
    check(x=(x, "... columns", FLOATS), packed=(words, "tiles words planes lanes"))
    if x.shape[-1] != columns:
        raise BookError(f"x is {list(x.shape)}; its last axis must be the matrix's {columns}")
    refuse_gradient("a packed product", [x])
    return x.reshape(x.shape[:-1].numel(), columns)


# --- the reference --------------------------------------------------------------------------------


def _signs(packed: Planes, plane: int) -> Tensor:
    """±1 in float32 of one plane, by group: [rows padded, groups, columns a group]."""
    bit = torch.arange(32, device=packed.words.device, dtype=torch.int32)
    words = packed.words[:, :, plane].transpose(1, 2).flatten(0, 1)  # [rows padded, blocks]
    return split((words[..., None] >> bit & 1).mul_(2).sub_(1).float().flatten(1), packed.span * 32)


def _wide(packed: Planes) -> tuple[Tensor, Tensor]:
    """Scales [rows padded, groups, planes] and offsets [rows padded, groups] in float32."""
    groups, n_planes = packed.scales.shape[1], packed.words.shape[2]

    def rows_first(part: Tensor) -> Tensor:
        part = power(part) if part.dtype == torch.uint8 else part.float()
        return part.permute(0, 3, 1, 2).flatten(0, 1)  # [rows padded, groups, scales]

    scale, offset = rows_first(packed.scales), rows_first(packed.offsets)
    if packed.doubling:
        scale = scale * 2.0 ** torch.arange(n_planes - 1, -1, -1, device=scale.device)
    else:
        scale = scale.unflatten(2, (n_planes, -1)).sum(-1)
    return scale, offset[..., 0] if offset.shape[1] else scale.new_zeros(len(scale), groups)


def _reference(packed: Planes, x: Tensor) -> Tensor:
    scale, offset = _wide(packed)
    x = split(pad(x, 32 * packed.words.shape[1]), packed.span * 32)  # [batch, groups, columns]
    y = x.new_zeros(())
    if packed.offsets.shape[1]:  # no offset is not a zero: 0 · ∞ is not a number
        y = (x.sum(-1)[:, None] * offset).sum(-1)
    for p in range(packed.words.shape[2]):
        y = y + (torch.einsum("rgc,bgc->brg", _signs(packed, p), x) * scale[:, :, p]).sum(-1)
    return y[:, : packed.rows]


# --- a CPU ----------------------------------------------------------------------------------------


def pad(x: Tensor, columns: int) -> Tensor:
    """x [batch, n] in float32, padded with zeros to [batch, columns]."""
    x = x.float()
    return F.pad(x, (0, columns - x.shape[1])) if columns > x.shape[1] else x.contiguous()


def _cpu(packed: Planes, x: Tensor) -> Tensor:
    x = pad(x, 32 * packed.words.shape[1])
    out = torch.empty(len(x), TILE * len(packed.words))
    from_x, to_y = x.numpy(), out.numpy()
    for i in range(0, len(x), AT_ONCE):
        some = slice(i, i + AT_ONCE)
        lookup.planes(*packed.arrays, from_x[some], packed.doubling, packed.span, to_y[some])
    return out[:, : packed.rows]


# --- a GPU ----------------------------------------------------------------------------------------


@jit
def _widen(stored, BYTE: constexpr):
    """A stored scale as float32 (``power``)."""
    if BYTE:
        e = (stored & 127).to(tl.int32)
        bits = tl.where(e == 0, 0, (e + 32) << 23) | ((stored & 128).to(tl.int32) << 24)
        return bits.to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@jit
def _planes_kernel(
    words, scales, offsets, x, out, blocks, planes, groups, span, terms, has_offsets, rows,
    DOUBLING: constexpr, BYTE: constexpr, TILE: constexpr, WIDTH: constexpr,
):  # fmt: skip
    tile, b = tl.program_id(0), tl.program_id(1)
    lane, bit = tl.arange(0, TILE), tl.arange(0, WIDTH)
    n_scales = terms if DOUBLING else terms * planes
    y = tl.zeros([TILE], tl.float32)
    for g in range(groups):
        first = g * span
        last = tl.minimum(first + span, blocks)
        total = tl.zeros([WIDTH], tl.float32)
        acc = tl.zeros([TILE], tl.float32)
        for p in range(planes):
            acc = acc + acc if DOUBLING else tl.zeros([TILE], tl.float32)
            for block in range(first, last):
                word = tl.load(words + ((tile * blocks + block) * planes + p) * TILE + lane)
                value = tl.load(x + (b * blocks + block) * WIDTH + bit)
                sign = ((word[:, None] >> bit[None, :]) & 1) * 2 - 1
                acc += tl.sum(sign.to(tl.float32) * value[None, :], 1)
                if p == 0:
                    total += value
            if not DOUBLING:
                scale = tl.zeros([TILE], tl.float32)
                for s in range(p * terms, p * terms + terms):
                    stored = tl.load(scales + ((tile * groups + g) * n_scales + s) * TILE + lane)
                    scale += _widen(stored, BYTE)
                y += scale * acc
        if DOUBLING:
            stored = tl.load(scales + (tile * groups + g) * TILE + lane)
            y += _widen(stored, BYTE) * acc
        if has_offsets:
            stored = tl.load(offsets + (tile * groups + g) * TILE + lane)
            y += _widen(stored, BYTE) * tl.sum(total)
    row = tile * TILE + lane
    tl.store(out + b * rows + row, y, mask=row < rows)


def _triton(packed: Planes, x: Tensor) -> Tensor:
    tiles, blocks, planes, _ = packed.words.shape
    groups, n_scales = packed.scales.shape[1:3]
    x = pad(x, 32 * blocks)
    out = x.new_empty(len(x), packed.rows)
    if out.numel():
        _planes_kernel[tiles, len(x)](
            packed.words, packed.scales, packed.offsets, x, out, blocks, planes, groups,
            packed.span, n_scales // (1 if packed.doubling else planes),
            packed.offsets.shape[1] > 0, packed.rows,
            DOUBLING=packed.doubling, BYTE=packed.scales.dtype == torch.uint8, TILE=TILE, WIDTH=32,
        )  # fmt: skip
    return out
