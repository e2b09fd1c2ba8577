"""Make soft_results.json and soft_alpha.safetensors: task embeddings, mixed in by trained weights.

For every task of soft_tasks.json and every seed: a split into training and test words, the mean
output of each head at the last token of 10-shot prompts (the task embedding), one mixing weight a
head trained through the frozen model, and the whole-word accuracy of all conditions on the test
words. Run it again and it goes on where it stopped.

    python data/steering/make_soft.py --merge
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from lib import hooks, models, steering

HERE = Path(__file__).resolve().parent
N_TEST, N_SHOTS, N_PROMPTS, STEPS, BATCH, LR = 24, 10, 24, 25, 12, 0.2
LAYERS = (6, 10, 14, 18)  # where one vector may be added; chosen on the training words
LEVELS = (0.1, 0.3, 0.6, 1.0)  # of a mixing weight that all heads share
FV_HEADS = 10


def tasks() -> dict[str, list[tuple[str, str]]]:
    """Task -> pairs of question and answer, one answer each."""
    found = json.loads((HERE / "soft_tasks.json").read_text(encoding="utf-8"))
    return {name: [tuple(pair) for pair in pairs] for name, pairs in found.items()}


def split(pairs, seed: int, n_test: int = N_TEST):
    """Training and test pairs, drawn with ``seed``."""
    pairs = sorted(pairs)
    random.Random(seed).shuffle(pairs)
    return pairs[n_test:], pairs[:n_test]


def demonstrations(shots) -> str:
    """Solved questions, as they stand before the one that is asked."""
    return "".join(f"Q: {q}\nA: {a}\n" for q, a in shots)


def draw_shots(pairs, pool, seed: int, n_shots: int = N_SHOTS, share: int = 6):
    """Demonstrations for each pair, drawn from ``pool`` without the pairs that they serve.

    ``share`` neighbouring pairs have them in common, so that a model reads them once.
    """
    rng, shots = random.Random(seed), []
    for start in range(0, len(pairs), share):
        served = pairs[start : start + share]
        shots += [rng.sample([p for p in pool if p not in served], n_shots)] * len(served)
    return shots


def _left_padded(rows, device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.long(), mask.to(device)


def _cache(past, rows=slice(None)) -> DynamicCache:
    cache = DynamicCache()
    for layer, (k, v) in enumerate(past):
        cache.update(k[rows], v[rows], layer)
    return cache


@torch.no_grad()
def prepare(model, tokenizer, pairs, shots=None) -> dict:
    """Run all of each prompt but its last token, once, and keep the keys and values.

    Injection acts on the last token alone, and earlier tokens cannot see it. What remains of a
    prompt is one token, forward and backward.
    """
    heads = [demonstrations(s) for s in shots or [()] * len(pairs)]
    ids = [tokenizer(f"Q: {q}\nA:", add_special_tokens=False).input_ids for q, _ in pairs]
    answers = [tokenizer(f" {a}", add_special_tokens=False).input_ids for _, a in pairs]
    tokens, mask = _left_padded(ids, model.device)
    past, cache = [], None
    if shots:
        distinct = list(dict.fromkeys(heads))
        first = [tokenizer(text, add_special_tokens=False).input_ids for text in distinct]
        first, seen = _left_padded(first, model.device)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        out = model.model(first, attention_mask=seen, position_ids=places, use_cache=True)
        rows = torch.tensor([distinct.index(text) for text in heads], device=model.device)
        past = [(layer.keys[rows], layer.values[rows]) for layer in out.past_key_values.layers]
        mask, cache = torch.cat([seen[rows], mask], 1), _cache(past)
    places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    out = model.model(
        tokens[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=places[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    past = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    most = max(map(len, answers))
    target = torch.tensor([a + [-100] * (most - len(a)) for a in answers], device=model.device)
    return dict(past=past, mask=mask, last=tokens[:, -1:], place=places[:, -1:], target=target)


def answer_logits(model, batch: dict, rows=None, first: bool = False) -> Tensor:
    """Logits [n, answer tokens, vocab] as the answer is read after the prompt, token by token.

    Args:
        rows: which prompts of the batch; ``None``: all.
        first: only the answer's first token is wanted, and no more is computed.
    """
    rows = torch.arange(len(batch["last"])) if rows is None else torch.as_tensor(rows)
    target = batch["target"][rows][:, : 1 if first else None]
    tokens = torch.cat([batch["last"][rows], target[:, :-1].clamp(min=0)], 1)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    extra = batch["mask"].new_ones(len(rows), tokens.shape[1] - 1)
    return model(
        input_ids=tokens,
        attention_mask=torch.cat([batch["mask"][rows], extra], 1),
        position_ids=batch["place"][rows] + steps,
        past_key_values=_cache(batch["past"], rows),
    ).logits


@torch.no_grad()
def correct(model, batch: dict, rows=None) -> Tensor:
    """Whether the greedy answer is the whole right word, [n] bool; edits around it apply."""
    rows = torch.arange(len(batch["last"])) if rows is None else rows
    logits, target = answer_logits(model, batch, rows), batch["target"][rows]
    return ((logits.argmax(-1) == target) | (target < 0)).all(1)


def at_prompt_end(fn):
    """An edit of the prompt's last token alone, the first that a prepared batch feeds."""
    return lambda x: torch.cat([fn(x[:, :1]), x[:, 1:]], 1)


