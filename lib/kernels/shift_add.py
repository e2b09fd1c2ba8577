"""Shift-and-add products: weights whose every factor is a power of two (ShiftAddLLM, DenseShift).

ShiftAddLLM (arXiv 2406.05981): W_q = Σ_i α_i b_i with binary matrices b_i in {−1, +1} and, a group
of columns, scaling factors α_i that are powers of two (or sums of few). So W_q x = Σ_i α_i (b_i x):
"queries and adds" for b_i x, a shift for α_i. This is ``lut``'s product with other scales; packing
it is done here, by alternating binary-coding quantization.

DenseShift (arXiv 2208.09708): W = s ∘ 2^p with signs s and whole p from 0 to 2^(bits−1) − 1, and no
zero. A code of ``bits`` bits finds its value in a table of 16 in one register (``lookup``).

On hardware without multipliers both save energy; a CPU or GPU multiplies by a power of two as fast
as it adds to an exponent, and exactly the same, so what is won here is memory: (bits + 1/16)·m·n/8
bytes are read where bfloat16 reads 2·m·n. No library has either product.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.errors import BookError
from lib.kernels import lookup, lut
from lib.kernels.dispatch import dispatch, jit, tl
from lib.kernels.lookup import TILE
from lib.kernels.lut import MANY, Planes, build, check_input, check_weight, pad, power, split

constexpr = tl.constexpr if tl else int


def pack(weight: Tensor, bits: int, group: int = 128, terms: int = 1, rounds: int = 15) -> Planes:
    """Alternating binary-coding quantization with power-of-two factors (ShiftAddLLM, section 3).

    Begins greedily, b_i = sign(r), α_i = mean |r|, r ← r − α_i b_i. Then, ``rounds`` times:
    α = (BᵀB)⁻¹Bᵀw, sorted by size and rounded to Σ_k ±2^round(log2 |rest|) (``terms`` terms), and
    every weight takes the nearest of the 2^bits sums ±α_1 … ±α_bits. Each group keeps the round
    with the least ‖w − Bα‖², since rounding α can undo what a round won.

    Args:
        weight: [rows, columns], floating; finite.
        bits: binary matrices, 1 to 6.
        group: columns that share their factors, a multiple of 32; the last may be shorter.
        terms: powers of two in a factor, 1 (a plain shift) to 3.

    Returns:
        a matrix for ``mv`` and ``unpack``, one byte a term.
    """
    check_weight(weight, group)
    if bits not in range(1, 7):
        raise BookError(f"bits is {bits}; it must be a whole number from 1 to 6")
    if terms not in range(1, 4):
        raise BookError(f"terms is {terms}; it must be 1, 2 or 3 powers of two")
    w = split(weight.float(), group)  # [rows, groups, group], padded with zeros
    inside = split(torch.ones_like(weight, dtype=torch.float32), group)
    rest, basis, factors = w, [], []
    size = inside.sum(-1, keepdim=True)
    for _ in range(bits):
        factors.append((rest * inside).abs().sum(-1, keepdim=True) / size)
        basis.append(torch.where(rest < 0, -1.0, 1.0))
        rest = rest - factors[-1] * basis[-1]
    basis, factors = torch.stack(basis, -1), torch.cat(factors, -1)  # [.., group, bits], [.., bits]
    best = torch.full(w.shape[:2], torch.inf, device=w.device)
    kept_signs = basis > 0
    kept_bytes = torch.zeros(*w.shape[:2], bits * terms, dtype=torch.uint8, device=w.device)
    for step in range(rounds + 1):
        if step:
            factors = _least_squares(basis, inside, w, factors)
        rounded = factors.abs().sort(-1, descending=True).values
        stored, rounded = _powers(rounded, terms)
        basis = _nearest(w, rounded)
        error = (((w - (basis * rounded[:, :, None]).sum(-1)) * inside) ** 2).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        kept_signs = torch.where(better[..., None, None], basis > 0, kept_signs)
        kept_bytes = torch.where(better[..., None], stored.flatten(2), kept_bytes)
    signs = kept_signs.flatten(1, 2)[:, : weight.shape[1]]
    return build(signs, kept_bytes, None, group, doubling=False)


def mv(packed, x: Tensor) -> Tensor:
    """The product of a matrix from ``pack`` or ``pack_dense_shift`` with x [..., columns].

    As ``lut.mv``: [..., rows] in x's dtype, float32 sums, errors by name.
    """
    if isinstance(packed, Planes):
        return lut.mv(packed, x)
    flat = check_input(x, packed.words, packed.columns)
    if len(flat) > MANY:
        y = F.linear(flat.float(), unpack(packed))
    else:
        y = dispatch(flat, _reference, _cpu, _triton, worth=packed.words.numel() > 0)(packed, flat)
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def unpack(packed) -> Tensor:
    """The matrix that is stored: float32 [rows, columns]."""
    if isinstance(packed, Planes):
        return lut.unpack(packed)
    return _shifts(packed) * power(packed.scales).view(-1, 1)[: packed.rows]


# --- ShiftAddLLM's alternation --------------------------------------------------------------------


def _least_squares(basis: Tensor, inside: Tensor, w: Tensor, before: Tensor) -> Tensor:
    """(BᵀB)⁻¹Bᵀw for each group, over its real columns; a hair of ridge where b_i coincide."""
    seen = basis * inside[..., None]
    gram = seen.mT @ basis
    ridge = 1e-4 * inside.sum(-1)[..., None, None] * torch.eye(gram.shape[-1], device=w.device)
    # The ridge pulls towards the factors before, so that what B cannot tell apart stays as it is.
    target = (seen.mT @ w[..., None]) + ridge @ before[..., None]
    return torch.linalg.solve(gram + ridge, target)[..., 0]


def _powers(factors: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Sums of ``terms`` powers of two: bytes [..., factors, terms] and values [..., factors]."""
    rest, stored = factors, []
    for _ in range(terms):
        e = torch.log2(rest.abs().clamp_min(2.0**-100)).round() + 95
        byte = torch.where(e < 1, 0, e.clamp(max=127) + 128 * (rest < 0)).to(torch.uint8)
        stored.append(byte)
        rest = rest - power(byte)
    return torch.stack(stored, -1), factors - rest


