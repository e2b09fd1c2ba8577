"""A causal transformer small enough to train on a laptop core, with an optional image in front.

Pre-norm RMSNorm and SwiGLU as in LLaMA, learned positions, and a tied embedding: the matrix that
reads a token also scores it, so a vector of the residual stream can be read in the vocabulary.
The blocks' parts have plain names (`blocks.L.mlp.down_proj`), which `lib.hooks` takes as sites.
"""

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lib import checkpoint


class Attention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, past=None):
        batch, pos, d_model = x.shape
        heads = (batch, pos, self.n_heads, d_model // self.n_heads)
        q, k, v = (t.reshape(heads).transpose(1, 2) for t in self.qkv_proj(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.ones(pos, k.shape[2], dtype=torch.bool, device=x.device)
        mask = seen.tril(k.shape[2] - pos) if past is not None else None
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
        return self.o_proj(z.transpose(1, 2).reshape(batch, pos, d_model)), (k, v)


class MLP(nn.Module):
    def __init__(self, d_model, d_mlp):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, d_model, d_mlp, n_heads):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(d_model, eps=1e-5), nn.RMSNorm(d_model, eps=1e-5)
        self.attn, self.mlp = Attention(d_model, n_heads), MLP(d_model, d_mlp)

    def forward(self, x, past=None):
        z, past = self.attn(self.norm_1(x), past)
        x = x + z
        return x + self.mlp(self.norm_2(x)), past


class Tiny(nn.Module):
    """Token ids [batch, pos], behind an image of [batch, n_patches, d_patch] if there is one.

    Returns logits [batch, pos, vocab] at the tokens. With a list as `cache`, the call goes on
    where the last one with this list ended, and the list then holds the keys and values.
    """

    def __init__(
        self, vocab, d_model=64, d_mlp=160, n_layers=2, n_heads=4, n_tokens=64, d_patch=0, seed=0
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, d_model)
        self.positions = nn.Embedding(n_tokens, d_model)
        wide = 2 * d_model
        self.see = d_patch and nn.Sequential(
            nn.Linear(d_patch, wide), nn.SiLU(), nn.Linear(wide, d_model)
        )
        self.blocks = nn.ModuleList(Block(d_model, d_mlp, n_heads) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data /= (2 * n_layers) ** 0.5
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=0.5 * d_model**-0.5)

    def forward(self, ids, patches=None, cache=None):
        x = self.embed(ids)
        if patches is not None:
            x = torch.cat([self.see(patches), x], 1)
        start = cache[0][0].shape[2] if cache else 0
        x = x + self.positions.weight[start : start + x.shape[1]]
        pasts = list(cache) if cache else [None] * len(self.blocks)
        for i, block in enumerate(self.blocks):
            x, pasts[i] = block(x, pasts[i])
        if cache is not None:
            cache[:] = pasts
        return self.norm(x[:, -ids.shape[1] :]) @ self.embed.weight.T


def half(model):
    """The weights as float16, to be saved."""
    return {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}


def fit(model, loss_of, steps, lr, path=None, warm=50, decay=True, weight_decay=0.05, log=None):
    """Train with AdamW on `loss_of(model, step)`, which draws its own data from the step's number.

    With a path, the run is saved every half minute and goes on from there if it was cut off.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)
    )
    first, path = 0, path and Path(path)
    if path and path.is_file():
        kept = checkpoint.load(path)
        first = kept["step"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])

    def save(step):
        kept = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
        checkpoint.save(path, kept)

    saved = time.monotonic()
    for step in range(first, steps):
        loss = loss_of(model, step)
        for group in optimizer.param_groups:
            left = min(1, 2 * (1 - step / steps) + 0.01) if decay else 1
            group["lr"] = lr * min(1, (step + 1) / warm) * left
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log and step % 200 == 199:
            log(f"step {step + 1} loss {loss.item():.3f}")
        if path and time.monotonic() - saved > 30:
            save(step + 1)
            saved = time.monotonic()
    if path and first < steps:
        save(steps)
    return model.eval()
