"""Makes corda_results.json: adapters of SmolLM2's last blocks, and what they cost in knowledge.

New task: one-step word problems. Old knowledge: sentences on capitals, languages, continents and
the like (written for the book, CC0). LoRA, PiSSA and CorDA's two modes (arXiv 2406.05223) train
adapters of one rank in the last three blocks, on hidden states that the 27 blocks before them give
once. Also: what is left of the knowledge when the smallest components of these blocks are dropped.
About five minutes a seed on one core; a finished run is kept.

    python data/quantization/make_corda.py --seeds 0 1 2 --scratch /tmp/corda
"""

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from make_ptq161 import Blocks  # noqa: E402

from lib import models, quantization  # noqa: E402

FIRST, RANK, BATCH, STEPS = 27, 16, 8, 24
RATES = (2e-3, 5e-4)
HOWS = ("plain", "ASVD", "CorDA")
CHECK = (6, 12, 24)  # steps after which both are scored
METHODS = ("LoRA", "PiSSA", "CorDA, knowledge kept", "CorDA, instruction previewed")
N_TRAIN, N_DRAWN, N_TEST = 96, 80, 48  # problems: to draw from, drawn by a seed, to test on
DROPS = (0.25, 0.5)  # shares of a matrix's components
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, "
    "Greece Athens, Poland Warsaw, Hungary Budapest, Russia Moscow, Ukraine Kiev, Norway Oslo, "
    "Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Ireland Dublin, Belgium Brussels, "
    "Japan Tokyo, China Beijing, India Delhi, Thailand Bangkok, Vietnam Hanoi, Turkey Ankara, "
    "Iran Tehran, Iraq Baghdad, Syria Damascus, Lebanon Beirut, Egypt Cairo, Kenya Nairobi, "
    "Libya Tripoli, Tunisia Tunis, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, "
    "Australia Canberra, Afghanistan Kabul, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade"
)
LANGUAGES = (
    "France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, "
    "Greece Greek, "
    "Poland Polish, Russia Russian, Norway Norwegian, Sweden Swedish, Denmark Danish, "
    "Finland Finnish, Japan Japanese, China Chinese, Thailand Thai, Turkey Turkish, Egypt Arabic, "
    "Mexico Spanish, Brazil Portuguese, Austria German, England English, Argentina Spanish, "
    "Korea Korean, Hungary Hungarian"
)
CONTINENTS = (
    "Kenya Africa, Nigeria Africa, Egypt Africa, Ghana Africa, Morocco Africa, Japan Asia, "
    "China Asia, India Asia, Thailand Asia, Vietnam Asia, Iran Asia, France Europe, "
    "Germany Europe, "
    "Italy Europe, Norway Europe, Poland Europe, Greece Europe, Spain Europe, Ethiopia Africa, "
    "Nepal Asia, Sweden Europe, Tanzania Africa, Pakistan Asia, Belgium Europe"
)
OPPOSITES = (
    "hot cold, big small, up down, left right, day night, black white, rich poor, old young, "
    "happy sad, fast slow, open closed, early late, hard soft, true false, north south, east west, "
    "wet dry, full empty, light dark, strong weak, good bad, long short, high low, war peace"
)
ASKED = {
    "The capital of {} is": CAPITALS,
    "The main language spoken in {} is": LANGUAGES,
    "{} is a country on the continent of": CONTINENTS,
    "The opposite of {} is": OPPOSITES,
}


def facts() -> list:
    """(question, answer) pairs of what the model knew before."""
    return [
        (question.format(a), f" {b}")
        for question, pairs in ASKED.items()
        for a, b in (pair.split() for pair in pairs.split(", "))
    ]


