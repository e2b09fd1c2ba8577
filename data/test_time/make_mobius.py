"""Makes mobius_runs.json, mobius_photos.json and mobius_nets.safetensors: classifiers of garments
trained with Möbius maps (after Chhipa et al., arXiv 2405.02296), with affine maps, with random
homographies and with nothing, tested on garments seen at an angle through a pinhole camera; and
what EfficientNet-Lite0 makes of photographs seen so.

    python make_mobius.py [--scratch DIR] [--seconds 340]

Resumable: a run that is cut off goes on where it stopped. About two minutes of one thread.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_polyphase import affine
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import datasets, models, vision

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
EPOCHS = 5
LEAST, MOST = 0.1, 0.3  # of |c|
SIDES = ("left", "right", "top", "bottom")  # which side of the picture is near
TILTS = (15, 30, 45)  # degrees
DISTANCE = 2.0  # of the camera, in half sides of the picture: a field of view of 53°
ARMS = {  # augmentation and its probability
    "none": (None, 0.0),
    "affine 0.2": ("affine", 0.2),
    "affine 0.8": ("affine", 0.8),
    "homography 0.2": ("homography", 0.2),
    "homography 0.8": ("homography", 0.8),
    "MPD 0.2": ("mobius", 0.2),
    "MPD 0.8": ("mobius", 0.8),
    "MPD padded 0.8": ("padded", 0.8),
}
SHIPPED = ("none", "MPD 0.8")  # weights of the first seed, for the notebook


# --- maps of the picture ------------------------------------------------------------------------


def pixels(h: int, w: int) -> Tensor:
    """Where the pixels of a picture lie, x to the right and y down from −1 to 1: [h, w, 2]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([x, y], -1)


def pulled(x: Tensor, grid: Tensor, padded: bool = False) -> Tensor:
    """x [n, c, h, w] read at ``grid`` [n or 1, h, w, 2]; outside is black, or the border."""
    mode = "border" if padded else "zeros"
    grid = grid.expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, align_corners=True, padding_mode=mode)


def mobius_grid(c: Tensor, h: int, w: int) -> Tensor:
    """Φ(z) = z / (c z + 1) of each pixel z = x + iy, for complex c [n]: [n, h, w, 2]."""
    z = torch.view_as_complex(pixels(h, w))
    return torch.view_as_real(z / (c[:, None, None] * z + 1))


def mobius(x: Tensor, c: Tensor, padded: bool = False) -> Tensor:
    """x [n, channels, h, w], each read at Φ(z) with its own complex c [n], or all with one [1]."""
    return pulled(x, mobius_grid(c, *x.shape[-2:]), padded)


def draw_c(n: int, generator: torch.Generator) -> Tensor:
    """c real or imaginary, of either sign, |c| even between LEAST and MOST: complex64 [n]."""
    size = LEAST + (MOST - LEAST) * torch.rand(n, generator=generator)
    turn = torch.tensor([1, -1, 1j, -1j])[torch.randint(4, (n,), generator=generator)]
    return size * turn


def homography_grid(corners: Tensor, h: int, w: int) -> Tensor:
    """Where a homography reads: the one that shows the picture's corners (top left, top right,
    bottom right, bottom left) at ``corners`` [n, 4, 2]. [n, h, w, 2]."""
    own = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).expand(len(corners), 4, 2)
    u, v = corners.unbind(-1)
    (x, y), one, nil = own.unbind(-1), torch.ones_like(u), torch.zeros_like(u)
    top = torch.stack([u, v, one, nil, nil, nil, -u * x, -v * x], -1)
    bottom = torch.stack([nil, nil, nil, u, v, one, -u * y, -v * y], -1)
    found = torch.linalg.solve(torch.cat([top, bottom], 1), torch.cat([x, y], 1))
    m = torch.cat([found, torch.ones(len(found), 1)], 1).view(-1, 1, 1, 3, 3)
    at = F.pad(pixels(h, w), (0, 1), value=1.0)
    out = (m @ at[..., None]).squeeze(-1)
    return out[..., :2] / out[..., 2:]


