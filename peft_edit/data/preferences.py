"""Preference data and contrast sets, of any source -> rows."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset

from ..arguments import Argument, ArgumentError
from .contexts import Message, join_messages
from .reading import (
    FILE_TYPES,
    NotThereError,
    Request,
    columns_of,
    describe,
    load_hub,
    read_file,
    refuse,
    require_columns,
    unformatted,
)
from .rows import CONTRAST_FEATURES, conversation, kind


_COLUMNS = ("prompt", "chosen", "rejected")
# What TRL's trainers hand to the model or to its chat template beside the messages, and is not read here.
_UNREAD = ("tools", "chat_template_kwargs", "images", "image")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# Of dialogues that are written out as one text, as in Anthropic/hh-rlhf.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_FORM = "'\\n\\nHuman: ...\\n\\nAssistant: ...'"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def load(request: Request, known_names: list[str]) -> list[dict]:
    """Records with `id` and the columns of preference data or of a contrast set."""
    name, source = request.name, describe(request.name)
    is_file = isinstance(name, (str, os.PathLike)) and Path(name).suffix.lower() in FILE_TYPES
    if is_file or isinstance(name, Dataset):
        refuse(source, **{option: value for option, value in vars(request).items() if option != "name"})
        records = read_file(Path(name)) if is_file else unformatted(name).to_list()
        columns = columns_of(records)
    elif isinstance(name, (str, os.PathLike)) and Path(name).is_dir():
        records, columns = _read_hub(replace(request, name=os.fspath(name)))
    elif isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).is_file():
        records, columns = _read_hub(request)
    elif isinstance(name, (str, os.PathLike)) and "/" in os.fspath(name) and not Path(name).exists():
        raise NotThereError(f"there is no file or folder {name}: change ", Argument("name"))
    else:
        raise ArgumentError(
            Argument("name"),
            f" must be a known data set ({', '.join(map(repr, known_names))}), a file ({', '.join(FILE_TYPES)}), a "
            f"Hub id with a slash or a datasets.Dataset, got {source}{_how_to_convert(name)}",
        )
    known = _known_columns(columns, source) if records else []
    if "chosen" in known and "prompt" not in known and not _has_prompts(records[0]):
        raise ValueError(
            f"{source} lacks the column prompt, and its answers hold none, as conversations and dialogues of the form "
            f"{_FORM} do; it has {', '.join(columns)}: rename the column that is the prompt, or add it"
        )
    return [{"id": row} | {column: record.get(column) for column in known} for row, record in enumerate(records)]


def _how_to_convert(data: object) -> str:
    """What makes a `Dataset` of data that are none, for a message."""
    if isinstance(data, list | tuple) and all(isinstance(row, str | os.PathLike) for row in data):
        return ": load the files one by one, and join them by concatenate_datasets"
    if isinstance(data, list | tuple):
        return ": pass Dataset.from_list(rows)"
    if isinstance(data, Mapping):
        return ": pass one of its splits" if isinstance(data, DatasetDict) else ": pass Dataset.from_dict(columns)"
    if isinstance(data, IterableDataset):
        return ": pass Dataset.from_list(list(data))"
    return ": pass Dataset.from_pandas(frame)" if type(data).__name__ == "DataFrame" else ""


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
        return [column for column in (*_COLUMNS, *_UNREAD) if column in columns]
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
    if unread := [column for column in _UNREAD if not _is_blank(record.get(column))]:
        raise ValueError(
            f"row {row_id}: {unread[0]} changes what the model reads, which is not supported: leave the row out"
        )
    prompt, chosen, rejected = (record.get(column) for column in _COLUMNS)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _dialogues(prompt, chosen, rejected, row_id)
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        return {"id": row_id, "prompt": prompt, "positives": [chosen], "negatives": [rejected]}
    if not (isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, (list, str, type(None)))):
        kinds = ", ".join(f"{column} {kind(record.get(column))}" for column in _COLUMNS)
        raise ValueError(
            f"row {row_id}: prompt, chosen and rejected must be text, or conversations, got {kinds}: leave it out"
        )
    chosen, rejected = conversation(chosen, row_id, "chosen"), conversation(rejected, row_id, "rejected")
    if isinstance(prompt, list):
        messages, chosen, rejected = _split_prompt(conversation(prompt, row_id, "prompt"), chosen, rejected)
    else:
        messages, chosen, rejected = _split_shared_prompt(row_id, prompt, chosen, rejected)
    return {
        "id": row_id,
        "prompt": join_messages(messages),
        "positives": [_only_answer(chosen, row_id, "chosen")],
        "negatives": [_only_answer(rejected, row_id, "rejected")],
        "messages": messages,
    }


def _is_blank(value: object) -> bool:
    """Whether a cell says nothing: null, an empty list or text, JSON of one, or a dict of nulls."""
    if isinstance(value, Mapping):
        return all(map(_is_blank, value.values()))
    return value in (None, [], "", "[]", "{}", "null")


def _dialogues(prompt, chosen: str, rejected: str, row_id: int):
    """Prompt and answers, where the answers are whole dialogues as conversations: the prompt is in them then, and one
    that is also given apart as text must be."""
    whole = [_TURN.match(value) is not None and "Human" in _TURN.findall(value) for value in (chosen, rejected)]
    if prompt is None and not all(whole):
        column = "rejected" if whole[0] else "chosen"
        raise ValueError(
            f"row {row_id}: there is no prompt, and {column} is no dialogue of the form {_FORM} that holds one: fill "
            "the prompt in, or leave the row out"
        )
    if not all(whole):
        return prompt, chosen, rejected
    if isinstance(prompt, str) and _TURN.match(prompt):
        given = _messages(prompt)
        prompt = [turn for turn in given if turn["content"]]  # "Assistant:" at its end asks for the answer
    return prompt, _messages(chosen), _messages(rejected)


def _messages(dialogue: str) -> list[Message]:
    """The messages of a dialogue in one text."""
    _, *parts = _TURN.split(dialogue)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[role], "content": content.strip()} for role, content in turns]


def _split_prompt(prompt: list[Message], chosen: list[Message], rejected: list[Message]):
    """The prompt with the messages that both answers begin with, and the rest of the answers. A prompt that both repeat
    stands once."""
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    shared = _shared(chosen, rejected)
    return [*prompt, *chosen[:shared]], chosen[shared:], rejected[shared:]


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with. The last is the answer, even where both are the same."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _split_shared_prompt(row_id: int, prompt: str | None, chosen: list[Message], rejected: list[Message]):
    """Splits TRL's implicit prompt, the messages that both begin with, off the answers.

    A prompt column of text beside conversations is found in public data: there it repeats one of the shared messages,
    or is all that comes before the answers.
    """
    shared = _shared(chosen, rejected)
    messages = chosen[:shared]
    if prompt is not None:
        turn = {"role": "user", "content": prompt}
        if messages and turn not in messages:
            raise ValueError(f"row {row_id}: prompt is not among the messages that chosen and rejected begin with")
        messages = messages or [turn]
    if not messages:
        raise ValueError(
            f"row {row_id}: there is no prompt, and chosen and rejected begin with different messages: add a prompt"
        )
    return messages, chosen[shared:], rejected[shared:]


def _only_answer(messages: list[Message], row_id: int, column: str) -> str:
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        got = ", ".join(roles) or "none"
        raise ValueError(
            f"row {row_id}: {column} must have one assistant message after the prompt, got {got}: "
            "end both conversations after the first answer in which they differ, or leave the row out"
        )
    return messages[0]["content"]
