"""Train small RoPE models at 128 tokens, change their rotary basis, extend and test them.

    python data/long_context/make_giraffe.py --scratch /tmp/giraffe --seeds 0 1 2

A seed is a model of its own, with other weights to begin with and other texts to be trained and
tested on. Resumable: models and rows stay in the scratch folder. Writes
``giraffe_results.json`` (a row a method, evaluation basis, task, length and seed) and
``giraffe_models.safetensors`` (float16: the base model and the one extended by linear scaling).

The text is made of three kinds of documents, one for each of the paper's task styles (arXiv
2308.10882): lines to look up, and prose with facts about people in it, of two kinds: where someone
lives (a word, mostly known from training: FreeFormQA) and a number (AlteredNumericQA). A person's
place and number are fixed in "the world"; a document tells the world's value or, in half of the
cases, another one, and the right answer is always the document's.
"""

import argparse
import json
import math
import random
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lib import datasets, models

HERE = Path(__file__).resolve().parent
LENGTH, LONGER = 128, 256  # tokens: of pretraining and of extension
LENGTHS = (64, 128, 256, 512, 1024)
BASE = 500.0  # half of the frequencies turn once or more within 128 tokens
STEPS, SHORT, EXTRA = 1200, 300, 200  # SHORT: the first steps, on documents a quarter as long

# The vocabulary: characters of prose, numbers, four signs, places, people, names of lines.
CHARS = "abcdefghijklmnopqrstuvwxyz ."
VALUE = len(CHARS)
LINE, ASK, LIVES, NUMBER = range(VALUE + 100, VALUE + 104)
PLACE = VALUE + 104
PERSON = PLACE + 32
NAME = PERSON + 64
VOCAB = NAME + 360
_draw = random.Random(7)
HOMES = [PLACE + _draw.randrange(32) for _ in range(64)]
NUMBERS = [VALUE + _draw.randrange(100) for _ in range(64)]


def prose(held_out: bool) -> list[int]:
    """Moby Dick as tokens: its last tenth is held out."""
    text = " ".join(datasets.moby_dick().lower().split())
    at = len(text) * 9 // 10
    found = text[at:] if held_out else text[:at]
    return [CHARS.index(c) for c in found if c in CHARS]


# --- documents: (tokens, which of them are scored) ------------------------------------------------


