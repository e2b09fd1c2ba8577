"""Caches of SmolLM2: bytes, loss and time of a decode step with 768 tokens of Moby Dick kept.

``error`` is the loss above the float32 cache's in nats, over 832 tokens read through the cache
128 at a time; beside it the spread of that over the passages of 128. "kept" is measured on the
cache after the decode steps, the float window included; "packed" is what one more token will cost.
"""

import sys
from contextlib import ExitStack
from functools import partial

import torch
from transformers import DynamicCache, QuantizedCache

from lib import datasets, models
from lib.kernels import bitpack
from lib.kernels.dispatch import using
from lib.kernels.layer_input_cache import LayerInputCache
from lib.kernels.quantized_cache import QuantizedKVCache, bytes_kept
from tests.bench_kernels.common import Row, compare, race

KEPT, CHUNK = 768, 128
BASE = "DynamicCache float32"


def rows() -> list[Row]:
    for package in ("optimum.quanto", "hqq"):
        try:
            __import__(package)
        except ImportError:
            print(f"no {package}: transformers' backend of that name is not shown", file=sys.stderr)
    return _unpacking() + _decoding()


def _unpacking() -> list[Row]:
    """The kernel alone: one layer's keys or values of 4,096 tokens."""
    found = []
    x = torch.randn(1, 4096, 192, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    for bits in (2, 3, 4, 8):
        for per in ("channel", "token"):
            packed = bitpack.quantize(x, bits, 64, per)

            def unpack(backend, packed=packed, bits=bits, per=per):
                with using(backend):
                    bitpack.dequantize(packed, bits, 64, per, out)

            ways = {
                "reference": partial(unpack, "reference"),
                "ours, Numba": partial(unpack, "cpu"),
            }
            times = compare(race(ways, rounds=7, seconds=0.5), "reference")
            moved = sum(t.nbytes for t in packed) + x.nbytes
            for way, (seconds, ratio) in times.items():
                shape = f"unpack 4,096 × 192, {bits} bits a {per}"
                found.append(Row(shape, way, seconds, ratio, "reference", bytes=moved))
    return found


def _decoding() -> list[Row]:
    model, tokenizer = models.load("smollm2", device="cpu")
    text = tokenizer(datasets.moby_dick()[60_000:70_000], return_tensors="pt").input_ids
    text = text[:, : KEPT + 65]
    inputs = partial(LayerInputCache, model)
    ways = {
        BASE: DynamicCache,
        "transformers fp8": partial(QuantizedCache, "fp8", model.config),
        **{f"ours, K and V, {b} bits": partial(QuantizedKVCache, model, b) for b in (4, 2)},
        **{f"ours, XQuant, {b} bits": partial(inputs, b) for b in (4, 2)},
        **{f"ours, XQuant latents, {b} bits": partial(inputs, b, latents=True) for b in (4, 2)},
        "ours, XQuant-CL, 2 bits": partial(inputs, 2, cross_layer=True),
        "ours, XQuant-CL latents, 2 bits": partial(inputs, 2, latents=True, cross_layer=True),
    }
    quality, steps, caches, packed = {}, {}, {}, {}
    with ExitStack() as stack, torch.inference_mode():
        for way, make in ways.items():
            cache = caches[way] = make()
            if isinstance(cache, LayerInputCache):
                stack.enter_context(cache)
            logits, sizes = [], {}
            for part in text[:, :-1].split(CHUNK, 1):
                logits.append(model(part, past_key_values=cache).logits[0])
                sizes[cache.get_seq_length()] = bytes_kept(cache)
            packed[way] = (sizes[KEPT] - sizes[KEPT - CHUNK]) / CHUNK
            logits = torch.cat(logits)
            losses = torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="none")
            quality[way] = losses, logits.argmax(-1)
            steps[way] = lambda c=cache: model(text[:, -1:], past_key_values=c)
        times = compare(race(steps, rounds=5, seconds=8), BASE)
    weights = sum(p.nbytes for p in model.parameters())
    found = []
    for way, (seconds, ratio) in times.items():
        above = quality[way][0] - quality[BASE][0]
        cache = caches[way]
        more = {
            "bytes a token, kept": bytes_kept(cache) / cache.get_seq_length(),
            "packed": packed[way],
            "perplexity": float(quality[way][0].mean().exp()),
            "± nats": float(above[CHUNK:KEPT].view(-1, CHUNK).mean(1).std()),
            "same greedy token": float((quality[way][1] == quality[BASE][1]).float().mean()),
        }
        if getattr(cache, "factor_bytes", 0):
            more["MB of factors"] = cache.factor_bytes / 1e6
        found.append(
            Row(
                f"decode, {KEPT} kept",
                way,
                seconds,
                ratio,
                BASE,
                bytes=weights + bytes_kept(cache),
                error=float(above.mean()),
                note="nats above float32",
                more=more,
            )
        )
    return found
