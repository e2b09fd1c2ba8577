"""What the makers that steer a U-Net by a loss on its cross-attention share, and their baseline.

Where the words of prompts stand among the tokens, maps made comparable as Attend-and-Excite (Chefer
et al., arXiv 2301.13826) makes them, that method itself, and the harness of the makers: batches,
judged pictures, parts that a scratch folder keeps.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import denoising, diffusion, hooks, models, shapes_score, shapes_text  # noqa: E402

SIZE = (16, 16)  # of the maps; those of 8 × 8 are scaled to it
GUIDANCE, STEPS, BATCH = diffusion.GUIDANCE, 20, 24
HEAT = 100  # of the softmax over words (Attend-and-Excite's code)
# Attend-and-Excite goes on, at 0, 20 and 40 % of the steps, until the weakest word has this peak;
# for at most 20 rounds of its 50 steps' worth, 8 of 20.
THRESHOLDS, ROUNDS = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}, 8
SCALES = (1.25, 5.0, 20.0, 80.0)  # tried for every method; 20 is Attend-and-Excite's own

# --- words and maps -------------------------------------------------------------------------------

_TOWARDS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}


class Words(NamedTuple):
    """Where the words of a batch's prompts stand; all prompts name equally many things.

    ``own`` bool [n, tokens]: words, not special tokens or padding. ``nouns`` and ``colours``
    [n, things, tokens] pick a word's map: 1 at its token, or shares of its tokens. ``order``
    [n, things, 2]: +1 and -1 for those that are to have the smaller and larger x or y; 0 where the
    prompt says nothing.
    """

    own: Tensor
    nouns: Tensor
    colours: Tensor
    order: Tensor

    def rows(self, index: Tensor) -> "Words":
        return Words(*(part[index] for part in self))


def words_of(denoiser) -> Words:
    """The words of a denoiser's prompts, on its device."""
    tokenizer, n, length = denoiser.pipe.tokenizer, len(denoiser.prompts), denoiser.n_text
    wanted = [shapes_text.parse(prompt) for prompt in denoiser.prompts]
    own = torch.zeros(n, length, dtype=torch.bool)
    nouns, colours = torch.zeros(2, n, len(wanted[0].things), length)
    order = torch.zeros(n, nouns.shape[1], 2)
    for i, (prompt, want) in enumerate(zip(denoiser.prompts, wanted, strict=True)):
        own[i, denoising.word_tokens(tokenizer, prompt, [(0, len(prompt))])] = True
        for k, thing in enumerate(want.things):
            for picks, kind in ((nouns, "shape"), (colours, "colour")):
                at = denoising.word_tokens(tokenizer, prompt, [thing.spans[kind]])
                picks[i, k, at] = 1 / len(at)
        for a, relation, b in want.relations:
            axis, sign = _TOWARDS[relation]
            order[i, a, axis], order[i, b, axis] = sign, -sign
    device = denoiser.model.device
    return Words(*(part.to(device) for part in (own, nouns, colours, order)))


def among_words(maps: Tensor, own: Tensor, heat: float = HEAT) -> Tensor:
    """Maps [n, tokens, h, w] as shares of the words at each place: softmax of ``heat`` times."""
    return (heat * maps).masked_fill(~own[:, :, None, None], -torch.inf).softmax(1)


def of(maps: Tensor, picks: Tensor) -> Tensor:
    """The maps of picked words: [n, things, h, w]."""
    return torch.einsum("nthw,nkt->nkhw", maps, picks)


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Maps [n, k, h, w] under a Gaussian of 3 × 3."""
    line = torch.exp(-0.5 * (torch.arange(-1.0, 2) / sigma) ** 2)
    kernel = (line[:, None] * line / line.sum() ** 2).to(maps)[None, None]
    flat = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(flat, kernel)[:, 0].unflatten(0, maps.shape[:2])


def stretched(maps: Tensor) -> Tensor:
    """Each map [..., h, w] from 0 at its lowest to 1 at its highest place."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def highs(maps: Tensor) -> Tensor:
    """Where maps [..., h, w] respond highly, at least half as much as at their peak: bool."""
    return stretched(maps) >= 0.5


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks [..., h, w]: [...]."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp(min=1)


