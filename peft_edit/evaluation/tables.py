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
        self.counts = resamples(len(data), options.resamples, options.bootstrap_seed)

    def measures(self) -> dict[str, dict[str, float | None]]:
        """Of all questions."""
        alone = {**self.of_model, **self.of_both}
        return {
            name: {
                "value": _number(statistic.value),
                **_bounds("", statistic.resampled(self.counts)),
                **self._against_base(name, statistic),
            }
            for name, statistic in alone.items()
        }

    def _against_base(self, name: str, statistic: Statistic) -> dict[str, float | None]:
        base = self.of_base.get(name)
        if base is None:
            return dict.fromkeys(("base", "difference", "difference_low", "difference_high", "p_value"))
        differences = statistic.resampled(self.counts) - base.resampled(self.counts)
        right = base.summands[:, 0], statistic.summands[:, 0]
        return {
            "base": _number(base.value),
            "difference": _number(statistic.value - base.value),
            **_bounds("difference_", differences),
            "p_value": mcnemar(*right) if name in OF_RIGHT else None,
        }

    def categories(self) -> dict[str, dict[str, Any]]:
        """Of the questions of each category, where they have one."""
        names = np.array([row["category"] or "" for row in self.data])
        return {str(name): self._category(names == name) for name in sorted(set(names) - {""})}

    def _category(self, chosen: np.ndarray) -> dict[str, Any]:
        measures = {
            name: {
                "value": _number(statistic.of(chosen).value),
                "base": _number(self.of_base[name].of(chosen).value) if name in self.of_base else None,
            }
            for name, statistic in {**self.of_model, **self.of_both}.items()
        }
        return {"questions": int(chosen.sum()), "measures": measures}


def _joined(found: Iterable[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    return {name: statistic for statistics in found for name, statistic in statistics.items()}


def _bounds(prefix: str, values: np.ndarray) -> dict[str, float | None]:
    low, high = interval(values) or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
