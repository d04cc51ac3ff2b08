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
# Largest element of the gradient, as a share of that which all rows could add up to, at which a probe is found.
TOLERANCE = 1e-10
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
    largest = rows.abs().sum(dim=1).amax(dim=1)  # (heads,)
    found = rows.new_zeros(len(rows), rows.shape[-1])
    for _ in range(MAX_STEPS):
        gradient, hessian = _derivatives(rows, signs, penalty, found)
        if (gradient.abs().amax(dim=1) <= TOLERANCE * largest).all():
            return found[:, :-1], found[:, -1]
        step = torch.linalg.solve(hessian, gradient)
        taken = _descend(rows, signs, penalty, found, gradient, step)
        if torch.equal(taken, found):  # to the last bit: rounding leaves nothing to gain
            return found[:, :-1], found[:, -1]
        found = taken
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


def _descend(
    rows: Tensor, signs: Tensor, penalty: Tensor, parameters: Tensor, gradient: Tensor, step: Tensor
) -> Tensor:
    """Parameters after as much of a step as makes the objective of each head smaller (Armijo's rule)."""
    before = _objective(rows, signs, penalty, parameters)
    slope = (gradient * step).sum(dim=1)
    length = torch.ones_like(before)
    for _ in range(MAX_HALVINGS):
        after = _objective(rows, signs, penalty, parameters - length[:, None] * step)
        enough = after <= before - 1e-4 * length * slope
        if enough.all():
            break
        length = torch.where(enough, length, length / 2)
    return parameters - torch.where(enough, length, 0)[:, None] * step


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
