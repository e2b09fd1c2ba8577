"""Small ReLU nets on Fashion-MNIST, and how many of their neurons are active: makes lazy_runs.json.

    python data/sparsity/make_lazy.py [--seeds 0 1 2] [--scratch DIR]

Two-layer MLPs and vision transformers with d = 64 (transformers' ViT, ReLU, patches of 7 × 7) are
trained on 10,000 pictures with SGD and without weight decay: on their labels, on random labels, on
pictures of noise, on fresh noise in every step; wide and narrow, deep and shallow; with Adam; plain
and with Top-k thresholding; with clean and with wrong labels. One row a run; a run that the scratch
folder holds is not repeated. About 9 minutes of one thread.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets  # noqa: E402

CLASSES, BATCH = 10, 128
# Severities 1, 3 and 5 of ImageNet-C (Hendrycks and Dietterich, 2019) for the paper's kinds of
# noise; blur (sigma in pixels) and a grey square (its side) are ours.
CORRUPTIONS = {
    "gaussian": (0.08, 0.18, 0.38),
    "impulse": (0.03, 0.09, 0.27),
    "shot": (60, 12, 3),
    "blur": (0.7, 1.4, 2.2),
    "occlusion": (6, 10, 14),
}


def pictures(name: str = "fashion_mnist") -> dict[str, Tensor]:
    """``x_train`` [10000, 1, 28, 28] and ``x_test`` in 0…1, ``y_train``, ``y_test``."""
    found = {key: torch.tensor(value) for key, value in getattr(datasets, name)().items()}
    return {k: v[:, None].float() / 255 if k[0] == "x" else v.long() for k, v in found.items()}


class Neurons(nn.Module):
    """ReLU, and above it Top-k where ``k`` is given: only the k largest of the last axis stay.

    ``active`` keeps which neurons were above zero in the last forward, [..., d_mlp].
    """

    def __init__(self, k: int | None = None):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        a = x.relu()
        if self.k is not None and self.k < a.shape[-1]:
            least = a.topk(self.k, dim=-1).values[..., -1:]
            a = torch.where(a >= least, a, 0.0)
        self.active = (a > 0).detach()
        return a


def mlp(width: int = 512, k: int | None = None, seed: int = 0) -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), Neurons(k), nn.Linear(width, CLASSES))


def vit(width: int = 256, depth: int = 2, k: int | None = None, seed: int = 0) -> nn.Module:
    """A vision transformer whose MLPs are ``width`` wide."""
    torch.manual_seed(seed)
    net = ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=width,
            hidden_act="relu",
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    for layer in net.vit.layers:
        layer.mlp.activation_fn = Neurons(k)
    return net


def layers(net: nn.Module) -> list[Neurons]:
    return [m for m in net.modules() if isinstance(m, Neurons)]


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return getattr(out, "logits", out)


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> tuple[Tensor, list[float], list[float]]:
    """Logits [n, 10]; for each layer the share of active neurons, and of neurons never active."""
    net.eval()
    found, shares, ever = [], [], None
    for part in x.split(500):
        found.append(logits_of(net, part))
        active = [n.active.flatten(0, -2) for n in layers(net)]
        shares.append([a.float().mean().item() for a in active])
        now = [a.any(0) for a in active]
        ever = now if ever is None else [e | a for e, a in zip(ever, now, strict=True)]
    share = torch.tensor(shares).mean(0).tolist()
    return torch.cat(found), share, [1 - e.float().mean().item() for e in ever]


def train(net, x, y, epochs: int, seed: int, by="sgd", fresh=False, watch=None) -> None:
    """A short warm-up and a cosine to zero, in place.

    Args:
        by: ``"sgd"`` (rate 0.1, momentum 0.9) or ``"adam"`` (rate 0.001).
        fresh: new pictures of noise and new random labels in every step.
        watch: ``watch(step)``, called after every epoch.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    top = {"sgd": 0.1, "adam": 1e-3}[by]
    params = net.parameters()
    opt = torch.optim.Adam(params) if by == "adam" else torch.optim.SGD(params, top, momentum=0.9)
    per_epoch = len(x) // BATCH
    steps = epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=g)
        at = order[step % per_epoch * BATCH :][:BATCH]
        some, labels = x[at], y[at]
        if fresh:
            some = torch.rand(some.shape, generator=g)
            labels = torch.randint(CLASSES, labels.shape, generator=g)
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.param_groups[0]["lr"] = top * rate
        net.train()
        loss = F.cross_entropy(logits_of(net, some), labels)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if watch and (step + 1) % per_epoch == 0:
            watch(step + 1)


def mislabelled(y: Tensor, share: float, seed: int) -> Tensor:
    """A ``share`` of the labels replaced by uniformly random ones, as the paper does."""
    g = torch.Generator().manual_seed(2000 + seed)
    new = torch.randint(CLASSES, y.shape, generator=g)
    return torch.where(torch.rand(y.shape, generator=g) < share, new, y)


def corrupt(x: Tensor, kind: str, level: float, seed: int = 0) -> Tensor:
    """Pictures 0…1 [n, 1, 28, 28], made worse in one of the ways of ``CORRUPTIONS``."""
    g = torch.Generator().manual_seed(3000 + seed)
    if kind == "gaussian":
        return (x + level * torch.randn(x.shape, generator=g)).clamp(0, 1)
    if kind == "impulse":
        hit = torch.rand(x.shape, generator=g) < level
        return torch.where(hit, torch.rand(x.shape, generator=g).round(), x)
    if kind == "shot":
        return (torch.poisson(x * level, generator=g) / level).clamp(0, 1)
    if kind == "blur":
        at = torch.arange(-5.0, 6.0)
        line = torch.softmax(-(at**2) / (2 * level**2), 0)
        return F.conv2d(x, (line[:, None] * line)[None, None], padding=5)
    if kind == "occlusion":
        side, x = int(level), x.clone()
        corners = torch.randint(28 - side + 1, (len(x), 2), generator=g).tolist()
        for picture, (i, j) in zip(x, corners, strict=True):
            picture[0, i : i + side, j : j + side] = 0.5
        return x
    raise ValueError(f"no corruption {kind!r}")


def calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """ECE: |accuracy − confidence| in equal bins of confidence, weighted by their size."""
    confidence, guess = logits.softmax(-1).max(-1)
    right = (guess == y).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(right[which == b].sum() - confidence[which == b].sum()).abs() for b in range(bins)]
    return float(torch.stack(gaps).sum() / len(y))


def accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(-1) == y).float().mean().item()


def run(
    net="mlp", width=512, depth=1, k=None, data="fashion_mnist", wrong=0.0, by="sgd", epochs=12,
    n=10000, spoil=False, seed=0,
):  # fmt: skip
    """Train one net on the first ``n`` pictures; one row.

    Args:
        spoil: test it on corrupted pictures as well (1,000 of them).
    """
    real = pictures(data if data == "mnist" else "fashion_mnist")
    x, y = real["x_train"][:n], real["y_train"][:n]
    g = torch.Generator().manual_seed(4000 + seed)
    if data == "noise pictures":
        x = torch.rand(x.shape, generator=g)
    if data == "random labels":
        y = torch.randint(CLASSES, y.shape, generator=g)
    if wrong:
        y = mislabelled(y, wrong, seed)
    made = vit(width, depth, k, seed) if net == "vit" else mlp(width, k, seed)
    probe = torch.rand((2000, *x.shape[1:]), generator=g) if "noise" in data else x[:2000]
    history = []

    def watch(step=0):
        if epochs <= 12:
            now = outputs(made, probe)[1]
            history.append([step, round(sum(now) / len(now), 5)])

    _, first, _ = outputs(made, probe)
    watch()
    train(made, x, y, epochs, seed, by, fresh=data == "fresh noise", watch=watch)
    _, share, dead = outputs(made, probe)
    row = {"net": net, "width": width, "depth": depth, "k": k, "data": data, "wrong": wrong}
    row |= {"by": by, "epochs": epochs, "n": n, "seed": seed}
    row |= {"start": round(sum(first) / depth, 5), "share": round(sum(share) / depth, 5)}
    row |= {"by_layer": [round(s, 5) for s in share], "dead": round(sum(dead) / depth, 5)}
    row["history"] = history
    row["fitted"] = round(accuracy(outputs(made, x)[0], y), 5)  # on the labels it was trained on
    if data in ("fashion_mnist", "mnist"):
        logits, test_share, _ = outputs(made, real["x_test"])
        row["test_share"] = round(sum(test_share) / depth, 5)
        row["accuracy"] = round(accuracy(logits, real["y_test"]), 5)
        row["ece"] = round(calibration_error(logits, real["y_test"]), 5)
    if spoil:
        x, y = real["x_test"][:1000], real["y_test"][:1000]
        for kind, levels in CORRUPTIONS.items():
            found = [accuracy(outputs(made, corrupt(x, kind, c))[0], y) for c in levels]
            row[kind] = round(sum(found) / len(found), 5)
    return row


def plan(seed: int) -> list[dict]:
    """Every run of a seed: what ``run`` is called with."""
    one = [dict(data=d) for d in ("random labels", "noise pictures", "fresh noise", "mnist")]
    one += [dict(width=width) for width in (32, 128, 512)]
    one += [dict(by="adam"), dict(by="adam", data="random labels")]
    small = dict(net="vit", epochs=4)
    one += [small | dict(width=256, depth=2, k=k, spoil=True) for k in (None, 16)]
    one += [small | dict(width=w, depth=d) for w, d in ((64, 2), (256, 1), (256, 4))]
    one.append(small | dict(width=256, depth=2, by="adam"))
    for wrong in (0.0, 0.4, 0.8):  # few pictures, many passes: wrong labels are memorized
        one += [dict(k=k, wrong=wrong, n=2000, epochs=100) for k in (None, 32)]
    one += [dict(k=k, wrong=0.4, n=2000, epochs=100, by="adam") for k in (None, 32)]
    for wrong in (0.0, 0.4, 0.8):  # many pictures, few passes
        one += [dict(k=k, wrong=wrong, epochs=20, spoil=not wrong) for k in (None, 32)]
    return [settings | dict(seed=seed) for settings in one]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", default=Path(tempfile.gettempdir()) / "sparsity_lazy")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order: the same numbers every time
    scratch = Path(args.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for settings in [s for seed in args.seeds for s in plan(seed)]:
        name = "_".join(f"{key}-{value}" for key, value in settings.items()).replace(" ", "-")
        kept = scratch / f"{name}.json"
        if not kept.exists():
            row = run(**settings)
            kept.write_text(json.dumps(row))
            print(name, row["start"], row["share"], row.get("accuracy"), flush=True)
        rows.append(json.loads(kept.read_text()))
    if sorted(args.seeds) != [0, 1, 2]:
        return  # part of the work; the table is written when all seeds are asked for
    rows.sort(key=lambda row: row["seed"])
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "lazy_runs.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')
    print(f"wrote lazy_runs.json: {len(rows)} runs")


if __name__ == "__main__":
    main()
