"""Makes trg_rows.json and trg_teacher.safetensors: a narrow student that is taught relations.

A convolutional teacher (width 24) teaches a student of width 4 on some 1,990 garments, once with as
many of every class, once long-tailed (800 of the first class down to 8 of the last): with labels
alone, with the teacher's probabilities (KD; Hinton et al., arXiv 1503.02531), with relations of
instances on top (RKD; Park et al., arXiv 1904.05068), and with the token-level relationship graph
(TRG; Zhang et al., arXiv 2306.12442), whole and in parts. Each term's weight is the best of three
on validation images, on the balanced set with a seed of its own. Resumable.

    python data/merging/make_trg.py --seeds 0 1 2 [--scratch DIR]
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, vision  # noqa: E402

TEACHER, STUDENT = 24, 4  # widths of the first convolution; the last has four times as many
TEACHING = dict(epochs=20, batch=64, rate=3e-3)
EPOCHS, BATCH, RATE = 15, 32, 1e-2  # of the student
COUNTS = [round(800 * 100 ** (-c / 9)) for c in range(10)]  # of the long-tailed set, 1,985 in all
SOFTEN = 4.0  # the temperature of KD
TOKENS, NEIGHBOURS = 8, 8  # of an image in the graph; of a token
WARM, COLD, FIXED = 0.5, 0.05, 0.16  # temperature of the global loss: from, to; when it stays
TERMS = ("rkd", "inner", "local", "global")
GRID = {"rkd": (0.1, 0.3, 1.0), "inner": (30.0, 300.0, 3000.0), "local": (3.0, 30.0, 300.0),
        "global": (0.03, 0.1, 0.3)}  # fmt: skip
METHODS = {  # the terms added to the labels
    "labels": (),
    "KD": ("kd",),
    "KD + RKD": ("kd", "rkd"),
    "KD + TRG": ("kd", "inner", "local", "global"),
    "KD + contextual": ("kd", "inner"),
    "KD + local": ("kd", "local"),
    "KD + global": ("kd", "global"),
    "KD + TRG, fixed temperature": ("kd", "inner", "local", "global fixed"),
}


PLAN = {"balanced": tuple(METHODS), "long-tailed": ("labels", "KD", "KD + RKD", "KD + TRG")}


# --- what is taught -------------------------------------------------------------------------------


def tokens(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """The last feature map as tokens, [n, places, channels], and the logits [n, classes]."""
    maps = net[:-2](x)  # all but the mean over places and the head
    return maps.flatten(2).transpose(1, 2), net[-2:](maps)


def graph(t: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k-nearest-neighbour graph of tokens [n, d], taken at length one: edges exp(−d²/2)."""
    t = F.normalize(t, dim=-1)
    square = (2 - 2 * t @ t.T).clamp_min(0)
    # No token is its own neighbour.
    near = square.detach() + 1e9 * torch.eye(len(t), device=t.device)
    edges = torch.zeros_like(square).scatter(1, near.topk(k, largest=False).indices, 1.0)
    return edges * torch.exp(-square / 2)


def local_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL from the teacher's graph to the student's, a softmax a row; mean over tokens."""
    log_s, log_t = graph(student).log_softmax(-1), graph(teacher).log_softmax(-1)
    return F.kl_div(log_t, log_s, reduction="batchmean", log_target=True)


def global_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE: each student token [n, d] has to find its own teacher token [n, d] among all."""
    similarity = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T
    return F.cross_entropy(
        similarity / temperature, torch.arange(len(student), device=student.device)
    )


def context(t: Tensor) -> Tensor:
    """How much each token of an image [n, places, d] resembles the others: [n, places, places]."""
    return (t @ t.transpose(1, 2) / math.sqrt(t.shape[-1])).softmax(-1)


def contextual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(context(student), context(teacher))


def kd_loss(student: Tensor, teacher: Tensor, soften: float = SOFTEN) -> Tensor:
    """KL from the teacher's softened probabilities to the student's, times the temperature²."""
    log_s, log_t = ((z / soften).log_softmax(-1) for z in (student, teacher))
    return soften**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def rkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances between instances (over their mean) and angles of triples, with RKD's weights."""
    if len(student) < 2:  # the last batch of a pass may hold one image, which relates to none
        return 0 * student.sum()

    def distances(e):
        d = (e[:, None] - e).square().sum(-1).add(1e-12).sqrt()
        return d / d[d > 1e-5].mean()

    def angles(e):
        ways = F.normalize(e[None] - e[:, None], dim=-1)
        return ways @ ways.transpose(1, 2)

    pull = F.smooth_l1_loss(distances(student), distances(teacher))
    return 25 * pull + 50 * F.smooth_l1_loss(angles(student), angles(teacher))


class Student(nn.Module):
    """The net, and the projection that brings its tokens to the teacher's width."""

    def __init__(self, net: nn.Sequential, width: int):
        super().__init__()
        self.net = net
        self.project = nn.Linear(net.head.in_features, width, bias=False)

    def forward(self, x):
        return self.net(x)


# --- data and training ----------------------------------------------------------------------------


