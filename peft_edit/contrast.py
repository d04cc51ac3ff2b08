"""Data sets and preference data -> contrast sets.

A contrast set is a `datasets.Dataset` with one row per question and the columns `CONTRAST_FEATURES`, whatever it was
loaded from.
"""

import csv
import io
import json
import logging
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, List, Value

from .prompts import Message, join_messages


logger = logging.getLogger(__name__)

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
    }
)

_PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
_FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TRUTHFUL_QA = "truthfulqa/truthful_qa"


def load_contrast_set(
    name: str | os.PathLike | Dataset,
    *,
    subset: str | None = None,
    data_files: str | os.PathLike | None = None,
    split: str | None = None,
    ids: Iterable[int] | None = None,
) -> Dataset:
    """Loads questions with their positive and negative answers.

    Preference data have the columns `prompt`, `chosen`, `rejected`: text, or conversations in TRL's format, in which
    `prompt` may be missing where `chosen` and `rejected` begin with the same messages. Of a conversation, `messages`
    keeps the prompt's turns and `prompt` their contents, joined by new lines. Files and data sets that already have
    `prompt`, `positives`, `negatives` are taken as contrast sets; their other columns are optional.

    Args:
        name: `"truthful_qa"`; or preference data or a contrast set as a .json, .jsonl, .csv or .parquet file, as the
            id of a data set on the Hub ("user/name"), or as a `Dataset`.
        subset: configuration of a data set on the Hub.
        data_files: local copy of a known data set (`TruthfulQA.csv`); for a data set on the Hub, files in it.
        split: for `"truthful_qa"`, the questions of the HPR paper: `"train"` (367), `"eval"` (41) or `"test"` (409),
            in the paper's order. These ids number the rows of the Hub's `multiple_choice` configuration; on the CSV,
            which is in another order, they give splits of the same sizes with other questions. For a data set on
            the Hub, its split; needed where it has several. None takes all rows.
        ids: keep the rows with these ids, in this order; with `split`, they must be in it.

    Returns:
        A data set with the columns `CONTRAST_FEATURES`. `id` is the row in the source; a contrast set's own `id` is
        kept where there is one. Within a row, answers that are repeated are kept once, and those that stand in both
        lists are dropped from both, with a count in the log.

    Raises:
        ValueError: the name, split or an option has no meaning, columns are missing, ids are unknown or repeated, or
            a row (which is named by its id) holds something else than text, an empty answer, or no answer on one
            side.
        FileNotFoundError: there is no such file.
        ConnectionError: `"truthful_qa"` is to come from the Hub, which cannot be reached.
    """
    if isinstance(name, str) and name in _KNOWN:
        rows = _KNOWN[name](subset=subset, data_files=data_files, split=split)
    else:
        rows = _load_preferences(name, subset=subset, data_files=data_files, split=split)
    rows = _select(rows, ids, "the rows" if split is None else f"split {split!r}")
    if not rows:
        raise ValueError(f"no rows to load from {_describe(name)}: it is empty, or ids is")
    rows = [_checked(row) for row in rows]
    _drop_shared_answers(rows)
    return Dataset.from_list(rows, features=CONTRAST_FEATURES)


# Known data sets: (subset, data_files, split) -> rows


def check_contrast_set(data: Dataset) -> None:
    """Raise ValueError unless a data set has rows and the columns of a contrast set."""
    missing = [name for name in CONTRAST_FEATURES if name not in getattr(data, "column_names", ())]
    if missing:
        raise ValueError(
            f"a contrast set needs the columns {', '.join(missing)} too: load it with load_contrast_set(data)"
        )
    if len(data) == 0:
        raise ValueError("the contrast set is empty: nothing to do")


def _load_truthful_qa(*, subset, data_files, split) -> list[dict]:
    _refuse("'truthful_qa', which reads the configurations it needs", subset=subset)
    split_ids = None
    if split is not None:
        splits = json.loads(resources.files(__package__).joinpath("data/truthfulqa_hpr_splits.json").read_bytes())
        if split not in splits:
            raise ValueError(f"split of 'truthful_qa' must be one of {', '.join(splits)} or None, got {split!r}")
        split_ids = splits[split]
    if data_files is None:
        rows = _truthful_qa_from_hub()
    else:
        rows = _truthful_qa_from_csv(data_files)
        if split is not None:
            logger.warning(
                "split=%r of %s has the size of the HPR paper's split and not its questions: the paper's ids number "
                "the rows of the Hub's data set, and the CSV is in another order",
                split,
                data_files,
            )
    return _select(rows, split_ids, "'truthful_qa'")


