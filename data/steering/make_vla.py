"""Train the chapter's vision-language-action policies and measure steering by value vectors.

    python data/steering/make_vla.py            # everything, resumable

The world is a table top seen from above, [0, 1]², drawn as 24 × 24 pixels: two coloured blocks and
a gripper. The instruction "take the red block" may end in a word of speed. As OpenVLA does, the
policy first learns language about pictures and is then fine-tuned to answer with action tokens,
bins of the same vocabulary:

    stage 1   <image> take the red block . say   -> fast upward left
    stage 2   <image> take the red block . act   -> <+04> <-08> <-12>   (dx, dy, grip)

No instruction ever holds a word of direction. In stage 2 a share of each batch is still of stage 1
("mixed": a quarter, as co-trained robot models have it) or none ("tuned": as OpenVLA has it).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from steering_tiny import Tiny, fit, half
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from lib import hooks  # noqa: E402

CONCEPTS = {
    "fast": "fast quickly rapidly swift hurry".split(),
    "slow": "slow slowly gently careful calm".split(),
    "up": "up upward above high raise".split(),
    "down": "down downward below low lower".split(),
    "left": "left leftward west leftmost leftwards".split(),
    "right": "right rightward east rightmost rightwards".split(),
}
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.15, 0.25, 0.95)}
OTHER = "take the block . say act what steady level centred holding empty".split()
BINS = torch.linspace(-0.12, 0.12, 13)  # metres a step, if the table is a metre wide
ACTIONS = [f"<{100 * b:+03.0f}>" for b in BINS.tolist()]
WORDS = [w for words in CONCEPTS.values() for w in words] + [*COLOURS, *OTHER]
VOCABULARY = WORDS + ACTIONS
TOKEN = {w: i for i, w in enumerate(VOCABULARY)}
FIRST_ACTION = TOKEN[ACTIONS[0]]
SIDE, PATCH = 24, 6
SPEEDS = {"slow": 0.04, "normal": 0.06, "fast": 0.10}  # of the demonstrations, a step
REACH, GRASP = 0.05, 0.09
HORIZON = 24
BATCH, STEPS = 64, {1: 800, 2: 2500}
SHARES = {"mixed": 0.25, "tuned": 0.0}  # of stage 2 that is still of stage 1
STRENGTHS, N_SCENES = (1, 2, 4, 8, 16), 64  # of the measured steering
SHAPE = dict(d_model=48, d_mlp=128, n_layers=4, n_heads=4)


# --- the world ------------------------------------------------------------------------------------


def scenes(n, generator):
    """Starts of n episodes: positions in [0.08, 0.92]², kept apart; the target is block 0."""
    spots = 0.08 + 0.84 * torch.rand(n, 8, 3, 2, generator=generator)
    near = (spots[:, :, :, None] - spots[:, :, None]).norm(dim=-1) + torch.eye(3)
    pick = near.flatten(2).amin(-1).argmax(1)  # the best spread of eight draws
    spots = spots[torch.arange(n), pick]
    first = torch.randint(3, (n,), generator=generator)
    second = (first + 1 + torch.randint(2, (n,), generator=generator)) % 3
    return dict(
        gripper=spots[:, 0], blocks=spots[:, 1:].clone(), held=torch.full((n,), -1),
        colours=torch.stack([first, second], 1),
    )  # fmt: skip


def render(world):
    """Pictures [n, 16, 108]: patches of 6 × 6 pixels × 3 colours, row by row; y points up."""
    n = len(world["gripper"])
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    picture = torch.zeros(n, SIDE, SIDE, 3)

    def draw(at, half_width, colour):
        gap = (axis - at[..., None]).abs() * SIDE  # [n, 2, SIDE] in pixels
        line = (half_width + 0.5 - gap).clamp(0, 1)
        alpha = (line[:, 1].flip(-1)[:, :, None] * line[:, 0][:, None, :])[..., None]
        return picture * (1 - alpha) + alpha * colour[:, None, None, :]

    palette = torch.tensor(list(COLOURS.values()))
    for i in (1, 0):
        picture = draw(world["blocks"][:, i], 1.5, palette[world["colours"][:, i]])
    closed = (world["held"] >= 0)[:, None].float()
    tip = closed * torch.tensor([1.0, 0.9, 0.1]) + (1 - closed) * torch.ones(3)
    picture = draw(world["gripper"], 1.0, tip)
    k = SIDE // PATCH
    return picture.view(n, k, PATCH, k, PATCH, 3).transpose(2, 3).reshape(n, k * k, -1)


def expert(world, speed):
    """The demonstrator's motion [n, 2] and grip [n] in {-1 open, 1 closed}; speed [n]."""
    way = world["blocks"][:, 0] - world["gripper"]
    far = way.norm(dim=1)
    step = way / far.clamp_min(1e-6)[:, None] * torch.minimum(speed, far)[:, None]
    grip = (far < REACH).float() * 2 - 1  # a wrong block is let go
    step[world["held"] == 0] = 0.0
    return step, grip, far


