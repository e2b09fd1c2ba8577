"""Makes void_results.json and frontier_void.json: which blocks SmolLM2 leaves unused by the rule of
L2 Adaptive Computation (Void in Language Models, arXiv 2505.14467), in prompts and in responses,
and what skipping them does, against the same number skipped at random or always the same ones.
About 12 minutes on one core; a finished row is kept and not made again.

    python data/sparsity/make_void.py --scratch /tmp/void
"""

import argparse
import json
import random
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import datasets, models, steering  # noqa: E402

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


# --- the rule -----------------------------------------------------------------------------------


@contextmanager
def adaptive(model, alpha: float, how: str = "skip", masks=None):
    """While it lasts, blocks are traced or skipped by the rule, for each token by itself.

    A block is used where it lengthens the stream by at least ``alpha`` times the range (largest
    minus smallest) of what the blocks below it did; otherwise it is a void.

    Args:
        how: ``"trace"`` changes nothing; ``"exit"`` gives the final norm the output of the last
            used block, all blocks having run on all they were given (what the released code does);
            ``"skip"`` passes the stream on unchanged past a void, whose keys and values later
            tokens still see, made from what was passed on.
        masks: instead of the rule, which blocks to use: bool [layers, batch, pos], one a forward.

    Yields:
        a list that gets, a forward, what was used: bool [layers, batch, pos].
    """
    uses, deltas, used = [], [], []
    kept = None

    def hook(layer):
        def after(module, args, out):
            nonlocal kept
            x = args[0]
            if layer == 0:
                deltas.clear()
                used.clear()
                kept = x
            delta = out.norm(dim=-1) - x.norm(dim=-1)
            below = torch.stack(deltas or [delta])
            on = delta >= alpha * (below.amax(0) - below.amin(0))
            if masks is not None:
                on = masks[len(uses)][layer].to(x.device)
            deltas.append(delta)
            used.append(on)
            last = layer == model.config.num_hidden_layers - 1
            if last:
                uses.append(torch.stack(used))
            if how == "skip":
                return torch.where(on[..., None], out, x)
            kept = torch.where(on[..., None], out, kept)
            return kept if how == "exit" and last else out

        return after

    handles = [b.register_forward_hook(hook(i)) for i, b in enumerate(model.model.layers)]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


# --- questions ----------------------------------------------------------------------------------

PLACES = "kitchen garden office garage bedroom library".split()
THINGS = "key book ball letter hat lamp phone ring".split()
CAPITALS = (
    "France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|Russia Moscow|Egypt Cairo|"
    "Austria Vienna|Greece Athens|Portugal Lisbon|Ireland Dublin|Poland Warsaw|Norway Oslo|"
    "China Beijing|Cuba Havana|Iran Tehran|Kenya Nairobi|Peru Lima|Hungary Budapest|Turkey Ankara|"
    "Ghana Accra|Ecuador Quito|Nepal Kathmandu|Latvia Riga|Zambia Lusaka|Uganda Kampala|"
    "Senegal Dakar|Jordan Amman|Oman Muscat|Qatar Doha|Mongolia Ulaanbaatar|Laos Vientiane|"
    "Fiji Suva|Malawi Lilongwe|Bhutan Thimphu|Slovenia Ljubljana|Iceland Reykjavik"
)
ASKED = (
    "What is the capital of France?|Why is the sky blue?|Give me a recipe for pancakes.|"
    "Write a short poem about the sea.|How do I tie a tie?|What does a heart do?|"
    "Name three planets.|Tell me a story about a dog.|How many days has a year?|"
    "What is photosynthesis?|Explain what a noun is.|How can I sleep better?|"
    "Who wrote Hamlet?|What is a good name for a cat?|Why do leaves turn red in autumn?|"
    "Translate 'good morning' into French.|What is 7 times 8?|How does a magnet work?|"
    "List four vegetables.|What should I pack for a trip to the mountains?|"
    "Describe the taste of a lemon.|What is the difference between a frog and a toad?|"
    "How do I make tea?|Write one sentence about winter."
).split("|")


