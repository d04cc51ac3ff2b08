"""Files of a store, and what stands in its meta.json and its index."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import files
from ...arguments import Argument, ArgumentError
from ...models.dtypes import FLOATING, dtype_name
from .disk import reporting_full_disk
from .format import UNKNOWN_DIGEST, header


FORMAT_VERSION = 2
META, INDEX = "meta.json", "index.safetensors"
# Tokens of an answer that make one row of it.
RowTokens = Literal["last", "mean", "random"]
ROW_TOKENS = get_args(RowTokens)
# Tokens of which each is a row: those of the answers, and those of plain texts.
EVERY_TOKEN = ("answer", "all")
DTYPES = tuple(map(dtype_name, FLOATING.values()))
# What reading needs of meta.json.
REQUIRED = (
    *("complete", "sites", "tokens", "hidden_size", "dtype", "modules", "shards"),
    *("model", "fingerprint", "active_adapters"),
)
# A file of a store, or a hidden one that was being written when a run was killed. Generated answers are there only
# until the index is.
STORE_FILE = re.compile(
    r"(\.)?(meta\.json|(index|shard-\d+)\.safetensors|generated-\d+\.json)(?(1)(\.[0-9a-f]{8})?\.tmp)|\.lock"
)
AGAIN = ("collect again with ", Argument("resume", False))


def read_manifest(path: Path) -> dict[str, Any]:
    """Contents of a store's meta.json, of whatever format version.

    Raises:
        ValueError: the folder is no store, or its meta.json is damaged or of another program.
    """
    file = path / META
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is no activation store: it has no {META}; pass the folder that collect wrote"
        ) from None
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise _damaged(file, "no format_version")
    return metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Contents of a store's meta.json, which this release can read.

    Raises:
        ValueError: the folder is no store, of another format version, or its meta.json is damaged.
    """
    file, metadata = path / META, read_manifest(path)
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}: collect again")
    if missing := [name for name in REQUIRED if name not in metadata]:
        raise _damaged(file, f"no {missing[0]}")
    dtype, sites, modules, shards = (metadata[name] for name in ("dtype", "sites", "modules", "shards"))
    if dtype not in DTYPES:
        raise _damaged(file, f"dtype is {dtype!r}")
    if not isinstance(sites, list) or not sites or not isinstance(modules, dict) or set(modules) != set(sites):
        raise _damaged(file, f"sites are {sites!r}, modules are {modules!r:.80}")
    layers = [sorted(of_site) for of_site in modules.values() if isinstance(of_site, dict)]
    if len(layers) < len(sites) or not layers[0] or any(of_site != layers[0] for of_site in layers):
        raise _damaged(file, f"modules are {modules!r:.80}")
    if not all(layer.isdigit() for layer in layers[0]):
        raise _damaged(file, f"layers are {layers[0]!r:.80}")
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and {"file", "first_row", "rows", "sha256"} <= set(shard) for shard in shards
    ):
        raise _damaged(file, f"shards are {shards!r:.80}")
    return metadata


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} is damaged ({what}): collect again into another folder")


def read_index(path: Path, names: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors of a store's index.safetensors, memory-mapped; of `names` those that are there, None for all."""
    with _open_index(path) as tensors:
        found = tensors.keys()
        wanted = found if names is None else [name for name in names if name in found]
        return {name: tensors.get_tensor(name) for name in wanted if name not in without}


def read_token_ids(path: Path, start: int, stop: int) -> Tensor:
    """Part of the token ids in a store's index, (stop - start,) int32, of which nothing stays mapped."""
    with _open_index(path) as tensors:
        return tensors.get_slice("token_ids")[start:stop].clone()


@contextmanager
def _open_index(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path / INDEX, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{path / INDEX} cannot be read ({error}): ", *AGAIN) from error


def is_whole(path: Path) -> bool:
    """Whether a file is there and as `write_index` wrote it, in every byte."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        size = file.read(8)
        # A damaged length may be anything.
        first = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        found = re.search(rb'"sha256":"([0-9a-f]{64})"', first)
        if found is None:
            return False
        unknown = first[: found.start(1)] + UNKNOWN_DIGEST.encode() + first[found.end(1) :]
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(unknown))
        return digest.hexdigest().encode() == found[1]


def check_folder(path: Path) -> None:
    """Raise ValueError where `path` is a file, or a folder with files that are no part of a store."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder")
    names = sorted(file.name for file in path.iterdir()) if path.exists() else []
    # What a run leaves that was killed before it wrote its manifest is hidden, as is what file managers leave.
    foreign = [name for name in names if not name.startswith(".") and not STORE_FILE.fullmatch(name)]
    if META not in names and (foreign or any(not name.startswith(".") for name in names)):
        raise ValueError(f"{path} is not empty: choose another folder")
    if foreign:
        raise ValueError(f"{path} also holds {foreign[0]}, which is no part of a store: choose another folder")


def store_files(path: Path) -> list[Path]:
    """Files of a store but its lock, the index first: without it shards are nothing."""
    found = [file for file in path.iterdir() if STORE_FILE.fullmatch(file.name) and file.name != files.LOCK]
    return sorted(found, key=lambda file: file.name != INDEX)


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write a store's meta.json."""
    text = json.dumps(metadata, indent=2) + "\n"
    with reporting_full_disk(path, len(text), "what was collected is kept"):
        files.write_text(path / META, text)


@dataclass(frozen=True)
class StoreShape:
    """What all shards of a store have in common.

    Attributes:
        names: of the tensors, "site.layer".
        width: d.
        dtype: of all of them.
    """

    names: tuple[str, ...]
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> StoreShape:
        """Of the store with this meta.json."""
        modules = metadata["modules"]
        names = [f"{site}.{layer}" for site in metadata["sites"] for layer in sorted(modules[site], key=int)]
        return cls(tuple(names), metadata["hidden_size"], getattr(torch, metadata["dtype"]))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all tensors."""
        return len(self.names) * self.width * self.dtype.itemsize

    def header(self, rows: int, digest: str = UNKNOWN_DIGEST) -> bytes:
        """First bytes of a shard with so many rows, up to its tensors."""
        return header(dict.fromkeys(self.names, (self.dtype, (rows, self.width))), digest)