# --- steering -------------------------------------------------------------------------------------


def part(denoiser, index: Tensor):
    """The denoiser of some of its prompts."""
    few = copy.copy(denoiser)
    few.prompts = [denoiser.prompts[i] for i in index.tolist()]
    few.states = tuple(state[index] for state in denoiser.states)
    return few


def strength(scale: float, i: int, steps: int) -> float:
    """Step size of the update before step i, as Attend-and-Excite lets it fall."""
    return scale * math.sqrt(1 - 0.5 * i / max(steps - 1, 1))


def slope_of(denoiser, x: Tensor, level, loss: Callable[[Tensor], Tensor]):
    """Slope and values of a loss on the maps [n, tokens, h, w] of all blocks."""
    return denoising.attention_gradient(
        denoiser, x, level, "cross_pattern",
        lambda acts: loss(denoising.text_maps(denoiser, acts, SIZE)),
    )  # fmt: skip


def steer(denoiser, loss, scale: float, steps: int, share: float) -> Callable:
    """``before`` for ``denoising.sample``: one update of the latents before each step.

    Args:
        loss: ``loss(i, maps)`` gives [n].
        share: of the steps, from the first, that are steered.
    """

    def before(i: int, x: Tensor, level) -> Tensor:
        if i >= share * steps:
            return x
        slope, _ = slope_of(denoiser, x, level, lambda maps: loss(i, maps))
        return x - strength(scale, i, steps) * slope

    return before


def neglect(maps: Tensor, words: Words) -> Tensor:
    """Attend-and-Excite's loss, [n]: what the peak of the most neglected noun lacks to 1."""
    peaks = smooth(of(among_words(maps, words.own), words.nouns)).amax((-2, -1))
    return 1 - peaks.amin(1)


def attend_and_excite(
    denoiser, words: Words, scale: float, steps: int, spent: Tensor | None = None
) -> Callable:
    """``before`` for ``denoising.sample``: updates in the first half of the steps, and at three
    of them as many as it takes. ``spent`` [n] has the gradients added that each picture takes."""
    goals = {round(at * steps): goal for at, goal in THRESHOLDS.items()}

    def before(i: int, x: Tensor, level) -> Tensor:
        if i >= steps / 2:
            return x
        size, late = strength(scale, i, steps), torch.arange(len(x), device=x.device)
        for _ in range(ROUNDS if i in goals else 0):
            few = words.rows(late)
            slope, lost = slope_of(part(denoiser, late), x[late], level, lambda m: neglect(m, few))  # noqa: B023
            if spent is not None:
                spent.index_add_(0, late.cpu(), torch.ones_like(spent[: len(late)]))
            short = lost > 1 - goals[i]
            late = late[short]
            if not len(late):
                break
            x = x.index_add(0, late, slope[short], alpha=-size)
        if spent is not None:
            spent.add_(1)
        slope, _ = slope_of(denoiser, x, level, lambda m: neglect(m, words))
        return x - size * slope

    return before


# --- the makers' harness --------------------------------------------------------------------------


def arguments(doc: str, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=72, help="of each seed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / f"own_{name}")
    parser.add_argument("--out", type=Path, default=HERE / f"{name}_rows.json")
    return parser.parse_args()


class Kept:
    """Results by name in the scratch folder, for one state of the weights and one set of steps."""

    def __init__(self, folder: Path, steps: int):
        weights = models.DATA / "diffusion" / "unet.safetensors"
        told = hashlib.sha1(weights.read_bytes()).hexdigest()[:10] if weights.is_file() else "none"
        self.folder = folder / f"{told}_{steps}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], object]):
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(make()))
            print("made", name, flush=True)
        return json.loads(path.read_text())


