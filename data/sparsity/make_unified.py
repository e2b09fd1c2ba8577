"""Make unified_results.json and unified_model.safetensors: one model that reads and draws digits.

A mixture of transformers as in BAGEL: the *understanding* component has the weights that caption
tokens and patches of a picture to be read go through, the *generation* component those that tokens
of a picture being drawn go through; they meet in one attention. A caption is three words: the
digit, how heavy the stroke is, which way it leans. Pictures to read come in as pixels of 49
patches, pictures to draw are 49 codes of a codebook, written one after the other.

The script trains three of them, probes each without training (depth and width of each component)
and adapts the generation component to half of its neurons a token: as a mixture of experts and,
with the same number of steps, as a model pruned once and for all.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lib import checkpoint, datasets  # noqa: E402

D, LAYERS, HEADS, NEURONS, CODES = 64, 4, 4, 160, 128
WORDS = [*"0123456789", "light", "medium", "bold", "left", "upright", "right"]
QUERY = len(WORDS)  # the token that asks for a caption
SHARED, EXPERTS, TOP = 40, 12, 4  # neurons every token uses; experts of 10 neurons, 4 of them on
STEPS, ADAPT, BATCH = 1200, 300, 32
SEEDS = (0, 1, 2)
COMPONENTS = ("und", "gen")


# --- pictures, captions, codes --------------------------------------------------------------------


def patches(x: Tensor) -> Tensor:
    """[n, 28, 28] to [n, 49, 16], row by row."""
    return x.unfold(1, 4, 4).unfold(2, 4, 4).reshape(len(x), 49, 16)


def picture(p: Tensor) -> Tensor:
    """[n, 49, 16] back to [n, 28, 28]."""
    return p.reshape(-1, 7, 7, 4, 4).permute(0, 1, 3, 2, 4).reshape(-1, 28, 28)


def stroke(x: Tensor) -> Tensor:
    """[n, 2]: mean ink of a picture, and its shear (columns a row, to the right positive)."""
    ink = x.sum((1, 2)).clamp_min(1e-6)
    rows = torch.arange(28.0, device=x.device)[:, None]
    columns = rows.T
    r = rows - ((x * rows).sum((1, 2)) / ink)[:, None, None]
    c = columns - ((x * columns).sum((1, 2)) / ink)[:, None, None]
    lean = -(x * r * c).sum((1, 2)) / (x * r * r).sum((1, 2)).clamp_min(1e-6)
    return torch.stack([x.mean((1, 2)), lean], 1)


def captions(x: Tensor, digit: Tensor, cuts: Tensor) -> Tensor:
    """Three words a picture: [n, 3] of ``WORDS``; ``cuts`` [2, 2]: terciles of ``stroke``."""
    values = stroke(x)
    thirds = (values[:, :, None] > cuts[None]).sum(-1)
    return torch.stack([digit, 10 + thirds[:, 0], 13 + thirds[:, 1]], 1)


def nearest(p: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(p, codebook).argmin(-1)


def clusters(p: Tensor, n: int, rounds: int = 15) -> Tensor:
    """k-means: ``n`` centres [n, 16] of patches [m, 16]; the first is the empty patch."""
    g = torch.Generator().manual_seed(0)
    inked = p[p.sum(-1) > 0.5]
    centres = torch.cat(
        [torch.zeros(1, 16), inked[torch.randperm(len(inked), generator=g)[: n - 1]]]
    )
    for _ in range(rounds):
        at = nearest(p, centres)
        count = torch.bincount(at, minlength=n).clamp_min(1)[:, None]
        centres = torch.zeros(n, 16).index_add_(0, at, p) / count
    return centres


def load() -> dict[str, Tensor]:
    """Pictures, captions and codes of MNIST, and what makes them: cuts and codebook."""
    raw = datasets.mnist()
    out = {}
    for part in ("train", "test"):
        out[f"x_{part}"] = torch.tensor(raw[f"x_{part}"]).float() / 255
    out["cuts"] = torch.quantile(stroke(out["x_train"]), torch.tensor([1 / 3, 2 / 3]), dim=0).T
    g = torch.Generator().manual_seed(0)
    some = patches(out["x_train"][torch.randperm(10_000, generator=g)[:1500]]).flatten(0, 1)
    out["codebook"] = clusters(some, CODES)
    for part in ("train", "test"):
        digit = torch.tensor(raw[f"y_{part}"]).long()
        out[f"words_{part}"] = captions(out[f"x_{part}"], digit, out["cuts"])
        out[f"codes_{part}"] = nearest(patches(out[f"x_{part}"]), out["codebook"])
    return out


# --- the model ------------------------------------------------------------------------------------


def fresh(seed: int) -> dict[str, Tensor]:
    """New weights: for each component and layer q, k, v, o, gate, up, down and two norms."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std=None):
        return torch.randn(*shape, generator=g) * (std or shape[-1] ** -0.5)

    w = {}
    for c in COMPONENTS:
        for layer in range(LAYERS):
            at = f"{c}.{layer}."
            for name in "qkv":
                w[at + name] = draw(D, D)
            w[at + "o"] = draw(D, D) / math.sqrt(2 * LAYERS)
            w[at + "gate"], w[at + "up"] = draw(NEURONS, D), draw(NEURONS, D)
            w[at + "down"] = draw(D, NEURONS) / math.sqrt(2 * LAYERS)
            w[at + "norm1"] = torch.ones(D)
            w[at + "norm2"] = torch.ones(D)
        w[f"{c}.norm"] = torch.ones(D)
    w["words"], w["read"], w["codes"] = (
        draw(17, D, std=0.5),
        draw(D, 16),
        draw(CODES + 1, D, std=0.5),
    )
    w["und.place"], w["gen.place"] = draw(49 + 3, D, std=0.3), draw(49, D, std=0.3)
    w["und.head"], w["gen.head"] = draw(16, D), draw(CODES, D)
    return w


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def run(w, streams: dict[str, Tensor], neurons=None, drop=(), watch=None) -> dict[str, Tensor]:
    """All layers, over "und" [b, n, d] and, where a picture is drawn, "gen" [b, m, d] behind it.

    Args:
        neurons: ``neurons(component, layer, x, h) -> h`` changes the hidden neurons h [b, n, 160]
            of an MLP whose normed input is x.
        drop: (component, layer) pairs whose tokens skip that layer: attention, MLP and all.
        watch: ``watch(component, layer, before, after)``, the stream around a layer.
    """
    streams = dict(streams)
    for layer in range(LAYERS):
        here = [c for c in COMPONENTS if c in streams and (c, layer) not in drop]
        before = dict(streams)
        q, k, v = [], [], []
        for c in here:
            n = rms(streams[c], w[f"{c}.{layer}.norm1"])
            for name, into in zip("qkv", (q, k, v), strict=True):
                heads = (n @ w[f"{c}.{layer}.{name}"].T).unflatten(-1, (HEADS, -1))
                into.append(heads.transpose(1, 2))
        if not here:
            continue
        q, k, v = (torch.cat(t, 2) for t in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        for c, z_c in zip(here, z.split([streams[c].shape[1] for c in here], 1), strict=True):
            at = f"{c}.{layer}."
            x = streams[c] + z_c @ w[at + "o"].T
            n = rms(x, w[at + "norm2"])
            h = F.silu(n @ w[at + "gate"].T) * (n @ w[at + "up"].T)
            if neurons is not None:
                h = neurons(c, layer, n, h)
            streams[c] = x + h @ w[at + "down"].T
            if watch is not None:
                watch(c, layer, before[c], streams[c])
    return streams


def read_caption(w, x: Tensor, words: Tensor, **how) -> Tensor:
    """Logits [n, 3, 16] of a caption's words, each given picture [n, 28, 28] and words before."""
    asked = torch.cat([torch.full_like(words[:, :1], QUERY), words[:, :2]], 1)
    und = torch.cat([patches(x) @ w["read"].T, w["words"][asked]], 1) + w["und.place"]
    out = run(w, {"und": und}, **how)["und"][:, -3:]
    return rms(out, w["und.norm"]) @ w["und.head"].T


def draw_codes(w, words: Tensor, codes: Tensor, **how) -> Tensor:
    """Logits [n, m + 1, codes] of each code of a picture and the next, given the caption [n, 3]
    and the codes so far [n, m]."""
    und = w["words"][words] + w["und.place"][49:]
    begun = torch.cat([torch.full_like(words[:, :1], CODES), codes], 1)
    gen = w["codes"][begun] + w["gen.place"][: begun.shape[1]]
    out = run(w, {"und": und, "gen": gen}, **how)["gen"]
    return rms(out, w["gen.norm"]) @ w["gen.head"].T


def loss_read(w, data, at, part="train", **how) -> Tensor:
    words = data[f"words_{part}"][at]
    logits = read_caption(w, data[f"x_{part}"][at], words, **how)
    return F.cross_entropy(logits.flatten(0, 1), words.flatten())


def loss_draw(w, data, at, part="train", **how) -> Tensor:
    codes = data[f"codes_{part}"][at]
    logits = draw_codes(w, data[f"words_{part}"][at], codes[:, :-1], **how)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@torch.no_grad()
def draw(w, words: Tensor, seed: int, temperature: float = 0.8, **how) -> Tensor:
    """Codes [n, 49] drawn from the model for captions [n, 3]."""
    g = torch.Generator(words.device).manual_seed(seed)
    codes = words[:, :0]
    for _ in range(49):
        logits = draw_codes(w, words, codes, **how)[:, -1] / temperature
        codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=g)], 1)
    return codes


