"""Low-bit products: packing, the three backends, torch's own packed product as a second opinion."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import lowbit
from lib.kernels.dispatch import triton, using

SOME = settings(max_examples=30, deadline=None)
bits = st.sampled_from(lowbit.BITS)
groups = st.sampled_from([32, 64, 96])


def matrix(m, n, seed):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def naive(codes, scale, minimum, group, x):
    """The equation, sum by sum, in float64."""
    y = np.zeros(len(codes))
    for i in range(len(codes)):
        for j in range(codes.shape[1]):
            g = j // group
            y[i] += (float(scale[i, g]) * int(codes[i, j]) + float(minimum[i, g])) * float(x[j])
    return y


@SOME
@given(bits, groups, st.integers(1, 40), st.integers(1, 200), st.integers(0, 9))
def test_unpack_gives_back_what_was_packed(bits, group, m, n, seed):
    codes, scale, minimum = lowbit.quantize(matrix(m, n, seed), bits, group)
    packed = lowbit.pack_codes(codes, scale, minimum=minimum, bits=bits, group=group)
    found, scale_found, minimum_found = lowbit.codes_of(packed)
    assert torch.equal(found[:, :n], codes)
    assert torch.equal(scale_found, scale) and torch.equal(minimum_found, minimum)
    wide = scale.repeat_interleave(group, 1)[:, :n], minimum.repeat_interleave(group, 1)[:, :n]
    assert torch.equal(lowbit.unpack(packed), wide[0] * codes + wide[1])


@SOME
@given(bits, groups, st.integers(1, 40), st.integers(1, 200), st.integers(0, 9))
def test_rounding_is_to_nearest(bits, group, m, n, seed):
    w = matrix(m, n, seed)
    codes, scale, minimum = lowbit.quantize(w, bits, group)
    wide = scale.repeat_interleave(group, 1)[:, :n], minimum.repeat_interleave(group, 1)[:, :n]
    off = (wide[0] * codes + wide[1] - w).abs()
    # Half a step; at the ends of the range the rounding of scale and minimum to float16 adds.
    assert (off <= 0.5 * wide[0] + 2e-3 * w.abs().max()).all()
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert (off <= 0.501 * wide[0] + 1e-6)[inside].all()


@SOME
@given(bits, groups, st.integers(1, 40), st.integers(1, 130), st.integers(0, 9))
def test_reference_is_the_equation(bits, group, m, n, seed):
    packed = lowbit.pack(matrix(m, n, seed), bits, group)
    codes, scale, minimum = lowbit.codes_of(packed)
    x = matrix(1, n, seed + 1)[0]
    with using("reference"):
        y = lowbit.mv(packed, x)
    expected = naive(codes[:, :n], scale, minimum, group, x)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-5 * math.sqrt(n) * 4)


@SOME
@given(
    bits, groups, st.integers(1, 70), st.integers(1, 400),
    st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(),
)  # fmt: skip
def test_cpu_is_the_reference(bits, group, m, n, lead, dtype, strided):
    packed = lowbit.pack(matrix(m, n, m), bits, group)
    x = matrix(math.prod(lead) or 1, 2 * n if strided else n, n).to(dtype)
    x = (x[:, ::2] if strided else x)[: math.prod(lead)].reshape(*lead, n)
    with using("reference"):
        expected = lowbit.mv(packed, x)
    with using("cpu"):
        found = lowbit.mv(packed, x)
    assert found.shape == (*lead, m) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-5 * math.sqrt(n), rtol=1e-4)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("bits", lowbit.BITS)
@pytest.mark.parametrize("m, n, group, rows", [(17, 96, 32, 1), (5, 70, 64, 2), (16, 700, 32, 1)])
def test_triton_is_the_reference(bits, m, n, group, rows):
    packed, x = lowbit.pack(matrix(m, n, 1), bits, group), matrix(rows, n, 2)
    if torch.cuda.is_available():
        packed, x = packed.to("cuda"), x.cuda()
    with using("reference"):
        expected = lowbit.mv(packed, x)
    with using("triton"):
        found = lowbit.mv(packed, x)
    torch.testing.assert_close(found, expected, atol=2e-5 * math.sqrt(n), rtol=1e-4)


def test_torch_packed_int4_agrees():
    """Another library on the same codes; it rounds x and scales to bfloat16, hence 1 %."""
    m, n, group = 64, 256, 32
    codes, scale, minimum = lowbit.quantize(matrix(m, n, 3), 4, group)
    scale, minimum = scale.bfloat16().float(), minimum.bfloat16().float()
    packed = lowbit.pack_codes(codes, scale, minimum=minimum, bits=4, group=group)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    middle = minimum + 8 * scale  # their weight is (code − 8) · scale + zero
    both = torch.stack([scale.T, middle.T], dim=-1).bfloat16().contiguous()
    x = matrix(1, n, 4).bfloat16()
    expected = torch.ops.aten._weight_int4pack_mm_for_cpu(x, theirs, group, both).float()
    found = lowbit.mv(packed, x)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_gives_nan_everywhere(backend, bad):
    packed, x = lowbit.pack(matrix(20, 96, 5), 3, 32), matrix(2, 96, 6)
    x[1, 40] = bad
    with using(backend):
        y = lowbit.mv(packed, x)
    assert y[0].isfinite().all() and y[1].isnan().all()


@cache
def ready(m, n, bits):
    draw = torch.Generator().manual_seed(7)
    groups = -(-n // 32)
    return (
        torch.randint(0, 2**bits, (m, n), generator=draw),
        torch.rand(m, groups, generator=draw) + 0.1,
        torch.randint(0, 2**bits, (m, groups), generator=draw),
    )


@pytest.mark.parametrize("bits", lowbit.BITS)
def test_ready_codes_with_zero_points(bits):
    codes, scale, zero = ready(18, 80, bits)
    packed = lowbit.pack_codes(codes, scale, zero, bits=bits, group=32)
    wide = [v.repeat_interleave(32, 1)[:, :80] for v in (scale, zero)]
    exact = wide[0] * (codes - wide[1])
    # Scale and minimum are float16: 2^-11 of the largest product.
    assert (lowbit.unpack(packed) - exact).abs().max() <= 2**-10 * scale.max() * 2**bits
    x = matrix(1, 80, 8)[0]
    torch.testing.assert_close(
        lowbit.mv(packed, x), lowbit.unpack(packed) @ x, atol=1e-3, rtol=1e-4
    )


@SOME
@given(bits, st.integers(0, 9))
def test_packing_twice_changes_nothing(bits, seed):
    once = lowbit.unpack(lowbit.pack(matrix(16, 64, seed), bits, 32))
    # Where a group uses both ends of its range, its grid comes back as it was.
    codes, _, _ = lowbit.quantize(once, bits, 32)
    full = codes.unflatten(1, (2, 32))
    full = (full.amin(-1) == 0) & (full.amax(-1) == 2**bits - 1)
    assume(full.all())
    assert torch.equal(lowbit.unpack(lowbit.pack(once, bits, 32)), once)


def test_storage_is_really_small():
    for bits, group in ((2, 64), (3, 128), (4, 32), (8, 32)):
        packed = lowbit.pack(matrix(64, 1280, 1), bits, group)
        assert packed.nbytes * 8 == 64 * 1280 * (bits + 32 / group)
        assert packed.words.untyped_storage().nbytes() == packed.words.nbytes


def test_constant_and_tiny_groups():
    w = torch.zeros(3, 64)
    w[1], w[2] = 0.5, 1e-8 * torch.arange(64)
    back = lowbit.unpack(lowbit.pack(w, 2, 32))
    assert torch.equal(back[:2], w[:2]) and (back[2] - w[2]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stack_and_empty(backend):
    parts = [lowbit.pack(matrix(m, 96, m), 3, 32) for m in (16, 32, 5)]
    x = matrix(1, 96, 1)[0]
    with using(backend):
        expected = torch.cat([lowbit.mv(p, x) for p in parts])
        torch.testing.assert_close(lowbit.mv(lowbit.stack(parts), x), expected)
        assert lowbit.mv(lowbit.pack(torch.zeros(0, 64), 2), torch.zeros(64)).shape == (0,)
        assert lowbit.mv(lowbit.pack(torch.zeros(3, 0), 2), torch.zeros(0)).tolist() == [0, 0, 0]


def test_one_line_errors():
    w, x = matrix(16, 64, 0), matrix(1, 64, 0)[0]
    packed = lowbit.pack(w, 4, 32)
    codes, scale, minimum = lowbit.quantize(w, 4, 32)
    for message, run in {
        "weight is [64]": lambda: lowbit.pack(x, 4),
        "weight is int64": lambda: lowbit.pack(w.long(), 4),
        "weight has NaN": lambda: lowbit.pack(w / 0, 4),
        "weight is beyond float16": lambda: lowbit.pack(w * 1e9, 4),
        "bits is 5": lambda: lowbit.pack(w, 5),
        "group is 48": lambda: lowbit.pack(w, 4, 48),
        "x is [63]": lambda: lowbit.mv(packed, x[:63]),
        "x is int64": lambda: lowbit.mv(packed, x.long()),
        "x is a list": lambda: lowbit.mv(packed, [1.0]),
        "packed is a Tensor": lambda: lowbit.mv(w, x),
        "x is on meta": lambda: lowbit.mv(packed, x.to("meta")),
        "mv has no gradient": lambda: lowbit.mv(packed, x.clone().requires_grad_()),
        "scale is [16, 2]; it must be [16, 1]": lambda: lowbit.pack_codes(
            codes, scale, minimum, bits=4, group=64
        ),
        "codes reach from": lambda: lowbit.pack_codes(codes, scale, minimum, bits=2, group=32),
        "codes is float32": lambda: lowbit.pack_codes(w, scale, minimum, bits=4, group=32),
        "zero or minimum": lambda: lowbit.pack_codes(codes, scale, bits=4, group=32),
        "parts must have": lambda: lowbit.stack([lowbit.pack(w[:3], 4)] * 2),
        "parts differ": lambda: lowbit.stack([packed, lowbit.pack(w, 4, 64)]),
    }.items():
        with pytest.raises(BookError) as caught:
            run()
        assert message in str(caught.value) and "\n" not in str(caught.value)
