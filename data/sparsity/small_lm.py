"""Small Llamas over bytes, and the loop that trains them: what several scripts of this folder use.

Text is Moby Dick in bytes, so the vocabulary is 256 and nearly all weights are in the blocks.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, datasets  # noqa: E402

LENGTH = 128


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Moby Dick in bytes: the first nine tenths to train on, the rest to test on."""
    ids = torch.tensor(list(datasets.moby_dick().encode()), dtype=torch.uint8).long()
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def pieces(ids: torch.Tensor, n: int, seed: int, length: int = LENGTH) -> torch.Tensor:
    """``n`` random stretches: ids [n, length + 1]."""
    g = torch.Generator().manual_seed(seed)
    at = torch.randint(len(ids) - length - 1, (n,), generator=g)
    return torch.stack([ids[a : a + length + 1] for a in at])


def llama(
    d_model: int = 128,
    n_layers: int = 4,
    d_mlp: int = 512,
    act: str = "silu",
    seed: int = 0,
    n_heads: int | None = None,
) -> LlamaForCausalLM:
    """A Llama over bytes: ``act`` is any activation of transformers; ``n_heads`` heads of 32
    dimensions each (None: as many as fill ``d_model``)."""
    n_heads = n_heads or d_model // 32
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=d_model,
            intermediate_size=d_mlp,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_heads,
            head_dim=32,
            max_position_embeddings=512,
            hidden_act=act,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next byte in nats: batch [n, length + 1]."""
    out = model(batch[:, :-1])
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out(model, ids: torch.Tensor, n: int = 64, seed: int = 1234) -> float:
    """Mean loss in nats a byte on ``n`` stretches of the test text, the same for every model."""
    model.eval()
    batches = pieces(ids, n, seed).split(16)
    return sum(loss_of(model, b).item() * len(b) for b in batches) / n


def train(
    model,
    ids: torch.Tensor,
    steps: int,
    seed: int,
    state: Path | None = None,
    rate: float = 3e-3,
    batch: int = 16,
    length: int = LENGTH,
    penalty=None,
    watch=None,
    every: int = 50,
) -> None:
    """AdamW with a short warm-up and a cosine down to a tenth, in place; resumes from ``state``.

    Args:
        penalty: ``penalty(step) -> Tensor``, added to the loss after each forward (a regularizer
            that reads what its own hooks kept).
        watch: ``watch(step, loss)``, called every ``every`` steps and after the last one.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    first = 0
    if state and state.exists():
        kept = checkpoint.load(state)
        first = kept["step"]
        model.load_state_dict(kept["model"])
        opt.load_state_dict(
            {"state": kept["opt"], "param_groups": opt.state_dict()["param_groups"]}
        )
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / 30)
        down = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in opt.param_groups:
            group["lr"] = rate * warm * down
        model.train()
        loss = loss_of(model, pieces(ids, batch, seed * 1_000_003 + step, length))
        total = loss if penalty is None else loss + penalty(step)
        opt.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        done = step + 1
        if watch and (done % every == 0 or done == steps):
            watch(done, loss.item())
        if state and (done % 200 == 0 or done == steps):
            tree = {"step": done, "model": dict(model.state_dict())}
            checkpoint.save(state, tree | {"opt": opt.state_dict()["state"]})
