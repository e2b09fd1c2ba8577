"""The selective scan beside a parallel scan, transformers' Mamba and autograd, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BookError
from lib.kernels.dispatch import using
from lib.kernels.selective_scan import selective_scan
from tests.bench_kernels.selective_scan import parallel, theirs

BACKENDS = ("reference", "cpu", "triton")
NAMES = "x delta A B C D z delta_bias initial".split()


def parts(batch, dim, length, state, dtype=torch.float32, seed=0) -> dict:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, dim, length),
        "delta": draw(batch, dim, length) * 2 - 1,
        "A": -(draw(dim, state).abs() + 0.05),
        "B": draw(batch, state, length),
        "C": draw(batch, state, length),
        "D": draw(dim),
        "z": draw(batch, dim, length),
        "delta_bias": draw(dim),
        "initial": draw(batch, dim, state),
    }


def close(got, want, tolerance):
    limit = tolerance * (want.abs().max().item() if want.numel() else 0) + 1e-30
    torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=limit, equal_nan=True)


def gradients(given_parts, backend=None, **options):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in given_parts.items()}
    with using(backend or "reference"):
        y, state = selective_scan(**leaves, **options)
    mix = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    found = torch.autograd.grad((y * mix).sum() + (state**2).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 2),
        st.sampled_from([0, 1, 3, 64, 70]),
        st.sampled_from([0, 1, 2, 31, 33]),
        st.sampled_from([1, 3, 16]),
    ),
    without=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial"])),
    softplus=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_equals_the_parallel_scan(shape, without, softplus, backend, channels_last, dtype, seed):
    given_parts = parts(*shape, dtype=dtype, seed=seed)
    if not softplus:
        given_parts["delta"] = given_parts["delta"].abs() / 2
    if channels_last:
        for name in ("x", "delta", "z"):
            given_parts[name] = given_parts[name].mT.contiguous().mT
    exact = {k: v.double() for k, v in given_parts.items()}
    for name in without:
        given_parts[name] = None
        exact[name] = None if name == "z" else torch.zeros_like(exact[name])
    if not softplus:  # the oracle applies it: give it the inverse, and the bias inside
        step = exact["delta"] + exact["delta_bias"][:, None]
        step = step.clamp(min=1e-6)
        given_parts["delta"] = step.to(dtype)
        given_parts["delta_bias"] = None
        exact["delta"] = torch.log(torch.expm1(given_parts["delta"].double()))
        exact["delta_bias"] = torch.zeros_like(exact["delta_bias"])
    with using(backend):
        y, state = selective_scan(**given_parts, softplus=softplus)
    assert y.dtype == dtype and y.shape == given_parts["x"].shape and state.dtype == torch.float32
    if shape[2]:
        want, last = parallel(**exact)
        close(y, want, {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])
        close(state, last, 3e-6)
    else:
        close(state, exact["initial"], 1e-6)


@pytest.mark.skipif(theirs() is None, reason="no Mamba in this version of transformers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(backend):
    given_parts = parts(2, 40, 37, 16)
    del given_parts["initial"]
    want, last = theirs()(**given_parts)
    with using(backend):
        y, state = selective_scan(**given_parts)
    close(y, want, 3e-6)
    close(state, last, 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_are_the_whole(backend):
    whole = parts(1, 70, 40, 4)
    first = {k: v[..., :17] if k in ("x", "delta", "B", "C", "z") else v for k, v in whole.items()}
    second = {k: v[..., 17:] if k in ("x", "delta", "B", "C", "z") else v for k, v in whole.items()}
    with using(backend):
        y, state = selective_scan(**whole)
        head, middle = selective_scan(**first)
        tail, end = selective_scan(**(second | {"initial": middle}))
    close(torch.cat((head, tail), -1), y, 1e-6)
    close(end, state, 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_autograds_through_the_loop(backend, softplus, gated):
    given_parts = parts(2, 70, 67, 5)
    if not softplus:
        given_parts["delta"] = given_parts["delta"].abs() / 2
        given_parts["delta_bias"] = given_parts["delta_bias"].abs() / 2
    if not gated:
        del given_parts["z"]
    want = gradients({k: v.double() for k, v in given_parts.items()}, softplus=softplus)
    got = gradients(given_parts, backend, softplus=softplus)
    for name in given_parts:
        close(got[name].double(), want[name], 1e-5)


def test_gradcheck():
    leaves = {k: v.requires_grad_() for k, v in parts(1, 2, 34, 2, torch.float64).items()}

    def scan(*values):
        return selective_scan(**dict(zip(NAMES, values, strict=True)))

    with using("cpu"):
        assert torch.autograd.gradcheck(scan, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_channel_from_its_step_on(backend):
    given_parts = parts(2, 3, 9, 2)
    given_parts["x"][1, 2, 4] = float("nan")
    with using(backend):
        y, state = selective_scan(**given_parts)
    wrong = torch.zeros(2, 3, 9, dtype=torch.bool)
    wrong[1, 2, 4:] = True
    assert torch.equal(y.isnan(), wrong) and state.isnan().sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:overflow")  # Triton's interpreter, of exp(200)
@pytest.mark.parametrize("value", [-float("inf"), -200.0, -60.0, 60.0, 200.0])
def test_extreme_steps_do_what_the_reference_does(backend, value):
    given_parts = parts(1, 3, 5, 2)
    given_parts["delta"][0, 1, 2] = value
    given_parts["z"][0, 0, 1] = min(abs(value), 1e4) * (1 if value < 0 else -1)
    with using("reference"):
        want = selective_scan(**given_parts)
    with using(backend):
        got = selective_scan(**given_parts)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_wrong_input_is_named():
    good = parts(2, 3, 5, 4)
    for name, bad, words in [
        ("x", good["x"][0], r"^x is \[3, 5\]; it must be \[batch, dim, length\]"),
        ("x", good["x"].long(), "^x is int64"),
        ("delta", good["x"][..., :4], r"^delta is \[2, 3, 4\]"),
        ("A", good["A"].T, r"^A is \[4, 3\]"),
        ("B", good["B"].mT, r"^B is \[2, 5, 4\]"),
        ("C", good["C"].mT, r"^C is \[2, 5, 4\]"),
        ("D", good["A"], r"^D is \[3, 4\]"),
        ("z", good["B"], r"^z is \[2, 4, 5\]"),
        ("delta_bias", torch.ones(2), r"^delta_bias is \[2\]"),
        ("initial", good["initial"].mT, r"^initial is \[2, 4, 3\]"),
        ("B", good["B"].to("meta"), "^B is on meta, x on cpu"),
    ]:
        with pytest.raises(BookError, match=words):
            selective_scan(**(good | {name: bad}))
    with pytest.raises(BookError, match=r"^A is \[dim, 0\]"):
        selective_scan(**parts(2, 3, 5, 0))
