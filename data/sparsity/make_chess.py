"""CHESS on SmolLM2: thresholds by channel, what they cost in loss, and what they save in time.

    python data/sparsity/make_chess.py --seeds 0 1 2   # about six minutes a seed on one core
    python data/sparsity/make_chess.py --times         # two minutes, alone on the machine

write ``chess_rows.json`` (a row a method, sparsity and calibration seed) and ``chess_times.json``
(seconds a token of decode loops); both rewrite ``frontier_chess.json``, those rows for the
chapter's frontier. Resumable by seed and by row. ``statistics``, ``thresholds``, ``masked`` and
``thinned`` are what the chapter uses.
"""

import argparse
import json
import platform
import statistics as stats
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets, hooks, models  # noqa: E402
from lib.kernels import decode, sparse_mlp, sparse_mv  # noqa: E402
from lib.kernels.dispatch import numba  # noqa: E402
from lib.kernels.sparse_mv import kept_by  # noqa: E402

SPARSITIES = (0.3, 0.5, 0.7)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SELECTED = ("q_proj", "o_proj")  # CHESS's choice: neither of the two whose results are cached
PROMPT = 16  # tokens before the timed ones
KEYS = ("method", "setting", "attention", "seed")


# --- calibration ----------------------------------------------------------------------------------


def sites_of(model, path: str) -> list[str]:
    """The site ``path`` of every block, such as ``"mlp.act_fn"``."""
    return [f"model.layers.{i}.{path}" for i in range(model.config.num_hidden_layers)]


def statistics(model, ids: Tensor) -> dict[str, list[Tensor]]:
    """What the thresholds are read off, by layer, from one forward a passage of ``ids`` [n, pos].

    Returns:
        ``g``: |act(W_gate x)| [tokens, d_mlp]; ``up``: mean |W_up x| [d_mlp]; ``qkv`` and ``o``:
        |input| of the queries', keys' and values' and of the output projection [tokens, d_model].
    """
    paths = dict(
        g="mlp.act_fn", up="mlp.up_proj", qkv="self_attn.q_proj:in", o="self_attn.o_proj:in"
    )
    sites = {key: sites_of(model, path) for key, path in paths.items()}
    found = {key: [[] for _ in names] for key, names in sites.items()}
    for row in ids:
        acts = hooks.read(model, row[None], sum(sites.values(), []))
        for key, names in sites.items():
            for parts, name in zip(found[key], names, strict=True):
                parts.append(acts[name][0].abs())
    joined = {key: [torch.cat(parts) for parts in by_layer] for key, by_layer in found.items()}
    joined["up"] = [u.mean(0) for u in joined["up"]]
    return joined


def cut_at(scores: Tensor, sparsity: float) -> Tensor:
    """The number at or below which a share ``sparsity`` of all ``scores`` lies."""
    below = int(sparsity * scores.numel())
    return scores.flatten().kthvalue(below).values if below else scores.new_tensor(-1.0)


def thresholds(found: Mapping, sparsity: float, rule: str) -> Tensor:
    """Thresholds on |g| [n_layers, d_mlp] that drop a share ``sparsity`` on the calibration text.

    Args:
        rule: "CHESS", c / E|u_i| with one c a layer; "CATS", one threshold a layer;
            "magnitude", one for the model.
    """
    if rule == "magnitude":
        cut = cut_at(torch.cat([g[::4].flatten() for g in found["g"]]), sparsity)
        return torch.stack([torch.full_like(u, float(cut)) for u in found["up"]])
    rows = []
    for g, up in zip(found["g"], found["up"], strict=True):
        weight = up if rule == "CHESS" else torch.ones_like(up)
        rows.append(cut_at(g * weight, sparsity) / weight)
    return torch.stack(rows)


def attention_cuts(found: Mapping, sparsity: float, names=SELECTED) -> dict[str, Tensor]:
    """One threshold a layer on |input| for each of the named projections: name -> [n_layers]."""
    cuts = {
        key: torch.stack([cut_at(x, sparsity) for x in found[key]])
        for key in {"o" if name == "o_proj" else "qkv" for name in names}
    }
    return {name: cuts["o" if name == "o_proj" else "qkv"] for name in names}


