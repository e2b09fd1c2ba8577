"""A subject in new scenes by attention to a noised picture of it: makes freecus_rows.json.

    python data/attention_control/make_freecus.py [--seeds 0 1 2] [--prompts 72] [--threads 1]

Half of the subjects have two colours, which no caption describes; half are single things of one
colour. Half of the prompts ask for a background, half for a companion. Which blocks share is told
by leaving out one at a time, how many and how the baseline scales its keys by a tuning set. One row
a seed, a variant, a sort of subject and a kind of prompt; rows that the scratch folder holds are
not made again. About 11 minutes of one thread.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import own_rows
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from lib import (  # noqa: E402
    attention_sharing,
    denoising,
    diffusion,
    shapes,
    shapes_look,
    shapes_score,
    shapes_subjects,
)

TUNING_SEED, SCALE = 99, 1.1
COUNTS, SCALES = (2, 3, 4), (1.0, 1.1, 1.2)  # tried: pivotal blocks; the baseline's scale


# --- the method ----------------------------------------------------------------------------------


def shifted(steps: int, mu: float) -> list[denoising.Level]:
    """The levels of a flow sampler whose ``steps`` dynamic shifting moved by ``mu``."""
    sigmas = [1 / (1 + math.exp(-mu) * (steps / (steps - i) - 1)) for i in range(steps)] + [0.0]
    return [denoising.Level(1000 * s, 1 - s, s) for s in sigmas]


def dynamic(tokens: int = 64) -> float:
    """The shift that Flux gives a picture of so many tokens."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


class Pivotal:
    """Keys and values of a reference, noted in one pass and shared in the next.

    Args:
        seen: bool [n, tokens], the reference's tokens that show the subject.
        scale: of the reference's keys and the text's.
    """

    def __init__(self, seen: Tensor, scale: float = SCALE):
        self.seen, self.scale, self.kept = seen, scale, {}

    def keep(self, a):
        """For the pass over the reference, which attends to itself as ever."""
        k = a.turn(a.k)
        self.kept[a.block] = k[:, a.n_text :], a.v[:, a.n_text :]
        return a.turn(a.q), k, a.v

    def use(self, a):
        """For the pass over the picture that is made."""
        times = len(a.q) // len(self.seen)  # two where guidance has its half without a prompt
        ref_k, ref_v, seen = (
            x.repeat(times, *[1] * (x.ndim - 1)) for x in (*self.kept[a.block], self.seen)
        )
        k = a.turn(a.k)
        k = torch.cat([self.scale * ref_k, self.scale * k[:, : a.n_text], k[:, a.n_text :]], 1)
        see = F.pad(seen, (0, a.k.shape[1]), value=True)
        return a.turn(a.q), k, torch.cat([ref_v, a.v], 1), see[:, None, None]


def customize(pipe, prompts, clean, seen, noise, steps, guidance, mu, blocks, scale=SCALE):
    """Pictures float32 [n, 3, 64, 64] of the subjects of given pictures.

    Args:
        clean: latents of the reference pictures, like ``noise``; seen: as for ``Pivotal``.
        mu: shift of the reference's levels; the picture's own is ``dynamic()``.
        blocks: that share; none for sampling from the prompt alone.
    """
    path, levels = shifted(steps, dynamic()), shifted(steps, mu)
    denoiser, pivotal = denoising.Denoiser(pipe, prompts, guidance), Pivotal(seen, scale)

    def before(i, x, level):
        if blocks:
            x_ref = levels[i].alpha * clean + levels[i].sigma * noise
            with attention_sharing.attending(pipe.transformer, pivotal.keep, blocks):
                denoiser.raw(x_ref, level, guided=False)  # told the picture's time, not its own
        return x

    with attention_sharing.attending(pipe.transformer, pivotal.use, blocks):
        return denoiser.decode(denoising.sample(denoiser, noise, path, before))


def vitality(pipe, prompts, noise, steps, guidance) -> list[float]:
    """How much pictures change, mean over pixels, when a block is left out: one number a block."""
    model, path = pipe.transformer, shifted(steps, dynamic())
    denoiser = denoising.Denoiser(pipe, prompts, guidance)

    def skip(block, args, kwargs, out):
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    whole, found = denoiser.decode(denoising.sample(denoiser, noise, path)), []
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        watch = block.register_forward_hook(skip, with_kwargs=True)
        try:
            part = denoiser.decode(denoising.sample(denoiser, noise, path))
        finally:
            watch.remove()
        found.append(float((part - whole).abs().mean()))
    return found


