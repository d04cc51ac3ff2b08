"""Results of evaluations -> the tables and the metadata of a model card."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import EvalResult

from ..data.names import data_id, data_name
from ..evaluation.results import Results
from .markdown import code


# Measure -> its name in tables, the factor there and the decimals.
MEASURES = {"mc1": ("MC1 %", 100, 1), "mc2": ("MC2 %", 100, 1), "perplexity": ("perplexity", 1, 3)}
SIDE_EFFECTS = ("perplexity",)


def eval_results_of(read: Sequence[Results]) -> list[EvalResult]:
    """The metadata's results: those with the adapter as it is, on all rows of a data set, or of its split or subset,
    that came from the Hub. It would be told as the Hub's where it is a local copy, or a part."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data_id(result.data["name"], result.data["files"]),
            dataset_name=", ".join(filter(None, (result.data["name"], result.data["subset"]))),
            dataset_split=result.data["split"],
            metric_type=name,
            metric_name=name.upper(),
            metric_value=round(value, 4),
        )
        for result in read
        if result.adapters and result.strength == 1 and _is_whole(result)
        if data_id(result.data["name"], result.data["files"])
        for name, value in result.measures.items()
        if name not in SIDE_EFFECTS  # which is of other text
    ]


def _is_whole(result: Results) -> bool:
    return result.data["rows"] == result.data["of_rows"]


def tables_of(read: Sequence[Results], side_effects: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows for each data set: the base model, then the edits by strength, with their change."""
    tables = []
    for rows in dict.fromkeys(result.rows for result in read):
        of_data = [result for result in read if result.rows == rows]
        of_data.sort(key=lambda result: (bool(result.adapters), result.strength))
        measured = dict.fromkeys(name for result in of_data for name in result.measures)
        names = [name for name in measured if (name in SIDE_EFFECTS) == side_effects]
        if not names:
            continue
        base = next((result.measures for result in of_data if not result.adapters), {})
        table = [[_row_name(result), *(_cell(name, result, base) for name in names)] for result in of_data]
        caption = _perplexity_caption(of_data) if side_effects else _caption(of_data[0])
        tables.append((caption, ["model", *(MEASURES[name][0] for name in names)], table))
    return tables


def _caption(result: Results) -> str:
    data = result.data
    name, files = data["name"] and data_name(data["name"]), data["files"]
    count, total = len(result.ids), data["of_rows"]
    parts = (
        name and code(name),
        data["subset"] and f"subset {code(data['subset'])}",
        data["split"] and f"split {code(data['split'])}",
        files and f"a local copy ({', '.join(map(code, files))})",
        f"{count} of {total} questions" if total is not None and total > count else f"{count} questions",
        f"prompt format {code(result.prompts['format'])}",
    )
    return f"Measured on {', '.join(filter(None, parts))}."


def _perplexity_caption(results: Sequence[Results]) -> str:
    file = next((result.texts.get("file") for result in results if result.texts), None)
    return f"Perplexity of other text{f', {code(file)}' if file else ''}."


def _row_name(result: Results) -> str:
    if not result.adapters:
        return "base model"
    return "this adapter" if result.strength == 1 else f"this adapter, strength {result.strength:g}"


def _cell(name: str, result: Results, base: dict[str, float]) -> str:
    if name not in result.measures:
        return ""
    _, factor, decimals = MEASURES[name]
    text = f"{factor * result.measures[name]:.{decimals}f}"
    if not result.adapters or name not in base:
        return text
    return f"{text} ({factor * (result.measures[name] - base[name]):+.{decimals}f})"