def move(world, step, grip):
    """The world after one action: motion [n, 2], grip [n] (closed where positive)."""
    n = torch.arange(len(step))
    gripper = (world["gripper"] + step).clamp(0, 1)
    blocks, held = world["blocks"].clone(), world["held"].clone()
    held[grip <= 0] = -1
    gap = (blocks - gripper[:, None]).norm(dim=-1)
    takes = (grip > 0) & (held < 0) & (gap.amin(1) < GRASP)
    held = torch.where(takes, gap.argmin(1), held)
    carried = held >= 0
    blocks[n[carried], held[carried]] = gripper[carried]
    return dict(world, gripper=gripper, blocks=blocks, held=held)


def success(world):
    """[n] bool: the gripper holds the target block."""
    return world["held"] == 0


def instructions(world, adverbs=None):
    """ids [n, 5] of "take the red block ."; adverbs: [n] token ids for the last word."""
    line = torch.tensor([TOKEN[w] for w in "take the red block .".split()])
    ids = line.repeat(len(world["held"]), 1)
    ids[:, 2] = TOKEN["red"] + world["colours"][:, 0]
    if adverbs is not None:
        ids[:, 4] = adverbs
    return ids


# --- training -------------------------------------------------------------------------------------


def states(n, generator):
    """Situations of all moments of an episode, so that no rollout leaves what was taught."""
    world = scenes(n, generator)
    moment = torch.rand(n, generator=generator)
    jitter = 0.06 * torch.randn(n, 2, generator=generator)
    near = moment < 0.25
    world["gripper"][near] = (world["blocks"][:, 0] + jitter).clamp(0, 1)[near]
    for i, low, high in ((0, 0.25, 0.3), (1, 0.3, 0.35)):  # has taken the target, the other one
        mine = (moment >= low) & (moment < high)
        world["held"][mine] = i
        world["gripper"][mine] = world["blocks"][mine, i]
    return world


def draw_words(classes, names, generator):
    """For classes [n] (indices into names) a random word of each: token ids [n]."""
    table = torch.tensor([[TOKEN[w] for w in (CONCEPTS[c] if c in CONCEPTS else [c] * 5)]
                          for c in names])  # fmt: skip
    return table[classes, torch.randint(5, (len(classes),), generator=generator)]


