"""Self-attention of a diffusion model between whatever queries, keys and values a method gives it.

``hooks.edit`` changes what attention holds but not how much: it cannot let one picture look at
another. ``attending`` hands the queries, keys and values of chosen blocks to a function before
their softmax, in U-Nets and flow transformers alike, and goes on with what it returns.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import BookError
from lib.wiring import wiring_of


@dataclass
class Attention:
    """What a self-attention block holds before its softmax.

    Attributes:
        block: its number, that of the sites ``self_pattern.block``.
        q, k, v: [n, tokens, n_heads, d_head]; in a flow transformer the text's tokens come first,
            and q and k are normed but not yet turned to their positions.
        n_text: tokens of text among them; 0 in a U-Net.
        hidden: [n, places, width], from which the picture's were made.
    """

    block: int
    q: Tensor
    k: Tensor
    v: Tensor
    n_text: int
    hidden: Tensor
    _attn: nn.Module = field(repr=False)
    _positions: Callable | None = field(default=None, repr=False)

    def turn(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Queries or keys turned to their positions, rotary; as they are in a U-Net.

        Args:
            x: [n, tokens, n_heads, d_head], of text and picture or of the picture alone.
            shift: rows and columns by which the picture's tokens are taken to lie elsewhere.
        """
        if self._positions is None:
            return x
        from diffusers.models.embeddings import apply_rotary_emb

        cos, sin = self._positions(shift)
        if x.shape[1] != len(cos):
            cos, sin = cos[self.n_text :], sin[self.n_text :]
        return apply_rotary_emb(x, (cos, sin), sequence_dim=1)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed, not turned) and values [n, places, n_heads, d_head] of other states."""
        k, v = self._attn.to_k(hidden), self._attn.to_v(hidden)
        k, v = (x.unflatten(-1, (self._attn.heads, -1)) for x in (k, v))
        norm = getattr(self._attn, "norm_k", None)
        return (k if norm is None else norm(k)), v


Share = Callable[[Attention], tuple]


@contextmanager
def attending(model: nn.Module, share: Share, blocks: Iterable[int] | None = None):
    """Let ``share`` say who attends to what while the model runs.

    Args:
        model: a U-Net or Flux-like transformer of ``diffusers``.
        share: from an ``Attention`` to (q, k, v) or (q, k, v, mask), as the softmax gets them: q
            of as many tokens as before, k and v of any number (the same), turned to their
            positions where there are such; the mask boolean (True: may look) or added to the
            scores, broadcast to [n, n_heads, query, key].
        blocks: numbers of self-attention blocks; None for all.

    The model's own processors come back on any exit. ``hooks`` sees the patterns, which have as
    many keys as ``share`` gave.

    Raises:
        BookError: a block without self-attention.
    """
    taps = wiring_of(model).anatomy.taps
    known = {
        int(site.rpartition(".")[2]): tap.module
        for site, tap in taps.items()
        if site.startswith("self_pattern.")
    }
    chosen = list(known) if blocks is None else [int(block) for block in blocks]
    if wrong := [block for block in chosen if block not in known]:
        have = ", ".join(map(str, known)) or "none"
        raise BookError(f"no self-attention in block {wrong[0]}; it is in {have}")
    told: dict = {}  # of the forward at hand: the tokens of the picture, the ids of all
    embed = getattr(model, "pos_embed", None) if hasattr(model, "transformer_blocks") else None
    watches = []
    if embed is not None:

        def note_picture(module, args, kwargs):
            told["places"] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        def note_ids(module, args):
            told["ids"] = args[0]

        watches.append(model.register_forward_pre_hook(note_picture, with_kwargs=True))
        watches.append(embed.register_forward_pre_hook(note_ids))

    def positions(shift):
        ids = told["ids"]
        if shift != (0, 0):
            ids = ids.clone()
            ids[-told["places"] :, 1:] += ids.new_tensor(shift)
        return embed.forward(ids)  # not by a call, which would be noted

    before = {block: known[block].processor for block in chosen}
    try:
        for block in chosen:
            processor = _Processor(block, share, told, None if embed is None else positions)
            known[block].set_processor(processor)
        yield
    finally:
        for block, processor in before.items():
            known[block].set_processor(processor)
        for watch in watches:
            watch.remove()


class _Processor:
    """Takes the place of ``AttnProcessor2_0`` (self-attention) or ``FluxAttnProcessor``."""

    def __init__(self, block: int, share: Share, told: dict, positions):
        self.block, self.share, self.told, self.positions = block, share, told, positions

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb=None,
        **unused,
    ):
        cut = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731
        norm = lambda name, x: (  # noqa: E731
            x if getattr(attn, name, None) is None else getattr(attn, name)(x)
        )
        q, k, v = (cut(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = norm("norm_q", q), norm("norm_k", k)
        n_text, states = 0, hidden_states
        if encoder_hidden_states is not None:  # a joint block: the text has weights of its own
            n_text = encoder_hidden_states.shape[1]
            tq, tk, tv = (
                cut(to(encoder_hidden_states))
                for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            tq, tk = norm("norm_added_q", tq), norm("norm_added_k", tk)
            q, k, v = (torch.cat(pair, 1) for pair in ((tq, q), (tk, k), (tv, v)))
        elif self.positions is not None:  # a single block: text and picture in one row
            n_text = q.shape[1] - self.told["places"]
            states = hidden_states[:, n_text:]
        q, k, v, *mask = self.share(
            Attention(self.block, q, k, v, n_text, states, attn, self.positions)
        )
        z = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[0] if mask else attention_mask
        )
        z = z.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is not None:
            text, z = z[:, :n_text], z[:, n_text:]
            return attn.to_out[1](attn.to_out[0](z)), attn.to_add_out(text)
        if getattr(attn, "to_out", None) is None:  # single blocks project outside
            return z
        return attn.to_out[1](attn.to_out[0](z))
