"""Makes inductive_bias_rows.json: how many bits single out a model that generalizes, after "Towards
Exact Computation of Inductive Bias" (arXiv 2406.15941).

Random hypotheses that fit the training data are drawn from a space, a scaled noncentral chi-squared
distribution is fitted to their test losses, and its lower tail at a target loss gives the bits.
Checked on a space that can be enumerated and on Gaussian processes, whose losses have a known
distribution; then by the dimension of the inputs, and for kernels against networks. About 4 minutes
on one core; resumable.

    python data/merging/make_inductive_bias.py [--scratch DIR]
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize, special, stats
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, vision  # noqa: E402

# --- the estimate ---------------------------------------------------------------------------------


def fitted(losses) -> tuple[float, float, float]:
    """A scaled noncentral chi-squared for losses [n]: (degrees of freedom, noncentrality, scale).

    The mean is the sample's; the variance, and how much of the mean is noncentral, are the
    likeliest, searched from the sample's variance. (All three by scipy's ``ncx2.fit`` start where
    the search often stays: it gives another distribution.)
    """
    x = np.asarray(losses, float)
    mean, variance = x.mean(), x.var(ddof=1)

    def at(log_ratio, logit):
        share = special.expit(logit)
        scale = np.exp(log_ratio) * variance / (2 * mean * (1 + share))
        return mean / scale * (1 - share), mean / scale * share, scale

    def surprise(parameters):
        df, nc, scale = at(*np.clip(parameters, -8, 8))
        found = -stats.ncx2.logpdf(x, df, nc, scale=scale).sum()
        return found if np.isfinite(found) else 1e12

    starts = [(0.0, -2.0), (0.0, 2.0)]
    options = dict(xatol=1e-2, fatol=1e-2, maxiter=80)
    found = [optimize.minimize(surprise, s, method="Nelder-Mead", options=options) for s in starts]
    return at(*np.clip(min(found, key=lambda f: f.fun).x, -8, 8))


def bits(target: float, df: float, nc: float, scale: float) -> float:
    """−log₂ of the chance of a loss of at most ``target``.

    Where scipy's tail is zero: Sankaran's power that makes the distribution nearly normal.
    """
    found = stats.ncx2.logcdf(target, df, nc, scale=scale)
    if not np.isfinite(found) or found < -600:
        total, spread = df + nc, df + 2 * nc
        h = 1 - 2 * total * (df + 3 * nc) / (3 * spread**2)
        p = spread / total**2
        m = (h - 1) * (1 - 3 * h)
        z = (target / scale / total) ** h - (1 + h * p * (h - 1 - 0.5 * (2 - h) * m * p))
        found = stats.norm.logcdf(z / (h * np.sqrt(2 * p) * (1 + 0.5 * m * p)))
    return float(-found / np.log(2))


def estimate(losses, target: float) -> float:
    """Bits that a sample of losses needs to reach ``target``."""
    return bits(target, *fitted(losses))


# --- a space that can be enumerated -------------------------------------------------------------

LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def enumerate_space(seed: int, n_train: int = 6, n_test: int = 60, fit: float = 0.05):
    """All 390,625 networks of two tanh units over two inputs with weights in five levels, and a
    teacher of the same form whose weights lie in between.

    Returns:
        test losses (mean squared error) of the share ``fit`` of them that fits the six training
        points best: [19531].
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (n_train + n_test, 2))
    unit = np.array(list(itertools.product(LEVELS, repeat=4)))  # w1, w2, bias, output weight
    table = unit[:, 3:] * np.tanh(unit[:, :2] @ x.T + unit[:, 2:3])  # [625, points]
    w = rng.uniform(-2, 2, (2, 4))
    y = (w[:, 3:] * np.tanh(w[:, :2] @ x.T + w[:, 2:3])).sum(0)

    def losses(part):  # |a + b - y|^2 for every pair of units
        u, t = table[:, part], y[part]
        one = (u**2).sum(1) - 2 * u @ t
        return ((one[:, None] + one + 2 * u @ u.T + t @ t) / len(t)).ravel()

    train, test = losses(slice(n_train)), losses(slice(n_train, None))
    keep = np.argsort(train, kind="stable")[: round(fit * len(train))]
    return test[keep]


SAMPLES = (30, 100, 300, 1000)
DEPTHS = (4, 8, 11)  # exact bits that are asked for


