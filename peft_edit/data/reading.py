"""Files and repositories on the Hub -> records as they are, one dictionary a row."""

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from ..arguments import Argument, ArgumentError, one_line
from .rows import kind, text


FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


class NotThereError(ArgumentError, FileNotFoundError):
    """A file that an argument names is not there."""


class UnreachableError(ArgumentError, ConnectionError):
    """The Hub cannot be reached; arguments say how to do without it."""


@dataclass(frozen=True)
class Request:
    """What `load_contrast_set` was asked for; its arguments, for what loads the records."""

    name: str
    subset: str | None = None
    data_files: str | os.PathLike | list | None = None
    split: str | None = None
    revision: str | None = None


def read_known(
    request: Request, repository: str, config: str, split: str | None, *, local: str, columns: Iterable[str]
) -> list[dict]:
    """Records of a known data set: of the local copy where there is one, else of the Hub. Their `id` is their row.

    Args:
        repository, config, split: where the data set is on the Hub.
        local: name of its file, for the error message where the Hub cannot be reached.
        columns: what the records must have.
    """
    if request.data_files is not None:
        records, source = read_local(request), describe(request.data_files)
    else:
        records = read_known_hub(request, repository, config, split, local=local)
        source = describe(repository)
    if records:
        require_columns(columns_of(records), columns, source)
    return numbered(records)


def read_local(request: Request) -> list[dict]:
    """Records of the local copy of a known data set: a file, several, or a folder of files, in the order of names."""
    refuse(f"a local copy of {request.name!r}", revision=request.revision)
    files = request.data_files if isinstance(request.data_files, (list, tuple)) else [request.data_files]
    if not files or not all(isinstance(file, (str, os.PathLike)) for file in files):
        raise ArgumentError(
            Argument("data_files"),
            f" of {request.name!r} must be the path of a file or of a folder, or a list of such paths, got "
            f"{request.data_files!r}",
        )
    records = []
    for path in map(Path, files):
        if not path.exists():
            raise NotThereError(f"there is no file or folder {path}: change ", Argument("data_files"))
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in FILE_TYPES) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"the folder {path} has no file of the types {', '.join(FILE_TYPES)}: pass another")
        for file in found:
            records += read_file(file)
    return records


def read_known_hub(request: Request, repository: str, config: str | None, split: str, *, local: str) -> list[dict]:
    """Records of one split of a known data set on the Hub."""
    try:
        return load_hub(repository, config, split=split, revision=request.revision).to_list()
    except OSError as error:
        # a repository or revision that is not there is no trouble with the connection
        error_class = ArgumentError if isinstance(error, FileNotFoundError) else UnreachableError
        remedy: tuple[str | Argument, ...] = ("pass a local copy, ", Argument("data_files", local))
        if request.revision is not None:
            remedy = ("pass another ", Argument("revision"), ", or leave it out, or ", *remedy)
        reason = f"{request.name!r} could not be loaded from the Hub ({one_line(error)}): "
        raise error_class(reason, *remedy) from error


def load_hub(repository: str, config: str | None, **options):
    """`datasets.load_dataset`, whose errors that are neither OSError nor ValueError become ValueError. For a folder
    here, which it prefers to the Hub, all say so."""
    if os.path.isdir(repository):
        return _load_folder(repository, config, **options)
    try:
        return datasets.load_dataset(repository, config, **options)
    except OSError:
        raise
    # RuntimeError: a data set that is a loading script, which no current release of `datasets` runs
    except (DatasetsError, RuntimeError) as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{repository!r} on the Hub cannot be read ({reason}): pass its files instead") from error


# What a folder is that holds a file, and what to pass instead of it.
_NO_DATA = {
    "adapter_config.json": ("an adapter", "pass data"),
    "meta.json": ("a store of activations", "pass the data that it was collected from"),
    "config.json": ("a model", "pass data"),
    "state.json": ("written by save_to_disk", "pass load_from_disk(folder) in Python, or a file"),
}


