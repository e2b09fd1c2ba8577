"""Activation matching at test time on small nets and on EfficientNet-Lite0: makes actmad_rows.json
and actmad_net.safetensors.

    python data/test_time/make_actmad.py [--parts …] [--scratch DIR]

Convolutional nets are trained on 10,000 garments; each then meets the test garments corrupted,
batch by batch, and adapts to them. Every method's optimizer and learning rate are chosen on a net
and on garments that the tables do not use. EfficientNet-Lite0 meets corrupted crops of photographs.
What the scratch folder holds is not made again. About 15 minutes of one thread.
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
sys.path.insert(0, str(HERE.parent.parent))

from lib import corruptions, datasets, hooks, models, vision  # noqa: E402

SITES = ("norm1", "norm2", "norm3")  # where the statistics are taken: after each normalization
METHODS = ("source", "norm", "tent", "actmad", "channels", "last", "channels last")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
ADAM = tuple(f"adam {r:g}" for r in RATES)
HOWS = (*ADAM, "sgd 0.001", "sgd 0.003", "sgd 0.01")
SEEDS = (0, 1, 2)
BATCH = 32  # 2,000 images in 63 steps; the paper's 10,000 in batches of 128 make 79
FEW = ("noise", "fog", "pixelate")  # for the curves that would take long on all kinds
SIZES = (4, 16, 64, 256)  # of a batch
TUNER = 100  # the seed of the nets on which rates are chosen


# --- the method ---------------------------------------------------------------------------------


def moments(a: Tensor, places: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and variance over a batch, of every place or of whole channels.

    Args:
        a: [n, c, h, w] of a convolutional net, [n, token, d] of a transformer.
        places: True keeps [c, h, w] (or [token, d]); False gives [c] (or [d]).
    """
    if places:
        return a.mean(0), a.var(0)
    over = (0, 2, 3) if a.ndim == 4 else (0, 1)
    return a.mean(over), a.var(over)


@torch.no_grad()
def statistics(model: nn.Module, x: Tensor, sites=SITES, places=True, batch=BATCH) -> dict:
    """What the activations look like at home: site -> (mean, variance), averaged over batches."""
    found = []
    for part in x.split(batch):
        if len(part) == batch or len(x) < batch:
            acts = hooks.read(model, part, sites)
            found.append([moments(acts[site], places) for site in sites])
    mean_of = lambda i, k: torch.stack([f[i][k] for f in found]).mean(0)  # noqa: E731
    return {site: (mean_of(i, 0), mean_of(i, 1)) for i, site in enumerate(sites)}


def distance(acts, home: dict, places: bool = True) -> Tensor:
    """ActMAD's loss: mean L1 distance of means and of variances, summed over the sites, halved."""
    total = 0.0
    for site, (mean, var) in home.items():
        m, v = moments(acts[site], places)
        total = total + (m - mean).abs().mean() + (v - var).abs().mean()
    return total / 2


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions [n, classes], in nats."""
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]


def optimizer(weights, how: str) -> torch.optim.Optimizer:
    """Adam, or gradient descent with Nesterov's momentum, from ``"adam 0.001"`` and the like."""
    name, rate = how.split()
    if name == "adam":
        return torch.optim.Adam(weights, lr=float(rate))
    return torch.optim.SGD(weights, lr=float(rate), momentum=0.9, nesterov=True)


class Adapter:
    """A copy of ``model`` that adapts to one batch after the other.

    Args:
        method: one of ``METHODS``: ``source`` changes nothing, ``norm`` takes batch norm's
            statistics from the batch at hand, ``tent`` minimizes entropy so and trains the affine
            weights, the others match activations and train every weight.
        home: of ``statistics``; for the matching methods.
        how: optimizer and learning rate, ``"adam 0.001"`` or ``"sgd 0.001"`` (with momentum).
    """

    def __init__(self, model, method: str, home: dict | None = None, how: str = "adam 0.001"):
        self.model, self.method, self.home = copy.deepcopy(model), method, home
        self.places = "channels" not in method
        self.model.train(method in ("norm", "tent")).requires_grad_(False)
        if method in ("source", "norm"):
            return
        parts = norms(self.model) if method == "tent" else [self.model]
        weights = [w for part in parts for w in part.parameters()]
        self.stepper = optimizer([w.requires_grad_() for w in weights], how)

    def step(self, x: Tensor) -> None:
        """Adapt to the images of one batch."""
        if self.method in ("source", "norm"):
            return
        with torch.enable_grad():
            if self.method == "tent":
                loss = entropy(self.model(x))
            else:
                acts = hooks.read(self.model, x, list(self.home), detach=False)
                loss = distance(acts, self.home, self.places)
            self.stepper.zero_grad()
            loss.backward()
            self.stepper.step()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


def home_of(model: nn.Module, x: Tensor, method: str, sites=SITES) -> dict | None:
    """The statistics that ``method`` matches: of every place or of channels, everywhere or last."""
    if method in ("source", "norm", "tent"):
        return None
    return statistics(
        model, x, sites[-1:] if "last" in method else sites, "channels" not in method
    )  # fmt: skip


