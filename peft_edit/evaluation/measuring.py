"""A model, and the base model beside it, measured in one run: results with intervals, see `results`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data import check_contrast_set
from ..data.prompts import settled
from ..data.texts import load_texts
from ..models.fingerprint import active_adapters
from ..tuners.layer import edit_layers
from ..tuners.strength import edit_strength
from .comparing import check_comparable
from .metrics import Scores, wanted_metrics
from .multiple_choice import QuestionScore, evaluate_multiple_choice
from .options import OF_EDITS, OF_TEXTS, EvaluationOptions
from .perplexity import perplexity
from .results import read_results, record, texts_record
from .side_effects import check_active, disabled_adapters, side_effects
from .statistics import CONFIDENCE
from .tables import MeasureTables


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
    base_results: Mapping[str, Any] | str | os.PathLike | None = None,
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
        texts: unrelated texts for side effects, see `load_texts`, or several sets of them by name.
        strength: factor on the strength of the edits, see `edit_strength`.
        names: adapter's name in the model to what people know it by, its folder or id on the Hub.
        examples: what is recorded of answered questions before each prompt, where `with_examples` put some there.
        base_results: of the base model alone on the same questions, or their file: its answers are taken from there.
        options: of `EvaluationOptions`: `base`, `batch_size`, `resamples`, `bootstrap_seed`, and how prompts become
            tokens.

    Returns:
        JSON values, see `results`.

    Raises:
        ValueError: a metric is unknown, lacks the columns, the texts, the adapter or the base model that it needs; an
            adapter is merged; see `evaluate_multiple_choice` and `side_effects`.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    options = EvaluationOptions(metrics=None if metrics is None else list(metrics), **options)
    data, adapters = check_contrast_set(data), active_adapters(model)
    with_base = options.base and bool(adapters)
    if with_base:
        check_active(model)
    sets = _text_sets(texts)
    wanted = wanted_metrics(options, data, bool(adapters), bool(sets))
    if metrics is not None and adapters:
        _check_edits(model, metrics)
    options = settled(tokenizer, options)
    recorded = {"prompts": options, "strength": strength, "names": names, "examples": examples}
    known = None
    if base_results is not None:
        if not with_base:
            raise ArgumentError(Argument("base_results"), " need an adapter, beside which they stand: leave them out")
        unmeasured = [QuestionScore(row_id, False, 0.0, {}).to_dict() for row_id in data["id"]]
        ours = {"measures": {}, "side_effects": [], "questions": unmeasured}
        known = _known_base(base_results, record(model, tokenizer, data, ours, **recorded))
    with edit_strength(model, strength) if strength != 1 else nullcontext():
        before, after = _scores(model, tokenizer, data, options, with_base, known)
        effects = _side_effects(model, tokenizer, sets, wanted, options, with_base)
    tables = MeasureTables(data, wanted, before, after, options)
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
    return record(model, tokenizer, data, measured, **recorded)


def _check_edits(model: nn.Module, metrics: Sequence[str]) -> None:
    """Raise ValueError where a measure of activations was asked for, and no active adapter edits any."""
    if any(layer.active_here for layer in edit_layers(model)):
        return
    if of_edits := [name for name in metrics if name in OF_EDITS]:
        raise ArgumentError(
            Argument("metrics"),
            f": {of_edits[0]} is of adapters that edit activations, and none that is active does: leave it out",
        )


def _text_sets(texts: Mapping[str, Sequence[str]] | Iterable[str] | None) -> dict[str | None, list[str]]:
    sets = {} if texts is None else texts if isinstance(texts, Mapping) else {None: texts}
    return {name: list(load_texts(some)["text"]) for name, some in sets.items()}


def _scores(
    model: nn.Module, tokenizer, data: Dataset, options: EvaluationOptions, with_base: bool, known: Scores | None
) -> tuple[Scores | None, Scores]:
    """The scores of the questions, of the base model and of the model."""

    def scored() -> Scores:
        return evaluate_multiple_choice(
            model, tokenizer, data, batch_size=options.batch_size, **options.of_prompts
        ).questions

    if not with_base or known is not None:
        return known, scored()
    with disabled_adapters(model):
        before = scored()
    return before, scored()


def _known_base(base_results: Mapping[str, Any] | str | os.PathLike, ours: Mapping[str, Any]) -> Scores:
    """The base model's scores of results that were measured earlier.

    Raises:
        ValueError: they are of an adapter, or of another model, other rows or other prompts.
    """
    read, own = read_results(base_results, "base_results"), read_results(ours, "this evaluation")
    if read.adapters:
        raise ArgumentError(
            Argument("base_results"), f": {read.where} is of an adapter: pass results of the base model alone"
        )
    check_comparable([read, own])
    if read.rows != own.rows:
        raise ArgumentError(
            Argument("base_results"), f": {read.where} is of other questions: evaluate the base model on the same"
        )
    return [QuestionScore(**question) for question in read.questions]


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
