"""The delta product beside the dense one, on every backend, over long streams and broken input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import delta, dispatch
from lib.kernels.dispatch import using

BACKENDS = ("reference", "cpu", "triton")


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 70),
    m=st.sampled_from([0, 1, 5, 64, 131]),
    steps=st.integers(0, 4),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threshold=st.sampled_from([0.0, 0.3, 2.0, "by channel"]),
    backend=st.sampled_from(BACKENDS),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_a_plain_loop(n, m, steps, share, threshold, backend, strided, seed):
    torch.manual_seed(seed)
    w = torch.randn(m, n)
    w_t, x = w.T.contiguous(), torch.randn(n)
    limit = torch.rand(n) if threshold == "by channel" else threshold
    stream, seen = delta.start(w_t, x), x.double().tolist()
    for _ in range(steps):
        x = torch.where(torch.rand(n) < share, torch.randn(n), x)
        given_x = torch.stack((x, x), 1)[:, 0] if strided else x
        with using(backend):
            y = delta.step(w_t, given_x, stream, limit)
        sent = 0
        for i in range(n):
            bound = limit[i].item() if threshold == "by channel" else limit
            if abs(x[i].item() - seen[i]) > bound:
                seen[i], sent = x[i].item(), sent + 1
        assert stream.sent == sent
        assert stream.reference.double().tolist() == seen
        want = w.double() @ torch.tensor(seen, dtype=torch.float64)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(dispatch.numba is None, reason="no Numba")
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("sent", [0, 5, 8, 21])
def test_threads_share_the_outputs(workers, sent):
    w_t, y = torch.randn(40, 5), torch.randn(5)
    index, change = torch.randperm(40)[:sent], torch.randn(sent)
    want = y + change @ w_t[index]
    delta._add_shared(w_t.numpy(), index.numpy(), change.numpy(), y.numpy(), workers)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_small_changes_add_up_and_the_error_stays_bounded(backend):
    """Each change alone is below the threshold; without x̂ nothing would ever be sent."""
    torch.manual_seed(0)
    w_t, x = torch.randn(50, 30), torch.zeros(50)
    stream = delta.start(w_t, x)
    with using(backend):
        for _ in range(500):
            x = x + 0.02 * torch.rand(50)
            y = delta.step(w_t, x, stream, 0.1)
    assert (x - stream.reference).abs().max() <= 0.1 and x.min() > 3
    bound = 0.1 * w_t.abs().sum(0) + 1e-3
    assert ((y - x @ w_t).abs() <= bound).all()
    drift = (y - stream.reference @ w_t).abs().max()
    assert drift < 1e-3  # rounding alone
    delta.refresh(w_t, stream)
    torch.testing.assert_close(stream.output, stream.reference @ w_t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_stream_recovers_from_what_is_not_finite(backend, bad):
    w_t, x = torch.randn(40, 20), torch.randn(40)
    stream = delta.start(w_t, x)
    broken = x.clone()
    broken[3] = bad
    with using(backend):
        assert not delta.step(w_t, broken, stream, 0.5).isfinite().any()
        assert stream.sent == 1
        y = delta.step(w_t, x, stream, 0.5)
    torch.testing.assert_close(y, x @ w_t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_returned_does_not_change_later(backend):
    w_t, x = torch.randn(40, 20), torch.randn(40)
    stream = delta.start(w_t, x)
    with using(backend):
        first = delta.step(w_t, x, stream)
        kept, before = first.clone(), x.clone()
        changed = x.clone()
        changed[:5] += 1
        delta.step(w_t, changed, stream)
    assert torch.equal(first, kept) and torch.equal(x, before)


def test_wrong_input_is_named():
    w_t, x = torch.randn(4, 3), torch.randn(4)
    stream = delta.start(w_t, x)
    with pytest.raises(BookError, match=r"^x is \[3\]; it must be \[n\] with n = 4"):
        delta.step(w_t, torch.randn(3), stream)
    with pytest.raises(BookError, match="^x is float64; it must be float32"):
        delta.start(w_t, x.double())
    with pytest.raises(BookError, match="^w_t is not contiguous"):
        delta.start(torch.randn(3, 4).T, x)
    with pytest.raises(BookError, match="^threshold is -1"):
        delta.step(w_t, x, stream, -1)
    with pytest.raises(BookError, match="^threshold is nan"):
        delta.step(w_t, x, stream, float("nan"))
    with pytest.raises(BookError, match=r"^threshold is \[2\]"):
        delta.step(w_t, x, stream, torch.ones(2))
    with pytest.raises(BookError, match=r"^stream.output is \[3\]; it must be \[m\] with m = 5"):
        delta.step(torch.randn(4, 5), x, stream)
    with pytest.raises(BookError, match="^the delta product has no gradient"):
        delta.step(w_t, x.clone().requires_grad_(), stream)
    with pytest.raises(BookError, match="^x is on meta, w_t on cpu"):
        delta.start(w_t, x.to("meta"))
