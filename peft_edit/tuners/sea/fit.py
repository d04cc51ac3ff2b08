"""Activation store -> fitted SEA adapter, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...activations.store import ActivationStore, Store, open_store
from ...adapters.changes import relative_change, warn_of_change
from ...adapters.match import (
    check_retain,
    check_store,
    check_unmerged,
    describe_data,
    describe_retained,
    find_adapter,
    replace_config,
)
from ...arguments import Argument, ArgumentError, parts_of
from ...processes import processes
from .config import SEAConfig
from .layer import SEALayer
from .maths import FEATURE_MAPS, check_finite, edit, fit, project, rescale_statistics
from .subspaces import second_moment


@dataclass(frozen=True)
class SiteFit:
    """What the fit found at one site.

    Attributes:
        layer: index of the decoder block.
        site: name of the module.
        positive_rank, negative_rank: number of directions kept.
        positive_energy, negative_energy: share of the squared singular values that they carry, in (0, 1].
        positive_spectrum, negative_spectrum: their singular values, in decreasing order.
        signature: sum of the singular values of E^T L / n (SEA): how well the site tells the behaviours apart.
        rms: root mean square of the neutral activations.
        mean_rescale, mean_rescale_deviation: mean and standard deviation of ||h|| / ||y|| over the neutral
            demonstrations.
        relative_error, unscaled_error: what replacing the token's own ratio by the mean costs, and what leaving it out
            costs, see `RescaleStatistics`.
        strength: of the edit whose ratio was taken.
        retained_rank: number of directions that a retain set keeps from the edit.
        change: mean of ||out - h|| / ||h|| over the retain set's tokens, without one over the neutral demonstrations.
    """

    layer: int
    site: str
    positive_rank: int
    negative_rank: int
    positive_energy: float
    negative_energy: float
    positive_spectrum: list[float]
    negative_spectrum: list[float]
    signature: float
    rms: float
    mean_rescale: float
    mean_rescale_deviation: float
    relative_error: float
    unscaled_error: float
    strength: float
    retained_rank: int
    change: float


# What the configuration keeps of a site besides its ranks.
RECORDED = ("rms", "mean_rescale", "mean_rescale_deviation", "relative_error", "unscaled_error", "strength", "change")
# Rows of a retain set that are read at once.
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class SEAFit:
    """Result of `fit_sea`: one `SiteFit` for each layer, in increasing order.

    Attributes:
        adapter_name: the adapter that was fitted.
        demonstrations: number of demonstrations.
        layers: the sites.
    """

    adapter_name: str
    demonstrations: int
    layers: list[SiteFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def fit_sea(
    model: nn.Module,
    store: Store,
    adapter_name: str | None = None,
    allow_fingerprint_mismatch: bool = False,
    *,
    retain: Store | None = None,
) -> SEAFit:
    """Fit a SEA adapter to stored activations (SEA), in closed form and float64, one layer in memory at a time.

    Under `accelerate launch` or `torchrun` the processes share the layers, and all end with the same adapter.
    Afterwards the adapter edits, its factors are ready to be saved and its configuration holds the ranks and
    statistics. Nothing changes when the fit of any layer fails. Fitting again replaces the fit.

    Args:
        model: a model with a SEA adapter: from `get_peft_model`, or a Transformers model after `add_adapter`.
        store: activations collected from that model, with `tokens` "last", "mean" or "random"; or their folder.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: fit although the store says that it was collected from another model.
        retain: activations of texts to leave alone, collected with `tokens="all"`, or their folder. The edit does not
            touch the directions that carry `retain_energy` of their second moment (ours; the paper has none).

    Raises:
        ValueError: a store does not fit the adapter (model, site, layers, hidden size, tokens), has fewer than two
            demonstrations or activations that are not finite; the adapter is merged, missing or no SEA adapter.
    """
    store = open_store(store)
    adapter_name, config, layers = find_adapter(model, adapter_name, SEAConfig, SEALayer)
    check_unmerged(layers.values(), "fit")
    store = check_store(model, store, config.site, layers, allow_fingerprint_mismatch)
    if retain is not None:
        retain = check_retain(model, open_store(retain), config.site, layers, allow_fingerprint_mismatch)

    if retain is not None:
        check_retains(config)
    together = processes()

    def fit_share() -> list[tuple[SiteFit, tuple[Tensor, Tensor]]]:
        mine, share = together.share(sorted(layers)), []
        for index in tqdm(mine, desc="fitting", unit="layer", leave=None, disable=not together.is_main):
            try:
                share.append(fit_site(store, retain, index, layers[index], config))
            except ValueError as error:
                raise ArgumentError(f"layer {index}: ", *parts_of(error)) from error
        return share

    fitted = [site for share in together.gather(together.agree(fit_share)) for site in share]
    fits = sorted((site_fit for site_fit, _ in fitted), key=lambda site_fit: site_fit.layer)
    for site_fit, factors in fitted:
        layer = layers[site_fit.layer]
        layer.set_factors(adapter_name, *(factor.to(_device(layer)) for factor in factors), checked=True)
    replace_config(
        model,
        adapter_name,
        rank_pattern={f.site: [f.positive_rank, f.negative_rank] for f in fits},
        fit_statistics={f.site: {name: getattr(f, name) for name in RECORDED} for f in fits},
        base_model_fingerprint=store.metadata["fingerprint"],
        fitted_on={
            **describe_data(store),
            "demonstrations": len(store),
            **({} if retain is None else {"retain": describe_retained(retain)}),
        },
    )
    rows = "the neutral demonstrations" if retain is None else "the tokens of the retain set"
    warn_of_change({f.layer: f.change for f in fits}, rows)
    return SEAFit(adapter_name, len(store), fits)


def check_retains(config: SEAConfig) -> None:
    """Raise ValueError where an edit changes every token, those of a retain set too, whatever its directions are."""
    kind = "leaves no token of a retain set as it is"
    if config.projections == "positive":
        raise ArgumentError(
            *(Argument("projections", "positive"), f" keeps nothing but its directions and {kind}: take another, or "),
            *("leave out ", Argument("retain")),
        )
    if config.rescale == "average":
        raise ArgumentError(
            *(
                Argument("rescale", "average"),
                f" takes half of each projection and {kind}: take another, or leave out ",
            ),
            Argument("retain"),
        )


def fit_site(
    store: ActivationStore, retain: ActivationStore | None, index: int, layer: SEALayer, config: SEAConfig
) -> tuple[SiteFit, tuple[Tensor, Tensor]]:
    """What the fit of a layer finds, and the two factors, (k+, d) and (k-, d), float32 on the CPU; nothing is changed.

    Args:
        store, retain: at the adapter's site; the latter None without texts to leave alone.
        index: of the decoder block.
        layer: that is to be fitted.
        config: of the adapter.
    """
    device = _device(layer)
    # MPS has no float64.
    fit_device = torch.device("cpu") if device.type in ("meta", "mps") else device
    neutral, positive, negative = (
        tensor.to(fit_device, torch.float64)
        for tensor in (store.neutral(index), store.positive(index), store.negative(index))
    )
    rms = float(neutral.square().mean().sqrt())
    scale = 1.0 if config.input_scale is None else config.input_scale * rms
    retained = None
    if retain is not None:
        phi = mapped(config, scale)
        chunks = (phi(chunk) for chunk in text_rows(retain, index, fit_device))
        retained = second_moment(chunks, len(retain)).leading(config.retain_energy)
    fitted = fit(
        neutral,
        positive,
        negative,
        positive_energy=config.positive_energy,
        negative_energy=config.negative_energy,
        centered=config.centered,
        feature_map=config.feature_map,
        scale=scale,
        retained=retained,
    )
    bases = fitted.positive.basis, fitted.negative.basis
    left_alone = None if retain is None else text_rows(retain, index, fit_device)
    statistics = site_statistics(neutral, *bases, config, scale, left_alone)
    site_fit = SiteFit(
        layer=index,
        site=layer.site,
        positive_rank=len(fitted.positive.basis),
        negative_rank=len(fitted.negative.basis),
        positive_energy=fitted.positive.energy,
        negative_energy=fitted.negative.energy,
        positive_spectrum=fitted.positive.singular_values.tolist(),
        negative_spectrum=fitted.negative.singular_values.tolist(),
        signature=fitted.signature,
        retained_rank=0 if retained is None else len(retained),
        **statistics,
    )
    # On the CPU, so that processes on other devices can take them over.
    return site_fit, tuple(spectrum.basis.float().cpu() for spectrum in (fitted.positive, fitted.negative))


def text_rows(store: ActivationStore, index: int, device: torch.device) -> Iterator[Tensor]:
    """Activations of the tokens of a store's texts at a layer, (r, d) each, float64."""
    for rows in store.text_tokens().split(CHUNK_ROWS):
        chunk = store.gather(rows, [index])[0].to(device, torch.float64)
        check_finite("retain", chunk)
        yield chunk


