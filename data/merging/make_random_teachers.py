"""Make random_teachers_rows.json and random_teachers_nets.safetensors.

A teacher is a network nobody trained; a student starts beside it, and learns to give its outputs on
plain images: no label, no augmentation. Measured: what a linear probe reads from the features of
both, here and on digits; the same with noise for images, and with the student starting further off;
what supervised training makes of the student as a starting point (lottery tickets, and whether
two runs with different orders of the data end in one basin).

    python data/merging/make_random_teachers.py [--out FOLDER] [--scratch DIR]
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import models, vision  # noqa: E402

SEEDS = (0, 1, 2)
WIDTH, DEPTH = 64, 8
STEPS, BATCH, RATE = 600, 64, 4e-3
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NUDGE = 1e-6  # what alpha = 0 stands for: at the teacher itself the gradient is zero
STAGES = (10, 30, 100, 300, STEPS)
TUNE = {"epochs": 4, "rate": 0.05, "optimizer": "sgd", "batch": 128}  # supervised runs
ROUNDS, KEPT = 4, 0.4  # of iterative pruning; each keeps this share of what is left


class Projection(nn.Module):
    """DINO's head: an MLP to 32 dimensions, scaled to length 1, and their cosines with 128
    prototypes, [n, 128]. It is thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 32))
        self.prototypes = nn.Linear(32, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes.weight, dim=-1)
        )


def small(images: Tensor) -> Tensor:
    """Images [n, 1, 28, 28] to means of 2 × 2 pixels, [n, 196]."""
    return F.avg_pool2d(images, 2).flatten(1)


def network(seed: int, depth: int = DEPTH, norm: bool = True) -> nn.ModuleDict:
    """``backbone``: [n, 196] to features [n, 64] through ``depth`` layers of linear map, batch norm
    and ReLU, weights drawn as He et al. do; ``head``: the projection."""
    torch.manual_seed(seed)
    layers, before = [], 196
    for _ in range(depth):
        linear = nn.Linear(before, WIDTH)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(WIDTH)] if norm else []), nn.ReLU()]
        before = WIDTH
    parts = {"backbone": nn.Sequential(*layers), "head": Projection(WIDTH)}
    return nn.ModuleDict(parts).to(models.device())


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> nn.Module:
    """Set the batch norms' statistics to those over ``x`` [n, ...]; ``net`` ends in eval mode."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
    net.train()
    backbone = net["backbone"] if isinstance(net, nn.ModuleDict) else net
    for part in x.split(1000):
        backbone(part)
    for m in norms:
        m.momentum = 0.1
    return net.eval()


def between(teacher: nn.Module, other: nn.Module, alpha: float) -> nn.Module:
    """A student's start: ((1 − α) teacher + α other) / √((1 − α)² + α²), parameter by parameter, so
    that its variance is a fresh draw's at every α. ``other`` is overwritten and returned."""
    scale = math.hypot(alpha, 1 - alpha)
    with torch.no_grad():
        for own, its in zip(other.parameters(), teacher.parameters(), strict=True):
            own.mul_(alpha).add_(its, alpha=1 - alpha).div_(scale)
    return other


def distil(student, teacher, x, *, steps=STEPS, rate=RATE, seed=0, each=None) -> list[float]:
    """Adam on the KL divergence of the student's softmax to the teacher's, temperature 1, on the
    same images; every step's loss. ``each(step, student)`` is called after every step."""
    with torch.no_grad():
        goal = torch.cat([teacher["head"](teacher["backbone"](p)) for p in x.split(1000)])
    goal = goal.log_softmax(-1)
    stepper = torch.optim.Adam(student.parameters(), lr=rate)
    dice = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, steps + 1):
        student.train()
        rows = torch.randint(len(x), (BATCH,), generator=dice).to(x.device)
        out = student["head"](student["backbone"](x[rows])).log_softmax(-1)
        loss = F.kl_div(out, goal[rows], log_target=True, reduction="batchmean")
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
        if each is not None:
            each(step, student)
    student.eval()
    return losses


@torch.no_grad()
def features(net: nn.ModuleDict, x: Tensor) -> Tensor:
    return torch.cat([net["backbone"](part) for part in x.split(1000)])


def probe(found: Tensor, y: Tensor, test: Tensor, y_test: Tensor) -> dict[str, float]:
    """Accuracy on ``test`` [n, d] of a logistic regression and of 20 nearest neighbours by cosine,
    both from ``found`` [m, d] with labels y; features are standardized by those of ``found``."""
    mean, std = found.mean(0), found.std(0) + 1e-6 * found.std() + 1e-12
    a, b = (F.normalize((f - mean) / std, dim=1) for f in (found, test))
    voted = y[(b @ a.T).topk(20, 1).indices].mode(1).values
    read = vision.linear_probe(found, y, test)
    return {"linear": share(read, y_test), "knn": share(voted, y_test)}


