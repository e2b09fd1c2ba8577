"""Small image classifiers on the book's digits and garments, and the one loop that trains them.

``images`` gives the data as tensors; ``conv_net`` and ``vit`` make a network from a seed; ``train``
trains any of them; ``logits`` and ``accuracy`` read them in batches; ``linear_probe`` asks what a
network's features hold.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lib import datasets, models
from lib.errors import BookError


def images(name: str = "fashion_mnist") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """10,000 training and 2,000 test images of the book's own copy, on ``models.device()``.

    Args:
        name: ``"fashion_mnist"`` or ``"mnist"``.

    Returns:
        ``x_train`` float32 [10000, 1, 28, 28] in [0, 1], ``y_train`` int64 [10000], ``x_test``,
        ``y_test``.

    Raises:
        BookError: another name.
    """
    if name not in ("fashion_mnist", "mnist"):
        raise BookError(f"images {name!r} are unknown; give fashion_mnist or mnist")
    data = getattr(datasets, name)()
    found = []
    for part in ("train", "test"):
        found.append(torch.tensor(data[f"x_{part}"])[:, None].float() / 255)
        found.append(torch.tensor(data[f"y_{part}"]).long())
    return tuple(t.to(models.device()) for t in found)


def conv_net(
    width: int = 16, classes: int = 10, channels: int = 1, norm: bool = True, seed: int = 0
) -> nn.Sequential:
    """Three 3 × 3 convolutions of ``width``, 2 and 4 times ``width`` channels, and a linear head.

    Modules by name: ``conv1``, ``norm1`` (batch norm; absent with ``norm=False``), ``relu1``,
    ``pool1`` (2 × 2 maximum), …, ``relu3``, ``mean`` (over all places), ``head``. Takes images
    [n, channels, h, w] of any size from 4 × 4 on, gives logits [n, classes].
    """
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = channels
    for stage, after in enumerate((width, 2 * width, 4 * width), start=1):
        layers[f"conv{stage}"] = nn.Conv2d(before, after, 3, padding=1, bias=not norm)
        if norm:
            layers[f"norm{stage}"] = nn.BatchNorm2d(after)
        layers[f"relu{stage}"] = nn.ReLU()
        if stage < 3:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        before = after
    layers["mean"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["head"] = nn.Linear(before, classes)
    return nn.Sequential(layers).to(models.device())


class Vit(ViTForImageClassification):
    """``transformers``' vision transformer whose output is the logits, like a plain module's."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, channels, size, size] to logits [n, classes]; ``.vit(x)`` gives the rest."""
        return super().forward(x).logits


def vit(
    size: int = 28,
    patch: int = 7,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    classes: int = 10,
    channels: int = 1,
    seed: int = 0,
    **config,
) -> Vit:
    """A vision transformer with (size / patch)² tokens and a class token.

    Args:
        config: further settings of ``transformers.ViTConfig``; the MLP is twice ``width`` unless
            ``intermediate_size`` says otherwise.

    Raises:
        BookError: ``size`` is no multiple of ``patch``, or ``width`` none of ``heads``.
    """
    if size % patch or width % heads:
        raise BookError(
            f"vit cuts size {size} into patches of {patch} and width {width} into {heads} heads: "
            "both must come out even"
        )
    torch.manual_seed(seed)
    settings = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_labels=classes,
        **{
            "intermediate_size": 2 * width,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        | config,
    )
    return Vit(settings).to(models.device())


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    rate: float = 1e-3,
    batch: int = 128,
    seed: int = 0,
    decay: float = 0.0,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    each: Callable[[int, nn.Module], None] | None = None,
) -> list[float]:
    """Train ``model`` in place on ``x`` [n, ...], ``y`` [n]; leaves it in eval mode.

    Args:
        rate: the learning rate, at its start where ``schedule`` lets it fall.
        seed: of the order of the images, and of the generator that ``augment`` is given.
        decay: weight decay; with ``"sgd"`` added to the gradient, with ``"adamw"`` apart from it.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        schedule: ``"cosine"`` falls to 0 over the run, step by step; ``"constant"`` stays.
        loss: ``loss(model, xb, yb)``, a scalar; by default the cross entropy of ``model(xb)``.
        augment: ``augment(xb, generator)`` before each step.
        each: called after every epoch with its number from 1 on; whatever mode it leaves the model
            in, the next epoch trains.

    Returns:
        the mean loss of each epoch.

    Raises:
        BookError: an unknown optimizer or schedule, or images and labels that differ in number.
    """
    if len(x) != len(y):
        raise BookError(f"train needs a label an image, not {len(x)} images and {len(y)} labels")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        stepper = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    elif optimizer == "sgd":
        stepper = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    else:
        raise BookError(f"optimizer {optimizer!r} is unknown; give adamw or sgd")
    steps = epochs * -(-len(x) // batch)
    if schedule == "cosine":
        schedule_ = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, max(steps, 1))
    elif schedule == "constant":
        schedule_ = torch.optim.lr_scheduler.ConstantLR(stepper, factor=1.0)
    else:
        raise BookError(f"schedule {schedule!r} is unknown; give cosine or constant")
    generator = torch.Generator().manual_seed(seed)
    means = []
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            xb, yb = x[rows], y[rows]
            if augment is not None:
                xb = augment(xb, generator)
            value = F.cross_entropy(model(xb), yb) if loss is None else loss(model, xb, yb)
            stepper.zero_grad()
            value.backward()
            stepper.step()
            schedule_.step()
            total += float(value.detach()) * len(rows)
        means.append(total / len(x))
        if each is not None:
            each(epoch, model)
    model.eval()
    return means


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch: int = 500) -> Tensor:
    """``model`` on all of ``x`` in batches, in the mode the model is in: [n, classes]."""
    return torch.cat([model(part) for part in x.split(batch)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of ``x`` whose largest logit is at its label ``y``, in [0, 1]."""
    return float((logits(model, x).argmax(-1) == y).float().mean())


def linear_probe(
    features: Tensor, y: Tensor, test: Tensor, penalty: float = 1e-4, classes: int = 10
) -> Tensor:
    """Answers of a logistic regression, fitted until L-BFGS ends, at most 100 steps.

    Args:
        features: [n, d], standardized here by their own mean and spread, and ``test`` by the same.
        y: their labels [n], below ``classes``.
        test: [m, d].
        penalty: of the squared weights, the bias among them.

    Returns:
        int64 [m]: the class that each row of ``test`` is given.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6 * features.std() + 1e-12
    a, b = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (features, test))
    w = torch.zeros(a.shape[1], classes, device=a.device, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = F.cross_entropy(a @ w, y) + penalty * w.square().sum()
        value.backward()
        return value

    solver.step(closure)
    return (b @ w.detach()).argmax(-1)
