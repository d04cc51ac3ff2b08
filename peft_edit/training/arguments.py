"""Options of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments

from ..arguments import Argument, ArgumentError, check_options


# Options of `transformers.TrainingArguments` that would be ignored, or fail later: the values that do no harm, and why
# others do. Transformers versions differ in which of them they have.
OFF = (None, False, 0, 0.0)
NO_MODEL = "the language model takes no part in the training"
NO_TEXT = "token pairs are no texts, and have no lengths"
MEANS = "the metrics are means over all token pairs of an evaluation"
UNSUITED: dict[str, tuple[tuple, str]] = {
    "label_smoothing_factor": (OFF, "the data are two activations of a pair, and no labels of tokens"),
    "neftune_noise_alpha": (OFF, f"{NO_MODEL}, nor do its embeddings"),
    "gradient_checkpointing": (OFF, NO_MODEL),
    "activation_checkpointing": (OFF, NO_MODEL),
    "use_liger_kernel": (OFF, NO_MODEL),
    "group_by_length": (OFF, NO_TEXT),
    "train_sampling_strategy": ((None, "random", "sequential"), NO_TEXT),
    "include_num_input_tokens_seen": ((*OFF, "no"), NO_TEXT),
    "batch_eval_metrics": (OFF, MEANS),
    "eval_do_concat_batches": ((None, True), MEANS),
    "optim_target_modules": (OFF, "the weights of all blocks are stacked, and lie in no linear layers"),
    "deepspeed": ((*OFF, ""), "it trains in one or several plain processes"),
    "fsdp": ((*OFF, "", []), "it trains in one or several plain processes"),
    "parallelism_config": ((None,), "it trains in one or several plain processes"),
    "include_for_metrics": ((None, []), "its metrics are its own"),
    "remove_unused_columns": (OFF, "activations have no columns"),
}


@dataclass
class EditTrainingArguments(TrainingArguments):
    """
    Arguments of an [`EditTrainer`]: those of `transformers.TrainingArguments` with the defaults of the HPR paper: 5
    epochs of batches of 16 token pairs, AdamW, learning rate 5e-4, cosine schedule with 5 % warm-up, and the best epoch
    kept.

    `max_grad_norm` is the bound for the gradient of each decoder block by itself: the blocks train together but
    independently of each other.

    `retain_weight` is the weight of the tokens of a retain set beside that of as many positive tokens; without a retain
    set it is not used.
    """

    # The method, for messages.
    method: ClassVar[str] = "this method"

    num_train_epochs: float = field(default=5.0, metadata={"help": "Number of training epochs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Token pairs in a batch, on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Token pairs in a batch of the evaluation."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1 a share of all steps."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Bound for the norm of each block's gradient."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch, best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep besides the best."})
    load_best_model_at_end: bool | None = field(
        default=None, metadata={"help": "Keep the best checkpoint's weights. Default: where there is an evaluation."}
    )
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "What is best."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether the best is the greatest. Default: not for losses and errors."}
    )
    retain_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the tokens to leave alone.", "minimum": 0, "allowed": "of 0 or more and finite"},
    )
    logging_steps: float = field(default=100, metadata={"help": "Steps between logs; below 1 a share of all steps."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Page-locked batches. Default: where CUDA is."}
    )
    # A loss that is not finite stops the training.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not used: such a loss is an error."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: activations have no columns."})

    def __post_init__(self):
        check_options(self, ("retain_weight",))
        self.check_suited()
        if self.load_best_model_at_end is None:
            together = self.save_strategy in (self.eval_strategy, "best")
            self.load_best_model_at_end = self.eval_strategy != "no" and together
        best_by_loss = self.metric_for_best_model is None or self.metric_for_best_model.endswith("loss")
        if self.prediction_loss_only and self.load_best_model_at_end and not best_by_loss:
            raise ArgumentError(
                *(Argument("prediction_loss_only", True), f" leaves out {self.metric_for_best_model!r}, by which the "),
                *("best is chosen: leave it out, or pass ", Argument("metric_for_best_model", "loss")),
            )
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "error"))
        if self.accelerator_config is None:
            # Batches from page-locked memory are copied while the device computes: no step waits for them.
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        super().__post_init__()
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            # They watch the same metric, by default one that falls.
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **(self.lr_scheduler_kwargs or {})}

    def check_suited(self) -> None:
        """Raise ArgumentError for an option that has no meaning here, see `UNSUITED`."""
        for name, (works, reason) in UNSUITED.items():
            if (value := getattr(self, name, None)) not in works:
                raise ArgumentError(Argument(name, value), f" has no meaning for {self.method}: {reason}; leave it out")
