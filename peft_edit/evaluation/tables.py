"""Scores of the questions -> measures with intervals, of an edited model against its base model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .metrics import METRICS, Scores, shift
from .options import EvaluationOptions
from .statistics import Statistic, interval, mcnemar, resamples


# Measures that say of each question whether it is right: McNemar's test is for them.
OF_RIGHT = ("mc1", "bbq_accuracy")


class MeasureTables:
    """Statistics of the scores, with intervals."""

    def __init__(
        self,
        data: Dataset,
        wanted: Sequence[str],
        before: Scores | None,
        after: Scores,
        options: EvaluationOptions,
    ):
        self.data, self.before, self.after = data, before, after
        metrics = [METRICS[name] for name in wanted if name in METRICS]
        self.of_model = _joined(metric(data, after) for metric in metrics)
        self.of_base = {} if before is None else _joined(metric(data, before) for metric in metrics)
        self.of_both = shift(before, after) if "shift" in wanted else {}
        self.seed = options.bootstrap_seed
        self.counts = resamples(len(data), options.resamples, self.seed)

    def measures(self) -> dict[str, dict[str, float | None]]:
        """Of all questions."""
        of_base = self.of_base
        return {
            name: {**_measure(statistic, of_base.get(name), self.counts), "p_value": self._p_value(name)}
            for name, statistic in {**self.of_model, **self.of_both}.items()
        }

    def _p_value(self, name: str) -> float | None:
        if name not in OF_RIGHT or name not in self.of_base:
            return None
        return mcnemar(self.of_base[name].summands[:, 0], self.of_model[name].summands[:, 0])

    def categories(self) -> dict[str, dict[str, Any]]:
        """Of the questions of each category, where they have one."""
        names = np.array([row["category"] or "" for row in self.data])
        return {str(name): self._category(names == name) for name in sorted(set(names) - {""})}

    def _category(self, chosen: np.ndarray) -> dict[str, Any]:
        counts = resamples(int(chosen.sum()), len(self.counts), self.seed)
        of_base = {name: statistic.of(chosen) for name, statistic in self.of_base.items()}
        measures = {
            name: _measure(statistic.of(chosen), of_base.get(name), counts)
            for name, statistic in {**self.of_model, **self.of_both}.items()
        }
        return {"questions": int(chosen.sum()), "measures": measures}


def _measure(statistic: Statistic, base: Statistic | None, counts: np.ndarray) -> dict[str, float | None]:
    """A statistic of some questions and its interval; the base model's, and the interval of the difference by the same
    resamples (r, n)."""
    resampled = statistic.resampled(counts)
    found = {"value": _number(statistic.value), **_bounds("", resampled)}
    if base is None:
        return found | dict.fromkeys(("base", "difference", "difference_low", "difference_high"))
    return {
        **found,
        "base": _number(base.value),
        "difference": _number(statistic.value - base.value),
        **_bounds("difference_", resampled - base.resampled(counts)),
    }


def _joined(found: Iterable[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    return {name: statistic for statistics in found for name, statistic in statistics.items()}


def _bounds(prefix: str, values: np.ndarray) -> dict[str, float | None]:
    low, high = interval(values) or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