def mixing(embedding: Tensor, alpha: Tensor) -> dict:
    """Edits of every layer's z: (1 − α) z + α t, at the last token of the prompt.

    Args:
        embedding: task embedding t [layers, heads, d_head].
        alpha: mixing weights [layers, heads], 0 to 1.
    """

    def mix(t, a):
        return at_prompt_end(lambda z: (1 - a[:, None]) * z + a[:, None] * t)

    pairs = enumerate(zip(embedding, alpha, strict=True))
    return {f"z.{layer}": mix(t, a) for layer, (t, a) in pairs}


def adding(layer: int, vector: Tensor) -> dict:
    """The edit that adds ``vector`` [d_model] after a block, at the last token of the prompt."""
    return {f"resid_post.{layer}": at_prompt_end(lambda x: x + vector)}


@torch.no_grad()
def last_token(model, batch: dict, sites) -> dict[str, Tensor]:
    """Activations at the last token of the prompts, site -> [n, ...]."""
    with hooks.capture(model, sites) as acts:
        answer_logits(model, batch, first=True)
    return {site: x[:, 0].clone() for site, x in acts.items()}


def accuracy(model, batch: dict, edits: dict | None = None, n: int | None = None) -> float:
    """Share of whole words right under ``edits``, of the batch's first ``n`` prompts."""
    rows = torch.arange(len(batch["last"]))[:n]
    with hooks.edit(model, edits or {}):
        return float(correct(model, batch, rows).float().mean())


def first_loss(model, batch: dict, rows=None) -> Tensor:
    """Mean loss of the answer's first token, in nats."""
    rows = torch.arange(len(batch["last"])) if rows is None else rows
    logits = answer_logits(model, batch, rows, first=True)[:, 0]
    return torch.nn.functional.cross_entropy(logits, batch["target"][rows, 0])


