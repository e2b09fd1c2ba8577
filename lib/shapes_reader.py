"""A second opinion on pictures of the shapes world: a small trained network that finds things.

It reads what ``lib.shapes_look`` reads, in the same form and by other means: learnt from damaged
drawings (``data/diffusion/make_reader.py``), not computed from the world's rules.
``shapes_score.score(images, prompts, shapes_reader.look)`` scores by it.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lib.errors import BookError
from lib.models import DATA
from lib.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES
from lib.shapes_look import Found, Seen, prepare

CELLS = 16  # a picture has 16 × 16 cells, and a thing is read in the cell of its centre
HEADS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}
_THERE, _SURE = 0.4, 0.5  # probability of a centre that counts, of an attribute that is told


class Reader(nn.Module):
    """Pictures [n, 3, 64, 64] to cells [n, 1 + 7 + 8 + 3 + 3, 16, 16], logits of a centre and of
    the attributes of a thing centred there, and logits [n, 7] of the background."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(12, width // 2, 3, padding=1)
        self.down = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 1, 2, 1)
        )
        self.cells = nn.Conv2d(width, 1 + sum(map(len, HEADS.values())), 1)
        self.ground = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.stem(F.pixel_unshuffle(2 * x - 1, 2)))
        x = F.silu(self.down(x))
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.cells(x), self.ground(x.mean((2, 3)))


@lru_cache
def reader() -> Reader:
    """The trained network."""
    path = DATA / "diffusion" / "reader.safetensors"
    if not path.is_file():
        raise BookError(f"{path.name} is missing: make it with data/diffusion/make_reader.py")
    net = Reader()
    net.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    return net.eval()


@torch.no_grad()
def look(images: Tensor, net: Reader | None = None) -> list[Seen]:
    """What pictures show, in the form of ``shapes_look.look``; masks are empty.

    ``overlap`` is the probability of a thing there, ``margin`` by how much its shape leads.

    Raises:
        BookError: as ``shapes_look.look``; the trained weights are missing.
    """
    net = net or reader()
    seen = []
    for part in prepare(images).split(64):
        cells, grounds = net(part)
        heat = cells[:, 0].sigmoid()
        peak = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > _THERE)
        parts = cells[:, 1:].split([len(names) for names in HEADS.values()], 1)
        each = [p.softmax(1) for p in parts]
        for i, ground in enumerate(grounds.softmax(1)):
            things = [
                _thing(
                    heat[i],
                    {kind: p[i, :, y, x] for kind, p in zip(HEADS, each, strict=True)},
                    x,
                    y,
                )  # fmt: skip
                for y, x in peak[i].nonzero().tolist()
            ]
            things.sort(key=lambda thing: -thing.area)
            match, best = ground.max(0)
            name = list(BACKGROUNDS)[int(best)] if match > _SURE else None
            seen.append(Seen(tuple(things), name, float(match), 0.0))
    return seen


def _thing(heat: Tensor, each: dict[str, Tensor], x: int, y: int) -> Found:
    told = {}
    for kind, chances in each.items():
        best = int(chances.argmax())
        told[kind] = HEADS[kind][best] if chances[best] > _SURE else None
    rows, columns = slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2)
    near = heat[rows, columns] / heat[rows, columns].sum()
    across = SIZES[told["size"] or "medium"]
    first, second = each["shape"].topk(2).values.tolist()
    return Found(
        **told,
        x=float((near.sum(0) * (torch.arange(CELLS)[columns] + 0.5)).sum()) / CELLS,
        y=float((near.sum(1) * (torch.arange(CELLS)[rows] + 0.5)).sum()) / CELLS,
        across=across,
        area=across**2 / 2,
        overlap=float(heat[y, x]),
        margin=first - second,
        colours=dict(zip(HEADS["colour"], each["colour"].tolist(), strict=True)),
        mask=torch.zeros(64, 64, dtype=torch.bool),
    )
