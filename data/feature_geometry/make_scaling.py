"""Train the toy model of Liu et al. 2025 at five widths, with weak and with strong superposition.

x_i is active with probability p_i ~ i^(-alpha) (one active feature on average) and then uniform
in [0, 2]; the model is relu(W Wt x + b). Weight decay of +1 keeps rows of W small (weak
superposition), -1 pushes the norm of every row towards 1 (strong). Authors' optimiser, learning
rate, schedule and decay rule; smaller here: 256 features (1,000), 2,000 steps (20,000), batches
of 512 (2,048).
Three seeds of a condition train side by side in one batched model.

    python data/feature_geometry/make_scaling.py     # about 8 minutes on one core; resumes
writes scaling.json beside this file.
"""

import itertools
import json
import math
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
N, WIDTHS, ALPHAS, DECAYS, SEEDS = 256, (6, 10, 17, 30, 52), (1.0, 1.4, 1.8), (1.0, -1.0), 3


def frequencies(alpha, n=N):
    """Probability of each feature; they sum to 1."""
    p = torch.arange(1, n + 1).double() ** -alpha
    return (p / p.sum()).float()


def sample(p, shape, generator):
    """Sparse inputs [*shape, n]."""
    shape = (*shape, len(p))
    on = torch.rand(shape, generator=generator) < p
    return on * torch.rand(shape, generator=generator) * 2


def forward(W, b, x):
    """Reconstructions [runs, batch, n] by models W [runs, n, m], b [runs, 1, n]."""
    return torch.relu((x @ W) @ W.transpose(1, 2) + b)


def rate(step, steps, top=1e-2, warm=0.1):
    if step < warm * steps:
        return top * (step + 1) / (warm * steps)
    part = (step - warm * steps) / ((1 - warm) * steps)
    return top * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * part)))


def decay(W, strength, lr):
    """Plain decay where `strength` is positive; where negative, rows grow or shrink to norm 1."""
    if strength >= 0:
        W.mul_(1 - strength * lr)
    else:
        W.add_(lr * strength * W * (1 - 1 / (W.norm(dim=-1, keepdim=True) + 1e-8)))


def train(m, alpha, strength, seeds=SEEDS, steps=2000, batch=512, n=N):
    """Returns W [seeds, n, m], b, and the final loss of each seed, summed over features."""
    g = torch.Generator().manual_seed(1000 * m + int(10 * alpha) + (strength > 0))
    p = frequencies(alpha, n)
    W = (torch.randn(seeds, n, m, generator=g) / math.sqrt(m)).requires_grad_()
    b = torch.randn(seeds, 1, n, generator=g).requires_grad_()
    optimiser = torch.optim.Adam([W, b])
    for step in range(steps):
        lr = rate(step, steps)
        optimiser.param_groups[0]["lr"] = lr
        x = sample(p, (1, batch), g)
        loss = (forward(W, b, x) - x).pow(2).mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            decay(W, strength, lr)
        optimiser.step()
    with torch.no_grad():
        W, b = W.detach(), b.detach()
        parts = [
            (forward(W, b, x) - x).pow(2).sum(-1).mean(1)
            for x in (sample(p, (1, 4096), g) for _ in range(16))
        ]
    return W, b, torch.stack(parts).mean(0)


def measure(alpha, strength, m):
    """Losses, represented features and mean squared overlap of three models: a record of lists."""
    W, _, loss = train(m, alpha, strength)
    unit = torch.nn.functional.normalize(W, dim=-1)
    overlap = ((unit @ unit.transpose(1, 2)).pow(2).sum((1, 2)) - N) / (N * (N - 1))
    here = dict(loss=loss, represented=(W.norm(dim=-1) > 0.5).float().sum(1), overlap=overlap)
    return dict(alpha=alpha, decay=strength, m=m) | {k: v.tolist() for k, v in here.items()}


def main():
    torch.set_num_threads(1)
    path = HERE / "scaling.json"
    records = json.loads(path.read_text()) if path.exists() else []
    done = {(r["alpha"], r["decay"], r["m"]) for r in records}
    for job in itertools.product(ALPHAS, DECAYS, WIDTHS):
        if job not in done:
            records.append(measure(*job))
            print(records[-1], flush=True)
            path.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