def judged(images: Tensor, prompts: Sequence[str]) -> list[dict]:
    """Of each picture: all right; things right in shape and colour, as a share; how many are
    missing; mean share of another's colour; colours swapped; relation right, or None."""
    found = []
    for row in shapes_score.score(images.cpu(), list(prompts)):
        leaks = [thing["leak"] for thing in row["things"] if thing["leak"] is not None]
        found.append(
            {
                "all": int(row["all"]),
                "things": round(
                    sum(bool(t["both"]) for t in row["things"]) / len(row["things"]), 3
                ),
                "missing": row["missing"],
                "leak": round(sum(leaks) / len(leaks), 3) if leaks else 0.0,
                "swapped": int(row["swapped"]),
                "relation": None if row["relation"] is None else int(row["relation"]),
            }
        )
    return found


def watched(denoiser, x: Tensor, steps: int, before=None) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, and see the nouns' maps in every step.

    Returns:
        pictures [n, 3, 64, 64]; the nouns' maps, each stretched to [0, 1], and their shares among
        the words, both [steps, n, things, h, w].
    """
    words, path = words_of(denoiser), denoising.levels(denoiser.pipe, steps)
    seen, shares = [], []
    with hooks.capture(denoiser.model, "cross_pattern") as acts:

        def each(i, x, clean):
            maps = denoising.text_maps(denoiser, acts, SIZE)
            seen.append(stretched(of(maps, words.nouns)))
            shares.append(of(among_words(maps, words.own), words.nouns))

        x = denoising.sample(denoiser, x, path, before=before, each=each)
    return denoiser.decode(x), torch.stack(seen), torch.stack(shares)


def overlaps(masks: Tensor) -> Tensor:
    """Mean IoU of the nouns' masks over pairs of things, [steps, n]."""
    k = masks.shape[2]
    pairs = [iou(masks[:, :, a], masks[:, :, b]) for a in range(k) for b in range(a)]
    return torch.stack(pairs).mean(0)


def retained(masks: Tensor) -> Tensor:
    """Mean IoU over nouns of every step's masks with those a fifth of the way, [steps, n]."""
    return iou(masks, masks[len(masks) // 5]).mean(2)


def tuned(worth: Callable[[float], float]) -> dict[str, float]:
    """How well every scale does; where the best is at an end, up to two scales are added there."""
    found = {scale: worth(scale) for scale in SCALES}
    for _ in range(2):
        best = best_of(found)
        if min(found) < best < max(found):
            break
        scale = best * 4 if best == max(found) else best / 4
        found[scale] = worth(scale)
    return {f"{scale:g}": round(found[scale], 4) for scale in sorted(found)}


def best_of(found: dict) -> float:
    """The scale that does best, of equals the smallest."""
    return min(
        map(float, found), key=lambda scale: (-found.get(scale, found.get(f"{scale:g}")), scale)
    )


def pipeline():
    """The U-Net that is steered, on the CPU, one guided sampler for all makers."""
    return diffusion.pipeline("unet", "cpu")


def chosen(name: str, method: str, otherwise: float = 20.0) -> float:
    """The scale that another maker's tuning found for a method."""
    path = HERE / f"{name}_rows.json"
    return json.loads(path.read_text())["scales"][method] if path.is_file() else otherwise


def write(path: Path, about: dict, rows: list[dict]) -> None:
    """Rows a line each, words in them by their place in ``words``."""
    words = {c: list(dict.fromkeys(r[c] for r in rows)) for c in rows[0] if type(rows[0][c]) is str}
    coded = [[words[c].index(v) if c in words else v for c, v in row.items()] for row in rows]
    text = json.dumps(about | {"columns": list(rows[0]), "words": words}, separators=(",", ":"))
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in coded)
    path.write_text(f'{text[:-1]},\n"rows":[\n{lines}\n]}}\n')


def read(path: Path) -> dict:
    """What ``write`` wrote, its ``rows`` as dicts."""
    told = json.loads(path.read_text())
    columns, words = told["columns"], told["words"]
    told["rows"] = [
        {c: words[c][v] if c in words else v for c, v in zip(columns, row, strict=True)}
        for row in told["rows"]
    ]
    return told
