"""Plain texts, such as those that an edit shall leave alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from .reading import FILE_TYPES, columns_of, read_file, read_text, require_columns
from .rows import check_encodable, kind, text


def load_texts(texts: Dataset | Iterable[str] | str | os.PathLike) -> Dataset:
    """Texts as a data set with the columns `id`, the row, and `text`.

    Args:
        texts: a list of texts, a `Dataset` with a column `text`, or a file: .txt with one text a line, of which empty
            ones are left out, or .jsonl, .json, .csv or .parquet with a column `text`.

    Raises:
        ValueError: there are no texts, or a row is none.
    """
    name = None
    if isinstance(texts, (str, os.PathLike)):
        name, texts = Path(texts).name, _read(Path(texts))
    if isinstance(texts, Dataset):
        if "text" not in texts.column_names:
            raise ValueError(f"texts need a column 'text', the data set has {', '.join(texts.column_names)}: rename it")
        name, texts = texts.info.dataset_name, texts["text"]
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts must be a list of text, a Dataset or a file, got {kind(texts)}: pass one of these")
    texts = list(texts)
    if wrong := [row for row, value in enumerate(texts) if not isinstance(value, str) or not value.strip()]:
        got = "empty text" if isinstance(texts[wrong[0]], str) else kind(texts[wrong[0]])
        raise ValueError(f"row {wrong[0]}: a text must be text, got {got}: fill it in or leave the row out")
    if not texts:
        raise ValueError("there are no texts: pass at least one")
    for row, value in enumerate(texts):
        check_encodable(value, f"row {row}: the text")
    data = Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    data.info.dataset_name = name
    return data


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there is no file {path} with texts")
    if path.suffix.lower() == ".txt":
        # not splitlines: a text may hold the other line ends that it knows, such as a form feed
        return [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
    if path.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"{path} must be a file of the types .txt, {', '.join(FILE_TYPES)}: convert it, or rename it")
    records = read_file(path)
    require_columns(columns_of(records), ["text"], str(path))
    return [text(record | {"id": row}, "text") for row, record in enumerate(records)]
