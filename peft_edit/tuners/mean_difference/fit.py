"""Activation store -> fitted mean-difference adapter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...activations.store import ActivationStore, Store, open_store
from ...adapters.changes import warn_of_change
from ...adapters.match import check_store, check_unmerged, describe_data, find_adapter, replace_config
from .config import MeanDifferenceConfig
from .layer import MeanDifferenceLayer


# Token pairs whose activations are in memory at once.
CHUNK_PAIRS = 16_384


@dataclass(frozen=True)
class SiteFit:
    """What the fit found at one site.

    Attributes:
        layer: index of the decoder block.
        site: name of the module.
        norm: length of the difference of the means, before `scale_to_rms` scales it.
        rms: root mean square of the site's activations, positive and negative ones.
        change: length of what is added, over the root mean square of the lengths of these activations. It is added to
            every token, so that a retain set could change nothing: lower the strength.
    """

    layer: int
    site: str
    norm: float
    rms: float
    change: float


@dataclass(frozen=True)
class MeanDifferenceFit:
    """Result of `fit_mean_difference`: one `SiteFit` for each layer, in increasing order.

    Attributes:
        adapter_name: the adapter that was fitted.
        demonstrations: number of demonstrations, or of token pairs where the store holds every answer token.
        layers: the sites.
    """

    adapter_name: str
    demonstrations: int
    layers: list[SiteFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def fit_mean_difference(
    model: nn.Module,
    store: Store,
    adapter_name: str | None = None,
    allow_fingerprint_mismatch: bool = False,
) -> MeanDifferenceFit:
    """Fit a mean-difference adapter to stored activations, in float64: v = mean(h+) - mean(h-) (CAA, equation 2).

    Afterwards the adapter edits, its vectors are ready to be saved and its configuration says what it was fitted on.
    Nothing changes when the fit of any layer fails. Fitting again replaces the fit.

    Args:
        model: a model with a mean-difference adapter: from `get_peft_model`, or a Transformers model after
            `add_adapter`.
        store: activations collected from that model, of whatever `tokens`; or their folder. With `tokens="answer"` the
            means are over the token pairs.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: fit although the store says that it was collected from another model.

    Raises:
        ValueError: the store does not fit the adapter (model, site, layers, hidden size), is empty, has activations
            that are not finite or means that are equal; the adapter is merged, missing or of another method.
    """
    store = open_store(store)
    adapter_name, config, layers = find_adapter(model, adapter_name, MeanDifferenceConfig, MeanDifferenceLayer)
    check_unmerged(layers.values(), "fit")
    if len(store) == 0:
        raise ValueError(f"{store.path} holds no demonstration: collect some")
    store = check_store(model, store, config.site, layers, allow_fingerprint_mismatch)

    vectors, fits = {}, []
    for index, layer in tqdm(layers.items(), desc="fitting", unit="layer", leave=None):
        vector, rms = mean_difference(store, index)
        if not vector.any():
            raise ValueError(
                f"layer {index}: positive and negative activations have the same mean, so that there is nothing to "
                "add: check the data"
            )
        norm = float(vector.norm())
        if config.scale_to_rms:
            vector = vector * (rms / vector.square().mean().sqrt())
        vectors[index] = vector.float()
        if not (vectors[index].isfinite().all() and math.isfinite(norm) and math.isfinite(rms)):
            raise ValueError(
                f"layer {index}: the activations of {store.path} are not finite, or their means differ by more than "
                "float32 holds: collect them in a wider dtype, or leave the questions with huge ones out"
            )
        change = abs(config.strength) * float(vector.norm()) / (rms * math.sqrt(store.hidden_size))
        fits.append(SiteFit(index, layer.site, norm=norm, rms=rms, change=change))
    for index, layer in layers.items():
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        layer.set_vector(adapter_name, vectors[index].to(device), checked=True)
    counted = store.counted.replace(" ", "_")
    replace_config(
        model,
        adapter_name,
        fit_statistics={fit.site: {"norm": fit.norm, "rms": fit.rms} for fit in fits},
        base_model_fingerprint=store.metadata["fingerprint"],
        fitted_on={**describe_data(store), counted: len(store)},
    )
    warn_of_change({fit.layer: fit.change for fit in fits}, "activations")
    return MeanDifferenceFit(adapter_name, len(store), fits)


def mean_difference(store: ActivationStore, layer: int) -> tuple[Tensor, float]:
    """mean(h+) - mean(h-), (d,) float64, and the root mean square of all of these activations."""
    sums, squares = [], 0.0
    for sign, column in (("positive", 1), ("negative", 0)):
        if store.tokens == "answer":
            chunks = (store.gather(rows, [layer])[0] for rows in store.pairs()[:, column].split(CHUNK_PAIRS))
        else:
            chunks = iter((getattr(store, sign)(layer),))
        total = torch.zeros(store.hidden_size, dtype=torch.float64)
        for chunk in chunks:
            chunk = chunk.double()
            total += chunk.sum(dim=0)
            squares += float(chunk.square().sum())
        sums.append(total)
    count = len(store)
    return (sums[0] - sums[1]) / count, (squares / (2 * count * store.hidden_size)) ** 0.5
