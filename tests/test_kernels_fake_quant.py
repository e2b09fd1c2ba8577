"""Fake quantization: backends against the reference, that against torch, torchao and tables."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import fake_quant as fq
from lib.kernels.dispatch import using

PROPERTY = settings(max_examples=30, deadline=None)
INTEGERS = [f"int{b}" for b in range(2, 9)]
NUMBERS = [*INTEGERS, *fq.FORMATS]
ways = st.sampled_from(["tensor", "channel", "token", "group"])

# The OCP specifications' tables, as fractions; the negative half mirrors them.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)]
E3M2 = [i / 16 for i in range(8)] + [
    (1 + i / 4) * 2.0**e for e in range(-1, 5) for i in range(4)
]  # fmt: skip
E1M2 = [i / 4 for i in range(8)]
E3M0 = [0, 0.25, 0.5, 1, 2, 4, 8, 16]


def drawn(seed, shape, spread=3.0):
    """Numbers of mixed magnitude, some zero and some equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        spread * torch.randn(shape, generator=generator)
    )
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x)


def symmetric_of(number, wish):
    return wish or number in fq.FORMATS


@st.composite
def tensors(draw):
    """Any of the shapes that the papers quantize; a group that divides the last axis."""
    group = draw(st.sampled_from([1, 2, 5, 16]))
    shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=2))
    shape = (*shape, group * draw(st.integers(1, 9)))
    x = drawn(draw(st.integers(0, 10**6)), shape)
    if draw(st.booleans()) and x.dim() > 1:  # the same numbers with other strides
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.to(draw(st.sampled_from(fq.FLOATS))), group


def same(a, b, rtol=0.0):
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)


@PROPERTY
@given(tensors(), st.sampled_from(NUMBERS), ways, st.booleans(), st.sampled_from(["cpu", "triton"]))
def test_backends_equal_the_reference_bit_for_bit(given, number, per, symmetric, backend):
    x, group = given
    options = dict(number=number, per=per, group=group, symmetric=symmetric_of(number, symmetric))
    with using("reference"):
        expected = fq.fake_quantize(x, **options)
        scale, zero = fq.scale_of(x, **options)
        static = fq.fake_quantize(x, number, per, group, scale=0.7 * scale, zero=zero)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    last_bit = 2**-7 if backend == "triton" and x.dtype == torch.bfloat16 else 0
    with using(backend):
        same(fq.fake_quantize(x, **options), expected, last_bit)
        ours = fq.fake_quantize(x, number, per, group, scale=0.7 * scale, zero=zero)
        same(ours, static, last_bit)


