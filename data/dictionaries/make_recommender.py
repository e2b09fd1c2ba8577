"""Train the recommender of RecSAE and its dictionaries, three seeds.

    python data/dictionaries/make_recommender.py        # about 5 minutes on one core
writes recommender.safetensors (float16: three recommenders, three dictionaries) beside this file.
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from recommender import Recommender, hit_rate, shoppers  # noqa: E402

from lib import dictionaries as D  # noqa: E402

SEEDS, STEPS, M, K = 3, 1500, 128, 8


def train(seed):
    torch.manual_seed(seed)
    model = Recommender()
    data = shoppers(6000, seed=100 + seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (STEPS - step) / (0.3 * STEPS))
        part = data[torch.randint(len(data), (128,))]
        scores = model(part[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), part[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def dictionary(model, seed):
    with torch.no_grad():
        states = model.state(shoppers(6000, seed=200 + seed)).flatten(0, 1)
    return D.train(states, M, D.topk(K), steps=1500, batch=1024, seed=seed)[0]


def main(out=HERE):
    kept, began = {}, time.monotonic()
    for seed in range(SEEDS):
        model = train(seed)
        sae = dictionary(model, seed)
        test = shoppers(500, seed=300)
        h = model.state(test[:, :-1])
        back = D.reconstruct(sae, h, D.topk(K))
        hits = [hit_rate(s @ model.items.weight.T, test[:, 1:]) for s in (h, back)]
        print(seed, "HR@10", hits, "EV", D.explained_variance(h.flatten(0, 1), back.flatten(0, 1)),
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        kept |= {f"{seed}/model.{k}": v.half().contiguous() for k, v in model.state_dict().items()}
        kept |= {f"{seed}/sae.{k}": v.half().contiguous() for k, v in sae.items()}
    save_file(kept, Path(out) / "recommender.safetensors")


if __name__ == "__main__":
    main()
