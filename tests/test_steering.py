"""The steering harness on the real model: what it adds, what it says, what it costs."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lib import datasets, hooks, models, steering
from lib.errors import BookError


@pytest.fixture(scope="module")
def loaded():
    return models.load("smollm2", device="cpu")


@pytest.fixture(scope="module")
def ids(loaded):
    _, tokenizer = loaded
    return (
        tokenizer(datasets.moby_dick()[50_000:51_000], return_tensors="pt")
        .input_ids[:, :96]
        .view(3, 32)
    )


def test_the_vectors():
    to, away = torch.randn(5, 3, 8), torch.randn(4, 3, 8)
    vector = steering.mean_difference(to, away)
    assert torch.allclose(vector, to.mean(0) - away.mean(0)) and vector.shape == (3, 8)
    drawn = steering.random_like(vector, 1)
    assert torch.allclose(drawn.norm(dim=-1), vector.norm(dim=-1))
    assert torch.equal(drawn, steering.random_like(vector, 1))
    assert not torch.equal(drawn, steering.random_like(vector, 2))
    for bad in (torch.zeros(0, 3, 8), torch.zeros(4, 8)):
        with pytest.raises(BookError, match="mean difference"):
            steering.mean_difference(to, bad)


def test_steered_adds_the_vector_where_told_and_leaves_no_trace(loaded, ids):
    model, _ = loaded
    vector = torch.randn(hooks.shape(model)["d_model"])
    plain = hooks.read(model, ids, "resid_post.3")["resid_post.3"]
    with steering.steered(model, {"resid_post.3": vector}, 2.0, positions=5):
        new = hooks.read(model, ids, "resid_post.3")["resid_post.3"]
    assert torch.allclose(new[:, 5] - plain[:, 5], 2 * vector.expand(3, -1), atol=1e-4)
    assert torch.equal(new[:, :5], plain[:, :5]) and torch.equal(new[:, 6:], plain[:, 6:])
    assert torch.equal(hooks.read(model, ids, "resid_post.3")["resid_post.3"], plain)


def test_batches_and_padding_do_not_change_what_is_said(loaded):
    model, tokenizer = loaded
    asked = ["Name a colour.", "What is the capital of France? Answer in one word.", "Say hello."]
    together = steering.generate(model, tokenizer, asked, n_new=8)
    alone = [steering.generate(model, tokenizer, [text], n_new=8)[0] for text in asked]
    assert together == alone
    assert "Paris" in together[1]
    assert not any("assistant" in text for text in together)


def test_drawn_text_follows_its_seed_and_leaves_the_reader_s_alone(loaded):
    model, tokenizer = loaded
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = (
        steering.generate(model, tokenizer, ["Tell me a story."], n_new=12, seed=seed)
        for seed in (1, 1, 2)
    )
    assert a == b != c
    assert torch.equal(torch.rand(1), wanted)


def test_prompts_that_cannot_be_made(loaded):
    model, tokenizer = loaded
    assert steering.prompt(tokenizer, "Hi", "Be brief.").startswith("<|im_start|>system\nBe brief.")
    with pytest.raises(BookError, match="chat=True"):
        steering.generate(model, tokenizer, ["Hi"], system="Be brief.", chat=False)
    with pytest.raises(BookError, match="no chat template"):
        steering.prompt(models.load("minilm")[1], "Hi")


def test_cost_is_zero_for_no_edit_and_right_for_one(loaded, ids):
    model, _ = loaded
    free = steering.cost(model, ids, nullcontext, batch=2)
    assert free["kl"] == 0 and free["perplexity"] == free["perplexity_plain"]
    vector = steering.random_like(torch.full((hooks.shape(model)["d_model"],), 2.0))
    context = lambda: steering.steered(model, {"resid_post.9": vector})  # noqa: E731
    paid = steering.cost(model, ids, context, batch=2)
    whole = steering.cost(model, ids, context, batch=3)
    assert all(math.isclose(paid[name], whole[name], rel_tol=1e-4) for name in paid)
    with torch.inference_mode():  # the definitions, written out
        plain = model(ids).logits
        with context():
            new = model(ids).logits
    kl = torch.nn.functional.kl_div(
        plain.log_softmax(-1), new.log_softmax(-1), log_target=True, reduction="none"
    )
    assert math.isclose(paid["kl"], float(kl.sum(-1).mean()), rel_tol=1e-4) and paid["kl"] > 0.01
    entropy = torch.distributions.Categorical(logits=new).entropy().mean()
    assert math.isclose(paid["entropy"], float(entropy), rel_tol=1e-4)
    loss = torch.nn.functional.cross_entropy(new[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(paid["perplexity"], float(loss.exp()), rel_tol=1e-4)
    assert paid["perplexity"] > paid["perplexity_plain"]


def test_judges_know_plain_cases():
    good, bad = "What a wonderful, happy day, I love it!", "This is awful, I hate every bit of it."
    assert steering.sentiment([good])[0] > 0.5 > -0.5 > steering.sentiment([bad])[0]
    clean, rude = steering.profanity(["The ship left at noon.", "What the fuck, you asshole."])
    assert clean < 0.3 < 0.9 < rude
    near = steering.topic(
        ["Both teams scored in the last minute."], ["a football match", "cooking"]
    )
    assert near.shape == (1, 2) and near[0, 0] > near[0, 1] + 0.1
    assert np.all(np.abs(steering.topic(["a", "a much longer text than that"], ["a"])) <= 1 + 1e-5)
    assert len(steering.profanity([])) == len(steering.sentiment([])) == 0


def test_speed_counts_tokens(loaded, ids):
    model, _ = loaded
    assert steering.speed(model, ids, nullcontext, n_new=4, times=1) > 0
