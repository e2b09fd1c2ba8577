"""MONKEY: an image prompt kept to the subject by the mask that it makes itself: monkey_rows.json.

    python data/attention_control/make_monkey.py [--seeds 0 1 2] [--prompts 72] [--threads 1]
        [--scratch DIR]

The U-Net with its IP-Adapter is shown one thing on one background and asked for the thing's shape
on another: half of the things are plain and coloured, half are two-coloured subjects. The adapter
alone at four scales, in the middle half of the steps only, and MONKEY: a second pass in which the
image tokens are masked to where the first pass saw the subject; the same with the true mask. Block,
token, threshold and variant come from pictures of seed 100. A row a picture; a chunk that the
scratch folder holds is not made again. About 3.5 seconds a picture on one thread.
"""

import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import own_rows
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import denoising, diffusion, hooks, shapes, shapes_score, shapes_subjects  # noqa: E402
from lib.denoising import Denoiser  # noqa: E402

STEPS, GUIDANCE, CHUNK = 20, diffusion.GUIDANCE, 12
SCALES, FIRST = (0.25, 0.5, 0.75, 1.0), 0.75  # of the adapter alone; of the first pass
THRESHOLDS = (0.3, 0.5, 0.7)  # of the mask: tried
GRID = 16  # cells of a mask's side: latents
SHOWN = 0.5  # likeness from which a two-coloured subject counts as shown

# --- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A reference picture [3, 64, 64], the ``prompt``, what a right picture shows in words
    (``wanted``), the ``subject`` if it has two colours, and characters of the prompt's noun."""

    picture: Tensor
    prompt: str
    wanted: str
    subject: shapes_subjects.Subject | None
    noun: tuple[int, int]


