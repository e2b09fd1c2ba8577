"""SmolLM2's MLP at batch 1, reading only the rows above CHESS's thresholds; alone and in generate.

The 30 layers run in turn, each on its own real input: 318 MB of float32, so that neither 2 MB of
L2 nor 32 MB of L3 holds them (one layer, 10.6 MB, would fit L3). "limit" is the speed-up that
the bytes left to read allow, 3 / (3 − 2s) for the MLP. In ``generate`` the MLP's share p of a
step is timed inside the dense model, and the limit is 1 / (1 − p + p (3 − 2s) / 3).
"of it" divides by the best dense float32 way of torch, "of own" by this kernel with thresholds
that keep every row: the stricter measure, since torch's dense product wastes bandwidth.
Perplexity is on 1,024 tokens of Moby Dick, thresholds from another 1,024.
"""

import statistics
import sys
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn import functional as F

from lib import datasets, metrics, models
from lib.kernels.dispatch import using
from lib.kernels.sparse_mlp import calibrate, gated_mlp, pack, sparse_mlp
from lib.kernels.sparse_mv import masked_mv, sparse_mv
from tests.bench_kernels.common import Row, compare, race

SPARSITIES = (0.0, 0.5, 0.7)
MLP_BYTES = 3 * 576 * 1536 * 4
TOKENS = 24


@torch.no_grad()
def rows() -> list[Row]:
    model, tokenizer = models.load("smollm2", device="cpu")
    ids = torch.tensor(tokenizer(datasets.moby_dick()[200_000:240_000])["input_ids"])
    fit, test = ids[None, :1024], ids[4096:5120].view(2, 512)
    mlps = [layer.mlp for layer in model.model.layers]
    thresholds = {s: calibrate(model, fit, s) for s in SPARSITIES[1:]}
    thresholds[0.0] = torch.full_like(thresholds[0.5], -1.0)
    loss = {s: _perplexity(model, test, thresholds[s]) for s in SPARSITIES[1:]}
    loss[0.0] = metrics.perplexity(model, test)
    plain = _perplexity(model, test, calibrate(model, fit, 0.5, "plain"))
    print(f"perplexity at 50 %, one threshold a layer (CATS): {plain:.1f}", file=sys.stderr)
    inputs = _inputs(model, mlps, test[:1])
    return _alone(mlps, inputs, thresholds, loss) + _in_generate(model, ids, thresholds, loss)


def _perplexity(model, test, thresholds) -> float:
    with sparse_mlp(model, thresholds):
        return metrics.perplexity(model, test)