def batch(stage, n, generator):
    """Training batch: ids [n, 9], patches [n, 16, 108]; the last three ids are the answer."""
    world = states(n, generator)
    kind = torch.randint(10, (n,), generator=generator)
    kind = torch.where(kind < 2, 1, torch.where(kind < 4, 2, 0))  # 20 % slow, 20 % fast
    named = draw_words(kind, [".", "slow", "fast"], generator)
    speed = torch.tensor([SPEEDS[s] for s in ("normal", "slow", "fast")])[kind]
    step, grip, far = expert(world, speed)
    ids = instructions(world, named)
    if stage == 2:
        answer = action_ids(step, grip)
        cue = torch.full((n, 1), TOKEN["act"])
    else:
        pace = torch.where(far > 0.35, 2, torch.where(far < 0.15, 1, 0))
        pace = torch.where(kind > 0, kind, pace)
        way = world["blocks"][:, 0] - world["gripper"]
        side = torch.where(way > 0.05, 1, torch.where(way < -0.05, 2, 0))
        answer = torch.stack([
            draw_words(pace, ["steady", "slow", "fast"], generator),
            draw_words(side[:, 1], ["level", "up", "down"], generator),
            draw_words(side[:, 0], ["centred", "right", "left"], generator),
        ], 1)  # fmt: skip
        cue = torch.full((n, 1), TOKEN["say"])
        what = torch.rand(n, generator=generator) < 0.15  # a question that is not about motion
        seen = TOKEN["red"] + world["colours"].sort(1).values
        full = torch.where(world["held"] >= 0, TOKEN["holding"], TOKEN["empty"])
        answer[what] = torch.cat([seen, full[:, None]], 1)[what]
        cue[what] = TOKEN["what"]
    return torch.cat([ids, cue, answer], 1), render(world)


def action_ids(step, grip):
    """Action tokens [n, 3] of motions [n, 2] and grips [n]: the nearest bins."""
    both = torch.cat([step, 0.12 * grip[:, None]], 1)
    return FIRST_ACTION + (both[..., None] - BINS).abs().argmin(-1)


def build(seed):
    n_patches = (SIDE // PATCH) ** 2
    return Tiny(len(VOCABULARY), n_tokens=n_patches + 9, d_patch=3 * PATCH**2, seed=seed, **SHAPE)


def train(model, stage, seed, path=None, log=None, share=0.0):
    """One stage of training, STEPS[stage] steps of BATCH pictures, a share of them of stage 1."""
    drawn = {}

    def loss_of(model, step):
        chunk = step // 16  # drawn sixteen batches at a time
        if chunk not in drawn:
            drawn.clear()
            generator = torch.Generator().manual_seed(1_000_000 * seed + 10_000 * stage + chunk)
            fresh = batch(stage, 16 * BATCH, generator)
            drawn[chunk] = [x.unflatten(0, (16, BATCH)) for x in fresh]
            if n_words := int(share * BATCH):
                words = batch(1, 16 * n_words, generator)
                for x, new in zip(drawn[chunk], words, strict=True):
                    x[:, :n_words] = new.unflatten(0, (16, n_words))
        ids, patches = (x[step % 16] for x in drawn[chunk])
        logits = model(ids[:, :-1], patches)[:, -3:]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -3:].flatten())

    return fit(model, loss_of, STEPS[stage], 3e-3, path, log=log)


# --- acting ---------------------------------------------------------------------------------------


@torch.inference_mode()
def act(model, ids, patches):
    """Greedy action tokens [n, 3] for instructions [n, 5], restricted to the action tokens."""
    new = torch.cat([ids, torch.full((len(ids), 1), TOKEN["act"])], 1)
    cache, out = [], []
    for i in range(3):
        logits = model(new, patches if i == 0 else None, cache)[:, -1, FIRST_ACTION:]
        new = FIRST_ACTION + logits.argmax(-1, keepdim=True)
        out.append(new)
    return torch.cat(out, 1)


def rollout(model, world, adverb=None, steps=HORIZON):
    """Let the policy act. Returns success [n] at any time, and the paths [steps + 1, n, 2]."""
    word = None if adverb is None else torch.full((len(world["held"]),), TOKEN[adverb])
    ids, path = instructions(world, word), [world["gripper"]]
    won = success(world)
    for _ in range(steps):
        chosen = BINS[act(model, ids, render(world)) - FIRST_ACTION]
        world = move(world, chosen[:, :2], chosen[:, 2])
        won = won | success(world)
        path.append(world["gripper"])
    return won, torch.stack(path)


