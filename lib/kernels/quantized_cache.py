"""A key-value cache in 2, 3, 4 or 8 bits, for ``model.generate(..., past_key_values=cache)``.

KIVI's rule (arXiv 2402.02750, section 3): keys are quantized per channel, in groups along time,
because a few channels of the keys are large at every token; values per token, in groups within a
head, because each token's value enters the output as a whole. The newest tokens wait in a float
window until a whole group of them can be packed.

Why not a library call: transformers' ``QuantizedCache`` with its quanto and hqq backends needs
packages that are not part of this stack, requantizes the whole past whenever its window is full
(errors add up), and groups both keys and values alike. Its ``fp8`` backend needs nothing, and
stands in the bench: one scale a tensor, 8 bits.

Every step reads b/8 bytes a past value plus 4 bytes a group, unpacks one layer at a time into
floats (``bitpack``) and hands them to the model's own attention: what is kept is packed, what is
transient is one layer.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lib.errors import BookError
from lib.kernels import bitpack
from lib.kernels.bitpack import Packed
from lib.kernels.dispatch import check, refuse_gradient

STORED = {16: torch.float16, 32: torch.float32}  # kept as they are, for comparison


class Stream:
    """One tensor [batch, time, width] that grows: packed groups of tokens, then a float window.

    Args:
        bits: 2, 3, 4, 8 (packed), 16 (float16) or 32 (float32).
        group: values that share a scale: tokens (per channel) or channels (per token).
        per: ``"channel"`` or ``"token"``.
        block: tokens packed at a time; the group itself where groups run along time.
        window: the newest tokens that stay float at least; up to ``window + block - 1`` do.
    """

    def __init__(self, bits: int, group: int, per: str, block: int, window: int):
        self.bits, self.group, self.per, self.block, self.window = bits, group, per, block, window
        self.reset()

    def reset(self) -> None:
        self.packed: Packed | Tensor | None = None
        self.tail: Tensor | None = None

    @property
    def stored(self) -> int:
        """Tokens that are packed."""
        if self.packed is None:
            return 0
        return (self.packed if self.bits in STORED else self.packed.codes).shape[1]

    def __len__(self) -> int:
        return self.stored + (0 if self.tail is None else self.tail.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._tensors())

    def _tensors(self) -> list[Tensor]:
        packed = [] if self.packed is None else self.packed
        return [*([packed] if isinstance(packed, Tensor) else packed)] + (
            [] if self.tail is None else [self.tail]
        )

    def unpack(self, room: int = 0) -> Tensor:
        """float32 [batch, stored + room, width]; the last ``room`` rows are not written."""
        packed = self.packed
        if packed is None:
            like = self.tail
            return like.new_empty(len(like), room, like.shape[2], dtype=torch.float32)
        if self.bits in STORED:
            batch, stored, width = packed.shape
            out = packed.new_empty(batch, stored + room, width, dtype=torch.float32)
            out[:, :stored] = packed
            return out
        codes = packed.codes
        width = codes.shape[2] * 8 // self.bits
        out = torch.empty(len(codes), codes.shape[1] + room, width, device=codes.device)
        return bitpack.dequantize(packed, self.bits, self.group, self.per, out)

    def read(self, x: Tensor) -> Tensor:
        """All that is kept, with the new rows ``x`` [batch, n, width] after it, in x's dtype."""
        if self.tail is None:
            return x
        waiting, new = self.tail.shape[1], x.shape[1]
        out = self.unpack(waiting + new)
        out[:, out.shape[1] - waiting - new : out.shape[1] - new] = self.tail
        out[:, out.shape[1] - new :] = x
        return out.to(x.dtype)

    def append(self, x: Tensor) -> Tensor | None:
        """Let ``x`` wait in the window; returns the rows that are due to be packed, if any."""
        self.tail = x.clone() if self.tail is None else torch.cat([self.tail, x], 1)
        due = (self.tail.shape[1] - self.window) // self.block * self.block
        if due <= 0:
            return None
        rows, self.tail = self.tail[:, :due], self.tail[:, due:].clone()
        return rows

    def store(self, rows: Tensor) -> Tensor:
        """Pack rows [batch, n · block, width]; returns what they will be read back as, float32."""
        if self.bits in STORED:
            new = rows.to(STORED[self.bits])
            self.packed = new if self.packed is None else torch.cat([self.packed, new], 1)
            return new.float()
        new = bitpack.quantize(rows, self.bits, self.group, self.per)
        self.packed = (
            new
            if self.packed is None
            else Packed(*(torch.cat(pair, 1) for pair in zip(self.packed, new, strict=True)))
        )
        return bitpack.dequantize(new, self.bits, self.group, self.per)

    def crop(self, keep: int, rows: Tensor | None = None) -> None:
        """Keep the first ``keep`` tokens; a group that is cut goes back to the window as floats.

        Args:
            rows: [batch, stored, width] to take those floats from; by default what unpacks.
        """
        if keep >= len(self):
            return
        stored = self.stored
        if keep >= stored:
            self.tail = self.tail[:, : keep - stored].clone()
            return
        whole = keep // self.block * self.block
        rows = self.unpack() if rows is None else rows
        self.tail = rows[:, whole:keep].to(self.tail.dtype, copy=True)
        if self.bits in STORED:
            self.packed = self.packed[:, :whole].clone() if whole else None
            return
        lines = whole // self.group if self.per == "channel" else whole
        codes, scale, low = self.packed
        cut = Packed(codes[:, :whole].clone(), scale[:, :lines].clone(), low[:, :lines].clone())
        self.packed = cut if whole else None

    def select(self, index: Tensor) -> None:
        """Keep these rows of the batch, in this order: a beam search's reorder."""
        if self.tail is None:
            return
        index = index.to(self.tail.device)
        self.tail = self.tail.index_select(0, index)
        if isinstance(self.packed, Tensor):
            self.packed = self.packed.index_select(0, index)
        elif self.packed is not None:
            self.packed = Packed(*(x.index_select(0, index) for x in self.packed))


