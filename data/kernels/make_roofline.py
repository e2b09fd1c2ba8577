"""What this machine can do, and where three kernels of the book stand on it: ``roofline.json``.

``python data/kernels/make_roofline.py`` measures for about a minute; let nothing else run. Every
figure is the median of several rounds in which all ways take turns. Weights that a language model
would read anew for every token are read from many copies in turn, so that no cache keeps them.
"""

import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets, hooks, models  # noqa: E402
from lib.kernels import hadamard, lowbit, sparse_mlp, topk_sae  # noqa: E402
from lib.kernels.dispatch import OPTIONS, njit, prange  # noqa: E402


def median_seconds(ways: dict, rounds: int = 7) -> dict[str, float]:
    """Seconds of every way; each runs once a round, in an order that changes."""
    times = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@njit(parallel=True, **OPTIONS)
def _read(x, turns, out):
    """Every thread adds up its own row ``turns`` times."""
    for i in prange(len(x)):
        total = np.float32(0)
        for _ in range(turns):
            for j in range(x.shape[1]):
                total += x[i, j]
            x[i, 0] = total * np.float32(0)  # or the turns would be folded into one
        out[i] = total


def bandwidth(threads: int) -> list[dict]:
    """Bytes a second read, all threads together, for sets of 16 KiB to 256 MiB."""
    found = []
    for power in range(14, 29):
        x = torch.ones(threads, 2**power // 4 // threads).numpy()
        out, turns = np.zeros(threads, np.float32), max(1, 2**26 // 2**power)
        seconds = median_seconds({"read": lambda x=x, t=turns, out=out: _read(x, t, out)})["read"]
        found.append({"set": 2**power, "bytes a second": 2**power * turns / seconds})
    return found


def products() -> list[dict]:
    """X W for a weight matrix [2048, 5632] in float32 (46 MB) and 1 to 512 rows of X."""
    copies = [torch.randn(2048, 5632) for _ in range(4)]
    batches = [2**i for i in range(10)]
    turn = iter(range(10**9))
    inputs = {b: torch.randn(b, 5632) for b in batches}
    seconds = median_seconds(
        {b: lambda b=b: F.linear(inputs[b], copies[next(turn) % 4]) for b in batches}
    )
    return [
        {
            "batch": b,
            "flops": 2 * b * 2048 * 5632,
            "bytes": 4 * (2048 * 5632 + b * (2048 + 5632)),
            "seconds": seconds[b],
        }
        for b in batches
    ]


def low_bits() -> list[dict]:
    """One vector times [2048, 5632] in fewer and fewer bits; 200 MB of copies take turns."""
    w, x = torch.randn(2048, 5632), torch.randn(5632)
    narrow, turn = x.bfloat16(), iter(range(10**9))
    held, ways = {}, {}
    for bits in (32, 16, 8, 4, 3, 2):
        if bits == 32:
            held[bits], run = [w, w.clone(), w.clone(), w.clone()], lambda a: torch.mv(a, x)
        elif bits == 16:
            held[bits] = [w.bfloat16() for _ in range(8)]
            run = lambda a: torch.mv(a, narrow)  # noqa: E731
        else:
            one = lowbit.pack(w, bits)
            held[bits] = [
                lowbit.replace(one, words=one.words.clone()) for _ in range(200 // (3 * bits) + 1)
            ]
            run = lambda a: lowbit.mv(a, x)  # noqa: E731
        # Several products a turn: a single one is too short to time well.
        ways[bits] = lambda run=run, all=held[bits]: [
            run(all[next(turn) % len(all)]) for _ in range(4)
        ]
    seconds = median_seconds(ways, 15)
    return [
        {
            "bits": bits,
            "flops": 2 * w.numel(),
            "bytes": held[bits][0].nbytes + 4 * (2048 + 5632),
            "seconds": seconds[bits] / 4,
        }
        for bits in held
    ]


def sparse_step() -> list[dict]:
    """All of SmolLM2's MLPs for one token, dense and sparse, on real inputs of four tokens."""
    model, tokenizer = models.load("smollm2", device="cpu", dtype=torch.float32)
    ids = tokenizer(datasets.moby_dick()[200_000:], return_tensors="pt").input_ids[:, :256]
    acts = hooks.read(model, ids, "mlp_in")
    n_layers = model.config.num_hidden_layers
    inputs = torch.stack([acts[f"mlp_in.{i}"][0] for i in range(n_layers)])  # [layer, pos, d]
    tokens = [inputs[:, t].contiguous() for t in (50, 100, 150, 200)]
    mlps = [layer.mlp for layer in model.model.layers]
    gates = [mlp.gate_proj.weight.detach() for mlp in mlps]
    rows = [sparse_mlp.pack(mlp.up_proj.weight, mlp.down_proj.weight) for mlp in mlps]
    shares, kept = (0.0, 0.3, 0.5, 0.7, 0.9), {}
    ways = {}

    def dense():
        for x in tokens:
            for mlp, row in zip(mlps, x, strict=True):
                mlp(row)

    def sparse(cuts):
        for x in tokens:
            for i, row in enumerate(x):
                sparse_mlp.gated_mlp(row, gates[i], rows[i], cuts[i])

    for share in shares:
        cuts = sparse_mlp.calibrate(model, ids, share, act="silu")
        on = [
            (F.silu(gates[i] @ row).abs() > cuts[i]).sum().item()
            for x in tokens
            for i, row in enumerate(x)
        ]
        kept[share] = sum(on) / len(on)
        ways[share] = lambda cuts=cuts: sparse(cuts)
    with torch.no_grad():
        seconds = median_seconds({"dense": dense} | ways)
    d_mlp, d = gates[0].shape
    least = {"dense": 3 * d_mlp * d} | {s: d_mlp * d + 2 * kept[s] * d for s in shares}
    return [
        {
            "way": way if way == "dense" else "sparse",
            "sparsity": 0.0 if way == "dense" else 1 - kept[way] / d_mlp,
            "flops": 2 * n_layers * least[way],
            "bytes": 4 * n_layers * least[way],
            "seconds": seconds[way] / len(tokens),
        }
        for way in least
    ]


def sae_step(n=4096, d=576, m=4608, k=32) -> list[dict]:
    """Loss and gradients of a TopK autoencoder: plain torch with its dense decode, and ours."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    W = torch.randn(m, d, generator=generator) / d**0.5
    parts = [v.requires_grad_() for v in (W, torch.zeros(m), W.clone(), torch.zeros(d))]
    W_enc, b_enc, W_dec, b_dec = parts

    def dense():
        scores = (x - b_dec) @ W_enc.T + b_enc
        top = scores.topk(k)
        z = torch.zeros_like(scores).scatter(1, top.indices, top.values.relu())
        torch.autograd.grad((z @ W_dec + b_dec - x).square().mean(), parts)

    def ours():
        z = topk_sae.encode(x, W_enc, b_enc, k, centre=b_dec)
        found = topk_sae.decode(z.values, z.indices, W_dec, b_dec)
        torch.autograd.grad((found - x).square().mean(), parts)

    seconds = median_seconds({"dense": dense, "ours": ours}, 5)
    one, few = 2 * n * d * m, 2 * n * d * k
    weights = 4 * (2 * n * d + 4 * m * d)  # x twice; both matrices, and their gradients
    # Dense: two products forward and four backward (the encoder's input feels b_dec), and the
    # matrix of latents and that of its gradient each written and read. Ours: one, the rest sparse.
    return [
        {
            "way": "dense",
            "flops": 6 * one,
            "bytes": weights + 4 * 4 * n * m,
            "seconds": seconds["dense"],
        },
        {"way": "ours", "flops": one + 4 * few, "bytes": weights, "seconds": seconds["ours"]},
    ]


def hadamard_step(n=4096, rows=1024) -> list[dict]:
    """The transform of a batch: by the dense matrix, and by butterflies."""
    x, h = torch.randn(rows, n), hadamard.matrix(n)
    out = torch.empty_like(x)
    with torch.no_grad():
        seconds = median_seconds(
            {
                "dense": lambda: torch.mm(x, h, out=out),
                "ours": lambda: hadamard.transform(out, inplace=True),
            },
            5,
        )
    return [
        {
            "way": "dense",
            "flops": 2 * rows * n * n,
            "bytes": 4 * (n * n + 2 * rows * n),
            "seconds": seconds["dense"],
        },
        {
            "way": "ours",
            "flops": rows * n * (n.bit_length() - 1),
            "bytes": 8 * rows * n,
            "seconds": seconds["ours"],
        },
    ]


def machine() -> dict:
    """Name, threads, and the peak of float32 products (2048 cubed, best of several)."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").is_file() else []  # fmt: skip
    square = torch.randn(2048, 2048)
    seconds = median_seconds({"multiply": lambda: square @ square}, 9)["multiply"]
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "flops a second": 2 * 2048**3 / seconds,
    }


def measure() -> dict:
    """Everything that the chapter draws; about a minute."""
    random.seed(0)
    torch.manual_seed(0)
    found = {"machine": machine(), "reads": bandwidth(torch.get_num_threads())}
    parts = dict(
        products=products, low_bits=low_bits, mlp=sparse_step, sae=sae_step, hadamard=hadamard_step
    )
    return roofs(found | {name: part() for name, part in parts.items()})


def roofs(found: dict) -> dict:
    """Adds B, and raises P to the best that anything reached: no point lies above its roof."""
    read = [p["bytes a second"] for p in found["reads"] if p["set"] >= 2**27]
    read += [p["bytes"] / p["seconds"] for p in found["mlp"]]
    peaks = [p["flops"] / p["seconds"] for p in found["products"]]
    found["machine"]["bytes a second"] = max(read)
    found["machine"]["flops a second"] = max(found["machine"]["flops a second"], *peaks)
    return found


if __name__ == "__main__":
    result = measure()
    (HERE / "roofline.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
