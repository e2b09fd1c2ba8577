"""Losses for four constraints and refined noise on the book's U-Net: noise_refinement_rows.json.

    python data/attention_control/make_noise_refinement.py [--seeds 0 1 2] [--prompts 72]

Half of the prompts name two things, half a relation. The plain sampler, Attend-and-Excite and the
unified loss make one picture a prompt. Where a verifier, the exact scorer, finds the unified loss's
picture wrong, there is a second: from the same noise, refined on the losses of what was wrong, or,
for control, from fresh noise. And the plain sampler may try three times, which costs less. One row
a picture. Attend-and-Excite's scale is that of make_a_star.py, if it has run; the unified loss's
comes from other prompts, the same four tried. About 10 minutes of one thread.
"""

from itertools import combinations

import own_losses
import torch
from own_losses import Words, among_words, of, stretched
from torch import Tensor

from lib import denoising, shapes_score, shapes_text

SHARE = 0.5  # of the steps that the unified loss steers, 25 of 50
REFINE = 10  # updates of a noise
KINDS, TUNING, TUNING_SEED = ("two", "relation"), 16, 901

# --- the four losses ------------------------------------------------------------------------------


def common(a: Tensor, b: Tensor) -> Tensor:
    """What two maps [n, h, w] have in common: their product over their sum, [n]."""
    a, b = stretched(a), stretched(b)
    return (a * b).sum((1, 2)) / ((a + b).sum((1, 2)) + 1e-8)


def no_place(maps: Tensor, heat: float = 1000.0) -> Tensor:
    """What each noun lacks to a place that is more its own than each other's, [n, things]."""
    share = heat * maps / maps.sum((2, 3), keepdim=True)
    ahead = (share[:, :, None] - share[:, None]).amax((3, 4)).clamp(min=0)  # [n, thing, other]
    return (1 - ahead.sum(2) / max(maps.shape[1] - 1, 1)).clamp(min=0)


def disorder(maps: Tensor, order: Tensor) -> Tensor:
    """How far the maps' centres are from the order that was asked for: [n], 0 where none was."""
    shares = maps / (maps.sum((2, 3), keepdim=True) + 1e-8)
    x = (shares.sum(2) * torch.arange(maps.shape[3], device=maps.device)).sum(2)
    y = (shares.sum(3) * torch.arange(maps.shape[2], device=maps.device)).sum(2)
    wrong = (torch.stack([x, y], 2) * order).sum((1, 2))
    return wrong.sigmoid() * (order != 0).any(2).any(1)


