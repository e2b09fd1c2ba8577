"""Product of a low-bit matrix with one vector, against bfloat16 torch.mv, out of cache.

Matrices from N(0, 1), rounded to nearest in groups of 64 (torch's int8: one scale a row), as many
copies as do not fit the cache. Bytes: codes and scales read once. Errors: relative, against the
float64 product of the matrix before rounding, so mostly the rounding's; "of the sum": against the
float64 product of the matrix after rounding, so the kernel's own.
"""

import itertools
import sys

import torch

from lib.kernels import lowbit
from lib.kernels.dispatch import using
from tests.bench_kernels.common import Row, compare, race

GROUP = 64
CACHE = 96 * 2**20  # bytes; three times the largest cache we met


def cycle(make, size: int):
    """``make(i)`` gives a way that uses its own copy; enough of them, in turn."""
    ways = itertools.cycle([make(i) for i in range(max(2, -(-CACHE // size)))])
    return lambda: next(ways)()


def relative(y, exact) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def rows() -> list[Row]:
    torch.manual_seed(0)
    found = []
    for m, n in ((2048, 5632), (8192, 8192)):
        w, x = torch.randn(m, n), torch.randn(n)
        half, exact = x.bfloat16(), w.double() @ x.double()
        ways, size, more = {}, {}, {}

        def add(name, nbytes, make, ways=ways, size=size):
            ways[name], size[name] = cycle(make, nbytes), nbytes

        def copy(*tensors):
            return [t.clone() for t in tensors]

        def plain(i, dtype, x, w=w):
            (own,) = copy(w.to(dtype))
            return lambda: torch.mv(own, x)

        add("float32 torch.mv", 4 * m * n, lambda i, x=x: plain(i, torch.float32, x))
        add("bfloat16 torch.mv", 2 * m * n, lambda i, h=half: plain(i, torch.bfloat16, h))

        scale = (w.abs().amax(1) / 127).bfloat16()
        codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

        def int8(i, codes=codes, scale=scale, h=half[None]):
            own, s = copy(codes, scale)
            return lambda: torch.ops.aten._weight_int8pack_mm(h, own, s)[0]

        add("torch int8, scale a row", m * n, int8)
        codes, scale, low = lowbit.quantize(w, 4, GROUP)
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        both = torch.stack([scale.T, (low + 8 * scale).T], -1).bfloat16().contiguous()

        def int4(i, theirs=theirs, both=both, h=half[None]):
            own, s = copy(theirs, both)
            return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(h, own, GROUP, s)[0]

        add("torch int4", theirs.nbytes + both.nbytes, int4)
        kept = {}
        for bits in lowbit.BITS:
            packed = kept[bits] = lowbit.pack(w, bits, GROUP)

            def ours(i, p=packed, x=x):
                words, scales = copy(p.words, p.scales)
                own = lowbit.replace(p, words=words, scales=scales)
                return lambda: lowbit.mv(own, x)

            name = f"ours, Numba, {bits} bits"
            add(name, packed.nbytes, ours)
            after = lowbit.unpack(packed).double() @ x.double()
            more[name] = {"of the sum": relative(ways[name](), after)}
        times = race(ways, rounds=9, seconds=6)
        if m == 2048:
            with using("reference"):
                slow = {"reference, 4 bits": lambda p=kept[4], x=x: lowbit.mv(p, x)}
                ways |= slow
                spent = race(slow, rounds=3)["reference, 4 bits"]
            size["reference, 4 bits"] = kept[4].nbytes
            middle = sorted(spent)[1]
            times["reference, 4 bits"] = [middle] * len(times["torch int4"])
        for way, (seconds, ratio) in compare(times, "bfloat16 torch.mv").items():
            found.append(
                Row(
                    shape=f"{m} × {n}",
                    way=way,
                    seconds=seconds,
                    ratio=ratio,
                    baseline="bfloat16 torch.mv",
                    bytes=float(size[way]),
                    error=relative(ways[way](), exact),
                    more={"bits a weight": 8 * size[way] / (m * n), **more.get(way, {})},
                )
            )
        if not any(r.way.endswith("int4") for r in found):
            print("lowbit: torch has no packed int4 here", file=sys.stderr)
    return found
