"""Low-bit GEMV: y = W x with W in 2, 3, 4 or 8 bits, one scale and one minimum a group.

In a group of weights of one row, w ≈ scale · code + minimum: round to nearest on the group's own
range (the baseline of GPTQ, arXiv 2210.17323, and of every later method, whose ready codes,
scales and zero points ``pack_codes`` takes as they are). With group sums Σx this is

    y[i] = Σ_g scale[i, g] · Σ_{j in g} code[i, j] x[j]  +  minimum[i, g] · Σ_{j in g} x[j].

Layout: 32 codes of one row fill ``bits`` words of 32 bits, without gaps (code t begins at bit
t · bits). Sixteen rows lie side by side, word by word, so that a vector register holds the same
codes of sixteen rows: unpacking is one mask, one conversion, one multiply-add for sixteen weights,
and no sum runs across a register. A code that is masked but not shifted is 2^s times too large;
x is divided by 2^s once instead, which is exact. Scale and minimum are float16: 4 bits in groups of
32 cost 5 bits a weight, the size and the precision of GGUF's Q4_1; 2 bits in groups of 64, 2.5.

What libraries have: ``torch``'s packed int8 and int4 products (``_weight_int8pack_mm``: one scale a
row; ``_weight_int4pack_mm_for_cpu``: groups) round activations to bfloat16; for 2 and 3 bits there
is nothing on x86. The bench times both beside this file: it stays at 4 and 8 bits because it keeps
float32 activations and 8-bit groups at no loss of speed.

A product of one vector reads every weight once: memory sets the limit at 8 bits; at 2 and 3 bits
unpacking does (about three vector instructions for sixteen weights, whatever the width).
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError

try:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic
except ImportError:
    ir = types = None

    def intrinsic(**options):
        return lambda function: function


from lib.kernels.dispatch import OPTIONS, check, dispatch, jit, njit, prange, refuse_gradient, tl

constexpr = tl.constexpr if tl else int  # an annotation only
BITS = (2, 3, 4, 8)
_LANES = 16  # rows side by side: 512 bits of float32, or two registers of 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] in ``bits`` bits, filled up to whole row blocks and groups.

    ``words``: int32 [row blocks, groups · group / 32, bits, 16], the codes. ``scales``: int32 [row
    blocks, groups, 16], a group's scale (low half) and minimum (high half), float16 each.
    """

    words: Tensor
    scales: Tensor
    bits: int
    group: int
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included: what a product reads."""
        return self.words.nbytes + self.scales.nbytes

    def to(self, device) -> "Packed":
        return replace(self, words=self.words.to(device), scales=self.scales.to(device))


def quantize(weight: Tensor, bits: int, group: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on each group's own range; the last group of a row may be short.

    Args:
        weight: [m, n], finite floats.
        bits: 2, 3, 4 or 8.
        group: weights of one row that share a scale; a multiple of 32.

    Returns:
        (codes, scale, minimum): uint8 [m, n] and float32 [m, ceil(n / group)], the last two already
        rounded to float16; weight ≈ scale · code + minimum, off by at most half a scale (and the
        rounding of scale and minimum).
    """
    check(weight=(weight, "m n", _FLOATS))
    _check_format(bits, group)
    if not weight.isfinite().all():
        raise BookError("weight has NaN or infinity; it must be finite")
    m, n = weight.shape
    w = weight.detach().float()
    if n % group:  # a short last group: its last weight again, which changes no range
        w = torch.cat([w, w[:, -1:].expand(m, group - n % group)], dim=1)
    w = w.unflatten(1, (-1, group)) if n else w.new_zeros(m, 0, group)
    if not n:
        empty = w.new_zeros(m, 0)
        return torch.zeros(m, 0, dtype=torch.uint8, device=w.device), empty, empty
    low, high = w.amin(-1), w.amax(-1)
    # Codes are made for the scale and minimum that are stored, not for those before rounding.
    scale, low = _half((high - low) / (2**bits - 1), "weight"), _half(low, "weight")
    codes = ((w - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round()
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8)
    return codes.flatten(1)[:, :n].contiguous(), scale, low


def pack_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Packed:
    """Pack codes that exist already: from ``quantize``, GPTQ, OmniQuant, …

    Args:
        codes: integers [m, n] in 0 … 2^bits − 1.
        scale: [m, ceil(n / group)].
        zero: the same shape; weight = scale · (code − zero). Or
        minimum: the same shape; weight = scale · code + minimum.

    Scale and minimum (= −scale · zero) are rounded to float16.
    """
    _check_format(bits, group)
    check(codes=(codes, "m n", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)))
    m, n = codes.shape
    groups = -(-n // group)
    if (zero is None) == (minimum is None):
        raise BookError("give zero or minimum, one of the two")
    offset = {"zero": zero} if minimum is None else {"minimum": minimum}
    shape = f"{m} {groups}"
    check(scale=(scale, shape), **{name: (value, shape) for name, value in offset.items()})
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise BookError(f"codes reach from {low} to {high}; {bits} bits hold 0 to {2**bits - 1}")
    low = -scale.float() * zero.float() if minimum is None else minimum
    scale, low = _half(scale, "scale"), _half(low, *offset)
    blocks = -(-m // _LANES)
    full = codes.new_zeros(blocks * _LANES, groups * group, dtype=torch.int32)
    full[:m, :n] = codes
    chunks = groups * group // 32
    full = full.view(blocks, _LANES, chunks, 32).permute(0, 2, 3, 1)
    words = full.new_zeros(blocks, chunks, bits, _LANES)
    for t in range(32):
        word, shift = divmod(t * bits, 32)
        words[:, :, word] |= full[:, :, t] << shift  # what does not fit falls off the end
        if shift + bits > 32:
            words[:, :, word + 1] |= full[:, :, t] >> 32 - shift
    both = full.new_zeros(blocks * _LANES, groups, dtype=torch.int64)
    halves = [v.half().view(torch.int16).long() & 0xFFFF for v in (scale, low)]
    both[:m] = halves[0] | halves[1] << 16
    both = both.view(blocks, _LANES, groups).transpose(1, 2)
    both = torch.where(both >= 2**31, both - 2**32, both).to(torch.int32)  # the same bits
    return Packed(words, both.contiguous(), bits, group, m, n)


def pack(weight: Tensor, bits: int, group: int = 64) -> Packed:
    """``quantize`` and ``pack_codes`` in one: weight [m, n], finite floats."""
    codes, scale, minimum = quantize(weight, bits, group)
    return pack_codes(codes, scale, minimum=minimum, bits=bits, group=group)


def unpack(packed: Packed) -> Tensor:
    """The matrix that ``packed`` stands for: float32 [rows, columns], exactly what ``mv`` uses."""
    codes, scale, low = codes_of(packed)
    codes = codes.float().unflatten(1, (scale.shape[1], packed.group))
    w = scale[..., None] * codes + low[..., None]
    return w.flatten(1)[:, : packed.columns].contiguous()


def codes_of(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [rows, groups · group], scale, minimum float32 [rows, groups]) of ``packed``."""
    words, both = (v.long() & 0xFFFFFFFF for v in (packed.words, packed.scales))
    found = []
    for t in range(32):
        word, shift = divmod(t * packed.bits, 32)
        code = words[:, :, word] >> shift
        if shift + packed.bits > 32:
            code = code | words[:, :, word + 1] << 32 - shift
        found.append((code & 2**packed.bits - 1).to(torch.uint8))
    codes = torch.stack(found, dim=2).permute(0, 3, 1, 2)  # [blocks, 16, chunks, 32]
    codes = codes.flatten(2).flatten(0, 1)[: packed.rows]
    both = both.transpose(1, 2).flatten(0, 1)[: packed.rows]
    halves = [(both >> shift).to(torch.int16).view(torch.float16).float() for shift in (0, 16)]
    return codes.contiguous(), *halves


def stack(parts: list[Packed]) -> Packed:
    """Matrices over the same input as one, one below the other: q, k and v in one product.

    All must have the same bits, group and columns, and all but the last a multiple of 16 rows.
    """
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.group, part.columns) != (first.bits, first.group, first.columns):
            raise BookError("parts differ in bits, group or columns; stack takes like with like")
    if any(part.rows % _LANES for part in parts[:-1]):
        raise BookError(f"parts must have a multiple of {_LANES} rows")
    words, scales = (torch.cat([getattr(p, n) for p in parts]) for n in ("words", "scales"))
    return replace(first, words=words, scales=scales, rows=sum(p.rows for p in parts))


def mv(packed: Packed, x: Tensor) -> Tensor:
    """W x for one vector or several: float32 [..., m].

    Args:
        packed: a matrix [m, n].
        x: [..., n], float32 (bfloat16 and float16 are widened); sums are kept in float32.

    A vector that has a NaN or an infinity gives NaN in every row.

    Raises:
        BookError: a wrong shape, dtype or device, named; gradients asked for (there are none).
    """
    if not isinstance(packed, Packed):
        raise BookError(f"packed is a {type(packed).__name__}; make it with lowbit.pack")
    check(x=(x, f"... {packed.columns}", _FLOATS))
    if x.device != packed.words.device:
        raise BookError(f"x is on {x.device}, packed on {packed.words.device}; use one device")
    refuse_gradient("mv", [x])
    run = dispatch(x, _reference, _cpu, _triton)
    lead = x.shape[:-1]
    if not x.numel() or not packed.rows:
        return torch.zeros(*lead, packed.rows, device=x.device)
    rows = x.detach().float().reshape(-1, packed.columns)
    return run(packed, rows).reshape(*lead, packed.rows)


def _check_format(bits: int, group: int) -> None:
    if bits not in BITS:
        raise BookError(f"bits is {bits}; there are 2, 3, 4 and 8")
    if not isinstance(group, int) or group < 32 or group % 32:
        raise BookError(f"group is {group}; it must be a multiple of 32")


def _half(x: Tensor, name: str) -> Tensor:
    """``x`` rounded to float16, as float32."""
    x = x.float().half().float()
    if not x.isfinite().all():
        raise BookError(f"{name} is beyond float16's range or not finite; rescale it")
    return x


def _reference(packed: Packed, x: Tensor) -> Tensor:
    # The last term is 0, or NaN where x is not finite.
    return x @ unpack(packed).T + 0 * x.sum(-1, keepdim=True)


# --- CPU ------------------------------------------------------------------------------------------


def _cpu(packed: Packed, x: Tensor) -> Tensor:
    words, scales = arrays(packed)
    kernel = cpu_kernel(packed.bits)
    y = torch.empty(len(x), len(words), _LANES)
    for row, out in zip(x.contiguous().numpy(), y.numpy(), strict=True):
        kernel(words, scales, row, out, False)
    return y.flatten(1)[:, : packed.rows]


def arrays(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Words and scales as the CPU kernel takes them: uint32, sharing memory."""
    return packed.words.numpy().view(np.uint32), packed.scales.numpy().view(np.uint32)


@cache
def cpu_kernel(bits: int):
    """The kernel ``(words, scales, x [n], y [row blocks, 16], add)``: y = W x, or y += W x."""

    @njit(parallel=True, **OPTIONS)
    def kernel(words, scales, x, y, add):
        blocks, groups = scales.shape[0], scales.shape[1]
        chunks = words.shape[1] // groups if groups else 0
        scaled = np.zeros((groups * chunks, 32), np.float32)
        sums = np.zeros(groups, np.float32)
        _prepare(x, bits, scaled, sums)
        scale = np.empty((blocks, _LANES), np.float32)
        # Indices, no views: a view counts references, atomically, and two threads that count on
        # one array wait for each other at every step.
        for b in prange(blocks):
            if not add:
                for lane in range(_LANES):
                    y[b, lane] = 0
            for g in range(groups):
                for lane in range(_LANES):
                    both = scales[b, g, lane]
                    scale[b, lane] = _half_to_float(both)
                    y[b, lane] += _half_to_float(both >> np.uint32(16)) * sums[g]
                for c in range(g * chunks, (g + 1) * chunks):
                    word = (b * groups * chunks + c) * bits
                    _chunk(bits, words, word, scaled, c, scale, y, b)

    return kernel


@intrinsic(prefer_literal=True)
def _chunk(typing, bits, words, word, x, c, scale, y, b):
    """y[b, lane] += scale[b, lane] · Σ_t code[t, lane] · x[c, t]: 32 codes of sixteen rows.

    ``word`` is the index of the codes' first sixteen words. In vectors of sixteen, spelt out: left
    to itself the compiler sometimes proves that it may vectorize and sometimes not, a factor of
    eighteen apart. LLVM fits it to any CPU.
    """
    width = bits.literal_value
    whole, real = ir.IntType(32), ir.FloatType()
    wholes, reals = ir.VectorType(whole, _LANES), ir.VectorType(real, _LANES)

    def generate(context, builder, signature, arguments):
        _, words, word, x, c, scale, y, b = arguments
        _, words_type, _, x_type, _, scale_type, y_type, _ = signature.args

        def pointer(kind, array, row, vector, wide=_LANES):  # to the start of that row of the array
            data = context.make_array(kind)(context, builder, array).data
            at = builder.mul(row, row.type(wide))
            return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())

        def load(start, index):
            return builder.load(builder.gep(start, [whole(index)]), align=4)

        def all_lanes(value, kind):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, whole(0))
            zeros = ir.Constant(wholes, [0] * _LANES)
            return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

        def constant(value):
            return ir.Constant(wholes, [value] * _LANES)

        def multiply_add(a, b, c):
            return builder.fadd(builder.fmul(a, b, ("contract",)), c, ("contract",))

        start = pointer(words_type, words, word, wholes)
        w = [load(start, i) for i in range(width)]
        values = builder.bitcast(pointer(x_type, x, c, reals, 32), real.as_pointer())
        totals = [ir.Constant(reals, [0.0] * _LANES)] * 2  # two chains of dependent sums, not one
        for t in range(32):
            word, shift = divmod(t * width, 32)
            if shift + width < 32:  # masked where it stands: x was divided by 2^shift
                code = builder.and_(w[word], constant((1 << width) - 1 << shift))
            else:
                code = builder.lshr(w[word], constant(shift))
            if shift + width > 32:
                rest = builder.shl(w[word + 1], constant(32 - shift))
                code = builder.and_(builder.or_(code, rest), constant((1 << width) - 1))
            code = builder.sitofp(code, reals)
            totals[t % 2] = multiply_add(code, all_lanes(load(values, t), reals), totals[t % 2])
        total = builder.fadd(*totals)
        here, factor = pointer(y_type, y, b, reals), pointer(scale_type, scale, b, reals)
        total = multiply_add(total, load(factor, 0), load(here, 0))
        builder.store(total, here, align=4)
        return context.get_dummy_value()

    return types.void(bits, words, word, x, c, scale, y, b), generate


