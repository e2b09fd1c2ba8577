"""RazorAttention on SmolLM2: which key-value heads keep all, and what the others may forget.

    python data/long_context/make_razor.py            # about twelve minutes on one core

writes ``razor.json`` (head scores, one row a method, setting and seed) and ``razor_frontier.json``
(the same rows for the chapter's frontier). ``head_scores``, ``choose``, ``share`` and
``forgetting`` are what the chapter uses.
"""

import argparse
import json
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_retrieval as retrieval

from lib import datasets, hooks, models

HERE = Path(__file__).resolve().parent
SINKS = 4  # first tokens that every head keeps
LENGTH = 512  # tokens of a text
N_NEEDLES = 8


# --- heads ------------------------------------------------------------------------------------


@torch.inference_mode()
def head_scores(model, n: int = 128, repeats: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Echo and induction scores [layer, head], on ``n`` random tokens said ``repeats`` times.

    Mean attention of a token in a later round on its own earlier copies (echo), and on the tokens
    after those (induction).
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(100, model.config.vocab_size, (n,), generator=generator)
    ids = once.repeat(repeats)[None].to(model.device)
    t = torch.arange(n, n * repeats, device=model.device)
    sums = {}

    def note(layer):
        def keep(A):
            weights = [torch.zeros(A.shape[1], device=A.device) for _ in range(2)]
            for back in range(1, repeats):
                rows = t[t >= n * back]
                for i in range(2):
                    weights[i] += A[0][:, rows, rows - n * back + i].sum(-1)
            sums[layer] = torch.stack(weights) / len(t)
            return A

        return keep

    n_layers = hooks.shape(model)["n_layers"]
    with hooks.edit(model, {f"pattern.{layer}": note(layer) for layer in range(n_layers)}):
        model.model(ids)
    both = torch.stack([sums[layer] for layer in range(n_layers)], 1).cpu()
    return both[0], both[1]


def kv(score, n_kv: int) -> Tensor:
    """[layer, head] to [layer, n_kv]: a key-value head counts as its best query head."""
    score = torch.as_tensor(np.asarray(score))
    return score.unflatten(1, (n_kv, -1)).amax(-1)


def choose(
    echo: Tensor, induction: Tensor, share: float = 0.14, echo_share: float = 0.01
) -> Tensor:
    """The heads that keep all [layer, n_kv]: the paper's top 14 % by induction, 1 % by echo."""
    whole = torch.zeros(induction.shape, dtype=torch.bool)
    for score, part in ((induction, share), (echo, echo_share)):
        count = round(part * score.numel())
        whole.view(-1)[score.flatten().topk(count).indices] = True
    return whole


def random_choice(like: Tensor, seed: int) -> Tensor:
    """As many heads as ``like`` has, drawn among the others."""
    others = (~like).flatten().nonzero().flatten()
    picked = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    out = torch.zeros_like(like)
    out.view(-1)[picked[: int(like.sum())]] = True
    return out


# --- what is dropped --------------------------------------------------------------------------


def outside(n_query: int, n_key: int, size: int, device=None) -> Tensor:
    """Keys that are neither the first ``SINKS`` nor among the last ``size``: [n_query, n_key]."""
    key = torch.arange(n_key, device=device)
    query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    return (key >= SINKS) & (query - key >= size)


@contextmanager
def forgetting(model, whole: Tensor | None, size: int, compensate: bool = True, heavy=None):
    """Attention as if heads had dropped keys from their cache.

    A compensation token (the mean of the dropped keys and of their values, counted as often as
    tokens were dropped) has the score q · mean(k) = mean(q · k) and adds N exp(score) mean(v): the
    same as giving each dropped key the mean of their scores. So nothing is stored here; ``share``
    says what would be.

    Args:
        whole: [layer, n_kv], heads that drop nothing; ``None``: all drop.
        size: tokens of the sliding window, the query included.
        heavy: layer -> [batch, n_kv, key], keys that are kept although outside the window; or how
            many keys each query keeps, those that drew most attention so far.
    """
    shape = hooks.shape(model)
    group = shape["n_heads"] // shape["n_kv_heads"]

    def change(layer):
        def fn(scores):
            gone = outside(*scores.shape[-2:], size, scores.device)[None, None]
            if whole is not None:
                gone = gone & ~whole[layer].to(scores.device)[None, :, None, None]
            if heavy is not None:
                gone = gone.expand(len(scores), shape["n_kv_heads"], -1, -1).clone()
                if isinstance(heavy, int):
                    drawn = scores.softmax(-1).unflatten(1, (-1, group)).sum(2).cumsum(-2)
                    top = drawn.masked_fill(~gone, 0).topk(min(heavy, drawn.shape[-1])).indices
                    gone.scatter_(-1, top, False)
                else:
                    gone[..., : heavy[layer].shape[-1]] &= ~heavy[layer][:, :, None]
            gone = gone.repeat_interleave(group, 1) if gone.shape[1] > 1 else gone
            if not compensate:
                return scores.masked_fill(gone, -torch.inf)
            count = gone.sum(-1, keepdim=True).clamp(min=1)
            mean = scores.masked_fill(~gone, 0).sum(-1, keepdim=True) / count
            return torch.where(gone, mean, scores)

        return fn

    with ExitStack() as stack:
        for layer in range(shape["n_layers"]):
            if whole is None or not bool(whole[layer].all()):
                stack.enter_context(hooks.edit(model, f"scores.{layer}", change(layer)))
        yield


def share(whole: Tensor | None, size: int, compensate: bool, length: int = LENGTH) -> float:
    """Bytes of the cache after ``length`` tokens, as a share of the full one's."""
    kept = min(length, SINKS + size + (1 if compensate else 0)) / length
    full = 0.0 if whole is None else float(whole.float().mean())
    return full + (1 - full) * kept


@torch.inference_mode()
def read_and_weigh(model, ids: Tensor, keep: int):
    """``retrieval.read_prompt``, and what attention each key drew: layer -> [batch, n_kv, key]."""
    shape, drawn = hooks.shape(model), {}

    def note(layer):
        def fn(A):
            drawn[layer] = A.sum(-2).unflatten(1, (shape["n_kv_heads"], -1)).sum(2)
            return A

        return fn

    with hooks.edit(model, {f"pattern.{i}": note(i) for i in range(shape["n_layers"])}):
        return retrieval.read_prompt(model, ids, keep), drawn


def hitters(drawn: dict, count: int) -> dict:
    """The ``count`` keys of each head that drew most attention (H2O's rule, once, at the end)."""
    return {
        layer: torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(count).indices, True)
        for layer, x in drawn.items()
    }


