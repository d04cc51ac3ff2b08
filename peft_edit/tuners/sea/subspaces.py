"""Spans of thin factors: what an edit changes, projections joined, and the factor of a dense projection.

A basis is (k, d) with orthonormal rows; k is its rank, d the hidden size. Decompositions run in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# Directions that both factors share cancel to the rounding of float32 factors, a few 1e-7; a direction whose eigenvalue
# is smaller than this changes an activation by less than a millionth.
CANCELLED = 1e-6


def change(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of P+ + P- - I = U+ U+^T - U- U-^T, what the edit adds to the identity (SEA).

    Args:
        positive, negative: (k+, d) and (k-, d), bases.

    Returns:
        (r, d) orthonormal rows and (r,) eigenvalues in [-1, 1], float64, r <= k+ + k-: 1 for a direction that is
        amplified, -1 for one that is removed. Directions that both share are untouched and left out, see `CANCELLED`.
    """
    both = torch.cat((positive, negative)).double()
    signs = torch.cat((both.new_ones(len(positive)), -both.new_ones(len(negative))))
    q, r = torch.linalg.qr(both.T)  # (d, k), (k, k)
    values, vectors = torch.linalg.eigh((r * signs) @ r.T)
    kept = values.abs() > CANCELLED
    return (q @ vectors[:, kept]).T, values[kept]


@dataclass(frozen=True)
class Moment:
    """Eigenvalues, (k,), in decreasing order, and eigenvectors, (k, d), of a second moment R^T R times the number t of
    its rows, both float64."""

    values: Tensor
    vectors: Tensor
    count: int

    def leading(self, energy: float) -> Tensor:
        """Basis of the leading eigenvectors, (k, d), as few as carry a share of the trace, in (0, 1]."""
        values, vectors = self.values, self.vectors
        cumulated = values.cumsum(dim=0)
        resolved = values > values[0] * max(self.count, vectors.shape[1]) * torch.finfo(values.dtype).eps
        k = min(int((cumulated < energy * cumulated[-1]).sum()) + 1, int(resolved.sum()))
        return vectors[:k].contiguous()


def second_moment(chunks: Iterable[Tensor], count: int) -> Moment:
    """The eigenvectors of R^T R. Of the (d, d) moment and the (t, d) factor the smaller one is in memory, besides a
    chunk.

    Args:
        chunks: the rows of R, (r, d) each, float64.
        count: t, the number of all rows.
    """
    factor: list[Tensor] = []
    moment: Tensor | None = None
    for chunk in chunks:
        if count < chunk.shape[1]:
            factor.append(chunk)
        else:
            moment = chunk.T @ chunk if moment is None else moment.addmm_(chunk.T, chunk)
    if moment is None:
        _, singular, vectors = torch.linalg.svd(torch.cat(factor), full_matrices=False)
        return Moment(singular.square(), vectors, count)
    values, vectors = torch.linalg.eigh(moment)
    return Moment(values.flip(0).clamp_min(0), vectors.flip(1).T, count)


def join(bases: Sequence[Tensor]) -> Tensor:
    """Basis of the orthogonal projection that is nearest to the sum of several ones, in the Frobenius norm.

    It spans the eigenvectors of the sum whose eigenvalues are above 1/2. Directions of two bases less than 60 degrees
    apart become one, their mean; of those further apart both stay. The whole sum of the spans would also hold the small
    differences between directions that are meant to be the same, as full directions.

    Args:
        bases: (k, d) each.

    Returns:
        (k, d), float64, of at most the sum of the ranks. The order of the bases does not matter.
    """
    _, singular, right = torch.linalg.svd(torch.cat(list(bases)).double(), full_matrices=False)
    return right[singular.square() > 0.5]


def factor_projection(projection: Tensor) -> tuple[Tensor, float]:
    """The basis of an orthogonal projection, and how far the matrix is from being one.

    Its rank is its trace, so that a few products find the range, where an eigenvalue decomposition would take minutes
    for each layer of a large model.

    Args:
        projection: (d, d), finite.

    Returns:
        (k, d) float64 with projection = basis^T basis, and the largest entry of the difference of the two sides. It is
        of the size of rounding exactly if the matrix is an orthogonal projection.
    """
    projection = projection.double()
    d = len(projection)
    rank = min(max(round(float(projection.trace())), 0), d)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(d, rank, dtype=torch.float64, generator=generator).to(projection.device)
    for _ in range(2):  # the second pass takes out the rounding that the random start has magnified
        basis = torch.linalg.qr(projection @ basis)[0]
    basis = basis.T.contiguous()
    deviation = (basis.T @ basis - projection).abs().max() if d else projection.new_zeros(())
    return basis, float(deviation)


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of the product of two thin factors by one of a smaller rank.

    Args:
        left, right: (d, r) and (r, m).
        rank: at most r.

    Returns:
        (d, rank) and (rank, m), and the relative error in the Frobenius norm.
    """
    q, r = torch.linalg.qr(left)
    u, s, v = torch.linalg.svd(r @ right, full_matrices=False)
    total = s.square().sum()
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return (q @ u[:, :rank]) * s[:rank], v[:rank], error
