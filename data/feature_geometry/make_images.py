"""Small generators of garments, and an archetypal autoencoder that compares them with real ones.

Variational autoencoders (MLP, 16 latent variables) learn Fashion-MNIST: three seeds on all classes,
and three on all classes but one, a known blind spot (trousers, bags, ankle boots). Every generator
draws 1,000 garments. EfficientNet-Lite0 reads real and drawn garments (block 10 at 112 x 112
pixels: 7 x 7 places of 112 channels). A relaxed archetypal autoencoder (RA-SAE, TopK) is trained on
real garments alone: every dictionary row is a convex mixture of 400 centroids of the features plus
a deviation of bounded length.

    python data/feature_geometry/make_images.py     # about 8 minutes on one core; resumes
writes images.safetensors (autoencoder, two generators, prevalences) beside this file.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from lib import checkpoint, datasets, hooks, models  # noqa: E402

WORK = Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "feature_geometry"))
CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
MISSING = (1, 8, 9)
GENERATORS = {f"all, seed {s}": (s, None) for s in range(3)} | {
    f"no {CLASSES[c]}": (3 + i, c) for i, c in enumerate(MISSING)
}
SITE, CONCEPTS, CENTROIDS, K, DELTA, HIDDEN, Z = "block.10", 256, 400, 6, 0.3, 256, 16


class Generator(nn.Module):
    """A variational autoencoder of 28 x 28 images."""

    def __init__(self):
        super().__init__()
        self.read = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * Z))
        self.draw = nn.Sequential(
            nn.Linear(Z, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 784),
        )  # fmt: skip

    def forward(self, x):
        mean, log_var = self.read(x).chunk(2, 1)
        return self.draw(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var


def train_generator(seed, missing=None, epochs=60, batch=128):
    """Train on the 10,000 garments (without class `missing`)."""
    torch.manual_seed(seed)
    data = datasets.fashion_mnist()
    x = torch.tensor(data["x_train"]).flatten(1).float() / 255
    if missing is not None:
        x = x[torch.tensor(data["y_train"]) != missing]
    net = Generator()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            logits, mean, log_var = net(x[rows])
            miss = F.binary_cross_entropy_with_logits(logits, x[rows], reduction="sum")
            spread = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum()
            optimiser.zero_grad()
            ((miss + spread) / len(rows)).backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


def drawn(draw, n, seed):
    """n garments in [0, 1] from a generator's `draw`: [n, 28, 28]."""
    z = torch.randn(n, Z, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(draw(z)).view(n, 28, 28)


def features(net, images, size=112):
    """EfficientNet's features of images [n, 28, 28] in [0, 1]: [n, places, channels]."""
    found = []
    for part in images.split(50):
        x = F.interpolate(part[:, None], size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        acts = hooks.read(net, (x * 255 - 127) / 128, SITE)[SITE]
        found.append(acts.flatten(2).transpose(1, 2))
    return torch.cat(found)


def dictionary(w):
    """Rows of the RA-SAE: convex mixtures of centroids plus a bounded deviation, unit length."""
    relax = w["relax"]
    relax = relax * DELTA / relax.norm(dim=1, keepdim=True).clamp_min(DELTA)
    return F.normalize(w["mix"].softmax(1) @ w["centroids"] + relax, dim=1)


def codes(w, x, D=None, k=K):
    """Concepts of x [n, channels]: at most k positive ones a place, [n, concepts]."""
    x = (x - w["mean"]) / w["scale"]
    scores = torch.relu(x @ w["W_enc"].T + w["b_enc"])
    top, index = scores.topk(k, dim=1)
    return torch.zeros_like(scores).scatter(1, index, top)


def train_dictionary(x, seed=0, epochs=6, batch=1024):
    """An archetypal autoencoder on x [n, channels]; returns its weights."""
    from sklearn.cluster import MiniBatchKMeans

    g = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    scale = (x - mean).pow(2).sum(1).mean().sqrt()
    normed = (x - mean) / scale
    means = MiniBatchKMeans(CENTROIDS, random_state=seed, batch_size=4096, n_init=1)
    centroids = torch.tensor(means.fit(normed.numpy()).cluster_centers_).float()
    start = torch.full((CONCEPTS, CENTROIDS), -2.0)
    start[torch.arange(CONCEPTS), torch.randperm(CENTROIDS, generator=g)[:CONCEPTS]] = 6.0
    fixed = {"mean": mean, "scale": scale, "centroids": centroids}
    w = {"mix": start, "relax": torch.zeros(CONCEPTS, x.shape[1]), "b_enc": torch.zeros(CONCEPTS)}
    w["W_enc"] = dictionary(w | fixed).clone()
    w = {n: v.requires_grad_() for n, v in w.items()}
    optimiser = torch.optim.Adam(w.values(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(batch):
            z = codes(w | fixed, x[rows])
            back = z @ dictionary(w | fixed)
            loss = (back - normed[rows]).pow(2).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    w = {n: v.detach() for n, v in w.items()} | fixed
    return w | {"D": dictionary(w)}


def prevalence(w, x):
    """Mean activation of every concept over images x [n, places, channels]: [concepts]."""
    return codes(w, x.flatten(0, 1)).mean(0)


@torch.inference_mode()
def capture():
    net, _ = models.load("efficientnet-lite0")
    data = datasets.fashion_mnist()
    x = torch.tensor(data["x_train"]).float() / 255
    for name, images in (("fit", x[:3000]), ("real", x[3000:5000])):
        checkpoint.save(WORK / f"images.{name}.safetensors", features(net, images).half())
    for name, (seed, missing) in GENERATORS.items():
        path = WORK / f"generator.{seed}.safetensors"
        if not path.exists():
            with torch.inference_mode(False):
                checkpoint.save(path, train_generator(seed, missing).state_dict())
        made = Generator()
        made.load_state_dict(checkpoint.load(path))
        images = drawn(made.draw, 1000, seed)
        checkpoint.save(WORK / f"images.{seed}.safetensors", features(net, images).half())
        print(name, flush=True)


def main():
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / f"images.{len(GENERATORS) - 1}.safetensors").exists():
        capture()
    load = lambda name: checkpoint.load(WORK / f"images.{name}.safetensors").float()  # noqa: E731
    fit, real = load("fit"), load("real")
    data = datasets.fashion_mnist()
    label = torch.tensor(data["y_train"][3000:5000])
    kept = {}
    for seed in range(3):
        w = train_dictionary(fit.flatten(0, 1), seed)
        x = real.flatten(0, 1)
        back = codes(w, x) @ w["D"] * w["scale"] + w["mean"]
        share = 1 - (back - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        far = (w["D"] - F.normalize(w["mix"].softmax(1) @ w["centroids"], dim=1)).norm(dim=1)
        print("dictionary", seed, f"explains {share:.3f}, off hull {far.mean():.2f}", flush=True)
        one = codes(w, x).view(len(real), -1, CONCEPTS).mean(1)
        rows = {f"real {c}": one[label == c].mean(0) for c in range(10)}
        rows |= {"real a": one[:1000].mean(0), "real b": one[1000:].mean(0)}
        rows |= {name: prevalence(w, load(s)) for name, (s, _) in GENERATORS.items()}
        kept |= {f"prevalence.{seed}.{name}": v for name, v in rows.items()}
        kept[f"explained.{seed}"] = share
        if seed == 0:
            kept |= {f"sae.{n}": w[n] for n in ("D", "W_enc", "b_enc", "mean", "scale")}
    for seed in (0, 4):
        state = checkpoint.load(WORK / f"generator.{seed}.safetensors")
        kept |= {f"generator.{seed}.{n}": v for n, v in state.items() if n.startswith("draw")}
    half = {n: v if "prevalence" in n else v.half() for n, v in kept.items()}
    save_file({n: v.contiguous() for n, v in half.items()}, HERE / "images.safetensors")


if __name__ == "__main__":
    main()
