"""Capture activations of SmolLM2 on Moby Dick, one file a piece, for training dictionaries.

The book is cut into passages of 128 tokens; every tenth is held out. Written for every piece of
passages: each site in float16 [passage, pos, d], ``ids``, and with --gradients the gradient of the
summed next-token loss with respect to the first site, in float16 times 64.

    python data/dictionaries/make_activations.py --sites resid_post.15 --gradients --out FOLDER

Forty minutes on one core for the whole book with gradients, half of it without. A piece that
exists is kept, so an interrupted run goes on where it stopped. The files stay outside the
repository: 170 MB for 150,000 tokens of one site.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from lib import datasets, hooks, models  # noqa: E402

LENGTH, PIECE, BATCH = 128, 64, 4
HELD_OUT = 10  # one passage in this many is held out
GRADIENT_SCALE = 64.0


def passages(tokenizer) -> torch.Tensor:
    """The whole book as passages of LENGTH tokens: ids [n, LENGTH]."""
    ids = tokenizer(datasets.moby_dick(), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def order(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Passages for training, and held-out ones, each in an order that samples the whole book."""
    held = torch.arange(n) % HELD_OUT == HELD_OUT - 1
    mix = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return mix[~held[mix]], mix[held[mix]]


def capture(model, ids, sites, gradients=False) -> dict[str, torch.Tensor]:
    """Float16 activations of ``sites`` on ids [passage, pos], with or without the gradient."""
    parts = []
    for part in ids.split(BATCH):
        if not gradients:
            acts = hooks.read(model, part.to(model.device), sites)
            parts.append({site: acts[site].half().cpu() for site in sites})
            continue
        with (
            torch.enable_grad(),
            hooks.capture(model, sites[1:] or sites) as rest,
            hooks.capture(model, sites[0], detach=False) as acts,
        ):
            loss = loss_of(model(part.to(model.device)).logits, part.to(model.device)).sum()
        grad = torch.autograd.grad(loss, acts[sites[0]])[0]
        kept = {site: rest[site] for site in sites[1:]} | {sites[0]: acts[sites[0]].detach()}
        parts.append({site: x.half().cpu() for site, x in kept.items()})
        parts[-1]["gradient"] = (grad * GRADIENT_SCALE).half().cpu()
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def loss_of(logits, ids) -> torch.Tensor:
    """Next-token loss at every position but the last: [batch, pos - 1], in nats."""
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(ids), -1)


def load(folder, site: str, split: str = "train", tokens: int | None = None) -> torch.Tensor:
    """A captured site as float32 [token, d], each passage's first position left out.

    The first position holds a massive activation (chapter sinks) that no dictionary should learn.
    """
    found = []
    for path in sorted(Path(folder).glob(f"{split}-*.safetensors")):
        x = load_file(path)[site][:, 1:].flatten(0, 1).float()
        found.append(x / GRADIENT_SCALE if site == "gradient" else x)
        if tokens and sum(map(len, found)) >= tokens:
            break
    if not found:
        raise SystemExit(f"no {split} pieces in {folder}: run make_activations.py first")
    return torch.cat(found)[:tokens]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", nargs="+", default=["resid_post.15", "resid_post.12"])
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--train", type=int, default=1200, help="passages of 128 tokens")
    parser.add_argument("--held", type=int, default=128, help="passages of 128 tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    model, tokenizer = models.load("smollm2")
    texts = passages(tokenizer)
    for split, rows, wanted in zip(
        ("held", "train"), reversed(order(len(texts))), (args.held, args.train), strict=True
    ):
        for piece, at in enumerate(rows[:wanted].split(PIECE)):
            path = args.out / f"{split}-{piece:03d}.safetensors"
            if path.exists():
                continue
            if time.monotonic() - began > 60 * args.minutes:
                return
            kept = capture(model, texts[at], args.sites, args.gradients)
            part = path.with_suffix(".part")
            save_file(kept | {"ids": texts[at].to(torch.int32)}, part)
            part.rename(path)
            print(path.name, f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