def _nearest(w: Tensor, factors: Tensor) -> Tensor:
    """Signs [..., columns, bits] of the sum ±α_1 … ±α_bits nearest to each weight."""
    bits = factors.shape[-1]
    number, bit = torch.arange(2**bits, device=w.device), torch.arange(bits, device=w.device)
    table = (number[:, None] >> bit & 1).float() * 2 - 1  # [2^bits, bits]
    sums, order = (factors @ table.T).sort(-1)
    middle = ((sums[..., 1:] + sums[..., :-1]) / 2).contiguous()
    at = torch.searchsorted(middle, w.contiguous())
    return table[order.gather(-1, at)]


# --- DenseShift -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shifts:
    """A matrix of ±2^p a weight and one power of two a row; rows are padded to 64.

    Attributes:
        words: int32 [tiles, words a row, 1, 64]: 32 // bits codes a word (16, 10, 8), the first
            lowest; a code is p and, above it, 1 for minus.
        scales: uint8 [tiles, 64], each row's power of two (``lut.power``).
        rows, columns: of the matrix.
        width: bits of a code.
    """

    words: Tensor
    scales: Tensor
    rows: int
    columns: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    @property
    def bits(self) -> float:
        """Bits of storage a weight, all counted."""
        return 8 * self.nbytes / max(1, self.rows * self.columns)


