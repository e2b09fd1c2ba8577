"""Small data that several chapters use; what they are and where they come from: data/README.md."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError
from lib.models import DATA

# Names, places and things that are one token each, with a leading space, for SmolLM2's tokenizer.
_NAMES = (
    "Mary John Tom James Dan Martin Amy Scott Kate Anna Alice Bob Sarah Emma Jack Paul Mark Peter "
    "David Michael Daniel Laura Lisa Susan Jane Robert Henry George Charles Andrew"
).split()
_PLACES = "store park school office house station hospital garden".split()
_THINGS = "drink book ring letter gift box ball key".split()
_TEMPLATES = (
    "When{a} and{b} went to the{place},{s} gave a{thing} to",
    "Then,{a} and{b} went to the{place}, and{s} gave a{thing} to",
    "After{a} and{b} went to the{place},{s} handed a{thing} to",
    "While{a} and{b} were at the{place},{s} gave a{thing} to",
)


def ioi(n: int, seed: int = 0, template: int | None = None) -> list[dict]:
    """Prompts of the indirect object identification task (Wang et al., 2022).

    Args:
        n: how many.
        template: always this one of the four, so that all prompts have the same length in tokens;
            ``None`` draws them.

    Returns:
        dicts of ``prompt``, ``corrupt`` (the same with the other name as giver, so that the
        answers change places), ``io`` and ``s`` (the right and the wrong answer, with a leading
        space), ``order`` ("ABB" or "BAB", in which the indirect object comes first or second).
        Both texts have the same length in tokens, and differ in one.
    """
    if n < 1:
        raise BookError(f"ioi needs at least one prompt, not {n}")
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        io, s = rng.sample(_NAMES, 2)
        order = rng.choice(("ABB", "BAB"))
        first, second = (io, s) if order == "ABB" else (s, io)
        text = _TEMPLATES[rng.randrange(len(_TEMPLATES)) if template is None else template]
        words = dict(a=f" {first}", b=f" {second}", place=f" {rng.choice(_PLACES)}")
        words["thing"] = f" {rng.choice(_THINGS)}"
        prompts.append(
            dict(
                prompt=text.format(s=f" {s}", **words),
                corrupt=text.format(s=f" {io}", **words),
                io=f" {io}",
                s=f" {s}",
                order=order,
            )
        )
    return prompts


def _archive(name: str) -> dict[str, np.ndarray]:
    path = DATA / f"{name}.npz"
    if not path.is_file():
        raise BookError(f"data/{name}.npz is missing: restore it from the repository")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def mnist() -> dict[str, np.ndarray]:
    """10,000 training and 2,000 test digits: uint8 ``x_train`` [10000, 28, 28], ``y_train``, …"""
    return _archive("mnist")


def fashion_mnist() -> dict[str, np.ndarray]:
    """10,000 training and 2,000 test garments, in the form of ``mnist()``."""
    return _archive("fashion_mnist")


def moby_dick() -> str:
    """The whole of Moby Dick: 1.2 million characters of English prose."""
    return (DATA / "moby_dick.txt").read_text(encoding="utf-8")


def text(source: str = "moby_dick", characters: int = 0, start: int = 0) -> str:
    """Prose to read: Moby Dick from character ``start`` on, or a text of the reader's own.

    Args:
        source: ``"moby_dick"``, or the path of a UTF-8 file, which is taken whole.
        characters: how many are needed at least.

    Raises:
        BookError: no such file; not UTF-8; too short.
    """
    if source == "moby_dick":
        return moby_dick()[start:]
    try:
        found = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8" if isinstance(error, UnicodeError) else "cannot be read"
        raise BookError(
            f"text {source!r} {why}; give moby_dick or the path of a UTF-8 text file"
        ) from None
    if len(found) < characters:
        raise BookError(
            f"text {source!r} has {len(found):,} characters; this setting needs {characters:,}"
        )
    return found


_PARTS = {"calibration": (0.0, 0.7), "held out": (0.8, 1.0)}  # of Moby Dick, as shares of it


def passages(tokenizer, part: str, n: int, length: int = 256, seed: int = 0) -> Tensor:
    """``n`` passages of Moby Dick, each of ``length`` tokens, drawn by ``seed``: ids [n, length].

    Args:
        part: ``"calibration"``, the first seven tenths of the book, or ``"held out"``, its last
            fifth.

    Raises:
        BookError: another part, or a tokenizer that makes fewer than a token of eight characters.
    """
    if part not in _PARTS:
        raise BookError(f"part {part!r} of Moby Dick is unknown; give one of {', '.join(_PARTS)}")
    whole = moby_dick()
    begin, end = (int(share * len(whole)) for share in _PARTS[part])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(begin, end - 8 * length, (n,), generator=generator).tolist()
    rows = [tokenizer(whole[at : at + 8 * length]).input_ids[:length] for at in starts]
    if min(map(len, rows), default=length) < length:
        raise BookError(f"a passage is shorter than {length} tokens; draw with another seed")
    return torch.tensor(rows)


def photos() -> dict[str, np.ndarray]:
    """Real photographs that come inside scikit-image and scikit-learn: uint8 [height, width, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = {n: getattr(data, n)() for n in ("chelsea", "coffee", "astronaut", "rocket")}
    samples = load_sample_images()
    for path, image in zip(samples.filenames, samples.images, strict=True):
        found[Path(path).stem] = np.asarray(image)
    return found
