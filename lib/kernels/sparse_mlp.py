"""Matrix–vector products and a gated MLP that read only the rows which survive a threshold.

The decode step of a Llama-like MLP at batch 1, with one threshold a channel as in CHESS (He et
al., arXiv 2409.01366, channel-wise thresholding and its two kernels, vmmsp and spvmm):

    g = act(W_gate x)                      every row of W_gate is read
    y = Σ_{i: |g_i| > t_i} g_i (w_up,i · x) w_down,i      only the kept rows of the other two

The same rule with one t for all is CATS, with ReLU and t = 0 the Lazy Neuron (arXiv 2210.06313),
with ReLU and t > 0 the shifted FATReLU of ProSparse (arXiv 2402.13516). NaN passes every
threshold, so that it is not lost; a product with a dropped row is never formed.

Bytes set the time. Of three matrices one is read whole, of the others a share 1 − s, so a
sparsity s allows a speed-up of 3 / (3 − 2s): 1.5 at 50 %, 1.9 at 70 %. A library call cannot
reach it: torch has no product that skips rows (gathering them first reads and writes them once
more), and at batch 1 its dense product falls short of the memory's speed besides. The down
projection is stored transposed and each of its rows behind the row of the up projection that it
goes with, so that a kept channel is one run of 8 d bytes. On such jumps a processor's own
prefetcher starts late: the kernel, which knows the next kept row, asks for it in advance. Threads
take blocks of channels as they come free, so that one which wakes late does not hold up the rest.

Numba does this in float32; on a CPU other dtypes take the reference.
"""

import math
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, jit, njit, numba, prange, refuse_gradient, tl
from lib.kernels.sparse_mv import (
    FLOATS,
    TILE,
    add,
    add_up,
    arrays,
    ask_row,
    dot,
    dots,
    kept_by,
    mixes,
    parts_of,
    pick,
    take,
)

ACTS = {"silu": nn.functional.silu, "relu": nn.functional.relu}
_BLOCK = 64  # channels a thread takes at a time: their 147 kB of gate fit its L2 cache


def pack(up: Tensor, down: Tensor) -> Tensor:
    """Rows for ``gated_mlp``: up [d_mlp, d] and down [d, d_mlp] to [d_mlp, 2, d]."""
    sizes = check(up=(up, "d_mlp d", FLOATS), down=(down, "d d_mlp", (getattr(up, "dtype", None),)))
    shape = (sizes["d_mlp"], 2, sizes["d"])
    if up.device.type == "cpu" and up.dtype == torch.float32:
        rows = torch.from_numpy(np.empty(shape, np.float32))  # NumPy asks for large pages
    else:
        rows = up.new_empty(shape)
    rows[:, 0], rows[:, 1] = up.detach(), down.detach().T
    return rows


def gated_mlp(x: Tensor, gate: Tensor, rows: Tensor, thresholds: Tensor, act="silu") -> Tensor:
    """The gated MLP on the channels whose activated gate is above its threshold.

    One vector goes through the kernel; several go through dense products with the same rule. A
    gate within rounding of its threshold may fall on either side.

    Args:
        x: [..., d]; float32, or bfloat16 or float16.
        gate: W_gate [d_mlp, d], of the same dtype.
        rows: ``pack(up, down)`` [d_mlp, 2, d], of the same dtype; finite.
        thresholds: [d_mlp] float32, compared with |act(W_gate x)|; a negative one keeps all.
        act: "silu" or "relu".

    Returns:
        [..., d].

    Raises:
        BookError: a wrong shape, dtype, device or activation; a gradient wanted.
    """
    same = (getattr(x, "dtype", None),)
    sizes = check(
        x=(x, "... d", FLOATS),
        gate=(gate, "d_mlp d", same),
        rows=(rows, "d_mlp 2 d", same),
        thresholds=(thresholds, "d_mlp", (torch.float32,)),
    )
    _activation(act)
    refuse_gradient("gated_mlp", (x, gate, rows))
    if x.numel() == sizes["d"] > 0:
        gate, rows, thresholds = (t.contiguous() for t in (gate, rows, thresholds))
        return _gated(x, gate, rows, thresholds, act)
    g = ACTS[act](x @ gate.T)
    return torch.where(kept_by(g, thresholds), g * (x @ rows[:, 0].T), 0) @ rows[:, 1]


def _gated(x, gate, rows, thresholds, act, weights=None):
    """``weights``: the last three tensors as arrays, for a caller that keeps them."""
    run = pick(x, _reference_gated, _cpu_gated, _triton_gated)
    return run(x, gate, rows, thresholds, act, weights)


