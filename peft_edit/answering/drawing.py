"""Which token comes next: the most likely one, or one that is drawn for each sequence by a seed of its own.

`generate` draws the tokens of a batch from one stream of random numbers, so that a sample depends on what else is in
the batch. Here each sequence has its own stream, and a token is drawn by the Gumbel-max trick: the argument of the
maximum of log p + g, with g = -log of an exponential number for each token of the vocabulary, is distributed by p. Of
all ways to draw from two distributions with the same random numbers it lets them agree about as often as can be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .options import AnswerOptions


def seed_of(seed: int, row_id: int, number: int) -> int:
    """The seed of one of several answers to a row, in [0, 2^63)."""
    digest = hashlib.blake2b(f"{seed} {row_id} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class Drawing(LogitsProcessor):
    """Chooses the tokens of a batch, one call a step, and keeps how likely the model found them.

    Args:
        options: of the answers.
        seeds: of each of the b sequences.

    Attributes:
        log_likelihoods: of each step (b,), on the CPU: log of the chosen token's probability, in nats, in the model's
            own distribution. Those of steps after a sequence's end mean nothing.
    """

    def __init__(self, options: AnswerOptions, seeds: Sequence[int]):
        self.log_likelihoods: list[Tensor] = []
        self._seeds = list(seeds) if options.do_sample else []
        self._generators: list[torch.Generator] = []
        self._processors = _processors(options)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, V) of which all are -inf but those of the chosen tokens."""
        log_p = scores.float().log_softmax(dim=-1)
        scores = self._processors(input_ids, scores)
        if self._seeds:
            scores = scores - self._exponential(scores).log()
        chosen = scores.argmax(dim=-1, keepdim=True)
        self.log_likelihoods.append(log_p.gather(1, chosen).squeeze(1).cpu())
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    def _exponential(self, scores: Tensor) -> Tensor:
        """Exponential numbers (b, V), above 0, of each sequence's own stream."""
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        numbers = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(numbers, self._generators, strict=True):
            row.exponential_(generator=generator)
        return numbers.clamp_min_(torch.finfo(torch.float32).tiny)


def _processors(options: AnswerOptions) -> LogitsProcessorList:
    """Those of Transformers, in its order."""
    found = LogitsProcessorList()
    if not options.do_sample:
        return found
    if options.temperature != 1:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p:
        found.append(MinPLogitsWarper(float(options.min_p)))
    return found
