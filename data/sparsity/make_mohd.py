"""Make mohd_results.json: mixtures of hidden dimensions against plain Llamas of the same family.

All models read the bytes of Moby Dick, have two blocks, attention of 64 dimensions and MLPs of 256
neurons; only the width of the residual stream differs, and how much of it a token uses. A plain
model of width d reads and writes all of it in every sublayer; a mixture reads and writes
``ACTIVE`` of its sub-dimensions of eight. Three seeds of everything.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent.parent))

import small_lm  # noqa: E402

PART = 8  # dimensions of a sub-dimension
BLOCKS, INNER, D_MLP = 2, 64, 256
SEEDS = (0, 1, 2)
STEPS = 300
BALANCE = 0.01  # weight of the load balancing loss

# name: (width, active sub-dimensions or None for a plain model, shared ones, changes)
RUNS = {
    "plain 32": (32, None, None, {}),
    "plain 64": (64, None, None, {}),
    "plain 96": (96, None, None, {}),
    "plain 128": (128, None, None, {}),
    "MoHD 64, half": (64, 4, 3, {}),
    "MoHD 128, half": (128, 8, 6, {}),
    "MoHD 192, a third": (192, 8, 6, {}),
    "no shared": (128, 8, 0, {}),
    "all shared": (128, 8, 8, {}),
    "no scaling": (128, 8, 6, {"scaling": False}),
    "no fusion": (128, 8, 6, {"fusion": False}),
    "random routing": (128, 8, 6, {"random": True}),
}


class Routed(nn.Module):
    """A sublayer (attention or MLP) that reads and writes the active sub-dimensions of a token.

    Args:
        inner: the sublayer, from [batch, pos, d] to [batch, pos, d] (or a tuple that begins so).
        d: the width of the stream, a multiple of ``PART``.
        active, shared: how many sub-dimensions a token uses, and how many of them every token does.
    """

    def __init__(self, inner, d, active, shared, scaling=True, fusion=True, random=False):
        super().__init__()
        self.inner, self.n = inner, d // PART
        self.active, self.shared = active, shared
        self.scaling, self.random = scaling, random
        self.router = nn.Linear(d, self.n, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        # a Monarch matrix: mix within each group, then between groups; begins as the identity
        self.within = self.between = None
        if fusion:
            self.within = nn.Parameter(torch.eye(PART).repeat(self.n, 1, 1))
            self.between = nn.Parameter(torch.eye(self.n).repeat(PART, 1, 1))

    def gates(self, x):
        """g [batch, pos, n]: a softmax score where a sub-dimension is active, 0 elsewhere."""
        scores = self.router(x).softmax(-1)
        rest = scores[..., self.shared :]
        order = torch.rand_like(rest) if self.random else rest
        chosen = order.topk(self.active - self.shared, -1).indices
        keep = torch.zeros_like(rest).scatter(-1, chosen, 1.0)
        if rest.shape[-1]:  # Switch's load balance over the routed sub-dimensions
            self.balance = rest.shape[-1] * (keep.mean((0, 1)) * rest.mean((0, 1))).sum()
        keep = torch.cat([torch.ones_like(scores[..., : self.shared]), keep], -1)
        return scores * keep, keep

    def forward(self, x=None, **kwargs):
        x = kwargs.pop("hidden_states") if x is None else x
        g, keep = self.gates(x)
        alpha = self.n * g.sum(-1, keepdim=True) if self.scaling else 1.0
        out = self.inner(x * (alpha * g).repeat_interleave(PART, -1), **kwargs)
        y, *rest = out if isinstance(out, tuple) else (out,)
        y = y * keep.repeat_interleave(PART, -1)
        if self.within is not None:
            y = torch.einsum("...nc,ncd->...nd", y.unflatten(-1, (self.n, PART)), self.within)
            y = torch.einsum("...nc,cnm->...mc", y, self.between).flatten(-2)
        return (y, *rest) if isinstance(out, tuple) else y


def build(name: str, seed: int):
    """The model of a row of ``RUNS``: ids [batch, pos] to logits."""
    d, active, shared, changes = RUNS[name]
    model = small_lm.llama(d, BLOCKS, D_MLP, seed=seed, n_heads=INNER // 32)
    if active:
        for block in model.model.layers:
            block.self_attn = Routed(block.self_attn, d, active, shared, **changes)
            block.mlp = Routed(block.mlp, d, active, shared, **changes)
    return model


def parameters(model) -> dict[str, int]:
    """Weights in the blocks, and those that one token uses; the tied embedding is counted apart."""
    total = used = 0
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            inner = getattr(part, "inner", part)
            size = sum(w.numel() for w in inner.parameters())
            extra = sum(w.numel() for w in part.parameters()) - size
            share = part.active / part.n if isinstance(part, Routed) else 1.0
            total += size + extra
            used += round(size * share) + extra
    return {"blocks": total, "active": used, "embedding": model.model.embed_tokens.weight.numel()}


def routed(model) -> list[Routed]:
    return [m for m in model.modules() if isinstance(m, Routed)]


@torch.no_grad()
def routing(model, ids) -> dict[str, float]:
    """How the routers of a trained mixture choose: over its sublayers, on 16 pieces of the text."""
    chosen = [[] for _ in routed(model)]
    handles = [
        m.register_forward_pre_hook(
            lambda m, args, kw, kept=kept: kept.append(
                m.gates(args[0] if args else kw["hidden_states"])[1]
            ),
            with_kwargs=True,
        )
        for m, kept in zip(routed(model), chosen, strict=True)
    ]
    model.eval()
    model(small_lm.pieces(ids, 16, 99)[:, :-1])
    for h in handles:
        h.remove()
    rows = []
    for m, kept in zip(routed(model), chosen, strict=True):
        free = kept[0][..., m.shared :]
        k = m.active - m.shared
        if not k:
            continue
        share = free.mean((0, 1)) / k
        entropy = -(share * share.clamp_min(1e-9).log()).sum() / math.log(len(share))
        again = (free[:, 1:] * free[:, :-1]).sum(-1).mean() / k
        apart = (share * share * k).sum()  # two tokens that choose independently
        rows.append((entropy.item(), again.item(), apart.item()))
    mean = torch.tensor(rows).mean(0).tolist() if rows else [None] * 3
    return dict(zip(("entropy", "kept", "kept by chance"), mean, strict=True))


def main(argv=None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--state", type=Path, default=Path("/tmp/mohd"), help="scratch folder")
    options.add_argument("--out", type=Path, default=HERE / "mohd_results.json")
    options.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = options.parse_args(argv)
    train, test = small_lm.corpus()
    for seed in args.seeds:
        for name in RUNS:
            path = args.state / f"{name.replace(' ', '_').replace(',', '')}_{seed}.json"
            if path.exists():
                continue
            model = build(name, seed)
            layers = routed(model)
            small_lm.train(
                model, train, STEPS, seed,
                state=path.with_suffix(".safetensors"),
                penalty=(lambda step, m=layers: BALANCE * sum(x.balance for x in m))
                if layers and layers[0].active > layers[0].shared else None,
            )  # fmt: skip
            row = {"name": name, "seed": seed, "width": RUNS[name][0], **parameters(model)}
            torch.manual_seed(0)  # random routing draws on the test text too
            row["loss"] = round(small_lm.held_out(model, test), 5)
            row |= {k: v if v is None else round(v, 4) for k, v in routing(model, test).items()}
            path.write_text(json.dumps(row))
            path.with_suffix(".safetensors").unlink(missing_ok=True)
            print(row, flush=True)
    rows = [json.loads(p.read_text()) for p in args.state.glob("*.json")]
    order = {(n, s): (i, s) for i, n in enumerate(RUNS) for s in SEEDS}
    rows.sort(key=lambda r: order[r["name"], r["seed"]])
    lines = ",\n".join(json.dumps(r) for r in rows)
    args.out.write_text(f'{{"steps": {STEPS}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