# --- what is judged -------------------------------------------------------------------------------


def judge(w, x: Tensor) -> Tensor:
    """Logits [n, 10] of a small convolutional net that knows digits."""
    y = F.relu(F.conv2d(x[:, None], w["judge.1"], stride=2, padding=1))
    y = F.relu(F.conv2d(y, w["judge.2"], stride=2, padding=1))
    return y.flatten(1) @ w["judge.3"].T


def train_judge(data) -> dict[str, Tensor]:
    """Trained on real digits as the codebook shows them."""
    g = torch.Generator().manual_seed(0)
    w = {
        "judge.1": torch.randn(16, 1, 3, 3, generator=g) * 0.4,
        "judge.2": torch.randn(32, 16, 3, 3, generator=g) * 0.1,
        "judge.3": torch.randn(10, 32 * 49, generator=g) * 0.02,
    }
    for v in w.values():
        v.requires_grad_()
    opt = torch.optim.Adam(w.values(), lr=2e-3)
    for _ in range(700):
        at = torch.randint(10_000, (64,), generator=g)
        x = picture(data["codebook"][data["codes_train"][at]])
        loss = F.cross_entropy(judge(w, x), data["words_train"][at, 0])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return {k: v.detach() for k, v in w.items()}


@torch.no_grad()
def obeyed(judged, x: Tensor, words: Tensor, cuts: Tensor) -> Tensor:
    """[n, 3]: which words of the caption the picture x [n, 28, 28] obeys."""
    return captions(x, judge(judged, x).argmax(-1), cuts) == words