def question(task: str, rng: random.Random) -> tuple[str, str, list[str], int]:
    """What the user asks, how the answer begins, its possible next words and which is right.

    ``where``: a passage of three sentences and six places; ``capital``: four cities.
    """
    if task == "capital":
        drawn = rng.sample([p.split() for p in CAPITALS.split("|")], 4)
        country = drawn[0][0]
        begin = f"The capital of {country} is"
        return f"What is the capital of {country}?", begin, [f" {city}" for _, city in drawn], 0
    things, places = rng.sample(THINGS, 3), rng.sample(PLACES, 3)
    passage = " ".join(f"The {t} is in the {p}." for t, p in zip(things, places, strict=True))
    i = rng.randrange(3)
    begin = f"The {things[i]} is in the"
    options = [f" {p}" for p in PLACES]
    return f"{passage} Where is the {things[i]}?", begin, options, PLACES.index(places[i])


def questions(tokenizer, task: str, n: int, seed: int):
    """``n`` of them: the prompts' tokens (a list), first tokens of the possible answers [n,
    answers], and the right ones [n]."""
    rng = random.Random(f"{task} {seed}")
    drawn = [question(task, rng) for _ in range(n)]
    texts = [steering.prompt(tokenizer, asked) + begin for asked, begin, _, _ in drawn]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    first = [[tokenizer(word).input_ids[0] for word in words] for _, _, words, _ in drawn]
    return ids, torch.tensor(first), torch.tensor([right for *_, right in drawn])


@torch.inference_mode()
def chosen(model, ids: list[list[int]], options: Tensor) -> Tensor:
    """Which of the possible answers the model finds likeliest at the end of each prompt: [n]."""
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, own in zip(padded, ids, strict=True):
        row[: len(own)] = torch.tensor(own)  # padding stands behind, where nothing looks back at it
    device = next(model.parameters()).device
    stream = model.model(padded.to(device)).last_hidden_state
    logits = model.lm_head(stream[torch.arange(len(ids)), lengths - 1]).cpu()
    return logits.gather(1, options).argmax(1)


# --- what to leave out instead ------------------------------------------------------------------


@torch.inference_mode()
def rankings(model, ids: Tensor) -> dict[str, list[int]]:
    """Blocks, the one to leave out first first. ``norm``: least mean lengthening of the stream;
    ``influence``: least mean of 1 − cos(stream before, after) (ShortGPT, arXiv 2403.03853);
    ``late``: the last but one and on downwards."""
    length, turn = [], []

    def after(module, args, out):
        x = args[0]
        length.append(float((out.norm(dim=-1) - x.norm(dim=-1))[:, 1:].mean()))
        turn.append(float(1 - F.cosine_similarity(out, x, dim=-1)[:, 1:].mean()))

    handles = [b.register_forward_hook(after) for b in model.model.layers]
    try:
        model.model(ids)
    finally:
        for handle in handles:
            handle.remove()
    n = len(length)
    return {
        "norm": sorted(range(n), key=lambda i: length[i]),
        "influence": sorted(range(n), key=lambda i: turn[i]),
        "late": [*range(n - 2, -1, -1), n - 1],
    }


def fixed(out: list[int], n_layers: int, shape) -> Tensor:
    """The mask that leaves out these blocks for every token: bool [layers, *shape]."""
    mask = torch.ones(n_layers, *shape, dtype=torch.bool)
    mask[list(out)] = False
    return mask


def shuffled(mask: Tensor, seed: int) -> Tensor:
    """As many blocks used for each token, but any: mask [layers, batch, pos]."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(mask.shape, generator=g).argsort(0).to(mask.device)
    return mask.gather(0, order)


# --- measures -----------------------------------------------------------------------------------


@torch.inference_mode()
def traced(model, tokenizer, asked: list[str], n_new: int, alphas) -> list[dict]:
    """For each question and alpha, the share of tokens that use each block: in the prompt (``pp``),
    in the response (``rg``), and in the same response read as a user's words (``read``)."""
    rows = []
    for said, answer in zip(
        asked, steering.generate(model, tokenizer, asked, n_new=n_new, batch=1), strict=True
    ):
        whole = steering.prompt(tokenizer, said)
        n_prompt = len(tokenizer(whole, add_special_tokens=False).input_ids)
        reply = tokenizer(answer, add_special_tokens=False).input_ids
        before, behind = steering.prompt(tokenizer, "\0").split("\0")
        n_before = len(tokenizer(before, add_special_tokens=False).input_ids)
        for alpha in alphas:
            parts = {}
            with adaptive(model, alpha, "trace") as uses:
                for text in (whole + answer, before + answer + behind):
                    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                    model.model(ids.to(model.device))
            talk, read = (u[:, 0].float().cpu() for u in uses)
            parts["pp"] = talk[:, 1:n_prompt]  # the first token, all void, left out
            parts["rg"] = talk[:, n_prompt : n_prompt + len(reply)]
            parts["read"] = read[:, n_before : n_before + len(reply)]
            rows.append({"alpha": alpha} | {k: v.mean(1) for k, v in parts.items()})
    return rows


