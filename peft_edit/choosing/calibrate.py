"""The strength at which an edit does as much damage as it may, so that methods are compared at equal damage."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapters.match import find_config, replace_config
from ..arguments import Argument, ArgumentError, nearest, takes
from ..data.texts import load_texts
from ..evaluation.side_effects import SideEffects, check_active
from ..evaluation.texts import NotFiniteError
from ..json_files import digest_of
from ..models.fingerprint import active_adapters
from ..models.sites import decoder_blocks, layer_index, unwrap
from ..tuners.config import EditConfig
from ..tuners.layer import edit_layers
from .options import CalibrationOptions
from .texts import SharedTexts
from .trial import GIB


logger = logging.getLogger(__name__)
# Smallest share of the configured value that is tried.
LEAST = 2.0**-10
# Of which a twentieth is one.
LEAST_TOKENS = 20


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        adapter_name: the adapter.
        dial: field of its configuration that was set.
        before, value: what it was and is.
        side_effects: at that value.
        limited: False where the largest value that was to be tried is within the budget.
        tried: values in the order in which they were tried, with their 95th percentiles of the divergence; None where
            the model gave NaN.
        kept_logits: whether the base model's logits were computed once; else again for each value.
    """

    adapter_name: str
    dial: str
    before: float
    value: float
    side_effects: SideEffects
    limited: bool
    tried: list[tuple[float, float | None]]
    kept_logits: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@takes(CalibrationOptions)
def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Dataset | Iterable[str] | str | os.PathLike,
    *,
    adapter_name: str | None = None,
    **options: Any,
) -> Calibration:
    """Find by bisection the largest strength at which an edit stays within a budget of damage, and set it.

    The damage is measured at the value that is taken. It is taken for rising: were it not, a larger value might be
    within the budget too. The configuration of the adapter gets the value, and says what it was calibrated by. Nothing
    changes when an error is raised.

    Args:
        model: with one active adapter, of an editing method.
        tokenizer: of the model.
        texts: that the edit is not meant for, see `load_texts`.
        adapter_name: which adapter; None for the active one.
        options: see `CalibrationOptions`.

    Raises:
        ValueError: no single adapter of an editing method is active, the method has no such dial, it is 0, or the
            damage is above the budget even at a thousandth of it.
    """
    chosen = CalibrationOptions(**options)
    adapter_name, config = find_config(model, adapter_name, PeftConfig)
    check_active(model)
    if (active := active_adapters(model)) != [adapter_name]:
        raise ArgumentError(
            *(Argument("adapter_name", adapter_name), f" must be the only active adapter, active are {active}: "),
            "the damage that is measured is that of all",
        )
    dial = _dial(config, chosen.dial)
    full = getattr(config, dial)
    maximum = chosen.maximum
    if dial == "gate":  # a probability
        maximum = min(maximum, 1 / full)
    texts = list(load_texts(texts)["text"])
    need = unchanged_blocks(model, adapter_name)
    shared = SharedTexts(model, tokenizer, texts, chosen.batch_size, int(chosen.memory * GIB), [need])
    logger.info(
        "the base model's logits are %s", "computed once" if shared.keeps_logits else "computed again for each value"
    )
    if shared.tokens < LEAST_TOKENS:
        raise ArgumentError(
            Argument("texts"),
            f" have {shared.tokens} predicted tokens, too few for a 95th percentile: pass at least {LEAST_TOKENS}",
        )
    tried: list[tuple[float, float | None]] = []

    def within(factor: float) -> SideEffects | None:
        replace_config(model, adapter_name, **{dial: factor * full})
        try:
            effects, _ = shared.measure(model, need)
        except NotFiniteError:
            effects = None
        tried.append((factor * full, None if effects is None else effects.kl_p95))
        return effects if effects is not None and effects.kl_p95 <= chosen.kl_p95 else None

    try:
        factor, effects = bisect(within, maximum, chosen.tolerance)
        if effects is None:
            raise ArgumentError(
                *_too_much(dial, *tried[-1]),
                *(Argument("kl_p95", chosen.kl_p95), ": raise it, or learn the edit with a retain set"),
            )
    finally:
        restored = replace(config)
        replace_config(model, adapter_name, **{name: getattr(restored, name) for name in (dial, "calibration")})
    value = full if factor == 1 else factor * full
    found = {
        "dial": dial,
        "value": value,
        "kl_p95": effects.kl_p95,
        "budget": chosen.kl_p95,
        "texts": digest_of(texts),
        "tokens": effects.tokens,
    }
    replace_config(model, adapter_name, **{dial: value, "calibration": found})
    return Calibration(
        adapter_name, dial, full, value, effects, factor < maximum, tried, kept_logits=shared.keeps_logits
    )


def _too_much(dial: str, value: float, kl_p95: float | None) -> list[str]:
    """Beginning of the message that even the smallest value is too much; None where the model gave NaN there too."""
    if kl_p95 is None:
        raise NotFiniteError
    return [f"even with {dial}={value:.3g} the 95th percentile of the divergence is {kl_p95:.3g} nats, more than "]


def bisect(
    within: Callable[[float], SideEffects | None], maximum: float, tolerance: float
) -> tuple[float, SideEffects | None]:
    """The largest factor in (0, maximum] that is within a budget, to a relative tolerance, and its side effects; None
    of them where none from `LEAST` on is."""
    if (effects := within(maximum)) is not None:
        return maximum, effects
    low, high, best = 0.0, maximum, None
    with tqdm(desc="calibrating", unit="value", leave=None) as progress:
        while high - low > tolerance * high:
            if best is None and high <= LEAST:
                return 0.0, None
            middle = max(LEAST, high / 4) if best is None else (low + high) / 2
            effects = within(middle)
            low, high, best = (middle, high, effects) if effects is not None else (low, middle, best)
            progress.update()
    return low, best


def _dial(config: PeftConfig, name: str | None) -> str:
    dials = [dial for dial in config.dials if hasattr(config, dial)] if isinstance(config, EditConfig) else []
    if not dials:
        raise ValueError(
            f"adapters of {config.peft_type.value} have no strength that could be calibrated: pass one that edits "
            "activations"
        )
    if name is not None and name not in dials:
        raise ArgumentError(Argument("dial"), f" {name!r} is none of {config.method}{nearest(name, dials)}")
    name = name or dials[0]
    if getattr(config, name) == 0:
        raise ArgumentError(Argument(name), " is 0, so that the adapter edits nothing: set another value first")
    return name


def unchanged_blocks(model: nn.Module, adapter_name: str) -> int:
    """Number of the model's first blocks that an adapter leaves as they are."""
    blocks = set(decoder_blocks(unwrap(model)).values())
    needs = [
        # The output of a whole block is edited after the block has run.
        (layer_index(layer.site) or 0) + (layer.site in blocks)
        for layer in edit_layers(model)
        if layer.is_fitted(adapter_name)
    ]
    return min(needs, default=0)
