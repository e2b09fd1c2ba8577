"""TopK sparse autoencoder at d 576, 4,608 latents, k 32: a training step without the optimizer.

Step: from x to the gradients of all four parameters, no optimizer on either side. ``error`` is the
largest difference of a gradient from dense autograd's, over that gradient's largest entry, in the
worst parameter. Flops are the least there are: the one dense product and four sparse ones.
"""

import statistics
import sys

import torch
import torch.nn.functional as F

from lib.kernels import sparse_decode, topk, topk_sae
from lib.kernels.dispatch import using
from tests.bench_kernels.common import Row, compare, race

N, D, M, K = 4096, 576, 4608, 32
SHAPE = f"{N} × {D}, {M} latents, k {K}"


def plain(x, W_enc, b_enc, W_dec, b_dec):
    """As everyone writes it: dense scores, torch.topk, a dense decode, autograd."""
    values, indices = F.linear(x - b_dec, W_enc, b_enc).relu().topk(K, dim=1)
    z = torch.zeros(len(x), M).scatter(1, indices, values)
    return F.mse_loss(z @ W_dec + b_dec, x)


def sparse(x, W_enc, b_enc, W_dec, b_dec, decode, **options):
    found = topk_sae.encode(x, W_enc, b_enc, K, centre=b_dec, **options)
    return F.mse_loss(decode(found, W_dec, b_dec), x)


def bag(found, W_dec, b_dec):
    weights = {"per_sample_weights": found.values, "mode": "sum"}
    return F.embedding_bag(found.indices, W_dec, **weights) + b_dec


def ours(found, W_dec, b_dec):
    return topk_sae.decode(found.values, found.indices, W_dec, b_dec)


def steps() -> list[Row]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g)
    shapes = (M, D), (M,), (M, D), (D,)
    parameters = [torch.randn(*s, generator=g) / 24 for s in shapes]
    for p in parameters:
        p.requires_grad_()
    recall: list[float] = []

    narrow = {"bfloat16": True, "recall": recall}

    def reference():
        with using("reference"):
            return sparse(x, *parameters, ours)

    losses = {
        "plain dense PyTorch": lambda: plain(x, *parameters),
        "reference": reference,
        "ours, Numba": lambda: sparse(x, *parameters, ours),
        "ours, embedding_bag for decode": lambda: sparse(x, *parameters, bag),
        "ours, bfloat16 candidates": lambda: sparse(x, *parameters, ours, **narrow),
    }

    def step(name):
        def run():
            for p in parameters:
                p.grad = None
            losses[name]().backward()

        return run

    ways = {name: step(name) for name in losses}
    ways["plain dense PyTorch"]()
    exact = [p.grad.clone() for p in parameters]
    errors = {}
    for name, run in ways.items():
        run()
        errors[name] = max(
            float((p.grad - e).abs().max() / e.abs().max())
            for p, e in zip(parameters, exact, strict=True)
        )
    times = race(ways, rounds=9, seconds=22)
    rows = []
    for name, (seconds, ratio) in compare(times, "plain dense PyTorch").items():
        rows.append(Row(f"step, {SHAPE}", name, seconds, ratio, "plain dense PyTorch"))
        rows[-1].error, rows[-1].note = errors[name], "of the largest gradient"
        rows[-1].flops = 2 * N * D * M + 4 * 2 * N * K * D
        rows[-1].more = {"tokens a second": round(N / seconds)}
        if "bfloat16" in name:
            rows[-1].more["recall"] = statistics.mean(recall)
    return rows


def parts() -> list[Row]:
    g = torch.Generator().manual_seed(1)
    scores, x = torch.randn(N, M, generator=g), torch.randn(N, D, generator=g)
    W, b = torch.randn(M, D, generator=g), torch.zeros(D)
    found = topk.select(scores, K)
    starts, indices = sparse_decode.even_starts(found.indices), found.indices.flatten()
    values = found.values.flatten()
    order, tokens, columns = sparse_decode.transpose(indices, starts, M)
    z = torch.zeros(N, M).scatter(1, found.indices, found.values)
    rows = []

    def add(shape, baseline, ways, exact, least):
        results = {name: run() for name, run in ways.items()}
        for name, (seconds, ratio) in compare(race(ways, 9, 6), baseline).items():
            error = float((results[name] - exact).abs().max() / exact.abs().max())
            rows.append(Row(shape, name, seconds, ratio, baseline, least, error=error))

    size = f"{N} × {M}"
    ways = {
        "torch.topk": lambda: scores.topk(K).values,
        "ours, Numba": lambda: topk.select(scores, K).values,
    }
    add(f"k {K} of every token, {size}", "torch.topk", ways, found.values, scores.nbytes)
    total = K * N
    ways = {
        "torch.topk": lambda: scores.flatten().topk(total).values.sort().values,
        "ours, Numba": lambda: topk.select(scores, total, "batch").values.sort().values,
    }
    exact = ways["torch.topk"]()
    add(f"{total:,} of the batch, {size}", "torch.topk", ways, exact, scores.nbytes)
    csr = torch.sparse_csr_tensor(starts, indices, values, (N, M), check_invariants=False)
    exact = (z.double() @ W.double()).float()
    ways = {
        "dense product": lambda: z @ W,
        "torch CSR product": lambda: csr @ W,
        "embedding_bag": lambda: bag(found, W, b),
        "ours, Numba": lambda: sparse_decode.gather(values, indices, starts, W),
    }
    add(f"decode, k {K}, {size}", "embedding_bag", ways, exact, W.nbytes + x.nbytes)
    exact = (z.T.double() @ x.double()).float()

    def embedding_gradient():  # what embedding_bag's backward does for W_dec
        weight = W.requires_grad_()
        out = F.embedding_bag(found.indices, weight, per_sample_weights=found.values, mode="sum")
        return torch.autograd.grad(out, weight, x)[0]

    ways = {
        "dense product": lambda: z.T @ x,
        "embedding_bag, with its forward": embedding_gradient,
        "ours, Numba, with the sort": lambda: _columns(values, indices, starts, x),
    }
    add(f"gradient of W_dec, {size}", "dense product", ways, exact, W.nbytes + x.nbytes)
    return rows


def _columns(values, indices, starts, x):
    order, tokens, columns = sparse_decode.transpose(indices, starts, M)
    return sparse_decode.gather(values[order], tokens, columns, x)


def rows() -> list[Row]:
    print(
        "topk_sae: sparsify, SAELens, dictionary_learning clash with this environment",
        file=sys.stderr,
    )
    torch.sparse.check_sparse_tensor_invariants.disable()
    return steps() + parts()
