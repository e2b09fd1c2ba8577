"""Needles in Moby Dick, the retrieval score of every head, and what masking heads does.

    python data/long_context/make_retrieval.py        # about ten minutes on one core

writes ``retrieval_heads.json`` (three seeds: other needles, hay, depths and random heads).
``needles``, ``read_prompt`` and ``copies`` are also what the chapter and the other scripts use.
"""

import argparse
import copy
import json
import random
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib import datasets, hooks, models

HERE = Path(__file__).resolve().parent
LENGTHS = (256, 512, 1024)  # tokens of a prompt
MASKED = (0, 3, 6, 14, 27)  # heads taken out
TAIL = 40  # tokens at a prompt's end that hold the whole question
N_WORDS = 4  # of an answer

# What is asked; the answer is four words drawn at random, so that nothing but the text tells it.
TEMPLATES = (
    ("What is the secret password of the library?", "The secret password of the library is"),
    ("What did the king of Norway order for breakfast?",
     "The king of Norway ordered for breakfast"),
    ("What is the best thing to see in San Francisco?",
     "The best thing to see in San Francisco is"),
    ("What does Professor Lindqvist keep in her drawer?",
     "Professor Lindqvist keeps in her drawer"),
    ("What was painted on the door of the bakery?", "On the door of the bakery was painted"),
    ("What did the twins bring back from Brazil?", "The twins brought back from Brazil"),
    ("What is the name of the new satellite?", "The name of the new satellite is"),
    ("What does the robot say every morning?", "Every morning the robot says"),
)  # fmt: skip
WORDS = (
    "purple violin lemon copper elephant window seven yellow piano tiger silver orange garden "
    "winter blue chocolate rocket mirror green castle paper sugar dragon camera nine velvet apple "
    "bridge golden monkey coffee butter crystal guitar cotton summer desert pepper lion ticket "
    "pencil engine forest diamond eleven honey basket carpet"
).split()
KNOWN = (
    ("The capital of France is", " Paris"), ("The capital of Germany is", " Berlin"),
    ("The capital of Japan is", " Tokyo"), ("The capital of Russia is", " Moscow"),
    ("The capital of Spain is", " Madrid"), ("The capital of China is", " Beijing"),
    ("The capital of England is", " London"), ("The capital of Greece is", " Athens"),
    ("The capital of Egypt is", " Cairo"), ("The capital of Austria is", " Vienna"),
    ("The opposite of hot is", " cold"), ("The opposite of up is", " down"),
    ("The day after Monday is", " Tuesday"), ("The month after June is", " July"),
    ("The number after seven is", " eight"), ("The first month of the year is", " January"),
    ("Bread is baked from", " flour"), ("Romeo and", " Juliet"),
    ("The Earth goes around the", " Sun"), ("Water is made of hydrogen and", " oxygen"),
    ("The author of Hamlet is William", " Shakespeare"), ("The Eiffel Tower is in", " Paris"),
    ("The largest planet is", " Jupiter"), ("Two plus two equals", " four"),
)  # fmt: skip


# --- prompts ----------------------------------------------------------------------------------


def needles(tokenizer, n: int, length: int, seed: int, depth: float | None = None):
    """Prompts that hide a sentence in Moby Dick and end where its answer begins.

    Args:
        length: tokens of every prompt, question included.
        depth: where the needle lies, 0 (start) to 1 (just before the last ``TAIL`` tokens);
            ``None`` draws it from 0.05 to 0.75.

    Returns:
        ids [n, length], answers [n, 4] and starts [n], the position of each answer's first word
        in its needle. The answer words occur nowhere else in the prompt's needle or question. A
        needle counts as found where every answer token is the model's greedy choice.
    """
    rng = random.Random(1000 * seed + 7)
    begin = (200_000 + 60_000 * seed) % 1_000_000
    hay = tokenizer(datasets.moby_dick()[begin:][: 32 * length]).input_ids
    ids, answers, starts = [], [], []
    head = tokenizer("<|im_start|>user\nRead the text and answer the question.\n\n").input_ids
    for i in range(n):
        question, opening = TEMPLATES[i % len(TEMPLATES)]
        answer = tokenizer("".join(f" {w}" for w in rng.sample(WORDS, N_WORDS))).input_ids
        needle = tokenizer(f" {opening}").input_ids + answer + tokenizer(".").input_ids
        tail = tokenizer(
            f"\n\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n{opening}"
        ).input_ids
        at = rng.uniform(0.05, 0.75) if depth is None else depth
        n_hay = length - len(head) - len(needle) - len(tail)
        start = rng.randrange(len(hay) - n_hay)
        straw = hay[start : start + n_hay]
        room = length - TAIL - len(head) - len(needle)  # the needle ends before the tail begins
        cut = round(at * room)
        ids.append(head + straw[:cut] + needle + straw[cut:] + tail)
        answers.append(answer)
        starts.append(len(head) + cut + len(needle) - 1 - N_WORDS)
    return torch.tensor(ids), torch.tensor(answers), torch.tensor(starts)


@torch.inference_mode()
def read_prompt(model, ids: Tensor, keep: int = 1):
    """Keys and values of all but the last ``keep`` tokens: a cache to be copied before use."""
    return model.model(ids[:, :-keep], use_cache=True).past_key_values