@torch.no_grad()
def scores(w, data, judged, tasks=COMPONENTS, n_draw: int = 150, **how) -> dict[str, float]:
    """``read``: share of test pictures whose digit is read right, ``words`` of all three words;
    ``nats`` a code on test pictures; ``drawn``: share of drawn pictures with the digit asked for,
    ``obeyed`` of all words asked for."""
    out = {}
    if "und" in tasks:
        words = data["words_test"][:1000]
        right = read_caption(w, data["x_test"][:1000], words, **how).argmax(-1) == words
        out |= {"read": right[:, 0].float().mean().item(), "words": right.float().mean().item()}
    if "gen" in tasks:
        out["nats"] = (
            sum(loss_draw(w, data, at, "test", **how).item() for at in torch.arange(600).split(100))
            / 6
        )
        words = data["words_test"][:n_draw]
        x = picture(data["codebook"][draw(w, words, 7, **how)])
        good = obeyed(judged, x, words, data["cuts"]).float()
        out |= {"drawn": good[:, 0].mean().item(), "obeyed": good.mean().item()}
    return {k: round(v, 4) for k, v in out.items()}


# --- training-free probes -------------------------------------------------------------------------


@torch.no_grad()
def importance(w, data, task: str) -> dict[tuple, Tensor]:
    """Mean |h| of each neuron times the norm of its column of W_down, on 200 training pictures."""
    found = {}

    def look(c, layer, x, h):
        size = h.abs().mean((0, 1)) * w[f"{c}.{layer}.down"].norm(dim=0)
        found[c, layer] = size
        return h

    (loss_read if task == "und" else loss_draw)(w, data, torch.arange(200), neurons=look)
    return found


@torch.no_grad()
def likeness(w, data, task: str) -> dict[tuple, float]:
    """Cosine between what goes into a layer and what comes out, on 200 training pictures."""
    found = {}

    def look(c, layer, before, after):
        found[c, layer] = F.cosine_similarity(before, after, dim=-1).mean().item()

    (loss_read if task == "und" else loss_draw)(w, data, torch.arange(200), watch=look)
    return found


