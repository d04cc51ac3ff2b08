"""The results of a recipe as one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import files
from ...evaluation.comparing import check_comparable
from ...evaluation.results import Results, read_results
from ...evaluation.showing import LABELS, SHIFT, SIDE_EFFECTS, measure_cell, side_effect_cells
from ..common import table
from .plan import TABLE, TABLE_JSON
from .reading import Recipe


# What the table says of the effects on other texts; the files of results say more.
DAMAGE = ("perplexity", "perplexity_ratio", "kl_p95")


def write_table(recipe: Recipe, folder: Path, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Write the results of evaluations as a table, in Markdown and JSON.

    Args:
        recipe: of the results.
        folder: of the run, where the tables go.
        names: of the files of results in it.

    Returns:
        The table as text, and as JSON values.

    Raises:
        ValueError: results cannot stand side by side.
    """
    results = [read_results(folder / name) for name in names]
    check_comparable(results)
    columns = _columns(results)
    header = ["results", "data", "questions", *columns]
    rows = [
        [name.removesuffix(".json"), _data(found), str(len(found.ids)), *(cells[place] for cells in columns.values())]
        for place, (name, found) in enumerate(zip(names, results, strict=True))
    ]
    files.write_text(folder / TABLE, _markdown(recipe, header, rows))
    values = _json(recipe, names, results)
    files.write_json(folder / TABLE_JSON, values)
    return table(header, rows), values


def _columns(results: Sequence[Results]) -> dict[str, list[str]]:
    """Title of each column to its cells: the measures, then what each set of texts says of damage."""
    names = dict.fromkeys(name for found in results for name in found.measures if name not in SHIFT)
    columns = {
        f"{LABELS.get(name, name)} %": [measure_cell(r.measures[name]) if name in r.measures else "" for r in results]
        for name in names
    }
    files = dict.fromkeys(effects["texts"].get("file") for found in results for effects in found.side_effects)
    for file in files:
        shown = [_of_texts(found, file) for found in results]
        for name in DAMAGE:
            if any(name in cells for cells in shown):
                title = f"{SIDE_EFFECTS[name][0]}, {file}" if file else SIDE_EFFECTS[name][0]
                columns[title] = [cells.get(name, "") for cells in shown]
    return columns


def _of_texts(results: Results, file: str | None) -> dict[str, str]:
    found = (effects for effects in results.side_effects if effects["texts"].get("file") == file)
    return side_effect_cells(next(found, {}))


def _data(results: Results) -> str:
    """What the data set is called."""
    parts = [results.data[name] for name in ("name", "subset", "split")]
    named = [os.path.basename(str(part)) for part in parts if part is not None]
    return " ".join(named or map(str, results.data["files"] or ())) or "unknown"


def _markdown(recipe: Recipe, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    listed = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    variables = "\n".join(f"- {name}: {value}" for name, value in recipe.variables.items())
    return "\n\n".join(filter(None, (f"# {recipe.name}", recipe.description.strip(), listed, variables))) + "\n"


def _json(recipe: Recipe, names: Sequence[str], results: Sequence[Results]) -> dict[str, Any]:
    rows = [
        {
            "results": name,
            "data": dict(found.data),
            "questions": len(found.ids),
            "adapters": [dict(adapter) for adapter in found.adapters],
            "strength": found.strength,
            "measures": dict(found.measures),
            "side_effects": list(found.side_effects),
        }
        for name, found in zip(names, results, strict=True)
    ]
    return {"recipe": recipe.name, "variables": dict(recipe.variables), "rows": rows}
