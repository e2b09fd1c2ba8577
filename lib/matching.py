"""Match the units of two layers or two models one to one: neurons, latents, directions.

``costs`` and ``correlations`` say how well unit i of A fits unit j of B; ``assign`` picks the best
one-to-one pairing by the Hungarian method (scipy's ``linear_sum_assignment``); ``compose`` chains
pairings through layers.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib.errors import BookError


def costs(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Squared distances between units, summed over several weight matrices.

    Args:
        pairs: (A, B) with a unit a row: A [n, d], B [m, d]; or vectors [n] and [m], such as biases.
            n and m are the same in all pairs, d need not be.

    Returns:
        [n, m]: ``Σ ‖A[i] − B[j]‖²``, never below 0.

    Raises:
        BookError: no pair, or shapes that do not fit.
    """
    if not pairs:
        raise BookError("costs needs at least one pair of weights: costs((A, B))")
    total = 0
    for a, b in pairs:
        a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise BookError(
                f"costs compares rows of equal length, not shapes {list(a.shape)} and "
                f"{list(b.shape)}"
            )
        square = a.pow(2).sum(1)[:, None] + b.pow(2).sum(1) - 2 * a @ b.T
        if not isinstance(total, int) and total.shape != square.shape:
            raise BookError(
                f"the pairs compare different units: {list(total.shape)} and {list(square.shape)}"
            )
        total = total + square.clamp_min(0)
    return total


def correlations(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r of every unit of one with every unit of the other, on the same samples.

    Args:
        x: activations [samples, n]; y: [samples, m].

    Returns:
        [n, m]; 0 where a unit never changes.

    Raises:
        BookError: different numbers of samples, or fewer than two.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise BookError(
            f"correlations needs the same two samples or more a row, not shapes {list(x.shape)} "
            f"and {list(y.shape)}"
        )
    x, y = (z - z.mean(0) for z in (x, y))
    x, y = (torch.where(z.norm(dim=0) > 0, z / z.norm(dim=0).clamp_min(1e-30), 0) for z in (x, y))
    return x.T @ y


def assign(scores: Tensor, maximise: bool = True) -> Tensor:
    """The one-to-one pairing with the best total: unit i of A goes with ``assign(scores)[i]`` of B.

    Args:
        scores: [n, m] with n ≤ m; similarities, or costs with ``maximise=False``.

    Returns:
        int64 [n], every entry different; a permutation where n = m.

    Raises:
        BookError: more rows than columns, or entries that are not finite.
    """
    if scores.ndim != 2 or scores.shape[0] > scores.shape[1]:
        raise BookError(f"assign needs [n, m] with n ≤ m, not {list(scores.shape)}: transpose it")
    if not scores.isfinite().all():
        raise BookError("assign needs finite scores: there are NaN or infinite entries")
    _, columns = linear_sum_assignment(scores.detach().cpu().numpy(), maximize=maximise)
    return torch.from_numpy(columns).to(scores.device)


def compose(*pairings: Tensor) -> Tensor:
    """Chain pairings: A to B, then B to C, … : int64 [n] with ``last[… second[first]]``."""
    if not pairings:
        raise BookError("compose needs at least one pairing")
    chained = pairings[0]
    for following in pairings[1:]:
        if chained.numel() and int(chained.max()) >= len(following):
            raise BookError(
                f"a pairing names unit {int(chained.max())}, the next one has {len(following)}"
            )
        chained = following[chained]
    return chained
