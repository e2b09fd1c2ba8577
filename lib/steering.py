"""One harness for every method that steers a language model: its effect beside its cost.

A *steering vector* is added to a site of the residual stream while the model runs. Three vectors
set the scale for any other: the difference of two means, a random direction of the same norm, and
none at all (a prompt that asks for the same). The effect is judged from outside the model, by
classifiers that come inside wheels; the cost is what the same edit does to text that should have
been left alone.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lib import hooks, models
from lib.errors import BookError


def mean_difference(to: Tensor, away: Tensor) -> Tensor:
    """The mean of ``to`` [n, ...] minus the mean of ``away`` [m, ...]: the shape without axis 0.

    Raises:
        BookError: an empty set, or activations of two shapes.
    """
    if not len(to) or not len(away) or to.shape[1:] != away.shape[1:]:
        raise BookError(
            f"a mean difference needs [n, ...] and [m, ...] of one shape with n, m > 0; "
            f"got {list(to.shape)} and {list(away.shape)}"
        )
    return to.mean(0) - away.mean(0)


def random_like(vector: Tensor, seed: int = 0) -> Tensor:
    """Random directions, each as long as ``vector``'s along the last axis."""
    drawn = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.to(vector)
    return drawn * (vector.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def steered(
    model, vectors: Mapping[str, Tensor], strength: float = 1.0, positions: hooks.Positions = None
) -> AbstractContextManager:
    """While it lasts, ``strength * vectors[site]`` is added at every site (see ``hooks.edit``).

    Args:
        vectors: [d_model] each, or what broadcasts to [batch, pos, d_model].
        positions: which tokens; ``None``: all, those generated included.
    """
    edits = {site: hooks.add(vector, strength) for site, vector in vectors.items()}
    return hooks.edit(model, edits, positions=positions)


# --- text ------------------------------------------------------------------------------------


def prompt(tokenizer, text: str, system: str | None = None) -> str:
    """A user's message in the form that the chat model was tuned on, up to where it answers.

    Without ``system``, the tokenizer's template puts in the model's own default.

    Raises:
        BookError: a model that was never tuned to chat.
    """
    if tokenizer.chat_template is None:
        raise BookError("this model's tokenizer has no chat template; pass chat=False")
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    n_new: int = 24,
    system: str | None = None,
    chat: bool = True,
    seed: int | None = None,
    batch: int = 16,
) -> list[str]:
    """What the model says next, one text a prompt; edits of an outer context apply.

    Args:
        n_new: tokens at most; an answer ends earlier where the model ends it.
        system: the system message; also the baseline that only asks (chat models).
        chat: whether to wrap prompts in the model's chat template.
        seed: draws from the model's distribution (temperature 1) with this seed; ``None``: greedy.
        batch: prompts at a time, padded on the left. Under padding a prompt's tokens are counted
            from the end, so edit all positions or negative ones.

    Raises:
        BookError: a system message without the chat template to put it in.
    """
    if system is not None and not chat:
        raise BookError("a system message needs chat=True; put it into the prompts instead")
    texts = [prompt(tokenizer, text, system) for text in prompts] if chat else list(prompts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths: little padding
    said = [""] * len(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                padding_side="left",
                add_special_tokens=not chat,
                return_tensors="pt",
            ).to(model.device)
            tokens = model.generate(
                **inputs,
                max_new_tokens=n_new,
                do_sample=seed is not None,
                temperature=None if seed is None else 1.0,
                top_k=None if seed is None else 0,
                top_p=None if seed is None else 1.0,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = tokens[:, inputs.input_ids.shape[1] :]
            for i, row in zip(chosen, new, strict=True):
                said[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return said


# --- cost ------------------------------------------------------------------------------------


@torch.inference_mode()
def cost(
    model, ids: Tensor, context: Callable[[], AbstractContextManager], batch: int = 8
) -> dict[str, float]:
    """What an edit does to text that it was not meant for.

    Args:
        ids: [n, pos] tokens of ordinary prose.
        context: returns a fresh context in which the model is steered (``lambda: steered(…)``).

    Returns:
        ``perplexity`` and ``perplexity_plain``; ``kl``, KL(steered ‖ plain) of the next token's
        distribution, and ``entropy`` and ``entropy_plain``, means over all positions in nats.
    """
    sums = dict.fromkeys(("loss", "loss_plain", "kl", "entropy", "entropy_plain"), 0.0)
    for part in ids.split(batch):
        plain = model(part).logits.float().log_softmax(-1)
        with context():
            new = model(part).logits.float().log_softmax(-1)
        for name, logp in (("", new), ("_plain", plain)):
            picked = logp[:, :-1].gather(-1, part[:, 1:, None])
            sums["loss" + name] -= float(picked.mean()) * len(part)
            sums["entropy" + name] -= float((logp.exp() * logp).sum(-1).mean()) * len(part)
        sums["kl"] += float((new.exp() * (new - plain)).sum(-1).mean()) * len(part)
    means = {name: value / len(ids) for name, value in sums.items()}
    return {
        "perplexity": math.exp(means["loss"]),
        "perplexity_plain": math.exp(means["loss_plain"]),
        **{name: means[name] for name in ("kl", "entropy", "entropy_plain")},
    }


@torch.inference_mode()
def speed(
    model, ids: Tensor, context: Callable[[], AbstractContextManager], n_new: int = 16, times=3
) -> float:
    """Tokens a second in ``generate`` at batch 1 under an edit: a median of ``times`` runs."""
    taken = []
    for _ in range(times + 1):  # the first run warms up
        with context():
            begun = time.perf_counter()
            model.generate(
                ids[:1], max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=0
            )
            taken.append(time.perf_counter() - begun)
    return n_new / float(np.median(taken[1:]))


# --- judges from outside ---------------------------------------------------------------------


def sentiment(texts: Sequence[str]) -> np.ndarray:
    """From −1, wholly negative, to 1: [n]. VADER's lexicon and rules (Hutto and Gilbert, 2014)."""
    judge = _vader()
    return np.array([judge.polarity_scores(text)["compound"] for text in texts])


def profanity(texts: Sequence[str]) -> np.ndarray:
    """The probability that a text is profane, [n]: a linear classifier over words (its package,
    alt-profanity-check, was trained on 200,000 labelled comments)."""
    from profanity_check import predict_prob

    return np.asarray(predict_prob(list(texts))) if len(texts) else np.zeros(0)


def topic(texts: Sequence[str], topics: Sequence[str]) -> np.ndarray:
    """How near each text is to each topic: [texts, topics], cosines of MiniLM's vectors."""
    return (_sentences(texts) @ _sentences(topics).T).numpy()


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@cache
def _minilm():
    return models.load("minilm", device="cpu")


@torch.inference_mode()
def _sentences(texts: Sequence[str]) -> Tensor:
    """Unit vectors [n, 384]: the mean over tokens of MiniLM's last layer."""
    encoder, tokenizer = _minilm()
    inputs = tokenizer(
        list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    states = encoder(**inputs).last_hidden_state
    mask = inputs.attention_mask[..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
