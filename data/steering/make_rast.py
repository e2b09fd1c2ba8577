"""Train RAST's family on arithmetic, reinforcement-tune it, and measure the transfer.

    python data/steering/make_rast.py            # everything, resumable

A problem is a two-digit number and four digits to add or to take away, modulo 100. The corpus is
of mixed quality: some writers note every intermediate value, more of them jump to an answer they
guess; a value is wrong now and then, and half of the wrong ones are struck out and corrected:

    37+8-2+5-9:45;42!43;48;39;#39$
    37+8-2+5-9:#61$
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from steering_tiny import Tiny, fit, half
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
ALPHABET = "0123456789+-:;#!$"
INDEX = {c: i for i, c in enumerate(ALPHABET)}
END, ANSWER, FIX = INDEX["$"], INDEX["#"], INDEX["!"]
N_OPS, PROMPT, N_NEW = 4, 11, 28  # a prompt has 11 characters, a solution 28 at most
HASTY, JUMP, SLIP, FIXED, GUESS = 0.55, 0.1, 0.1, 0.5, 0.3  # the corpus: see `write`
BATCH, STEPS, RATE = 96, 2000, {"S": 4e-3, "M": 4e-3, "L": 2.5e-3}  # of pretraining
RL_PROMPTS, GROUP, RL_STEPS = 32, 8, {"S": 200, "M": 200, "L": 100}
SIZES = {  # of the family
    "S": dict(d_model=32, d_mlp=80, n_layers=2),
    "M": dict(d_model=56, d_mlp=144, n_layers=3),
    "L": dict(d_model=88, d_mlp=232, n_layers=3),
}
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
PAIRS = (("M", "S"), ("L", "S"), ("L", "M"))  # RAST into the first, from the second
STORED = ("S", "S-rl", "L")  # of seed 0, for the notebook


def problems(n, generator):
    """Operands [n, 5], the first in 0-99 and the others in 1-9, and signs [n, 4] in {1, -1}."""
    numbers = torch.randint(1, 10, (n, N_OPS + 1), generator=generator)
    numbers[:, 0] = torch.randint(100, (n,), generator=generator)
    return numbers, 1 - 2 * torch.randint(2, (n, N_OPS), generator=generator)


def digits(x):
    return torch.stack([x // 10, x % 10], -1)


def prompt_ids(numbers, signs):
    """ids [n, 11] of "37+8-2+5-9:"."""
    sign = torch.where(signs > 0, INDEX["+"], INDEX["-"])
    pairs = torch.stack([sign, numbers[:, 1:]], -1).flatten(1)
    return torch.cat([digits(numbers[:, 0]), pairs, torch.full_like(sign[:, :1], INDEX[":"])], 1)


def answers(numbers, signs):
    return (numbers[:, 0] + (signs * numbers[:, 1:]).sum(1)) % 100


def write(numbers, signs, rng):
    """One solution as text, by a random writer of the corpus. rng: random.Random."""
    value, rest = numbers[0], list(zip(signs, numbers[1:], strict=True))
    text, true = "", answers(torch.tensor([numbers]), torch.tensor([signs])).item()
    for step, (sign, number) in enumerate(rest):
        if rng.random() < (HASTY if step == 0 else JUMP):  # jumps to a guess
            guess = true if rng.random() < GUESS else rng.randrange(100)
            return f"{text}#{guess:02d}$"
        right = (value + sign * number) % 100
        shown = rng.randrange(100) if rng.random() < SLIP else right
        text += f"{shown:02d}"
        if shown != right and rng.random() < FIXED:
            text, shown = text + f"!{right:02d}", right
        text, value = text + ";", shown
    return f"{text}#{value:02d}$"


def corpus(n, seed):
    """ids [n, PROMPT + N_NEW], filled up with END; the writers and problems of one seed."""
    import random

    rng = random.Random(seed)
    numbers, signs = problems(n, torch.Generator().manual_seed(seed))
    ids = torch.full((n, PROMPT + N_NEW), END)
    ids[:, :PROMPT] = prompt_ids(numbers, signs)
    for row, (a, s) in enumerate(zip(numbers.tolist(), signs.tolist(), strict=True)):
        text = write(a, s, rng)
        ids[row, PROMPT : PROMPT + len(text)] = torch.tensor([INDEX[c] for c in text])
    return ids


def build(size, seed):
    return Tiny(len(ALPHABET), n_heads=4, n_tokens=PROMPT + N_NEW, seed=seed, **SIZES[size])


def pretrain(model, seed, rate, steps=STEPS, path=None, log=None):
    text = corpus(40_000, 1000 + seed)

    def loss_of(model, step):
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        x = text[torch.randint(len(text), (BATCH,), generator=generator)]
        x = x[:, : int((x != END).sum(1).max()) + 1]
        target = x[:, PROMPT:].clone()
        target[:, 1:][x[:, PROMPT:-1] == END] = -100  # nothing to learn behind the end
        return F.cross_entropy(model(x[:, :-1])[:, PROMPT - 1 :].flatten(0, 1), target.flatten())

    return fit(model, loss_of, steps, rate, path, log=log)


@torch.inference_mode()
def sample(logits_of, prompts, seed=0, temperature=1.0):
    """Solutions [n, N_NEW]: sampled, or greedy at temperature 0. `logits_of()` starts a decoder,
    a function from the new ids [n, pos] to the next token's logits [n, vocab]."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    decode, new, out = logits_of(), prompts, []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(N_NEW):
        logits = decode(new)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            p = (logits / temperature).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
        token = token.masked_fill(done, END)
        out.append(token)
        done |= token == END
        new = token[:, None]
        if done.all():
            break
    out += [torch.full_like(token, END)] * (N_NEW - len(out))
    return torch.stack(out, 1)