def random_homography(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each corner drawn inwards by up to a quarter of the side: distortion scale one half."""
    own = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    inwards = 0.5 * torch.rand(len(x), 4, 2, generator=generator)
    return pulled(x, homography_grid(own * (1 - inwards), *x.shape[-2:]))


def camera_corners(side: str, tilt: float) -> Tensor:
    """Where a pinhole camera sees the corners of a picture that is turned by ``tilt`` degrees, its
    ``side`` towards the camera, which stands back until all of it is in the frame: [4, 2]."""
    own = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    axis, sign = (0 if side in ("left", "right") else 1), (1 if side in ("left", "top") else -1)
    sin, cos = math.sin(math.radians(tilt)), math.cos(math.radians(tilt))
    depth = DISTANCE + sign * own[:, axis] * sin  # from the pinhole
    own[:, axis] *= cos
    seen = DISTANCE * own / depth[:, None]
    return torch.tensor(seen / np.abs(seen).max()).float()


def viewed(x: Tensor, side: str, tilt: float, padded: bool = False) -> Tensor:
    """x [n, channels, h, w] as a camera sees it, ``side`` near, turned by ``tilt`` degrees."""
    grid = homography_grid(camera_corners(side, tilt)[None], *x.shape[-2:])
    return pulled(x, grid, padded)


def unsqueezed(x: Tensor, side: str, tilt: float) -> Tensor:
    """The camera's view after the best affine map has set it straight: perspective is left."""
    corners = camera_corners(side, tilt)
    target = homography_grid(corners[None], 33, 33)[0]
    shown = (target.abs() <= 1).all(-1)
    at = F.pad(pixels(33, 33)[shown], (0, 1), value=1.0)
    straight = F.pad(corners, (0, 1), value=1.0) @ torch.linalg.lstsq(at, target[shown]).solution
    return pulled(x, homography_grid(straight[None], *x.shape[-2:]))


def matching_c(side: str, size: float) -> Tensor:
    """The c of |c| = ``size`` whose Möbius map brings the same side near as ``viewed`` does."""
    return torch.tensor([dict(left=-1, right=1, top=1j, bottom=-1j)[side]]) * size


def augmented(kind: str | None, p: float):
    """An ``augment`` for ``vision.train``: ``kind`` with probability ``p`` an image."""
    ways = dict(
        affine=affine,
        homography=random_homography,
        mobius=lambda x, g: mobius(x, draw_c(len(x), g)),
        padded=lambda x, g: mobius(x, draw_c(len(x), g), padded=True),
    )
    if kind is None:
        return None

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(x), generator=generator) < p
        return torch.where(chosen[:, None, None, None], ways[kind](x, generator), x)

    return augment


# --- the garments -------------------------------------------------------------------------------


def small_net(seed: int = 0) -> nn.Sequential:
    """Two strided convolutions and two dense layers on garments [n, 1, 28, 28], on the CPU."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def measured(net, x: Tensor, y: Tensor) -> dict:
    """Accuracy on garments as they are and seen from each side at each tilt, both backgrounds."""
    found = {"clean": round(vision.accuracy(net, x, y), 4), "seen": {}}
    few, labels = x[:1000], y[:1000]
    for padded in (False, True):
        for side in SIDES:
            name = f"{side}, padded" if padded else side
            found["seen"][name] = {
                str(tilt): round(vision.accuracy(net, viewed(few, side, tilt, padded), labels), 4)
                for tilt in TILTS
            }
    return found


def straightened(net, x: Tensor, y: Tensor) -> dict:
    """Accuracy at each tilt, over sides, with squeeze and shrinking undone."""
    few, labels = x[:1000], y[:1000]
    return {
        str(tilt): round(
            float(np.mean([vision.accuracy(net, unsqueezed(few, s, tilt), labels) for s in SIDES])),
            4,
        )
        for tilt in TILTS
    }


def garment_runs(scratch: Path, seconds: float) -> list[Path]:
    begun = time.monotonic()
    x_train, y_train, x_test, y_test = (t.cpu() for t in vision.images("fashion_mnist"))
    for seed in SEEDS:
        for name, (kind, p) in ARMS.items():
            file = scratch / f"{name.replace(' ', '_')}_{seed}.json"
            if file.exists() or time.monotonic() - begun > seconds:
                continue
            net = small_net(seed)
            vision.train(
                net, x_train, y_train, epochs=EPOCHS, rate=2e-3, seed=seed,
                augment=augmented(kind, p),
            )  # fmt: skip
            row = dict(arm=name, seed=seed) | measured(net, x_test, y_test)
            kept = {k: v.half() for k, v in net.state_dict().items()}
            save_file(kept, file.with_suffix(".safetensors"))
            net.load_state_dict(kept)  # rounded, as they are shipped
            row["unsqueezed"] = straightened(net, x_test, y_test)
            file.write_text(json.dumps(row))
            print(round(time.monotonic() - begun), json.dumps(row), flush=True)
    return sorted(f for f in scratch.glob("*.json") if not f.name.startswith("photo"))


# --- the photographs ----------------------------------------------------------------------------


def crops(n: int, seed: int) -> dict[str, Tensor]:
    """``n`` square crops of each photograph, of 300 pixels or the whole height, at 224: values from
    0 to 1, [n, 3, 224, 224]."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, photo in datasets.photos().items():
        whole = torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255
        size, drawn = min(300, *whole.shape[1:]), []
        for _ in range(n):
            top, left = (int(torch.randint(s - size + 1, (), generator=g)) for s in whole.shape[1:])
            crop = whole[None, :, top : top + size, left : left + size]
            drawn.append(F.interpolate(crop, size=224, mode="bilinear", antialias=True))
        found[name] = torch.cat(drawn).clamp(0, 1)
    return found


