"""Which decoder blocks of an HPR adapter edit: those whose probes are most accurate on held-out activations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...activations.store import ActivationStore, Store, open_pairs
from ...adapters.match import check_store, find_adapter, replace_config
from ...arguments import Argument, ArgumentError
from ...models.dtypes import is_finite
from .config import HPRConfig
from .layer import HPRLayer


# Activations in memory at once while a probe is evaluated.
CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class LayerSelection:
    """Result of `select_layers`.

    Attributes:
        adapter_name: the adapter.
        accuracy: index of each block with modules to the accuracy of its probe, in [0, 1].
        selected: the blocks that edit, in increasing order.
    """

    adapter_name: str
    accuracy: dict[int, float]
    selected: list[int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def select_layers(
    model: nn.Module,
    eval_store: Store,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    prune: bool = False,
    adapter_name: str | None = None,
    allow_fingerprint_mismatch: bool = False,
) -> LayerSelection:
    """Let only the blocks with the most accurate probes edit (HPR, section 4; the paper keeps 5).

    The accuracy is the share of right decisions over both tokens of all pairs. `selected_layers` and `probe_accuracy`
    of the adapter's configuration are written; from then on only the selected blocks are saved. Nothing changes when an
    error is raised. The model may be on the meta device.

    Args:
        model: with a trained HPR adapter.
        eval_store: activations of questions that the adapter was not trained on, as for `HPRTrainer`.
        top_k: how many blocks, in [1, number of blocks with modules]; of equal accuracies the lower block is taken.
        threshold: keep all blocks whose accuracy is at least this, in [0, 1]. Either this or `top_k`.
        prune: delete the modules of the other blocks. Without it another selection can follow.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: select although the store says that it was collected from another model.

    Raises:
        ValueError: no evaluation data, neither or both of `top_k` and `threshold`, a value outside its range, a
            threshold that no block reaches, or a store that does not fit the adapter.
    """
    if eval_store is None:
        raise ValueError("select_layers needs held-out activations: pass the store of questions not trained on")
    store = open_pairs(eval_store)
    adapter_name, _, layers = find_adapter(model, adapter_name, HPRConfig, HPRLayer)
    if not layers:
        raise ArgumentError(
            f"adapter {adapter_name!r} has no modules (", Argument("selected_layers", []), "): nothing to select from"
        )
    _check_choice(top_k, threshold, len(layers))
    store = check_store(model, store, "block", layers, allow_fingerprint_mismatch)

    for index, layer in layers.items():
        _check_weights(index, layer, adapter_name)
    with tqdm(layers.items(), desc="evaluating probes", unit="layer", leave=None) as progress:
        accuracy = {index: probe_accuracy(store, index, layer, adapter_name) for index, layer in progress}
    ranked = sorted(accuracy, key=accuracy.get, reverse=True)
    selected = ranked[:top_k] if threshold is None else [i for i in ranked if accuracy[i] >= threshold]
    if not selected:
        best = ranked[0]
        raise ArgumentError(
            f"no probe is at least {threshold} accurate, the best is {accuracy[best]:.4f} of layer {best}: lower the ",
            *(Argument("threshold"), ", or pass ", Argument("top_k")),
        )
    replace_config(
        model,
        adapter_name,
        selected_layers=sorted(selected),
        probe_accuracy={str(index): value for index, value in accuracy.items()},
    )
    if prune:
        for index, layer in layers.items():
            if index not in selected:
                layer.remove_adapter(adapter_name)
    return LayerSelection(adapter_name, accuracy, sorted(selected))


@torch.no_grad()
def probe_accuracy(store: ActivationStore, index: int, layer: HPRLayer, adapter_name: str) -> float:
    """Share in [0, 1] of right decisions of a block's probe over both tokens of all pairs.

    Args:
        store: with `tokens="answer"`.
        index: of the block.
        layer: its modules.
        adapter_name: whose probe.
    """
    device = layer.hpr_probe[adapter_name].weight.device
    chunks = store.answer_chunks(index, CHUNK_ROWS)
    logits = torch.cat([layer.probe_logits(chunk.to(device), adapter_name).cpu() for chunk in chunks])
    if not torch.isfinite(logits).all():
        raise ArgumentError(
            f"the probe of layer {index} gives logits that are not finite: collect {store.path} again (",
            *(Argument("resume", False), ")"),
        )
    negative, positive = logits[store.pairs()].T
    return float(torch.cat((positive > 0, negative <= 0)).double().mean())


def _check_weights(index: int, layer: HPRLayer, adapter_name: str) -> None:
    for part in layer.adapter_layer_names:
        parameters = list(getattr(layer, part)[adapter_name].parameters())
        if any(p.is_meta for p in parameters):
            raise ValueError(f"the weights of layer {index} are on the meta device ({part}): load the adapter first")
        if not all(map(is_finite, parameters)):
            raise ValueError(f"the weights of layer {index} are not finite ({part}): train the adapter again")


def _check_choice(top_k: int | None, threshold: float | None, count: int) -> None:
    if (top_k is None) == (threshold is None):
        given = "neither" if top_k is None else "both"
        raise ArgumentError(
            *("pass either ", Argument("top_k", 5), ", as the paper does, or ", Argument("threshold", 0.9)),
            f" or the like, got {given}",
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= count):
        raise ArgumentError(
            Argument("top_k"),
            f" must be an integer from 1 to {count}, the number of layers with modules, got {top_k!r}",
        )
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 <= threshold <= 1):
        raise ArgumentError(
            Argument("threshold"), f" must be an accuracy in [0, 1], got {threshold!r}: pass 0.9 for 90 %"
        )
