"""AttentionInfluence on SmolLM2: what a text loses when the retrieval heads are masked.

    python data/long_context/make_influence.py        # about ten minutes on one core

writes ``influence_texts.json`` (the passages) and ``influence.json`` (their losses under every
mask, three seeds). ``passages``, ``proxy`` and ``losses`` are also what the chapter uses.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_retrieval as retrieval

from lib import datasets, hooks, models

HERE = Path(__file__).resolve().parent
LENGTH = 128  # tokens of a passage
SHARE = 0.05  # of the heads are masked, as in the paper
REASONING = ("arithmetic", "recall", "code", "proof")
PLAIN = ("narrative", "description")
CONTROL = ("scrambled arithmetic", "repeated narrative")
NAMES = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis".split()
THINGS = "apples coins stamps books pens shells cards marbles".split()


# --- passages ---------------------------------------------------------------------------------


def arithmetic(rng: random.Random, sound: bool = True) -> str:
    """A word problem worked step by step; not ``sound``: every result is some number."""
    lines = []
    for _ in range(6):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        a, b, c = rng.randint(12, 60), rng.randint(2, 11), rng.randint(2, 9)
        left, worth, before = a - b, (a - b) * c, (a - b) * c + b
        if not sound:
            left, worth, before = (rng.randint(2, high) for high in (58, 500, 500))
        first = (
            f"{name} has {a} {thing} and gives {b} away, so {a} - {b} = {left} are left. Each is "
            f"worth {c} cents, and {left} * {c} = {worth}, so they are worth {worth} cents."
        )
        second = (
            f"If {name} buys {c} boxes of {left} {thing}, that makes {c} * {left} = {worth}. "
            f"Before losing {b} there were {worth} + {b} = {before} {thing}."
        )
        lines.append(rng.choice((first, second)))
    return " ".join(lines)


def recall(rng: random.Random) -> str:
    """A table of keys and values, then questions about it with their answers."""
    keys = rng.sample(NAMES, 9)
    values = {k: f"{rng.randint(100, 999)}{rng.choice('ABCDEFGH')}" for k in keys}
    table = ", ".join(f"{k}: {v}" for k, v in values.items())
    asked = rng.sample(keys, 8)
    questions = " ".join(f"What is the number of {k}? It is {values[k]}." for k in asked)
    return f"Room numbers of the guests. {table}. {questions}"


def proof(rng: random.Random) -> str:
    """Chains of implications, each conclusion drawn from what was said before."""
    out = []
    for _ in range(3):
        words = rng.sample("blip crag dorn flim gost harn jelk kimp lorn morv nesk prax".split(), 5)
        name = rng.choice(NAMES)
        facts = [f"Every {a} is a {b}." for a, b in zip(words, words[1:], strict=False)]
        said = [f"{name} is a {words[0]}."]
        steps = [
            f"Since {name} is a {a} and every {a} is a {b}, {name} is a {b}."
            for a, b in zip(words, words[1:], strict=False)
        ]
        rng.shuffle(facts)
        out.append(" ".join(facts + said + steps + [f"Therefore {name} is a {words[-1]}."]))
    return " ".join(out)


def code(rng: random.Random) -> str:
    """Functions of this library, from a random line on."""
    files = sorted((HERE.parents[1] / "lib").glob("*.py"))
    lines = rng.choice([f for f in files if f.stat().st_size > 4000]).read_text().splitlines()
    start = rng.randrange(20, len(lines) - 60)
    return "\n".join(lines[start : start + 60])


def novel(rng: random.Random) -> str:
    """Moby Dick from a random sentence of its story on."""
    text = datasets.moby_dick()
    start = rng.randrange(100_000, len(text) - 20_000)
    start = text.index(". ", start) + 2
    return " ".join(text[start : start + 2000].split())


def description(rng: random.Random) -> str:
    """Plain statements without a step from one to the next."""
    places = "harbour valley market forest station village island bridge garden castle".split()
    looks = "quiet old green busy grey wide narrow sunny cold famous".split()
    has = "a small church", "many boats", "old trees", "a stone wall", "two cafés", "a long street"
    out = []
    for _ in range(17):
        place, look, other = rng.choice(places), rng.choice(looks), rng.choice(looks)
        town = rng.choice("Lyon Bergen Porto Graz Ghent Turku".split())
        time = rng.choice("morning evening summer winter".split())
        sentences = (
            f"The {place} near {town} is {look} and {other}.",
            f"{rng.choice(NAMES)} likes the {look} {place}, which has {rng.choice(has)}.",
            f"In the {time} the {place} is {look}.",
        )
        out.append(rng.choice(sentences))
    return " ".join(out)


def passages(n: int, seed: int) -> dict[str, list[str]]:
    """``n`` texts of each kind, each longer than ``LENGTH`` tokens."""
    rng = random.Random(seed)
    makers = {
        "arithmetic": arithmetic, "recall": recall, "code": code, "proof": proof,
        "narrative": novel, "description": description,
        "scrambled arithmetic": lambda r: arithmetic(r, sound=False),
    }  # fmt: skip
    out = {kind: [make(rng) for _ in range(n)] for kind, make in makers.items()}
    out["repeated narrative"] = []
    for text in out["narrative"]:  # the same tale told twice: nothing to reason, all to copy
        half = " ".join(text.split()[:44])
        out["repeated narrative"].append(f"{half} {half} {half} {half}")
    return out


def tokens(tokenizer, texts: list[str]) -> Tensor:
    """The first ``LENGTH`` tokens of each text: [n, LENGTH]."""
    ids = [tokenizer(text).input_ids[:LENGTH] for text in texts]
    short = [text[:40] for text, row in zip(texts, ids, strict=True) if len(row) < LENGTH]
    if short:
        raise ValueError(f"texts shorter than {LENGTH} tokens: {short}")
    return torch.tensor(ids)


# --- the paper's proxy task and score ---------------------------------------------------------


def proxy(tokenizer, n: int, seed: int, n_pairs: int = 8):
    """The paper's search task in small: a JSON object of hashes and sentences, three examples, a
    key to look up. Same form as ``retrieval.needles``: ids, answers and starts, all prompts cut
    to the shortest from the left of the object."""
    rng = random.Random(1000 * seed + 3)
    rows = []
    for _ in range(n):
        pairs = {}
        while len(pairs) < n_pairs:
            key = "".join(rng.choice("0123456789abcdef") for _ in range(8))
            pairs[key] = "".join(f" {w}" for w in rng.sample(retrieval.WORDS, retrieval.N_WORDS))
        keys = list(pairs)
        asked = rng.sample(keys, 4)
        ids, at = tokenizer("{").input_ids, {}
        for key, value in pairs.items():
            ids += tokenizer(f'"{key}":').input_ids
            at[key] = len(ids)
            ids += tokenizer(value).input_ids + tokenizer(",\n").input_ids
        ids += tokenizer("}\n").input_ids
        for key in asked[:-1]:
            ids += tokenizer(f"Key: {key}\nValue:{pairs[key]}\n").input_ids
        ids += tokenizer(f"Key: {asked[-1]}\nValue:").input_ids
        rows.append((ids, tokenizer(pairs[asked[-1]]).input_ids, at[asked[-1]]))
    size = max(len(ids) for ids, _, _ in rows)
    pad = tokenizer("\n").input_ids  # in front, so that all prompts end together
    return (
        torch.tensor([pad * (size - len(ids)) + ids for ids, _, _ in rows]),
        torch.tensor([a for _, a, _ in rows]),
        torch.tensor([start + size - len(ids) for ids, _, start in rows]),
    )


@torch.inference_mode()
def losses(model, ids: Tensor, heads=(), batch: int = 8) -> Tensor:
    """Mean next-token loss of each passage with ``heads`` masked: [n], in nats."""
    out = []
    with retrieval.masked(model, heads):
        for part in ids.split(batch):
            logits = model(part).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            out.append(loss.view(len(part), -1).mean(1))
    return torch.cat(out)


# --- the experiment ---------------------------------------------------------------------------


def run(model, tokenizer, seed: int, n: int, scratch: Path) -> dict:
    path = scratch / f"influence_{seed}.json"
    done = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "loss": {}}
    n_heads = hooks.shape(model)["n_layers"] * hooks.shape(model)["n_heads"]
    count = round(SHARE * n_heads)
    if "score" not in done:
        ids, answers, starts = proxy(tokenizer, 12, seed)
        hits = []
        for i in range(0, 12, 4):
            part = slice(i, i + 4)
            cache = retrieval.read_prompt(model, ids[part])
            hits.append(retrieval.copies(model, cache, ids[part], answers[part], starts[part]))
        score = torch.cat(hits).float().mean((0, 1))
        # The library's code changes; the passages that were shipped stay.
        shipped = HERE / "influence_texts.json"
        texts = json.loads(shipped.read_text()) if shipped.is_file() else None
        texts = texts[seed] if texts else passages(n, seed)
        done |= dict(score=score.numpy().round(4).tolist(), texts=texts)
        print(
            seed,
            "proxy",
            [(h, round(float(score[h]), 2)) for h in retrieval.ranked(score)[:count]],
            flush=True,
        )
        path.write_text(json.dumps(done))
    masks = {"none": [], "retrieval": retrieval.ranked(done["score"])[:count]}
    masks["random"] = retrieval.random_heads(done["score"], count, seed)
    done["heads"] = {name: [list(h) for h in heads] for name, heads in masks.items()}
    for kind, texts in done["texts"].items():
        ids = tokens(tokenizer, texts)
        for name, heads in masks.items():
            key = f"{kind}/{name}"
            if key not in done["loss"]:
                done["loss"][key] = [round(float(x), 4) for x in losses(model, ids, heads)]
                path.write_text(json.dumps(done))
        base, ref, rand = (torch.tensor(done["loss"][f"{kind}/{m}"]) for m in masks)
        ours, other = (float(((x - base) / base).mean()) for x in (ref, rand))
        print(f"{seed} {kind:22s} {base.mean():.2f} {ours:.3f} {other:.3f}", flush=True)
    return done


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=6, help="passages a kind and seed")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/long_context"))
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2", device="cpu")
    seeds = [run(model, tokenizer, seed, args.n, args.scratch) for seed in range(3)]
    texts = [one.pop("texts") for one in seeds]
    (HERE / "influence_texts.json").write_text(json.dumps(texts, ensure_ascii=False, indent=0))
    (HERE / "influence.json").write_text(json.dumps({"n": args.n, "seeds": seeds}))


if __name__ == "__main__":
    main()
