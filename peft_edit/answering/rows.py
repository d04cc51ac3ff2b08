"""Rows of answers: read again, and summed up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import whole_lines
from .options import LIKELIHOOD


@dataclass(frozen=True)
class Candidate:
    """One of the answers to a prompt, see `generate_answers`."""

    answer: str
    tokens: int
    finished: bool
    log_likelihood: float
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without a score where no function gives one."""
        return {name: value for name, value in vars(self).items() if value is not None}


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The whole rows of a file."""
    rows = []
    for number, line in enumerate(whole_lines(out), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "run": row["run"]})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{out} has a line {number} that is no answer of an earlier run: choose another file"
            ) from error
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the answers of each of the models: `answers`, their number, `tokens`, `finished`, the share in [0, 1],
    `log_likelihood`, and where there are some, `score` and `first_score`, that of the first of several candidates: what
    one answer alone would have."""
    found: dict[str, dict[str, float]] = {}
    for who in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == who]
        firsts = [row["candidates"][0] for row in mine if "candidates" in row]
        kept = {"tokens": mine, "finished": mine, LIKELIHOOD: mine, "score": mine, "first_score": firsts}
        found[who] = {"answers": len(mine)}
        for name, of in kept.items():
            values = [row[name.removeprefix("first_")] for row in of if name.removeprefix("first_") in row]
            if values:
                found[who][name] = sum(values) / len(values)
    return found
