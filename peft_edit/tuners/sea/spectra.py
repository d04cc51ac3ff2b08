"""Leading left singular vectors of a cross-covariance that is never formed where it would be large.

Omega = X^T Y / n is (d, d), has rank at most n and is the product of two thin factors. Only its leading left singular
vectors are wanted, and its energy ||Omega||_F^2 is known beforehand (for n < d it is the trace of a product of two n
x n Gram matrices), so the decomposition stops as soon as they carry the requested share. No matrix larger than
min(n, d) squared is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ...arguments import Argument, ArgumentError


# Up to this size of min(n, d) a complete decomposition takes a fraction of a second.
SMALL_CORE = 512
# Width of a Krylov block: narrow enough to waste nothing on a small rank, wide enough for fast matrix products.
BLOCK_WIDTH = 24
# Beyond this share of min(n, d) the complete decomposition is cheaper; for n < d, where it is dearer, beyond the second
# one if the energy is carried already, so that the vectors need only become more exact.
WIDEST_SHARE = 0.3
WIDEST_CARRYING_SHARE = 0.7
# Accepted bound on the error of the projector onto the leading vectors (residual over gap, Davis-Kahan).
PROJECTOR_TOLERANCE = 1e-9
# A direction whose squared length is a smaller share than this of what the size of its entries allows is rounding.
RESOLUTION = 1e-12
# Singular values that lie closer together than this share of the gap at the cut may be copies of one.
COPY_SHARE = 1e-6
# Lengths of a block's directions that differ by more than this are made equal with so much rounding that their metric
# is to be computed again.
MOST_SPREAD = 1e3
# The Krylov space grows by this factor from one look at its eigenvalues to the next.
LOOK_GROWTH = 1.2


@dataclass(frozen=True)
class Spectrum:
    """Leading part of the singular value decomposition of Omega.

    Attributes:
        basis: (k, d), the leading left singular vectors as orthonormal rows.
        singular_values: (k,), in decreasing order.
        energy: share of the squared singular values in the leading k, in [0, 1].
    """

    basis: torch.Tensor
    singular_values: torch.Tensor
    energy: float

    def cut(self, ratio: float) -> Spectrum:
        """Its fewest leading vectors that carry a smaller share of the energy of all: what `LeftFactor.decompose` gives
        with that ratio. With a ratio of 1, and one above what it carries, itself."""
        shares = self.singular_values.square().cumsum(dim=0)
        shares = shares * (self.energy / shares[-1])
        k = int((shares < ratio).sum()) + 1
        if ratio == 1 or k >= len(shares):
            return self
        return Spectrum(self.basis[:k], self.singular_values[:k], float(shares[k - 1]))


class LeftFactor:
    """The factor X of Omega = X^T Y / n, shared by the decompositions with several Y.

    Args:
        x: (n, d), float64, rows are demonstrations.
    """

    def __init__(self, x: torch.Tensor):
        self.x = x

    @cached_property
    def gram(self) -> torch.Tensor:  # (n, n)
        return _gram(self.x)

    def decompose(self, y: torch.Tensor, ratio: float) -> Spectrum:
        """Fewest leading left singular vectors of X^T Y / n that carry `ratio` of its energy.

        Args:
            y: (n, d), float64, row i belongs to row i of X.
            ratio: share of the sum of squared singular values, in (0, 1]. 1 keeps the numerical rank: the singular
                values above s_1 max(n, d) eps.

        Raises:
            ValueError: X^T Y is zero, so that no direction is distinguished.
        """
        if min(self.x.shape) > SMALL_CORE and ratio < 1:
            spectrum = self._leading(y, ratio)
            if spectrum is not None:
                return spectrum
        return self._complete(y, ratio)

    def _complete(self, y: torch.Tensor, ratio: float) -> Spectrum:
        n, d = self.x.shape
        if n >= d:
            u, s, _ = torch.linalg.svd(self.x.T @ y / n)
        else:
            q, r = torch.linalg.qr(self.x.T)  # (d, n), (n, n)
            core = r @ torch.linalg.qr(y.T, mode="r").R.T / n
            u, s, _ = torch.linalg.svd(core)
            u = q @ u
        if s[0] == 0:
            raise ArgumentError(
                "their cross-covariance with the neutral ones is zero, so no direction stands out: "
                "check the data, or fit with ",
                Argument("centered", False),
            )
        cumulated = s.square().cumsum(dim=0)
        numerical_rank = int((s > s[0] * max(n, d) * torch.finfo(s.dtype).eps).sum())
        k = numerical_rank
        if ratio < 1:
            k = min(k, int((cumulated < ratio * cumulated[-1]).sum()) + 1)
        return Spectrum(u[:, :k].T.contiguous(), s[:k], float(cumulated[k - 1] / cumulated[-1]))

    def _leading(self, y: torch.Tensor, ratio: float) -> Spectrum | None:
        """Block Krylov iteration on Omega Omega^T; None where the complete decomposition is cheaper or more accurate.

        For n < d the left singular vectors are X^T a, where Y Y^T X X^T a = lambda a: all work is on (n, n) Gram
        matrices, in the inner product a^T X X^T b, in which the operator is symmetric.
        """
        n, d = self.x.shape
        if n < d:
            x_gram, y_gram = self.gram, _gram(y)
            total = float((x_gram * y_gram).sum())  # n^2 ||Omega||_F^2
            # Coefficients stand on the left of each product, as rows: on the right it takes up to three times as long,
            # depending on how many there are.
            operator = _Operator(
                lambda a: (a.T @ y_gram).T, lambda a: (a.T @ x_gram).T, lambda a: (a.T @ self.x).T, float(x_gram.norm())
            )
        else:
            omega = self.x.T @ y
            total = float(omega.square().sum())
            operator = _Operator(lambda a: (a.T @ omega @ omega.T).T, lambda a: a, lambda a: a, 1.0)

        size = min(n, d)
        generator = torch.Generator(self.x.device).manual_seed(0)
        start = torch.randn(size, BLOCK_WIDTH, dtype=self.x.dtype, device=self.x.device, generator=generator)
        block, metric_block, _ = _orthonormalise(start, start[:, :0], start[:, :0], operator)
        basis, metric_basis = block, metric_block
        projected = start.new_empty(0, 0)  # (m, m), the operator in the Krylov basis
        next_look, widest = 0.0, WIDEST_SHARE
        while basis.shape[1] + BLOCK_WIDTH <= widest * size:
            image = operator.apply(metric_block)
            columns = metric_basis.T @ image  # (m, width)
            above, below = columns[: len(projected)], columns[len(projected) :]
            projected = torch.cat((torch.cat((projected, above), dim=1), torch.cat((above.T, below), dim=1)))
            block, metric_block, coupling = _orthonormalise(image, basis, metric_basis, operator)
            exhausted = block.shape[1] == 0
            if exhausted or len(projected) >= next_look:
                next_look = LOOK_GROWTH * len(projected)
                values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
                values, vectors = values.flip(0), vectors.flip(1)
                k = int((values.cumsum(dim=0) < ratio * total).sum()) + 1
                if k < len(values):
                    widest = WIDEST_CARRYING_SHARE if n < d else WIDEST_SHARE
                    tolerance = PROJECTOR_TOLERANCE * float(values[k - 1] - values[k])
                    rounding = torch.finfo(values.dtype).eps * float(values[0])
                    if float((coupling @ vectors[-coupling.shape[1] :, : k + 1]).norm()) < max(tolerance, rounding):
                        if rounding > tolerance:
                            return None  # squared Gram matrices cannot resolve so small a gap
                        pairs = vectors[:, : k + 1]
                        q = _verified(values[: k + 1], basis @ pairs, metric_basis @ pairs, operator)
                        if q is None:
                            return None
                        return Spectrum(q.T.contiguous(), values[:k].sqrt() / n, float(values[:k].sum() / total))
            if exhausted:
                return None
            basis = torch.cat((basis, block), dim=1)
            metric_basis = torch.cat((metric_basis, metric_block), dim=1)
        return None


@dataclass(frozen=True)
class _Operator:
    """n^2 Omega Omega^T on coefficients a of the vectors lift(a), in the inner product a^T metric(b).

    Attributes:
        apply: metric(a) -> coefficients of n^2 Omega Omega^T lift(a).
        metric: a -> the matrix of the inner product times a.
        lift: a -> vectors, (d, width).
        metric_norm: norm of that matrix, which sets the rounding of an inner product.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    metric: Callable[[torch.Tensor], torch.Tensor]
    lift: Callable[[torch.Tensor], torch.Tensor]
    metric_norm: float


