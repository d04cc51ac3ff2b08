"""What results hold, declared for `mismatch`; the top of `results` says what each key means."""

from __future__ import annotations

from typing import Any, TypedDict


class OfModel(TypedDict, total=False):
    """What results say of the base model."""

    name: str | None
    fingerprint: str | None


class OfAdapter(TypedDict):
    """What results say of an adapter."""

    name: str
    method: str
    config: str
    weights: str


class NamedData(TypedDict, total=False):
    """Where the data come from, as far as it is known."""

    name: str | None
    subset: str | None
    split: str | None
    files: list[str] | None
    examples: dict[str, Any] | None
    of_rows: int | None


class OfSource(NamedData):
    """What results say of the data."""

    rows: int
    digest: str


class NamedTexts(TypedDict, total=False):
    """What a set of texts is called, as far as it is known."""

    file: str | None


class OfTexts(NamedTexts):
    """What results say of a set of texts."""

    digest: str
    count: int


class MoreSideEffects(TypedDict, total=False):
    """What is told of an edit only, or where it was asked for."""

    tokens: int
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p95: float
    touched: float | None
    norm_change: float | None
    angle: float | None


class OfSideEffects(MoreSideEffects):
    """What results say of the effects on a set of texts."""

    texts: OfTexts


class MoreOfMeasure(TypedDict, total=False):
    """What stands beside a value, where it was measured."""

    low: float | None
    high: float | None
    base: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p_value: float | None


class OfMeasure(MoreOfMeasure):
    """What results say of a measure."""

    value: float | None


class OfPrompts(TypedDict):
    """What results say of the prompts, beside what is compared and never used."""

    format: str


class OfQuestion(TypedDict):
    """What results say of a question, see `QuestionScore`."""

    id: int
    mc1: bool
    mc2: float
    log_likelihoods: dict[str, float]


class OfCategory(TypedDict):
    """What results say of the questions of a category."""

    questions: int
    measures: dict[str, OfMeasure]


class MoreRecorded(TypedDict, total=False):
    """What results tell where there is something to tell."""

    categories: dict[str, OfCategory]
    base_questions: list[OfQuestion] | None
    versions: dict[str, str]


class Recorded(MoreRecorded):
    """What reading needs of results."""

    model: OfModel
    adapters: list[OfAdapter]
    strength: float
    data: OfSource
    prompts: OfPrompts
    measures: dict[str, OfMeasure]
    side_effects: list[OfSideEffects]
    questions: list[OfQuestion]
