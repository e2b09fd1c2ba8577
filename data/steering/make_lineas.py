"""Train LinEAS's maps and its rivals on SmolLM2, and measure each: lineas_*.{json,safetensors}.

    python make_lineas.py             # all tasks and seeds, about 80 minutes on two cores
    python make_lineas.py --task sentiment --seeds 0

Each run (task, seed) is kept in ``--work`` while it grows, so that an interrupted run goes on.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib import checkpoint, datasets, hooks, models, steering  # noqa: E402

SITE = "attn_in"  # the normed input of every attention layer
N_TRAIN = 32  # sentences a side
STEPS = 60
BATCH = 16  # sentences a side and step
RATE = 0.001  # of b; omega, whose natural unit is ten times larger, gets ten times that
SPARSITY = 0.6  # lambda_1; lambda_G is a tenth of it
PREFIX = {  # the baseline that only asks
    "sentiment": "Here is a happy and positive review. ",
    "civility": "The following text is polite and kind. ",
}
N_NEW = 14


def prompts() -> dict:
    """task -> source and target sentences (unpaired) and openers to continue (held out)."""
    return json.loads((HERE / "lineas_prompts.json").read_text(encoding="utf-8"))


def draw(task: str, seed: int) -> tuple[list[str], list[str]]:
    """32 source and 32 target sentences of the pool."""
    pool = prompts()[task]
    rng = torch.Generator().manual_seed(seed)
    return tuple(
        [pool[side][i] for i in torch.randperm(len(pool[side]), generator=rng)[:N_TRAIN].tolist()]
        for side in ("source", "target")
    )


def tokens(tokenizer, texts: list[str], device) -> tuple[dict, Tensor]:
    """Padded input and, for pooling, weights [n, pos] over each text's tokens but the first."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(device)
    weights = inputs.attention_mask.float()
    weights[:, 0] = 0  # the sink token: the same in every text
    return dict(inputs), weights / weights.sum(1, keepdim=True)


def pool(x: Tensor, weights: Tensor) -> Tensor:
    """Means over tokens: [n, pos, d] and [n, pos] to [n, d]."""
    return (x * weights[..., None]).sum(1)


def sites(model) -> list[str]:
    return [f"{SITE}.{layer}" for layer in range(hooks.shape(model)["n_layers"])]


def pooled(model, tokenizer, texts: list[str], context=None) -> Tensor:
    """Mean activations at every site: [layer, n, d]."""
    inputs, weights = tokens(tokenizer, texts, model.device)
    acts = hooks.read(model, inputs, SITE).stack(SITE)
    return torch.stack([pool(x, weights) for x in acts])


# --- maps: omega and b, [layer, d] each ------------------------------------------------------


def transport(model, omega: Tensor, b: Tensor, strength: float = 1.0):
    """While it lasts, x becomes (1 - strength) x + strength (omega x + b) at every site."""

    def of(layer):
        scale, shift = 1 + strength * (omega[layer] - 1), strength * b[layer]
        return lambda x: scale * x + shift

    return hooks.edit(model, {site: of(i) for i, site in enumerate(sites(model))})


