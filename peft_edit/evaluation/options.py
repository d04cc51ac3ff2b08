"""What an evaluation measures: the metrics that can be asked for, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..arguments import check_options
from ..data.options import PromptOptions


# Resamples of the questions for the intervals, and the seed of these.
RESAMPLES, SEED = 2000, 0
# Metrics of the answers' scores.
OF_ANSWERS = ("mc", "bbq", "crows_pairs")
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
ALL_METRICS = (*OF_ANSWERS, "shift", *OF_TEXTS)


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
