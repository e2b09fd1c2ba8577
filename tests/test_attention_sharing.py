"""Attention between pictures (lib/attention_sharing.py), on tiny random networks."""

import pytest
import tiny_diffusion
import torch

from lib import hooks
from lib.attention_sharing import attending
from lib.errors import BookError


def unet():
    model = tiny_diffusion.unet(text=12)
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 12)
    return model, dict(sample=x, timestep=500, encoder_hidden_states=text, return_dict=False)


def flow():
    model = tiny_diffusion.flow(text=12, joint=2, single=2)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    inputs = dict(
        hidden_states=torch.randn(3, 12, 16),
        timestep=torch.full((3,), 0.5),
        encoder_hidden_states=torch.randn(3, 5, 12),
        pooled_projections=torch.randn(3, 12),
        txt_ids=torch.zeros(5, 3),
        img_ids=ids,
        return_dict=False,
    )
    return model, inputs


@pytest.fixture(params=[unet, flow])
def made(request):
    return request.param()


@torch.no_grad()
def out(model, inputs):
    return model(**inputs)[0]


def plain(a):
    return a.turn(a.q), a.turn(a.k), a.v


def doubled(a):
    """Every key twice: the same softmax."""
    k = a.turn(a.k)
    return a.turn(a.q), torch.cat([k, k], 1), torch.cat([a.v, a.v], 1)


def hidden_keys(a):
    """Another picture's keys at hand, and a mask that keeps all from looking at them."""
    k = a.turn(a.k)
    k, v = (torch.cat([x, x.roll(1, 0)], 1) for x in (k, a.v))
    see = torch.arange(k.shape[1]) < a.k.shape[1]
    return a.turn(a.q), k, v, see[None, None, None]


@pytest.mark.parametrize("share", [plain, doubled, hidden_keys])
def test_what_changes_nothing_changes_nothing(made, share):
    model, inputs = made
    want = out(model, inputs)
    with attending(model, share):
        got = out(model, inputs)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(out(model, inputs), want)


@pytest.mark.parametrize("blocks", [[0], [1], [3]])
def test_a_picture_that_looks_at_another_changes_and_the_other_does_not(made, blocks):
    model, inputs = made

    def share(a):
        k, v = a.turn(a.k), a.v
        k, v = (torch.cat([x, x[:1].expand_as(x)], 1) for x in (k, v))
        see = torch.ones(3, 1, 1, k.shape[1], dtype=torch.bool)
        see[0, ..., a.k.shape[1] :] = False
        seen.append(a.block)
        return a.turn(a.q), k, v, see

    seen = []
    want = out(model, inputs)
    with attending(model, share, blocks):
        got = out(model, inputs)
    assert seen == blocks
    assert torch.allclose(got[0], want[0], atol=1e-5)
    assert (got[1:] - want[1:]).abs().amax((1, 2)).min() > 1e-5


def test_the_text_of_a_flow_comes_first_and_only_places_are_shifted():
    model, inputs = flow()

    def share(a):
        assert a.n_text == 5 and a.q.shape[1] == 17 and a.hidden.shape[1] == 12
        still, moved = a.turn(a.k), a.turn(a.k, (0, 4))
        assert torch.equal(still[:, :5], moved[:, :5])
        assert not torch.allclose(still[:, 5:], moved[:, 5:])
        assert torch.equal(a.turn(a.k[:, 5:], (0, 4)), moved[:, 5:])
        # Turning both by as much changes no product: only distances count.
        q, k = a.q[:, 5:], a.k[:, 5:]
        products = [
            torch.einsum("nqhd,nkhd->nhqk", a.turn(q, s), a.turn(k, s)) for s in ((0, 0), (2, 4))
        ]
        assert torch.allclose(*products, atol=1e-4)
        met.append(a.block)
        return plain(a)

    met = []
    with attending(model, share):
        out(model, inputs)
    assert met == [0, 1, 2, 3]


def test_own_states_projected_are_the_own_keys_and_values(made):
    model, inputs = made

    def share(a):
        k, v = a.project(a.hidden)
        assert torch.allclose(k, a.k[:, a.n_text :], atol=1e-6)
        assert torch.allclose(v, a.v[:, a.n_text :], atol=1e-6)
        return plain(a)

    with attending(model, share):
        out(model, inputs)


def test_hooks_see_the_keys_that_were_added(made):
    model, inputs = made
    with attending(model, doubled, [1]), hooks.capture(model, "self_pattern") as acts:
        out(model, inputs)
    tokens = acts["self_pattern.1"].shape[2]
    assert acts["self_pattern.1"].shape[3] == 2 * tokens
    assert acts["self_pattern.2"].shape[2] == acts["self_pattern.2"].shape[3]
    assert torch.allclose(acts["self_pattern.1"].sum(-1), torch.ones(()), atol=1e-5)


def test_the_models_own_processors_come_back_on_any_exit(made):
    model, inputs = made
    before = dict(model.attn_processors)
    hooks_before = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ZeroDivisionError), attending(model, lambda a: 1 / 0):
        out(model, inputs)
    after = dict(model.attn_processors)
    assert all(after[name] is before[name] for name in before)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks_before
    with pytest.raises(BookError, match="block 99; it is in 0, 1"), attending(model, plain, [99]):
        pass


def test_one_sharing_inside_another_has_its_turn_and_then_gives_it_back(made):
    model, inputs = made
    met = []

    def noting(a):
        met.append("outer")
        return plain(a)

    def inner(a):
        met.append("inner")
        return plain(a)

    with attending(model, noting):
        with attending(model, inner):
            out(model, inputs)
        assert set(met) == {"inner"}
        met.clear()
        out(model, inputs)
    assert set(met) == {"outer"}
