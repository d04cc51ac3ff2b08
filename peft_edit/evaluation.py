"""Multiple-choice evaluation (MC1, MC2) and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import check_contrast_set
from .data.prompts import EncodedAnswer, encode_answers, listed_choices
from .models.run import (
    cache_name,
    can_share_prompts,
    check_length,
    inference,
    input_device,
    pad,
    prompt_cache,
    select_rows,
)
from .models.sites import unwrap
from .tuners.editing import check_independent_of_padding


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
        prompt_format: "auto", "chat", "plain", "few_shot_qa" or "lettered_choices", see `encode_answers`.
        batch_size: most answers in a forward pass; the answers of one question stay together even if there are more.

    Raises:
        ValueError: the data are empty, a sequence is longer than the model takes, the model gives NaN, or an active
            edit is of the last token of a forward pass only, whose result depends on padding.
    """
    check_contrast_set(data)
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    choices = listed_choices(data)
    encoded = encode_answers(
        tokenizer,
        list(data["prompt"]),
        choices,
        messages=list(data["messages"]),
        prompt_format=prompt_format,
        row_ids=list(data["id"]),
        choices=choices,
    )
    scores = answer_log_likelihoods(model, encoded, batch_size=batch_size)
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


def answer_log_likelihoods(
    model: nn.Module, questions: list[list[EncodedAnswer]], *, batch_size: int = 16
) -> list[list[float]]:
    """Log-likelihood in nats of each answer given its prompt, summed over the answer's tokens."""
    bare = unwrap(model)
    check_length(bare, max(len(answer.input_ids) for answers in questions for answer in answers))
    scores: list[list[float]] = [[] for _ in questions]
    with inference(model), tqdm(total=len(questions), desc="evaluating", unit="question", leave=None) as progress:
        share = can_share_prompts(bare)
        for group in _groups(questions, batch_size):
            answers = [answer for i in group for answer in questions[i]]
            owners = [place for place, i in enumerate(group) for _ in questions[i]]
            shared = _shared_length(questions[group[0]]) if share else 0
            flat = iter(_score_group(model, bare, answers, owners, shared))
            for i in group:
                scores[i] = [next(flat) for _ in questions[i]]
            progress.update(len(group))
    return scores


def _shared_length(answers: list[EncodedAnswer]) -> int:
    """Number of leading tokens that the answers of a question share, without the prompt's last: that one predicts the
    first token of each answer."""
    limit = answers[0].prompt_length - 1
    first = answers[0].input_ids
    return min(next((i for i in range(limit) if answer.input_ids[i] != first[i]), limit) for answer in answers)


def _groups(questions: list[list[EncodedAnswer]], batch_size: int) -> Iterable[list[int]]:
    """Questions with shared parts of one length: their caches need no padding, which not every model ignores."""
    by_length: dict[int, list[int]] = {}
    for i, answers in enumerate(questions):
        by_length.setdefault(_shared_length(answers), []).append(i)
    for members in by_length.values():
        group: list[int] = []
        for i in members:
            if group and sum(len(questions[j]) for j in group) + len(questions[i]) > batch_size:
                yield group
                group = []
            group.append(i)
        yield group


def _score_group(
    model: nn.Module, bare: nn.Module, answers: list[EncodedAnswer], owners: list[int], shared: int
) -> list[float]:
    """Log-likelihood of each answer; `owners` are the places of their questions in the group."""
    device = input_device(bare)
    cached = {}
    if shared > 0:
        firsts = [owners.index(place) for place in range(owners[-1] + 1)]
        cache = prompt_cache(bare, [answers[i].input_ids[:shared] for i in firsts])
        cached = {cache_name(bare): select_rows(cache, owners), "use_cache": True}
    ids, mask = pad([answer.input_ids for answer in answers], device)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, answer in enumerate(answers):
        scored[i, answer.prompt_length : len(answer.input_ids)] = True
    logits = model(input_ids=ids[:, shared:-1], attention_mask=mask[:, :-1], **{"use_cache": False, **cached}).logits
    scored, targets = scored[:, shared + 1 :].to(logits.device), ids[:, shared + 1 :].to(logits.device)
    log_likelihoods = -functional.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
    return [float(part.sum()) for part in log_likelihoods.split(scored.sum(dim=1).tolist())]


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, batch_size: int = 16
) -> float:
    """Perplexity over all tokens of some texts after each one's first: exp of the mean negative log-likelihood."""
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    bare = unwrap(model)
    texts = list(texts)
    encoded = tokenizer(texts)["input_ids"] if texts else []
    encoded = sorted((ids for ids in encoded if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError("perplexity needs texts of at least two tokens")
    check_length(bare, len(encoded[-1]))
    total, count = 0.0, 0
    with inference(model):
        for start in tqdm(range(0, len(encoded), batch_size), desc="perplexity", unit="batch", leave=None):
            batch = encoded[start : start + batch_size]
            ids, mask = pad(batch, input_device(bare))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            scored, targets = mask[:, 1:].bool().to(logits.device), ids[:, 1:].to(logits.device)
            total += float(functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))
            count += int(scored.sum())
    return math.exp(total / count)
