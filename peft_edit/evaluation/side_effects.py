"""What an edit does to text that it is not meant for: perplexity, divergence from the base model, tokens touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.fingerprint import active_adapters
from ..models.run import TOKEN_BAR, inference
from ..models.sites import layer_index, runnable, without_wrappers
from ..tuners.layer import EditLayer
from ..tuners.observing import Change, change_of, observed_edits, token_rows
from .texts import TextBatch, text_batches


# Logits that are compared at once: their distributions in float32 are no second copy of all of them.
CHUNK_ELEMENTS = 2**22
# The percentile of the divergence that is reported.
HIGH = 0.95
NOT_FINITE = (
    "the logits of the texts are NaN or infinite: load the model in a wider dtype (bfloat16 or float32), or lower the "
    "strength of the edit"
)


class NotFiniteError(ValueError):
    """Logits that are NaN or infinite."""


@dataclass(frozen=True)
class SideEffects:
    """Of an edited model against the same model with its adapters disabled, over the predicted tokens of some texts.

    Attributes:
        tokens: number of tokens that are predicted: all but the first of each text.
        perplexity, base_perplexity: exp of the mean negative log-likelihood.
        perplexity_ratio: the first over the second; 1 without any effect.
        kl_mean, kl_p95: mean and 95th percentile over tokens of KL(base || edited) of the next-token distributions, in
            nats. The percentile is exact, interpolated between two tokens as numpy does.
        touched: share in [0, 1] of the tokens, those after which one is predicted, that at least one site changed; None
            where the adapters are no edits of activations.
        norm_change: mean of | ||out|| / ||in|| - 1 | over touched tokens and sites; 0 where none is touched.
        angle: mean over the same of the angle between in and out, radians in [0, pi].
        sites: name of each edited module to its `layer`, and its own `touched`, `norm_change` and `angle`.
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p95: float
    touched: float | None
    norm_change: float | None
    angle: float | None
    sites: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class SideEffectsMeter:
    """Accumulates side effects from logits and activations, batch by batch."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._base_nll, self._nll = 0.0, 0.0
        self._sites: dict[tuple[str, str], _SiteSums] = {}
        self._touched, self._tokens = 0, 0
        self._batch: TextBatch | None = None
        self._touched_in_batch: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of predicted tokens so far."""
        return self._tokens

    @property
    def kl(self) -> Tensor:
        """(t,) float32 on the CPU, KL(base || edited) of each predicted token so far, nats."""
        return torch.cat(self._kl) if self._kl else torch.zeros(0)

    @property
    def perplexity_ratio(self) -> float:
        """Of the tokens so far."""
        return _exp((self._nll - self._base_nll) / self._tokens)

    def update(self, base: Tensor, edited: Tensor, targets: Tensor) -> None:
        """Add predicted tokens.

        Args:
            base, edited: (t, V), logits of the two models, any floating dtype.
            targets: (t,) int64, the tokens that follow.

        Raises:
            NotFiniteError: a logit is NaN or infinite.
        """
        rows = max(1, CHUNK_ELEMENTS // base.shape[1])
        for p, q, target in zip(base.split(rows), edited.split(rows), targets.split(rows), strict=True):
            log_p, log_q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
            kl = divergence(log_p, log_q)
            # Gathered before they leave the device, where float64 may be missing.
            self._nll -= float(log_q.gather(1, target[:, None]).cpu().double().sum())
            self._base_nll -= float(log_p.gather(1, target[:, None]).cpu().double().sum())
            self._kl.append(kl.cpu())
        self._tokens += len(targets)
        if not (math.isfinite(self._nll) and math.isfinite(self._base_nll) and bool(self._kl[-1].isfinite().all())):
            raise NotFiniteError(NOT_FINITE)

    @contextmanager
    def observing(self, model: nn.Module, batch: TextBatch) -> Iterator[None]:
        """Add what the model's edits do to the tokens of a batch, which is run once inside the `with` block."""
        self._batch, self._touched_in_batch = batch, None
        with observed_edits(model, self._observe):
            yield
        if self._touched_in_batch is not None:
            self._touched += int(self._touched_in_batch.sum())

    def _observe(self, layer: EditLayer, before: Tensor, after: Tensor) -> None:
        predicting = self._batch.predicting.flatten()
        before, after = (token_rows(layer, x, len(predicting)) for x in (before, after))
        predicting = predicting.to(before.device)
        change = change_of(before[predicting], after[predicting])
        key = layer.site, type(layer).__name__
        self._sites.setdefault(key, _SiteSums(layer_index(layer.site))).add(change)
        seen = self._touched_in_batch
        self._touched_in_batch = change.touched if seen is None else seen | change.touched.to(seen.device)

    def result(self) -> SideEffects:
        """The side effects of all tokens so far, of which there is at least one."""
        kl, sites = self.kl, self._sites
        names = [site for site, _ in sites]
        labels = {key: key[0] if names.count(key[0]) == 1 else " ".join(key) for key in sites}
        total = sum(sites.values(), start=_SiteSums(None)) if sites else None
        return SideEffects(
            tokens=self._tokens,
            perplexity=_exp(self._nll / self._tokens),
            base_perplexity=_exp(self._base_nll / self._tokens),
            perplexity_ratio=self.perplexity_ratio,
            kl_mean=float(kl.double().mean()),
            kl_p95=percentile(kl, HIGH),
            touched=None if total is None else self._touched / self._tokens,
            norm_change=None if total is None else total.norm_change,
            angle=None if total is None else total.angle,
            sites={labels[key]: {"layer": sums.layer, **sums.to_dict(self._tokens)} for key, sums in sites.items()},
        )


@dataclass
class _SiteSums:
    """Sums over the touched tokens of a site. Those with a norm have a change of norm and an angle."""

    layer: int | None
    touched: int = 0
    defined: int = 0
    norm: float = 0.0
    angle_rad: float = 0.0

    def add(self, change: Change) -> None:
        self.touched += int(change.touched.sum())
        self.defined += len(change.norm)
        self.norm += float(change.norm.cpu().double().sum())
        self.angle_rad += float(change.angle_rad.cpu().double().sum())

    def __add__(self, other: _SiteSums) -> _SiteSums:
        names = ("touched", "defined", "norm", "angle_rad")
        return _SiteSums(None, *(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def norm_change(self) -> float:
        return self.norm / max(self.defined, 1)

    @property
    def angle(self) -> float:
        return self.angle_rad / max(self.defined, 1)

    def to_dict(self, tokens: int) -> dict[str, float]:
        return {"touched": self.touched / tokens, "norm_change": self.norm_change, "angle": self.angle}


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of distributions along the last dimension, (..., V) -> (...), from their logarithms."""
    # Rounding takes the divergence of two equal distributions below 0.
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0)


def percentile(values: Tensor, share: float) -> float:
    """The value below which a share in [0, 1] of values, (t,), lie, interpolated between two; exact for any number of
    them (torch.quantile takes 16 million)."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low, high = (float(ordered[i]) for i in (math.floor(place), math.ceil(place)))
    return low + (place - math.floor(place)) * (high - low)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def side_effects(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, batch_size: int = 16
) -> SideEffects:
    """What the active adapters do to some texts, against the same model with them disabled.

    With adapters that edit no activations, LoRA for one, the changes of activations are None.

    Args:
        model: a causal language model with active adapters that are not merged.
        tokenizer: of that model.
        texts: any, of at least two tokens each; others are left out.
        batch_size: most texts in a forward pass.

    Raises:
        ValueError: no adapter is active, or one is merged, depends on padding or gives NaN; what `perplexity` raises.
    """
    check_active(model)
    batches = text_batches(model, tokenizer, texts, batch_size, "a measure of side effects")
    model, meter = runnable(model), SideEffectsMeter()
    total = sum(batch.read for batch in batches)
    with inference(model), tqdm(total=total, desc="side effects", leave=None, **TOKEN_BAR) as bar:
        for batch in batches:
            with disabled_adapters(model):
                base, targets = batch.predict(model)
            with meter.observing(model, batch):
                edited, _ = batch.predict(model)
            meter.update(base, edited, targets)
            bar.update(batch.read)
    return meter.result()


def check_active(model: nn.Module) -> None:
    """Raise ValueError unless adapters are active, and none is merged, so that the model without them is at hand."""
    if any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "an adapter is merged, and the base model without it is gone: call unmerge_adapter first, or load the "
            "adapter without merging it"
        )
    if not active_adapters(model):
        raise ValueError(
            f"{type(without_wrappers(model)).__name__} has no active adapter whose effects could be measured: load "
            "one, or make one active with set_adapter"
        )


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """The base model inside the `with` block: a `PeftModel`'s, or that of a Transformers model after `add_adapter`."""
    model = without_wrappers(model)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
