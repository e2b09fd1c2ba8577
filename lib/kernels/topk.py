"""The greatest k of every row, column or whole matrix, exactly, with ties to the lowest index.

A sparse autoencoder's activation is a choice of pairs (token, latent) under a budget (Ayonrinde
2024, arXiv 2411.02124): TopK lets every token have k latents (Gao et al. 2024, arXiv 2406.04093),
feature choice every latent its number of tokens, mutual choice the whole batch one total. All three
are here; the two last leave tokens with unequal numbers of latents, so they come back ragged.

Why not ``torch.topk``: on a CPU it takes about four times as long (the bench prints both). A row's
k-th greatest group maximum bounds its k-th greatest entry from below, so one vector pass for √(km)
group maxima, a bisection on those, and a look into the few groups above the bound find the same
entries: a row is read from memory once (18 kB at 4,608), and the limit is that reading. On a GPU
torch's own sort is used: the reference runs there.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels.dispatch import OPTIONS, check, dispatch, njit, numba, prange
from lib.kernels.sparse_decode import bounds, transpose

WAYS = ("token", "latent", "batch")


class Chosen(NamedTuple):
    """Chosen pairs, token by token.

    values: [n, k], or ragged [pairs]; indices: int64, the latents, of the same shape; starts: None,
    or int64 [n + 1]: token t owns the pairs ``starts[t]`` to ``starts[t + 1]``.
    """

    values: Tensor
    indices: Tensor
    starts: Tensor | None = None


def select(scores: Tensor, k: int | Tensor, by: str = "token") -> Chosen:
    """Choose the greatest entries of a dense matrix; no gradient flows through this.

    Args:
        scores: [n, m], float32 or float64 (float64 runs the reference). NaN ranks above infinity,
            as in torch. Nothing is cut at zero: where a row has fewer than k positive entries, the
            greatest of the others are chosen, and ``encode`` gives them value and gradient 0.
        k: how many; more than there are means all. An int64 tensor gives every token [n] or every
            latent [m] its own budget.
        by: "token": k of every row, in falling order (a tensor k: ragged). "latent": k of every
            column. "batch": k of the whole matrix. These two are ragged, with a token's latents in
            rising order.

    Raises:
        BookError: for a wrong shape, dtype, budget or way.
    """
    n, m = check(scores=(scores, "n m", (torch.float32, torch.float64))).values()
    wanted = budgets(k, by, n, m)
    scores = scores.detach()
    fast = scores.dtype == torch.float32
    if by == "batch":
        cpu = _cpu_batch if fast else None
        return dispatch(scores, _reference_batch, cpu=cpu)(scores, wanted)
    rows = scores if by == "token" else scores.T
    cpu = _cpu_rows if fast else None
    values, found = dispatch(scores, _reference_rows, cpu=cpu)(rows, wanted)
    return arrange(values, found, wanted, by, n, None if isinstance(k, Tensor) else min(k, m))


def budgets(k: int | Tensor, by: str, n: int, m: int) -> Tensor | int:
    """k, checked: the starts [rows + 1] of every row's (or latent's) own pairs, or the total."""
    if by not in WAYS:
        raise BookError(f'by is "{by}"; it must be one of {", ".join(WAYS)}')
    rows, most = {"token": (n, m), "latent": (m, n), "batch": (1, n * m)}[by]
    if isinstance(k, Tensor) and by != "batch":
        check(k=(k, str(rows), (torch.int64,)))
        if rows and int(k.min()) < 0:
            raise BookError(f"k has the budget {int(k.min())}; every budget must be 0 or more")
        each = k.cpu().clamp(max=most)
    elif isinstance(k, int) and k >= 1:
        each = torch.full((rows,), min(k, most), dtype=torch.int64)
    else:
        tensor = "" if by == "batch" else f" or an int64 tensor [{rows}] of budgets"
        raise BookError(f"k is {k!r}; it must be a whole number of at least 1{tensor}")
    if by == "batch":
        return int(each[0])
    return torch.cat([each.new_zeros(1), each.cumsum(0)])


def arrange(
    values: Tensor, found: Tensor, starts: Tensor, by: str, n: int, width: int | None
) -> Chosen:
    """What a selection by rows found, as pairs by token; [n, width] where all have as many."""
    starts = starts.to(values.device)
    if by == "latent":
        order, latents, starts = transpose(found, starts, n)
        return Chosen(values[order], latents, starts)
    if width is None:
        return Chosen(values, found, starts)
    return Chosen(values.view(n, width), found.view(n, width))


# The specification: a stable sort, so that of equals the first comes first; NaN leads, as in torch.


def _reference_rows(scores: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    budget = starts.diff().to(scores.device)
    most = int(budget.max()) if len(budget) else 0
    values, found = scores.sort(dim=1, descending=True, stable=True)
    keep = torch.arange(most, device=scores.device) < budget[:, None]
    return values[:, :most][keep], found[:, :most][keep]


def _reference_batch(scores: Tensor, total: int) -> Chosen:
    n, m = scores.shape
    order = scores.flatten().sort(descending=True, stable=True).indices[:total].sort().values
    tokens = order // max(m, 1)
    starts = torch.zeros(n + 1, dtype=torch.int64, device=scores.device)
    starts[1:] = torch.bincount(tokens, minlength=n).cumsum(0)
    return Chosen(scores.flatten()[order], order % max(m, 1), starts)


def _cpu_rows(scores: Tensor, starts: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``scores`` may be bfloat16 here; ``bias`` [m] is added to every row on the way."""
    n, m = scores.shape
    values = torch.empty(int(starts[-1]), dtype=torch.float32)
    found = torch.empty(int(starts[-1]), dtype=torch.int64)
    if len(values):
        narrow = scores.dtype == torch.bfloat16
        bits = scores.contiguous().view(torch.int16 if narrow else torch.int32).numpy()
        bias = (torch.zeros(m) if bias is None else bias.contiguous()).numpy()
        parts = bounds(starts.numpy())
        _rows(bits, 16 * narrow, bias, starts.numpy(), parts, values.numpy(), found.numpy())
    return values, found


