"""What a collection runs: each unique sequence once, and which of its rows each demonstration refers to.

The plan depends on the data and the arguments only. It is written to the store before the first forward pass, so that
an interrupted collection goes on with the very same sequences.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .prompts import EncodedAnswer, encode_answers, encode_prompts


Span = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True)
class Sequence:
    """Token ids to run, and the half-open span of positions whose activations are kept."""

    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass
class Plan:
    """Sequences in the order in which they are run, the longest first, and the tensors of a store's index."""

    sequences: list[Sequence]
    index: dict[str, Tensor]

    @classmethod
    def from_index(cls, index: dict[str, Tensor]) -> Plan:
        """The plan that a store's index.safetensors holds."""
        ids = index["token_ids"].split(index["sequence_lengths"].tolist())
        spans = index["spans"].tolist()
        return cls([Sequence(tuple(i.tolist()), *span) for i, span in zip(ids, spans, strict=True)], index)

    def describe_row(self, row: int) -> str:
        """Which answer of which question a row of the store belongs to, the first of them."""
        pairs = self.index.get("pairs")
        rows = {"negative": pairs[:, 0], "positive": pairs[:, 1]} if pairs is not None else self.index
        for sign in ("positive", "negative", "neutral"):
            if sign in rows and len(places := (rows[sign] == row).nonzero()):
                return f"{sign}, question {int(self.index['question'][places[0, 0]])}"
        return "in no demonstration"


@dataclass
class _Sequences:
    """Unique sequences by content."""

    numbers: dict[Span, int] = field(default_factory=dict)

    def add(self, ids, start: int, stop: int) -> int:
        return self.numbers.setdefault((tuple(ids), start, stop), len(self.numbers))


def make_plan(
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    *,
    tokens: str,
    neutral: str | None,
    answers: str,
    prompt_format: str,
    seed: int,
    generate: Callable[[list[list[int]]], list[list[int]]],
) -> Plan:
    """Encode a contrast set and lay out its rows; arguments as for `collect_activations`.

    Args:
        generate: maps prompts' token ids to those of the model's own answers, called once with all that are needed.
    """
    texts = {"prompts": data["prompt"], "messages": data["messages"], "row_ids": data["id"]}
    texts = {name: list(column) for name, column in texts.items()}
    options = {"messages": texts["messages"], "prompt_format": prompt_format, "row_ids": texts["row_ids"]}
    positives = encode_answers(tokenizer, texts["prompts"], list(data["positives"]), **options)
    negatives = encode_answers(tokenizer, texts["prompts"], list(data["negatives"]), **options)

    chooser, unique = random.Random(seed), _Sequences()
    if tokens == "answer":
        return _answer_token_plan(texts["row_ids"], positives, negatives, unique)

    neutral_numbers = [
        unique.add(ids, len(ids) - 1, len(ids))
        for ids in _neutral_ids(tokenizer, data, texts["prompts"], neutral, options, generate)
    ]
    rows: dict[str, list[int]] = {"positive": [], "negative": [], "neutral": [], "question": []}
    for i, (good, bad) in enumerate(zip(positives, negatives, strict=True)):
        for positive, negative in _chosen(good, bad, answers, chooser):
            rows["positive"].append(unique.add(positive.input_ids, *_span(positive, tokens, seed)))
            rows["negative"].append(unique.add(negative.input_ids, *_span(negative, tokens, seed)))
            rows["neutral"].append(neutral_numbers[i] if neutral_numbers else -1)
            rows["question"].append(texts["row_ids"][i])
    if not neutral_numbers:
        del rows["neutral"]

    sequences, rank = _longest_first(unique)
    question = torch.tensor(rows.pop("question"))
    index = {name: rank[torch.tensor(numbers)] for name, numbers in rows.items()}
    return Plan(sequences, {**index, "question": question, **_sequence_tensors(sequences)})


