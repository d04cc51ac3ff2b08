"""What a sweep wrote, read again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..json_files import mismatch, read_json
from .sweep import RECORD, Sweep
from .trial import Base, Found, Scores


_AGAIN = "run peft-edit sweep again with this release of peft_edit"


class OfScores(TypedDict):
    """See `Scores`."""

    mc1: float
    mc2: float
    questions: dict[str, list[float]]


class OfBase(TypedDict):
    """See `Base`."""

    scores: OfScores
    block_tokens: int
    separate: int


class OfFound(TypedDict):
    """See `Found`; a damage that is infinite is null."""

    key: str
    setting: dict[str, Any]
    damage: float | None
    side_effects: dict[str, Any] | None
    stopped: str | None
    scores: OfScores | None
    block_tokens: int


class Chosen(TypedDict):
    """The setting that was chosen, which stands among the others."""

    key: str


class OfSweep(TypedDict):
    """See `Sweep.to_dict`."""

    method: str
    criterion: Literal["mc1", "mc2"]
    budget: dict[str, float]
    base: OfBase
    chosen: Chosen
    settings: list[OfFound]


def read_sweep(record: Mapping[str, Any] | str | os.PathLike) -> Sweep:
    """The result of a sweep.

    Args:
        record: `Sweep.to_dict()`, or the file `sweep.json` beside the adapter, or that adapter's folder.

    Raises:
        ValueError: there is none, or it is of an earlier release, or damaged.
    """
    where = "the sweep"
    if not isinstance(record, Mapping):
        path = Path(record)
        path = path / RECORD if path.is_dir() else path
        where = str(path)
        record = read_json(path, Any, "no JSON", "pass the sweep.json that peft-edit sweep wrote beside the adapter")
    if problem := mismatch(record, OfSweep) or _contradiction(record):
        raise ValueError(f"{where} is no sweep that this release reads ({problem}): {_AGAIN}")
    criterion, base = record["criterion"], record["base"]
    found = [
        Found.from_dict({name: row[name] for name in OfFound.__annotations__}, criterion) for row in record["settings"]
    ]
    chosen = next(row for row in found if row.key == record["chosen"]["key"])
    read = Base(Scores(**_of(OfScores, base["scores"])), base["block_tokens"], base["separate"])
    return Sweep(record["method"], criterion, record["budget"], read, found, chosen)


def _of(declared: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in declared.__annotations__}


def _contradiction(record: Mapping[str, Any]) -> str | None:
    """What cannot be in a sweep whose fields have the right types, or None."""
    if record["chosen"]["key"] not in {row["key"] for row in record["settings"]}:
        return "the chosen setting is none of the settings"
    scores = [row["scores"] for row in (record["base"], *record["settings"]) if row["scores"] is not None]
    counts = {len(of["questions"].get(name, ())) for of in scores for name in ("mc1", "mc2")}
    if len(counts) != 1 or 0 in counts:
        return f"scores are of {' and '.join(map(str, sorted(counts)))} questions"
    if any("layers" not in row["setting"] for row in record["settings"]):
        return "a setting without layers"
    return None
