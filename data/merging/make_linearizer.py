"""Makes linearizer_rows.json, linearizer_nets.safetensors and linearizer_times.json.

A vision transformer is the teacher, trained on 10,000 labelled garments; a student whose tokens mix
by Mamba's selective scan, in linear time, sees 1,000 of them. ViT-Linearizer (Wei and Chellappa,
arXiv 2504.00037) lets it match the teacher's token-by-token similarities at four stages and predict
the teacher's tokens where the picture is masked, then finetunes it on labels. Beside it: labels
alone for as many passes, plain feature distillation, each term alone, and matching of masked tokens
too. Resumable; ``--times`` measures both nets' forward time by the number of tokens, on an
otherwise idle machine.

    python data/merging/make_linearizer.py --seeds 0 1 2 [--scratch DIR]
    python data/merging/make_linearizer.py --times
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numba
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, vision  # noqa: E402
from lib.kernels.selective_scan import selective_scan  # noqa: E402

WIDTH, DEPTH, PATCH = 48, 4, 4  # of both nets
INNER, STATE, RANK = 48, 8, 4  # of the student's scan
N, DISTIL, TUNE = 1000, 5, 3  # images, passes, passes on labels
TEACHER_PASSES, TEACHER_BATCH, BATCH, RATE = 5, 64, 25, 2e-3
SPREAD = (
    0.15  # of the teacher's first weights; 0.02, as usual for widths of hundreds, learns slowly
)
SHARP = 8.0  # times the probe's outputs, which lie between 0 and 1, to make logits
MASKED = 0.75  # share of tokens that the student does not see
METHODS = ("labels", "features", "masking", "matching", "both", "both, all tokens")


# --- the student ----------------------------------------------------------------------------------


class Scan(nn.Module):
    """Mamba's token mixer, [n, tokens, d] to the same: each token sees those before it."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.into = nn.Linear(width, 2 * INNER, bias=False)
        self.taps = nn.Parameter(torch.randn(3, INNER) * 0.5)
        self.read = nn.Linear(INNER, RANK + 2 * STATE, bias=False)
        self.step = nn.Linear(RANK, INNER)
        nn.init.uniform_(self.step.bias, -4.0, -1.0)  # a softplus from 0.02 to 0.3
        self.log_a = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(INNER, 1))
        self.skip = nn.Parameter(torch.ones(INNER))
        self.out = nn.Linear(INNER, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.into(x).chunk(2, -1)
        before = F.pad(x, (0, 0, 2, 0))  # a token, and the two before it
        x = F.silu(sum(w * before[:, i : i + x.shape[1]] for i, w in enumerate(self.taps)))
        low, b, c = self.read(x).split([RANK, STATE, STATE], -1)
        parts = (t.transpose(1, 2) for t in (x, self.step(low), b, c, z))
        x, delta, b, c, z = parts
        y, _ = selective_scan(x, delta, -self.log_a.exp(), b, c, self.skip, z)
        return self.out(y.transpose(1, 2))


class Block(nn.Module):
    """A scan and an MLP. The mean of all tokens goes first, so that the first has heard of the rest
    (an idea of Adventurer, the paper's student)."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm1, self.scan = nn.LayerNorm(width), Scan(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        whole = self.norm1(torch.cat([x.mean(1, keepdim=True), x], 1))
        x = x + self.scan(whole)[:, 1:]
        return x + self.mlp(self.norm2(x))


class Linear(nn.Module):
    """The student: patches, blocks that read them forwards and backwards in turn, a head."""

    def __init__(self, seed: int = 0, size: int = 28):
        torch.manual_seed(seed)
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(torch.randn((size // PATCH) ** 2, WIDTH) * 0.02)
        self.mask = nn.Parameter(torch.zeros(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.predict = nn.Linear(WIDTH, WIDTH)  # to the teacher's tokens
        self.head = nn.Linear(WIDTH, 10)

    def stages(self, x: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        """Tokens after each block, [n, tokens, d], and last the normed ones. ``hidden``: bool
        [n, tokens], where the mask stands in place of the patch."""
        t = self.patch(x).flatten(2).transpose(1, 2)
        if hidden is not None:
            t = torch.where(hidden[..., None], self.mask, t)
        t, found = t + self.place, []
        for i, block in enumerate(self.blocks):
            t = block(t.flip(1)).flip(1) if i % 2 else block(t)
            found.append(t)
        return [*found, self.norm(t)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x)[-1].mean(1))


# --- what is taught -------------------------------------------------------------------------------


def teacher_stages(net: vision.Vit, x: Tensor) -> list[Tensor]:
    """The teacher's patch tokens after each block, and last the normed ones; no class token."""
    out = net.vit(x, output_hidden_states=True)
    return [t[:, 1:] for t in (*out.hidden_states[1:], out.last_hidden_state)]


def activation_map(t: Tensor) -> Tensor:
    """Cosines of every token with every other, each row at length one: [n, tokens, tokens]."""
    t = F.normalize(t, dim=-1)
    return F.normalize(t @ t.transpose(1, 2), dim=-1)


def matching_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """One minus the cosine of the two maps' rows, mean over rows and stages."""
    losses = [
        1 - (activation_map(s) * activation_map(t)).sum(-1).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def masks(n: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Which tokens are hidden, as many in every picture: bool [n, tokens]."""
    return torch.rand(n, tokens, generator=generator).argsort(1) < round(MASKED * tokens)


def visible(t: Tensor, hidden: Tensor) -> Tensor:
    """The tokens that are not hidden, in order: [n, seen, d]."""
    return t[~hidden].view(len(t), -1, t.shape[-1])


def distil_loss(net: Linear, method: str, x: Tensor, taught: list[Tensor], generator) -> Tensor:
    """What ``method`` minimizes before the labels come: x [n, 1, h, w], the teacher's stages."""
    tokens = taught[0].shape[1]
    hidden = None
    if method in ("masking", "both", "both, all tokens"):
        hidden = masks(len(x), tokens, generator).to(x.device)
    stages = net.stages(x, hidden)
    value = 0.0
    if method in ("matching", "both", "both, all tokens"):
        pairs = stages[:-1], taught[:-1]
        if method == "both":
            pairs = ([visible(t, hidden) for t in side] for side in pairs)
        value = value + matching_loss(*pairs)
    if method != "matching":
        asked = torch.ones_like(taught[0][..., 0], dtype=torch.bool) if hidden is None else hidden
        value = value + F.smooth_l1_loss(net.predict(stages[-1])[asked], taught[-1][asked])
    return value


# --- training and measures ------------------------------------------------------------------------


@torch.no_grad()
def all_stages(f, x: Tensor) -> list[Tensor]:
    return [torch.cat(t) for t in zip(*(f(part) for part in x.split(250)), strict=True)]


@torch.no_grad()
def probe(net: Linear, x: Tensor, y: Tensor) -> Tensor:
    """A ridge classifier on mean tokens: [d + 1, classes], the bias last."""
    a = F.pad(all_stages(net.stages, x)[-1].mean(1), (0, 1), value=1.0)
    one = torch.eye(a.shape[1], device=a.device)
    return torch.linalg.solve(a.T @ a + one, a.T @ F.one_hot(y, 10).float())


@torch.no_grad()
def measures(net: Linear, ridge: Tensor, x_test, y_test, taught_test: list[Tensor]) -> dict:
    """The probe's share of right answers, the likeness of activation maps to the teacher's by
    stage, and the error at hidden tokens over that of the mean token."""
    n = len(taught_test[0])
    stages = all_stages(net.eval().stages, x_test[:n])
    guess = F.pad(stages[-1].mean(1), (0, 1), value=1.0) @ ridge
    likeness = [
        1 - float(matching_loss([s], [t]))
        for s, t in zip(stages[:-1], taught_test[:-1], strict=True)
    ]
    hidden = masks(500, stages[0].shape[1], torch.Generator().manual_seed(0)).to(x_test.device)
    told = taught_test[-1][:500]
    predicted = net.predict(net.stages(x_test[:500], hidden)[-1])
    error = F.smooth_l1_loss(predicted[hidden], told[hidden])
    base = F.smooth_l1_loss(told.mean((0, 1)).expand_as(told)[hidden], told[hidden])
    return dict(
        probe=round(float((guess.argmax(-1) == y_test[:n]).float().mean()), 4),
        likeness=[round(v, 4) for v in likeness],
        hidden_error=round(float(error / base), 4),
    )


def student(method: str, seed: int, x, y, taught: list[Tensor], test) -> tuple[Linear, dict]:
    """A student after distillation and labels, and its row."""
    net = Linear(seed).to(x.device)
    g = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(x), device=x.device)
    settings = dict(rate=RATE, batch=BATCH, seed=seed)
    row = dict(seed=seed, method=method)
    passes = DISTIL + TUNE
    if method != "labels":
        vision.train(
            net, x, rows, epochs=DISTIL, **settings,
            loss=lambda m, xb, at: distil_loss(m, method, xb, [t[at] for t in taught], g),
        )  # fmt: skip
        ridge = probe(net, x, y)
        row["before"] = measures(net, ridge, *test)
        # The head starts from the probe: three passes are too few to begin it anew.
        net.head.weight.data, net.head.bias.data = SHARP * ridge[:-1].T.clone(), SHARP * ridge[-1]
        passes = TUNE
    vision.train(net, x, y, epochs=passes, **settings)
    if method == "labels":
        row["after"] = measures(net, probe(net, x, y), *test)
    row["accuracy"] = round(vision.accuracy(net, *test[:2]), 4)
    return net, row


def times(rounds: int = 10) -> dict:
    """Seconds of a forward of one picture on one thread, by tokens: teacher and student with fresh
    weights, in turn, ``rounds`` times. The fastest is what the computation takes; the median says
    how quiet the machine was."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    seen = {}
    for turn in range(rounds + 1):
        for size in (28, 56, 112, 168, 224):
            nets = {"teacher": vision.vit(size, PATCH, WIDTH, DEPTH), "student": Linear(size=size)}
            x = torch.rand(1, 1, size, size)
            for name, net in nets.items():
                with torch.inference_mode():
                    net.cpu().eval()(x)
                    start = time.perf_counter()
                    net(x)
                    if turn:
                        took = time.perf_counter() - start
                        seen.setdefault((name, (size // PATCH) ** 2), []).append(took)
    rows = []
    for (name, tokens), took in seen.items():
        fastest, median = (round(f(took), 6) for f in (min, statistics.median))
        rows.append(dict(net=name, tokens=tokens, seconds=fastest, median=median))
        print(rows[-1], flush=True)
    return dict(threads=1, rounds=rounds, rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "linearizer")
    parser.add_argument("--times", action="store_true", help="measure times and do nothing else")
    args = parser.parse_args(argv)
    if args.times:
        (HERE / "linearizer_times.json").write_text(json.dumps(times()))
        return
    start = time.time()
    x, y, x_test, y_test = vision.images()
    file = args.scratch / "state.safetensors"
    state = checkpoint.load(file) if file.is_file() else {"rows": {}, "nets": {}}

    def store(note):
        checkpoint.save(file, state)
        print(f"{time.time() - start:5.0f} s  {note}", flush=True)

    teacher = vision.vit(28, PATCH, WIDTH, DEPTH, seed=1000, initializer_range=SPREAD)
    if "teacher" not in state["nets"]:
        vision.train(
            teacher, x, y, epochs=TEACHER_PASSES, rate=RATE, batch=TEACHER_BATCH, seed=1000
        )
        state["nets"]["teacher"] = {k: v.half() for k, v in teacher.state_dict().items()}
    # What teaches is what is shipped.
    teacher.load_state_dict({k: v.float() for k, v in state["nets"]["teacher"].items()})
    teacher.eval()
    if "teacher" not in state["rows"]:
        found = round(vision.accuracy(teacher, x_test, y_test), 4)
        state["rows"]["teacher"] = dict(seed=None, method="teacher", accuracy=found)
        store(f"teacher: {found}")
    x, y = x[:N], y[:N]
    taught, taught_test = (
        all_stages(lambda p: teacher_stages(teacher, p), p) for p in (x, x_test[:1000])
    )
    for seed in args.seeds:
        for method in METHODS:
            key = f"{method}/{seed}"
            if key in state["rows"]:
                continue
            net, row = student(method, seed, x, y, taught, (x_test, y_test, taught_test))
            state["rows"][key] = row
            if seed == 0 and method in ("labels", "both"):
                kept = {k: v for k, v in net.state_dict().items() if "predict" not in k}
                state["nets"][method] = {k: v.half() for k, v in kept.items()}
            store(f"{key}: {row}")
    (HERE / "linearizer_rows.json").write_text(
        json.dumps({"images": N, "passes": [DISTIL, TUNE], "rows": list(state["rows"].values())})
    )
    flat = {f"{net}.{k}": v for net, w in state["nets"].items() for k, v in w.items()}
    save_file({k: v.contiguous() for k, v in flat.items()}, HERE / "linearizer_nets.safetensors")
    print(f"{len(state['rows'])} rows")


if __name__ == "__main__":
    main()
