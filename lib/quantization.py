"""Weights in fewer numbers: what a layer reads, how its weights are rounded, and putting them in.

Everything is about the ``nn.Linear`` modules of a model's repeated blocks, by their dotted names
(``model.layers.3.mlp.up_proj``); embedding, head and norms stay as they are. Rounding itself is
``lib.kernels.fake_quant``; these are floats on a grid, so that quality can be measured with any
forward. Bytes and seconds are measured with ``lib.kernels.lowbit`` and its like.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.errors import BookError
from lib.kernels import fake_quant


class Moments(NamedTuple):
    """What one linear layer read: means over ``n`` tokens, in float32.

    ``second`` [in, in] is the mean of x xᵀ, ``peak`` [in] the largest |x| of a channel, ``mean``
    [in] the mean of x.
    """

    second: Tensor
    peak: Tensor
    mean: Tensor
    n: int


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules inside the model's repeated blocks, by dotted name, in their order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }


@torch.inference_mode()
def calibrate(
    model: nn.Module, ids: Tensor, names: Iterable[str] | None = None, batch: int = 4
) -> dict[str, Moments]:
    """Moments of what the linears read on ``ids`` [n, pos], in one pass and without the head.

    Layers that read the same tensor (queries, keys and values) share one ``Moments``.

    Raises:
        BookError: a name that is no linear of a block, or one that the forward never called.
    """
    chosen = _chosen(model, names)
    owner: dict[str, str] = {}  # who counts for this name: the first that read the same tensor
    sums: dict[str, list] = {}
    last: list = [None, ""]

    def read(name, x):
        if name not in owner:
            owner[name] = last[1] if x is last[0] else name
        last[:] = x, owner[name]
        if owner[name] != name:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        new = [rows.T @ rows, rows.abs().amax(0), rows.sum(0), len(rows)]
        if name not in sums:
            sums[name] = new
            return
        old = sums[name]
        sums[name] = [
            old[0] + new[0],
            torch.maximum(old[1], new[1]),
            old[2] + new[2],
            old[3] + new[3],
        ]

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0]))
        for name, module in chosen.items()
    ]
    try:
        for part in ids.split(batch):
            getattr(model, "base_model", model)(part)
            last[:] = None, ""
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in chosen if name not in owner]:
        raise BookError(f"{silent[0]} read nothing: its forward was never called on these tokens")
    moments = {
        name: Moments(second / n, peak, total / n, n)
        for name, (second, peak, total, n) in sums.items()
    }
    return {name: moments[owner[name]] for name in chosen}


def nearest(
    weight: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    clip: float | Tensor = 1.0,
) -> Tensor:
    """``weight`` [out, in] rounded to the nearest of 2^bits levels (round-to-nearest, RTN).

    Args:
        bits: 2 to 8.
        group: inputs of a row that share a scale, a divisor of ``in``; ``None``: the whole row.
        clip: the share of each group's range that the levels span, a number or in the shape of
            the scales.
    """
    how = dict(per="channel" if group is None else "group", group=group or 0, symmetric=symmetric)
    scale, zero = _scales(weight, bits, group, symmetric, clip)
    return fake_quant.fake_quantize(weight, f"int{bits}", **how, scale=scale, zero=zero)


@torch.no_grad()
def gptq(
    weight: Tensor,
    second: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    damp: float = 0.01,
    order: bool = True,
) -> Tensor:
    """GPTQ (arXiv 2210.17323): column by column, each rounding's error repaired by the later ones.

    Minimizes ‖(W - Ŵ) X‖² greedily; scales are fixed beforehand from ``weight`` itself.

    Args:
        weight: [out, in].
        second: [in, in], the mean of x xᵀ (``calibrate``).
        damp: share of the mean diagonal that is added to it (section 3.3).
        order: columns that read the most first (the authors' code calls it act-order).
    """
    n = weight.shape[1]
    scale, zero = _scales(weight, bits, group, symmetric, 1.0)
    grid = fake_quant.grid_of(f"int{bits}", symmetric)
    scale = scale.view(len(weight), -1).repeat_interleave(group or n, 1)
    zero = torch.zeros_like(scale) if zero is None else zero.view(len(weight), -1)
    zero = zero if zero.shape == scale.shape else zero.repeat_interleave(group or n, 1)

    hessian = second.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # never read: any rounding will do
    diagonal += damp * diagonal.mean()
    to = diagonal.argsort(descending=True) if order else torch.arange(n, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[to][:, to]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()

    left, scale, zero = weight.float()[:, to], scale[:, to], zero[:, to]
    out = torch.empty_like(left)
    for start in range(0, n, 128):  # repairs reach the far columns once a block (section 3.2)
        stop = min(start + 128, n)
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            codes = (left[:, i] / scale[:, i]).round() + zero[:, i]
            out[:, i] = (codes.clamp(grid.low, grid.high) - zero[:, i]) * scale[:, i]
            error = (left[:, i] - out[:, i]) / factor[i, i]
            left[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return out[:, to.argsort()].to(weight.dtype)


@torch.no_grad()
def low_rank(error: Tensor, rank: int, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U [out, rank] and V [rank, in] whose product stands for ``error`` [out, in] best.

    Without ``second`` in the Frobenius norm (the plain singular value decomposition of
    ZeroQuant-V2's LoRC, arXiv 2303.08302); with it, the mean of x xᵀ, in the error's effect on the
    outputs, ‖(E - U V) C^½‖ (EoRA, arXiv 2410.21271). Either way the best U are the principal axes
    of what the error does to the outputs, eigenvectors of E C Eᵀ, and V = Uᵀ E: that is EoRA's
    answer without its detour through the eigenspace of C. Best first: any first r are best too.
    """
    if not 0 < rank <= min(error.shape):
        raise BookError(f"rank is {rank}; it must be from 1 to {min(error.shape)}")
    # in double: massive activations put eight orders of magnitude between C's eigenvalues
    e = error.double()
    c = None if second is None else second.double()
    if len(e) <= e.shape[1]:
        axes = torch.linalg.eigh(e @ e.T if c is None else e @ c @ e.T).eigenvectors
        u = axes.flip(1)[:, :rank]
    else:  # the same on the smaller side; any root of C will do
        seen = e
        if c is not None:
            values, vectors = torch.linalg.eigh(c)
            seen = e @ (vectors * values.clamp(min=0).sqrt())
        v = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :rank]
        u = torch.linalg.qr(seen @ v).Q
    return u.float(), (u.T @ e).float()


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """While it lasts, the named linears have these weights; on any exit, their own again.

    Raises:
        BookError: a name that is no linear of a block, a weight of another shape.
    """
    chosen = _chosen(model, weights)
    for name, module in chosen.items():
        if weights[name].shape != module.weight.shape:
            raise BookError(
                f"the weight for {name} is {list(weights[name].shape)}; "
                f"it must be {list(module.weight.shape)}"
            )
    own = {name: module.weight for name, module in chosen.items()}
    try:
        for name, module in chosen.items():
            new = weights[name].detach().to(own[name].device, own[name].dtype)
            module.weight = nn.Parameter(new, requires_grad=False)
        yield model
    finally:
        for name, module in chosen.items():
            module.weight = own[name]


