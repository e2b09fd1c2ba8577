"""Sets of pictures in one style, by attention shared between them: makes aligned_gen_rows.json.

    python data/attention_control/make_aligned_gen.py [--seeds 0 1 2] [--prompts 72] [--threads 1]

Two thirds of the prompts come in sets of four that say a texture and a background and leave colour
and size open; the first picture of a set is its reference. The others come in threes that name a
shape alone, and take their style from a drawn picture. One row a seed, a variant and a kind; rows
that the scratch folder holds are not made again. About 10 minutes of one thread.
"""

import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import own_rows
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from lib import attention_sharing, denoising, diffusion, hooks, shapes, shapes_score  # noqa: E402

KINDS = ("said", "picture")
STYLE = ("colour", "texture", "size", "background")
AT = 0.25  # where on the way to the picture attention is looked at


# --- the method ----------------------------------------------------------------------------------


def adain(x: Tensor, like: Tensor) -> Tensor:
    """``x`` [n, tokens, n_heads, d_head] with the mean and deviation, over tokens, of ``like``."""
    (mean, own), (target, other) = (
        (y.mean(1, keepdim=True), y.var(1, keepdim=True).add(1e-5).sqrt()) for y in (x, like)
    )
    return (x - mean) / own * other + target


def sharing(first: Tensor, shift: int, text: bool, scale: float = 1.0):
    """Attention shared with a reference, for ``attention_sharing.attending``.

    Args:
        first: int64 [n], for every picture the row of its reference, which has its own number.
        shift: columns by which the reference is taken to lie to the right.
        text: whether text tokens are normalized and shared, too.
        scale: of the reference's keys.
    """

    def share(a):
        of = first if len(first) == len(a.q) else torch.cat([first, first + len(first)])
        begin = 0 if text else a.n_text
        q, k = (
            torch.cat([x[:, :begin], adain(x[:, begin:], x[of, begin:])], 1) for x in (a.q, a.k)
        )
        theirs = a.turn(k[of, begin:], (0, shift))
        keys = torch.cat([a.turn(k), scale * theirs], 1)
        values = torch.cat([a.v, a.v[of, begin:]], 1)
        see = torch.ones(len(of), 1, 1, keys.shape[1], dtype=torch.bool, device=keys.device)
        see[of == torch.arange(len(of), device=of.device), ..., k.shape[1] :] = False
        return a.turn(q), keys, values, see

    return share


# variant -> (ShiftPE, text shared too, scale of the keys, single blocks alone); None: no sharing
VARIANTS = {
    "plain": None,
    "naive": (False, True, 1.0, False),
    "naive + ShiftPE": (True, True, 1.0, False),
    "AlignedGen": (True, False, 1.1, True),
    "AlignedGen, no shift": (False, False, 1.1, True),
    "AlignedGen, λ = 0.9": (True, False, 0.9, True),
}


def single_blocks(pipe) -> list[int]:
    """Numbers of the blocks in which text and picture share their weights."""
    model = pipe.transformer
    n = len(model.transformer_blocks)
    return list(range(n, n + len(model.single_transformer_blocks)))


def chosen(pipe, variant: str, first: Tensor, columns: int):
    """What a variant does to attention, and the blocks in which it does (None: all)."""
    shifted, text, scale, single = VARIANTS[variant]
    share = sharing(first, columns if shifted else 0, text, scale)
    return share, single_blocks(pipe) if single else None