def _load_folder(folder: str, config: str | None, **options):
    for file, (what, remedy) in _NO_DATA.items():
        if os.path.exists(os.path.join(folder, file)):
            raise ValueError(f"the folder {folder} is {what} ({file}), and no data set: {remedy}")
    try:
        return datasets.load_dataset(folder, config, **options)
    except (DatasetsError, RuntimeError, OSError, ValueError) as error:
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise ValueError(
            f"the folder {folder} on this machine cannot be read as data ({reason}): pass a file in it, or another name"
        ) from error


def read_file(path: Path) -> list[dict]:
    """Records of a .csv, .parquet, .jsonl or .json file; the latter may be JSON lines too."""
    suffix = path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise ValueError(f"{path} must be a file of the types {', '.join(FILE_TYPES)}: convert it, or rename it")
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {one_line(error)}") from error
    content = read_text(path)
    # not splitlines: JSON strings may hold the other line ends that it knows, such as U+2028
    whole = content.lstrip().startswith("[") or (suffix == ".json" and not _starts_with_json_line(content))
    documents = [(1, content)] if whole else enumerate(content.split("\n"), start=1)
    records = []
    for line, document in documents:
        if document.strip():
            try:
                value = json.loads(document)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error
            except (RecursionError, ValueError) as error:  # of more levels, or digits, than Python reads
                what = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
                raise ValueError(f"{path}, line {line}: {what}: leave it out") from error
            records += value if isinstance(value, list) else [value]
    for row_id, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {row_id} of {path} must be a JSON object, got {kind(record)}")
    return records


def _starts_with_json_line(content: str) -> bool:
    try:
        json.loads(content.lstrip().split("\n", 1)[0])
    except (RecursionError, ValueError):
        return False
    return True


def _read_csv(path: Path) -> list[dict]:
    content = read_text(path)
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    limit = csv.field_size_limit()
    # 131,072 characters unless somebody has changed it; no field is longer than the file
    csv.field_size_limit(max(limit, len(content)))
    try:
        records = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    for row_id, record in enumerate(records):
        if None in record or None in record.values():
            raise ValueError(f"row {row_id} of {path} must have {len(reader.fieldnames)} cells, as the header has")
    return records


def read_text(path: Path) -> str:
    """Contents of a file in UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def unformatted(data: datasets.Dataset) -> datasets.Dataset:
    """A data set that gives Python's own types, whatever its format (torch, numpy, pandas, ...) and its columns are.

    Raises:
        ArgumentError: it has a transform, which makes its rows only when they are read.
    """
    if data.format["type"] == "custom":
        raise ArgumentError(
            "the data set has a transform (set_transform, with_transform), whose rows are not stored: store them with "
            "data.map(...), or take the transform off with data.with_format(None)"
        )
    return data.with_format(None)


def numbered(records: list[dict]) -> list[dict]:
    """The records with their rows as `id`, and with every column that one of them has."""
    blank = dict.fromkeys(columns_of(records))
    return [blank | record | {"id": row} for row, record in enumerate(records)]


def in_category(records: list[dict], column: str, request: Request) -> list[dict]:
    """The records whose `column` is the subset that was asked for; all of them for None."""
    if request.subset is None or not records:
        return records
    found = [record for record in records if record.get(column) == request.subset]
    if not found:
        known = sorted({text(record, column) for record in records})
        raise ArgumentError(
            Argument("subset"), f" of {request.name!r} must be one of {', '.join(known)}, got {request.subset!r}"
        )
    return found


def describe(name) -> str:
    """A source, for error messages."""
    if isinstance(name, (list, tuple)) and name and all(isinstance(part, (str, os.PathLike)) for part in name):
        return ", ".join(map(describe, name))
    return repr(str(name)) if isinstance(name, (str, os.PathLike)) else f"a {type(name).__name__}"


def refuse(source: str, **options) -> None:
    """Raise ValueError for options that have no meaning for a source."""
    for option, value in options.items():
        if value is not None:
            raise ArgumentError(Argument(option, value), f" has no meaning for {source}: leave it out")


def columns_of(records: list[dict]) -> list[str]:
    """All columns that any of the records has."""
    return list(dict.fromkeys(column for record in records for column in record))


def require_columns(columns: list[str], needed: Iterable[str], source: str) -> None:
    """Raise ValueError, which names the columns that are there, unless those that are needed are among them."""
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(f"{source} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}: rename them")
