"""Results of evaluations -> the tables and the metadata of a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult

from ..data.names import data_id, data_name
from ..evaluation.results import Results
from ..evaluation.showing import LABELS, SHIFT, SIDE_EFFECTS, measure_cell, percent, side_effect_cells
from .markdown import code


# Model, what it is called, and its cells by column.
Row = tuple[str, dict[str, str]]


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
            metric_name=LABELS.get(name, name),
            metric_value=round(measure["value"], 4),
        )
        for result in read
        if result.adapters and result.strength == 1 and _is_whole(result)
        if data_id(result.data["name"], result.data["files"])
        for name, measure in result.measures.items()
        if measure["value"] is not None and name not in SHIFT
    ]


def _is_whole(result: Results) -> bool:
    return result.data["rows"] == result.data["of_rows"]


def tables_of(read: Sequence[Results], side_effects: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows for each data set: the base model, then the edits by strength, with their change."""
    tables = []
    for rows in dict.fromkeys(result.rows for result in read):
        of_data = [result for result in read if result.rows == rows]
        of_data.sort(key=lambda result: (bool(result.adapters), result.strength))
        tables += _of_side_effects(of_data) if side_effects else _of_measures(of_data)
    return tables


def _of_measures(results: Sequence[Results]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The measures, and the shift from the base model's answers."""
    alone = next((result.measures for result in results if not result.adapters), {})
    base = {name: measure["value"] for name, measure in alone.items()}
    beside = [(name, value["base"]) for r in results for name, value in r.measures.items() if name not in base]
    base |= {name: value for name, value in beside if value is not None}
    edited = [result for result in results if result.adapters]
    rows = [("base model", {name: percent(value) for name, value in base.items() if value is not None})]
    rows += [(_row_name(r), {name: measure_cell(m, base.get(name)) for name, m in r.measures.items()}) for r in edited]
    has_intervals = any(m["difference_low"] is not None for r in edited for m in r.measures.values())
    caption = _caption(results[0]) + (" In brackets the change, with its 95 % interval." if has_intervals else "")
    labels = {name: f"{LABELS.get(name, code(name))} %" for result in results for name in result.measures}
    of_shift = {name: label for name, label in labels.items() if name in SHIFT}
    found = [_table(caption, {name: label for name, label in labels.items() if name not in SHIFT}, rows)]
    if of_shift:
        found.append(_table("Of these questions, by MC1:", of_shift, rows[1:]))
    return [table for table in found if table is not None]


def _of_side_effects(results: Sequence[Results]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table of each set of texts."""
    found = {}
    for result in results:
        for effects in result.side_effects:
            found.setdefault(effects["texts"]["digest"], []).append((result, effects))
    tables = []
    for of_texts in found.values():
        texts = of_texts[0][1]["texts"]
        base = next((e.get("base_perplexity", None if r.adapters else e.get("perplexity")) for r, e in of_texts), None)
        rows = [] if base is None else [("base model", {"perplexity": f"{base:.3f}"})]
        for result, effects in of_texts:
            if result.adapters:
                ratio = (
                    {}
                    if None in (base, effects.get("perplexity"))
                    else {"perplexity_ratio": effects["perplexity"] / base}
                )
                rows.append((_row_name(result), side_effect_cells({**effects, **ratio})))
        name = f", {code(texts['file'])}" if texts.get("file") else ""
        caption = f"On other text{name}: {texts['count']} texts."
        tables.append(_table(caption, {name: label for name, (label, *_) in SIDE_EFFECTS.items()}, rows))
    return [table for table in tables if table is not None]


def _table(
    caption: str, labels: Mapping[str, str], rows: Sequence[Row]
) -> tuple[str, list[str], list[list[str]]] | None:
    """Columns that have a cell, and rows that have one; None where there is none."""
    names = [name for name in labels if any(name in cells for _, cells in rows)]
    table = [[model, *(cells.get(name, "") for name in names)] for model, cells in rows if cells]
    return (caption, ["model", *(labels[name] for name in names)], table) if names else None


def _caption(result: Results) -> str:
    data = result.data
    name, files = data["name"] and data_name(data["name"]), data["files"]
    count, total = len(result.ids), data["of_rows"]
    parts = (
        name and code(name),
        data["subset"] and f"subset {code(data['subset'])}",
        data["split"] and f"split {code(data['split'])}",
        files and f"a local copy ({', '.join(map(code, files))})",
        data["examples"] and f"{data['examples'].get('count')} answered questions before each",
        f"{count} of {total} questions" if total is not None and total > count else f"{count} questions",
        f"prompt format {code(result.prompts['format'])}",
    )
    return f"Measured on {', '.join(filter(None, parts))}."


def _row_name(result: Results) -> str:
    if not result.adapters:
        return "base model"
    return "this adapter" if result.strength == 1 else f"this adapter, strength {result.strength:g}"
