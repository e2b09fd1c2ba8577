"""Makes repe.json and repe.safetensors: control vectors for three small reasoning tasks.

For each seed and task: states of the residual stream on 120 solved items and on random tokens; the
paper's three vectors, a contrast of items that the model gets right with those it gets wrong, and
a random direction; then accuracy, KL and entropy on 72 further items against the strength. About
three minutes a seed on one core; a finished part is kept.

    python data/steering/make_repe.py --seeds 0 1 2
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, hooks, models, steering  # noqa: E402

LAYER = 14  # the middle of 30 blocks
SITE = f"resid_post.{LAYER}"
STRENGTHS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
N_TRAIN, N_TEST = 120, 72
NAMES = "Mary John Tom James Dan Anna Alice Bob Sarah Emma Jack Paul Peter David Laura Lisa".split()
ASK = "Think carefully and answer correctly. "


def inductive(rng: random.Random) -> dict:
    """Indirect objects with three names: who of the three is given something?"""
    names = rng.sample(NAMES, 3)
    order, givers = rng.sample(names, 3), rng.sample(names[:2], 2)
    place = rng.choice("store park school office garden".split())
    thing = rng.choice("drink book ring letter gift".split())
    text = (
        f"When {order[0]}, {order[1]} and {order[2]} went to the {place}, "
        f"{givers[0]} and {givers[1]} gave a {thing} to"
    )
    return dict(prompt=text, answer=" " + names[2], options=[" " + name for name in names])


def deductive(rng: random.Random) -> dict:
    """Two rules and a case, in the manner of bAbI's basic deduction."""
    kinds = dict(mice="mouse", wolves="wolf", cats="cat", sheep="sheep")
    kinds |= dict(dogs="dog", birds="bird", bears="bear", lions="lion")
    a, b, c, d = rng.sample(list(kinds), 4)
    rules = [f"{a.capitalize()} are afraid of {b}.", f"{c.capitalize()} are afraid of {d}."]
    rng.shuffle(rules)
    name = rng.choice(NAMES)
    text = f"{rules[0]} {rules[1]} {name} is a {kinds[a]}. {name} is afraid of"
    return dict(prompt=text, answer=" " + b, options=[" " + b, " " + d])


def arithmetic(rng: random.Random) -> dict:
    """A sum or a difference of two digits with a one-digit result, after two solved examples."""

    def sum_(rng):
        while True:
            a, b, op = rng.randint(1, 9), rng.randint(1, 9), rng.choice("+-")
            result = a + b if op == "+" else a - b
            if 0 < result < 10:
                return f"{a} {op} {b} = ", str(result)

    text, answer = sum_(rng)
    shots = "".join(f"{q}{r}\n" for q, r in [sum_(rng), sum_(rng)])
    return dict(prompt=shots + text, answer=answer, options=[str(i) for i in range(10)])


TASKS = dict(inductive=inductive, deductive=deductive, arithmetic=arithmetic)


def items(task: str, n: int, seed: int) -> list[dict]:
    """``n`` items of a task: ``prompt``, ``answer`` and its ``options``, each one token."""
    rng = random.Random(f"{task} {seed}")
    return [TASKS[task](rng) for _ in range(n)]


def groups(tokenizer, prompts: list[str], batch: int = 24):
    """Prompts of one length in tokens together, so that none is padded: (indices, ids)."""
    ids = [tokenizer(p).input_ids for p in prompts]
    for length in sorted({len(i) for i in ids}):
        same = [k for k, i in enumerate(ids) if len(i) == length]
        for start in range(0, len(same), batch):
            chosen = same[start : start + batch]
            yield chosen, torch.tensor([ids[k] for k in chosen])


