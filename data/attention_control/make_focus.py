"""Optimal control of a flow towards unentangled subjects: makes focus_rows.json and its weights.

    python data/attention_control/make_focus.py [--seeds 0 1 2] [--prompts 72] [--scratch DIR]

The plain sampler, three costs of attention in the same single-pass controller, Attend-and-Excite in
its own form (steps on the latents), and control networks of low rank (focus_lora.safetensors) that
adjoint matching trains on one prompt or on eight, over prompts that name two and three things. The
strength of each control comes from the same four tries on prompts of their own. Rows: shares a
model, method, kind of prompt and seed. What the scratch folder holds is not made again.
"""

import json
import math
import sys
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import own_rows
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import denoising, diffusion, shapes_score, shapes_text  # noqa: E402

STEPS, GUIDANCE, BATCH = 20, diffusion.GUIDANCE, 24
SHARES = (0.03, 0.08, 0.2, 0.5)  # a control's size, in sizes of the velocity
RANK, ALPHA = 4, 16
COSTS = ("attend and excite", "conform", "focus")
METHODS = {
    "flow": ("plain", "latent steps", *COSTS, "tuned on 1", "tuned on 8"),
    "unet": ("plain", "attend and excite", "focus"),
}
KINDS = ("two", "three")

# --- costs of attention --------------------------------------------------------------------------


def groups(pipe, prompt: str) -> list[list[int]]:
    """Tokens of each thing's colour and shape: one group a subject."""
    found = shapes_text.words(prompt)
    return [
        denoising.word_tokens(pipe.tokenizer, prompt, [spans["colour"], spans["shape"]])
        for spans in found
    ]


def sites(pipe) -> list[str]:
    """Where the costs read attention: a flow's joint blocks, a U-Net's cross-attentions."""
    if denoising.is_flow(pipe):
        return [f"self_pattern.{i}" for i in range(len(pipe.transformer.transformer_blocks))]
    return ["cross_pattern"]


def smooth(maps: Tensor) -> Tensor:
    """Maps [n, tokens, h, w] through a Gaussian of 3 × 3 places and sd 1."""
    row = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)], device=maps.device)
    kernel = torch.outer(row, row)
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel)[:, 0].unflatten(0, maps.shape[:2])


def divergence(q: Tensor) -> Tensor:
    """Jensen and Shannon's divergence of rows [m, places], cubed and normed, between 0 and 1."""
    q = (q / q.amax(-1, keepdim=True)) ** 3
    q = q / q.sum(-1, keepdim=True)
    ratio = (q + 1e-10).log() - (q.mean(0) + 1e-10).log()
    return (q * ratio).sum(-1).mean() / math.log(len(q))


def focus(maps: list[Tensor]) -> Tensor:
    """FOCUS: the tokens of a subject look at one place, subjects at different ones.

    Args:
        maps: [tokens, places] a subject.
    """
    within = torch.stack([divergence(m) for m in maps if len(m) > 1]).mean()
    between = divergence(torch.stack([m.mean(0) for m in maps]))
    return (within + 1 - between) / 2


def attend_and_excite(maps: list[Tensor]) -> Tensor:
    """The most neglected subject's highest attention is 1."""
    total = torch.cat(maps).sum(0)
    peaks = torch.stack([(m / total).mean(0).max() for m in maps])
    return F.relu(1 - peaks.min())


def conform(maps: list[Tensor], before: list[Tensor] | None, heat: float = 0.07) -> Tensor:
    """Contrast (NT-Xent): tokens of one subject, now and a step ago, attract; others repel."""
    if before is None:
        return maps[0].sum() * 0
    rows = F.normalize(torch.cat([*maps, *before]), dim=-1)
    label = torch.tensor([i for _ in range(2) for i, m in enumerate(maps) for _ in m])
    label = label.to(rows.device)
    near = rows @ rows.T / heat
    same = label[:, None] == label
    other = near.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    pairs = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return -(near - torch.logaddexp(near, other))[pairs].mean()


def cost(denoiser, name: str):
    """The cost ``name`` as ``attention_gradient`` wants it: activations to a value a picture."""
    told = [groups(denoiser.pipe, prompt) for prompt in denoiser.prompts]
    size, last = (8, 8) if denoiser.flow else (16, 16), [None] * len(told)

    def values(acts) -> Tensor:
        maps = smooth(denoising.text_maps(denoiser, acts, size)).flatten(2)
        found = []
        for i, (own, tokens) in enumerate(zip(maps, told, strict=True)):
            own = [own[group] for group in tokens]
            if name == "conform":
                found.append(conform(own, last[i]))
                last[i] = [m.detach() for m in own]
            else:
                found.append(focus(own) if name == "focus" else attend_and_excite(own))
        return torch.stack(found)

    return values