@PROPERTY
@given(tensors(), st.sampled_from(NUMBERS), ways, st.booleans(), st.sampled_from(["cpu", "triton"]))
def test_backward_equals_the_reference(given, number, per, symmetric, backend):
    x, group = given
    symmetric = symmetric_of(number, symmetric)
    scale, zero = fq.scale_of(x, number, per, group, symmetric)
    scale = 0.6 * scale  # so that some are clipped
    slope = drawn(1, x.shape, 1.0).to(x.dtype)
    found = {}
    for name in ("reference", backend):
        leaves = [v.clone().requires_grad_() for v in (x, scale, zero) if v is not None]
        with using(name):
            y = fq.fake_quantize(leaves[0], number, per, group, True, *leaves[1:])
            ranged = fq.fake_quantize(leaves[0], number, per, group, symmetric)
            through = torch.autograd.grad(ranged, leaves[0], slope)
            found[name] = *torch.autograd.grad(y, leaves, slope), *through
    for ours, expected in zip(found[backend], found["reference"], strict=True):
        assert ours.dtype == expected.dtype
        size = expected.float().abs().max().item() * x.numel() + 1e-30
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("number", INTEGERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_integers_are_torchs_own(number, symmetric, backend):
    x = drawn(3, (12, 40))
    grid = fq.grid_of(number, symmetric)
    low, high = int(grid.low), int(grid.high)
    for per, axis in (("tensor", None), ("channel", 0), ("token", 0)):
        scale, zero = fq.scale_of(x, number, per, symmetric=symmetric)
        scale = 0.8 * scale
        points = torch.zeros_like(scale) if zero is None else zero
        leaf, peer = x.clone().requires_grad_(), x.clone().requires_grad_()
        with using(backend):
            ours = fq.fake_quantize(leaf, number, per, scale=scale, zero=zero)
        if axis is None:
            torchs = torch.fake_quantize_per_tensor_affine(peer, scale, points.int(), low, high)
        else:
            torchs = torch.fake_quantize_per_channel_affine(
                peer, scale, points.int(), axis, low, high
            )
        same(ours, torchs)
        slope = drawn(4, x.shape)
        same(torch.autograd.grad(ours, leaf, slope)[0], torch.autograd.grad(torchs, peer, slope)[0])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_ties_fall_as_torchs(backend):
    """Half way between two codes the last bit of x / s decides: all must round the same number."""
    scale = drawn(19, (300,), 1.0).abs() + 1e-3
    x = (torch.arange(-8, 8) + 0.5) * scale[:, None]
    points = torch.zeros(300, dtype=torch.int32)
    with using(backend):
        ours = fq.fake_quantize(x, "int4", "token", scale=scale)
    same(ours, torch.fake_quantize_per_channel_affine(x, scale, points, 0, -8, 7))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_step_gradient_is_torchs_learnable_one(backend):
    x, slope = drawn(5, (6, 64), 1.0), drawn(6, (6, 64), 1.0)
    scale, zero = fq.scale_of(x, "int4", "channel", symmetric=False)
    found = []
    for learnable in (False, True):
        leaves = [v.clone().requires_grad_() for v in (x, 0.7 * scale, zero)]
        if learnable:
            y = torch._fake_quantize_learnable_per_channel_affine(*leaves, 0, 0, 15, 1.0)
        else:
            with using(backend):
                y = fq.fake_quantize(leaves[0], "int4", "channel", scale=leaves[1], zero=leaves[2])
        found.append((y, *torch.autograd.grad(y, leaves, slope)))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-4)


TABLES = dict(e2m1=E2M1, e1m2=E1M2, e3m0=E3M0, e2m3=E2M3, e3m2=E3M2)


@pytest.mark.parametrize("number", TABLES)
def test_small_formats_are_the_tables_of_all_codes(number):
    half = torch.tensor(TABLES[number])
    table = torch.cat([-half[1:].flip(0), half])
    torch.testing.assert_close(fq.codes(number), table, rtol=0, atol=0)
    assert len(table) == 2 ** {"e2m1": 4, "e1m2": 4, "e3m0": 4}.get(number, 6) - 1
    one = torch.ones(())
    for backend in ("reference", "cpu", "triton"):
        with using(backend):
            same(fq.fake_quantize(table, number, scale=one), table)
            # Just beside every middle between two codes: the nearer one; beyond the last: the last.
            middle = (table[1:] + table[:-1]) / 2
            away = 1e-4 * (table[1:] - table[:-1])
            same(fq.fake_quantize(middle + away, number, scale=one), table[1:])
            same(fq.fake_quantize(middle - away, number, scale=one), table[:-1])
            same(fq.fake_quantize(torch.tensor([1e9, -1e9]), number, scale=one), table[[-1, 0]])
            if number != "e3m0":  # ties: the code with the even last bit
                places = torch.arange(len(half) - 1)
                even = half[places + places % 2]
                same(fq.fake_quantize(middle[len(half) - 1 :], number, scale=one), even)


