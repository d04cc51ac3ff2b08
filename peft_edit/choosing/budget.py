"""How much damage an edit may do, and which setting is chosen within it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..arguments import Argument, ArgumentError, nearest
from ..evaluation.side_effects import HIGH, SideEffectsMeter


DEFAULT = {"perplexity_ratio": 1.05, "kl_p95": 0.5}
# Measures of `SideEffects` that can have a limit, to their values without any damage.
UNHARMED = {"perplexity_ratio": 1.0, "kl_mean": 0.0, "kl_p95": 0.0, "touched": 0.0, "norm_change": 0.0, "angle": 0.0}
# A perplexity ratio is taken for what it will be when so large a share of the tokens is read, and it is over its limit
# for hopeless settings by this factor: the rest would have to undo it.
READ_SHARE, CLEARLY = 0.25, 2.0


@dataclass(frozen=True)
class Budget:
    """Limits of damage.

    Attributes:
        limits: name of a measure of `SideEffects` to its largest value, inclusive.
    """

    limits: Mapping[str, float]

    def __post_init__(self):
        for name, limit in self.limits.items():
            if name not in UNHARMED:
                raise ArgumentError(
                    Argument("budget"), f" limits {name!r}, which it has not{nearest(str(name), UNHARMED)}"
                )
            number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
            if not number or not UNHARMED[name] < limit < math.inf:
                raise ArgumentError(
                    Argument("budget"), f" must limit {name} to a number above {UNHARMED[name]:g}, got {limit!r}"
                )
        if not self.limits:
            raise ArgumentError(Argument("budget"), " limits nothing: pass for example ", Argument("budget", DEFAULT))

    def share(self, name: str, value: float | None) -> float:
        """Which share of its limit a measure uses: 0 unharmed, 1 at the limit. Without a value 0: adapters that edit
        no activations have no such measure."""
        unharmed = UNHARMED[name]
        return 0.0 if value is None else (value - unharmed) / (self.limits[name] - unharmed)

    def damage(self, effects: Mapping[str, Any]) -> float:
        """The largest share of a limit that some side effects use: at most 1 within the budget."""
        return max(self.share(name, effects[name]) for name in self.limits)

    def hopeless(self, meter: SideEffectsMeter, tokens: int, factor: float) -> str | None:
        """Why a setting's damage is known to be more than `factor` budgets before all texts are read, or None.

        Args:
            meter: of what was read so far.
            tokens: predicted tokens of all texts.
            factor: of the budget, 1 or more.
        """
        if "kl_p95" in self.limits:
            limit = factor * self.limits["kl_p95"]
            above = int((meter.kl > limit).sum())
            if above >= tokens - math.floor(HIGH * (tokens - 1)):  # the percentile is among these, whatever follows
                return f"kl_p95 is certain to be above {limit:g}: {above} of {tokens} tokens are"
        if "kl_mean" in self.limits:
            limit = factor * self.limits["kl_mean"]
            least = float(meter.kl.double().sum()) / tokens  # no token's is below 0
            if least > limit:
                return f"kl_mean is certain to be above {limit:g}: it is at least {least:.3g}"
        read = meter.tokens >= READ_SHARE * tokens
        if "perplexity_ratio" in self.limits and read:
            ratio = meter.perplexity_ratio
            if self.share("perplexity_ratio", ratio) > CLEARLY * factor:
                return f"perplexity_ratio is {ratio:.3g} after {meter.tokens} of {tokens} tokens"
        return None


class Tried(Protocol):
    """What choosing looks at."""

    damage: float
    benefit: float | None
    of_questions: Sequence[float] | None


T = TypeVar("T", bound=Tried)


def choose(tried: Sequence[T]) -> T | None:
    """Of the settings within the budget that whose benefit is the greatest, and of all within one standard error of
    it that with the least damage; of equal ones the first. None where none is within the budget.

    All settings answer the same questions, so that the standard error is that of the difference of two settings, over
    the questions: much smaller than that of either alone.
    """
    within = [found for found in tried if found.damage <= 1 and found.benefit is not None]
    if not within:
        return None
    best = max(within, key=lambda found: found.benefit)
    return min((found for found in within if _as_good(found, best)), key=lambda found: found.damage)


def _as_good(found: Tried, best: Tried) -> bool:
    """Whether a setting's benefit is within one standard error of the difference from the best one's."""
    pairs = zip(best.of_questions, found.of_questions, strict=True)
    differences = torch.tensor([greatest - other for greatest, other in pairs], dtype=torch.float64)
    if len(differences) < 2:  # whose deviation nobody knows
        return bool(differences.mean() <= 0)
    return bool(differences.mean() <= differences.std() / math.sqrt(len(differences)))


def front(tried: Sequence[T]) -> list[T]:
    """The settings than which none has both more benefit and less damage, the least damage first. Of equal ones the
    first."""
    measured = sorted(
        (found for found in tried if found.benefit is not None), key=lambda found: (found.damage, -found.benefit)
    )
    best, members = -math.inf, []
    for found in measured:
        if found.benefit > best:
            best = found.benefit
            members.append(found)
    return members
