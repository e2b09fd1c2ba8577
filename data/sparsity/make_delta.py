"""A digit moves over a photograph: makes delta_runs.json and delta_nets.safetensors.

    python data/sparsity/make_delta.py [--seeds 0 1 2] [--scratch DIR]

A small convolutional net reads clips of six frames: MNIST digits of 14 × 14 pixels that drift over
a still crop of a photograph, with sensor noise in every frame. It is trained plainly; from there on
with an L1 penalty on activations (what is usual), or with Delta Activation Layers (Yousefzadeh and
Sifalakis, arXiv 2107.07305), briefly and for longer. One row a run; the nets of seed 0 are kept for
the chapter. A run that the scratch folder holds is not repeated. About 9 minutes of one thread.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets  # noqa: E402

SIDE, FRAMES, BATCH, NOISE = 28, 6, 32, 0.02
# What one input of each layer is multiplied with: 9 taps, a quarter of the places, 8 or 16 channels
FAN_OUT = {"frame": 18.0, "conv1": 36.0, "conv2": 128.0, "hidden": 10.0}
NEURONS = {"frame": 784, "conv1": 8 * 14 * 14, "conv2": 16 * 7 * 7, "hidden": 128}

# The penalty, its weight, and steps of training after the 1,500 that all runs share
STAGES = [(kind, rate, 500) for kind in ("l1", "delta") for rate in (0.03, 0.3, 3.0)]
STAGES += [("delta", 0.3, 1500), ("delta", 3.0, 1500)]
STAGES += [("l1", 30.0, 500), ("delta", 30.0, 500), ("delta", 30.0, 1500), ("plain", 0.0, 1500)]

# --- clips ---------------------------------------------------------------------------------------


def scenes() -> dict[str, Tensor]:
    """Digits [n, 14, 14] and labels for training and test, and grey photographs for each."""
    found = datasets.mnist()
    grey = [torch.tensor(np.asarray(p).mean(-1) / 255).float() for p in datasets.photos().values()]
    out = {"train_photos": grey[:4], "test_photos": grey[4:]}
    for part in ("train", "test"):
        x = torch.tensor(found[f"x_{part}"]).float() / 255
        out[f"{part}_digits"] = F.avg_pool2d(x[:, None], 2)[:, 0]
        out[f"{part}_labels"] = torch.tensor(found[f"y_{part}"]).long()
    return out


def clips(digits: Tensor, photos: list[Tensor], g: torch.Generator, noise=NOISE) -> Tensor:
    """Frames [n, FRAMES, 1, 28, 28] in 0…1: digits [n, 14, 14] that drift by −1, 0 or 1 a frame.

    A third of the photograph's contrast; a digit covers it where it is brighter.
    """
    n, reach = len(digits), FRAMES - 1
    velocity = torch.randint(-1, 2, (n, 2), generator=g)
    at = torch.randint(0, SIDE - 14 + 1 - reach, (n, 2), generator=g)
    at = at + torch.where(velocity < 0, reach, 0)
    which = torch.randint(len(photos), (n,), generator=g).tolist()
    corner = torch.rand(n, 2, generator=g)
    still = torch.empty(n, 1, 1, SIDE, SIDE)
    for i, photo in enumerate(photos[w] for w in which):
        r, c = (
            int(u * (s - 2 * SIDE)) for u, s in zip(corner[i].tolist(), photo.shape, strict=True)
        )
        still[i] = photo[r : r + 2 * SIDE : 2, c : c + 2 * SIDE : 2] / 3
    corners = at[:, None] + torch.arange(FRAMES)[:, None] * velocity[:, None]  # [n, frame, 2]
    line = torch.arange(14)
    rows = (corners[..., 0, None, None] + line[:, None]).expand(-1, -1, 14, 14)
    columns = (corners[..., 1, None, None] + line).expand(-1, -1, 14, 14)
    moving = torch.zeros(n, FRAMES, SIDE, SIDE)
    moving[
        torch.arange(n)[:, None, None, None], torch.arange(FRAMES)[:, None, None], rows, columns
    ] = digits[:, None].expand(-1, FRAMES, 14, 14)
    made = torch.maximum(moving[:, :, None], still)
    return made + noise * torch.randn(made.shape, generator=g)


# --- the layer -----------------------------------------------------------------------------------


class _Step(torch.autograd.Function):
    """round(z / q) q. Rounding passes the gradient; q's is the one of the authors' code: negated,
    so that a penalty on |ΔO|, which falls when a step grows past the change, makes q grow."""

    @staticmethod
    def forward(ctx, z, q):
        levels = torch.round(z / q)
        ctx.save_for_backward(levels)
        ctx.shape = q.shape
        return levels * q

    @staticmethod
    def backward(ctx, grad):
        (levels,) = ctx.saved_tensors
        return grad, -(grad * levels).sum_to_size(ctx.shape)


def quantize(z: Tensor, q: Tensor) -> Tensor:
    """f_q(z) = round(z / q) q with a trainable step: z [n, channel, …], q [channel]."""
    return _Step.apply(z, q.abs().reshape(1, -1, *[1] * (z.dim() - 2)))


def fresh_net(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    parts = {
        "conv1": nn.Conv2d(1, 8, 3, stride=2, padding=1),
        "conv2": nn.Conv2d(8, 16, 3, stride=2, padding=1),
        "hidden": nn.Linear(784, 128),
        "out": nn.Linear(128, 10),
    }
    return nn.ModuleDict(parts)


def fresh_steps(init: float = 0.1) -> nn.ParameterDict:
    """A step q for every channel of the frame and of the three hidden layers."""
    channels = {"frame": 1, "conv1": 8, "conv2": 16, "hidden": 128}
    return nn.ParameterDict({k: nn.Parameter(torch.full((n,), init)) for k, n in channels.items()})


def forward(net, frames: Tensor, steps=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Every frame by itself: frames [n, 1, 28, 28] to logits [n, 10] and what each layer reads."""
    reads = {}

    def cast(name, z):
        reads[name] = z if steps is None else quantize(z, steps[name])
        return reads[name]

    a = cast("frame", frames)
    a = cast("conv1", net["conv1"](a).relu())
    a = cast("conv2", net["conv2"](a).relu())
    a = cast("hidden", net["hidden"](a.flatten(1)).relu())
    return net["out"](a), reads


