"""The results of a whole experiment, by the table that `peft-edit run` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from peft.utils import CONFIG_NAME

from ..adapters.read import read_config
from ..evaluation.results import Results, read_results
from ..json_files import inside, read_json
from ..tuners.config import EditConfig


class OfRow(TypedDict):
    """A row of the table: the file of its results."""

    results: str


class OfTable(TypedDict):
    """What is read of `table.json`."""

    recipe: str
    rows: list[OfRow]


def read_experiment(table: Path) -> tuple[str, list[Results]]:
    """The recipe's name, and the results of its rows, whose files stand beside the table.

    Raises:
        ValueError: it is no such table, or a file of its results is missing or damaged.
    """
    read = read_json(table, OfTable, "no table of a recipe", "pass the table.json that peft-edit run wrote")
    return read["recipe"], [read_results(table.parent / inside(row["results"], table)) for row in read["rows"]]


def by_demonstrations(results: Sequence[Results], method: str, folder: Path) -> list[tuple[int, Results]]:
    """Results of the edits of one method on the first data set, by the number of demonstrations that they were learnt
    from, or of questions where the method counts no demonstrations.

    Args:
        results: of an experiment.
        method: name of the method.
        folder: of the experiment, in which adapters are looked for that are not where they were.
    """
    found: dict[int, Results] = {}
    for of_row in results:
        if len(of_row.adapters) != 1 or of_row.strength != 1 or of_row.adapters[0]["method"] != method:
            continue
        place = Path(of_row.adapters[0]["name"])
        place = next((p for p in (place, folder / place, folder / place.name) if (p / CONFIG_NAME).exists()), None)
        config = None if place is None else read_config(place)
        if not isinstance(config, EditConfig):
            continue
        number = config.fitted_on.get("demonstrations", config.fitted_on.get("questions"))
        if number and (not found or next(iter(found.values())).rows == of_row.rows):
            found.setdefault(number, of_row)
    return sorted(found.items())
