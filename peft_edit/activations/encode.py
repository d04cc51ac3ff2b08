"""A contrast set in tokens: each unique sequence once, and which of its rows each demonstration refers to.

From it comes the index of a store, see `plan`.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.prompts import EncodedAnswer, encode_answers, encode_prompts, listed_choices
from .batches import make_schedule
from .sequences import SequenceTable


# Questions that are encoded at once.
CHUNK = 256


@dataclass(frozen=True)
class Options:
    """Arguments of `collect_activations` that decide which tokens of which sequences are kept, and what a model takes.

    Attributes:
        limit: most tokens in a sequence; None for any number.
        vocabulary: number of token ids that the model has embeddings for.
    """

    tokens: str
    neutral: str | None
    answers: str
    prompt_format: str
    seed: int
    max_new_tokens: int
    truncate: bool
    limit: int | None
    vocabulary: int


@dataclass
class Draft:
    """A contrast set in tokens; the model's own answers are still missing.

    Attributes:
        prompts: token ids of the prompts that the model has to answer, each once.
    """

    options: Options
    table: SequenceTable = field(default_factory=SequenceTable)
    prompts: list[array] = field(default_factory=list)
    _numbers: dict[bytes, int] = field(default_factory=dict)  # of the prompts
    # For each question whose neutral activation waits for an answer: its group and number of its prompt.
    _waiting: list[tuple[int, int]] = field(default_factory=list)
    # Question to the number of its neutral sequence.
    _neutral: dict[int, int] = field(default_factory=dict)
    # For each demonstration, or pair of answers, three: its question, and its sequences (negative, positive).
    _pairs: array = field(default_factory=partial(array, "q"))
    # tokens="answer": for each pair two, the first place within the answers that differs, and the number of places.
    _places: array = field(default_factory=partial(array, "q"))
    _row_ids: array = field(default_factory=partial(array, "q"))

    def add_question(self, row_id: int, prompt: list[int], good, bad, neutral: EncodedAnswer | None, chooser) -> None:
        """Add a question's answers; `neutral` is its neutral text, None where the options or the model decide."""
        options, group = self.options, len(self._row_ids)
        self._row_ids.append(row_id)
        if options.tokens == "answer":
            for positive, negative in itertools.product(good, bad):
                first, shorter = _first_difference(positive, negative), _shorter(positive, negative)
                numbers = (self._add(answer, group) for answer in (negative, positive))
                self._pairs.extend((group, *numbers))
                self._places.extend((first, shorter - first))
            return
        for positive, negative in _chosen(good, bad, options.answers, chooser):
            self._pairs.extend((group, self._add(negative, group), self._add(positive, group)))
        if neutral is not None:
            self._add_neutral(group, neutral.input_ids)
        elif options.neutral == "prompt":
            self._add_neutral(group, prompt)
        elif options.neutral is not None:
            content = array("i", prompt)
            number = self._numbers.setdefault(content.tobytes(), len(self.prompts))
            if number == len(self.prompts):
                self.prompts.append(content)
            self._waiting.append((group, number))

    def _add(self, answer: EncodedAnswer, group: int) -> int:
        return self.table.add(answer.input_ids, *_span(answer, self.options), group)

    def _add_neutral(self, group: int, ids: Sequence[int]) -> None:
        self._neutral[group] = self.table.add(ids, len(ids) - 1, len(ids), group)

    def check(self) -> None:
        """Raise ValueError where there is nothing to collect."""
        if self.options.tokens == "answer" and not any(self._places[1::2]):
            raise ValueError("no pair of answers differs in any token that both have: nothing to collect")

    def finish(
        self,
        answers: Sequence[Sequence[int]],
        *,
        share: bool,
        batch_size: int | None,
        max_tokens: int,
        row_bytes: int,
    ) -> dict[str, Tensor]:
        """The index of the store. The draft is used up.

        Args:
            answers: the model's own answers to `prompts`.
            share, batch_size, max_tokens: see `make_schedule`.
            row_bytes: size of a row of the store.
        """
        for group, number in self._waiting:
            self._add_neutral(group, self.prompts[number] + array("i", answers[number]))
        table, every_token = self.table, self.options.tokens == "answer"
        schedule = make_schedule(table, share=share, batch_size=batch_size, max_tokens=max_tokens)
        order = numpy.array(schedule.order)
        spans = numpy.stack((table.starts, table.stops), axis=1)[order]
        # A mean is one row, whatever it is taken over.
        rows = spans[:, 1] - spans[:, 0] if every_token else numpy.ones(len(order), dtype=numpy.int64)
        first_rows = numpy.empty(len(order), dtype=numpy.int64)
        first_rows[order] = numpy.cumsum(rows) - rows

        pairs = numpy.array(self._pairs).reshape(-1, 3)
        index = {"question": numpy.array(self._row_ids)[pairs[:, 0]]}
        negative, positive = first_rows[pairs[:, 1]], first_rows[pairs[:, 2]]
        if every_token:
            first, count = numpy.array(self._places).reshape(-1, 2).T
            index["answer_pairs"] = numpy.stack((negative + first, positive + first, count), axis=1)
        else:
            index |= {"negative": negative, "positive": positive}
            if self.options.neutral is not None:
                neutral = numpy.array([self._neutral[group] for group in range(len(self._row_ids))])
                index["neutral"] = first_rows[neutral[pairs[:, 0]]]
        index["token_ids"] = numpy.concatenate([table.ids(number) for number in order])
        index["sequence_lengths"] = table.lengths()[order]
        index["spans"] = spans
        self.table = SequenceTable()
        tensors = {name: torch.from_numpy(values) for name, values in index.items()}
        return tensors | schedule.tensors(rows, row_bytes)