def sample(pipe, prompts, first, x, path, guidance, variant, given=None) -> Tensor:
    """Pictures of sets: float32 [n, 3, 64, 64].

    Args:
        first: as in ``sharing``.
        x: the noise they start from.
        given: {row: latents [4, 16, 16]} of references that are not made but given.
    """
    denoiser = denoising.Denoiser(pipe, prompts, guidance)

    def before(i, x, level):
        for row, clean in (given or {}).items():
            x[row] = level.alpha * clean + level.sigma * noise[row]
        return x

    noise = x.clone()
    if VARIANTS[variant] is None:
        return denoiser.decode(denoising.sample(denoiser, x.clone(), path, before))
    share, blocks = chosen(pipe, variant, first, x.shape[-1] // 2)
    with attention_sharing.attending(pipe.transformer, share, blocks):
        return denoiser.decode(denoising.sample(denoiser, x.clone(), path, before))


# --- what is asked for ---------------------------------------------------------------------------


def said_sets(n: int, seed: int) -> list[list[str]]:
    """``n`` sets of four prompts: one texture, one background, four shapes, colour left open."""
    rng, sets = random.Random(1000 + seed), []
    for i in range(n):
        texture = ("striped", "dotted")[i % 2]
        where = shapes.SAID[rng.choice([b for b in shapes.BACKGROUNDS if b != "white"])][0]
        sets.append([f"a {texture} {s} {where}" for s in rng.sample(shapes.SHAPES, 4)])
    return sets


def picture_sets(n: int, seed: int) -> list[tuple[shapes.Scene, list[str]]]:
    """``n`` drawn references, and for each its caption and three prompts of other shapes."""
    rng, sets = random.Random(2000 + seed), []
    for i in range(n):
        ground = rng.choice([b for b in shapes.BACKGROUNDS if b != "white"])
        own, *others = rng.sample(shapes.SHAPES, 4)
        size, texture = rng.choice(["medium", "large"]), ("striped", "dotted")[i % 2]
        at = [rng.uniform(0.3, 0.7) for _ in range(2)]
        thing = shapes.Thing(own, rng.choice(list(shapes.COLOURS)), size, texture, *at)
        big = "large " if size == "large" else ""
        told = f"a {big}{texture} {thing.colour} {own} {shapes.SAID[ground][0]}"
        scene = shapes.Scene((thing,), ground)
        sets.append((scene, [told, *(f"a {s}" for s in others)]))
    return sets


# --- what is measured ----------------------------------------------------------------------------


def look(row: dict) -> dict:
    """The style of a picture from its row of ``shapes_score.score``, None where it has none."""
    thing = row["things"][0]["found"]
    if thing is None and row["seen"].things:
        thing = max(row["seen"].things, key=lambda t: t.area)
    found = {kind: getattr(thing, kind, None) for kind in STYLE[:3]}
    return found | {"background": row["seen"].background}


def tones(images: Tensor) -> np.ndarray:
    """Shares of 4 × 4 × 4 tones in pictures [n, 3, h, w]: [n, 64]."""
    bins = (images * 3.999).long().flatten(2)
    number = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]
    return (
        torch.stack([torch.bincount(row, minlength=64) for row in number]).numpy()
        / (number.shape[1])
    )


def measure(images: Tensor, prompts: list[str], kind: str) -> dict:
    """Sums over sets of four pictures: pairs that agree in style, and targets that show what their
    prompt names, or the reference's shape."""
    rows = shapes_score.score(images, prompts)
    shares, looks = tones(images), [look(row) for row in rows]
    pairs = {name: [] for name in (*STYLE, "tones")}
    told = {name: [] for name in ("text", "all", "leak")}
    for begin in range(0, len(rows), 4):
        four = range(begin, begin + 4)
        own = rows[begin]["things"][0]["want"].shape
        for i, j in combinations(four, 2):
            if kind == "picture" and i != begin:
                continue
            for name in STYLE:
                pairs[name].append(looks[i][name] == looks[j][name] is not None)
            pairs["tones"].append(np.minimum(shares[i], shares[j]).sum())
        for i in four if kind == "said" else four[1:]:
            told["text"].append(bool(rows[i]["things"][0]["shape"]))
            told["all"].append(bool(rows[i]["all"]))
        for i in four[1:]:
            told["leak"].append(any(t.shape == own for t in rows[i]["seen"].things))
    found = {name: float(np.mean(values)) for name, values in (pairs | told).items()}
    return found | {"style": float(np.mean([found[name] for name in STYLE]))}


