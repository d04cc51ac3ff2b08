"""Options of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...training.arguments import EditTrainingArguments


@dataclass
class DiffTrainingArguments(EditTrainingArguments):
    """
    Arguments of a [`DiffTrainer`]: those of `transformers.TrainingArguments` with the defaults of the HPR paper: 5
    epochs of batches of 16 token pairs, AdamW, learning rate 5e-4, cosine schedule with 5 % warm-up, and the epoch with
    the least loss kept.

    `max_grad_norm` is the bound for the gradient of each decoder block by itself: the blocks train together but
    independently of each other.

    `retain_weight` is the weight of the tokens of a retain set beside that of as many positive tokens; without a retain
    set it is not used.
    """

    method: ClassVar[str] = "Diff"
