"""Products and MLPs that skip rows beside a loop over rows, on every backend and in a model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lib.errors import BookError
from lib.kernels import sparse_mlp as kernel
from lib.kernels.dispatch import using
from lib.kernels.sparse_mlp import calibrate, gated_mlp, pack, sparse_mlp
from lib.kernels.sparse_mv import masked_mv, sparse_mv

BACKENDS = ("reference", "cpu", "triton")
DRAWS = settings(max_examples=25, deadline=None)
NAN, INF = math.nan, math.inf


def loop(x, gate, up, down, thresholds, act):
    """The oracle: one channel after the other, in float64."""
    x, gate, up, down = (t.double().numpy() for t in (x, gate, up, down))
    y = np.zeros(len(down))
    for i, t in enumerate(thresholds.tolist()):
        s = float(gate[i] @ x)
        g = max(s, 0.0) if act == "relu" else s / (1 + math.exp(-s))
        if abs(g) > t:
            y += g * float(up[i] @ x) * down[:, i]
    return torch.from_numpy(y)


def problem(seed, d, n, act="silu", share=0.5):
    """x, gate, up, down and thresholds that no gate comes near, so that rounding decides none."""
    torch.manual_seed(seed)
    gate, up, down = torch.randn(n, d), torch.randn(n, d), torch.randn(d, n)
    x = torch.randn(d) / max(d, 1) ** 0.5
    g = kernel.ACTS[act](gate @ x).abs()
    drop = torch.rand(n) < share
    return x, gate, up, down, torch.where(drop, g + 0.01, g - 0.01)


def close(got, want, tolerance=1e-5):
    scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * scale)


# --- the MLP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 99),
    d=st.integers(1, 40),
    n=st.integers(0, 150),
    act=st.sampled_from(("silu", "relu")),
    share=st.sampled_from((0.0, 0.5, 0.9, 1.0)),
    axes=st.sampled_from(((), (1,), (1, 1))),
    strided=st.booleans(),
)
@DRAWS
def test_the_mlp_is_a_loop_over_channels(backend, seed, d, n, act, share, axes, strided):
    x, gate, up, down, thresholds = problem(seed, d, n, act, share)
    want = loop(x, gate, up, down, thresholds, act)
    rows = pack(up, down)
    if strided:
        x, gate, rows = (torch.stack([t, t], -1)[..., 0] for t in (x, gate, rows))
        thresholds = torch.stack([thresholds, thresholds], -1)[..., 0]
    with using(backend):
        got = gated_mlp(x.view(*axes, d), gate, rows, thresholds, act)
    assert got.shape == (*axes, d) and got.dtype == torch.float32
    close(got.view(d), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 129])
def test_the_edges_of_a_block_of_channels(backend, n):
    for share in (0.0, 0.5):
        x, gate, up, down, thresholds = problem(n, 24, n, share=share)
        with using(backend):
            got = gated_mlp(x, gate, pack(up, down), thresholds)
        close(got, loop(x, gate, up, down, thresholds, "silu"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_blocks(threads):
    if kernel.numba is None:
        pytest.skip("Numba is not installed")
    x, gate, up, down, thresholds = problem(0, 48, 300)
    out = torch.full((48,), NAN)
    arrays = kernel.arrays(x, gate, pack(up, down), thresholds)
    kernel._numba_gated(*arrays, False, threads, out.numpy())
    close(out, loop(x, gate, up, down, thresholds, "silu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_dropped_rows_are_not_used(backend, act):
    x, gate, up, down, thresholds = problem(3, 20, 100, act)
    want = loop(x, gate, up, down, thresholds, act)
    dropped = kernel.ACTS[act](gate @ x).abs() <= thresholds
    assert 20 < dropped.sum() < 80
    up[dropped], down[:, dropped] = NAN, INF
    with using(backend):
        close(gated_mlp(x, gate, pack(up, down), thresholds, act), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_nan_is_kept_and_infinity_passes(backend, act):
    gate, one = torch.eye(4), torch.ones(4, 1)
    rows = pack(one @ torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.eye(4))  # up · x = x[1]
    high = torch.full((4,), 1e30)
    with using(backend):
        got = gated_mlp(torch.tensor([NAN, 2.0, 3.0, 4.0]), gate, rows, high, act)
        assert got.isnan().all()  # up's 0 · NaN: the whole kept channel is NaN, as it should be
        x = torch.tensor([INF, 2.0, 3.0, 4.0])
        rows = pack(one @ torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.eye(4))
        rows[0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        got = gated_mlp(
            x.nan_to_num(posinf=INF), torch.diag(torch.tensor([0.0, 1, 1, 1])), rows, high
        )
        assert got.isnan().any()  # 0 · infinity in a gate
        finite = torch.tensor([1.0, 2.0, 3.0, 4.0])
        none = gated_mlp(finite, gate, rows, torch.full((4,), INF), act)
        assert torch.equal(none, torch.zeros(4))
        every = gated_mlp(finite, gate, rows, torch.full((4,), NAN), act)
        close(every, gated_mlp(finite, gate, rows, torch.full((4,), -1.0), act))
        assert every.abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_at_its_threshold_is_dropped(backend):
    x, gate = torch.ones(1), torch.tensor([[0.5], [0.5], [-0.5]])
    rows = pack(torch.ones(3, 1), torch.tensor([[1.0, 10.0, 100.0]]))
    with using(backend):
        got = gated_mlp(x, gate, rows, torch.tensor([0.5, 0.25, 0.0]), "relu")
    assert got.item() == 5.0  # the first is at its threshold, the third at 0 after the ReLU


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels_no_width(backend):
    with using(backend):
        empty = gated_mlp(torch.ones(3), torch.ones(0, 3), torch.ones(0, 2, 3), torch.ones(0))
        assert torch.equal(empty, torch.zeros(3))
        thin = gated_mlp(torch.ones(0), torch.ones(5, 0), torch.ones(5, 2, 0), torch.ones(5))
        assert thin.shape == (0,)
        none = gated_mlp(torch.ones(0, 3), torch.ones(5, 3), torch.ones(5, 2, 3), torch.ones(5))
        assert none.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    x, gate, up, down, _ = problem(1, 32, 80)
    x, gate, up, down = (t.to(dtype) for t in (x, gate, up, down))
    thresholds = torch.full((80,), -1.0)
    with using(backend):
        got = gated_mlp(x, gate, pack(up, down), thresholds)
    assert got.dtype == dtype
    close(got, loop(x, gate, up, down, thresholds, "silu"), 3e-2)


def test_several_vectors_follow_the_same_rule():
    x, gate, up, down, thresholds = problem(5, 16, 90)
    several = torch.stack([x, -x, 2 * x]).view(3, 1, 16)
    got = gated_mlp(several, gate, pack(up, down), thresholds)
    for one, y in zip(several[:, 0], got[:, 0], strict=True):
        close(y, gated_mlp(one, gate, pack(up, down), thresholds), 1e-4)


# --- the products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 99),
    n=st.integers(0, 90),
    m=st.integers(0, 140),
    kind=st.sampled_from(("number", "thresholds", "mask", "rows")),
    strided=st.booleans(),
)
@DRAWS
def test_products_are_dense_ones_with_zeros(backend, seed, n, m, kind, strided):
    torch.manual_seed(seed)
    w, x, v = torch.randn(n, m), torch.randn(n), torch.randn(m)
    mask = torch.rand(n) < 0.5
    select = {
        "number": 0.5,
        "thresholds": torch.where(mask, x.abs() / 2, x.abs() * 2),
        "mask": mask,
        "rows": mask.nonzero()[:, 0].repeat(2)[torch.randperm(2 * int(mask.sum()))],
    }[kind]
    mask = x.abs() > 0.5 if kind == "number" else mask
    want_x = torch.where(mask, x, 0).double() @ w.double()
    want_v = torch.where(mask, w.double() @ v.double(), 0)
    w[~mask] = NAN
    if strided:
        w, x, v = (torch.stack([t, t], -1)[..., 0] for t in (w, x, v))
    with using(backend):
        close(sparse_mv(w, x, select), want_x)
        if kind in ("mask", "rows"):
            close(masked_mv(w, v, select), want_v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_any_threshold(backend):
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with using(backend):
        assert sparse_mv(w, torch.tensor([NAN, 0.1, 0.2]), 9.0).isnan().all()
        assert sparse_mv(w, torch.tensor([INF, 0.1, 0.2]), 9.0).tolist() == [INF, INF]
        assert sparse_mv(w, torch.tensor([0.0, 1.0, -2.0])).tolist() == [-7.0, -8.0]


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)  # wide gates, so that thresholds matter
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def steps(model, ids):
    """Logits [pos, vocab] token after token through the cache: every step at batch 1."""
    cache, found = None, []
    with torch.no_grad():
        for i in range(len(ids)):
            out = model(ids[None, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_steps_agree_with_one_long_forward(model, ids, backend):
    thresholds = calibrate(model, ids, 0.5)
    dense = model(ids[:1]).logits[0]
    with sparse_mlp(model, thresholds), using(backend):
        close(steps(model, ids[0, :12]), model(ids[:1, :12]).logits[0], 1e-4)
        assert (model(ids[:1]).logits[0] - dense).abs().max() > 0.1  # the thresholds do bite
    with sparse_mlp(model, torch.full_like(thresholds, -1.0)), using(backend):
        close(steps(model, ids[0, :12]), dense[:12], 1e-4)


def test_generate_and_restore(model, ids):
    thresholds = calibrate(model, ids, 0.5)
    options = {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(ids[:1, :4], **options)
    with sparse_mlp(model, thresholds):
        sparse = model.generate(ids[:1, :4], **options)
        with using("reference"):
            assert torch.equal(model.generate(ids[:1, :4], **options), sparse)
        with sparse_mlp(model, torch.full_like(thresholds, -1.0)):
            assert torch.equal(model.generate(ids[:1, :4], **options), before)
        assert torch.equal(model.generate(ids[:1, :4], **options), sparse)
    with pytest.raises(ZeroDivisionError), sparse_mlp(model, thresholds):
        raise ZeroDivisionError
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)
    assert torch.equal(model.generate(ids[:1, :4], **options), before)


def test_a_gradient_takes_the_dense_way(model, ids):
    with sparse_mlp(model, calibrate(model, ids, 0.5)):
        mlp = model.model.layers[0].mlp
        x = torch.randn(1, 1, 32, requires_grad=True)
        y = mlp(x)
        y.sum().backward()
        assert x.grad.abs().sum() > 0
        close(mlp(x.detach()), y.detach())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("act", [None, "relu"])
def test_calibration_gives_the_wanted_sparsity(model, ids, sparsity, act):
    first = model.model.layers[0].mlp
    seen = []
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    thresholds = calibrate(model, ids, sparsity, act=act)
    handle.remove()
    assert thresholds.shape == (3, 80) and thresholds.dtype == torch.float32
    x = seen[0].flatten(0, 1).double()
    g = kernel.ACTS[act or "silu"](x @ first.gate_proj.weight.double().T).abs()
    scale = (x @ first.up_proj.weight.double().T).abs().mean(0)
    dropped = (g.float() <= thresholds[0]).double().mean().item()
    at_zero = (g == 0).double().mean().item()  # a ReLU drops these at any threshold
    assert abs(dropped - (max(sparsity, at_zero) if sparsity else 0)) < 0.005
    if 0 < sparsity < 1 and sparsity > at_zero:  # CHESS: one quantile of |g| E|u|, over E|u|
        cut = np.quantile((g * scale).numpy(), sparsity)
        torch.testing.assert_close(thresholds[0].double(), cut / scale, rtol=5e-3, atol=1e-6)
        plain = calibrate(model, ids, sparsity, "plain", act)
        assert (plain == plain[:, :1]).all()
        assert (
            abs(plain[0, 0].item() - np.quantile(g.numpy(), sparsity)) < 5e-3 * plain[0, 0] + 1e-6
        )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": torch.ones(5)}, "gate is"),
        ({"x": torch.ones(4, dtype=torch.float64)}, "x is float64"),
        ({"x": [1.0]}, "x is a list"),
        ({"gate": torch.ones(6, 4, dtype=torch.bfloat16)}, "gate is bfloat16"),
        ({"gate": torch.ones(4)}, "gate is"),
        ({"gate": torch.ones(6, 4, device="meta")}, "gate is on meta"),
        ({"rows": torch.ones(6, 4)}, "rows is"),
        ({"rows": torch.ones(6, 3, 4)}, "rows is"),
        ({"thresholds": torch.ones(7)}, "thresholds is"),
        ({"thresholds": torch.ones(6).double()}, "thresholds is float64"),
        ({"act": "tanh"}, 'act is "tanh"'),
        ({"x": torch.ones(4, requires_grad=True)}, "gated_mlp has no gradient"),
    ],
)
def test_a_wrong_argument_of_the_mlp_is_named(change, says):
    arguments = {
        "x": torch.ones(4),
        "gate": torch.ones(6, 4),
        "rows": torch.ones(6, 2, 4),
        "thresholds": torch.ones(6),
    }
    with pytest.raises(BookError, match=says) as error:
        gated_mlp(**arguments | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda w, x: sparse_mv(w, torch.ones(3)), "x is"),
        (lambda w, x: sparse_mv(w.double(), x), "w is float64"),
        (lambda w, x: sparse_mv(w, x, torch.ones(3)), "select is"),
        (lambda w, x: sparse_mv(w, x, torch.ones(3, dtype=torch.bool)), "select is"),
        (lambda w, x: sparse_mv(w, x, torch.tensor([0, 4])), "select has rows 0 to 4"),
        (lambda w, x: sparse_mv(w, x, torch.tensor([-1])), "select has rows -1"),
        (lambda w, x: sparse_mv(w, x, torch.tensor([1], dtype=torch.int32)), "select is int32"),
        (lambda w, x: sparse_mv(w, x, "all"), "select is a str"),
        (lambda w, x: masked_mv(w, x[:3], 0.5), "select is a float"),
        (lambda w, x: masked_mv(w, x[:3], torch.ones(4)), "select is float32"),
        (lambda w, x: masked_mv(w, x, torch.ones(4) > 0), "x is"),
        (lambda w, x: sparse_mv(w.requires_grad_(), x), "sparse_mv has no gradient"),
        (lambda w, x: masked_mv(w.requires_grad_(), x[:3], x > 0), "masked_mv has no gradient"),
        (lambda w, x: pack(w, w), "down is"),
        (lambda w, x: pack(w, w.T.double()), "down is float64"),
    ],
)
def test_a_wrong_argument_of_a_product_is_named(call, says):
    with pytest.raises(BookError, match=says):
        call(torch.ones(4, 3), torch.ones(4))


def test_a_wrong_model_or_threshold_is_named(model, ids):
    good = torch.zeros(3, 80)
    with pytest.raises(BookError, match="thresholds is"), sparse_mlp(model, good[:2]):
        pass
    with pytest.raises(BookError, match="thresholds is float64"), sparse_mlp(model, good.double()):
        pass
    with pytest.raises(BookError, match='act is "gelu"'), sparse_mlp(model, good, act="gelu"):
        pass
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(BookError, match="BertModel without gated MLPs"):
        calibrate(BertModel(config), ids, 0.5)
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, mlp_bias=True,
    )  # fmt: skip
    with pytest.raises(BookError, match="bias"):
        calibrate(LlamaForCausalLM(config), ids, 0.5)
    for arguments, says in [
        ((ids, 1.5), "sparsity is 1.5"),
        ((ids, 0.5, "best"), 'rule is "best"'),
        ((ids[0], 0.5), "ids is"),
        ((ids[:, :0], 0.5), "ids is empty"),
        ((ids.float(), 0.5), "ids is float32"),
    ]:
        with pytest.raises(BookError, match=says):
            calibrate(model, *arguments)
