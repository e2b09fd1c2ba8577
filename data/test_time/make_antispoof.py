"""Faces whose every factor is known, and nets that tell live ones from prints and screens.

A drawn face has an identity (14 attributes), a domain (the camera of a data set: white balance,
gamma, blur, noise, vignette, background; other people and other attack devices too) and a liveness
(live, printed, replayed on a screen). Trains plain and domain-generalizing nets on some domains and
tests them on one that was left out: ``antispoof_rows.json``, one row a run.

    python data/test_time/make_antispoof.py [--scratch FOLDER] [--seeds 0 1 2]
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SIZE = 28  # pixels a side
WIDTH = 8  # channels of the first stage of an encoder
EPOCHS = 8
# One row a domain. Gains of red, green, blue; gamma; blur (pixels); noise; vignette; background
# grey; strength of the attack's traces; halftone period (pixels); screen's period (pixels).
DOMAINS = {
    "office": ((1.0, 1.0, 1.0), 1.0, 0.3, 0.02, 0.0, 0.75, 0.10, 2.6, 3.2),
    "phone": ((1.12, 1.0, 0.82), 0.8, 0.6, 0.03, 0.2, 0.45, 0.09, 3.6, 4.4),
    "webcam": ((0.85, 0.98, 1.15), 1.25, 0.5, 0.06, 0.1, 0.60, 0.10, 3.0, 2.6),
    "kiosk": ((0.95, 1.08, 0.9), 1.5, 0.4, 0.04, 0.5, 0.25, 0.08, 4.4, 3.7),
}
KINDS = ("live", "print", "replay")


# --- the generator --------------------------------------------------------------------------------


def people(n: int, rng: np.random.Generator, tone: float = 0.5) -> Tensor:
    """``n`` identities: [n, 14] attributes in [0, 1]; ``tone`` is the mean of the skin's."""
    who = rng.random((n, 14))
    who[:, 0] = np.clip(tone + 0.25 * rng.standard_normal(n), 0, 1)
    return torch.from_numpy(who).float()


def draw(who: Tensor, rng: np.random.Generator, background: float) -> Tensor:
    """A picture of each row of ``who`` [n, 14], in another pose, light and expression each time.

    Returns:
        float32 [n, 3, 28, 28] in [0, 1].
    """
    n = len(who)
    a = [who[:, i, None, None] for i in range(14)]

    def some(low, high):
        return torch.from_numpy(rng.uniform(low, high, (n, 1, 1))).float()

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    size, turn = some(0.93, 1.07), some(-0.12, 0.12)
    x0, y0 = axis[None, None] - some(-0.12, 0.12), axis[None, :, None] - some(-0.12, 0.12)
    x, y = (x0 * turn.cos() + y0 * turn.sin()) / size, (y0 * turn.cos() - x0 * turn.sin()) / size

    def blob(cx, cy, rx, ry, soft=0.12):
        """1 within an ellipse, 0 without, soft at the rim."""
        r = torch.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + 1e-6)
        return torch.sigmoid((1 - r) / soft)

    def colour(*channels):
        return torch.stack([c.expand(n, 1, 1) for c in channels], 1)

    light = 0.85 - 0.55 * a[0]
    skin = colour(light + 0.1, light * (0.8 + 0.08 * a[1]), light * (0.62 + 0.15 * a[1]))
    hair = colour(0.1 + 0.6 * a[2], 0.08 + 0.45 * a[2] * a[3], 0.06 + 0.25 * a[2] * a[3])
    eye = colour(0.1 + 0.1 * a[4], 0.1 + 0.25 * a[4], 0.1 + 0.4 * a[4])
    lips = colour(0.45 + 0.3 * light, 0.2 + 0.2 * light, 0.22 + 0.2 * light)
    wide, tall = 0.48 + 0.14 * a[5], 0.66 + 0.14 * a[6]
    apart, eye_y = 0.18 + 0.1 * a[7], -0.12 + 0.04 * a[8]
    smile = some(-0.03, 0.06)
    ground = torch.full((n, 3, SIZE, SIZE), background) + 0.15 * (x0 * some(-1, 1))[:, None]
    picture = ground.clamp(0, 1)
    layers = [
        (blob(0, -0.18, wide + 0.10, tall + 0.02 + 0.1 * a[9]), hair),
        (blob(0, 0.08, wide, tall - 0.04), skin),
    ]
    for side in (-1, 1):
        brow = blob(side * apart, eye_y - 0.16 - 0.04 * a[10], 0.13, 0.035 + 0.02 * a[10], 0.3)
        layers += [
            (brow, hair),
            (blob(side * apart, eye_y, 0.10 + 0.03 * a[8], 0.055), colour(*[light * 0 + 0.92] * 3)),
            (blob(side * apart, eye_y, 0.05, 0.055), eye),
        ]
    nose = blob(0, 0.16 + 0.06 * a[11], 0.05 + 0.05 * a[11], 0.14)
    mouth = blob(0, 0.44 + smile - 2.5 * smile * x**2, 0.14 + 0.12 * a[12], 0.045 + 0.04 * a[13])
    layers += [(0.5 * nose, skin * 0.7), (mouth, lips)]
    for mask, paint in layers:
        picture = picture + mask[:, None] * (paint - picture)
    shade = 1 + some(-0.3, 0.3) * x0 + some(-0.15, 0.15) * y0
    return (picture * shade[:, None]).clamp(0, 1)