def dealt(home: dict, over: str, seed: int) -> dict:
    """A control: the statistics of home, given to other places of their channel (``over``
    "places"), or to any place of any channel ("all"); mean and variance stay together."""
    g, out = torch.Generator().manual_seed(seed), {}
    for site, pair in home.items():
        keep = 1 if over == "places" else 0
        flat = [t.flatten(keep) for t in pair]
        order = torch.randperm(flat[0].shape[-1], generator=g)
        out[site] = tuple(t[..., order].view_as(pair[0]) for t in flat)
    return out


def online(adapter: Adapter, x: Tensor, y: Tensor, batch: int = BATCH) -> float:
    """Error in %, each batch predicted once, right after the step on it."""
    wrong = 0
    for xb, yb in zip(x.split(batch), y.split(batch), strict=True):
        adapter.step(xb)
        wrong += int((adapter(xb).argmax(-1) != yb).sum())
    return 100 * wrong / len(x)


def error(adapter: Adapter, x: Tensor, y: Tensor, batch: int = BATCH) -> float:
    """Error in % without a further step."""
    hits = [
        adapter(xb).argmax(-1) == yb for xb, yb in zip(x.split(batch), y.split(batch), strict=True)
    ]
    return 100 * (1 - torch.cat(hits).float().mean().item())


# --- the runs -----------------------------------------------------------------------------------


class Bench:
    """Data, nets, rates and rows, each made once and kept in the scratch folder."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self.x, self.y, self.x_test, self.y_test = vision.images("fashion_mnist")

    def net(self, seed: int) -> nn.Module:
        """A trained net; that of ``TUNER`` has not seen the last 2,000 training images."""
        model = vision.conv_net(seed=seed).to(memory_format=torch.channels_last)  # faster on a CPU
        kept = self.scratch / f"conv_{seed}.safetensors"
        if kept.exists():
            model.load_state_dict(load_file(kept))
            return model.eval()
        n = 8000 if seed == TUNER else 10000
        vision.train(model, self.x[:n], self.y[:n], epochs=6, rate=3e-3, seed=seed)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, kept)
        print(kept.name, vision.accuracy(model, self.x_test, self.y_test), flush=True)
        return model

    def kept(self, name: str, make) -> dict | list:
        file = self.scratch / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(make()))
            print(name, flush=True)
        return json.loads(file.read_text())

    def tuned(self) -> dict[str, dict]:
        """method -> how -> error in % on held-out training images, mean of three kinds at 3."""
        model = self.net(TUNER)
        x, y = self.x[8000:], self.y[8000:]

        def make(method, how):
            home = home_of(model, self.x[:4096], method)
            return [
                online(Adapter(model, method, home, how), corruptions.corrupt(x, c, 3, seed=7), y)
                for c in FEW
            ]

        found = {}
        for method in METHODS[2:]:
            for how in HOWS:
                name = f"tuned_conv_{method}_{how}".replace(" ", "-")
                errors = self.kept(name, partial(make, method, how))
                found.setdefault(method, {})[how] = round(sum(errors) / len(errors), 4)
        return found

    def how(self, method: str) -> str:
        """The best rate of Adam, unless momentum did better by half a point or more."""
        if method in ("source", "norm"):
            return "adam 0"
        errors = self.tuned()[method]
        return min(errors, key=lambda how: errors[how] + 0.5 * how.startswith("sgd"))

    def adapter(self, model, method: str, home=None) -> Adapter:
        return Adapter(model, method, home, self.how(method))

    def table(self, seed: int) -> list[dict]:
        """Online error of every method on every kind at 5, of four at 1 and 3, and clean."""
        rows = [self.kept(f"table_{seed}_{m}", partial(self.column, seed, m)) for m in METHODS]
        return [row for column in rows for row in column]

    def column(self, seed: int, method: str) -> list[dict]:
        model, rows = self.net(seed), []
        home = home_of(model, self.x, method)
        for severity in (0, 1, 3, 5) if method in METHODS[:4] else (0, 5):
            for c in corruptions.KINDS if severity else ("clean",):
                x = corruptions.corrupt(self.x_test, c, severity, seed) if severity else self.x_test
                e = round(online(self.adapter(model, method, home=home), x, self.y_test), 4)
                rows.append(dict(seed=seed, kind=c, severity=severity, method=method, error=e))
        return rows

    def curves(self, seed: int) -> list[dict]:
        """After k steps, two passes over 1,024 images at severity 5: error on other images of the
        corruption and on clean ones."""
        model, rows = self.net(seed), []
        home = home_of(model, self.x, "actmad")
        for c in FEW:
            x = corruptions.corrupt(self.x_test, c, 5, seed)
            seen, left, clean, y = x[:1024], x[1024:], self.x_test[1024:], self.y_test[1024:]
            for m in ("norm", "tent", "actmad"):
                a = self.adapter(model, m, home=home)
                for k, xb in enumerate([None, *seen.split(BATCH) * 2]):
                    if xb is not None:
                        a.step(xb)
                    if k in (0, 1, 2, 4, 8, 16, 32, 64) and (k == 0 or m != "norm"):
                        row = dict(seed=seed, kind=c, steps=k, method=m)
                        row["error"] = round(error(a, left, y), 4)
                        row["clean"] = round(error(a, clean, y), 4)
                        rows.append(row)
        return rows

    def dealt(self, seed: int) -> list[dict]:
        """Online error at severity 5 with the statistics of home ``dealt`` to others."""
        model, rows = self.net(seed), []
        home = home_of(model, self.x, "actmad")
        for over in ("places", "all"):
            for c in corruptions.KINDS:
                x = corruptions.corrupt(self.x_test, c, 5, seed)
                a = self.adapter(model, "actmad", home=dealt(home, over, seed))
                e = round(online(a, x, self.y_test), 4)
                rows.append(dict(seed=seed, kind=c, over=over, error=e))
        return rows

    def sizes(self, seed: int) -> list[dict]:
        """Online error at severity 5 by size of the batch, over the first 1,024 test images."""
        model, rows = self.net(seed), []
        home = home_of(model, self.x, "actmad")
        for c in FEW:
            x = corruptions.corrupt(self.x_test[:1024], c, 5, seed)
            for size in SIZES:
                for m in ("norm", "tent", "actmad"):
                    a = self.adapter(model, m, home=home)
                    e = online(a, x, self.y_test[:1024], size)
                    rows.append(dict(seed=seed, kind=c, size=size, method=m, error=round(e, 4)))
        return rows

    def photographs(self, seed: int) -> list[dict]:
        """``photo_runs`` with the rate that does best on crops of another seed."""
        tried = ["adam 1e-05", "adam 3e-05", "adam 0.0001", "adam 0.0003"]
        tuned = self.kept("tuned_photos", lambda: photo_runs(TUNER, {"actmad": tried}))
        mean = {how: sum(r["agree"] for r in tuned if r["how"] == how) for how in tried}
        best = max(mean, key=mean.get)
        return photo_runs(seed, {"source": ["adam 0"], "norm": ["adam 0"], "actmad": [best]})


def crops(n: int, seed: int) -> Tensor:
    """``n`` random crops of the book's photographs, [n, 3, 128, 128] in [−1, 1], in turn."""
    g = torch.Generator().manual_seed(seed)
    pictures = [torch.tensor(p).permute(2, 0, 1).float() / 255 for p in datasets.photos().values()]
    found = []
    for i in range(n):
        p = pictures[i % len(pictures)]
        side = int(min(p.shape[1:]) * (0.4 + 0.4 * torch.rand(1, generator=g).item()))
        top, left = (int(torch.randint(s - side + 1, (1,), generator=g)) for s in p.shape[1:])
        cut = p[None, :, top : top + side, left : left + side]
        found.append(F.interpolate(cut, size=128, mode="bilinear", antialias=True))
    return 2 * torch.cat(found) - 1


