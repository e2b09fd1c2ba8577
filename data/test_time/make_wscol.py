"""Weak-to-strong contrast for a detector without its source: makes wscol_runs.json.

    python data/test_time/make_wscol.py [--seeds 0 1 2] [--scratch DIR]

The detectors of own_scenes.py are given unlabelled scenes in fog and no source scene. A teacher,
the student's moving average, looks at a weak view (mirrored at most) and labels it; the student
learns from a strong view (colours, blur, patches painted over). On top of it come a mapping network
that brings both views into one space, and the contrast of WSCoL. Rates and weights come from scenes
of low contrast, three tries a method. One row a severity, a seed and a method; a row that the
scratch folder holds is not made again. About 9 minutes of one thread.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import own_scenes  # noqa: E402
from own_scenes import NOTHING, SIDE, iou  # noqa: E402

from lib import corruptions  # noqa: E402

METHODS = ("weak views only", "mean teacher", "mapping", "WSCoL, all background", "WSCoL")
PARTS = ("colour", "blur", "patches")
BATCH, STEPS, SEVERITIES = 16, 160, (3, 4)
PROPOSALS, SURE, HEAT, KEEP = 12, 0.6, 0.07, 0.98
RATES, WEIGHTS = (0.0001, 0.0003, 0.001), (0.01, 0.05, 0.2)  # tried on low contrast

# --- views ---------------------------------------------------------------------------------------


def strong(x: Tensor, g: torch.Generator, parts=PARTS) -> Tensor:
    """A strong view of images [n, 3, h, w]: brightness, contrast and saturation, or no colour at
    all; blur, every other time; up to three patches of noise (with 0.7, 0.5 and 0.3)."""
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)

    bright, sharp, colour, grey, blur = (draw(0.6, 1.4) for _ in range(5))
    if "colour" in parts:
        x = bright * x
        x = x.mean((1, 2, 3), keepdim=True) * (1 - sharp) + sharp * x
        plain = x.mean(1, keepdim=True)
        x = plain + torch.where(grey < 0.76, 0.0, colour) * (x - plain)
    if "blur" in parts:
        x = torch.where(blur < 1, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)
    for chance in (0.7, 0.5, 0.3):
        high, wide, top, left, use = (draw(0, 1)[:, 0] for _ in range(5))
        noise = torch.rand(n, 3, SIDE, SIDE, generator=g)
        if "patches" in parts:
            high, wide = (8 + 16 * v for v in (high, wide))
            at = torch.arange(SIDE)
            rows = (at[:, None] >= top * (SIDE - high)) & (at[:, None] < top * (SIDE - high) + high)
            columns = (at >= left * (SIDE - wide)) & (at < left * (SIDE - wide) + wide)
            x = torch.where((rows & columns & (use < chance))[:, None], noise, x)
    return x.clamp(0, 1)


def found(net, images: Tensor, boxes: Tensor, kinds: Tensor) -> Tensor:
    """Whether ``net`` finds each garment: its kind, surer than a half, IoU of a half: [n, 4]."""
    with torch.no_grad():
        seen = own_scenes.detections(*net(images))
    right = (seen["kinds"][:, :, None] == kinds[:, None]) & (seen["scores"] > 0.5)[:, :, None]
    return (right & (iou(seen["boxes"][:, :, None], boxes[:, None]) >= 0.5)).any(1)


@torch.no_grad()
def semantics_lost(net, images, boxes, kinds, seed: int = 0, parts=PARTS) -> dict[str, float]:
    """What a strong view takes away from ``net``: shares of the garments that it finds in
    ``images``, or names rightly at their cells.

    Returns:
        ``lost``: found in the image, not in the strong view; ``gained``: the other way round, for
        scale; ``confused``: cells whose garment becomes another garment; ``cosine``: mean cosine of
        the features of both views at garments' cells.
    """
    view = strong(images, torch.Generator().manual_seed(seed), parts)
    before, after = (found(net, x, boxes, kinds) for x in (images, view))
    _, wanted = own_scenes.assign(boxes, kinds)
    here = wanted < NOTHING
    features = [net.features(x) for x in (images, view)]
    guess = [net.read(f)[0][..., :NOTHING].argmax(-1) for f in features]
    named = here & (guess[0] == wanted)
    a, b = (f.flatten(2).transpose(1, 2)[here] for f in features)
    return {
        "lost": float((before & ~after).sum() / before.sum().clamp(min=1)),
        "gained": float((after & ~before).sum() / before.sum().clamp(min=1)),
        "confused": float((named & (guess[1] != wanted)).sum() / named.sum().clamp(min=1)),
        "cosine": float(F.cosine_similarity(a, b).mean()),
    }


# --- the parts of WSCoL --------------------------------------------------------------------------


class Mapping(nn.Module):
    """From a proposal's 64 features to the shared space: 64 that the detector's head can read, and
    from them 32 of unit length to compare."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.out = nn.Linear(64, 32)

    def forward(self, f: Tensor) -> Tensor:
        """[m, 64] to [m, 32]."""
        return F.normalize(self.out(self.body(f).relu()), dim=-1)