def enumerated(seed: int, draws: int = 5) -> dict:
    """Estimates from samples of the enumerated space against the exact bits."""
    losses = np.sort(enumerate_space(seed))
    rng = np.random.default_rng(1000 + seed)
    rows = []
    for depth in DEPTHS:
        target = losses[max(1, round(len(losses) * 2.0**-depth)) - 1]
        exact = -np.log2((losses <= target).mean())
        for n in SAMPLES:
            found, hits = [], []
            for _ in range(draws):
                sample = rng.choice(losses, n)
                found.append(estimate(sample, target))
                hits.append(int((sample <= target).sum()))
            rows.append(
                dict(depth=depth, exact=round(float(exact), 4), n=n)
                | dict(bits=np.round(found, 3).tolist(), hits=hits)
            )
    return dict(seed=seed, rows=rows)


# --- Gaussian processes --------------------------------------------------------------------------


def kernel(kind: str, a, b, length: float) -> np.ndarray:
    """``"rbf"``: exp(−r² / 2 length²); ``"laplace"``: exp(−r / length)."""
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    if kind == "rbf":
        return np.exp(-square / (2 * length**2))
    return np.exp(-np.sqrt(square) / length)


def posterior(kind, x, y, x_test, length: float, jitter: float = 1e-6):
    """Functions that interpolate (x [n, d], y [n, outputs]): their mean [tests, outputs] and
    covariance [tests, tests] at x_test."""
    k = kernel(kind, x, x, length) + jitter * np.eye(len(x))
    across = kernel(kind, x, x_test, length)
    solved = np.linalg.solve(k, np.concatenate([y, across], 1))
    outputs = y.shape[1]
    mean = across.T @ solved[:, :outputs]
    return mean, kernel(kind, x_test, x_test, length) - across.T @ solved[:, outputs:]


def spectrum(mean, covariance, y_test):
    """The mean squared error of a draw is Σᵢ λᵢ χ²(k, δᵢ): (λ [tests], δ [tests], k outputs)."""
    n, outputs = y_test.shape
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    values = np.maximum(values, 1e-9) / (n * outputs)
    aside = ((vectors.T @ (mean - y_test)) ** 2).sum(1) / (n * outputs)
    return values, aside / values, outputs


