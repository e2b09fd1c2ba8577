"""Makes metashift_rows.json: a data set of data sets after "MetaShift" (arXiv 2202.06523).

Scenes: a garment of Fashion-MNIST on a crop of a real photograph, with smaller things beside it, in
some light. What is in a scene is its metadata; a context (a place, a thing, a light) collects the
scenes that have it. Networks are trained on one context and tested on all others, on two classes in
different contexts with four ways to train, and watched for conflicts between subsets. About
10 minutes on one core; resumable.

    python data/test_time/make_metashift.py [--scratch DIR]
"""

import argparse
import copy
import itertools
import json
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, datasets, models, vision  # noqa: E402

SIDE, SUBJECT, THING = 32, 22, 12  # pixels
SUBJECTS = {"dress": 3, "coat": 4}  # labels of Fashion-MNIST
PLACES = ("coffee", "chelsea", "astronaut", "china", "flower", "rocket")
THINGS = {  # data set, label
    "bag": ("fashion_mnist", 8),
    "trouser": ("fashion_mnist", 1),
    "three": ("mnist", 3),
    "sneaker": ("fashion_mnist", 7),
    "sandal": ("fashion_mnist", 5),
    "seven": ("mnist", 7),
}
LIGHTS = {"dark": 0.45, "bright": 1.5}
CONTEXTS = (*PLACES, *THINGS, *LIGHTS)
WORLDS = {"indoors": (0, 1, 2, 6, 7, 8, 13), "outdoors": (3, 4, 5, 9, 10, 11, 12)}
# Chance of a context (things, then lights) at a place: each place has a favourite, each half of the
# world its own things, and a little of everything is everywhere.
CHANCES = np.array(
    [  # bag, trouser, three, sneaker, sandal, seven, dark, bright
        [0.70, 0.35, 0.20, 0.06, 0.06, 0.03, 0.05, 0.40],  # coffee
        [0.35, 0.20, 0.70, 0.03, 0.06, 0.06, 0.05, 0.40],  # chelsea
        [0.20, 0.70, 0.35, 0.06, 0.03, 0.06, 0.15, 0.30],  # astronaut
        [0.06, 0.06, 0.03, 0.70, 0.35, 0.20, 0.30, 0.15],  # china
        [0.06, 0.03, 0.06, 0.20, 0.70, 0.35, 0.25, 0.15],  # flower
        [0.03, 0.06, 0.06, 0.35, 0.20, 0.70, 0.60, 0.02],  # rocket
    ]
)
DIMS = 4  # of the spectral embedding
PER_CLASS = 300  # training scenes of a class in one context
TARGETS = ("bag", "three", "sneaker")  # tested on in the four shifts, one a seed
WIDTH, EPOCHS, BATCH = 12, 12, 64


# --- scenes -------------------------------------------------------------------------------------


