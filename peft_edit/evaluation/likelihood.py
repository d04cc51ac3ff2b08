"""Log-likelihoods of answers given their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..data.prompts import EncodedAnswer
from ..models.kind import check_language_model, check_vocabulary
from ..models.run import (
    TOKEN_BAR,
    TokenProgress,
    cache_name,
    can_share_prompts,
    check_length,
    inference,
    input_device,
    pad,
    prompt_cache,
    select_rows,
)
from ..models.sites import runnable, unwrap


def answer_log_likelihoods(
    model: nn.Module,
    questions: list[list[EncodedAnswer]],
    *,
    batch_size: int = 16,
    row_ids: Sequence[int] | None = None,
) -> list[list[float]]:
    """Log-likelihood in nats of each answer given its prompt, summed over the answer's tokens.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        questions: the answers of each, encoded after their prompts.
        batch_size: most answers in a forward pass.
        row_ids: of the questions, for errors; None for their places.

    Raises:
        ValueError: the model is of another kind, a sequence is longer than it takes, or has an id without an embedding.
    """
    check_language_model(model)
    model, bare = runnable(model), unwrap(model)
    for row_id, answers in zip(range(len(questions)) if row_ids is None else row_ids, questions, strict=True):
        check_vocabulary(bare, (answer.input_ids for answer in answers), f"row {row_id}")
    check_length(bare, max(len(answer.input_ids) for answers in questions for answer in answers))
    scores: list[list[float]] = [[] for _ in questions]
    total = sum(map(_tokens, questions))
    with inference(model), tqdm(total=total, desc="evaluating", leave=None, **TOKEN_BAR) as bar:
        # DataParallel splits tensors between devices, and no caches.
        share = can_share_prompts(bare) and not any(isinstance(m, nn.DataParallel) for m in model.modules())
        progress = TokenProgress(bare, bar)
        for group in _groups(questions, batch_size):
            answers = [answer for i in group for answer in questions[i]]
            owners = [place for place, i in enumerate(group) for _ in questions[i]]
            shared = _shared_length(questions[group[0]]) if share else 0
            with progress.over(_tokens(answers)):
                flat = iter(_score_group(model, bare, answers, owners, shared))
            for i in group:
                scores[i] = [next(flat) for _ in questions[i]]
    return scores


def _tokens(answers: list[EncodedAnswer]) -> int:
    return sum(len(answer.input_ids) for answer in answers)


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
