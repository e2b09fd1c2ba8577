"""Merge small convolutional nets by matching their units: what make_dimat and make_zoo share.

A net is a ``lib.vision.conv_net``: three stages of channels whose order means nothing. ``match``
finds, stage by stage, which channel of one net goes with which of another; ``permute`` reorders a
net without changing what it computes; ``average`` mixes nets weight by weight; ``reset_norm``
measures batch norm's statistics anew, without which a mixture's activations are too small.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import hooks, matching  # noqa: E402

STAGES = (1, 2, 3)


def halve(images: Tensor) -> Tensor:
    """Images [n, 1, 28, 28] at 14 × 14 pixels: the mean of every 2 × 2, a quarter of the work."""
    return F.avg_pool2d(images, 2)


@torch.no_grad()
def units(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What each channel says at each place after each ReLU: a [n · places, channels] a stage."""
    with hooks.capture(model, [f"relu{stage}" for stage in STAGES]) as acts:
        model(images)
    return [a.movedim(1, -1).flatten(0, -2) for a in acts.values()]


def match(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """P_1, P_2, P_3 as index vectors: channel i of one net goes with channel ``P[i]`` of another.

    Each stage is matched by itself, by the correlations of the two nets' ``units`` on the same
    images and a linear assignment: no labels, no training.
    """
    return [matching.assign(matching.correlations(x, y)) for x, y in zip(a, b, strict=True)]


@torch.no_grad()
def permute(model: nn.Module, order: list[Tensor]) -> nn.Module:
    """A copy with the channels of stage l in the order ``order[l]``; it computes the same.

    The rows of a stage's convolution and its batch norm move, and the columns of the layer that
    reads them.
    """
    model = copy.deepcopy(model)
    layers = dict(model.named_children())
    for stage, p in zip(STAGES, order, strict=True):
        for name in (f"conv{stage}", f"norm{stage}"):
            for tensor in layers[name].state_dict().values() if name in layers else ():
                if tensor.ndim:  # not the count of batches
                    tensor.copy_(tensor[p])
        reader = layers["head"] if stage == STAGES[-1] else layers[f"conv{stage + 1}"]
        reader.weight.copy_(reader.weight[:, p])
    return model


@torch.no_grad()
def average(models: list[nn.Module], weights: list[float] | None = None) -> nn.Module:
    """A copy whose every weight and statistic is the weighted mean (None: the plain mean)."""
    weights = [1 / len(models)] * len(models) if weights is None else weights
    mixed = copy.deepcopy(models[0])
    states = [m.state_dict() for m in models]
    for name, tensor in mixed.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(sum(w * s[name] for w, s in zip(weights, states, strict=True)))
    return mixed


@torch.no_grad()
def reset_norm(model: nn.Module, images: Tensor, batch: int = 250) -> nn.Module:
    """Batch norm's means and variances measured anew on ``images``; returns the model, in eval."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for part in images.split(batch) if norms else ():
        model(part)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def merge(models, images: Tensor, weights=None, matched: bool = True, reset: bool = True):
    """Average nets after bringing each into the channel order of the first.

    Args:
        images: [n, 1, h, w], for the matching and for batch norm; labels are not needed.
        weights: one a model; None for equal ones.
        matched: False leaves the channels as they are: plain weight averaging.
        reset: False keeps the averaged statistics of batch norm.
    """
    first, *others = models
    if matched:
        seen = units(first, images)
        others = [permute(m, match(seen, units(m, images))) for m in others]
    mixed = average([first, *others], weights)
    return reset_norm(mixed, images) if reset else mixed.eval()


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross entropy in nats, share of labels missed) over images [n, 1, h, w]."""
    out = torch.cat([model(part) for part in images.split(500)])
    return float(F.cross_entropy(out, labels)), float((out.argmax(-1) != labels).float().mean())