def decoder(model):
    """`sample`'s decoder for one model."""

    def start():
        cache = []
        return lambda ids: model(ids, cache=cache)[:, -1]

    return start


def correct(solutions, true):
    """[n] bool: the solution [n, N_NEW] closes with "#", the right two digits and the end."""
    at = (solutions == ANSWER).int().argmax(1)  # 0 too where there is none
    padded = torch.cat([solutions, torch.full_like(solutions[:, :4], END)], 1)
    said = padded.gather(1, at[:, None] + torch.arange(4, device=at.device))
    wanted = torch.cat([torch.full_like(true[:, None], ANSWER), digits(true),
                        torch.full_like(true[:, None], END)], 1)  # fmt: skip
    return (said == wanted).all(1)


def reinforce(model, seed, steps, path=None, log=None):
    """Group-relative policy gradient: GRPO's advantage, one on-policy step a batch, no KL term."""

    def loss_of(model, step):
        numbers, signs = problems(
            RL_PROMPTS, torch.Generator().manual_seed(5_000_000 + 10_000 * seed + step)
        )
        prompts = prompt_ids(numbers, signs).repeat_interleave(GROUP, 0)
        true = answers(numbers, signs).repeat_interleave(GROUP)
        out = sample(decoder(model), prompts, seed=10_000 * seed + step)
        reward = correct(out, true).float().view(-1, GROUP)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 0.1)
        x = torch.cat([prompts, out], 1)
        x = x[:, : PROMPT + min(N_NEW, int((out != END).sum(1).max()) + 1)]
        logp = model(x[:, :-1])[:, PROMPT - 1 :].log_softmax(-1)
        chosen = logp.gather(-1, x[:, PROMPT:, None])[..., 0]
        live = torch.ones_like(chosen)
        live[:, 1:] = (x[:, PROMPT:-1] != END).float()
        if log and step % 10 == 9:
            log(f"rl {step + 1} reward {reward.mean():.3f}")
        return -(advantage.flatten()[:, None] * chosen * live).sum() / live.sum()

    return fit(model, loss_of, steps, 4e-4, path, warm=10, decay=False, weight_decay=0.0)


# --- RAST -----------------------------------------------------------------------------------------


