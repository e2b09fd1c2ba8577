"""Selective scan in float32, state 16, softplus and gate, against transformers' own Mamba path.

Forward under no_grad, then forward and backward. "parallel" is the associative scan by doubling
(log₂ length passes over [batch, dim, length, state]). Flops: 11 for a state and step (an
exponential counts as 7) in the forward. Errors: the largest over the largest value of y, against
the reference in float64; for the backward, of the gradient of Δ.
"""

import sys

import torch
import torch.nn.functional as F

from lib.kernels.dispatch import using
from lib.kernels.selective_scan import selective_scan
from tests.bench_kernels.common import Row, compare, race


def parallel(x, delta, A, B, C, D, z, delta_bias, initial=None):
    """The scan by doubling (Hillis and Steele): (a, b) after (a', b') is (a a', a b' + b)."""
    delta = F.softplus(delta + delta_bias[:, None])
    a = torch.exp(delta[..., None] * A[:, None])  # [batch, dim, length, state]
    h = (delta * x)[..., None] * B.transpose(1, 2)[:, None]
    if initial is not None:
        first = torch.cat((a[:, :, :1] * initial[:, :, None], torch.zeros_like(a[:, :, 1:])), 2)
        h = h + first
    stride = 1
    while stride < x.shape[-1]:
        h = torch.cat(
            (h[:, :, :stride], a[:, :, stride:] * h[:, :, :-stride] + h[:, :, stride:]), 2
        )
        a = torch.cat((a[:, :, :stride], a[:, :, stride:] * a[:, :, :-stride]), 2)
        stride *= 2
    y = torch.einsum("bdls,bsl->bdl", h, C) + D[:, None] * x
    return (y if z is None else y * F.silu(z)), h[:, :, -1]


def theirs():
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError:
        print("selective_scan: no transformers, or another version's Mamba", file=sys.stderr)
        return None
    return lambda x, delta, A, B, C, D, z, delta_bias: mamba_selective_scan(
        *(x, delta, A, B, C, D, z),
        delta_bias=delta_bias,
        delta_softplus=True,
        return_last_state=True,
    )


def inputs(batch: int, dim: int, length: int, state: int = 16, dtype=torch.float32) -> list:
    """As a fresh Mamba block has them: A = −1 … −16, Δ around 0.01 to 0.1 before its bias."""
    A = -torch.arange(1.0, state + 1).expand(dim, state).contiguous()
    x, delta, z = torch.randn(3, batch, dim, length)
    B, C = torch.randn(2, batch, state, length)
    bias = torch.empty(dim).uniform_(-5, -2)
    return [t.to(dtype) for t in (x, delta, A, B, C, torch.ones(dim), z, bias)]


def ours(*parts):
    return selective_scan(*parts[:7], delta_bias=parts[7])


def reference(*parts):
    with using("reference"):
        return ours(*parts)


def rows() -> list[Row]:
    torch.manual_seed(0)
    found = []
    ways = {"ours, Numba": ours, "reference": reference, "parallel": parallel}
    base = "reference"
    if peer := theirs():
        ways["transformers"], base = peer, "transformers"
    for dim, length, backward in ((1536, 1, False), (1536, 512, False), (1536, 512, True)):
        parts = inputs(1, dim, length)
        exact = [t.double() for t in parts]
        for group in (parts, exact) if backward else ():
            for t in group:
                t.requires_grad_()

        def run(f, parts, backward=backward):
            if not backward:
                with torch.no_grad():
                    return f(*parts)[0]
            return torch.autograd.grad(f(*parts)[0].sum(), parts)[1]

        want = run(reference, exact)
        all_ways = {way: lambda f=f, parts=parts: run(f, parts) for way, f in ways.items()}
        if length > 1:  # as a projection gives them, channels last in memory
            last = [t.mT.contiguous().mT if t.shape == parts[0].shape else t for t in parts]
            last = [t.detach().requires_grad_(backward) for t in last]
            all_ways["ours, channels last"] = lambda last=last: run(ours, last)
        times = compare(race(all_ways, rounds=7, seconds=12), base)
        for way, (seconds, ratio) in times.items():
            error = (all_ways[way]() - want).abs().max() / want.abs().max()
            found.append(
                Row(
                    shape=f"1 × {dim} × {length}{', with backward' if backward else ''}",
                    way=way,
                    seconds=seconds,
                    ratio=ratio,
                    baseline=base,
                    flops=None if backward else 11.0 * dim * length * 16,
                    error=error.item(),
                )
            )
    return found
