"""Makes asc.json and asc.safetensors: chains of thought of SmolLM2, shortened by one vector.

For each seed: 100 pairs of a wordy and a terse chain for generated word problems, the vector
between them, the strength that a KL budget allows in closed form, how far the next-token
distribution really moved, and length and accuracy of chains on 32 further problems. About six
minutes a seed on one core; a finished part is kept and not made again.

    python data/steering/make_asc.py --seeds 0 1 2
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import hooks, models, steering  # noqa: E402

SITE = "resid_post.14"  # the middle of 30 blocks
BUDGETS = (0.05, 0.1, 0.2, 0.5)  # nats a token
N_PAIRS, N_CALIBRATE, N_TEST, N_NEW = 100, 10, 32, 80
NAMES = "Mary John Tom James Dan Anna Alice Bob Sarah Emma Jack Paul".split()
THINGS = "apples books coins pens balls cards keys eggs".split()
STEPS, BRIEF = " Think step by step.", " Be concise."


def problems(n: int, seed: int) -> list[dict]:
    """One-step word problems with numbers from 2 to 9: ``question``, ``a``, ``op``, ``b``,
    ``answer`` and the words that they are told with."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        name, other = rng.sample(NAMES, 2)
        thing, op = rng.choice(THINGS), rng.choice("+-*")
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        a = a + b if op == "-" else a
        question = {
            "+": f"{name} has {a} {thing}. {name} buys {b} more {thing}. "
            f"How many {thing} does {name} have now?",
            "-": f"{name} has {a} {thing}. {name} gives {b} {thing} to {other}. "
            f"How many {thing} does {name} have left?",
            "*": f"There are {a} boxes with {b} {thing} in each box. "
            f"How many {thing} are there in total?",
        }[op]
        answer = {"+": a + b, "-": a - b, "*": a * b}[op]
        words = dict(name=name, other=other, thing=thing)
        made.append(dict(question=question, a=a, op=op, b=b, answer=answer) | words)
    return made


def pair(p: dict) -> tuple[str, str]:
    """A wordy and a terse chain for one problem; both are right."""
    a, b, thing, name, answer = p["a"], p["b"], p["thing"], p["name"], p["answer"]
    first, second, rule = {
        "+": (
            f"we know that {name} starts with {a} {thing}",
            f"we read that {name} buys {b} more {thing}, so the number goes up",
            f"we have to add the two numbers, which means that we add {b} to {a}",
        ),
        "-": (
            f"we know that {name} starts with {a} {thing}",
            f"we read that {name} gives {b} of them to {p['other']}, so the number goes down",
            f"we have to take the second number from the first, so we take {b} from {a}",
        ),
        "*": (
            f"we know that there are {a} boxes",
            f"we read that each of the boxes holds {b} {thing}, the same number every time",
            f"we have to multiply the two numbers, which means that we count {b} {a} times",
        ),
    }[p["op"]]
    wordy = (
        f"Let's think about this problem step by step. First, {first}. Next, {second}. "
        f"To find out how many {thing} there are in the end, {rule}. When we work this out "
        f"carefully, we find that the result is {answer}. Therefore, the answer is {answer}."
    )
    return wordy, f"{a} {p['op']} {b} = {answer}. The answer is {answer}."


def tokens(tokenizer, question: str, chain: str) -> tuple[torch.Tensor, int]:
    """Ids [pos] of the chat with the question asked and the chain said; where the chain starts."""
    asked = tokenizer(steering.prompt(tokenizer, question + STEPS), add_special_tokens=False)
    said = tokenizer(chain, add_special_tokens=False)
    return torch.tensor(asked.input_ids + said.input_ids), len(asked.input_ids)


def chain_states(model, tokenizer, questions, chains, batch: int = 10) -> torch.Tensor:
    """The residual stream at ``SITE``, averaged over the tokens of each chain: [n, d_model]."""
    states = []
    for start in range(0, len(chains), batch):
        rows = [
            tokens(tokenizer, q, c)
            for q, c in zip(
                questions[start : start + batch], chains[start : start + batch], strict=True
            )
        ]
        ids = torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True)
        # Causal attention: padding on the right changes nothing before it.
        x = hooks.read(model, ids.to(model.device), SITE)[SITE].cpu()
        states += [x[i, at : len(r)].mean(0) for i, (r, at) in enumerate(rows)]
    return torch.stack(states)


@torch.inference_mode()
def log_probs(model, tokenizer, vector, strength, questions, chains, n: int = 48) -> torch.Tensor:
    """Log-probabilities of the next token at the first ``n`` positions of each chain, stacked
    over chains: [positions, vocab], with ``strength * vector`` added."""
    found = []
    with steering.steered(model, {SITE: vector}, strength):
        for question, chain in zip(questions, chains, strict=True):
            ids, at = tokens(tokenizer, question, chain)
            keep = min(n, len(ids) - at) + 1
            ids = ids[None, : at + n].to(model.device)
            found.append(model(ids, logits_to_keep=keep).logits[0].float().log_softmax(-1))
    return torch.cat(found)


@torch.inference_mode()
def rates(model, tokenizer, vector, questions, chains, h: float = 0.05):
    """Per position, the slope of the logits' response to the strength: its variance under the
    model's own distribution, and its range over the vocabulary; both [positions]."""
    p = log_probs(model, tokenizer, vector, 0.0, questions, chains).exp()
    slope = log_probs(model, tokenizer, vector, h, questions, chains)
    slope = (slope - log_probs(model, tokenizer, vector, -h, questions, chains)) / (2 * h)
    mean = (p * slope).sum(-1, keepdim=True)
    return (p * (slope - mean) ** 2).sum(-1), slope.amax(-1) - slope.amin(-1)


