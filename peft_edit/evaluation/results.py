"""Results of evaluations: recorded with all that they follow from, and read.

Results are JSON, an object with these keys; readers take no notice of others (`command` and `options`, which the
command line adds, repeat an evaluation):

    version         2
    model           name, revision, fingerprint, dtype: the base model
    adapters        of each active adapter its name, and method, config and weights as `adapter_record` gives them
    strength        the factor of `edit_strength`
    data            name, subset, split, files, rows, of_rows as `source_of` gives them, digest, a hash of the rows, and
                    examples, of the answered questions before each prompt their count, name, split and seed, or null
    prompts         format and more, as `prompt_record` gives it
    measures        name to value, low and high (an interval over the questions), base (the base model's value in the
                    same run), difference, difference_low, difference_high and p_value; null for what was not measured
    categories      name to questions, their number, and measures, of each the same without p_value; where questions
                    have one
    side_effects    of each set of texts: texts (file, digest, count) and what `SideEffects` has; of a base model alone
                    the perplexity
    questions       of each question its id and scores
    base_questions  the same of the base model, or null
    intervals       confidence, resamples, seed
    versions        package to version

Shares and probabilities are in [0, 1], biases in [-1, 1], divergences in nats, angles in radians.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptOptions, prompt_record
from ..data.source import rows_digest, source_of
from ..json_files import mismatch, read_json
from ..models.fingerprint import active_adapters, adapter_record, fingerprint, tensors_of
from ..models.sites import unwrap
from ..version import __version__
from .metrics import LEAST
from .recorded import OfQuestion, Recorded


VERSION = 2
OF_MODEL = ("name", "revision", "fingerprint", "dtype")
OF_MEASURE = ("value", "low", "high", "base", "difference", "difference_low", "difference_high", "p_value")
OF_DATA = ("name", "subset", "split", "files", "rows", "of_rows", "digest", "examples")
# What names a data set. Results of one name must agree in all else, and so must those of the same rows.
DATA_SET = ("name", "subset", "split", "files", "examples")
# MC2 is a sum of probabilities, which rounding takes above 1.
ROUNDING = 1e-9
_AGAIN = "evaluate again with this release of peft_edit"


@dataclass(frozen=True)
class Results:
    """Results as they were read, see the top of this module.

    Attributes:
        where: the file, for messages.
        model, adapters, strength, data, prompts, measures, side_effects, questions, categories, versions: as recorded.
        base_questions: those of the base model in the order of `questions`; None where they are not known.
    """

    where: str
    model: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]]
    strength: float
    data: Mapping[str, Any]
    prompts: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, float | None]]
    side_effects: Sequence[Mapping[str, Any]]
    questions: Sequence[Mapping[str, Any]]
    categories: Mapping[str, Mapping[str, Any]]
    base_questions: Sequence[Mapping[str, Any]] | None
    versions: Mapping[str, str]

    @property
    def ids(self) -> list[int]:
        """Of the questions, in their order."""
        return [question["id"] for question in self.questions]

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
    names: Mapping[str, str] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was measured with all that it follows from, as JSON values.

    Args:
        model: that was evaluated, with its adapters active as they were then.
        tokenizer: of the model.
        data: the contrast set.
        measured: `measures`, `side_effects`, `questions` and more.
        prompts: how prompts became tokens.
        strength: the factor of `edit_strength`.
        names: adapter's name in the model to what people know it by, its folder or id on the Hub.
        examples: what is known of answered questions before each prompt, `count` and more; None without.
    """
    bare = unwrap(model)
    try:
        of_model = fingerprint(model)
    except ValueError:  # its decoder blocks cannot be told, so that it has none
        of_model = None
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
        "data": {**source_of(data), "digest": rows_digest(data), "examples": examples and dict(examples)},
        "prompts": prompt_record(tokenizer, prompts or PromptOptions()),
        **measured,
        "versions": versions(),
    }


