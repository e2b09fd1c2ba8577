"""Uniform asymmetric quantization with bits that are really packed: what both caches store.

A group of values keeps its minimum m and its step s in float16, and every value the code

    q = floor((x - m) / s + 1/2)  in 0 … 2^b - 1,   x̂ = m + s q   (KIVI, arXiv 2402.02750, eq. 1)

Groups run along time, one channel at a time (``per="channel"``), or along the channels of one
token (``per="token"``). Codes lie in planes: with n = 8 / b codes a byte, byte j of a row holds
the codes of channels j, j + w/n, j + 2 w/n, …, so that unpacking is a shift and a mask over whole
runs of memory, with no shuffle. Three bits are a plane of two bits and a plane of one.

Why not a library call: torch has no packed store for 2, 3 and 4 bits with scales along time, and
its own bit operations need a pass over memory for every shift, mask, concatenation and product.
Packing happens once a token and stays in torch; unpacking happens at every step for the whole
past, so it has a kernel: it reads b/8 bytes a value and writes 4, in one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, dispatch, jit, njit, prange, tl, triton

BITS = (2, 3, 4, 8)
PLANES = {2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 8: ((8, 0),)}  # (bits, shift) of a plane
constexpr = tl.constexpr if tl else int  # an annotation only
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Packed(NamedTuple):
    """What ``quantize`` keeps of x [batch, length, width].

    codes: uint8 [batch, length, width · bits / 8].
    scale, low: float16, [batch, length / group, width] per channel,
        [batch, length, width / group] per token.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor


def quantize(x: Tensor, bits: int, group: int, per: str) -> Packed:
    """Quantize and pack.

    Args:
        x: [batch, length, width], float32, bfloat16 or float16; ``width`` a multiple of 8.
            A group that holds a NaN, an infinity or a magnitude beyond float16 (65,504) comes
            back as NaN or infinity.
        bits: 2, 3, 4 or 8.
        group: values that share a scale; divides ``length`` (per channel) or ``width`` (per token).
        per: ``"channel"`` or ``"token"``.

    Raises:
        BookError: naming the argument that does not fit.
    """
    length, width = _fits(x, bits, group, per)
    x = x.float()
    grouped = _grouped(x, group, per)
    along = 2 if per == "channel" else -1
    levels = 2**bits - 1
    low = grouped.amin(along, keepdim=True).half()
    span = grouped.amax(along, keepdim=True) - low.float()
    scale = (span.clamp(min=0) / levels).half()  # `low`, rounded up, may pass the largest value
    codes = dispatch(x, reference=_reference_pack, triton=_triton_pack)(
        x, scale.float(), low.float(), bits, group, per
    )
    shape = (-1, length // group, width) if per == "channel" else (-1, length, width // group)
    return Packed(codes, scale.reshape(len(x), *shape[1:]), low.reshape(len(x), *shape[1:]))


def dequantize(
    packed: Packed, bits: int, group: int, per: str, out: Tensor | None = None
) -> Tensor:
    """Unpack: x̂ = low + scale · code.

    Args:
        packed, bits, group, per: as ``quantize`` had them.
        out: written in its first ``length`` rows if given, float32 [batch, rows, width] and
            contiguous: a buffer that has room for the tokens after the packed ones.

    Returns:
        float32 [batch, length, width], or ``out``.
    """
    batch, length, _ = packed.codes.shape
    width = packed.codes.shape[2] * 8 // bits
    if out is None:
        out = torch.empty(batch, length, width, device=packed.codes.device)
    elif (
        out.dtype != torch.float32
        or not out.is_contiguous()
        or out.dim() != 3
        or (out.shape[0], out.shape[2]) != (batch, width)
        or out.shape[1] < length
    ):
        raise BookError(
            f"out is {str(out.dtype).removeprefix('torch.')} {list(out.shape)}; it must be "
            f"contiguous float32 [{batch}, {length} or more, {width}]"
        )
    if out.numel() and length:
        worth = batch * length * width >= 4096  # below, starting the threads costs as much
        dispatch(
            packed.codes,
            reference=_reference_dequantize,
            cpu=_cpu_dequantize,
            triton=_triton_dequantize,
            worth=worth,
        )(packed, bits, group, per, out)
    return out


def _fits(x: Tensor, bits: int, group: int, per: str) -> tuple[int, int]:
    if bits not in BITS:
        raise BookError(f"bits is {bits}; it must be one of {', '.join(map(str, BITS))}")
    if per not in ("channel", "token"):
        raise BookError(f'per is "{per}"; it must be "channel" or "token"')
    sizes = check(x=(x, "batch length width", FLOATS))
    length, width = sizes["length"], sizes["width"]
    if width % 8:
        raise BookError(f"x is {width} wide; its width must be a multiple of 8 to pack into bytes")
    divided, axis = (length, "length") if per == "channel" else (width, "width")
    if group < 1 or divided % group:
        raise BookError(f"group is {group}; it must divide x's {axis}, {divided}")
    return length, width


def _grouped(x: Tensor, group: int, per: str) -> Tensor:
    """[batch, length / group, group, width] or [batch, length, width / group, group]."""
    return x.unflatten(1 if per == "channel" else 2, (-1, group))


def _reference_pack(
    x: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, per: str
) -> Tensor:
    step = torch.where(scale > 0, scale, torch.ones_like(scale))  # a constant group: all codes 0
    codes = ((_grouped(x, group, per) - low) / step + 0.5).floor().clamp(0, 2**bits - 1)
    codes = codes.nan_to_num(0).to(torch.uint8).reshape(x.shape)
    planes = []
    for plane, shift in PLANES[bits]:
        parts = ((codes >> shift) & (2**plane - 1)).unflatten(-1, (8 // plane, -1))
        packed = parts[..., 0, :].clone()
        for i in range(1, 8 // plane):
            packed |= parts[..., i, :] << (plane * i)
        planes.append(packed)
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0]


def _reference_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., width · bits / 8] -> uint8 [..., width]."""
    width = codes.shape[-1] * 8 // bits
    sizes = [width * plane // 8 for plane, _ in PLANES[bits]]
    found = None
    for (plane, shift), part in zip(PLANES[bits], codes.split(sizes, -1), strict=True):
        mask = 2**plane - 1
        one = torch.cat([(part >> (plane * i)) & mask for i in range(8 // plane)], -1) << shift
        found = one if found is None else found | one
    return found


def _reference_dequantize(packed: Packed, bits: int, group: int, per: str, out: Tensor) -> None:
    length = packed.codes.shape[1]
    codes = _grouped(_reference_codes(packed.codes, bits).float(), group, per)
    along = 2 if per == "channel" else -1
    scale, low = packed.scale.float().unsqueeze(along), packed.low.float().unsqueeze(along)
    out[:, :length] = torch.addcmul(low, codes, scale).flatten(*((1, 2) if along == 2 else (2, 3)))


def _cpu_dequantize(packed: Packed, bits: int, group: int, per: str, out: Tensor) -> None:
    scale, low = packed.scale.float().numpy(), packed.low.float().numpy()
    kernel = _numba_channel if per == "channel" else _numba_token
    kernel(packed.codes.contiguous().numpy(), scale, low, bits, group, out.numpy())


@njit(**OPTIONS)
def _numba_codes(row, bits, out):
    """The codes of one row, as floats: plane after plane, each a run."""
    width = out.shape[0]
    if bits == 8:
        for c in range(width):
            out[c] = row[c]
    elif bits == 4:
        half = width // 2
        high = out[half:]
        for c in range(half):
            out[c] = row[c] & 15
            high[c] = row[c] >> 4
    else:
        run = width // 4
        a, b, c, d = out[:run], out[run : 2 * run], out[2 * run : 3 * run], out[3 * run :]
        for j in range(run):
            a[j], b[j], c[j], d[j] = row[j] & 3, row[j] >> 2 & 3, row[j] >> 4 & 3, row[j] >> 6
        if bits == 3:
            eighth = width // 8
            more = row[run:]
            for i in range(8):
                part = out[i * eighth : (i + 1) * eighth]
                for j in range(eighth):
                    part[j] += (more[j] >> i & 1) << 2


@njit(parallel=True, **OPTIONS)
def _numba_channel(codes, scale, low, bits, group, out):
    batch, length = codes.shape[:2]
    blocks = length // group
    for i in prange(batch * blocks):
        b, k = i // blocks, i % blocks
        steps, lows = scale[b, k], low[b, k]
        for t in range(k * group, (k + 1) * group):
            row = out[b, t]
            _numba_codes(codes[b, t], bits, row)
            for c in range(row.shape[0]):
                row[c] = row[c] * steps[c] + lows[c]


@njit(parallel=True, **OPTIONS)
def _numba_token(codes, scale, low, bits, group, out):
    batch, length = codes.shape[:2]
    parts = scale.shape[2]
    for i in prange(batch * length):
        b, t = i // length, i % length
        row = out[b, t]
        _numba_codes(codes[b, t], bits, row)
        for g in range(parts):
            step, least = scale[b, t, g], low[b, t, g]
            part = row[g * group : (g + 1) * group]
            for c in range(group):
                part[c] = part[c] * step + least


def _triton_pack(x: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, per: str) -> Tensor:
    batch, length, width = x.shape
    codes = torch.empty(batch, length, width * bits // 8, dtype=torch.uint8, device=x.device)
    x, scale, low = x.contiguous(), scale.contiguous(), low.contiguous()
    start = 0
    for plane, shift in PLANES[bits]:
        run = width * plane // 8  # bytes of this plane in a row
        block = triton.next_power_of_2(max(run, 1))
        if batch * length:
            _pack_kernel[(batch * length,)](
                *(x, scale, low, codes, length, width, codes.shape[2], start, run, group),
                LEVELS=2**bits - 1,
                PLANE=plane,
                SHIFT=shift,
                PER_CHANNEL=per == "channel",
                BLOCK=block,
            )
        start += run
    return codes


@jit
def _pack_kernel(
    x,
    scale,
    low,
    codes,
    length,
    width,
    row_bytes,
    start,
    run,
    group,
    LEVELS: constexpr,
    PLANE: constexpr,
    SHIFT: constexpr,
    PER_CHANNEL: constexpr,
    BLOCK: constexpr,
):
    """One row a program; byte j of the plane gathers channels j, j + run, j + 2 run, …"""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    mask = j < run
    byte = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(8 // PLANE):
        c = j + i * run
        if PER_CHANNEL:
            at = (row // group) * width + c
        else:
            at = row * (width // group) + c // group
        step = tl.load(scale + at, mask=mask, other=1.0)
        least = tl.load(low + at, mask=mask, other=0.0)
        value = tl.load(x + row * width + c, mask=mask, other=0.0)
        code = tl.floor((value - least) / tl.where(step > 0, step, 1.0) + 0.5)
        code = tl.where(code > 0, code, 0.0)  # NaN too
        code = tl.where(code < LEVELS, code, LEVELS).to(tl.int32)
        byte |= ((code >> SHIFT) & ((1 << PLANE) - 1)) << (PLANE * i)
    tl.store(codes + row * row_bytes + start + j, byte.to(tl.uint8), mask=mask)


def _triton_dequantize(packed: Packed, bits: int, group: int, per: str, out: Tensor) -> None:
    batch, length, row_bytes = packed.codes.shape
    width = out.shape[2]
    _unpack_kernel[(batch * length,)](
        packed.codes.contiguous(),
        packed.scale.contiguous(),
        packed.low.contiguous(),
        out,
        length,
        out.shape[1],
        width,
        row_bytes,
        group,
        BITS=bits,
        PER_CHANNEL=per == "channel",
        BLOCK=triton.next_power_of_2(width),
    )


@jit
def _unpack_kernel(
    codes,
    scale,
    low,
    out,
    length,
    out_rows,
    width,
    row_bytes,
    group,
    BITS: constexpr,
    PER_CHANNEL: constexpr,
    BLOCK: constexpr,
):
    """One row a program; neighbouring lanes read neighbouring bytes."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < width
    first: tl.constexpr = 2 if BITS == 3 else BITS
    run = width * first // 8
    byte = tl.load(codes + row * row_bytes + c % run, mask=mask, other=0).to(tl.int32)
    code = (byte >> ((c // run) * first)) & ((1 << first) - 1)
    if BITS == 3:
        more = width // 8
        high = tl.load(codes + row * row_bytes + run + c % more, mask=mask, other=0).to(tl.int32)
        code += ((high >> (c // more)) & 1) << 2
    if PER_CHANNEL:
        at = (row // group) * width + c
    else:
        at = row * (width // group) + c // group
    step = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
    least = tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
    b, t = row // length, row % length
    tl.store(out + (b * out_rows + t) * width + c, least + step * code.to(tl.float32), mask=mask)