@pytest.mark.parametrize("number", ["e4m3", "e5m2"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_eight_bit_floats_are_torchs_own(number, backend):
    kind = dict(e4m3=torch.float8_e4m3fn, e5m2=torch.float8_e5m2)[number]
    every = torch.arange(256, dtype=torch.uint8).view(kind).float()
    every = every[every.isfinite()].unique()
    torch.testing.assert_close(fq.codes(number), every, rtol=0, atol=0)
    largest = torch.finfo(kind).max
    middle = (every[1:] + every[:-1]) / 2  # ties, too
    x = torch.cat([every, middle, drawn(7, (3000,), 6.0)]).clamp(-largest, largest)
    with using(backend):
        same(fq.fake_quantize(x, number, scale=torch.ones(())), x.to(kind).float())


def test_against_torchaos_microscaling():
    mx = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = drawn(8, (64, 32))
    scale, _ = fq.scale_of(x, "e2m1", "group", 32, by="power")
    assert (torch.frexp(scale).mantissa == 0.5).all()  # powers of two
    codes = mx.f32_to_f4_unpacked(x / scale)
    theirs = mx.f4_unpacked_to_f32(codes) * scale
    torch.testing.assert_close(
        fq.fake_quantize(x, "e2m1", "group", 32, scale=scale), theirs, rtol=0, atol=0
    )
    for number in ("e2m3", "e3m2"):
        codes = getattr(mx, f"f32_to_f6_{number}_unpacked")(x)
        theirs = getattr(mx, f"f6_{number}_unpacked_to_f32")(codes)
        same(fq.fake_quantize(x, number, scale=torch.ones(())), theirs)


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(NUMBERS), st.booleans())
def test_result_is_the_nearest_code_by_brute_force(seed, number, symmetric):
    symmetric = symmetric_of(number, symmetric)
    x = drawn(seed, (3, 20), 2.0)
    scale, zero = fq.scale_of(x, number, "token", symmetric=symmetric)
    table = fq.codes(number, symmetric)
    table = (table - (0 if zero is None else zero[:, None])) * scale[:, None]  # [row, code]
    away = (x[..., None] - table[:, None]).abs()
    y = fq.fake_quantize(x, number, "token", symmetric=symmetric)
    distance = (x - y).abs()
    # As near as any code, but for ties and the rounding of the zero point.
    assert (distance <= away.min(-1).values + 1e-5 * scale[:, None]).all()
    assert ((y[..., None] - table[:, None]).abs().min(-1).values <= 1e-5 * scale[:, None]).all()


def test_quantizing_twice_changes_nothing():
    x = drawn(9, (5, 48))
    for number in NUMBERS:
        scale, _ = fq.scale_of(x, number, "group", 16)
        once = fq.fake_quantize(x, number, "group", 16, scale=scale)
        same(fq.fake_quantize(once, number, "group", 16, scale=scale), once)


def test_straight_through_is_the_slope_with_the_rounding_held_fixed():
    """gradcheck on the surrogate whose rounding error is frozen; ours gives its gradients."""
    x = drawn(10, (3, 16), 1.0).double()
    scale, zero = (v.double() for v in fq.scale_of(x.float(), "int3", "token", symmetric=False))
    scale = 0.6 * scale
    error = (x / scale[:, None]).round() - x / scale[:, None]

    def surrogate(x, scale, zero):
        code = (x / scale[:, None] + error + zero[:, None]).clamp(0, 7)
        return (code - zero[:, None]) * scale[:, None]

    # Half a step off the clip's corners, where a numerical slope means nothing.
    keep = zero.round() + 0.25
    leaves = [v.clone().requires_grad_() for v in (x, scale, keep)]
    assert torch.autograd.gradcheck(surrogate, leaves, eps=1e-7, atol=1e-4)
    slope = drawn(11, x.shape, 1.0)
    leaves[2] = zero.clone().requires_grad_()
    expected = torch.autograd.grad(surrogate(*leaves), leaves, slope.double())
    for backend in ("reference", "cpu", "triton"):
        mine = [v.detach().float().requires_grad_() for v in leaves]
        with using(backend):
            y = fq.fake_quantize(mine[0], "int3", "token", scale=mine[1], zero=mine[2])
            found = torch.autograd.grad(y, mine, slope)
        for ours, numeric in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_learned_clip_follows_omniquants_equation(backend):
    w, slope = drawn(12, (4, 32), 1.0), drawn(13, (4, 32), 1.0)
    gamma, beta = torch.tensor([4.0, 0.5, -1, 2]), torch.tensor([4.0, 1, 0, -0.5])

    def straight(v):
        return v + (v.round() - v).detach()

    leaves = [v.clone().requires_grad_() for v in (w, gamma, beta)]
    top = leaves[1].sigmoid() * w.amax(1)
    bottom = leaves[2].sigmoid() * w.amin(1)
    h = ((top - bottom) / 15)[:, None]
    z = straight(-bottom[:, None] / h)
    code = (straight(leaves[0] / h) + z).clamp(0, 15)
    expected = (code - z) * h
    grads = torch.autograd.grad(expected, leaves, slope)

    mine = [v.clone().requires_grad_() for v in (w, gamma, beta)]
    with using(backend):
        y = fq.learned_clip(*mine, number="int4", per="channel")
        found = torch.autograd.grad(y, mine, slope)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_learned_clip_learns():
    """One outlier a row: training γ alone brings the error well below that of the whole range."""
    w = drawn(14, (8, 64), 0.0)
    w[:, 0] = 12.0
    for number in ("int3", "e2m1"):
        gamma = torch.full((8,), 4.0, requires_grad=True)
        optimizer = torch.optim.Adam([gamma], lr=0.1)
        errors = []
        for _ in range(60):
            # The outlier's own loss is left out, as for a weight whose input is always zero.
            error = (fq.learned_clip(w, gamma, number=number) - w)[:, 1:].square().mean()
            errors.append(error.item())
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        assert errors[-1] < 0.5 * errors[0]


def test_lsq_scale_is_the_scale_with_a_smaller_gradient():
    x = drawn(15, (64,), 1.0)
    step = torch.tensor(0.3, requires_grad=True)
    (plain,) = torch.autograd.grad(fq.fake_quantize(x, "int4", scale=step).square().sum(), step)
    scaled = fq.lsq_scale(step, x, "int4")
    assert scaled.item() == step.item()
    (less,) = torch.autograd.grad(fq.fake_quantize(x, "int4", scale=scaled).square().sum(), step)
    torch.testing.assert_close(less, plain / math.sqrt(64 * 7))


def test_ways_to_choose_a_scale():
    x = torch.cat([torch.linspace(-1, 1, 199), torch.tensor([50.0])])
    for number, high in (("int8", 127), ("e4m3", 448), ("e2m1", 6)):
        torch.testing.assert_close(fq.scale_of(x, number)[0], torch.tensor(50.0 / high))
        cut = fq.scale_of(x, number, by="percentile", share=0.99)[0]
        torch.testing.assert_close(cut, x.abs().sort().values[197] / high)
        whole = fq.scale_of(x, number, by="percentile", share=1.0)[0]
        torch.testing.assert_close(whole, fq.scale_of(x, number)[0])
    scale, zero = fq.scale_of(x, "int8", symmetric=False)
    torch.testing.assert_close(scale, torch.tensor(51.0 / 255))
    assert zero == 5
    scale, zero = fq.scale_of(x + 60, "int8", symmetric=False)  # zero stays exact
    assert zero == 0
    assert fq.scale_of(x[:0].view(0, 4), per="token")[0].shape == (0,)


def test_shapes_of_scales():
    x = drawn(16, (2, 3, 8))
    shapes = {"tensor": (), "channel": (2,), "token": (2, 3), "group": (2, 3, 2)}
    for per, shape in shapes.items():
        scale, zero = fq.scale_of(x, "int4", per, 4, symmetric=False)
        assert scale.shape == shape and zero.shape == shape
        given_scale = fq.fake_quantize(x, "int4", per, 4, scale=scale, zero=zero)
        torch.testing.assert_close(
            given_scale, fq.fake_quantize(x, "int4", per, 4, False), rtol=0, atol=0
        )
    # A token's scale is its own: another's values do not move it.
    other = x.clone()
    other[1] = 1000
    same(fq.fake_quantize(x, "int4", "token")[0], fq.fake_quantize(other, "int4", "token")[0])


@pytest.mark.filterwarnings("ignore:invalid value")  # NaN in Triton's interpreter
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("number", ["int4", "e2m1", "e4m3"])
def test_nan_and_infinity(backend, number):
    nan, inf = math.nan, math.inf
    x = torch.tensor(
        [[1, -3, nan, 2], [0.5, inf, 1, 2], [0, 0, -0.0, 0], [1, 2, 3, -inf], [4, 3, 2, 1]]
    )
    with using(backend):
        one = torch.full((5,), 0.5)
        y = fq.fake_quantize(x, number, "token", scale=one)
        top = fq.codes(number).max() / 2
        assert y[0].isnan().tolist() == [False, False, True, False]
        assert y[1, 1] == top and -y[3, 3] >= top and y.isfinite().sum() == 19
        for affine in (False, True):
            if affine and number != "int4":
                continue
            y = fq.fake_quantize(x, number, "token", symmetric=not affine)
            assert y[[0, 1, 3]].isnan().all() and y[[2, 4]].isfinite().all()
            assert (y[2] == 0).all()
            with using("reference"):
                same(y, fq.fake_quantize(x, number, "token", symmetric=not affine))
        assert fq.fake_quantize(x, number).isnan().all()
        huge = torch.tensor([[3e38, -3e38]] * 2)
        assert fq.fake_quantize(huge, number, "token").isfinite().all()
        assert fq.fake_quantize(torch.full((2, 2), 1e-44), number, "token").isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_empty_and_single_values(backend):
    with using(backend):
        for shape in ((0,), (0, 8), (4, 0), (2, 0, 8)):
            for per in ("tensor", "channel", "token"):
                assert fq.fake_quantize(torch.zeros(shape), "int4", per).shape == shape
        one = torch.tensor(2.5)
        torch.testing.assert_close(fq.fake_quantize(one, "int4"), one)
        torch.testing.assert_close(
            fq.fake_quantize(one.view(1, 1), "e2m1", "token"), one.view(1, 1)
        )
        assert fq.learned_clip(torch.zeros(0, 4), torch.zeros(0)).shape == (0, 4)


def test_long_rows_are_cut_into_pieces():
    """Longer than a thread's piece, and than a program's block: sums over all pieces."""
    x, slope = drawn(17, (2, 20001), 1.0), drawn(18, (2, 20001), 0.0)
    scale = 0.5 * fq.scale_of(x, "int4", "token")[0]
    found = {}
    for backend in ("reference", "cpu", "triton"):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        with using(backend):
            y = fq.fake_quantize(leaves[0], "int4", "token", scale=leaves[1])
            ranged = fq.fake_quantize(x, "int4", "token", symmetric=False)
            found[backend] = y, ranged, *torch.autograd.grad(y, leaves, slope)
    for backend in ("cpu", "triton"):
        for ours, expected in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "says, call",
    [
        ("x is int64", lambda x: fq.fake_quantize(x.long())),
        ("x is a list", lambda x: fq.fake_quantize([1.0])),
        ('number is "int9"', lambda x: fq.fake_quantize(x, "int9")),
        ('number is "fp4"', lambda x: fq.scale_of(x, "fp4")),
        ("symmetric is False", lambda x: fq.fake_quantize(x, "e2m1", symmetric=False)),
        ('per is "row"', lambda x: fq.fake_quantize(x, per="row")),
        ("group is 5", lambda x: fq.fake_quantize(x, per="group", group=5)),
        ("group is 0", lambda x: fq.fake_quantize(x, per="group", group=0)),
        ("x is one number", lambda x: fq.fake_quantize(x[0, 0], per="token")),
        ("scale is [3]", lambda x: fq.fake_quantize(x, per="channel", scale=torch.ones(3))),
        ("scale is float64", lambda x: fq.fake_quantize(x, scale=torch.ones(()).double())),
        ("scale is on meta", lambda x: fq.fake_quantize(x, scale=torch.ones((), device="meta"))),
        ("zero is [2]", lambda x: fq.fake_quantize(x, scale=torch.ones(()), zero=torch.ones(2))),
        ("zero is given", lambda x: fq.fake_quantize(x, zero=torch.ones(()))),
        ("zero is missing", lambda x: fq.fake_quantize(x, symmetric=False, scale=torch.ones(()))),
        ('by is "mse"', lambda x: fq.scale_of(x, by="mse")),
        ('by is "percentile"', lambda x: fq.scale_of(x, by="percentile", share=1.5)),
        ("x is [0, 8]; a scale", lambda x: fq.scale_of(x[:0])),
        ("gamma is [2]", lambda x: fq.learned_clip(x, torch.ones(2))),
        ("beta is [2]", lambda x: fq.learned_clip(x, torch.ones(4), torch.ones(2))),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line(says, call):
    with pytest.raises(BookError) as error:
        call(torch.randn(4, 8))
    assert says in str(error.value) and "\n" not in str(error.value)
