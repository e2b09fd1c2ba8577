"""The TopK sparse autoencoder's pieces against dense autograd, torch.topk and naive loops."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels import sparse_decode, topk, topk_sae
from lib.kernels.dispatch import using

BACKENDS = ("reference", "cpu", "triton")
FEW = settings(max_examples=25, deadline=None)


def made(seed, n, m, d, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return random(n, d), random(m, d), random(m), random(m, d), random(d)


def close(a, b, tolerance=1e-5):
    """Equal to ``tolerance`` of the largest entry."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.numel():
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)


def same(a, b):
    assert a.indices.equal(b.indices)
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=0, equal_nan=True)
    assert (a.starts is None) == (b.starts is None)
    assert a.starts is None or a.starts.equal(b.starts)


def naive(scores, k, by):
    """Set of (token, latent): a Python sort with NaN first, then ties by place."""
    table = scores.tolist()
    cells = [(t, i) for t in range(len(table)) for i in range(scores.shape[1])]
    groups = {}
    for cell in cells:
        groups.setdefault({"token": cell[0], "latent": cell[1], "batch": 0}[by], []).append(cell)
    found = set()
    for name, group in groups.items():
        budget = int(k[name]) if isinstance(k, torch.Tensor) else k

        def rank(cell):
            value = table[cell[0]][cell[1]]
            return (0, 0, cell) if value != value else (1, -value, cell)

        found |= set(sorted(group, key=rank)[:budget])
    return found


def pairs(chosen):
    if chosen.starts is None:
        return {(t, i) for t, row in enumerate(chosen.indices.tolist()) for i in row}
    return set(
        zip(sparse_decode.owners(chosen.starts).tolist(), chosen.indices.tolist(), strict=True)
    )


@FEW
@given(
    n=st.integers(0, 5),
    m=st.integers(1, 300),
    k=st.integers(1, 320),
    by=st.sampled_from(topk.WAYS),
    kind=st.sampled_from(["normal", "ties", "zeros", "odd", "transposed"]),
    seed=st.integers(0, 99),
)
def test_selection(n, m, k, by, kind, seed):
    g = torch.Generator().manual_seed(seed)
    scores = (
        torch.randn(m, n, generator=g).T if kind == "transposed" else torch.randn(n, m, generator=g)
    )
    if kind == "ties":
        scores = scores.round()
    elif kind == "zeros":
        scores = scores.relu() * torch.where(torch.rand(n, m, generator=g) < 0.5, -1.0, 1.0)
    elif kind == "odd":
        odd = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0])
        scores = torch.where(
            torch.rand(n, m, generator=g) < 0.2,
            odd[torch.randint(5, (n, m), generator=g)],
            scores,
        )
    with using("reference"):
        expected = topk.select(scores, k, by)
    with using("cpu"):
        found = topk.select(scores, k, by)
    assert pairs(expected) == naive(scores, k, by)
    same(found, expected)
    if by == "token":
        most = min(k, m)
        torch.testing.assert_close(
            found.values, scores.topk(most).values, rtol=0, atol=0, equal_nan=True
        )
    if kind == "normal":
        with using("cpu"):
            assert topk.select(scores.double(), k, by).indices.equal(expected.indices)


@pytest.mark.parametrize("m,k", [(4608, 32), (4608, 700), (1000, 1), (2048, 2048)])
def test_selection_at_size(m, k):
    scores = torch.randn(9, m, generator=torch.Generator().manual_seed(m))
    scores[1] = scores[1].round()
    scores[2] = 1.0
    scores[3, 5:] = float("nan")
    scores[3, 0] = float("inf")  # before the NaN, and still ranked after it
    scores[4, 7] = float("inf")
    scores[5] = scores[5].relu()
    scores[6] *= 3e38
    scores[7] *= 1e-40
    scores[8, :9] = torch.nan
    with using("reference"):
        expected = topk.select(scores, k)
    same(topk.select(scores, k), expected)


@pytest.mark.parametrize("by", ["token", "latent"])
def test_budgets(by):
    scores = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    size = 40 if by == "token" else 70
    k = torch.randint(0, 9, (size,), generator=torch.Generator().manual_seed(1))
    k[0], k[1] = 0, 1000
    found = topk.select(scores, k, by)
    assert pairs(found) == naive(scores, k, by)
    with using("reference"):
        same(topk.select(scores, k, by), found)
    with pytest.raises(BookError, match=r"k has the budget -1"):
        topk.select(scores, torch.full((size,), -1), by)


