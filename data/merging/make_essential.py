"""Makes essential_rows.json: one-shot magnitude pruning, after "The Emergence of Essential
Sparsity" (arXiv 2306.03805).

Three pretrained models at growing sparsity, by magnitude, at random and in N:M patterns; a small
byte-level language model watched while it trains, on all of Moby Dick or a sixteenth of it; and
small convolutional networks trained with labels or to tell rotations apart. About 5 minutes on one
core; resumable.

    python data/merging/make_essential.py [--scratch DIR]
"""

import argparse
import importlib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "sparsity")]

import small_lm  # noqa: E402

from lib import checkpoint, datasets, metrics, models, quantization, vision  # noqa: E402

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANDOM = (0.05, 0.1, 0.3)
PATTERNS = ((1, 2), (2, 4), (4, 8))  # n kept of m
EIGHTHS = (7, 5, 3)  # kept of 8, besides 4
WITHIN = 0.02  # of the dense score: how far a model may fall up to its drop point
SEEDS = (0, 1, 2)
MODULES = (
    "numpy",
    "numpy.linalg",
    "scipy.linalg",
    "scipy.signal",
    "scipy.ndimage",
    "scipy.special",
)


# --- masks ----------------------------------------------------------------------------------------


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """What is pruned: the linears of the blocks, or the convolutions of a network that has none in
    blocks; embeddings, norms, biases and heads stay."""
    found = quantization.linears(model)
    return found or {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def magnitude(modules: Mapping[str, nn.Module], sparsity: float) -> dict[str, Tensor]:
    """Masks (True: kept) without the smallest weights of all modules together."""
    sizes = torch.cat([m.weight.detach().abs().flatten() for m in modules.values()])
    gone = round(sparsity * len(sizes))
    floor = sizes.kthvalue(gone).values if gone else -1.0
    return {name: m.weight.detach().abs() > floor for name, m in modules.items()}


def random(modules: Mapping[str, nn.Module], sparsity: float, seed: int) -> dict[str, Tensor]:
    """Masks that lose a share ``sparsity`` of all weights, drawn by ``seed``."""
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.weight.shape, generator=g) >= sparsity for n, m in modules.items()}


def n_of_m(modules: Mapping[str, nn.Module], n: int, m: int, seed: int | None = None):
    """Masks that keep, of every m weights in a row along a module's inputs, the n largest (with a
    seed: any n). Rows that m does not divide keep their rest."""
    g = None if seed is None else torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in modules.items():
        rows = module.weight.detach().abs().flatten(1)
        if g is not None:
            rows = torch.rand(rows.shape, generator=g)
        even = rows.shape[1] // m * m
        groups = rows[:, :even].unflatten(1, (-1, m))
        mask = torch.ones_like(rows, dtype=torch.bool)
        top = torch.zeros_like(groups, dtype=torch.bool)
        mask[:, :even] = top.scatter(2, groups.topk(n, dim=2).indices, True).flatten(1)
        masks[name] = mask.view_as(module.weight)
    return masks


