"""Dictionaries on activations made of known directions, and their measures by hand."""

import pytest
import torch

from lib import dictionaries as D
from lib.errors import BookError
from lib.kernels.topk_sae import Chosen


@pytest.fixture(scope="module")
def made():
    """4,000 tokens of 3 out of 24 orthogonal-ish directions in 16 dimensions, off centre."""
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    which = torch.rand(4000, 24, generator=g).topk(3).indices
    f = torch.zeros(4000, 24).scatter(1, which, 1 + torch.rand(4000, 3, generator=g))
    return truth, 5 * f @ truth + 3


@pytest.fixture(scope="module")
def trained(made):
    return D.train(made[1], 32, D.topk(3), steps=400, batch=128, lr=3e-3)


def test_training_finds_the_directions(made, trained):
    truth, x = made
    sae, log = trained
    back = D.reconstruct(sae, x, D.topk(3))
    assert D.explained_variance(x, back) > 0.8
    best = (truth @ sae["W_dec"].T).max(1).values
    assert (best > 0.9).float().mean() > 0.7  # most of what the data are made of
    random = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    assert best.mean() > (truth @ random.T).max(1).values.mean() + 0.2
    assert log["loss"][-20:].mean() < 0.5 * log["loss"][:20].mean()


def test_rows_keep_length_one_and_nothing_wants_a_gradient(trained):
    sae, _ = trained
    assert torch.allclose(sae["W_dec"].norm(dim=1), torch.ones(32), atol=1e-5)
    assert not any(tensor.requires_grad for tensor in sae.values())


def test_same_seed_same_dictionary(made):
    a, b = (D.train(made[1], 16, D.topk(2), steps=20, batch=64, seed=3)[0] for _ in range(2))
    c = D.train(made[1], 16, D.topk(2), steps=20, batch=64, seed=4)[0]
    assert all(a[name].equal(b[name]) for name in a)
    assert not a["W_dec"].equal(c["W_dec"])


@pytest.mark.parametrize(
    "choice",
    [D.topk(3), D.mutual(3), D.by_latent(torch.full((32,), 3 / 32))],
    ids=["topk", "mutual", "by_latent"],
)
def test_encode_and_decode_are_the_dense_formula(made, trained, choice):
    sae, x = trained[0], made[1][:96]
    chosen = D.encode(sae, x, choice, batch=96)
    f = D.dense(chosen, 32)
    by_hand = (f @ sae["W_dec"] + sae["b_dec"]) * sae["scale"]
    assert torch.allclose(D.decode(sae, chosen), by_hand, atol=1e-3)
    scores = ((x / sae["scale"] - sae["b_dec"]) @ sae["W_enc"].T + sae["b_enc"]).relu()
    assert torch.allclose(f[f > 0], scores[f > 0], atol=1e-4)
    assert len(chosen.indices) == 96 * 3


def test_budgets_bind_where_they_should(made, trained):
    sae, x = trained[0], made[1][:64]
    per_token = D.encode(sae, x, D.topk(3)).starts.diff()
    assert per_token.eq(3).all()
    per_token = D.encode(sae, x, D.mutual(3), batch=64).starts.diff()
    assert per_token.sum() == 192 and not per_token.eq(3).all()
    share = torch.linspace(0.02, 0.4, 32)
    chosen = D.encode(sae, x, D.by_latent(share), batch=64)
    assert torch.bincount(chosen.indices, minlength=32).equal((share * 64).round().long())


def test_batches_do_not_change_what_is_chosen_by_token(made, trained):
    sae, x = trained[0], made[1][:50]
    one, many = D.encode(sae, x, D.topk(3)), D.encode(sae, x, D.topk(3), batch=7)
    assert one.indices.equal(many.indices) and one.starts.equal(many.starts)
    cube = x.view(5, 10, 16)
    flat = D.reconstruct(sae, x, D.topk(3))
    assert torch.allclose(D.reconstruct(sae, cube, D.topk(3)), flat.view_as(cube), atol=1e-5)


