"""A corruption benchmark for images of any size: six kinds at five severities, each from a seed.

The kinds are among those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), and a shift.
Lengths are shares of the image's side, so that a garment of 28 pixels and a photograph of 224
suffer alike; the strengths are the book's own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import BookError

# What severity 1 to 5 means: standard deviation of the noise; of the blur, in sides; optical
# thickness of the fog; contrast left; resolution left; distance moved, in sides.
_STRENGTH = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "blur": (0.010, 0.020, 0.030, 0.045, 0.060),
    "fog": (0.2, 0.4, 0.7, 1.1, 1.6),
    "contrast": (0.6, 0.5, 0.4, 0.3, 0.2),
    "pixelate": (0.5, 0.4, 0.33, 0.25, 0.2),
    "shift": (0.04, 0.08, 0.12, 0.18, 0.25),
}
KINDS = tuple(_STRENGTH)
_AIR = 0.9  # brightness of the fog itself


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images, each by a draw of its own; the same seed corrupts in the same way.

    Args:
        images: float [n, channels, height, width] in [0, 1].
        kind: one of ``KINDS``.
        severity: 1, the mildest, to 5.
        seed: of the noise, the fog's clouds and the shift's direction.

    Returns:
        like ``images``, in [0, 1].

    Raises:
        BookError: another kind or severity, or images of another form.
    """
    if kind not in _STRENGTH:
        raise BookError(f"corruption {kind!r} is unknown; give one of {', '.join(KINDS)}")
    if severity not in range(1, 6):
        raise BookError(f"severity goes from 1 to 5, not {severity}")
    if images.ndim != 4 or not images.is_floating_point():
        raise BookError(
            "corrupt takes float images [n, channels, height, width] in [0, 1], not "
            f"{images.dtype} of shape {list(images.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    strength = _STRENGTH[kind][severity - 1]
    return globals()[f"_{kind}"](images, strength, generator).clamp(0, 1)


def _noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(images.shape, generator=generator)
    return images + strength * drawn.to(images)


def _blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian, one axis after the other; the border's pixels go on outside."""
    deviation = strength * min(images.shape[-2:])
    reach = math.ceil(3 * deviation)
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.softmax(-at.square() / (2 * deviation**2), 0)
    flat = F.pad(images.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return flat.view_as(images)


def _fog(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Light lost on its way and air's own light in its place, thicker where the clouds are."""
    n, _, *size = images.shape
    clouds = torch.zeros(n, 1, *size)
    for octave in range(1, 5):
        drawn = torch.rand(n, 1, 2**octave, 2**octave, generator=generator)
        clouds += 0.5**octave * F.interpolate(drawn, size=size, mode="bilinear")
    clouds = clouds / (1 - 0.5**4)
    kept = torch.exp(-strength * (0.5 + clouds)).to(images)
    return images * kept + _AIR * (1 - kept)


def _contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + strength * (images - middle)


def _pixelate(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    size = [max(1, round(strength * side)) for side in images.shape[-2:]]
    small = F.interpolate(images, size=size, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="nearest-exact")


def _shift(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Whole pixels in a direction of its own an image; the border's pixels come in."""
    n, _, height, width = images.shape
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    rows, columns = (
        torch.arange(side) - torch.round(strength * side * along)[:, None].long()
        for side, along in ((height, angle.sin()), (width, angle.cos()))
    )
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    each, channels = torch.arange(n), torch.arange(images.shape[1])
    return images[
        each[:, None, None, None],
        channels[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
