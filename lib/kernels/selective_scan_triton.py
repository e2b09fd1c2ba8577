"""The selective scan's two Triton kernels: a program takes a block of channels through time.

The state [state, channels] stays in registers; what `lib/kernels/selective_scan.py` says of memory
holds here too. Backward writes the states of one stretch to a scratch that fits the GPU's cache.
"""

from lib.kernels.dispatch import jit, tl, triton

WIDTH = 32  # channels a program
STRETCH = 32  # as in selective_scan


def forward(x, delta, A, B, C, D, bias, z, h0, y, last, marks, softplus) -> None:
    batch, length, dim = x.shape
    states, stretches = A.shape[0], marks.shape[1]
    _forward[(triton.cdiv(dim, WIDTH), batch)](
        *(x, delta, A, B, C, D, bias, z if z.numel() else x, h0, y, last, marks),
        *(length, dim, states, stretches),
        *(z.numel() > 0, softplus, triton.next_power_of_2(states), WIDTH, STRETCH),
    )


def backward(
    x, delta, A, B, C, D, bias, z, marks, gy, g, gx, gdelta, gA, gB, gC, gD, gbias, gz, softplus
) -> None:
    batch, length, dim = x.shape
    blocks, states, gated = triton.cdiv(dim, WIDTH), A.shape[0], z.numel() > 0
    scratch = x.new_empty(batch, blocks, STRETCH, triton.next_power_of_2(states), WIDTH)
    shares_b, shares_c = x.new_empty(2, blocks, *B.shape)
    _backward[(blocks, batch)](
        *(x, delta, A, B, C, D, bias, z if gated else x, marks, gy, g, gx, gdelta, gA),
        *(shares_b, shares_c, gD, gbias, gz if gated else gx, scratch),
        *(batch, length, dim, states, marks.shape[1], blocks),
        *(gated, softplus, triton.next_power_of_2(states), WIDTH, STRETCH),
    )
    for total, shares in ((gB, shares_b), (gC, shares_c)):  # the caller sums over its own blocks
        total.zero_()[0] = shares.sum(0)


