"""The TopK sparse autoencoder: encode, select, decode, with sparse gradients for training.

    z = TopK(W_enc (x − b_dec) + b_enc),   x̂ = W_decᵀ z + b_dec        (Gao et al. 2024, arXiv
2406.04093, eq. 1; feature and mutual choice: Ayonrinde 2024, arXiv 2411.02124)

Of the dense products of a plain step (scores, decode, the gradients of z, W_dec and W_enc) only
the first is needed: 2·n·d·m flops to know which latents are greatest. All else touches k of m
latents: 2·n·k·d flops each for the decode and the gradients of the values, of W_dec and of W_enc.
So the step is bound by one dense product, which a library does best; it runs in pieces of 512
tokens that stay in the cache until the selection has read them.
A step is ``encode``, ``decode``, any loss, ``backward``. Fusing decode, squared error and the
gradient of the values in one loop was tried: 0 to 8 % faster, so the parts stayed.

Latents are rows: W_enc and W_dec are both [m, d] (W_enc as in ``torch.nn.Linear``). ReLU comes
after the choice: where fewer than k entries are positive, the chosen others have value 0 and no
gradient, which gives the same reconstruction and gradients as ReLU first.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.errors import BookError
from lib.kernels import topk
from lib.kernels.dispatch import OPTIONS, check, dispatch, njit, prange
from lib.kernels.sparse_decode import (
    FLOATS,
    bounds,
    check_pairs,
    decode,
    dot_rows,
    dots,
    even_starts,
    gather,
    transpose,
)
from lib.kernels.topk import Chosen, order_key, select, sort_keys

__all__ = ["Chosen", "decode", "encode", "encode_at", "select"]

PIECE = 512  # tokens whose scores fit the shared cache (9 MB at 4,608 latents)
mkldnn = torch.ops.mkldnn
log = logging.getLogger(__name__)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int | Tensor,
    by: str = "token",
    centre: Tensor | None = None,
    relu: bool = True,
    bfloat16: bool = False,
    recall: list | None = None,
) -> Chosen:
    """The chosen latents of every token and their values, differentiable in x and the parameters.

    Args:
        x: [n, d], float32 or float64; W_enc: [m, d]; b_enc: [m]; centre: [d], taken from x first
            (as a rule b_dec). Backward costs n·k·d, not n·m·d.
        k, by: as in ``select``: per token, per latent (feature choice), or the whole batch.
        relu: whether negative values become 0 (and lose their gradient).
        bfloat16: choose 2k candidates a token by a bfloat16 product, score those in float32 and
            keep k. Faster, and not exact: the share of the exact choice that it finds (on 16
            tokens) goes to this module's log and, if given, to the list ``recall``. For k of
            every token, in float32 only.

    Returns:
        ``Chosen(values, indices, starts)``.

    Raises:
        BookError: for a wrong shape, dtype, device, budget or way.
    """
    _check(x, W_enc, b_enc, centre)
    if bfloat16 and (by != "token" or isinstance(k, Tensor) or x.dtype != torch.float32):
        raise BookError("bfloat16=True needs a whole number k of every token, and x in float32")
    with torch.no_grad():
        moved = x.detach() if centre is None else x - centre
        if bfloat16:
            found = _narrow(moved, W_enc.detach(), b_enc.detach(), k, recall)
        else:
            found = _choose(moved, W_enc.detach(), b_enc.detach(), k, by)
    starts = even_starts(found.indices) if found.starts is None else found.starts
    flat = found.values.flatten(), found.indices.flatten()
    values = _Encode.apply(x, W_enc, b_enc, centre, *flat, starts, relu)
    return Chosen(values.view_as(found.values), found.indices, found.starts)


def encode_at(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    indices: Tensor,
    starts: Tensor | None = None,
    centre: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """The values of latents chosen by another rule (g-SAE: gradients; top-AFA: a norm).

    Args:
        indices: int64 [n, k], or [pairs] with ``starts`` [n + 1]; the rest as in ``encode``.

    Returns:
        values of the shape of ``indices``, from n·k·d products, with gradients.
    """
    _check(x, W_enc, b_enc, centre)
    check_pairs(indices, starts, len(W_enc), None)
    starts = even_starts(indices) if starts is None else starts
    if len(starts) != len(x) + 1:
        raise BookError(f"indices choose for {len(starts) - 1} tokens; x has {len(x)}")
    flat = indices.flatten()
    with torch.no_grad():
        values = dots(flat, starts, x if centre is None else x - centre, W_enc) + b_enc[flat]
    values = _Encode.apply(x, W_enc, b_enc, centre, values, flat, starts, relu)
    return values.view_as(indices)


def _check(x, W_enc, b_enc, centre) -> None:
    same = (x.dtype,) if isinstance(x, Tensor) else FLOATS
    named = {"x": (x, "n d", FLOATS), "W_enc": (W_enc, "m d", same), "b_enc": (b_enc, "m", same)}
    check(**named, **({} if centre is None else {"centre": (centre, "d", same)}))


class _Encode(torch.autograd.Function):
    """Values already known, their gradients sparse."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, centre, values, indices, starts, relu):
        ctx.relu, ctx.centred = relu, centre is not None
        values = values.relu() if relu else values.clone()
        ctx.save_for_backward(x, W_enc, centre, indices, starts, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W_enc, centre, indices, starts, values = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if ctx.relu:
            grad = torch.where(values > 0, grad, 0)
        grad_x = gather(grad, indices, starts, W_enc) if wants[0] else None
        grad_W = grad_b = grad_centre = None
        if any(wants[1:4]):
            order, tokens, columns = transpose(indices, starts, len(W_enc))
            grad = grad[order]
            grad_b = _sums(grad, columns)
            if wants[1]:
                grad_W = gather(grad, tokens, columns, x if centre is None else x - centre)
            if wants[3]:  # −Σₜ dxₜ, and the sum over tokens may be done first
                grad_centre = -(grad_b @ W_enc)
        return grad_x, grad_W, grad_b if wants[2] else None, grad_centre, *[None] * 4


def _sums(values: Tensor, starts: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=starts, initial=0)


def _choose(x: Tensor, W: Tensor, b: Tensor, k: int | Tensor, by: str) -> Chosen:
    """The dense product, in pieces where a piece can be chosen from at once."""
    n, m = len(x), len(W)
    wanted = topk.budgets(k, by, n, m)
    if by == "batch":
        return select(F.linear(x, W, b), k, by)
    if by == "token":
        rows, columns, row_bias, column_bias = x, W, None, b
    else:
        rows, columns, row_bias, column_bias = W, x, b, None
    cpu = _cpu_pieces if x.dtype == torch.float32 else None
    run = dispatch(x, _reference_pieces, cpu=cpu)
    values, found = run(rows, columns, row_bias, column_bias, wanted)
    return topk.arrange(values, found, wanted, by, n, None if isinstance(k, Tensor) else min(k, m))


def _reference_pieces(rows, columns, row_bias, column_bias, starts):
    scores = F.linear(rows, columns, column_bias)
    scores = scores if row_bias is None else scores + row_bias[:, None]
    return topk._reference_rows(scores, starts)


def _cpu_pieces(rows, columns, row_bias, column_bias, starts):
    values = torch.empty(int(starts[-1]))
    found = torch.empty(int(starts[-1]), dtype=torch.int64)
    product = _product(columns, len(rows))
    for first in range(0, len(rows), PIECE):
        last = min(first + PIECE, len(rows))
        scores = product(rows[first:last])
        if row_bias is not None:
            scores += row_bias[first:last, None]
        own = starts[first : last + 1] - starts[first]
        at = slice(int(starts[first]), int(starts[last]))
        values[at], found[at] = topk._cpu_rows(scores, own, column_bias)
    return values, found


def _product(W: Tensor, n: int):
    """x -> x Wᵀ in float32. oneDNN on a repacked W took 106 ms where ``torch.mm`` took 123."""
    if n >= PIECE and torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_linear_pointwise"):
        packed = mkldnn._reorder_linear_weight(W.contiguous(), PIECE)
        return lambda x: mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")
    return lambda x: torch.mm(x, W.T)


def _narrow(x: Tensor, W: Tensor, b: Tensor, k: int, recall: list | None) -> Chosen:
    n, m = len(x), len(W)
    wide, k = min(2 * k, m), min(k, m)
    run = dispatch(x, _reference_narrow, cpu=_cpu_narrow)
    values, indices = run(x, W, b, k, wide)
    if not n:
        return Chosen(values, indices)
    sample = torch.arange(0, n, max(1, n // 16), device=x.device)[:16]
    exact = _choose(x[sample], W, b, k, "token").indices
    hits = (exact[:, :, None] == indices[sample][:, None, :]).any(2).float().mean().item()
    log.info("bfloat16 candidates: recall %.4f on %d tokens", hits, len(sample))
    if recall is not None:
        recall.append(hits)
    return Chosen(values, indices)


def _reference_narrow(x, W, b, k, wide):
    scores = F.linear(x.bfloat16(), W.bfloat16(), b.bfloat16())
    near = scores.sort(dim=1, descending=True, stable=True).indices[:, :wide].sort(1).values
    starts = even_starts(near)
    exact = (dots(near.flatten(), starts, x, W) + b[near.flatten()]).view_as(near)
    values, place = exact.sort(dim=1, descending=True, stable=True)
    return values[:, :k], near.gather(1, place[:, :k])


def _cpu_narrow(x, W, b, k, wide):
    n, m = len(x), len(W)
    values, found = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    half, W_half, b_half = x.bfloat16(), W.bfloat16(), b.bfloat16()
    x, W, b = x.contiguous().numpy(), W.contiguous().numpy(), b.contiguous().numpy()
    for first in range(0, n, PIECE):
        last = min(first + PIECE, n)
        scores = F.linear(half[first:last], W_half, b_half)
        starts = topk.budgets(wide, "token", last - first, m)
        near = topk._cpu_rows(scores, starts)[1].view(-1, wide).numpy()
        parts = bounds(starts.numpy())
        out = values[first:last].numpy(), found[first:last].numpy()
        _rescore(x[first:last], W, b, near, parts, *out)
    return values, found


@njit(parallel=True, **OPTIONS)
def _rescore(x, W, b, near, parts, values, found):
    wide, k = near.shape[1], found.shape[1]
    for part in prange(len(parts) - 1):
        scores, keys, spare = np.empty(wide, np.float32), near[0].copy(), np.empty(128, np.int64)
        bits = scores.view(np.int32)
        for t in range(parts[part], parts[part + 1]):
            dot_rows(near[t], 0, wide, x[t], W, scores)
            for i in range(wide):
                scores[i] += b[near[t, i]]
            for i in range(wide):
                keys[i] = order_key(bits[i], near[t, i])
            sort_keys(keys, wide, spare)
            for i in range(k):
                rank = ~(keys[i] >> 32)  # the key holds the float's bits: turn them back
                bits[i] = np.int32(rank if rank >= 0 else rank ^ 0x7FFFFFFF)
                values[t, i] = scores[i]
                found[t, i] = keys[i] & 0xFFFFFFFF
