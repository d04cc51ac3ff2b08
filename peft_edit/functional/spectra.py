"""Leading left singular vectors of a cross-covariance that is never formed where it would be large.

Omega = X^T Y / n is (d, d), has rank at most n and is the product of two thin factors. Only its leading left singular
vectors are wanted, and its energy ||Omega||_F^2 is known beforehand (for n < d it is the trace of a product of two n
x n Gram matrices), so the decomposition stops as soon as they carry the requested share. No matrix larger than
min(n, d) squared is formed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch


# Up to this size of min(n, d) a complete decomposition takes a fraction of a second.
SMALL_CORE = 512
# Width of a Krylov block: narrow enough to waste nothing on a small rank, wide enough for fast matrix products.
BLOCK_WIDTH = 24
# Beyond this share of min(n, d) the complete decomposition is cheaper.
WIDEST_SHARE = 0.3
# Accepted bound on the error of the projector onto the leading vectors (residual over gap, Davis-Kahan).
PROJECTOR_TOLERANCE = 1e-9
# Directions of a block whose length shrank by more than this were already in the subspace.
DEPENDENCE = 1e-10
# The Gram matrix is built in this many strips, so that its symmetric half costs little more than half.
GRAM_STRIPS = 16


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
            raise ValueError("the cross-covariance of neutral and demonstration activations is zero: nothing to fit")
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

            def metric(a):
                return x_gram @ a

            def apply(metric_a):
                return y_gram @ metric_a
        else:
            omega = self.x.T @ y
            total = float(omega.square().sum())

            def metric(a):
                return a

            def apply(a):
                return omega @ (omega.T @ a)

        size = min(n, d)
        generator = torch.Generator(self.x.device).manual_seed(0)
        start = torch.randn(size, BLOCK_WIDTH, dtype=self.x.dtype, device=self.x.device, generator=generator)
        block, metric_block, _ = _orthonormalise(start, metric(start))
        basis, metric_basis = block, metric_block
        projected = start.new_empty(0, 0)  # (m, m), the operator in the Krylov basis
        while basis.shape[1] + BLOCK_WIDTH <= WIDEST_SHARE * size:
            image = apply(metric_block)
            columns = metric_basis.T @ image  # (m, width)
            above, below = columns[: len(projected)], columns[len(projected) :]
            projected = torch.cat((torch.cat((projected, above), dim=1), torch.cat((above.T, below), dim=1)))
            values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
            values, vectors = values.flip(0), vectors.flip(1)

            image = image - basis @ columns
            image = image - basis @ (metric_basis.T @ image)  # once more against rounding
            block, metric_block, coupling = _orthonormalise(image, metric(image))

            k = int((values.cumsum(dim=0) < ratio * total).sum()) + 1
            if k < len(values):
                tolerance = PROJECTOR_TOLERANCE * float(values[k - 1] - values[k])
                if torch.finfo(values.dtype).eps * float(values[0]) > tolerance:
                    return None  # squared Gram matrices cannot resolve so small a gap
                if float((coupling @ vectors[-coupling.shape[1] :, : k + 1]).norm()) < tolerance:
                    left = basis @ vectors[:, :k]
                    left = self.x.T @ left if n < d else left
                    q = _orthonormalise(left, left)[0]
                    return Spectrum(q.T.contiguous(), values[:k].sqrt() / n, float(values[:k].sum() / total))
            if block.shape[1] == 0:
                return None
            basis = torch.cat((basis, block), dim=1)
            metric_basis = torch.cat((metric_basis, metric_block), dim=1)
        return None


def _gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T, (n, n), its lower half computed and mirrored."""
    gram = x.new_empty(len(x), len(x))
    edges = [round(i * len(x) / GRAM_STRIPS) for i in range(GRAM_STRIPS + 1)]
    for low, high in itertools.pairwise(edges):
        strip = x[low:] @ x[low:high].T
        gram[low:, low:high] = strip
        gram[low:high, low:] = strip.T
    return gram


def _orthonormalise(block: torch.Tensor, metric_block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Basis Q of the block's span with Q^T metric(Q) = I, metric(Q), and C such that Q C is the block.

    By the eigenvectors of the small Gram matrix, because threaded Householder QR of a tall block is slower than all
    else here.
    """
    whole = torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
    for _ in range(2):  # the second pass removes the rounding of the first
        gram = block.T @ metric_block
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        kept = values > DEPENDENCE**2 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        values, vectors = values[kept], vectors[:, kept]
        down = vectors / values.sqrt()
        block, metric_block, whole = block @ down, metric_block @ down, (vectors * values.sqrt()).T @ whole
    return block, metric_block, whole
