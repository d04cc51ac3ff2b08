"""Spectral Editing of Activations: the fit, the edit and its linear form for merging.

Source: "Spectral Editing of Activations for Large Language Model Alignment" (SEA), NeurIPS 2024, arXiv 2405.09719.
Rows are samples, n demonstrations, d the hidden size, k a rank. A basis is (k, d) with orthonormal rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Argument, ArgumentError, check_choice, parts_of
from .spectra import LeftFactor, Spectrum


Rescale = Literal["token", "none", "mean", "average"]
Projections = Literal["both", "positive", "negative", "exchanged"]
FeatureSpace = Literal["activation", "feature"]
Projection = Callable[[Tensor], Tensor]

# The inverse feature maps diverge at the ends of their domain: arguments stay this far inside (the published value).
DOMAIN_MARGIN = 1e-4
# Elements that are merged at once: few enough for the caches and for their copies to need no memory that counts.
MERGE_NUMEL = 2**20


def project(x: Tensor, basis: Tensor, columns: bool = False) -> Tensor:
    """Orthogonal projection of x, (..., d), or of its columns, (d, n), onto the span of basis, (k, d), by two thin
    products in x's dtype."""
    basis = basis.to(x.dtype)
    return basis.T @ (basis @ x) if columns else (x @ basis.T) @ basis


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map phi and its inverse, which also sees phi's input because not every phi is injective."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]


def _squared_exponential_inverse(z: Tensor, x: Tensor) -> Tensor:
    return torch.sign(x) * (-2 * torch.log(z.clamp(DOMAIN_MARGIN, 1))).sqrt()


def _elu_inverse(z: Tensor, x: Tensor) -> Tensor:
    return torch.where(z >= 0, z, torch.log1p(z.clamp(-1 + DOMAIN_MARGIN, 0)))


FEATURE_MAPS: dict[str, FeatureMap] = {
    "tanh": FeatureMap(torch.tanh, lambda z, x: torch.atanh(z.clamp(-1 + DOMAIN_MARGIN, 1 - DOMAIN_MARGIN))),
    "squared_exponential": FeatureMap(lambda x: torch.exp(-x.square() / 2), _squared_exponential_inverse),
    "elu": FeatureMap(functional.elu, _elu_inverse),
}


# Argument of `edit` to what it can be.
CHOICES = {
    "projections": get_args(Projections),
    "feature_map": (None, *FEATURE_MAPS),
    "feature_space": get_args(FeatureSpace),
    "rescale": get_args(Rescale),
}


@dataclass(frozen=True)
class Fit:
    """Result of `fit`: a thin factor for each sign, and how informative the site is."""

    positive: Spectrum
    negative: Spectrum
    signature: float