def wasserstein(z: Tensor, v: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of each neuron's samples: [n, d] and [n, d] to [d]."""
    return (z.sort(0).values - v.sort(0).values).square().mean(0)


def end_to_end_loss(model, inputs: dict, weights: Tensor, target: Tensor, omega, b) -> Tensor:
    """Sum over layers and neurons of the distance after transport, all maps in place."""
    with transport(model, omega, b):
        acts = hooks.read(model, inputs, SITE, detach=False)
    pairs = zip(sites(model), target, strict=True)
    return sum(wasserstein(pool(acts[site], weights), v).sum() for site, v in pairs)


def proximal(x: Tensor, l1: float, group: float) -> Tensor:
    """Sparse group lasso's step: soft-threshold each entry, then shrink each layer's vector."""
    x = x.sign() * (x.abs() - l1).clamp(min=0)
    length = x.norm(dim=-1, keepdim=True)
    return x * (1 - group * x.shape[-1] ** 0.5 / length.clamp(min=1e-9)).clamp(min=0)


def train(model, tokenizer, source, target, steps, rate, l1=0.0, keep=None, seed=0):
    """LinEAS: (omega, b), and the loss of every step.

    Args:
        l1: lambda_1 of the sparse group lasso; lambda_G = lambda_1 / 10.
        keep: a file in which an interrupted run finds itself again.
    """
    inputs, weights = tokens(tokenizer, source, model.device)
    goal = pooled(model, tokenizer, target)
    omega = torch.ones_like(goal[:, 0]).requires_grad_()
    b = torch.zeros_like(goal[:, 0]).requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [omega], "lr": 10 * rate}, {"params": [b], "lr": rate}]
    )
    rates = [10 * rate, rate]
    losses = []
    if keep is not None and keep.exists():
        state = checkpoint.load(keep)
        omega.data, b.data, losses = state["omega"], state["b"], state["losses"]
        optimizer.load_state_dict(state["optimizer"])
    for step in range(len(losses), steps):
        for group, top in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = top * (1 - step / steps)
        rng = torch.Generator().manual_seed(1000 * seed + step)
        x, y = (torch.randperm(len(t), generator=rng)[:BATCH] for t in (source, target))
        some = {k: v[x] for k, v in inputs.items()}
        optimizer.zero_grad()
        loss = end_to_end_loss(model, some, weights[x], goal[:, y], omega, b)
        loss.backward()
        optimizer.step()
        if l1:
            for_omega, for_b = (l1 * group["lr"] for group in optimizer.param_groups)
            omega.data = 1 + proximal(omega.data - 1, for_omega, for_omega / 10)
            b.data = proximal(b.data, for_b, for_b / 10)
        losses.append(float(loss.detach()))
        if keep is not None and step % 5 == 4:
            state = dict(omega=omega.data, b=b.data, losses=losses)
            checkpoint.save(keep, state | dict(optimizer=optimizer.state_dict()))
    return (omega.detach(), b.detach()), losses


def layer_local(model, tokenizer, source, target):
    """Lin-AcT, sequential: each layer's map in closed form, given those before it."""
    inputs, weights = tokens(tokenizer, source, model.device)
    goal = pooled(model, tokenizer, target)
    omega, b = torch.ones_like(goal[:, 0]), torch.zeros_like(goal[:, 0])

    def fit(layer):
        def change(x):
            z, v = pool(x, weights).sort(0).values, goal[layer].sort(0).values
            zc, vc = z - z.mean(0), v - v.mean(0)
            omega[layer] = (zc * vc).sum(0) / zc.square().sum(0)
            b[layer] = v.mean(0) - omega[layer] * z.mean(0)
            return omega[layer] * x + b[layer]

        return change

    with torch.no_grad(), hooks.edit(model, {s: fit(i) for i, s in enumerate(sites(model))}):
        hooks.read(model, inputs, sites(model)[-1])
    return omega, b