@torch.inference_mode()
def loss_under(model, ids: Tensor, how: str = "skip", alpha: float = 0.0, masks=None):
    """Mean loss of each row in nats (as ``metrics.losses``) and what was used, a mask a row.
    ``how`` "full": nothing is skipped."""
    found = []
    if how == "full":
        return [_loss(model, row) for row in ids], []
    with adaptive(model, alpha, how, masks) as uses:
        found = [_loss(model, row) for row in ids]
    return found, list(uses)


def _loss(model, row: Tensor) -> float:
    logits = model(row[None].to(model.device)).logits[0, :-1].float()
    return float(F.cross_entropy(logits, row[1:].to(logits.device)))


def share(uses: list[Tensor]) -> float:
    """Mean share of blocks used, the first token of each text left out."""
    return float(torch.cat([u[..., 1:].flatten(1) for u in uses], 1).float().mean())


def _kept(file: Path, make) -> dict | list:
    if not file.exists():
        made = make()
        file.write_text(json.dumps(made))
        print(file.name, "made", flush=True)
    return json.loads(file.read_text())


def losses_of(model, tokenizer, seed: int) -> list[dict]:
    """Loss of four passages under every rule, at the rule's own share of blocks."""
    ids = datasets.passages(tokenizer, "held out", 4, 128, seed=seed)
    calibration = datasets.passages(tokenizer, "calibration", 4, 128, seed=seed)
    order, n_layers = rankings(model, calibration), model.config.num_hidden_layers
    rows = [
        {
            "method": "all blocks",
            "alpha": None,
            "share": 1.0,
            "losses": loss_under(model, ids, "full")[0],
        }
    ]
    for alpha in ALPHAS:
        for how in ("exit", "skip"):
            found, uses = loss_under(model, ids, how, alpha)
            rows.append({"method": how, "alpha": alpha, "share": share(uses), "losses": found})
        masks = [shuffled(u, seed) for u in uses]
        found, _ = loss_under(model, ids, "skip", masks=masks)
        rows.append({"method": "random", "alpha": alpha, "share": share(uses), "losses": found})
        n_out = n_layers - round(share(uses) * n_layers)
        for kind, blocks in order.items():
            mask = fixed(blocks[:n_out], n_layers, (1, ids.shape[1]))
            found, _ = loss_under(model, ids, "skip", masks=[mask] * len(ids))
            rows.append(
                {"method": kind, "alpha": alpha, "share": 1 - n_out / n_layers, "losses": found}
            )
    return _rounded(rows, seed)


def answers_of(model, tokenizer, seed: int, task: str, n: int) -> list[dict]:
    """Share of right answers to a task's questions under every rule."""
    calibration = datasets.passages(tokenizer, "calibration", 4, 128, seed=seed)
    blocks, n_layers = rankings(model, calibration)["influence"], model.config.num_hidden_layers
    ids, options, right = questions(tokenizer, task, n, seed)

    lengths = torch.tensor([len(row) for row in ids])
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # no padding
    real[:, 0] = False

    def score():
        return float((chosen(model, ids, options) == right).float().mean())

    def used_share(mask):
        return float(mask.cpu()[:, real].float().mean())

    rows = [{"method": "all blocks", "alpha": None, "share": 1.0, "accuracy": score()}]
    for alpha in (0.0, 0.2, 0.8):
        for how in ("exit", "skip"):
            with adaptive(model, alpha, how) as uses:
                found = score()
            used = used_share(uses[0])
            rows.append({"method": how, "alpha": alpha, "share": used, "accuracy": found})
        n_out = n_layers - round(used * n_layers)
        instead = {
            "random": shuffled(uses[0], seed),
            "influence": fixed(blocks[:n_out], n_layers, uses[0].shape[1:]),
        }
        for kind, mask in instead.items():
            with adaptive(model, 0.0, "skip", [mask]):
                found = score()
            used = used_share(mask)
            rows.append({"method": kind, "alpha": alpha, "share": used, "accuracy": found})
    return [{"task": task} | row for row in _rounded(rows, seed)]


