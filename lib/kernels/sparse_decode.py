"""Sparse decode of a dictionary and its gradients, without one dense [n, m] matrix.

A sparse autoencoder reconstructs token t from its few chosen latents (Gao et al. 2024, arXiv
2406.04093, eq. 2): x̂ₜ = Σⱼ vₜⱼ · W_dec[iₜⱼ] + b_dec. With A the sparse [n, m] matrix of the values,
three products do everything: ``gather`` A·W (decode), ``dots`` of G·Wᵀ only where A has entries
(the gradient of the values), and ``gather`` with the transpose, Aᵀ·G (the gradient of W_dec). The
transpose is one counting sort of the pairs by latent; then one thread owns a latent's row, so
nothing races, no atomics are needed, and the sums come out the same on every run.

Every pair reads one row of d floats (2.3 kB at d = 576) and does 2d flops: a quarter of a flop a
byte, so the limit is memory, here the shared cache where W_dec lies (10.6 MB at 4,608 × 576).
Four rows are read at once, so the sum is loaded and stored once for four. Measured beside:
``torch.nn.functional.embedding_bag`` and torch's CSR products (the bench prints them).
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, dispatch, jit, njit, numba, prange, tl, triton

FLOATS = (torch.float32, torch.float64)


def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Reconstruct tokens from chosen latents: ``x̂[t] = Σⱼ values[t, j] W_dec[indices[t, j]] + b``.

    Differentiable in values, W_dec and b_dec; the work is that of the pairs alone.

    Args:
        values: [n, k], float32 or float64; or [pairs], with ``starts``. NaN and infinity spread
            to their own token, as in a dense product of the chosen entries.
        indices: int64 of the same shape, latents from 0 to m − 1. A latent may come twice.
        W_dec: [m, d], a latent's direction a row; b_dec: [d]. Dtypes as values.
        starts: int64 [n + 1], for ragged choices: token t owns pairs starts[t] to starts[t + 1].

    Returns:
        [n, d].

    Raises:
        BookError: for a wrong shape, dtype or device, or an index or start out of range.
    """
    check_pairs(indices, starts, len(W_dec) if isinstance(W_dec, Tensor) else 0, values)
    same = (values.dtype,)
    check(values=(values, "...", FLOATS), W_dec=(W_dec, "m d", same), b_dec=(b_dec, "d", same))
    starts = even_starts(indices) if starts is None else starts
    return _Decode.apply(values.flatten(), indices.flatten(), starts, W_dec, b_dec)


def check_pairs(indices: Tensor, starts: Tensor | None, m: int, values: Tensor | None) -> None:
    axes = "n k" if starts is None else "pairs"
    named = {"indices": (indices, axes, (torch.int64,))}
    if values is not None:
        named = {"values": (values, axes)} | named
    if starts is not None:
        named["starts"] = (starts, "n+1", (torch.int64,))
    check(**named)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < m:
        low, high = int(indices.min()), int(indices.max())
        raise BookError(f"indices run from {low} to {high}; with {m} latents: 0 to {m - 1}")
    if starts is not None:
        good = len(starts) and starts[0] == 0 and starts[-1] == len(indices)
        if not good or bool((starts.diff() < 0).any()):
            raise BookError(f"starts must rise from 0 to {len(indices)}, the number of pairs")


def even_starts(indices: Tensor) -> Tensor:
    n, k = indices.shape
    return torch.arange(n + 1, device=indices.device) * k


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, starts, W_dec, b_dec):
        ctx.save_for_backward(values, indices, starts, W_dec)
        return gather(values, indices, starts, W_dec) + b_dec

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, starts, W_dec = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_values = dots(indices, starts, grad, W_dec) if wants[0] else None
        grad_W = None
        if wants[3]:
            order, tokens, columns = transpose(indices, starts, len(W_dec))
            grad_W = gather(values[order], tokens, columns, grad)
        return grad_values, None, None, grad_W, grad.sum(0) if wants[4] else None


# The three products, unchecked: what the autograd functions are made of.


