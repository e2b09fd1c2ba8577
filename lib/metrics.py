"""Measures that several chapters share, and the margins their verdicts rest on."""

import numpy as np
import torch
from torch import Tensor


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Logit of the right token minus that of the wrong one.

    Args:
        logits: [..., vocab].
        right, wrong: token ids, [...] (they broadcast against the leading axes of ``logits``).

    Returns:
        [...], in nats.
    """
    right, wrong = (torch.as_tensor(t, device=logits.device) for t in (right, wrong))
    right, wrong = (t.expand(logits.shape[:-1])[..., None] for t in (right, wrong))
    return (logits.gather(-1, right) - logits.gather(-1, wrong)).squeeze(-1)


@torch.inference_mode()
def perplexity(model, ids: Tensor) -> float:
    """exp of the mean next-token loss over ``ids`` [batch, pos]."""
    logits = model(ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(losses.exp())


@torch.inference_mode()
def losses(model, ids: Tensor) -> list[float]:
    """Mean next-token loss of each row of ``ids`` [n, pos] in nats, with one forward a row: the
    logits of a whole batch of passages would take hundreds of megabytes."""
    found = []
    for row in ids:
        logits = model(row[None]).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    return found


def beats(a, b, by: float = 0.0) -> bool:
    """Whether ``a`` exceeds ``b`` by more than ``by``, with a margin wider than the seeds' spread.

    Args:
        a, b: one measurement a seed (same seeds, same order); ``b`` may be a single number.
        by: how much more ``a`` must reach, in the same unit.

    Returns:
        mean(a − b) − by > the sample standard deviation of a − b. One seed has no spread, so it
        never suffices.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    differences = np.atleast_1d(a - b)
    if len(differences) < 2:
        raise ValueError("beats needs two seeds or more: one seed has no spread")
    return bool(differences.mean() - by > differences.std(ddof=1))


def interval(values, statistic=np.mean, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval of ``statistic`` over ``values`` (prompts, images, …).

    Args:
        values: [n] or [n, ...]; resampled along the first axis.
        statistic: a function of such an array.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(1000)]
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def fmt(mean: float, spread: float) -> str:
    """``"0.87 ± 0.02"``: a mean to the digits that its spread supports."""
    digits = 2 if spread <= 0 else max(0, 1 - int(np.floor(np.log10(spread))) - 1)
    digits = min(max(digits, 0), 4)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def pm(values, digits: int | None = None) -> str:
    """``"0.87 ± 0.02"``: mean and sample standard deviation of one measurement a seed, to
    ``digits`` places (None: as many as the spread supports).
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError("pm needs two seeds or more: one seed has no spread")
    mean, spread = values.mean(), values.std(ddof=1)
    return fmt(mean, spread) if digits is None else f"{mean:,.{digits}f} ± {spread:,.{digits}f}"
