"""Covariate and label shift at once, and the label shift adapter: makes label_shift_rows.json and
label_shift_net.safetensors.

    python data/test_time/make_label_shift.py [--seeds …] [--scratch DIR]

Nets are trained on long-tailed garments and meet corrupted garments whose labels are distributed as
at home, evenly, the other way round, or long-tailed in an unrelated order. Learning
rates are chosen on a net and on garments that the tables do not use. About 4 minutes of one thread.
"""

import argparse
import copy
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import make_actmad as am  # noqa: E402

from lib import corruptions, vision  # noqa: E402

CLASSES, RATIO = 10, 50  # the source's largest class has RATIO times as many images as its smallest
LARGEST, TARGET, TUNING = 600, 600, 500  # images: of the largest class, of a target, to tune on
BATCH, SEVERITY, MEMORY = 32, 3, 0.9
TARGETS = ("forward", "uniform", "backward", "shuffled")
SEEDS = (0, 1, 2)
TUNER = 100
TUNED = ("tent", "dot", "tent adapter", "actmad")


# --- label distributions ------------------------------------------------------------------------


def long_tail(order: Tensor, ratio: float = RATIO) -> Tensor:
    """p [classes], falling geometrically along ``order`` until the last has 1/``ratio``."""
    p = ratio ** -(torch.arange(len(order)) / (len(order) - 1))
    return torch.zeros(len(order)).scatter(0, order, p / p.sum())


def degree(p: Tensor, source: Tensor) -> Tensor:
    """How imbalanced ``p`` [..., classes] is along the source's tail: 1 as the source, 0 even, −1
    the other way round."""
    tail = source.log() - source.log().mean()
    return (p * tail).sum(-1) / (source * tail).sum()


def tilted(source: Tensor, power: Tensor | float) -> Tensor:
    """The source's distribution to a power, normalized: 1 itself, 0 even, −1 reversed."""
    return torch.softmax(power * source.log(), -1)


def target_of(name: str, order: Tensor, seed: int) -> Tensor:
    """The label distribution of a target domain, [classes]."""
    if name == "uniform":
        return torch.full((len(order),), 1 / len(order))
    if name == "shuffled":  # a tail as long, in an order that has nothing to do with the source's
        g = torch.Generator().manual_seed(seed)
        while True:
            other = torch.randperm(len(order), generator=g)
            if abs(degree(long_tail(other), long_tail(order))) < 0.15:
                return long_tail(other)
    return long_tail(order if name == "forward" else order.flip(0))


def draw(pool: list[Tensor], p: Tensor, n: int, g: torch.Generator) -> Tensor:
    """``n`` rows from the pools of the classes, as ``p`` says, in random order."""
    counts = (p * n).round().long().clamp(min=1)
    rows = [
        rows[torch.randperm(len(rows), generator=g)[:k]]
        for rows, k in zip(pool, counts, strict=True)
    ]
    rows = torch.cat(rows)
    return rows[torch.randperm(len(rows), generator=g)]


# --- the adapter --------------------------------------------------------------------------------


class LabelShiftAdapter(nn.Module):
    """From the degree of imbalance, the changes of the last layers: h ← (1 + γ) h + β, and ΔW, Δb.

    Args:
        d: width of the features h; all outputs start at zero, where the source model is itself.
    """

    def __init__(self, d: int, classes: int = CLASSES, hidden: int = 64, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.sizes = [d, d, classes * d, classes]
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, sum(self.sizes))
        )
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, h: Tensor, degree: Tensor, head: nn.Linear) -> Tensor:
        """Features [n, d] and the degree of the target's imbalance to logits [n, classes]."""
        gamma, beta, dw, db = self.net(degree.reshape(1)).split(self.sizes)
        h = (1 + gamma) * h + beta
        return F.linear(h, head.weight + dw.view_as(head.weight), head.bias + db)


def train_adapter(adapter, h, y, head, source, steps: int = 1500, rate=1e-3, seed: int = 0) -> None:
    """On the source's features h [n, d], the model frozen: every batch imagines another target.

    The logits for target p, plus log(source / p), must classify the source's images: then the
    logits themselves suit p (the generalized logit-adjusted loss).
    """
    g = torch.Generator().manual_seed(seed)
    stepper = torch.optim.Adam(adapter.parameters(), lr=rate)
    for _ in range(steps):
        rows = torch.randint(len(h), (128,), generator=g)
        p = tilted(source, 2.4 * torch.rand(1, generator=g) - 1.2)
        logits = adapter(h[rows], degree(p, source), head)
        loss = F.cross_entropy(logits + source.log() - p.log(), y[rows])
        stepper.zero_grad()
        loss.backward()
        stepper.step()