def lines(rng: random.Random, length: int, n_asked: int | None = None):
    """Lines of a name and a number, then questions for some of the names."""
    total = length // 3
    asked = n_asked or rng.randint(total // 4, 9 * total // 10)
    names = rng.sample(range(NAME, VOCAB), total - asked)
    values = {n: VALUE + rng.randrange(100) for n in names}
    questions = rng.choices(names, k=asked)
    tokens = [t for n in names for t in (LINE, n, values[n])]
    tokens += [t for n in questions for t in (ASK, n, values[n])]
    pad = length - len(tokens)
    return [LINE] * pad + tokens, [0] * (pad + 3 * len(names)) + [0, 0, 1] * asked


def fact(rng: random.Random, person: int, kind: int, altered: bool) -> int:
    """What a document says of a person: the world's value, or another."""
    known, first, n = (HOMES[person], PLACE, 32) if kind == LIVES else (NUMBERS[person], VALUE, 100)
    other = rng.choice([v for v in range(first, first + n) if v != known])
    return other if altered else known


def story(rng, length: int, text: list[int], altered: float = 0.5, kinds=(LIVES, NUMBER),
          n_asked: int | None = None, closed: float = 0.15):  # fmt: skip
    """Prose with one fact in 32 tokens, then questions about them.

    Args:
        altered: the share of facts that are not the world's.
        closed: the share of questions about a person of whom nothing was said.
    """
    n_facts = max(2, length // 32)
    asked = n_asked or rng.randint(n_facts, 3 * n_facts)
    people = rng.sample(range(64), n_facts + 4)
    told = [(p, rng.choice(kinds)) for p in people[:n_facts]]
    values = {p: fact(rng, p, kind, rng.random() < altered) for p, kind in told}
    questions = []
    for _ in range(asked):
        p, kind = rng.choice(told)
        value = values[p]
        if rng.random() < closed:
            p, kind = rng.choice(people[n_facts:]), rng.choice(kinds)
            value = fact(rng, p, kind, False)
        questions += [ASK, kind, PERSON + p, value]
    facts = [[kind, PERSON + p, values[p]] for p, kind in told]
    room = length - len(questions) - 3 * n_facts
    start = rng.randrange(len(text) - room)
    cuts = sorted(rng.randrange(room + 1) for _ in facts)
    tokens, scored, at = [], [], 0
    for cut, said in zip((*cuts, room), (*facts, []), strict=True):
        tokens += text[start + at : start + cut] + said
        scored += [1] * (cut - at) + [0] * len(said)
        at = cut
    return tokens + questions, scored + [0, 0, 0, 1] * asked


def plain(rng, length: int, text: list[int]):
    start = rng.randrange(len(text) - length)
    return text[start : start + length], [1] * length


def repeated(rng, length: int):
    """Names and numbers without order, said again and again: what looking up is learnt on first."""
    period = rng.randint(4, length // 2)
    part = rng.sample([*range(VALUE, LINE), *range(NAME, VOCAB)], period)
    tokens = (part * (length // period + 1))[:length]
    return tokens, [0] * period + [1] * (length - period)


def batch(rng, n: int, length: int, text: list[int]):
    """Training documents; ``length`` below the trained one: half of them repeat themselves.

    Returns ids and targets (-100: not scored).
    """
    made = []
    for _ in range(n):
        if length < LENGTH and rng.random() < 0.5:
            made.append(repeated(rng, length))
            continue
        u = rng.random()
        made.append(
            lines(rng, length)
            if u < 0.5
            else story(rng, length, text)
            if u < 0.9
            else plain(rng, length, text)
        )
    return tensors(made)


def tensors(made):
    ids = torch.tensor([tokens for tokens, _ in made])
    return ids, ids.masked_fill(torch.tensor([scored for _, scored in made]) == 0, -100)


def loss_of(logits, targets):
    """A quarter of the mean loss of prose plus the mean loss of answers, next token."""
    targets = targets[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    letters, answers = (targets >= 0) & (targets < VALUE), targets >= VALUE
    return 0.25 * (losses * letters).sum() / letters.sum().clamp(min=1) + (
        losses * answers
    ).sum() / answers.sum().clamp(min=1)


# --- bases ----------------------------------------------------------------------------------------


def theta(d_head: int = 32, base: float = BASE) -> torch.Tensor:
    """RoPE's angles a token, fastest first: [d_head / 2]."""
    return base ** (-torch.arange(0, d_head, 2) / d_head)


def linear(angles, scale: float):
    return angles / scale


def power(angles, k: float = 0.5):
    """Low frequencies are stretched more than high ones."""
    return angles * (1 - torch.arange(len(angles)) / len(angles)) ** k


def truncated(angles, length: int = LENGTH):
    """Kept if they turn once within ``length``; slower ones share an angle; the slowest rest."""
    keep = 2 * math.pi / length
    slow = torch.full_like(angles, keep / 16)
    return torch.where(angles >= keep, angles, torch.where(angles > keep / 8, slow, 0 * angles))


def ntk(scale: float, d_head: int = 32, base: float = BASE):
    """A larger base: the slowest angle is divided by the scale, the fastest is kept."""
    return theta(d_head, base * scale ** (d_head / (d_head - 2)))


@contextmanager
def rotating(model, angles):
    """The model with these rotary angles instead of its own."""
    rotary = model.get_decoder().rotary_emb
    before = rotary.inv_freq
    rotary.inv_freq = angles.to(before)
    try:
        yield model
    finally:
        rotary.inv_freq = before


BASES = {
    "none": theta(),
    "linear 4": linear(theta(), 4),
    "linear 8": linear(theta(), 8),
    "power 0.5": power(theta()),
    "truncated": truncated(theta()),
    "NTK 4": ntk(4),
}
EXTENDED = ("none", "linear 4", "power 0.5", "truncated")  # fine-tuned at 256 tokens
# With which basis each model is read: (trained basis, basis at evaluation).
READ = [("base", b) for b in ("none", "linear 4", "power 0.5", "truncated", "NTK 4")]
READ += [(b, b) for b in EXTENDED] + [("linear 4", "linear 8")]


MOMENTS = ("exp_avg", "exp_avg_sq")


# --- model, training, tests -----------------------------------------------------------------------


def build(seed: int = 0):
    """Two layers of Llama, with each token's embedding mixed into the next one's.

    Such a smear (arXiv 2209.11895) spares the model the head that looks one token back, so that a
    lookup takes one head, and is learnt in minutes.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=2048,
        rope_parameters=dict(rope_type="default", rope_theta=BASE), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, initializer_range=0.06,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    embedding = model.get_input_embeddings()
    embedding.smear = torch.nn.Linear(96, 96, bias=False)
    embedding.register_forward_hook(
        lambda module, args, x: x + F.pad(module.smear(x), (0, 0, 1, 0))[:, :-1]
    )
    return model


def train(model, seed: int, steps: int, length: int, n: int, rate: float, text, state: Path):
    """AdamW with a cosine; every 250 steps its state is saved, so that it can go on from there.

    Pretraining begins with documents a quarter as long, on which looking up is learnt faster.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    weights = list(model.parameters())
    done, warm = 0, min(100, steps // 5)
    if state.exists():
        saved = load_file(state)
        done = int(saved["done"])
        for i, w in enumerate(weights):
            w.data.copy_(saved[f"{i}.w"])
            step = torch.tensor(float(done))
            optimizer.state[w] = dict(step=step, **{k: saved[f"{i}.{k}"] for k in MOMENTS})
    model.train()
    for step in range(done, steps):
        # A step's documents depend neither on the steps before nor, in extension, on the basis.
        rng = random.Random(f"{seed} {length} {step}")
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warm) * cosine
        short = 4 if length == LENGTH and step < SHORT else 1
        ids, targets = batch(rng, n * short, length // short, text)
        loss = loss_of(model(ids).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"  seed {seed}, step {step + 1}: loss {loss.item():.3f}", flush=True)
            saved = {"done": torch.tensor(step + 1)}
            for i, w in enumerate(weights):
                moments = {f"{i}.{k}": optimizer.state[w][k] for k in MOMENTS}
                saved |= {f"{i}.w": w.data.clone(), **moments}
            save_file(saved, state)
    return model.eval()


def tests(length: int, n: int, text: list[int], seed: int = 0) -> dict:
    """Held-out documents of each task: name -> (ids, targets), n of each."""
    few = min(8, length // 16)
    kinds = {
        "lines": lambda rng: lines(rng, length, few),
        "free form": lambda rng: story(rng, length, text, 0.0, (LIVES,), few, 0.0),
        "altered": lambda rng: story(rng, length, text, 1.0, (NUMBER,), few, 0.0),
        "prose": lambda rng: plain(rng, length, text),
    }
    made = {}
    for task, document in kinds.items():
        rng = random.Random(f"{seed} {length} {task}")
        made[task] = tensors([document(rng) for _ in range(n)])
    return made


@torch.inference_mode()
def score(model, ids, targets, task: str) -> float:
    """Share of right answers (arg max); for prose: nats a character over the second half."""
    keep = ids.shape[1] // 2 + 1 if task == "prose" else min(65, ids.shape[1])
    logits = model(ids, logits_to_keep=keep).logits[:, :-1].flatten(0, 1)
    targets = targets[:, 1 - keep :].flatten()
    if task == "prose":
        return F.cross_entropy(logits, targets).item()
    answers = targets >= VALUE
    return (logits.argmax(-1) == targets)[answers].float().mean().item()


def evaluate(model, text, n: int, seed: int, lengths=LENGTHS) -> list[dict]:
    rows = []
    for length in lengths:
        for task, (ids, targets) in tests(length, n, text, seed).items():
            parts = [
                score(model, *pair, task)
                for pair in zip(ids.split(16), targets.split(16), strict=True)
            ]
            rows.append(dict(task=task, length=length, value=round(sum(parts) / len(parts), 4)))
    return rows


# --- SmolLM2: a short text with a hole in its positions ----------------------------------------

HOLES = (
    0,
    6_000,
    12_000,
    24_000,
)  # positions skipped before the question; SmolLM2 was trained at 8,192
FAR = ("none", "linear 4", "power 0.5", "truncated", "NTK 4")


def far_bases(model) -> dict:
    """SmolLM2's angles under each basis."""
    config = model.config
    own, base = model.get_decoder().rotary_emb.inv_freq, config.rope_parameters["rope_theta"]
    return {
        "none": own,
        "linear 4": linear(own, 4),
        "power 0.5": power(own),
        "truncated": truncated(own, config.max_position_embeddings),
        "NTK 4": ntk(4, 2 * len(own), base),
    }


@torch.inference_mode()
def across(model, ids, hole: int, end: int, keep: int):
    """Logits of the last ``keep`` tokens of ``ids``, whose last ``end`` lie ``hole`` positions on.

    The text before the hole is read as it is; relative positions across it are what a text of
    ``hole`` more tokens would have, without the tokens.
    """
    positions = torch.arange(ids.shape[1])
    positions[-end:] += hole
    where = positions.expand(len(ids), -1)
    # With a mask of its own, transformers does not take the jump for the start of another text.
    mask = torch.ones_like(ids)
    return model(ids, attention_mask=mask, position_ids=where, logits_to_keep=keep).logits


def smollm2(scratch: Path, seeds) -> list[dict]:
    """Loss of 64 tokens of prose after 256 tokens and a hole: a row a basis, hole and seed.

    The basis "alone" is the reference: the 64 tokens with nothing but one token before them.
    """
    model, tokenizer = models.load("smollm2")
    bases, rows = far_bases(model), []
    for seed in seeds:
        text = datasets.moby_dick()[400_000 + 100_000 * seed :][:4_000]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :640].view(2, 320)
        for basis, hole in [("alone", 0)] + [(b, hole) for b in FAR for hole in HOLES]:
            path = scratch / f"far_{seed}_{basis}_{hole}.json".replace(" ", "_")
            if not path.exists():
                with rotating(model, bases.get(basis, bases["none"])):
                    read = ids[:, -65:] if basis == "alone" else ids
                    logits = across(model, read, hole, 64, 65)[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, -64:].flatten()).item()
                row = dict(basis=basis, hole=hole, seed=seed, loss=round(loss, 4))
                path.write_text(json.dumps(row))
                print(row, flush=True)
            rows.append(json.loads(path.read_text()))
    return rows


def save_rows(rows: list[dict], name: str) -> None:
    text = ",\n".join(json.dumps(r) for r in rows)
    (HERE / name).write_text('{"rows": [\n' + text + "\n]}\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/giraffe"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=16, help="documents a test")
    parser.add_argument("--smollm2", action="store_true", help="only SmolLM2 across a hole")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.smollm2:
        save_rows(smollm2(args.scratch, args.seeds), "giraffe_smollm2.json")
        return
    text, unseen = prose(False), prose(True)

    def made(seed, name, start=None):
        path = args.scratch / f"{seed}_{name.replace(' ', '_')}.safetensors"
        model = build(seed)
        if path.exists():
            model.load_state_dict(load_file(path), strict=False)
            return model.eval()
        going = args.scratch / f"going_{path.name}"
        if start is None:
            train(model, seed, STEPS, LENGTH, 8, 3e-3, text, going)
        else:
            model.load_state_dict(start.state_dict())
            with rotating(model, BASES[name]):
                train(model, seed, EXTRA, LONGER, 4, 1e-3, text, going)
        state = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, path)
        return model

    for seed in args.seeds:
        base = made(seed, "base")
        for trained, basis in READ:
            path = args.scratch / f"rows_{seed}_{trained}_{basis}.json".replace(" ", "_")
            if path.exists():
                continue
            model = base if trained == "base" else made(seed, trained, base)
            with rotating(model, BASES[basis]):
                rows = evaluate(model, unseen, args.n, seed)
            for row in rows:
                row |= dict(trained=trained, basis=basis, seed=seed)
            path.write_text(json.dumps(rows))
            lines_rows = [f"{r['length']}: {r['value']:.2f}" for r in rows if r["task"] == "lines"]
            print(
                f"seed {seed}, {trained} read as {basis}: lines {', '.join(lines_rows)}", flush=True
            )

    rows = [r for p in sorted(args.scratch.glob("rows_*.json")) for r in json.loads(p.read_text())]
    save_rows(rows, "giraffe_results.json")
    keep = {
        "base": args.scratch / "0_base.safetensors",
        "linear 4": args.scratch / "0_linear_4.safetensors",
    }
    if all(p.exists() for p in keep.values()):
        tensors_ = {f"{n}.{k}": v.half() for n, p in keep.items() for k, v in load_file(p).items()}
        save_file(tensors_, HERE / "giraffe_models.safetensors")
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
