"""Shift-and-add products: backends against the reference, quantizers against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import lut
from lib.kernels import shift_add as sa
from lib.kernels.dispatch import using
from tests.test_kernels_lut import FEW, backend_agrees, dtypes, groups, matrix, vectors

PROPERTY = settings(max_examples=25, deadline=None)
sizes = (st.integers(1, 140), st.integers(1, 200))


def packed_of(kind, rows, columns, bits, group=64, seed=0):
    if kind == "dense shift":
        return sa.pack_dense_shift(matrix(rows, columns, seed), min(max(bits, 2), 4))
    return sa.pack(matrix(rows, columns, seed), bits, group, terms=1 + rows % 3, rounds=2)


kinds = st.sampled_from(["dense shift", "binary codes"])


@PROPERTY
@given(kinds, *sizes, st.integers(1, 4), groups, st.integers(0, 40), dtypes)
def test_the_cpu_kernel_is_the_reference(kind, rows, columns, bits, group, batch, dtype):
    packed = packed_of(kind, rows, columns, bits, group)
    x = vectors((batch, columns) if batch else columns, dtype)
    backend_agrees("cpu", packed, sa.unpack, sa.mv, x)


@FEW
@given(kinds, st.integers(1, 70), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2))
def test_the_triton_kernel_is_the_reference(kind, rows, columns, bits, batch):
    packed = packed_of(kind, rows, columns, bits, 32)
    x = vectors((batch, columns) if batch else columns)
    backend_agrees("triton", packed, sa.unpack, sa.mv, x)


def test_a_byte_is_a_power_of_two():
    byte = torch.arange(256, dtype=torch.uint8)
    for b, value in zip(range(256), sa.power(byte).tolist(), strict=True):
        e = b & 127
        assert value == (0 if e == 0 else (-1 if b > 127 else 1) * 2.0 ** (e - 95))


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 70), st.integers(0, 1000))
def test_every_weight_takes_the_nearest_sum(bits, terms, columns, seed):
    """Brute force over the 2^bits sums of each group's own factors."""
    w = matrix(3, columns, seed)
    packed = sa.pack(w, bits, 32, terms)
    stored = sa.unpack(packed)
    factors = sa.power(packed.scales)[0].permute(2, 0, 1).unflatten(2, (bits, terms)).sum(-1)
    for r, g in itertools.product(range(3), range(packed.scales.shape[1])):
        part = slice(32 * g, 32 * g + 32)
        alphas = factors[r, g].tolist()
        sums = [
            sum(a * s for a, s in zip(alphas, signs, strict=True))
            for signs in itertools.product([1, -1], repeat=bits)
        ]
        gaps = (w[r, part, None] - torch.tensor(sums)).abs().amin(-1)
        torch.testing.assert_close((stored[r, part] - w[r, part]).abs(), gaps)


def test_one_bit_is_the_papers_first_step():
    """sign(w), and mean |w| rounded in the logarithm to a power of two."""
    w = matrix(40, 64)
    alpha = torch.exp2(w.abs().mean(1, keepdim=True).log2().round())
    torch.testing.assert_close(sa.unpack(sa.pack(w, 1, 64)), w.sign() * alpha)


def test_alternating_wins_and_terms_win():
    w = matrix(64, 256)

    def error(**options):
        return (sa.unpack(sa.pack(w, 3, 128, **options)) - w).square().sum().item()

    assert error(terms=3, rounds=15) < 0.8 * error(terms=3, rounds=0)
    assert error(terms=3) < error(terms=1)
    assert error(terms=1, rounds=15) <= error(terms=1, rounds=1)


def test_codes_that_fit_come_back():
    """A matrix of that form is stored without error."""
    signs = vectors((70, 96, 2)).sign()
    w = (signs * torch.tensor([1.0, 0.25])).sum(-1)
    torch.testing.assert_close(sa.unpack(sa.pack(w, 2, 32)), w, rtol=0, atol=0)
    shifts = torch.randint(0, 8, (70, 96), generator=torch.Generator().manual_seed(0))
    w = vectors((70, 96)).sign() * torch.exp2(shifts - 11.0)
    torch.testing.assert_close(sa.unpack(sa.pack_dense_shift(w, 4)), w, rtol=0, atol=0)


