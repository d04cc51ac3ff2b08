"""What an evaluation measures: the metrics that can be asked for, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import Dataset

from ..arguments import Argument, ArgumentError, check_options
from ..data.prompts import PromptOptions
from .metrics import METRICS, check_columns, suited
from .statistics import RESAMPLES, SEED


# Metrics of plain text to what `SideEffects` calls them.
OF_TEXTS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("perplexity", "base_perplexity", "perplexity_ratio"),
    "kl": ("kl_mean", "kl_p95"),
    "touched": ("touched",),
    "norms": ("norm_change", "angle", "sites"),
}
# Metrics that compare an edited model with the base model.
OF_EDITS = ("touched", "norms")
OF_TWO = ("shift", "kl", *OF_EDITS)
ALL_METRICS = (*METRICS, "shift", *OF_TEXTS)


@dataclass(kw_only=True)
class EvaluationOptions(PromptOptions):
    """What is measured, and how.

    Attributes:
        metrics: of mc, bbq, crows_pairs, shift, perplexity, kl, touched and norms; None for those that the data are
            made for, with what an adapter and texts add.
        base: whether the base model is measured too, with the adapters disabled.
        batch_size: most answers, or texts, in a forward pass.
        resamples: of the questions, for the intervals.
        bootstrap_seed: of the resamples.
    """

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Of {', '.join(ALL_METRICS)}. Default: all that suit.",
            "option": "--metrics",
        },
    )
    base: bool = field(default=True, metadata={"help": "Measure the base model too, beside the adapter."})
    batch_size: int = field(
        default=16,
        metadata={"help": "Most answers, or texts, in a forward pass.", "minimum": 1, "allowed": "of at least 1"},
    )
    resamples: int = field(
        default=RESAMPLES,
        metadata={"help": "Of the questions, for the intervals.", "minimum": 1, "allowed": "of at least 1"},
    )
    bootstrap_seed: int = field(
        default=SEED, metadata={"help": "Of the resamples.", "minimum": 0, "allowed": "of at least 0"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self, tuple(EvaluationOptions.__annotations__))


def wanted_metrics(options: EvaluationOptions, data: Dataset, has_adapters: bool, has_texts: bool) -> list[str]:
    """Names of the metrics, in the order of `ALL_METRICS`.

    Args:
        options: as given.
        data: a contrast set.
        has_adapters: whether adapters are active.
        has_texts: whether there are texts for side effects.

    Raises:
        ValueError: a metric is unknown, or lacks the columns, the texts, the adapter or the base model that it needs.
    """
    if options.metrics is None:
        found = [*suited(data), "shift", *(OF_TEXTS if has_texts else ())]
        compares = has_adapters and options.base
        return [name for name in ALL_METRICS if name in found and (compares or name not in OF_TWO)]
    if not options.metrics:
        raise ArgumentError(Argument("metrics"), f" must be some of {', '.join(ALL_METRICS)}, got none")
    for name in options.metrics:
        if name not in ALL_METRICS:
            raise ArgumentError(Argument("metrics"), f" must be of {', '.join(ALL_METRICS)}, got {name!r}")
        if name in OF_TEXTS and not has_texts:
            raise ArgumentError(
                Argument("metrics"), f": {name} needs ", Argument("texts"), ": pass some, or leave it out"
            )
        if name in OF_TWO and not has_adapters:
            raise ArgumentError(
                Argument("metrics"), f": {name} compares an edited model with its base model, and no adapter is active"
            )
        if name in OF_TWO and not options.base:
            raise ArgumentError(
                *(Argument("metrics"), f": {name} needs the base model: leave out "),
                Argument("base", False),
            )
    check_columns(data, options.metrics)
    return [name for name in ALL_METRICS if name in options.metrics]
