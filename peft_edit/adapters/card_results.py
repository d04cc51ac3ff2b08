"""Results of evaluations -> the tables and the metadata of a model card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import EvalResult

from ..data.names import data_id, data_name
from ..json_files import mismatch, read_json


# Measure -> its name in tables, the factor there and the decimals. Others are shown by their own names.
MEASURES = {"mc1": ("MC1 %", 100, 1), "mc2": ("MC2 %", 100, 1), "perplexity": ("perplexity", 1, 3)}
SIDE_EFFECTS = ("perplexity",)

Results = Mapping[str, Any] | str | os.PathLike


class Data(TypedDict, total=False):
    """The data of an evaluation."""

    name: str | None
    split: str | None


class Conditions(TypedDict, total=False):
    """What results may say besides: the scores of each question or their number, and under what they were measured."""

    strength: float
    data: Data | None
    questions: list | int | None


class Evaluation(Conditions):
    """What `peft-edit evaluate --json` writes; every other number with a point is a measure."""

    adapter: str | None


def read_results(results: Results) -> dict[str, Any]:
    """Results of one evaluation, without the scores of each question."""
    where, given = "results", results
    if not isinstance(results, Mapping):
        where = str(results)
        given = read_json(Path(results), Any, "no JSON", "pass what peft-edit evaluate --json wrote")
    problem = mismatch(dict(given) if isinstance(given, Mapping) else given, Evaluation)
    numbers = {} if problem else {name: value for name, value in given.items() if isinstance(value, float)}
    measures = {name: value for name, value in numbers.items() if name != "strength"}
    if not measures:
        raise ValueError(
            f"{where} must be what peft-edit evaluate --json wrote, with adapter and mc1 or the like "
            f"({problem or 'no measure'})"
        )
    data, questions = given.get("data") or {}, given.get("questions")  # the scores of each, or their number
    return {
        "adapter": given["adapter"],
        "edited": given["adapter"] is not None,
        "strength": given.get("strength", 1.0),
        "data": data_name(data["name"]) if data.get("name") else None,
        "split": data.get("split"),
        "questions": len(questions) if isinstance(questions, list) else questions,
        "measures": measures,
    }


def eval_results_of(read: list[dict[str, Any]]) -> list[EvalResult]:
    """The metadata's results: those with the adapter as it is, on data whose name is known."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data_id(result["data"]) or result["data"],
            dataset_name=result["data"],
            dataset_split=result["split"],
            metric_type=name,
            metric_name=name.upper() if name in ("mc1", "mc2") else name,
            metric_value=round(value, 4),
        )
        for result in read
        if result["edited"] and result["strength"] == 1 and result["data"] is not None
        for name, value in result["measures"].items()
        if name not in SIDE_EFFECTS  # which is of other text
    ]


def tables_of(read: list[dict[str, Any]], side_effects: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows for each data set: the base model, then the edits by strength, with their change."""
    tables = []
    for key in dict.fromkeys((r["data"], r["split"], r["questions"]) for r in read):
        of_data = [r for r in read if (r["data"], r["split"], r["questions"]) == key]
        of_data.sort(key=lambda r: (r["edited"], r["strength"]))
        measured = dict.fromkeys(name for r in of_data for name in r["measures"])
        names = [name for name in measured if (name in SIDE_EFFECTS) == side_effects]
        if not names:
            continue
        base = next((r["measures"] for r in of_data if not r["edited"]), {})
        rows = [[_row_name(r), *(_cell(name, r, base) for name in names)] for r in of_data]
        caption = "Perplexity of other text." if side_effects else _caption(*key)
        tables.append((caption, ["model", *(MEASURES.get(name, (name,))[0] for name in names)], rows))
    return tables


def _caption(data: str | None, split: str | None, questions: int | None) -> str:
    parts = (data and f"`{data}`", split and f"split `{split}`", questions and f"{questions} questions")
    return f"Measured on {', '.join(filter(None, parts)) or 'data that are not recorded'}."


def _row_name(result: dict[str, Any]) -> str:
    if not result["edited"]:
        return "base model"
    return "this adapter" if result["strength"] == 1 else f"this adapter, strength {result['strength']:g}"


def _cell(name: str, result: dict[str, Any], base: dict[str, float]) -> str:
    if name not in result["measures"]:
        return ""
    _, factor, decimals = MEASURES.get(name, (name, 1, 4))
    text = f"{factor * result['measures'][name]:.{decimals}f}"
    if not result["edited"] or name not in base:
        return text
    return f"{text} ({factor * (result['measures'][name] - base[name]):+.{decimals}f})"
