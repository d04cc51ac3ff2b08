"""The columns of a contrast set and the checks of its rows, whatever they were loaded from."""

import logging
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

from datasets import Features, List, Value

from ..arguments import Argument, ArgumentError
from .contexts import Message


logger = logging.getLogger(__name__)

# Keys of messages, besides role and content, that chat templates print.
_PRINTED = ("tool_calls", "tool_call_id", "function_call", "tool_plan", "reasoning_content", "reasoning", "thinking")
_TOOL_ROLES = ("tool", "function", "ipython")

# Columns that tell what one of the answers is.
_TOLD_ANSWERS = ("unknown", "stereotyped")

CONTRAST_FEATURES = Features(
    {
        "id": Value("int64"),
        "prompt": Value("string"),
        "positives": List(Value("string")),
        "negatives": List(Value("string")),
        "neutral": Value("string"),
        "mc1_choices": List(Value("string")),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "category": Value("string"),
        "unknown": Value("string"),
        "stereotyped": Value("string"),
    }
)


def kind(value) -> str:
    """What a value is, for error messages."""
    return "nothing" if value is None else type(value).__name__


def text(record: dict, column: str) -> str:
    """A record's cell that must hold text."""
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        got = "empty text" if isinstance(value, str) else kind(value)
        raise ValueError(f"row {record['id']}: {column} must be text, got {got}: fill it in or leave the row out")
    return value


def select(records: list[dict], ids: Iterable[int] | None, source: str) -> list[dict]:
    """Records in the order of `ids`; all of them for None."""
    by_id: dict = {}
    for record in records:
        if type(record.get("id")) is not int:
            raise ValueError(f"row {record.get('id')!r}: id must be an integer, got {kind(record.get('id'))}")
        if not -(2**63) <= record["id"] < 2**63:
            raise ValueError(f"row {record['id']}: id must fit in 64 bits: number the rows, or leave the column out")
        if by_id.setdefault(record["id"], record) is not record:
            raise ValueError(
                f"row {record['id']}: the id stands in several rows: number the rows, or leave the column out"
            )
    if ids is None:
        return records
    try:
        wanted = [operator.index(row_id) for row_id in ids]
    except TypeError:
        raise ArgumentError(Argument("ids"), f" must be a list of integers, got {ids!r}") from None
    if repeated := [row_id for row_id, times in Counter(wanted).items() if times > 1]:
        raise ArgumentError(Argument("ids"), f" must differ, got {repeated[0]} more than once")
    if unknown := [row_id for row_id in wanted if row_id not in by_id]:
        raise ValueError(f"ids {unknown[:5]} are not in {source}, which holds {len(records)} rows")
    return [by_id[row_id] for row_id in wanted]


def checked(row: dict[str, Any], source: str) -> dict[str, Any]:
    """The row with all columns of a contrast set, in their order, and repeated answers removed.

    Args:
        row: of a contrast set.
        source: what it was loaded from, for errors.
    """
    row = {column: row.get(column) for column in CONTRAST_FEATURES}
    row_id = row["id"]
    for column in ("prompt", "neutral", "category", *_TOLD_ANSWERS):
        if not isinstance(row[column], str) and (row[column] is not None or column == "prompt"):
            raise ValueError(f"row {row_id}: {column} must be text, got {kind(row[column])}")
    for column in ("positives", "negatives", "mc1_choices"):
        if row[column] is not None or column != "mc1_choices":
            row[column] = _checked_answers(row[column], row_id, column)
    for column in _TOLD_ANSWERS:
        if row[column] is not None and row[column] not in (*row["positives"], *row["negatives"]):
            raise ValueError(f"row {row_id}: {column} must be one of the answers, got {row[column]!r}")
    if row["mc1_choices"] is not None and len(row["mc1_choices"]) < 2:
        raise ValueError(f"row {row_id}: mc1_choices must have at least 2 choices, got {len(row['mc1_choices'])}")
    if row["messages"] is not None:
        row["messages"] = conversation(row["messages"], row_id, "messages")
    for column, value in row.items():
        check_encodable(value, f"row {row_id} of {source}: {column}")
    return row


def check_encodable(value: Any, what: str) -> None:
    """Raise ValueError for text that no file and no tokenizer takes: JSON can write half of a surrogate pair."""
    if isinstance(value, list):
        for part in value:
            check_encodable(part, what)
    elif isinstance(value, dict):
        check_encodable(list(value.values()), what)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode_escape").decode()
            raise ValueError(
                f"{what} has half of a surrogate pair ({half}), which is no character: mend the text, or leave the row "
                "out"
            ) from error


def _checked_answers(value, row_id: int, column: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        what = f"a list of {', '.join(sorted(set(map(kind, value))))}" if isinstance(value, list) else kind(value)
        raise ValueError(f"row {row_id}: {column} must be a list of text, got {what}")
    if not all(answer.strip() for answer in value):
        raise ValueError(f"row {row_id}: {column} has an empty answer: fill it in or remove it")
    return list(dict.fromkeys(value))


def conversation(value, row_id: int, column: str) -> list[Message]:
    """The role and content of every message, of which parts of text are joined.

    Further keys are left out. Those that chat templates print, calls of tools and thoughts, are refused unless null.
    """
    if not isinstance(value, list) or not value:
        got = "none" if value == [] else kind(value)
        raise ValueError(
            f"row {row_id}: {column} must be a list of messages, got {got}: fill it in or leave the row out"
        )
    return [_message(message, f"row {row_id}: {column}") for message in value]


def _message(message, what: str) -> Message:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    printed = (*_PRINTED, "name") if role in _TOOL_ROLES else _PRINTED
    if found := [key for key in printed if fields.get(key)]:
        raise ValueError(f"{what} has a message with {found[0]}, which is not supported: leave the row out")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        kinds = {part.get("type") for part in parts} - {"text"}
        if others := sorted(map(str, kinds)):
            raise ValueError(
                f"{what} has a message with a part of type {others[0]}, only text is supported: leave the row out"
            )
        texts = [part.get("text") for part in parts]
        # a list of anything else is no content
        content = "".join(texts) if parts == content and all(isinstance(text, str) for text in texts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{what} must be messages with a role and a content of text")
    return {"role": role, "content": content}


def drop_shared_answers(rows: list[dict], known: bool) -> list[dict]:
    """Remove answers that stand in both lists of a row from both, with a count in the log.

    A row that has none left on one side contrasts nothing: of a `known` data set, which its user did not write, it is
    left out with a count in the log too; of others it is an error.
    """
    dropped, kept = 0, []
    for row in rows:
        shared = set(row["positives"]) & set(row["negatives"])
        dropped += len(shared)
        for column in ("positives", "negatives"):
            row[column] = [answer for answer in row[column] if answer not in shared]
            if not row[column] and not (known and shared):
                also = f" after {len(shared)} that stand in both lists were dropped" if shared else ""
                raise ValueError(f"row {row['id']}: {column} has no answers{also}: leave the row out")
        if row["positives"] and row["negatives"]:
            kept.append(row)
    if dropped:
        logger.warning("dropped from both lists: %d answers that stand in the positives and in the negatives", dropped)
    if left_out := len(rows) - len(kept):
        logger.warning("left out %d rows, whose answers on one side all stand on the other too", left_out)
    return kept
