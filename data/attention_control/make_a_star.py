"""Attention segregation and retention on the book's U-Net: makes a_star_rows.json.

    python data/attention_control/make_a_star.py [--seeds 0 1 2] [--prompts 72] [--threads 1]

Prompts that name two things, and a few that name three, by the plain sampler, by Attend-and-Excite
and by A-STAR with both of its losses or one. One row a picture, and by seed and method how far the
nouns' maps overlap, and keep to their early places, in every step. The update's scale comes from
other prompts, the same four tried for both methods; A-STAR also runs at Attend-and-Excite's own.
About 14 minutes of one thread.
"""

import own_losses
import torch
from own_losses import Words, highs, of, stretched
from torch import Tensor

from lib import denoising, shapes_text

METHODS = ("plain", "attend-and-excite", "segregation", "retention", "a-star", "a-star, strong")
MAIN = ("plain", "attend-and-excite", "a-star")
TUNING, TUNING_SEED = 16, 900
STRONG = 20.0  # Attend-and-Excite's own scale: what the losses do to the maps, whatever it costs

# --- the two losses -------------------------------------------------------------------------------


def segregation(maps: Tensor) -> Tensor:
    """How much the concepts' maps [n, things, h, w] share, over pairs: [n], 1/2 a pair at most."""
    total = maps.new_zeros(len(maps))
    for m in range(maps.shape[1]):
        for k in range(m):
            a, b = maps[:, m], maps[:, k]
            total = total + torch.minimum(a, b).sum((1, 2)) / (a + b).sum((1, 2))
    return total


def retention(maps: Tensor, before: Tensor) -> Tensor:
    """How much of the masks of the step before [n, things, h, w] the maps have left, [n]."""
    shared = torch.minimum(maps, before).sum((2, 3)) / (maps + before).sum((2, 3))
    return (1 - shared).sum(1)


class AStar:
    """The loss of a whole run: it remembers the masks of the step before."""

    def __init__(self, words: Words, segregate: bool = True, retain: bool = True):
        self.words, self.segregate, self.retain, self.masks = words, segregate, retain, None

    def __call__(self, i: int, maps: Tensor) -> Tensor:
        maps = stretched(of(maps, self.words.nouns))
        loss = segregation(maps) if self.segregate else 0 * maps.sum((1, 2, 3))
        if self.retain and self.masks is not None:
            loss = loss + retention(maps, self.masks)
        self.masks = highs(maps.detach()).to(maps)
        return loss


def before_of(method: str, denoiser, scale: float, steps: int):
    """What a method does to the latents before each step; None for the plain sampler."""
    if method == "plain":
        return None
    words = own_losses.words_of(denoiser)
    if method == "attend-and-excite":
        return own_losses.attend_and_excite(denoiser, words, scale, steps)
    loss = AStar(words, method != "retention", method != "segregation")
    return own_losses.steer(denoiser, loss, scale, steps, share=1.0)


# --- runs -----------------------------------------------------------------------------------------


def run(pipe, prompts: list[str], seed: int, method: str, scale: float, steps: int) -> dict:
    """Rows of the pictures of ``prompts``, and the curves of their maps over the steps."""
    rows, curves = [], {"overlap": [], "kept": [], "peak": []}
    noise = denoising.noise(len(prompts), seed)
    for start in range(0, len(prompts), own_losses.BATCH):
        few = prompts[start : start + own_losses.BATCH]
        denoiser = denoising.Denoiser(pipe, few, own_losses.GUIDANCE)
        x = noise[start : start + len(few)].to(pipe.device)
        before = before_of(method, denoiser, scale, steps)
        images, maps, shares = own_losses.watched(denoiser, x, steps, before)
        masks, peaks = highs(maps), shares.amax((3, 4))
        overlap, kept = own_losses.overlaps(masks), own_losses.retained(masks)
        for k, row in enumerate(own_losses.judged(images, few)):
            row["overlap"] = round(float(overlap[:, k].mean()), 3)
            row["kept"] = round(float(kept[-1, k]), 3)
            rows.append(row)
        for name, values in (("overlap", overlap), ("kept", kept), ("peak", peaks.mean(2))):
            curves[name].append(values.sum(1))
    mean = {k: (sum(v) / len(prompts)).tolist() for k, v in curves.items()}
    return {"rows": rows, "curves": {k: [round(x, 4) for x in v] for k, v in mean.items()}}


def tune(pipe, method: str, steps: int) -> dict:
    """How right the pictures of every scale are, on prompts of their own."""
    prompts = shapes_text.prompts("two", TUNING, TUNING_SEED)

    def worth(scale: float) -> float:
        rows = run(pipe, prompts, TUNING_SEED, method, scale, steps)["rows"]
        return sum(row["things"] + row["all"] for row in rows) / 2 / len(rows)

    return own_losses.tuned(worth)


def plan(prompts: int) -> list[tuple[str, str, int]]:
    """(kind, method, prompts a seed): half as many for single losses, fewer that name three."""
    two = [("two", m, prompts if m in MAIN else prompts // 2) for m in METHODS]
    return two + [("three", m, max(prompts * 2 // 9, 1)) for m in MAIN]


def main():
    args = own_losses.arguments(__doc__, "a_star")
    torch.set_num_threads(args.threads)
    kept, pipe = own_losses.Kept(args.scratch, args.steps), own_losses.pipeline()
    tried = {m: kept(f"tune_{m}", lambda m=m: tune(pipe, m, args.steps)) for m in MAIN[1:]}
    scales = {m: own_losses.best_of(found) for m, found in tried.items()}
    rows, curves = [], []
    for kind, method, n in plan(args.prompts):
        scale = STRONG if "strong" in method else scales.get(method, scales["a-star"])
        for seed in args.seeds:
            texts = shapes_text.prompts(kind, n, seed)
            found = kept(
                f"{kind}_{seed}_{method}_{n}",
                lambda a=(texts, seed, method, scale): run(pipe, *a, args.steps),
            )
            told = {"kind": kind, "seed": seed, "method": method}
            rows += [told | row for row in found["rows"]]
            curves.append(told | found["curves"])
    about = dict(steps=args.steps, tried=tried, scales=scales, curves=curves)
    own_losses.write(args.out, about, rows)


if __name__ == "__main__":
    main()