def fit(
    neutral: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    positive_energy: float = 0.998,
    negative_energy: float = 0.998,
    centered: bool = False,
    feature_map: str | None = None,
    scale: float = 1.0,
    retained: Tensor | None = None,
) -> Fit:
    """Leading left singular vectors of Omega+ = H^T H+ / n and Omega- = H^T H- / n (SEA), in float64.

    Args:
        neutral, positive, negative: (n, d) each, row i of the three is one demonstration.
        positive_energy, negative_energy: share of the squared singular values that the kept directions carry, in (0,
            1].
        centered: subtract each set's mean over the demonstrations first (ours; the paper does not).
        feature_map: name in `FEATURE_MAPS` to fit on phi(x / scale) (Phi-SEA).
        scale: divisor of the activations before the feature map, > 0.
        retained: (k, d), basis of directions that the edit shall not touch (ours): the sets are projected off them, so
            that the factors lie in their complement.

    Raises:
        ValueError: shapes differ, fewer than two demonstrations, activations that are not finite, an energy outside
            (0, 1], or a cross-covariance that is zero.

    Departs from the published code: phi is applied (there it is thrown away), and an energy of 1 keeps the numerical
    rank (there it can keep nothing).
    """
    check_choice("feature_map", feature_map, CHOICES["feature_map"])
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be above 0 and finite, got {scale}: are all neutral activations zero?")
    shape = tuple(neutral.shape)
    if not len(shape) == 2 or not shape == tuple(positive.shape) == tuple(negative.shape):
        raise ValueError(
            "neutral, positive and negative must all be (demonstrations, hidden size), "
            f"got {shape}, {tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    if shape[0] < 2:
        raise ValueError(f"a fit needs at least 2 demonstrations, got {shape[0]}")
    for name, energy in (("positive_energy", positive_energy), ("negative_energy", negative_energy)):
        check_energy(name, energy)
    if retained is not None and len(retained) == shape[1]:
        raise ArgumentError(
            "the retain set spans all directions, none is left to edit: lower ", Argument("retain_energy")
        )
    sets = []
    for name, activations in (("neutral", neutral), ("positive", positive), ("negative", negative)):
        check_finite(name, activations)
        activations = activations.double()
        if feature_map is not None:
            activations = FEATURE_MAPS[feature_map].forward(activations / scale)
        activations = activations - activations.mean(dim=0) if centered else activations
        sets.append(activations if retained is None else activations - project(activations, retained))
    left, spectra = LeftFactor(sets[0]), []
    for name, answers, energy in (("positive", sets[1], positive_energy), ("negative", sets[2], negative_energy)):
        try:
            spectra.append(left.decompose(answers, energy))
        except ValueError as error:
            raise ArgumentError(f"{name} activations: ", *parts_of(error)) from error
    return Fit(*spectra, signature=signature(positive, negative))


def check_energy(name: str, energy: float) -> None:
    """Raise ValueError unless energy is a share in (0, 1]."""
    if not 0 < energy <= 1:
        remedy = f": pass {energy / 100:g}" if 50 <= energy <= 100 else ""
        raise ArgumentError(Argument(name), f" must be in (0, 1], got {energy}{remedy}")


def check_finite(name: str, activations: Tensor) -> None:
    """Raise ValueError naming the first row of activations, (n, d), that holds a NaN or an infinity."""
    if activations.sum().isfinite():  # the cheap look: a sum hides no NaN or infinity
        return
    bad = ~torch.isfinite(activations).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{name} activations must be finite: {int(bad.sum())} of {len(bad)} rows are not, "
            f"the first is row {int(bad.nonzero()[0])}; drop those demonstrations or collect them in a wider dtype"
        )


def signature(positive: Tensor, negative: Tensor) -> float:
    """How much a site tells the two behaviours apart: the sum of the singular values of E^T L / n (SEA).

    E, (2n, d), stacks the positive and negative activations, (n, d) each; L, (2n, 2), holds their one-hot labels. So
    the two columns of E^T L / n are the mean activations.
    """
    means = torch.stack((positive.double().mean(dim=0), negative.double().mean(dim=0)))  # (2, d)
    return float(torch.linalg.svdvals(means).sum())