def attack(pictures: Tensor, kind: str, domain: str, rng: np.random.Generator) -> Tensor:
    """Print the pictures [n, 3, h, w] on paper, or show them on a screen, as ``domain`` does it."""
    *_, strength, halftone, screen = DOMAINS[domain]
    n = len(pictures)

    def some(low, high):
        return torch.from_numpy(rng.uniform(low, high, (n, 1, 1, 1))).float()

    place = torch.arange(SIZE).float()
    px, py = place[None, None, None], place[None, None, :, None]
    angle, phase = some(0.2, 1.2), some(0, 2 * math.pi)
    u, v = px * angle.cos() + py * angle.sin(), py * angle.cos() - px * angle.sin()
    force = strength * some(0.6, 1.4)
    if kind == "print":  # a smaller range of colours, and dots
        grey = pictures.mean(1, keepdim=True)
        paper = 0.12 + 0.76 * (pictures + 0.25 * (grey - pictures))
        period = halftone * some(0.85, 1.15)
        dots = (2 * math.pi * u / period + phase).cos() * (2 * math.pi * v / period).cos()
        return (paper + force * dots).clamp(0, 1)
    period = screen * some(0.85, 1.15)  # a bluish screen, moiré and a reflection
    moire = (2 * math.pi * u / period + phase).sin()
    tint = torch.tensor([0.94, 1.0, 1.07])[:, None, None]
    glare = torch.exp(-((px - some(4, SIZE - 4)) ** 2 + (py - some(4, SIZE - 4)) ** 2) / 30)
    beat = torch.tensor([1.0, 0.6, 0.9])[:, None, None]
    return (pictures * tint + 0.7 * force * moire * beat + some(0, 0.5) * glare).clamp(0, 1)