def ragged(seed, n, m, most):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, n)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return torch.from_numpy(rng.integers(0, m, int(counts.sum()))), starts


def dense(values, indices, starts, m):
    """The [n, m] matrix that the pairs stand for; repeated pairs add up."""
    n = len(starts) - 1
    place = sparse_decode.owners(starts) * m + indices
    return values.new_zeros(n * m).index_add(0, place, values).view(n, m)


def gradients(output, tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(output.shape, generator=g, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad((output * weight).sum(), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(0, 7),
    m=st.integers(1, 9),
    d=st.integers(1, 40),
    most=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
)
def test_decode(backend, n, m, d, most, dtype, strided):
    indices, starts = ragged(n + m, n, m, most)
    g = torch.Generator().manual_seed(d)
    values = torch.randn(len(indices), generator=g).to(dtype).requires_grad_()
    W = torch.randn(d, m, generator=g).T if strided else torch.randn(m, d, generator=g)
    W, b = W.to(dtype).requires_grad_(), torch.randn(d, generator=g).to(dtype).requires_grad_()
    expected = dense(values, indices, starts, m) @ W + b
    with using(backend):
        found = topk_sae.decode(values, indices, W, b, starts)
        close(found, expected)
        for ours, theirs in zip(
            gradients(found, (values, W, b)), gradients(expected, (values, W, b)), strict=True
        ):
            close(ours, theirs)


def test_decode_against_embedding_bag():
    _, _, _, W, b = made(0, 1, 60, 33)
    scores = torch.randn(50, 60, generator=torch.Generator().manual_seed(3))
    chosen = topk.select(scores, 7)
    theirs = F.embedding_bag(chosen.indices, W, per_sample_weights=chosen.values, mode="sum") + b
    close(topk_sae.decode(chosen.values, chosen.indices, W, b), theirs)


def step(x, W_enc, b_enc, W_dec, b_dec, k, by="token", **options):
    """The sparse autoencoder's loss, from the pieces."""
    found = topk_sae.encode(x, W_enc, b_enc, k, by, b_dec, **options)
    x_hat = topk_sae.decode(found.values, found.indices, W_dec, b_dec, found.starts)
    return F.mse_loss(x_hat, x), found


def plain(x, W_enc, b_enc, W_dec, b_dec, k, by="token", centred=True, relu=True):
    """A dense autoencoder as everyone writes it: relu, topk, scatter, product, autograd."""
    z = (x - b_dec if centred else x) @ W_enc.T + b_enc
    flat = {"token": z, "latent": z.T, "batch": z.view(1, -1)}[by]
    k = min(k, flat.shape[1])
    mask = torch.zeros_like(flat).scatter(1, flat.topk(k, dim=1).indices, 1.0)
    mask = mask.T if by == "latent" else mask.view_as(z)
    z = (z.relu() if relu else z) * mask
    x_hat = z @ W_dec + b_dec
    return F.mse_loss(x_hat, x), x_hat


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", topk.WAYS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_step_is_dense_autograd(backend, by, centred, relu):
    n, m, d = (12, 20, 17) if backend == "triton" else (70, 90, 65)
    inputs = [p.requires_grad_() for p in made(1, n, m, d)]
    with torch.no_grad():
        inputs[2][: m // 2] -= 60  # half of the latents are dead
    k = {"token": 5, "latent": 4, "batch": 5 * n}[by]
    expected, x_hat = plain(*inputs, k, by, centred, relu)
    theirs = torch.autograd.grad(expected, inputs)
    x, W_enc, b_enc, W_dec, b_dec = inputs
    with using(backend):
        parts = topk_sae.encode(x, W_enc, b_enc, k, by, b_dec if centred else None, relu)
        found = topk_sae.decode(parts.values, parts.indices, W_dec, b_dec, parts.starts)
        ours = torch.autograd.grad(F.mse_loss(found, x), inputs)
    close(found, x_hat)
    for one, two in zip(ours, theirs, strict=True):
        close(one, two)
    if by == "token":  # choice by another rule: values from the indices alone
        values = topk_sae.encode_at(x, W_enc, b_enc, parts.indices, None, b_dec, relu)
        dense_values = ((x - b_dec) @ W_enc.T + b_enc).gather(1, parts.indices)
        dense_values = dense_values.relu() if relu else dense_values
        close(values, dense_values)
        wants = (x, W_enc, b_enc, b_dec)
        for one, two in zip(gradients(values, wants), gradients(dense_values, wants), strict=True):
            close(one, two)


@pytest.mark.parametrize("k,m", [(1, 1), (9, 9), (50, 9), (3, 600)])
@pytest.mark.parametrize("n", [1, 2, 1100])
def test_sizes(k, m, n):
    """k ≥ m, one token, one latent, more tokens than a piece; all dead; few positive."""
    for shift in (0.0, -2.0, -1000.0):
        inputs = [p.requires_grad_() for p in made(n, n, m, 6)]
        with torch.no_grad():
            inputs[2] += shift
        expected, _ = plain(*inputs, k)
        total, chosen = step(*inputs, k)
        assert chosen.values.shape == (n, min(k, m)) and (chosen.values >= 0).all()
        close(total, expected)
        total.backward()
        for ours, p in zip(inputs, torch.autograd.grad(expected, inputs), strict=True):
            close(ours.grad, p)


def test_nothing_to_encode():
    x, W_enc, b_enc, W_dec, b_dec = (p.requires_grad_() for p in made(0, 0, 8, 5))
    chosen = topk_sae.encode(x, W_enc, b_enc, 3, centre=b_dec)
    found = topk_sae.decode(chosen.values, chosen.indices, W_dec, b_dec)
    assert chosen.values.shape == (0, 3) and found.shape == (0, 5)
    found.sum().backward()
    assert W_enc.grad.eq(0).all() and W_dec.grad.eq(0).all()
    for by in ("latent", "batch"):
        assert pairs(topk_sae.encode(x, W_enc, b_enc, 3, by)) == set()
    assert topk_sae.encode(x, W_enc, b_enc, 3, bfloat16=True).values.shape == (0, 3)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("by", topk.WAYS)
def test_gradcheck(backend, by):
    inputs = [p.requires_grad_() for p in made(4, 6, 10, 4, torch.float64)]
    with using(backend):
        assert torch.autograd.gradcheck(lambda *p: step(*p, 3, by)[0], inputs)


def test_gradients_where_asked():
    inputs = made(5, 20, 30, 8)
    inputs[3].requires_grad_()
    total, chosen = step(*inputs, 4)
    assert not chosen.values.requires_grad
    total.backward()
    assert inputs[3].grad is not None and inputs[1].grad is None
    inputs[1].requires_grad_()
    theirs = torch.autograd.grad(plain(*inputs, 4)[0], inputs[1:4:2])
    for one, two in zip(
        torch.autograd.grad(step(*inputs, 4)[0], inputs[1:4:2]), theirs, strict=True
    ):
        close(one, two)


def test_same_on_every_run_and_thread_count():
    inputs = [p.requires_grad_() for p in made(6, 300, 200, 33)]
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        W_grad = torch.autograd.grad(step(*inputs, 8)[0], inputs)[1:4:2]
        runs.append(W_grad)
    torch.set_num_threads(threads)
    assert runs[1][0].equal(runs[2][0]) and runs[1][1].equal(runs[2][1])
    close(runs[0][0], runs[1][0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("m,k", [(700, 16), (20, 16), (8, 16), (300, 70)])
def test_bfloat16_candidates(backend, m, k, caplog):
    x, W_enc, b_enc, _, _ = (p.requires_grad_() for p in made(7, 600, m, 64))
    recall = []
    with using(backend), caplog.at_level(logging.INFO, "lib.kernels.topk_sae"):
        found = topk_sae.encode(x, W_enc, b_enc, k, bfloat16=True, recall=recall)
        exact = topk_sae.encode(x, W_enc, b_enc, k)
    hits = sum(
        len(set(a) & set(b))
        for a, b in zip(found.indices.tolist(), exact.indices.tolist(), strict=True)
    )
    assert hits / exact.indices.numel() > 0.999 and 0.99 < recall[0] <= 1
    assert "recall" in caplog.text
    expected = (x @ W_enc.T + b_enc).gather(1, found.indices).relu()
    close(found.values, expected)  # scored in float32, not in bfloat16
    assert (found.values.diff(dim=1) <= 0).all()
    for a, b in zip(
        gradients(found.values, (x, W_enc)), gradients(expected, (x, W_enc)), strict=True
    ):
        close(a, b)


def test_recall_is_a_measurement():
    """Latents that bfloat16 cannot tell apart: candidates miss, and the recall says so."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, 64, generator=g)
    W = base + 1e-4 * torch.randn(500, 64, generator=g)
    recall = []
    topk_sae.encode(
        base + 0 * torch.randn(40, 64), W, torch.zeros(500), 8, bfloat16=True, recall=recall
    )
    assert recall[0] < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter
def test_nan_and_infinity_stay_with_their_token(backend, odd):
    x, W_enc, b_enc, W_dec, b_dec = made(8, 6, 12, 5)
    x[2, 1] = odd
    with using(backend):
        chosen = topk_sae.encode(x, W_enc, b_enc, 3)
        out = topk_sae.decode(chosen.values, chosen.indices, W_dec, b_dec)
    assert not out[2].isfinite().any()
    keep = [0, 1, 3, 4, 5]
    assert out[keep].isfinite().all()
    clean = topk_sae.encode(x[keep], W_enc, b_enc, 3)
    assert chosen.indices[keep].equal(clean.indices)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda a: a | {"x": a["x"][0]}, "x is"),
        (lambda a: a | {"x": a["x"].half()}, "x is float16"),
        (lambda a: a | {"x": a["x"].tolist()}, "x is a list"),
        (lambda a: a | {"W_enc": a["W_enc"].T}, "W_enc is"),
        (lambda a: a | {"W_enc": a["W_enc"].double()}, "W_enc is float64"),
        (lambda a: a | {"b_enc": a["b_enc"][1:]}, "b_enc is"),
        (lambda a: a | {"W_dec": a["W_dec"][:, 1:]}, "b_dec is"),
        (lambda a: a | {"W_dec": a["W_dec"][:1]}, "indices run"),
        (lambda a: a | {"b_dec": a["b_dec"][1:]}, "centre is"),
        (lambda a: a | {"b_dec": a["b_dec"].double()}, "centre is float64"),
        (lambda a: a | {"W_dec": a["W_dec"].to("meta")}, "W_dec is on meta"),
        (lambda a: a | {"k": 0}, "k is 0"),
        (lambda a: a | {"k": 2.5}, "k is 2.5"),
        (lambda a: a | {"k": torch.ones(3, dtype=torch.int64)}, "k is"),
        (lambda a: a | {"by": "row"}, "by is"),
        (lambda a: a | {"by": "latent", "bfloat16": True}, "bfloat16=True needs"),
    ],
)
def test_bad_input_to_the_step(change, words):
    names = ("x", "W_enc", "b_enc", "W_dec", "b_dec")
    arguments = dict(zip(names, made(0, 4, 8, 5), strict=True)) | {"k": 2}
    with pytest.raises(BookError, match=words) as caught:
        step(**change(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"indices": torch.tensor([[0, 8]])}, "indices run from 0 to 8"),
        ({"indices": torch.tensor([[-1, 1]])}, "indices run from -1"),
        ({"indices": torch.tensor([[0, 1]], dtype=torch.int32)}, "indices is int32"),
        ({"indices": torch.tensor([[0, 1, 2]])}, "indices is"),
        ({"values": torch.ones(1, 2).half()}, "values is float16"),
        ({"W_dec": torch.ones(8, 4)}, "b_dec is"),
        (
            {
                "values": torch.ones(2),
                "indices": torch.tensor([0, 1]),
                "starts": torch.tensor([0, 1]),
            },
            "starts must",
        ),
        (
            {
                "values": torch.ones(2),
                "indices": torch.tensor([0, 1]),
                "starts": torch.tensor([0, 3, 2]),
            },
            "starts must",
        ),
    ],
)
def test_bad_input_to_decode(change, words):
    good = {
        "values": torch.ones(1, 2),
        "indices": torch.tensor([[0, 1]]),
        "W_dec": torch.ones(8, 5),
        "b_dec": torch.ones(5),
    }
    with pytest.raises(BookError, match=words):
        topk_sae.decode(**(good | change))
    with pytest.raises(BookError, match="indices choose for 1 tokens; x has 2"):
        topk_sae.encode_at(torch.ones(2, 5), torch.ones(8, 5), torch.ones(8), good["indices"])
    with pytest.raises(BookError, match="scores is float16"):
        topk.select(torch.ones(2, 3).half(), 1)
