"""The same subjects in another picture: makes ir_diffusion_rows.json.

    python data/attention_control/make_ir_diffusion.py [--seeds 0 1 2] [--prompts 24]

A drawn reference shows two, three or four things whose textures and sizes no prompt tells; a target
asks for the same things by colour and shape. A rehearsal without sharing says where the subjects
come to lie in the target, as the paper does it. Then the same noise is sampled again while the
target looks at the reference, by ConsiStory's rule and by those of IR-Diffusion, one by one and
together. U-Net and flow, and in the U-Net also subjects of two colours. Rows: a model, number of
subjects, method and seed. What the scratch folder holds is not made again.
"""

import json
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import own_rows
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import (  # noqa: E402
    attention_sharing,
    denoising,
    diffusion,
    hooks,
    shapes,
    shapes_score,
    shapes_subjects,
)

STEPS, GUIDANCE, BATCH, TRIES = 20, diffusion.GUIDANCE, 8, 3
METHODS = ("shared", "mutual", "isolated", "repositioned", "both")
COUNTS = (2, 3, 4)
FAR = 0.3  # sides of the picture between a subject's places in reference and target

# --- scenes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``looks``: ``shapes.Thing`` or ``Subject``, in the order of the prompt; image and masks are
    the reference's."""

    prompt: str
    looks: tuple
    image: Tensor
    masks: Tensor


def prompt_of(looks) -> str:
    named = [f"{'an' if t.colour == 'orange' else 'a'} {t.colour} {t.shape}" for t in looks]
    return ", ".join(named[:-1]) + f" and {named[-1]}"


def cases(n: int, count: int, seed: int) -> list[Case]:
    """References of ``count`` things on white, of other shapes and colours all; every texture as
    often as any other."""
    rng, found, round_ = random.Random(f"{seed} {count}"), [], 0
    weights = [float(k == count - 1) for k in range(4)]
    while len(found) < n:
        for scene in shapes.sample(200, 1000 * seed + 10 * count + round_, weights, same=0):
            things = scene.things
            if len({t.shape for t in things}) < count or len({t.colour for t in things}) < count:
                continue
            things = tuple(replace(t, texture=rng.choice(shapes.TEXTURES)) for t in things)
            image, masks = shapes.draw(shapes.Scene(things))
            found.append(Case(prompt_of(things), things, image, masks))
        round_ += 1
    return found[:n]


def subject_cases(n: int, seed: int) -> list[Case]:
    """References of two subjects of two colours each, all of them different."""
    rng, found = random.Random(f"{seed} subjects"), []
    while len(found) < n:
        a, b = (shapes_subjects.subject(rng.randrange(1000)) for _ in range(2))
        if a.shape == b.shape or len({a.colour, a.second, b.colour, b.second}) < 4:
            continue
        for _ in range(50):
            parts = [
                shapes_subjects.reference(s, rng.randrange(10**6), "white", scale="large")
                for s in (a, b)
            ]
            wide = F.max_pool2d(torch.stack([mask for _, mask in parts])[None], 5, 1, 2)[0]
            if (wide[0] * wide[1]).max() == 0:
                image = (parts[0][0] + parts[1][0] - 1).clamp(0, 1)
                masks = torch.stack([mask for _, mask in parts])
                found.append(Case(prompt_of((a, b)), (a, b), image, masks))
                break
    return found


# --- who looks at whom ---------------------------------------------------------------------------


def region(masks: Tensor, side: int) -> Tensor:
    """Number of the subject at each place of a side × side grid, -1 for none: [places]."""
    cover = F.adaptive_avg_pool2d(masks.float()[None], side)[0].flatten(1)
    label = torch.where(cover.amax(0) > 0.3, cover.argmax(0), -1)
    for i, own in enumerate(cover):  # a small thing keeps a place
        label[own.argmax()] = i if own.max() > 0 else label[own.argmax()]
    return label


def moved(ref: Tensor, target: Tensor, side: int) -> Tensor:
    """For each place of a subject in the target the reference's place that comes to lie there when
    the subject's box is scaled and moved to its box in the target; elsewhere the same place."""
    pick = torch.arange(side * side, device=ref.device)
    for i in range(int(target.max()) + 1):
        here, there = ((x.view(side, side) == i).nonzero() for x in (target, ref))
        if len(here) and len(there):
            low, high = here.amin(0), here.amax(0) + 1
            ref_low, ref_high = there.amin(0), there.amax(0) + 1
            share = (here - low + 0.5) / (high - low)
            at = (ref_low + share * (ref_high - ref_low)).long()
            pick[target == i] = at[:, 0] * side + at[:, 1]
    return pick