@contextmanager
def masked(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, the modules' weights are zero where ``masks`` say False."""
    own = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = own[name] * masks[name].to(own[name].device)
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = own[name]


def drop_point(sparsities, scores, dense: float, within: float = WITHIN) -> float:
    """The largest sparsity up to which all scores (higher is better) stay within a share ``within``
    of the dense one, between grid points linearly."""
    last = (0.0, 0.0)
    for s, score in sorted(zip(sparsities, scores, strict=True)):
        lost = (dense - score) / abs(dense)
        if lost > within:
            return last[0] + (s - last[0]) * (within - last[1]) / (lost - last[1])
        last = (s, max(lost, 0.0))
    return last[0]


# --- pretrained models: a score a seed (a seed is a draw of text or crops) ------------------------


def functions(n: int, seed: int) -> tuple[list[str], list[str]]:
    """Names of ``n`` public functions of numpy and scipy, in words, and the first sentence of each
    one's documentation, without the name where it stands in it."""
    found = {}
    for module in MODULES:
        library = importlib.import_module(module)
        for name in sorted(getattr(library, "__all__", dir(library))):
            text = inspect.getdoc(getattr(library, name, None)) or ""
            first = " ".join(text.split("\n\n")[0].split())
            if name.islower() and len(name) > 3 and name not in first and len(first) > 25:
                found[first] = f"{name.replace('_', ' ')} ({module.replace('.', ' ')})"
    first = sorted(found)
    pick = np.random.default_rng(seed).permutation(len(first))[:n]
    return [found[first[k]] for k in pick], [first[k] for k in pick]


def minilm_scores(seeds=SEEDS, n: int = 40):
    """A function that scores MiniLM as a search engine: from a function's name to its documentation
    among ``n``. Mean reciprocal rank, [seed]."""
    model, tokenizer = models.load("minilm")
    sets = [functions(n, s) for s in seeds]

    @torch.no_grad()
    def vectors(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        batch = batch.to(model.device)
        seen = batch.attention_mask[..., None]
        z = (model(**batch).last_hidden_state * seen).sum(1) / seen.sum(1)
        return F.normalize(z, dim=-1)

    def score(which=None) -> list[float]:
        found = []
        for names, texts in (sets[s] for s in which or range(len(sets))):
            alike = vectors(names) @ vectors(texts).T
            rank = (alike >= alike.diag()[:, None]).sum(1)
            found.append(float((1 / rank).mean()))
        return found

    return model, score


def smollm2_scores(seeds=SEEDS, passages: int = 1, tokens: int = 96):
    """A function that scores SmolLM2: minus the next-token loss on held-out text, [seed]."""
    model, tokenizer = models.load("smollm2")
    sets = [datasets.passages(tokenizer, "held out", passages, tokens, s) for s in seeds]

    def score(which=None) -> list[float]:
        return [
            -float(np.mean(metrics.losses(model, sets[s].to(model.device))))
            for s in which or range(len(sets))
        ]

    return model, score


def efficientnet_scores(seeds=SEEDS, crops: int = 12):
    """A function that scores EfficientNet-Lite0: share of crops of real photographs whose first
    class is the dense network's, [seed]."""
    model, prepare = models.load("efficientnet-lite0")
    photos, sets = list(datasets.photos().values()), []
    for seed in seeds:
        rng, images = np.random.default_rng(seed), []
        for k in range(crops):
            photo = photos[k % len(photos)]
            side = int(rng.integers(180, min(photo.shape[:2])))
            top, left = (int(rng.integers(size - side + 1)) for size in photo.shape[:2])
            images.append(
                prepare(np.ascontiguousarray(photo[top : top + side, left : left + side]))
            )
        sets.append(torch.stack(images).to(models.device()))

    @torch.no_grad()
    def first(s: int) -> Tensor:
        return vision.logits(model, sets[s], 12).argmax(-1)

    dense = [first(s) for s in range(len(sets))]

    def score(which=None) -> list[float]:
        return [float((first(s) == dense[s]).float().mean()) for s in which or range(len(sets))]

    return model, score


MODELS = {
    "MiniLM": minilm_scores,
    "SmolLM2": smollm2_scores,
    "EfficientNet-Lite0": efficientnet_scores,
}


def curves(name: str, state: Path) -> list[dict]:
    """All masks of one pretrained model: rows of how it was pruned and a score a seed; for random
    masks seed s has the s-th draw of the mask too. Resumes from ``state``."""
    model, score = MODELS[name]()
    modules = prunable(model)
    convolutions = isinstance(next(iter(modules.values())), nn.Conv2d)
    jobs = [("dense", 0.0, None)]
    jobs += [("magnitude", s, lambda s=s: magnitude(modules, s)) for s in GRID]
    if not convolutions:
        for n, m in (*PATTERNS, *((n, 8) for n in EIGHTHS)):
            jobs.append((f"{n}:{m}", 1 - n / m, lambda n=n, m=m: n_of_m(modules, n, m)))
    jobs += [("random", s, None) for s in RANDOM]
    if not convolutions:
        jobs.append(("random 4:8", 0.5, None))
    rows = json.loads(checkpoint.load(state)["json"]) if state.exists() else []
    for how, sparsity, masks in jobs[len(rows) :]:
        if how == "dense":
            scores = score()
        elif masks:
            with masked(modules, masks()):
                scores = score()
        else:
            scores = []
            for k in SEEDS:
                drawn = (
                    n_of_m(modules, 4, 8, k) if ":" in how else random(modules, sparsity, seed=k)
                )
                with masked(modules, drawn):
                    scores += score([k])
        rows.append(
            dict(model=name, how=how, sparsity=sparsity, scores=[round(v, 5) for v in scores])
        )
        checkpoint.save(state, {"json": json.dumps(rows)})
    return rows


# --- a small language model while it trains ------------------------------------------------------


def near_zero(model) -> list[float]:
    """Shares of the blocks' weights below a tenth of their matrix's root mean square, and below
    0.002, a tenth of what they were drawn with."""
    weights = [m.weight.detach() for m in prunable(model).values()]
    n = sum(w.numel() for w in weights)
    relative = sum(int((w.abs() < 0.1 * w.pow(2).mean().sqrt()).sum()) for w in weights) / n
    return [round(relative, 5), round(sum(int((w.abs() < 2e-3).sum()) for w in weights) / n, 5)]


LM_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def pretrain(seed: int, share: float, steps: int = 200) -> dict:
    """Train on the first ``share`` of the text; every 10 steps the shares near zero, every 50 the
    held-out loss at each sparsity."""
    train, test = small_lm.corpus()
    model = small_lm.llama(64, 2, 256, seed=seed)
    modules, zero, loss = prunable(model), [[0, *near_zero(model)]], []

    def watch(step, _):
        zero.append([step, *near_zero(model)])
        if step % 50 == 0:
            row = [small_lm.held_out(model, test, 32)]
            for s in LM_GRID:
                with masked(modules, magnitude(modules, s)):
                    row.append(small_lm.held_out(model, test, 32))
            loss.append([step, *(round(v, 4) for v in row)])

    part = train[: int(share * len(train))]
    small_lm.train(model, part, steps, seed, batch=8, watch=watch, every=10)
    return dict(seed=seed, share=share, zero=zero, loss=loss)


# --- with labels or without ----------------------------------------------------------------------

TRUNK_GRID = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97)


def objective(seed: int, kind: str, n: int = 1000, epochs: int = 6) -> dict:
    """A conv net trained with labels ("supervised") or to tell by which quarter turn an image was
    turned ("rotations"); its trunk pruned, and a new linear head fitted to the pruned trunk's
    features by ridge regression. Test accuracy at each sparsity."""
    x, y, x_test, y_test = vision.images()
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y, probe = x[pick[:n]], y[pick[:n]], pick[n : 2 * n]
    x_test, y_test = x_test[:1000], y_test[:1000]
    x_probe, y_probe = (t[probe] for t in vision.images()[:2])
    model = vision.conv_net(8, 10 if kind == "supervised" else 4, seed=seed)
    turns = torch.Generator().manual_seed(seed)

    def rotations(model, xb, _):
        k = torch.randint(4, (len(xb),), generator=turns)
        turned = torch.stack([image.rot90(int(j), (1, 2)) for image, j in zip(xb, k, strict=True)])
        return F.cross_entropy(model(turned), k)

    loss = rotations if kind == "rotations" else None
    vision.train(model, x, y, epochs=epochs, rate=3e-3, batch=64, seed=seed, loss=loss)
    trunk, modules = model[:-1], prunable(model)

    def probed() -> float:
        a, b = (vision.logits(trunk, z) for z in (x_probe, x_test))
        mean, spread = a.mean(0), a.std(0).clamp_min(1e-6)
        a, b = (F.pad((z - mean) / spread, (0, 1), value=1.0) for z in (a, b))
        ridge = a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1])
        head = torch.linalg.solve(ridge, a.T @ F.one_hot(y_probe, 10).float())
        return round(float(((b @ head).argmax(-1) == y_test).float().mean()), 4)

    scores = [probed()]
    for s in TRUNK_GRID:
        with masked(modules, magnitude(modules, s)):
            scores.append(probed())
    return dict(seed=seed, kind=kind, sparsity=[0.0, *TRUNK_GRID], scores=scores)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "essential")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result: dict[str, list] = dict(curves=[], pretrain=[], objective=[])

    def kept(name, job):
        state = args.scratch / name
        start = time.time()
        if not state.exists():
            checkpoint.save(state, {"json": json.dumps(job())})
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        return json.loads(checkpoint.load(state)["json"])

    for name in MODELS:
        partial = args.scratch / f"{name}_partial"
        result["curves"] += kept(name, lambda n=name, p=partial: curves(n, p))
    for seed in SEEDS:
        for kind in ("supervised", "rotations"):
            result["objective"].append(
                kept(f"{kind}_{seed}", lambda s=seed, k=kind: objective(s, k))
            )
    for seed in SEEDS:
        for share in (1.0, 1 / 16):
            job = kept(f"lm_{share:.2f}_{seed}", lambda s=seed, p=share: pretrain(s, p))
            result["pretrain"].append(job)
    path = HERE / "essential_rows.json"
    path.write_text(json.dumps(result) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
