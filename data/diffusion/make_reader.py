"""The trained reader of the shapes world and how far it and the scorer agree: makes
reader.safetensors and reader.json.

    python data/diffusion/make_reader.py [--steps N] [--measure] [--images FILE]

A small network learns from drawings damaged in many ways to find things; 5 minutes of one thread.
``--measure`` only measures the stored one. ``--images``: a safetensors file of what a generator
drew, ``images`` [n, 3, 64, 64], with the list ``prompts`` as JSON in its header; the two are
compared on it too.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import corruptions, shapes, shapes_look, shapes_reader, shapes_score  # noqa: E402
from lib.shapes_reader import CELLS, HEADS, Reader  # noqa: E402
from lib.shapes_text import Want, Wanted, parse  # noqa: E402

BATCH = 64
WEIGHTS = (0.2, 0.35, 0.2, 0.25)  # of one to four things: fuller pictures teach more


# --- damage -------------------------------------------------------------------------------------


def blur(images: Tensor, spread: Tensor) -> Tensor:
    """Gaussian, each picture by its own width [n] in pixels."""
    at = torch.arange(-4.0, 5)
    kernels = torch.softmax(-at.square() / (2 * spread[:, None].clamp(min=0.05) ** 2), 1)
    kernels = kernels.repeat_interleave(3, 0)
    flat = F.pad(images, [4] * 4, mode="replicate").flatten(0, 1)[None]
    for shape in ((-1, 1, 9, 1), (-1, 1, 1, 9)):
        flat = F.conv2d(flat, kernels.view(shape), groups=len(kernels))
    return flat.view_as(images)


def bend(images: Tensor, far: Tensor, generator: torch.Generator) -> Tensor:
    """Smooth displacements, of standard deviation ``far`` [n] in pixels."""
    n = len(images)
    moved = torch.randn(n, 2, 9, 9, generator=generator) * far[:, None, None, None] / 32
    moved = F.interpolate(moved, (64, 64), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid + moved, padding_mode="border", align_corners=False)


def patches_basis() -> Tensor:
    """Principal directions [48, 48] of the drawings' 4 × 4 patches, strongest first."""
    drawn = shapes.pictures(shapes.sample(400, 11))
    patches = F.pixel_unshuffle(drawn, 4).permute(0, 2, 3, 1).reshape(-1, 48) - 0.5
    return torch.linalg.eigh(patches.T @ patches / len(patches)).eigenvectors.flip(1)