def classifier_vectors(source: Tensor, target: Tensor) -> Tensor:
    """ITI-c: at every site the normal of a logistic regression, one standard deviation long."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for s, t in zip(source, target, strict=True):
        x, y = torch.cat([s, t]).cpu().numpy(), [0] * len(s) + [1] * len(t)
        normal = torch.tensor(LogisticRegression(max_iter=500).fit(x, y).coef_[0]).to(s)
        normal = normal / normal.norm()
        found.append(normal * (torch.cat([s, t]) @ normal).std())
    return torch.stack(found)


# --- measuring -------------------------------------------------------------------------------


def judge(task: str, texts: list[str]) -> float:
    scores = steering.sentiment(texts) if task == "sentiment" else 1 - steering.profanity(texts)
    return float(scores.mean())


def prose(tokenizer, n=4, length=64, device="cpu") -> Tensor:
    """Untouched text: ids [n, length] of Moby Dick."""
    text = datasets.moby_dick()[30_000 : 30_000 + 8 * n * length]
    return tokenizer(text, return_tensors="pt").input_ids[0, : n * length].view(n, -1).to(device)


def measure(model, tokenizer, task, method, strength, context, seed, openers=None) -> dict:
    openers = openers or prompts()[task]["test"]
    with context():
        said = steering.generate(model, tokenizer, openers, n_new=N_NEW, chat=False)
    cost = steering.cost(model, prose(tokenizer, device=model.device), context)
    return dict(
        task=task, method=method, strength=strength, seed=seed, effect=round(judge(task, said), 4),
        kl=round(cost["kl"], 4), perplexity=round(cost["perplexity"], 2),
        perplexity_plain=round(cost["perplexity_plain"], 2), said=said[:3],
    )  # fmt: skip


def as_vectors(model, rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(sites(model), rows, strict=True))


def run(model, fast, tokenizer, task: str, seed: int, work: Path) -> None:
    """``model`` is trained on; ``fast``, the same in bfloat16, is measured."""
    source, target = draw(task, seed)
    name = f"{task}_{seed}"
    maps, curves = {}, {}
    dense, curves["dense"] = train(
        model,
        tokenizer,
        source,
        target,
        STEPS,
        RATE,
        keep=work / f"{name}_dense.safetensors",
        seed=seed,
    )
    maps["dense"] = dense
    if task == "sentiment":
        maps["sparse"], curves["sparse"] = train(
            model, tokenizer, source, target, STEPS, RATE, SPARSITY,
            keep=work / f"{name}_sparse.safetensors", seed=seed,
        )  # fmt: skip
    local = layer_local(model, tokenizer, source, target)
    s, t = (pooled(model, tokenizer, texts) for texts in (source, target))
    difference, classified = t.mean(1) - s.mean(1), classifier_vectors(s, t)
    drawn = steering.random_like(difference, seed)

    def vectors(rows):
        return lambda k: lambda: steering.steered(fast, as_vectors(fast, rows), k)

    def moved(found):
        return lambda k: lambda: transport(fast, *found, k)

    ways = (0.25, 0.5, 1.0)
    # The rivals are compared at what LinEAS spends, where their curves bend: measure them near it,
    # since a straight line between two strengths would put them too low.
    near = (0.2, 0.35, *ways)
    plan = [("mean difference", vectors(difference), near),
            ("ITI-c", vectors(classified), tuple(2 * k for k in near)),
            ("random", vectors(drawn), ways),
            ("Lin-AcT", moved(local), near),
            ("LinEAS", moved(dense), ways),
            *((f"LinEAS, {k}", moved(maps[k]), (1.0,)) for k in maps if k != "dense")]  # fmt: skip
    path = work / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(r["method"], r["strength"]) for r in rows}

    def add(row):
        rows.append(row)
        path.write_text(json.dumps(rows))
        print(task, seed, row["method"], row["strength"], row["effect"], row["kl"], flush=True)

    if ("none", 0.0) not in done:
        add(measure(fast, tokenizer, task, "none", 0.0, nullcontext, seed))
    if ("prompt only", 0.0) not in done:
        asked = [PREFIX[task] + opener for opener in prompts()[task]["test"]]
        add(measure(fast, tokenizer, task, "prompt only", 0.0, nullcontext, seed, asked))
    for method, of, strengths in plan:
        for k in strengths:
            if (method, k) not in done:
                add(measure(fast, tokenizer, task, method, k, of(k), seed))
    tensors = {f"{label}.{part}": x for label, found in maps.items()
               for part, x in zip(("omega", "b"), found, strict=True)}  # fmt: skip
    tensors |= {"local.omega": local[0], "local.b": local[1], "difference": difference}
    save_file({k: x.contiguous().half() for k, x in tensors.items()}, work / f"{name}.safetensors")
    (work / f"{name}_curves.json").write_text(json.dumps(curves))


def join(work: Path) -> None:
    """One table of all runs, and the maps of every sentiment seed."""
    rows, curves, tensors = [], {}, {}
    for path in sorted(work.glob("*_?.json")):
        if not path.with_suffix(".safetensors").exists():
            continue  # not finished
        rows += json.loads(path.read_text())
        found = load_file(path.with_suffix(".safetensors"))
        if path.stem.startswith("sentiment"):
            curves[path.stem] = json.loads((work / f"{path.stem}_curves.json").read_text())
            tensors |= {f"{path.stem[-1]}.{k}": x for k, x in found.items()}
    curves = {run: {k: [round(x, 2) for x in v] for k, v in c.items()} for run, c in curves.items()}
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    out = f'{{"rows": [\n{text}\n],\n"losses": {json.dumps(curves)}}}\n'
    (HERE / "lineas_results.json").write_text(out, encoding="utf-8")
    save_file(tensors, HERE / "lineas_maps.safetensors")
    print(len(rows), "rows,", len(tensors), "tensors")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="*", default=["sentiment", "civility"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lineas")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load("smollm2")
    fast, _ = models.load("smollm2", dtype=torch.bfloat16)
    for task in args.task:
        for seed in args.seeds:
            run(model, fast, tokenizer, task, seed, args.work)
    join(args.work)


if __name__ == "__main__":
    main()
