"""Options of generated answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..arguments import Argument, ArgumentError, check_options
from ..data.options import PromptOptions


# Who answers: the model with its adapters disabled, and with them.
BASE, EDITED = "base", "edited"
# What chooses the best of several answers where no function does.
LIKELIHOOD = "log_likelihood"
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(kw_only=True)
class AnswerOptions(PromptOptions):
    """
    How answers are generated.

    Args:
        models (`str`, *optional*):
            Who answers: the "base" model, the "edited" one, or "both". By default both where an adapter is active.
        max_new_tokens (`int`):
            Most tokens in an answer.
        do_sample (`bool`):
            Draw tokens; otherwise each is the most likely one.
        temperature (`float`), top_k (`int`, *optional*), top_p (`float`), min_p (`float`, *optional*):
            Of the draw, as in Transformers, whose order they are applied in. By default the model's own distribution.
        seed (`int`):
            Of the draw. Each answer has a seed of its own, which follows from this, the row's `id` and the answer's
            number, so that it depends neither on the other prompts nor on the size of batches. The base model and the
            edited one have the same: where the edit changes nothing, they draw the same token.
        best_of (`int`):
            So many answers are drawn, of which the best is kept; the others stand beside it.
        score (`str` or function):
            What is best: "log_likelihood", the mean over an answer's tokens, or a function, on the command line
            "module:function". It is called with a row, a dict with the columns of a contrast set, `id` and `prompt`
            among them, and the list of answers to it, and returns as many numbers, the highest for the best.
        batch_size (`int`):
            Most answers that are generated at once.
        resume (`bool`):
            Go on with the file of an interrupted run; False replaces it.
        prompt_format, template_arguments, template_time:
            See `PromptOptions`.
    """

    models: Literal["base", "edited", "both"] | None = field(
        default=None, metadata={"help": "Who answers. Default: both with an adapter."}
    )
    max_new_tokens: int = field(
        default=128, metadata={"help": "Most tokens in an answer.", "minimum": 1, "allowed": "of at least 1"}
    )
    do_sample: bool = field(default=False, metadata={"help": "Draw tokens. Otherwise each is the most likely one."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of the draw.", "above": 0, "maximum": 100, "allowed": "above 0 and at most 100"}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Draw from so many likeliest tokens.", "minimum": 1, "allowed": "of at least 1"}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Draw from the likeliest tokens of this probability together.",
            "above": 0,
            "maximum": 1,
            "allowed": "in (0, 1]",
        },
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw from tokens of at least this share of the likeliest one's probability.",
            "minimum": 0,
            "maximum": 1,
            "allowed": "in [0, 1]",
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the draw; base and edited answers have the same."})
    best_of: int = field(
        default=1,
        metadata={"help": "Draw so many answers and keep the best.", "minimum": 1, "allowed": "of at least 1"},
    )
    score: str | Callable[[dict[str, Any], list[str]], Any] = field(
        default=LIKELIHOOD,
        metadata={"help": "What is best: log_likelihood (mean per token), or module:function of a row and answers."},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Most answers at once.", "minimum": 1, "allowed": "of at least 1"}
    )
    resume: bool = field(default=True, metadata={"help": "Go on with an interrupted run's file, or replace it."})

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        changed = [name for name in OF_DRAWS if getattr(self, name) != getattr(AnswerOptions, name)]
        if changed and not self.do_sample:
            raise ArgumentError(
                *(Argument(changed[0], getattr(self, changed[0])), " is of a draw: pass ", Argument("do_sample", True)),
                " too",
            )
        if self.best_of > 1 and not self.do_sample:
            raise ArgumentError(
                *(Argument("best_of", self.best_of), " needs answers that differ: pass "),
                *(Argument("do_sample", True), " too"),
            )
