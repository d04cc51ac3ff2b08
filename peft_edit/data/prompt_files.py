"""Prompts without answers, for models to answer: as a contrast set whose lists of answers are empty."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from .contexts import join_messages
from .reading import FILE_TYPES, columns_of, describe, numbered, read_file, read_text
from .rows import CONTRAST_FEATURES, checked, conversation, kind, select, text


# Columns of answers: a file with one of them is a contrast set, or preference data.
ANSWERS = ("positives", "negatives", "chosen", "rejected")


def is_prompt_file(name: str | os.PathLike) -> bool:
    """Whether a name is that of a file of prompts: a .txt file, or another one without columns of answers."""
    path = Path(name)
    if path.suffix.lower() == ".txt":
        return True
    readable = path.suffix.lower() in FILE_TYPES and path.is_file()
    return readable and not set(columns_of(read_file(path))) & set(ANSWERS)


def load_prompts(prompts: Iterable[str] | str | os.PathLike) -> Dataset:
    """Prompts as a data set with the columns of a contrast set; there are no answers.

    Args:
        prompts: a list of text, or a file: .txt with one prompt a line, of which empty ones are left out; or .jsonl,
            .json, .csv or .parquet with a column `prompt`, text or a conversation, or `messages`, a conversation, and
            `id` where the rows have their own.

    Raises:
        ValueError: there are no prompts, a row has none, or a conversation ends with an answer.
    """
    if isinstance(prompts, (str, os.PathLike)):
        source, records = describe(prompts), _read(Path(prompts))
    else:
        source, records = "the prompts", [{"prompt": prompt} for prompt in prompts]
    if not records:
        raise ValueError(f"{source} has no prompts: pass at least one")
    columns = columns_of(records)
    if not {"prompt", "messages"} & set(columns):
        raise ValueError(f"{source} lacks a column prompt or messages; it has {', '.join(columns)}: rename one")
    records = select(records if "id" in columns else numbered(records), None, source)
    return Dataset.from_list([checked(_row(record), source) for record in records], features=CONTRAST_FEATURES)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path} of prompts: pass another")
    if path.suffix.lower() == ".txt":
        # not splitlines: a prompt may hold the other line ends that it knows, such as a form feed
        return [{"prompt": line.rstrip("\r")} for line in read_text(path).split("\n") if line.strip()]
    return read_file(path)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """The row of a contrast set without answers."""
    row: dict[str, Any] = {"id": record["id"], "positives": [], "negatives": [], "messages": None}
    column = "prompt" if record.get("prompt") is not None else "messages"
    if column == "prompt" and isinstance(record["prompt"], str):
        return {**row, "prompt": text(record, "prompt")}
    if not isinstance(record.get(column), list):
        raise ValueError(
            f"row {record['id']}: prompt must be text, or messages a conversation, got {kind(record.get(column))}: "
            "fill one in, or leave the row out"
        )
    messages = conversation(record[column], record["id"], column)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"row {record['id']}: {column} end with an answer: leave it out")
    return {**row, "prompt": join_messages(messages), "messages": messages}