# --- control at test time ------------------------------------------------------------------------


def controller(denoiser, path, values, strength: float, told: list | None = None):
    """The single-pass control, for ``sample``'s ``change``: with s = 1 − t the noise's share and
    y = x / (α + σ) the flow's state, the velocity loses λ s ∇f(y)."""
    where = sites(denoiser.pipe)

    def change(i, x, clean, noise):
        _, alpha, sigma = path[i]
        slope, value = denoising.attention_gradient(denoiser, x, path[i], where, values)
        slope, s = (alpha + sigma) * slope, sigma / (alpha + sigma)
        if told is not None:
            told.append((slope, s, noise - clean, value))
        return clean - strength * s**2 * slope, noise + strength * s * (1 - s) * slope

    return change


def latent_steps(denoiser, path, values, strength: float):
    """Attend-and-Excite's own form, for ``sample``'s ``before``: a step on the latents before each
    of the first half of the sampling steps, the later the shorter."""
    where, steps = sites(denoiser.pipe), len(path) - 1

    def before(i, x, level):
        if i >= steps // 2:
            return x
        slope, _ = denoising.attention_gradient(denoiser, x, level, where, values)
        return x - strength / steps * math.sqrt(1 - 0.5 * i / max(steps // 2 - 1, 1)) * slope

    return before


# --- a control network of low rank, and adjoint matching -----------------------------------------


def lora_names(model: nn.Module) -> list[str]:
    """The projections that get an update: all of the joint blocks' attention."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    return [
        f"transformer_blocks.{i}.attn.{end}"
        for i in range(len(model.transformer_blocks))
        for end in (*ends, "to_add_out")
    ]


def fresh_lora(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights that change nothing yet."""
    g, found = torch.Generator().manual_seed(seed), {}
    for name in lora_names(model):
        wide, deep = model.get_submodule(name).weight.shape
        found[f"{name}.a"] = torch.randn(RANK, deep, generator=g) / math.sqrt(deep)
        found[f"{name}.b"] = torch.zeros(wide, RANK)
    return {k: v.to(model.device) for k, v in found.items()}


@contextmanager
def lora(model: nn.Module, weights: dict[str, Tensor]):
    """The model with its updates, W x + (α / r) B A x, for as long as the context lasts."""
    handles = []
    for name in sorted({key[:-2] for key in weights}):
        a, b = weights[f"{name}.a"], weights[f"{name}.b"]

        def add(module, args, out, a=a, b=b):
            return out + ALPHA / RANK * F.linear(F.linear(args[0], a), b)

        handles.append(model.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memoryless(x: Tensor, out: Tensor, here, there) -> tuple[Tensor, float, float]:
    """A step of the memoryless process (ancestral sampling) from what a flow model put out: its
    mean, the standard deviation of the noise to add, and how fast the mean moves with ``out``."""
    keep = here.alpha / there.alpha * there.sigma / here.sigma
    mean = there.alpha * (x - here.sigma * out) + there.sigma * keep * (x + here.alpha * out)
    rate = -there.alpha * here.sigma + there.sigma * keep * here.alpha
    return mean, there.sigma * math.sqrt(max(1 - keep**2, 0)), rate


def adjoint_matching(
    pipe, prompts, strength, iterations=240, name="focus", steps=10, many=4, some=4, rate=2e-3,
    guidance=1.0, seed=0, told: list | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train a control network: trajectories of the controlled memoryless process, the lean adjoint
    backwards along each, and a regression of the control on the adjoint.

    Args:
        prompts: one an iteration, in turn.
        strength: λ of the running cost.
        many: trajectories an iteration; ``some`` of their times are fitted.
        guidance: with more than 1, the exact adjoint of a guided flow explodes.
        told: gets (loss, mean cost along the trajectories) of each iteration.
    """
    model, where = pipe.transformer, sites(pipe)
    weights = {k: v.requires_grad_() for k, v in fresh_lora(model, seed).items()}
    stepper = torch.optim.Adam(weights.values(), lr=rate, betas=(0.95, 0.999))
    path, g = denoising.levels(pipe, steps), torch.Generator().manual_seed(seed)
    for step in range(iterations):
        denoiser = denoising.Denoiser(pipe, [prompts[step % len(prompts)]] * many, guidance)
        values = cost(denoiser, name)
        x = torch.randn(many, 4, 16, 16, generator=g).to(model.device)
        states, slopes, costs = [], [], []
        with lora(model, {k: v.detach() for k, v in weights.items()}):
            for here, there in pairwise(path):
                slope, value = denoising.attention_gradient(denoiser, x, here, where, values)
                with torch.no_grad():
                    mean, spread, _ = memoryless(x, denoiser.raw(x, here), here, there)
                states.append(x)
                slopes.append(strength * (here.sigma - there.sigma) * slope)
                costs.append(value.mean())
                x = mean + spread * torch.randn(x.shape, generator=g).to(x)
        adjoint, base, wanted = torch.zeros_like(x), [], []
        for i in reversed(range(steps)):  # a_k = (∂ mean / ∂ x)ᵀ a_{k+1} + h λ ∇f
            at = states[i].detach().requires_grad_()
            with torch.enable_grad():
                out = denoiser.raw(at, path[i])
                mean, _, _ = memoryless(at, out, path[i], path[i + 1])
                (back,) = torch.autograd.grad(mean, at, adjoint)
            base.insert(0, out.detach())
            wanted.insert(0, adjoint)
            adjoint = back + slopes[i]
        loss = 0
        times = torch.randperm(steps - 1, generator=g)[:some].tolist()  # the last has no noise
        with lora(model, weights):
            for i in times:
                _, spread, speed = memoryless(states[i], base[i], path[i], path[i + 1])
                moved = speed * (denoiser.raw(states[i], path[i]) - base[i])
                loss = loss + ((moved + spread**2 * wanted[i]) / spread).square().mean() / some
        stepper.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)  # one that explodes would stop Adam
        stepper.step()
        if told is not None:
            told.append((float(loss.detach()), float(torch.stack(costs).mean())))
    return {k: v.detach() for k, v in weights.items()}


# --- runs ----------------------------------------------------------------------------------------


def draw(pipe, prompts, seed: int, method: str, strength=0.0, weights=None, steps=STEPS):
    """Pictures float32 [n, 3, 64, 64] of one method; the noise of a prompt is its place's."""
    images, path = [], denoising.levels(pipe, steps)
    noise = denoising.noise(len(prompts), seed).to(denoising.network(pipe).device)
    for start in range(0, len(prompts), BATCH):
        denoiser = denoising.Denoiser(pipe, prompts[start : start + BATCH], GUIDANCE)
        more = {}
        if method in COSTS:
            more["change"] = controller(denoiser, path, cost(denoiser, method), strength)
        elif method == "latent steps":
            values = cost(denoiser, "attend and excite")
            more["before"] = latent_steps(denoiser, path, values, strength)
        with lora(denoiser.model, weights) if weights else nullcontext():
            x = denoising.sample(denoiser, noise[start : start + BATCH], path, **more)
        images.append(denoiser.decode(x).float().cpu())
    return torch.cat(images)


def shares(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """What the pictures show of what was asked for: shares of things, and of pictures."""
    rows = shapes_score.score(images, prompts)
    things = [thing for row in rows for thing in row["things"]]
    leaks = [thing["leak"] for thing in things if thing["leak"] is not None]
    mean = lambda values: round(sum(values) / max(len(values), 1), 4)  # noqa: E731
    return {
        "things": mean([bool(thing["both"]) for thing in things]),
        "missing": mean([not thing["shape"] for thing in things]),
        "leak": mean(leaks),
        "all": mean([bool(row["all"]) for row in rows]),
        "swapped": mean([bool(row["swapped"]) for row in rows]),
    }


def unit(pipe, prompts, name: str, steps=STEPS) -> float:
    """The strength at which a control is as large as the velocity, over plain sampling."""
    denoiser, path = denoising.Denoiser(pipe, prompts, GUIDANCE), denoising.levels(pipe, steps)
    told: list = []
    change = controller(denoiser, path, cost(denoiser, name), 0.0, told)
    x = denoising.noise(len(prompts), 700).to(denoiser.model.device)
    denoising.sample(denoiser, x, path, change=change)
    control = sum(float((s * slope).norm()) for slope, s, _, _ in told)
    return sum(float(velocity.norm()) for _, _, velocity, _ in told) / max(control, 1e-9)


def choices(pipe, kind: str, kept: Path) -> dict:
    """The strength of each control that gets most things right on prompts for tuning, the weaker
    one where two are level; and all that was tried."""
    told = json.loads(kept.read_text()) if kept.exists() else {}
    prompts = [p for k in KINDS for p in shapes_text.prompts(k, 6, 700)]
    for method in METHODS[kind]:
        if method == "plain" or method.startswith("tuned"):
            continue
        had = told.setdefault(method, {"unit": None, "tried": {}})
        name = "attend and excite" if method == "latent steps" else method
        if had["unit"] is None:
            had["unit"] = unit(pipe, prompts, name)
        for share in SHARES:
            if str(share) not in had["tried"]:
                images = draw(pipe, prompts, 700, method, share * had["unit"])
                had["tried"][str(share)] = shares(images, prompts)["things"]
                kept.write_text(json.dumps(told))
        had["share"] = max(SHARES, key=lambda s: (had["tried"][str(s)], -s))
        print(kind, method, had, flush=True)
    return told


def train_prompts() -> list[str]:
    """The first is the one of "tuned on 1"."""
    two, three = (shapes_text.prompts(kind, 4, 800) for kind in KINDS)
    return [p for pair in zip(two, three, strict=True) for p in pair]


def tests(n: int, seed: int, barred: list[str]) -> dict[str, list[str]]:
    """``n`` prompts of each kind, none that a control network was trained on."""
    found = {}
    for kind in KINDS:
        some = shapes_text.prompts(kind, n + 8, seed)
        found[kind] = [p for p in some if p not in barred][:n]
    return found


def control_networks(pipe, strength: float, scratch: Path, iterations: int) -> tuple[dict, dict]:
    """Weights and training curves of "tuned on 1" and "tuned on 8"."""
    prompts, weights, curves = train_prompts(), {}, {}
    for many in (1, 8):
        kept = scratch / f"focus_lora_{many}.safetensors"
        if not kept.exists():
            told: list = []
            made = adjoint_matching(pipe, prompts[:many], strength, iterations, told=told)
            save_file({k: v.half().cpu().contiguous() for k, v in made.items()}, kept)
            kept.with_suffix(".json").write_text(json.dumps(told))
        weights[many] = load_file(kept)
        curves[many] = json.loads(kept.with_suffix(".json").read_text())
    return weights, curves


def main(argv: list[str] | None = None) -> None:
    parser = own_rows.arguments(__doc__, "attention_control", 72, "a seed; a third for the U-Net")
    parser.add_argument("--iterations", type=int, default=240, help="of adjoint matching")
    parser.add_argument("--models", nargs="+", default=["flow", "unet"])
    args = own_rows.begin(parser, argv)
    rows, head = [], {"iterations": args.iterations, "prompts": train_prompts()}
    for kind in args.models:
        pipe = diffusion.pipeline(kind, "cpu")
        chosen = choices(pipe, kind, args.scratch / f"focus_{kind}_choices.json")
        head[kind] = chosen
        weights = {}
        if kind == "flow":
            strength = chosen["focus"]["share"] * chosen["focus"]["unit"]
            weights, curves = control_networks(pipe, strength, args.scratch, args.iterations)
            head["training"] = {
                many: [[round(v, 5) for v in row] for row in curve[:: max(len(curve) // 30, 1)]]
                for many, curve in curves.items()
            }
            named = {f"{many}.{k}": v for many, w in weights.items() for k, v in w.items()}
            save_file(named, HERE / "focus_lora.safetensors")
            (HERE / "focus_lora.safetensors").chmod(0o644)
        each = args.prompts // 2 if kind == "flow" else args.prompts // 6
        for seed in args.seeds:
            asked = tests(each, seed, train_prompts())
            if kind == "flow":
                asked["single"] = shapes_text.prompts("single", each // 3, seed)
            for method in METHODS[kind]:
                for what, prompts in asked.items():
                    if what == "single" and method != "plain" and "tuned" not in method:
                        continue
                    name = f"focus_{kind}_{method}_{what}_{seed}_{each}.json".replace(" ", "_")
                    kept = args.scratch / name
                    if not kept.exists():
                        had = chosen.get(method)
                        strength = had["share"] * had["unit"] if had else 0.0
                        own = {k: v.float() for k, v in weights[int(method[-1])].items()} if (
                            "tuned" in method
                        ) else None  # fmt: skip
                        images = draw(pipe, prompts, seed, method, strength, own)
                        row = {"model": kind, "method": method, "kind": what, "seed": seed}
                        row |= {"n": len(prompts)} | shares(images, prompts)
                        kept.write_text(json.dumps(row))
                    rows.append(json.loads(kept.read_text()))
                    print(rows[-1], flush=True)
    own_rows.write("focus", head, rows)


if __name__ == "__main__":
    main()