def states(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """The residual stream at ``SITE`` at each prompt's last token: [n, d_model]."""
    found = torch.zeros(len(prompts), model.config.hidden_size)
    for chosen, ids in groups(tokenizer, prompts):
        found[chosen] = hooks.read(model, ids.to(model.device), SITE)[SITE][:, -1].cpu()
    return found


def noise(tokenizer, n: int, seed: int, length: int = 16) -> list[str]:
    """Texts of random tokens: the paper's contrast to a task."""
    rng = random.Random(f"noise {seed}")
    drawn = [[rng.randrange(100, 40_000) for _ in range(length)] for _ in range(n)]
    return [tokenizer.decode(row) for row in drawn]


@torch.inference_mode()
def lower(model, tokenizer, prompts: list[str]) -> list:
    """What enters block ``LAYER + 1`` for groups of prompts, read once for every strength."""
    return [
        (chosen, hooks.read(model, ids.to(model.device), SITE)[SITE])
        for chosen, ids in groups(tokenizer, prompts)
    ]


@torch.inference_mode()
def upper(model, read: list, n: int, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Log-probabilities after each prompt, [n, vocab], with ``shift`` added at ``SITE``: only the
    blocks above it run."""
    inner, found = model.model, torch.zeros(n, model.config.vocab_size)
    for chosen, x in read:
        x = x + (shift.to(x) if isinstance(shift, torch.Tensor) else shift)
        where = torch.arange(x.shape[1], device=x.device)[None]
        rotary = inner.rotary_emb(x, where)
        for block in inner.layers[LAYER + 1 :]:
            x = block(x, position_embeddings=rotary, position_ids=where)
            x = x[0] if isinstance(x, tuple) else x
        found[chosen] = model.lm_head(inner.norm(x[:, -1])).float().log_softmax(-1).cpu()
    return found


def score(tokenizer, found: list[dict], logp: torch.Tensor, plain: torch.Tensor) -> dict:
    """Per item whether the likeliest option is right; mean KL(steered ‖ plain), mean entropy."""
    right = []
    for item, row in zip(found, logp, strict=True):
        options = [tokenizer(o).input_ids[0] for o in item["options"]]
        right.append(int(item["options"][int(row[options].argmax())] == item["answer"]))
    return dict(
        right=right,
        kl=float((logp.exp() * (logp - plain)).sum(-1).mean()),
        entropy=float(-(logp.exp() * logp).sum(-1).mean()),
    )


def contrasts(positive: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors from pairs of states [n, d_model]: the mean of the differences, and their first
    principal axis, turned to the mean's side and given its length."""
    difference = positive - negative
    mean = difference.mean(0)
    axis = torch.linalg.svd(difference - mean, full_matrices=False).Vh[0]
    return mean, axis * torch.sign(axis @ mean) * mean.norm()  # an axis has no sign of its own


def run(model, tokenizer, task: str, seed: int) -> tuple[dict, dict]:
    """One task and seed: results by vector and strength, and the vectors."""
    train, test = items(task, N_TRAIN, 2 * seed), items(task, N_TEST, 2 * seed + 1)
    asked = [i["prompt"] for i in train]
    solved = states(model, tokenizer, [i["prompt"] + i["answer"] for i in train])
    negative = states(model, tokenizer, noise(tokenizer, N_TRAIN, seed))
    before = lower(model, tokenizer, asked)
    last = torch.zeros_like(solved)
    for chosen, x in before:
        last[chosen] = x[:, -1].cpu()
    own = upper(model, before, N_TRAIN)
    right = torch.tensor(score(tokenizer, train, own, own)["right"]).bool()
    made = {}
    made["reading"] = solved.mean(0)
    made["contrast"], made["pca"] = contrasts(solved, negative)
    if right.any() and not right.all():
        made["own"] = steering.mean_difference(last[right], last[~right])
    made["random"] = steering.random_like(made["contrast"], seed=100 * seed + len(task))

    read = lower(model, tokenizer, [i["prompt"] for i in test])
    plain = upper(model, read, N_TEST)
    found = dict(plain=score(tokenizer, test, plain, plain))
    asked = lower(model, tokenizer, [ASK + i["prompt"] for i in test])
    found["prompt"] = score(tokenizer, test, upper(model, asked, N_TEST), plain)
    for name, vector in made.items():
        for strength in STRENGTHS:
            logp = upper(model, read, N_TEST, strength * vector)
            found[f"{name} {strength:g}"] = score(tokenizer, test, logp, plain)
    train_accuracy = float(right.float().mean())
    norms = {name: float(v.norm()) for name, v in made.items()}
    return dict(task=task, seed=seed, train=train_accuracy, norms=norms, results=found), made


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=Path, default=Path("/tmp/repe"), help="finished parts")
    args = parser.parse_args(argv)
    args.parts.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")
    rows, kept = [], {}
    for seed in args.seeds:
        for task in TASKS:
            path = args.parts / f"{task}_{seed}.safetensors"
            if not path.exists():
                checkpoint.save(path, run(model, tokenizer, task, seed))
            row, made = checkpoint.load(path)
            rows.append(row)
            kept |= {f"{task}_{seed}_{name}": v.half() for name, v in made.items()}
            means = {k: sum(r["right"]) / N_TEST for k, r in row["results"].items()}
            print(task, seed, {k: round(v, 3) for k, v in means.items()}, flush=True)
    if set(args.seeds) == {0, 1, 2}:
        save_file(kept, HERE / "repe.safetensors")
        (HERE / "repe.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
