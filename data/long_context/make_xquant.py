"""SmolLM2 reads prose and needles through caches in few bits: perplexity, answers, bytes.

    python data/long_context/make_xquant.py --scratch /tmp/xquant

Resumable. Writes ``xquant_frontier.json`` (a row a method, number of bits and seed). A seed is two
texts of 512 tokens of Moby Dick and a draw of needles. Texts are read in chunks of 64 tokens, so
that all of a text's past is read back packed; no float window is kept, so that every byte of a
cache is in the row. Time is in the bench of the kernels (``tests/bench_kernels/caches.py``).
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from lib import datasets, models
from lib.kernels.layer_input_cache import LayerInputCache
from lib.kernels.quantized_cache import (
    QuantizedKVCache,
    Stream,
    StreamsLayer,
    bytes_kept,
    logits_through,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import make_retrieval  # noqa: E402

TEXT, CHUNK = 512, 64
FULL = 2 * 30 * 192 * 2 * TEXT  # bytes of SmolLM2's float16 cache of a text


def nearest(model, bits: int) -> QuantizedKVCache:
    """Keys and values both rounded per token: round to nearest without KIVI's rule."""
    cache = QuantizedKVCache(model, bits, window=0)
    cache.layers = [
        StreamsLayer(*(Stream(bits, 64, "token", 64, 0) for _ in range(2))) for _ in cache.layers
    ]
    return cache


METHODS = {  # name -> a cache in so many bits, without a float window
    "full cache": lambda model, bits: QuantizedKVCache(model, bits, window=0),
    "KV round to nearest": nearest,
    "KIVI-style KV": lambda model, bits: QuantizedKVCache(model, bits, window=0),
    "XQuant": lambda model, bits: LayerInputCache(model, bits, window=0),
    "XQuant latents": lambda model, bits: LayerInputCache(model, bits, latents=True, window=0),
    "XQuant-CL": lambda model, bits: LayerInputCache(model, bits, cross_layer=True, window=0),
    "XQuant-CL latents": lambda model, bits: LayerInputCache(
        model, bits, latents=True, cross_layer=True, window=0
    ),
}
NEEDLE_RUNS = [("full cache", 16)] + [
    (m, b) for b in (4, 2) for m in ("KIVI-style KV", "XQuant latents", "XQuant-CL latents")
]
RUNS = [("full cache", 16)] + [(m, b) for m in list(METHODS)[1:] for b in (8, 4, 3, 2)]


def texts(tokenizer, seed: int, n: int = 2):
    """[n, 512] tokens of prose."""
    text = datasets.moby_dick()[150_000 + 200_000 * seed :][: 4_000 * n]
    return tokenizer(text, return_tensors="pt").input_ids[0, : TEXT * n].view(n, TEXT)


@torch.inference_mode()
def through(model, ids, method: str, bits: int):
    """Logits [batch, pos, vocab] of ``ids`` read through the method's cache, and the cache."""
    cache = METHODS[method](model, bits)
    if isinstance(cache, LayerInputCache):
        with cache:
            return logits_through(model, ids, cache, CHUNK), cache
    return logits_through(model, ids, cache, CHUNK), cache


def quality(model, ids, method: str, bits: int) -> dict:
    """Perplexity of ``ids`` [batch, pos] and bytes of one text's cache, as a share of float16."""
    logits, cache = through(model, ids, method, bits)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    full = FULL * ids.numel() / TEXT
    return dict(perplexity=loss.exp().item(), share=bytes_kept(cache) / full)


@torch.inference_mode()
def needles_found(model, tokenizer, method: str, bits: int, seed: int, n: int = 8) -> float:
    """Share of needles in ``TEXT`` tokens whose whole answer is the greedy continuation.

    The last 63 tokens of a prompt wait unpacked; they hold the question, never the needle.
    """
    ids, answers, _ = make_retrieval.needles(tokenizer, n, TEXT, seed)
    cache = METHODS[method](model, bits)
    with cache if isinstance(cache, LayerInputCache) else nullcontext():
        for part in ids[:, :-1].split(CHUNK, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        last = torch.cat([ids[:, -1:], answers[:, :-1]], 1)
        logits = model(last, past_key_values=cache).logits
    return (logits.argmax(-1) == answers).all(1).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/xquant"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")

    for seed in args.seeds:
        ids = texts(tokenizer, seed)
        for method, bits in RUNS:
            path = args.scratch / f"{seed}_{method}_{bits}.json".replace(" ", "_")
            if path.exists():
                continue
            found = quality(model, ids, method, bits)
            found = {k: round(v, 4) for k, v in found.items()}
            row = dict(method=method, setting=f"{bits} bits", bits=bits, seed=seed, **found)
            path.write_text(json.dumps(row))
            print(row, flush=True)
    for seed in args.seeds:
        for method, bits in NEEDLE_RUNS:
            path = args.scratch / f"needle_{seed}_{method}_{bits}.json".replace(" ", "_")
            if not path.exists():
                path.write_text(json.dumps(needles_found(model, tokenizer, method, bits, seed)))
                print(path.stem, path.read_text(), flush=True)
    rows = [json.loads(p.read_text()) for p in sorted(args.scratch.glob("[0-9]_*.json"))]
    for row in rows:
        name = "needle_{seed}_{method}_{bits}.json".format(**row).replace(" ", "_")
        path = args.scratch / name
        row["needle"] = round(json.loads(path.read_text()), 4) if path.exists() else None
    order = {run: i for i, run in enumerate(RUNS)}
    rows.sort(key=lambda r: (order[r["method"], r["bits"]], r["seed"]))
    text = '{"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
    (HERE / "xquant_frontier.json").write_text(text)
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