@contextmanager
def rounded_inputs(
    model: nn.Module,
    bits: int,
    per: str = "token",
    names: Iterable[str] | None = None,
    symmetric: bool = True,
) -> Iterator[nn.Module]:
    """While it lasts, what the linears read is rounded to 2^bits levels.

    Args:
        per: one scale a ``token`` or a ``tensor``, found anew at each forward (dynamic).
        names: of the linears; ``None``: all.
    """
    if per not in ("token", "tensor"):
        raise BookError(f'per is "{per}"; it must be "token" or "tensor"')
    chosen = _chosen(model, names)

    def rounded(_, args):
        x = fake_quant.fake_quantize(args[0], f"int{bits}", per=per, symmetric=symmetric)
        return (x, *args[1:])

    handles = [module.register_forward_pre_hook(rounded) for module in chosen.values()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Linear]:
    known = linears(model)
    if not known:
        raise BookError("this model has no linear modules in repeated blocks")
    if names is None:
        return known
    for name in (names := list(names)):
        if name not in known:
            raise BookError(f"{name} is no linear of a block; those are like {next(iter(known))}")
    return {name: known[name] for name in names}


def _scales(weight: Tensor, bits: int, group: int | None, symmetric: bool, clip):
    if weight.ndim != 2:
        raise BookError(f"weight is {list(weight.shape)}; it must be [out, in]")
    if group is not None and (group < 1 or weight.shape[1] % group):
        raise BookError(f"group is {group}; it must divide the {weight.shape[1]} inputs of a row")
    per = "channel" if group is None else "group"
    scale, zero = fake_quant.scale_of(weight.detach(), f"int{bits}", per, group or 0, symmetric)
    return scale * clip, zero  # the zero point is a code: the same share of a smaller range