# --- value vectors and steering -------------------------------------------------------------------


def value_logits(model):
    """What each value vector adds to each token's logit: [layer, neuron, vocab]."""
    read = model.embed.weight * model.norm.weight
    return torch.stack([block.mlp.down_proj.weight.T @ read.T for block in model.blocks]).detach()


def meanings(logits, k=5):
    """A label for each value vector [..., vocab]: a concept, "colour" or "action" where its top
    five tokens share that pattern (three words of a concept or colour, four bins), or ""."""
    groups = {c: {TOKEN[w] for w in words} for c, words in CONCEPTS.items()}
    groups["colour"] = {TOKEN[c] for c in COLOURS}
    groups["action"] = set(range(FIRST_ACTION, len(VOCABULARY)))
    top = logits.flatten(0, -2).topk(k).indices.tolist()
    return [
        next((g for g, ids in groups.items() if len(ids & set(row)) >= 3 + (g == "action")), "")
        for row in top
    ]


def cluster(model, concept, n=10):
    """The n (layer, neuron) whose value vectors raise a concept's words most, for their length."""
    logits = value_logits(model)[..., :FIRST_ACTION]
    logits = logits - logits.mean(-1, keepdim=True)
    words = [TOKEN[w] for w in CONCEPTS[concept]]
    score = logits[..., words].mean(-1) / logits.norm(dim=-1)
    return [divmod(i, score.shape[1]) for i in score.flatten().topk(n).indices.tolist()]


def matched(neurons, width, seed):
    """As many neurons of the same layers, drawn at random from the others."""
    generator, taken, out = torch.Generator().manual_seed(seed), set(neurons), []
    for layer, _ in neurons:
        free = [i for i in range(width) if (layer, i) not in taken]
        out.append((layer, free[int(torch.randint(len(free), (1,), generator=generator))]))
        taken.add(out[-1])
    return out


def clamped(model, neurons, strength, units):
    """While it lasts, these neurons have the activation strength * units[layer], at all tokens."""
    edits = {}
    for layer in {layer for layer, _ in neurons}:
        mine = [i for at, i in neurons if at == layer]

        def fix(x, mine=mine, value=strength * units[layer]):
            x[..., mine] = value
            return x

        edits[f"blocks.{layer}.mlp.down_proj:in"] = fix
    return hooks.edit(model, edits)


def units(model, world):
    """Root mean square of each layer's activations while acting: a list of floats."""
    sites = [f"blocks.{i}.mlp.down_proj:in" for i in range(len(model.blocks))]
    with hooks.capture(model, sites) as seen:
        act(model, instructions(world), render(world))
    return [seen[site].square().mean().sqrt().item() for site in sites]


def behaviour(won, path, first=4):
    """Success, mean step length and mean motion right and up over the first steps: before any
    episode is over, so that those that end early cannot bias them."""
    step = path[1 : first + 1] - path[:first]
    return dict(success=won.float().mean().item(), speed=step.norm(dim=-1).mean().item(),
                right=step[..., 0].mean().item(), up=step[..., 1].mean().item())  # fmt: skip


@torch.inference_mode()
def says(model, n=400):
    """Share of narrated words that belong to the right kind, by place (pace, height, side)."""
    ids, patches = batch(1, n, torch.Generator().manual_seed(77))
    asked = ids[:, 5] == TOKEN["say"]
    told = model(ids[:, :-1], patches)[:, -3:].argmax(-1)[asked]
    kind = {TOKEN[w]: c for c, words in CONCEPTS.items() for w in words}
    right = [[kind.get(a, a) == kind.get(b, b) for a, b in zip(x, y, strict=True)]
             for x, y in zip(told.tolist(), ids[asked][:, -3:].tolist(), strict=True)]  # fmt: skip
    return torch.tensor(right).float().mean(0).tolist()


