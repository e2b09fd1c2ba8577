"""Timing that a noisy machine cannot fool much, and what the machine itself can do."""

import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Row:
    """One line of a kernel's table: one way of doing one thing at one shape."""

    shape: str  # in words: "1536 × 576, 70 % sparse"
    way: str  # "ours, Numba", "reference", "torchao int4", …
    seconds: float  # median
    ratio: float  # median over rounds of (baseline's seconds / this way's seconds)
    baseline: str  # which way the ratio is against
    bytes: float | None = None  # that must move at least; with seconds gives the fraction below
    flops: float | None = None  # that must be done at least
    error: float | None = None  # against the exact result, in the unit that ``note`` names
    note: str = ""
    more: dict = field(default_factory=dict)  # e.g. {"tokens a second": 96.0}

    def record(self, machine: dict) -> dict:
        found = asdict(self)
        if self.bytes:
            found["of bandwidth"] = self.bytes / self.seconds / machine["bytes a second"]
        if self.flops:
            found["of peak"] = self.flops / self.seconds / machine["flops a second"]
        return found


def race(ways: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 20.0):
    """Time every way once a round, in an order that changes, so that a slow moment hits all alike.

    Returns:
        name -> list of seconds, one a round. A way that takes under 2 ms runs several times a
        round. Stops early after ``seconds`` in all, with at least three rounds.
    """
    repeats = {}
    for name, run in ways.items():
        run()  # compiles, warms the cache
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(200, int(0.002 / max(time.perf_counter() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in random.sample(list(ways), len(ways)):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                ways[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def compare(times: dict[str, list[float]], baseline: str) -> dict[str, tuple[float, float]]:
    """name -> (median seconds, median over rounds of baseline's seconds / its own)."""
    return {
        name: (
            statistics.median(found),
            statistics.median(b / t for b, t in zip(times[baseline], found, strict=True)),
        )
        for name, found in times.items()
    }


def machine() -> dict:
    """Name, cores and measured limits: bytes a second read from memory, float32 flops a second.

    Memory is read in a sum over 256 MiB, far more than any cache; arithmetic is a 2048-cubed
    matrix product.
    """
    big, square = torch.ones(64 * 2**20), torch.randn(2048, 2048)
    times = race({"read": big.sum, "multiply": lambda: square @ square}, rounds=9)
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "bytes a second": big.nbytes / min(times["read"]),
        "flops a second": 2 * 2048**3 / min(times["multiply"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
