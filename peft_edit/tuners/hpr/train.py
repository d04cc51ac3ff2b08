"""Activation stores -> trained HPR adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import Argument, ArgumentError
from ...training.pairs import TokenPairs
from ...training.trainer import EditTrainer
from .arguments import HPRTrainingArguments
from .config import HPRConfig
from .layer import HPRLayer
from .maths import Loss, loss
from .stacked import StackedHPR


__all__ = ["HPRTrainer", "HPRTrainingArguments", "StackedHPR", "TokenPairs"]


class HPRTrainer(EditTrainer):
    """
    Trains the probes and angle networks of an HPR adapter on stored activations. It is a `transformers.Trainer`:
    callbacks, checkpoints, schedules, optimizers, mixed precision and several processes work as everywhere.

    The language model takes no part: it may be on the meta device, and only the adapter is moved to `args.device`. All
    decoder blocks train together in stacked weights, each by its own loss and with its gradient clipped by itself, so
    that a block's training does not depend on which others are trained (with optimizers that treat each weight by
    itself: AdamW, SGD, ...; Adafactor takes statistics of whole tensors). `train` ends with the weights in the adapter.

    Logged besides the loss (HPR, equations 8 to 10), which is the mean over the blocks: `probe_loss`, `angle_loss`,
    `angle_error` (mean |predicted - true| angle of negative tokens, radians) and `probe_accuracy`, the share in [0, 1]
    of right decisions over both tokens of all pairs, on average and for each block. With a retain set also
    `retain_touched`, the share of its tokens in the batches that the probe would have rotated.

    Args:
        model: a `PeftModel` with an HPR adapter, or a Transformers model after `add_adapter`.
        args: [`HPRTrainingArguments`].
        train_dataset: store of `collect_activations(..., site="block", tokens="answer")`, or its folder.
        eval_dataset: a store of other questions; also a dictionary of stores.
        retain_dataset: store of texts to leave alone, `collect_activations(..., site="block", tokens="all")`, or its
            folder (ours; the paper has none). The probe learns that their tokens are positive.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: train although a store says that it was collected from another model.
        kwargs: further arguments of `transformers.Trainer`, such as `callbacks` and `optimizers`; not `data_collator`
            and `compute_metrics`, which are its own.

    Raises:
        TypeError: `args` are no `HPRTrainingArguments`.
        ValueError: a store does not fit the adapter (model, site, layers, hidden size, tokens), the evaluation data are
            missing, the adapter is none of HPR or has other modules to train, or an option has no meaning here, such as
            `gradient_checkpointing`, `label_smoothing_factor`, DeepSpeed and FSDP.
    """

    config_class = HPRConfig
    layer_class = HPRLayer
    arguments_class = HPRTrainingArguments
    stacked_class = StackedHPR
    trained = "probes and angle networks"
    score = "probe_accuracy"
    per_layer = ("probe_accuracy",)

    def trains(self, layer: int) -> bool:
        return self.adapter_config.edits(layer)

    def _check_adapter(self) -> None:
        if not self.layers:
            raise ArgumentError(
                f"adapter {self.adapter_name!r} edits no layer (",
                Argument("selected_layers", []),
                "): nothing to train",
            )
        super()._check_adapter()

    def losses(self, outputs: tuple[Tensor, ...], retain_weight: float = 1.0) -> Loss:
        logits, angles, target, *retained = outputs
        return _losses(logits, angles, target, *retained, weight=retain_weight)

    def measures(self, losses: Loss, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        logits, angles, target, *retained = outputs
        accuracy, error = _scores(logits, angles, target)
        measured = {
            "probe_loss": losses.probe,
            "angle_loss": losses.angle,
            "probe_accuracy": accuracy,
            "angle_error": error,
        }
        return measured | ({"retain_touched": _touched(*retained)} if retained else {})


def _losses(logits: Tensor, angles: Tensor, target: Tensor, *retained: Tensor, weight: float = 1.0) -> Loss:
    """Loss terms of each block, (blocks,), of what `StackedHPR` returns."""
    logits_of_retained, angles_of_retained = (x.T for x in retained) if retained else (None, None)
    return loss(
        logits.permute(1, 2, 0),
        angles.permute(1, 2, 0),
        target.T,
        retained_logits=logits_of_retained,
        retained_angles_rad=angles_of_retained,
        retain_weight=weight,
    )


def _scores(logits: Tensor, angles: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probe accuracy and mean absolute error of the negative tokens' angles, (blocks,) each."""
    right = torch.stack((logits[..., 0] > 0, logits[..., 1] <= 0))
    return right.float().mean(dim=(0, 1)), (angles[..., 1] - target).abs().mean(dim=0)


def _touched(logits: Tensor, angles: Tensor) -> Tensor:
    """Share of the tokens to leave alone that the paper's gate would let rotate, (blocks,)."""
    return (logits <= 0).float().mean(dim=0)
