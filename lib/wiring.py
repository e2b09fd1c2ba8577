"""How ``lib.hooks`` switches a site on: PyTorch's own hooks, and attention opened up."""

import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode

from lib.anatomy import Tap, anatomy
from lib.errors import BookError

_SOFTMAXES = {nn.functional.softmax, torch.softmax, Tensor.softmax}


class Wiring:
    """What is switched on in one model right now. One exists per model, while it lives."""

    def __init__(self, model: nn.Module):
        self.anatomy = anatomy(model)
        # site -> functions of (site, x), in the order their contexts were entered
        self.edits: dict[str, list[Callable]] = {}
        self.stores: dict[str, list[Callable]] = {}
        self.live: dict[str, list] = {}  # what to ``remove()`` to unhook each live site
        self.hooks: dict[str, partial] = {}  # made once: 400 sites are hooked at a stroke
        self.offset = 0  # tokens that the cache already holds in this forward
        self.prompt = None  # length of the first forward of a generate() now running
        self.calls = Counter()  # forwards of a module that serves several layers
        self.stash: dict[str, Tensor] = {}  # what entered the block of a resid_mid site

    def fire(self, site: str, x: Tensor) -> Tensor:
        """Pass a site's value through its edits, then show it to whoever captures it."""
        if self.edits:
            for change in self.edits.get(site, ()):
                x = change(site, x)
        for store in self.stores.get(site, ()):
            x = store(site, x)
        return x


_WIRINGS: "weakref.WeakKeyDictionary[nn.Module, Wiring]" = weakref.WeakKeyDictionary()


def wiring_of(model: nn.Module) -> Wiring:
    if not isinstance(model, nn.Module):
        raise BookError(f"hooks need a torch module, not {type(model).__name__}")
    wiring = _WIRINGS.get(model)
    if wiring is None:
        wiring = _WIRINGS[model] = Wiring(model)
    return wiring


_HOOKS = {}  # where -> the hook that serves such a site


def _connect(wiring: Wiring, site: str) -> None:
    """Hook one site, unless it is hooked already."""
    if site in wiring.live:
        return
    tap = wiring.anatomy.taps[site]
    if tap.where in ("scores", "pattern"):
        wiring.live[site] = [_Opened(wiring, site, tap)]
        return
    hook = wiring.hooks.get(site)
    if hook is None:
        hook = wiring.hooks[site] = partial(_HOOKS[tap.where], wiring, site, tap)
    if tap.where == "in":
        wiring.live[site] = [tap.module.register_forward_pre_hook(hook, with_kwargs=True)]
        return
    wiring.live[site] = [tap.module.register_forward_hook(hook)]
    if tap.where == "mid":
        remember = partial(_remember, wiring, site)
        wiring.live[site].append(tap.start().register_forward_pre_hook(remember, with_kwargs=True))


def _is_mine(wiring: Wiring, site: str, tap: Tap) -> bool:
    """Whether this call of a module that serves several layers is the one that the site means."""
    wiring.calls[site] += 1
    return (wiring.calls[site] - 1) % tap.uses == tap.nth


def _after(wiring: Wiring, site: str, tap: Tap, module, args, output):
    if tap.nth is not None and not _is_mine(wiring, site, tap):
        return None
    full = output if type(output) is Tensor else tap.pick(output)
    x = tap.view(full) if tap.view else full
    y = wiring.fire(site, x)
    if y is x:
        return None
    return tap.put(output, tap.back(full, y) if tap.view else y)


def _before(wiring: Wiring, site: str, tap: Tap, module, args, kwargs):
    if tap.nth is not None and not _is_mine(wiring, site, tap):
        return None
    full = args[0] if args else next(iter(kwargs.values()))
    x = tap.view(full) if tap.view else full
    y = wiring.fire(site, x)
    if y is x:
        return None
    y = tap.back(full, y) if tap.view else y
    return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): y})


def _remember(wiring: Wiring, site: str, module, args, kwargs):
    wiring.stash[site] = args[0] if args else next(iter(kwargs.values()))


def _middle(wiring: Wiring, site: str, tap: Tap, module, args, output):
    # The stream between the halves is never an output: it is resid_pre + attn_out, so a change to
    # it is written as a change to attn_out.
    if tap.nth is not None and not _is_mine(wiring, site, tap):
        return None
    start = wiring.stash[site]
    x = start + tap.pick(output)
    y = wiring.fire(site, x)
    return None if y is x else tap.put(output, y - start)


_HOOKS.update({"in": _before, "out": _after, "mid": _middle})


class _Opened:
    """One site of an attention that is taken apart while this lives; ``remove()`` ends it."""

    def __init__(self, wiring: Wiring, site: str, tap: Tap):
        self.wiring, self.site, self.tap, self.module = wiring, site, tap, tap.module
        if self.module not in _OPEN:
            _OPEN[self.module] = []
            _CLOSE[self.module] = _stand_in(self.module) or _detour(self.module)
        _OPEN[self.module].append(self)

    def remove(self) -> None:
        _OPEN[self.module].remove(self)
        if not _OPEN[self.module]:
            del _OPEN[self.module]
            _CLOSE.pop(self.module)()


# attention module -> its opened sites, and what puts it back once there is none
_OPEN: "weakref.WeakKeyDictionary[nn.Module, list[_Opened]]" = weakref.WeakKeyDictionary()
_CLOSE: "weakref.WeakKeyDictionary[nn.Module, Callable]" = weakref.WeakKeyDictionary()


