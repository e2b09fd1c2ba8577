"""Binary weights with salient channels at 4 bits (PTQ1.61).

PTQ1.61 (arXiv 2502.13179) ranks input channels by their activations, keeps the top fifth of the
weight's columns at 4 bits and makes the rest binary: w ≈ α_r sign(w − μ_r) + μ_r with a scale and a
mean a row, 0.2 · 4 + 0.8 · 1 bits a weight. The mask has one dimension (whole columns), so it costs
next to nothing, and the two kinds of column need no mixing: the salient ones move to the front of
x, and the product is two of ``lut``'s, one over four planes, one over a single plane.

The paper then learns α and one more scale a row and a column, block by block against the block's
output. A row's scale multiplies into α and μ, a column's into x, so what is learned fits this
storage; here α and μ have their closed form. No library has a product with binary weights. One
product reads about 1.6·m·n/8 bytes, a tenth of bfloat16's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import BookError
from lib.kernels import lut
from lib.kernels.dispatch import check
from lib.kernels.lut import Planes, build, check_input, check_weight


@dataclass(frozen=True)
class Binary:
    """A matrix [rows, columns] of which some columns have 4 bits and the others one.

    Attributes:
        salient, rest: the two kinds of column.
        order: int32 [columns]: where in x the salient columns lie, then where the rest do.
    """

    salient: Planes
    rest: Planes
    order: Tensor

    @property
    def nbytes(self) -> int:
        return self.salient.nbytes + self.rest.nbytes + self.order.nbytes

    @property
    def bits(self) -> float:
        """Bits of storage a weight, all counted."""
        return 8 * self.nbytes / max(1, self.rest.rows * len(self.order))


def pack(weight: Tensor, activation: Tensor, keep: float = 0.2) -> Binary:
    """Columns with the largest activations at 4 bits, the others binary (PTQ1.61, section 3.2).

    Salient: 2^4 levels between a row's minimum and maximum over its salient columns. The rest:
    μ = mean w, α = mean |w − μ|, both a row over its other columns, and the sign of w − μ: for
    these signs the least squared error that a scale and this mean can have.

    Args:
        weight: [rows, columns], floating; finite.
        activation: [columns], the size of each input channel, e.g. its mean |x| on some text.
        keep: the share of columns that are salient, 0 to 1; rounded to whole columns.

    Raises:
        BookError: a wrong shape, dtype or share; a weight or an activation that is not finite.
    """
    check_weight(weight, 32)
    check(weight=(weight, "rows columns"), activation=(activation, "columns", lut.FLOATS))
    if not 0 <= keep <= 1:
        raise BookError(f"keep is {keep}; it must be a share of the columns from 0 to 1")
    if not activation.isfinite().all():
        raise BookError("activation holds NaN or infinity; it must be finite")
    rows, columns = weight.shape
    kept = round(keep * columns)
    order = activation.argsort(descending=True, stable=True)
    order = torch.cat([order[:kept].sort().values, order[kept:].sort().values])  # x read in order
    salient, rest = weight.float()[:, order].split([kept, columns - kept], 1)
    count = max(1, columns - kept)
    mean = (rest.sum(1) / count).half()
    signs = rest >= mean.float()[:, None]
    scale = ((rest - mean.float()[:, None]).abs().sum(1) / count).half()
    group = -(-count // 32) * 32  # the whole row
    return Binary(
        lut.pack(salient, 4, max(32, -(-kept // 32) * 32)),
        build(signs[..., None], _one(scale, rest), _one(mean, rest)[..., 0], group, doubling=True),
        order.int(),
    )


def _one(values: Tensor, like: Tensor) -> Tensor:
    """[rows] as [rows, groups, 1]: one group, or none where there are no columns."""
    return values[:, None, None].expand(-1, min(1, like.shape[1]), 1)


def mv(packed: Binary, x: Tensor) -> Tensor:
    """The product with x [..., columns]: [..., rows] in x's dtype; float32 sums, as ``lut.mv``."""
    flat = check_input(x, packed.rest.words, len(packed.order)).float()
    flat = flat.index_select(1, packed.order)
    kept = packed.salient.columns
    y = lut.mv(packed.salient, flat[:, :kept]) + lut.mv(packed.rest, flat[:, kept:])
    return y.to(x.dtype).view(*x.shape[:-1], packed.rest.rows)


def unpack(packed: Binary) -> Tensor:
    """The matrix that is stored: float32 [rows, columns]."""
    matrix = torch.cat([lut.unpack(packed.salient), lut.unpack(packed.rest)], 1)
    return torch.empty_like(matrix).index_copy_(1, packed.order.long(), matrix)