@torch.inference_mode()
def answer(model, cache, ids: Tensor, answers: Tensor, keep: int = 1) -> Tensor:
    """Which answer tokens are the model's greedy choice, given those before: [n, 4] truth values.

    The cache is copied first. All four right is what greedy decoding would have written.
    """
    fed = torch.cat([ids[:, -keep:], answers[:, :-1]], 1)
    out = model(fed, past_key_values=copy.deepcopy(cache), logits_to_keep=N_WORDS)
    return out.logits.argmax(-1) == answers


# --- heads ------------------------------------------------------------------------------------


@torch.inference_mode()
def copies(model, cache, ids: Tensor, answers: Tensor, starts: Tensor) -> Tensor:
    """Where heads copy: [n, 4, layer, head], true where the model writes an answer token and the
    head's strongest key is that very token in the needle."""
    fed = torch.cat([ids[:, -1:], answers[:, :-1]], 1)
    with hooks.capture(model, "pattern") as acts:
        out = model(fed, past_key_values=copy.deepcopy(cache))
    written = out.logits.argmax(-1) == answers  # [n, 4]
    looked = acts.stack("pattern").argmax(-1)  # [layer, n, head, 4]
    place = starts[:, None] + torch.arange(N_WORDS, device=ids.device)
    same = looked == place[None, :, None]
    return (same & written[None, :, None]).permute(1, 3, 0, 2)


@contextmanager
def masked(model, heads):
    """The queries of ``heads``, pairs (layer, head), are zero: they attend to all keys alike."""
    by_layer = {}
    for layer, head in heads:
        by_layer.setdefault(int(layer), []).append(int(head))
    with ExitStack() as stack:
        for layer, chosen in by_layer.items():
            stack.enter_context(hooks.edit(model, f"q.{layer}", hooks.zero(), heads=chosen))
        yield


def ranked(score) -> list[tuple[int, int]]:
    """Heads (layer, head) from the highest score [layer, head] down."""
    score = np.asarray(score)
    order = np.argsort(-score, axis=None, kind="stable")
    return [tuple(int(i) for i in np.unravel_index(o, score.shape)) for o in order]


def random_heads(score, n: int, seed: int, spare: int = 54) -> list[tuple[int, int]]:
    """``n`` heads drawn from all but the ``spare`` highest scores."""
    return random.Random(seed).sample(ranked(score)[spare:], n)


@torch.inference_mode()
def knowledge(model, tokenizer) -> float:
    """The share of ``KNOWN`` sentences that the model completes: knowledge that no text holds."""
    text = tokenizer(
        [prompt for prompt, _ in KNOWN], padding=True, padding_side="right", return_tensors="pt"
    )
    logits = model(
        text.input_ids.to(model.device)
    ).logits.cpu()  # causal: the padding changes nothing
    last = logits[torch.arange(len(KNOWN)), text.attention_mask.sum(1) - 1]
    ends = torch.tensor([tokenizer(end).input_ids[0] for _, end in KNOWN])
    return float((last.argmax(-1) == ends).float().mean())


# --- the experiment ---------------------------------------------------------------------------


def run(model, tokenizer, seed: int, n: int, scratch: Path) -> dict:
    """One seed: scores at each length, and the needle and knowledge under masks."""
    path = scratch / f"retrieval_{seed}.json"
    done = (
        json.loads(path.read_text())
        if path.is_file()
        else {"seed": seed, "score": {}, "active": {}}
    )
    for length in LENGTHS:
        if str(length) in done["score"]:
            continue
        ids, answers, starts = needles(tokenizer, n, length, seed)
        hits = []
        for i in range(0, n, 4):
            part = slice(i, i + 4)
            cache = read_prompt(model, ids[part])
            hits.append(copies(model, cache, ids[part], answers[part], starts[part]))
        each = torch.cat(hits).float().mean(1)  # [n, layer, head]
        done["score"][str(length)] = each.mean(0).numpy().round(4).tolist()
        done["active"][str(length)] = (each > 0).float().mean(0).numpy().round(4).tolist()
        path.write_text(json.dumps(done))
        top = ranked(each.mean(0))[:5]
        print(seed, length, [(h, round(float(each.mean(0)[h]), 2)) for h in top], flush=True)
    # Masks are tested on needles, hay and words that the heads were not chosen on.
    score = np.mean([done["score"][str(length)] for length in LENGTHS], 0)
    rows = done.setdefault("masks", [])
    tried = [(row["heads"], row["kind"]) for row in rows]
    parts = []
    for count in MASKED:
        others = random_heads(score, count, seed)
        for kind, chosen in (("retrieval", ranked(score)[:count]), ("random", others)):
            if (count, kind) in tried:
                continue
            if not parts:
                ids, answers, _ = needles(tokenizer, 2 * n, 512, seed + 10)
                caches = [read_prompt(model, part) for part in ids.split(4)]
                parts = list(zip(caches, ids.split(4), answers.split(4), strict=True))
            with masked(model, chosen):
                right = torch.cat([answer(model, *part) for part in parts])
                known = knowledge(model, tokenizer)
            found, share = (float(x.float().mean()) for x in (right.all(1), right))
            rows.append(dict(heads=count, kind=kind, tokens=share, found=found, known=known))
            print(seed, rows[-1], flush=True)
            path.write_text(json.dumps(done))
    return done


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--n", type=int, default=8, help="needles a length and seed; twice as many are tested"
    )
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/long_context"))
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2", device="cpu")
    seeds = [run(model, tokenizer, seed, args.n, args.scratch) for seed in range(3)]
    (HERE / "retrieval_heads.json").write_text(json.dumps({"n": args.n, "seeds": seeds}))


if __name__ == "__main__":
    main()
