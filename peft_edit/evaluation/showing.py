"""Measures and side effects as tables show them: in percent, nats and degrees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


# Measures as tables call them, in percent.
LABELS = {
    "mc1": "MC1",
    "mc2": "MC2",
    "bbq_accuracy": "BBQ accuracy",
    "bbq_unknown_rate": "BBQ unknown answers",
    "bbq_stereotype_rate": "BBQ stereotyped answers",
    "bbq_bias_disambiguated": "BBQ bias, disambiguated",
    "bbq_bias_ambiguous": "BBQ bias, ambiguous",
    "crows_stereotype_rate": "CrowS-Pairs stereotyping sentences",
    "false_to_true": "false to true",
    "true_to_false": "true to false",
    "remains_true": "remains true",
    "remains_false": "remains false",
    "corrected_rate": "corrected of the wrong ones",
    "corrupted_rate": "corrupted of the right ones",
}
# Of these, the shift from the base model's answers.
SHIFT = ("false_to_true", "true_to_false", "remains_true", "remains_false", "corrected_rate", "corrupted_rate")
# What is told of side effects: its name in tables, the factor there and the decimals.
SIDE_EFFECTS = {
    "perplexity": ("perplexity", 1, 3),
    "perplexity_ratio": ("ratio", 1, 3),
    "kl_mean": ("KL, mean, nats", 1, 3),
    "kl_p95": ("KL, 95th percentile, nats", 1, 3),
    "touched": ("tokens touched %", 100, 1),
    "norm_change": ("change of norm %", 100, 1),
    "angle": ("angle, degrees", 180 / math.pi, 1),
}


def percent(value: float | None, sign: str = "", decimals: int = 1) -> str:
    """A share in percent, "" for None."""
    return "" if value is None else f"{100 * value:{sign}.{decimals}f}"


def measure_cell(measure: Mapping[str, float | None], base: float | None = None) -> str:
    """A value in percent, with the change from the base model's and its interval, where they are known: "65.0 (+25.0;
    +17.2 to +32.8)".

    Args:
        measure: of results.
        base: the base model's value where the measure itself has none.
    """
    base = measure["base"] if base is None else base
    if measure["value"] is None or base is None:
        return percent(measure["value"])
    low, high = measure["difference_low"], measure["difference_high"]
    bounds = "" if None in (low, high) else f"; {percent(low, '+')} to {percent(high, '+')}"
    return f"{percent(measure['value'])} ({percent(measure['value'] - base, '+')}{bounds})"


def side_effect_cells(effects: Mapping[str, Any]) -> dict[str, str]:
    """What is told of side effects, by name."""
    return {
        name: f"{factor * effects[name]:.{decimals}f}"
        for name, (_, factor, decimals) in SIDE_EFFECTS.items()
        if effects.get(name) is not None
    }
