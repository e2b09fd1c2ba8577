"""Make dual_head_rows.json and dual_head_teacher.safetensors: one head, two heads, two losses.

A teacher (``conv_net`` of width 16, all 10,000 garments) and students of width 4 that see 1,000 of
them. A student learns from labels (cross entropy, CE), from the teacher's probabilities (KD), from
its logits (BinaryKL), or from labels and logits with one head or with two. Each method with a
weight of its teacher's loss has it chosen on 1,000 garments that no student trains on.

    python data/merging/make_dual_head.py [--out FOLDER] [--scratch DIR]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import vision  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
WEIGHTS = (0.1, 1.0)  # of the teacher's loss: the authors' for ImageNet and for CIFAR-100
SEEN, HELD = slice(0, 1000), slice(9000, 10000)  # a student's garments; those that choose a weight
EPOCHS, BATCH, RATE, DECAY = 20, 64, 0.05, 5e-4
T_LOGIT, T_KD = 2.0, 4.0

# name: (uses labels, the teacher's loss, heads: "one", "two" or "two, aligned")
METHODS = {
    "CE": (True, None, "one"),
    "KD": (True, "kd", "one"),
    "BinaryKL": (False, "binary", "one"),
    "CE + BinaryKL": (True, "binary", "one"),
    "CE + BinaryKL-Norm": (True, "norm", "one"),
    "two linear heads": (True, "norm", "two"),
    "DHKD": (True, "norm", "two, aligned"),
}


def binary_kl(student: Tensor, teacher: Tensor, T: float = T_LOGIT) -> Tensor:
    """T² times the summed KL divergence of the classes' own sigmoids, σ(teacher / T) to
    σ(student / T), mean over the batch; logits [n, classes]. Each class is a yes or no of its own,
    so that a constant added to all logits counts, which a softmax would not see."""
    q = torch.sigmoid(teacher / T)
    cross = F.binary_cross_entropy_with_logits(student / T, q, reduction="none")
    own = F.binary_cross_entropy(q, q, reduction="none")
    return T**2 * (cross - own).sum(1).mean()


def binary_kl_norm(student: Tensor, teacher: Tensor, T: float = T_LOGIT) -> Tensor:
    """``binary_kl`` of the difference of the logits to 0: every σ((student − teacher) / T) is to be
    one half. Its gradient in a logit, T (σ(difference / T) − ½), depends on the difference
    alone, not on where the teacher's sigmoid is flat."""
    return binary_kl(student - teacher, torch.zeros_like(teacher), T)


def kd(student: Tensor, teacher: Tensor, T: float = T_KD) -> Tensor:
    """T² times the KL divergence of softmax(teacher / T) to softmax(student / T)."""
    p, q = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    return T**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")


LOSSES = {"kd": kd, "binary": binary_kl, "norm": binary_kl_norm}


def student(seed: int, heads: str = "one") -> nn.ModuleDict:
    """A narrow net in parts: ``backbone`` (images to [n, 16]), ``head``, and with two heads ``aux``
    (linear, or two layers where gradients are aligned, as the authors have it)."""
    net = vision.conv_net(4, seed=seed)
    d = net.head.in_features
    parts = {"backbone": net[:-1], "head": net.head}
    if heads == "two":
        parts["aux"] = nn.Linear(d, 10)
    elif heads == "two, aligned":
        parts["aux"] = nn.Sequential(
            nn.Linear(d, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 10)
        )
    return nn.ModuleDict(parts).to(next(net.parameters()).device)


def share_against(first: Tensor, second: Tensor, parameters: list[Tensor]) -> Tensor:
    """c = min(0, g₁·g₂) / ‖g₁‖² of two losses' gradients; g₂ − c g₁ no longer opposes g₁."""
    g = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True)
         for v in (first, second)]  # fmt: skip
    dot = sum((a * b).sum() for a, b in zip(*g, strict=True) if a is not None and b is not None)
    return torch.clamp(dot, max=0) / sum(a.square().sum() for a in g[0] if a is not None)


def two_losses(model, xb, labels, teacher, kind) -> tuple[Tensor, Tensor]:
    """Cross entropy of the head, and the teacher's loss of the auxiliary head (or the only one)."""
    features = model["backbone"](xb)
    main = model["head"](features)
    taught = model["aux"](features) if "aux" in model else main
    return F.cross_entropy(main, labels), LOSSES[kind](taught, teacher)