# --- in place of a model's MLPs -------------------------------------------------------------------


@contextmanager
def sparse_mlp(model: nn.Module, thresholds: Tensor, act: str | None = None):
    """Run every gated MLP of a Llama-like model by the rule of ``gated_mlp``, and restore it after.

    A single token (a step of ``generate`` at batch 1) takes the kernel; longer or several inputs,
    and those that want a gradient, take the model's own projections with the same thresholds.
    Hooks on the projections inside an MLP (``mlp_hidden``) do not see the kernel's steps. Holds a
    packed copy of the up and down projections while it is open.

    Args:
        model: has modules with ``gate_proj``, ``up_proj``, ``down_proj`` without bias.
        thresholds: [n_layers, d_mlp] float32, as from ``calibrate``.
        act: "silu" or "relu"; by default the model's own.

    Raises:
        BookError: no such MLPs, a bias, another activation; thresholds of a wrong shape or dtype.
    """
    mlps = _mlps(model)
    wanted = f"{len(mlps)} {mlps[0].gate_proj.out_features}"
    check(thresholds=(thresholds, wanted, (torch.float32,)))

    def replaced(layer: int, mlp: nn.Module):
        name = act or _act_of(mlp)
        function = _activation(name)
        gate = mlp.gate_proj.weight.detach().contiguous()
        rows = pack(mlp.up_proj.weight, mlp.down_proj.weight)
        cuts = thresholds[layer].to(gate.device).contiguous()
        floats = gate.device.type == "cpu" and gate.dtype == torch.float32
        weights = arrays(gate, rows, cuts) if floats else None
        width = gate.shape[1]

        def forward(x: Tensor) -> Tensor:
            if x.numel() == width and not (x.requires_grad and torch.is_grad_enabled()):
                return _gated(x, gate, rows, cuts, name, weights)
            g = function(mlp.gate_proj(x))
            return mlp.down_proj(torch.where(kept_by(g, cuts), g * mlp.up_proj(x), 0))

        return forward

    with _forwards(mlps, replaced):
        yield model


@torch.no_grad()
def calibrate(model: nn.Module, ids: Tensor, sparsity: float, rule="chess", act=None) -> Tensor:
    """Thresholds at which a share ``sparsity`` of each layer's channels is dropped on ``ids``.

    ``"chess"``: a channel matters as |g_i| E|u_i|, where u = W_up x; with c the quantile of that
    score over channels and tokens, t_i = c / E|u_i| (He et al., arXiv 2409.01366, channel-wise
    thresholding). ``"plain"``: one t a layer, the quantile of |g_i| (CATS).

    Args:
        ids: [batch, pos] token ids; one forward of the dense model.
        sparsity: 0–1; 0 keeps every channel.
        act: "silu" or "relu"; by default the model's own.

    Returns:
        [n_layers, d_mlp] float32, for ``sparse_mlp``.
    """
    if not 0 <= sparsity <= 1:
        raise BookError(f"sparsity is {sparsity}; it must lie from 0 to 1")
    if rule not in ("chess", "plain"):
        raise BookError(f'rule is "{rule}"; it must be "chess" or "plain"')
    check(ids=(ids, "batch pos", (torch.int64,)))
    if not ids.numel():
        raise BookError("ids is empty; thresholds need at least one token")
    found = {}

    def watched(layer: int, mlp: nn.Module):
        function = _activation(act or _act_of(mlp))

        def forward(x: Tensor) -> Tensor:
            g, up = function(mlp.gate_proj(x)), mlp.up_proj(x)
            scale = up.float().abs().flatten(0, -2).mean(0)
            scale = scale if rule == "chess" else torch.ones_like(scale)
            scores = (g.float().abs() * scale).flatten()
            below = int(sparsity * scores.numel())
            cut = scores.kthvalue(below).values if below else scores.new_tensor(-1.0)
            found[layer] = cut / scale
            return mlp.down_proj(g * up)

        return forward

    mlps = _mlps(model)
    with _forwards(mlps, watched):
        getattr(model, "base_model", model)(ids)
    return torch.stack([found[layer] for layer in range(len(mlps))])


def _mlps(model: nn.Module) -> list[nn.Module]:
    parts = ("gate_proj", "up_proj", "down_proj")
    found = [m for m in model.modules() if all(hasattr(m, part) for part in parts)]
    if not found:
        raise BookError(
            f"model is a {type(model).__name__} without gated MLPs ({', '.join(parts)})"
        )
    if any(getattr(m, part).bias is not None for m in found for part in parts):
        raise BookError("model has MLPs with a bias; the sparse MLP has none")
    return found