def _truthful_qa_from_hub() -> list[dict]:
    try:
        questions = datasets.load_dataset(_TRUTHFUL_QA, "multiple_choice", split="validation").to_list()
        generation = datasets.load_dataset(_TRUTHFUL_QA, "generation", split="validation").to_list()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"'truthful_qa' could not be loaded from the Hub ({reason}): pass a local copy, data_files='TruthfulQA.csv'"
        ) from error
    categories = {row["question"]: row["category"] for row in generation}
    rows = []
    for row_id, row in enumerate(questions):
        mc1, mc2 = (_by_label(row[column], row_id, column) for column in ("mc1_targets", "mc2_targets"))
        if len(mc1[1]) != 1:
            raise ValueError(f"row {row_id}: mc1_targets must have one choice with label 1, got {len(mc1[1])}")
        rows.append(
            {
                "id": row_id,
                "prompt": row["question"],
                # a stable sort moves the best answer to the front and leaves the others in their order
                "positives": sorted(mc2[1], key=lambda answer, best=mc1[1][0]: answer != best),
                "negatives": mc2[0],
                "mc1_choices": mc1[1] + mc1[0],
                "category": categories.get(row["question"]),
            }
        )
    return rows


def _by_label(targets: dict, row_id: int, column: str) -> dict[int, list[str]]:
    choices, labels = targets["choices"], targets["labels"]
    if len(choices) != len(labels):
        raise ValueError(f"row {row_id}: {column} has {len(choices)} choices and {len(labels)} labels")
    return {label: [choice for choice, its in zip(choices, labels, strict=True) if its == label] for label in (0, 1)}


def _truthful_qa_from_csv(path: str | os.PathLike) -> list[dict]:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"data_files of 'truthful_qa' must be the path of one CSV file, got {path!r}")
    records = _read_csv(Path(path))
    _require_columns(records, ["Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"], path)
    return [
        {
            "id": row_id,
            "prompt": record["Question"],
            "positives": [record["Best Answer"].strip(), *_split_answers(record["Correct Answers"])],
            "negatives": _split_answers(record["Incorrect Answers"]),
            "category": record["Category"],
        }
        for row_id, record in enumerate(records)
    ]


def _split_answers(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(";") if answer.strip()]


_KNOWN = {"truthful_qa": _load_truthful_qa}


# Preference data and contrast sets -> rows, of which those with `chosen` become contrast rows once they are selected


def _load_preferences(name, *, subset, data_files, split) -> list[dict]:
    source = _describe(name)
    if isinstance(name, Dataset):
        _refuse(source, subset=subset, data_files=data_files, split=split)
        records = name.to_list()
    elif isinstance(name, (str, os.PathLike)) and Path(name).suffix.lower() in _FILE_TYPES:
        _refuse(source, subset=subset, data_files=data_files, split=split)
        records = _read_file(Path(name))
    elif isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).is_file():
        records = _read_hub(name, subset, data_files, split)
    else:
        raise ValueError(
            f"name must be a known data set ({', '.join(map(repr, _KNOWN))}), a file ({', '.join(_FILE_TYPES)}), a "
            f"Hub id with a slash or a datasets.Dataset, got {source}"
        )
    columns = _columns(records)
    if {"positives", "negatives"} <= set(columns):
        _require_columns(records, ["prompt"], source)
        known = [column for column in CONTRAST_FEATURES if column in columns]
    elif {"chosen", "rejected"} <= set(columns):
        known = _PREFERENCE_COLUMNS
    elif records:
        raise ValueError(
            f"{source} needs the columns prompt, chosen, rejected or prompt, positives, negatives; it has "
            f"{', '.join(columns)}: rename them"
        )
    else:
        known = []
    return [{"id": n} | {column: record.get(column) for column in known} for n, record in enumerate(records)]


def _preference_row(row: dict) -> dict:
    row_id, prompt, chosen, rejected = (row[column] for column in ("id", *_PREFERENCE_COLUMNS))
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        return {"id": row_id, "prompt": prompt, "positives": [chosen], "negatives": [rejected]}
    if not (isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, (list, str, type(None)))):
        kinds = ", ".join(f"{column} {_kind(row[column])}" for column in _PREFERENCE_COLUMNS)
        raise ValueError(f"row {row_id}: prompt, chosen and rejected must be text, or conversations, got {kinds}")
    chosen, rejected = _conversation(chosen, row_id, "chosen"), _conversation(rejected, row_id, "rejected")
    if isinstance(prompt, list):
        messages = _conversation(prompt, row_id, "prompt")
    else:
        messages, chosen, rejected = _split_shared_prompt(row_id, prompt, chosen, rejected)
    return {
        "id": row_id,
        "prompt": join_messages(messages),
        "positives": [_only_answer(chosen, row_id, "chosen")],
        "negatives": [_only_answer(rejected, row_id, "rejected")],
        "messages": messages,
    }


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


# Reading: source -> records as they are


def _read_hub(name: str, subset: str | None, data_files, split: str | None) -> list[dict]:
    loaded = datasets.load_dataset(name, subset, data_files=data_files, split=split)
    if split is None:
        if len(loaded) > 1:
            raise ValueError(f"{name!r} has the splits {', '.join(loaded)}: pass one of them as split")
        (loaded,) = loaded.values()
    known = {*CONTRAST_FEATURES, *_PREFERENCE_COLUMNS}
    wanted = [column for column in loaded.column_names if column in known]
    # without any column that is known, the names of the others are what the error has to show
    return loaded.select_columns(wanted or loaded.column_names).to_list()


