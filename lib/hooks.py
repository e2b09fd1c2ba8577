"""Read and write the activations of a plain PyTorch model.

A *site* names a tensor: ``"resid_post.12"`` is the residual stream after block 12,
``"pattern.3"`` the attention pattern of block 3. ``"resid_post"`` names it at every layer and
``"resid_post.3-7"`` at five of them. ``sites(model)`` lists what a model has:

==============================  =====================================  ==========================
kind                            shape                                  what
==============================  =====================================  ==========================
embed                           [batch, pos, d_model]                  what enters the first block
resid_pre, resid_mid,           [batch, pos, d_model]                  the residual stream before a
resid_post                                                             block, between attention and
                                                                       MLP, and after the block
attn_in, mlp_in                 [batch, pos, d_model]                  normed input of either half
q                               [batch, pos, n_heads, d_head]          queries, before rotary
k, v                            [batch, pos, n_kv_heads, d_head]       keys (before rotary), values
scores, pattern                 [batch, n_heads, query, key]           before and after the softmax
z                               [batch, pos, n_heads, d_head]          per-head output, before W_O
attn_out, mlp_out               [batch, pos, d_model]                  what either half adds
mlp_hidden                      [batch, pos, d_mlp]                    input of the down projection
final_norm, logits              [batch, pos, d_model or vocab]         after the last norm; logits
==============================  =====================================  ==========================

Diffusers' U-Nets and transformers have ``resid_post``, ``mlp_out``, ``self_pattern``,
``cross_pattern``, ``self_z``, ``cross_z``, ``self_out`` and ``cross_out`` by transformer block,
U-Nets also ``down``, ``mid`` and ``up``. In any model the path of a submodule is a site too: its
output, or with ``:in`` behind it its first input; ``block`` numbers the blocks of a convolutional
net.

``capture`` and ``read`` read sites, ``edit`` writes them. The model is neither wrapped nor
converted, and every exit from a context, exceptions included, leaves it as it was.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from lib.anatomy import Tap
from lib.errors import BookError
from lib.wiring import Wiring, connected, wiring_of


class _Stop(BaseException):
    """Leaves a forward once every wanted site has been read; never seen outside this file."""


# --- names ------------------------------------------------------------------------------------


def sites(model: nn.Module) -> list[str]:
    """Every named site of ``model``, in the order of its layers (submodule paths not listed)."""
    return list(wiring_of(model).anatomy.taps)


def shape(model: nn.Module) -> dict[str, int]:
    """``n_layers``, ``d_model``, ``n_heads``, ``n_kv_heads``, ``d_head`` and ``d_mlp``."""
    return dict(wiring_of(model).anatomy.shape)


def _resolve(wiring: Wiring, model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """Spell names out as single sites: kinds and ranges become one site a layer."""
    taps = wiring.anatomy.taps
    found = []
    for name in [names] if isinstance(names, str) else names:
        kind, _, layers = name.rpartition(".")
        if name in taps:
            found.append(name)
        elif any(tap.startswith(f"{name}.") and tap[len(name) + 1 :].isdigit() for tap in taps):
            found += [tap for tap in taps if tap.rpartition(".")[0] == name]
        elif layers.count("-") == 1 and all(part.isdigit() for part in layers.split("-")):
            first, last = map(int, layers.split("-"))
            span = [f"{kind}.{layer}" for layer in range(first, last + 1)]
            if not span or any(site not in taps for site in span):
                raise _unknown(name, model, taps)
            found += span
        else:
            taps[name] = _module_tap(name, model, taps)
            found.append(name)
    return list(dict.fromkeys(found))


def _module_tap(name: str, model: nn.Module, taps: Mapping) -> Tap:
    path, _, end = name.partition(":")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or not path or end not in ("", "in"):
        raise _unknown(name, model, taps)
    return Tap(ref(module), "in" if end else "out", pos_dim=1)


def _unknown(name: str, model: nn.Module, taps: Mapping) -> BookError:
    layers: dict[str, list[int]] = {}
    for tap in taps:
        kind, _, layer = tap.rpartition(".")
        if layer.isdigit():
            layers.setdefault(kind, []).append(int(layer))
        elif "." not in tap and ":" not in tap:
            layers.setdefault(tap, [])
    spans: dict[str, list[str]] = {}  # kinds that reach over the same layers are named together
    for kind, found in layers.items():
        spans.setdefault(f"in layers {min(found)}-{max(found)}" if found else "", []).append(kind)
    have = "; ".join(f"{', '.join(kinds)} {span}".strip() for span, kinds in spans.items())
    close = difflib.get_close_matches(name, [*taps, *layers], n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return BookError(
        f'no site "{name}" in this {type(model).__name__}.{hint} '
        f"It has {have or 'no named sites'}; and the path of any submodule."
    )


# --- reading --------------------------------------------------------------------------------------


class Activations(dict):
    """Tensors by site name (lists of tensors, one a forward, where ``steps=True``)."""

    def stack(self, kind: str) -> Tensor:
        """The captured sites of one kind, in the order of their layers: [layer, ...]."""
        found = sorted(
            (int(site.rpartition(".")[2]), site)
            for site in self
            if site.rpartition(".")[0] == kind and site.rpartition(".")[2].isdigit()
        )
        return torch.stack([self[site] for _, site in found] or [self[kind]])

    def __missing__(self, site: str):
        have = ", ".join(self) or "nothing: has the model run inside the context?"
        raise BookError(f'"{site}" was not captured; captured: {have}')


@contextmanager
def capture(model: nn.Module, sites: str | Iterable[str], detach: bool = True, steps: bool = False):
    """Read sites while the model runs as usual.

    Args:
        model: any torch module; it stays itself.
        sites: one site, kind or range, or several.
        detach: ``False`` keeps the autograd graph, so that ``torch.autograd.grad(metric,
            acts[site])`` works; the earliest captured site becomes a leaf if the model's weights
            want no gradient.
        steps: ``True`` keeps a list, one tensor a forward (``generate`` runs many); ``False`` the
            last forward's.

    Yields:
        Activations: shapes as in the table above, the model's own dtype and device. Values are
        those the model goes on with, after every edit. They share memory with the model's own.
        ``scores`` and ``pattern`` have attention computed step by step, which changes the output
        by rounding; every other capture leaves it bit for bit the same.

    Raises:
        BookError: a site that the model does not have.
    """
    acts = Activations()
    wiring = wiring_of(model)
    names = _resolve(wiring, model, sites)
    keep = _keeper(wiring, acts, detach, steps)
    with connected(model, wiring, wiring.stores, dict.fromkeys(names, keep)):
        yield acts


def _keeper(wiring: Wiring, acts: Activations, detach: bool, steps: bool) -> Callable:
    copies = wiring.anatomy.inplace  # a later in-place activation would overwrite what we hold
    taps = wiring.anatomy.taps

    def store(site: str, x: Tensor) -> Tensor:
        if detach:
            kept = x.detach() if x.requires_grad else x
            kept = kept.clone() if copies else kept
        else:
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()
            elif taps[site].is_view or copies:
                x = x.clone()  # a node of its own, on the path to the output
            kept = x
        if steps:
            acts.setdefault(site, []).append(kept)
        else:
            acts[site] = kept
        return x

    return store


def read(model: nn.Module, inputs, sites: str | Iterable[str], detach: bool = True) -> Activations:
    """Run the model on ``inputs`` only as far as the last of ``sites``, and return them.

    Nothing after that site is computed: no later layer, no logits.

    Args:
        inputs: a tensor, or a mapping of keyword arguments such as a tokenizer returns.
    """
    wiring = wiring_of(model)
    names = _resolve(wiring, model, sites)
    waiting = set(names)

    def tick(site: str, x: Tensor) -> Tensor:
        waiting.discard(site)
        if not waiting:
            raise _Stop
        return x

    with capture(model, names, detach=detach) as acts:
        with connected(model, wiring, wiring.stores, dict.fromkeys(names, tick)):
            try:
                with torch.set_grad_enabled(not detach):
                    model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            except _Stop:
                pass
    return acts


# --- writing --------------------------------------------------------------------------------------

Positions = int | slice | Iterable[int] | None


@contextmanager
def edit(
    model: nn.Module,
    sites: str | Iterable[str] | Mapping[str, Callable],
    fn: Callable[[Tensor], Tensor] | None = None,
    positions: Positions = None,
    heads: int | Iterable[int] | None = None,
):
    """Replace what sites hold while the model runs: ``x`` becomes ``fn(x)``.

    Args:
        sites: sites with one ``fn`` for all, or a mapping from site to its own function.
        fn: gets the selected part of the site's tensor and returns its new value (the same shape,
            or one that broadcasts to it).
        positions: which tokens, counted from the start of the text, also under ``generate`` with a
            cache; negative ones count from the end of the prompt. For ``scores`` and ``pattern``
            they select queries. ``None``: all.
        heads: which heads, for sites that have them. The part then keeps both axes, in the order
            of the site's shape.

    Edits nest: outer contexts act first. Everything is put back on any exit.

    Raises:
        BookError: an unknown site, a selection that the site does not have, or a result that does
            not fit.
    """
    wiring = wiring_of(model)
    if not isinstance(sites, Mapping):
        if fn is None:
            raise BookError("edit needs a function: edit(model, site, fn) or {site: fn}")
        sites = {site: fn for site in ([sites] if isinstance(sites, str) else sites)}
    changes, met = {}, {}  # met: site -> (whether the positions ever came up, tokens seen)
    for name, function in sites.items():
        for site in _resolve(wiring, model, name):
            changes[site] = _change(wiring, site, function, positions, heads, met)
    with ExitStack() as stack:
        if _is_negative(positions):
            _watch_generate(wiring, model, stack)
        stack.enter_context(connected(model, wiring, wiring.edits, changes))
        yield
    if met and not any(reached for reached, _ in met.values()):
        length = max(tokens for _, tokens in met.values())
        raise BookError(f"no position {positions} came up: the text had {length} tokens")


def _change(wiring, site: str, fn: Callable, positions: Positions, heads, met) -> Callable:
    tap = wiring.anatomy.taps[site]
    if heads is not None and tap.head_dim is None:
        raise BookError(f'"{site}" has no heads; edit q, k, v, z, scores or pattern by head')
    if positions is not None and not isinstance(positions, (int, slice)):
        positions = [int(p) for p in positions]
    if heads is not None:
        heads = [heads] if isinstance(heads, int) else [int(h) for h in heads]

    def change(site: str, x: Tensor) -> Tensor:
        dims, picks = [], []
        if positions is not None:
            tokens = x.shape[tap.pos_dim]
            chosen = _local(positions, wiring.offset, tokens, wiring.prompt)
            met[site] = (met.get(site, (False,))[0] or bool(chosen), wiring.offset + tokens)
            if not chosen:
                return x  # this step of generate() holds none of them
            dims, picks = [tap.pos_dim], [torch.tensor(chosen, device=x.device)]
        if heads is not None:
            if not all(0 <= h < x.shape[tap.head_dim] for h in heads):
                raise BookError(f'"{site}" has heads 0 to {x.shape[tap.head_dim] - 1}, not {heads}')
            dims, picks = [*dims, tap.head_dim], [*picks, torch.tensor(heads, device=x.device)]
        wholes = [x]
        for dim, pick in zip(dims, picks, strict=True):
            wholes.append(wholes[-1].index_select(dim, pick))
        new = fn(wholes.pop().clone() if not dims else wholes.pop())
        shape = [len(picks[dims.index(d)]) if d in dims else n for d, n in enumerate(x.shape)]
        new = _fit(new, shape, x, site)
        for dim, pick, whole in zip(reversed(dims), reversed(picks), reversed(wholes), strict=True):
            new = whole.index_copy(dim, pick, new)
        return new

    return change


def _fit(new, shape: list[int], x: Tensor, site: str) -> Tensor:
    if not isinstance(new, Tensor):
        raise BookError(f'the edit of "{site}" returned {type(new).__name__}, not a tensor')
    try:
        return new.to(x).expand(shape)
    except RuntimeError:
        raise BookError(
            f'the edit of "{site}" returned shape {tuple(new.shape)}, which does not fit '
            f"{tuple(shape)}"
        ) from None


def _is_negative(positions: Positions) -> bool:
    if isinstance(positions, slice):
        return any(p is not None and p < 0 for p in (positions.start, positions.stop))
    if isinstance(positions, int):
        return positions < 0
    return positions is not None and any(p < 0 for p in positions)


def _local(positions: Positions, offset: int, n: int, prompt: int | None) -> list[int]:
    """Which of the ``n`` tokens now in hand are meant; the first of them is token ``offset``."""
    end = offset + n if prompt is None else prompt
    if isinstance(positions, slice):
        low, high, step = positions.start or 0, positions.stop, positions.step or 1
        low = low + end if low < 0 else low
        high = offset + n if high is None else high + end if high < 0 else high
        wanted = range(low, min(high, offset + n), step)
    else:
        wanted = [positions] if isinstance(positions, int) else positions
        wanted = [p + end if p < 0 else p for p in wanted]
    return [p - offset for p in wanted if offset <= p < offset + n]


def _watch_generate(wiring: Wiring, model: nn.Module, stack: ExitStack) -> None:
    """Note the prompt's length while ``model.generate`` runs: negative positions count from it."""
    if not callable(getattr(model, "generate", None)):
        return
    original, had = model.generate, "generate" in model.__dict__

    def generate(*args, **kwargs):
        hook = wiring.anatomy.base.register_forward_pre_hook(first, with_kwargs=True)
        try:
            return original(*args, **kwargs)
        finally:
            hook.remove()
            wiring.prompt = None

    def first(module, args, kwargs):
        if wiring.prompt is None:
            tokens = args[0] if args else kwargs.get("input_ids")
            tokens = kwargs["inputs_embeds"] if tokens is None else tokens
            wiring.prompt = wiring.offset + tokens.shape[1]

    def restore():
        if had:
            model.generate = original
        else:
            del model.generate

    model.generate = generate
    stack.callback(restore)


# Makers of edits: each returns a function from a tensor to its new value.


def add(vector: Tensor, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """``x + scale * vector``; ``vector`` broadcasts to ``x``."""
    return lambda x: x + scale * vector.to(x)


def scale(factor: float) -> Callable[[Tensor], Tensor]:
    """``factor * x``."""
    return lambda x: factor * x


def project_out(directions: Tensor) -> Callable[[Tensor], Tensor]:
    """Remove from the last axis its part in the span of ``directions`` ([d] or [k, d])."""
    basis = torch.linalg.qr(torch.atleast_2d(directions).float().T).Q  # [d, k], orthonormal
    return lambda x: x - ((x.float() @ basis.to(x.device)) @ basis.T.to(x.device)).to(x.dtype)


def replace(value: Tensor | float) -> Callable[[Tensor], Tensor]:
    """``value`` in place of ``x``; it broadcasts to ``x``."""
    return lambda x: torch.as_tensor(value).to(x).expand_as(x)


def zero() -> Callable[[Tensor], Tensor]:
    """Zeros in place of ``x`` (zero ablation)."""
    return torch.zeros_like