def mapped(config: SEAConfig, scale: float) -> Callable[[Tensor], Tensor]:
    """What the fit does with activations before it decomposes them."""
    if config.feature_map is None:
        return lambda x: x
    return lambda x: FEATURE_MAPS[config.feature_map].forward(x / scale)


def site_statistics(
    neutral: Tensor,
    positive: Tensor,
    negative: Tensor,
    config: SEAConfig,
    scale: float = 1.0,
    left_alone: Iterable[Tensor] | None = None,
) -> dict[str, float]:
    """What the configuration records of a site, see `RECORDED`.

    Args:
        neutral: (n, d), neutral activations, float64.
        positive, negative: (k+, d) and (k-, d), the factors.
        config: of the edit.
        scale: divisor before the feature map.
        left_alone: activations of the retain set, (r, d) each, float64; None for the neutral ones.
    """
    edit_site = partial(
        edit,
        positive=partial(project, basis=positive),
        negative=partial(project, basis=negative),
        projections=config.projections,
        feature_map=config.feature_map,
        feature_space=config.feature_space,
        scale=scale,
    )
    edited = edit_site(neutral, rescale="none", strength=config.statistics_strength)
    ratio = rescale_statistics(neutral, edited)
    as_configured = {"rescale": config.rescale, "mean_rescale": ratio.mean, "strength": config.strength}
    values = (
        float(neutral.square().mean().sqrt()),
        ratio.mean,
        ratio.deviation,
        ratio.relative_error,
        ratio.unscaled_error,
        config.statistics_strength,
        relative_change([neutral] if left_alone is None else left_alone, partial(edit_site, **as_configured)),
    )
    return dict(zip(RECORDED, values, strict=True))


def _device(layer: SEALayer) -> torch.device:
    """Where the site's output is, whatever has been done with earlier adapters."""
    device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    return torch.device("cpu") if device is None else device