def at_cells(x: Tensor, cells: Tensor) -> Tensor:
    """Rows of x [n, 64 cells, d] at ``cells`` [n, k]: [n, k, d]."""
    return x.gather(1, cells[..., None].expand(-1, -1, x.shape[-1]))


def unsteadiness(boxes: Tensor, sureness: Tensor) -> Tensor:
    """How uncertain an image's proposals are, [n]: the variance of how many of them survive
    non-maximum suppression, over thresholds from 0 to 0.5.

    Args:
        boxes: [n, k, 4]; sureness: [n, k].
    """
    order = sureness.argsort(1, descending=True)
    boxes = at_cells(boxes, order)
    near = iou(boxes[:, :, None], boxes[:, None]) > torch.arange(0, 0.6, 0.1).view(-1, 1, 1, 1)
    kept = torch.ones(near.shape[:3], dtype=torch.bool)  # [threshold, n, k]
    for j in range(1, boxes.shape[1]):
        kept[..., j] = ~(kept[..., :j] & near[..., :j, j]).any(-1)
    return kept.sum(-1).float().var(0, unbiased=False)


def cluster(z, p, prototypes, known, sure, sure_kinds, rounds: int = 2) -> Tensor:
    """Pseudo labels of weak features by the nearest centre, which starts at the prototype.

    Args:
        z: mapped weak features [m, d]; p: the teacher's probabilities [m, 7].
        prototypes: [6, d], of the kinds ``known`` [6]; the others, and nothing, start at the mean
            that p weighs.
        sure: [m], proposals of a sure detection, which keep its kind, ``sure_kinds`` [m].
    """
    guess = torch.where(sure, sure_kinds, p.argmax(-1))
    for i in range(rounds):
        centres = p.T @ z / (p.sum(0)[:, None] + 1e-8)
        if i == 0:
            centres[:NOTHING] = torch.where(known[:, None], prototypes, centres[:NOTHING])
        there = torch.bincount(guess, minlength=NOTHING + 1) > 0
        far = torch.cdist(z, centres).masked_fill(~there, torch.inf)
        guess = torch.where(sure, sure_kinds, far.argmin(-1))
        p = F.one_hot(guess, NOTHING + 1).float()
    return guess


