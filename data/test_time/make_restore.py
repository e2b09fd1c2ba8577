"""A small image-text model over MiniLM, and prompts learned on one of its towers, or on both.

Pretraining: a vision transformer and MiniLM's frozen sentence encoder, joined by a contrastive loss
on captioned pictures (a garment of Fashion-MNIST, painted in a colour and a texture):
``restore_tower.safetensors``. Then both towers are frozen, and prompts are learned from 16 pictures
of each of twelve base classes in another style; what that does to twelve new classes, and to the
features of both towers, goes to ``restore_rows.json``, one row a run.

    python data/test_time/make_restore.py [--scratch FOLDER] [--seeds 0 1 2]
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import datasets, models, vision

HERE = Path(__file__).resolve().parent
GARMENTS = "top trousers sweater dress coat sandals shirt sneakers bag boots".split()
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.55, 0.1, 0.75),
    "orange": (1.0, 0.5, 0.05),
    "white": (0.95, 0.95, 0.95),
    "pink": (1.0, 0.55, 0.75),
}
TEXTURES = "plain striped checked spotted".split()
TEMPLATE = "a photo of a"
CONTEXT = 4  # tokens of the template, which the learned prompts replace
WIDTH, DEPTH = (
    64,
    4,
)  # of the vision transformer; prompts enter the first DEPTH blocks of each tower
CLASSES = [
    (g, c, t) for g in range(len(GARMENTS)) for c in range(len(COLOURS)) for t in range(4)
]  # fmt: skip


# --- pictures and captions ------------------------------------------------------------------------


def caption(which: tuple[int, int, int]) -> str:
    """A class (garment, colour, texture) in words: every word is one token of MiniLM's."""
    garment, colour, texture = which
    return f"{TEXTURES[texture]} {list(COLOURS)[colour]} {GARMENTS[garment]}"


def paint(grey: Tensor, colour: Tensor, texture: Tensor, style: str, seed: int) -> Tensor:
    """Garments [n, 28, 28] in [0, 1] in their colours and textures: [n, 3, 28, 28] in [0, 1].

    Args:
        style: ``"studio"``, a dark ground; ``"street"``, clutter, warm light and noise.
    """
    rng = np.random.default_rng(seed)
    n = len(grey)

    def some(low, high, *shape):
        return torch.from_numpy(rng.uniform(low, high, (n, *shape))).float()

    row = torch.arange(28.0)[None, :, None] + some(0, 5, 1, 1)
    column = torch.arange(28.0)[None, None] + some(0, 5, 1, 1)
    turn = 2 * math.pi / 5
    stripe, check = (turn * row).sin(), (turn * row).sin() * (turn * column).sin()
    spot = (turn * row / 1.2).cos() + (turn * column / 1.2).cos() - 0.9
    pattern = torch.stack(
        [torch.ones_like(check), *(8 * p.expand_as(check) for p in (stripe, check, spot))]
    )
    ink = 0.25 + 0.75 * pattern[texture, torch.arange(n)].sigmoid()
    hue = torch.tensor(list(COLOURS.values()))[colour][..., None, None]
    mask = (grey / 0.15).clamp(max=1)[:, None]
    cloth = hue * (0.35 + 0.65 * grey[:, None]) * ink[:, None]
    if style == "studio":
        ground = some(0, 0.15, 1, 1, 1).expand(n, 3, 28, 28)
        return (mask * cloth + (1 - mask) * ground).clamp(0, 1)
    ground = F.interpolate(some(0, 0.4, 3, 5, 5), size=(28, 28), mode="bilinear")
    lamp = torch.tensor([1.05, 0.97, 0.8])[:, None, None] * some(0.7, 0.95, 1, 1, 1)
    noise = torch.from_numpy(rng.standard_normal((n, 3, 28, 28))).float()
    return ((mask * cloth + (1 - mask) * ground) * lamp + 0.05 * noise).clamp(0, 1)


def pictures(classes: list[tuple], each: int, style: str, part: str, seed: int):
    """``each`` pictures of every class: [n, 3, 28, 28] and labels [n], from garments of a part."""
    data = datasets.fashion_mnist()
    rng = np.random.default_rng(seed)
    y = data[f"y_{part}"]
    rows = [rng.choice(np.flatnonzero(y == g), each) for g, _, _ in classes]
    grey = torch.tensor(data[f"x_{part}"][np.concatenate(rows)]).float() / 255
    label = torch.arange(len(classes)).repeat_interleave(each)
    _, colour, texture = torch.tensor(classes)[label].T
    return paint(grey, colour, texture, style, seed), label


