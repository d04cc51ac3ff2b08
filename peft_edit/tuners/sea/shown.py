"""The spectra of SEA's fit, for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...activations.store import ActivationStore
from ..shown import LayerSpectra
from .config import SEAConfig
from .fit import fit_site
from .layer import SEALayer


# Of the energy; what is beyond is far below what any edit keeps.
SHOWN_ENERGY = 0.9999


def layer_spectra(
    config: SEAConfig, layers: Mapping[int, SEALayer], store: ActivationStore, retain: ActivationStore | None = None
) -> Iterator[LayerSpectra]:
    """The decomposition of each layer, as the fit with this configuration makes it, but for more directions.

    Args:
        config: of the adapter.
        layers: block index to its layers.
        store: that it was fitted to, at its site.
        retain: the texts that it was told to leave alone, at its site.
    """
    energies = {name: max(SHOWN_ENERGY, getattr(config, name)) for name in ("positive_energy", "negative_energy")}
    for index, layer in sorted(layers.items()):
        found, _ = fit_site(store, retain, index, layer, replace(config, **energies))
        ranks = config.rank_pattern.get(layer.site, [0, 0])
        spectra = {"positive": found.positive_spectrum, "negative": found.negative_spectrum}
        yield LayerSpectra(index, spectra, dict(zip(spectra, ranks, strict=True)), found.signature)
