"""What a collection runs: each unique sequence once, and which of its rows each demonstration refers to.

The plan is written to the store before the first forward pass, so that an interrupted collection goes on with the very
same sequences and batches.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .prompts import EncodedAnswer, encode_answers, encode_prompts, listed_choices
from .schedule import SequenceTable, make_schedule


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
    # For each demonstration, or pair of answers: its question, and numbers of its sequences (negative, positive).
    _pairs: list[tuple[int, int, int]] = field(default_factory=list)
    # tokens="answer": for each pair the first place within the answers that differs, and the number of places.
    _places: list[tuple[int, int]] = field(default_factory=list)
    _row_ids: list[int] = field(default_factory=list)

    def add_question(self, row_id: int, prompt: list[int], good, bad, neutral: EncodedAnswer | None, chooser) -> None:
        """Add a question's answers; `neutral` is its neutral text, None where the options or the model decide."""
        options, group = self.options, len(self._row_ids)
        self._row_ids.append(row_id)
        if options.tokens == "answer":
            for positive, negative in itertools.product(good, bad):
                first, shorter = _first_difference(positive, negative), _shorter(positive, negative)
                numbers = (self._add(answer, group) for answer in (negative, positive))
                self._pairs.append((group, *numbers))
                self._places.append((first, shorter - first))
            return
        for positive, negative in _chosen(good, bad, options.answers, chooser):
            self._pairs.append((group, self._add(negative, group), self._add(positive, group)))
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
        if self.options.tokens == "answer" and not any(count for _, count in self._places):
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

        pairs = numpy.array(self._pairs)
        index = {"question": numpy.array(self._row_ids, dtype=numpy.int64)[pairs[:, 0]]}
        negative, positive = first_rows[pairs[:, 1]], first_rows[pairs[:, 2]]
        if every_token:
            first, count = numpy.array(self._places).T
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


@dataclass(frozen=True)
class Batch:
    """Sequences that are run together, and the bucket whose prompts' cache they go on from."""

    sequences: range
    bucket: int


class Plan:
    """The sequences of a store's index, in the order in which they are run."""

    def __init__(self, index: dict[str, Tensor], tokens: str):
        self._index, self.tokens = index, tokens
        self._ends = [0, *index["sequence_lengths"].cumsum(dim=0).tolist()]
        self.spans: list[list[int]] = index["spans"].tolist()
        self.cuts: list[list[int]] = index["bucket_cuts"].tolist()

    def __len__(self) -> int:
        return len(self.spans)

    def ids(self, number: int) -> Tensor:
        return self._index["token_ids"][self._ends[number] : self._ends[number + 1]]

    def rows(self, number: int) -> int:
        """How many rows of a sequence are kept."""
        start, stop = self.spans[number]
        return stop - start if self.tokens == "answer" else 1

    @cached_property
    def shards(self) -> list[list[Batch]]:
        """The batches of each shard."""
        ends = self._index["batch_sizes"].cumsum(dim=0).tolist()
        batches_per_bucket = self._index["bucket_batches"]
        buckets = torch.arange(len(batches_per_bucket)).repeat_interleave(batches_per_bucket).tolist()
        spans = zip(itertools.pairwise([0, *ends]), buckets, strict=True)
        batches = [Batch(range(*span), bucket) for span, bucket in spans]
        shards, first = [], 0
        for count in self._index["shard_batches"].tolist():
            shards.append(batches[first : first + count])
            first += count
        return shards

    def shard_rows(self, number: int) -> int:
        return sum(self.rows(i) for batch in self.shards[number] for i in batch.sequences)

    @cached_property
    def _bucket_sequences(self) -> list[range]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for batch in (batch for shard in self.shards for batch in shard):
            first.setdefault(batch.bucket, batch.sequences.start)
            last[batch.bucket] = batch.sequences.stop
        return [range(first[bucket], last[bucket]) for bucket in sorted(first)]

    def prompts(self, bucket: int) -> list[tuple[int, ...]]:
        """What is run once for all sequences of a bucket: their different beginnings, in the order of their first."""
        return list(dict.fromkeys(self.prompt(i, bucket) for i in self._bucket_sequences[bucket]))

    def prompt(self, number: int, bucket: int) -> tuple[int, ...]:
        """The beginning of a sequence that its bucket's cache holds."""
        return tuple(self.ids(number)[: self.cuts[bucket][1]].tolist())

    def describe(self, number: int) -> str:
        """Which answer of which question a sequence is, the first of them."""
        first = sum(self.rows(i) for i in range(number))
        for sign, rows, counts in self._demonstrations():
            found = ((rows < first + self.rows(number)) & (rows + counts > first)).nonzero()
            if len(found):
                return f"{sign}, question {int(self._index['question'][found[0, 0]])}"
        return "in no demonstration"

    def _demonstrations(self) -> Iterator[tuple[str, Tensor, Tensor | int]]:
        """Sign, first rows and numbers of rows of the demonstrations."""
        if self.tokens == "answer":
            pairs = self._index["answer_pairs"]
            yield "positive", pairs[:, 1], pairs[:, 2]
            yield "negative", pairs[:, 0], pairs[:, 2]
            return
        for sign in ("positive", "negative", "neutral"):
            if sign in self._index:
                yield sign, self._index[sign], 1
