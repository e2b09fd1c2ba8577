"""The selective scan, Mamba's recurrence, forward and backward, with no state kept but the last.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,   y_t = C_t h_t + D x_t   (× silu(z_t) with a gate)

per channel, from Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2), which Quamba (arXiv 2410.13229)
quantizes. torch has no scan with a coefficient. The sequential loop launches five small operations
a step; the parallel forms write exp(ΔA), ΔBx and h out, each [batch, dim, length, state], 16 times
the input; `transformers` does both on a CPU.

Here 64 channels at a time run through time with their states in the L1 cache, so that x, Δ, z and y
are all that moves. An exponential a state and step remains, and bounds the speed: it is a
polynomial in the vector registers (2e-7 relative). The backward keeps one state in 32 and walks
each stretch forward again, then back.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, dispatch, njit, prange

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS = 64  # that one thread takes through time at once
STRETCH = 32  # steps between the states that the backward starts from
SHORT = 2  # steps (a decode's one) that torch takes as fast: 0.2 ms against 0.3 at 1536 channels
LOG2_E = math.log2(math.e)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [batch, dim, length] and the last state [batch, dim, state].

    Args:
        x: [batch, dim, length], float32, float64, bfloat16 or float16; half precision is computed
            in float32. A view of [batch, length, dim], as a projection gives it, saves a copy.
        delta: [batch, dim, length], the step Δ before its bias and softplus.
        A: [dim, state], float32 or float64; negative where the state is to decay.
        B, C: [batch, state, length].
        D: [dim], the skip.
        z: [batch, dim, length], the gate: y · silu(z).
        delta_bias: [dim], added to delta.
        softplus: Δ = log(1 + exp(delta + delta_bias)); ``False`` takes it as it is.
        initial: [batch, dim, state], the state before the first step; zero if it is not given.

    Returns:
        y in x's dtype, and the state in the dtype computed in. Feeding the state back as
        ``initial`` goes on where the last call stopped. A NaN stays in its channel, from its step
        on.

    All of them have gradients, once (no second derivatives but in the reference).
    """
    axes = "batch dim length"
    given = {
        "x": (x, axes, FLOATS),
        "delta": (delta, axes, FLOATS),
        "A": (A, "dim state", FLOATS),
        "B": (B, "batch state length", FLOATS),
        "C": (C, "batch state length", FLOATS),
        "D": (D, "dim", FLOATS),
        "z": (z, axes, FLOATS),
        "delta_bias": (delta_bias, "dim", FLOATS),
        "initial": (initial, "batch dim state", FLOATS),
    }
    optional = ("D", "z", "delta_bias", "initial")
    sizes = check(**{k: v for k, v in given.items() if v[0] is not None or k not in optional})
    if not sizes["state"]:
        raise BookError("A is [dim, 0]; it must have at least one state a channel")
    wide = torch.promote_types(x.dtype, torch.float32)
    D = x.new_zeros(sizes["dim"]) if D is None else D
    delta_bias = x.new_zeros(sizes["dim"]) if delta_bias is None else delta_bias
    if initial is None:
        initial = x.new_zeros(sizes["batch"], sizes["dim"], sizes["state"])
    parts = (x, delta, A, B, C, D, delta_bias, z, initial)
    parts = [None if t is None else t.to(wide) for t in parts]
    on_gpu = None if wide == torch.float64 else _triton
    worth = x.numel() > 0 and sizes["length"] > SHORT
    y, state = dispatch(x, _reference, _cpu, on_gpu, worth)(*parts, softplus)
    return y.to(x.dtype), state


def _reference(x, delta, A, B, C, D, bias, z, h, softplus):
    delta = delta + bias[:, None]
    if softplus:
        delta = F.softplus(delta)
    outputs = []
    for t in range(x.shape[-1]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, :, t] * x[:, :, t, None]
        outputs.append((h * C[:, None, :, t]).sum(-1) + D * x[:, :, t])
    y = torch.stack(outputs, -1) if outputs else torch.empty_like(x)
    return (y if z is None else y * F.silu(z)), h


