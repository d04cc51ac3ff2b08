"""Stored activations before and after an adapter's edit: spectra, probes, norms, and places in the plane. The model
takes no part: of it the structure is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.store import ActivationStore, Store, open_store
from ..adapters.match import check_retain, check_store
from ..arguments import Argument, ArgumentError
from ..choosing.probe import probe_accuracy
from ..extras import import_extra
from ..models.sites import layer_index
from ..places import ROW_TOKENS
from ..plotting.stored import QUANTILES
from ..tuners.layer import EditLayer, edit_layers
from ..tuners.method import method_of
from ..tuners.shown import LayerSpectra


if TYPE_CHECKING:
    import numpy as np

# Rows of each group that are taken where there are more, at random by this seed.
NORM_ROWS, PLANE_ROWS, SEED = 2000, 200, 0
EDITED = ", edited"
# Norms over so many medians are of massive activations, which the first token of a text mostly has
# (https://arxiv.org/abs/2402.17762): one of them in the plane, and all others are a point.
MASSIVE = 8
# Neighbours that t-SNE keeps near, and the fewest groups' rows for that.
NEIGHBOURS, FEWEST = 30, 12


class StoredEdit:
    """An adapter and the activations that it was learnt from.

    Args:
        model: with the adapter; the base model may be on the meta device.
        store: activations of the base model.
        retain: activations of texts that have nothing to do with it, or None.
        allow_fingerprint_mismatch: also where a store says that it was collected from another model.

    Raises:
        ValueError: the adapter edits several modules of a block, or a store does not suit it.
    """

    def __init__(
        self,
        model: PeftModel,
        store: Store,
        retain: Store | None = None,
        *,
        allow_fingerprint_mismatch: bool = False,
    ):
        self.adapter = model.active_adapters[0]
        self.config = model.peft_config[self.adapter]
        layers = [layer for layer in edit_layers(model) if layer.is_fitted(self.adapter)]
        self.layers: dict[int, EditLayer] = {layer_index(layer.site): layer for layer in layers}
        if None in self.layers or len(self.layers) < len(layers):
            raise ArgumentError(
                "pictures of stored activations are of one site in a block, and the adapter has others: leave ",
                *(Argument("store"), " out"),
            )
        if not self.layers:
            raise ArgumentError("the adapter edits nothing, so that there is nothing to show of ", Argument("store"))
        given = model, self.config.site, self.layers, allow_fingerprint_mismatch
        self.store = check_store(given[0], open_store(store), *given[1:])
        self.retain = None if retain is None else check_retain(given[0], open_store(retain), *given[1:])

    def spectra(self) -> list[LayerSpectra]:
        """Of each layer, where the method decomposes activations; otherwise none."""
        method = method_of(self.config)
        if method.spectra is None:
            return []
        found = method.spectra(self.config, self.layers, self.store, self.retain)
        with tqdm(found, desc="spectra", unit="layer", total=len(self.layers), leave=None) as progress:
            return list(progress)

    def probes(self) -> dict[str, dict[int, float]]:
        """Accuracy of linear probes on each layer, where the store has one row an answer; otherwise none. A probe is
        fitted to one half of the questions and asked about the other."""
        if self.store.tokens not in ROW_TOKENS or len(self.store.questions().unique()) < 2:
            return {}
        with tqdm(self.store.layers, desc="probes", unit="layer", leave=None) as progress:
            return {"stored activations": {index: probe_accuracy(self.store, index) for index in progress}}

    def norms(self) -> dict[str, dict[int, list[float]]]:
        """Quantiles of the norms of each group's activations, before and after the edit, see `norms_figure`."""
        found: dict[str, dict[int, list[float]]] = {}
        with tqdm(sorted(self.layers), desc="norms", unit="layer", leave=None) as progress:
            for index in progress:
                for name, h in self.before_and_after(index, NORM_ROWS):
                    found.setdefault(name, {})[index] = _quantiles(h.float().norm(dim=-1))
        return found

    def before_and_after(self, index: int, most: int) -> Iterator[tuple[str, Tensor]]:
        """Name of each group and its activations, (n, d), as stored and edited."""
        for name, h in self.groups(index, most):
            yield name, h
            yield name + EDITED, self.edited(index, h)

    def groups(self, index: int, most: int) -> Iterator[tuple[str, Tensor]]:
        """The activations of positive and negative answers at a block, at most so many rows of each."""
        for sign in ("positive", "negative"):
            yield sign, self._gather(self.store, self.store.rows(sign), index, most)

    def edited(self, index: int, h: Tensor) -> Tensor:
        """Activations, (n, d), of a block as the adapter edits them where no block before it edits."""
        with torch.no_grad():
            return self.layers[index].edit_scope(h, self.adapter)

    def in_plane(self, index: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Title of each way into the plane, and name of each group to its points, (n, 2).

        The groups are positive, negative and neutral activations, those of texts to leave alone, and the negative ones
        after the edit. Principal components are those of all but the last. Massive activations are left out.
        """
        groups = dict(self.groups(index, PLANE_ROWS))
        if self.store.has_neutral:
            groups["neutral"] = _some(self.store.neutral(index), PLANE_ROWS)
        if self.retain is not None:
            groups["retain"] = self._gather(self.retain, self.retain.text_tokens(), index, PLANE_ROWS)
        groups = without_massive(groups)
        stored = torch.cat(list(groups.values())).double().numpy()
        groups["negative" + EDITED] = self.edited(index, groups["negative"])
        together = torch.cat(list(groups.values())).double().numpy()
        sizes = [len(rows) for rows in groups.values()]
        pca = import_extra("sklearn.decomposition", "plots", "a plot of activations").PCA(2, random_state=SEED)
        yield f"Principal components, layer {index}", _split(pca.fit(stored).transform(together), groups, sizes)
        if len(together) >= FEWEST:
            manifold = import_extra("sklearn.manifold", "plots", "a plot of activations")
            near = min(NEIGHBOURS, (len(together) - 1) / 3)
            tsne = manifold.TSNE(2, perplexity=near, init="pca", random_state=SEED)
            yield f"t-SNE, layer {index}", _split(tsne.fit_transform(together), groups, sizes)

    def _gather(self, store: ActivationStore, rows: Tensor, index: int, most: int) -> Tensor:
        return store.gather(_some(rows, most), [index])[0]


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, the same ones each time, in their order."""
    if len(rows) <= most:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:most]
    return rows[chosen.sort().values]


def without_massive(groups: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of each group whose norm is at most `MASSIVE` times the median of all."""
    limit = MASSIVE * torch.cat(list(groups.values())).float().norm(dim=-1).median()
    return {name: rows[rows.float().norm(dim=-1) <= limit] for name, rows in groups.items()}


def _quantiles(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor(QUANTILES)).tolist()


def _split(points: np.ndarray, groups: Mapping[str, Tensor], sizes: list[int]) -> dict[str, np.ndarray]:
    import numpy as np

    return dict(zip(groups, np.split(points, np.cumsum(sizes)[:-1]), strict=True))
