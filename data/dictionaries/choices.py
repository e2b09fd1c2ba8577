"""Three ways to choose a token's latents that are no plain budget (see lib.dictionaries).

Used by the chapter and by make_dictionaries.py. Every function returns a choice:
``choice(sae, u, extra) -> Chosen``.
"""

import torch
from torch import Tensor

from lib.dictionaries import Choice
from lib.kernels import topk_sae
from lib.kernels.topk_sae import Chosen, select


def by_gradient(k: int, beta: float = 1.0) -> Choice:
    """g-SAE: the k greatest of f ∘ (1 + β |W_dec g| / mean), g the loss's gradient, as ``extra``.

    W_dec g is how the loss answers to each latent's direction; dividing by its mean over the
    token's latents makes β free of units. The values stay f.
    """

    def choice(sae, u, gradient) -> Chosen:
        with torch.no_grad():
            f = torch.nn.functional.linear(u - sae["b_dec"], sae["W_enc"], sae["b_enc"]).relu()
            effect = (gradient @ sae["W_dec"].T).abs()
            effect /= effect.mean(1, keepdim=True).clamp(min=1e-12)
            found = select(f * (1 + beta * effect), k).indices
        values = topk_sae.encode_at(u, sae["W_enc"], sae["b_enc"], found, centre=sae["b_dec"])
        return Chosen(values, found)

    return choice


def top_afa(most: int) -> Choice:
    """top-AFA: the fewest greatest latents whose norm reaches that of the centred token.

    ‖f‖ should be ‖u − b_dec‖ where directions are nearly orthogonal; ``most`` bounds the number
    (and the work). A token whose ``most`` latents stay below takes all of them.
    """

    def choice(sae, u, extra) -> Chosen:
        with torch.no_grad():
            wide = topk_sae.encode(
                u, sae["W_enc"], sae["b_enc"], most, centre=sae["b_dec"], relu=True
            )
            reach = wide.values.square().cumsum(1)
            target = (u - sae["b_dec"]).square().sum(1, keepdim=True)
            # One more than the number that falls short, but none of value zero.
            keep = torch.cat([target > 0, reach[:, :-1] < target], 1) & (wide.values > 0)
            keep[:, 0] = True
            starts = torch.cat([keep.new_zeros(1).long(), keep.sum(1).cumsum(0)])
            found = wide.indices[keep]
        values = topk_sae.encode_at(
            u, sae["W_enc"], sae["b_enc"], found, starts, centre=sae["b_dec"]
        )
        return Chosen(values, found, starts)

    return choice


def norm_gap(u: Tensor, chosen: Chosen, b_dec: Tensor) -> Tensor:
    """Per token, (‖f‖ − ‖u − b_dec‖)²: what the loss L_AFA presses to zero. [n]"""
    starts = chosen.starts
    if starts is None:
        length = chosen.values.square().sum(1)
    else:
        length = torch.segment_reduce(chosen.values.square(), "sum", offsets=starts, initial=0)
    return ((length + 1e-8).sqrt() - (u - b_dec).norm(dim=1)).square()


def zipf(rate: Tensor) -> tuple[float, float]:
    """Fit rate ≈ c · rank^(−a) to the sorted rates by least squares in logs: (c, a)."""
    ranked = rate[rate > 0].sort(descending=True).values
    rank = torch.arange(1, len(ranked) + 1, dtype=torch.float32)
    A = torch.stack([torch.ones_like(rank), -rank.log()], 1)
    c, a = torch.linalg.lstsq(A, ranked.log()[:, None]).solution.flatten().tolist()
    return float(torch.tensor(c).exp()), a


def zipf_weak(rate: Tensor, share: float = 0.5) -> Tensor:
    """Latents that speak less than ``share`` of what Zipf's law gives their rank: bool [m].

    With the law at zero this would be the dead latents alone: aux_zipf_loss generalises aux_k.
    """
    if not (rate > 0).any():
        return torch.ones_like(rate, dtype=torch.bool)
    c, a = zipf(rate)
    rank = rate.argsort(descending=True).argsort() + 1
    return rate < share * c * rank.float() ** -a


def zipf_shares(rate: Tensor, k: int) -> Tensor:
    """Feature choice's budgets: shares of tokens on the fitted law, ranked as now, summing to k."""
    _, a = zipf(rate)
    rank = rate.argsort(descending=True).argsort() + 1
    share = rank.float() ** -a
    for _ in range(50):  # no latent can have more than every token
        share = (share * (k / share.sum())).clamp(max=0.9)
    return share