def camera(pictures: Tensor, domain: str, rng: np.random.Generator) -> Tensor:
    """What the camera of ``domain`` makes of pictures [n, 3, h, w]."""
    gains, gamma, blur, noise, vignette, *_ = DOMAINS[domain]
    at = torch.arange(-2, 3).float()
    kernel = torch.exp(-(at**2) / (2 * blur**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 5)
    x = F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    x = F.conv2d(x, kernel.transpose(2, 3), groups=3)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    rim = 1 - vignette * (axis[:, None] ** 2 + axis[None] ** 2) / 2
    x = (x.clamp_min(1e-3) ** gamma) * torch.tensor(gains)[:, None, None] * rim
    return (x + noise * torch.from_numpy(rng.standard_normal(x.shape)).float()).clamp(0, 1)


def dataset(domain: str, n_people: int, shots: int, seed: int) -> dict[str, Tensor]:
    """``shots`` live and ``shots`` spoof pictures of each of ``n_people`` people of a domain.

    Returns:
        ``x`` [n, 3, 28, 28], ``live`` [n] (1: live), ``person`` [n], ``kind`` [n] (of ``KINDS``).
    """
    place = list(DOMAINS).index(domain)
    rng = np.random.default_rng([seed, place])
    who = people(n_people, rng, tone=(0.3, 0.6, 0.45, 0.7)[place])
    person = torch.arange(n_people).repeat_interleave(2 * shots)
    kind = torch.tensor(([0] * shots + [1, 2] * shots)[: 2 * shots]).repeat(n_people)
    x = draw(who[person], rng, DOMAINS[domain][5])
    for code in (1, 2):
        x[kind == code] = attack(x[kind == code], KINDS[code], domain, rng)
    return dict(
        x=camera(x, domain, rng), live=(kind == 0).long(), person=person, kind=kind
    )  # fmt: skip


def joined(domains: list[str], n_people: int, shots: int, seed: int) -> dict[str, Tensor]:
    """Several domains in one, with ``domain`` [n] and people counted through."""
    parts = [dataset(d, n_people, shots, seed) for d in domains]
    for at, part in enumerate(parts):
        part["domain"] = torch.full_like(part["live"], at)
        part["person"] = part["person"] + at * n_people
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


# --- the method -----------------------------------------------------------------------------------


def statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """A feature map's style, [n, c, h, w] to two of [n, c, 1, 1]: mean and deviation by channel."""
    return maps.mean((2, 3), keepdim=True), maps.var((2, 3), keepdim=True).add(1e-5).sqrt()


def style_cross(maps: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """Content of ``maps`` [n, c, h, w] in a style between its own and its ``partner``'s [n].

    ``share`` [n, 1, 1, 1] of the own style stays.
    """
    mean, deviation = statistics(maps)
    content = (maps - mean) / deviation
    mean = share * mean + (1 - share) * mean[partner]
    return content * (share * deviation + (1 - share) * deviation[partner]) + mean


class StyleAttention(nn.Module):
    """Channel by channel, how much of the style to keep: between the map and its whitened self."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Linear(2 * channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        mean, deviation = statistics(maps)
        keep = self.gate(torch.cat([mean, deviation], 1).flatten(1)).sigmoid()[..., None, None]
        return keep * maps + (1 - keep) * (maps - mean) / deviation


class Encoder(nn.Module):
    """Three convolutions to a feature vector [n, 4 · width]; ``attention`` after the second."""

    def __init__(self, attention: bool = False, width: int = WIDTH):
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.attention = StyleAttention(2 * width) if attention else nn.Identity()

    def early(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.stages[0](x), 2)

    def late(self, maps: Tensor) -> Tensor:
        maps = F.max_pool2d(self.attention(self.stages[1](maps)), 2)
        return self.stages[2](maps).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(x))


def orthogonality(u: Tensor, v: Tensor) -> Tensor:
    """Mean squared cosine between a picture's liveness features ``u`` [n, d] and identity ``v``."""
    return F.cosine_similarity(u, v, dim=-1).square().mean()


def decorrelation(u: Tensor, v: Tensor) -> Tensor:
    """Mean squared correlation, over a batch, of every entry of ``u`` [n, d] with each of ``v``."""
    u, v = ((z - z.mean(0)) / (z.std(0) + 1e-4) for z in (u, v))
    return (u.T @ v / len(u)).square().mean() * u.shape[1]


def asymmetric_contrast(u: Tensor, crossed: Tensor, live: Tensor, heat: float = 0.2) -> Tensor:
    """Live pictures attract all live ones; a spoof attracts its own style-crossed self alone.

    Args:
        u, crossed: features [n, d] of pictures and of the same in another style.
        live: [n], 1 or 0. Both kinds repel the other kind; spoofs do not repel each other.
    """
    likeness = F.normalize(u, dim=-1) @ F.normalize(crossed, dim=-1).T / heat  # [n, n]
    same = live[:, None] == live[None]
    own = torch.eye(len(u), dtype=torch.bool, device=u.device)
    positive = torch.where(live[:, None].bool(), same, own)
    logits = likeness.masked_fill(~(positive | ~same), -torch.inf)
    away = logits.log_softmax(1).masked_fill(~positive, 0)
    return -(away.sum(1) / positive.sum(1)).mean()


class Reverse(torch.autograd.Function):
    """The identity forwards; backwards, the gradient with its sign turned."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


DLIF = dict(orthogonal="cosine", cross=True, attention=True, contrast=True)
METHODS = {
    "ERM": {},
    "adversary on data sets": dict(adversary="domain"),
    "adversary on people": dict(adversary="person"),
    "DLIF": DLIF,
    "without orthogonality": DLIF | dict(orthogonal=None),
    "without Style Cross": DLIF | dict(cross=False),
    "without style attention": DLIF | dict(attention=False),
    "without contrast": DLIF | dict(contrast=False),
    "orthogonality alone": dict(orthogonal="cosine"),
    "decorrelation alone": dict(orthogonal="correlation"),
}
WEIGHTS = dict(identity=1.0, orthogonal=1.0, contrast=0.3, adversary=0.3)


def train(data: dict[str, Tensor], method: dict, seed: int, epochs: int = EPOCHS):
    """Train on ``joined`` data by one of ``METHODS``.

    Returns:
        (liveness encoder, head, identity encoder or None), in eval mode.
    """
    torch.manual_seed(seed)
    cross, target = method.get("cross"), method.get("adversary")
    liveness, head = Encoder(bool(method.get("attention"))), nn.Linear(4 * WIDTH, 2)
    parts = nn.ModuleList([liveness, head])
    identity = judge = name = None
    n_people = int(data["person"].max()) + 1
    if method.get("orthogonal"):
        identity, name = Encoder(), nn.Linear(4 * WIDTH, n_people)
        parts.extend([identity, name])
    if target:
        outputs = int(data[target].max()) + 1
        judge = nn.Sequential(
            nn.Linear(4 * WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, outputs)
        )
        parts.append(judge)
    parts.to(memory_format=torch.channels_last)  # a third faster on a CPU
    n, batch = len(data["x"]), 64
    steps = epochs * math.ceil(n / batch)
    stepper = torch.optim.AdamW(parts.parameters(), lr=3e-3, weight_decay=1e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    order = torch.Generator().manual_seed(seed)
    parts.train()
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=order).split(batch):
            x, live = data["x"][rows], data["live"][rows]
            flip = torch.rand(len(x), generator=order) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
            x = x.contiguous(memory_format=torch.channels_last)
            maps = liveness.early(x)
            u = liveness.late(maps)
            loss = F.cross_entropy(head(u), live)
            crossed = u
            if cross:
                # A partner of the same liveness: its style must not change what the picture is.
                noise = torch.rand(len(x), len(x), generator=order)
                partner = noise.masked_fill(live[:, None] != live[None], -1).argmax(1)
                share = torch.rand(len(x), 1, 1, 1, generator=order)
                crossed = liveness.late(style_cross(maps, partner, share))
                loss = (loss + F.cross_entropy(head(crossed), live)) / 2
            if method.get("contrast"):
                loss = loss + WEIGHTS["contrast"] * asymmetric_contrast(u, crossed, live)
            if identity is not None:
                v = identity(x)
                loss = loss + WEIGHTS["identity"] * F.cross_entropy(name(v), data["person"][rows])
                apart = orthogonality if method["orthogonal"] == "cosine" else decorrelation
                loss = loss + WEIGHTS["orthogonal"] * apart(u, v.detach())
            if judge is not None:
                guess = judge(Reverse.apply(u))
                loss = loss + WEIGHTS["adversary"] * F.cross_entropy(guess, data[target][rows])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            falling.step()
    parts.eval()
    return liveness, head, identity


# --- measures -------------------------------------------------------------------------------------


@torch.no_grad()
def scores(liveness, head, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures: how live they look (logit difference, [n]) and their features [n, d]."""
    u = liveness(x)
    logits = head(u)
    return logits[:, 1] - logits[:, 0], u


def auc(score: Tensor, live: Tensor) -> float:
    """Chance that a live picture scores above a spoof."""
    ranks = torch.empty(len(score), dtype=torch.float64)
    ranks[score.argsort()] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    n1 = int(live.sum())
    return float((ranks[live == 1].sum() - n1 * (n1 + 1) / 2) / (n1 * (len(live) - n1)))


def threshold(score: Tensor, live: Tensor) -> float:
    """Where as many live pictures are refused as spoofs let in: the equal error rate's."""
    cuts = score.sort().values
    refused = torch.tensor([(score[live == 1] < c).float().mean() for c in cuts])
    let_in = torch.tensor([(score[live == 0] >= c).float().mean() for c in cuts])
    return float(cuts[(refused - let_in).abs().argmin()])


def hter(score: Tensor, live: Tensor, cut: float) -> float:
    """Half total error rate: mean of live pictures refused and spoofs let in, in %."""
    refused = (score[live == 1] < cut).float().mean()
    return float(50 * (refused + (score[live == 0] >= cut).float().mean()))


def decode(features: Tensor, label: Tensor, seed: int = 0, ridge: float = 1.0) -> float:
    """Accuracy of a linear readout of ``label`` [n] from ``features`` [n, d], on the other half."""
    z = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    half = len(z) // 2
    x = (features - features[z[:half]].mean(0)) / (features[z[:half]].std(0) + 1e-4)
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    y = F.one_hot(label, int(label.max()) + 1).double()
    fit, held = x[z[:half]], x[z[half:]]
    w = torch.linalg.solve(
        fit.T @ fit + ridge * torch.eye(x.shape[1]).double(), fit.T @ y[z[:half]]
    )
    return float(((held @ w).argmax(1) == label[z[half:]]).double().mean())


def run(sources: list[str], target: str, name: str, seed: int, n_people: int, shots: int) -> dict:
    """One row: train by method ``name`` on ``sources``, test on ``target`` and on new people."""
    data = joined(sources, n_people, shots, seed)
    held = joined(sources, 6, 12, 500 + seed)  # other people, the same cameras: for the threshold
    new = dataset(target, 15, 12, 1000 + seed)
    liveness, head, identity = train(data, METHODS[name], seed)
    at_home, _ = scores(liveness, head, held["x"])
    away, u = scores(liveness, head, new["x"])
    seen, u_seen = scores(liveness, head, data["x"])
    cut = threshold(at_home, held["live"])
    row = dict(
        sources=sources,
        target=target,
        method=name,
        seed=seed,
        people=n_people,
        hter=hter(away, new["live"], cut),
        hter_own_cut=hter(away, new["live"], threshold(away, new["live"])),
        auc=auc(away, new["live"]),
        auc_home=auc(at_home, held["live"]),
        person=decode(u_seen, data["person"]),
        person_new=decode(u, new["person"]),
        domain=decode(u_seen, data["domain"]),
    )
    if identity is not None:
        with torch.no_grad():
            v = identity(data["x"])
        row["cosine"] = float(orthogonality(u_seen, v))
        row["person_identity"] = decode(v, data["person"])
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


MAIN = ("ERM", "adversary on data sets", "adversary on people", "DLIF")
HALF = ("phone",)  # the target of every other setting


def jobs(seeds: list[int]) -> list[tuple]:
    """Every run: leave one out; orthogonality alone; two sources; ablations; fewer people."""

    def rest(target):
        return [d for d in DOMAINS if d != target]

    alone, less = list(METHODS)[-2:], list(METHODS)[len(MAIN) : -2]
    found = [(rest(t), t, m, s, 15, 12) for t in DOMAINS for s in seeds for m in MAIN]
    found += [(rest(t), t, m, s, 15, 12) for t in HALF for s in seeds for m in alone]
    found += [
        (["office", "kiosk"], t, m, s, 15, 12)
        for t in HALF
        for s in seeds
        for m in (MAIN[0], MAIN[1], MAIN[3])
    ]
    found += [(rest(t), t, m, s, 15, 12) for t in HALF for s in seeds for m in less]
    # Fewer people, with as many pictures.
    return found + [
        (rest(t), t, m, s, 3, 60) for t in HALF for s in seeds for m in (MAIN[0], MAIN[3])
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "antispoof")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    state = args.scratch / "rows.json"
    rows = json.loads(state.read_text()) if state.exists() else []
    done = {json.dumps(r["job"]) for r in rows}
    for job in jobs(args.seeds):
        if json.dumps(list(job)) in done:
            continue
        rows.append(run(*job) | {"job": list(job)})
        state.write_text(json.dumps(rows))
        print({k: v for k, v in rows[-1].items() if k not in ("job", "sources")}, flush=True)
    keep = [{k: v for k, v in r.items() if k != "job"} for r in rows]
    (HERE / "antispoof_rows.json").write_text(json.dumps(keep, indent=0) + "\n")


if __name__ == "__main__":
    main()
