"""Run the batches of a plan and give the rows of its sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..models.run import cache_name, input_device, pad, prompt_cache, select_rows
from .plan import Batch, Plan
from .recorder import Recorder


class Runner:
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
