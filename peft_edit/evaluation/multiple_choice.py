"""Multiple-choice accuracy: MC1 and MC2."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data import check_contrast_set
from ..data.prompts import PromptOptions, encode_answers, listed_choices, settled
from ..models.kind import check_language_model
from ..tuners.layer import check_independent_of_padding
from .likelihood import answer_log_likelihoods


@dataclass(frozen=True)
class QuestionScore:
    """Scores of one question.

    Attributes:
        id: row in the contrast set.
        mc1: whether the correct choice is the likeliest.
        mc2: share of the probability of all answers that is on the positive ones, in [0, 1].
        log_likelihoods: answer to its log-likelihood given the prompt, in nats.
    """

    id: int
    mc1: bool
    mc2: float
    log_likelihoods: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Means over the questions, in [0, 1], and the score of each question in the order of the data."""

    mc1: float
    mc2: float
    questions: list[QuestionScore]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def evaluate_multiple_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    *,
    prompt_format: str = "auto",
    template_arguments: dict[str, Any] | None = None,
    template_time: str | None = None,
    batch_size: int = 16,
) -> MultipleChoiceResult:
    """Score every answer of a contrast set by its log-likelihood given the prompt (TruthfulQA, arXiv 2109.07958).

    MC1: the first of `mc1_choices` (where null, the first positive answer) is likelier than every other choice (every
    negative answer). MC2: normalised probability of the positive answers among all positive and negative ones.

    A prompt is run once; its key-value cache serves all its answers, each of which is run once.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        tokenizer: of that model.
        data: a contrast set, see `load_contrast_set`.
        prompt_format, template_arguments, template_time: see `PromptOptions`.
        batch_size: most answers, and most prompts, in a forward pass.

    Raises:
        ValueError: the model is no causal one or has no LM head, the data are empty, a sequence is longer than the
            model takes or has a token without an embedding, the model gives NaN, or an active edit is of the last
            token of a forward pass only, whose result depends on padding.
    """
    data = check_contrast_set(data)
    check_language_model(model)
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ArgumentError(Argument("batch_size"), f" must be at least 1, got {batch_size}")
    prompts = settled(
        tokenizer,
        PromptOptions(prompt_format=prompt_format, template_arguments=template_arguments, template_time=template_time),
    )
    choices = listed_choices(data)
    encoded = encode_answers(
        tokenizer,
        list(data["prompt"]),
        choices,
        messages=list(data["messages"]),
        **prompts.of_prompts,
        row_ids=list(data["id"]),
        choices=choices,
    )
    scores = answer_log_likelihoods(model, encoded, batch_size=batch_size, row_ids=data["id"])
    if undefined := [
        row["id"] for row, row_scores in zip(data, scores, strict=True) if any(map(math.isnan, row_scores))
    ]:
        raise ValueError(
            f"the log-likelihoods of {len(undefined)} questions are NaN, the first is row {undefined[0]}: "
            "load the model in a wider dtype (bfloat16 or float32), or lower the strength of the edit"
        )
    questions = [
        _question_score(row, dict(zip(texts, row_scores, strict=True)))
        for row, texts, row_scores in zip(data, choices, scores, strict=True)
    ]
    return MultipleChoiceResult(
        mc1=sum(question.mc1 for question in questions) / len(questions),
        mc2=sum(question.mc2 for question in questions) / len(questions),
        questions=questions,
    )


def _question_score(row: dict[str, Any], scores: dict[str, float]) -> QuestionScore:
    correct, *others = row["mc1_choices"] or (row["positives"][0], *row["negatives"])
    of_answers = torch.tensor([scores[text] for text in (*row["positives"], *row["negatives"])], dtype=torch.float64)
    return QuestionScore(
        id=row["id"],
        mc1=all(scores[correct] > scores[other] for other in others),
        mc2=float(of_answers.softmax(dim=0)[: len(row["positives"])].sum()),
        log_likelihoods=scores,
    )
