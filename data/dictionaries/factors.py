"""Semi-nonnegative factors of MLP activations, and steering by a direction (make_factors.py)."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import hooks

HERE = Path(__file__).resolve().parent
FIT = 8  # sentences of a concept to fit on; the others are held out
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the stream's mean norm


def concepts() -> dict:
    """``prompts``, and ``concepts``: name -> ``sentences``, ``words``; made for the book (CC0)."""
    return json.loads((HERE / "concepts.json").read_text(encoding="utf-8"))


def snmf(A: Tensor, k: int, keep: float = 0.1, steps: int = 100, seed: int = 0):
    """A ≈ Z Y with Y ≥ 0, Z sparse (Ding, Li and Jordan 2010; winners by Shafran et al. 2025).

    Args:
        A: [d_mlp, n]; keep: the share of neurons that each feature may use.

    Returns:
        (Z [d_mlp, k], Y [k, n], relative squared errors, one a step).
    """
    g = torch.Generator().manual_seed(seed)
    Y = torch.rand(k, A.shape[1], generator=g) + 0.01
    winners, errors = max(1, int(keep * len(A))), []
    for _ in range(steps):
        ridge = 1e-4 * torch.eye(k) * Y.square().sum() / k
        Z = torch.linalg.solve(Y @ Y.T + ridge, Y @ A.T).T
        cut = Z.abs().topk(winners, dim=0).values[-1]
        Z = torch.where(Z.abs() >= cut, Z, 0)
        Z = Z / Z.norm(dim=0).clamp(min=1e-8)
        P, Q = Z.T @ A, Z.T @ Z
        up = P.clamp(min=0) + (-Q).clamp(min=0) @ Y
        down = (-P).clamp(min=0) + Q.clamp(min=0) @ Y
        Y = Y * (up / down.clamp(min=1e-8)).sqrt()
        errors.append(((A - Z @ Y).square().sum() / A.square().sum()).item())
    return Z, Y, errors


def coefficients(A: Tensor, Z: Tensor, steps: int = 50) -> Tensor:
    """Y ≥ 0 for new tokens, Z fixed: [k, n]."""
    P, Q = Z.T @ A, Z.T @ Z
    Y = P.clamp(min=0) + 1e-3
    for _ in range(steps):
        up = P.clamp(min=0) + (-Q).clamp(min=0) @ Y
        Y = Y * (up / ((-P).clamp(min=0) + Q.clamp(min=0) @ Y).clamp(min=1e-8)).sqrt()
    return Y


def tokens_of(model, tokenizer, texts, sites):
    """Activations of texts, first token left out: ({site: [token, d]}, text of each token)."""
    ids = [tokenizer(text).input_ids for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids])  # nothing looks to the right
    acts = hooks.read(model, padded.to(model.device), sites)
    keep = torch.tensor([[0 < t < len(i) for t in range(longest)] for i in ids])
    return {site: acts[site].cpu()[keep] for site in sites}, keep.nonzero()[:, 0]


def by_text(values: Tensor, owner: Tensor) -> Tensor:
    """The greatest value of each text: [feature, token] -> [feature, text]."""
    return torch.stack([values[:, owner == i].amax(1) for i in range(int(owner.max()) + 1)], 1)


def best_feature(texts_by_feature: Tensor, label: Tensor) -> int:
    """The feature that tells texts of a concept from others best: standardised gap of means."""
    own, other = texts_by_feature[:, label], texts_by_feature[:, ~label]
    gap = own.mean(1) - other.mean(1)
    return int((gap / (texts_by_feature.std(1) + 1e-6)).argmax())


def auc(scores: Tensor, label: Tensor) -> float:
    """Chance that a text of the concept scores above another one; ties count half."""
    gaps = scores[label][:, None] - scores[~label][None]
    return float(((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean())


@torch.inference_mode()
def steer(model, prompts, words, site, direction, norm, kl=0.5):
    """Mean gain of the concept's words in log-probability, where the output moved by ``kl`` nats.

    The direction is added after every token of ``prompts`` (ids [n, pos]) at several strengths;
    the gain is read off by interpolation between those. words: token ids.
    """
    direction = direction / direction.norm()
    plain = model(prompts).logits[:, -1].log_softmax(-1)
    kls, gains = [0.0], [0.0]
    for strength in STRENGTHS:
        with hooks.edit(model, site, hooks.add(strength * norm * direction), slice(1, None)):
            moved = model(prompts).logits[:, -1].log_softmax(-1)
        kls.append((plain.exp() * (plain - moved)).sum(-1).mean().item())
        mass = [x[:, words].logsumexp(-1).mean().item() for x in (moved, plain)]
        gains.append(mass[0] - mass[1])
        if kls[-1] > kl:
            break
    kls = np.maximum.accumulate(kls)
    return float(np.interp(kl, kls, gains))
