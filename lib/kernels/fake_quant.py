"""Fake quantization: round a tensor to the few values a format has, and keep training it.

With a scale s and, if affine, a zero point z for each tensor, channel, token or group, a number
becomes the nearest code q between the lowest and the highest, and comes back as a float:

    q = clip(round(x / s) + z, q_lo, q_hi),    y = s (q - z).

Integers of b bits have the codes -2^(b-1) … 2^(b-1) - 1, affine 0 … 2^b - 1. In floating-point
formats (FP4DiT, arXiv 2503.15465; OCP's 8-bit and Microscaling specifications) codes of m mantissa
bits are spaced by 2^(max(floor(log2 |x / s|), e_min) - m), finer near zero, and there is no z.
FP4DiT's real-valued exponent bias is this scale in another guise.

Rounding has no useful gradient, so backward takes it as the identity (straight-through): x gets
the gradient where its code is not clipped and none elsewhere. The scale gets LSQ's (arXiv
1902.08153): q - z - x / s inside, q - z where clipped. ``learned_clip`` puts OmniQuant's (arXiv
2308.13137) learnable clipping in front.

Why not torch alone: ``torch.fake_quantize_per_tensor_affine`` and ``…per_channel_affine`` compute
the integer half bit for bit the same, but must be given the scales, write a mask beside the result
and take int32 zero points without a gradient; plain tensor operations pass over memory once for
every step. Here one pass finds a group's range and quantizes it while it is in the cache: 4 bytes
read and 4 written a number, some 15 operations. On two cores (``tests/bench_kernels``) that is 5 to
28 times the plain operations, 2 to 10 times torch's fused ones, and with backward twice torch's
learnable one. ``torch.compile`` of the plain operations does as well for integers, where the
machine has a C++ compiler and every new shape may take seconds. Percentiles stay torch's
``kthvalue``; half precision is widened by torch first.

NaN stays NaN and infinity is clipped where the scale is given; where it is computed, a group that
holds either has no scale and comes out as NaN throughout.
"""

import math
import re

import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels import fake_quant_loops as loops
from lib.kernels.dispatch import check, dispatch
from lib.kernels.fake_quant_loops import Grid

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# exponent of the smallest normal number, bits of the mantissa, largest value. The 8-bit formats
# keep codes for NaN (and E5M2 for infinity); the smaller ones have none.
FORMATS = {
    "e2m1": (0, 1, 6.0), "e1m2": (0, 2, 1.75), "e3m0": (-2, 0, 16.0),
    "e2m3": (0, 3, 7.5), "e3m2": (-2, 2, 28.0),
    "e4m3": (-6, 3, 448.0), "e5m2": (-14, 2, 57344.0),
}  # fmt: skip


def grid_of(number: str, symmetric: bool = True) -> Grid:
    """The grid of ``int2`` … ``int8`` or of one of ``FORMATS`` (which are always symmetric)."""
    if isinstance(number, str) and re.fullmatch("int[2-8]", number):
        reach = 2 ** (int(number[3]) - 1)
        return Grid(-reach, reach - 1) if symmetric else Grid(0, 2 * reach - 1)
    if number not in FORMATS:
        raise BookError(f'number is "{number}"; it must be int2 … int8 or {", ".join(FORMATS)}')
    if not symmetric:
        raise BookError(f'symmetric is False; "{number}" has a sign of its own: it must be True')
    least, mantissa, largest = FORMATS[number]
    return Grid(-largest, largest, mantissa, least, math.floor(math.log2(largest)))


def codes(number: str, symmetric: bool = True) -> Tensor:
    """All values of a format, ascending, float32 [n]; zero once."""
    grid = grid_of(number, symmetric)
    if grid.mantissa < 0:
        return torch.arange(grid.low, grid.high + 1)
    steps = range(-1, grid.most - grid.least + 1)  # -1: below the smallest normal number
    found = {
        math.ldexp(fraction + (step >= 0) * 2**grid.mantissa, max(step, 0) + grid.least)
        / 2**grid.mantissa
        for step in steps
        for fraction in range(2**grid.mantissa)
    }
    half = sorted(v for v in found if 0 < v <= grid.high)
    return torch.tensor([-v for v in reversed(half)] + [0.0] + half)