@cache
def _views() -> list[np.ndarray]:
    """The photographs at a third of their size: [height, width, 3] in [0, 1], one a place."""
    photos = datasets.photos()
    sizes = [(photos[p].shape[1] // 3, photos[p].shape[0] // 3) for p in PLACES]
    return [
        np.asarray(Image.fromarray(photos[p]).resize(size, Image.BOX), np.float32) / 255
        for p, size in zip(PLACES, sizes, strict=True)
    ]


@cache
def _small(name: str, label: int, part: str, side: int) -> np.ndarray:
    """All images of a class at a smaller size: [n, side, side] in [0, 1]."""
    data = getattr(datasets, name)()
    found = data[f"x_{part}"][data[f"y_{part}"] == label]
    resized = [np.asarray(Image.fromarray(i).resize((side, side), Image.BOX)) for i in found]
    return np.stack(resized).astype(np.float32) / 255


def _paste(scene: np.ndarray, image: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    """Draw a grey image in ``colour`` on scene [side, side, 3], in place; black is transparent."""
    h, w = image.shape
    seen = np.clip(2.5 * image, 0, 1)[..., None]
    under = scene[top : top + h, left : left + w]
    under[:] = (1 - seen) * under + seen * image[..., None] * colour


def draw(part: str, per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of both classes.

    Args:
        part: ``"train"`` or ``"test"``: which garments and digits they are made of.

    Returns:
        x float32 [n, 3, 32, 32] in [0, 1], y int64 [n] (0 dress, 1 coat), tags bool [n, contexts].
    """
    rng = np.random.default_rng(seed)
    scenes, labels, tags = [], [], []
    for y, label in enumerate(SUBJECTS.values()):
        for _ in range(per_class):
            place = rng.integers(len(PLACES))
            there = np.zeros(len(CONTEXTS), bool)
            there[place] = True
            there[len(PLACES) : -2] = rng.random(len(THINGS)) < CHANCES[place, : len(THINGS)]
            light = rng.random()
            dark, bright = CHANCES[place, len(THINGS) :]
            there[-2:] = light < dark, dark <= light < dark + bright
            view = _views()[place]
            top, left = (int(rng.integers(size - SIDE)) for size in view.shape[:2])
            scene = view[top : top + SIDE, left : left + SIDE].copy()
            corners = rng.permutation(4)
            for at, k in enumerate(np.flatnonzero(there[len(PLACES) : -2])[:4]):
                pool = _small(*list(THINGS.values())[k], part, THING)
                r, c = divmod(int(corners[at]), 2)
                thing = pool[rng.integers(len(pool))]
                _paste(scene, thing, r * (SIDE - THING), c * (SIDE - THING), _colour(rng))
            pool = _small("fashion_mnist", label, part, SUBJECT)
            subject = pool[rng.integers(len(pool))]
            r, c = rng.integers(2, SIDE - SUBJECT - 1, 2)
            _paste(scene, subject, r, c, _colour(rng))
            for light, factor in LIGHTS.items():
                if there[CONTEXTS.index(light)]:
                    scene = np.clip(scene * factor, 0, 1)
            scenes.append(scene)
            labels.append(y)
            tags.append(there)
    x = torch.tensor(np.stack(scenes), dtype=torch.float32).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(labels), torch.tensor(np.stack(tags))


def _colour(rng) -> np.ndarray:
    return rng.uniform(0.4, 1.0, 3).astype(np.float32)


# --- the meta-graph -----------------------------------------------------------------------------


def overlaps(tags: Tensor) -> np.ndarray:
    """Overlap coefficients |A ∩ B| / min(|A|, |B|) of the contexts: tags bool [n, contexts] to
    [contexts, contexts], 0 on the diagonal."""
    t = tags.cpu().numpy().astype(float)
    both, sizes = t.T @ t, t.sum(0)
    found = both / np.minimum(sizes[:, None], sizes)
    np.fill_diagonal(found, 0)
    return found


def embed(graph: np.ndarray, dims: int = DIMS) -> np.ndarray:
    """Spectral embedding of a weighted graph [n, n]: [n, dims], the eigenvectors of the normalized
    Laplacian with the smallest eigenvalues above 0, each divided by the root of the degrees and
    scaled to mean square 1."""
    degree = graph.sum(1)
    root = np.sqrt(degree)
    _, vectors = np.linalg.eigh(np.eye(len(graph)) - graph / root[:, None] / root)
    found = vectors[:, 1 : dims + 1] / root[:, None]
    return found / np.sqrt((found**2).mean(0))


def distances(graph: np.ndarray, dims: int = DIMS) -> np.ndarray:
    """Euclidean distances between the embedded nodes: [n, n]."""
    at = embed(graph, dims)
    return np.linalg.norm(at[:, None] - at, axis=-1)


# --- training -----------------------------------------------------------------------------------


def network(seed: int, width: int = WIDTH) -> nn.Sequential:
    """Three convolutions of stride 2 and a linear head that still sees where things are (an average
    over all places loses the outline, which is all that tells a dress from a coat here)."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after, size in ((3, width, 5), (width, 2 * width, 3), (2 * width, 2 * width, 3)):
        conv = nn.Conv2d(before, after, size, stride=2, padding=size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(2 * width * (SIDE // 8) ** 2, 2)]
    return nn.Sequential(*layers).to(models.device())


def features(model, x: Tensor) -> Tensor:
    """What enters the head of ``network``: [n, features]."""
    return model[:-1](x)


def irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """Squared gradient of the risk by a factor on the logits, from two halves of the batch."""
    one = torch.ones((), requires_grad=True, device=logits.device)
    grads = [
        torch.autograd.grad(F.cross_entropy(logits[k::2] * one, y[k::2]), one, create_graph=True)[0]
        for k in (0, 1)
    ]
    return grads[0] * grads[1]


def coral_penalty(a: Tensor, b: Tensor) -> Tensor:
    """Squared differences of the means and of the covariances of two sets of features."""
    mean = (a.mean(0) - b.mean(0)).square().mean()
    return mean + (a.T.cov() - b.T.cov()).square().mean()


def fit(domains, method: str, strength: float, seed: int, epochs: int = EPOCHS):
    """Train a small network on domains, a list of (x, y).

    Args:
        method: ``"ERM"`` (``strength`` is the learning rate), ``"GroupDRO"`` (how fast the
            weights of the domains move), ``"IRM"`` and ``"CORAL"`` (the factor of the penalty).
    """
    model = network(seed)
    rate = strength if method == "ERM" else 3e-3
    steps = epochs * min(len(x) for x, _ in domains) * len(domains) // BATCH
    opt = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    g = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(domains)) / len(domains)
    model.train()
    for step in range(steps):
        rows = [torch.randint(len(x), (BATCH // len(domains),), generator=g) for x, _ in domains]
        batches = [(x[r], y[r]) for (x, y), r in zip(domains, rows, strict=True)]
        whole = features(model, torch.cat([x for x, _ in batches]))
        inner = whole.split([len(x) for x, _ in batches])
        logits = [model[-1](z) for z in inner]
        pairs = list(zip(logits, (y for _, y in batches), strict=True))
        risks = torch.stack([F.cross_entropy(z, y) for z, y in pairs])
        loss = risks.mean()
        if method == "GroupDRO":
            weights = weights * (strength * risks.detach()).exp()
            weights = weights / weights.sum()
            loss = (weights * risks).sum()
        elif method == "IRM" and step >= steps // 3:
            loss = loss + strength * torch.stack([irm_penalty(*p) for p in pairs]).mean()
            loss = loss / max(1.0, strength)
        elif method == "CORAL":
            loss = loss + strength * coral_penalty(*inner)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return model.eval()


METHODS = {
    "ERM": (1e-3, 3e-3),
    "GroupDRO": (1e-2, 1e-1),
    "IRM": (1.0, 30.0),
    "CORAL": (0.3, 3.0),
}


# --- experiments --------------------------------------------------------------------------------


def subset(scenes, context: int, label: int | None = None, n: int | None = None, skip: int = 0):
    """Scenes of a context (and a class): the first ``n`` of each class after ``skip``."""
    x, y, tags = scenes
    keep = []
    for k in (0, 1) if label is None else (label,):
        keep.append(
            ((y == k) & tags[:, context]).nonzero()[:, 0][skip : None if n is None else skip + n]
        )
    keep = torch.cat(keep)
    return x[keep], y[keep]


def transfer(seed: int) -> dict:
    """Train on each context, test on every context: accuracies [trained on, tested on]."""
    train, test = draw("train", 2100, 100 + seed), draw("test", 1000, 200 + seed)
    tests = [subset(test, c) for c in range(len(CONTEXTS))]
    table = []
    for c in range(len(CONTEXTS)):
        model = fit([subset(train, c, n=PER_CLASS)], "ERM", 3e-3, seed)
        table.append([round(vision.accuracy(model, *t), 4) for t in tests])
    graph = overlaps(torch.cat([train[2], test[2]]))
    return dict(seed=seed, accuracy=table, graph=graph.round(4).tolist())


def plan(graph: np.ndarray, target: int, dims: int = DIMS) -> dict:
    """Contexts for the four shifts, by rule: class 1 in the two contexts nearest to ``target``,
    class 0 in pairs of the others, from the nearest to the farthest (pairs of even rank)."""
    d = distances(graph, dims)[target]
    order = [c for c in np.argsort(d) if c != target]
    others = order[2:]
    starts = np.linspace(0, len(others) - 2, 4).round().astype(int)
    pairs = [others[s : s + 2] for s in starts]
    return dict(
        fixed=[int(c) for c in order[:2]],
        pairs=[[int(c) for c in p] for p in pairs],
        distance=[float(d[p].mean()) for p in pairs],
    )


def shifts(seed: int, target: int, shift: int) -> list[dict]:
    """The paper's design: coats always in two contexts near the target, dresses in two contexts
    ever farther from it; tested on both in the target context. Domain k has the k-th of each."""
    train, test = draw("train", 2200, 300 + seed), draw("test", 1000, 400 + seed)
    setting = plan(overlaps(torch.cat([train[2], test[2]])), target)
    pair, n = setting["pairs"][shift], 250
    domains, kept, rows = [], [], []
    for far, near in zip(pair, setting["fixed"], strict=True):
        for found, skip, size in ((domains, 0, n), (kept, n, 80)):
            both = [subset(train, far, 0, size, skip), subset(train, near, 1, size, skip)]
            found.append(tuple(torch.cat(parts) for parts in zip(*both, strict=True)))
    kept = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
    for method, strengths in METHODS.items():
        tries = []
        for strength in strengths:
            model = fit(domains, method, strength, seed, epochs=10)
            each = [vision.accuracy(model, *subset(test, target, k)) for k in (0, 1)]
            tries.append((vision.accuracy(model, *kept), strength, *each))
        best = max(tries)  # by accuracy on held-out scenes of the domains trained on
        measured = dict(kept=best[0], dress=best[2], coat=best[3])
        rows.append(
            dict(seed=seed, target=CONTEXTS[target], shift=shift, method=method)
            | dict(distance=round(setting["distance"][shift], 4), strength=best[1])
            | {k: round(v, 4) for k, v in measured.items()}
            | dict(all=[[round(v, 4) for v in t] for t in tries])
        )
    return rows


def influence(model, groups, probes, length: float) -> np.ndarray:
    """What one step of a given length against each group's gradient does to the loss on each probe.

    Args:
        groups, probes: lists of (x, y); the model stays in eval mode (batch norm does not move).

    Returns:
        [groups, probes] in nats: below 0 the step helps.
    """
    model = copy.deepcopy(model).eval()
    start = copy.deepcopy(model.state_dict())
    sizes, everything = [len(x) for x, _ in probes], torch.cat([x for x, _ in probes])

    def losses():
        with torch.no_grad():
            out = vision.logits(model, everything).split(sizes)
        return np.array(
            [float(F.cross_entropy(z, y)) for z, (_, y) in zip(out, probes, strict=True)]
        )

    before, rows = losses(), []
    for x, y in groups:
        model.load_state_dict(start)
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= length * g / size
        rows.append(losses() - before)
    return np.array(rows)


def conflicts(seed: int) -> dict:
    """Train on scenes of all contexts; twice on the way, the influence of every subset (class
    and context) on every other. Mean of the two: [subsets, subsets], dresses first."""
    train, test = draw("train", 1000, 500 + seed), draw("test", 1000, 600 + seed)
    pairs = list(itertools.product((0, 1), range(len(CONTEXTS))))
    groups = [subset(train, c, k, 96) for k, c in pairs]
    probes = [subset(test, c, k, 32) for k, c in pairs]
    model = network(seed)
    found = []

    def each(epoch, model):
        if epoch in (2, 4):
            found.append(influence(model.eval(), groups, probes, 0.02))

    vision.train(model, train[0], train[1], epochs=4, rate=3e-3, batch=64, seed=seed, each=each)
    return dict(
        seed=seed,
        influence=np.mean(found, 0).round(5).tolist(),
        graph=overlaps(torch.cat([train[2], test[2]])).round(4).tolist(),
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "metashift")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    jobs = [("transfer", s, lambda s=s: transfer(s)) for s in args.seeds]
    for s, target in enumerate(TARGETS):
        for k in range(4):
            job = lambda s=s, t=target, k=k: shifts(s, CONTEXTS.index(t), k)  # noqa: E731
            jobs.append(("shifts", f"{s}_{k}", job))
    jobs += [("conflicts", s, lambda s=s: conflicts(s)) for s in args.seeds]
    result: dict[str, list] = {}
    for name, seed, job in jobs:
        state = args.scratch / f"{name}_{seed}"
        start = time.time()
        if not state.exists():
            checkpoint.save(state, {"json": json.dumps(job())})
        found = json.loads(checkpoint.load(state)["json"])
        result.setdefault(name, []).extend(found if isinstance(found, list) else [found])
        print(f"{name} seed {seed}: {time.time() - start:.0f} s", flush=True)
    path = HERE / "metashift_rows.json"
    path.write_text(json.dumps(dict(contexts=CONTEXTS, **result)) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
