"""A model, and the base model beside it, measured in one run: results with intervals, see `results`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError, check_options
from ..data import check_contrast_set
from ..data.prompts import PromptOptions, settled
from ..models.fingerprint import active_adapters
from ..tuners.strength import edit_strength
from .metrics import METRICS, Scores, shift, suited
from .multiple_choice import evaluate_multiple_choice
from .perplexity import perplexity
from .results import record, texts_record
from .side_effects import check_active, disabled_adapters, side_effects
from .statistics import CONFIDENCE, RESAMPLES, SEED, Statistic, interval, mcnemar, resamples


# Metrics of plain text to what `SideEffects` calls them.
OF_TEXTS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("perplexity", "base_perplexity", "perplexity_ratio"),
    "kl": ("kl_mean", "kl_p95"),
    "touched": ("touched",),
    "norms": ("norm_change", "angle", "sites"),
}
# Metrics that compare an edited model with the base model.
OF_TWO = ("shift", "kl", "touched", "norms")
ALL_METRICS = (*METRICS, "shift", *OF_TEXTS)
# Measures that say of each question whether it is right: McNemar's test is for them.
OF_RIGHT = ("mc1", "bbq_accuracy")


@dataclass(kw_only=True)
class EvaluationOptions(PromptOptions):
    """What is measured, and how.

    Attributes:
        metrics: of mc, bbq, crows_pairs, shift, perplexity, kl, touched and norms; None for those that the data are
            made for, with what an adapter and texts add.
        base: whether the base model is measured too, with the adapters disabled.
        batch_size: most answers, or texts, in a forward pass.
        resamples: of the questions, for the intervals.
        bootstrap_seed: of the resamples.
    """

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Of {', '.join(ALL_METRICS)}. Default: all that suit.",
            "option": "--metrics",
        },
    )
    base: bool = field(default=True, metadata={"help": "Measure the base model too, beside the adapter."})
    batch_size: int = field(
        default=16,
        metadata={"help": "Most answers, or texts, in a forward pass.", "minimum": 1, "allowed": "of at least 1"},
    )
    resamples: int = field(
        default=RESAMPLES,
        metadata={"help": "Of the questions, for the intervals.", "minimum": 1, "allowed": "of at least 1"},
    )
    bootstrap_seed: int = field(
        default=SEED, metadata={"help": "Of the resamples.", "minimum": 0, "allowed": "of at least 0"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self, tuple(EvaluationOptions.__annotations__))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    metrics: Sequence[str] | None = None,
    *,
    texts: Mapping[str, Sequence[str]] | Iterable[str] | None = None,
    strength: float = 1.0,
    names: Mapping[str, str] | None = None,
    examples: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a model does with the questions of a contrast set, and an edit to other texts.

    Each measure comes with a 95 % bootstrap interval over the questions; where adapters are active, the base model's
    stands beside it, with the interval of the difference by the same resamples, and McNemar's exact test.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        tokenizer: of that model.
        data: a contrast set.
        metrics: "mc" (MC1, MC2), "bbq", "crows_pairs" of the questions; "shift" from the base model's answers; and of
            the texts "perplexity", "kl" (divergence from the base model), "touched" (tokens), "norms" (change of norm
            and direction). None for those that the data are made for, with what adapters and texts add.
        texts: unrelated texts for side effects, or several sets of them by name.
        strength: factor on the strength of the edits, see `edit_strength`.
        names: adapter's name in the model to what people know it by, its folder or id on the Hub.
        examples: what is recorded of answered questions before each prompt, where `with_examples` put some there.
        options: of `EvaluationOptions`: `base`, `batch_size`, `resamples`, `bootstrap_seed`, and how prompts become
            tokens.

    Returns:
        JSON values, see `results`.

    Raises:
        ValueError: a metric is unknown, lacks the columns, the texts, the adapter or the base model that it needs; an
            adapter is merged; see `evaluate_multiple_choice` and `side_effects`.
    """
    options = EvaluationOptions(metrics=None if metrics is None else list(metrics), **options)
    data, adapters = check_contrast_set(data), active_adapters(model)
    with_base = options.base and bool(adapters)
    if with_base:
        check_active(model)
    sets = _text_sets(texts)
    wanted = _wanted(options, data, bool(adapters), bool(sets))
    options = settled(tokenizer, options)
    with edit_strength(model, strength) if strength != 1 else nullcontext():
        before, after = _scores(model, tokenizer, data, options, with_base)
        effects = _side_effects(model, tokenizer, sets, wanted, options, with_base)
    tables = _Tables(data, wanted, before, after, options)
    measured = {
        "measures": tables.measures(),
        "categories": tables.categories(),
        "side_effects": effects,
        "questions": [question.to_dict() for question in after],
        "base_questions": None if before is None else [question.to_dict() for question in before],
        "intervals": {
            "confidence": CONFIDENCE,
            "resamples": options.resamples,
            "seed": options.bootstrap_seed,
        },
    }
    recorded = {"prompts": options, "strength": strength, "names": names, "examples": examples}
    return record(model, tokenizer, data, measured, **recorded)


