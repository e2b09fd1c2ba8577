"""Count effective features (Bereska et al. 2025) in four kinds of small trained networks.

1. Toy models of superposition: 60 features in 12 neurons, five sparsities, 3 seeds; ground truth.
2. Dropout: multi-task sparse parity (3 tasks of 4 bits), MLP of 32 or 128, six rates, 3 seeds.
3. Grokking: addition modulo 53, the authors' MLP (embedding 12, hidden 48), 3 seeds.
4. Adversarial training on MNIST: digits 0 and 1 in an MLP of 128, all ten in one of 16; four
   budgets, 3 seeds.
Every network's hidden layer is read by a tied ReLU autoencoder with four (toy: eight) latents a
neuron; activations are scaled to unit mean square first, so that one L1 weight suits all. All
networks of a condition train side by side in one batched model.

    python data/feature_geometry/make_lossy.py     # about 5 minutes on one core; resumes
writes lossy.json, and lossy_toy.safetensors (the toy models and their autoencoders, float16).
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from lib import datasets  # noqa: E402

L1 = 0.1


def effective(codes):
    """exp of the entropy of the latents' shares of codes [..., samples, latents]: [...]."""
    mass = codes.abs().sum(-2)
    p = mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum(-1))


def adam(weights, lr, **more):
    return torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=lr, **more)


def detach(weights):
    return {k: v.detach() for k, v in weights.items()}


def encode(sae, h):
    """Codes [runs, samples, latents] of activations h [runs, samples, n]."""
    h = h / sae["scale"][:, None, None] - sae["b_dec"][:, None]
    return torch.relu(h @ sae["W"].transpose(1, 2) + sae["b_enc"][:, None])


def autoencoder(h, expansion=4, steps=1000, batch=128, lr=2e-3, l1=L1, seed=0, from_data=False):
    """Tied autoencoders on h [runs, samples, n], one a run: x ~ relu(W(x - b) + c) W + b.

    The loss is the squared error plus `l1` x the latents' sum, both averaged over neurons. Rows
    start at random, or (`from_data`) at samples: where most inputs are empty, others soon die.
    Returns weights (stacked over runs), the effective features and explained variance of each.
    """
    runs, samples, n = h.shape
    g = torch.Generator().manual_seed(seed)
    scale = h.pow(2).mean((1, 2)).sqrt().clamp_min(1e-6)
    x = h / scale[:, None, None]
    m = expansion * n
    rows = F.normalize(torch.randn(runs, m, n, generator=g), dim=-1)
    if from_data:
        filled = torch.multinomial(x.norm(dim=2), m, generator=g)  # the larger, the likelier
        picked = x.gather(1, filled[..., None].expand(-1, -1, n))
        rows = F.normalize(picked / picked.norm(dim=-1, keepdim=True) + 0.1 * rows, dim=-1)
    w = {"W": rows, "b_enc": torch.zeros(runs, m), "b_dec": x.mean(1).clone()}
    optimiser = adam(w, lr)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, 3 * (1 - step / steps))
        part = x[:, torch.randint(samples, (batch,), generator=g)]
        z = torch.relu((part - w["b_dec"][:, None]) @ w["W"].transpose(1, 2) + w["b_enc"][:, None])
        error = z @ w["W"] + w["b_dec"][:, None] - part
        loss = (error.pow(2).sum(-1) + l1 * z.sum(-1)).mean(1).sum() / n
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            w["W"] /= w["W"].norm(dim=-1, keepdim=True)
    w = detach(w) | {"scale": scale}
    with torch.no_grad():
        z = encode(w, h)
        error = z @ w["W"] + w["b_dec"][:, None] - x
        centred = x - x.mean(1, keepdim=True)
        kept = 1 - error.pow(2).sum((1, 2)) / centred.pow(2).sum((1, 2)).clamp_min(1e-9)
    return w, effective(z), kept


def sparsest(h, weights=(0.1, 0.5, 2.0, 6.0), least=0.9, **settings):
    """For every run the autoencoder with the largest L1 weight that explains `least` of h.

    One weight does not suit inputs of all sparsities: rare inputs are large when they come.
    """
    best = None
    for l1 in weights:
        w, count, kept = autoencoder(h, l1=l1, **settings)
        if best is None:
            best = w, count, kept
        good = kept >= least
        for old, new in zip(
            (*best[0].values(), *best[1:]), (*w.values(), count, kept), strict=True
        ):
            old[good] = new[good]
    return best


# --- 1. toy models of superposition --------------------------------------------------------------

TOY = dict(features=60, neurons=12, active=(1.0, 0.3, 0.1, 0.04, 0.01))


