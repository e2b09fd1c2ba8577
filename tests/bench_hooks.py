"""What hooks cost: SmolLM2, one prompt, every way of reading activations in one run.

Run by ``make bench``. Each round times every way once, in an order that changes, so that a slow
moment of the machine falls on all alike; the table shows medians of the ratio to the plain forward.
"""

import random
import statistics
import sys
import time

import torch

from lib import datasets, hooks, models

ROUNDS = 40
LENGTHS = (14, 128)  # tokens: a patching prompt, a paragraph


def ways(model, tokenizer, length: int) -> dict:
    """name -> a function that runs one forward that way; peers that do not import are left out."""
    text = tokenizer(datasets.moby_dick()[50_000:60_000], return_tensors="pt")
    inputs = {key: value[:, :length] for key, value in text.items()}
    blocks = model.model.layers

    def plain():
        return model(**inputs)

    def torch_hooks():
        kept = {}
        handles = [
            block.register_forward_hook(lambda m, a, y, i=i: kept.__setitem__(i, y))
            for i, block in enumerate(blocks)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()

    def ours_residual():
        with hooks.capture(model, "resid_post"):
            model(**inputs)

    fused = [s for s in hooks.sites(model) if not s.startswith(("scores", "pattern"))]

    def ours_most():
        with hooks.capture(model, fused):
            model(**inputs)

    def ours_everything():
        with hooks.capture(model, hooks.sites(model)):
            model(**inputs)

    def ours_half():
        hooks.read(model, inputs, "resid_post.14")

    found = {
        "plain forward": plain,
        "register_forward_hook, residual stream": torch_hooks,
        "lib.hooks, residual stream": ours_residual,
        "lib.hooks, every site but scores and patterns": ours_most,
        "lib.hooks, every site": ours_everything,
        "lib.hooks.read, residual stream after layer 14 of 30": ours_half,
    }
    try:
        found |= peers(model, tokenizer, inputs)
    except ImportError as error:
        print(f"peers left out: {error}", file=sys.stderr)
    return found


def peers(model, tokenizer, inputs) -> dict:
    import nnsight

    wrapped = nnsight.LanguageModel(model, tokenizer=tokenizer)

    def nnsight_residual():
        with wrapped.trace(inputs["input_ids"]):
            kept = [block.output.save() for block in wrapped.model.layers]  # noqa: F841

    import pyvene

    config = pyvene.IntervenableConfig(
        [
            {
                "layer": i,
                "component": "block_output",
                "intervention_type": pyvene.CollectIntervention,
            }
            for i in range(len(model.model.layers))
        ]
    )
    collector = pyvene.IntervenableModel(config, model=model)
    n = inputs["input_ids"].shape[1]

    def pyvene_residual():
        collector(dict(inputs), unit_locations={"base": list(range(n))})

    return {
        "nnsight, residual stream": nnsight_residual,
        "pyvene, residual stream": pyvene_residual,
    }


@torch.inference_mode()
def main() -> None:
    model, tokenizer = models.load("smollm2", device="cpu")
    for length in LENGTHS:
        race(ways(model, tokenizer, length), length)


def race(runs: dict, length: int) -> None:
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as error:  # a peer that breaks is named, not dropped in silence
            print(f"{name}: fails here ({type(error).__name__}: {str(error)[:100]})")
            del runs[name]
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    base = seconds["plain forward"]
    print(f"{f'{length} tokens':55}  ms   ratio to the plain forward (median of {ROUNDS})")
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        print(f"{name:55} {1000 * statistics.median(times):5.1f}  {ratio:.3f}")


if __name__ == "__main__":
    main()
