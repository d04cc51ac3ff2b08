"""The results of a recipe as one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import files
from ...evaluation.results import Results, check_comparable, read_results
from ..common import table
from .plan import TABLE, TABLE_JSON
from .reading import Recipe


# Measures that are shares, shown in per cent.
SHARES = ("mc1", "mc2")


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
    measures = list(dict.fromkeys(name for found in results for name in found.measures))
    header = ["results", "data", "questions", *map(_title, measures)]
    rows = [
        [name.removesuffix(".json"), _data(found), str(len(found.ids)), *_cells(found, measures)]
        for name, found in zip(names, results, strict=True)
    ]
    files.write_text(folder / TABLE, _markdown(recipe, header, rows))
    values = _json(recipe, names, results)
    files.write_json(folder / TABLE_JSON, values)
    return table(header, rows), values


def _title(measure: str) -> str:
    return f"{measure.upper()} %" if measure in SHARES else measure.replace("_", " ")


def _cells(results: Results, measures: Sequence[str]) -> list[str]:
    shown = {n: f"{100 * v:.1f}" if n in SHARES else f"{v:.4g}" for n, v in results.measures.items()}
    return [shown.get(name, "") for name in measures]


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
        }
        for name, found in zip(names, results, strict=True)
    ]
    return {"recipe": recipe.name, "variables": dict(recipe.variables), "rows": rows}