def loss_of(method: str, weight: float, y: Tensor, teacher: Tensor):
    """``loss(model, xb, rows)`` for ``vision.train``: rows index labels y and teacher's logits."""
    labels, kind, heads = METHODS[method]

    def loss(model, xb, rows):
        if kind is None:
            return F.cross_entropy(model["head"](model["backbone"](xb)), y[rows])
        first, second = two_losses(model, xb, y[rows], teacher[rows], kind)
        if not labels:
            return second
        second = weight * second
        if heads != "two, aligned":
            return first + second
        # g₁ + (g₂ − c g₁): projecting the teacher's gradient only reweighs the cross entropy
        c = share_against(first, second, [p for p in model.parameters() if p.requires_grad])
        return (1 - c.detach()) * first + second

    return loss


def cosines(model, x, y, teacher, kind) -> dict[str, float]:
    """Cosine of the two losses' gradients in the head and in the backbone, in eval mode."""
    model.eval()
    losses = two_losses(model, x, y, teacher, kind)
    found = {}
    for part in ("head", "backbone"):
        own = list(model[part].parameters())
        g = [torch.autograd.grad(v, own, retain_graph=True, allow_unused=True) for v in losses]
        flat = [torch.cat([(torch.zeros_like(p) if d is None else d).flatten()
                           for d, p in zip(ds, own, strict=True)]) for ds in g]  # fmt: skip
        found[part] = F.cosine_similarity(*flat, dim=0).item()
    return found


@torch.no_grad()
def scores(model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 16] and the head's logits [n, 10], in eval mode."""
    model.eval()
    features = torch.cat([model["backbone"](part) for part in x.split(1000)])
    return features, model["head"](features)


def refit(features: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Predictions [n] on ``test`` of a logistic regression, in place of the head."""
    return vision.linear_probe(features, y, test, penalty=1e-3)


def run(method: str, weight: float, seed: int, data, teacher: Tensor, epochs: int = EPOCHS):
    """Train one student; (row of results, the student). ``teacher``: logits [10000, 10]."""
    x, y, xt, yt = data
    _, kind, heads = METHODS[method]
    model = student(seed, heads)
    curve = []

    def each(epoch, model):
        if kind in ("binary", "norm") and epoch in (1, 2, 5, 10, 15, epochs):
            some = slice(0, 500)
            curve.append([epoch, *(round(v, 4) for v in cosines(
                model, x[some], y[some], teacher[some], kind).values())])  # fmt: skip

    rows = torch.arange(len(x), device=x.device)[SEEN]
    vision.train(
        model, x[SEEN], rows, epochs=epochs, rate=RATE, batch=BATCH, seed=seed, decay=DECAY,
        optimizer="sgd", loss=loss_of(method, weight, y, teacher), each=each,
    )  # fmt: skip
    right = {}
    for name, (images, labels) in {"test": (xt, yt), "held": (x[HELD], y[HELD])}.items():
        features, logits = scores(model, images)
        right[name] = (logits.argmax(-1) == labels).float().mean().item()
        if name == "test":
            again = refit(scores(model, x[SEEN])[0], y[SEEN], features)
            right["refit"] = (again == labels).float().mean().item()
    row = {"method": method, "weight": weight, "seed": seed}
    row |= {k: round(v, 4) for k, v in right.items()} | {"cosines": curve}
    return row, model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the files are written")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dual_head",
        help="partial runs",
    )
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    data = vision.images()

    saved = args.scratch / "teacher.safetensors"
    net = vision.conv_net(16, seed=100)
    if saved.exists():
        net.load_state_dict(load_file(saved))
    else:
        vision.train(net, data[0], data[1], epochs=8, rate=3e-3, seed=100)
        save_file(net.state_dict(), saved)
    net.eval()
    taught = vision.logits(net, data[0])
    right = vision.accuracy(net, data[2], data[3])
    print(f"teacher: {right:.4f} of the test garments")

    def kept(name, **change):
        part = args.scratch / f"{name}.json"
        if not part.exists():
            row, _ = run(data=data, teacher=taught, **change)
            part.write_text(json.dumps(row))
            print(name, {k: row[k] for k in ("test", "held", "refit")}, flush=True)
        return json.loads(part.read_text())

    result = {"teacher": round(right, 4), "rows": []}
    save_file(
        {"logits": taught[SEEN].half().contiguous()}, args.out / "dual_head_teacher.safetensors"
    )
    for seed in SEEDS:
        for method, (labels, kind, _) in METHODS.items():
            for weight in WEIGHTS if kind and labels else (1.0,):
                name = f"{method.replace(' ', '_')}_{weight}_{seed}"
                result["rows"].append(kept(name, method=method, weight=weight, seed=seed))
        write(result, args.out)


def write(result: dict, out: Path) -> None:
    (out / "dual_head_rows.json").write_text(json.dumps(result) + "\n")
    print("wrote", out / "dual_head_rows.json", len(result["rows"]), flush=True)


if __name__ == "__main__":
    main()