@torch.no_grad()
def answers(lite, x: Tensor) -> tuple[Tensor, Tensor]:
    """EfficientNet-Lite0's logits and its features before the head, for x in [0, 1] at 224."""
    held, on = [], next(lite.parameters()).device
    hook = [m for m in lite.modules() if isinstance(m, nn.Linear)][-1]
    handle = hook.register_forward_pre_hook(lambda _, args: held.append(args[0].flatten(1)))
    logits = [lite(((part * 255 - 127) / 128).to(on)) for part in x.split(8)]
    handle.remove()
    return torch.cat(logits).cpu(), torch.cat(held).cpu()


def photo_row(lite, name: str, x: Tensor) -> dict:
    """For the crops x of a photograph: how often the first answer stays when they are seen at an
    angle, and how near, by the cosine of features, a map of the upright crop comes to that view."""
    still, own = answers(lite, x)
    row, seen = dict(photo=name, agreement={}, near={}), {}
    made = {s: answers(lite, mobius(x, matching_c(s, MOST)))[1] for s in SIDES}
    turned = answers(lite, affine(x, torch.Generator().manual_seed(0)))[1]
    other = dict(left="right", right="left", top="bottom", bottom="top")

    def like(pairs) -> float:
        return round(float(np.mean([F.cosine_similarity(*pair).mean() for pair in pairs])), 4)

    for tilt in TILTS:
        same = []
        for side in SIDES:
            logits, seen[side] = answers(lite, viewed(x, side, tilt))
            same.append(float((logits.argmax(-1) == still.argmax(-1)).float().mean()))
        row["agreement"][str(tilt)] = [round(v, 4) for v in same]
        row["near"][str(tilt)] = {
            "same side": like((seen[s], made[s]) for s in SIDES),
            "opposite side": like((seen[s], made[other[s]]) for s in SIDES),
            "affine": like((seen[s], turned) for s in SIDES),
            "as it was": like((seen[s], own) for s in SIDES),
        }
    return row


def photo_rows(scratch: Path, n: int = 4) -> list[dict]:
    """A row a photograph, of ``n`` crops each."""
    lite, _ = models.load("efficientnet-lite0")
    rows = []
    for name, x in crops(n, seed=0).items():
        file = scratch / f"photo_{name}.json"
        if not file.exists():
            file.write_text(json.dumps(photo_row(lite, name, x)))
        rows.append(json.loads(file.read_text()))
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "mobius")
    parser.add_argument("--seconds", type=float, default=340.0, help="start no run after so many")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    files = garment_runs(args.scratch, args.seconds)
    if len(files) < len(ARMS) * len(SEEDS):
        print(len(files), "runs done; start again for the rest")
        return
    rows = [json.loads(f.read_text()) for f in files]
    rows.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "mobius_runs.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')
    lines = ",\n".join(json.dumps(row) for row in photo_rows(args.scratch))
    (HERE / "mobius_photos.json").write_text(f'{{"rows": [\n{lines}\n]}}\n')
    weights = {
        f"{name}.{k}": v
        for name in SHIPPED
        for k, v in load_file(args.scratch / f"{name.replace(' ', '_')}_0.safetensors").items()
    }
    save_file(weights, HERE / "mobius_nets.safetensors")
    print("wrote mobius_runs.json, mobius_photos.json and mobius_nets.safetensors")


if __name__ == "__main__":
    main()