@PROPERTY
@given(st.integers(1, 9), st.integers(1, 60), st.sampled_from([2, 3, 4]), st.integers(0, 1000))
def test_dense_shift_is_the_nearest_power_and_never_zero(rows, columns, bits, seed):
    w = matrix(rows, columns, seed)
    w[0, 0] = 0
    packed = sa.pack_dense_shift(w, bits)
    scale = sa.power(packed.scales).flatten()[:rows]
    grid = 2.0 ** torch.arange(2 ** (bits - 1))
    stored = sa.unpack(packed)
    assert (stored != 0).all()
    for r in range(rows):
        points = torch.cat([grid, -grid]) * scale[r]
        best = (w[r, :, None] - points).abs().amin(-1)
        torch.testing.assert_close((stored[r] - w[r]).abs(), best)
        errors = [  # the scale itself, among its neighbours
            (w[r, :, None] - points * 2.0**e).abs().amin(-1).square().sum() for e in (-1, 0, 1)
        ]
        top = w[r].abs().max().log2().ceil()
        if top - scale[r].log2() - (2 ** (bits - 1) - 1) in (1, 2, 3):  # inside what is tried
            assert errors[1] <= min(errors) * (1 + 1e-4)


def test_memory_is_saved():
    rows, columns = 640, 1920
    weights = rows * columns
    for bits in (1, 2, 3, 4):
        packed = sa.pack(matrix(rows, columns), bits, 128, rounds=0)
        assert packed.nbytes == weights * bits // 8 + weights * bits // 128
        assert packed.bits == bits * (1 + 1 / 16)
    for bits, each in ((2, 16), (3, 10), (4, 8)):
        packed = sa.pack_dense_shift(matrix(rows, columns), bits)
        assert packed.nbytes == 4 * weights // each + rows
        held = [t for t in vars(packed).values() if isinstance(t, torch.Tensor)]
        assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in held)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1), (1, 33), (65, 1)])
def test_empty_and_single(backend, rows, columns):
    w = matrix(rows, columns)
    for packed in (sa.pack(w, 2), sa.pack_dense_shift(w, 3)):
        assert sa.unpack(packed).shape == (rows, columns)
        with using(backend):
            for shape in [(columns,), (0, columns), (2, 1, columns)]:
                y = sa.mv(packed, vectors(shape))
                torch.testing.assert_close(y, vectors(shape) @ sa.unpack(packed).T)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["dense shift", "binary codes"])
def test_what_is_not_finite_spreads_alike(kind, backend, bad):
    packed = packed_of(kind, 70, 100, 3, 32)
    x = vectors((3, 100))
    x[1, 37] = bad
    with using("reference"):
        expected = sa.mv(packed, x)
    with using(backend):
        y = sa.mv(packed, x)
    assert not expected[1].isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_zeros_cost_nothing_with_binary_codes():
    assert not sa.unpack(sa.pack(torch.zeros(3, 40), 3)).any()


@pytest.mark.parametrize("batch", [lut.MANY, lut.MANY + 1])
def test_large_batches_are_dense(batch):
    packed, x = sa.pack_dense_shift(matrix(66, 70), 3), vectors((batch, 70))
    torch.testing.assert_close(sa.mv(packed, x), x @ sa.unpack(packed).T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: sa.pack(torch.zeros(3), 3), r"weight is \[3\]"),
        (lambda: sa.pack(torch.zeros(3, 4), 7), "bits is 7; .* from 1 to 6"),
        (lambda: sa.pack(torch.zeros(3, 4), 3, terms=4), "terms is 4; .* 1, 2 or 3"),
        (lambda: sa.pack(torch.zeros(3, 4), 3, 100), "group is 100"),
        (lambda: sa.pack_dense_shift(torch.zeros(3, 4), 5), "bits is 5; it must be 2, 3 or 4"),
        (lambda: sa.pack_dense_shift(torch.full((3, 4), torch.inf)), "weight holds NaN, infinity"),
        (lambda: sa.mv(PACKED, torch.zeros(5)), r"x is \[5\]; .* the matrix's 4"),
        (lambda: sa.mv(PACKED, torch.zeros(4).double()), "x is float64"),
        (lambda: sa.mv(PACKED, torch.zeros(4, device="meta")), "x on meta"),
        (lambda: sa.mv(PACKED, torch.zeros(4, requires_grad=True)), "no gradient"),
    ],
)
def test_errors_name_the_argument(wrong, words):
    with pytest.raises(BookError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


PACKED = sa.pack_dense_shift(torch.ones(3, 4), 3)