# --- leaving out ----------------------------------------------------------------------------------


@contextmanager
def masked(model, rule: Callable[[int, Tensor], Tensor]):
    """Zero act(gate) wherever ``rule(layer, g)`` is False; yields the kept shares as they come.

    Zeroing the gate is what leaving a neuron out does: its product with the up branch is zero,
    and so is its part of the output.
    """
    shares = []

    def change(layer, g):
        keep = rule(layer, g)
        shares.append(float(keep.float().mean()))
        return torch.where(keep, g, 0)

    sites = sites_of(model, "mlp.act_fn")
    with hooks.edit(model, {site: partial(change, i) for i, site in enumerate(sites)}):
        yield shares


def above(t: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The rule of ``sparse_mlp.gated_mlp``: |g| above thresholds [n_layers, d_mlp]."""
    return lambda layer, g: kept_by(g, t[layer])


def top_k(share: float) -> Callable[[int, Tensor], Tensor]:
    """The same number of neurons for every token: those with the largest |g|."""

    def rule(_, g):
        kept = g.abs().topk(round(share * g.shape[-1]), dim=-1).indices
        return torch.zeros_like(g, dtype=torch.bool).scatter_(-1, kept, True)

    return rule


def at_random(share: float, seed: int) -> Callable[[int, Tensor], Tensor]:
    """Neurons drawn anew for every token."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, g: (torch.rand(g.shape, generator=generator) < share).to(g.device)


@contextmanager
def thinned(model, cuts: Mapping[str, Tensor]):
    """Zero inputs of the named attention projections at or below ``cuts[name]`` [n_layers].

    Yields, by name, the kept shares as they come.
    """
    shares = {name: [] for name in cuts}

    def change(name, limit, x):
        keep = kept_by(x, limit)
        shares[name].append(float(keep.float().mean()))
        return torch.where(keep, x, 0)

    edits = {
        site: partial(change, name, limit)
        for name, cut in cuts.items()
        for site, limit in zip(sites_of(model, f"self_attn.{name}:in"), cut, strict=True)
    }
    with hooks.edit(model, edits):
        yield shares


def megabytes(model, mlp_share: float, attention: Mapping[str, float] | None = None) -> float:
    """Float32 bytes of the blocks' weights that one token reads, in 10⁶.

    Args:
        mlp_share: kept neurons; the gate is read whole, the other two for these alone.
        attention: projection -> the share of its inputs that is kept; others are read whole.
    """
    total = 0.0
    for layer in model.model.layers:
        gate, up, down = (
            p.weight.numel() for p in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        )
        total += gate + mlp_share * (up + down)
        for name in PROJECTIONS:
            total += getattr(layer.self_attn, name).weight.numel() * (attention or {}).get(name, 1)
    return 4 * total / 1e6


# --- quality --------------------------------------------------------------------------------------


def tasks(tokenizer) -> dict:
    """The held-out passages, four words to choose from where a word begins, and IOI prompts."""
    ids = datasets.passages(tokenizer, "held out", 4, 256, seed=1851)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    begins = torch.tensor([t.startswith("Ġ") and t[1:].isalpha() for t in pieces])
    at = begins[ids[:, 1:]].nonzero()  # [items, 2]: passage and position before the word
    words = ids[:, 1:][begins[ids[:, 1:]]]
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for right in words:
        other = words[words != right]
        wrong.append(other[torch.randint(len(other), (3,), generator=generator)])
    choices = torch.cat([words[:, None], torch.stack(wrong)], 1)
    groups = {}
    for p in datasets.ioi(96, seed=0):
        prompt = tokenizer(p["prompt"]).input_ids
        pair = [tokenizer(p[who]).input_ids[0] for who in ("io", "s")]
        groups.setdefault(len(prompt), []).append((prompt, pair))
    ioi = [tuple(map(torch.tensor, zip(*group, strict=True))) for group in groups.values()]
    return {"ids": ids, "at": at, "choices": choices, "ioi": ioi}


@torch.inference_mode()
def quality(model, task: Mapping) -> dict:
    """Nats a passage; accuracy at the next of four words (chance 1/4) and at IOI (chance 1/2)."""
    losses, hits, told = [], [], []
    for p, row in enumerate(task["ids"].to(model.device)):
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(round(float(F.cross_entropy(logits, row[1:])), 5))
        mine = task["at"][:, 0] == p
        four = logits[task["at"][mine, 1].to(row.device)].gather(
            1, task["choices"][mine].to(row.device)
        )
        hits += (four.argmax(1) == 0).tolist()
    for prompts, pairs in task["ioi"]:
        last = model(prompts.to(model.device), logits_to_keep=1).logits[:, -1]
        two = last.gather(1, pairs.to(model.device))
        told += (two[:, 0] > two[:, 1]).tolist()
    return {
        "losses": losses,
        "perplexity": round(float(torch.tensor(losses).mean().exp()), 4),
        "words": round(sum(hits) / len(hits), 5),
        "ioi": round(sum(told) / len(told), 5),
    }


def plan(seed: int, only: float | None = None) -> list[dict]:
    """What is measured with this calibration seed; what no seed changes, with the first alone."""
    rows = [{"method": "dense", "s": 0.0}] if seed == 0 else []
    for s in SPARSITIES:
        rows += [{"method": m, "s": s} for m in ("CHESS", "CATS", "magnitude", "random")]
        rows += [{"method": "top-k", "s": s}] if seed == 0 else []
        # Keys and values are a quarter of the attention's weights under grouped queries, so all
        # four at three quarters of the sparsity read as few bytes as the two.
        rows += [
            {"method": "CHESS", "s": s, "names": SELECTED, "attention": "q, o"},
            {"method": "CHESS", "s": s, "names": PROJECTIONS, "attention": "q, k, v, o"},
            {"method": "CHESS", "s": s, "names": PROJECTIONS, "share": 0.75,
             "attention": "q, k, v, o at the bytes of q, o"},
        ]  # fmt: skip
    rows += [
        {"method": "dense", "s": 0.7, "names": (name,), "attention": name[0]}
        for name in PROJECTIONS
    ]
    return [
        {"attention": "dense", "names": (), "share": 1.0, "seed": seed, **r}
        | {"setting": f"{100 * r['s']:.0f} %"}
        for r in rows
        if only is None or r["s"] == only
    ]


def rows_of_seed(model, tokenizer, seed: int, n: int, done: list[dict], keep: Callable) -> None:
    """Measure what ``done`` lacks of this seed, and hand each row to ``keep``."""
    known = {tuple(r[k] for k in KEYS) for r in done}
    todo = [p for p in plan(seed) if tuple(p[k] for k in KEYS) not in known]
    if not todo:
        return
    task = tasks(tokenizer)
    ids = datasets.passages(tokenizer, "calibration", n, 256, seed).to(model.device)
    found = statistics(model, ids)
    for p in todo:
        s, share = p["s"], 1 - p["s"]
        rules = {
            "top-k": lambda share=share: top_k(share),
            "random": lambda share=share: at_random(share, seed),
            "dense": lambda: lambda _, g: torch.ones_like(g, dtype=torch.bool),
        }
        make = rules.get(p["method"], lambda s=s, p=p: above(thresholds(found, s, p["method"])))
        cuts = attention_cuts(found, p["share"] * s, p["names"]) if p["names"] else {}
        with masked(model, make()) as kept, thinned(model, cuts) as thin:
            begin = time.perf_counter()
            measured = quality(model, task)
        mlp_share = stats.mean(kept)
        thin = {name: stats.mean(v) for name, v in thin.items()}
        row = {k: p[k] for k in KEYS} | {
            "mlp_share": round(mlp_share, 5),
            "attention_share": {name: round(v, 5) for name, v in thin.items()},
            "megabytes": round(megabytes(model, mlp_share, thin), 3),
            **measured,
        }
        print(*(row[k] for k in KEYS), row["mlp_share"], row["perplexity"], row["words"],
              row["ioi"], f"{time.perf_counter() - begin:.1f} s", flush=True)  # fmt: skip
        keep(row)


# --- seconds --------------------------------------------------------------------------------------


def own_loop(model, t: Tensor, cuts: Mapping[str, Tensor], length: int) -> Callable:
    """``step(token, position) -> logits``: ``decode``'s loop with the sparse products in it.

    The dense loop to compare it with is ``decode.quantize(model, dtype=torch.float32)``. Keys and
    values of up to ``length`` positions are kept; begin again at position 0 for a new text.

    Args:
        t: thresholds [n_layers, d_mlp]; below zero: every neuron is read.
        cuts: from ``attention_cuts`` for queries and outputs, or empty: these are read whole.
    """
    c, n = model.config, numba.get_num_threads()
    heads, kv, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    d, queries, eps = c.hidden_size, heads * width, np.float32(c.rms_norm_eps)
    keys = np.zeros((len(t), kv, width, length), np.float32)
    values = np.zeros((len(t), kv, length, width), np.float32)
    turns = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(length)[None])
    cos, sin = (x[0].float().numpy() for x in turns)
    qkv2, out2 = decode._rows(queries + 2 * kv * width), decode._rows(c.vocab_size)
    qkv, out = qkv2.reshape(-1), out2.reshape(-1)[: c.vocab_size]
    h, part, normed = (np.zeros(d, np.float32) for _ in range(3))
    z = np.zeros(queries, np.float32)
    plan = []
    for i, layer in enumerate(model.model.layers):
        a, m = layer.self_attn, layer.mlp
        w = {name: getattr(a, name).weight.detach() for name in PROJECTIONS}
        first = ("k_proj", "v_proj") if cuts else PROJECTIONS[:3]
        products = [torch.cat([w[name] for name in first]), w["o_proj"]]
        if cuts:
            products += [w["q_proj"].T, w["o_proj"].T]
        limits = [np.float32(cuts[name][i]) for name in SELECTED] if cuts else []
        rows = sparse_mlp.pack(m.up_proj.weight, m.down_proj.weight)
        mlp = sparse_mv.arrays(m.gate_proj.weight, rows, t[i])
        norms = sparse_mv.arrays(
            layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        )
        plan.append((norms, sparse_mv.arrays(*products), limits, mlp, keys[i], values[i]))
    embed, last = sparse_mv.arrays(model.model.embed_tokens.weight, model.model.norm.weight)
    (head,) = sparse_mv.arrays(model.lm_head.weight)

    def mix(w, x, limit, y):  # y = Σ x_i w_i over the inputs above the limit
        kept = np.flatnonzero(~(np.abs(x) <= limit))
        sparse_mv._numba_mix(w, x, kept, n, y)

    def step(token: int, position: int) -> np.ndarray:
        h[:] = embed[token]
        turn = cos[position], sin[position]
        attend = decode._attend_long if position >= decode._LONG else decode._attend
        for (before, between), products, limits, mlp, k, v in plan:
            decode._normalize(h, before, eps, normed)
            decode._full_mv(products[0], normed, qkv2[queries // 16 :] if limits else qkv2, False)
            if limits:
                mix(products[2], normed, limits[0], qkv[:queries])
            attend(qkv, *turn, k, v, position, z)
            if limits:
                mix(products[3], z, limits[1], part)
                h[:] += part
            else:
                decode._full_mv(products[1], z, h.reshape(-1, 16), True)
            decode._normalize(h, between, eps, normed)
            sparse_mlp._numba_gated(normed, *mlp, False, n, part)
            h[:] += part
        decode._normalize(h, last, eps, normed)
        decode._full_mv(head, normed, out2, False)
        return out

    return step


def time_loop(step: Callable, prompt: list[int], tokens: int) -> float:
    """Median seconds a token of greedy decoding after ``prompt``."""
    for position, token in enumerate(prompt):
        found = step(token, position)
    times = []
    for position in range(len(prompt), len(prompt) + tokens):
        begin = time.perf_counter()
        found = step(int(found.argmax()), position)
        times.append(time.perf_counter() - begin)
    return stats.median(times)


def time_generate(model, prompt: Tensor, tokens: int) -> float:
    """Median seconds a token of ``model.generate`` after ``prompt`` [1, pos]."""
    at = []

    def note(ids, scores, **_):
        at.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        stopping_criteria=[note], attention_mask=torch.ones_like(prompt),
    )  # fmt: skip
    return stats.median(b - a for a, b in zip(at, at[1:], strict=False))


@contextmanager
def forwards(modules, make: Callable):
    """Give each module ``make(i, module)`` for its forward while open."""
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            module.forward = make(i, module)
            stack.callback(delattr, module, "forward")
        yield


def columns(_, mlp):
    """torch's faster dense product at batch 1: x @ W with gate and up stored [in, out]."""
    a, b = (w.weight.detach().T.contiguous() for w in (mlp.gate_proj, mlp.up_proj))
    down, dense = mlp.down_proj.weight.T, mlp.forward
    return lambda x: (F.silu(x @ a) * (x @ b)) @ down if x.shape[1] == 1 else dense(x)


def sparse_inputs(cuts: Tensor):
    """A projection that at batch 1 reads only the columns whose inputs are above ``cuts[i]``."""

    def make(i, module):
        w, limit, dense = module.weight.detach().T.contiguous(), float(cuts[i]), module.forward

        def forward(x):
            if x.numel() != len(w):
                return dense(x)
            return sparse_mv.sparse_mv(w, x.reshape(-1), limit).view(*x.shape[:-1], -1)

        return forward

    return make


@contextmanager
def in_kernels(model, t: Tensor, cuts: Mapping[str, Tensor]):
    """``generate`` with the sparse MLP and, with ``cuts``, sparse queries and outputs."""
    with ExitStack() as stack:
        stack.enter_context(sparse_mlp.sparse_mlp(model, t))
        for name, cut in cuts.items():
            modules = [getattr(layer.self_attn, name) for layer in model.model.layers]
            stack.enter_context(forwards(modules, sparse_inputs(cut)))
        yield


@torch.inference_mode()
def times(model, tokenizer, n: int, rounds: int, tokens: int) -> dict:
    """Seconds a token of every way, in turn, round by round; float32, batch 1, a short prompt."""
    begin = time.perf_counter()
    found = statistics(model, datasets.passages(tokenizer, "calibration", n, 256, 0))
    prompt = datasets.passages(tokenizer, "held out", 1, PROMPT, seed=7)
    cuts = {s: attention_cuts(found, s) for s in (0.5, 0.7)}
    t = {("CHESS", s): thresholds(found, s, "CHESS") for s in SPARSITIES}
    t["CHESS", 0.0] = torch.full_like(t["CHESS", 0.5], -1.0)
    settings = [(*key, {}) for key in t] + [("CHESS", s, cut) for s, cut in cuts.items()]
    for s in SPARSITIES:
        t["CATS", s] = thresholds(found, s, "CATS")
        settings.append(("CATS", s, {}))
    del found
    decoder, first = decode.quantize(model, dtype=torch.float32), prompt[0].tolist()

    def dense_step(token, position):
        if position == 0:
            decoder.start(PROMPT + tokens)
        return decoder.step(token)

    steps, errors = {("decode loop", "dense", "0 %", "dense"): dense_step}, {}
    contexts = {
        ("generate", "dense", "0 %", "dense"): ExitStack,
        ("generate", "dense, x @ W", "0 %", "dense"): lambda: forwards(
            [layer.mlp for layer in model.model.layers], columns
        ),
    }
    for method, s, cut in settings:
        step = own_loop(model, t[method, s], cut, PROMPT + tokens)
        for position, token in enumerate(first):
            got = torch.from_numpy(step(token, position).copy())
        with masked(model, above(t[method, s])), thinned(model, cut):
            want = model(prompt).logits[0, -1]
        key = (method, f"{100 * s:.0f} %", "q, o" if cut else "dense")
        errors[key] = float((got - want).abs().max() / want.abs().max())
        steps["decode loop", *key] = step
        if method == "CHESS":
            contexts["generate", *key] = partial(in_kernels, model, t[method, s], cut)
    exact = errors["CHESS", "0 %", "dense"]  # a gate within rounding of its threshold may flip
    assert exact < 1e-4, f"the loop differs from the model by {exact}"
    rows = []
    for turn in range(-1, rounds):  # the first, short round warms up
        if turn >= 3 and time.perf_counter() - begin > 90:
            break
        many = tokens if turn >= 0 else 4
        found = {key: time_loop(step, first, many) for key, step in steps.items()}
        for key, context in contexts.items():
            with context():
                found[key] = time_generate(model, prompt, max(4, many // 3))
        for key, seconds in found.items() if turn >= 0 else ():
            named = dict(zip(("loop", "method", "setting", "attention"), key, strict=True))
            rows.append(named | {"round": turn, "seconds": round(seconds, 6)})
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines()
             if line.startswith("model name")] if cpu.is_file() else []  # fmt: skip
    machine = {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    return {"machine": machine, "rows": rows, "error": exact, "worst": max(errors.values())}


# --- files ----------------------------------------------------------------------------------------


def frontier(rows: list[dict], timed: dict | None) -> list[dict]:
    """The rows in the chapter's common form, with the decode loop's seconds where it was timed."""
    seconds = {}
    for r in (timed or {"rows": []})["rows"]:
        if r["loop"] == "decode loop":
            seconds.setdefault((r["method"], r["setting"], r["attention"]), []).append(r["seconds"])
    names = {"magnitude": "magnitude (one threshold for the model)",
             "CATS": "CATS (layer-wise thresholds)"}  # fmt: skip
    found = []
    for r in rows:
        if r["attention"] not in ("dense", "q, o"):
            continue
        took = seconds.get((r["method"], r["setting"], r["attention"]))
        found.append({
            "method": names.get(r["method"], r["method"])
            + (", attention too" if r["attention"] != "dense" else ""),
            **{k: r[k] for k in ("setting", "seed", "mlp_share", "megabytes")},
            "seconds": round(stats.median(took), 6) if took else None,
            "perplexity": r["perplexity"],
        })  # fmt: skip
    return found


def write(name: str, rows: list | dict) -> None:
    """JSON, a row a line."""
    lines = lambda items: "[\n" + ",\n".join(json.dumps(r) for r in items) + "\n]"  # noqa: E731
    if isinstance(rows, dict):
        head = json.dumps({k: v for k, v in rows.items() if k != "rows"})[:-1]
        text = f'{head}, "rows": {lines(rows["rows"])}}}\n'
    else:
        text = lines(rows) + "\n"
    (HERE / name).write_text(text)
    print(f"{name}: {len(text):,} bytes")


def read(name: str):
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--texts", type=int, default=8, help="calibration passages of 256 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/make_chess"))
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2", device="cpu")
    for seed in args.seeds:
        path = args.scratch / f"rows_{seed}.json"
        done = json.loads(path.read_text()) if path.exists() else []

        def keep(row, done=done, path=path):
            done.append(row)
            path.write_text(json.dumps(done))

        rows_of_seed(model, tokenizer, seed, args.texts, done, keep)
    if args.times:
        write("chess_times.json", times(model, tokenizer, args.texts, args.rounds, args.tokens))
    parts = sorted(args.scratch.glob("rows_*.json"))
    if len(parts) >= 3:
        write("chess_rows.json", [r for part in parts for r in json.loads(part.read_text())])
    if rows := read("chess_rows.json"):
        write("frontier_chess.json", frontier(rows, read("chess_times.json")))


if __name__ == "__main__":
    main()
