"""What the makers of this folder share: a training loop that may be stopped at any time.

A maker's state is one file in its scratch folder, replaced every two minutes: weights, their
running mean (what is shipped), the optimiser, steps and minutes so far. Batches are drawn by the
number of the step, so that a run that was cut goes on as if it had not been, from its last file.
Minutes are those that the process computed, not those on the wall: a stopped process spends none.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib import checkpoint  # noqa: E402

SAVE_SECONDS, LOG_SECONDS = 100, 30
MUON = 5.0  # times the rate of AdamW, whose steps, though bounded by the same, are longer at first


def arguments(name: str, minutes: float, doc: str, **more: int) -> argparse.Namespace:
    """What every maker takes, and its own numbers with their defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help=f"to train from here on; {minutes}")
    parser.add_argument("--decay", type=float, default=0, help="minutes of falling rate, at last")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / name)
    parser.add_argument("--ship", action="store_true", help="write the weights beside this file")
    parser.add_argument("--look", type=int, default=0, help="sample so many pictures and score")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    for option, default in more.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    if args.minutes is None:
        args.minutes = 0.0 if args.ship or args.look or args.decay else minutes
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # branches that begin at zero are slow otherwise
    args.scratch.mkdir(parents=True, exist_ok=True)
    return args


def compiled(function, args: argparse.Namespace):
    """``torch.compile`` where a C++ compiler is found: a sixth to two fifths faster here, after
    some minutes. A process that is killed while it compiles leaves torn files, so that a cache
    which no run has yet trained with is thrown away."""
    if not args.compile or not shutil.which("g++"):
        return function
    cache = args.scratch / "compiled"
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(cache):
        if not (cache / "whole").exists():
            shutil.rmtree(cache, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return torch.compile(function, dynamic=False)


class Trainer:
    """A model, its running mean, its optimiser, and where they are kept.

    The rate warms up and stays; a last phase, ``decay``, lets it fall to zero from wherever the
    constant phase has come, in a file of its own, so that either can go on.
    """

    def __init__(self, model, args, lr, ema=0.999, warmup=400, betas=(0.9, 0.99), decay=0.01,
                 muon=False):  # fmt: skip
        self.model, self.lr, self.rate, self.warmup = model, lr, ema, warmup
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        kinds: dict[int, list] = {1: [], 2: [], 4: []}
        for p in model.parameters():
            kinds[2 if muon and p.ndim == 2 else 1 if p.ndim < 2 else 4].append(p)
        groups = [
            dict(params=kinds[4], weight_decay=decay),
            dict(params=kinds[1], weight_decay=0.0),
        ]
        self.optimisers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
        if kinds[2]:  # matrices; its steps are made as long as AdamW's
            self.optimisers.append(
                torch.optim.Muon(
                    kinds[2], lr=MUON * lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.step, self.seen, self.minutes, self.losses = 0, 0, 0.0, []
        self.decay = args.decay
        self.falling = 0.0  # minutes of the decay phase so far
        self.path = args.scratch / "state.safetensors"
        start = self.path
        if self.decay:
            self.path = args.scratch / "decayed.safetensors"
            start = self.path if self.path.exists() else start
        if start.exists():
            self._read(checkpoint.load(start))
        self.threads = args.threads
        self.until = self.minutes + (self.decay - self.falling if self.decay else args.minutes)

    def _read(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        for key in ("step", "seen", "minutes", "falling", "losses"):
            setattr(self, key, state[key])

    def save(self) -> None:
        checkpoint.save(self.path, {
            "model": self.model.state_dict(), "ema": self.ema, "step": self.step,
            "optimisers": [o.state_dict() for o in self.optimisers], "seen": self.seen,
            "minutes": self.minutes, "falling": self.falling, "losses": self.losses[-5000:],
        })  # fmt: skip

    def run(self, loss_of) -> None:
        """Train until the minutes are spent; ``loss_of(step) -> (loss, images)``."""
        self.model.train()
        saved = said = time.monotonic()
        busy = began = time.process_time()
        first, at, recent = self.step, self.seen, []
        while self.minutes < self.until:
            fall = 1 - self.falling / self.decay if self.decay else 1.0
            for group in (g for o in self.optimisers for g in o.param_groups):
                group["lr"] = (
                    (MUON if "momentum" in group else 1)
                    * self.lr
                    * min(1.0, (self.step + 1) / self.warmup)
                    * max(fall, 0.01)
                )
            loss, images = loss_of(self.step)
            for optimiser in self.optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if math.isfinite(float(norm)):
                for optimiser in self.optimisers:
                    optimiser.step()
            self.step, self.seen = self.step + 1, self.seen + images
            keep = min(self.rate, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    self.ema[name].lerp_(value, 1 - keep)
            recent.append(float(loss.detach()))
            if self.step - first == 20 and (self.path.parent / "compiled").exists():
                (self.path.parent / "compiled" / "whole").touch()
            now, spent = time.monotonic(), time.process_time()
            minutes = (spent - busy) / 60 / self.threads
            busy, self.minutes = spent, self.minutes + minutes
            self.falling += minutes if self.decay else 0.0
            if now - said > LOG_SECONDS:
                mean = sum(recent) / len(recent)
                self.losses.append([self.step, mean])
                print(
                    f"step {self.step}  seen {self.seen}  minutes {self.minutes:.1f}"
                    f"  loss {mean:.4f}  norm {float(norm):.2f}"
                    f"  images/s {(self.seen - at) / (now - said):.1f}"
                    f"  a computed second {(self.seen - at) / (spent - began):.1f}",
                    flush=True,
                )
                said, began, at, recent = now, spent, self.seen, []
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def mean(self) -> nn.Module:
        """The model with the running mean of its weights."""
        self.model.load_state_dict(self.ema)
        return self.model.eval().requires_grad_(False)


def ship(name: str, model: nn.Module, **record) -> None:
    """Write ``<name>.safetensors`` (float16) and ``<name>.json`` beside this file."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, HERE / f"{name}.safetensors")
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    (HERE / f"{name}.safetensors").chmod(0o644)
    (HERE / f"{name}.json").write_text(json.dumps({"config": config, **record}, indent=1) + "\n")


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):  # fmt: skip
    """``scaled_dot_product_attention`` of [batch, heads, n, d] without a mask, written out: on a
    CPU and so few tokens the backward pass of the fused one takes a third of a step."""
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, query.shape[:2])


def spread(n: int, g: torch.Generator) -> torch.Tensor:
    """``n`` numbers in [0, 1), one in each nth: a batch then holds times of every kind."""
    return (torch.arange(n) + torch.rand(n, generator=g)) / n
