"""Preference data and contrast sets, of any source -> rows."""

import os
import re
from pathlib import Path

from datasets import Dataset

from ..arguments import Argument, ArgumentError
from .contexts import Message, join_messages
from .reading import FILE_TYPES, Request, columns_of, describe, load_hub, read_file, refuse, require_columns
from .rows import CONTRAST_FEATURES, conversation, kind


_COLUMNS = ("prompt", "chosen", "rejected")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of dialogues that are written out as one text, as in Anthropic/hh-rlhf.
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def load(request: Request, known_names: list[str]) -> list[dict]:
    """Records with `id` and the columns of preference data or of a contrast set."""
    name, source = request.name, describe(request.name)
    is_file = isinstance(name, (str, os.PathLike)) and Path(name).suffix.lower() in FILE_TYPES
    if is_file or isinstance(name, Dataset):
        refuse(source, **{option: value for option, value in vars(request).items() if option != "name"})
        records = read_file(Path(name)) if is_file else name.to_list()
        columns = columns_of(records)
    elif isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).is_file():
        records, columns = _read_hub(request)
    else:
        raise ArgumentError(
            Argument("name"),
            f" must be a known data set ({', '.join(map(repr, known_names))}), a file ({', '.join(FILE_TYPES)}), a "
            f"Hub id with a slash or a datasets.Dataset, got {source}",
        )
    known = _known_columns(columns, source) if records else []
    if "chosen" in known and "prompt" not in known and not _has_prompts(records[0]):
        require_columns(columns, ["prompt"], source)
    return [{"id": row} | {column: record.get(column) for column in known} for row, record in enumerate(records)]


def _read_hub(request: Request) -> tuple[list[dict], list[str]]:
    """Records of what is needed of a data set, and the names of all its columns."""
    name = request.name
    loaded = load_hub(
        name, request.subset, data_files=request.data_files, split=request.split, revision=request.revision
    )
    if request.split is None:
        if len(loaded) > 1:
            raise ArgumentError(f"{name!r} has the splits {', '.join(loaded)}: pass one of them as ", Argument("split"))
        (loaded,) = loaded.values()
    needed = _known_columns(loaded.column_names, describe(name))
    return loaded.select_columns(needed).to_list(), loaded.column_names


def _known_columns(columns: list[str], source: str) -> list[str]:
    if {"positives", "negatives"} <= set(columns):
        require_columns(columns, ["prompt"], source)
        return [column for column in CONTRAST_FEATURES if column in columns]
    if {"chosen", "rejected"} <= set(columns):
        return [column for column in _COLUMNS if column in columns]
    raise ValueError(
        f"{source} needs the columns prompt, chosen, rejected or prompt, positives, negatives; it has "
        f"{', '.join(columns)}: rename them"
    )


def _has_prompts(record: dict) -> bool:
    """Whether the answers of preference data hold their prompt: conversations and dialogues in one text may."""
    return not isinstance(record["chosen"], str) or _TURN.match(record["chosen"]) is not None


def to_row(record: dict) -> dict:
    """The row of a contrast set that a record stands for."""
    if "chosen" not in record:
        return record
    row_id = record["id"]
    prompt, chosen, rejected = (record.get(column) for column in _COLUMNS)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _dialogue(chosen, row_id, "chosen"), _dialogue(rejected, row_id, "rejected")
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        return {"id": row_id, "prompt": prompt, "positives": [chosen], "negatives": [rejected]}
    if not (isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, (list, str, type(None)))):
        kinds = ", ".join(f"{column} {kind(record.get(column))}" for column in _COLUMNS)
        raise ValueError(f"row {row_id}: prompt, chosen and rejected must be text, or conversations, got {kinds}")
    chosen, rejected = conversation(chosen, row_id, "chosen"), conversation(rejected, row_id, "rejected")
    if isinstance(prompt, list):
        messages = conversation(prompt, row_id, "prompt")
    else:
        messages, chosen, rejected = _split_shared_prompt(row_id, prompt, chosen, rejected)
    return {
        "id": row_id,
        "prompt": join_messages(messages),
        "positives": [_only_answer(chosen, row_id, "chosen")],
        "negatives": [_only_answer(rejected, row_id, "rejected")],
        "messages": messages,
    }


def _dialogue(value: str, row_id: int, column: str) -> list[Message]:
    """The messages of a dialogue in one text."""
    before, *parts = _TURN.split(value)
    if before.strip() or not parts:
        raise ValueError(
            f"row {row_id}: there is no prompt, and {column} is no dialogue of the form '\\n\\nHuman: ...\\n\\n"
            "Assistant: ...': give it a prompt"
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[role], "content": content.strip()} for role, content in turns]


def _split_shared_prompt(row_id: int, prompt: str | None, chosen: list[Message], rejected: list[Message]):
    """Splits TRL's implicit prompt, the messages that both begin with, off the answers.

    A prompt column of text beside conversations is found in public data: there it repeats one of the shared messages,
    or is all that comes before the answers.
    """
    shared = 0
    # the last message is the answer even where both are the same
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    messages = chosen[:shared]
    if prompt is not None:
        turn = {"role": "user", "content": prompt}
        if messages and turn not in messages:
            raise ValueError(f"row {row_id}: prompt is not among the messages that chosen and rejected begin with")
        messages = messages or [turn]
    if not messages:
        raise ValueError(f"row {row_id}: there is no prompt, and chosen and rejected begin with different messages")
    return messages, chosen[shared:], rejected[shared:]


def _only_answer(messages: list[Message], row_id: int, column: str) -> str:
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise ValueError(
            f"row {row_id}: {column} must have one assistant message after the prompt, got {', '.join(roles)}: split "
            "longer conversations at one answer"
        )
    return messages[0]["content"]
