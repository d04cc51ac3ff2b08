"""The benefit of many edits on the same questions, for which the base model is run once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.multiple_choice import MultipleChoiceResult, evaluate_multiple_choice
from .sharing import SharedPasses


# Questions on which it is seen whether blocks can be left out.
SAMPLE = 2


class SharedQuestions:
    """Questions, the base model's scores, and what enters its blocks.

    Args:
        model: the base model.
        tokenizer: of the model.
        data: a contrast set.
        needs: numbers of first blocks that edits leave as they are, one for each edit.
        memory: bytes for what enters the blocks.
        options: of `evaluate_multiple_choice`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        needs: Iterable[int],
        memory: int,
        **options: Any,
    ):
        self._evaluate = partial(evaluate_multiple_choice, tokenizer=tokenizer, **options)
        self._data = data
        sample = data.select(range(min(SAMPLE, len(data))))
        self.passes = SharedPasses(
            model,
            needs,
            run=lambda: _scores(self._evaluate(model, data=sample)),
            samples=len(sample) / len(data),
            memory=memory,
        )
        with self.passes.recording():
            self.base = self._evaluate(model, data=data)
        # Tokens that pass each block in an evaluation.
        self.positions = self.passes.block_tokens // len(self.passes.blocks)

    def evaluate(self, model: nn.Module, need: int) -> MultipleChoiceResult:
        """The scores of a model whose active adapters leave so many first blocks as they are."""
        with self.passes.skipping(need):
            return self._evaluate(model, data=self._data)


def _scores(result: MultipleChoiceResult) -> Tensor:
    return torch.tensor([score for question in result.questions for score in question.log_likelihoods.values()])
