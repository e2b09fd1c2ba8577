"""Binary weights with salient channels: the formula by hand, backends, storage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import binary
from lib.kernels.dispatch import using
from tests.test_kernels_lut import FEW, backend_agrees, dtypes, matrix, vectors

PROPERTY = settings(max_examples=25, deadline=None)
shares = st.sampled_from([0, 0.05, 0.2, 0.5, 1])


def packed_of(rows, columns, keep=0.2, seed=0):
    return binary.pack(matrix(rows, columns, seed), vectors(columns, seed=seed + 1).abs(), keep)


@PROPERTY
@given(st.integers(1, 140), st.integers(1, 200), shares, st.integers(0, 40), dtypes)
def test_the_cpu_kernel_is_the_reference(rows, columns, keep, batch, dtype):
    x = vectors((batch, columns) if batch else columns, dtype)
    backend_agrees("cpu", packed_of(rows, columns, keep), binary.unpack, binary.mv, x)


@FEW
@given(st.integers(1, 70), st.integers(1, 70), shares, st.integers(0, 2))
def test_the_triton_kernel_is_the_reference(rows, columns, keep, batch):
    x = vectors((batch, columns) if batch else columns)
    backend_agrees("triton", packed_of(rows, columns, keep), binary.unpack, binary.mv, x)


@PROPERTY
@given(st.integers(1, 20), st.integers(2, 80), shares, st.integers(0, 1000))
def test_the_formula(rows, columns, keep, seed):
    w, size = matrix(rows, columns, seed), vectors(columns, seed=seed + 1).abs()
    stored = binary.unpack(binary.pack(w, size, keep))
    kept = round(keep * columns)
    salient = torch.zeros(columns, dtype=torch.bool)
    salient[size.topk(kept).indices] = True
    rest = w[:, ~salient]
    if rest.shape[1]:
        mean = rest.mean(1, keepdim=True)
        scale = (rest - mean).abs().mean(1, keepdim=True)
        low, high = mean - scale, mean + scale
        got = stored[:, ~salient]
        room = 1e-3 * (mean.abs() + scale)
        near_low, near_high = (got - low).abs() <= room, (got - high).abs() <= room
        assert (near_low | near_high).all()
        clear = (rest - mean).abs() > room
        assert (near_high[clear] == (rest > mean)[clear]).all()
    if kept:
        part = w[:, salient]
        step = (part.amax(1) - part.amin(1)) / 15
        slack = 2e-3 * (part.abs().amax(1) + step)
        assert ((stored[:, salient] - part).abs().amax(1) <= step / 2 + slack).all()


def test_memory_is_saved():
    rows, columns = 4096, 2560
    packed = packed_of(rows, columns)
    assert (packed.salient.columns, packed.rest.columns) == (512, 2048)
    words, scales, order = rows * (512 * 4 + 2048) // 8, 2 * rows * 4, 4 * columns
    assert packed.nbytes == words + scales + order
    assert packed.bits < 1.64  # 0.2 · 4 + 0.8 of signs and codes; scales and order are the rest
    assert packed.nbytes < rows * columns * 2 / 9  # a ninth of bfloat16


def test_loud_channels_are_worth_their_bits():
    """Where a few inputs are large, keeping their columns beats keeping as many others."""
    w, loud = matrix(256, 320), torch.ones(320)
    loud[torch.randperm(320, generator=torch.Generator().manual_seed(0))[:40]] = 20
    x = vectors((64, 320)) * loud

    def error(activation):
        return (binary.mv(binary.pack(w, activation), x) - x @ w.T).norm() / (x @ w.T).norm()

    assert error(loud) < 0.3 * error(-loud)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1), (1, 33), (65, 1)])
def test_empty_and_single(backend, rows, columns):
    packed = packed_of(rows, columns)
    assert binary.unpack(packed).shape == (rows, columns)
    with using(backend):
        for shape in [(columns,), (0, columns), (2, 1, columns)]:
            y = binary.mv(packed, vectors(shape))
            torch.testing.assert_close(y, vectors(shape) @ binary.unpack(packed).T)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_alike(backend, bad):
    packed, x = packed_of(70, 100), vectors((3, 100))
    x[1, 37] = bad
    with using("reference"):
        expected = binary.mv(packed, x)
    with using(backend):
        y = binary.mv(packed, x)
    assert not expected[1].isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: binary.pack(torch.zeros(3), torch.zeros(3)), r"weight is \[3\]"),
        (lambda: binary.pack(torch.zeros(3, 4), torch.zeros(5)), r"activation is \[5\]"),
        (lambda: binary.pack(torch.zeros(3, 4), torch.zeros(4), 20), "keep is 20; .* from 0 to 1"),
        (lambda: binary.pack(torch.zeros(3, 4), torch.full((4,), torch.nan)), "activation holds"),
        (lambda: binary.pack(torch.full((3, 4), torch.nan), torch.zeros(4)), "weight holds NaN"),
        (lambda: binary.mv(packed_of(3, 4), torch.zeros(5)), r"x is \[5\]; .* the matrix's 4"),
        (lambda: binary.mv(packed_of(3, 4), torch.zeros(4).int()), "x is int32"),
        (lambda: binary.mv(packed_of(3, 4), torch.zeros(4, device="meta")), "x on meta"),
        (lambda: binary.mv(packed_of(3, 4), torch.zeros(4, requires_grad=True)), "no gradient"),
    ],
)
def test_errors_name_the_argument(wrong, words):
    with pytest.raises(BookError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)