def _answer_token_plan(row_ids, positives, negatives, unique: _Sequences) -> Plan:
    for answer in (a for row in (*positives, *negatives) for a in row):
        unique.add(answer.input_ids, answer.prompt_length, len(answer.input_ids))
    sequences, rank = _longest_first(unique)
    lengths = torch.tensor([s.stop - s.start for s in sequences])
    first_rows = (lengths.cumsum(dim=0) - lengths).tolist()

    def first_row(answer: EncodedAnswer) -> int:
        number = unique.add(answer.input_ids, answer.prompt_length, len(answer.input_ids))
        return first_rows[int(rank[number])]

    pairs, questions = [], []
    for row_id, good, bad in zip(row_ids, positives, negatives, strict=True):
        for positive, negative in product(good, bad):
            places = torch.arange(_first_difference(positive, negative), _shorter(positive, negative))
            pairs.append(torch.stack((first_row(negative) + places, first_row(positive) + places), dim=1))
            questions += [row_id] * len(places)
    pairs = torch.cat(pairs)
    if len(pairs) == 0:
        raise ValueError("no pair of answers differs in any token that both have: nothing to collect")
    return Plan(sequences, {"pairs": pairs, "question": torch.tensor(questions), **_sequence_tensors(sequences)})


def _first_difference(positive: EncodedAnswer, negative: EncodedAnswer) -> int:
    """Place within the answers of the first token that differs: before it activations are identical."""
    same = next(
        (i for i, (a, b) in enumerate(zip(positive.input_ids, negative.input_ids, strict=False)) if a != b),
        min(len(positive.input_ids), len(negative.input_ids)),
    )
    return max(0, same - positive.prompt_length)


def _shorter(positive: EncodedAnswer, negative: EncodedAnswer) -> int:
    return min(len(positive.input_ids) - positive.prompt_length, len(negative.input_ids) - negative.prompt_length)


def _chosen(good, bad, answers: str, chooser: random.Random):
    if answers == "first":
        return [(good[0], bad[0])]
    if answers == "random":
        return [(chooser.choice(good), chooser.choice(bad))]
    return list(product(good, bad))


def _span(answer: EncodedAnswer, tokens: str, seed: int) -> tuple[int, int]:
    start, stop = answer.prompt_length, len(answer.input_ids)
    if tokens == "last":
        return stop - 1, stop
    if tokens == "random":
        # Seeded by the answer itself, so that an answer which demonstrates twice is run once.
        position = random.Random(f"{seed} {answer.input_ids}").randrange(start, stop)
        return position, position + 1
    return start, stop


def _neutral_ids(tokenizer, data: Dataset, prompts, neutral: str | None, options, generate) -> list[list[int]]:
    """Token ids whose last token is neutral, one list a question; none where none are wanted."""
    if neutral is None:
        return []
    texts = list(data["neutral"])
    if neutral == "text" and None in texts:
        row_id = options["row_ids"][texts.index(None)]
        raise ValueError(f"row {row_id} has no neutral text: fill the column, or pass neutral='generated' or 'prompt'")
    prompt_ids = encode_prompts(tokenizer, prompts, **options)
    if neutral == "prompt":
        return prompt_ids
    wanted = [[text] if text is not None and neutral != "generated" else [] for text in texts]
    encoded = encode_answers(tokenizer, prompts, wanted, **options)
    missing = list({tuple(ids): ids for ids, answers in zip(prompt_ids, encoded, strict=True) if not answers}.values())
    generated = zip(missing, generate(missing) if missing else [], strict=True)
    continued = {tuple(prompt): prompt + answer for prompt, answer in generated}
    return [
        answers[0].input_ids if answers else continued[tuple(ids)]
        for ids, answers in zip(prompt_ids, encoded, strict=True)
    ]


def _longest_first(unique: _Sequences) -> tuple[list[Sequence], Tensor]:
    """Sequences by falling length, so that too little memory shows at once, and the rank of each number."""
    order = sorted(unique.numbers, key=lambda span: -len(span[0]))
    rank = torch.empty(len(order), dtype=torch.int64)
    rank[torch.tensor([unique.numbers[span] for span in order])] = torch.arange(len(order))
    return [Sequence(*span) for span in order], rank


def _sequence_tensors(sequences: list[Sequence]) -> dict[str, Tensor]:
    return {
        "token_ids": torch.tensor([i for s in sequences for i in s.ids], dtype=torch.int32),
        "sequence_lengths": torch.tensor([len(s.ids) for s in sequences]),
        "spans": torch.tensor([(s.start, s.stop) for s in sequences]),
    }
