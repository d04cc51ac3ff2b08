"""Fourth stage of a collection: the index of a store -> the rows of its shards, batch after batch."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..models.run import TokenProgress, cache_name, input_device, pad, prompt_cache, select_rows
from ..places import EVERY_TOKEN
from ..processes import Processes
from .recorder import Recorder
from .store.layout import INDEX, StoreShape, is_whole, read_index, read_token_ids
from .store.shards import Shard


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
        return stop - start if self.tokens in EVERY_TOKEN else 1

    @cached_property
    def batches(self) -> list[list[Batch]]:
        """Those of each shard."""
        ends = self._index["batch_sizes"].cumsum(dim=0).tolist()
        batches_per_bucket = self._index["bucket_batches"]
        buckets = torch.arange(len(batches_per_bucket)).repeat_interleave(batches_per_bucket).tolist()
        spans = zip(itertools.pairwise([0, *ends]), buckets, strict=True)
        batches = iter([Batch(range(*span), bucket) for span, bucket in spans])
        return [list(itertools.islice(batches, count)) for count in self._index["shard_batches"].tolist()]

    @cached_property
    def shards(self) -> list[Shard]:
        """What each shard holds."""
        spans = (range(batches[0].sequences.start, batches[-1].sequences.stop) for batches in self.batches)
        return [Shard(number, sum(map(self.rows, span)), len(span)) for number, span in enumerate(spans)]

    def tokens_in(self, sequences: range) -> int:
        """How many tokens consecutive sequences have."""
        return self._ends[sequences.stop] - self._ends[sequences.start]

    def tokens_of_shard(self, number: int) -> int:
        """How many tokens the sequences of a shard have."""
        batches = self.batches[number]
        return self.tokens_in(range(batches[0].sequences.start, batches[-1].sequences.stop))

    @cached_property
    def _bucket_sequences(self) -> list[range]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for batch in itertools.chain(*self.batches):
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
                row = int(self._index["question"][found[0, 0]])
                return f"row {row} of the texts" if self.tokens == "all" else f"{sign}, question {row}"
        return "in no demonstration"

    def _demonstrations(self) -> Iterator[tuple[str, Tensor, Tensor | int]]:
        """Sign, first rows and numbers of rows of the demonstrations."""
        if self.tokens == "all":
            yield "text", *self._index["texts"].T
            return
        if self.tokens == "answer":
            pairs = self._index["answer_pairs"]
            yield "positive", pairs[:, 1], pairs[:, 2]
            yield "negative", pairs[:, 0], pairs[:, 2]
            return
        for sign in ("positive", "negative", "neutral"):
            if sign in self._index:
                yield sign, self._index[sign], 1


def read_plan(path: Path, tokens: str) -> Plan:
    """What a store's index says; raises ValueError where it is damaged. Token ids stay on disk until they are run."""
    plan = Plan(read_index(path, without=["token_ids"]), tokens, partial(read_token_ids, path))
    if not is_whole(path / INDEX):
        raise ValueError(f"{path / INDEX} is damaged: delete it to have it written again")
    return plan


def run_shards(
    model: nn.Module, plan: Plan, shards: Sequence[Shard], metadata: dict[str, Any], together: Processes
) -> Iterator[tuple[Shard, dict[str, Tensor]]]:
    """Run the batches of some shards: yields the shard and, of each tensor, its next rows, (r, d).

    Args:
        model: without a `PeftModel` around it, see `inference`.
        plan: what is run.
        shards: what is missing of this process's share.
        metadata: of the store.
        together: the processes that collect.

    Raises:
        ValueError: an activation is not finite, in the dtype of the store.
    """
    names = {f"{site}.{i}": name for site, of_site in metadata["modules"].items() for i, name in of_site.items()}
    shape = StoreShape.of(metadata)
    mine = together.share(plan.shards)
    total, left = (sum(plan.tokens_of_shard(shard.number) for shard in some) for some in (mine, shards))
    bar = together.bar("collecting", total, total - left)
    with bar, Recorder(model, names, mean=plan.tokens == "mean") as recorder:
        runner, progress, size = _Runner(model, plan, recorder), TokenProgress(model, bar), 0
        for shard in shards:
            for batch in plan.batches[shard.number]:
                with progress.over(plan.tokens_in(batch.sequences)):
                    rows = runner.run(batch)
                for name, tensor in rows.items():
                    _check_finite(tensor.to(shape.dtype), name, plan, batch)
                yield shard, rows
                size += len(tensor) * shape.row_bytes
                bar.set_postfix_str(f"{size / 1e6:,.1f} MB", refresh=False)


class _Runner:
    """Runs batches. The cache of a bucket's prompts is made by the first of its batches."""

    def __init__(self, model: nn.Module, plan: Plan, recorder: Recorder):
        self.model, self.plan, self.recorder = model, plan, recorder
        self._bucket: int | None = None
        self._cache: Cache | None = None
        self._rows: dict[tuple[int, ...], int] = {}

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Name of each tensor to the kept rows of a batch, (r, d), in the order of its sequences and positions."""
        plan, cut = self.plan, self.plan.cuts[batch.bucket][1]
        cache = None
        if cut:
            self._enter(batch.bucket)
            cache = select_rows(self._cache, [self._rows[plan.prompt(i, batch.bucket)] for i in batch.sequences])
        ids, mask = pad([plan.ids(i)[cut:] for i in batch.sequences], input_device(self.model))
        kept = torch.zeros_like(ids, dtype=torch.bool)
        for row, i in zip(kept, batch.sequences, strict=True):
            start, stop = plan.span(i)
            row[start - cut : stop - cut] = True
        mask = torch.cat((mask.new_ones(len(mask), cut), mask), dim=1)
        with self.recorder.keeping(kept) as rows:
            # The model without its LM head, whose logits nobody reads.
            cached = {} if cache is None else {cache_name(self.model): cache}
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **cached)
        return rows

    def _enter(self, bucket: int) -> None:
        if bucket != self._bucket:
            self._cache = None  # before the next one takes its memory
            prompts = self.plan.prompts(bucket)
            self._cache = prompt_cache(self.model, prompts, common=self.plan.cuts[bucket][0])
            self._rows = {prompt: row for row, prompt in enumerate(prompts)}
            self._bucket = bucket


def _check_finite(rows: Tensor, name: str, plan: Plan, batch: Batch) -> None:
    if rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite():  # a sum hides no NaN or infinity
        return
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        ends = torch.tensor([plan.rows(i) for i in batch.sequences]).cumsum(dim=0)
        number = batch.sequences[int((ends <= row).sum())]
        site, _, layer = name.partition(".")
        raise ValueError(
            f"layer {layer}: the activations ({site}) of {plan.describe(number)} are not finite: "
            "load the model and store in a wider dtype (bfloat16 or float32)"
        )