@njit(**OPTIONS)
def _prepare(x, bits, scaled, sums):
    """x over 2^shift where a code is masked without a shift; the groups' sums."""
    chunks = len(scaled) // max(len(sums), 1)
    for g in range(len(sums)):
        total = np.float32(0)
        for c in range(g * chunks, (g + 1) * chunks):
            for t in range(min(32, x.size - c * 32)):
                shift = t * bits % 32
                down = shift if shift + bits < 32 else 0
                total += x[c * 32 + t]
                scaled[c, t] = x[c * 32 + t] * (np.float32(1) / np.float32(np.int64(1) << down))
        sums[g] = total
    # NaN for every row where x is not finite: 0 · ∞ would hide it in some rows and not in others.
    whole = np.float32(0)
    for g in range(len(sums)):
        whole += sums[g]
    sums[0] += np.float32(0) * whole


@njit(**OPTIONS)
def read_row(words, scales, bits, i, y):
    """y [columns] = row ``i`` of a packed matrix: an embedding's look-up."""
    block, lane = i // _LANES, i % _LANES
    group = words.shape[1] // scales.shape[1] * 32
    top = np.uint64((1 << bits) - 1)
    for j in range(y.size):
        word, shift = j % 32 * bits // 32, j % 32 * bits % 32
        code = np.uint64(words[block, j // 32, word, lane])
        if shift + bits > 32:
            code |= np.uint64(words[block, j // 32, word + 1, lane]) << np.uint64(32)
        code = (code >> np.uint64(shift)) & top
        both = scales[block, j // group, lane]
        low = _half_to_float(both >> np.uint32(16))
        y[j] = _half_to_float(both) * np.float32(code) + low


@njit(inline="always", **OPTIONS)
def _half_to_float(bits):
    """The low 16 bits, a finite float16, as float32: the exponent moves by 127 − 15."""
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    sign = np.float32(1) - np.float32(np.int32((bits >> np.uint32(14)) & np.uint32(2)))
    return magnitude * np.float32(2.0**112) * sign


# --- GPU ------------------------------------------------------------------------------------------


def _triton(packed: Packed, x: Tensor) -> Tensor:
    blocks, groups = packed.scales.shape[:2]
    padded = x.new_zeros(len(x), groups * packed.group)
    padded[:, : packed.columns] = x
    y = x.new_empty(len(x), blocks * _LANES)
    _mv_kernel[(blocks, len(x))](
        packed.words, packed.scales, padded, y, groups, blocks,
        BITS=packed.bits, CHUNKS=packed.group // 32, BLOCK=16,
    )  # fmt: skip
    return y[:, : packed.rows] + 0 * x.sum(-1, keepdim=True)


@jit
def _mv_kernel(
    words, scales, x, y, groups, blocks,
    BITS: constexpr, CHUNKS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One program: sixteen rows and one vector, ``BLOCK`` groups at a time."""
    block, vector = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, 16)
    total = tl.zeros([BLOCK, 16], tl.float32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < groups
        part = tl.zeros([BLOCK, 16], tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for c in range(CHUNKS):
            chunk = group * CHUNKS + c
            at = words + ((block * groups * CHUNKS + chunk) * (BITS * 16))[:, None] + lanes[None, :]
            for t in tl.static_range(32):
                # BITS and t are constants: one word, or for 3 bits sometimes two, hold the code.
                code = tl.load(at + (t * BITS // 32) * 16, mask=inside[:, None], other=0)
                code = (code >> (t * BITS % 32)) & ((1 << min(BITS, 32 - t * BITS % 32)) - 1)
                if t * BITS % 32 + BITS > 32:
                    more = tl.load(at + (t * BITS // 32 + 1) * 16, mask=inside[:, None], other=0)
                    code |= (more << (32 - t * BITS % 32)) & ((1 << BITS) - 1)
                value = tl.load(x + (vector * groups * CHUNKS + chunk) * 32 + t, inside, other=0.0)
                part += code.to(tl.float32) * value[:, None]
                sums += value
        at = scales + ((block * groups + group) * 16)[:, None] + lanes[None, :]
        both = tl.load(at, mask=inside[:, None], other=0)
        scale = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += scale * part + low * sums[:, None]
    at = y + (vector * blocks + block) * 16 + lanes
    tl.store(at, tl.sum(total, axis=0))