@njit(**OPTIONS)
def order_key(bits, index):
    """A number that is smaller the greater the float with these bits, then the lower the index."""
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        rank = np.int64(0x7FFFFFFF)  # every NaN, first
    elif (bits & 0x7FFFFFFF) == 0:
        rank = np.int64(0)  # both zeros are equal
    else:
        rank = np.int64(bits) if bits >= 0 else np.int64(bits ^ 0x7FFFFFFF)
    return (~rank << 32) | np.int64(index)


@njit(**OPTIONS)
def sort_keys(keys, count, spare):
    """Rising, in place. A key's place is how many are smaller: no branch to guess, all vectors."""
    if count > 128:
        keys[:count].sort()
        return
    spare[:count] = keys[:count]
    for i in range(count):
        key, place = spare[i], 0
        for j in range(count):
            place += spare[j] < key
        keys[place] = key  # keys differ: each holds its own index


@njit(**OPTIONS)
def _fill(source, shift, bias, row):
    """The floats whose (upper) bits ``source`` holds, plus bias, into row; how many are NaN."""
    bits, bad = row.view(np.int32), 0
    for j in range(len(source)):
        bits[j] = np.int32(source[j]) << shift
    for j in range(len(source)):
        row[j] += bias[j]
        bad += row[j] != row[j]
    return bad


@njit(**OPTIONS)
def _bound(tops, k):
    """At most the k-th greatest of ``tops``, and close to it; NaN if they are not all finite."""
    low, high = tops[0], tops[0]
    for j in range(1, len(tops)):
        low = tops[j] if tops[j] < low else low
        high = tops[j] if tops[j] > high else high
    if not (low > -np.inf and high < np.inf):
        return np.float32(np.nan)
    for _ in range(32):
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        if not (low < middle < high):
            break
        count = np.int32(0)
        for j in range(len(tops)):
            count += np.int32(tops[j] >= middle)
        if count >= k:
            low = middle
            if count <= k + k // 8:
                break
        else:
            high = middle
    return low


@njit(**OPTIONS)
def _candidates(row, m, k, tops, near, keys):
    """Fill ``keys`` with every entry that can be among the k greatest; returns how many."""
    bits, groups, count = row.view(np.int32), len(tops), 0
    bound = np.float32(np.nan)
    if groups >= k:
        tops[:] = row[:groups]  # group j: entries j, j + groups, j + 2 groups, …
        for first in range(groups, len(row), groups):
            part = row[first : first + groups]  # a slice: row[first + j] would not run in vectors
            for j in range(groups):
                tops[j] = part[j] if part[j] > tops[j] else tops[j]
        bound = _bound(tops, k)
    if bound != bound:  # k is most of the row, or the row has infinities: sort it all
        for j in range(m):
            keys[j] = order_key(bits[j], j)
        return m
    passing = 0
    for j in range(groups):
        near[passing] = j
        passing += tops[j] >= bound
    for first in range(0, len(row), groups):  # rising indices, so that the first ties are the right
        for i in range(passing):
            keys[count] = first + near[i]
            count += row[first + near[i]] >= bound
    ties, kept = 0, 0
    for i in range(count):
        j = keys[i]
        tie = row[j] == bound
        keys[kept] = order_key(bits[j], j)
        kept += not tie or ties < k
        ties += tie
    return kept