def _cpu(*parts):
    return _Scan.apply(_forward_numba, _backward_numba, *parts)


def _triton(*parts):
    from lib.kernels import selective_scan_triton as gpu

    return _Scan.apply(gpu.forward, gpu.backward, *parts)


class _Scan(torch.autograd.Function):
    """The two kernels' door. They see [batch, length, …] with channels last, states as rows."""

    @staticmethod
    def forward(ctx, forward, backward, x, delta, A, B, C, D, bias, z, h, softplus):
        keep = any(ctx.needs_input_grad)
        moved = [t.detach().transpose(1, 2).contiguous() for t in (x, delta, B, C, h)]
        x, delta, B, C, h = moved
        # exp(ΔA) = 2^(Δ A log₂ e)
        A = (A.detach().double() * LOG2_E).to(x.dtype).T.contiguous()
        z = x.new_empty(0, 0, 0) if z is None else z.detach().transpose(1, 2).contiguous()
        D, bias = D.detach().contiguous(), bias.detach().contiguous()
        inputs = (x, delta, A, B, C, D, bias, z)
        stretches = -(-x.shape[1] // STRETCH) if keep else 0
        marks = x.new_empty(x.shape[0], stretches, *A.shape)
        y, last = torch.empty_like(x), torch.empty_like(h)
        forward(*inputs, h, y, last, marks, softplus)
        ctx.save_for_backward(*inputs, marks)
        ctx.backward, ctx.softplus = backward, softplus
        return y.transpose(1, 2), last.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, g_last):
        *inputs, marks = ctx.saved_tensors
        x, _, A, B, _, _, _, z = inputs
        batch, length, dim = x.shape
        blocks = -(-dim // CHANNELS)
        gy, g = (t.transpose(1, 2).contiguous() for t in (gy, g_last))
        g = g.clone() if g.data_ptr() == g_last.data_ptr() else g  # becomes the initial state's
        gx, gdelta, gz = torch.empty_like(x), torch.empty_like(x), torch.empty_like(z)
        gA = x.new_zeros(batch, *A.shape)
        gB, gC = x.new_empty(2, blocks, *B.shape)  # a sum over channels: each block its own share
        gD, gbias = x.new_zeros(2, batch, dim)
        ctx.backward(*inputs, marks, gy, g, gx, gdelta, gA, gB, gC, gD, gbias, gz, ctx.softplus)
        gB, gC, g, gx, gdelta, gz = (
            t.transpose(1, 2) for t in (gB.sum(0), gC.sum(0), g, gx, gdelta, gz)
        )
        gz = gz if z.numel() else None
        return None, None, gx, gdelta, gA.sum(0).T, gB, gC, gD.sum(0), gbias.sum(0), gz, g, None


def _exact(x: Tensor):
    """None for float32: Numba drops the branches that None closes, so each dtype has its code."""
    return None if x.dtype == torch.float32 else True


def _forward_numba(*tensors_and_softplus):
    *tensors, softplus = tensors_and_softplus
    _forward(*(t.numpy() for t in tensors), softplus, _exact(tensors[0]))


def _backward_numba(*tensors_and_softplus):
    *tensors, softplus = tensors_and_softplus
    exact = _exact(tensors[0])
    tensors = [t.numpy() for t in tensors]
    _backward(tuple(tensors[:8]), *tensors[8:], softplus, exact)


@njit(**OPTIONS)
def _exp2(v, exact):
    """2^v: a polynomial on [−½, ½], and the integer part written into the exponent's bits."""
    if exact is not None:
        return 2.0**v
    one = np.float32(1)
    v = np.float32(-127) if v < np.float32(-127) else v  # NaN passes both
    v = np.float32(128) if v > np.float32(128) else v
    k = np.floor(v + np.float32(0.5))
    f = v - k
    p = np.float32(1.5403530e-4) * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + one
    k = k if k > np.float32(-127) else np.float32(-127)  # a NaN is no integer
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def _sigmoid(v, exact):
    if exact is not None:
        return 1.0 / (1.0 + np.exp(-v))
    return np.float32(1) / (np.float32(1) + _exp2(v * np.float32(-LOG2_E), exact))


@njit(**OPTIONS)
def _softplus(v, exact):
    if exact is not None:
        return max(v, 0.0) + np.log1p(np.exp(-abs(v)))
    e = _exp2(abs(v) * np.float32(-LOG2_E), exact)
    s = e / (e + np.float32(2))  # log(1 + e) = 2 artanh(e / (2 + e)), s ≤ ⅓
    q = s * s
    p = np.float32(1 / 15) * q + np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    p = np.float32(2) * (s + s * q * p)
    return p + (v if v > np.float32(0) else np.float32(0))


# In the functions below, a step's row [first : stop] is one slice, which Numba knows to lie in one
# piece; through `x[t, first + j]`, or in the parallel loop itself, nothing is vectorized: 4.4 ns a
# state and step in place of 0.5.


@njit(parallel=True, **OPTIONS)
def _forward(x, delta, A, B, C, D, bias, z, h0, y, last, marks, softplus, exact):
    blocks = (x.shape[2] + CHANNELS - 1) // CHANNELS
    for task in prange(x.shape[0] * blocks):
        b, block = task // blocks, task % blocks
        gate = z[b] if z.size else x[b]
        seen = (x[b], delta[b], A, B[b], C[b], D, bias, gate)
        first, gated = block * CHANNELS, z.size > 0
        _walk(seen, h0[b], y[b], last[b], marks[b], first, gated, softplus, exact)


@njit(**OPTIONS)
def _walk(inputs, h0, y, last, marks, first, gated, softplus, exact):
    """One block of channels through time; x [length, dim], states [state, dim]."""
    x, delta, A, B, C, D, bias, z = inputs
    stop = min(first + CHANNELS, x.shape[1])
    states, width = A.shape[0], stop - first
    h, a = h0[:, first:stop].copy(), A[:, first:stop].copy()
    skip, shift = D[first:stop], bias[first:stop]
    step, gain = np.empty(width, x.dtype), np.empty(width, x.dtype)
    total = np.empty(width, x.dtype)
    for t in range(x.shape[0]):
        if t % STRETCH == 0 and marks.shape[0] > 0:
            marks[t // STRETCH, :, first:stop] = h
        now, wait = x[t, first:stop], delta[t, first:stop]
        gate, out = z[t, first:stop], y[t, first:stop]
        for j in range(width):
            s = wait[j] + shift[j]
            step[j] = _softplus(s, exact) if softplus else s
        for j in range(width):
            gain[j] = step[j] * now[j]
            total[j] = skip[j] * now[j]
        for n in range(states):
            put, read = B[t, n], C[t, n]
            for j in range(width):
                new = _exp2(step[j] * a[n, j], exact) * h[n, j] + gain[j] * put
                h[n, j] = new
                total[j] += new * read
        if gated:
            for j in range(width):
                out[j] = total[j] * gate[j] * _sigmoid(gate[j], exact)
        else:
            out[:] = total
    last[:, first:stop] = h


@njit(parallel=True, **OPTIONS)
def _backward(inputs, marks, gy, g, gx, gdelta, gA, gB, gC, gD, gbias, gz, softplus, exact):
    x, delta, A, B, C, D, bias, z = inputs
    blocks = gB.shape[0]
    for task in prange(x.shape[0] * blocks):
        b, block = task // blocks, task % blocks
        gated = z.size > 0
        gate, g_gate = (z[b], gz[b]) if gated else (x[b], gx[b])
        seen = (x[b], delta[b], A, B[b], C[b], D, bias, gate)
        sums = (gA[b], gB[block, b], gC[block, b], gD[b], gbias[b])
        first = block * CHANNELS
        _walk_back(
            seen,
            marks[b],
            gy[b],
            g[b],
            gx[b],
            gdelta[b],
            g_gate,
            sums,
            first,
            gated,
            softplus,
            exact,
        )


@njit(**OPTIONS)
def _walk_back(inputs, marks, gy, g_end, gx, gdelta, gz, sums, first, gated, softplus, exact):
    """One block of channels, each stretch forward again, then back.

    g_end [state, dim] holds ∂L/∂h: of the last state at first, of the initial state at the end.
    """
    x, delta, A_all, B, C, D, bias, z = inputs
    gA_all, gB, gC, gD_all, gbias_all = sums
    stop = min(first + CHANNELS, x.shape[1])
    states, width, kind = A_all.shape[0], stop - first, x.dtype
    before = np.empty((STRETCH + 1, states, width), kind)  # h_{t−1}
    decay = np.empty((STRETCH, states, width), kind)  # exp(Δ_t A)
    steps, gain = np.empty((STRETCH, width), kind), np.empty((STRETCH, width), kind)
    gh, total = np.empty(width, kind), np.empty(width, kind)
    through_a, through_b = np.empty(width, kind), np.empty(width, kind)
    A, g = A_all[:, first:stop].copy(), g_end[:, first:stop].copy()
    gA = np.zeros((states, width), kind)
    skip, shift = D[first:stop], bias[first:stop]
    gD, gbias = gD_all[first:stop], gbias_all[first:stop]
    one, zero, log_2 = kind.type(1), kind.type(0), kind.type(math.log(2))
    for stretch in range(marks.shape[0] - 1, -1, -1):
        start = stretch * STRETCH
        count = min(STRETCH, x.shape[0] - start)
        before[0] = marks[stretch, :, first:stop]
        for k in range(count):
            t = start + k
            now, wait = x[t, first:stop], delta[t, first:stop]
            step, put_in = steps[k], gain[k]
            for j in range(width):
                s = wait[j] + shift[j]
                step[j] = _softplus(s, exact) if softplus else s
            for j in range(width):
                put_in[j] = step[j] * now[j]
            after = before[k + 1]
            for n in range(states):
                put = B[t, n]
                for j in range(width):
                    a = _exp2(step[j] * A[n, j], exact)
                    after[n, j] = a * before[k, n, j] + put_in[j] * put
                    decay[k, n, j] = a
        for k in range(count - 1, -1, -1):
            t = start + k
            now, gate, g_out = x[t, first:stop], z[t, first:stop], gy[t, first:stop]
            step, put_in = steps[k], gain[k]
            for j in range(width):
                gh[j] = g_out[j]
                total[j] = skip[j] * now[j]
                through_a[j], through_b[j] = zero, zero
            if gated:
                for j in range(width):
                    gh[j] *= gate[j] * _sigmoid(gate[j], exact)
            for n in range(states):
                put, read, sum_b, sum_c = B[t, n], C[t, n], zero, zero
                for j in range(width):
                    a = decay[k, n, j]
                    carried = a * before[k, n, j]
                    h = carried + put_in[j] * put
                    total[j] += h * read
                    sum_c += gh[j] * h
                    here = g[n, j] + gh[j] * read
                    sum_b += here * put_in[j]
                    through_b[j] += here * put
                    exponent = here * carried  # ∂L/∂(Δ A)
                    gA[n, j] += exponent * step[j]
                    through_a[j] += exponent * A[n, j]
                    g[n, j] = here * a
                gB[t, n], gC[t, n] = sum_b, sum_c
            g_x, g_delta = gx[t, first:stop], gdelta[t, first:stop]
            wait, g_gate = delta[t, first:stop], gz[t, first:stop]
            for j in range(width):
                slope = through_a[j] * log_2 + through_b[j] * now[j]
                if softplus:
                    slope *= _sigmoid(wait[j] + shift[j], exact)
                g_delta[j] = slope
                gbias[j] += slope
            for j in range(width):
                g_x[j] = gh[j] * skip[j] + through_b[j] * step[j]
                gD[j] += gh[j] * now[j]
            if gated:
                for j in range(width):
                    v, s = gate[j], _sigmoid(gate[j], exact)
                    g_gate[j] = g_out[j] * total[j] * s * (one + v * (one - s))
    gA_all[:, first:stop] = gA
    g_end[:, first:stop] = g