def _read_file(path: Path) -> list[dict]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
    text = _read_text(path)
    # not splitlines: JSON strings may hold the other line ends that it knows, such as U+2028
    documents = [(1, text)] if text.lstrip().startswith("[") else enumerate(text.split("\n"), start=1)
    records = []
    for line, document in documents:
        if document.strip():
            try:
                value = json.loads(document)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error
            records += value if isinstance(value, list) else [value]
    for row_id, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {row_id} of {path} must be a JSON object, got {_kind(record)}")
    return records


def _read_csv(path: Path) -> list[dict]:
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error
    for row_id, record in enumerate(records):
        if None in record or None in record.values():
            raise ValueError(f"row {row_id} of {path} must have {len(reader.fieldnames)} cells, as the header has")
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


# Checks


def _describe(name) -> str:
    return repr(str(name)) if isinstance(name, (str, os.PathLike)) else f"a {type(name).__name__}"


def _kind(value) -> str:
    return "nothing" if value is None else type(value).__name__


def _refuse(source: str, **options) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} has no meaning for {source}: leave it out")


def _columns(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(column for record in records for column in record))


def _require_columns(records: list[dict], needed: list[str], source) -> None:
    columns = _columns(records)
    if records and (missing := [column for column in needed if column not in columns]):
        raise ValueError(f"{source} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}: rename them")


def _select(rows: list[dict], ids: Iterable[int] | None, source: str) -> list[dict]:
    """Rows in the order of `ids`; all of them for None."""
    by_id: dict = {}
    for row in rows:
        if type(row.get("id")) is not int:
            raise ValueError(f"row {row.get('id')!r}: id must be an integer, got {_kind(row.get('id'))}")
        if by_id.setdefault(row["id"], row) is not row:
            raise ValueError(
                f"row {row['id']}: the id stands in several rows: number the rows, or leave the column out"
            )
    if ids is None:
        return rows
    try:
        wanted = [operator.index(row_id) for row_id in ids]
    except TypeError:
        raise ValueError(f"ids must be a list of integers, got {ids!r}") from None
    if repeated := [row_id for row_id, times in Counter(wanted).items() if times > 1]:
        raise ValueError(f"ids must differ, got {repeated[0]} more than once")
    if unknown := [row_id for row_id in wanted if row_id not in by_id]:
        raise ValueError(f"ids {unknown[:5]} are not in {source}, which holds {len(rows)} rows")
    return [by_id[row_id] for row_id in wanted]


def _checked(row: dict) -> dict:
    """The row with all columns of a contrast set, in their order, and repeated answers removed."""
    if "chosen" in row:
        row = _preference_row(row)
    row = {column: row.get(column) for column in CONTRAST_FEATURES}
    row_id = row["id"]
    for column in ("prompt", "neutral", "category"):
        if not isinstance(row[column], str) and (row[column] is not None or column == "prompt"):
            raise ValueError(f"row {row_id}: {column} must be text, got {_kind(row[column])}")
    for column in ("positives", "negatives", "mc1_choices"):
        if row[column] is not None or column != "mc1_choices":
            row[column] = _checked_answers(row[column], row_id, column)
    if row["mc1_choices"] is not None and len(row["mc1_choices"]) < 2:
        raise ValueError(f"row {row_id}: mc1_choices must have at least 2 choices, got {len(row['mc1_choices'])}")
    if row["messages"] is not None:
        row["messages"] = _conversation(row["messages"], row_id, "messages")
    return row


def _checked_answers(value, row_id: int, column: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        kind = f"a list of {', '.join(sorted(set(map(_kind, value))))}" if isinstance(value, list) else _kind(value)
        raise ValueError(f"row {row_id}: {column} must be a list of text, got {kind}")
    if not all(answer.strip() for answer in value):
        raise ValueError(f"row {row_id}: {column} has an empty answer: fill it in or remove it")
    return list(dict.fromkeys(value))


def _conversation(value, row_id: int, column: str) -> list[Message]:
    """The role and content of every message; further keys, such as null-filled `tool_calls`, are left out."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"row {row_id}: {column} must be a list of messages, got {value or _kind(value)!r}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"row {row_id}: {column} must be messages with a role and a content of text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _drop_shared_answers(rows: list[dict]) -> None:
    dropped = 0
    for row in rows:
        shared = set(row["positives"]) & set(row["negatives"])
        dropped += len(shared)
        for column in ("positives", "negatives"):
            row[column] = [answer for answer in row[column] if answer not in shared]
            if not row[column]:
                also = f" after {len(shared)} that stand in both lists were dropped" if shared else ""
                raise ValueError(f"row {row['id']}: {column} has no answers{also}: leave the row out")
    if dropped:
        logger.warning("dropped from both lists: %d answers that stand in the positives and in the negatives", dropped)