def census(model, seed):
    """Counts of `meanings` by layer, of the value vectors and of as many random directions."""
    logits = value_logits(model)
    noise = torch.randn(2000, logits.shape[0], SHAPE["d_model"],
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    noise = noise.flatten(0, 1) @ (model.embed.weight * model.norm.weight).T.detach()
    count = lambda labels: {m: labels.count(m) for m in sorted(set(labels))}  # noqa: E731
    return dict(layers=[count(meanings(layer)) for layer in logits],
                random=count(meanings(noise[:2000])))  # fmt: skip


def measure(model, seed, strengths=STRENGTHS, n=N_SCENES):
    """All conditions on n scenes: rows of dicts."""
    world = scenes(n, torch.Generator().manual_seed(30_000 + seed))
    scale = units(model, world)
    rows = [dict(kind="none", **behaviour(*rollout(model, world)))]
    for i, concept in enumerate(CONCEPTS):
        word = CONCEPTS[concept][0]
        rows.append(dict(kind="prompt", concept=concept, **behaviour(*rollout(model, world, word))))
        neurons = cluster(model, concept)
        others = matched(neurons, SHAPE["d_mlp"], 10 * seed + i)
        for kind, chosen in (("cluster", neurons), ("random", others)):
            for strength in strengths:
                with clamped(model, chosen, strength, scale):
                    found = behaviour(*rollout(model, world))
                rows.append(dict(kind=kind, concept=concept, strength=strength, **found))
    return rows


def policy(seed, condition, scratch, log=None):
    """The policy of one seed after stage 1 and after stage 2; trained if need be."""
    spoken = train(build(seed), 1, seed, scratch / f"vla_{seed}_1.pt", log)
    acting = build(seed)
    acting.load_state_dict(spoken.state_dict())
    path = scratch / f"vla_{seed}_{condition}.pt"
    return spoken, train(acting, 2, seed, path, log, SHARES[condition])


def load():
    """The stored policy (seed 0, mixed), data/steering/vla_policy.safetensors."""
    model = build(0)
    weights = load_file(HERE / "vla_policy.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.eval().requires_grad_(False)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--conditions", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "book_vla")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = {condition: [] for condition in args.conditions}
    for condition in args.conditions:
        for seed in args.seeds:
            kept = args.scratch / f"vla_row_{condition}_{seed}.json"
            if not kept.is_file():
                say = lambda text: print(text, flush=True)  # noqa: E731
                spoken, acting = policy(seed, condition, args.scratch, say)
                row = dict(seed=seed, rows=measure(acting, seed), says=[says(spoken), says(acting)],
                           census=[census(spoken, seed), census(acting, seed)])  # fmt: skip
                kept.write_text(json.dumps(rounded(row)))
                if (seed, condition) == (0, "mixed"):
                    save_file(half(acting), HERE / "vla_policy.safetensors")
            found[condition].append(json.loads(kept.read_text()))
    # The strength that the claims use is set by what it costs, not by what it does: the largest
    # that leaves the six clusters half of the unsteered success on average.
    table = dict(found)
    for condition, policies in found.items():
        none = mean_success(policies, "none")
        left = {s: mean_success(policies, "cluster", s) / none for s in STRENGTHS}
        enough = [s for s in STRENGTHS if left[s] >= 0.5]
        table[f"strength_{condition}"] = max(enough, default=STRENGTHS[0])
    (HERE / "vla_rows.json").write_text(json.dumps(rounded(table), separators=(",", ":")) + "\n")
    print(f"{sum(map(len, found.values()))} policies in vla_rows.json")


def mean_success(found, kind, strength=None):
    rows = [r for p in found for r in p["rows"]]
    kept = [r["success"] for r in rows if r["kind"] == kind and r.get("strength") == strength]
    return sum(kept) / len(kept)


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return round(x, 5) if isinstance(x, float) else x


if __name__ == "__main__":
    main()