def gather(values: Tensor, indices: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """[len(starts) − 1, d]: the sum over a row's pairs of ``values · rows[indices]``."""
    run = dispatch(rows, _reference_gather, cpu=_cpu_gather, triton=_triton_gather)
    return run(values, indices, starts, rows)


def dots(indices: Tensor, starts: Tensor, left: Tensor, rows: Tensor) -> Tensor:
    """[pairs]: the product of every pair's ``left[t]`` and ``rows[index]``."""
    run = dispatch(rows, _reference_dots, cpu=_cpu_dots, triton=_triton_dots)
    return run(indices, starts, left, rows)


def transpose(indices: Tensor, starts: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same pairs sorted by latent: (order [pairs], their tokens [pairs], starts [m + 1]).

    A stable counting sort: a latent's tokens rise. On a GPU torch's sort does it.
    """
    return dispatch(indices, _reference_transpose, cpu=_cpu_transpose)(indices, starts, m)


def owners(starts: Tensor) -> Tensor:
    """[pairs]: the row that owns each pair."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff())


def _reference_gather(values, indices, starts, rows):
    out = rows.new_zeros(len(starts) - 1, rows.shape[1])
    return out.index_add_(0, owners(starts), values[:, None] * rows[indices])


def _reference_dots(indices, starts, left, rows):
    return (left[owners(starts)] * rows[indices]).sum(1)


def _reference_transpose(indices, starts, m):
    order = indices.argsort(stable=True)
    columns = torch.zeros(m + 1, dtype=torch.int64, device=indices.device)
    columns[1:] = torch.bincount(indices, minlength=m).cumsum(0)
    return order, owners(starts)[order], columns


def bounds(starts: np.ndarray) -> np.ndarray:
    """Cut rows into runs of about equally many pairs, a few a thread: a popular latent has many."""
    n = len(starts) - 1
    parts = max(1, min(n, 4 * numba.get_num_threads()))
    weight = starts + np.arange(n + 1)  # an empty row is some work too: its sum is set to zero
    cuts = np.searchsorted(weight, np.linspace(0, weight[-1], parts + 1))
    cuts[0], cuts[-1] = 0, n
    return cuts


def _cpu_gather(values, indices, starts, rows):
    out = torch.empty(len(starts) - 1, rows.shape[1], dtype=rows.dtype)
    arrays = [x.detach().contiguous().numpy() for x in (values, indices, starts, rows)]
    _gather(*arrays, bounds(arrays[2]), out.numpy())
    return out


def _cpu_dots(indices, starts, left, rows):
    out = torch.empty(len(indices), dtype=rows.dtype)
    arrays = [x.detach().contiguous().numpy() for x in (indices, starts, left, rows)]
    _dots(*arrays, bounds(arrays[1]), out.numpy())
    return out


def _cpu_transpose(indices, starts, m):
    order, tokens = torch.empty_like(indices), torch.empty_like(indices)
    columns = torch.empty(m + 1, dtype=torch.int64)
    arrays = [x.contiguous().numpy() for x in (indices, starts)]
    _transpose(*arrays, order.numpy(), tokens.numpy(), columns.numpy())
    return order, tokens, columns


@njit(**OPTIONS)
def sum_rows(values, indices, begin, end, rows, out):
    """Add ``values · rows[indices]`` of the pairs begin to end to out: four rows at a time."""
    at = begin
    while at + 4 <= end:
        v0, v1, v2, v3 = values[at], values[at + 1], values[at + 2], values[at + 3]
        r0, r1 = rows[indices[at]], rows[indices[at + 1]]
        r2, r3 = rows[indices[at + 2]], rows[indices[at + 3]]
        for j in range(len(out)):
            out[j] += (v0 * r0[j] + v1 * r1[j]) + (v2 * r2[j] + v3 * r3[j])
        at += 4
    while at < end:
        v0, r0 = values[at], rows[indices[at]]
        for j in range(len(out)):
            out[j] += v0 * r0[j]
        at += 1


@njit(**OPTIONS)
def dot_rows(indices, begin, end, left, rows, out):
    """``out[pair] = left · rows[index]`` for the pairs begin to end."""
    for at in range(begin, end):
        row, total = rows[indices[at]], rows.dtype.type(0)
        for j in range(len(left)):
            total += left[j] * row[j]
        out[at] = total


@njit(parallel=True, **OPTIONS)
def _gather(values, indices, starts, rows, parts, out):
    for part in prange(len(parts) - 1):
        for r in range(parts[part], parts[part + 1]):
            out[r] = 0
            sum_rows(values, indices, starts[r], starts[r + 1], rows, out[r])


@njit(parallel=True, **OPTIONS)
def _dots(indices, starts, left, rows, parts, out):
    for part in prange(len(parts) - 1):
        for r in range(parts[part], parts[part + 1]):
            dot_rows(indices, starts[r], starts[r + 1], left[r], rows, out)


@njit(**OPTIONS)
def _transpose(indices, starts, order, tokens, columns):
    columns[:] = 0
    for at in range(len(indices)):
        columns[indices[at] + 1] += 1
    for i in range(1, len(columns)):
        columns[i] += columns[i - 1]
    free = columns[:-1].copy()
    for t in range(len(starts) - 1):
        for at in range(starts[t], starts[t + 1]):
            place = free[indices[at]]
            free[indices[at]] = place + 1
            order[place] = at
            tokens[place] = t


def _triton_gather(values, indices, starts, rows):
    n, d = len(starts) - 1, rows.shape[1]
    out = torch.empty(n, d, dtype=rows.dtype, device=rows.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(d))
        grid = (n, triton.cdiv(d, block))
        args = [x.contiguous() for x in (values, indices, starts, rows)]
        _gather_kernel[grid](*args, out, d, BLOCK=block)
    return out


def _triton_dots(indices, starts, left, rows):
    out = torch.empty(len(indices), dtype=rows.dtype, device=rows.device)
    d = rows.shape[1]
    if len(starts) > 1:
        block = min(1024, triton.next_power_of_2(max(d, 1)))
        args = [x.contiguous() for x in (indices, starts, left, rows)]
        _dots_kernel[(len(starts) - 1,)](*args, out, d, BLOCK=block)
    return out


@jit
def _gather_kernel(values, indices, starts, rows, out, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for pair in range(tl.load(starts + row), tl.load(starts + row + 1)):
        index = tl.load(indices + pair)
        total += tl.load(values + pair) * tl.load(rows + index * d + at, mask=inside, other=0.0)
    tl.store(out + row * d + at, total, mask=inside)


@jit
def _dots_kernel(indices, starts, left, rows, out, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for pair in range(tl.load(starts + row), tl.load(starts + row + 1)):
        index = tl.load(indices + pair)
        total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
        for first in range(0, d, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mine = tl.load(left + row * d + at, mask=at < d, other=0.0)
            total += mine * tl.load(rows + index * d + at, mask=at < d, other=0.0)
        tl.store(out + pair, tl.sum(total, axis=0))