class StreamsLayer(CacheLayerMixin):
    """A layer of a cache that keeps its past in streams; what transformers asks of a layer."""

    is_sliding = False
    supports_early_init = False
    is_croppable = False  # a crop into the packed part leaves a trace: it rounds again later

    def __init__(self, *streams: Stream):
        super().__init__()
        self.streams = streams

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        keys, values = self.streams
        batch, heads, new, d_head = key_states.shape
        found = []
        for stream, x in ((keys, key_states), (values, value_states)):
            rows = x.transpose(1, 2).reshape(batch, new, -1)
            whole = stream.read(rows)
            found.append(whole.view(batch, -1, heads, x.shape[3]).transpose(1, 2))
            due = stream.append(rows)
            if due is not None:
                stream.store(due)
        self.is_initialized = True
        return tuple(found)

    def get_seq_length(self) -> int:
        return len(self.streams[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.streams[0]) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams)

    def reset(self) -> None:
        for stream in self.streams:
            stream.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        keep = kept(len(self.streams[0]), tokens_to_remove)
        for stream in self.streams:
            stream.crop(keep)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for stream in self.streams:
            stream.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        for stream in self.streams:
            if stream.tail is not None:
                stream.select(torch.arange(len(stream.tail)).repeat_interleave(repeats))