def make_draft(tokenizer: PreTrainedTokenizerBase, data: Dataset, options: Options) -> Draft:
    """Encode a contrast set.

    Raises:
        ValueError: a row cannot be encoded, has no neutral text that is asked for, or is longer than the model takes.
    """
    draft, chooser = Draft(options), random.Random(options.seed)
    for first in range(0, len(data), CHUNK):
        rows = data[first : first + CHUNK]
        encoded = _encode(tokenizer, rows, options)
        for row_id, prompt, positives, negatives, texts in zip(rows["id"], *encoded, strict=True):
            draft.add_question(row_id, prompt, positives, negatives, texts[0] if texts else None, chooser)
    draft.check()
    return draft


def _encode(tokenizer, rows: dict[str, list], options: Options):
    """Prompts, positives, negatives and neutral texts of some rows; each row's fit what the model takes."""
    texts = [[] for _ in rows["id"]]
    if options.neutral in ("auto", "text"):
        texts = [[] if text is None else [text] for text in rows["neutral"]]
        if options.neutral == "text" and [] in texts:
            row_id = rows["id"][texts.index([])]
            raise ValueError(
                f"row {row_id} has no neutral text: fill the column, or pass neutral='generated' or 'prompt'"
            )
    columns = {"messages": rows["messages"], "prompt_format": options.prompt_format, "row_ids": rows["id"]}
    columns["choices"] = listed_choices(rows)
    prompts = encode_prompts(tokenizer, rows["prompt"], **columns)
    sides = [
        encode_answers(tokenizer, rows["prompt"], side, **columns)
        for side in (rows["positives"], rows["negatives"], texts)
    ]
    for i, row_id in enumerate(rows["id"]):
        answers = [answer for side in sides for answer in side[i]]
        largest = max(itertools.chain(prompts[i], *(answer.input_ids for answer in answers)))
        if largest >= options.vocabulary:
            raise ValueError(
                f"row {row_id}: the tokenizer gives the id {largest}, the model has embeddings for "
                f"{options.vocabulary} ids: pass the model's own tokenizer, or resize its embeddings"
            )
        answered = options.neutral in ("auto", "generated") and not texts[i]
        begins = [*(answer.prompt_ids for answer in answers), prompts[i]]
        cut = _excess(tokenizer, row_id, answers, prompts[i], answered, options)
        if cut:
            kept = int(all(ids[0] in tokenizer.all_special_ids for ids in begins))  # BOS, if there is one
            if any(len(ids) <= kept + cut for ids in begins):
                raise ValueError(
                    f"row {row_id}: without a prompt its longest answer is still more than the {options.limit} tokens "
                    f"that the model takes: {'lower max_new_tokens, or ' if answered else ''}leave the row out"
                )
            prompts[i] = _shortened(prompts[i], kept, cut)
            for side in sides:
                side[i] = [
                    EncodedAnswer(_shortened(answer.input_ids, kept, cut), answer.prompt_length - cut)
                    for answer in side[i]
                ]
    return prompts, *sides


def _shortened(ids: list[int], kept: int, cut: int) -> list[int]:
    return ids[:kept] + ids[kept + cut :]


def _excess(tokenizer, row_id: int, answers, prompt: list[int], answered: bool, options: Options) -> int:
    """How many tokens of a row's prompt have to go, so that its longest answer fits."""
    if options.limit is None:
        return 0
    lengths = {"prompt and answer": max((len(answer.input_ids) for answer in answers), default=len(prompt))}
    if answered:
        lengths["prompt and generated answer"] = len(prompt) + options.max_new_tokens
    what, length = max(lengths.items(), key=lambda item: item[1])
    if length > options.limit and not options.truncate:
        remedy = "lower max_new_tokens, " if answered and lengths["prompt and answer"] <= options.limit else ""
        raise ValueError(
            f"row {row_id}: {what} has {length} tokens, the model takes {options.limit}: {remedy}leave the row out, or "
            "pass truncate=True to cut its prompt on the left"
        )
    return max(0, length - options.limit)


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
    return list(itertools.product(good, bad))


def _span(answer: EncodedAnswer, options: Options) -> tuple[int, int]:
    start, stop = answer.prompt_length, len(answer.input_ids)
    if options.tokens == "last":
        return stop - 1, stop
    if options.tokens == "random":
        # Seeded by the answer itself, so that an answer which demonstrates twice is run once.
        position = random.Random(f"{options.seed} {answer.input_ids}").randrange(start, stop)
        return position, position + 1
    return start, stop
