"""Units of two layers are matched one to one (lib/matching.py)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import matching
from lib.errors import BookError


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), extra=st.integers(0, 2), seed=st.integers(0, 99), most=st.booleans())
def test_assign_is_best_of_all_pairings(n, extra, seed, most):
    scores = torch.randn(n, n + extra, generator=torch.Generator().manual_seed(seed))
    found = matching.assign(scores, maximise=most)
    assert len(set(found.tolist())) == n
    totals = [
        sum(scores[i, j].item() for i, j in enumerate(columns))
        for columns in itertools.permutations(range(n + extra), n)
    ]
    best = max(totals) if most else min(totals)
    assert scores[range(n), found].sum().item() == pytest.approx(best, abs=1e-5)


def test_a_shuffled_layer_is_found_again():
    g = torch.Generator().manual_seed(0)
    W, b, order = torch.randn(20, 8, generator=g), torch.randn(20, generator=g), torch.randperm(20)
    noisy = W[order] + 0.01 * torch.randn(20, 8, generator=g)
    cost = matching.costs((W, noisy), (b, b[order]))
    assert torch.equal(order[matching.assign(cost, maximise=False)], torch.arange(20))


def test_costs_are_squared_distances():
    A, B = torch.randn(4, 3), torch.randn(5, 3)
    a, b = torch.randn(4), torch.randn(5)
    expected = torch.cdist(A, B).pow(2) + (a[:, None] - b).pow(2)
    torch.testing.assert_close(matching.costs((A, B), (a, b)), expected, rtol=1e-4, atol=1e-5)


def test_correlations_are_pearsons_and_0_for_silent_units():
    x, y = torch.randn(50, 3), torch.randn(50, 4)
    y[:, 1] = 7.0
    found = matching.correlations(x, y)
    both = torch.corrcoef(torch.cat([x, y], 1).T)[:3, 3:]
    torch.testing.assert_close(found[:, [0, 2, 3]], both[:, [0, 2, 3]], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[:, 1], torch.zeros(3))


def test_compose_chains_pairings():
    first, second = torch.tensor([2, 0, 1]), torch.tensor([5, 4, 3])
    assert matching.compose(first, second).tolist() == [3, 5, 4]
    assert matching.compose(first).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: matching.assign(torch.zeros(3, 2)), "n ≤ m"),
        (lambda: matching.assign(torch.full((2, 2), torch.nan)), "finite"),
        (lambda: matching.costs(), "at least one"),
        (lambda: matching.costs((torch.zeros(2, 3), torch.zeros(2, 4))), "equal length"),
        (lambda: matching.costs((torch.zeros(2, 3), torch.zeros(2, 3)),
                                (torch.zeros(3), torch.zeros(2))), "different units"),
        (lambda: matching.correlations(torch.zeros(3, 2), torch.zeros(4, 2)), "same two samples"),
        (lambda: matching.compose(), "at least one"),
        (lambda: matching.compose(torch.tensor([3]), torch.tensor([0])), "names unit 3"),
    ],
)  # fmt: skip
def test_errors_say_what_was_wrong(call, says):
    with pytest.raises(BookError, match=says):
        call()