def share(answers: Tensor, y: Tensor) -> float:
    return round((answers == y).float().mean().item(), 4)


def classifier(net: nn.ModuleDict, seed: int) -> nn.Sequential:
    """A copy of the backbone with a fresh linear head of ten classes (the same for one seed)."""
    torch.manual_seed(1000 + seed)
    head = nn.Linear(WIDTH, 10).to(next(net.parameters()).device)
    out = nn.Sequential(*network(0)["backbone"], head)
    own = {k: v.clone() for k, v in net["backbone"].state_dict().items()}
    out.load_state_dict(own | {f"{len(out) - 1}.{k}": v for k, v in head.state_dict().items()})
    return out


@torch.no_grad()
def rescaled(net: nn.ModuleDict, like: nn.ModuleDict) -> nn.ModuleDict:
    """``net`` with every unit's weights as long as those of ``like``. Batch norm takes the length
    out again, so the function stays; but a step of SGD turns short weights further than long ones.
    """
    out = network(0)
    out.load_state_dict(net.state_dict())
    for own, its in zip(out["backbone"], like["backbone"], strict=True):
        if isinstance(own, nn.Linear):
            scale = its.weight.norm(dim=1) / own.weight.norm(dim=1)
            own.weight.mul_(scale[:, None])
            own.bias.mul_(scale)
    return out


def largest(net: nn.Sequential, masks: list[Tensor], kept: float, by_layer: bool) -> list[Tensor]:
    """Masks of the ``kept`` share of what ``masks`` left, by size: over all layers of the backbone
    at once, or in each; the head and the biases stay whole."""
    sizes = [w.abs()[m] for w, m in zip(weights(net), masks, strict=True)]
    pools = sizes if by_layer else [torch.cat(sizes)] * len(sizes)
    floors = [p.sort(descending=True).values[max(1, round(kept * len(p))) - 1] for p in pools]
    return [m & (w.abs() >= f) for w, m, f in zip(weights(net), masks, floors, strict=True)]


def weights(net: nn.Sequential) -> list[Tensor]:
    return [m.weight.detach() for m in list(net)[:-1] if isinstance(m, nn.Linear)]


def supervised(start: nn.Sequential, x, y, order: int, masks=None) -> nn.Sequential:
    """Train ``start`` in place on labels; masked weights are zero before every step and after."""
    mine = [m for m in list(start)[:-1] if isinstance(m, nn.Linear)]

    def thin():
        for m, keep in zip(mine, masks or [], strict=False):
            m.weight.data.mul_(keep)

    def loss(model, xb, yb):
        thin()
        return F.cross_entropy(model(xb), yb)

    vision.train(start, x, y, seed=order, loss=loss, **TUNE)
    thin()
    return start


def tickets(checkpoint: nn.ModuleDict, seed: int, data, by_layer: bool, random_too: bool) -> dict:
    """Iterative magnitude pruning that rewinds to ``checkpoint``: accuracy at shares removed
    0, 1 − 0.4, 1 − 0.4², …; and of masks of the same sizes a layer, shuffled."""
    x, y, xt, yt = data
    net = supervised(classifier(checkpoint, seed), x, y, seed)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights(net)]
    found, shuffled = [share(net(xt).argmax(-1), yt)], []
    dice = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        masks = largest(net, masks, KEPT, by_layer)
        net = supervised(classifier(checkpoint, seed), x, y, seed, masks)
        found.append(share(net(xt).argmax(-1), yt))
        if random_too:
            mixed = [
                m.flatten()[torch.randperm(m.numel(), generator=dice)].view_as(m) for m in masks
            ]
            other = supervised(classifier(checkpoint, seed), x, y, seed, mixed)
            shuffled.append(share(other(xt).argmax(-1), yt))
    return {"found": found, "shuffled": [found[0], *shuffled] if random_too else []}


@torch.no_grad()
def along(one: nn.Sequential, two: nn.Sequential, data, points=(0, 0.25, 0.5, 0.75, 1)) -> list:
    """[loss, error] on the test images along the line from ``one`` to ``two``, batch norm settled
    anew at each point."""
    x, y, xt, yt = data
    ends = one.state_dict(), two.state_dict()
    mid = nn.Sequential(*network(0)["backbone"], nn.Linear(WIDTH, 10).to(x.device))
    rows = []
    for t in points:
        mixed = {
            k: (1 - t) * a + t * ends[1][k] if a.is_floating_point() else a
            for k, a in ends[0].items()
        }
        mid.load_state_dict(mixed)
        out = settle(mid, x)(xt)
        rows.append([round(F.cross_entropy(out, yt).item(), 4),
                     round(1 - share(out.argmax(-1), yt), 4)])  # fmt: skip
    return rows