@jit
def _step(wait, shift, SOFTPLUS: tl.constexpr):
    """Δ, and its slope in what came before softplus."""
    s = wait + shift
    slope = tl.full(s.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = 1 / (1 + tl.exp(-s))
        e = tl.exp(-tl.abs(s))  # log(1 + e) by its series where 1 + e would round
        tail = tl.where(e < 1e-3, e - 0.5 * e * e, tl.log(1 + e))
        s = tl.where(s > 0, s, 0.0) + tail
    return s, slope


@jit
def _forward(
    x, delta, A, B, C, D, bias, z, h0, y, last, marks, length, dim, states, stretches,
    GATED: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * W + tl.arange(0, W)
    n = tl.arange(0, N)
    on, real = j < dim, n < states
    both = real[:, None] & on[None, :]
    at = n[:, None] * dim + j[None, :]
    a = tl.load(A + at, mask=both, other=0.0)
    h = tl.load(h0 + b * states * dim + at, mask=both, other=0.0)
    skip, shift = tl.load(D + j, mask=on, other=0.0), tl.load(bias + j, mask=on, other=0.0)
    for t in range(0, length):
        row = (b * length + t) * dim + j
        if stretches > 0:
            mark = marks + (b * stretches + t // S) * states * dim + at
            tl.store(mark, h, mask=both & (t % S == 0))
        now = tl.load(x + row, mask=on, other=0.0)
        step, _ = _step(tl.load(delta + row, mask=on, other=0.0), shift, SOFTPLUS)
        put = tl.load(B + (b * length + t) * states + n, mask=real, other=0.0)
        read = tl.load(C + (b * length + t) * states + n, mask=real, other=0.0)
        h = tl.exp2(step[None, :] * a) * h + (step * now)[None, :] * put[:, None]
        out = tl.sum(h * read[:, None], 0) + skip * now
        if GATED:
            v = tl.load(z + row, mask=on, other=0.0)
            out = out * v / (1 + tl.exp(-v))
        tl.store(y + row, out, mask=on)
    tl.store(last + b * states * dim + at, h, mask=both)


@jit
def _backward(
    x, delta, A, B, C, D, bias, z, marks, gy, g_end, gx, gdelta, gA, gB, gC, gD, gbias, gz, scratch,
    batch, length, dim, states, stretches, blocks,
    GATED: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    j = block * W + tl.arange(0, W)
    n = tl.arange(0, N)
    on, real = j < dim, n < states
    both = real[:, None] & on[None, :]
    at = n[:, None] * dim + j[None, :]
    own = scratch + (b * blocks + block) * S * N * W + n[:, None] * W + tl.arange(0, W)[None, :]
    a = tl.load(A + at, mask=both, other=0.0)
    g = tl.load(g_end + b * states * dim + at, mask=both, other=0.0)
    skip, shift = tl.load(D + j, mask=on, other=0.0), tl.load(bias + j, mask=on, other=0.0)
    sum_a = tl.zeros((N, W), dtype=tl.float32)
    sum_d, sum_shift = tl.zeros((W,), dtype=tl.float32), tl.zeros((W,), dtype=tl.float32)
    for back in range(0, stretches):
        start = (stretches - 1 - back) * S
        count = tl.minimum(S, length - start)
        mark = marks + (b * stretches + start // S) * states * dim + at
        h = tl.load(mark, mask=both, other=0.0)
        for k in range(0, count):
            row = (b * length + start + k) * dim + j
            now = tl.load(x + row, mask=on, other=0.0)
            step, _ = _step(tl.load(delta + row, mask=on, other=0.0), shift, SOFTPLUS)
            put = tl.load(B + (b * length + start + k) * states + n, mask=real, other=0.0)
            tl.store(own + k * N * W, h)
            h = tl.exp2(step[None, :] * a) * h + (step * now)[None, :] * put[:, None]
        tl.debug_barrier()  # the states are read back below
        for k in range(0, count):
            t = start + count - 1 - k
            row = (b * length + t) * dim + j
            small = (b * length + t) * states + n
            now = tl.load(x + row, mask=on, other=0.0)
            step, slope = _step(tl.load(delta + row, mask=on, other=0.0), shift, SOFTPLUS)
            put = tl.load(B + small, mask=real, other=0.0)
            read = tl.load(C + small, mask=real, other=0.0)
            g_out = tl.load(gy + row, mask=on, other=0.0)
            decay = tl.exp2(step[None, :] * a)
            carried = decay * tl.load(own + (count - 1 - k) * N * W)
            h = carried + (step * now)[None, :] * put[:, None]
            gh = g_out
            if GATED:
                v = tl.load(z + row, mask=on, other=0.0)
                s = 1 / (1 + tl.exp(-v))
                total = tl.sum(h * read[:, None], 0) + skip * now
                tl.store(gz + row, g_out * total * s * (1 + v * (1 - s)), mask=on)
                gh = g_out * v * s
            here = g + gh[None, :] * read[:, None]
            share = (block * batch + b) * length * states + t * states + n
            tl.store(gC + share, tl.sum(gh[None, :] * h, 1), mask=real)
            tl.store(gB + share, tl.sum(here * (step * now)[None, :], 1), mask=real)
            exponent = here * carried
            sum_a += exponent * step[None, :]
            through_b = tl.sum(here * put[:, None], 0)
            g_step = tl.sum(exponent * a, 0) * 0.6931471805599453 + through_b * now
            g_step = g_step * slope
            tl.store(gdelta + row, g_step, mask=on)
            tl.store(gx + row, gh * skip + through_b * step, mask=on)
            sum_shift += g_step
            sum_d += gh * now
            g = here * decay
        tl.debug_barrier()
    tl.store(g_end + b * states * dim + at, g, mask=both)
    tl.store(gA + b * states * dim + at, sum_a, mask=both)
    tl.store(gD + b * dim + j, sum_d, mask=on)
    tl.store(gbias + b * dim + j, sum_shift, mask=on)
