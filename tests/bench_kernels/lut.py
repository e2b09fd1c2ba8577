"""Lookup-table GEMV at batch 1: bit planes against bfloat16; errors on real weights and inputs."""

import torch
from torch.nn import functional as F

from lib import hooks, models
from lib.kernels import lut
from lib.kernels.dispatch import using
from lib.kernels.lookup import TILE
from tests.bench_kernels.common import Row, compare, race

SHAPES = [(8192, 8192), (2048, 5632)]
ROTATED = 96 * 2**20  # bytes of matrices read in turn, so that no cache holds the next one
TEXT = "The captain looked at the grey sea for a long time, and then he gave the order to turn."
NOTE = "error of Wx on MiniLM's matrices and inputs"


def rows() -> list[Row]:
    found = []
    for m, n in SHAPES:
        ways, nbytes = {}, {}
        for bits in (1, 2, 3, 4):
            add_ways(ways, nbytes, f"ours, Numba, {bits} bits", planes(m, n, bits), lut.mv, n)
        found += measured(m, n, ways, nbytes)
    errors = {b: real_errors(lambda w, x, b=b: lut.pack(w, b), lut.mv) for b in (1, 2, 3, 4)}
    for row in found:
        if row.way.startswith("ours"):
            give_error(row, errors[int(row.way.split()[-2])])
    packed, x = planes(2048, 2048, 3)()[0], torch.randn(2048)

    def reference():
        with using("reference"):
            lut.mv(packed, x)

    times = race({"ours, Numba, 3 bits": lambda: lut.mv(packed, x), "reference, 3 bits": reference})
    for way, (seconds, ratio) in compare(times, "reference, 3 bits").items():
        found.append(Row("2048 × 2048", way, seconds, ratio, "reference, 3 bits"))
    return found


def planes(m, n, bits, span=4):
    """Matrices of random words: the time does not depend on what they hold."""

    def make(count=1):
        tiles, blocks = m // TILE, n // 32
        shape = (tiles, blocks, bits, TILE)
        scales = torch.rand(tiles, -(-blocks // span), 1, TILE).half()
        return [
            lut.Planes(words(shape), scales.clone(), scales.clone(), m, n, span, True)
            for _ in range(count)
        ]

    return make


def words(shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def add_ways(ways, nbytes, name, make, mv, n):
    """One way that takes the next matrix at every call."""
    size = make()[0].nbytes
    held, x = make(max(1, -(-ROTATED // size))), torch.randn(n)
    turn = iter(range(10**9))
    ways[name] = lambda: mv(held[next(turn) % len(held)], x)
    nbytes[name] = size + 4 * n


def measured(m, n, ways, nbytes) -> list[Row]:
    """Race ``ways`` with torch's own: bfloat16 ``mv`` (the baseline) and linear, float32, int4."""
    count = max(1, -(-ROTATED // (2 * m * n)))
    brain, x = [torch.randn(m, n).bfloat16() for _ in range(count)], torch.randn(n)
    full = [torch.randn(m, n) for _ in range(max(1, -(-ROTATED // (4 * m * n))))]
    turn, short = iter(range(10**9)), x.bfloat16()
    ways = dict(ways)
    ways["torch.mv, bfloat16"] = lambda: torch.mv(brain[next(turn) % count], short)
    ways["linear, bfloat16"] = lambda: F.linear(short[None], brain[next(turn) % count])
    ways["torch.mv, float32"] = lambda: torch.mv(full[next(turn) % len(full)], x)
    nbytes |= {w: 2 * m * n for w in ("torch.mv, bfloat16", "linear, bfloat16")}
    nbytes["torch.mv, float32"] = 4 * m * n
    codes = [torch.randint(0, 15, (m, n), dtype=torch.int32) for _ in range(2)]
    fours = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(c, 1) for c in codes]
    fours = [f.clone() for _ in range(max(1, -(-ROTATED // m // n))) for f in fours]
    scale = torch.rand(n // 128, m, 2).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    ways["torch's packed int4"] = lambda: product(
        short[None], fours[next(turn) % len(fours)], 128, scale
    )
    nbytes["torch's packed int4"] = m * n // 2 + scale.nbytes
    found = compare(race(ways, rounds=11, seconds=6.0), "torch.mv, bfloat16")
    return [
        Row(f"{m} × {n}", way, seconds, ratio, "torch.mv, bfloat16", bytes=nbytes[way])
        for way, (seconds, ratio) in found.items()
    ]


@torch.no_grad()
def real_errors(pack, mv) -> dict[str, float]:
    """Relative error of the first MLP product, over layers, with the inputs that a text gives."""
    found = {}
    for name, layers in (("minilm", (0, 2, 4)), ("smollm2", (5, 15, 25))):
        model, tokenizer = models.load(name, device="cpu")
        inputs = tokenizer(TEXT, return_tensors="pt")
        if name == "minilm":
            linears = [model.encoder.layer[i].intermediate.dense for i in layers]
        else:
            linears = [model.model.layers[i].mlp.up_proj for i in layers]
        errors = []
        for x, linear in zip(_inputs(model, inputs, linears), linears, strict=True):
            exact = x @ linear.weight.T
            y = mv(pack(linear.weight, x), x)
            errors.append(((y - exact).norm() / exact.norm()).item())
        found[name] = sum(errors) / len(errors)
    return found


def _inputs(model, inputs, linears) -> list:
    names = {module: name for name, module in model.named_modules()}
    sites = [f"{names[linear]}:in" for linear in linears]
    with hooks.capture(model, sites) as acts:
        model(**inputs)
    return [acts[site][0] for site in sites]


def give_error(row: Row, errors: dict[str, float]) -> None:
    row.error, row.note = errors["minilm"], NOTE
    row.more = {"on SmolLM2's": errors["smollm2"]}
