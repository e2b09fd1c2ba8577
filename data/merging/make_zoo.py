"""A zoo of 36 small nets over load and temperature, and its loss landscape (arXiv 2504.18072).

Three widths (load: a narrow net carries more data a weight) by four batch sizes (temperature: a
small batch is noisy) by three seeds, trained by SGD on 2,048 images of Fashion-MNIST at 14 × 14
pixels. Per net: losses, the Hessian's top eigenvalue and trace, what pruning and a new task do to
it. Per pair of seeds: connectivity along a trained Bezier curve and along a line, similarity of
outputs, and what merging gives. Writes ``zoo_rows.json`` (a cell a line, lists over seeds) and
``zoo_nets.safetensors`` (two of the three seeds).
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import own_merge as om  # noqa: E402

from lib import vision  # noqa: E402

WIDTHS, BATCHES, SEEDS = (2, 4, 8), (25, 50, 100, 250), (0, 1, 2)
IMAGES, EPOCHS, RATE, DECAY = 2048, 10, 0.1, 5e-4


def data():
    """(2,048 training images, labels, 1,000 test images, labels) at 14 × 14 pixels."""
    x, y, test, labels = vision.images()
    return om.halve(x[:IMAGES]), y[:IMAGES], om.halve(test[:1000]), labels[:1000]


def trained(width, batch, seed, x, y):
    """One net of the zoo: SGD with momentum, weight decay, a rate that falls to zero."""
    net = vision.conv_net(width, seed=seed)
    vision.train(
        net,
        x,
        y,
        epochs=EPOCHS,
        batch=batch,
        rate=RATE,
        decay=DECAY,
        optimizer="sgd",
        seed=seed,
    )
    return net


def hessian(net, x, y, steps: int = 10, probes: int = 4, seed: int = 0) -> tuple[float, float]:
    """(top eigenvalue, trace) of the training loss's Hessian on x [n, 1, h, w], in eval mode.

    Power iteration of ``steps`` products; Hutchinson's mean of vᵀHv over random signs v.
    """
    weights = [p for p in net.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(F.cross_entropy(net(x), y), weights, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])

    def product(v):
        hv = torch.autograd.grad(flat @ v, weights, retain_graph=True)
        return torch.cat([h.flatten() for h in hv])

    g = torch.Generator().manual_seed(seed)
    v, top = torch.randn(len(flat), generator=g).to(flat), 0.0
    for _ in range(steps):
        v = v / v.norm()
        hv = product(v)
        top, v = float(v @ hv), hv
    signs = [torch.randint(0, 2, (len(flat),), generator=g).to(flat) * 2 - 1 for _ in range(probes)]
    return top, sum(float(s @ product(s)) for s in signs) / probes


def bezier(a, b, x, y, epochs: int = 20, rate: float = 0.1, batch: int = 128, seed: int = 0):
    """Train the bend φ of the curve (1−t)² a + 2t(1−t) φ + t² b to a low loss at random t.

    Returns:
        a function of t in [0, 1] to the net on the curve, whose statistics are not measured yet.
    """
    ends = [dict(net.named_parameters()) for net in (a, b)]
    bend = {k: ((v + ends[1][k]) / 2).detach().requires_grad_() for k, v in ends[0].items()}
    net = copy.deepcopy(a).train()

    def at(t):
        return {
            k: (1 - t) ** 2 * ends[0][k].detach()
            + 2 * t * (1 - t) * bend[k]
            + t**2 * ends[1][k].detach()
            for k in bend
        }

    stepper = torch.optim.SGD(list(bend.values()), lr=rate, momentum=0.9)
    g = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        stepper.param_groups[0]["lr"] = rate * (1 if epoch < epochs / 2 else 0.1)
        for rows in torch.randperm(len(x), generator=g).split(batch):
            t = float(torch.rand((), generator=g))
            loss = F.cross_entropy(functional_call(net, at(t), (x[rows],)), y[rows])
            stepper.zero_grad()
            loss.backward()
            stepper.step()

    def on_curve(t):
        point = copy.deepcopy(a)
        point.load_state_dict({k: v.detach() for k, v in at(t).items()}, strict=False)
        return point

    return on_curve


def connectivity(errors: list[float]) -> float:
    """mc: mean of the ends' errors minus the error, between them, that is farthest from it.

    Below 0 a barrier, about 0 connected, above 0 the ends are not trained well (percent points).
    """
    middle = (errors[0] + errors[-1]) / 2
    return 100 * (middle - max(errors, key=lambda e: abs(e - middle)))


def cka(a, b) -> float:
    """Linear CKA of two sets of outputs on the same inputs, [n, k] and [n, m]; 1 is the same."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def prune(net, share: float, x):
    """A copy without the ``share`` of smallest convolution and head weights, statistics reset."""
    net = copy.deepcopy(net)
    weights = [
        m.weight.data for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    cut = torch.cat([w.abs().flatten() for w in weights]).quantile(share)
    for w in weights:
        w.mul_(w.abs() > cut)
    return om.reset_norm(net, x)


def cell(width, batch, sets, mnist) -> tuple[dict, list]:
    """One cell's measurements, lists over seeds or pairs (0–1, 0–2, 1–2), and its nets."""
    x, y, test, labels = sets
    some, some_y = x[:512], y[:512]
    row = dict(width=width, batch=batch)
    nets = []

    def put(**values):
        for key, value in values.items():
            row.setdefault(key, []).append(round(value, 5))

    for seed in SEEDS:
        net = trained(width, batch, seed, x, y)
        nets.append(net)
        loss, error = om.score(net, x, y)
        test_loss, test_error = om.score(net, test, labels)
        put(train_loss=loss, train_error=error, test_loss=test_loss, test_error=test_error)
        top, trace = hessian(net, x[:256], y[:256])
        put(hessian_top=top, hessian_trace=trace)
        put(pruned=om.score(prune(net, 0.7, some), test, labels)[1])
        other = copy.deepcopy(net)
        vision.train(other, *mnist[:2], epochs=6, batch=20, rate=0.02, optimizer="sgd", seed=seed)
        put(transfer=om.score(other, *mnist[2:])[1])
    outputs = [vision.logits(net, test[:512]) for net in nets]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = nets[i], nets[j]
        put(cka=cka(outputs[i], outputs[j]))
        curve = bezier(a, b, x, y, seed=i + j)
        errors = [
            om.score(om.reset_norm(curve(t), some), some, some_y)[1]
            for t in torch.linspace(0, 1, 5).tolist()
        ]
        put(curve=connectivity(errors))
        matched = om.permute(b, om.match(om.units(a, x[:256]), om.units(b, x[:256])))
        ends = [om.reset_norm(copy.deepcopy(net), some) for net in (a, b)]
        loss = sum(om.score(net, some, some_y)[0] for net in ends) / 2
        put(ends_error=sum(om.score(net, test, labels)[1] for net in ends) / 2)
        for name, end in (("line", b), ("matched", matched)):
            mixed = om.reset_norm(om.average([a, end]), some)
            put(**{f"{name}_barrier": om.score(mixed, some, some_y)[0] - loss})
            put(**{f"{name}_error": om.score(mixed, test, labels)[1]})
    return row, nets


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "zoo_state",
        help="folder for finished cells",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="a part of all")
    args = parser.parse_args(argv)
    state = args.scratch
    state.mkdir(parents=True, exist_ok=True)
    sets = data()
    digits, names, test, labels = vision.images("mnist")
    mnist = (om.halve(digits[:200]), names[:200], om.halve(test[:1000]), labels[:1000])
    for width in args.widths:
        for batch in BATCHES:
            path = state / f"{width}_{batch}.json"
            if path.exists():
                continue
            start = time.time()
            row, nets = cell(width, batch, sets, mnist)
            save_file(
                {
                    f"{width}.{batch}.{seed}.{k}": v.half() if v.is_floating_point() else v
                    for seed, net in enumerate(nets[:2])
                    for k, v in net.state_dict().items()
                },
                path.with_suffix(".safetensors"),
            )
            path.write_text(json.dumps(row))
            print(f"{width} {batch}: {time.time() - start:.0f} s", row, flush=True)
    cells = [state / f"{width}_{batch}.json" for width in WIDTHS for batch in BATCHES]
    if all(path.exists() for path in cells):
        lines = ",\n".join(path.read_text() for path in cells)
        (HERE / "zoo_rows.json").write_text(f'{{"cells": [\n{lines}\n]}}\n')
        tensors = [load_file(path.with_suffix(".safetensors")) for path in cells]
        save_file(
            {k: v for part in tensors for k, v in part.items()}, HERE / "zoo_nets.safetensors"
        )


if __name__ == "__main__":
    main()
