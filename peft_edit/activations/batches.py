"""Third stage of a collection: tokens -> the index of the store, which says in which order and in which batches the
sequences are run, and which shards their rows fill.

It depends on the sequences and the arguments only, never on time, memory or the number of processes, so that a
collection which is interrupted, or done by several processes, ends with the same bytes.

Answers to one question begin with the same prompt. Where that means fewer tokens, questions with prompts of about one
length make a bucket: their prompts are run once, and the key-value cache serves all their answers, which follow in
batches of similar length. A beginning that all prompts of a bucket have in common, such as examples before the
question, is run once for all of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from ..models.run import batches_within
from .arguments import CollectArguments
from .sequences import Encoded, SequenceTable
from .store.layout import StoreShape


# What a forward pass costs beside its tokens, in tokens: below it a pass is bound by launching its operators.
FORWARD_TOKENS = 256
# A shard is full when it holds so many bytes or sequences: what an interruption can lose.
SHARD_BYTES = 256 * 2**20
SHARD_SEQUENCES = 512


def make_index(
    encoded: Encoded,
    answers: Sequence[array],
    arguments: CollectArguments,
    settings: dict[str, Any],
    *,
    share: bool,
) -> tuple[dict[str, Tensor], int]:
    """The index of a store, and the number of bytes that its rows take.

    Args:
        encoded: the contrast set in tokens, to which the neutral sequences are added.
        answers: the model's own answers to its `prompts`.
        arguments: with the limits of batches.
        settings: of the store.
        share: whether caches of prompts can be shared.
    """
    for group, number in zip(encoded.waiting[::2], encoded.waiting[1::2], strict=True):
        encoded.add_neutral(group, encoded.prompts[number] + answers[number])
    table, every_token = encoded.table, arguments.every_token
    limits = {"batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens_per_batch}
    schedule = make_schedule(table, share=share, **limits)
    order = numpy.array(schedule.order)
    spans = numpy.stack((table.starts, table.stops), axis=1)[order]
    # A mean is one row, whatever it is taken over.
    rows = spans[:, 1] - spans[:, 0] if every_token else numpy.ones(len(order), dtype=numpy.int64)
    first_rows = numpy.empty(len(order), dtype=numpy.int64)
    first_rows[order] = numpy.cumsum(rows) - rows

    index = _demonstrations(encoded, arguments, first_rows)
    index["token_ids"] = numpy.concatenate([table.ids(number) for number in order])
    index["sequence_lengths"] = table.lengths()[order]
    index["spans"] = spans
    tensors = {name: torch.from_numpy(values) for name, values in index.items()}
    row_bytes = StoreShape.of(settings).row_bytes
    return tensors | schedule.tensors(rows, row_bytes), int(rows.sum()) * row_bytes


def _demonstrations(
    encoded: Encoded, arguments: CollectArguments, first_rows: numpy.ndarray
) -> dict[str, numpy.ndarray]:
    """Which rows are whose; `first_rows` are those of the sequences."""
    if arguments.of_texts:
        numbers = numpy.array(encoded.pairs)
        counts = encoded.table.lengths()[numbers]
        return {"question": numpy.array(encoded.row_ids), "texts": numpy.stack((first_rows[numbers], counts), axis=1)}
    pairs = numpy.array(encoded.pairs).reshape(-1, 3)
    index = {"question": numpy.array(encoded.row_ids)[pairs[:, 0]]}
    negative, positive = first_rows[pairs[:, 1]], first_rows[pairs[:, 2]]
    if arguments.every_token:
        first, count = numpy.array(encoded.places).reshape(-1, 2).T
        index["answer_pairs"] = numpy.stack((negative + first, positive + first, count), axis=1)
    else:
        index |= {"negative": negative, "positive": positive}
        if encoded.neutral is not None:
            neutral = numpy.array([encoded.neutral[group] for group in range(len(encoded.row_ids))])
            index["neutral"] = first_rows[neutral[pairs[:, 0]]]
    return index


@dataclass
class Schedule:
    """What is run, in order.

    Attributes:
        order: numbers of the sequences.
        batch_sizes: number of sequences in each batch.
        bucket_batches: number of batches in each bucket.
        bucket_cuts: for each bucket the length of what all its sequences have in common, and that of the prompts whose
            cache its batches go on from; (0, 0) for none.
        cost: tokens that are run, padding included, and FORWARD_TOKENS for each forward pass.
    """

    order: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    bucket_batches: list[int] = field(default_factory=list)
    bucket_cuts: list[tuple[int, int]] = field(default_factory=list)
    cost: int = 0

    def add_bucket(
        self, numbers: list[int], lengths: numpy.ndarray, limits: tuple[int | None, int], *, common=0, cut=0, prompts=0
    ) -> None:
        """Append sequences, the longest first, that go on from the cache of `prompts` prompts."""
        if cut:
            self.cost += FORWARD_TOKENS + prompts * (cut - common)
            self.cost += FORWARD_TOKENS + common if common else 0
        ordered = sorted(numbers, key=lambda number: -lengths[number])
        before = len(self.batch_sizes)
        for batch in batches_within([int(lengths[number]) for number in ordered], *limits):
            self.batch_sizes.append(len(batch))
            self.cost += FORWARD_TOKENS + len(batch) * (int(lengths[ordered[batch[0]]]) - cut)
        self.order += ordered
        self.bucket_batches.append(len(self.batch_sizes) - before)
        self.bucket_cuts.append((common, cut))

    def tensors(self, rows: numpy.ndarray, row_bytes: int) -> dict[str, Tensor]:
        """For the index of a store; `rows` counts the kept rows of each sequence in the order in which it is run."""
        return {
            "batch_sizes": torch.tensor(self.batch_sizes),
            "bucket_batches": torch.tensor(self.bucket_batches),
            "bucket_cuts": torch.tensor(self.bucket_cuts),
            "shard_batches": torch.tensor(list(_shards(self.batch_sizes, rows, row_bytes))),
        }


def make_schedule(table: SequenceTable, *, share: bool, batch_size: int | None, max_tokens: int) -> Schedule:
    """The cheaper of plain batches, and of batches that go on from the caches of their prompts.

    Args:
        table: the sequences.
        share: whether caches can be shared at all.
        batch_size: most sequences in a batch; None for no limit.
        max_tokens: most tokens in a batch, those in the cache and padding included.
    """
    limits = (batch_size, max_tokens)
    lengths = table.lengths()
    plain = Schedule()
    plain.add_bucket(list(range(len(table))), lengths, limits)
    if not share:
        return plain
    shared = Schedule()
    for groups, cut in _buckets(table, *limits):
        numbers = [number for group in groups for number in group]
        prompts = len({table.ids(group[0])[:cut].tobytes() for group in groups})
        common = _common_prefix(table, [group[0] for group in groups], cut)
        # A pass of its own has to save more than it costs.
        if (prompts - 1) * common <= FORWARD_TOKENS:
            common = 0
        if (len(numbers) - prompts) * cut <= FORWARD_TOKENS:
            common = cut = 0
        shared.add_bucket(numbers, lengths, limits, common=common, cut=cut, prompts=prompts)
    return min(plain, shared, key=lambda schedule: schedule.cost)


def _buckets(table: SequenceTable, batch_size: int | None, max_tokens: int) -> Iterator[tuple[list[list[int]], int]]:
    """Groups of sequences whose prompts are of about one length, and the length up to which they are run once."""
    members: dict[int, list[int]] = {}
    for number, group in enumerate(table.groups):
        members.setdefault(group, []).append(number)
    groups = list(members.values())
    cuts = [_common_prefix(table, group, min(table.starts[number] for number in group)) for group in groups]
    bucket: list[list[int]] = []
    # Of a bucket: sum over its groups of the answers beyond the first, and of those times the length of their prompt.
    answers = prompts = 0
    cut = 0
    for i in sorted(range(len(groups)), key=lambda i: -cuts[i]):
        more = len(groups[i]) - 1
        # What cutting the longer prompts at this one's length would run again, against the passes of a new bucket.
        waste = prompts - answers * cuts[i]
        full = len(bucket) == batch_size or (len(bucket) + 1) * cut > max_tokens
        if bucket and (full or waste > 2 * FORWARD_TOKENS):
            yield bucket, cut
            bucket, answers, prompts = [], 0, 0
        bucket.append(groups[i])
        cut, answers, prompts = cuts[i], answers + more, prompts + more * cuts[i]
    if bucket:
        yield bucket, cut


def _common_prefix(table: SequenceTable, numbers: list[int], limit: int) -> int:
    """Number of leading ids, at most `limit`, that some sequences have in common."""
    first = table.ids(numbers[0])[:limit]
    for number in numbers[1:]:
        other = table.ids(number)[: len(first)]
        first = first[: len(other)]
        differs = (first != other).nonzero()[0]
        first = first[: differs[0]] if len(differs) else first
    return len(first)


def _shards(batch_sizes: list[int], rows: numpy.ndarray, row_bytes: int) -> Iterator[int]:
    """Number of batches in each shard."""
    ends = numpy.cumsum(batch_sizes)
    rows_until = numpy.concatenate(([0], numpy.cumsum(rows)))
    first_batch = first = 0
    for batch, end in enumerate(ends.tolist(), start=1):
        size = int(rows_until[end] - rows_until[first]) * row_bytes
        if size >= SHARD_BYTES or end - first >= SHARD_SEQUENCES or batch == len(batch_sizes):
            yield batch - first_batch
            first_batch, first = batch, end
