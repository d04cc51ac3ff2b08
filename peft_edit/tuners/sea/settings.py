"""The axes of SEA, and how its settings are made: the directions of a smaller energy are the first of those of a larger
one, so that one decomposition of a site serves all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel, TaskType
from tqdm.auto import tqdm

from ...adapters.match import check_retain, check_store, find_adapter, replace_config
from ...arguments import Argument, ArgumentError, parts_of
from ...choosing.axes import Setting, Settings, Sources, declared, with_adapter
from ...choosing.probe import probe_accuracy
from .config import SEAConfig
from .fit import fit_sea, mapped, site_statistics, text_rows
from .layer import SEALayer
from .maths import FeatureSpace, Projections, Rescale, fit, signature
from .spectra import Spectrum
from .subspaces import second_moment


OF_CONFIG = declared(SEAConfig)


@dataclass(frozen=True, kw_only=True)
class SEASetting(Setting):
    """The fields of `SEAConfig` that a sweep can vary; a `retain_energy` of None is a fit without the retain set."""

    positive_energy: float = field(**OF_CONFIG["positive_energy"])
    negative_energy: float = field(**OF_CONFIG["negative_energy"])
    centered: bool = field(**OF_CONFIG["centered"])
    feature_map: str | None = field(**OF_CONFIG["feature_map"])
    feature_space: FeatureSpace = field(**OF_CONFIG["feature_space"])
    input_scale: float | None = field(**OF_CONFIG["input_scale"])
    rescale: Rescale = field(**OF_CONFIG["rescale"])
    projections: Projections = field(**OF_CONFIG["projections"])
    strength: float = field(**OF_CONFIG["strength"])
    retain_energy: float | None = field(default=None, metadata=OF_CONFIG["retain_energy"]["metadata"])


class Variant(NamedTuple):
    """What a decomposition depends on besides the energies."""

    centered: bool
    feature_map: str | None
    input_scale: float | None
    retain_energy: float | None


@dataclass(frozen=True)
class SiteSpectra:
    """Decomposition of a site for the largest energies that any setting of a variant has."""

    positive: Spectrum
    negative: Spectrum
    rms: float
    scale: float


class SEASettings(Settings):
    """Settings of SEA."""

    kind = SEASetting
    aliases: ClassVar = {"energy": ("positive_energy", "negative_energy")}
    rankings = ("probe", "signature")

    def __init__(self, model, sources: Sources):
        super().__init__(model, sources)
        if sources.adapter is not None:
            raise ArgumentError(Argument("adapter"), " is for methods that are trained: SEA is fitted, leave it out")
        self.store, self.retain = sources.store, sources.retain
        self.site = self.store.site
        self._spectra: dict[tuple[Variant, int], SiteSpectra] = {}
        self._scores: dict[str, dict[int, float]] = {}

    @property
    def layers(self) -> list[int]:
        return self.store.layers

    @property
    def defaults(self) -> dict[str, Any]:
        return {} if self.retain is None else {"retain_energy": SEAConfig.retain_energy}

    def ranking(self, name: str) -> dict[int, float]:
        def of_means(store, index):
            return signature(store.positive(index), store.negative(index))

        if name not in self._scores:
            score = {"probe": probe_accuracy, "signature": of_means}[name]
            self._scores[name] = {index: score(self.store, index) for index in self.layers}
        return self._scores[name]

    def check(self, setting: SEASetting) -> None:
        if setting.retain_energy is not None and self.retain is None:
            raise ArgumentError(Argument("retain_energy"), " needs ", Argument("retain"), ": pass a store of texts too")
        self.config(setting)

    def config(self, setting: SEASetting) -> SEAConfig:
        """The configuration of a setting, without what a fit writes."""
        values = {f.name: getattr(setting, f.name) for f in fields(setting) if f.name != "layers"}
        if setting.retain_energy is None:
            del values["retain_energy"]
        return SEAConfig(
            task_type=TaskType.CAUSAL_LM, site=self.site, layers_to_transform=list(setting.layers), **values
        )

    def group(self, setting: SEASetting) -> Variant:
        return Variant(*(getattr(setting, name) for name in Variant._fields))

    def prepare(self, settings: Sequence[SEASetting]) -> None:
        variants: dict[Variant, list[SEASetting]] = {}
        for setting in settings:
            variants.setdefault(self.group(setting), []).append(setting)
        needed = sorted({index for setting in settings for index in setting.layers})
        with with_adapter(self.model, SEAConfig(site=self.site, layers_to_transform=needed)) as adapted:
            _, _, layers = find_adapter(adapted, None, SEAConfig, SEALayer)
            allow = self.sources.allow_fingerprint_mismatch
            check_store(adapted, self.store, self.site, layers, allow)
            if self.retain is not None:
                self.retain = check_retain(adapted, self.retain, self.site, layers, allow)
        for index in tqdm(needed, desc="decomposing", unit="layer", leave=None):
            of_layer = {v: [s for s in members if index in s.layers] for v, members in variants.items()}
            try:
                self._decompose(index, {variant: members for variant, members in of_layer.items() if members})
            except ValueError as error:
                raise ArgumentError(f"layer {index}: ", *parts_of(error)) from error

    def _decompose(self, index: int, variants: dict[Variant, list[SEASetting]]) -> None:
        sets = [tensor.double() for tensor in self._rows(index)]
        rms = float(sets[0].square().mean().sqrt())
        moments = {}
        for variant, settings in variants.items():
            scale = 1.0 if variant.input_scale is None else variant.input_scale * rms
            retained = None
            if variant.retain_energy is not None:
                of_map = variant.feature_map, variant.input_scale
                if of_map not in moments:
                    phi = mapped(self.config(settings[0]), scale)
                    chunks = (phi(chunk) for chunk in text_rows(self.retain, index, torch.device("cpu")))
                    moments[of_map] = second_moment(chunks, len(self.retain))
                retained = moments[of_map].leading(variant.retain_energy)
            fitted = fit(
                *sets,
                positive_energy=max(setting.positive_energy for setting in settings),
                negative_energy=max(setting.negative_energy for setting in settings),
                centered=variant.centered,
                feature_map=variant.feature_map,
                scale=scale,
                retained=retained,
            )
            spectra = (replace(s, basis=s.basis.float()) for s in (fitted.positive, fitted.negative))
            self._spectra[variant, index] = SiteSpectra(*spectra, rms, scale)

    def _rows(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.store.neutral(index), self.store.positive(index), self.store.negative(index)

    @contextmanager
    def applied(self, setting: SEASetting) -> Iterator[PeftModel]:
        with with_adapter(self.model, self.config(setting)) as adapted:
            name, config, layers = find_adapter(adapted, None, SEAConfig, SEALayer)
            ranks, statistics = {}, {}
            for index, layer in layers.items():
                spectra = self._spectra[self.group(setting), index]
                bases = [
                    spectrum.cut(energy).basis
                    for spectrum, energy in (
                        (spectra.positive, setting.positive_energy),
                        (spectra.negative, setting.negative_energy),
                    )
                ]
                device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                layer.set_factors(name, *(basis.to(device or "cpu") for basis in bases), checked=True)
                ranks[layer.site] = [len(basis) for basis in bases]
                statistics[layer.site] = {"rms": spectra.rms}
                if config.rescale == "mean":
                    neutral = self.store.neutral(index).double()
                    statistics[layer.site] = site_statistics(
                        neutral, *(basis.double() for basis in bases), config, spectra.scale
                    )
            replace_config(adapted, name, rank_pattern=ranks, fit_statistics=statistics)
            yield adapted

    @contextmanager
    def learnt(self, setting: SEASetting) -> Iterator[PeftModel]:
        retain = None if setting.retain_energy is None else self.retain
        with with_adapter(self.model, self.config(setting)) as adapted:
            fit_sea(adapted, self.store, None, self.sources.allow_fingerprint_mismatch, retain=retain)
            yield adapted


SETTINGS = SEASettings
