"""The axes of mean-difference steering: a vector of a site serves all strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel, TaskType

from ...adapters.match import find_adapter, replace_config
from ...arguments import Argument, ArgumentError
from ...choosing.axes import Setting, Settings, Sources, declared, with_adapter
from ...choosing.probe import probe_accuracy
from ...places import ROW_TOKENS
from .config import MeanDifferenceConfig
from .fit import fit_mean_difference
from .layer import MeanDifferenceLayer


OF_CONFIG = declared(MeanDifferenceConfig)


@dataclass(frozen=True, kw_only=True)
class MeanDifferenceSetting(Setting):
    """The fields of `MeanDifferenceConfig` that a sweep can vary."""

    strength: float = field(**OF_CONFIG["strength"])
    scale_to_rms: bool = field(**OF_CONFIG["scale_to_rms"])
    token_scope: str = field(**OF_CONFIG["token_scope"])


class MeanDifferenceSettings(Settings):
    """Settings of mean-difference steering."""

    kind = MeanDifferenceSetting

    def __init__(self, model, sources: Sources):
        super().__init__(model, sources)
        for name in ("adapter", "retain"):
            if getattr(sources, name) is not None:
                raise ArgumentError(Argument(name), " is not used by mean-difference steering: leave it out")
        self.store = sources.store
        self.site = self.store.site
        self.rankings = ("probe",) if self.store.tokens in ROW_TOKENS else ()
        self._scores: dict[int, float] = {}
        # Whether vectors are scaled to vectors and statistics, by block and by site.
        self._fits: dict[bool, tuple[dict[int, Any], dict[str, dict[str, float]]]] = {}

    @property
    def layers(self) -> list[int]:
        return self.store.layers

    def ranking(self, name: str) -> dict[int, float]:
        self._scores = self._scores or {index: probe_accuracy(self.store, index) for index in self.layers}
        return self._scores

    def check(self, setting: MeanDifferenceSetting) -> None:
        if setting.token_scope != "all":
            raise ArgumentError(
                Argument("token_scope", setting.token_scope),
                " cannot be swept: scores of answers then depend on padding; sweep with ",
                *(Argument("token_scope", "all"), ", and set it afterwards"),
            )
        self.config(setting)

    def config(self, setting: MeanDifferenceSetting) -> MeanDifferenceConfig:
        """The configuration of a setting, without what a fit writes."""
        return MeanDifferenceConfig(
            task_type=TaskType.CAUSAL_LM,
            site=self.site,
            layers_to_transform=list(setting.layers),
            strength=setting.strength,
            scale_to_rms=setting.scale_to_rms,
        )

    def prepare(self, settings: Sequence[MeanDifferenceSetting]) -> None:
        needed = tuple(sorted({index for setting in settings for index in setting.layers}))
        for scaled in {setting.scale_to_rms for setting in settings}:
            with self.learnt(MeanDifferenceSetting(layers=needed, scale_to_rms=scaled)) as adapted:
                name, config, layers = find_adapter(adapted, None, MeanDifferenceConfig, MeanDifferenceLayer)
                vectors = {i: layer.mean_difference_vector[name].weight.detach() for i, layer in layers.items()}
                self._fits[scaled] = vectors, config.fit_statistics

    @contextmanager
    def applied(self, setting: MeanDifferenceSetting) -> Iterator[PeftModel]:
        vectors, statistics = self._fits[setting.scale_to_rms]
        with with_adapter(self.model, self.config(setting)) as adapted:
            name, _, layers = find_adapter(adapted, None, MeanDifferenceConfig, MeanDifferenceLayer)
            for index, layer in layers.items():
                layer.set_vector(name, vectors[index], checked=True)
            sites = [layer.site for layer in layers.values()]
            replace_config(adapted, name, fit_statistics={site: statistics[site] for site in sites})
            yield adapted

    @contextmanager
    def learnt(self, setting: MeanDifferenceSetting) -> Iterator[PeftModel]:
        allow = self.sources.allow_fingerprint_mismatch
        with with_adapter(self.model, self.config(setting)) as adapted:
            fit_mean_difference(adapted, self.store, allow_fingerprint_mismatch=allow)
            yield adapted


SETTINGS = MeanDifferenceSettings