class Head:
    """How features become logits: ``plain``; ``balanced`` subtracts log p of the source;
    ``estimated`` then adds log p̂ of the target; ``adapter`` asks the adapter for p̂'s degree, and
    ``oracle`` for that of the true p.

    p̂ starts even and follows the mean prediction of each batch.
    """

    def __init__(self, kind: str, model, adapter, source: Tensor, truth: Tensor):
        self.kind, self.model, self.adapter, self.source = kind, model, adapter, source
        self.p = truth if kind == "oracle" else torch.full_like(source, 1 / len(source))

    def __call__(self, h: Tensor) -> Tensor:
        if self.kind in ("adapter", "oracle"):
            return self.adapter(h, degree(self.p, self.source), self.model.head)
        logits = self.model.head(h)
        if self.kind == "balanced":
            return logits - self.source.log()
        return logits - self.source.log() + self.p.log() if self.kind == "estimated" else logits

    def follow(self, logits: Tensor) -> None:
        if self.kind != "oracle":
            self.p = MEMORY * self.p + (1 - MEMORY) * logits.softmax(-1).mean(0)


def run(model, adapter, source, truth, x, y, base: str, heads, how="adam 0.001", home=None) -> dict:
    """Adapt online, predict each batch right after the step on it.

    Args:
        base: what meets the covariate shift: ``source``, ``norm``, ``tent``, ``dot`` (entropy with
            rare predictions weighted up, after DELTA) or ``actmad``.
        heads: what meets the label shift; ``tent`` minimizes the entropy of the first of them.

    Returns:
        head -> (error in %, mean of the classes' errors in %, how far p̂ ends from p in L1).
    """
    model = copy.deepcopy(model).train(base in ("norm", "tent", "dot")).requires_grad_(False)
    features = model[:-1]
    made = {kind: Head(kind, model, adapter, source, truth) for kind in heads}
    if base in ("tent", "dot", "actmad"):
        parts = [model] if base == "actmad" else am.norms(model)
        weights = [w.requires_grad_() for part in parts for w in part.parameters()]
        stepper = am.optimizer(weights, how)
    often, guesses = torch.full_like(source, 1 / len(source)), {kind: [] for kind in heads}
    for xb in x.split(BATCH):
        if base in ("tent", "dot", "actmad"):
            if base == "actmad":
                acts = am.hooks.read(model, xb, list(home), detach=False)
                loss = am.distance(acts, home)
            else:
                logits = made[heads[0]](features(xb))
                p = logits.softmax(-1)
                each = -(p * p.clamp(min=1e-12).log()).sum(-1)
                weight = torch.ones_like(each)
                if base == "dot":
                    weight = 1 / (often[p.argmax(-1)] + 1e-6)
                    weight = weight / weight.mean()
                    often = 0.95 * often + 0.05 * p.detach().mean(0)
                loss = (weight * each).mean()
            stepper.zero_grad()
            loss.backward()
            stepper.step()
        with torch.no_grad():
            h = features(xb)
            for kind, head in made.items():
                logits = head(h)
                guesses[kind].append(logits.argmax(-1))
                head.follow(logits)
    found = {}
    for kind in heads:
        wrong = (torch.cat(guesses[kind]) != y).float()
        by_class = [wrong[y == c].mean().item() for c in y.unique()]
        off = (made[kind].p - truth).abs().sum().item()
        found[kind] = (100 * wrong.mean().item(), 100 * sum(by_class) / len(by_class), off)
    return found


# --- the runs -----------------------------------------------------------------------------------


def parts(seed: int):
    """Order of the classes and, by class, rows of the source, to tune on and of the targets.

    Rows count through training and test images, one after the other.
    """
    x, y, x_test, y_test = vision.images("fashion_mnist")
    x, y = torch.cat([x, x_test]), torch.cat([y, y_test])
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(500 + seed))
    rows = [(y == c).nonzero().flatten() for c in range(CLASSES)]
    pools = [[r[:LARGEST] for r in rows], [r[LARGEST : LARGEST + 200] for r in rows],
             [r[LARGEST + 200 :] for r in rows]]  # fmt: skip
    return x, y, order, pools


def source_net(seed: int, scratch: Path, balanced: bool = False):
    """(net, adapter, home, source distribution) trained on the long tail, kept in ``scratch``.

    Args:
        balanced: train with the balanced softmax, the long-tail remedy at training time.
    """
    x, y, order, pools = parts(seed)
    source = long_tail(order)
    g = torch.Generator().manual_seed(seed)
    rows = draw(pools[0], source, round(LARGEST / source.max().item()), g)
    x, y = x[rows].contiguous(memory_format=torch.channels_last), y[rows]
    model = vision.conv_net(seed=seed).to(memory_format=torch.channels_last)
    adapter = LabelShiftAdapter(model.head.in_features, seed=seed)
    kept = scratch / f"{'balanced' if balanced else 'plain'}_{seed}.safetensors"
    if not kept.exists():
        shifted = lambda m, xb, yb: F.cross_entropy(m(xb) + source.log() * balanced, yb)  # noqa: E731
        vision.train(model, x, y, epochs=16, rate=3e-3, seed=seed, loss=shifted)
        with torch.no_grad():
            h = model[:-1](x)
        for weight in model.parameters():
            weight.requires_grad_(False)
        if not balanced:
            train_adapter(adapter, h, y, model.head, source, seed=seed)
        both = {f"model.{k}": v for k, v in model.state_dict().items()}
        both |= {f"adapter.{k}": v for k, v in adapter.state_dict().items()}
        save_file({k: v.contiguous() for k, v in both.items()}, kept)
        print(kept.name, flush=True)
    load(model, adapter, load_file(kept))
    adapter.requires_grad_(False)
    return model.eval(), adapter, am.statistics(model, x, batch=BATCH), source