def changes(a: Tensor, n: int) -> Tensor:
    """O(t) − O(t − 1) after the first frame: [n · FRAMES, …] to [n, FRAMES − 1, …]."""
    a = a.reshape(n, -1, *a.shape[1:])
    return a[:, 1:] - a[:, :-1]


def operations(reads: dict[str, Tensor], n: int, delta: bool) -> float:
    """Share of the multiplications whose activation (``delta``: whose change) is not zero."""
    done = 0.0
    for name, a in reads.items():
        what = changes(a, n) if delta else a
        done += FAN_OUT[name] * NEURONS[name] * (what != 0).float().mean().item()
    return done / sum(FAN_OUT[k] * NEURONS[k] for k in FAN_OUT)


def penalty(reads: dict[str, Tensor], n: int, kind: str) -> Tensor:
    """Mean |O| (``l1``) or mean |ΔO| (``delta``) of every layer, weighted by its fan-out."""
    total = 0.0
    for name, a in reads.items():
        if kind == "l1" and name == "frame":
            continue  # the frame is given; without a quantizer nothing can be trained there
        what = changes(a, n) if kind == "delta" else a
        total = total + FAN_OUT[name] / 128 * what.abs().mean()
    return total


# --- training ------------------------------------------------------------------------------------


def train(net, scene, n_steps: int, seed: int, kind="plain", rate=0.0, steps=None) -> None:
    """Adam with a cosine to zero, in place; the loss is on a clip's mean logits."""
    groups = [{"params": list(net.parameters()), "top": 2e-3}]
    if steps is not None:
        groups.append({"params": list(steps.parameters()), "top": 1e-3})
    opt = torch.optim.Adam(groups, lr=0.0)
    g = torch.Generator().manual_seed(5000 + seed)
    for step in range(n_steps):
        for group in opt.param_groups:
            group["lr"] = group["top"] * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        at = torch.randint(len(scene["train_digits"]), (BATCH,), generator=g)
        frames = clips(scene["train_digits"][at], scene["train_photos"], g)
        logits, reads = forward(net, frames.flatten(0, 1), steps)
        logits = logits.reshape(BATCH, FRAMES, 10).mean(1)
        loss = F.cross_entropy(logits, scene["train_labels"][at])
        if rate:
            loss = loss + rate * penalty(reads, BATCH, kind)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()