def fake_quantize(
    x: Tensor,
    number: str = "int8",
    per: str = "tensor",
    group: int = 128,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """``x`` rounded to the codes of ``number``, with straight-through gradients.

    Args:
        x: any shape, float32, bfloat16 or float16; a per-channel weight is [channel, …].
        number: ``int2`` … ``int8``, or ``e2m1``, ``e1m2``, ``e3m0`` (4 bits), ``e2m3``, ``e3m2``
            (6), ``e4m3``, ``e5m2`` (8).
        per: one scale a ``tensor``, ``channel`` (index of the first axis), ``token`` (all along
            the last axis) or ``group`` (of ``group`` neighbours along the last axis).
        scale: float32, positive (not checked), in the shape ``scale_of`` gives; gets a gradient.
            None: the largest magnitude (affine: the range) of each part sets it, as a constant.
        zero: float32 whole numbers in scale's shape, for affine codes; gets a gradient too.

    Returns:
        Same shape and dtype as ``x``.

    Raises:
        BookError: a dtype, shape, format or ``per`` that is none of these.
    """
    check(x=(x, "...", FLOATS))
    if scale is None and zero is not None:
        raise BookError("zero is given without scale; give both, as scale_of returns them")
    if scale is not None and zero is None and not symmetric:
        raise BookError("zero is missing; affine codes with a given scale need it")
    grid = grid_of(number, symmetric and zero is None)
    shape = _scale_shape(x, per, group)
    for name, part in (("scale", scale), ("zero", zero)):
        if part is not None:
            check(x=(x, "..."), **{name: (part, "...", (torch.float32,))})
            if part.shape != shape:
                raise BookError(f"{name} is {list(part.shape)}; it must be {list(shape)} ({per})")
    if x.numel() == 0:
        return x.clone()
    rows = x.reshape(max(shape.numel(), 1), -1)
    if scale is None:
        return _Dynamic.apply(rows, grid).view(x.shape)
    flat = None if zero is None else zero.reshape(-1)
    return _Static.apply(rows, scale.reshape(-1), flat, grid).view(x.shape)


def scale_of(
    x: Tensor,
    number: str = "int8",
    per: str = "tensor",
    group: int = 128,
    symmetric: bool = True,
    by: str = "range",
    share: float = 0.999,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) for ``fake_quantize``; differentiable in ``x``.

    Args:
        by: ``range``: the largest magnitude, or for affine codes the range of the values and 0 (so
            that 0 stays exact); ``percentile``: the same of the ``share`` of values that is
            smallest in magnitude (affine: cut at both ends alike); ``power``: the power of two
            that the Microscaling formats use, 2^(floor(log2 max|x|) - e_max).
        share: of the values kept by ``percentile``, above 0.5 and at most 1.

    Returns:
        float32; shape [] per tensor, [channel], [… all but the last axis] per token,
        […, last axis / group] per group.
    """
    check(x=(x, "...", FLOATS))
    grid = grid_of(number, symmetric)
    shape = _scale_shape(x, per, group)
    if x.numel() == 0 and shape.numel():
        raise BookError(f"x is {list(x.shape)}; a scale needs at least one value")
    if x.numel() == 0:
        return torch.zeros(shape, device=x.device), None if symmetric else torch.zeros(shape)
    rows = x.reshape(shape.numel(), -1).float()
    if by == "power" and symmetric:
        top = torch.frexp(rows.abs().amax(1)).exponent - 1
        most = grid.most if grid.mantissa >= 0 else math.floor(math.log2(grid.high))
        return torch.ldexp(torch.ones_like(rows[:, 0]), top - most).clamp(min=loops.TINY).view(
            shape
        ), None
    if by == "range":
        low, high = _extent(rows)
    elif by == "percentile" and 0.5 < share <= 1:
        kept = math.ceil(share * rows.shape[1])
        if symmetric:
            high = rows.abs().kthvalue(kept, dim=1).values
            low = -high
        else:
            high = rows.kthvalue(kept, dim=1).values
            low = -(-rows).kthvalue(kept, dim=1).values
    else:
        raise BookError(
            f'by is "{by}" with share {share}; it must be range, percentile with a share above '
            "0.5 and at most 1, or (symmetric only) power"
        )
    scale, zero = _scale(low, high, grid)
    return scale.view(shape), None if zero is None else zero.view(shape)


def learned_clip(
    w: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    number: str = "int4",
    per: str = "channel",
    group: int = 128,
) -> Tensor:
    """OmniQuant's learnable weight clipping (arXiv 2308.13137, eq. 2), ready to train.

    h = (σ(γ) max w - σ(β) min w) / (2^b - 1), z = -round(σ(β) min w / h), and ``w``
    quantized with them; gradients reach γ, β and ``w`` (which does not feel its own range).

    Args:
        gamma, beta: float32 in the scale's shape (see ``scale_of``); the paper starts both at 4,
            where σ is 0.982. Without ``beta``: symmetric codes, one factor on the largest
            magnitude; the only choice for floating-point formats.
    """
    check(w=(w, "...", FLOATS), gamma=(gamma, "...", (torch.float32,)))
    shape = _scale_shape(w, per, group)
    grid = grid_of(number, beta is None)
    for name, part in (("gamma", gamma), ("beta", gamma if beta is None else beta)):
        if part.shape != shape:
            raise BookError(f"{name} is {list(part.shape)}; it must be {list(shape)} ({per})")
    if w.numel() == 0:
        return w.clone()
    low, high = (v.view(shape) for v in _extent(w.detach().reshape(shape.numel(), -1)))
    if beta is None:
        high = gamma.sigmoid() * torch.maximum(high, -low)
        scale, zero = _scale(-high, high, grid)
    else:
        scale, zero = _scale(beta.sigmoid() * low, gamma.sigmoid() * high, grid)
    return fake_quantize(w, number, per, group, beta is None, scale, zero)


def lsq_scale(scale: Tensor, x: Tensor, number: str) -> Tensor:
    """``scale`` itself; its gradient is multiplied by LSQ's 1 / sqrt(n q_hi) (section 2.2).

    ``n`` is how many numbers of ``x`` share one scale. Keeps steps and weights at one pace.
    """
    factor = (x.numel() / max(scale.numel(), 1) * grid_of(number).high) ** -0.5
    out = scale * 1.0
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * factor)
    return out


def _scale_shape(x: Tensor, per: str, group: int) -> torch.Size:
    if per == "tensor":
        return torch.Size(())
    if per not in ("channel", "token", "group"):
        raise BookError(f'per is "{per}"; it must be tensor, channel, token or group')
    if x.dim() == 0:
        raise BookError(f"x is one number; per {per} needs an axis")
    if per == "channel":
        return x.shape[:1]
    if per == "token":
        return x.shape[:-1]
    if not isinstance(group, int) or group < 1 or x.shape[-1] % group:
        raise BookError(f"group is {group}; it must divide x's last axis, {x.shape[-1]}")
    return torch.Size((*x.shape[:-1], x.shape[-1] // group))


def _extent(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of every row; NaN where a row holds one."""
    if len(rows) == 1:  # torch reduces a whole tensor several times faster than one long row
        low, high = (v[None] for v in torch.aminmax(rows))
    else:
        low, high = torch.aminmax(rows, dim=1)
    return low.float(), high.float()


def _scale(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point if affine, of ranges; a range that is not finite has scale NaN."""
    if grid.low < 0:
        reach = torch.maximum(-low, high)
        scale, zero = reach / grid.high, None
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        reach = high - low
        scale = reach / grid.high
        shift = -low / scale.clamp(min=loops.TINY)
        zero = shift + (shift.round() - shift).detach()
    return torch.where(reach.isfinite(), scale.clamp(min=loops.TINY), torch.nan), zero


class _Static(torch.autograd.Function):
    """rows [n, m] with scales [n] and zero points [n] or None."""

    @staticmethod
    def forward(ctx, rows, scale, zero, grid):
        shift = torch.zeros_like(scale) if zero is None else zero
        ctx.save_for_backward(rows, scale, shift)
        ctx.grid = grid
        push = dispatch(rows, _reference, loops.cpu_forward, loops.triton_forward)
        return push(rows, scale, shift, grid)

    @staticmethod
    def backward(ctx, gradient):
        rows, scale, shift = ctx.saved_tensors
        pull = dispatch(rows, _reference_backward, loops.cpu_backward, loops.triton_backward)
        found = pull(rows, scale, shift, ctx.grid, gradient.contiguous())
        return *(g if w else None for g, w in zip(found, ctx.needs_input_grad, strict=False)), None


class _Dynamic(torch.autograd.Function):
    """rows [n, m], each with the scale of its own range, which is taken as constant."""

    @staticmethod
    def forward(ctx, rows, grid):
        whole = rows.shape[0] == 1  # one row leaves nothing to share out between threads
        if whole or rows.shape[1] > 16384:
            scale, zero = _scale(*_extent(rows), grid)
            shift = torch.zeros_like(scale) if zero is None else zero
            push = dispatch(rows, _reference, loops.cpu_forward, loops.triton_forward)
            y = push(rows, scale, shift, grid)
        else:
            push = dispatch(rows, _reference_ranged, loops.cpu_ranged, loops.triton_ranged)
            y, scale, shift = push(rows, grid)
        ctx.grid = grid
        if grid.low == 0:  # symmetric codes clip nothing: the gradient passes as it is
            ctx.save_for_backward(rows, scale, shift)
        return y

    @staticmethod
    def backward(ctx, gradient):
        if ctx.grid.low < 0:
            return gradient, None
        return _Static.backward(ctx, gradient)[0], None


def _nearest(v: Tensor, grid: Grid) -> Tensor:
    """Rounded to the spacing of the grid, ties to even; not clipped yet."""
    if grid.mantissa < 0:
        return v.round()
    exponent = (torch.frexp(v).exponent - 1).clamp(grid.least, grid.most)
    step = torch.ldexp(torch.ones_like(v), exponent - grid.mantissa)
    return (v / step).round() * step


def _reference(rows, scale, shift, grid):
    z = shift[:, None]
    # By the reciprocal, as torch's own fake quantization does.
    q = (_nearest(rows.float() * scale.reciprocal()[:, None], grid) + z).clamp(grid.low, grid.high)
    return ((q - z) * scale[:, None]).to(rows.dtype)


def _reference_ranged(rows, grid):
    scale, zero = _scale(*_extent(rows), grid)
    shift = torch.zeros_like(scale) if zero is None else zero
    return _reference(rows, scale, shift, grid), scale, shift


def _reference_backward(rows, scale, shift, grid, gradient):
    z, s, g = shift[:, None], scale[:, None], gradient.float()
    v = rows.float() * s.reciprocal()
    free = _nearest(v, grid) + z
    q = free.clamp(grid.low, grid.high)
    inside = free == q
    for_scale = torch.where(inside, q - z - v, q - z) * g
    for_zero = torch.where(inside, 0.0, -s * g)
    return torch.where(inside, gradient, 0), for_scale.sum(1), for_zero.sum(1)
