"""Log-likelihoods of answers given their prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers.cache_utils import Cache

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


T = TypeVar("T")
# What a forward pass costs besides its tokens, in tokens: the weights are read, and a GPU is all but idle meanwhile.
PASS_TOKENS = {"cpu": 32}
PASS_TOKENS_ELSEWHERE = 1024


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
        batch_size: most answers, and most prompts, in a forward pass.
        row_ids: of the questions, for errors; None for their places.

    Raises:
        ValueError: the model is of another kind, a sequence is longer than it takes, or has an id without an embedding.
    """
    check_language_model(model)
    model, bare = runnable(model), unwrap(model)
    for row_id, answers in zip(range(len(questions)) if row_ids is None else row_ids, questions, strict=True):
        check_vocabulary(bare, (answer.input_ids for answer in answers), f"row {row_id}")
    check_length(bare, max(len(answer.input_ids) for answers in questions for answer in answers))
    scores = [[math.nan] * len(answers) for answers in questions]
    total = sum(len(answer.input_ids) for answers in questions for answer in answers)
    with inference(model), tqdm(total=total, desc="evaluating", leave=None, **TOKEN_BAR) as bar:
        # DataParallel splits tensors between devices, and no caches.
        share = can_share_prompts(bare) and not any(isinstance(m, nn.DataParallel) for m in model.modules())
        progress = TokenProgress(bare, bar)
        for group in _groups(questions, batch_size):
            shared = _shared_length(questions[group[0]]) if share else 0
            for i, k, score in _score_group(model, bare, questions, group, shared, batch_size, progress):
                scores[i][k] = score
    return scores


def _shared_length(answers: list[EncodedAnswer]) -> int:
    """Number of leading tokens that the answers of a question share, without the prompt's last: that one predicts the
    first token of each answer."""
    limit = answers[0].prompt_length - 1
    first = answers[0].input_ids
    return min(next((i for i in range(limit) if answer.input_ids[i] != first[i]), limit) for answer in answers)


def _groups(questions: list[list[EncodedAnswer]], batch_size: int) -> Iterator[list[int]]:
    """Questions with shared parts of one length: their caches need no padding, which not every model ignores."""
    by_length: dict[int, list[int]] = {}
    for i, answers in enumerate(questions):
        by_length.setdefault(_shared_length(answers), []).append(i)
    for members in by_length.values():
        yield from _batched(members, batch_size)


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def cheapest_batches(lengths: Sequence[int], most: int, pass_tokens: int) -> list[slice]:
    """Batches of neighbouring sequences for which positions, padding among them, and forward passes cost least.

    Args:
        lengths: tokens of each sequence, falling: a batch is as long as its first.
        most: sequences in a batch.
        pass_tokens: what a pass costs besides its positions, in positions.
    """
    # The least cost of the first n sequences, and where their last batch begins.
    costs, starts = [0.0], [0]
    for stop in range(1, len(lengths) + 1):
        candidates = range(max(0, stop - most), stop)
        start = min(candidates, key=lambda start: costs[start] + lengths[start] * (stop - start))
        costs.append(costs[start] + lengths[start] * (stop - start) + pass_tokens)
        starts.append(start)
    batches, stop = [], len(lengths)
    while stop:
        batches.append(slice(starts[stop], stop))
        stop = starts[stop]
    return batches[::-1]


def _score_group(
    model: nn.Module,
    bare: nn.Module,
    questions: list[list[EncodedAnswer]],
    group: Sequence[int],
    shared: int,
    batch_size: int,
    progress: TokenProgress,
) -> Iterator[tuple[int, int, float]]:
    """Question, place among its answers, and log-likelihood of each answer of a group.

    Answers of about one length are run together, whichever question they are of, so that little is padding.
    """
    cache = prompt_cache(bare, [questions[i][0].input_ids[:shared] for i in group]) if shared else None
    rows = [(row, i, k) for row, i in enumerate(group) for k in range(len(questions[i]))]
    rows.sort(key=lambda row: len(questions[row[1]][row[2]].input_ids), reverse=True)
    lengths = [len(questions[i][k].input_ids) - 1 - shared for _, i, k in rows]
    pass_tokens = PASS_TOKENS.get(input_device(bare).type, PASS_TOKENS_ELSEWHERE)
    for chosen in cheapest_batches(lengths, batch_size, pass_tokens):
        batch = rows[chosen]
        answers = [questions[i][k] for _, i, k in batch]
        with progress.over(sum(len(answer.input_ids) for answer in answers)):
            cached = None if cache is None else select_rows(cache, [row for row, _, _ in batch])
            scores = _score(model, bare, answers, cached, shared)
        for (_, i, k), score in zip(batch, scores, strict=True):
            yield i, k, score


def _score(
    model: nn.Module, bare: nn.Module, answers: list[EncodedAnswer], cache: Cache | None, shared: int
) -> list[float]:
    """Log-likelihood of each answer, given a cache of the first `shared` tokens of its prompt."""
    ids, mask = pad([answer.input_ids for answer in answers], input_device(bare))
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, answer in enumerate(answers):
        scored[i, answer.prompt_length : len(answer.input_ids)] = True
    scored, targets = scored[:, shared + 1 :], ids[:, shared + 1 :]
    cached = {"use_cache": False} if cache is None else {cache_name(bare): cache, "use_cache": True}
    with _predicting(bare, scored) as selected:
        logits = model(input_ids=ids[:, shared:-1], attention_mask=mask[:, :-1], **cached).logits
    logits = logits[0] if selected else logits[scored.to(logits.device)]
    targets = targets[scored].to(logits.device)
    log_likelihoods = -functional.cross_entropy(logits.float(), targets, reduction="none")
    return [float(part.sum()) for part in log_likelihoods.split(scored.sum(dim=1).tolist())]


@contextmanager
def _predicting(model: nn.Module, positions: Tensor) -> Iterator[list[bool]]:
    """Inside the `with` block a model of Transformers gives the logits of some positions alone, (1, n, vocabulary), if
    its LM head takes all of them as (b, s, d); else, and any other model, those of all, (b, s, vocabulary).

    Args:
        model: without a `PeftModel` around it.
        positions: which, (b, s) bool.

    Returns:
        A list that is not empty once they were selected.
    """
    selected: list[bool] = []

    def select(head: nn.Module, args: tuple) -> tuple | None:
        # Shapes must not depend on the data inside a compiled graph; DataParallel's replicas see a part of the rows.
        if torch.compiler.is_compiling() or not args or args[0].dim() != 3 or args[0].shape[:2] != positions.shape:
            return None
        hidden = args[0]
        selected.append(True)
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *args[1:])

    # What others do with logits may need the shape of the tokens.
    if not type(model).__module__.startswith("transformers."):
        yield selected
        return
    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        handle.remove()
