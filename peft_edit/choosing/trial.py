"""One setting at a time: its damage first, and its benefit where that leaves hope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.options import PromptOptions
from ..evaluation.multiple_choice import MultipleChoiceResult
from ..evaluation.texts import NotFiniteError
from .axes import Setting, Settings
from .budget import Budget
from .journal import Journal
from .questions import SharedQuestions
from .texts import SharedTexts


GIB = 2**30
BASE = "base"


@dataclass(frozen=True)
class Scores:
    """Scores on the validation questions.

    Attributes:
        mc1, mc2: means, in [0, 1].
        questions: name of each of these to the scores of the questions.
    """

    mc1: float
    mc2: float
    questions: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, result: MultipleChoiceResult) -> Scores:
        """Of an evaluation."""
        questions = {name: [float(getattr(q, name)) for q in result.questions] for name in ("mc1", "mc2")}
        return cls(result.mc1, result.mc2, questions)


@dataclass(frozen=True)
class Base:
    """The base model.

    Attributes:
        scores: on the validation questions.
        block_tokens: tokens times blocks that were run for all settings together.
        separate: tokens times blocks that an evaluation of one setting for itself runs: the questions, and the texts
            with and without the edit.
    """

    scores: Scores
    block_tokens: int
    separate: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What was found of a setting.

    Attributes:
        key: tells it from others, and from the same with other data.
        setting: axis to value, JSON values.
        damage: largest share of a limit of the budget that it uses, infinite where the model gives NaN.
        side_effects: see `SideEffects`; None where the model gives NaN.
        stopped: why not all texts were read, or the benefit was not asked for; None where both were.
        scores: on the validation questions; None where they were not asked for.
        block_tokens: tokens times blocks that were run for it.
        criterion: which of the scores is the benefit.
    """

    key: str
    setting: Mapping[str, Any]
    damage: float
    side_effects: Mapping[str, Any] | None
    stopped: str | None
    scores: Scores | None
    block_tokens: int
    criterion: str = field(compare=False)

    @property
    def benefit(self) -> float | None:
        """In [0, 1]."""
        return None if self.scores is None else getattr(self.scores, self.criterion)

    @property
    def of_questions(self) -> Sequence[float] | None:
        """The benefit of each question, of which that is the mean."""
        return None if self.scores is None else self.scores.questions[self.criterion]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without infinite ones."""
        row = {name: value for name, value in asdict(self).items() if name != "criterion"}
        return {**row, "damage": self.damage if math.isfinite(self.damage) else None}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], criterion: str) -> Found:
        """What `to_dict` gave."""
        scores, damage = row["scores"], row["damage"]
        return cls(
            **{
                **row,
                "damage": math.inf if damage is None else damage,
                "scores": None if scores is None else Scores(**scores),
                "criterion": criterion,
            }
        )


class Trials:
    """Settings, tried one by one, or read where they are finished.

    Args:
        model: the base model.
        tokenizer: of the model.
        maker: of the edits.
        settings: all.
        validation: contrast set.
        texts: for the damage.
        options: `SweepOptions`.
        budget: of damage.
        journal: of what is finished.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        maker: Settings,
        settings: Sequence[Setting],
        validation: Dataset,
        texts: Sequence[str],
        options: PromptOptions,
        budget: Budget,
        journal: Journal,
    ):
        self._model, self._tokenizer, self._maker, self._settings = model, tokenizer, maker, settings
        self._validation, self._texts, self._options = validation, texts, options
        self._budget, self._journal = budget, journal

    def need(self, setting: Setting) -> int:
        """Number of first blocks that a setting leaves as they are. The output of a block is edited after it has
        run."""
        return min(self._maker.edited(setting)) + (self._maker.site == "block")

    @cached_property
    def _needs(self) -> list[int]:
        # Of all, also of those that are finished: what is kept, and so the work, is the same after an interruption.
        return [self.need(setting) for setting in self._settings]

    @cached_property
    def _shared_texts(self) -> SharedTexts:
        memory, size = int(self._options.memory * GIB), self._options.batch_size
        return SharedTexts(self._model, self._tokenizer, self._texts, size, memory, self._needs)

    @cached_property
    def _shared_questions(self) -> SharedQuestions:
        options = {**self._options.of_prompts, "batch_size": self._options.batch_size}
        memory = int(self._options.memory * GIB)
        return SharedQuestions(self._model, self._tokenizer, self._validation, self._needs, memory, **options)

    @cached_property
    def base(self) -> Base:
        """The base model, which is run where a setting is left to be tried, or was never run."""
        row = self._journal.get(BASE)
        if row is None:
            texts, questions = self._shared_texts, self._shared_questions
            blocks = len(questions.passes.blocks)
            row = self._journal.add(
                BASE,
                Base(
                    scores=Scores.of(questions.base),
                    block_tokens=texts.passes.block_tokens + questions.passes.block_tokens,
                    separate=blocks * (questions.positions + 2 * texts.positions),
                ).to_dict(),
            )
        return Base(Scores(**row["scores"]), row["block_tokens"], row["separate"])

    def of(self, setting: Setting) -> Found:
        """What a setting does."""
        of = setting.to_dict()
        row = self._journal.get(of)
        if row is None:
            row = self._journal.add(of, {"setting": of, **self._measured(setting)})
        return Found.from_dict(row, self._options.criterion)

    def _measured(self, setting: Setting) -> dict[str, Any]:
        # Both at the first setting: what they run is the base model's work.
        texts, questions, need = self._shared_texts, self._shared_questions, self.need(setting)
        before = texts.passes.block_tokens + questions.passes.block_tokens
        factor, scores = self._options.hopeless, None
        with self._maker.applied(setting) as adapted:
            try:
                measured, stopped = texts.measure(
                    adapted, need, lambda meter: self._budget.hopeless(meter, texts.tokens, factor)
                )
                effects = measured.to_dict()
                damage = self._budget.damage(effects)
            except NotFiniteError as error:
                effects, stopped, damage = None, str(error), None
            if stopped is None and damage > factor:
                stopped = f"the damage is {damage:.3g} budgets, more than {factor:g}"
            if stopped is None:
                scores = asdict(Scores.of(questions.evaluate(adapted, need)))
        done = texts.passes.block_tokens + questions.passes.block_tokens - before
        return {
            "damage": damage,
            "side_effects": effects,
            "stopped": stopped,
            "scores": scores,
            "block_tokens": done,
        }