@torch.inference_mode()
def measured_kl(model, tokenizer, vector, strengths, questions, chains) -> list[float]:
    """For each strength, the mean KL(plain ‖ steered) of the next token in nats."""
    plain = log_probs(model, tokenizer, vector, 0.0, questions, chains)
    found = []
    for strength in strengths:
        new = log_probs(model, tokenizer, vector, strength, questions, chains)
        found.append(float((plain.exp() * (plain - new)).sum(-1).mean()))
    return found


@torch.inference_mode()
def answers(model, tokenizer, questions, chains, batch: int = 48) -> list[int | None]:
    """The number that the plain model reads off the end of each chain."""
    texts = [
        steering.prompt(tokenizer, q + STEPS) + c + "\nThe answer is"
        for q, c in zip(questions, chains, strict=True)
    ]
    read = steering.generate(model, tokenizer, texts, n_new=4, chat=False, batch=batch)
    found = [re.search(r"\d+", text) for text in read]
    return [int(m.group()) if m else None for m in found]


def evaluate(model, tokenizer, tested, suffix=STEPS, vector=None, strength=0.0) -> dict:
    """Length in tokens (at most ``N_NEW``) and correctness of each chain, and the chains."""
    questions = [p["question"] for p in tested]
    context = steering.steered(model, {} if vector is None else {SITE: vector}, strength)
    with context:
        chains = steering.generate(
            model, tokenizer, [q + suffix for q in questions], n_new=N_NEW, batch=len(tested)
        )
    read = answers(model, tokenizer, questions, chains)
    length = [len(tokenizer(c, add_special_tokens=False).input_ids) for c in chains]
    right = [int(r == p["answer"]) for r, p in zip(read, tested, strict=True)]
    return dict(length=length, right=right, chains=chains)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.1, 0.5])
    parser.add_argument("--parts", type=Path, default=Path("/tmp/asc"), help="finished parts")
    parser.add_argument("--join", action="store_true", help="only write the shipped files")
    args = parser.parse_args(argv)
    args.parts.mkdir(parents=True, exist_ok=True)
    model, tokenizer = (None, None) if args.join else models.load("smollm2")

    def part(name, make):
        path = args.parts / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
            print(name, flush=True)
        return json.loads(path.read_text())

    rows, vectors = [], {}
    for seed in args.seeds:
        file = args.parts / f"vector_{seed}.safetensors"
        drawn = problems(N_PAIRS + 2 * N_CALIBRATE + N_TEST, seed=1000 + seed)
        trained, rest = drawn[:N_PAIRS], drawn[N_PAIRS:]
        calibrated, rest = rest[: 2 * N_CALIBRATE], rest[2 * N_CALIBRATE :]
        if not file.exists():
            wordy, terse = zip(*map(pair, trained), strict=True)
            asked = [p["question"] for p in trained]
            states = [chain_states(model, tokenizer, asked, list(c)) for c in (terse, wordy)]
            save_file({"v": steering.mean_difference(*states)}, file)
        vector = load_file(file)["v"]
        random_vector = steering.random_like(vector, seed=seed)
        vectors[f"v_{seed}"] = vector.half()

        asked = [p["question"] for p in calibrated]
        said = part(
            f"said_{seed}",
            lambda asked=asked: steering.generate(
                model, tokenizer, [q + STEPS for q in asked], n_new=48, batch=len(asked)
            ),
        )
        fit, held = (
            (asked[:N_CALIBRATE], said[:N_CALIBRATE]),
            (asked[N_CALIBRATE:], said[N_CALIBRATE:]),
        )

        def bound(vector=vector, fit=fit, held=held):
            variance, span = rates(model, tokenizer, vector, *fit)
            found = dict(variance=float(variance.mean()), span2=float((span**2).mean()))
            strengths = [(2 * budget / found["variance"]) ** 0.5 for budget in BUDGETS]
            strengths += [(8 * budget / found["span2"]) ** 0.5 for budget in BUDGETS]
            kl = measured_kl(model, tokenizer, vector, strengths, *held)
            n = len(BUDGETS)
            found["local"] = dict(strength=strengths[:n], kl=kl[:n])
            found["worst"] = dict(strength=strengths[n:], kl=kl[n:])
            return found

        found = part(f"bound_{seed}", bound)
        runs = {"plain": (STEPS, None, 0.0), "prompt": (BRIEF, None, 0.0)}
        for budget in args.budgets:
            strength = (2 * budget / found["variance"]) ** 0.5
            runs[f"asc {budget:g}"] = (STEPS, vector, strength)
        if args.budgets:  # the baseline at the largest
            runs[f"random {budget:g}"] = (STEPS, random_vector, strength)
        results = {
            name: part(
                f"{name}_{seed}".replace(" ", "_"),
                lambda run=run, rest=rest: evaluate(model, tokenizer, rest, *run),
            )
            for name, run in runs.items()
        }
        empty = part(
            f"empty_{seed}",
            lambda rest=rest: answers(
                model, tokenizer, [p["question"] for p in rest], [""] * len(rest)
            ),
        )
        results["none"] = dict(
            length=[0] * len(rest),
            right=[int(e == p["answer"]) for e, p in zip(empty, rest, strict=True)],
            chains=[],
        )
        for name, result in results.items():
            result["chains"] = result["chains"][:4]
            print(
                f"seed {seed} {name}: {sum(result['length']) / len(rest):.1f} tokens, "
                f"{sum(result['right']) / len(rest):.3f} right",
                flush=True,
            )
        rows.append(dict(seed=seed, norm=float(vector.norm()), bound=found, results=results))
    if set(args.seeds) == {0, 1, 2}:
        save_file(vectors, HERE / "asc.safetensors")
        (HERE / "asc.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
