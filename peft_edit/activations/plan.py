"""What a collection runs, as the index of its store says it.

The index is written before the first forward pass, so that an interrupted collection goes on with the very same
sequences and batches.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


# Sequences whose token ids are read at once.
WINDOW = 1024


@dataclass(frozen=True)
class Batch:
    """Sequences that are run together, and the bucket whose prompts' cache they go on from."""

    sequences: range
    bucket: int


class Plan:
    """The sequences of a store's index, in the order in which they are run.

    Args:
        index: the tensors of the index.
        tokens: which tokens of an answer are kept.
        read_ids: gives the part of `token_ids` between two places, so that not all of it is in memory; None where it is
            in `index`.
    """

    def __init__(self, index: dict[str, Tensor], tokens: str, read_ids: Callable[[int, int], Tensor] | None = None):
        self._index, self.tokens = index, tokens
        self._read_ids = read_ids or (lambda start, stop: index["token_ids"][start:stop])
        self._window, self._window_first = torch.empty(0), -1
        # Arrays: there may be many more sequences than a Python object for each would fit.
        self._ends = array("q", [0, *index["sequence_lengths"].cumsum(dim=0).tolist()])
        self._starts, self._stops = (array("q", column) for column in index["spans"].T.tolist())
        self.cuts: list[list[int]] = index["bucket_cuts"].tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def ids(self, number: int) -> Tensor:
        """Token ids of a sequence."""
        first = number - number % WINDOW
        if first != self._window_first:
            self._window = self._read_ids(self._ends[first], self._ends[min(first + WINDOW, len(self))])
            self._window_first = first
        place = self._ends[first]
        return self._window[self._ends[number] - place : self._ends[number + 1] - place]

    def span(self, number: int) -> tuple[int, int]:
        """First position of a sequence that is kept, and the one behind the last."""
        return self._starts[number], self._stops[number]

    def rows(self, number: int) -> int:
        """How many rows of a sequence are kept."""
        start, stop = self.span(number)
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