@njit(parallel=True, **OPTIONS)
def _rows(scores, shift, bias, starts, parts, values, found):
    m = scores.shape[1]
    for part in prange(len(parts) - 1):
        first, last = parts[part], parts[part + 1]
        most = 1
        for r in range(first, last):
            most = max(most, starts[r + 1] - starts[r])
        groups = 16 * int(math.ceil(math.sqrt(most * m) / 16))
        groups = groups if 2 * groups <= m else 0
        padded = groups * ((m + groups - 1) // groups) if groups else m
        row = np.full(padded, -np.inf, np.float32)
        tops, near = np.empty(groups, np.float32), np.empty(groups + 1, np.int64)
        keys, spare = np.empty(m + 1, np.int64), np.empty(128, np.int64)
        for r in range(first, last):
            begin = starts[r]
            k = starts[r + 1] - begin
            if k == 0:
                continue
            bad = _fill(scores[r], shift, bias, row)
            if bad:
                bits = row.view(np.int32)
                for j in range(m):
                    keys[j] = order_key(bits[j], j)
                count = m
            else:
                count = _candidates(row, m, k, tops, near, keys)
            sort_keys(keys, count, spare)
            for i in range(k):
                index = keys[i] & 0xFFFFFFFF
                found[begin + i] = index
                values[begin + i] = row[index]


def _cpu_batch(scores: Tensor, total: int) -> Chosen:
    """Two histograms, of the upper and the lower half of the order key, give the exact cut."""
    n, m = scores.shape
    if not total:
        return _reference_batch(scores, total)
    table = scores.contiguous().numpy()
    parts = np.linspace(0, n, 1 + min(n, numba.get_num_threads())).astype(np.int64)
    upper, above, left = 0, 0, total
    for half in (1, 0):
        counts = np.zeros((len(parts) - 1, 65536), np.int64)
        _histogram(table, parts, half, upper, counts)
        sums = counts.sum(0).cumsum()
        bin = int(np.searchsorted(sums, left))
        above = int(sums[bin - 1]) if bin else 0
        left -= above
        upper = (upper << 16) | bin
    rank = ~(upper - 2**31)
    if rank == 0x7FFFFFFF:  # more NaN than places
        return _reference_batch(scores, total)
    cut = np.array([rank if rank >= 0 else rank ^ 0x7FFFFFFF], np.int64).astype(np.int32)
    cut = cut.view(np.float32)[0]
    over, ties = np.empty(n, np.int64), np.empty(n, np.int64)
    _count(table, cut, over, ties)
    before = np.cumsum(ties) - ties
    allowed = np.clip(left - before, 0, ties)  # ties go to the first tokens, then the first latents
    starts = torch.zeros(n + 1, dtype=torch.int64)
    starts[1:] = torch.from_numpy(over + allowed).cumsum(0)
    values, found = torch.empty(total), torch.empty(total, dtype=torch.int64)
    _collect(table, cut, allowed, starts.numpy(), values.numpy(), found.numpy())
    return Chosen(values, found, starts)


@njit(parallel=True, **OPTIONS)
def _histogram(scores, parts, half, upper, counts):
    for part in prange(len(parts) - 1):
        for r in range(parts[part], parts[part + 1]):
            bits = scores[r].view(np.int32)
            for j in range(len(bits)):
                key = (order_key(bits[j], 0) >> 32) + 2147483648
                if half == 1:
                    counts[part, key >> 16] += 1
                elif key >> 16 == upper:
                    counts[part, key & 0xFFFF] += 1


@njit(parallel=True, **OPTIONS)
def _count(scores, cut, over, ties):
    for r in prange(scores.shape[0]):
        more, same = 0, 0
        for j in range(scores.shape[1]):
            more += not (scores[r, j] <= cut)  # NaN counts as more
            same += scores[r, j] == cut
        over[r], ties[r] = more, same


@njit(parallel=True, **OPTIONS)
def _collect(scores, cut, allowed, starts, values, found):
    for r in prange(scores.shape[0]):
        at, left = starts[r], allowed[r]
        for j in range(scores.shape[1]):
            value = scores[r, j]
            tie = value == cut
            if not (value <= cut) or (tie and left > 0):
                left -= tie
                values[at] = value
                found[at] = j
                at += 1