def edit(
    h: Tensor,
    positive: Projection,
    negative: Projection,
    *,
    projections: Projections = "both",
    feature_map: str | None = None,
    feature_space: FeatureSpace = "activation",
    scale: float = 1.0,
    rescale: Rescale = "token",
    mean_rescale: float = 1.0,
    strength: float = 1.0,
) -> Tensor:
    """Edit activations: out = rescale(P+ h + P- h), P+ = U+ U+^T, P- = I - U- U-^T (SEA).

    A token's output depends on that token alone. Products run in h's dtype (with a feature map in float32, whose
    inverse amplifies rounding), norms and scalars in float32 or wider.

    Args:
        h: (..., d), any floating dtype; not changed.
        positive, negative: the orthogonal projections x -> U U^T x, see `project`.
        projections: which of P+ and P- are used; "exchanged" swaps U+ and U- (reverse editing).
        feature_map: name in `FEATURE_MAPS`, for phi^-1(P+ phi(h)) + phi^-1(P- phi(h)).
        feature_space: where the two are added: "activation" after phi^-1, as in the paper; "feature" before it, so that
            equal bases make the identity.
        scale: h is divided by it before phi and the result multiplied by it.
        rescale: "token" keeps each token's norm; "none"; "mean" multiplies by `mean_rescale`; "average" halves.
        strength: 0 returns h, 1 the edit, more is allowed; "token" keeps norms at every strength.

    Returns:
        (..., d), h's dtype.

    Departs from the published code: it takes the norm per feature over all tokens of all sequences of a batch, so
    that a token's output depends on later tokens and on its neighbours. That variant is not offered.
    """
    given = {"projections": projections, "feature_map": feature_map, "feature_space": feature_space, "rescale": rescale}
    for name, value in given.items():
        if value not in CHOICES[name]:
            check_choice(name, value, CHOICES[name])
    wide = torch.promote_types(h.dtype, torch.float32)
    # As a matrix, which each product would make of it again.
    shape, h = h.shape, h.reshape(-1, h.shape[-1])
    x = h.to(wide)
    if projections == "exchanged":
        positive, negative = negative, positive
    if feature_map is None:
        # P- alone can remove nearly all of h, and would leave the rounding of half precision products.
        y = _combine(x if projections == "negative" else h, positive, negative, projections, wide)
    else:
        phi = FEATURE_MAPS[feature_map]
        x_scaled = x / scale
        z = phi.forward(x_scaled)
        if feature_space == "feature" or projections in ("positive", "negative"):
            y = phi.inverse(_combine(z, positive, negative, projections, wide), x_scaled) * scale
        else:
            y = (phi.inverse(positive(z), x_scaled) + phi.inverse(z - negative(z), x_scaled)) * scale

    if rescale == "mean":
        y = mean_rescale * y
    elif rescale == "average":
        y = y / 2
    if strength != 1:
        y = x + strength * (y - x)
    if rescale == "token":
        norm, x_norm = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (y, x))
        # Divided by infinity, what has no direction becomes zero, and its gradient too.
        y = y * (x_norm / norm.masked_fill(norm <= rounding(h.dtype) * x_norm, float("inf")))
    return y.to(h.dtype).reshape(shape)


def edit_at_once(
    h: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    rescale: Rescale,
    mean_rescale: float,
    strength: float,
    add: Callable[[Tensor, Tensor, Tensor, float, float, float], Tensor] | None = None,
    in_python: bool = False,
) -> Tensor:
    """`edit` with both projections and no feature map in fewer operators, for values alone: it is not differentiable.

    Args:
        h: (..., d), float32 or wider, in half precision with `add` alone; not changed.
        positive, negative: U+^T and U-^T, (k, d) each, h's dtype.
        rescale, mean_rescale, strength: as of `edit`.
        add: a kernel for the sum with norms kept, see `kernels.add`.
        in_python: whether to compute what is one number for each token in Python, on a CPU.

    Returns:
        (..., d), h's dtype.
    """
    flat = h.reshape(-1, h.shape[-1])
    constant = {"mean": mean_rescale, "average": 0.5}.get(rescale, 1.0)
    # h + strength (constant (h + P+ h - (I - P-) h) - h)
    own, factor = 1 + strength * (constant - 1), strength * constant
    if add is not None:
        least = rounding(h.dtype) if rescale == "token" else None
        changes = ((flat @ basis.T) @ basis for basis in (positive, negative))
        return add(flat, *changes, own, factor, least).reshape(h.shape)
    y = torch.addmm(flat, functional.linear(flat, positive), positive, beta=own, alpha=factor)
    y = y.addmm_(functional.linear(flat, negative), negative, alpha=-factor)
    if rescale != "token":
        return y.reshape(h.shape)
    # Divided by infinity, what has no direction becomes zero.
    if in_python:
        least = rounding(h.dtype)
        norms = zip(*(torch.linalg.vector_norm(v, dim=-1).tolist() for v in (y, flat)), strict=True)
        ratios = [x_norm / (norm if not norm <= least * x_norm else math.inf) for norm, x_norm in norms]
        y.mul_(ratios[0] if len(ratios) == 1 else y.new_tensor(ratios).unsqueeze(1))
    else:
        ratio, x_norm = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (y, flat))
        ratio.div_(x_norm.clamp_min_(torch.finfo(h.dtype).tiny))
        y.div_(torch.threshold_(ratio, rounding(h.dtype), float("inf")))
    return y.reshape(h.shape)


