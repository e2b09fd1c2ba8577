"""Fake quantization: range, rounding and back to float32; the last shape with its backward."""

import sys

import torch

from lib.kernels import fake_quant as fq
from lib.kernels.dispatch import using
from tests.bench_kernels.common import Row, compare, race

# rows, columns, format, way, group, symmetric: SmolLM2's activations of 4,096 tokens; a weight
# matrix of a 1-billion model, in the settings of OmniQuant, FP4DiT and the Microscaling formats.
SHAPES = [
    (4096, 576, "int8", "token", 0, True),
    (2048, 5632, "int4", "group", 128, False),
    (2048, 5632, "e2m1", "group", 32, True),
    (2048, 5632, "e4m3", "tensor", 0, True),
]


def rows() -> list[Row]:
    torch.manual_seed(0)
    found = []
    for n, m, number, per, group, symmetric in SHAPES:
        x = torch.randn(n, m) * torch.randn(n, 1).exp()
        words = f"{n} × {m}, {number} per {per} {group or ''}".strip()
        options = dict(number=number, per=per, group=group, symmetric=symmetric)
        found += _race(words, _ways(x, options), 8 * x.numel())
    leaf = torch.randn(2048, 5632, requires_grad=True)
    return found + _race("2048 × 5632, int4, learned step", _learning(leaf), 20 * leaf.numel())


def _ways(x, options) -> dict:
    def ours():
        return fq.fake_quantize(x, **options)

    def reference():
        with using("reference"):
            return fq.fake_quantize(x, **options)

    ways = {"ours, Numba": ours, "reference": reference}
    rows = x.view(-1, options["group"] or x.shape[-1])
    if options["number"].startswith("int"):
        ways["torch.fake_quantize, scale found first"] = lambda: _torchs(rows, options).view_as(x)
        compiled = torch.compile(_plain_integers)
        ways["torch.compile of plain operations"] = lambda: compiled(rows, options).view_as(x)
    if options["number"] == "e4m3":
        ways["torch.float8_e4m3fn and back"] = lambda: _float8(x)
    if options["number"] == "e2m1":
        try:
            from torchao.prototype.mx_formats import kernels as mx
        except ImportError:
            print("torchao is missing: no line for its FP4", file=sys.stderr)
        else:
            ways["torchao's FP4 and back"] = lambda: _torchao(mx, rows).view_as(x)
    return ways


def _torchs(rows, options):
    grid = fq.grid_of(options["number"], options["symmetric"])
    low, high = torch.aminmax(rows, dim=1)
    scale, zero = fq._scale(low, high, grid)
    points = torch.zeros(len(scale), dtype=torch.int32) if zero is None else zero.int()
    return torch.fake_quantize_per_channel_affine(
        rows, scale, points, 0, int(grid.low), int(grid.high)
    )


def _plain_integers(rows, options):
    grid = fq.grid_of(options["number"], options["symmetric"])
    scale, zero = fq._scale(rows.amin(1), rows.amax(1), grid)
    z = torch.zeros_like(scale)[:, None] if zero is None else zero[:, None]
    code = ((rows * scale.reciprocal()[:, None]).round() + z).clamp(grid.low, grid.high)
    return (code - z) * scale[:, None]


def _float8(x):
    low, high = torch.aminmax(x)
    scale = torch.maximum(high, -low) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale


def _torchao(mx, rows):
    scale = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True) / 6
    return mx.f4_unpacked_to_f32(mx.f32_to_f4_unpacked(rows / scale)) * scale


def _learning(x) -> dict:
    """Forward and backward to the weights, the steps and the zero points of groups of 128."""
    scale, zero = (v.requires_grad_() for v in fq.scale_of(x.detach(), "int4", "group", 128, False))
    slope = torch.randn_like(x)

    def ours():
        y = fq.fake_quantize(x, "int4", "group", 128, scale=scale, zero=zero)
        return torch.autograd.grad(y, (x, scale, zero), slope)[0]

    def reference():
        with using("reference"):
            return ours()

    def torchs():
        y = torch._fake_quantize_learnable_per_channel_affine(
            x.view(-1, 128), scale.view(-1), zero.view(-1), 0, 0, 15, 1.0
        )
        return torch.autograd.grad(y, (x, scale, zero), slope.view(-1, 128))[0]

    def plain():  # straight-through as most papers' code writes it, by autograd
        rows, s, z = x.view(-1, 128), scale.view(-1, 1), zero.view(-1, 1)
        v = rows / s
        code = (v + (v.round() - v).detach() + z).clamp(0, 15)
        return torch.autograd.grad((code - z) * s, (x, scale, zero), slope.view(-1, 128))[0]

    name = "torch._fake_quantize_learnable"
    return {"ours, Numba": ours, "reference": reference, name: torchs, "autograd": plain}


def _race(shape: str, ways: dict, least: int) -> list[Row]:
    exact = ways["reference"]().detach()
    step = (exact[:1].unique().diff()).max()
    times = compare(race(ways, rounds=9, seconds=6), "reference")
    found = []
    for way, (seconds, ratio) in times.items():
        # A tie that falls the other way is a whole code off: count these instead of their size.
        off = ((ways[way]().detach() - exact).abs() > 0.01 * step).float().mean().item()
        found.append(
            Row(
                shape, way, seconds, ratio, "reference", least, error=off, note="share that differs"
            )
        )
    return found