def toy_sample(active, samples, generator, features=60):
    """Sparse features in [0, 1], active with the run's probability: [runs, samples, features]."""
    shape = (len(active), samples, features)
    on = torch.rand(shape, generator=generator) < active[:, None, None]
    return on * torch.rand(shape, generator=generator)


def toy(seeds=3, steps=4000):
    """Toy models relu(W Wt x + b) (Elhage et al. 2022), importance falling as 0.9^i."""
    n, m = TOY["neurons"], TOY["features"]
    active = torch.tensor(TOY["active"]).repeat_interleave(seeds)
    g = torch.Generator().manual_seed(0)
    w = {"W": torch.randn(len(active), m, n, generator=g) * n**-0.5 * 0.5}
    w["b"] = torch.zeros(len(active), 1, m)
    importance = 0.9 ** torch.arange(m)
    optimiser = adam(w, 3e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        x = toy_sample(active, 256, g)
        y = torch.relu((x @ w["W"]) @ w["W"].transpose(1, 2) + w["b"])
        # Each run's loss is divided by its sparsity, so that all learn at one pace.
        loss = (importance * (y - x).pow(2)).mean((1, 2)) / active
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    w = detach(w)
    h = toy_sample(active, 4096, g) @ w["W"]
    sae, count, kept = sparsest(h, expansion=8, steps=2000, batch=256, lr=1e-2, from_data=True)
    truth = w["W"].pow(2).sum((1, 2))
    shape = (-1, seeds)
    record = dict(active=TOY["active"], truth=truth.view(shape).tolist())
    record |= dict(count=count.view(shape).tolist(), explained=kept.view(shape).tolist())
    return record, {f"toy.{k}": v for k, v in w.items()} | {f"sae.{k}": v for k, v in sae.items()}


# --- 2. dropout ----------------------------------------------------------------------------------

RATES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)


def parity(samples, generator, tasks=3, bits=4):
    """Task as a one-hot, all tasks' bits, and the parity of the named task's bits."""
    task = torch.randint(tasks, (samples,), generator=generator)
    values = torch.randint(2, (samples, tasks, bits), generator=generator)
    target = values[torch.arange(samples), task].sum(1) % 2
    return torch.cat([F.one_hot(task, tasks), values.flatten(1)], 1).float(), target.float()


def dropout(width, seeds=3, steps=4000):
    rate = torch.tensor(RATES).repeat_interleave(seeds)[:, None, None]
    runs = len(rate)
    g = torch.Generator().manual_seed(1)
    w = {"in": torch.randn(runs, 15, width, generator=g) * 15**-0.5}
    w |= {"bias": torch.zeros(runs, 1, width), "end": torch.zeros(runs, 1, 1)}
    w |= {"out": torch.randn(runs, width, 1, generator=g) * width**-0.5}
    optimiser = adam(w, 3e-3)
    x_test, y_test = parity(2000, g)
    for _ in range(steps):
        x, y = parity(64, g)
        h = x @ w["in"] + w["bias"]
        h = h * (torch.rand(h.shape, generator=g) >= rate) / (1 - rate)
        logits = (torch.relu(h) @ w["out"] + w["end"])[..., 0]
        loss = F.binary_cross_entropy_with_logits(logits, y.expand(runs, -1), reduction="none")
        optimiser.zero_grad()
        loss.mean(1).sum().backward()
        optimiser.step()
    w = detach(w)
    h = torch.relu(x_test @ w["in"] + w["bias"])
    right = (((h @ w["out"] + w["end"])[..., 0] > 0) == y_test.bool()).float().mean(1)
    _, count, kept = autoencoder(h)
    shape = (-1, seeds)
    record = dict(rate=RATES, width=width, count=count.view(shape).tolist())
    record |= dict(accuracy=right.view(shape).tolist(), explained=kept.view(shape).tolist())
    return record


# --- 3. grokking ---------------------------------------------------------------------------------


