"""The Walsh–Hadamard transform along the last axis: rotations that spread outliers evenly.

y = H x / √n with H_2k = [[H_k, H_k], [H_k, −H_k]], as Quamba (Chiang et al., arXiv 2410.13229) uses
it on a Mamba block's output before it is quantized. For n = m·2^k the matrix is H_m ⊗ H_2^k, where
H_m is Paley's (1933): 576 = 36·16 and 1536 = 12·128, SmolLM2's widths, both have one.

torch has no such transform. The dense product reads n² weights and does 2n² operations a row; the
butterflies below read and write each row once, and do n log₂ n additions in the L1 cache. Each pass
has the constant geometry of Pease (1968): it reads four neighbours and writes them a quarter of the
row apart, so that every pass is the same loop, runs in vector registers, and the indices, having
turned full circle, end in their natural order.
"""

from functools import lru_cache
from math import isqrt, sqrt

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, dispatch, jit, njit, prange, tl, triton

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_BLOCK = 512  # the largest m that is looked for
WIDTH = 256  # columns that the block product goes over at once
DENSE = 128  # up to this n, or with fewer than four neighbours, torch's product is faster
SERIAL = 2**15  # elements below which threads cost more than they bring


def transform(
    x: Tensor,
    *,
    normalised: bool = True,
    transpose: bool = False,
    inplace: bool = False,
    block: Tensor | None = None,
) -> Tensor:
    """H x along the last axis, in O(n log n); ``x @ matrix(n).T / sqrt(n)`` done fast.

    Args:
        x: [..., n], float32, float64, bfloat16 or float16. Half precision is computed in float32
            and rounded once; unnormalised float16 may overflow to infinity.
        normalised: divide by √n, so that the transform is a rotation.
        transpose: Hᵀ x. The inverse of the normalised transform; the same as H x where n is a
            power of two, because that H is symmetric.
        inplace: write the result into ``x`` and return ``x``.
        block: the matrix H_m [m, m] of ±1 to use where ``paley`` knows none.

    Returns:
        [..., n], the dtype of x. Every output depends on every input of its row, so a NaN fills
        its row; so does an infinity, with infinities and NaN.

    Raises:
        BookError: no Hadamard matrix of order n is known here, or ``block`` is not one.

    The gradient is the transform with the other ``transpose``.
    """
    check(x=(x, "... n", FLOATS))
    p, h = _factors(x.shape[-1], block)
    how = {"normalised": normalised, "transpose": transpose, "block": block}
    if inplace and any(s == 0 and size > 1 for s, size in zip(x.stride(), x.shape, strict=True)):
        raise BookError("x is expanded, its rows share memory; an in-place transform needs a copy")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Transform.apply(x, p, h, inplace, how)
    return _run(x, p, h, inplace, how)


def matrix(n: int, *, block: Tensor | None = None, dtype=torch.float32) -> Tensor:
    """The matrix H [n, n] of ±1 that ``transform`` applies: H Hᵀ = n."""
    p, h = _factors(n, block)
    return _sylvester(p, dtype) if h is None else torch.kron(h.to(dtype), _sylvester(p, dtype))