def draw_losses(values, aside, outputs: int, n: int, seed: int) -> np.ndarray:
    """``n`` test losses of random draws."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.noncentral_chisquare(outputs, aside) @ values for _ in range(n)])


def exact_bits(target: float, values, aside, outputs: int) -> float:
    """Bits of Σᵢ λᵢ χ²(k, δᵢ) ≤ target by the saddlepoint approximation (Lugannani and Rice), whose
    relative error stays small far in the tail. ``target`` lies below the mean."""

    def cumulants(t):
        root = 1 - 2 * values * t
        k0 = (-0.5 * outputs * np.log(root) + aside * values * t / root).sum()
        k1 = (outputs * values / root + aside * values / root**2).sum()
        k2 = (2 * outputs * values**2 / root**2 + 4 * aside * values**2 / root**3).sum()
        return k0, k1, k2

    low = -1.0
    while cumulants(low)[1] > target:
        low *= 4
    t = optimize.brentq(lambda t: cumulants(t)[1] - target, low, 0, xtol=1e-12 * -low)
    k0, _, k2 = cumulants(t)
    w, u = -np.sqrt(2 * (t * target - k0)), t * np.sqrt(k2)
    mills = np.sqrt(np.pi / 2) * special.erfcx(-w / np.sqrt(2))
    log_chance = stats.norm.logpdf(w) + np.log(mills + 1 / w - 1 / u)
    return float(-log_chance / np.log(2))


DIMENSIONS = (2, 4, 6, 8, 12, 16)
EPSILON = 0.05  # of the variance of the labels


def dimension(seed: int, d: int, n: int = 100, n_test: int = 200) -> dict:
    """A teacher network over d inputs in [−1, 1], its outputs with variance 1, and a Gaussian
    process whose length grows with the distances: bits to reach a twentieth of the variance."""
    rng = np.random.default_rng(100 * seed + d)
    x = rng.uniform(-1, 1, (n + n_test, d))
    hidden = np.tanh(x @ (rng.standard_normal((d, 16)) * 2 / np.sqrt(d)) + rng.standard_normal(16))
    y = hidden @ rng.standard_normal(16)
    y = ((y - y.mean()) / y.std())[:, None]
    mean, covariance = posterior("rbf", x[:n], y[:n], x[n:], 0.5 * np.sqrt(d))
    known = spectrum(mean, covariance, y[n:])
    losses = draw_losses(*known, 3000, seed)
    if losses.mean() <= EPSILON:  # most draws are good: count
        exact = -np.log2((losses <= EPSILON).mean())
    else:
        exact = exact_bits(EPSILON, *known)
    found = {str(k): [estimate(losses[i * k :][:k], EPSILON) for i in range(5)] for k in (30, 100)}
    found |= {"300": [estimate(losses[i * 300 :][:300], EPSILON) for i in range(5)]}
    found |= {"1000": [estimate(losses[i * 1000 :][:1000], EPSILON) for i in range(3)]}
    return dict(
        seed=seed, d=d, exact=round(float(exact), 4), loss=round(float(losses.mean()), 5)
    ) | {"estimates": {k: np.round(v, 3).tolist() for k, v in found.items()}}


# --- digits and garments ------------------------------------------------------------------------


def task(name: str, seed: int, n: int = 300):
    """``n`` training and ``n`` test images [n, 1, 28, 28] and one-hot labels, drawn by ``seed``."""
    x, y, x_test, y_test = vision.images(name)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randperm(len(x), generator=g)[:n], torch.randperm(len(x_test), generator=g)[:n]
    one_hot = [F.one_hot(t, 10).float() for t in (y[a], y_test[b])]
    return x[a], one_hot[0], x_test[b], one_hot[1]


def gp_bits(name: str, seed: int, kind: str, side: int, target: float) -> dict:
    """Bits a Gaussian process needs on a task whose images are averaged down to side × side; the
    length is the median distance of the training images."""
    x, y, x_test, y_test = task(name, seed)
    x, x_test = (F.adaptive_avg_pool2d(z, side).flatten(1).double().numpy() for z in (x, x_test))
    y, y_test = y.double().numpy() - 0.1, y_test.double().numpy() - 0.1
    length = float(torch.pdist(torch.tensor(x)).median())
    known = spectrum(*posterior(kind, x, y, x_test, length), y_test)
    losses = draw_losses(*known, 1000, seed)
    return dict(task=name, seed=seed, kind=kind, side=side, loss=round(float(losses.mean()), 5)) | {
        "exact": round(exact_bits(target, *known), 2),
        "bits": round(estimate(losses, target), 2),
    }


def network(kind: str, seed: int) -> nn.Module:
    """``"shallow"`` and ``"deep"``: one or three hidden layers of 128; ``"conv"``: two convolutions
    of stride 2."""
    torch.manual_seed(seed)
    if kind == "conv":
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU()]
    if kind == "deep":
        layers += [nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def mse(model, x, y):
    return F.mse_loss(model(x), y)


def net_losses(name: str, seed: int, kind: str, n: int = 8, epochs: int = 40) -> dict:
    """Test losses of ``n`` networks from random weights, each trained on all of the task."""
    x, y, x_test, y_test = task(name, seed)
    losses, trained = [], []
    for k in range(n):
        model = network(kind, 1000 * seed + k)
        vision.train(model, x, y, epochs=epochs, batch=50, rate=2e-3, seed=k, loss=mse)
        with torch.no_grad():
            losses.append(round(float(mse(model, x_test, y_test)), 6))
            trained.append(float(mse(model, x, y)))
    return dict(task=name, seed=seed, kind=kind, losses=losses, trained=round(max(trained), 6))


def reference(name: str) -> float:
    """The target: test loss of a conv network trained on all 10,000 images."""
    x, y, x_test, y_test = vision.images(name)
    model = network("conv", 0)
    vision.train(model, x, F.one_hot(y, 10).float(), epochs=4, batch=50, rate=2e-3, loss=mse)
    with torch.no_grad():
        return float(F.mse_loss(vision.logits(model, x_test), F.one_hot(y_test, 10).float()))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "inductive")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    def kept(name, job):
        state = args.scratch / name
        start = time.time()
        if not state.exists():
            checkpoint.save(state, {"json": json.dumps(job())})
            print(f"{name}: {time.time() - start:.1f} s", flush=True)
        return json.loads(checkpoint.load(state)["json"])

    seeds, names = args.seeds, ("mnist", "fashion_mnist")
    result = dict(
        enumerated=[kept(f"enumerated_{s}", lambda s=s: enumerated(s)) for s in (*seeds, 3, 4)],
        dimension=[
            kept(f"dimension_{s}_{d}", lambda s=s, d=d: dimension(s, d))
            for s in (*seeds, 3, 4)
            for d in DIMENSIONS
        ],
        target={
            name: round(kept(f"target_{name}", lambda n=name: reference(n)), 6) for name in names
        },
    )
    result["gp"] = [
        kept(
            f"gp_{name}_{s}_{kind}_{side}",
            lambda a=(name, s, kind, side): gp_bits(*a, result["target"][a[0]]),
        )
        for name in names
        for s in seeds
        for kind, side in (("rbf", 7), ("rbf", 14), ("rbf", 28), ("laplace", 28))
    ]
    result["nets"] = [
        kept(f"net_{name}_{s}_{kind}", lambda a=(name, s, kind): net_losses(*a))
        for name in names
        for s in seeds
        for kind in ("shallow", "deep", "conv")
    ]
    path = HERE / "inductive_bias_rows.json"
    path.write_text(json.dumps(result) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
