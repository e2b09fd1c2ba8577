"""How good a sampler is so far: exact scores of prompts of every kind, and a sheet to look at."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lib import diffusion, shapes_score, shapes_text

KINDS = ("single", "two", "relation", "background")


def sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """Pictures [n, 3, h, w] in [0, 1] in rows."""
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(part), 2) for part in images.split(columns) if len(part) == columns]
    pixels = (torch.cat(rows, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def look(pipe, n: int, folder: Path, step: int, kinds=KINDS, seed: int = 1, **how) -> dict:
    """Share of ``n`` prompts of every kind whose picture is all right, and single measures."""
    folder = folder.parent / "sheets"
    folder.mkdir(parents=True, exist_ok=True)
    name = "flow" if hasattr(pipe, "transformer") else "unet"
    found, drawn = {"step": step}, []
    for kind in kinds:
        prompts = shapes_text.prompts(kind, n, seed)
        images = diffusion.draw(pipe, prompts, seed, **how)
        rows = shapes_score.score(images, prompts)
        drawn.append(images[:16])
        things = [thing for row in rows for thing in row["things"]]
        found[kind] = {
            "all": sum(bool(row["all"]) for row in rows) / n,
            "things": sum(bool(thing["both"]) for thing in things) / len(things),
            "unsure": sum(row.get("sure") is False for row in rows) / n,
        }
        (folder / f"{name}_{kind}.txt").write_text("\n".join(prompts[:16]))
    sheet(torch.cat(drawn).clamp(0, 1)).resize((66 * 8 * 2, 66 * 4 * len(kinds))).save(
        folder / f"{name}_{step}.png"
    )
    return found