@lru_cache(maxsize=32)
def paley(m: int) -> Tensor | None:
    """Paley's Hadamard matrix [m, m] of ±1, float32; ``None`` where he has none over a prime field.

    m = q + 1 with q a prime, 3 mod 4 (12, 20, 44, …; not symmetric), or m = 2(q + 1) with q a
    prime, 1 mod 4 (12, 28, 36, …; symmetric).
    """
    if _prime(q := m - 1) and q % 4 == 3:
        s = torch.zeros(m, m)
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _legendre(q)
        return s + torch.eye(m)
    if m % 4 == 0 and _prime(q := m // 2 - 1) and q % 4 == 1:
        s = torch.zeros(q + 1, q + 1)
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1, _legendre(q)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(s, one) + torch.kron(torch.eye(q + 1), zero)
    return None


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def _legendre(q: int) -> Tensor:
    """[q, q]: +1 where i − j is a square modulo q, −1 where it is not, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    i = torch.arange(q)
    return symbol[(i[:, None] - i[None, :]) % q]


def _sylvester(p: int, dtype=torch.float32) -> Tensor:
    h = torch.ones(1, 1, dtype=dtype)
    while len(h) < p:
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=dtype), h)
    return h


def _factors(n: int, block: Tensor | None) -> tuple[int, Tensor | None]:
    """n = p · m: the power of two p and the matrix H_m, ``None`` for m = 1."""
    if block is not None:
        m = check(block=(block, "m m", FLOATS))["m"]
        block = block.detach().float()
        if m % 4 or not torch.equal(block @ block.T, m * torch.eye(m, device=block.device)):
            raise BookError(f"block [{m}, {m}] is no Hadamard matrix: ±1, rows orthogonal, m = 4j")
        if n % m or not _power(n // m):
            raise BookError(f"x has {n} columns; with a block of {m} it must have {m}·2^k")
        return n // m, block
    if _power(n):
        return n, None
    odd = n // (n & -n) if n else LARGEST_BLOCK
    m = 4 * odd
    while m <= min(n, LARGEST_BLOCK):
        if n % m == 0 and (h := paley(m)) is not None:
            return n // m, h
        m *= 2
    raise BookError(f"x has {n} columns; no Hadamard matrix is known here for {n}: give block=")


def _power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, h, inplace, how):
        ctx.how = how | {"transpose": not how["transpose"]}
        if inplace:
            ctx.mark_dirty(x)
        return _run(x, p, h, inplace, how)

    @staticmethod
    def backward(ctx, gradient):
        return transform(gradient, **ctx.how), None, None, None, None


def _run(x: Tensor, p: int, h: Tensor | None, inplace: bool, how: dict) -> Tensor:
    n, transpose = x.shape[-1], how["transpose"]
    scale = 1 / sqrt(n) if how["normalised"] else 1.0
    if h is not None:
        h = (h.T if transpose else h).to(x.device).contiguous()
    rows = x.detach().reshape(-1, n).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    shared = rows.data_ptr() == x.data_ptr()
    out = torch.empty_like(rows) if shared and not inplace else rows
    cpu, triton = _cpu, None if rows.dtype == torch.float64 else _triton
    if how["block"] is None and (n <= DENSE or p < 4):
        cpu = lambda x, out, *_: out.copy_(x @ _dense(n, transpose, x.dtype) * scale)  # noqa: E731
    dispatch(rows, _reference, cpu, triton)(rows, out, p, h, scale)
    if not inplace:
        return out.view(x.shape).to(x.dtype)
    if shared:
        torch.autograd.graph.increment_version(x)  # the kernels write behind autograd's back
        return x
    return x.copy_(out.view(x.shape))


@lru_cache(maxsize=16)
def _dense(n: int, transpose: bool, dtype: torch.dtype) -> Tensor:
    h = matrix(n, dtype=dtype)
    return h if transpose else h.T.contiguous()


def _reference(x: Tensor, out: Tensor, p: int, h: Tensor | None, scale: float) -> None:
    """x [rows, n] into out [rows, n], which may be x."""
    rows, n = x.shape
    y, half = x, 1
    while half < p:
        a, b = y.view(rows, n // (2 * half), 2, half).unbind(-2)
        y = torch.stack((a + b, a - b), -2)
        half *= 2
    if h is not None:
        y = h.to(y.dtype) @ y.view(rows, n // p, p)
    torch.mul(y.view(rows, n), scale, out=out)


def _cpu(x: Tensor, out: Tensor, p: int, h: Tensor | None, scale: float) -> None:
    x, out = x.numpy(), out.numpy()
    block = np.ones((1, 1), x.dtype) if h is None else h.numpy().astype(x.dtype)
    block *= scale  # in x's precision: a float32 product would spoil float64
    if x.size < SERIAL:
        _rows(x, out, p, block)
    else:
        _many_rows(x, out, p, block, 2 * torch.get_num_threads())


@njit(**OPTIONS)
def _two(a, b, scale):
    half = a.size // 2
    for i in range(half):
        b_i, b_j = a[2 * i] + a[2 * i + 1], a[2 * i] - a[2 * i + 1]
        b[i], b[i + half] = scale * b_i, scale * b_j


@njit(**OPTIONS)
def _four(a, b, scale):
    quarter = a.size // 4
    for i in range(quarter):
        s, d = a[4 * i] + a[4 * i + 1], a[4 * i] - a[4 * i + 1]
        t, e = a[4 * i + 2] + a[4 * i + 3], a[4 * i + 2] - a[4 * i + 3]
        b[i], b[i + quarter] = scale * (s + t), scale * (d + e)
        b[i + 2 * quarter], b[i + 3 * quarter] = scale * (s - t), scale * (d - e)


@njit(**OPTIONS)
def _passes(x, out, spare, p, scale):
    """scale · (I ⊗ H_p) x for one row of m · p, which leaves it as [p, m]; out may be x.

    Every pass turns the index by the stages it did, so [m, p] ends as [p, m]: the row itself for
    m = 1. Every pass but the last writes into spare [2, n].
    """
    one, passes = x.dtype.type(1), 0
    while (1 << (2 * passes)) < p:
        passes += 1
    odd = (1 << (2 * passes)) != p  # then the first pass does one stage; the others do two
    for k in range(passes):
        last = k == passes - 1
        source = x if k == 0 else spare[(k + 1) % 2]
        target = out if last else spare[k % 2]
        if k == 0 and odd:
            _two(source, target, scale if last else one)
        else:
            _four(source, target, scale if last else one)
    if passes == 0:
        for i in range(x.size):
            out[i] = scale * x[i]


@njit(**OPTIONS)
def _block_rows(x, out, p, block, row, seen, y, spare):
    """H_m ⊗ H_p for a few rows, side by side, so that the innermost loop is never short.

    row [n], seen [m, width], y [4, width] with width = rows · p: scratch.
    """
    m, width = block.shape[0], x.shape[0] * p
    for r in range(x.shape[0]):
        _passes(x[r], row, spare, p, x.dtype.type(1))
        for j in range(m):
            for c in range(p):
                seen[j, r * p + c] = row[c * m + j]
    for i in range(0, m, 4):
        y[:] = 0
        for j in range(0, m, 4):
            h = block[i : i + 4, j : j + 4]
            for k in range(width):
                a, b, c, d = seen[j, k], seen[j + 1, k], seen[j + 2, k], seen[j + 3, k]
                y[0, k] += h[0, 0] * a + h[0, 1] * b + h[0, 2] * c + h[0, 3] * d
                y[1, k] += h[1, 0] * a + h[1, 1] * b + h[1, 2] * c + h[1, 3] * d
                y[2, k] += h[2, 0] * a + h[2, 1] * b + h[2, 2] * c + h[2, 3] * d
                y[3, k] += h[3, 0] * a + h[3, 1] * b + h[3, 2] * c + h[3, 3] * d
        for r in range(x.shape[0]):
            for q in range(4):
                out[r, (i + q) * p : (i + q + 1) * p] = y[q, r * p : (r + 1) * p]


@njit(**OPTIONS)
def _rows(x, out, p, block):
    m, n = block.shape[0], x.shape[1]
    spare = np.empty((2, n), x.dtype)
    if m == 1:
        for r in range(x.shape[0]):
            _passes(x[r], out[r], spare, p, block[0, 0])
        return
    step = max(1, min(x.shape[0], WIDTH // p))
    row, seen = np.empty(n, x.dtype), np.empty((m, step * p), x.dtype)
    y = np.empty((4, step * p), x.dtype)
    for r in range(0, x.shape[0], step):
        _block_rows(x[r : r + step], out[r : r + step], p, block, row, seen, y, spare)


@njit(parallel=True, **OPTIONS)
def _many_rows(x, out, p, block, workers):
    for w in prange(workers):
        a, b = w * x.shape[0] // workers, (w + 1) * x.shape[0] // workers
        _rows(x[a:b], out[a:b], p, block)


def _triton(x: Tensor, out: Tensor, p: int, h: Tensor | None, scale: float) -> None:
    small = min(p, 4096)  # what one program holds
    count = x.numel() // small
    tile = max(1, min(16, 4096 // small))
    stages = small.bit_length() - 1
    _butterflies[(triton.cdiv(count, tile),)](x, out, count, float(scale), small, stages, tile)
    while small < p:  # H_2^k = H_a ⊗ H_small
        a = min(64, p // small)
        out.copy_(_combine(out, _sylvester(a).to(x.device), small))
        small *= a
    if h is not None:
        out.copy_(_combine(out, h.float(), p))


def _combine(x: Tensor, h: Tensor, p: int) -> Tensor:
    """H_m over the middle axis of x seen as [rows, m, p]."""
    m, y = len(h), torch.empty_like(x)
    columns = x.numel() // m
    grid = (triton.cdiv(columns, 64), triton.cdiv(m, 16))
    _block_product[grid](x, h, y, m, p, columns, 16, 64)
    return y


@jit
def _butterflies(x, out, count, scale, P: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    inside = (row < count)[:, None] & (tl.arange(0, P) < P)[None, :]
    y = tl.load(x + at, mask=inside, other=0.0)
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(y, (TILE, P // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (TILE, P))
    tl.store(out + at, y * scale, mask=inside)


@jit
def _block_product(x, h, y, m, p, columns, TILE: tl.constexpr, WIDTH: tl.constexpr):
    column = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = column // p * m * p + column % p  # of the column, in its row
    total = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for first in range(0, m, TILE):
        j = first + tl.arange(0, TILE)
        inside = (j < m)[:, None] & (column < columns)[None, :]
        values = tl.load(x + start[None, :] + j[:, None] * p, mask=inside, other=0.0)
        inside = (i < m)[:, None] & (j < m)[None, :]
        signs = tl.load(h + i[:, None] * m + j[None, :], mask=inside, other=0.0)
        total = tl.dot(signs, values, total, input_precision="ieee")
    inside = (i < m)[:, None] & (column < columns)[None, :]
    tl.store(y + start[None, :] + i[:, None] * p, total, mask=inside)