def most_alike(alike, component: str, n: int) -> set[tuple]:
    """The ``n`` layers of a component that change their stream least."""
    own = {key: v for key, v in alike.items() if key[0] == component}
    return set(sorted(own, key=own.get, reverse=True)[:n])


def narrower(score, component: str, share: float):
    """``neurons`` that keeps the same share of neurons for every token, the most important."""
    keep = {}
    for (c, layer), values in score.items():
        if c == component:
            keep[c, layer] = torch.zeros_like(values)
            keep[c, layer][values.topk(round(share * len(values))).indices] = 1
    return lambda c, layer, x, h: h * keep[c, layer] if c == component else h


def chosen_by_token(w, component: str, share: float):
    """``neurons`` that keeps, for every token, those that matter most to it. It computes all h to
    know which, so it saves nothing: a bound on what a router could reach."""

    def pick(c, layer, x, h):
        if c != component:
            return h
        size = h.abs() * w[f"{c}.{layer}.down"].norm(dim=0)
        at = size.topk(round(share * h.shape[-1]), -1).indices
        return h * torch.zeros_like(h).scatter(-1, at, 1.0)

    return pick


# --- mixture of experts ---------------------------------------------------------------------------


def experts(score, component: str = "gen") -> dict[str, Tensor]:
    """Which neuron is whose: for each layer [160], -1 shared, else the number of its expert. The
    most important are shared; the rest goes round, one to each expert."""
    out = {}
    for layer in range(LAYERS):
        values = score[component, layer]
        owner = torch.full((len(values),), -1)
        rest = values.topk(len(values) - SHARED, largest=False).indices.sort().values
        owner[rest] = torch.arange(len(rest)) % EXPERTS
        out[f"owner.{layer}"] = owner
    return out


def fresh_routers(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed + 50)
    return {f"router.{i}": torch.randn(EXPERTS, D, generator=g) * 0.02 for i in range(LAYERS)}


def mixture(routers, owners, component: str = "gen"):
    """``neurons`` that keeps the shared ones and those of the ``TOP`` experts its router picks. A
    chosen expert counts in full; the gradient goes on to its probability (straight through)."""

    def route(c, layer, x, h):
        if c != component:
            return h
        p = (x @ routers[f"router.{layer}"].T).softmax(-1)
        hard = torch.zeros_like(p).scatter(-1, p.topk(TOP, -1).indices, 1.0)
        gate = hard * (1 + p - p.detach())
        gate = torch.cat([gate, torch.ones_like(gate[..., :1])], -1)  # owner -1: shared
        return h * gate[..., owners[f"owner.{layer}"]]

    return route


# --- training -------------------------------------------------------------------------------------


def fit(w, names, data, steps, seed, both, rate, neurons=None, state=None) -> None:
    """AdamW on the weights ``names`` of ``w``, in place; both tasks, or drawing alone."""
    free = [w[n].requires_grad_() for n in names]
    opt = torch.optim.AdamW(free, lr=rate, betas=(0.9, 0.95), weight_decay=0.02)
    first = 0
    if state and state.exists():
        kept = checkpoint.load(state)
        first = kept["step"]
        with torch.no_grad():
            for n in names:
                w[n].copy_(kept["w"][n])
        groups = opt.state_dict()["param_groups"]
        opt.load_state_dict({"state": kept["opt"], "param_groups": groups})
    for step in range(first, steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step + (0 if both else 500_000))
        for group in opt.param_groups:
            down = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            group["lr"] = rate * min(1, (step + 1) / 30) * down
        loss = loss_draw(w, data, torch.randint(10_000, (BATCH,), generator=g), neurons=neurons)
        if both:
            loss = loss + loss_read(w, data, torch.randint(10_000, (BATCH,), generator=g))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free, 1.0)
        opt.step()
        if state and ((step + 1) % 250 == 0 or step + 1 == steps):
            tree = {"step": step + 1, "w": {n: w[n] for n in names}}
            checkpoint.save(state, tree | {"opt": opt.state_dict()["state"]})
    for v in free:
        v.requires_grad_(False)


