"""XQuant and XQuant-CL: cache the layers' inputs, rematerialize keys and values (tomar2025xquant).

XQuant (arXiv 2508.10395) keeps the input X of each layer's attention (after the norm), quantized
per token, instead of K and V, and computes at every step

    K = RoPE(X̂ W_k),   V = X̂ W_v        over the whole past.

With one key-value head a query head, X is half of K and V. With grouped queries it is not:
SmolLM2's X is 576 wide, its K and V together 384. There the paper factors W_k = U_k Σ_k B_kᵀ and
W_v = U_v Σ_v B_vᵀ and keeps the latents X U_k (quantized per channel) and X U_v (per token), as
wide as K and V: ``latents=True``. The factors are kept once a model (``factor_bytes``), and they
are not small beside a short context.

XQuant-CL (``cross_layer=True``) keeps what a layer's input adds to the layers before,

    X̂_l = X̂_{l-1} + quantized(X_l - X̂_{l-1}),

from the layer ``base_layers`` on; the first layers keep X itself in ``base_bits``. With latents
the difference is projected by U_kv of [W_k W_v] = U_kv Σ B^T, and projected back to go on. That
loses what U_kv does not span, but not for its own layer, since U_kv spans all that W_k and W_v
read: in floats both forms are exact. (The last base layer keeps X whole: the sum starts there.)

Arithmetic is the price: two products over the whole past at every layer and token, 2 · 576 · 384
operations a past token and layer of SmolLM2 (2 · 2 · 192² with latents), where a cache of K and V
has none. These are matrix products, torch's own; the unpacking is ``bitpack``'s. There is no
Triton here beyond it: the rest is bookkeeping.

Positions are kept once (int32), so that padded batches rotate each row by its own.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lib.errors import BookError
from lib.kernels.dispatch import refuse_gradient
from lib.kernels.quantized_cache import Stream, StreamsLayer, kept, settings

_SHAPED_LIKE_LLAMA = ("llama", "mistral", "qwen2")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
_factors: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


class Factors(NamedTuple):
    """W = U M: ``down`` [d_model, rank] has orthonormal columns, ``up`` is [rank, width]."""

    down: Tensor
    up: Tensor


class LayerInputCache(Cache):
    """A cache of layer inputs, for ``generate`` inside its own ``with`` block.

    ``with LayerInputCache(model, bits=4) as cache: model.generate(**x, past_key_values=cache)``.
    The block puts a pre-hook on every attention module, by which the cache sees X, and takes them
    off on any exit; the cache keeps its content and may be entered again. Several caches may be
    active: each sees only the calls that it is passed to. An edit of X (``hooks.edit`` of
    ``attn_in`` or before) is kept; an edit of k or v holds for the call's own tokens only, since
    the past is computed anew.

    Args:
        model: shaped like Llama (Llama, Mistral, Qwen2): SmolLM2, for one.
        bits: 2, 3, 4, 8, 16 (float16) or 32 (float32: exact).
        latents: keep the projections on W_k's and W_v's singular vectors instead of X.
        cross_layer: keep differences between layers (XQuant-CL).
        group: values that share a scale (at most the width; it must divide it).
        window: the newest tokens that stay in the model's dtype at least.
        base_layers, base_bits: with ``cross_layer``: the first layers, kept whole, and their bits
            (by default 4, or ``bits`` where that is more).

    Raises:
        BookError: for a model of another shape, or an argument out of range; in a forward call
            outside the ``with`` block.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: int = 4,
        latents: bool = False,
        cross_layer: bool = False,
        group: int = 64,
        window: int = 32,
        base_layers: int = 3,
        base_bits: int | None = None,
    ):
        config = _check_shape(model)
        base_bits = max(4, bits) if base_bits is None else base_bits
        settings(config, (bits, base_bits), group, window)
        n_layers = config.num_hidden_layers
        if cross_layer and not 1 <= base_layers <= n_layers:
            raise BookError(f"base_layers is {base_layers}; it must be 1 to {n_layers}")
        self.model, self.latents, self.cross_layer = model, latents, cross_layer
        self.first = base_layers if cross_layer else n_layers  # the first layer kept as difference
        self.attention = [block.self_attn for block in model.get_decoder().layers]
        layers = []
        for i, module in enumerate(self.attention):
            d_model, width = config.hidden_size, module.k_proj.weight.shape[0]
            b = base_bits if cross_layer and i < self.first else bits
            if self._keeps_latents(i):
                wide = (width, width) if i < self.first else (min(d_model, 2 * width),)
                kinds = ("channel", "token") if i < self.first else ("token",)
            else:
                wide, kinds = (d_model,), ("token",)
            streams = []
            for w, per in zip(wide, kinds, strict=True):
                g = group if per == "channel" else min(group, w)
                if w % g or w % 8:
                    raise BookError(f"group is {group}; it must divide {w}, the width kept")
                streams.append(Stream(b, g, per, group, window))
            layers.append(StreamsLayer(*streams))
        super().__init__(layers=layers)
        self._handles: list = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._forget()

    def _keeps_latents(self, i: int) -> bool:
        whole = self.cross_layer and i == self.first - 1  # the sum of differences starts there
        return self.latents and not whole

    def _forget(self) -> None:
        self.positions: Tensor | None = None
        self._seen.clear()
        self._turn: tuple[Tensor, Tensor] | None = None  # cos, sin of the past, for one forward
        self._sum: Tensor | None = None  # X̂ of the layer before, for one forward

    # The hooks.

    def __enter__(self):
        if self._handles:
            raise BookError("this LayerInputCache is already active; use one with block at a time")
        for i, module in enumerate(self.attention):
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, i=i: self._see(i, args, kwargs), with_kwargs=True
                )
            )
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._turn = self._sum = None

    def _see(self, i: int, args: tuple, kwargs: dict) -> None:
        if kwargs.get("past_key_values") is self:
            x = args[0] if args else kwargs["hidden_states"]
            self._seen[i] = (x, kwargs.get("position_ids"))

    # A layer's turn.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx not in self._seen:
            raise BookError(
                "this LayerInputCache did not see the layer's input; call the model inside "
                "`with LayerInputCache(model, …) as cache:`"
            )
        x, position_ids = self._seen.pop(layer_idx)
        refuse_gradient("LayerInputCache", (x, key_states))
        if layer_idx == 0:
            self._start(x, position_ids)
        past = len(self.layers[layer_idx].streams[0])
        if past + x.shape[1] != self.positions.shape[1]:
            raise BookError("a forward call stopped half-way; call cache.reset() and begin again")
        if layer_idx < self.first:
            keys, values = self._update_whole(layer_idx, x)
        else:
            keys, values = self._update_difference(layer_idx, x)
        if layer_idx == len(self.layers) - 1:
            self._turn = self._sum = None
        if not past:
            return key_states, value_states
        batch, heads, _, d_head = key_states.shape
        keys, values = (y.view(batch, past, heads, d_head).transpose(1, 2) for y in (keys, values))
        keys = torch.cat([_rotate(keys, *self._turn_of_past(x, past)), key_states], 2)
        return keys, torch.cat([values, value_states], 2)

    def _start(self, x: Tensor, position_ids: Tensor | None) -> None:
        if position_ids is None:
            raise BookError("the model gave no position_ids to its attention; update transformers")
        new = position_ids.expand(len(x), -1).to(torch.int32)
        self.positions = new if self.positions is None else torch.cat([self.positions, new], 1)
        self._turn = self._sum = None

    def _turn_of_past(self, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
        if self._turn is None:
            rotary = self.model.get_decoder().rotary_emb
            cos, sin = rotary(x, self.positions[:, :past].long())
            self._turn = cos[:, None], sin[:, None]
        return self._turn

    def _update_whole(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keep X or its latents. Returns the past's keys (before RoPE) and values, [b, past, w]."""
        module, streams = self.attention[i], self.layers[i].streams
        new = x.shape[1]
        if self._keeps_latents(i):
            found = []
            for stream, linear in zip(streams, (module.k_proj, module.v_proj), strict=True):
                down, up = _factored(linear)
                latent = x @ down
                whole = stream.read(latent)[:, :-new]
                found.append(_plus(whole @ up, linear.bias))
                due = stream.append(latent)
                if due is not None:
                    stream.store(due)
            return tuple(found)
        stream = streams[0]
        stored = stream.stored
        whole = stream.read(x)
        due = stream.append(x)
        fresh = None if due is None else stream.store(due).to(x.dtype)
        if (
            self.cross_layer and i == self.first - 1
        ):  # the layers after add to what is packed, new blocks included
            parts = [whole[:, :stored]] + ([] if fresh is None else [fresh])
            self._sum = torch.cat(parts, 1)
        past = whole[:, :-new]
        return _project(module, past)

    def _update_difference(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keep X - X̂ of the layer before, or that times U_kv; add it to the running sum."""
        module, stream = self.attention[i], self.layers[i].streams[0]
        down = _factored(module.k_proj, module.v_proj).down if self.latents else None
        stored = stream.stored
        self._add(i, stored)
        keys, values = _project(module, self._sum[:, :stored])
        if stream.tail is not None and stream.tail.shape[1]:
            tail = _project(module, stream.tail if down is None else stream.tail @ down.T)
            keys = torch.cat([keys, tail[0]], 1)
            values = torch.cat([values, tail[1]], 1)
        due = stream.append(x if down is None else x @ down)
        if due is not None:
            fresh = self._sum[:, stored:]
            back = stream.store(due - (fresh if down is None else fresh @ down)).to(x.dtype)
            fresh += back if down is None else back @ down.T
        return keys, values

    def _add(self, i: int, stored: int) -> None:
        """X̂ of layer i's packed tokens: the sum so far plus the layer's own differences."""
        stream = self.layers[i].streams[0]
        if stored:
            delta = stream.unpack().to(self._sum.dtype)
            if self.latents:
                delta = delta @ _factored(self.attention[i].k_proj, self.attention[i].v_proj).down.T
            self._sum[:, :stored] += delta

    # What generate asks of a cache.

    @property
    def nbytes(self) -> int:
        """Bytes kept now: codes, scales, minima, the float window, and the positions."""
        positions = 0 if self.positions is None else self.positions.nbytes
        return sum(layer.nbytes for layer in self.layers) + positions

    @property
    def factor_bytes(self) -> int:
        """Bytes of the weights' factors that the latents need, once a model."""
        if not self.latents:
            return 0
        total = 0
        for i, module in enumerate(self.attention):
            if i >= self.first:
                total += _factored(module.k_proj, module.v_proj).down.nbytes
            elif self._keeps_latents(i):
                for linear in (module.k_proj, module.v_proj):
                    total += sum(x.nbytes for x in _factored(linear))
        return total

    def reset(self) -> None:
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        keep = kept(length, tokens_to_remove)
        if keep == length:
            return
        self._sum = None
        for i, layer in enumerate(self.layers):
            stream = layer.streams[0]
            rows = None
            if i >= self.first and stream.stored:
                self._add(i, stream.stored)
                rows = self._sum
                if self.latents:
                    module = self.attention[i]
                    rows = rows @ _factored(module.k_proj, module.v_proj).down
            elif i == self.first - 1:
                self._sum = stream.unpack().to(stream.tail.dtype) if stream.stored else None
            for stream in layer.streams:
                stream.crop(keep, rows)
        self.positions = self.positions[:, :keep].clone()
        self._sum = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, 0)


def _check_shape(model: nn.Module):
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in _SHAPED_LIKE_LLAMA:
        raise BookError(
            f"model is a {kind}; LayerInputCache rematerializes keys as Llama computes them "
            f"(one of {', '.join(_SHAPED_LIKE_LLAMA)})"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise BookError(
            f'model rotates by "{rope}", whose angles change as the text grows; LayerInputCache '
            f"needs one of {', '.join(_FIXED_ROPE)}"
        )
    return config


def _project(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(F.linear(x, p.weight, p.bias) for p in (module.k_proj, module.v_proj))


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as Llama applies it: [batch, heads, pos, d_head] by cos, sin [batch, 1, pos, d_head]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _factored(*linears: nn.Linear) -> Factors:
    """The SVD of the weights side by side, x ↦ x [W_1ᵀ W_2ᵀ …]; computed once a weight."""
    key = tuple((p.weight.data_ptr(), p.weight._version, p.weight.dtype) for p in linears)
    known = _factors.setdefault(linears[0], {})
    found = known.get(len(linears))
    if found is None or found[0] != key:
        w = torch.cat([p.weight.detach() for p in linears]).T
        u, s, b = torch.linalg.svd(w.float(), full_matrices=False)
        found = (key, Factors(u.to(w.dtype).contiguous(), (s[:, None] * b).to(w.dtype)))
        known[len(linears)] = found
    return found[1]