def rounding(dtype: torch.dtype) -> float:
    """Share of ||h|| below which y is zero or rounding, as for a token that is removed altogether: it has no direction
    to rescale. Products are rounded to h's dtype; sums over d, in float32 or wider, lose some bits more."""
    wide = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, 64 * torch.finfo(wide).eps)


def _combine(x: Tensor, positive: Projection, negative: Projection, projections: str, wide: torch.dtype) -> Tensor:
    """The sum of the chosen ones of P+ x and P- x = x - negative(x)."""
    if projections == "positive":
        return positive(x).to(wide)
    if projections == "negative":
        return x.to(wide) - negative(x).to(wide)
    return x.to(wide) + (positive(x).to(wide) - negative(x).to(wide))


def merge(
    weight: Tensor,
    positive: Projection,
    negative: Projection,
    *,
    projections: Projections = "both",
    rescale: Rescale = "token",
    mean_rescale: float = 1.0,
    strength: float = 1.0,
) -> Tensor:
    """Apply the edit's linear form to a weight or a bias: W' = c M W.

    Exact for "none", "mean" and "average", which are linear in h. "token" is not: it becomes its mean rescale, whose
    relative error `rescale_statistics` gives. Two thin products, in float32 or wider, result in the weight's dtype.

    Args:
        weight: rows, (n, d), or columns, (d, n), of the width of the edited activations.
        positive, negative: the orthogonal projections of its rows or of its columns, see `project`.
        projections, rescale, mean_rescale, strength: as of `edit`.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    linear = "none" if rescale == "token" else rescale
    merged = edit(
        wide,
        positive,
        negative,
        projections=projections,
        rescale=linear,
        mean_rescale=mean_rescale,
        strength=strength,
    )
    return (mean_rescale * merged if rescale == "token" else merged).to(weight.dtype)


def merge_pieces(weight: Tensor, columns: bool, apply: Callable[[Tensor], Tensor], out: Tensor) -> None:
    """Apply a map such as `merge` to the rows of a weight, (n, d), or to its columns, (d, n).

    It goes in pieces of a size that follows from the shape alone, each copied first. So the result is the same to the
    last bit wherever the weight lies and whatever its strides are (on one processor with as many threads), it takes
    little memory, and `out` may be `weight`.
    """
    along = int(columns)
    step = max(1, MERGE_NUMEL // weight.shape[1 - along])
    for piece, target in zip(weight.split(step, dim=along), out.split(step, dim=along), strict=True):
        target.copy_(apply(piece.clone(memory_format=torch.contiguous_format)))


@dataclass(frozen=True)
class RescaleStatistics:
    """Ratio ||h|| / ||y|| over the neutral demonstrations.

    Attributes:
        mean: the constant c of `rescale="mean"`.
        deviation: its standard deviation.
        relative_error: sqrt(mean((c ||y|| / ||h|| - 1)^2)), what replacing the token's own ratio by c costs.
        unscaled_error: sqrt(mean((||y|| / ||h|| - 1)^2)), what leaving the rescaling out costs.
    """

    mean: float
    deviation: float
    relative_error: float
    unscaled_error: float


def rescale_statistics(neutral: Tensor, edited: Tensor) -> RescaleStatistics:
    """Statistics of ||h|| / ||y||; neutral h and unrescaled edit y are (n, d). Rows where one is zero have none."""
    h_norm, y_norm = neutral.double().norm(dim=1), edited.double().norm(dim=1)
    defined = (h_norm > 0) & (y_norm > rounding(torch.float64) * h_norm)
    if not defined.any():
        raise ArgumentError("the edit maps every neutral demonstration to zero: lower ", Argument("negative_energy"))
    ratio = h_norm[defined] / y_norm[defined]
    mean = ratio.mean()
    return RescaleStatistics(
        mean=float(mean),
        deviation=float(ratio.std(correction=0)),
        relative_error=float((mean / ratio - 1).square().mean().sqrt()),
        unscaled_error=float((1 / ratio - 1).square().mean().sqrt()),
    )