def _watched(module: nn.Module, attend: Callable, *args, **kwargs):
    """Call ``attend``, within which the attention of ``module`` happens, with its sites shown."""
    wanted = [
        one
        for one in _OPEN[module]
        if one.tap.nth is None or _is_mine(one.wiring, one.site, one.tap)
    ]
    with _Attention(wanted):
        return attend(*args, **kwargs)


def _detour(module: nn.Module) -> Callable:
    """Watch the whole forward of ``module``; returns what ends that."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = partial(_watched, module, module.forward)

    def close():
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own

    return close


_STAND_INS: dict[tuple, list] = {}  # (registry, name) -> [its own function, modules served]


def _stand_in(module: nn.Module) -> Callable | None:
    """Watch only the function that ``transformers`` looks up for the attention of ``module``.

    Each torch call within a function mode costs a little, and a forward has forty before it comes
    to the attention itself. Returns what ends the watch; ``None`` if no function is looked up.
    """
    forward = inspect.unwrap(type(module).forward)
    registry = getattr(forward, "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS")
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if registry is None or "forward" in module.__dict__ or name not in registry:
        return None
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        return None
    key = (id(registry), name)
    if key not in _STAND_INS:
        own = registry[name]

        def attention(module, *args, **kwargs):
            if module not in _OPEN:  # another model's, or not wanted
                return own(module, *args, **kwargs)
            return _watched(module, own, module, *args, **kwargs)

        registry[name] = attention
        _STAND_INS[key] = [own, 0]
    _STAND_INS[key][1] += 1

    def close():
        _STAND_INS[key][1] -= 1
        if not _STAND_INS[key][1]:
            registry[name] = _STAND_INS.pop(key)[0]

    return close


class _Attention(TorchFunctionMode):
    """Opens up the attention that runs inside one module, whatever code computes it.

    Fused attention hides its scores and pattern, so it is computed step by step here; an
    implementation that calls a softmax itself shows both, its soft-caps and biases included.
    """

    def __init__(self, wanted: list[_Opened]):
        super().__init__()
        self.wanted = wanted
        self.heads = wanted[0].tap.heads if wanted else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is sdpa:
            return self.attend(*args, **(kwargs or {}))
        if func in _SOFTMAXES and args[0].dim() >= 3:
            scores = self.show("scores", args[0])
            return self.show("pattern", func(scores, *args[1:], **(kwargs or {})))
        return func(*args, **kwargs) if kwargs else func(*args)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
               scale=None, enable_gqa=False):  # fmt: skip
        """Softmax attention with torch's own arguments; query [batch, heads, n, d_head]."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = _grouped(query * scale, key.transpose(-2, -1))
        if is_causal:
            scores = scores + _future(*scores.shape[-2:], scores.dtype, scores.device)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        scores = self.show("scores", scores)
        pattern = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            pattern = pattern.nan_to_num()  # a padded query may see no key at all
        pattern = self.show("pattern", pattern.to(value.dtype))
        if dropout_p:
            pattern = nn.functional.dropout(pattern, dropout_p)
        return _grouped(pattern, value)

    def show(self, where: str, x: Tensor) -> Tensor:
        # [batch, heads, query, key] for the reader; the model may have folded heads into the
        # batch (diffusers) or into the queries (one query a step under grouped heads).
        shape = x.shape
        if len(shape) == 4 and shape[1] == self.heads:
            pass
        elif x.dim() == 3 and self.heads:
            x = x.unflatten(0, (-1, self.heads))
        elif self.heads and x.shape[1] != self.heads and x.shape[1] * x.shape[2] == self.heads:
            x = x.flatten(1, 2).unsqueeze(2)
        for one in self.wanted:
            if one.tap.where == where:
                x = one.wiring.fire(one.site, x)
        return x if x.shape == shape else x.reshape(shape)


def _grouped(x: Tensor, shared: Tensor) -> Tensor:
    """x @ shared, where several heads of x share one of ``shared`` ([batch, fewer heads, m, n])."""
    if x.shape[1] == shared.shape[1]:
        return x @ shared
    together = x.reshape(x.shape[0], shared.shape[1], -1, x.shape[-1])
    return (together @ shared).reshape(*x.shape[:-1], shared.shape[-1])


@lru_cache(maxsize=16)
def _future(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity where a key lies after the query, else 0 [queries, keys]."""
    with torch.inference_mode(False):  # a cached mask must also serve a run that wants gradients
        return torch.full((queries, keys), -math.inf, dtype=dtype, device=device).triu(1)


def _disconnect(wiring: Wiring, site: str) -> None:
    """Unhook a site that nobody reads or writes any more."""
    if not wiring.edits.get(site) and not wiring.stores.get(site):
        for handle in wiring.live.pop(site, ()):
            handle.remove()
        wiring.stash.pop(site, None)


@contextmanager
def connected(model, wiring: Wiring, book: dict, entries: Mapping[str, Callable]):
    """Keep ``entries``, functions of (site, x), in ``book`` (``edits`` or ``stores``), hooked."""
    base = wiring.anatomy.base

    def start(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        wiring.offset = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        wiring.calls.clear()

    hook = base.register_forward_pre_hook(start, with_kwargs=True)
    try:
        wiring.offset = 0
        wiring.calls.clear()
        for site, entry in entries.items():
            book.setdefault(site, []).append(entry)
            _connect(wiring, site)
        yield
    finally:
        hook.remove()
        for site, entry in entries.items():
            if entry in book.get(site, ()):
                book[site].remove(entry)
            _disconnect(wiring, site)
