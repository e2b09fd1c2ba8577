"""Rounding a model's weights: the definitions, and that models come back as they were."""

import pytest
import torch
from torch import nn

from lib import datasets, metrics, models, quantization
from lib.errors import BookError

FIRST = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def loaded():
    return models.load("smollm2", device="cpu")


@pytest.fixture(scope="module")
def ids(loaded):
    _, tokenizer = loaded
    text = datasets.moby_dick()[50_000:51_000]
    return tokenizer(text, return_tensors="pt").input_ids[:, :128].view(4, 32)


@pytest.fixture(scope="module")
def moments(loaded, ids):
    model, _ = loaded
    names = [n for n in quantization.linears(model) if n.startswith("model.layers.0.")]
    return quantization.calibrate(model, ids, names, batch=3)


def error(weight, rounded, second):
    difference = (weight - rounded).double()
    return float(((difference @ second.double()) * difference).sum())


def test_the_linears_are_those_of_the_blocks(loaded):
    names = list(quantization.linears(loaded[0]))
    assert len(names) == 7 * 30 and names[0] == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in names


def test_calibration_is_what_the_layer_read(loaded, ids, moments):
    model, _ = loaded
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, 1))
    )
    model(ids)
    handle.remove()
    (x,) = seen
    got = moments[FIRST]
    assert got.n == 128
    torch.testing.assert_close(got.second, x.T @ x / 128, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got.peak, x.abs().amax(0))
    torch.testing.assert_close(got.mean, x.mean(0), rtol=1e-3, atol=1e-5)
    assert moments["model.layers.0.mlp.gate_proj"] is got, "both read the same tensor"
    assert not model.model.layers[0].mlp.up_proj._forward_pre_hooks


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearest_and_gptq_stay_on_the_grid(loaded, moments, bits, group, symmetric):
    weight = loaded[0].model.layers[0].mlp.up_proj.weight.detach()[:48]
    second = moments[FIRST].second
    rounded = quantization.nearest(weight, bits, group, symmetric)
    repaired = quantization.gptq(weight, second, bits, group, symmetric)
    for values in (rounded, repaired):
        levels = max(len(row.unique()) for row in values.reshape(-1, group or weight.shape[1]))
        assert levels <= 2**bits
    assert error(weight, repaired, second) < error(weight, rounded, second)


def test_gptq_of_uncorrelated_inputs_is_rounding():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    got = quantization.gptq(weight, torch.eye(64), 3, group=32)
    torch.testing.assert_close(got, quantization.nearest(weight, 3, group=32))


def test_clip_shrinks_the_range():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    full, half = (quantization.nearest(weight, 3, clip=c) for c in (1.0, 0.5))
    width = lambda values: values.amax(1) - values.amin(1)  # noqa: E731
    torch.testing.assert_close(width(half), width(full) / 2)


@pytest.mark.parametrize("rows", [48, 900])  # fewer and more than the 576 inputs
def test_low_rank_is_the_best_in_its_norm(moments, rows):
    made = torch.Generator().manual_seed(0)
    wrong = torch.randn(rows, 576, generator=made)
    second = moments[FIRST].second
    plain, aware = (quantization.low_rank(wrong, 8, c) for c in (None, second))
    svd = torch.linalg.svdvals(wrong)
    left = (wrong - plain[0] @ plain[1]).pow(2).sum()
    torch.testing.assert_close(left, svd[8:].pow(2).sum())
    # The truth in C's norm: what the singular values of E C^1/2 leave.
    values, vectors = torch.linalg.eigh(second.double())
    truth = torch.linalg.svdvals(wrong.double() @ vectors * values.clamp(min=0).sqrt())
    for r in (3, 8):
        got = error(wrong, aware[0][:, :r] @ aware[1][:r], second)
        assert got == pytest.approx(float(truth[r:].pow(2).sum()), rel=1e-4)
    assert got < error(wrong, plain[0] @ plain[1], second)


def test_the_model_comes_back(loaded, ids):
    model, _ = loaded
    before = model.model.layers[0].mlp.up_proj.weight
    plain = metrics.perplexity(model, ids)
    with pytest.raises(RuntimeError, match="on purpose"):  # noqa: PT012
        with quantization.swapped(model, {FIRST: torch.zeros_like(before)}):
            with quantization.rounded_inputs(model, 4):
                assert metrics.perplexity(model, ids) != plain
            raise RuntimeError("on purpose")
    assert model.model.layers[0].mlp.up_proj.weight is before
    assert metrics.perplexity(model, ids) == plain


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_inputs_are_rounded_where_asked(loaded, ids, per):
    model, _ = loaded
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    with quantization.rounded_inputs(model, 3, per, [FIRST]):
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids[:1])
        handle.remove()
    parts = seen[0][0] if per == "token" else seen[0].reshape(1, -1)
    assert max(len(part.unique()) for part in parts) <= 8


def test_bad_input_gets_one_line(loaded, ids):
    model, _ = loaded
    weight = torch.randn(4, 64)
    for run, says in (
        (lambda: quantization.calibrate(model, ids, ["nope"]), "nope is no linear of a block"),
        (lambda: quantization.nearest(weight, 4, group=48), "must divide the 64 inputs"),
        (lambda: quantization.nearest(weight[0], 4), r"must be \[out, in\]"),
        (lambda: quantization.nearest(weight, 9), "int9"),
        (lambda: quantization.low_rank(weight, 5), "from 1 to 4"),
        (lambda: quantization.swapped(model, {FIRST: weight}).__enter__(), "it must be"),
        (lambda: quantization.rounded_inputs(model, 4, per="row").__enter__(), "per is"),
        (lambda: quantization.calibrate(nn.Linear(2, 2), ids), "no linear modules"),
    ):
        with pytest.raises(BookError, match=says):
            run()
