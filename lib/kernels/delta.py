"""Delta (temporal) sparse products: a stream's next W x from its last, reading what changed.

    y_t = y_{t−1} + W (x_t − x̂_{t−1})   over the inputs with |x_t − x̂_{t−1}| > θ,

the inference of the Delta Activation Layer ("Training for temporal sparsity in deep neural
networks, application in video processing"). x̂, the reference, takes a new value only where a
change is sent, so that small changes add up until they are sent and y_t = W x̂_t at every step: the
error is never more than |W| θ, however long the stream (float32 rounding apart; ``refresh`` ends
that).

torch's sparse products want the sparse operand as a matrix and build it anew each step; a
gather, ``w_t[changed].T @ change``, copies the rows first. The kernel goes through W's columns
(kept as rows of ``w_t``, so that each is one stretch of memory) eight at a time and adds them
into y: the bytes read fall with the share sent, which is the limit of the speed-up.
"""

from dataclasses import dataclass

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
    prange,
    refuse_gradient,
    tl,
    triton,
)

SERIAL = 2**16  # products below which threads cost more than they bring
FLOAT = (torch.float32,)


@dataclass
class Stream:
    """What a stream keeps between steps: x̂ [n], y = W x̂ [m], and how many inputs were sent last."""

    reference: Tensor
    output: Tensor
    sent: int


def start(w_t: Tensor, x: Tensor) -> Stream:
    """The first step, dense.

    Args:
        w_t: [n, m], float32: Wᵀ, contiguous (``linear.weight.T.contiguous()``, made once).
        x: [n], float32, the first input.

    Returns:
        The stream; its ``output`` [m] is W x.
    """
    _check(w_t, x)
    reference = x.detach().clone(memory_format=torch.contiguous_format)
    return Stream(reference, w_t.T @ reference, len(x))


def step(w_t: Tensor, x: Tensor, stream: Stream, threshold: float | Tensor = 0.0) -> Tensor:
    """The next output [m], and the stream moved on in place.

    Args:
        w_t: [n, m], float32, as for ``start``.
        x: [n], float32, the input now.
        stream: from ``start``; ``stream.sent`` counts the inputs sent in this step.
        threshold: θ ≥ 0, one number or [n]: a change is sent where it is larger.

    Returns:
        [m], a copy of ``stream.output``: W x̂ with |x − x̂| ≤ θ. A change that is not finite is sent
        and the product computed anew, so that the output is finite again as soon as x is. So is
        it where every input changed.
    """
    _check(w_t, x, stream, threshold)
    limit = threshold if isinstance(threshold, Tensor) else torch.full_like(x, threshold)
    run = dispatch(x, _reference, _cpu, _triton)
    run(w_t, x.detach().contiguous(), stream, limit.contiguous())
    return stream.output.clone()


def refresh(w_t: Tensor, stream: Stream) -> None:
    """Compute y = W x̂ anew, which ends what rounding has added up over many steps."""
    torch.mv(w_t.T, stream.reference, out=stream.output)


def _check(w_t: Tensor, x: Tensor, stream: Stream | None = None, threshold=0.0) -> None:
    given = {"w_t": (w_t, "n m", FLOAT), "x": (x, "n", FLOAT)}
    if stream is not None:
        given["stream.reference"] = (stream.reference, "n", FLOAT)
        given["stream.output"] = (stream.output, "m", FLOAT)
    if isinstance(threshold, Tensor):
        given["threshold"] = (threshold, "n", FLOAT)
    elif not threshold >= 0:
        raise BookError(f"threshold is {threshold}; it must be 0 or more")
    check(**given)
    if not w_t.is_contiguous():
        raise BookError("w_t is not contiguous; give weight.T.contiguous(), made once")
    refuse_gradient("the delta product", [w_t, x])


def _reference(w_t: Tensor, x: Tensor, stream: Stream, limit: Tensor) -> None:
    change = x - stream.reference
    sent = ~(change.abs() <= limit)  # a NaN is sent
    stream.sent = int(sent.sum())
    stream.reference = torch.where(sent, x, stream.reference)
    if stream.sent == len(x) or not change[sent].isfinite().all():
        refresh(w_t, stream)
    else:
        stream.output += change[sent] @ w_t[sent]


