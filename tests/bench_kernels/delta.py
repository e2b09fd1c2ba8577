"""Delta product of a float32 stream at batch 1, against torch.mv, by the share of changed inputs.

The stream holds each input for a while and then draws it anew from N(0, 1): no change is below the
threshold 0, so the error is rounding. The last rows are a slow stream, x_t = 0.98 x_{t−1} + noise,
with a threshold: there the error is the method's. Bytes: the rows of Wᵀ of the inputs sent. Errors:
relative, ‖y − W x‖ / ‖W x‖, after the thousand steps or so that the race took without a
``refresh``. The matrices do not fit in the cache.
"""

import torch

from lib.kernels import delta
from lib.kernels.dispatch import using
from tests.bench_kernels.common import Row, compare, race

STEPS = 16


def held(n: int, share: float) -> list[torch.Tensor]:
    xs = [torch.randn(n)]
    for _ in range(STEPS - 1):
        xs.append(torch.where(torch.rand(n) < share, torch.randn(n), xs[-1]))
    return xs


def slow(n: int) -> list[torch.Tensor]:
    xs = [torch.randn(n)]
    for _ in range(STEPS - 1):
        xs.append(0.98 * xs[-1] + 0.2 * torch.randn(n))
    return xs


def rows() -> list[Row]:
    torch.manual_seed(0)
    found = []
    for m, n in ((5632, 2048), (8192, 4096)):
        w = torch.randn(m, n) / n**0.5
        w_t = w.T.contiguous()
        cases = [(f"{share:.0%} change", held(n, share), 0.0) for share in (0.03, 0.1, 0.3, 0.7)]
        cases += [(f"slow, θ = {t}", slow(n), t) for t in (0.2, 0.4)]
        for name, xs, threshold in cases:
            stream, plain = delta.start(w_t, xs[0]), delta.start(w_t, xs[0])
            sent = []

            def ours(w_t=w_t, stream=stream, xs=xs, threshold=threshold, sent=sent):
                for x in xs:  # the last one again to the first: as much changes as in many steps
                    y = delta.step(w_t, x, stream, threshold)
                    sent.append(stream.sent)
                return y

            def reference(w_t=w_t, stream=plain, xs=xs, threshold=threshold):
                with using("reference"):
                    for x in xs:
                        y = delta.step(w_t, x, stream, threshold)
                return y

            def gathered(w=w, w_t=w_t, xs=xs):
                last, y = xs[0], w @ xs[0]
                for x in xs:
                    changed = (x != last).nonzero().squeeze(1)
                    y = y + (x - last)[changed] @ w_t[changed]
                    last = x
                return y

            all_ways = {
                "torch.mv": lambda w=w, xs=xs: [w @ x for x in xs][-1],
                "ours, Numba": ours,
                "reference": reference,
            }
            if threshold == 0:
                all_ways["torch, gathered rows"] = gathered
            times = compare(race(all_ways, rounds=7, seconds=3), "torch.mv")
            share = sum(sent) / len(sent) / n
            exact = w.double() @ xs[-1].double()
            for way, (seconds, ratio) in times.items():
                error = ((all_ways[way]() - exact).norm() / exact.norm()).item()
                read = 1.0 if way == "torch.mv" else share
                found.append(
                    Row(
                        shape=f"{m} × {n}, {name}",
                        way=way,
                        seconds=seconds / STEPS,
                        ratio=ratio,
                        baseline="torch.mv",
                        bytes=4.0 * m * n * read,
                        error=error,
                        more={"sent": share} if way == "ours, Numba" else {},
                    )
                )
    return found
