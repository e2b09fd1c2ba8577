"""The Walsh–Hadamard transform beside the dense matrix, on every backend."""

import pytest
import scipy.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import hadamard
from lib.kernels.dispatch import using

BACKENDS = ("reference", "cpu", "triton")
SIZES = (1, 2, 4, 8, 12, 16, 20, 28, 32, 36, 64, 128, 144, 192, 256, 288, 576, 1024)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def dense(x, transpose=False, normalised=True):
    """The oracle: x times the matrix, in float64."""
    h = hadamard.matrix(x.shape[-1], dtype=torch.float64).to(x.device)
    y = x.double() @ (h if transpose else h.T)
    return y / x.shape[-1] ** 0.5 if normalised else y


def close(got, want, dtype):
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-30)
    )


@pytest.fixture(params=[0, hadamard.DENSE], ids=["kernel", "as it is"])
def threshold(request, monkeypatch):
    """Small sizes go to torch's product; with the threshold at 0 they test the kernel too."""
    monkeypatch.setattr(hadamard, "DENSE", request.param)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 1024])
def test_powers_of_two_are_scipys_matrix(n):
    assert torch.equal(hadamard.matrix(n), torch.tensor(scipy.linalg.hadamard(n)).float())


@pytest.mark.parametrize("n", [12, 20, 28, 36, 44, 60, 76, 576, 960, 1536])
def test_block_matrices_are_hadamard(n):
    h = hadamard.matrix(n)
    assert h.abs().eq(1).all() and torch.equal(h @ h.T, n * torch.eye(n))


def test_papers_first_block_is_not_symmetric():
    assert not torch.equal(hadamard.paley(12), hadamard.paley(12).T)  # so transposes are tested
    assert torch.equal(hadamard.paley(36), hadamard.paley(36).T)


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from(SIZES),
    lead=st.lists(st.integers(0, 4), max_size=2),
    dtype=st.sampled_from(hadamard.FLOATS),
    backend=st.sampled_from(BACKENDS),
    layout=st.sampled_from(["contiguous", "every other", "transposed"]),
    how=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    serial=st.sampled_from([0, hadamard.SERIAL]),
    small=st.sampled_from([0, hadamard.DENSE]),
    seed=st.integers(0, 9),
)
@example(  # the block and its scale were multiplied in float32
    n=144, lead=[], dtype=torch.float64, backend="cpu", layout="contiguous",
    how=(True, False, False), serial=0, small=0, seed=0,
)  # fmt: skip
def test_equals_the_dense_product(n, lead, dtype, backend, layout, how, serial, small, seed):
    normalised, transpose, inplace = how
    random = torch.Generator().manual_seed(seed)
    shape = [*lead, n]
    if layout == "every other":
        x = torch.randn(*lead, 2 * n, generator=random).to(dtype)[..., ::2]
    elif layout == "transposed" and len(shape) > 1:
        x = torch.randn(*shape, generator=random).mT.to(dtype).contiguous().mT
    else:
        x = torch.randn(shape, generator=random).to(dtype)
    want = dense(x, transpose, normalised)
    before, kept = x.clone(), (hadamard.SERIAL, hadamard.DENSE)
    try:
        hadamard.SERIAL, hadamard.DENSE = serial, small
        with using(backend):
            y = hadamard.transform(x, normalised=normalised, transpose=transpose, inplace=inplace)
    finally:
        hadamard.SERIAL, hadamard.DENSE = kept
    assert y.dtype == dtype and y.shape == x.shape
    assert (y is x) if inplace else torch.equal(x, before)
    close(y, want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [4096, 8192, 576, 1536])
def test_large_rows_and_many_of_them(backend, n):
    x = torch.randn(9 if backend != "triton" else 2, n)
    with using(backend):
        y = hadamard.transform(x)
        back = hadamard.transform(y, transpose=True)
    close(y, dense(x), torch.float32)
    close(back, x.double(), torch.float32)  # a rotation, undone


def test_triton_joins_kernels_for_long_rows():
    x = torch.randn(1, 2**14)
    with using("triton"):
        close(hadamard.transform(x), hadamard.transform(x.double()), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")  # Triton's interpreter, of 0 · inf in padding
@pytest.mark.parametrize("n", [32, 144, 256])
def test_a_value_that_is_not_finite_fills_its_row_alone(backend, bad, n):
    x = torch.randn(3, n)
    x[1, 5] = bad
    with using(backend):
        y = hadamard.transform(x)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()
    assert torch.equal(y.isnan(), dense(x).isnan())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("n", [8, 12, 36, 48])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradient(backend, n, transpose, threshold):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    with using(backend):
        f = lambda x: hadamard.transform(x, transpose=transpose)  # noqa: E731
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)
        assert torch.autograd.gradcheck(lambda x: hadamard.transform(x * 2, inplace=True), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_in_place_is_seen_by_autograd(backend):
    w = torch.randn(2, 144, requires_grad=True)
    x = torch.randn(2, 144)
    product = (w * x).sum()  # keeps x for its backward
    with using(backend):
        hadamard.transform(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with using(backend), pytest.raises(RuntimeError, match="leaf"):
        hadamard.transform(w, inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_ones_own(backend):
    block = torch.tensor(scipy.linalg.hadamard(4)).float()[[2, 0, 1, 3]]  # not symmetric
    x = torch.randn(3, 64, requires_grad=True)
    h = hadamard.matrix(64, block=block)
    with using(backend):
        y = hadamard.transform(x, block=block)
        y.pow(2).cumsum(-1).sum().backward()
    close(y.detach(), (x.detach() @ h.T / 8).double(), torch.float32)
    again = x.detach().clone().requires_grad_()
    (again @ h.T / 8).pow(2).cumsum(-1).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-3)


def test_wrong_input_is_named():
    x = torch.randn(2, 8)
    with pytest.raises(BookError, match="^x is int64; it must be float32"):
        hadamard.transform(torch.ones(8, dtype=torch.int64))
    with pytest.raises(BookError, match=r"^x is \[\]; it must be \[\.\.\., n\]"):
        hadamard.transform(torch.tensor(1.0))
    with pytest.raises(BookError, match="^x is a list"):
        hadamard.transform([1.0])
    for n in (0, 3, 6, 172):
        with pytest.raises(BookError, match=f"^x has {n} columns; no Hadamard matrix"):
            hadamard.transform(torch.ones(2, n))
    with pytest.raises(BookError, match=r"^block \[4, 4\] is no Hadamard matrix"):
        hadamard.transform(x, block=torch.ones(4, 4))
    with pytest.raises(BookError, match=r"^block is \[4, 3\]; it must be \[m, m\]"):
        hadamard.transform(x, block=torch.ones(4, 3))
    with pytest.raises(BookError, match=r"^x has 8 columns; with a block of 12"):
        hadamard.transform(x, block=hadamard.paley(12))
    with pytest.raises(BookError, match="^x is expanded"):
        hadamard.transform(torch.randn(1, 8).expand(3, 8), inplace=True)