def test_extra_and_penalty_reach_their_users(made):
    x, seen, weighed = made[1][:200], [], []
    extra = torch.arange(200.0)[:, None]

    def choice(sae, u, extra):
        seen.append((u * sae["scale"], extra))
        return D.topk(2)(sae, u, None)

    def penalty(sae, u, chosen):
        weighed.append(len(u))
        return sae["b_enc"].square().sum()

    D.train(x, 16, choice, steps=2, batch=32, extra=extra, penalty=penalty)
    u, rows = seen[0]
    assert torch.allclose(u.detach(), x[rows[:, 0].long()], atol=1e-4) and weighed == [32, 32]


def test_auxiliary_loss_gives_weak_latents_the_error(made):
    sae, x = D.start(made[1], 32), made[1][:200]
    for name in D.PARTS:
        sae[name] = sae[name].requires_grad_()
    u = x / sae["scale"]
    error = u - sae["b_dec"].detach()
    weak = torch.arange(32) >= 20
    loss = D._auxiliary(sae, u, error, weak, k_aux=2)
    loss.backward()
    moved = sae["W_dec"].grad.abs().sum(1) > 0
    assert moved[20:].any() and not moved[:20].any()  # only the weak are asked
    # By hand: the two greatest of the weak at every token, relative to the error.
    f = ((u - sae["b_dec"]) @ sae["W_enc"][20:].T).relu()
    top = f.topk(2)
    back = torch.zeros_like(f).scatter(1, top.indices, top.values) @ sae["W_dec"][20:]
    by_hand = (back - error).square().mean() / error.square().mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)
    assert D._auxiliary(sae, u, error, torch.zeros(32, dtype=torch.bool), 2) == 0


def test_massive_tokens_are_left_alone(made, trained):
    sae, x = trained[0], made[1][:40].clone()
    x[7] *= 1000
    assert D.ordinary(x).logical_not().nonzero().flatten().tolist() == [7]
    out = D.splice(sae, D.topk(3))(x.view(4, 10, 16)).view(40, 16)
    assert out[7].equal(x[7])
    rest = torch.arange(40) != 7
    assert torch.allclose(out[rest], D.reconstruct(sae, x[rest], D.topk(3)), atol=1e-4)


def test_measures_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert D.explained_variance(x, x) == 1
    assert D.explained_variance(x, x.mean(0).expand(2, 2)) == 0
    assert D.explained_variance(x, x + 1) == -1
    chosen = Chosen(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3]))
    assert D.l0(chosen) == 1
    assert D.rates(chosen, 3).tolist() == [1, 0, 0]
    whole, bad = torch.tensor([1.0]), torch.tensor([5.0])
    assert D.recovered(whole, whole, bad) == 1 and D.recovered(whole, bad, bad) == 0


def test_small_file_is_nearly_the_same(made, trained):
    sae, x = trained[0], made[1]
    again = D.unpack(D.pack(sae))
    assert D.pack(sae)["W_dec"].dtype == torch.int8
    gaps = [D.explained_variance(x, D.reconstruct(s, x, D.topk(3))) for s in (sae, again)]
    assert abs(gaps[0] - gaps[1]) < 5e-3


def test_splicing():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (3, 9))
    site = "resid_post.0"
    whole = D.spliced_loss(model, ids, site)
    assert whole.shape == (3, 7)
    assert torch.allclose(D.spliced_loss(model, ids, site, lambda x: x.clone()), whole, atol=1e-5)
    by_hand = torch.nn.functional.cross_entropy(
        model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="none"
    )
    assert torch.allclose(whole.flatten(), by_hand, atol=1e-5)
    shapes = []
    zeroed = D.spliced_loss(
        model, ids, site, lambda x: shapes.append(x.shape) or torch.zeros_like(x)
    )
    assert shapes[0] == (3, 8, 16) and not torch.allclose(zeroed, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda sae, x: D.encode(sae, x[:, :3], D.topk(3)), r"reads \[n, 16\]"),
        (lambda sae, x: D.start(x[0], 4), r"must be \[tokens, d\]"),
        (lambda sae, x: D.train(x, 8, D.topk(1), extra=x[:2]), "extra has 2 rows"),
    ],
)
def test_errors_name_what_is_wrong(made, trained, call, says):
    with pytest.raises(BookError, match=says):
        call(trained[0], made[1])