def _text_sets(texts: Mapping[str, Sequence[str]] | Iterable[str] | None) -> dict[str | None, list[str]]:
    if texts is None:
        return {}
    if isinstance(texts, str):
        raise ArgumentError(Argument("texts"), " must be a list of texts, or several by name, got one text")
    return {name: list(some) for name, some in texts.items()} if isinstance(texts, Mapping) else {None: list(texts)}


def _wanted(options: EvaluationOptions, data: Dataset, has_adapters: bool, has_texts: bool) -> list[str]:
    """Names of the metrics, in the order of `ALL_METRICS`."""
    if options.metrics is None:
        found = [*suited(data), "shift", *(OF_TEXTS if has_texts else ())]
        compares = has_adapters and options.base
        return [name for name in ALL_METRICS if name in found and (compares or name not in OF_TWO)]
    if not options.metrics:
        raise ArgumentError(Argument("metrics"), f" must be some of {', '.join(ALL_METRICS)}, got none")
    for name in options.metrics:
        if name not in ALL_METRICS:
            raise ArgumentError(Argument("metrics"), f" must be of {', '.join(ALL_METRICS)}, got {name!r}")
        if name in OF_TEXTS and not has_texts:
            raise ArgumentError(
                Argument("metrics"), f": {name} needs ", Argument("texts"), ": pass some, or leave it out"
            )
        if name in OF_TWO and not has_adapters:
            raise ArgumentError(
                Argument("metrics"), f": {name} compares an edited model with its base model, and no adapter is active"
            )
        if name in OF_TWO and not options.base:
            raise ArgumentError(
                *(Argument("metrics"), f": {name} needs the base model: leave out "),
                Argument("base", False),
            )
    return [name for name in ALL_METRICS if name in options.metrics]


def _scores(
    model: nn.Module, tokenizer, data: Dataset, options: EvaluationOptions, with_base: bool
) -> tuple[Scores | None, Scores]:
    """The scores of the questions, of the base model and of the model."""

    def scored() -> Scores:
        return evaluate_multiple_choice(
            model, tokenizer, data, batch_size=options.batch_size, **options.of_prompts
        ).questions

    if not with_base:
        return None, scored()
    with disabled_adapters(model):
        before = scored()
    return before, scored()


def _side_effects(
    model: nn.Module,
    tokenizer,
    sets: Mapping[str | None, list[str]],
    wanted: Sequence[str],
    options: EvaluationOptions,
    with_base: bool,
) -> list[dict[str, Any]]:
    names = [field for metric in wanted if metric in OF_TEXTS for field in OF_TEXTS[metric]]
    found = []
    for name, texts in sets.items() if names else ():
        if with_base:
            effects = side_effects(model, tokenizer, texts, batch_size=options.batch_size).to_dict()
            effects = {key: effects[key] for key in ("tokens", *names)}
        else:
            effects = {"perplexity": perplexity(model, tokenizer, texts, batch_size=options.batch_size)}
        found.append({"texts": texts_record(texts, name), **effects})
    return found


class _Tables:
    """Statistics of the scores, with intervals."""

    def __init__(
        self,
        data: Dataset,
        wanted: Sequence[str],
        before: Scores | None,
        after: Scores,
        options: EvaluationOptions,
    ):
        self.data, self.before, self.after = data, before, after
        metrics = [METRICS[name] for name in wanted if name in METRICS]
        self.of_model = _joined(metric(data, after) for metric in metrics)
        self.of_base = {} if before is None else _joined(metric(data, before) for metric in metrics)
        self.of_both = shift(before, after) if "shift" in wanted else {}
        self.counts = resamples(len(data), options.resamples, options.bootstrap_seed)

    def measures(self) -> dict[str, dict[str, float | None]]:
        """Of all questions."""
        alone = {**self.of_model, **self.of_both}
        return {
            name: {
                "value": _number(statistic.value),
                **_bounds("", statistic.resampled(self.counts)),
                **self._against_base(name, statistic),
            }
            for name, statistic in alone.items()
        }

    def _against_base(self, name: str, statistic: Statistic) -> dict[str, float | None]:
        base = self.of_base.get(name)
        if base is None:
            return dict.fromkeys(("base", "difference", "difference_low", "difference_high", "p_value"))
        differences = statistic.resampled(self.counts) - base.resampled(self.counts)
        right = base.summands[:, 0], statistic.summands[:, 0]
        return {
            "base": _number(base.value),
            "difference": _number(statistic.value - base.value),
            **_bounds("difference_", differences),
            "p_value": mcnemar(*right) if name in OF_RIGHT else None,
        }

    def categories(self) -> dict[str, dict[str, Any]]:
        """Of the questions of each category, where they have one."""
        names = np.array([row["category"] or "" for row in self.data])
        return {str(name): self._category(names == name) for name in sorted(set(names) - {""})}

    def _category(self, chosen: np.ndarray) -> dict[str, Any]:
        measures = {
            name: {
                "value": _number(statistic.of(chosen).value),
                "base": _number(self.of_base[name].of(chosen).value) if name in self.of_base else None,
            }
            for name, statistic in {**self.of_model, **self.of_both}.items()
        }
        return {"questions": int(chosen.sum()), "measures": measures}


def _joined(found: Iterable[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    return {name: statistic for statistics in found for name, statistic in statistics.items()}


def _bounds(prefix: str, values: np.ndarray) -> dict[str, float | None]:
    low, high = interval(values) or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
