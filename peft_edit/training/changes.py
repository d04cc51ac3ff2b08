"""How far a trained edit moves activations that it is to leave alone."""

from __future__ import annotations

import torch

from ..adapters.changes import relative_change
from .trainer import EditTrainer


# Activations of a layer that are looked at, spread evenly over those that there are.
ROWS = 4096


@torch.no_grad()
def changes_of(trainer: EditTrainer) -> tuple[dict[int, float], str]:
    """Of each trained layer the mean of ||out - h|| / ||h||, and what the activations are: tokens of the retain set,
    without one those of positive answers, which no method is to move.

    Args:
        trainer: after the training.
    """
    pairs, name = trainer.train_dataset, trainer.adapter_name
    store, rows = pairs.store, pairs.pairs[:, 1].unique()
    if pairs.retain is not None:
        store, rows = pairs.retain, pairs.retained_rows
    rows = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()]
    what = "the tokens of positive answers" if pairs.retain is None else "the tokens of the retain set"
    changes = {}
    for index, layer in trainer.layers.items():
        # Where its modules are: those of blocks that were not loaded are not moved to the device of the training.
        h = store.gather(rows, [index])[0].float().to(next(layer.parameters()).device)
        changes[index] = relative_change([h], lambda x, layer=layer: layer.edit(x, name))
    return changes, what
