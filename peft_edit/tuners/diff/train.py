"""Activation stores -> trained Diff adapter."""

from __future__ import annotations

from torch import Tensor

from ...training.trainer import EditTrainer
from .arguments import DiffTrainingArguments
from .config import DiffConfig
from .layer import DiffLayer
from .maths import Loss, loss
from .stacked import StackedDiff


class DiffTrainer(EditTrainer):
    """
    Trains the networks of a Diff adapter on stored activations. It is a `transformers.Trainer`, see
    [`~peft_edit.training.trainer.EditTrainer`], on the same stores as `HPRTrainer`.

    Logged besides the loss, which is the mean over the blocks: `positive_loss` and `negative_loss`, the mean squared
    errors at positive and at negative tokens; and `relative_error`, on average and for each block: the latter as a
    share of the mean squared difference, so that 1 is a network that predicts nothing. With a retain set also
    `retain_loss`, the mean square of what is added to its tokens.

    Args:
        model: a `PeftModel` with a Diff adapter, or a Transformers model after `add_adapter`.
        args: [`DiffTrainingArguments`].
        train_dataset: store of `collect_activations(..., site="block", tokens="answer")`, or its folder.
        eval_dataset: a store of other questions; also a dictionary of stores.
        retain_dataset: store of texts to leave alone, `collect_activations(..., site="block", tokens="all")`, or its
            folder (ours; the paper has none). The networks learn to add nothing to their tokens.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: train although a store says that it was collected from another model.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        TypeError: `args` are no `DiffTrainingArguments`.
        ValueError: as in `EditTrainer`.
    """

    config_class = DiffConfig
    layer_class = DiffLayer
    arguments_class = DiffTrainingArguments
    stacked_class = StackedDiff
    trained = "networks"
    score = "relative_error"
    per_layer = ("relative_error",)

    def losses(self, outputs: tuple[Tensor, ...], retain_weight: float = 1.0) -> Loss:
        errors, _, *retained = outputs
        return loss(errors.permute(1, 2, 0), *(squares.T for squares in retained), retain_weight=retain_weight)

    def measures(self, losses: Loss, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        size = outputs[1].mean(dim=0)
        measured = {
            "positive_loss": losses.positive,
            "negative_loss": losses.negative,
            "relative_error": losses.negative / size.clamp_min(1e-30),
        }
        return measured | ({} if losses.retained is None else {"retain_loss": losses.retained})