def contrast(z: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrast of z [m, d]: same labels attract, others repel; 0 without a pair."""
    near = z @ z.T / HEAT
    near = near.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    logp = near - near.logsumexp(1, keepdim=True)
    pairs = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
    some = pairs.any(1)
    if not some.any():
        return z.sum() * 0
    each = torch.where(pairs, logp, 0.0).sum(1) / pairs.sum(1).clamp(min=1)
    return -each[some].mean()


def alignment(mapping: Mapping, weak, wide, same, sure, kinds, head: nn.Module) -> Tensor:
    """What brings the student's two views together: a contrast of proposals of the same garment
    across views, and the angle between the gradients that a right answer asks of the mapping.

    Args:
        weak, wide: the student's features of the proposals, weak and strong view, [m, 64] each.
        same: [m], proposals of one garment share a number; sure, kinds: as in ``cluster``.
    """
    loss = contrast(mapping(torch.cat([weak, wide])), torch.cat([same, same]))
    if not sure.any():
        return loss
    weight, bias = head.weight[:, :, 0, 0].detach(), head.bias.detach()
    slopes = []
    for f in (weak, wide):
        logits = F.linear(mapping.body(f[sure]), weight, bias)
        wrong = F.cross_entropy(logits, kinds[sure])
        parts = torch.autograd.grad(wrong, list(mapping.body.parameters()), create_graph=True)
        slopes.append(torch.cat([p.flatten() for p in parts]))
    return loss + 1 - F.cosine_similarity(*slopes, dim=0)


# --- adaptation ----------------------------------------------------------------------------------


def adapt(
    net, images: Tensor, method: str, rate: float, weight: float, seed=0, steps=STEPS, each=None
):
    """Adapt a copy of ``net`` to unlabelled ``images``; the teacher comes back.

    Args:
        weight: of the alignment and of the contrast, beside the mean teacher's losses.
        each: called as ``each(step, teacher, student, mapping)`` before the first step and after
            every one.

    Returns:
        the teacher; what clusters: ``mapping``, ``prototypes`` [6, 32] and ``known`` [6], the
        kinds that have one.
    """
    student, teacher = (
        copy.deepcopy(net).eval(),
        copy.deepcopy(net).eval(),
    )  # norms stay as they are
    mapping = Mapping(seed)
    prototypes, known = torch.zeros(NOTHING, 32), torch.zeros(NOTHING, dtype=torch.bool)
    moved = [*student.parameters(), *mapping.parameters()]
    stepper = torch.optim.Adam(moved, lr=rate)
    g = torch.Generator().manual_seed(seed)
    maps, contrasts = method not in METHODS[:2], method in METHODS[3:]
    for step in range(steps):
        if each:
            each(step, teacher, student, mapping)
        rows = torch.randint(len(images), (BATCH,), generator=g)
        weak = images[rows]
        if torch.rand((), generator=g) < 0.5:
            weak = weak.flip(-1)
        view = weak if method == "weak views only" else strong(weak, g)
        with torch.no_grad():  # the teacher labels the weak view
            t_map = teacher.features(weak)
            t_logits, t_boxes = teacher.read(t_map)
            p = t_logits.softmax(-1)
            pseudo = own_scenes.detections(t_logits, t_boxes)
            kinds = torch.where(pseudo["scores"] > SURE, pseudo["kinds"], -1)
            cells = (1 - p[..., NOTHING]).topk(PROPOSALS, 1).indices
        s_map = student.features(view)
        s_logits, s_boxes = student.read(s_map)
        loss = own_scenes.detection_loss(s_logits, s_boxes, pseudo["boxes"], kinds)
        t_p = at_cells(p, cells).flatten(0, 1)
        s_logp = at_cells(s_logits, cells).flatten(0, 1).log_softmax(-1)
        loss = loss + F.kl_div(s_logp, t_p, reduction="batchmean")

        if maps:
            which, wanted = own_scenes.assign(pseudo["boxes"], kinds)
            which, wanted = which.gather(1, cells), wanted.gather(1, cells).flatten()
            sure = wanted < NOTHING
            s_f, t_f = (
                at_cells(m.flatten(2).transpose(1, 2), cells).flatten(0, 1) for m in (s_map, t_map)
            )
        if maps and step % 2 == 0:
            s_weak = student.features(weak).flatten(2).transpose(1, 2)
            s_weak = at_cells(s_weak, cells).flatten(0, 1)
            numbers = which + torch.arange(BATCH)[:, None] * which.shape[1]
            same = torch.where(sure, numbers.flatten() + kinds.shape[1], -1)
            loss = loss + weight * alignment(mapping, s_weak, s_f, same, sure, wanted, student.kind)
        if contrasts:
            with torch.no_grad():
                z = mapping(t_f)
                for kind in wanted[sure].unique():
                    mean = z[wanted == kind].mean(0)
                    old = prototypes[kind] if known[kind] else mean
                    prototypes[kind], known[kind] = 0.9 * old + 0.1 * mean, True
                labels = cluster(z, t_p, prototypes, known, sure, wanted)
                calm = torch.ones(BATCH, dtype=torch.bool)
                if method == "WSCoL":
                    u = unsteadiness(at_cells(t_boxes, cells), 1 - t_p[:, NOTHING].view_as(cells))
                    calm = u <= u.median()
                use = (labels < NOTHING) | calm.repeat_interleave(PROPOSALS)
            loss = loss + weight * contrast(mapping(s_f)[use], labels[use])

        stepper.zero_grad()
        loss.backward()
        stepper.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - KEEP)
    if each:
        each(steps, teacher, student, mapping)
    return teacher, dict(mapping=mapping, prototypes=prototypes, known=known)


def choices(net, scratch: Path) -> tuple[dict, dict]:
    """The rate that suits the mean teacher best and the weight that suits each other method, on
    unlabelled target scenes of contrast 3, by the mAP on others of them; and all that was tried."""
    kept = scratch / "wscol_choices.json"
    tried = json.loads(kept.read_text()) if kept.exists() else {}
    images, boxes, kinds = own_scenes.scenes(640, "target", 60)
    images = corruptions.corrupt(images, "contrast", 3, 60)

    def worth(method, rate, weight) -> float:
        teacher, _ = adapt(net, images[:320], method, rate, weight, steps=60)
        return round(own_scenes.evaluate(teacher, images[320:], boxes[320:], kinds[320:]), 2)

    def best(method, values, call) -> float:
        had = tried.setdefault(method, {})
        for value in values:
            if str(value) not in had:
                had[str(value)] = call(value)
                print(method, value, had[str(value)], flush=True)
                kept.write_text(json.dumps(tried))
        return float(max(had, key=had.get))

    rate = best("mean teacher", RATES, lambda r: worth("mean teacher", r, 0.0))
    chosen = {"mean teacher": rate}
    for method in ("mapping", "WSCoL"):
        chosen[method] = best(method, WEIGHTS, lambda w, m=method: worth(m, rate, w))
    return chosen, tried


def one(net, images, method: str, chosen: dict, seed: int, clear, test) -> dict:
    """A row: mAP@0.5 in % on ``test`` and ``clear`` scenes after adaptation to ``images``, on the
    way there, and what a strong view takes away from the adapted detector."""
    adapted, trace = net, []

    def each(step, teacher, *_):
        if step % 40 == 0:
            trace.append(own_scenes.evaluate(teacher, *test))

    if method != "source only":
        weight = chosen.get(method.split(",")[0], 0.0)
        adapted, _ = adapt(net, images, method, chosen["mean teacher"], weight, seed, each=each)
    row = {"seed": seed, "method": method, "fog": own_scenes.evaluate(adapted, *test)}
    row |= {"trace": trace, "clear": own_scenes.evaluate(adapted, *clear)}
    return row | semantics_lost(adapted, *test)


def main(argv: list[str] | None = None) -> None:
    args = own_scenes.arguments(__doc__, argv)
    scratch, rows = args.scratch, []
    clear = own_scenes.scenes(400, "test", 0)
    chosen, tried = choices(own_scenes.detector(0, scratch), scratch)
    for severity in SEVERITIES:
        test = (corruptions.corrupt(clear[0], "fog", severity, 99), *clear[1:])
        for seed in args.seeds:
            net = own_scenes.detector(seed, scratch)
            images = own_scenes.scenes(960, "target", seed)[0]
            images = corruptions.corrupt(images, "fog", severity, seed)
            for method in ("source only", *METHODS):
                kept = scratch / f"wscol_{severity}_{seed}_{method.replace(' ', '_')}.json"
                if not kept.exists():
                    row = one(net, images, method, chosen, seed, clear, test)
                    kept.write_text(json.dumps({"severity": severity} | row))
                rows.append(json.loads(kept.read_text()))
                print({k: v for k, v in rows[-1].items() if k != "trace"}, flush=True)
    for row in rows:
        row["trace"] = [round(v, 2) for v in row["trace"]]
        row |= {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"chosen": chosen, "tried": tried})[1:-1]
    (HERE / "wscol_runs.json").write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n')
    print(f"wrote wscol_runs.json ({len(rows)} rows)")


if __name__ == "__main__":
    main()
