"""Make metacognition_results.json and metacognition_activations.safetensors: neurofeedback.

Sentences get a label by where their own activation lies on an axis of the residual stream. The
model sees pairs of sentence and label, and either reports the label of the next sentence, or is to
write (explicit control) or to read (implicit control) a sentence under a given label. Run it again
and it goes on where it stopped.

    python data/steering/make_metacognition.py
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import DynamicCache

from lib import datasets, hooks, models, steering

HERE = Path(__file__).resolve().parent
LAYER = 15  # the middle of 30: where sentences are measured
RANKS = (1, 2, 4, 8, 16, 32, 64)
N_SEQUENCES, N_PAIRS = 3, 48  # reports: sequences a seed, pairs in each
N_CONTEXT, N_TRIALS, N_DRAWS, N_NEW = 32, 20, 1, 12  # control: pairs, sentences a label, contexts
PREFIX = "Here is a sentence.\n"


def sentences(corpus: str) -> tuple[list[str], np.ndarray]:
    """200 sentences and their class: moral or not (ours), whale or not (Moby Dick)."""
    if corpus == "morality":
        found = json.loads((HERE / "metacognition_sentences.json").read_text(encoding="utf-8"))
        classes = [found["moral"], found["immoral"]]
    else:
        text = re.sub(r"\s+", " ", datasets.moby_dick())
        plain = [s.strip() for s in re.findall(r"[A-Z][^.!?\"“”;:]{35,75}\.", text)]
        plain = list(dict.fromkeys(s for s in plain if s.isascii()))
        whale = [s for s in plain if re.search(r"\b[Ww]hales?\b", s)]
        rest = [s for s in plain if not re.search(r"[Ww]hal", s)]
        rng = random.Random(0)
        classes = [rng.sample(whale, 100), rng.sample(rest, 100)]
    texts = [*classes[0], *classes[1]]
    return texts, np.array([1] * len(classes[0]) + [0] * len(classes[1]))


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _right_padded(rows, device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids.long(), mask.to(device)


@torch.no_grad()
def activations(model, tokenizer, texts, layer=LAYER, past=None, prefixes=None) -> Tensor:
    """Mean residual stream over each sentence's own tokens, [n, d_model].

    Args:
        past: keys and values of a context that all sentences follow; ``None``: PREFIX alone,
            which also keeps the first token's huge activation out of the mean.
        prefixes: what stands directly before each sentence.
    """
    prefixes = prefixes or [PREFIX] * len(texts)
    heads = [_ids(tokenizer, prefix) for prefix in prefixes]
    ids, mask = _right_padded(
        [h + _ids(tokenizer, f" {t}") for h, t in zip(heads, texts, strict=True)], model.device
    )
    own = mask.clone()
    for row, h in zip(own, heads, strict=True):
        row[: len(h)] = 0
    inputs = dict(input_ids=ids, attention_mask=mask)
    if past is not None:
        cache, seen = repeat(past, len(texts))
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.cat([seen, mask], 1),
            past_key_values=cache,
        )
    site = f"resid_post.{layer}"
    x = hooks.read(model, inputs, site)[site]
    return (x * own[..., None]).sum(1) / own.sum(1, keepdim=True)


@torch.no_grad()
def read_context(model, ids: list[int]) -> list:
    """Keys and values of one context."""
    out = model.model(torch.tensor([ids], device=model.device), use_cache=True)
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def repeat(past, n: int):
    """A cache in which ``n`` texts follow the same context, and its mask."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(past):
        cache.update(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1), layer)
    return cache, torch.ones(n, past[0][0].shape[2], dtype=torch.long, device=past[0][0].device)