PHOTO_SITES = tuple(f"_blocks.{i}" for i in (2, 4, 7, 10, 14))  # of EfficientNet-Lite0


def photo_runs(seed: int, methods: dict[str, list[str]]) -> list[dict]:
    """EfficientNet-Lite0: agreement (%) with its own answer to the clean crop, of 1,000 classes.

    Statistics come from 96 clean crops, adaptation from 96 others, 16 at a time; no labels.

    Args:
        methods: method -> what it steps with, in turn.
    """
    model, _ = models.load("efficientnet-lite0")
    home = statistics(model, crops(96, 50 + seed), PHOTO_SITES, batch=16)
    x = crops(96, seed)
    asked = vision.logits(model, x, 16).argmax(-1)
    rows = []
    for c in FEW:
        bad = 2 * corruptions.corrupt((x + 1) / 2, c, 3, seed) - 1
        for m, hows in methods.items():
            for how in hows:
                agree = 100 - online(Adapter(model, m, home, how), bad, asked, 16)
                rows.append(dict(seed=seed, kind=c, method=m, how=how, agree=round(agree, 4)))
    return rows


PARTS = ("table", "curves", "dealt", "sizes", "photographs")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--scratch", default=Path(tempfile.gettempdir()) / "test_time_actmad")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order: the same numbers every time
    bench, out = Bench(Path(args.scratch)), {}
    for part in args.parts:
        make = getattr(bench, part)
        made = [bench.kept(f"{part}_{s}", partial(make, s)) for s in SEEDS]
        out[part] = [row for rows in made for row in rows]
    if tuple(args.parts) != PARTS:
        return  # part of the work; the file is written when all parts are asked for
    chosen = {m: bench.how(m) for m in METHODS[2:]}
    out = {"tuned": bench.tuned(), "chosen": chosen} | out
    text = ",\n".join(
        f'"{k}": [\n' + ",\n".join(map(json.dumps, v)) + "\n]"
        if isinstance(v, list)
        else f'"{k}": {json.dumps(v)}'
        for k, v in out.items()
    )
    (HERE / "actmad_rows.json").write_text("{" + text + "}\n")
    state = {k: v.contiguous() for k, v in bench.net(0).state_dict().items()}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, HERE / "actmad_net.safetensors")
    print("wrote actmad_rows.json and actmad_net.safetensors")


if __name__ == "__main__":
    main()