def grokking(seeds=3, steps=20000, every=1000, p=53, embed=12, width=48):
    g = torch.Generator().manual_seed(2)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    order = torch.stack([torch.randperm(len(pairs), generator=g) for _ in range(seeds)])
    pairs = pairs[order]  # [seeds, p², 2]
    target = pairs.sum(-1) % p
    cut = int(0.4 * p * p)
    w = {"embed": torch.randn(seeds, p, embed, generator=g)}
    for side in "lr":
        w[side] = (torch.rand(seeds, embed, width, generator=g) * 2 - 1) * embed**-0.5
        w[side + "b"] = (torch.rand(seeds, 1, width, generator=g) * 2 - 1) * embed**-0.5
    w["out"] = (torch.rand(seeds, width, p, generator=g) * 2 - 1) * width**-0.5
    optimiser = adam(w, 0.005, weight_decay=2e-4)
    rows = torch.arange(seeds)[:, None]

    def hidden(x):
        left, right = w["embed"][rows, x[..., 0]], w["embed"][rows, x[..., 1]]
        return F.gelu(left @ w["l"] + w["lb"] + right @ w["r"] + w["rb"])

    steps_seen, train, test, kept = [], [], [], []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                h = hidden(pairs)
                right = ((h @ w["out"]).argmax(-1) == target).float()
                kept.append(h[:, :cut].clone())
                train.append(right[:, :cut].mean(1).tolist())
                test.append(right[:, cut:].mean(1).tolist())
                steps_seen.append(step)
        part = torch.randint(cut, (seeds, 128), generator=g)
        logits = hidden(pairs[rows, part]) @ w["out"]
        loss = F.cross_entropy(logits.flatten(0, 1), target[rows, part].flatten()) * seeds
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _, count, _ = autoencoder(torch.cat(kept))
    count = count.view(len(kept), seeds).tolist()
    return dict(step=steps_seen, train=train, test=test, count=count)


# --- 4. adversarial training ---------------------------------------------------------------------

BUDGETS = (0.0, 0.1, 0.2, 0.3)


def adversarial(classes, width, seeds=3, steps=800, pgd_steps=3):
    data = datasets.mnist()
    keep = {s: data[f"y_{s}"] < classes for s in ("train", "test")}
    x_train, x_test = (
        torch.tensor(data[f"x_{s}"][keep[s]]).flatten(1).float() / 255 for s in ("train", "test")
    )
    y_train, y_test = (torch.tensor(data[f"y_{s}"][keep[s]]).long() for s in ("train", "test"))
    budget = torch.tensor(BUDGETS).repeat_interleave(seeds)[:, None, None]
    runs = len(budget)
    g = torch.Generator().manual_seed(3)
    w = {"in": torch.randn(runs, 784, width, generator=g) * 784**-0.5}
    w |= {"bias": torch.zeros(runs, 1, width), "end": torch.zeros(runs, 1, classes)}
    w |= {"out": torch.randn(runs, width, classes, generator=g) * width**-0.5}
    optimiser = adam(w, 1e-3)

    def hidden(x):
        return torch.relu((x - 0.13) @ w["in"] + w["bias"])

    def losses(x, y):
        logits = hidden(x) @ w["out"] + w["end"]
        return F.cross_entropy(logits.flatten(0, 1), y.repeat(runs), reduction="none")

    def attack(x, y, budget, n):
        start = (torch.rand((runs, *x.shape), generator=g) * 2 - 1) * budget
        moved = (x + start).clamp(0, 1)
        for _ in range(n):
            moved.requires_grad_()
            slope = torch.autograd.grad(losses(moved, y).sum(), moved)[0]
            with torch.no_grad():
                moved = moved + 2 * budget / n * slope.sign()
                moved = (x + (moved - x).clamp(-budget, budget)).clamp(0, 1)
        return moved.detach()

    for _ in range(steps):
        rows = torch.randint(len(x_train), (64,), generator=g)
        x, y = x_train[rows], y_train[rows]
        moved = attack(x, y, budget, pgd_steps)
        loss = losses(moved, y).view(runs, -1).mean(1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = x_test[:500], y_test[:500]
    strike = attack(x, y, torch.full_like(budget, 0.1), 10)
    w = detach(w)
    robust = ((hidden(strike) @ w["out"] + w["end"]).argmax(-1) == y).float().mean(1)
    clean = ((hidden(x) @ w["out"] + w["end"]).argmax(-1) == y).float().mean(1)
    _, count, _ = autoencoder(hidden(x_train[:2000]))
    shape = (-1, seeds)
    record = dict(classes=classes, width=width, budget=BUDGETS, count=count.view(shape).tolist())
    return record | dict(robust=robust.view(shape).tolist(), clean=clean.view(shape).tolist())


JOBS = {"grokking": grokking}
JOBS |= {f"dropout {n}": partial(dropout, n) for n in (32, 128)}
JOBS |= {f"adversarial {c} {n}": partial(adversarial, c, n) for c, n in ((2, 128), (10, 16))}


def main():
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    path = HERE / "lossy.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    if "toy" not in records:
        records["toy"], weights = toy()
        half = {k: v.half().contiguous() for k, v in weights.items()}
        save_file(half, HERE / "lossy_toy.safetensors")
        path.write_text(json.dumps(records) + "\n")
        print("toy", records["toy"], flush=True)
    for name, job in JOBS.items():
        if name not in records:
            records[name] = job()
            path.write_text(json.dumps(records) + "\n")
            print(name, records[name], flush=True)


if __name__ == "__main__":
    main()