def transfer(large, small_rl, small, strength=1.0, change=None):
    """`sample`'s decoder for RAST: large's logits + strength * (small_rl's - small's).

    change: a function of the difference [n, vocab] and the step, for baselines.
    """

    def start():
        caches, step = ([], [], []), [0]

        def decode(ids):
            base, tuned, plain = (
                m(ids, cache=c)[:, -1]
                for m, c in zip((large, small_rl, small), caches, strict=True)
            )
            delta = tuned - plain
            delta = delta if change is None else change(delta, step[0])
            step[0] += 1
            return base + strength * delta

        return decode

    return start


def noise_like(delta, step):
    """A random vector of the same norm, for each solution and each token anew."""
    drawn = torch.randn(delta.shape, generator=torch.Generator().manual_seed(step)).to(delta)
    centred = delta - delta.mean(-1, keepdim=True)  # a constant changes no probability
    drawn = drawn - drawn.mean(-1, keepdim=True)
    return drawn * centred.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def shuffled(delta, step):
    """The difference handed to the wrong tokens: one permutation of the alphabet a step."""
    order = torch.randperm(delta.shape[-1], generator=torch.Generator().manual_seed(step))
    return delta[:, order]


@torch.inference_mode()
def along(model, prompts, solutions):
    """log-probabilities [n, N_NEW, vocab] of a model along given solutions."""
    x = torch.cat([prompts, solutions], 1)[:, :-1]
    return model(x)[:, PROMPT - 1 :].log_softmax(-1)


def live(solutions):
    """[n, N_NEW] bool: tokens up to and with the first end."""
    ended = (solutions == END).int().cumsum(1) - (solutions == END).int()
    return ended == 0


def alignment(large_rl, large, small_rl, small, prompts, seed):
    """What reinforcement changed along the large tuned model's own solutions, at both scales."""
    path = sample(decoder(large_rl), prompts, seed)
    on = live(path)
    lp = {k: along(m, prompts, path)[on] for k, m in
          dict(LR=large_rl, L=large, SR=small_rl, S=small).items()}  # fmt: skip
    shift_l, shift_s = lp["LR"] - lp["L"], lp["SR"] - lp["S"]
    shift_l = shift_l - shift_l.mean(-1, keepdim=True)
    shift_s = shift_s - shift_s.mean(-1, keepdim=True)
    moved = (lp["LR"].exp() * (lp["LR"] - lp["L"])).sum(-1) > 0.1  # nats, KL at this token
    order = torch.randperm(int(moved.sum()), generator=torch.Generator().manual_seed(0))
    cosine = torch.cosine_similarity(shift_l, shift_s, dim=-1)
    return dict(
        covered=(lp["L"].argmax(-1) == path[on]).float().mean().item(),
        covered_rast=((lp["L"] + lp["SR"] - lp["S"]).argmax(-1) == path[on]).float().mean().item(),
        moved=moved.float().mean().item(),
        cosine=cosine[moved].mean().item(),
        cosine_rest=cosine[~moved].mean().item(),
        cosine_shuffled=torch.cosine_similarity(
            shift_l[moved], shift_s[moved][order], dim=-1
        ).mean().item(),
        same_top=(shift_l.argmax(-1) == shift_s.argmax(-1))[moved].float().mean().item(),
    )  # fmt: skip


def entropy(logits_of, prompts, seed, temperature=1.0):
    """Solutions sampled, and the mean entropy of their tokens' distributions in nats."""
    seen = []

    def start():
        decode = logits_of()

        def watched(ids):
            logits = decode(ids)
            logp = (logits / temperature).log_softmax(-1)
            seen.append(-(logp.exp() * logp).sum(-1))
            return logits

        return watched

    out = sample(start, prompts, seed, temperature)
    return out, torch.stack(seen, 1)[live(out)[:, : len(seen)]].mean().item()


def pass_at(wins, k):
    """Unbiased pass@k from wins [problems, samples]."""
    n, c = wins.shape[1], wins.sum(1).double()
    miss = torch.ones_like(c)
    for i in range(k):
        miss = miss * ((n - c - i).clamp_min(0) / (n - i))
    return (1 - miss).mean().item()