def rules(ref: Tensor, target: Tensor, side: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which of its own places each of the target's may look at, which of the reference's, both
    [places, places], and what the latter are: [places], numbers of the reference's places."""
    subject = target[:, None]
    own = torch.ones(len(target), len(target), dtype=torch.bool, device=ref.device)
    pick, held = torch.arange(len(target), device=ref.device), ref
    if method in ("isolated", "both"):
        own = (subject < 0) | (target < 0) | (subject == target)
    if method in ("repositioned", "both"):
        pick = moved(ref, target, side)
        held = torch.where(ref[pick] == target, target, -1)
    if method == "shared":
        other = (held >= 0).expand_as(own)
    else:
        other = (subject >= 0) & (subject == held)
    return own, other, pick


class Sharing:
    """For ``attending``: batches of cases, each a reference and one target a method.

    Args:
        refs, targets: masks [subjects, 64, 64] a case.
        blocks: of each method, those where the target looks at the reference; isolation is in all.
    """

    def __init__(self, refs, targets, methods, blocks: dict[str, list[int]]):
        self.refs, self.targets, self.methods, self.blocks = refs, targets, list(methods), blocks
        self.tables: dict[tuple, tuple] = {}
        self.probe: list | None = None

    def table(self, side: int, block: int, n: int, n_text: int, device):
        """What ``rules`` says of each of ``n`` rows, the reference's first in each group: the mask
        [n, 1, query, key], keys of the reference behind a row's own; and the latter's numbers,
        None where no method looks at the reference in this block."""
        live = tuple(block in self.blocks[method] for method in self.methods)
        if (side, live, n) not in self.tables:
            every, rows = torch.ones(side**2, side**2, dtype=torch.bool), []
            for ref, target in zip(self.refs, self.targets, strict=True):
                a, b = region(ref, side), region(target, side)
                rows.append((every, ~every, torch.arange(side**2)))
                for method, on in zip(self.methods, live, strict=True):
                    own, other, pick = rules(a, b, side, method)
                    rows.append((own, other & on, pick))
            own, other, pick = (torch.stack(part) for part in zip(*rows, strict=True))
            mask = F.pad(own, (n_text, 0, n_text, 0), value=True)
            if any(live):
                mask = torch.cat([mask, F.pad(other, (0, 0, n_text, 0), value=False)], 2)
            half = n // len(mask)
            mask, pick = mask.repeat(half, 1, 1)[:, None].to(device), pick.repeat(half, 1)
            self.tables[side, live, n] = mask, pick.to(device) if any(live) else None
        return self.tables[side, live, n]

    def __call__(self, at: attention_sharing.Attention):
        n, places, group = len(at.q), at.q.shape[1] - at.n_text, 1 + len(self.methods)
        mask, pick = self.table(math.isqrt(places), at.block, n, at.n_text, at.q.device)
        q, k, v = at.turn(at.q), at.turn(at.k), at.v
        if pick is None:
            return q, k, v, mask
        ref = torch.arange(n, device=q.device) // group * group
        k_ref, v_ref = (x[ref[:, None], at.n_text + pick] for x in (at.k, v))
        k = torch.cat([k, at.turn(k_ref)], 1)  # where they lie now, in a flow
        if self.probe is not None:
            self._weigh(at, q, k, mask, group)
        return q, k, torch.cat([v, v_ref], 1), mask

    def _weigh(self, at, q, k, mask, group) -> None:
        """Note how much of a subject's attention goes to the reference, by how far away it is."""
        side = math.isqrt(q.shape[1] - at.n_text)
        half = len(q) - len(self.refs) * group  # of the rows with prompts
        for row in range(len(self.refs) * group):
            method = None if row % group == 0 else self.methods[row % group - 1]
            if method not in ("mutual", "repositioned"):
                continue
            scores = torch.einsum("qhd,khd->hqk", q[half + row], k[half + row])
            scores = (scores / math.sqrt(q.shape[-1])).masked_fill(~mask[half + row], -torch.inf)
            mass = scores.softmax(-1)[:, at.n_text :, -(side**2) :].sum(-1).mean(0)
            case = row // group
            label = region(self.targets[case], side).to(q.device)
            for i, far in enumerate(distances(self.refs[case], self.targets[case])):
                self.probe.append((method, at.block, far, float(mass[label == i].mean())))


def distances(refs: Tensor, targets: Tensor) -> list[float]:
    """How far each subject's places in both pictures lie apart, in sides."""
    at = (torch.arange(64) + 0.5) / 64
    centres = [
        torch.stack([(m * at).sum((1, 2)), (m * at[:, None]).sum((1, 2))], 1)
        / m.sum((1, 2))[:, None]
        for m in (refs.float(), targets.float())
    ]
    return (centres[0] - centres[1]).norm(dim=1).tolist()


# --- sampling ------------------------------------------------------------------------------------


def rehearse(pipe, some: list[Case], seed: int, steps=STEPS):
    """Plain pictures [n, 3, 64, 64], noise, and the subjects' masks in them, None where no try
    shows all."""
    device, path = denoising.network(pipe).device, denoising.levels(pipe, steps)
    images, noise = torch.zeros(len(some), 3, 64, 64), torch.zeros(len(some), 4, 16, 16)
    masks: list[Tensor | None] = [None] * len(some)
    for again in range(TRIES):
        fresh = denoising.noise(len(some), seed + 1000 * again)
        left = [i for i, mask in enumerate(masks) if mask is None]
        for start in range(0, len(left), 3 * BATCH):
            rows = left[start : start + 3 * BATCH]
            prompts = [some[i].prompt for i in rows]
            denoiser = denoising.Denoiser(pipe, prompts, GUIDANCE)
            x = denoising.sample(denoiser, fresh[rows].to(device), path)
            made = denoiser.decode(x).float().cpu()
            images[rows], noise[rows] = made, fresh[rows]
            for i, row in zip(rows, shapes_score.score(made, prompts), strict=True):
                if all(thing["shape"] for thing in row["things"]):
                    masks[i] = torch.stack([thing["found"].mask for thing in row["things"]])
    return images, noise, masks


def share(pipe, some, targets, noise, methods, blocks, seed: int, steps=STEPS, probe=None):
    """Pictures of each method, {method: [n, 3, 64, 64]}, of cases whose subjects lie at
    ``targets`` when sampled from ``noise``."""
    model, path, found = denoising.network(pipe), denoising.levels(pipe, steps), []
    for start in range(0, len(some), BATCH):
        part = slice(start, start + BATCH)
        group = 1 + len(methods)
        prompts = [case.prompt for case in some[part] for _ in range(group)]
        denoiser = denoising.Denoiser(pipe, prompts, GUIDANCE)
        clean = denoiser.encode(torch.stack([c.image for c in some[part]]).to(model.device))
        still = denoising.noise(len(clean), seed + 500 + start).to(clean)
        sharing = Sharing([c.masks for c in some[part]], targets[part], methods, blocks)

        def before(i, x, level, clean=clean, still=still, sharing=sharing, group=group):
            x = x.clone()
            x[::group] = level.alpha * clean + level.sigma * still  # the reference, as noisy
            sharing.probe = probe if i == steps // 2 else None
            return x

        x = noise[part].to(clean).repeat_interleave(group, 0)
        with attention_sharing.attending(model, sharing):
            x = denoising.sample(denoiser, x, path, before=before)
        found.append(denoiser.decode(x).float().cpu().unflatten(0, (-1, group))[:, 1:])
    return dict(zip(methods, torch.cat(found).unbind(1), strict=True))


# --- measures ------------------------------------------------------------------------------------


def measure(images: Tensor, some: list[Case], targets) -> dict:
    """Shares of the things: ``right`` shape and colour, ``follows`` the reference's texture
    besides, ``pattern`` the same of things that are not plain, ``far`` of those far from their
    place; ``size``; ``tone``: distance of the mean colours; ``leak``, ``missing``; ``fused``:
    pictures with fewer things than asked for."""
    got: dict[str, list] = {k: [] for k in ("right", "follows", "pattern", "far", "near", "size")}
    got |= {k: [] for k in ("tone", "leak", "missing", "fused")}
    scored = shapes_score.score(images, [case.prompt for case in some])
    for image, case, target, row in zip(images, some, targets, scored, strict=True):
        got["fused"].append(len(row["seen"].things) < len(case.looks))
        away = distances(case.masks, target)
        for i, thing in enumerate(row["things"]):
            look, seen = case.looks[i], thing["found"]
            follows = bool(thing["both"]) and seen.texture == look.texture
            got["right"].append(bool(thing["both"]))
            got["missing"].append(not thing["shape"])
            got["follows"].append(follows)
            if look.texture != "plain":
                got["pattern"].append(follows)
                got["far" if away[i] > FAR else "near"].append(follows)
            if seen is not None:
                got["leak"].append(thing["leak"])
                got["size"].append(seen.size == look.size)
                means = [
                    (x * mask).sum((1, 2)) / mask.sum()
                    for x, mask in ((image, seen.mask.float()), (case.image, case.masks[i]))
                ]
                got["tone"].append(float((means[0] - means[1]).norm()))
    return {k: round(sum(v) / len(v), 4) if v else None for k, v in got.items()}


def likeness(images: Tensor, some: list[Case]) -> dict:
    """Mean likeness of both subjects, and share of subjects that are plainly there."""
    found = [
        float(shapes_subjects.likeness(image[None], subject)[0])
        for image, case in zip(images, some, strict=True)
        for subject in case.looks
    ]
    return {
        "likeness": round(sum(found) / len(found), 4),
        "there": round(sum(value > 0.6 for value in found) / len(found), 4),
    }


# --- runs ----------------------------------------------------------------------------------------


def block_choices(pipe) -> dict[str, list[int]]:
    """Self-attentions in the order they run: all, or the second half, as in the paper's code."""
    kinds = [s for s in hooks.sites(denoising.network(pipe)) if s.startswith("self_pattern.")]
    every = [int(site.rpartition(".")[2]) for site in kinds]
    return {"all": every, "late": every[len(every) // 2 :]}


def choose(pipe, kept: Path) -> dict:
    """Where to look at the reference: what follows it best on cases for tuning, for ConsiStory's
    rule and for IR-Diffusion's alike; "late" where both are level."""
    if kept.exists():
        return json.loads(kept.read_text())
    some = [case for count in COUNTS for case in cases(4, count, 700)]
    _, noise, masks = rehearse(pipe, some, 700)
    keep = [i for i, mask in enumerate(masks) if mask is not None]
    some, targets = [some[i] for i in keep], [masks[i] for i in keep]
    tried: dict = {"shared": {}, "both": {}}
    for where, blocks in block_choices(pipe).items():
        made = share(pipe, some, targets, noise[keep], tried, dict.fromkeys(tried, blocks), 700)
        for method, images in made.items():
            tried[method][where] = measure(images, some, targets)["follows"]
    best = {m: max(("late", "all"), key=had.get) for m, had in tried.items()}
    kept.write_text(json.dumps({"tried": tried, "blocks": best, "cases": len(some)}))
    return json.loads(kept.read_text())


def weights_of(probe: list) -> dict:
    """Mean attention to the reference, of the nearer and the farther half of the subjects."""
    found = {}
    for method in ("mutual", "repositioned"):
        rows = sorted((far, mass) for name, _, far, mass in probe if name == method)
        half = len(rows) // 2
        found[method] = [
            round(sum(m for _, m in part) / max(len(part), 1), 4)
            for part in (rows[:half], rows[half:])
        ]
    return found


def run(pipe, some: list[Case], seed: int, chosen: dict, subjects=False) -> list[dict]:
    """A row a method: the measures of its pictures."""
    images, noise, masks = rehearse(pipe, some, seed)
    keep = [i for i, mask in enumerate(masks) if mask is not None]
    if not keep:
        return [{"method": "plain", "cases": len(some), "kept": 0}]
    some, targets = [some[i] for i in keep], [masks[i] for i in keep]
    where = block_choices(pipe)
    blocks = {m: where[chosen["shared" if m == "shared" else "both"]] for m in METHODS}
    probe: list = []
    made = {"plain": images[keep]}
    made |= share(pipe, some, targets, noise[keep], METHODS, blocks, seed, probe=probe)
    rows = []
    for method, pictures in made.items():
        values = likeness(pictures, some) if subjects else measure(pictures, some, targets)
        row = {"method": method, "cases": len(masks), "kept": len(keep)} | values
        mass = weights_of(probe).get(method)
        rows.append(row | ({"near_far_mass": mass} if mass else {}))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "attention_control", 24, "a seed, six pictures each")
    parser.add_argument("--models", nargs="+", default=["unet", "flow"])
    args = own_rows.begin(parser, argv)
    head, rows, each = {}, [], args.prompts // len(COUNTS)
    for kind in args.models:
        pipe = diffusion.pipeline(kind, "cpu")
        head[kind] = choose(pipe, args.scratch / f"ir_diffusion_{kind}_choices.json")
        print(kind, head[kind], flush=True)
        for seed in args.seeds:
            for count in (*COUNTS, "subjects") if kind == "unet" else COUNTS:
                kept = args.scratch / f"ir_diffusion_{kind}_{count}_{seed}_{each}.json"
                if not kept.exists():
                    subjects = count == "subjects"
                    some = subject_cases(each, seed) if subjects else cases(each, count, seed)
                    found = run(pipe, some, seed, head[kind]["blocks"], subjects)
                    same = {"model": kind, "count": count, "seed": seed}
                    kept.write_text(json.dumps([same | row for row in found]))
                rows += json.loads(kept.read_text())
                print(*rows[-1 - len(METHODS) :], sep="\n", flush=True)
    own_rows.write("ir_diffusion", head, rows)


if __name__ == "__main__":
    main()