def subset(kind: str) -> tuple[Tensor, Tensor]:
    """Some 1,990 of the first 9,000 training images and labels, ``"balanced"`` or
    ``"long-tailed"``."""
    x, y, _, _ = vision.images()
    counts = COUNTS if kind == "long-tailed" else [sum(COUNTS) // 10] * 10
    rows = torch.cat([(y[:9000] == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
    return x[rows], y[rows]


def distil(terms, weights: dict, x, y, taught: dict, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """A student trained on labels and the losses ``terms``; ``taught``: the teacher's tokens and
    logits of ``x``."""
    wide = taught["tokens"].shape[-1]
    student = Student(vision.conv_net(STUDENT, seed=seed), wide).to(x.device)
    g = torch.Generator().manual_seed(seed)
    steps, total = [0], epochs * -(-len(x) // BATCH)

    def loss(model, xb, rows):
        s, logits = tokens(model.net, xb)
        t = taught["tokens"][rows]
        value = F.cross_entropy(logits, y[rows])
        part = steps[0] / total
        steps[0] += 1
        which = torch.rand(len(xb), s.shape[1], generator=g).argsort(1)[:, :TOKENS].to(x.device)
        at = torch.arange(len(xb), device=x.device)[:, None]
        few_s, few_t = s[at, which].flatten(0, 1), t[at, which].flatten(0, 1)
        for term in terms:
            if term == "kd":
                value = value + kd_loss(logits, taught["logits"][rows])
            elif term == "rkd":
                value = value + weights["rkd"] * rkd_loss(s.mean(1), t.mean(1))
            elif term == "inner":
                value = value + weights["inner"] * contextual_loss(s, t)
            elif term == "local":
                value = value + weights["local"] * local_loss(few_s, few_t)
            else:
                warmth = FIXED if "fixed" in term else WARM * (COLD / WARM) ** part
                found = global_loss(model.project(few_s), few_t, warmth)
                value = value + weights["global"] * found
        return value

    rows = torch.arange(len(x), device=x.device)
    vision.train(student, x, rows, epochs=epochs, rate=RATE, batch=BATCH, seed=seed, loss=loss)
    return student.net


def teach(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        t, logits = zip(*(tokens(net.eval(), part) for part in x.split(500)), strict=True)
    return {"tokens": torch.cat(t), "logits": torch.cat(logits)}


def by_class(net: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    right = vision.logits(net, x).argmax(-1) == y
    return [round(float(right[y == c].float().mean()), 4) for c in range(10)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "trg")
    args = parser.parse_args(argv)
    start = time.time()
    x_all, y_all, x_test, y_test = vision.images()
    x_val, y_val = x_all[9000:], y_all[9000:]
    file = args.scratch / "state.safetensors"
    state = checkpoint.load(file) if file.is_file() else {"nets": {}, "tuning": {}, "rows": {}}

    def store(note):
        checkpoint.save(file, state)
        print(f"{time.time() - start:5.0f} s  {note}", flush=True)

    sets, taught = {}, {}
    for kind in ("balanced", "long-tailed"):
        x, y = sets[kind] = subset(kind)
        net = vision.conv_net(TEACHER, seed=1000)
        if kind not in state["nets"]:
            vision.train(net, x, y, **TEACHING, seed=1000)
            # What teaches is what is shipped.
            state["nets"][kind] = {k: v.half() for k, v in net.state_dict().items()}
            net.load_state_dict({k: v.float() for k, v in state["nets"][kind].items()})
            state["rows"][f"teacher/{kind}"] = by_class(net.eval(), x_test, y_test)
            store(f"teacher, {kind}: {sum(state['rows'][f'teacher/{kind}']) / 10:.3f}")
        net.load_state_dict({k: v.float() for k, v in state["nets"][kind].items()})
        taught[kind] = teach(net, x)

    for term in TERMS:
        for weight in GRID[term]:
            if f"{term}/{weight}" not in state["tuning"]:
                net = distil(
                    ("kd", term), {term: weight}, *sets["balanced"], taught["balanced"], 100
                )
                state["tuning"][f"{term}/{weight}"] = round(vision.accuracy(net, x_val, y_val), 4)
                store(f"{term} {weight}: validation {state['tuning'][f'{term}/{weight}']:.4f}")
    weights = {t: max(GRID[t], key=lambda w, t=t: state["tuning"][f"{t}/{w}"]) for t in TERMS}

    for seed in args.seeds:
        for kind in sets:
            for method in PLAN[kind]:
                key = f"{seed}/{kind}/{method}"
                if key in state["rows"]:
                    continue
                net = distil(METHODS[method], weights, *sets[kind], taught[kind], seed)
                state["rows"][key] = by_class(net, x_test, y_test)
                store(f"{key}: {sum(state['rows'][key]) / 10:.4f}")

    rows = []
    for kind in sets:
        found = state["rows"][f"teacher/{kind}"]
        rows.append(dict(seed=None, set=kind, method="teacher", by_class=found))
        for seed in args.seeds:
            for method in PLAN[kind]:
                found = state["rows"][f"{seed}/{kind}/{method}"]
                rows.append(dict(seed=seed, set=kind, method=method, by_class=found))
    (HERE / "trg_rows.json").write_text(
        json.dumps({"counts": COUNTS, "weights": weights, "tuning": state["tuning"], "rows": rows})
    )
    shipped = {k: v.contiguous() for k, v in state["nets"]["long-tailed"].items()}
    save_file(shipped, HERE / "trg_teacher.safetensors")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
