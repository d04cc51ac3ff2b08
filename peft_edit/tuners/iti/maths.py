"""Inference-Time Intervention: a logistic probe for each attention head, and the direction and step of each.

Source: "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model" (ITI), NeurIPS 2023,
arXiv 2306.03341, sections 3 and 4. d is the width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


# Newton's steps after which a probe that goes on to change is an error; a dozen are usual.
MAX_STEPS = 200
MAX_HALVINGS = 40
# A probe is found where a step would lower its objective by no more than this share, which is above rounding.
TOLERANCE = 1e-13
# Keeps the Hessian regular where all rows are classified with certainty; far below any curvature that matters.
RIDGE = 1e-12


def fit_probes(x: Tensor, y: Tensor, l2: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic regression of each head by Newton's method, all heads at once.

    Minimises sum_i log(1 + exp(-s_i (w . x_i + b))) + l2 |w|^2 / 2 with s = 2 y - 1, as scikit-learn's
    `LogisticRegression` does, by which the paper fits its probes; the intercept b is not penalised.

    Args:
        x: (heads, n, d), computed with in float64.
        y: (n,), 1 for positive and 0 for negative; both occur.
        l2: above 0.

    Returns:
        w, (heads, d), and b, (heads,), float64.

    Raises:
        ValueError: it does not converge.
    """
    rows = functional.pad(x.double(), (0, 1), value=1.0)  # (heads, n, d + 1)
    signs = 2 * y.double() - 1
    penalty = torch.full((rows.shape[-1],), l2, dtype=torch.float64)
    penalty[-1] = 0
    found = rows.new_zeros(len(rows), rows.shape[-1])
    for _ in range(MAX_STEPS):
        gradient, hessian = _derivatives(rows, signs, penalty, found)
        step = torch.linalg.solve(hessian, gradient)
        slope = (gradient * step).sum(dim=1)  # twice what the step would lower the objective by
        objective = _objective(rows, signs, penalty, found)
        moving = slope > TOLERANCE * (1 + objective)
        if not moving.any():
            return found[:, :-1], found[:, -1]
        step, slope = (moving[:, None] * step, moving * slope)
        found = found - _length(rows, signs, penalty, found, step, slope, objective)[:, None] * step
    raise ValueError("the probes do not converge: check the activations")


def _margins(rows: Tensor, signs: Tensor, parameters: Tensor) -> Tensor:
    """s (w . x + b), (heads, n)."""
    return signs * torch.bmm(rows, parameters.unsqueeze(2)).squeeze(2)


def _objective(rows: Tensor, signs: Tensor, penalty: Tensor, parameters: Tensor) -> Tensor:
    loss = functional.softplus(-_margins(rows, signs, parameters)).sum(dim=1)
    return loss + (penalty * parameters.square()).sum(dim=1) / 2


def _derivatives(rows: Tensor, signs: Tensor, penalty: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient, (heads, d + 1), and Hessian, (heads, d + 1, d + 1)."""
    wrong = torch.sigmoid(-_margins(rows, signs, parameters))  # (heads, n)
    gradient = penalty * parameters - torch.bmm((signs * wrong).unsqueeze(1), rows).squeeze(1)
    curvature = torch.bmm(rows.mT, (wrong * (1 - wrong)).unsqueeze(2) * rows) + torch.diag(penalty)
    scale = curvature.diagonal(dim1=1, dim2=2).amax(dim=1)
    return gradient, curvature + RIDGE * scale[:, None, None] * torch.eye(len(penalty), dtype=rows.dtype)


def _length(
    rows: Tensor, signs: Tensor, penalty: Tensor, parameters: Tensor, step: Tensor, slope: Tensor, objective: Tensor
) -> Tensor:
    """How much of a step makes the objective of each head smaller, (heads,) (Armijo's rule)."""
    length = torch.ones_like(objective)
    for _ in range(MAX_HALVINGS):
        after = _objective(rows, signs, penalty, parameters - length[:, None] * step)
        enough = after <= objective - 1e-4 * length * slope + 1e-15 * objective
        if enough.all():
            break
        length = torch.where(enough, length, length / 2)
    return torch.where(enough, length, 0)


def accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Share of rows that each head's probe gets right, (heads,). x is (heads, n, d), y is (n,)."""
    logits = torch.bmm(x.double(), weight.unsqueeze(2)).squeeze(2) + bias[:, None]
    return ((logits > 0) == (y > 0)).double().mean(dim=1)


def mass_mean_shift(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Direction theta of each head, the normalised difference of the means of positive and negative rows, and the
    standard deviation sigma of all rows along it.

    Args:
        x: (heads, n, d).
        y: (n,), 1 for positive and 0 for negative; both occur.

    Returns:
        theta, (heads, d), zero where the means are equal, and sigma, (heads,), float64.
    """
    x = x.double()
    shift = x[:, y > 0].mean(dim=1) - x[:, y <= 0].mean(dim=1)
    theta = functional.normalize(shift, dim=1, eps=torch.finfo(torch.float64).tiny)
    return theta, torch.bmm(x, theta.unsqueeze(2)).squeeze(2).std(dim=1, correction=0)