def _cpu(w_t: Tensor, x: Tensor, stream: Stream, limit: Tensor) -> None:
    index, change = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    stream.sent, finite = _send(x.numpy(), stream.reference.numpy(), limit.numpy(), index, change)
    if stream.sent == len(x) or not finite:
        refresh(w_t, stream)
        return
    y, index, change = stream.output.numpy(), index[: stream.sent], change[: stream.sent]
    if (workers := torch.get_num_threads()) == 1 or stream.sent * len(y) < SERIAL:
        _add(w_t.numpy(), index, change, y, 0, len(y))
    else:
        _add_shared(w_t.numpy(), index, change, y, workers)


@njit(**OPTIONS)
def _send(x, reference, limit, index, change):
    """The inputs that changed and by how much, in order; x̂ takes them. (count, all finite)."""
    count, total = 0, np.float32(0)
    for i in range(x.size):
        d = x[i] - reference[i]
        if not abs(d) <= limit[i]:
            index[count], change[count] = i, d
            reference[i] = x[i]
            total += d * np.float32(0)  # NaN from the first change that is not finite
            count += 1
    return count, total == 0


@njit(**OPTIONS)
def _add(w, index, change, y, first, stop):
    """y[first:stop] += Σ change · w[index]: eight rows at a time, as y then moves less.

    Each row is one slice of one row: Numba knows it to lie in one piece, and vectorizes.
    """
    y = y[first:stop]
    whole = index.size // 8 * 8
    for k in range(0, whole, 8):
        a, b = w[index[k], first:stop], w[index[k + 1], first:stop]
        c, d = w[index[k + 2], first:stop], w[index[k + 3], first:stop]
        e, f = w[index[k + 4], first:stop], w[index[k + 5], first:stop]
        g, h = w[index[k + 6], first:stop], w[index[k + 7], first:stop]
        da, db, dc, dd = change[k], change[k + 1], change[k + 2], change[k + 3]
        de, df, dg, dh = change[k + 4], change[k + 5], change[k + 6], change[k + 7]
        for j in range(y.size):
            low = da * a[j] + db * b[j] + dc * c[j] + dd * d[j]
            y[j] += low + (de * e[j] + df * f[j] + dg * g[j] + dh * h[j])
    for k in range(whole, index.size):
        a, da = w[index[k], first:stop], change[k]
        for j in range(y.size):
            y[j] += da * a[j]


@njit(parallel=True, **OPTIONS)
def _add_shared(w, index, change, y, workers):
    span = (y.size + workers - 1) // workers
    for s in prange(workers):
        _add(w, index, change, y, min(s * span, y.size), min((s + 1) * span, y.size))


def _triton(w_t: Tensor, x: Tensor, stream: Stream, limit: Tensor) -> None:
    n, m = w_t.shape
    change = torch.empty_like(x)
    _changes[(triton.cdiv(n, 1024),)](x, stream.reference, limit, change, n, 1024)
    stream.sent = int((change != 0).sum())
    if stream.sent == n or not change.isfinite().all():
        refresh(w_t, stream)
    else:
        _masked_product[(triton.cdiv(m, 64),)](w_t, change, stream.output, n, m, 64, 64)


@jit
def _changes(x, reference, limit, change, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    new = tl.load(x + i, mask=inside, other=0.0)
    old = tl.load(reference + i, mask=inside, other=0.0)
    d = new - old
    quiet = tl.abs(d) <= tl.load(limit + i, mask=inside, other=0.0)
    tl.store(change + i, tl.where(quiet, 0.0, d), mask=inside)
    tl.store(reference + i, tl.where(quiet, old, new), mask=inside)


@jit
def _masked_product(w, change, y, n, m, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """A load that its mask switches off reads no memory: rows of inputs not sent cost nothing."""
    j = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for first in range(0, n, INPUTS):
        i = (first + tl.arange(0, INPUTS)).to(tl.int64)
        d = tl.load(change + i, mask=i < n, other=0.0)
        wanted = (d != 0)[:, None] & (j < m)[None, :]
        rows = tl.load(w + i[:, None] * m + j[None, :], mask=wanted, other=0.0)
        total += tl.sum(rows * d[:, None], 0)
    total += tl.load(y + j, mask=j < m, other=0.0)
    tl.store(y + j, total, mask=j < m)