def probes(w, data, judged, seed) -> list[dict]:
    """Rows of the training-free study of one model."""
    rows = [{"probe": "none", **scores(w, data, judged)}]
    for task, component in (("und", "und"), ("gen", "und"), ("gen", "gen")):
        alike, score = likeness(w, data, task), importance(w, data, task)
        base = {"task": task, "component": component}
        for n in range(1, LAYERS):
            out = scores(w, data, judged, (task,), drop=most_alike(alike, component, n))
            rows.append({"probe": "depth", **base, "kept": 1 - n / LAYERS, **out})
        for share in (0.75, 0.5, 0.25):
            out = scores(w, data, judged, (task,), neurons=narrower(score, component, share))
            rows.append({"probe": "width", **base, "kept": share, **out})
        out = scores(w, data, judged, (task,), neurons=chosen_by_token(w, component, 0.5))
        rows.append({"probe": "by token", **base, "kept": 0.5, **out})
    return [{"seed": seed, **r} for r in rows]


def adaptations(w, data, judged, seed, folder) -> list[dict]:
    """Rows of the generation component at half of its neurons; the routers tuned alone are kept in
    ``folder``, and so is what was reached."""
    score = importance(w, data, "gen")
    owners = experts(score)
    pruned = narrower(score, "gen", 0.5)
    own = [n for n in w if n.startswith("gen.") or n == "codes"]
    routers = [f"router.{i}" for i in range(LAYERS)]
    ways = {  # name: (weights that are tuned, static or routed or all neurons)
        "pruned": ([], "static"),
        "pruned, tuned": (own, "static"),
        "untuned routers": ([], "routed"),
        "experts frozen": (routers, "routed"),
        "all tuned": (own + routers, "routed"),
        "dense, tuned": (own, "all"),
    }
    path = folder / f"adapted_{seed}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for name, (free, kind) in list(ways.items())[len(rows) :]:
        v = {k: t.clone() for k, t in w.items()} | fresh_routers(seed)
        neurons = {"static": pruned, "routed": mixture(v, owners), "all": None}[kind]
        if free:
            fit(v, free, data, ADAPT, seed, False, 1e-3, neurons)
        if name == "experts frozen":
            checkpoint.save(
                folder / f"routers_{seed}.safetensors", {n: v[n] for n in routers} | owners
            )
        found = scores(v, data, judged, ("gen",), neurons=neurons)
        rows.append({"seed": seed, "way": name, **found})
        path.write_text(json.dumps(rows))
        print(rows[-1], flush=True)
    return rows


def main(argv=None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--state", type=Path, default=Path("/tmp/unified"), help="scratch folder")
    options.add_argument("--out", type=Path, default=HERE)
    options.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = options.parse_args(argv)
    data = load()
    judged = train_judge(data)
    real = picture(data["codebook"][data["codes_test"]])
    good = obeyed(judged, real, data["words_test"], data["cuts"]).float()
    ceiling = {"drawn": round(good[:, 0].mean().item(), 4), "obeyed": round(good.mean().item(), 4)}
    print("real pictures through the codebook", ceiling, flush=True)
    parts = {}
    for seed in args.seeds:
        path = args.state / f"probes_{seed}.json"
        w = fresh(seed)
        model = args.state / f"model_{seed}.safetensors"
        fit(w, list(w), data, STEPS, seed, True, 3e-3, state=model)
        adapted = adaptations(w, data, judged, seed, args.state)
        if not path.exists():
            rows = probes(w, data, judged, seed)
            print(*rows, sep="\n", flush=True)
            path.write_text(json.dumps(rows))
        parts[seed] = {"probes": json.loads(path.read_text()), "adapted": adapted}
        if seed == SEEDS[0]:  # the one that is shipped
            ship = w | checkpoint.load(args.state / f"routers_{seed}.safetensors") | judged
            ship |= {"codebook": data["codebook"]}
            ship = {
                k: v.half() if v.is_floating_point() else v.to(torch.int8) for k, v in ship.items()
            }
            ship["cuts"] = data["cuts"]
            save_file(
                {k: v.contiguous() for k, v in ship.items()}, args.out / "unified_model.safetensors"
            )
    out = {"steps": STEPS, "adapt": ADAPT, "real": ceiling}
    text = json.dumps(out)[:-1]
    for key in ("probes", "adapted"):
        rows = [r for seed in args.seeds for r in parts[seed][key]]
        text += f', "{key}": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]"
    (args.out / "unified_results.json").write_text(text + "}\n")


if __name__ == "__main__":
    main()