def task(seed: int) -> tuple[list[tuple], list[tuple], list[tuple]]:
    """Twelve base classes (three garments, two colours, two textures), twelve new ones that share
    none of these, and 48 others."""
    rng = np.random.default_rng([7, seed])
    garments, colours, textures = (rng.permutation(n).tolist() for n in (10, 8, 4))
    base, new = (
        [
            (g, c, t)
            for g in garments[3 * i : 3 * i + 3]
            for c in colours[2 * i : 2 * i + 2]
            for t in textures[2 * i : 2 * i + 2]
        ]
        for i in (0, 1)
    )
    rest = [c for c in CLASSES if c not in base + new]
    return base, new, [rest[i] for i in rng.permutation(len(rest))[:48]]


# --- the two towers -------------------------------------------------------------------------------


def run_blocks(blocks, x: Tensor, prompts: Tensor | None, at: int) -> list[Tensor]:
    """The stream after each block: ``x`` [n, pos, d] through ``blocks``; with ``prompts``
    [depth, k, d], the ``k`` positions from ``at`` on are replaced before each of the first blocks.
    """
    states = []
    for i, block in enumerate(blocks):
        if prompts is not None and i < len(prompts):
            k = prompts.shape[1]
            own = prompts[i].expand(len(x), -1, -1)
            x = torch.cat([x[:, :at], own, x[:, at + k :]], 1)
        x = block(x)
        states.append(x)
    return states