def _verified(
    values: torch.Tensor, pairs: torch.Tensor, metric_pairs: torch.Tensor, operator: _Operator
) -> torch.Tensor | None:
    """The first k of k + 1 eigenvectors, orthonormal, (d, k); None unless they are the leading ones to the tolerance.

    The coupling of the last block misses what rounding hid from it, so the residuals are taken afresh: each over the
    distance to the other side of the cut, which bounds the error of the projector. Residuals do not show a singular
    value with more copies than a block has columns: the iteration finds only that many.
    """
    k = len(values) - 1
    gap = values[k - 1] - values[k]
    later = values[BLOCK_WIDTH - 1 : k]
    if (values[: len(later)] - later < COPY_SHARE * gap).any():
        return None
    residual = operator.lift(operator.apply(metric_pairs) - pairs * values)
    error = (residual.norm(dim=0) / (values - values[k]).clamp_min(gap)).norm()
    left = operator.lift(pairs[:, :k])
    gram, identity = left.T @ left, torch.eye(k, dtype=left.dtype, device=left.device)
    if max(float(error), float((gram - identity).norm())) > PROJECTOR_TOLERANCE:
        return None
    # One Newton step squares what is missing to orthonormality, and keeps the vectors in their places.
    return left @ (1.5 * identity - 0.5 * gram)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T, (n, n)."""
    if x.device.type != "cpu":
        return x @ x.T
    # NumPy sees that both factors are one array, and computes half of the product (BLAS's syrk, which PyTorch lacks).
    rows = x.numpy(force=True)
    return torch.from_numpy(rows @ rows.T)


def _orthonormalise(
    block: torch.Tensor, basis: torch.Tensor, metric_basis: torch.Tensor, operator: _Operator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q with Q^T metric(Q) = I and basis^T metric(Q) = 0, metric(Q), and C such that Q C is the block less its part in
    the basis's span.

    By the eigenvectors of the small Gram matrix, because threaded Householder QR of a tall block is slower than all
    else here.
    """
    block = block - basis @ (metric_basis.T @ block)
    block, metric_block, whole = _normalise(block, operator.metric(block), operator)
    lengths = whole.norm(dim=1)
    if len(lengths) and float(lengths.max() / lengths.min()) > MOST_SPREAD:
        metric_block = operator.metric(block)
    # Of directions that are all but in the span the first pass leaves rounding; two more make it orthogonal, too. What
    # they take off is small, and so is what its metric is off by.
    for _ in range(2):
        part = metric_basis.T @ block
        block, metric_block, factor = _normalise(block - basis @ part, metric_block - metric_basis @ part, operator)
        whole = factor @ whole
    return block, metric_block, whole


def _normalise(
    block: torch.Tensor, metric_block: torch.Tensor, operator: _Operator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q with Q^T metric(Q) = I, metric(Q), and C such that Q C is the block, given with its metric."""
    gram = block.T @ metric_block
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    block, metric_block = block @ vectors, metric_block @ vectors
    kept = values > RESOLUTION * operator.metric_norm * block.square().sum(dim=0)
    lengths = values[kept].sqrt()
    return block[:, kept] / lengths, metric_block[:, kept] / lengths, (vectors[:, kept] * lengths).T
