"""Matrix–vector products that read only selected rows, and the parts they share with a sparse MLP.

The two kernels of CHESS (He et al., arXiv 2409.01366): spvmm, y = Σ_{i: |x_i| > t_i} x_i w_i,
where the input picks the rows, and vmmsp, y_i = w_i · x for the picked i alone. NaN passes every
threshold, so that it is not lost; a product with a dropped row is never formed.

torch has no product that skips rows: ``w[rows] @ x`` reads and writes them once before it
multiplies, and at batch 1 its dense product falls short of the memory's speed (the bench has
both). Here a share 1 − s of 4 n m bytes is read, once, for two operations a number: memory alone
sets the time. On the jumps between kept rows a processor's own prefetcher starts late; the
kernel, which knows the next row, asks for it in advance.

Numba does this in float32; on a CPU other dtypes take the reference.
"""

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels.dispatch import (
    OPTIONS,
    check,
    dispatch,
    jit,
    njit,
    numba,
    prange,
    refuse_gradient,
    tl,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def sparse_mv(w: Tensor, x: Tensor, select: Tensor | float = 0.0) -> Tensor:
    """Σ x_i w_i over the selected rows of ``w``: CHESS's spvmm, for a down projection transposed.

    Args:
        w: [n, m], a row for each input; finite; float32, or bfloat16 or float16.
        x: [n], of the same dtype.
        select: a threshold or one a channel [n] (rows with |x_i| > t_i, and NaN), a bool mask
            [n], or int64 row numbers [k] (a number that comes twice counts once).

    Returns:
        [m].

    Raises:
        BookError: a wrong shape, dtype or device; a row number out of range; a gradient wanted.
    """
    n = check(w=(w, "n m", FLOATS), x=(x, "n", (getattr(w, "dtype", None),)))["n"]
    refuse_gradient("sparse_mv", (w, x))
    return pick(w, _reference_mix, _cpu_mix, _triton_mix)(w, x, _mask(select, n, x))


def masked_mv(w: Tensor, x: Tensor, select: Tensor) -> Tensor:
    """w_i · x for the selected rows of ``w``, 0 for the others: CHESS's vmmsp.

    Args:
        w: [m, n]; finite; float32, or bfloat16 or float16.
        x: [n], of the same dtype.
        select: a bool mask [m] or int64 row numbers [k].

    Returns:
        [m].

    Raises:
        BookError: as ``sparse_mv``.
    """
    m = check(w=(w, "m n", FLOATS), x=(x, "n", (getattr(w, "dtype", None),)))["m"]
    refuse_gradient("masked_mv", (w, x))
    return pick(w, _reference_rows, _cpu_rows, _triton_rows)(w, x, _mask(select, m, None, w))


# --- what the backends share ----------------------------------------------------------------------


def kept_by(g: Tensor, thresholds: Tensor | float) -> Tensor:
    return ~(g.abs() <= thresholds)  # not ">": NaN is kept


def pick(like: Tensor, reference, cpu, triton):
    return dispatch(like, reference, cpu if like.dtype == torch.float32 else None, triton)


def _mask(select, n: int, x: Tensor | None, like: Tensor | None = None) -> Tensor:
    """``select`` as a bool mask [n]; thresholds on ``x`` are allowed where it is given."""
    like = x if like is None else like
    if x is not None and isinstance(select, (int, float)) and not isinstance(select, bool):
        return kept_by(x, select)
    if not isinstance(select, Tensor):
        what = "a threshold, " if x is not None else ""
        raise BookError(f"select is a {type(select).__name__}; it must be {what}a mask or rows")
    if x is not None and select.is_floating_point():
        check(x=(x, "n"), select=(select, "n"))
        return kept_by(x, select)
    if select.dtype == torch.bool:
        check(w=(like, "..."), select=(select, str(n)))
        return select
    check(w=(like, "..."), select=(select, "k", (torch.bool, torch.int64)))
    if len(select) and not (0 <= int(select.min()) and int(select.max()) < n):
        low, high = int(select.min()), int(select.max())
        raise BookError(f"select has rows {low} to {high}; they must lie from 0 to {n - 1}")
    return torch.zeros(n, dtype=torch.bool, device=like.device).index_fill_(0, select, True)


# --- torch, the specification ---------------------------------------------------------------------


def _reference_mix(w, x, keep):
    return x[keep] @ w[keep]


def _reference_rows(w, x, keep):
    y = w.new_zeros(len(w))
    y[keep] = w[keep] @ x
    return y


# --- Numba ----------------------------------------------------------------------------------------

if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def take(typing, counter):
        """counter[0] += 1 as one step that no thread can divide; what it was before."""

        def code(context, builder, signature, arguments):
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            one = ir.Constant(ir.IntType(64), 1)
            return builder.atomic_rmw("add", array.data, one, "monotonic")

        return types.int64(counter), code

    @intrinsic
    def ask(typing, row, j):
        """Have the cache line of row[j] fetched into the L2 cache. (Into L1 is no faster than not
        to ask: its few slots for lines on their way are what holds up the jumps.)"""

        def code(context, builder, signature, arguments):
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            at = builder.gep(array.data, [arguments[1]])
            at = builder.bitcast(at, cgutils.voidptr_t)
            kind = ir.FunctionType(ir.VoidType(), [at.type] + 3 * [ir.IntType(32)])
            call = builder.module.declare_intrinsic("llvm.prefetch", [at.type], kind)
            read_to_l2 = [ir.Constant(ir.IntType(32), number) for number in (0, 2, 1)]
            builder.call(call, [at, *read_to_l2])
            return context.get_dummy_value()

        return types.void(row, j), code

else:
    take = ask = None


@njit(**OPTIONS)
def dot(w, x):
    total = np.float32(0)
    for j in range(len(x)):
        total += w[j] * x[j]
    return total


@njit(**OPTIONS)
def add(part, h, w):
    for j in range(len(part)):
        part[j] += h * w[j]


@njit(**OPTIONS)
def ask_row(row):
    for j in range(0, len(row), 16):
        ask(row, j)


@njit(**OPTIONS)
def add_up(parts, out):
    for j in range(len(out)):
        total = np.float32(0)
        for thread in range(len(parts)):
            total += parts[thread, j]
        out[j] = total


@njit(parallel=True, **OPTIONS)
def _numba_mix(w, x, kept, threads, out):
    parts = np.zeros((threads, w.shape[1]), np.float32)
    share = (len(kept) + threads - 1) // threads
    for thread in prange(threads):
        last = min(len(kept), (thread + 1) * share)
        for k in range(thread * share, last):
            if k + 1 < last and kept[k + 1] != kept[k] + 1:
                ask_row(w[kept[k + 1]])
            add(parts[thread], x[kept[k]], w[kept[k]])
    add_up(parts, out)


@njit(parallel=True, **OPTIONS)
def _numba_rows(w, x, kept, threads, out):
    share = (len(kept) + threads - 1) // threads
    for thread in prange(threads):
        last = min(len(kept), (thread + 1) * share)
        for k in range(thread * share, last):
            if k + 1 < last and kept[k + 1] != kept[k] + 1:
                ask_row(w[kept[k + 1]])
            out[kept[k]] = dot(w[kept[k]], x)


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _cpu_mix(w, x, keep):
    out = w.new_empty(w.shape[1])
    _numba_mix(*arrays(w, x, keep.nonzero()[:, 0]), numba.get_num_threads(), out.numpy())
    return out


def _cpu_rows(w, x, keep):
    out = w.new_zeros(len(w))
    _numba_rows(*arrays(w, x, keep.nonzero()[:, 0]), numba.get_num_threads(), out.numpy())
    return out


# --- Triton ---------------------------------------------------------------------------------------
# A program takes 16 channels; masked loads leave the dropped rows in memory. Sums over channels
# go to a row of their own a program and are added up after, so that the result does not depend on
# which program ran first.


@jit
def dots(w, x, row, keep, stride, d, ROWS: tl.constexpr, WIDE: tl.constexpr):
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, d, WIDE):
        column = start + tl.arange(0, WIDE)
        inside = column < d
        v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        at = w + row[:, None] * stride + column[None, :]
        r = tl.load(at, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(r * v[None, :], axis=1)
    return total


@jit
def mixes(w, h, row, keep, stride, d, parts, WIDE: tl.constexpr):
    for start in range(0, d, WIDE):
        column = start + tl.arange(0, WIDE)
        inside = column < d
        at = w + row[:, None] * stride + column[None, :]
        r = tl.load(at, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y = tl.sum(tl.where(keep[:, None], h[:, None] * r, 0.0), axis=0)
        tl.store(parts + tl.program_id(0) * d + column, y, mask=inside)


@jit
def _triton_mix_kernel(w, x, keeps, parts, n, m, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keep = tl.load(keeps + row, mask=row < n, other=0) != 0
    h = tl.load(x + row, mask=keep, other=0.0).to(tl.float32)
    mixes(w, h, row, keep, m, m, parts, WIDE)


@jit
def _triton_rows_kernel(w, x, keeps, out, m, n, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keep = tl.load(keeps + row, mask=row < m, other=0) != 0
    y = dots(w, x, row, keep, n, n, ROWS, WIDE)
    tl.store(out + row, tl.where(keep, y, 0.0), mask=row < m)


TILE = {"ROWS": 16, "WIDE": 128}


def parts_of(like: Tensor, n: int, d: int) -> Tensor:
    return torch.zeros((-(-n // TILE["ROWS"]), d), dtype=torch.float32, device=like.device)


def _triton_mix(w, x, keep):
    parts = parts_of(w, *w.shape)
    if parts.numel():
        keep = keep.to(torch.uint8)
        _triton_mix_kernel[len(parts),](
            w.contiguous(), x.contiguous(), keep, parts, *w.shape, **TILE
        )
    return parts.sum(0).to(w.dtype)


def _triton_rows(w, x, keep):
    out = w.new_zeros(len(w))
    if w.numel():
        grid = (-(-len(w) // TILE["ROWS"]),)
        keep = keep.to(torch.uint8)
        _triton_rows_kernel[grid](w.contiguous(), x.contiguous(), keep, out, *w.shape, **TILE)
    return out