def views(maps: Tensor, words: Words) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of nouns and colours as mild shares of the words, and of nouns as sharp ones."""
    mild, sharp = among_words(maps, words.own, 1.0), among_words(maps, words.own)
    return of(mild, words.nouns), of(mild, words.colours), of(sharp, words.nouns)


def unified(maps: Tensor, words: Words) -> Tensor:
    """All constraints at once, [n]. A relation parts the nouns already, so that their overlap
    counts only where none is asked for (the authors' code)."""
    nouns, colours, sharp = views(maps, words)
    things, related = range(nouns.shape[1]), (words.order != 0).any(2).any(1)
    overlap = sum(common(nouns[:, a], nouns[:, b]) for a, b in combinations(things, 2))
    unbound = sum(1 - common(nouns[:, k], colours[:, k]) for k in things)
    apart = torch.where(related, disorder(sharp, words.order), overlap)
    return no_place(nouns).sum(1) + unbound + apart


def selective(maps: Tensor, words: Words, faults: dict[str, Tensor]) -> Tensor:
    """The losses of what a picture got wrong alone, [n]."""
    nouns, colours, sharp = views(maps, words)
    loss = (faults["missing"] * no_place(nouns, 100.0)).sum(1)
    for k in range(nouns.shape[1]):
        others = [common(nouns[:, k], nouns[:, j]) for j in range(nouns.shape[1]) if j != k]
        loss = loss + faults["missing"][:, k] * sum(others)
        loss = loss + faults["colour"][:, k] * (1 - common(nouns[:, k], colours[:, k]))
    return loss + faults["relation"] * disorder(sharp, words.order)


def verify(images: Tensor, prompts: list[str], device) -> tuple[Tensor, dict[str, Tensor]]:
    """Which pictures are right, bool [n], and what is wrong with the others, 1 or 0: ``missing``
    and ``colour`` [n, things], ``relation`` [n]. Where no constraint is hurt (there is a thing too
    many), all things count as missing."""
    rows = shapes_score.score(images.cpu(), prompts)
    right = torch.tensor([bool(row["all"]) for row in rows], device=device)
    lists = {
        "missing": [[not t["shape"] for t in row["things"]] for row in rows],
        "colour": [[t["colour"] is False for t in row["things"]] for row in rows],
        "relation": [row["relation"] is False for row in rows],
    }
    faults = {k: torch.tensor(v, device=device).float() for k, v in lists.items()}
    nothing = sum(fault.flatten(1).sum(1) if fault.ndim > 1 else fault for fault in faults.values())
    faults["missing"][(nothing == 0) & ~right] = 1.0
    return right, faults


def refine(denoiser, x: Tensor, level, loss, scale: float, rounds: int = REFINE) -> Tensor:
    """The noise ``x`` after some updates on a loss of its maps."""
    for _ in range(rounds):
        slope, _ = own_losses.slope_of(denoiser, x, level, loss)
        x = x - scale * slope
    return x


# --- runs -----------------------------------------------------------------------------------------


def draw(
    pipe, prompts: list[str], x: Tensor, method: str, scale: float, steps: int, spent=None
) -> Tensor:
    """One picture a prompt from the noise ``x``, by one of the methods of a single try. To
    ``spent`` [n] goes what Attend-and-Excite takes, in gradients."""
    denoiser = denoising.Denoiser(pipe, prompts, own_losses.GUIDANCE)
    before, words = None, own_losses.words_of(denoiser)
    if method == "attend-and-excite":
        before = own_losses.attend_and_excite(denoiser, words, scale, steps, spent)
    elif method == "unified":
        before = own_losses.steer(denoiser, lambda i, m: unified(m, words), scale, steps, SHARE)
    path = denoising.levels(pipe, steps)
    return denoiser.decode(denoising.sample(denoiser, x, path, before=before))


def cost(method: str, steps: int) -> int:
    """Of one picture, in guided steps; an update with its gradient takes as long as one."""
    return steps + (round(SHARE * steps) if method == "unified" else 0)


def run(pipe, kind: str, n: int, seed: int, scales: dict, steps: int) -> dict[str, list[dict]]:
    """method -> a row a picture, for one seed's prompts of one kind."""
    rows: dict[str, list[dict]] = {}
    texts, noise = shapes_text.prompts(kind, n, seed), denoising.noise(n, seed)
    fresh = [denoising.noise(n, 10_000 + 100 * seed + k) for k in range(2)]
    for start in range(0, n, own_losses.BATCH):
        prompts = texts[start : start + own_losses.BATCH]
        span = slice(start, start + len(prompts))
        x, *others = (draws[span].to(pipe.device) for draws in (noise, *fresh))
        spent = {m: torch.full((len(prompts),), cost(m, steps)) for m in scales}
        second = {m: torch.zeros(len(prompts), dtype=torch.int) for m in scales}
        tries = {m: draw(pipe, prompts, x, m, scales[m], steps, spent[m]) for m in scales}

        def again(name: str, source: str, at: Tensor, images: Tensor, price: int, tries=tries,
                  spent=spent, second=second):  # fmt: skip
            """Pictures at ``at`` take the place of those of ``source``."""
            for table, value in ((tries, images), (spent, None), (second, 1)):
                table[name] = table[source].clone()
                if len(at):
                    table[name][at] = table[source][at] + price if value is None else value

        # The plain sampler, up to three times.
        name, method = "plain", "plain"
        for k, draws in enumerate(others):
            wrong = (~verify(tries[name], prompts, x.device)[0]).nonzero()[:, 0]
            few = [prompts[i] for i in wrong.tolist()]
            images = draw(pipe, few, draws[wrong], method, 0.0, steps) if few else tries[name][:0]
            again(f"plain, best of {k + 2}", name, wrong, images, cost("plain", steps))
            name = f"plain, best of {k + 2}"
        # The unified loss, once more: from refined noise or from fresh noise.
        right, faults = verify(tries["unified"], prompts, x.device)
        wrong = (~right).nonzero()[:, 0]
        few = [prompts[i] for i in wrong.tolist()]
        for name, start_at in (("refined noise", x), ("fresh noise", others[0])):
            price, images = cost("unified", steps), tries["unified"][:0]
            start_at = start_at[wrong]
            if name == "refined noise":
                price += REFINE
                if few:
                    denoiser = denoising.Denoiser(pipe, few)
                    words, told = (
                        own_losses.words_of(denoiser),
                        {k: v[wrong] for k, v in faults.items()},
                    )
                    start_at = refine(
                        denoiser, start_at, denoising.levels(pipe, steps)[0],
                        lambda m, w=words, t=told: selective(m, w, t), scales["unified"],
                    )  # fmt: skip
            if few:
                images = draw(pipe, few, start_at, "unified", scales["unified"], steps)
            again(name, "unified", wrong, images, price)
        for name, images in tries.items():
            for k, row in enumerate(own_losses.judged(images, prompts)):
                row |= {"second": int(second[name][k]), "cost": int(spent[name][k])}
                rows.setdefault(name, []).append(row)
    return rows


def tune(pipe, steps: int) -> dict:
    """How right the unified loss's pictures are for every scale, on prompts of their own."""

    def worth(scale: float) -> float:
        rows = []
        for kind in KINDS:
            prompts = shapes_text.prompts(kind, TUNING // 2, TUNING_SEED)
            x = denoising.noise(len(prompts), TUNING_SEED).to(pipe.device)
            images = draw(pipe, prompts, x, "unified", scale, steps)
            rows += own_losses.judged(images, prompts)
        return sum(row["things"] + row["all"] for row in rows) / 2 / len(rows)

    return own_losses.tuned(worth)


def main():
    args = own_losses.arguments(__doc__, "noise_refinement")
    torch.set_num_threads(args.threads)
    kept, pipe = own_losses.Kept(args.scratch, args.steps), own_losses.pipeline()
    tried = kept("tune_unified", lambda: tune(pipe, args.steps))
    excite = own_losses.chosen("a_star", "attend-and-excite")
    scales = {"plain": 0.0, "attend-and-excite": excite}
    scales["unified"] = own_losses.best_of(tried)
    n, rows = args.prompts // 2, []
    for kind in KINDS:
        for seed in args.seeds:
            found = kept(
                f"{kind}_{seed}_{n}_{excite:g}",
                lambda a=(kind, n, seed): run(pipe, *a, scales, args.steps),
            )
            for method, own in found.items():
                told = {"kind": kind, "seed": seed, "method": method}
                rows += [told | row for row in own]
    own_losses.write(args.out, dict(steps=args.steps, tried=tried, scales=scales), rows)


if __name__ == "__main__":
    main()