def squeeze(images: Tensor, basis: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """What a poor autoencoder leaves: ``kept`` [n] of 48 numbers a 4 × 4 patch, a little wrong."""
    codes = (F.pixel_unshuffle(images, 4).movedim(1, -1) - 0.5) @ basis
    codes += 0.1 * torch.randn(codes.shape, generator=generator)
    codes *= torch.arange(48) < kept[:, None, None, None]
    return F.pixel_shuffle((codes @ basis.T + 0.5).movedim(-1, 1), 4)


def damage(images: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Each kind on a half of the pictures, at any strength up to what a person still reads."""
    n = len(images)

    def strength(most: float) -> Tensor:
        drawn = torch.rand(2, n, generator=generator)
        return most * drawn[0] * (drawn[1] < 0.5)

    images = bend(images, strength(1.2), generator)
    rough = torch.rand(n, generator=generator) < 0.4
    kept = 5 + 15 * torch.rand(int(rough.sum()), generator=generator)
    images[rough] = squeeze(images[rough], basis, kept, generator)
    images = blur(images, strength(1.8))
    tint = strength(0.08)[:, None, None, None] * torch.randn(n, 3, 1, 1, generator=generator)
    images = 0.5 + (images - 0.5) * (1 - strength(0.3))[:, None, None, None] + tint
    noise = strength(0.2)[:, None, None, None]
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


# --- training -----------------------------------------------------------------------------------


def targets(scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Heat of centres [n, 16, 16], the attributes' numbers [n, 4, 16, 16] (-1 away from any
    centre), the backgrounds' numbers [n]."""
    at = (torch.arange(CELLS) + 0.5) / CELLS
    heat = torch.zeros(len(scenes), CELLS, CELLS)
    told = torch.full((len(scenes), len(HEADS), CELLS, CELLS), -1)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            away = CELLS**2 * ((at - thing.x) ** 2 + (at[:, None] - thing.y) ** 2)
            heat[i] = torch.maximum(heat[i], torch.exp(-away / 1.3))
            for k, (kind, names) in enumerate(HEADS.items()):
                told[i, k][away < 2] = names.index(getattr(thing, kind))
    grounds = [list(shapes.BACKGROUNDS).index(scene.background) for scene in scenes]
    return heat, told, torch.tensor(grounds)


def loss_of(net: Reader, images: Tensor, scenes) -> Tensor:
    heat, told, grounds = targets(scenes)
    with torch.autocast("cpu", torch.bfloat16):
        cells, ground = net(images.contiguous(memory_format=torch.channels_last))
    cells = cells.float()
    total = 10 * F.binary_cross_entropy_with_logits(cells[:, 0], heat)
    for part, right in zip(
        cells[:, 1:].split([len(names) for names in HEADS.values()], 1), told.unbind(1), strict=True
    ):
        total = total + F.cross_entropy(part, right, ignore_index=-1)
    return total + 0.5 * F.cross_entropy(ground.float(), grounds)


def train(steps: int, seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    net = Reader().to(memory_format=torch.channels_last)
    generator, basis = torch.Generator().manual_seed(seed), patches_basis()
    stepper = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(stepper, 3e-3, total_steps=steps, pct_start=0.05)
    mean = 0.0
    for step in range(1, steps + 1):
        scenes = shapes.sample(BATCH, 1_000_000 * (seed + 1) + step, counts=WEIGHTS)
        images = damage(shapes.pictures(scenes), basis, generator)
        value = loss_of(net, images, scenes)
        stepper.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        stepper.step()
        rates.step()
        mean += (float(value.detach()) - mean) / min(step, 50)
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {mean:.3f}", flush=True)
    return net.eval()


# --- agreement ----------------------------------------------------------------------------------


def wanted_of(scene: shapes.Scene) -> Wanted:
    wants = tuple(Want(t.shape, t.colour) for t in scene.things)
    return Wanted(wants, scene.background)


def compare(images: Tensor, wanted: list[Wanted], truth: list[bool] | None = None) -> dict:
    """How often scorer and reader say the same of whether pictures show what is wanted, over all
    pictures and where the scorer is sure; and, where the truth is known, how often each says it."""
    looked, read = shapes_look.look(images), shapes_reader.look(images)
    rows = [
        [shapes_score.judge(seen, want) for seen, want in zip(by, wanted, strict=True)]
        for by in (looked, read)
    ]

    def looks(seen):
        return sorted((t.shape or "", t.colour or "") for t in seen.things)

    def share(values) -> float:
        values = list(values)
        return round(sum(map(bool, values)) / len(values), 4) if values else None

    pairs = list(zip(looked, read, strict=True))
    verdicts = [(a["all"], b["all"], a["sure"]) for a, b in zip(*rows, strict=True)]
    found = {"pictures": len(images)}
    for name, judged in zip(("scorer", "reader"), rows, strict=True):
        found[f"{name} says right"] = share(row["all"] for row in judged)
        if truth:
            told = zip(judged, truth, strict=True)
            found[f"{name}'s verdict true"] = share(row["all"] == true for row, true in told)
    return found | {
        "scorer sure": share(row["sure"] for row in rows[0]),
        "same verdict": share(a == b for a, b, _ in verdicts),
        "same verdict where sure": share(a == b for a, b, sure in verdicts if sure),
        "same count": share(len(a.things) == len(b.things) for a, b in pairs),
        "same looks": share(looks(a) == looks(b) for a, b in pairs),
        "same background": share(a.background == b.background for a, b in pairs),
    }


def spoilt(scenes, rng: random.Random) -> tuple[list[Wanted], list[bool]]:
    """What scenes show, but for half of them with one thing's colour or shape another; and whether
    it is what they show."""
    found, truth = [], []
    for scene in scenes:
        truth.append(rng.random() < 0.5)
        if not truth[-1]:
            first, *rest = scene.things
            kind, names = rng.choice((("shape", shapes.SHAPES), ("colour", list(shapes.COLOURS))))
            other = rng.choice([name for name in names if name != getattr(first, kind)])
            scene = replace(scene, things=(replace(first, **{kind: other}), *rest))
        found.append(wanted_of(scene))
    return found, truth


def measure(n: int = 400) -> dict:
    """Agreement on scenes that training has not seen, clean and damaged, for prompts half of
    which ask for something else than what is drawn."""
    scenes = shapes.sample(n, 5)
    wanted, truth = spoilt(scenes, random.Random(0))
    clean = shapes.pictures(scenes)
    generator = torch.Generator().manual_seed(5)
    kinds = {"clean": clean}
    for kind, severities in (("noise", (1, 2, 3)), ("blur", (1, 2)), ("pixelate", (1, 2))):
        for severity in severities:
            kinds[f"{kind} {severity}"] = corruptions.corrupt(clean, kind, severity, seed=5)
    kinds["bent"] = bend(clean, torch.full((n,), 0.6), generator)
    kept = torch.full((n,), 12.0)
    kinds["squeezed"] = squeeze(clean, patches_basis(), kept, generator).clamp(0, 1)
    return {name: compare(images, wanted, truth) for name, images in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--images", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.measure:
        net = train(given.steps)
        weights = {name: t.half().contiguous() for name, t in net.state_dict().items()}
        save_file(weights, HERE / "reader.safetensors")
        shapes_reader.reader.cache_clear()
    found = {"drawings": measure()}
    if given.images:
        with safe_open(given.images, "pt") as file:
            images = file.get_tensor("images").float()
            prompts = json.loads(file.metadata()["prompts"])
        found["generated"] = compare(images, [parse(prompt) for prompt in prompts])
    (HERE / "reader.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