def noise_like(x: Tensor, seed: int) -> Tensor:
    """Gaussian noise with the mean and standard deviation of each pixel of ``x`` [n, d]."""
    dice = torch.Generator().manual_seed(seed)
    return x.mean(0) + x.std(0) * torch.randn(x.shape, generator=dice).to(x.device)


def one_seed(seed: int, garments, digits, state: Path) -> tuple[dict, dict]:
    """Every measurement of a seed, in parts kept in ``state``; (row, the student's weights)."""
    x = garments[0]
    sets = {"garments": garments, "digits": digits}

    def kept(name, make):
        part = state / f"{seed}_{name}.json"
        if not part.exists():
            part.write_text(json.dumps(make()))
            print(seed, name, part.read_text()[:110], flush=True)
        return json.loads(part.read_text())

    def read(net, names=("garments", "digits")):
        return {n: probe(features(settle(net, d[0]), d[0]), d[1], features(net, d[2]), d[3])
                for n, d in sets.items() if n in names}  # fmt: skip

    def student(alpha=0.0, images=x, each=None, teacher=None, **change):
        make = change.pop("make", network)
        teacher = settle(make(seed), images) if teacher is None else teacher
        net = between(teacher, make(seed + 500), max(alpha, NUDGE))
        distil(net, teacher, images, seed=seed, each=each, **change)
        return net

    def stages():
        found = []

        def each(step, net):
            if step in STAGES:
                found.append([step, read(net, ("garments",))["garments"]["linear"]])

        student(each=each)
        return found

    def plain(seed):
        return network(seed, norm=False)

    def authors():
        """Batch norm of the teacher as initialized: mean 0, variance 1."""
        return read(student(teacher=network(seed).eval()))

    row = {"seed": seed}
    row["teacher"] = kept("teacher", lambda: read(settle(network(seed), x)))
    own = student()
    row["student"] = kept("student", lambda: read(own))
    for alpha in ALPHAS[1:]:
        row[f"alpha {alpha}"] = kept(
            f"alpha{alpha}", lambda a=alpha: read(student(alpha=a), ("garments",))
        )
    row["noise"] = kept("noise", lambda: read(student(images=noise_like(x, seed))))
    row["digits"] = kept("digits", lambda: read(student(images=digits[0])))
    row["stages"] = kept("stages", stages)
    row["rate 1e-3"] = kept("rate", lambda: read(student(rate=1e-3), ("garments",)))
    row["no norm, teacher"] = kept("plain_teacher", lambda: read(plain(seed).eval(), ("garments",)))
    row["no norm"] = kept("plain", lambda: read(student(make=plain), ("garments",)))
    row["norm as initialized, teacher"] = kept(
        "authors_teacher", lambda: probe_unsettled(network(seed).eval(), garments)
    )
    row["norm as initialized"] = kept("authors", lambda: authors())

    starts = {"teacher": settle(network(seed), x), "student": settle(own, x)}
    for name, start in starts.items():
        row[f"line {name}"] = kept(f"line_{name}", lambda s=start: along(
            *(supervised(classifier(s, seed), x, garments[1], order) for order in (1, 2)),
            garments))  # fmt: skip
        for layers, part in ((False, ""), (True, "_by_layer")):
            row[f"tickets {name}{part}"] = kept(
                f"tickets_{name}{part}",
                lambda n=name, s=start, by=layers: tickets(s, seed, garments, by, n == "student"),
            )

    same = rescaled(starts["student"], starts["teacher"])
    row["line rescaled"] = kept("line_rescaled", lambda: along(
        *(supervised(classifier(same, seed), x, garments[1], order) for order in (1, 2)),
        garments))  # fmt: skip
    nets = {f"{seed}.{k}": v for k, v in own["backbone"].state_dict().items()}
    return row, nets


def probe_unsettled(net, data) -> dict:
    x, y, xt, yt = data
    return {"garments": probe(features(net, x), y, features(net, xt), yt)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the files are written")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "random_teachers"
    )
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)

    def load(name):
        x, y, xt, yt = vision.images(name)
        return small(x), y, small(xt), yt

    garments, digits = load("fashion_mnist"), load("mnist")
    pixels = {n: probe(d[0], d[1], d[2], d[3])
              for n, d in {"garments": garments, "digits": digits}.items()}  # fmt: skip
    print("pixels", pixels, flush=True)
    rows, nets = [], {}
    for seed in SEEDS:
        row, own = one_seed(seed, garments, digits, args.scratch)
        rows.append(row)
        nets |= {k: v.half() if v.is_floating_point() else v for k, v in own.items()}
        result = {"pixels": pixels, "rows": rows}
        (args.out / "random_teachers_rows.json").write_text(json.dumps(result) + "\n")
        save_file(nets, args.out / "random_teachers_nets.safetensors")
        print("wrote seeds up to", seed, flush=True)


if __name__ == "__main__":
    main()