def load(model: nn.Module, adapter: nn.Module, state: dict) -> None:
    """Weights of both, as ``source_net`` keeps them."""
    for part, name in ((model, "model."), (adapter, "adapter.")):
        part.load_state_dict({k.removeprefix(name): v.float() if v.is_floating_point() else v
                              for k, v in state.items() if k.startswith(name)})  # fmt: skip


def split(method: str) -> tuple[str, tuple[str, ...]]:
    return ("tent", ("adapter",)) if method == "tent adapter" else (method, ("plain",))


def tuned(scratch: Path) -> dict[str, dict]:
    """method -> how -> error in %, mean over three kinds, even and reversed labels."""
    kept = scratch / "tuned.json"
    if not kept.exists():
        x, y, order, pools = parts(TUNER)
        model, adapter, home, source = source_net(TUNER, scratch)
        found = {m: {} for m in TUNED}
        for method in TUNED:
            base, heads = split(method)
            for how in am.ADAM:
                errors = []
                for name in TARGETS[1:3]:
                    truth = target_of(name, order, TUNER)
                    rows = draw(pools[1], truth, TUNING, torch.Generator().manual_seed(7))
                    for c in am.FEW:
                        bad = corruptions.corrupt(x[rows], c, SEVERITY, 7)
                        out = run(
                            model, adapter, source, truth, bad, y[rows], base, heads, how, home
                        )
                        errors.append(out[heads[0]][0])
                found[method][how] = round(sum(errors) / len(errors), 4)
            print(method, found[method], flush=True)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def table(seed: int, scratch: Path) -> list[dict]:
    """One row a target and kind: "base head" -> [error, mean of the classes', p̂'s distance]."""
    hows = {m: min(e, key=e.get) for m, e in tuned(scratch).items()}
    x, y, order, pools = parts(seed)
    model, adapter, home, source = source_net(seed, scratch)
    other, *_ = source_net(seed, scratch, balanced=True)
    rows = []
    heads = ("plain", "balanced", "estimated", "adapter", "oracle")
    for name in TARGETS:
        truth = target_of(name, order, seed)
        at = draw(pools[2], truth, TARGET, torch.Generator().manual_seed(seed))
        for c in (*corruptions.KINDS, *(["clean"] if name == "backward" else [])):
            xs = corruptions.corrupt(x[at], c, SEVERITY, seed) if c != "clean" else x[at]
            place = dict(source=source, truth=truth, x=xs, y=y[at], home=home)
            go = partial(run, model, adapter, **place)
            found = {}
            for base in ("source", "norm", "actmad"):
                found |= {
                    f"{base} {h}": v
                    for h, v in go(base=base, heads=heads, how=hows.get(base, "adam 0")).items()
                }
            found |= {
                f"tent {h}": v
                for h, v in go(base="tent", heads=heads[:3], how=hows["tent"]).items()
            }
            for method in ("tent adapter", "dot"):
                base, one = split(method)
                found[f"{base} {one[0]}"] = go(base=base, heads=one, how=hows[method])[one[0]]
            for base in ("norm", "tent"):
                v = run(other, adapter, base=base, heads=("plain",), how=hows["tent"], **place)
                found[f"{base} trained balanced"] = v["plain"]
            found = {k: [round(float(a), 3) for a in v] for k, v in found.items()}
            rows.append(dict(seed=seed, target=name, kind=c, **found))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--scratch", default=Path(tempfile.gettempdir()) / "test_time_label_shift")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order: the same numbers every time
    scratch, rows = Path(args.scratch), []
    scratch.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        kept = scratch / f"table_{seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(table(seed, scratch)))
            print(kept.name, flush=True)
        rows += json.loads(kept.read_text())
    if tuple(args.seeds) != SEEDS:
        return  # part of the work; the file is written when all seeds are asked for
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"tuned": {json.dumps(tuned(scratch))},\n"rows": [\n{lines}\n]}}\n'
    (HERE / "label_shift_rows.json").write_text(text)
    state = load_file(scratch / "plain_0.safetensors")
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, HERE / "label_shift_net.safetensors")
    print(f"wrote label_shift_rows.json: {len(rows)} rows, and label_shift_net.safetensors")


if __name__ == "__main__":
    main()