def problems(n: int, seed: int) -> list:
    """``n`` different one-step word problems: (question, answer) pairs."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        name = rng.choice("Mary John Tom James Dan Anna Alice Bob Sarah Emma Jack Paul".split())
        thing = rng.choice("apples books coins pens balls cards keys eggs".split())
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        text, answer = rng.choice(
            [
                (f"{name} has {a} {thing} and buys {b} more. How many {thing} now?", a + b),
                (f"{name} has {a + b} {thing} and loses {b}. How many {thing} are left?", a),
                (f"{name} has {a} boxes with {b} {thing} in each. How many {thing} in all?", a * b),
            ]
        )
        found[f"Question: {text}\nAnswer:"] = f" {answer}"
    return list(found.items())


def encode(tokenizer, pairs: list, device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [n, pos], filled up on the right, and targets [n, pos]: the next token where it
    belongs to the answer, −100 elsewhere."""
    rows = [(tokenizer(q).input_ids, tokenizer(a).input_ids) for q, a in pairs]
    width = max(len(q) + len(a) for q, a in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for i, (q, a) in enumerate(rows):
        ids[i, : len(q) + len(a)] = torch.tensor(q + a)
        targets[i, len(q) - 1 : len(q) + len(a) - 1] = torch.tensor(a)
    return ids.to(device), targets.to(device)


@torch.no_grad()
def entering(model, ids: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Hidden states [n, pos, d] that block FIRST reads."""
    run, out = Blocks(model, ids.shape[1]), []
    for part in ids.split(batch):
        x = model.model.embed_tokens(part)
        for block in run.layers[:FIRST]:
            x = run(block, {}, x)
        out.append(x)
    return torch.cat(out)


def adapted(model) -> dict[str, torch.Tensor]:
    """Weights of the linears from block FIRST on, by name."""
    return {
        n: m.weight for n, m in quantization.linears(model).items() if int(n.split(".")[2]) >= FIRST
    }


def losses(model, weights: dict, x: torch.Tensor, targets: torch.Tensor):
    """Negative log likelihood [n] of whole answers and whether all their tokens are the likeliest
    [n], with ``weights`` in the last blocks, which read x [n, pos, d]."""
    run = Blocks(model, x.shape[1])
    for i in range(FIRST, len(run.layers)):
        prefix = f"model.layers.{i}."
        own = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
        x = run(run.layers[i], own, x)
    answer = targets != -100
    logits = model.lm_head(model.model.norm(x[answer]))
    each = F.cross_entropy(logits, targets[answer], reduction="none")
    row = answer.nonzero()[:, 0]
    nll = torch.zeros(len(x), device=x.device).index_add(0, row, each)
    wrong = (logits.argmax(-1) != targets[answer]).float()
    return nll, torch.zeros(len(x), device=x.device).index_add(0, row, wrong) == 0


def decompose(weight: torch.Tensor, second: torch.Tensor | None, damp: float = 0.01):
    """U [out, k], S [k], V [k, in] with U S V = weight: the singular value decomposition of W C,
    its right side times C⁻¹ (equation 4); without ``second`` that of W alone."""
    w = weight.double()
    if second is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u.float(), s.float(), v.float()
    c = second.double()
    c = c + damp * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
    return u.float(), s.float(), torch.linalg.solve(c, v.T).T.float()


def start(method: str, weight, knowledge, task, rank: int, generator):
    """Frozen weight [out, in] and trained factors B [out, rank], A [rank, in]; B A is part of W in
    all methods but LoRA, where B starts at zero.

    Args:
        knowledge, task: second moments of the layer's input on old questions and on new problems.
    """
    out, inside = weight.shape
    if method == "LoRA":
        bound = inside**-0.5  # the authors' default: Kaiming uniform with a = √5
        a = (torch.rand(rank, inside, generator=generator) * 2 - 1) * bound
        return weight, torch.zeros(out, rank, device=weight.device), a.to(weight.device)
    second = {METHODS[1]: None, METHODS[2]: knowledge, METHODS[3]: task}[method]
    u, s, v = decompose(weight, second)
    part = slice(len(s) - rank, None) if method == METHODS[2] else slice(rank)
    root = s[part].sqrt()
    b, a = u[:, part] * root, root[:, None] * v[part]
    return weight - b @ a, b.contiguous(), a.contiguous()


def train(
    model, method, rate, seed, moments, train_set, score, steps=STEPS, check=CHECK, rank=RANK
):
    """Rows of (step, scores) of one run: AdamW, one rate, a linear decay."""
    g = torch.Generator().manual_seed(seed)
    parts = {
        n: start(method, w, moments["knowledge"][n], moments["task"][n], rank, g)
        for n, w in adapted(model).items()
    }
    flat = [f.requires_grad_() for _, b, a in parts.values() for f in (b, a)]
    optimizer = torch.optim.AdamW(flat, lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    x, targets = train_set
    order, rows = torch.randperm(len(x), generator=g).tolist(), []
    for step in range(steps):
        at = [order[(step * BATCH + j) % len(order)] for j in range(BATCH)]
        weights = {n: w + b @ a for n, (w, b, a) in parts.items()}
        loss = losses(model, weights, x[at], targets[at])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 in check:
            with torch.no_grad():
                rows.append(
                    dict(step=step + 1, **score({n: w + b @ a for n, (w, b, a) in parts.items()}))
                )
    return rows


def scorer(model, task_set, fact_set):
    """weights -> loss in nats an answer and share of right ones, on new task and old knowledge."""

    @torch.no_grad()
    def score(weights):
        found = {}
        for name, (x, targets) in (("task", task_set), ("facts", fact_set)):
            both = [
                losses(model, weights, *part)
                for part in zip(x.split(32), targets.split(32), strict=True)
            ]
            nll, right = (torch.cat(v) for v in zip(*both, strict=True))
            found |= {
                f"{name}_nll": nll.mean().item(),
                f"{name}_right": right.float().mean().item(),
            }
        return found

    return score


def truncated(model, how: str, second: dict, drop: float) -> dict:
    """The last blocks' weights without the share ``drop`` of components, the smallest.

    ``how``: plain, ASVD (columns scaled by the size of their input, arXiv 2312.05821) or CorDA.
    """
    found = {}
    for n, w in adapted(model).items():
        size = second[n].diagonal().sqrt() + 1e-6
        if how == "ASVD":
            u, s, v = decompose(w * size, None)
            v = v / size
        else:
            u, s, v = decompose(w, second[n] if how == "CorDA" else None)
        keep = round(len(s) * (1 - drop))
        found[n] = (u[:, :keep] * s[:keep]) @ v[:keep]
    return found


@torch.no_grad()
def moments_of(model, x, targets) -> dict[str, torch.Tensor]:
    """Second moments of the adapted linears' inputs, where a token of a question or answer is read:
    from the states x [n, pos, d] that block FIRST reads."""
    real = (targets != -100).flip(1).cumsum(1).flip(1) > 0
    found, modules = {}, quantization.linears(model)

    def read(name, rows):
        found[name] = rows.T @ rows / len(rows)

    handles = [
        modules[n].register_forward_pre_hook(lambda _, a, n=n: read(n, a[0][real].float()))
        for n in adapted(model)
    ]
    try:
        losses(model, {}, x, targets)
    finally:
        for handle in handles:
            handle.remove()
    return found


def shared(model, tokenizer, scratch: Path) -> dict:
    """States and targets of all problems and facts: made once, the same for every seed."""
    path = scratch / "states.safetensors"
    sets = dict(task=problems(N_TRAIN + N_TEST, 0), facts=facts())
    targets = {n: encode(tokenizer, pairs, model.device) for n, pairs in sets.items()}
    if not path.is_file():
        save_file({n: entering(model, ids) for n, (ids, _) in targets.items()}, path)
    x = load_file(path)
    return {n: (x[n].to(model.device), targets[n][1]) for n in sets}


def setting(model, states: dict, seed: int) -> dict:
    """What a seed draws: problems to train on, facts to calibrate on, and the rest to test on."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(N_TRAIN, generator=g)[:N_DRAWN]
    order = torch.randperm(len(states["facts"][0]), generator=g)
    known, asked = order.chunk(2)

    def part(name, at):
        return tuple(v[at] for v in states[name])

    task = part("task", drawn)
    moments = dict(
        knowledge=moments_of(model, *part("facts", known)), task=moments_of(model, *task)
    )
    score = scorer(model, part("task", slice(N_TRAIN, None)), part("facts", asked))
    return dict(train=task, moments=moments, score=score)


def job(model, kind: str, what: tuple, seed: int, given: dict) -> list[dict]:
    """Rows of one piece of work: the plain model, dropped components, or a training run."""
    if kind == "plain":
        return [dict(seed=seed, **given["score"]({}))]
    if kind == "dropped":
        weights = truncated(model, what[0], given["moments"]["knowledge"], what[1])
        return [dict(seed=seed, how=what[0], drop=what[1], **given["score"](weights))]
    rows = train(model, *what, seed, given["moments"], given["train"], given["score"])
    return [dict(seed=seed, method=what[0], rate=what[1], **row) for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/corda"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    model, tokenizer = models.load("smollm2")
    states = shared(model, tokenizer, args.scratch)
    work = [[("plain", ())], [("dropped", (how, n)) for n in DROPS for how in HOWS]]
    work += [[("runs", (method, rate)) for method in METHODS] for rate in RATES]
    found, drawn = dict(plain=[], dropped=[], runs=[]), {}
    for part, seed in itertools.product(work, args.seeds):
        for kind, what in part:
            name = "_".join(map(str, (kind, *what, seed))).replace(" ", "_").replace(",", "")
            path = args.scratch / f"{name}.json"
            if not path.is_file():
                if time.time() - begun > 60 * args.minutes:
                    print("stopped; run again to go on")
                    return
                drawn = drawn if seed in drawn else {seed: setting(model, states, seed)}
                path.write_text(json.dumps(job(model, kind, what, seed, drawn[seed])))
                last = json.loads(path.read_text())[-1]
                print(name, last, f"{time.time() - begun:.0f} s", flush=True)
            found[kind] += json.loads(path.read_text())
    for rows in found.values():
        for row in rows:
            row |= {k: round(v, 4) for k, v in row.items() if k.endswith(("nll", "right"))}
    (HERE / "corda_results.json").write_text(json.dumps(found, indent=1) + "\n")
    print({k: len(v) for k, v in found.items()})


if __name__ == "__main__":
    main()