def axes(x: Tensor, classes: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Unit axes [d_model] from the activations of the fitting half: LR, PCs, a random one."""
    centred = (x - x.mean(0)).double()
    scale = float(centred.std())
    probe = LogisticRegression(C=0.1, max_iter=500).fit((centred / scale).numpy(), classes)
    found = {"LR": torch.tensor(probe.coef_[0])}
    _, _, v = torch.linalg.svd(centred, full_matrices=False)
    found |= {f"PC{rank}": v[rank - 1] for rank in RANKS}
    found["random"] = torch.randn(
        x.shape[1], generator=torch.Generator().manual_seed(seed)
    ).double()
    return {name: (axis / axis.norm()).float() for name, axis in found.items()}


def halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the half that fits axes, and of the half that is shown."""
    order = np.random.default_rng(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def setting(x: Tensor, classes: np.ndarray, seed: int):
    """(axes, labels by axis [n], shown indices): all that a seed fixes.

    A label is 1 above the axis's median over the shown half, so that either label is as common.
    (The LR axis separates the half that it was fitted to too well for a median of that half to
    carry over.) ``shuffled`` deals the LR axis's
    labels out at random.
    """
    fitting, shown = halves(len(x), seed)
    found = axes(x[fitting], classes[fitting], seed)
    labels = {k: (x @ a > (x[shown] @ a).median()).long().numpy() for k, a in found.items()}
    labels["shuffled"] = labels["LR"].copy()
    labels["shuffled"][shown] = np.random.default_rng(seed).permutation(labels["LR"][shown])
    return found, labels, shown


# --- report -----------------------------------------------------------------------------------


def report_ids(tokenizer, texts, labels) -> tuple[list[int], list[int]]:
    """Tokens of ``sentence Score: label`` pairs, and where each label is predicted."""
    ids, at = [], []
    for text, label in zip(texts, labels, strict=True):
        ids += _ids(tokenizer, f"{text} Score: ")
        at.append(len(ids) - 1)
        ids += _ids(tokenizer, str(int(label))) + _ids(tokenizer, "\n")
    return ids, at


@torch.no_grad()
def reports(model, tokenizer, sequences) -> Tensor:
    """Logit of label 1 minus that of 0 at every pair of every sequence: [sequences, pairs].

    One forward gives the report after 0, 1, 2, … examples.
    """
    found = [report_ids(tokenizer, texts, labels) for texts, labels in sequences]
    ids, mask = _right_padded([ids for ids, _ in found], model.device)
    x = model.model(ids, attention_mask=mask).last_hidden_state
    at = torch.tensor([at for _, at in found], device=model.device)
    x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
    one, zero = (model.lm_head.weight[_ids(tokenizer, label)[0]] for label in "10")
    return (x @ (one - zero)).cpu()


def ideal(x: Tensor, labels, sequences) -> list[list[float]]:
    """A logistic regression on the activations themselves, fitted to the pairs so far, at every
    fourth pair anew: its log odds of label 1, by sequence and pair (0 where it has nothing yet)."""
    a = ((x - x.mean(0)) / x.std()).numpy()
    found = []
    for rows in sequences:
        odds = [0.0] * len(rows)
        for n in range(1, len(rows), 4):
            seen = labels[rows[:n]]
            if len(set(seen)) == 2:
                probe = LogisticRegression(C=0.1, max_iter=300).fit(a[rows[:n]], seen)
                block = rows[n : n + 4]
                odds[n : n + 4] = [round(v, 2) for v in probe.decision_function(a[block]).tolist()]
        found.append(odds)
    return found


def report(model, tokenizer, corpus, name, x, classes, seed, texts) -> dict:
    """Reports on one axis: logit differences and labels, [sequences][pairs]."""
    _, labels, shown = setting(x, classes, seed)
    rng = np.random.default_rng(seed)
    n_sequences, n_pairs = (N_SEQUENCES, N_PAIRS) if corpus == "morality" else (3, 36)
    rows = [rng.permutation(shown)[:n_pairs] for _ in range(n_sequences)]
    chosen = [([texts[i] for i in r], labels[name][r]) for r in rows]
    d = torch.cat([reports(model, tokenizer, [c]) for c in chosen])
    known = ideal(x, labels[name], rows)
    return dict(
        logit=[[round(v, 2) for v in row] for row in d.tolist()],
        label=[labels[name][r].tolist() for r in rows],
        ideal=known,
    )


# --- control ----------------------------------------------------------------------------------


def under(label, names=("0", "1")) -> str:
    """What stands before a sentence of this label in the control experiments."""
    return f"Score {names[int(label)]}:"


def control_ids(tokenizer, texts, labels, names=("0", "1")) -> list[int]:
    """Tokens of ``Score label: sentence`` lines: here the label stands first."""
    ids = []
    for text, label in zip(texts, labels, strict=True):
        ids += _ids(tokenizer, under(label, names)) + _ids(tokenizer, f" {text}")
        ids += _ids(tokenizer, "\n")
    return ids


@torch.no_grad()
def write(model, tokenizer, past, prefixes, seed, n_new=N_NEW, temperature=0.7) -> list[str]:
    """One sampled sentence a prefix, after a shared context, up to the end of the line."""
    generator = torch.Generator().manual_seed(seed)
    cache, mask = repeat(past, len(prefixes))
    step = torch.tensor([_ids(tokenizer, p) for p in prefixes], device=model.device)
    newline, done, said = _ids(tokenizer, "\n")[0], [False] * len(prefixes), [[] for _ in prefixes]
    for _ in range(n_new):
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        out = model(step, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        p = (out.logits[:, -1].float() / temperature).softmax(-1).cpu()
        drawn = torch.multinomial(p, 1, generator=generator)
        for i, token in enumerate(drawn[:, 0].tolist()):
            done[i] |= token in (newline, tokenizer.eos_token_id)
            if not done[i]:
                said[i].append(token)
        if all(done):
            break
        step = drawn.to(model.device)
    return [tokenizer.decode(t).strip() or "." for t in said]


def cohens_d(high: np.ndarray, low: np.ndarray) -> float:
    """Difference of means in units of the pooled standard deviation."""
    pooled = np.sqrt((np.var(high, ddof=1) + np.var(low, ddof=1)) / 2)
    return float((np.mean(high) - np.mean(low)) / pooled)


def control(model, tokenizer, name, x, classes, seed, texts) -> list[dict]:
    """Explicit and implicit control on one axis, a dict a context.

    ``named`` is the LR axis with words for labels, ``shuffled`` with labels at random.
    """
    found, labels, shown = setting(x, classes, seed)
    axis = found["LR" if name in ("named", "shuffled") else name]
    shown_labels = labels["LR" if name == "named" else name]
    names = (" cruel", " kind") if name == "named" else ("0", "1")
    names = tuple(n.strip() for n in names)
    rows = []
    for draw in range(N_DRAWS):
        rng = np.random.default_rng((seed, draw))
        order = rng.permutation(shown)
        context, given = order[:N_CONTEXT], order[N_CONTEXT : N_CONTEXT + N_TRIALS]
        ids = control_ids(tokenizer, [texts[i] for i in context], shown_labels[context], names)
        past = read_context(model, ids)
        asked = [1] * N_TRIALS + [0] * N_TRIALS
        prefixes = [under(y, names) for y in asked]
        wrote = write(model, tokenizer, past, prefixes, seed=100 * seed + draw)
        half = slice(None, N_TRIALS), slice(N_TRIALS, None)

        def shift(values, half=half):
            return cohens_d(*(values[h].numpy() for h in half))

        in_context = activations(model, tokenizer, wrote, past=past, prefixes=prefixes).cpu() @ axis
        alone = activations(model, tokenizer, wrote).cpu() @ axis
        read = [texts[i] for i in given] * 2
        implicit = activations(model, tokenizer, read, past=past, prefixes=prefixes).cpu() @ axis
        mood = torch.tensor(steering.sentiment(wrote))
        copies = np.mean([w in {texts[i] for i in context} for w in wrote])
        rows.append(
            dict(
                axis=name,
                seed=seed,
                draw=draw,
                explicit=round(shift(in_context), 3),
                explicit_alone=round(shift(alone), 3),
                implicit=round(shift(implicit), 3),
                sentiment=[round(float(mood[h].mean()), 3) for h in half],
                copied=round(float(copies), 3),
                wrote=[wrote[h][:3] for h in half],
            )
        )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=Path, default=models.cache_folder() / "steering_meta")
    parser.add_argument("--only", default="", help="report or control; then nothing is written")
    args = parser.parse_args(argv)
    args.parts.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")
    kept, jobs = {}, []
    for corpus in ("morality", "moby_dick"):
        texts, classes = sentences(corpus)
        path = args.parts / f"{corpus}.safetensors"
        if not path.exists():
            parts = [activations(model, tokenizer, texts[i : i + 50]) for i in range(0, 200, 50)]
            save_file({"x": torch.cat(parts).cpu().half()}, path)
        kept[corpus] = (load_file(path)["x"].float(), classes, texts)
    some = ["LR", "shuffled", "named", "random", "PC1"]
    every = ["LR", "shuffled", *(f"PC{r}" for r in RANKS), "random"]
    for seed in args.seeds:
        jobs += [("control", "morality", name, seed) for name in some]
        jobs += [("report", "morality", name, seed) for name in every]
        jobs += [("report", "moby_dick", name, seed) for name in ("LR", "shuffled", "PC1", "PC32")]
    result = {"report": [], "control": []}
    for job in jobs:
        kind, corpus, name, seed = job
        if args.only not in ("", kind):
            continue
        path = args.parts / ("-".join(map(str, job)) + ".json")
        x, classes, texts = kept[corpus]
        if not path.exists():
            if kind == "report":
                made = report(model, tokenizer, corpus, name, x, classes, seed, texts)
                made = [dict(corpus=corpus, axis=name, seed=seed, **made)]
            else:
                made = control(model, tokenizer, name, x, classes, seed, texts)
            path.write_text(json.dumps(made))
            print(*job, flush=True)
        result[kind] += json.loads(path.read_text())
    if not args.only:
        (HERE / "metacognition_results.json").write_text(json.dumps(result))
        tensors = {corpus: x.half() for corpus, (x, _, _) in kept.items()}
        save_file(tensors, HERE / "metacognition_activations.safetensors")
        print("wrote metacognition_results.json and metacognition_activations.safetensors")


if __name__ == "__main__":
    main()