def test_clips(scene) -> Tensor:
    """The 2,000 test digits over the test photographs, always the same."""
    g = torch.Generator().manual_seed(77)
    return clips(scene["test_digits"], scene["test_photos"], g)


@torch.no_grad()
def measure(net, frames: Tensor, labels: Tensor, steps=None) -> dict[str, float]:
    """Accuracy of clips, and shares of multiplications done: reading activations, or changes."""
    right, spatial, delta = 0, [], []
    for part, y in zip(frames.split(500), labels.split(500), strict=True):
        logits, reads = forward(net, part.flatten(0, 1), steps)
        guess = logits.reshape(len(part), FRAMES, 10).mean(1).argmax(-1)
        right += (guess == y).sum().item()
        spatial.append(operations(reads, len(part), False))
        delta.append(operations(reads, len(part), True))
    mean = {"spatial": float(np.mean(spatial)), "delta": float(np.mean(delta))}
    return {"accuracy": right / len(labels)} | mean


@torch.no_grad()
def untrained_steps(net, frames: Tensor, size: float) -> nn.ParameterDict:
    """Steps of ``size`` times each layer's root mean square: quantized delta without training."""
    _, reads = forward(net, frames.flatten(0, 1))
    steps = fresh_steps()
    for name, q in steps.items():
        q.data.fill_(size * reads[name].square().mean().sqrt().item())
    return steps


def one_seed(seed: int, scene, scratch: Path, frames: Tensor) -> list[dict]:
    """All runs of one seed, each from the plainly trained net."""
    labels, rows = scene["test_labels"], []

    def stage(name, kind, n_steps, rate=0.0, base=None):
        kept = scratch / f"{seed}_{name}.safetensors"
        net, steps = fresh_net(seed), fresh_steps() if kind == "delta" else None
        both = nn.ModuleDict({"net": net} | ({"steps": steps} if steps is not None else {}))
        if base is not None:
            net.load_state_dict(base.state_dict())
        if kept.exists():
            both.load_state_dict(load_file(kept))
        else:
            train(net, scene, n_steps, 100 * seed + len(rows), kind, rate, steps)
            save_file(both.state_dict(), kept)
        row = {"method": kind, "name": name, "rate": rate, "steps": n_steps, "seed": seed}
        rows.append(row | measure(net, frames, labels, steps))
        print(rows[-1], flush=True)
        return net

    base = stage("start", "plain", 1500)
    plain = stage("plain", "plain", 500, base=base)
    for kind, rate, n_steps in STAGES:
        name = f"{kind} {rate}" if rate else kind
        stage(name + " long" * (n_steps > 500), kind, n_steps, rate, base)
    for size in (0.25, 0.5, 1.0, 2.0):
        steps = untrained_steps(plain, frames[:100], size)
        row = {"method": "untrained delta", "name": f"untrained {size}", "rate": size}
        rows.append(row | {"steps": 0, "seed": seed} | measure(plain, frames, labels, steps))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", default=Path(tempfile.gettempdir()) / "sparsity_delta")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order: the same numbers every time
    scratch = Path(args.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    scene = scenes()
    frames = test_clips(scene)
    rows = [row for s in args.seeds for row in one_seed(s, scene, scratch, frames)]
    if sorted(args.seeds) != [0, 1, 2]:
        return  # part of the work; the table is written when all seeds are asked for
    rows.sort(key=lambda row: row["seed"])
    rows = [{k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "delta_runs.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')
    kept = {}
    for name in ("plain", "l1 3.0", "delta 3.0"):
        for key, value in load_file(scratch / f"0_{name}.safetensors").items():
            kept[f"{name.split()[0]}.{key}"] = value.half()
    save_file(kept, HERE / "delta_nets.safetensors")
    print(f"wrote delta_runs.json ({len(rows)} rows) and delta_nets.safetensors")


if __name__ == "__main__":
    main()