def texts_record(texts: Sequence[str], file: str | os.PathLike | None) -> dict[str, Any]:
    """What results say of texts, which come from a file, or are called as one."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
    return {"file": None if file is None else os.path.basename(file), "digest": digest, "count": len(texts)}


def versions() -> dict[str, str]:
    """Versions of what takes part in an evaluation."""
    packages = {module.__name__: module.__version__ for module in (peft, tokenizers, torch, transformers)}
    return {"peft_edit": __version__, **packages, "python": platform.python_version()}


def read_results(results: Mapping[str, Any] | str | os.PathLike, what: str = "results") -> Results:
    """Results that `record` made.

    Args:
        results: as JSON values, or a file of them.
        what: to call JSON values in messages; a file has its name.

    Raises:
        ValueError: it holds something else, or what an earlier release wrote.
    """
    where = what if isinstance(results, Mapping) else str(results)
    if not isinstance(results, Mapping):
        results = read_json(Path(results), Any, "no JSON", "pass what peft-edit evaluate --json wrote")
    given = dict(results) if isinstance(results, Mapping) else {}
    if "version" not in given or "questions" not in given:
        raise ValueError(f"{where} must be what peft-edit evaluate --json wrote, with version and questions")
    if type(given["version"]) is not int or given["version"] != VERSION:
        raise ValueError(
            f"{where} has version {given['version']!r} of the results, this release reads {VERSION}: {_AGAIN}"
        )
    if problem := mismatch(given, Recorded) or _contradiction(given):
        raise ValueError(f"{where} is damaged ({problem}): {_AGAIN}")
    base = given.get("base_questions")
    return Results(
        where=where,
        model={**dict.fromkeys(OF_MODEL), **given["model"]},
        data={**dict.fromkeys(OF_DATA), **given["data"]},
        **{name: given[name] for name in ("adapters", "strength", "prompts", "side_effects")},
        measures=_whole_measures(given["measures"]),
        questions=_whole_questions(given["questions"]),
        categories={
            name: {"questions": category["questions"], "measures": _whole_measures(category["measures"])}
            for name, category in given.get("categories", {}).items()
        },
        base_questions=base and _whole_questions(base),
        versions=given.get("versions", {}),
    )


def _whole_measures(measures: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    return {name: {**dict.fromkeys(OF_MEASURE), **measure} for name, measure in measures.items()}


def _whole_questions(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: question[name] for name in OfQuestion.__annotations__} for question in questions]


def _contradiction(given: Mapping[str, Any]) -> str | None:
    """What cannot be in results whose fields have the right types, or None."""
    of_categories = [category["measures"] for category in given.get("categories", {}).values()]
    every = (item for measures in (given["measures"], *of_categories) for item in measures.items())
    for name, measure in every:
        for what in ("value", "base"):
            value, least = measure.get(what), LEAST.get(name, 0.0)
            if value is not None and not least <= value <= 1 + ROUNDING:
                return f"{what} of {name} is {value}, which must be from {least:g} to 1"
    for effects in given["side_effects"]:
        for name in ("perplexity", "base_perplexity"):
            if not 1 <= effects.get(name, 1) < math.inf:
                return f"{name} is {effects[name]}, which must be 1 or more and finite"
        for name in ("kl_mean", "kl_p95", "perplexity_ratio"):
            if not 0 <= effects.get(name, 0) < math.inf:
                return f"{name} is {effects[name]}, which must be 0 or more and finite"
        if effects.get("touched") is not None and not 0 <= effects["touched"] <= 1:
            return f"touched is {effects['touched']}, which is no share"
    if not 0 <= given["strength"] < math.inf:
        return f"strength is {given['strength']}, which must be 0 or more and finite"
    rows, of_rows, ids = given["data"]["rows"], given["data"].get("of_rows"), [q["id"] for q in given["questions"]]
    if not ids or rows != len(ids):
        return f"data.rows is {rows}, and there are {len(ids)} questions"
    if len(set(ids)) < len(ids):
        return "a question is there twice"
    base_questions = given.get("base_questions")
    if base_questions is not None and [question["id"] for question in base_questions] != ids:
        return "base_questions are others than questions"
    if of_rows is not None and of_rows < rows:
        return f"data.of_rows is {of_rows}, data.rows is {rows}"
    return None