def fit(model, batch: dict, embedding: Tensor, steps=STEPS, seed=0, lr=LR):
    """Train one mixing weight a head on 0-shot training prompts, the model frozen.

    Returns:
        (alpha [layers, heads], losses [steps] in nats).
    """
    logit = torch.zeros(embedding.shape[:2], device=embedding.device, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(batch["last"]), generator=generator)[:BATCH]
        with hooks.edit(model, mixing(embedding, logit.sigmoid())):
            loss = first_loss(model, batch, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return logit.detach().sigmoid(), losses


def function_vector(model, tokenizer, train, embedding: Tensor, seed: int) -> Tensor:
    """The sum of what the most causal heads write for the task, [d_model].

    A head's effect: how much the answer's logit would gain, to first order, if its mean output
    replaced its own on prompts whose demonstrations have their answers shuffled.
    """
    rng = random.Random(seed)
    pairs = rng.sample(train, 12)
    shots = []
    for start, demo in enumerate(draw_shots(pairs, train, seed)):
        if start % 6 == 0:
            wrong = [a for _, a in demo]
            rng.shuffle(wrong)
        shots.append([(q, a) for (q, _), a in zip(demo, wrong, strict=True)])
    batch = prepare(model, tokenizer, pairs, shots)
    with hooks.capture(model, "z", detach=False) as acts:
        logits = answer_logits(model, batch, first=True)[:, 0]
    right = logits.log_softmax(-1).gather(1, batch["target"][:, :1]).mean()
    slopes = torch.autograd.grad(right, list(acts.values()))
    gain = torch.stack(
        [
            ((t - z.detach()[:, 0]) * s[:, 0]).sum(-1).sum(0)
            for t, z, s in zip(embedding, acts.values(), slopes, strict=True)
        ]
    )
    best = gain.flatten().topk(FV_HEADS).indices.tolist()
    n_heads, d_head = embedding.shape[1:]
    vector = 0
    for layer, head in (divmod(i, n_heads) for i in best):
        out = model.model.layers[layer].self_attn.o_proj.weight
        vector = vector + out[:, head * d_head : (head + 1) * d_head] @ embedding[layer, head]
    return vector


def best_layer(model, batch: dict, vectors: dict[int, Tensor]) -> int:
    """The layer at which adding its vector answers most training words."""
    scores = {n: accuracy(model, batch, adding(n, v), 16) for n, v in vectors.items()}
    return max(scores, key=scores.get)


def few_shot(model, tokenizer, train, seed: int, n_prompts=N_PROMPTS, n_shots=N_SHOTS) -> dict:
    """A prepared batch of few-shot prompts made of training pairs alone."""
    pairs = random.Random(seed).sample(train, n_prompts)
    return prepare(model, tokenizer, pairs, draw_shots(pairs, train, seed, n_shots))


def embed(model, batch: dict) -> Tensor:
    """Task embedding [layers, heads, d_head]: mean z at the end of few-shot prompts."""
    return torch.stack([z.mean(0) for z in last_token(model, batch, "z").values()])


def measure(model, tokenizer, pairs, seed: int):
    """All conditions of one task and seed: (accuracies, losses, embedding, alpha, choices)."""
    train, test = split(pairs, seed)
    shown = few_shot(model, tokenizer, train, seed)
    plain, held_out = (prepare(model, tokenizer, p) for p in (train, test))
    few = prepare(model, tokenizer, test, draw_shots(test, train, seed + 1))
    embedding = embed(model, shown)
    alpha, losses = fit(model, plain, embedding, seed=seed)
    order = torch.randperm(alpha.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = alpha.flatten()[order].view_as(alpha)
    shared = {a: mixing(embedding, torch.full_like(alpha, a)) for a in LEVELS}
    tried = {a: accuracy(model, plain, edits, 16) for a, edits in shared.items()}
    level = max(tried, key=tried.get)
    sites = [f"resid_post.{n}" for n in LAYERS]
    ends = [last_token(model, b, sites) for b in (shown, plain)]
    difference = {
        n: steering.mean_difference(*(e[s] for e in ends))
        for n, s in zip(LAYERS, sites, strict=True)
    }
    fv = function_vector(model, tokenizer, train, embedding, seed)
    at_fv = best_layer(model, plain, dict.fromkeys(LAYERS, fv))
    at_md = best_layer(model, plain, difference)
    noise = steering.random_like(difference[at_md], seed)
    edits = {
        "0-shot": {},
        "soft": mixing(embedding, alpha),
        "shuffled heads": mixing(embedding, shuffled),
        "uniform": shared[level],
        "function vector": adding(at_fv, fv),
        "mean difference": adding(at_md, difference[at_md]),
        "random direction": adding(at_md, noise),
    }
    scores = {name: accuracy(model, held_out, e) for name, e in edits.items()}
    scores["10-shot"] = accuracy(model, few)
    scores["soft on training words"] = accuracy(model, plain, edits["soft"])
    choices = dict(level=level, fv_layer=at_fv, difference_layer=at_md)
    return scores, losses, embedding, alpha, choices


def transfer(model, tokenizer, found: dict, seed: int, names) -> list[list[float]]:
    """Accuracy [heads of task i, words and embedding of task j]."""
    table = []
    for target in names:
        test = prepare(model, tokenizer, split(tasks()[target], seed)[1])
        embedding = found[f"{target}/{seed}/embedding"].float()
        rows = [found[f"{source}/{seed}/alpha"].float() for source in names]
        table.append([accuracy(model, test, mixing(embedding, alpha), 12) for alpha in rows])
    return torch.tensor(table).T.tolist()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=Path, default=models.cache_folder() / "steering_soft")
    parser.add_argument("--merge", action="store_true", help="write the files from all parts")
    args = parser.parse_args(argv)
    args.parts.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")
    for seed in args.seeds:
        numbers, tensors = (args.parts / f"{seed}.{end}" for end in ("json", "safetensors"))
        part = json.loads(numbers.read_text()) if numbers.exists() else {"rows": []}
        found = load_file(tensors) if tensors.exists() else {}
        for name, pairs in tasks().items():
            if any(row["task"] == name for row in part["rows"]):
                continue
            scores, losses, embedding, alpha, choices = measure(model, tokenizer, pairs, seed)
            losses, scores = (
                [round(x, 3) for x in losses],
                {k: round(v, 4) for k, v in scores.items()},
            )
            part["rows"].append(dict(task=name, seed=seed, **scores, **choices, losses=losses))
            found[f"{name}/{seed}/alpha"] = alpha.half()
            found[f"{name}/{seed}/embedding"] = embedding.half()
            print(seed, name, scores, choices, flush=True)
            save_file(found, tensors)
            numbers.write_text(json.dumps(part))
        if "transfer" not in part:
            table = transfer(model, tokenizer, found, seed, list(tasks()))
            part["transfer"] = [[round(x, 4) for x in row] for row in table]
            numbers.write_text(json.dumps(part))
    if args.merge:
        parts = [json.loads((args.parts / f"{s}.json").read_text()) for s in args.seeds]
        result = dict(
            rows=[row for part in parts for row in part["rows"] if row["task"] in tasks()],
            transfer=[part["transfer"] for part in parts],
        )
        (HERE / "soft_results.json").write_text(json.dumps(result))
        found = {}
        for s in args.seeds:
            part = load_file(args.parts / f"{s}.safetensors")
            found |= {name: x for name, x in part.items() if name.endswith("/alpha")}
        save_file(found, HERE / "soft_alpha.safetensors")
        print("wrote soft_results.json and soft_alpha.safetensors")


if __name__ == "__main__":
    main()