class Towers(nn.Module):
    """The frozen pair: pictures and captions to features [n, 64], of one length."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.image = vision.vit(28, 7, WIDTH, DEPTH, channels=3, classes=WIDTH, seed=seed).cpu()
        self.project = nn.Linear(384, WIDTH)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.text = None  # MiniLM, set by ``with_text``: its weights are not stored again

    def with_text(self):
        minilm, self.tokenizer = models.load("minilm", device="cpu")
        object.__setattr__(self, "text", minilm)
        return self

    def words(self, classes: list[tuple], template: str = TEMPLATE) -> Tensor:
        """MiniLM's input embeddings of the classes' captions: [n, 9, 384], no padding."""
        ids = self.tokenizer([f"{template} {caption(c)}" for c in classes]).input_ids
        with torch.no_grad():
            return self.text.embeddings(torch.tensor(ids))

    def read(self, words: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Features of captions [n, 64], and the stream without the context, after each block."""
        states = run_blocks(self.text.encoder.layer, words, prompts, 1)
        states = [torch.cat([s[:, :1], s[:, 1 + CONTEXT :]], 1) for s in states]
        return self.project(states[-1].mean(1)), states

    def look(self, x: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Features of pictures [n, 64], and the stream without the prompts, after each block."""
        x = self.image.vit.embeddings(2 * x - 1)
        n = x.shape[1]
        if prompts is not None:  # room for them, behind the patches
            x = torch.cat([x, x.new_zeros(len(x), prompts.shape[1], x.shape[2])], 1)
        states = [s[:, :n] for s in run_blocks(self.image.vit.layers, x, prompts, n)]
        return self.image.classifier(self.image.vit.layernorm(states[-1])[:, 0]), states

    def logits(self, picture: Tensor, text: Tensor) -> Tensor:
        return self.scale.exp() * F.normalize(picture, dim=-1) @ F.normalize(text, dim=-1).T


def pretrain(towers: Towers, epochs: int, seed: int = 0) -> list[float]:
    """Contrastive: 8,000 garments an epoch, each in a colour and a texture of its own."""
    data = datasets.fashion_mnist()
    grey = torch.tensor(data["x_train"][:8000]).float() / 255
    garment = torch.tensor(data["y_train"][:8000]).long()
    words = towers.words(CLASSES)
    with torch.no_grad():  # MiniLM is frozen: its 320 sentences are read once
        parts = [run_blocks(towers.text.encoder.layer, w, None, 1)[-1] for w in words.split(40)]
        said = torch.cat([torch.cat([s[:, :1], s[:, 1 + CONTEXT :]], 1).mean(1) for s in parts])
    parameters = [p for p in towers.parameters()]
    steps = epochs * math.ceil(len(grey) / 128)
    stepper = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    falling = torch.optim.lr_scheduler.OneCycleLR(stepper, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        colour, texture = (torch.randint(n, garment.shape, generator=generator) for n in (8, 4))
        x = paint(grey, colour, texture, "studio", 100 * seed + epoch)
        which = garment * 32 + colour * 4 + texture
        for rows in torch.randperm(len(x), generator=generator).split(128):
            logits = towers.logits(towers.look(x[rows])[0], towers.project(said[which[rows]]))
            same = (which[rows][:, None] == which[rows][None]).float()
            same = same / same.sum(1, keepdim=True)  # a caption that comes twice is right twice
            loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            falling.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1}: loss {np.mean(losses[-len(x) // 128 :]):.3f}", flush=True)
    return losses


def load_towers() -> Towers:
    """The pretrained pair, frozen."""
    towers = Towers()
    towers.load_state_dict(models.weights("test_time/restore_tower.safetensors"))
    return towers.with_text().eval().requires_grad_(False)


# --- prompts --------------------------------------------------------------------------------------


def relative_shift(prompted: list[Tensor], frozen: list[Tensor]) -> Tensor:
    """Feature shift by block, [depth]: how far prompts move the stream, in units of its length."""
    pairs = zip(prompted, frozen, strict=True)
    return torch.stack([((p - f).norm(dim=-1) / f.norm(dim=-1)).mean() for p, f in pairs])


class Surgery(nn.Module):
    """Features [n, d], a little corrected by a feed-forward adapter; ``rate`` says how much."""

    def __init__(self, width: int = WIDTH, rate: float = 0.1):
        super().__init__()
        self.norm, self.rate = nn.LayerNorm(width), rate
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.rate * self.feed(self.norm(features))


class Prompts(nn.Module):
    """Learned prompts for the first ``DEPTH`` blocks: of the text, of the vision tower, or both.

    ``coupled``: the vision tower's are linear images of the text's, block by block.
    """

    def __init__(self, text: bool, vision: bool, coupled: bool, surgery: bool, start: Tensor):
        super().__init__()
        deep = torch.randn(DEPTH, CONTEXT, 384) * 0.02
        deep[0] = start
        self.words = nn.Parameter(deep) if text else None
        self.patches = self.maps = None
        if vision and coupled:
            self.maps = nn.ModuleList(nn.Linear(384, WIDTH) for _ in range(DEPTH))
        elif vision:
            self.patches = nn.Parameter(torch.randn(DEPTH, CONTEXT, WIDTH) * 0.02)
        self.correct_text = Surgery() if surgery else nn.Identity()
        self.correct_image = Surgery() if surgery else nn.Identity()

    def of_vision(self) -> Tensor | None:
        if self.maps is None:
            return self.patches
        return torch.stack([m(w) for m, w in zip(self.maps, self.words, strict=True)])


METHODS = {
    "text": dict(text=True, vision=False, coupled=False),
    "vision": dict(text=False, vision=True, coupled=False),
    "both, apart": dict(text=True, vision=True, coupled=False),
    "both, coupled": dict(text=True, vision=True, coupled=True),
    "consistency": dict(text=True, vision=True, coupled=True, consistency=10.0),
    "surgery": dict(text=True, vision=True, coupled=True, surgery=True),
    "RESTORE": dict(text=True, vision=True, coupled=True, consistency=10.0, surgery=True),
}


def learn(towers: Towers, method: dict, x, y, words, seed: int, steps: int = 60, rate=3e-3):
    """Prompts for few pictures ``x`` [n, 3, 28, 28] of base classes ``y`` with ``words``.

    Returns:
        (prompts, the loss of each step, feature shifts [steps, 2, DEPTH] of text and vision).
    """
    torch.manual_seed(seed)
    options = {k: method.get(k, False) for k in ("text", "vision", "coupled", "surgery")}
    prompts = Prompts(**options, start=words[0, 1 : 1 + CONTEXT])
    stepper = torch.optim.AdamW(prompts.parameters(), lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        said, text_states = towers.read(words)
        seen, image_states = towers.look(x)
    losses, shifts = [], []
    for step in range(steps):
        rows = torch.randperm(len(x), generator=order)[:32]
        text, image = (said, text_states), (seen[rows], [s[rows] for s in image_states])
        moved = [torch.zeros(DEPTH), torch.zeros(DEPTH)]
        if prompts.words is not None:
            text = towers.read(words, prompts.words)
            moved[0] = relative_shift(text[1][:DEPTH], text_states[:DEPTH])
        if prompts.of_vision() is not None:
            image = towers.look(x[rows], prompts.of_vision())
            moved[1] = relative_shift(image[1], [s[rows] for s in image_states])
        logits = towers.logits(prompts.correct_image(image[0]), prompts.correct_text(text[0]))
        loss = F.cross_entropy(logits, y[rows])
        losses.append(float(loss.detach()))
        shifts.append(torch.stack(moved).detach())
        if method.get("consistency"):
            loss = loss + method["consistency"] * (moved[0] - moved[1]).square().sum()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        falling.step()
        if step == steps // 3 and method.get("surgery"):  # the larger the shift, the more surgery
            prompts.correct_text.rate += 0.1 * float(shifts[-1][0].mean())
            prompts.correct_image.rate += 0.1 * float(shifts[-1][1].mean())
    return prompts.eval(), losses, torch.stack(shifts)


@torch.no_grad()
def features(towers: Towers, prompts: Prompts | None, x: Tensor, words: Tensor):
    """Features of pictures and captions with prompts (or without), of length one."""
    if prompts is None:
        found = towers.look(x)[0], towers.read(words)[0]
    else:
        image = prompts.correct_image(towers.look(x, prompts.of_vision())[0])
        found = image, prompts.correct_text(towers.read(words, prompts.words)[0])
    return tuple(F.normalize(f, dim=-1) for f in found)


def measure(towers: Towers, prompts: Prompts | None, x: Tensor, y: Tensor, words: Tensor) -> dict:
    """Accuracy among the given classes, in %; how far both towers' features were moved; cosine of
    a picture with its own caption, above the mean over the other captions."""
    image, text = features(towers, prompts, x, words)
    image0, text0 = features(towers, None, x, words)
    cosine = image @ text.T
    own = cosine[torch.arange(len(y)), y]
    others = (cosine.sum(1) - own) / (len(words) - 1)
    moved_text = (text - text0).norm(dim=-1).mean()
    moved_image = (image - image0).norm(dim=-1).mean()
    return dict(
        accuracy=float(100 * (cosine.argmax(1) == y).float().mean()),
        text_shift=float(moved_text),
        image_shift=float(moved_image),
        gap=float((moved_text - moved_image).abs()),
        margin=float((own - others).mean()),
    )


def run(towers: Towers, name: str, seed: int, shots: int = 16) -> dict:
    """One row: learn prompts by method ``name``; base and new classes, and 48 others."""
    base, new, other = task(seed)
    sets = [(*pictures(c, 40, "street", "test", 50 + seed), towers.words(c)) for c in (base, new)]
    sets.append((*pictures(other, 10, "studio", "test", 70 + seed), towers.words(other)))
    prompts, losses = None, []
    row = dict(method=name, seed=seed)
    if name != "zero-shot":
        x, y = pictures(base, shots, "street", "train", 90 + seed)
        prompts, losses, shifts = learn(towers, METHODS[name], x, y, sets[0][2], seed)
        row["blocks"] = [[round(v, 4) for v in part] for part in shifts[-1].tolist()]
        row["loss"] = round(float(np.mean(losses[-10:])), 4)
    for part, data in zip(("base", "new", "other"), sets, strict=True):
        found = measure(towers, prompts, *data)
        row |= {f"{part}_{k}": round(v, 5) for k, v in found.items()}
    a, b = row["base_accuracy"], row["new_accuracy"]
    return row | {"harmonic": round(2 * a * b / max(a + b, 1e-9), 4)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "restore")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    stored = HERE / "restore_tower.safetensors"
    if not stored.exists():
        towers = Towers().with_text()
        pretrain(towers, args.epochs)
        save_file({k: v.half().contiguous() for k, v in towers.state_dict().items()}, stored)
    towers = load_towers()
    state = args.scratch / "rows.json"
    rows = json.loads(state.read_text()) if state.exists() else []
    done = {(r["method"], r["seed"]) for r in rows}
    for seed in args.seeds:
        for name in ("zero-shot", *METHODS):
            if (name, seed) not in done:
                rows.append(run(towers, name, seed))
                state.write_text(json.dumps(rows))
                print(rows[-1], flush=True)
    order = ["zero-shot", *METHODS]
    rows.sort(key=lambda r: (r["seed"], order.index(r["method"])))
    (HERE / "restore_rows.json").write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