@torch.no_grad()
def looked_at(pipe, prompts, first, x, path, guidance, variant) -> tuple[float, np.ndarray]:
    """Where targets look in their reference, ``AT`` of the way.

    Returns:
        the share of what their picture tokens give to the reference's that goes to the token at
        their own place, and by displacement, [2 · rows - 1, 2 · columns - 1], how often a token so
        far away is looked at, times what an even look would give it.
    """
    denoiser = denoising.Denoiser(pipe, prompts, guidance)
    share, blocks = chosen(pipe, variant, first, x.shape[-1] // 2)
    k = max(1, round(AT * (len(path) - 1)))
    with attention_sharing.attending(pipe.transformer, share, blocks):
        x = denoising.sample(denoiser, x.clone(), path[: k + 1])
        with hooks.capture(pipe.transformer, "self_pattern") as acts:
            pipe.transformer(**denoiser.inputs(x, path[k], guided=True))
    rows, columns = (s // 2 for s in x.shape[-2:])
    targets = (first != torch.arange(len(first), device=first.device)).nonzero()[:, 0] + len(first)
    used = range(len(acts)) if blocks is None else blocks
    own = rows * columns
    maps = torch.stack(
        [acts[f"self_pattern.{b}"][targets][:, :, -own:, -own:].mean((0, 1)) for b in used]
    ).mean(0)  # [query, key]
    maps = (maps / maps.sum()).cpu()
    y, x_ = torch.arange(own) // columns, torch.arange(own) % columns
    away = (y[None] - y[:, None] + rows - 1, x_[None] - x_[:, None] + columns - 1)
    far, pairs = torch.zeros(2, 2 * rows - 1, 2 * columns - 1)
    far.index_put_(away, maps, accumulate=True)
    pairs.index_put_(away, torch.full_like(maps, own**-2), accumulate=True)
    return float(maps.trace()), (far / pairs).numpy()


# --- the runs ------------------------------------------------------------------------------------


def one(pipe, variant: str, seed: int, args) -> list[dict]:
    """The rows of a variant and a seed, one a kind of sets."""
    path = denoising.levels(pipe, args.steps)
    device = pipe.transformer.device
    drawn = picture_sets(args.prompts // 9, seed)
    sets = {
        "said": said_sets(args.prompts // 6, seed),
        "picture": [prompts for _, prompts in drawn],
    }
    scenes = shapes.pictures([scene for scene, _ in drawn]).to(device)
    latents = denoising.Denoiser(pipe, ["a circle"]).encode(scenes)
    rows = []
    for k, kind in enumerate(KINDS):
        noise = denoising.noise(4 * len(sets[kind]), 10 * seed + k).to(device)
        images = []
        for begin in range(0, len(sets[kind]), 6):
            part = sets[kind][begin : begin + 6]
            first = torch.arange(len(part), device=device).repeat_interleave(4) * 4
            given = None
            if kind == "picture":
                given = {4 * i: latents[begin + i] for i in range(len(part))}
            x = noise[4 * begin : 4 * (begin + len(part))]
            prompts = sum(part, [])
            images.append(
                sample(pipe, prompts, first, x, path, args.guidance, variant, given).cpu()
            )
        images = torch.cat(images)
        if kind == "picture":
            images[::4] = scenes.cpu()
        row = {"seed": seed, "variant": variant, "kind": kind, "sets": len(sets[kind])}
        row |= measure(images, sum(sets[kind], []), kind)
        if kind == "said" and VARIANTS[variant] is not None:
            prompts = sum(sets[kind][:6], [])
            first = torch.arange(len(prompts), device=device) // 4 * 4
            x = noise[: len(prompts)]
            row["same"], _ = looked_at(pipe, prompts, first, x, path, args.guidance, variant)
        rows.append(row)
    return rows


def rounded(rows: list[dict]) -> list[dict]:
    """Floats to four digits."""
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "aligned_gen", 72, "a seed; a multiple of 18")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=diffusion.GUIDANCE)
    args = own_rows.begin(parser, argv)
    pipe, rows = diffusion.pipeline("flow"), []
    for seed in args.seeds:
        for i, variant in enumerate(VARIANTS):
            kept = args.scratch / f"{args.prompts}_{args.steps}_{seed}_{i}.json"
            rows += own_rows.once(kept, lambda v=variant, s=seed: one(pipe, v, s, args))
            print(*rounded(rows[-2:]), sep="\n", flush=True)
    head = {"steps": args.steps, "guidance": args.guidance, "prompts": args.prompts}
    own_rows.write("aligned_gen", head, rounded(rows))


if __name__ == "__main__":
    main()