def cases(n: int, seed: int) -> list[Case]:
    """``n`` cases, plain things and two-coloured subjects by turns, on every background equally."""
    rng, tones = random.Random(seed), list(shapes.BACKGROUNDS)
    found = []
    for i in range(n):
        new = tones[(i // 2 + seed) % len(tones)]
        old = rng.choice([tone for tone in tones if tone != new])
        if i % 2:
            subject = shapes_subjects.subject(rng.randrange(1000))
            shape, colour = subject.shape, subject.colour
            picture, _ = shapes_subjects.reference(subject, rng.randrange(10**6), old)
        else:
            subject, shape = None, rng.choice(shapes.SHAPES)
            colour, low = rng.choice(list(shapes.COLOURS)), 0.56 * shapes.SIZES["large"] + 0.01
            x, y = (rng.uniform(low, 1 - low) for _ in "xy")
            scene = shapes.Scene((shapes.Thing(shape, colour, "large", x=x, y=y),), old)
            picture, _ = shapes.draw(scene)
        where = shapes.SAID[new][0]
        wanted = f"a {shape} {where}" if subject else f"a {colour} {shape} {where}"
        found.append(Case(picture, f"a {shape} {where}", wanted, subject, (2, 2 + len(shape))))
    return found


def denoiser(pipe, found: list[Case]) -> Denoiser:
    """Guided; the half without the prompt sees no picture either (an embedding of zero)."""
    pictures = torch.stack([case.picture for case in found]).to(pipe.device)
    with torch.no_grad():
        seen = pipe.image_encoder(pictures).image_embeds
    embeds = torch.cat([torch.zeros_like(seen), seen])[:, None]
    prompts = [case.prompt for case in found]
    return Denoiser(pipe, prompts, GUIDANCE, added_cond_kwargs={"image_embeds": [embeds]})


# --- the adapter's attention ---------------------------------------------------------------------


class Adapter:
    """What the image tokens do in every cross-attention, by ``hooks``.

    A block with an adapter attends twice, to the text's tokens and to the picture's, and the site
    ``cross_pattern`` holds one pattern after the other. The second one, of few keys, is multiplied
    by ``weight``: a number is the adapter's scale, a tensor [n, 16, 16] a mask. The last patterns
    stay in ``text`` and ``image``, site -> [n, heads, query, key], for the rows with prompts.
    """

    def __init__(self, unet):
        self.unet, self.weight = unet, 1.0
        self.text: dict[str, Tensor] = {}
        self.image: dict[str, Tensor] = {}

    def _change(self, site: str, tokens: int):
        def change(pattern: Tensor) -> Tensor:
            if pattern.shape[-1] == tokens:
                self.text[site] = pattern[len(pattern) // 2 :]
                return pattern
            self.image[site] = pattern[len(pattern) // 2 :]
            if not isinstance(self.weight, Tensor):
                return self.weight * pattern
            side = round(pattern.shape[2] ** 0.5)
            mask = F.adaptive_avg_pool2d(self.weight, side).flatten(1)
            return pattern * torch.cat([mask, mask])[:, None, :, None]

        return change

    @contextmanager
    def watching(self, tokens: int):
        sites = [s for s in hooks.sites(self.unet) if s.startswith("cross_pattern.")]
        with hooks.edit(self.unet, {site: self._change(site, tokens) for site in sites}):
            yield self


def middle(steps: int) -> range:
    """The middle half of the steps."""
    return range(steps // 4, steps - steps // 4)


def run(den: Denoiser, noise: Tensor, path, weight=1.0, only=None, each=None) -> Tensor:
    """Pictures made with the adapter at ``weight`` (a scale or a mask), in the steps ``only``.

    Args:
        each: told ``(step, adapter)`` after every step.
    """
    adapter = Adapter(den.model)

    def before(i, x, level):
        adapter.weight = weight if only is None or i in only else 0.0
        return x

    def after(i, x, clean):
        if each is not None:
            each(i, adapter)

    with adapter.watching(den.n_text):
        x = denoising.sample(den, noise, path, before=before, each=after)
    return den.decode(x).cpu()


def squash(maps: Tensor) -> Tensor:
    """Maps [n, …, h, w], each brought to 0 … 1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def union(maps: Tensor, threshold: float) -> Tensor:
    """Maps [step, n, side, side], each at least ``threshold`` of its range in some step: a mask
    [n, 16, 16]."""
    found = (squash(maps) >= threshold).any(0).float()
    return F.interpolate(found[:, None], (GRID, GRID))[:, 0]


def first_pass(den: Denoiser, found: list[Case], noise, path) -> tuple[Tensor, dict, dict]:
    """Pictures of the adapter at ``FIRST``; from the middle half of the steps the maps of each
    image token, (block, token) -> [step, n, side, side], and of the noun, block -> the same."""
    image, text = {}, {}
    nouns = [denoising.word_tokens(den.pipe.tokenizer, c.prompt, [c.noun]) for c in found]

    def each(i, adapter):
        if i not in middle(len(path) - 1):
            return
        for site, pattern in adapter.image.items():
            side, maps = round(pattern.shape[2] ** 0.5), pattern.mean(1)
            for token in range(maps.shape[-1]):
                square = maps[..., token].unflatten(1, (side, side))
                image.setdefault((site, token), []).append(square.cpu())
            words = adapter.text[site].mean(1)
            own = torch.stack([words[k][:, at].sum(-1) for k, at in enumerate(nouns)])
            text.setdefault(site, []).append(own.unflatten(1, (side, side)).cpu())

    pictures = run(den, noise, path, FIRST, each=each)
    stacked = [{k: torch.stack(v) for k, v in d.items()} for d in (image, text)]
    return pictures, *stacked


# --- measures ------------------------------------------------------------------------------------


def things(rows: list[dict]) -> Tensor:
    """Where ``shapes_score.score`` found things: [n, 64, 64], 0 or 1."""
    empty = torch.zeros(64, 64, dtype=torch.bool)
    found = [sum((t.mask for t in row["seen"].things), empty) for row in rows]
    return torch.stack(found).float()


def coarse(masks: Tensor) -> Tensor:
    """Masks [n, 64, 64] in the cells that they fill by half: [n, 16, 16]."""
    return (F.adaptive_avg_pool2d(masks, GRID) >= 0.5).float()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """[n], of masks [n, 16, 16]; 0 where both are empty."""
    return (a * b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2)).clamp(min=1)


def judge(images: Tensor, found: list[Case]) -> list[list[float]]:
    """[subject shown, background right, likeness or -1] a picture."""
    rows = []
    for k, row in enumerate(shapes_score.score(images, [case.wanted for case in found])):
        subject, alike = found[k].subject, -1.0
        if subject is not None:
            alike = float(shapes_subjects.likeness(images[k : k + 1], subject)[0])
        shown = row["things"][0]["both"] if subject is None else alike >= SHOWN
        rows.append([int(bool(shown)), int(bool(row["background"])), round(alike, 3)])
    return rows


def joint(rows: list[list[float]]) -> float:
    """Share of the pictures that show both, the subject and the background."""
    return round(sum(shown and ground for shown, ground, _ in rows) / len(rows), 4)


# --- rows ----------------------------------------------------------------------------------------


def tune(pipe, path, n: int = 16) -> dict:
    """Block, token and threshold of the mask by IoU, the same for the noun's; then whether the
    second pass masks in all steps, and the scale of the adapter alone, by ``joint``."""
    found, image, text, truth, made = cases(n, 100), {}, {}, [], {}
    for a in range(0, n, CHUNK):
        part = found[a : a + CHUNK]
        den, noise = denoiser(pipe, part), denoising.noise(n, 100)[a : a + CHUNK].to(pipe.device)
        pictures, *maps = first_pass(den, part, noise, path)
        truth.append(coarse(things(shapes_score.score(pictures, [c.wanted for c in part]))))
        for kept, new in zip((image, text), maps, strict=True):
            for key, value in new.items():
                kept.setdefault(key, []).append(value)
    truth = torch.cat(truth)
    worth = {
        (*key, bar) if isinstance(key, tuple) else (key, bar): round(
            float(iou(union(torch.cat(value, 1), bar), truth).mean()), 4
        )
        for maps in (image, text)
        for key, value in maps.items()
        for bar in THRESHOLDS
    }
    chosen = {
        name: max((key for key in worth if len(key) == long), key=worth.get)
        for name, long in (("mask", 3), ("noun", 2))
    }
    *key, bar = chosen["mask"]
    masks = union(torch.cat(image[tuple(key)], 1), bar)
    for a in range(0, n, CHUNK):
        part = found[a : a + CHUNK]
        den, noise = denoiser(pipe, part), denoising.noise(n, 100)[a : a + CHUNK].to(pipe.device)
        runs = {f"adapter {scale}": (scale, None) for scale in SCALES}
        own = masks[a : a + CHUNK].to(pipe.device)
        runs |= {"monkey middle": (own, middle(STEPS)), "monkey all": (own, None)}
        for name, (weight, only) in runs.items():
            made.setdefault(name, []).extend(judge(run(den, noise, path, weight, only), part))
    tried = {name: joint(rows) for name, rows in made.items()}
    best = lambda kind: max((k for k in tried if k.startswith(kind)), key=tried.get)  # noqa: E731
    top = sorted((k for k in worth if len(k) == 3), key=worth.get, reverse=True)[:12]
    return dict(
        mask=list(chosen["mask"]),
        noun=list(chosen["noun"]),
        variant=best("monkey"),
        scale=best("adapter"),
        tried=tried,
        iou={" ".join(map(str, k)): worth[k] for k in top},
    )


def chunk(pipe, found: list[Case], noise: Tensor, settings: dict) -> list[dict]:
    """Rows of some cases: verdicts by method, IoU of the masks."""
    path, den = denoising.levels(pipe, STEPS), denoiser(pipe, found)
    noise = noise.to(pipe.device)
    first, image, text = first_pass(den, found, noise, path)
    (site, token, bar), (noun_site, noun_bar) = settings["mask"], settings["noun"]
    truth = coarse(things(shapes_score.score(first, [case.wanted for case in found])))
    own, noun = union(image[site, token], bar), union(text[noun_site], noun_bar)
    masks = dict(monkey=own, oracle=truth)
    only = middle(STEPS) if settings["variant"] == "monkey middle" else None
    made = {f"adapter {FIRST}": first}
    for scale in SCALES:
        if scale != FIRST:
            made[f"adapter {scale}"] = run(den, noise, path, scale)
    made["adapter middle"] = run(den, noise, path, 1.0, middle(STEPS))
    for name, steps in (("middle", middle(STEPS)), ("all", None)):
        made[f"monkey {name}"] = run(den, noise, path, own.to(noise.device), steps)
    made["oracle"] = run(den, noise, path, masks["oracle"].to(noise.device), only)
    rows = [dict(kind="subject" if case.subject else "plain", runs={}) for case in found]
    for name, images in made.items():
        for row, verdict in zip(rows, judge(images, found), strict=True):
            row["runs"][name] = verdict
    whole = torch.ones_like(truth)
    for name, mask in dict(monkey=own, noun=noun, whole=whole).items():
        for row, value in zip(rows, iou(mask, truth).tolist(), strict=True):
            row.setdefault("iou", {})[name] = round(value, 3)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "attention_control_monkey", 72, "a seed")
    args = own_rows.begin(parser, argv)
    pipe = diffusion.add_adapter(diffusion.pipeline("unet", device="cpu"))

    settings = own_rows.once(
        args.scratch / "settings.json", lambda: tune(pipe, denoising.levels(pipe, STEPS))
    )
    print(settings, flush=True)
    rows = []
    for seed in args.seeds:
        found, noise = cases(args.prompts, seed), denoising.noise(args.prompts, seed)
        for a in range(0, args.prompts, CHUNK):
            part = (found[a : a + CHUNK], noise[a : a + CHUNK], settings)
            kept = args.scratch / f"{seed}_{a}_{len(part[0])}.json"
            made = own_rows.once(kept, lambda p=part: chunk(pipe, *p))
            rows += [dict(seed=seed, i=i) | row for i, row in enumerate(made, a)]
            print(f"seed {seed}: {a + len(made)} of {args.prompts}", flush=True)
    own_rows.write("monkey", dict(steps=STEPS, guidance=GUIDANCE, settings=settings), rows)


if __name__ == "__main__":
    main()
