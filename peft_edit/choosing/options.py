"""Options of a sweep and of a calibration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ..arguments import check_options
from ..data.options import PromptOptions


@dataclass(kw_only=True)
class SweepOptions(PromptOptions):
    """
    Options of a sweep.

    Args:
        method (`str`):
            Name of the method.
        criterion (`str`):
            The benefit: "mc2", the probability of the positive answers, or "mc1", the share of questions whose correct
            answer is the likeliest. Of a few dozen questions MC1 has as many values; MC2 is less coarse.
        budget (`dict[str, float]`, *optional*):
            Measure of damage to its largest value. By default a perplexity ratio of 1.05, and a 95th percentile of the
            divergence of 0.5 nats.
        hopeless (`float`):
            A setting whose damage is more than so many budgets is not asked for its benefit. The budget of a perplexity
            ratio counts from 1.
        batch_size (`int`):
            Most answers, and most texts, in a forward pass.
        memory (`float`):
            GiB for what is kept of the base model: its logits on the texts as much, and what enters its blocks, for
            texts and for questions as much each.
    """

    method: str = field(default="SEA", metadata={"help": "Name of the method, such as SEA, HPR, MEAN_DIFFERENCE."})
    criterion: Literal["mc2", "mc1"] = field(default="mc2", metadata={"help": "The benefit: mc2 (less coarse) or mc1."})
    budget: dict[str, float] | None = field(
        default=None,
        metadata={"help": 'Limits of damage as JSON. Default: \'{"perplexity_ratio": 1.05, "kl_p95": 0.5}\'.'},
    )
    hopeless: float = field(
        default=2.0,
        metadata={"help": "Settings over so many budgets stop early.", "minimum": 1, "allowed": "of 1 or more"},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Most answers or texts in a pass.", "minimum": 1, "allowed": "of at least 1"}
    )
    memory: float = field(
        default=2.0,
        metadata={"help": "GiB for what is shared.", "minimum": 0, "allowed": "of 0 or more and finite"},
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self, tuple(f.name for f in fields(SweepOptions)))


@dataclass(kw_only=True)
class CalibrationOptions:
    """
    Options of a calibration.

    Args:
        kl_p95 (`float`):
            The budget: largest 95th percentile of KL(base || edited) over the tokens, in nats.
        dial (`str`, *optional*):
            Field of the configuration that is set, by default the strength, of HPR and ITI `alpha`. Of HPR also "gate".
        maximum (`float`):
            Largest value that is tried, as a multiple of the configured one. 1 never makes an edit stronger.
        tolerance (`float`):
            Relative distance of the value that is found to one that is known to be too large.
        batch_size (`int`):
            Most texts in a forward pass.
        memory (`float`):
            GiB for the base model's logits, and as much for what enters its blocks.
    """

    kl_p95: float = field(
        default=0.5, metadata={"help": "Budget, in nats.", "above": 0, "allowed": "above 0 and finite"}
    )
    dial: str | None = field(
        default=None, metadata={"help": "Field that is set: strength, of HPR and ITI alpha, of HPR also gate."}
    )
    maximum: float = field(
        default=1.0,
        metadata={"help": "Largest multiple of the configured value.", "above": 0, "allowed": "above 0 and finite"},
    )
    tolerance: float = field(
        default=0.01,
        metadata={
            "help": "Relative distance to a value that is too large.",
            "minimum": 1e-6,
            "allowed": "in [1e-6, 0.5]",
            "maximum": 0.5,
        },
    )
    batch_size: int = field(
        default=16, metadata={"help": "Most texts in a forward pass.", "minimum": 1, "allowed": "of at least 1"}
    )
    memory: float = field(
        default=2.0, metadata={"help": "GiB for the base model's logits.", "minimum": 0, "allowed": "of 0 or more"}
    )

    def __post_init__(self):
        check_options(self)