def _rounded(rows: list[dict], seed: int) -> list[dict]:
    def short(v):
        return (
            [round(x, 5) for x in v]
            if isinstance(v, list)
            else round(v, 4)
            if isinstance(v, float)
            else v
        )

    return [{"seed": seed} | {k: short(v) for k, v in row.items()} for row in rows]


def traces_of(model, tokenizer, seed: int) -> list[dict]:
    asked = ASKED[seed::3]
    rows = traced(model, tokenizer, asked, 24, (0.1, 0.4, 0.8))
    keys = ("pp", "rg", "read")
    return [
        {"seed": seed, "alpha": r["alpha"]}
        | {k: [round(x, 3) for x in r[k].tolist()] for k in keys}
        for r in rows
    ]


def frontier(model, tokenizer) -> list[dict]:
    """Rows for the chapter's frontier: what a token reads of the blocks, and perplexity."""
    ids = datasets.passages(tokenizer, "held out", 4, 256, seed=1851)
    n_layers = model.config.num_hidden_layers
    block = model.model.layers[0]
    whole = 4 * sum(p.numel() for p in block.parameters() if p.ndim > 1)
    keys_values = 4 * sum(
        p.weight.numel() for p in (block.self_attn.k_proj, block.self_attn.v_proj)
    )
    rows, known = [], {}

    def row(method, setting, seed, used, read, found):
        perplexity = float(torch.tensor(found).mean().exp())
        rows.append(
            {"method": method, "setting": setting, "seed": seed, "mlp_share": round(used, 4)}
            | {"megabytes": round(n_layers * read / 1e6, 2), "seconds": None}
            | {"perplexity": round(perplexity, 3)}
        )

    for alpha in (0.0, 0.05, 0.1, 0.2, 0.4):
        found, uses = loss_under(model, ids, "skip", alpha)
        used = share(uses)
        row("LAC", f"α = {alpha:g}", 0, used, used * whole + (1 - used) * keys_values, found)
    for seed in (0, 1, 2):
        order = rankings(model, datasets.passages(tokenizer, "calibration", 4, 128, seed=seed))
        for n_out in (1, 2, 4, 6, 8):
            out = tuple(sorted(order["influence"][:n_out]))
            if out not in known:
                mask = fixed(out, n_layers, (1, ids.shape[1]))
                known[out] = loss_under(model, ids, "skip", masks=[mask] * len(ids))[0]
            used = 1 - n_out / n_layers
            row(
                "fixed layers",
                f"{n_layers - n_out} of {n_layers}",
                seed,
                used,
                used * whole,
                known[out],
            )
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/void"))
    parser.add_argument("--questions", type=int, default=20, help="a task and seed")
    makers = {"losses": losses_of, "traces": traces_of}
    for task in ("where", "capital"):
        makers[f"answers_{task}"] = answers_of
    parser.add_argument("--parts", nargs="+", default=["losses", "traces", "frontier", *makers])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")
    for part in args.parts:
        if part == "frontier":
            _kept(args.scratch / "frontier.json", partial(frontier, model, tokenizer))
            continue
        for seed in (0, 1, 2):
            make = partial(makers[part], model, tokenizer, seed)
            if "answers" in part:
                make = partial(make, task=part.split("_")[1], n=args.questions)
            _kept(args.scratch / f"{part}_{seed}.json", make)
    files = {part: [args.scratch / f"{part}_{s}.json" for s in (0, 1, 2)] for part in makers}
    found = {"losses": [], "traces": [], "answers": []}
    for part, own in files.items():
        for file in own:
            if not file.exists():
                return print("still to make:", file.name)
            found[part.split("_")[0]] += json.loads(file.read_text())
    lists = [f'"{k}": [\n' + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in found.items()]
    (HERE / "void_results.json").write_text("{" + ",\n".join(lists) + "}\n")
    rows = json.loads((args.scratch / "frontier.json").read_text())
    (HERE / "frontier_void.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
