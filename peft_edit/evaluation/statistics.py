"""Statistics of questions: intervals by the bootstrap, and McNemar's test.

Every statistic here is a function of what is summed over the questions. A resample of the questions is then a row of
counts, and all resamples are one matrix product. A base model and its edit are resampled alike, so that what differs
between them is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arguments import Argument, ArgumentError
from .options import RESAMPLES, SEED


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Statistic:
    """What is told of questions.

    Attributes:
        summands: (n, c), what is summed of each question.
        of_sums: sums (..., c) -> values (...); NaN where there is none, as of a share of nothing.
    """

    summands: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """Of all questions."""
        return float(self.of_sums(self.summands.sum(axis=0)))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """(r,), of each of r resamples; `counts` (r, n) says how often each question is in it."""
        return self.of_sums(counts @ self.summands)

    def of(self, chosen: np.ndarray) -> Statistic:
        """The same of some questions, which a boolean mask or their places choose."""
        return Statistic(self.summands[chosen], self.of_sums)


def mean(values: np.ndarray) -> Statistic:
    """Mean of (n,) values."""
    values = np.asarray(values, dtype=np.float64)
    return Statistic(np.stack([values, np.ones_like(values)], axis=1), lambda sums: share(sums[..., 0], sums[..., 1]))


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) != 0)


def resamples(questions: int, count: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(count, questions): how often each question is in each bootstrap resample of as many questions.

    Raises:
        ValueError: there is no question, or no resample.
    """
    for name, value in (("questions", questions), ("count", count)):
        if value < 1:
            raise ArgumentError(Argument(name), f" must be at least 1, got {value}")
    counts = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=count)
    return counts.astype(np.float64)


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Percentile interval of a statistic's resampled values; None where it has no value in one of 20 or more.

    Raises:
        ValueError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ArgumentError(Argument("confidence"), f" must be between 0 and 1, got {confidence}")
    defined = values[np.isfinite(values)]
    if len(defined) < CONFIDENCE * len(values):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """p-value of McNemar's exact test, two-sided: whether as many questions turn right as turn wrong.

    Args:
        before, after: (n,) booleans, whether each question is right.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)
