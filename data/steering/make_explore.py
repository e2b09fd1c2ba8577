"""Precompute the states of the chapter's explore panel: explore_states.json (about 4 minutes)."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import make_lineas  # noqa: E402

from lib import datasets, hooks, models, steering  # noqa: E402

LAYERS = (6, 14, 22)
STRENGTHS = (-2, -1, 0, 1, 2, 4)
OPENERS = ("The weekend began with", "My neighbour told me that", "When the door opened, we saw")
JUDGES = {
    "praise": ("sentiment, −1 to 1", steering.sentiment),
    "clean speech": ("chance that it is clean, 0 to 1", lambda said: 1 - steering.profanity(said)),
    "the sea": (
        "nearness to “ships, whales and the sea”, cosine",
        lambda said: steering.topic(said, ["ships, whales and the sea"])[:, 0],
    ),
}


def texts() -> dict[str, tuple[list[str], list[str]]]:
    """concept -> sentences that have it, and sentences that lack it."""
    pool = make_lineas.prompts()
    plain = pool["sentiment"]["source"][:16] + pool["sentiment"]["target"][:16]
    book = datasets.moby_dick()[300_000:340_000].replace("\n", " ")
    sea = [s.strip() + "." for s in book.split(".") if 40 < len(s) < 120]
    sea = [s for s in sea if any(w in s for w in ("whale", "ship", "sea", "boat", "sail"))]
    return {
        "praise": (pool["sentiment"]["target"], pool["sentiment"]["source"]),
        "clean speech": (pool["civility"]["target"], pool["civility"]["source"]),
        "the sea": (sea[:32], plain),
    }


@torch.no_grad()
def means(model, tokenizer, sentences) -> dict[int, torch.Tensor]:
    """Mean activations after the blocks in LAYERS, over tokens but the first: [n, d] each."""
    inputs, weights = make_lineas.tokens(tokenizer, sentences, model.device)
    names = [f"resid_post.{layer}" for layer in LAYERS]
    acts = hooks.read(model, inputs, names)
    return {i: make_lineas.pool(acts[f"resid_post.{i}"], weights) for i in LAYERS}


def main(argv=None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    model, tokenizer = models.load("smollm2", dtype=torch.bfloat16)
    ids = make_lineas.prose(tokenizer, n=2, device=model.device)
    states = []
    for concept, (to, away) in texts().items():
        print(concept, len(to), len(away), flush=True)
        h_to, h_away = (means(model, tokenizer, side) for side in (to, away))
        for layer, strength in itertools.product(LAYERS, STRENGTHS):
            vector = {f"resid_post.{layer}": steering.mean_difference(h_to[layer], h_away[layer])}

            def context(vector=vector, strength=strength):
                return steering.steered(model, vector, strength)

            with context():
                said = steering.generate(model, tokenizer, OPENERS, n_new=20, chat=False)
            cost = steering.cost(model, ids, context)
            scores = JUDGES[concept][1](said)
            states.append(
                dict(concept=concept, layer=layer, strength=strength, said=said,
                     scores=[round(float(s), 2) for s in scores], kl=round(cost["kl"], 3),
                     perplexity=round(cost["perplexity"], 1))
            )  # fmt: skip
            print({k: states[-1][k] for k in ("layer", "strength", "scores", "kl")}, flush=True)
    text = ",\n".join(json.dumps(state, ensure_ascii=False) for state in states)
    out = f'{{"openers": {json.dumps(OPENERS)},\n"states": [\n{text}\n]}}\n'
    (HERE / "explore_states.json").write_text(out, encoding="utf-8")


if __name__ == "__main__":
    main()
