"""Which implementation of an operation runs: by device, by shape, by what is installed.

Numba and Triton are optional. Where one is missing, the torch reference runs instead, and one
notice a process says so.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from lib.errors import BookError
from lib.models import cache_folder

# Numba reads these when it is imported. OpenMP is the layer that torch uses too: its threads are
# the quickest to start, and the two do not fight for the cores.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
# Its cache notices a change of a kernel's own file, not of a file that this one imports from: so
# the folder's name is that of all their contents.
_SOURCES = zlib.crc32(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / f"numba-{_SOURCES:08x}"))

try:
    import numba
    from numba import njit, prange
except ImportError:
    numba, prange = None, range

    def njit(*args, **options):  # leaves the function as it is; dispatch never calls it
        return args[0] if args and callable(args[0]) else lambda function: function


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)  # for the kernels' annotations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Sums may be reordered and contracted, so that they run in vector registers (a rounding of the
# last digits); NaN and infinity keep their meaning, which `fastmath=True` would not promise.
FASTMATH = {"reassoc", "contract", "nsz"}
OPTIONS = {"nogil": True, "fastmath": FASTMATH, "cache": True, "error_model": "numpy"}

_forced: ContextVar[str | None] = ContextVar("forced", default=None)
_told: set[str] = set()


def jit(function: Callable) -> Callable:
    """``triton.jit``, or the function as it is where Triton is missing."""
    return triton.jit(function) if triton else function


@contextmanager
def using(backend: str):
    """Run every operation inside on one backend: ``reference``, ``cpu`` or ``triton``.

    For tests and benches. With ``TRITON_INTERPRET=1`` set before the first import, ``triton``
    runs on CPU tensors too, slowly.
    """
    if backend not in ("reference", "cpu", "triton"):
        raise BookError(f'no backend "{backend}"; there are reference, cpu and triton')
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def dispatch(
    like: Tensor,
    reference: Callable,
    cpu: Callable | None = None,
    triton: Callable | None = None,
    worth: bool = True,
) -> Callable:
    """The implementation to call for tensors on ``like``'s device.

    Args:
        reference: the torch specification; runs anywhere.
        cpu: the Numba kernel's caller, if there is one.
        triton: the Triton kernel's caller, if there is one.
        worth: ``False`` where the shape is one at which the reference is as fast.
    """
    forced = _forced.get()
    if forced == "reference" or (forced is None and not worth):
        return reference
    if forced is None:
        forced = {"cpu": "cpu", "cuda": "triton"}.get(like.device.type, "reference")
    if forced == "triton" and triton is not None and _has("Triton", globals()["triton"]):
        return triton
    if forced == "cpu" and cpu is not None and _has("Numba", numba):
        # As many threads as torch has now: a reader who limits torch limits the kernels too.
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        return cpu
    return reference


def _has(name: str, module) -> bool:
    if module is None and name not in _told:
        _told.add(name)
        warnings.warn(
            f"{name} is not installed: lib.kernels runs its torch references, which are slower "
            f"(pip install {name.lower()})",
            stacklevel=4,
        )
    return module is not None


def check(**tensors: tuple) -> dict[str, int]:
    """Check tensors against their shapes in words; returns the sizes of the named axes.

    ``check(w=(w, "m n"), x=(x, "n", (torch.float32, torch.bfloat16)))``: a name that comes twice
    must be one size, ``...`` stands for any leading axes, and the optional third entry lists the
    dtypes allowed. All tensors must lie on one device.

    Raises:
        BookError: naming the argument, what it is and what it should be.
    """
    sizes: dict[str, int] = {}
    first = None
    for name, (x, axes, *dtypes) in tensors.items():
        if not isinstance(x, Tensor):
            raise BookError(f"{name} is a {type(x).__name__}; it must be a tensor [{axes}]")
        words = axes.split()
        got = f"{name} is [{', '.join(map(str, x.shape))}]; it must be [{', '.join(words)}]"
        if "..." in words:
            words = words[1:]
            shape = x.shape[max(x.dim() - len(words), 0) :]
        else:
            shape = x.shape
        if len(shape) != len(words):
            raise BookError(got)
        for size, word in zip(shape, words, strict=True):
            wanted = int(word) if word.isdigit() else sizes.setdefault(word, size)
            if size != wanted:
                raise BookError(f"{got} with {word} = {wanted}")
        if dtypes and x.dtype not in dtypes[0]:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes[0])
            raise BookError(
                f"{name} is {str(x.dtype).removeprefix('torch.')}; it must be {allowed}"
            )
        first = first or (name, x.device)
        if x.device != first[1]:
            raise BookError(f"{name} is on {x.device}, {first[0]} on {first[1]}; use one device")
    return sizes


def refuse_gradient(name: str, tensors: Iterable[Tensor]) -> None:
    """For an operation that has no backward: say so, instead of losing a gradient in silence."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise BookError(f"{name} has no gradient; call it under torch.no_grad()")
