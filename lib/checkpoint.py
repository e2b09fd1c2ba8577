"""What a long computation has reached, kept in a file: tensors and plain values, never a pickle.

One safetensors file: the tensors by number, and in its header the tree that they hang in, as JSON.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.errors import BookError


def save(path, tree) -> None:
    """Write ``tree``: nested dicts (keys text or whole numbers), lists and tuples of tensors,
    numbers, text, booleans and None. An interrupted write leaves the file that was there.

    Raises:
        BookError: anything else in the tree.
    """
    tensors: dict[str, Tensor] = {}

    def plain(x):
        if isinstance(x, Tensor):
            name = str(len(tensors))
            tensors[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(x, dict) and all(isinstance(key, (str, int)) for key in x):
            return {"dict": [[key, plain(value)] for key, value in x.items()]}
        if isinstance(x, (list, tuple)):
            return {"list": [plain(value) for value in x]}
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        raise BookError(f"a checkpoint holds tensors and plain values, not {type(x).__name__}")

    header = {"tree": json.dumps(plain(tree))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=header)
    part.replace(path)


def load(path, device="cpu"):
    """The tree that ``save`` wrote; tuples come back as lists.

    Raises:
        BookError: no such file, or one that ``save`` did not write.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BookError(f"{path} is no checkpoint ({error}); delete it to start anew") from None
    if "tree" not in header:
        raise BookError(f"{path} is no checkpoint (it holds no tree); delete it to start anew")

    def tree(x):
        if not isinstance(x, dict):
            return x
        ((kind, inner),) = x.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "list":
            return [tree(value) for value in inner]
        return {key: tree(value) for key, value in inner}

    return tree(json.loads(header["tree"]))
