"""Greedy decoding of Llama-shaped models with low-bit weights: one token, one pass over the bytes.

At batch 1 a decode step multiplies every weight with one number, so its time is the time to read
the weights plus what lies between the products. Here the products are ``lowbit``'s (q, k and v in
one, gate and up in one), what lies between them is a handful of small compiled functions, keys and
values stay in arrays that never move, and a layer costs eight calls from Python where
``transformers.generate`` costs about a hundred and fifty.

The specification is the plain model with the decoder's own (dequantized) weights,
``Decoder.dense()``: the decoder's logits equal its logits but for float32 rounding. Where Numba is
missing, or on a GPU, that model runs in its place. ``torch``'s packed int4 product would serve here
too; it rounds activations to bfloat16 and cannot keep its scales in float16, in which a GGUF file's
Q4_1 weights are stored: through ``lowbit`` at 4 bits in groups of 32 they come through unchanged.

No Triton here: the loop is bookkeeping around ``lowbit.mv``. A prompt goes through token by token,
like the answer; for long prompts use the plain model.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels import lowbit
from lib.kernels.dispatch import OPTIONS, dispatch, njit, prange
from lib.kernels.lowbit import Packed

_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_LONG = 256  # positions from which attention is worth a second thread


def quantize(
    model,
    bits: int | None = 4,
    group: int = 32,
    head_bits: int | None = 8,
    *,
    dtype: torch.dtype | None = None,
    ready: dict[str, Packed] | None = None,
) -> "Decoder":
    """A decoder with ``model``'s weights in few bits; ``model`` itself stays as it is.

    Args:
        model: a ``LlamaForCausalLM`` (no biases, SiLU, default head).
        bits: of the layers' weights, 2, 3, 4 or 8, rounded to nearest in groups of ``group``.
        head_bits: of the output head, in groups of 32; a tied embedding shares them.
        dtype: float32 or bfloat16: plain weights, no bits, in the same loop (``bits`` is ignored).
        ready: module name, such as ``"model.layers.0.mlp.up_proj"``, to a matrix that some other
            method has packed; the rest is rounded to nearest.

    Raises:
        BookError: another kind of model; a ready matrix of a wrong name or shape.
    """
    _check_model(model)
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise BookError(f"dtype is {dtype}; it must be float32 or bfloat16, or None for bits")
    ready = dict(ready or {})

    def weight(name: str, width: int | None, size: int) -> Tensor | Packed:
        full = model.get_submodule(name).weight.detach()
        if dtype is not None:
            return full.to(dtype).clone()
        if name in ready:
            found = ready.pop(name)
            if (found.rows, found.columns) != tuple(full.shape):
                raise BookError(
                    f'ready["{name}"] is [{found.rows}, {found.columns}]; it must be '
                    f"[{full.shape[0]}, {full.shape[1]}]"
                )
            return found
        return lowbit.pack(full, width, size)

    layers = []
    for i, layer in enumerate(model.model.layers):
        parts = {
            key: _stack([weight(f"model.layers.{i}.{name}", bits, group) for name in names])
            for key, names in _PARTS.items()
        }
        norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        layers.append((parts, *(w.detach().float().clone() for w in norms)))
    head = weight("lm_head", head_bits, 32)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    embedding = head if tied else model.model.embed_tokens.weight.detach().float().clone()
    if ready:
        raise BookError(f'ready names "{next(iter(ready))}", which is no product of this model')
    return Decoder(
        model.config, layers, model.model.norm.weight.detach().float().clone(), embedding, head,
        model.model.rotary_emb,
    )  # fmt: skip


class Decoder:
    """Weights and running state of one text. Make it with ``quantize``."""

    def __init__(self, config, layers, norm, embedding, head, rotary):
        self.config, self.layers, self.norm = config, layers, norm
        self.embedding, self.head, self._rotary = embedding, head, rotary
        self.position, self._length = 0, 0
        self._step = None  # compiled at the first use

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a step reads (a tied embedding counts once)."""
        products = [w for parts, *_ in self.layers for w in parts.values()] + [self.head]
        return sum(w.nbytes for w in products)

    def logits(self, ids) -> Tensor:
        """Next-token logits at every position: float32 [pos, vocab] for ids [pos] or [1, pos]."""
        ids = self._ids(ids)
        run = dispatch(self.norm, lambda: self._dense_logits(ids), lambda: self._all(ids))
        return run()

    def generate(self, ids, max_new_tokens: int, stop: int | Iterable[int] = ()) -> Tensor:
        """Greedy continuation: int64 [pos + new], prompt included.

        Args:
            ids: the prompt, [pos] or [1, pos].
            max_new_tokens: at most so many more.
            stop: id or ids after which to stop (kept as the last).
        """
        ids = self._ids(ids)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise BookError(f"max_new_tokens is {max_new_tokens}; it must be a whole number from 0")
        stop = {stop} if isinstance(stop, int) else set(stop)
        run = dispatch(self.norm, self._dense_generate, self._generate)
        return torch.tensor(run(ids, max_new_tokens, stop))

    def dense(self):
        """A plain ``LlamaForCausalLM`` in float32 with exactly this decoder's weights."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        state = {"model.norm.weight": self.norm, "lm_head.weight": _plain(self.head)}
        tied = self.embedding is self.head
        state["model.embed_tokens.weight"] = (
            state["lm_head.weight"] if tied else _plain(self.embedding)
        )
        for i, (parts, before, between) in enumerate(self.layers):
            base = f"model.layers.{i}."
            state[base + "input_layernorm.weight"] = before
            state[base + "post_attention_layernorm.weight"] = between
            for key, names in _PARTS.items():
                sizes = [model.get_submodule(base + name).out_features for name in names]
                for name, w in zip(names, _plain(parts[key]).split(sizes), strict=True):
                    state[f"{base}{name}.weight"] = w.contiguous()
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = self._rotary
        return model.eval().requires_grad_(False)

    # --- one token at a time ----------------------------------------------------------------------

    def start(self, length: int) -> None:
        """Forget the text; make room for ``length`` positions."""
        self.position = 0
        if self._step is None or self._length < length:
            self._length = -(-length // 256) * 256
            self._build()

    def step(self, token: int, want_logits: bool = True) -> np.ndarray | None:
        """Append one token; the logits after it, float32 [vocab] (overwritten by the next step)."""
        if self.position >= self._length:
            raise BookError(f"the text is full at {self._length} positions; start a longer one")
        found = self._step(token, self.position, want_logits)
        self.position += 1
        return found

    def _build(self) -> None:
        c = self.config
        d, mlp = c.hidden_size, c.intermediate_size
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        width, layers, eps = c.head_dim, len(self.layers), np.float32(c.rms_norm_eps)
        keys = np.zeros((layers, kv, width, self._length), np.float32)  # positions side by side
        values = np.zeros((layers, kv, self._length, width), np.float32)
        positions = torch.arange(self._length)[None]
        cos, sin = self._rotary(torch.zeros(1, 1), positions)
        cos, sin = cos[0].float().numpy(), sin[0].float().numpy()
        h2, qkv2, gu2 = (_rows(n) for n in (d, (heads + 2 * kv) * width, 2 * mlp))
        out2, normed = _rows(c.vocab_size), np.empty(d, np.float32)
        h, qkv, gu = (b.reshape(-1)[:n] for b, n in ((h2, d), (qkv2, qkv2.size), (gu2, 2 * mlp)))
        z, act = np.empty(heads * width, np.float32), np.empty(mlp, np.float32)
        embed, last, head = _row(self.embedding), self.norm.numpy(), _product(self.head)
        out = out2.reshape(-1)[: c.vocab_size]
        plan = [
            (a.numpy(), b.numpy(), *(_product(parts[key]) for key in _PARTS), keys[i], values[i])
            for i, (parts, a, b) in enumerate(self.layers)
        ]

        def step(token: int, position: int, want_logits: bool) -> np.ndarray | None:
            embed(token, h)
            turn = cos[position], sin[position]
            attend = _attend_long if position >= _LONG else _attend
            for before, between, to_qkv, to_o, to_gu, to_down, k, v in plan:
                _normalize(h, before, eps, normed)
                to_qkv(normed, qkv2, False)
                attend(qkv, *turn, k, v, position, z)
                to_o(z, h2, True)
                _normalize(h, between, eps, normed)
                to_gu(normed, gu2, False)
                _gate(gu, act)
                to_down(act, h2, True)
            if not want_logits:
                return None
            _normalize(h, last, eps, normed)
            head(normed, out2, False)
            return out

        self._step = step

    def _all(self, ids: list[int]) -> Tensor:
        self.start(len(ids))
        return torch.stack([torch.from_numpy(self.step(token)).clone() for token in ids])

    def _generate(self, ids: list[int], new: int, stop: set[int]) -> list[int]:
        if not new:
            return ids
        self.start(len(ids) + new)
        for token in ids[:-1]:
            self.step(token, want_logits=False)
        ids = list(ids)
        for _ in range(new):
            ids.append(int(self.step(ids[-1]).argmax()))
            if ids[-1] in stop:
                break
        return ids

    # --- the specification ------------------------------------------------------------------------

    @torch.inference_mode()
    def _dense_logits(self, ids: list[int]) -> Tensor:
        return self.dense()(torch.tensor([ids], device=self.norm.device)).logits[0]

    @torch.inference_mode()
    def _dense_generate(self, ids: list[int], new: int, stop: set[int]) -> list[int]:
        model, cache, given, ids = self.dense(), None, list(ids), list(ids)
        for _ in range(new):
            found = model(
                torch.tensor([given], device=self.norm.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache, given = found.past_key_values, [int(found.logits[0, -1].argmax())]
            ids += given
            if ids[-1] in stop:
                break
        return ids

    def _ids(self, ids) -> list[int]:
        ids = torch.as_tensor(ids)
        if ids.dim() == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise BookError(
                f"ids is {list(ids.shape)}; it must be whole numbers [pos], one or more"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise BookError(f"ids must lie in 0 to {self.config.vocab_size - 1}")
        return ids.tolist()


def _check_model(model) -> None:
    from transformers import LlamaForCausalLM

    if not isinstance(model, LlamaForCausalLM):
        raise BookError(f"model is a {type(model).__name__}; decode takes a LlamaForCausalLM")
    c = model.config
    if c.attention_bias or c.mlp_bias or c.hidden_act != "silu":
        raise BookError("model has biases or another activation than SiLU; decode takes neither")
    if (c.num_key_value_heads * c.head_dim) % 16 or c.intermediate_size % 16 or c.head_dim % 2:
        raise BookError("model must have k, v and MLP widths that are multiples of 16")


def _stack(parts: list):
    return lowbit.stack(parts) if isinstance(parts[0], Packed) else torch.cat(parts)


def _plain(weight: Tensor | Packed) -> Tensor:
    return lowbit.unpack(weight) if isinstance(weight, Packed) else weight.float()


def _rows(n: int) -> np.ndarray:
    return np.zeros((-(-n // 16), 16), np.float32)


def _product(weight: Tensor | Packed) -> Callable:
    """``(x [n], y [blocks, 16], add)``: y = W x, or y += W x."""
    if isinstance(weight, Packed):
        words, scales = lowbit.arrays(weight)
        kernel = lowbit.cpu_kernel(weight.bits)
        return lambda x, y, add: kernel(words, scales, x, y, add)
    if weight.dtype == torch.bfloat16:
        halves = weight.view(torch.int16).numpy().view(np.uint16)
        return lambda x, y, add: _half_mv(halves, x, y, add)
    full = weight.numpy()
    return lambda x, y, add: _full_mv(full, x, y, add)


def _row(weight: Tensor | Packed) -> Callable:
    """``(i, y [n])``: y = row i of the embedding."""
    if isinstance(weight, Packed):
        words, scales = lowbit.arrays(weight)
        return lambda i, y: lowbit.read_row(words, scales, weight.bits, i, y)

    def read(i: int, y: np.ndarray) -> None:
        y[:] = weight[i].float().numpy()

    return read


# --- what lies between the products ---------------------------------------------------------------


@njit(**OPTIONS)
def _normalize(x, gain, eps, y):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.size) + eps)
    for i in range(x.size):
        y[i] = x[i] * scale * gain[i]


@njit(inline="always", **OPTIONS)
def _exp(x):
    """e^x to two units in the last place for |x| ≤ 87; unlike libm's it vectorizes."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.3))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    x = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * x + np.float32(1.3981999507e-3)
    p = p * x + np.float32(8.3334519073e-3)
    p = p * x + np.float32(4.1665795894e-2)
    p = p * x + np.float32(1.6666665459e-1)
    p = p * x + np.float32(0.5)
    p = p * x * x + x + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def _gate(gate_up, y):
    half = y.size
    gate, up = gate_up[:half], gate_up[half:]
    for i in range(half):
        y[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]


