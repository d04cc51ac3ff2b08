"""Results of evaluations: recorded with all that they follow from, read, and compared only where that is the same.

Results are JSON, an object with these keys; readers take no notice of others (`command` and `options`, which the
command line adds, repeat an evaluation):

    version       1
    model         name, revision, fingerprint, dtype: the base model
    adapters      of each active adapter its name, and method, config and weights as `adapter_record` gives them
    strength      the factor of `edit_strength`
    data          name, subset, split, files, rows, of_rows as `source_of` gives them, and digest, a hash of the rows
    prompts       format and more, as `prompt_record` gives it
    texts         file and digest of the texts of the perplexity, or null
    mc1, mc2, perplexity    measures
    questions     of each question its id and scores
    versions      package to version
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import peft
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data.prompts import PromptOptions, prompt_record
from ..data.source import rows_digest, source_of
from ..json_files import mismatch, read_json
from ..models.fingerprint import active_adapters, adapter_record, fingerprint, tensors_of
from ..models.sites import unwrap
from ..version import __version__


VERSION = 1
MEASURES = ("mc1", "mc2", "perplexity")
OF_MODEL = ("name", "revision", "fingerprint", "dtype")
OF_DATA = ("name", "subset", "split", "files", "rows", "of_rows", "digest")
# What names a data set. Results of one name must agree in all else, and so must those of the same rows.
DATA_SET = ("name", "subset", "split", "files")
# MC2 is a sum of probabilities, which rounding takes above 1.
ROUNDING = 1e-9
# What to do where results differ in something, by the beginning of its name.
REMEDIES = {
    "model.dtype": "evaluate all in one dtype",
    "model": "evaluate one base model, without and with the adapter",
    "data": "evaluate all on the same rows",
    "questions": "evaluate all on the same rows, with the same skip and limit",
    "prompts.format": "evaluate all in one prompt format",
    "prompts.template_time": "give all the same template_time",
    "prompts": "evaluate all with one tokenizer and one template",
    "texts": "take the perplexity of the same texts",
}
_AGAIN = "evaluate again with this release of peft_edit"


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
    of_rows: int | None


class OfSource(NamedData):
    """What results say of the data."""

    rows: int
    digest: str


class NamedTexts(TypedDict, total=False):
    """Where the texts of the perplexity come from, as far as it is known."""

    file: str | None


class OfTexts(NamedTexts):
    """What results say of these texts."""

    digest: str


class OfPrompts(TypedDict):
    """What results say of the prompts, beside what is compared and never used."""

    format: str


class OfQuestion(TypedDict):
    """What results say of a question, beside its scores."""

    id: int


class Measures(TypedDict, total=False):
    """What was measured."""

    mc1: float
    mc2: float
    perplexity: float
    texts: OfTexts | None


class Recorded(Measures):
    """What reading needs of results."""

    model: OfModel
    adapters: list[OfAdapter]
    strength: float
    data: OfSource
    prompts: OfPrompts
    questions: list[OfQuestion]


@dataclass(frozen=True)
class Results:
    """Results as they were read, see the top of this module.

    Attributes:
        where: the file, for messages.
        model, adapters, strength, data, prompts, texts: as recorded.
        ids: of the questions, in their order.
        measures: name to value.
    """

    where: str
    model: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]]
    strength: float
    data: Mapping[str, Any]
    prompts: Mapping[str, Any]
    texts: Mapping[str, Any] | None
    ids: Sequence[int]
    measures: Mapping[str, float]

    @property
    def data_set(self) -> tuple:
        """What the data set is called."""
        return tuple(json.dumps(self.data.get(name)) for name in DATA_SET)

    @property
    def rows(self) -> tuple:
        """Which rows they are of, whatever the data set is called: a file that was renamed has the same."""
        return self.data["digest"], tuple(self.ids)

    @property
    def row(self) -> tuple:
        """Which row of a table they are: the adapters and their strength."""
        return tuple((adapter["config"], adapter["weights"]) for adapter in self.adapters), self.strength


def record(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    measured: Mapping[str, Any],
    *,
    prompts: PromptOptions | None = None,
    strength: float = 1.0,
    texts: Sequence[str] | None = None,
    texts_file: str | os.PathLike | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Results with all that they follow from, as JSON values.

    Args:
        model: that was evaluated, with its adapters active as they were then.
        tokenizer: of the model.
        data: the contrast set.
        measured: measures and `questions`, see `MultipleChoiceResult.to_dict`, and `perplexity`.
        prompts: how prompts became tokens.
        strength: the factor of `edit_strength`.
        texts: those of the perplexity.
        texts_file: that they come from.
        names: adapter's name in the model to what people know it by, its folder or id on the Hub.

    Raises:
        ValueError: a perplexity without its texts.
    """
    if "perplexity" in measured and texts is None:
        raise ArgumentError(Argument("texts"), " must be those of the perplexity that was measured, got None")
    bare, of_texts = unwrap(model), None
    try:
        of_model = fingerprint(model)
    except ValueError:  # its decoder blocks cannot be told, so that it has none
        of_model = None
    if texts is not None:
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
        of_texts = {"file": None if texts_file is None else os.path.basename(texts_file), "digest": digest}
    return {
        "version": VERSION,
        "model": {
            "name": getattr(bare.config, "_name_or_path", None) or None,
            "revision": getattr(bare.config, "_commit_hash", None),
            "fingerprint": of_model,
            "dtype": str(bare.dtype).removeprefix("torch."),
        },
        "adapters": [
            {"name": (names or {}).get(name, name), **adapter_record(model.peft_config[name], tensors_of(model, name))}
            for name in active_adapters(model)
        ],
        "strength": strength,
        "data": {**source_of(data), "digest": rows_digest(data)},
        "prompts": prompt_record(tokenizer, prompts or PromptOptions()),
        "texts": of_texts,
        **measured,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part in an evaluation."""
    packages = {module.__name__: module.__version__ for module in (peft, tokenizers, torch, transformers)}
    return {"peft_edit": __version__, **packages, "python": platform.python_version()}


def read_results(results: Mapping[str, Any] | str | os.PathLike) -> Results:
    """Results that `record` made.

    Args:
        results: as JSON values, or a file of them.

    Raises:
        ValueError: it holds something else, or what an earlier release wrote.
    """
    where = "results" if isinstance(results, Mapping) else str(results)
    if not isinstance(results, Mapping):
        results = read_json(Path(results), Any, "no JSON", "pass what peft-edit evaluate --json wrote")
    given = dict(results) if isinstance(results, Mapping) else {}
    measures = {name: given[name] for name in MEASURES if name in given}
    if not measures:
        raise ValueError(f"{where} must be what peft-edit evaluate --json wrote, with {' or '.join(MEASURES)}")
    if given.get("version") != VERSION:
        raise ValueError(
            f"{where} has version {given.get('version')!r} of the results, this release reads {VERSION}, which records "
            f"what they follow from: {_AGAIN}"
        )
    if problem := mismatch(given, Recorded) or _contradiction(given):
        raise ValueError(f"{where} is damaged ({problem}): {_AGAIN}")
    return Results(
        where=where,
        model={**dict.fromkeys(OF_MODEL), **given["model"]},
        data={**dict.fromkeys(OF_DATA), **given["data"]},
        **{name: given[name] for name in ("adapters", "strength", "prompts")},
        texts=given.get("texts"),
        ids=[question["id"] for question in given["questions"]],
        measures=measures,
    )


def _contradiction(given: Mapping[str, Any]) -> str | None:
    """What cannot be in results whose fields have the right types, or None."""
    for name in ("mc1", "mc2"):
        if name in given and not 0 <= given[name] <= 1 + ROUNDING:
            return f"{name} is {given[name]}, which is no share"
    if "perplexity" in given and not 1 <= given["perplexity"] < math.inf:
        return f"perplexity is {given['perplexity']}, which must be 1 or more and finite"
    if "perplexity" in given and given.get("texts") is None:
        return "no texts of the perplexity"
    if not 0 <= given["strength"] < math.inf:
        return f"strength is {given['strength']}, which must be 0 or more and finite"
    rows, of_rows, ids = given["data"]["rows"], given["data"].get("of_rows"), [q["id"] for q in given["questions"]]
    if not ids or rows != len(ids):
        return f"data.rows is {rows}, and there are {len(ids)} questions"
    if len(set(ids)) < len(ids):
        return "a question is there twice"
    if of_rows is not None and of_rows < rows:
        return f"data.of_rows is {of_rows}, data.rows is {rows}"
    return None


def check_comparable(results: Sequence[Results]) -> None:
    """Raise ValueError, which names what differs, unless results can stand side by side: all of one base model, and
    those of one data set, or of the same rows whatever they are called, of the same rows and prompts, each adapter
    and strength once."""
    for later_place, later in enumerate(results):
        for earlier in results[:later_place]:
            for name, first, second in _differences(earlier, later):
                remedy = next(remedy for start, remedy in REMEDIES.items() if name.startswith(start))
                raise ValueError(
                    f"{earlier.where} and {later.where} must agree in {name}, got {first} and {second}: {remedy}"
                )
            if _same_data(earlier, later) and earlier.row == later.row:
                raise ValueError(
                    f"{earlier.where} and {later.where} are of the same model on the same data: pass one of them"
                )


def _differences(one: Results, other: Results) -> Iterator[tuple[str, str, str]]:
    """Name of each thing in which results that are compared differ, and both values, to print."""
    known = one.model.get("fingerprint") and other.model.get("fingerprint")  # it tells more than a name
    yield from _differing("model", one.model, other.model, ("fingerprint" if known else "name", "dtype"))
    if not _same_data(one, other):
        return
    if one.ids != other.ids:
        yield "questions", *_different_ids(one.ids, other.ids)
    yield from _differing("data", one.data, other.data, ("digest",))
    yield from _differing("prompts", one.prompts, other.prompts, sorted({*one.prompts, *other.prompts}))
    if one.texts is not None and other.texts is not None:
        yield from _differing("texts", one.texts, other.texts, ("digest",))


def _same_data(one: Results, other: Results) -> bool:
    return one.data_set == other.data_set or one.rows == other.rows


def _differing(
    part: str, one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    for name in names:
        if one.get(name) != other.get(name):
            yield f"{part}.{name}", _short(one.get(name)), _short(other.get(name))


def _different_ids(one: Sequence[int], other: Sequence[int]) -> tuple[str, str]:
    if len(one) != len(other):
        return str(len(one)), str(len(other))
    first, second = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"id {first}", f"id {second}"


def check_adapter(
    results: Results, adapter: Mapping[str, str], where: str, base_fingerprint: str | None = None
) -> None:
    """Raise ValueError unless results are of the base model alone, or with this adapter and no other.

    Args:
        adapter: what is known of `adapter_record` of the adapter.
        where: what to call the adapter in messages.
        base_fingerprint: of the model that it was learnt on; None where it is not known.
    """
    of_model = results.model.get("fingerprint")
    if None not in (base_fingerprint, of_model) and base_fingerprint != of_model:
        raise ValueError(
            f"{results.where} and {where} must agree in the fingerprint of the base model: {of_model} there, "
            f"{base_fingerprint} here; evaluate the model that the adapter was made for"
        )
    if len(results.adapters) > 1:
        names = ", ".join(repr(found["name"]) for found in results.adapters)
        raise ValueError(f"{results.where} is of several adapters ({names}): evaluate with {where} alone")
    for found in results.adapters:
        for name, value in adapter.items():
            if found[name] != value:
                raise ArgumentError(
                    f"{results.where} is of another adapter ({found['name']!r}, {name} {found[name]!r}) than {where} "
                    f"({name} {value}): evaluate with ",
                    Argument("adapter", where),
                )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
