"""Uniform attention maps in DDIM inversion and in editing: makes uniform_maps_rows.json.

    python data/attention_control/make_uniform_maps.py [--seeds 0 1 2] [--prompts 72] [--edits 36]
        [--threads 1] [--scratch DIR]

Pictures of two drawn things are inverted and made again, with the U-Net's cross-attention as it is
and with all its maps set to 1/N, under their own caption and under none. The first ``--edits`` of
each seed also go through another picture's caption and through guidance, and one thing gets another
colour or another shape in four ways. Settings come from pictures of seed 100. A row a picture; a
chunk that the scratch folder holds is not made again. About 4 seconds a picture on one thread.
"""

import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import own_rows
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import denoising, diffusion, hooks, shapes, shapes_score, shapes_text  # noqa: E402
from lib.denoising import Denoiser  # noqa: E402

STEPS, GUIDANCE, CHUNK = 20, diffusion.GUIDANCE, 12
MAPS, TEXTS = ("ordinary", "uniform"), ("own", "empty", "other")
CROSS = 0.4  # share of the steps in which Prompt-to-Prompt gives cross-attention, as published
SELF = (0.6, 0.3, 0.0)  # and self-attention: tried
QUANTILES, BEGINS = (0.5, 0.7, 0.9), (200, 400)  # of the mask: tried
BRANCHES = ("plain", "p2p", "uniform", "latents")  # of the target; source comes before them
GROWN = 3  # pixels by which an edited thing's mask is grown before the rest is compared

# --- pictures and edits --------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """``thing`` (0 or 1) of ``before`` is given another look: ``after``; captions of both."""

    before: shapes.Scene
    after: shapes.Scene
    source: str
    target: str
    thing: int
    kind: str


def caption(scene: shapes.Scene) -> str:
    """Colour and shape of each thing in order, and the background unless white."""
    said = [f"{'an' if t.colour == 'orange' else 'a'} {t.colour} {t.shape}" for t in scene.things]
    where = "" if scene.background == "white" else " " + shapes.SAID[scene.background][0]
    return " and ".join(said) + where