def _inputs(model, mlps, ids) -> list[list[torch.Tensor]]:
    """inputs[k][layer]: what the MLPs read at ten positions, [1, 576]."""
    seen = []
    handles = [
        mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for mlp in mlps
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return [[x[0, p : p + 1].clone() for x in seen] for p in range(50, 500, 45)]


def _alone(mlps, inputs, thresholds, loss) -> list[Row]:
    gates = [m.gate_proj.weight.detach() for m in mlps]
    ups = [m.up_proj.weight.detach() for m in mlps]
    downs = [m.down_proj.weight.detach() for m in mlps]
    packed = [pack(u, d) for u, d in zip(ups, downs, strict=True)]
    turned = [[w.T.contiguous() for w in ws] for ws in (gates, ups, downs)]  # [in, out]
    layers = range(len(mlps))

    def way(step):  # all layers on one position's inputs, the next call on the next position's
        turn = iter(range(10**9))

        def run():
            xs = inputs[next(turn) % len(inputs)]
            for layer in layers:
                y = step(layer, xs[layer])
            return y

        return run

    def columns(i, x):
        a, b, _ = (w[i] for w in turned)
        return (F.silu(x @ a) * (x @ b)) @ downs[i].T

    def gathered(i, x):
        g = F.silu(F.linear(x, gates[i]))[0]
        keep = (g.abs() > thresholds[0.7][i]).nonzero()[:, 0]
        return (g[keep] * (ups[i][keep] @ x[0])) @ turned[2][i][keep]

    def ours(s):
        return lambda i, x: gated_mlp(x, gates[i], packed[i], thresholds[s][i])

    torch_ways = {
        "torch, F.linear (the model's)": way(lambda i, x: mlps[i](x)),
        "torch, x @ W with W [in, out]": way(columns),
        **_packed_by_mkl(gates, ups, downs, way),
    }
    ways = {
        **torch_ways,
        "torch, rows gathered, 70 %": way(gathered),
        **{f"ours, {s:.0%}": way(ours(s)) for s in SPARSITIES},
    }
    error, kept = {}, {}
    for s in SPARSITIES:
        pairs, shares = [], []
        for xs in inputs[:3]:
            for i in layers:
                with using("reference"):
                    want = gated_mlp(xs[i], gates[i], packed[i], thresholds[s][i])
                got = ours(s)(i, xs[i])
                pairs.append(((got - want).abs().max() / want.abs().max()).item())
        for xs in inputs:
            g = torch.stack([F.silu(F.linear(xs[i], gates[i])[0]).abs() for i in layers])
            shares.append((g > thresholds[s]).float().mean().item())
        error[f"ours, {s:.0%}"], kept[s] = max(pairs), statistics.mean(shares)
    times = race(ways, rounds=15, seconds=8)
    best = min(torch_ways, key=lambda name: statistics.median(times[name]))
    against, own = compare(times, best), compare(times, "ours, 0%")
    found = []
    for name, (seconds, ratio) in against.items():
        s = float(name.split()[-1].rstrip("%")) / 100 if name.startswith("ours") else 0.0
        share = (1 + 2 * kept[s]) / 3
        more = {}
        if name.startswith("ours") and s:
            more = {"limit": 1 / share, "of it": ratio * share, "of own": own[name][1] * share}
        if s in loss:
            more["perplexity"] = loss[s]
        row = Row(
            "576→1536→576", name, seconds / len(mlps), ratio, best, MLP_BYTES * share,
            error=error.get(name), more=more, note="best of torch" if name == best else "",
        )  # fmt: skip
        found.append(row)
    return found + _products(turned[2], inputs, ups)


def _products(downs, inputs, ups) -> list[Row]:
    """The two products alone at 70 %: the down projection [1536, 576] and the up projection."""
    torch.manual_seed(0)
    layers, n = range(len(ups)), len(downs[0])
    hs = [torch.randn(n) for _ in layers]
    masks = [h.abs() > h.abs().quantile(0.7) for h in hs]
    x = inputs[0][0][0]
    ways = {
        "torch, dense down": lambda: [h @ w for h, w in zip(hs, downs, strict=True)],
        "torch, dense up": lambda: [w @ x for w in ups],
        "ours, sparse_mv, 70 %": lambda: [
            sparse_mv(w, h, m) for w, h, m in zip(downs, hs, masks, strict=True)
        ],
        "ours, masked_mv, 70 %": lambda: [
            masked_mv(w, x, m) for w, m in zip(ups, masks, strict=True)
        ],
    }
    times, found = race(ways, rounds=9, seconds=2), []
    for name, base in zip(ways, 2 * ["torch, dense down", "torch, dense up"], strict=True):
        seconds, ratio = compare({k: times[k] for k in (name, base)}, base)[name]
        moved = MLP_BYTES / 3 * (0.3 if "ours" in name else 1)
        found.append(Row("1536 × 576", name, seconds / len(ups), ratio, base, moved))
    return found


def _packed_by_mkl(gates, ups, downs, way) -> dict:
    """torch's own prepacked products, where this build has them."""
    found, ops = {}, torch.ops
    triples = list(zip(gates, ups, downs, strict=True))
    try:
        kept = [[ops.mkl._mkl_reorder_linear_weight(w.clone(), 1) for w in t] for t in triples]

        def step(i, x):
            a, b, c = (
                lambda v, p=p, w=w: ops.mkl._mkl_linear(v, p, w, None, 1)
                for p, w in zip(kept[i], triples[i], strict=True)
            )
            return c(F.silu(a(x)) * b(x))

        step(0, torch.ones(1, 576))
        found["torch, MKL prepacked"] = way(step)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        print(f"no MKL prepacked linear: {str(error).splitlines()[0][:80]}", file=sys.stderr)
    try:
        other = [[ops.mkldnn._reorder_linear_weight(w.clone(), 1) for w in t] for t in triples]

        def onednn(i, x):
            a, b, c = (
                lambda v, p=p: ops.mkldnn._linear_pointwise(v, p, None, "none", [], "")
                for p in other[i]
            )
            return c(F.silu(a(x)) * b(x))

        onednn(0, torch.ones(1, 576))
        found["torch, oneDNN prepacked"] = way(onednn)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        print(f"no oneDNN prepacked linear: {str(error).splitlines()[0][:80]}", file=sys.stderr)
    return found


# --- end to end -----------------------------------------------------------------------------------


class _Clock:
    """A stopping criterion that never stops: it notes when each token was done."""

    def __init__(self):
        self.times = []

    def __call__(self, ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def _decode(model, prompt) -> list[float]:
    clock = _Clock()
    model.generate(
        prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
        stopping_criteria=[clock], pad_token_id=0, attention_mask=torch.ones_like(prompt),
    )  # fmt: skip
    return clock.times


@contextmanager
def _forwards(mlps, make):
    """Give every MLP ``make(mlp)`` for its forward; afterwards, the one that it had before."""
    before = [vars(mlp).get("forward") for mlp in mlps]
    for mlp in mlps:
        mlp.forward = make(mlp)
    try:
        yield
    finally:
        for mlp, forward in zip(mlps, before, strict=True):
            if forward is None:
                del mlp.forward
            else:
                mlp.forward = forward


def _columns_first(mlp):
    """x @ W, with gate and up stored [in, out]; long inputs take the model's own way."""
    a, b = (w.weight.T.contiguous() for w in (mlp.gate_proj, mlp.up_proj))
    down = mlp.down_proj.weight.T
    dense = mlp.forward
    return lambda x: (F.silu(x @ a) * (x @ b)) @ down if x.shape[1] == 1 else dense(x)


def _onednn(mlp):
    """torch's product with weights in oneDNN's own order, fixed for one row."""
    kept = [
        torch.ops.mkldnn._reorder_linear_weight(w.weight.detach().clone(), 1)
        for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    dense = mlp.forward

    def product(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    def forward(x):
        if x.shape[1] > 1:
            return dense(x)
        return product(F.silu(product(x, kept[0])) * product(x, kept[1]), kept[2])

    return forward


def _share(model, mlps, prompt) -> float:
    """The part of a decode step that the MLPs take, as they are now, by the clock in one run."""
    spent = [0.0]

    def timed(mlp):
        inner = mlp.forward

        def forward(x):
            start = time.perf_counter()
            y = inner(x)
            if x.shape[1] == 1:
                spent[0] += time.perf_counter() - start
            return y

        return forward

    with _forwards(mlps, timed):
        clock = _decode(model, prompt)
    return spent[0] / (clock[-1] - clock[0])


def _in_generate(model, ids, thresholds, loss) -> list[Row]:
    mlps = [layer.mlp for layer in model.model.layers]
    prompt = ids[None, 6000:6064]
    dense = {
        "dense, as loaded": nullcontext,
        "dense, x @ W with W [in, out]": lambda: _forwards(mlps, _columns_first),
    }
    try:
        _onednn(mlps[0])(torch.ones(1, 1, 576))
        dense["dense, oneDNN prepacked"] = lambda: _forwards(mlps, _onednn)
    except (RuntimeError, AttributeError, NotImplementedError):
        pass  # said above
    sparse = {f"ours, {s:.0%}": (lambda s=s: sparse_mlp(model, thresholds[s])) for s in SPARSITIES}
    contexts = dense | sparse
    times, shares = {name: [] for name in contexts}, {name: [] for name in contexts}
    begin = time.perf_counter()
    for done in range(4):  # in turn, so that a slow moment of the machine hits all alike
        if done >= 3 and time.perf_counter() - begin > 12:
            break
        for name, context in contexts.items():
            with context():
                times[name].append(statistics.median(np.diff(_decode(model, prompt))))
                if name in dense or name == "ours, 0%":
                    shares[name].append(_share(model, mlps, prompt))
    base = min(dense, key=lambda name: statistics.median(times[name]))
    against, own = compare(times, base), compare(times, "ours, 0%")
    loaded = compare(times, "dense, as loaded")
    found = []
    for name, (seconds, ratio) in against.items():
        s = float(name.split()[-1].rstrip("%")) / 100 if name in sparse else 0.0
        more = {"tokens a second": 1 / seconds, "× as loaded": loaded[name][1]}
        if s:
            p, q = (statistics.median(shares[n]) for n in (base, "ours, 0%"))
            limit, own_limit = (1 / (1 - part * 2 * s / 3) for part in (p, q))
            more |= {"limit": limit, "of it": ratio / limit, "of own": own[name][1] / own_limit}
        else:
            more["MLP's share"] = statistics.median(shares[name])
        more["perplexity"] = loss[s]
        note = "CHESS reports 1.27×" if s == 0.5 else "best dense" if name == base else ""
        found.append(Row("generate, batch 1", name, seconds, ratio, base, more=more, note=note))
    return found