def describe(picture: Tensor, noun: str) -> str:
    """What a reader of pictures says about the subject: adjectives and the noun.

    Stands in for the multimodal model; of a thing in two colours it says the one that it sees most.
    """
    things = shapes_look.look(picture[None])[0].things
    if not things:
        return noun
    thing = max(things, key=lambda t: t.area)
    size = thing.size if thing.shape == noun and thing.size != "medium" else None
    texture = thing.texture if thing.texture != "plain" else None
    colour = thing.colour or max(thing.colours, key=thing.colours.get, default=None)
    return " ".join(filter(None, [size, texture, colour, noun]))


# --- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A subject, one of ``lib.shapes_subjects`` (``sort`` two) or a thing (``sort`` one); its
    picture's background; the prompt, with {} where the subject is named."""

    sort: str
    subject: shapes_subjects.Subject | shapes.Thing
    ground: str
    kind: str
    text: str
    seed: int

    def prompt(self, name: str | None = None) -> str:
        name = name or self.subject.shape
        return self.text.format(f"an {name}" if name[0] in "aeiou" else f"a {name}")


def tasks(n: int, seed: int) -> list[Task]:
    """``n`` tasks, of either sort and kind in turn."""
    rng, found = random.Random(3000 + seed), []
    for i in range(n):
        sort, kind = ("two", "one")[i % 2], ("background", "companion")[i // 2 % 2]
        if sort == "two":
            subject = shapes_subjects.subject(97 * seed + i)
            own = {subject.colour, subject.second}
        else:
            colour, texture = rng.choice(list(shapes.COLOURS)), rng.choice(shapes.TEXTURES)
            size = rng.choice(("medium", "large"))
            at = [rng.uniform(0.3, 0.7) for _ in range(2)]
            subject = shapes.Thing(rng.choice(shapes.SHAPES), colour, size, texture, *at)
            own = {colour}
        wanted = "white"
        if kind == "background":
            wanted = rng.choice([b for b in shapes.BACKGROUNDS if b != "white"])
            text = "{} " + shapes.SAID[wanted][0]
        else:
            other = rng.choice([s for s in shapes.SHAPES if s != subject.shape])
            colour = rng.choice([c for c in shapes.COLOURS if c not in own])
            side = shapes.SAID[rng.choice(("left of", "right of"))][0]
            article = "an" if colour == "orange" else "a"
            text = f"{{}} {side} {article} {colour} {other}"
        ground = rng.choice([b for b in shapes.BACKGROUNDS if b != wanted])
        found.append(Task(sort, subject, ground, kind, text, 1000 * seed + i))
    return found


def reference(task: Task) -> tuple[Tensor, Tensor]:
    """The subject's picture [3, 64, 64] and where the subject is in it [64, 64]."""
    if task.sort == "two":
        return shapes_subjects.reference(task.subject, task.seed, task.ground)
    image, masks = shapes.draw(shapes.Scene((task.subject,), task.ground))
    return image, masks[0]


def foreground(masks: Tensor) -> Tensor:
    """bool [n, 64]: the tokens in whose middle a subject shows."""
    return F.interpolate(masks[:, None], (8, 8), mode="bilinear").flatten(1) > 0


# --- what is measured ----------------------------------------------------------------------------


def like(task: Task, image: Tensor, row: dict) -> float:
    """How far a picture shows the subject, 0 to 1."""
    if task.sort == "two":
        return float(shapes_subjects.likeness(image[None], task.subject))
    kinds = ("shape", "colour", "texture", "size")
    alike = [
        sum(getattr(t, kind) == getattr(task.subject, kind) for kind in kinds) / 4
        for t in row["seen"].things
        if t.shape == task.subject.shape
    ]
    return max(alike, default=0.0)


def measure(batch: list[Task], images: Tensor) -> list[dict]:
    """A row a picture."""
    scored = shapes_score.score(images, [task.prompt() for task in batch])
    found = []
    for task, image, row in zip(batch, images, scored, strict=True):
        followed = row["background"]
        if task.kind == "companion":
            followed = row["things"][1]["both"]
        found.append(
            {
                "sort": task.sort,
                "kind": task.kind,
                "like": like(task, image, row),
                "followed": float(bool(followed)),
                "relation": float(bool(row["relation"])),
                "copy": float(row["seen"].background == task.ground),
            }
        )
    return found


# --- the runs ------------------------------------------------------------------------------------

VARIANTS = (
    "prompt alone",
    "caption",
    "all layers",
    "FreeCus, plain shift",
    "FreeCus, no caption",
    "FreeCus",
)


def run(pipe, batch: list[Task], seed: int, args, caption=True, mu=None, blocks=(), scale=SCALE):
    """The rows of pictures of a variant."""
    device, rows = pipe.transformer.device, []
    noise = denoising.noise(len(batch), 500 + seed).to(device)
    for begin in range(0, len(batch), 24):
        part = batch[begin : begin + 24]
        pictures, masks = (torch.stack(x) for x in zip(*map(reference, part), strict=True))
        prompts = [
            task.prompt(describe(picture, task.subject.shape) if caption else None)
            for task, picture in zip(part, pictures, strict=True)
        ]
        clean = denoising.Denoiser(pipe, ["a circle"]).encode(pictures.to(device))
        images = customize(
            pipe, prompts, clean, foreground(masks).to(device), noise[begin : begin + len(part)],
            args.steps, args.guidance, -dynamic() if mu is None else mu, list(blocks), scale,
        )  # fmt: skip
        rows += measure(part, images.cpu())
    return rows


def worth(rows: list[dict]) -> float:
    """By which settings are chosen: likeness and prompt followed count alike."""
    return sum(row["like"] + row["followed"] for row in rows) / 2 / len(rows)


def choices(pipe, args, kept: Path) -> dict:
    """Vitality of the blocks, the pivotal ones, and the scale of the baseline's keys."""
    found = json.loads(kept.read_text()) if kept.exists() else {"pivotal": {}, "all": {}}
    n = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    batch = tasks(max(args.prompts // 3, 4), TUNING_SEED)
    if "vitality" not in found:
        prompts = [task.prompt() for task in batch[:8]]
        noise = denoising.noise(len(prompts), TUNING_SEED).to(pipe.transformer.device)
        found["vitality"] = vitality(pipe, prompts, noise, args.steps, args.guidance)
    order = sorted(range(n), key=lambda b: -found["vitality"][b])
    for tries, name, setting in (
        (COUNTS, "pivotal", lambda c: dict(blocks=sorted(order[:c]))),
        (SCALES, "all", lambda s: dict(blocks=range(n), scale=s)),
    ):
        for value in tries:
            if str(value) not in found[name]:
                rows = run(pipe, batch, TUNING_SEED, args, **setting(value))
                found[name][str(value)] = worth(rows)
                kept.write_text(json.dumps(found))
                print(name, value, found[name][str(value)], flush=True)
    count = int(max(found["pivotal"], key=found["pivotal"].get))
    found["blocks"] = sorted(order[:count])
    found["scale"] = float(max(found["all"], key=found["all"].get))
    return found


def setting(variant: str, chosen: dict) -> dict:
    """Arguments of ``run`` for a variant."""
    blocks = chosen["blocks"]
    return {
        "prompt alone": dict(caption=False),
        "caption": dict(),
        "all layers": dict(blocks=range(len(chosen["vitality"])), scale=chosen["scale"]),
        "FreeCus, plain shift": dict(blocks=blocks, mu=dynamic()),
        "FreeCus, no caption": dict(blocks=blocks, caption=False),
        "FreeCus": dict(blocks=blocks),
    }[variant]


def aggregated(rows: list[dict]) -> list[dict]:
    """Means of the rows of each sort and kind."""
    found = []
    for sort, kind in sorted({(row["sort"], row["kind"]) for row in rows}):
        own = [row for row in rows if (row["sort"], row["kind"]) == (sort, kind)]
        means = {
            name: round(sum(row[name] for row in own) / len(own), 4)
            for name in ("like", "followed", "relation", "copy")
        }
        found.append({"sort": sort, "kind": kind, "n": len(own)} | means)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "freecus", 72, "a seed; a multiple of 4")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--guidance", type=float, default=diffusion.GUIDANCE)
    args = own_rows.begin(parser, argv)
    name = f"{args.prompts}_{args.steps}"
    pipe, rows = diffusion.pipeline("flow"), []
    chosen = choices(pipe, args, args.scratch / f"{name}_choices.json")
    for seed in args.seeds:
        batch = tasks(args.prompts, seed)
        for i, variant in enumerate(VARIANTS):
            kept = args.scratch / f"{name}_{seed}_{i}.json"
            how = setting(variant, chosen)
            own = own_rows.once(
                kept, lambda b=batch, s=seed, h=how: aggregated(run(pipe, b, s, args, **h))
            )
            rows += [{"seed": seed, "variant": variant} | row for row in own]
            print(*rows[-len(own) :], sep="\n", flush=True)
    chosen["vitality"] = [round(v, 4) for v in chosen["vitality"]]
    for key in ("pivotal", "all"):
        chosen[key] = {k: round(v, 4) for k, v in chosen[key].items()}
    head = {"steps": args.steps, "guidance": args.guidance, "prompts": args.prompts}
    own_rows.write("freecus", head | {"chosen": chosen}, rows)


if __name__ == "__main__":
    main()
