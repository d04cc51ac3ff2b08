"""Options of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...training.arguments import EditTrainingArguments


@dataclass
class HPRTrainingArguments(EditTrainingArguments):
    """
    Arguments of a [`HPRTrainer`]: those of `transformers.TrainingArguments` with the defaults of the HPR paper: 5
    epochs of batches of 16 token pairs, AdamW, learning rate 5e-4, cosine schedule with 5 % warm-up, and the epoch with
    the most accurate probes kept.

    Of epochs with equally accurate probes the first is kept. Where the accuracy reaches 1 early, that leaves the angle
    networks hardly trained: pass `metric_for_best_model="loss"`.

    `max_grad_norm` is the bound for the gradient of each decoder block by itself: the blocks train together but
    independently of each other.

    `retain_weight` is the weight of the tokens of a retain set beside that of as many positive tokens; without a retain
    set it is not used.
    """

    method: ClassVar[str] = "HPR"

    metric_for_best_model: str | None = field(default="probe_accuracy", metadata={"help": "What is best."})