# --- the experiment ---------------------------------------------------------------------------


@torch.inference_mode()
def perplexity(model, ids: Tensor) -> float:
    losses = []
    for row in ids:
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]))
    return float(torch.stack(losses).mean().exp())


def texts(tokenizer, seed: int) -> Tensor:
    """Four texts of 512 tokens of Moby Dick, other ones for each seed: [4, 512]."""
    text = datasets.moby_dick()[150_000 + 200_000 * seed :][:12_000]
    return tokenizer(text, return_tensors="pt").input_ids[0, : 4 * LENGTH].view(4, LENGTH)


def methods(echo: Tensor, induction: Tensor, seed: int) -> list[dict]:
    """What is compared; ``whole`` None: every head drops."""
    chosen = choose(echo, induction)
    equal = round(share(chosen, 64, True) * LENGTH) - SINKS  # tokens a head, at equal bytes
    hit = equal - equal // 2
    rows = [("full cache", "", torch.ones_like(chosen), LENGTH, False, None)]
    rows += [("RazorAttention", f"window {n}", chosen, n, True, None) for n in (64, 96)]
    rows += [
        ("no compensation", "window 64", chosen, 64, False, None),
        ("random heads", "window 64", random_choice(chosen, seed), 64, True, None),
        ("window + sinks", "equal bytes", None, equal, False, None),
        ("heavy hitters", "equal bytes", None, equal // 2, False, hit),
    ]
    for part in (0.28, 0.5):
        more = choose(echo, induction, part)
        rows.append(("RazorAttention", f"{part:.0%} of heads, window 64", more, 64, True, None))
    found = HERE / "retrieval_heads.json"
    if found.is_file():  # as many heads, chosen by the needles of another seed
        scores = json.loads(found.read_text())["seeds"][(seed + 1) % 3]["score"]
        needle = kv(np.mean(list(scores.values()), 0), chosen.shape[1])
        best = torch.zeros_like(chosen)
        best.view(-1)[needle.flatten().topk(int(chosen.sum())).indices] = True
        rows.append(("heads chosen by needles", "window 64", best, 64, True, None))
    names = ("method", "setting", "whole", "size", "comp", "heavy")
    return [dict(zip(names, row, strict=True)) for row in rows]


def run(model, tokenizer, seed: int, scratch: Path) -> dict:
    path = scratch / f"razor_{seed}.json"
    done = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "rows": {}}
    n_kv = hooks.shape(model)["n_kv_heads"]
    if "echo" not in done:
        echo, induction = head_scores(model, seed=seed)
        done |= dict(
            echo=echo.numpy().round(4).tolist(), induction=induction.numpy().round(4).tolist()
        )
        path.write_text(json.dumps(done))
    echo, induction = kv(done["echo"], n_kv), kv(done["induction"], n_kv)
    ids, answers, _ = retrieval.needles(tokenizer, N_NEEDLES, LENGTH, seed)
    prose, read = texts(tokenizer, seed), {}
    for m in methods(echo, induction, seed):
        name = f"{m['method']} {m['setting']}"
        row = done["rows"].setdefault(
            name, dict(method=m["method"], setting=m["setting"], seed=seed)
        )
        row["share"] = share(m["whole"], m["size"] + (m["heavy"] or 0), m["comp"])
        row["heads"] = 0 if m["whole"] is None else int(m["whole"].sum())
        for name, keep in (
            ("tokens", retrieval.TAIL),
            ("after", 1),
        ):  # cut before, after the question
            if name in row:
                continue
            if keep not in read:
                read[keep] = [read_and_weigh(model, part, keep) for part in ids.split(4)]
            right = []
            parts = zip(read[keep], ids.split(4), answers.split(4), strict=True)
            for (cache, drawn), part, a in parts:
                heavy = hitters(drawn, m["heavy"]) if m["heavy"] else None
                with forgetting(model, m["whole"], m["size"], m["comp"], heavy):
                    right.append(retrieval.answer(model, cache, part, a, keep))
            right = torch.cat(right)
            row[name] = float(right.float().mean())
            if name == "tokens":
                row["needle"] = float(right.all(1).float().mean())
        if "perplexity" not in row:
            with forgetting(model, m["whole"], m["size"], m["comp"], m["heavy"]):
                row["perplexity"] = perplexity(model, prose)
        print(row, flush=True)
        path.write_text(json.dumps(done))
    return done


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/long_context"))
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2", device="cpu")
    seeds = [run(model, tokenizer, seed, args.scratch) for seed in range(3)]
    for one in seeds:
        one["rows"] = list(one["rows"].values())
    (HERE / "razor.json").write_text(json.dumps({"seeds": seeds}))
    kept = ("method", "setting", "seed", "share", "perplexity", "needle")
    rows = []
    for one in seeds:
        full = next(r["perplexity"] for r in one["rows"] if r["method"] == "full cache")
        rows += [
            {k: row.get(k) for k in kept} | {"full": full}  # on the same texts
            for row in one["rows"] if row["method"] != "full cache"
        ]  # fmt: skip
    (HERE / "razor_frontier.json").write_text(json.dumps({"rows": rows}, indent=0))


if __name__ == "__main__":
    main()