class QuantizedKVCache(Cache):
    """Keys per channel, values per token, packed.

    ``model.generate(**inputs, past_key_values=QuantizedKVCache(model, bits=2))``; also for plain
    forward calls. A batch may be padded on either side, beams may be reordered. What a call's own
    tokens attend to among themselves is exact; what is packed is read packed by later calls.

    Args:
        model: a decoder of transformers whose layers all attend to the whole past, or its config.
        bits: 2, 3, 4, 8, 16 (float16) or 32 (float32); or a pair, for keys and for values.
        group: values that share a scale: tokens for keys; channels of a head for values (at most
            a head).
        window: the newest tokens that stay in the model's dtype at least; up to
            ``window + group - 1`` do.

    Raises:
        BookError: for bits, group or window out of range, or a model with other layers.
    """

    def __init__(self, model, bits: int | tuple[int, int] = 4, group: int = 64, window: int = 32):
        config = getattr(model, "config", model).get_text_config(decoder=True)
        bits = (bits, bits) if isinstance(bits, int) else tuple(bits)
        settings(config, bits, group, window)
        d_head = getattr(config, "head_dim", None)
        d_head = d_head or config.hidden_size // config.num_attention_heads
        in_head = min(group, d_head)
        if d_head % in_head:
            raise BookError(f"group is {group}; it must divide a head's {d_head} channels")
        if d_head * config.num_key_value_heads % 8:
            raise BookError("model's keys are not a multiple of 8 wide: they do not pack")
        super().__init__(
            layers=[
                StreamsLayer(
                    Stream(bits[0], group, "channel", group, window),
                    Stream(bits[1], in_head, "token", group, window),
                )
                for _ in range(config.num_hidden_layers)
            ]
        )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        refuse_gradient("QuantizedKVCache", (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes kept now: codes, scales, minima and the float window of every layer."""
        return sum(layer.nbytes for layer in self.layers)


def settings(config, bits: tuple[int, ...], group: int, window: int) -> None:
    """Check what both caches take.

    Raises:
        BookError: naming what is out of range.
    """
    for b in bits:
        if b not in (*bitpack.BITS, *STORED):
            raise BookError(f"bits is {b}; it must be 2, 3, 4, 8, 16 or 32")
    if group < 8 or group % 8:
        raise BookError(f"group is {group}; it must be a multiple of 8")
    if window < 0:
        raise BookError(f"window is {window}; it must be 0 or more tokens")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"} or getattr(config, "sliding_window", None):
        raise BookError(
            f"model has layers of type {', '.join(sorted(types))} or a sliding window; these "
            "caches keep the whole past of full attention only"
        )


def kept(length: int, tokens_to_remove: int) -> int:
    """transformers' ``crop`` takes a negative number: how many tokens to drop."""
    if tokens_to_remove > 0 or -tokens_to_remove > length:
        raise BookError(f"crop({tokens_to_remove}); it must be between {-length} and 0")
    return length + tokens_to_remove


def bytes_kept(cache: Cache) -> int:
    """Bytes that any of these caches, or one of transformers', keeps now."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes

    def size(x) -> int:
        if isinstance(x, Tensor):
            return x.nbytes
        return sum(map(size, x)) if isinstance(x, tuple | list) else 0

    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(size(getattr(layer, name, None)) for layer in cache.layers for name in names)


@torch.inference_mode()
def logits_through(model, ids: Tensor, cache: Cache, chunk: int = 64) -> Tensor:
    """Logits of a text read through a cache in chunks, so that the stored past is really used.

    Args:
        ids: [batch, pos].
        cache: empty; afterwards it holds the text.
        chunk: tokens a call. Within a call the tokens see each other exactly.

    Returns:
        float32 [batch, pos, vocab].
    """
    check(ids=(ids, "batch pos", (torch.int64,)))
    if chunk < 1:
        raise BookError(f"chunk is {chunk}; it must be 1 or more tokens")
    parts = [model(part, past_key_values=cache).logits.float() for part in ids.split(chunk, 1)]
    return torch.cat(parts, 1)


def loss_through(model, ids: Tensor, cache: Cache, chunk: int = 64) -> Tensor:
    """Mean next-token loss of every text in ``ids`` [batch, pos], read through ``cache``.

    Returns:
        [batch], in nats; its exponential is the perplexity.
    """
    logits = logits_through(model, ids, cache, chunk)[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1).mean(1)
