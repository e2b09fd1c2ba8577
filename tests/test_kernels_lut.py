"""Lookup-table GEMV: backends against the reference, storage and rounding against plain loops."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import lut, shift_add
from lib.kernels.dispatch import using
from lib.kernels.lookup import TILE

PROPERTY = settings(max_examples=40, deadline=None)
FEW = settings(max_examples=8, deadline=None)  # Triton's interpreter takes its time
groups = st.sampled_from([32, 64, 128])
dtypes = st.sampled_from(lut.FLOATS)


def matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(rows, 1, generator=generator))
    return spread * torch.randn(rows, columns, generator=generator) + 0.1


def vectors(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(y, expected, x, w, dtype=torch.float32):
    """Equal up to the rounding of sums: a share of Σ|w||x|, and of the dtype that comes back."""
    assert y.dtype == dtype and y.shape == expected.shape
    unit = 2e-6 if dtype == torch.float32 else 1e-2
    room = unit * (x.float().abs() @ w.abs().T) + 1e-6
    assert ((y.float() - expected.float()).abs() <= room).all()


def backend_agrees(backend, packed, unpack, mv, x):
    with using("reference"):
        expected = mv(packed, x)
    with using(backend):
        y = mv(packed, x)
    w = unpack(packed)
    near(y, expected, x, w, x.dtype)
    near(y, x.float() @ w.T, x, w, x.dtype)  # an oracle that knows no planes


@PROPERTY
@given(
    st.integers(1, 150), st.integers(1, 300), st.integers(1, 8), groups, st.integers(0, 40), dtypes
)
def test_the_cpu_kernel_is_the_reference(rows, columns, bits, group, batch, dtype):
    packed = lut.pack(matrix(rows, columns), bits, group)
    x = vectors((batch, columns) if batch else columns, dtype)
    backend_agrees("cpu", packed, lut.unpack, lut.mv, x)


@FEW
@given(st.integers(1, 70), st.integers(1, 100), st.integers(1, 8), groups, st.integers(0, 2))
def test_the_triton_kernel_is_the_reference(rows, columns, bits, group, batch):
    packed = lut.pack(matrix(rows, columns), bits, group)
    x = vectors((batch, columns) if batch else columns)
    backend_agrees("triton", packed, lut.unpack, lut.mv, x)


@PROPERTY
@given(st.integers(1, 9), st.integers(1, 140), st.integers(1, 8), groups)
def test_levels_are_the_nearest_of_an_even_grid(rows, columns, bits, group):
    w = matrix(rows, columns, seed=rows)
    stored = lut.unpack(lut.pack(w, bits, group))
    for r in range(rows):
        for start in range(0, columns, group):
            part, got = w[r, start : start + group], stored[r, start : start + group]
            step = (part.max() - part.min()) / (2**bits - 1)
            slack = 2e-3 * (part.abs().max() + step)  # scale and offset are float16
            assert (got - part).abs().max() <= step / 2 + slack
            assert len(got.unique()) <= 2**bits


def test_bits_are_taken_in_order():
    """One row of known codes, decoded by hand from the words."""
    w = torch.arange(8.0).repeat(4)[None]  # 0 … 7 four times, exactly on a 3-bit grid
    packed = lut.pack(w, 3, 32)
    words = [packed.words[0, 0, p, 0].item() for p in range(3)]
    codes = [sum((words[p] >> k & 1) << (2 - p) for p in range(3)) for k in range(32)]
    assert codes == [int(v) for v in w[0]]
    torch.testing.assert_close(lut.unpack(packed), w, rtol=0, atol=4e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_memory_is_saved(bits):
    rows, columns, group = 640, 2048, 128
    packed = lut.pack(matrix(rows, columns), bits, group)
    assert packed.words.nbytes == rows * columns * bits // 8
    assert packed.nbytes == rows * columns * bits // 8 + 4 * rows * columns // group
    tensors = [t for t in vars(packed).values() if isinstance(t, torch.Tensor)]
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    assert packed.bits == bits + 0.25


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1), (0, 0), (1, 33), (65, 1)])
def test_empty_and_single(backend, rows, columns):
    packed = lut.pack(matrix(rows, columns), 3)
    assert lut.unpack(packed).shape == (rows, columns)
    with using(backend):
        for shape in [(columns,), (0, columns), (1, columns), (2, 1, columns)]:
            y = lut.mv(packed, vectors(shape))
            assert y.shape == (*shape[:-1], rows)
            torch.testing.assert_close(y, vectors(shape) @ lut.unpack(packed).T)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spreads_alike(backend, bad):
    packed = lut.pack(matrix(70, 100), 2, 32)
    x = vectors((3, 100))
    x[1, 37] = bad
    with using("reference"):
        expected = lut.mv(packed, x)
    with using(backend):
        y = lut.mv(packed, x)
    assert expected[[0, 2]].isfinite().all() and not expected[1].isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_strides_do_not_matter():
    w, x = matrix(130, 96), vectors((96, 7)).T
    assert not x.is_contiguous()
    packed = lut.pack(w.T.contiguous().T, 4)
    torch.testing.assert_close(lut.unpack(packed), lut.unpack(lut.pack(w, 4)), rtol=0, atol=0)
    torch.testing.assert_close(lut.mv(packed, x), lut.mv(packed, x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [lut.AT_ONCE, lut.AT_ONCE + 1, lut.MANY, lut.MANY + 1])
def test_large_batches_are_cut_and_then_dense(batch):
    packed, x = lut.pack(matrix(66, 70), 3, 32), vectors((batch, 70))
    near(lut.mv(packed, x), x @ lut.unpack(packed).T, x, lut.unpack(packed))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: lut.pack(torch.zeros(3), 3), r"weight is \[3\]; it must be \[rows, columns\]"),
        (lambda: lut.pack(torch.zeros(3, 4).long(), 3), "weight is int64"),
        (lambda: lut.pack([[1.0]], 3), "weight is a list"),
        (lambda: lut.pack(torch.zeros(3, 4), 9), "bits is 9; .* from 1 to 8"),
        (lambda: lut.pack(torch.zeros(3, 4), 3, 48), "group is 48; .* multiple of 32"),
        (lambda: lut.pack(torch.full((3, 4), float("nan")), 3), "weight holds NaN"),
        (lambda: lut.pack(torch.full((3, 4), 1e6), 3), "beyond float16"),
        (lambda: lut.pack(torch.zeros(3, 4, requires_grad=True), 3), "no gradient"),
        (lambda: lut.mv(PACKED, torch.zeros(5)), r"x is \[5\]; .* the matrix's 4"),
        (lambda: lut.mv(PACKED, torch.zeros(())), r"x is \[\]"),
        (lambda: lut.mv(PACKED, torch.zeros(4).long()), "x is int64; it must be float32"),
        (lambda: lut.mv(PACKED, torch.zeros(4, device="meta")), "packed is on cpu, x on meta"),
        (lambda: lut.mv(PACKED, torch.zeros(4, requires_grad=True)), "no gradient"),
    ],
)
def test_errors_name_the_argument(wrong, words):
    with pytest.raises(BookError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


PACKED = lut.pack(torch.ones(3, 4), 3)

OTHER_CPU = """
import torch
from lib.kernels import lut, shift_add
from lib.kernels.dispatch import using
torch.manual_seed(0)
w, x = torch.randn(70, 90), torch.randn(2, 90)
cases = [(lut, lut.pack(w, 3, 32)), (shift_add, shift_add.pack(w, 2, 32)),
         (shift_add, shift_add.pack_dense_shift(w, 3))]
for room, packed in cases:
    with using("cpu"):
        y = room.mv(packed, x)
    torch.testing.assert_close(y, x @ room.unpack(packed).T, rtol=1e-4, atol=1e-4)
print("right")
"""


@pytest.mark.skipif(lut.lookup.numba is None, reason="needs Numba")
@pytest.mark.parametrize("features", ["", "+avx,+avx2,+fma"])
def test_a_cpu_with_less_gives_the_same(features):
    """The code for CPUs without AVX-512, and without AVX2, made on this one."""
    here = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    run = [sys.executable, "-c", OTHER_CPU]
    done = subprocess.run(run, env=here, capture_output=True, text=True, timeout=240)
    assert done.stdout == "right\n", done.stderr


def test_tiles_are_what_the_kernel_takes():
    assert lut.pack(matrix(65, 33), 2).words.shape == (2, 2, 2, TILE)
    assert shift_add.pack_dense_shift(matrix(65, 33), 3).words.shape == (2, 4, 1, TILE)