def edits(n: int, seed: int, tokenizer) -> list[Edit]:
    """``n`` scenes of two plain things, backgrounds and kinds of edit by turns. The new word has as
    many tokens as the old one, so that token answers to token."""
    rng, tones = random.Random(seed), list(shapes.BACKGROUNDS)
    places = shapes.sample(n, 5_000 + seed, counts=(0, 1), same=0, related=0)
    length = {w: len(tokenizer(w).input_ids) for w in (*shapes.COLOURS, *shapes.SHAPES)}
    found = []
    for i, prompt in enumerate(shapes_text.prompts("two", n, seed)):
        things = tuple(
            shapes.Thing(want.shape, want.colour, "medium", x=at.x, y=at.y)
            for want, at in zip(shapes_text.parse(prompt).things, places[i].things, strict=True)
        )
        before = shapes.Scene(things, tones[(i // 2 + seed) % len(tones)])
        kind, k = ("colour", "shape")[i % 2], rng.randrange(2)
        words = shapes.COLOURS if kind == "colour" else shapes.SHAPES
        used = [getattr(t, kind) for t in things]
        fits = [[w for w in words if w not in used and length[w] == length[old]] for old in used]
        k = k if fits[k] else 1 - k
        new = rng.choice(fits[k])
        changed = [replace(t, **{kind: new}) if j == k else t for j, t in enumerate(things)]
        after = replace(before, things=tuple(changed))
        found.append(Edit(before, after, caption(before), caption(after), k, kind))
    return found


# --- reconstruction ------------------------------------------------------------------------------


def attention(pipe, maps: str):
    """The context in which the U-Net's cross-attention is ``ordinary`` or ``uniform``."""
    if maps == "ordinary":
        return nullcontext()
    return hooks.edit(pipe.unet, "cross_pattern", lambda a: torch.full_like(a, 1 / a.shape[-1]))


def invert(pipe, latents: Tensor, prompts, path, maps: str) -> Tensor:
    """The noise that DDIM inversion finds."""
    with attention(pipe, maps):
        return denoising.invert(Denoiser(pipe, prompts), latents, path)[0]


def again(pipe, noise: Tensor, prompts, path, maps: str, guidance=1.0) -> tuple[Tensor, list]:
    """From noise back to latents; and the x_0 predicted at each step."""
    seen: list[Tensor] = []
    with attention(pipe, maps):
        down = Denoiser(pipe, prompts, guidance)
        x = denoising.sample(down, noise, path, each=lambda i, x, clean: seen.append(clean))
    return x, seen


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """[n], in dB, of pictures [n, 3, h, w]; over the pixels ``where`` [n, h, w] is 1."""
    wrong = (a - b).square().mean(1)
    where = torch.ones_like(wrong) if where is None else where
    return -10 * ((wrong * where).sum((1, 2)) / where.sum((1, 2))).clamp(min=1e-8).log10()


def ssim(a: Tensor, b: Tensor, side: int = 7) -> Tensor:
    """[n], structural similarity in boxes of ``side`` pixels."""
    mean = lambda x: F.avg_pool2d(x, side, 1)  # noqa: E731
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.mean((1, 2, 3))


def watched(pipe, latents: Tensor, prompts, path) -> tuple[Tensor, Tensor, Tensor]:
    """Up and down with ordinary maps: noise, latents made again, and how far the cross-attentions'
    outputs lie apart on the way up and down, relative to their size, mean over levels and blocks
    [n]."""
    outs = []
    with hooks.capture(pipe.unet, "cross_out", steps=True) as up:
        noise = invert(pipe, latents, prompts, path, "ordinary")
    with hooks.capture(pipe.unet, "cross_out", steps=True) as down:
        x, _ = again(pipe, noise, prompts, path, "ordinary")
    for site in up:
        for a, b in zip(reversed(up[site]), down[site], strict=True):  # the same level
            outs.append((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))
    return noise, x, torch.stack(outs).mean(0)


# --- editing -------------------------------------------------------------------------------------


def mask(source: Tensor, target: Tensor, q: float) -> Tensor:
    """Where two predictions of x_0 [n, c, h, w] differ, grown by one cell: 0 or 1. As in the
    authors' code the difference must exceed its ``q`` quantile twice."""
    apart = (source - target).abs()
    bar = apart.flatten(1).quantile(q, dim=1)[:, None, None, None]
    return F.max_pool2d((apart > 2 * bar).float(), 3, 1, 1)


def branches(pipe, noise, references, source, target, path, settings, self_share=0.0):
    """Edit in several ways at once: latents [1 + len(settings), n, …], the source's first.

    Args:
        references: name -> x_0 [step][n, …], what a branch keeps outside its mask.
        settings: a branch each: (whether it gets the source's attention, the name of its reference
            or None, quantile, the time at which masking begins).
    """
    n, many, steps = len(source), 1 + len(settings), len(path) - 1
    given = [k + 1 for k, row in enumerate(settings) if row[0]]
    now = 0

    def give(share: float):
        def change(a: Tensor) -> Tensor:  # [2 · many · n, heads, query, key]
            if now >= share * steps:
                return a
            rows = a.unflatten(0, (2, many, n))
            rows[1, given] = rows[1, :1].clone()
            return rows.flatten(0, 2)

        return change

    def blend(i, x, clean, noise_):
        nonlocal now
        now = i + 1
        parts = clean.unflatten(0, (many, n)).clone()
        for k, (_, name, q, begin) in enumerate(settings, 1):
            if name and path[i].t < begin:
                kept = 1 - mask(parts[0], parts[k], q * i / (steps - 1))
                parts[k] += kept * (references[name][i] - parts[k])
        return parts.flatten(0, 1), noise_

    unet = pipe.unet
    denoiser = Denoiser(pipe, [*source, *target * len(settings)], GUIDANCE)
    with hooks.edit(unet, {"cross_pattern": give(CROSS), "self_pattern": give(self_share)}):
        x = denoising.sample(denoiser, noise.repeat(many, 1, 1, 1), path, change=blend)
    return x.unflatten(0, (many, n))


def outside(edit: Edit) -> Tensor:
    """1 where neither the old nor the new thing is, nor near it: [64, 64]."""
    both = [shapes.draw(s)[1][edit.thing] for s in (edit.before, edit.after)]
    grown = F.max_pool2d(torch.stack(both).amax(0)[None, None], 2 * GROWN + 1, 1, GROWN)
    return (grown[0, 0] < 0.01).float()


def judge(images: Tensor, wanted: list[Edit]) -> list[list[int]]:
    """[done, kept] a picture: the thing at its place has its new look; all else is as it was."""
    rows = []
    scores = shapes_score.score(images, [e.target for e in wanted])
    for row, edit in zip(scores, wanted, strict=True):
        right = []
        for got, thing in zip(row["things"], edit.after.things, strict=True):
            found = got["found"]
            near = found is not None and max(abs(found.x - thing.x), abs(found.y - thing.y)) < 0.1
            right.append(bool(near and got["both"]))
        kept = right[1 - edit.thing] and row["seen"].background == edit.before.background
        rows.append([int(right[edit.thing]), int(kept and row["extra"] == 0)])
    return rows


# --- rows ----------------------------------------------------------------------------------------


def prepare(pipe, wanted: list[Edit], path):
    """Pictures, their latents, and x_0 at every step: of the uniform branch, and their own."""
    pictures, empty = shapes.pictures([e.before for e in wanted]), [""] * len(wanted)
    latents = Denoiser(pipe, [""]).encode(pictures)
    _, clean = again(pipe, invert(pipe, latents, empty, path, "uniform"), empty, path, "uniform")
    return pictures, latents, dict(uniform=clean, latents=[latents] * (len(path) - 1))


def tune(pipe, path, n: int = 16) -> dict:
    """Self-attention's share of Prompt-to-Prompt, then quantile and beginning of the mask: by the
    share of edits that are done with all else kept, then by PSNR outside."""
    wanted = edits(n, 100, pipe.tokenizer)
    pictures, latents, references = prepare(pipe, wanted, path)
    source, target = [e.source for e in wanted], [e.target for e in wanted]
    noise = invert(pipe, latents, source, path, "ordinary")
    where, decode = torch.stack([outside(e) for e in wanted]), Denoiser(pipe, [""]).decode

    def worth(x):
        images = decode(x)
        right = sum(done and kept for done, kept in judge(images, wanted)) / n
        return [round(right, 4), round(float(psnr(images, pictures, where).mean()), 2)]

    tried = {}
    for share in SELF:
        x = branches(pipe, noise, {}, source, target, path, [(True, None, 0, 0)], share)
        tried[f"self {share}"] = worth(x[1])
    share = max(SELF, key=lambda s: tried[f"self {s}"])
    ways = [(True, "uniform", q, begin) for q in QUANTILES for begin in BEGINS]
    x = branches(pipe, noise, references, source, target, path, ways, share)
    for k, (_, _, q, begin) in enumerate(ways, 1):
        tried[f"mask {q} {begin}"] = worth(x[k])
    best = max(ways, key=lambda way: tried[f"mask {way[2]} {way[3]}"])
    return dict(self=share, quantile=best[2], begin=best[3], tried=tried)


def chunk(pipe, wanted: list[Edit], others: list[str], settings: dict, full: bool) -> list[dict]:
    """Rows of some pictures; ``full`` with the other caption, guidance and edits."""
    path, n = denoising.levels(pipe, STEPS), len(wanted)
    coder = Denoiser(pipe, [""])
    pictures, latents, references = prepare(pipe, wanted, path)
    texts = dict(own=[e.source for e in wanted], empty=[""] * n, other=others)
    rows = [dict(kind=e.kind, psnr={}, ssim={}) for e in wanted]

    def note(name, x):
        images = coder.decode(x)
        for measure, values in (("psnr", psnr(images, pictures)), ("ssim", ssim(images, pictures))):
            for row, value in zip(rows, values.tolist(), strict=True):
                row[measure][name] = round(value, 2 if measure == "psnr" else 3)

    noise, x, apart = watched(pipe, latents, texts["own"], path)
    for row, value in zip(rows, apart.tolist(), strict=True):
        row["apart"] = round(value, 4)
    note("autoencoder", latents)
    note("ordinary own", x)
    note("uniform empty", references["uniform"][-1])  # the last step ends in its x_0
    for maps in MAPS:
        for text in TEXTS[: 3 if full else 2]:
            if f"{maps} {text}" in rows[0]["psnr"]:
                continue
            start = invert(pipe, latents, texts[text], path, maps)
            note(f"{maps} {text}", again(pipe, start, texts[text], path, maps)[0])
            if full and (maps, text) == ("uniform", "own"):
                note("uniform guided", again(pipe, start, texts[text], path, maps, GUIDANCE)[0])
    if not full:
        return rows
    q, begin = settings["quantile"], settings["begin"]
    ways = [(False, None, 0, 0), (True, None, 0, 0)]
    ways += [(True, name, q, begin) for name in ("uniform", "latents")]
    target, where = [e.target for e in wanted], torch.stack([outside(e) for e in wanted])
    x = branches(pipe, noise, references, texts["own"], target, path, ways, settings["self"])
    note("ordinary guided", x[0])
    for name, part in zip(BRANCHES, x[1:], strict=True):
        images = coder.decode(part)
        kept = psnr(images, pictures, where).tolist()
        for row, verdict, value in zip(rows, judge(images, wanted), kept, strict=True):
            row.setdefault("edit", {})[name] = [*verdict, round(value, 2)]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "attention_control_uniform_maps", 72, "pictures a seed")
    parser.add_argument("--edits", type=int, default=36, help="of them also edited")
    args = own_rows.begin(parser, argv)
    pipe = diffusion.pipeline("unet", device="cpu")

    settings = own_rows.once(
        args.scratch / "settings.json", lambda: tune(pipe, denoising.levels(pipe, STEPS))
    )
    print(settings, flush=True)
    rows = []
    for seed in args.seeds:
        wanted = edits(args.prompts, seed, pipe.tokenizer)
        others = [e.source for e in wanted[1:] + wanted[:1]]
        cuts = sorted({*range(0, args.prompts, CHUNK), min(args.edits, args.prompts)})
        for a, b in zip(cuts, [*cuts[1:], args.prompts], strict=True):
            if a < b:
                part = (wanted[a:b], others[a:b], settings, a < args.edits)
                kept = args.scratch / f"{seed}_{a}_{b}_{args.prompts}.json"
                made = own_rows.once(kept, lambda p=part: chunk(pipe, *p))
                rows += [dict(seed=seed, i=i) | row for i, row in enumerate(made, a)]
                print(f"seed {seed}: {b} of {args.prompts}", flush=True)
    own_rows.write("uniform_maps", dict(steps=STEPS, guidance=GUIDANCE, settings=settings), rows)


if __name__ == "__main__":
    main()