def _attention(qkv, cos, sin, keys, values, position, out):
    """Rotate, append to keys [kv, d, length], values [kv, length, d]; attend: out [heads · d]."""
    kv, d = keys.shape[0], keys.shape[1]
    heads, half, n = out.size // d, d // 2, position + 1
    for h in range(kv):
        k, v = qkv[(heads + h) * d :], qkv[(heads + kv + h) * d :]
        for i in range(half):
            keys[h, i, position] = k[i] * cos[i] - k[i + half] * sin[i]
            keys[h, i + half, position] = k[i + half] * cos[i + half] + k[i] * sin[i + half]
        for i in range(d):
            values[h, position, i] = v[i]
    scale = np.float32(1 / np.sqrt(d))
    for h in prange(heads):
        at, group = qkv[h * d : (h + 1) * d], h // (heads // kv)
        scores = np.zeros(n, np.float32)
        for i in range(d):
            if i < half:
                q = (at[i] * cos[i] - at[i + half] * sin[i]) * scale
            else:
                q = (at[i] * cos[i] + at[i - half] * sin[i]) * scale
            row = keys[group, i]
            for t in range(n):
                scores[t] += q * row[t]
        top = scores.max()
        total = np.float32(0)
        for t in range(n):
            scores[t] = _exp(scores[t] - top)
            total += scores[t]
        mixed = np.zeros(d, np.float32)
        for t in range(n):
            for i in range(d):
                mixed[i] += scores[t] * values[group, t, i]
        for i in range(d):
            out[h * d + i] = mixed[i] / total


_attend = njit(**OPTIONS)(_attention)
_attend_long = njit(parallel=True, **OPTIONS)(_attention)


@njit(parallel=True, **OPTIONS)
def _full_mv(w, x, y, add):
    for i in prange(w.shape[0]):
        total = np.float32(0)
        for j in range(x.size):
            total += w[i, j] * x[j]
        y[i // 16, i % 16] = total + y[i // 16, i % 16] if add else total


@njit(parallel=True, **OPTIONS)
def _half_mv(w, x, y, add):
    """``w`` holds bfloat16, the upper half of a float32."""
    for i in prange(w.shape[0]):
        total = np.float32(0)
        for j in range(x.size):
            total += np.uint32(np.uint32(w[i, j]) << np.uint32(16)).view(np.float32) * x[j]
        y[i // 16, i % 16] = total + y[i // 16, i % 16] if add else total