def pack_dense_shift(weight: Tensor, bits: int = 4) -> Shifts:
    """The nearest of ±2^0 … ±2^P, P = 2^(bits−1) − 1, times a power of two a row.

    DenseShift trains such weights; this projects given ones: nearest in size, zero to the smallest.
    A row's power of two is the one with the least squared error among five below its maximum.

    Args:
        weight: [rows, columns], floating; finite.
        bits: 2, 3 or 4: a sign and 1, 2 or 3 bits of shift. Storage is 32 / (32 // bits) bits.
    """
    check_weight(weight, 32)
    if bits not in (2, 3, 4):
        raise BookError(f"bits is {bits}; it must be 2, 3 or 4")
    rows, columns = weight.shape
    w, most = weight.float(), 2 ** (bits - 1) - 1
    peak = w.abs().amax(1, keepdim=True) if columns else w.new_zeros(rows, 1)
    top = torch.log2(peak.clamp_min(2.0**-60)).ceil()
    least, scale, shift = None, None, None
    for down in range(5):
        low = torch.ldexp(torch.ones_like(top), top - down - most)
        # ⌊log2(4/3 a)⌋ changes at 1.5·2^p, halfway between 2^p and 2^(p+1).
        p = torch.log2((w.abs() / low).clamp_min(0.5) * (4 / 3)).floor().clamp(0, most)
        error = ((w.abs() - low * torch.exp2(p)) ** 2).sum(1, keepdim=True)
        if least is None:
            least, scale, shift = error, top - down - most, p
        better = error < least
        scale, shift = torch.where(better, top - down - most, scale), torch.where(better, p, shift)
        least = torch.minimum(error, least)
    code = shift.long() | (w < 0).long() << (bits - 1)
    tiles, each = -(-rows // TILE), 32 // bits
    code = F.pad(code, (0, -columns % each, 0, TILE * tiles - rows))
    code = code.view(tiles, TILE, code.shape[1] // each, each) << bits * torch.arange(
        each, device=w.device
    )
    words = code.sum(-1).to(torch.int32).transpose(1, 2)[:, :, None].contiguous()
    scales = F.pad((scale[:, 0] + 95).to(torch.uint8), (0, TILE * tiles - rows)).view(tiles, TILE)
    return Shifts(words, scales, rows, columns, bits)


def _shifts(packed: Shifts) -> Tensor:
    """±2^p before the rows' scales: float32 [rows, columns]."""
    each, width = 32 // packed.width, packed.width
    place = width * torch.arange(each, device=packed.words.device)
    code = packed.words.transpose(1, 3).flatten(0, 1)[:, 0, :, None] >> place & (1 << width) - 1
    code = code.flatten(1)[: packed.rows, : packed.columns]
    size = torch.exp2((code & (1 << (width - 1)) - 1).float())
    return torch.where(code >> (width - 1) > 0, -size, size)


def _reference(packed: Shifts, x: Tensor) -> Tensor:
    return (x.float() @ _shifts(packed).T) * power(packed.scales).flatten()[: packed.rows]


@cache
def _book(width: int) -> np.ndarray:
    """The values of codes of ``width`` bits, repeated to 16, whatever lies above a code."""
    size = 2.0 ** np.arange(2 ** (width - 1), dtype=np.float32)
    return np.tile(np.concatenate([size, -size]), 16 >> width)


def _cpu(packed: Shifts, x: Tensor) -> Tensor:
    each = 32 // packed.width
    x = pad(x, each * packed.words.shape[1])
    out = torch.empty(len(x), TILE * len(packed.words))
    words, scales = packed.words.numpy(), packed.scales.numpy()
    lookup.codes(words, _book(packed.width), scales, x.numpy(), packed.width, each, out.numpy())
    return out[:, : packed.rows]


@jit
def _codes_kernel(
    words, scales, x, out, n_words, columns, rows,
    WIDTH: constexpr, EACH: constexpr, PLACES: constexpr, TILE: constexpr,
):  # fmt: skip
    tile, b = tl.program_id(0), tl.program_id(1)
    lane, place = tl.arange(0, TILE), tl.arange(0, PLACES)  # PLACES: a power of two, ≥ EACH
    y = tl.zeros([TILE], tl.float32)
    for i in range(n_words):
        word = tl.load(words + (tile * n_words + i) * TILE + lane)
        column = i * EACH + place
        value = tl.load(x + b * columns + column, mask=(place < EACH) & (column < columns), other=0)
        code = word[:, None] >> tl.minimum(WIDTH * place, 31)[None, :]
        exponent = ((code & ((1 << (WIDTH - 1)) - 1)) + 127) << 23  # 2^p, bit by bit
        weight = (exponent | ((code >> (WIDTH - 1)) << 31)).to(tl.float32, bitcast=True)
        y += tl.sum(weight * value[None, :], 1)
    e = (tl.load(scales + tile * TILE + lane) & 127).to(tl.int32)
    y = y * tl.where(e == 0, 0, (e + 32) << 23).to(tl.float32, bitcast=True)
    row = tile * TILE + lane
    tl.store(out + b * rows + row, y, mask=row < rows)


def _triton(packed: Shifts, x: Tensor) -> Tensor:
    tiles, n_words = packed.words.shape[:2]
    x = x.float().contiguous()
    out = x.new_empty(len(x), packed.rows)
    if out.numel():
        _codes_kernel[tiles, len(x)](
            packed.words, packed.scales, x, out, n_words, packed.columns, packed.rows,
            WIDTH=packed.width, EACH=32 // packed.width, PLACES=16, TILE=TILE,
        )  # fmt: skip
    return out