def _act_of(mlp: nn.Module) -> str:
    function = mlp.act_fn  # nn.SiLU, transformers' SiLUActivation, nn.functional.silu, …
    name = getattr(function, "__name__", type(function).__name__)
    return name.lower().removesuffix("activation")


def _activation(act: str):
    if act not in ACTS:
        raise BookError(f'act is "{act}"; it must be {" or ".join(ACTS)}')
    return ACTS[act]


@contextmanager
def _forwards(mlps: list[nn.Module], make):
    """Give every MLP a forward of its own; take it away (or put an earlier one back) on exit."""
    fresh = [make(layer, mlp) for layer, mlp in enumerate(mlps)]
    with ExitStack() as stack:
        for mlp, forward in zip(mlps, fresh, strict=True):
            if "forward" in vars(mlp):
                stack.callback(setattr, mlp, "forward", mlp.forward)
            else:
                stack.callback(delattr, mlp, "forward")
            mlp.forward = forward
        yield


# --- torch, the specification ---------------------------------------------------------------------


def _reference_gated(x, gate, rows, thresholds, act, weights=None):
    v = x.reshape(-1)
    g = ACTS[act](gate @ v)
    keep = kept_by(g, thresholds)
    up, down = rows[keep].unbind(1)
    return ((g[keep] * (up @ v)) @ down).view(x.shape)


# --- Numba ----------------------------------------------------------------------------------------


@njit(parallel=True, **OPTIONS)
def _numba_gated(x, gate, rows, thresholds, relu, threads, out):
    n, d = gate.shape
    blocks = (n + _BLOCK - 1) // _BLOCK
    parts = np.zeros((threads, d), np.float32)  # the output, one a thread
    taken = np.zeros(1, np.int64)
    for thread in prange(threads):
        part = parts[thread]
        g, kept = np.empty(_BLOCK, np.float32), np.empty(_BLOCK + 1, np.int64)
        block = take(taken)
        while block < blocks:
            first = block * _BLOCK
            size = min(_BLOCK, n - first)
            for k in range(size):
                g[k] = dot(gate[first + k], x)
            count = 0
            for k in range(size):  # no branch: which channels stay cannot be foretold
                s = g[k]
                a = (np.float32(0) if s <= 0 else s) if relu else s / (np.float32(1) + math.exp(-s))
                g[count], kept[count] = a, first + k
                count += np.int64(not (abs(a) <= thresholds[first + k]))
            for k in range(count):
                i = kept[k]
                if k + 1 < count and kept[k + 1] != i + 1:  # a neighbour comes by itself
                    ask_row(rows[kept[k + 1], 0])
                    ask_row(rows[kept[k + 1], 1])
                add(part, g[k] * dot(rows[i, 0], x), rows[i, 1])
            block = take(taken)
    add_up(parts, out)


def _cpu_gated(x, gate, rows, thresholds, act, weights=None):
    out = torch.empty(x.shape)
    v, y = (t.numpy().reshape(-1) for t in (x.detach().contiguous(), out))
    weights = weights or arrays(gate, rows, thresholds)
    _numba_gated(v, *weights, act == "relu", numba.get_num_threads(), y)
    return out


# --- Triton ---------------------------------------------------------------------------------------


@jit
def _triton_gated_kernel(
    x,
    gate,
    rows,
    thresholds,
    parts,
    n,
    d,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    s = dots(gate, x, row, row < n, d, d, ROWS, WIDE)
    if RELU:
        g = tl.where(s <= 0, 0.0, s)
    else:
        g = s / (1.0 + tl.exp(-s))
    t = tl.load(thresholds + row, mask=row < n, other=0.0)
    keep = (row < n) & ((tl.abs(g) <= t) == 0)
    h = g * dots(rows, x, row, keep, 2 * d, d, ROWS, WIDE)
    mixes(rows + d, h, row, keep, 2 * d, d, parts, WIDE)


def _triton_gated(x, gate, rows, thresholds, act, weights=None):
    parts = parts_of(x, *gate.shape)
    if parts.numel():
        relu = act == "relu"
        _triton_gated_kernel[len(parts),](
            x.contiguous(), gate, rows, thresholds, parts, *gate.shape, RELU=relu, **TILE
        )
    return parts.sum(0).to(x.dtype).view(x.shape)