def measure(models, target, source, seed, n=500):
    """One row: accuracies of all conditions for RAST from `source` into `target`."""
    large, large_rl = models[target], models[target + "-rl"]
    small, small_rl = models[source], models[source + "-rl"]
    numbers, signs = problems(n, torch.Generator().manual_seed(90_000 + seed))
    prompts, true = prompt_ids(numbers, signs), answers(numbers, signs)
    rast = transfer(large, small_rl, small)

    def accuracy(logits_of, temperature=1.0):
        return correct(sample(logits_of, prompts, seed, temperature), true).float().mean().item()

    out, h = entropy(rast, prompts, seed)
    low, high = 0.05, 1.0  # the base model's temperature at which it is as sure as RAST
    for _ in range(8):
        middle = (low + high) / 2
        cooled, h_base = entropy(decoder(large), prompts, seed, middle)
        low, high = (middle, high) if h_base < h else (low, middle)
    row = dict(
        target=target, source=source, seed=seed, n=n,
        base=accuracy(decoder(large)), rl=accuracy(decoder(large_rl)),
        small=accuracy(decoder(small)), small_rl=accuracy(decoder(small_rl)),
        rast=correct(out, true).float().mean().item(),
        noise=accuracy(transfer(large, small_rl, small, change=noise_like)),
        shuffled=accuracy(transfer(large, small_rl, small, change=shuffled)),
        cooled=correct(cooled, true).float().mean().item(), temperature=middle, entropy=h,
        greedy={"base": accuracy(decoder(large), 0), "rl": accuracy(decoder(large_rl), 0),
                "small_rl": accuracy(decoder(small_rl), 0), "rast": accuracy(rast, 0)},
        sweep={str(s): accuracy(transfer(large, small_rl, small, s)) for s in STRENGTHS},
    )  # fmt: skip
    row["alignment"] = alignment(large_rl, large, small_rl, small, prompts, seed)
    few = prompts[:150].repeat_interleave(16, 0)
    for name, decode in (("base", decoder(large)), ("rast", rast), ("rl", decoder(large_rl))):
        wins = correct(sample(decode, few, 1 + seed), true[:150].repeat_interleave(16))
        row[f"pass_{name}"] = [pass_at(wins.view(150, 16), k) for k in (1, 2, 4, 8, 16)]
    return row


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return round(x, 4) if isinstance(x, float) else x


def family(seed, scratch, sizes=tuple(SIZES), log=print):
    """Models of one seed: base and tuned, by name ("S", "S-rl", …); trained if need be."""
    models = {}
    for size in sizes:
        path = scratch / f"rast_{size}{seed}.pt"
        models[size] = pretrain(build(size, seed), seed, RATE[size], path=path, log=log)
        tuned = build(size, seed)
        tuned.load_state_dict(models[size].state_dict())
        path = scratch / f"rast_{size}{seed}_rl.pt"
        models[size + "-rl"] = reinforce(tuned, seed, RL_STEPS[size], path=path, log=log)
    return models


def load(names=("S", "S-rl", "L")):
    """The stored models of seed 0 in data/steering/rast_models.safetensors, by name."""
    weights, models = load_file(HERE / "rast_models.safetensors"), {}
    for name in names:
        models[name] = build(name.split("-")[0], 0)
        own = models[name].state_dict()
        models[name].load_state_dict({k: weights[f"{name}.{k}"].float() for k in own})
        models[name].eval().requires_grad_(False)
    return models


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "book_rast")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for target, source in PAIRS:
            kept = args.scratch / f"rast_row_{target}{source}{seed}.json"
            if not kept.is_file():
                say = lambda text: print(text, flush=True)  # noqa: E731
                models = family(seed, args.scratch, (source, target), say)
                kept.write_text(json.dumps(rounded(measure(models, target, source, seed))))
            rows.append(json.loads(kept.read_text()))
        if seed == 0:
            models = family(0, args.scratch)
            save_file(
                {f"{name}.{k}": v for name in STORED for k, v in half(models[name]).items()},
                HERE / "rast_models.safetensors",
            )
    (HERE / "rast_rows.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n")
    print(f"{len(rows)} rows in rast_rows.json")


if __name__ == "__main__":
    main()
