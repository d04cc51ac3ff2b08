"""Files of a store, and what stands in its meta.json and its index."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import files
from ...arguments import Argument, ArgumentError
from ...json_files import mismatch, read_json
from ...models.dtypes import FLOATING, dtype_name
from ...places import Site
from .disk import reporting_full_disk
from .format import UNKNOWN_DIGEST, header


FORMAT_VERSION = 2
META, INDEX = "meta.json", "index.safetensors"
DTYPES = tuple(map(dtype_name, FLOATING.values()))
# Index of a decoder block as JSON's keys and names of tensors have it.
LAYER = re.compile(r"0|[1-9][0-9]*")
DIGEST = re.compile(r"[0-9a-f]{64}")
# A file of a store, or a hidden one that was being written when a run was killed. Generated answers are there only
# until the index is.
STORE_FILE = re.compile(
    r"(\.)?(meta\.json|(index|shard-\d+)\.safetensors|generated-\d+\.json)(?(1)(\.[0-9a-f]{8})?\.tmp)|\.lock"
)
AGAIN = ("collect again with ", Argument("resume", False))
OTHER_FOLDER = "collect again into another folder"


class ShardEntry(TypedDict):
    """A shard in the manifest, see `shards.Shard`: its rows are those of the store from `first_row` on."""

    file: str
    first_row: int
    rows: int
    sha256: str


class Data(TypedDict, total=False):
    """The contrast set of a store."""

    name: str | None
    subset: str | None
    split: str | None
    files: list[str] | None
    rows: int
    of_rows: int | None


class Description(TypedDict, total=False):
    """What meta.json may say besides, of a store that was collected. What is not here is compared, and never used."""

    revision: str | None
    data: Data | None
    neutral: str | None
    prompt_format: str | None
    template_time: str | None


class Manifest(Description):
    """What reading needs of meta.json."""

    complete: bool
    sites: list[Site]
    tokens: Literal["last", "mean", "random", "answer", "all"]
    hidden_size: int
    dtype: str
    modules: dict[str, dict[str, str | None]]
    shards: list[ShardEntry]
    model: str | None
    fingerprint: str | None
    active_adapters: list[str]


class Versioned(TypedDict):
    """What meta.json of every format version has."""

    format_version: Any


def shard_name(number: int) -> str:
    """Name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def read_manifest(path: Path) -> dict[str, Any]:
    """Contents of a store's meta.json, of whatever format version.

    Raises:
        ValueError: the folder is no store, or its meta.json is damaged or of another program.
    """
    if not (path / META).exists():
        raise ValueError(f"{path} is no activation store: it has no {META}; pass the folder that collect wrote")
    return read_json(path / META, Versioned, "damaged", OTHER_FOLDER)


def read_metadata(path: Path) -> dict[str, Any]:
    """Contents of a store's meta.json, which this release can read.

    Raises:
        ValueError: the folder is no store, of another format version, or its meta.json is damaged.
    """
    metadata = read_manifest(path)
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}: collect again")
    if problem := mismatch(metadata, Manifest) or _contradiction(metadata):
        raise ValueError(f"{path / META} is damaged ({problem}): {OTHER_FOLDER}")
    return metadata


def _contradiction(metadata: dict[str, Any]) -> str | None:
    """What cannot be in a manifest whose fields have the right types, or None."""
    sites, modules = metadata["sites"], metadata["modules"]
    if not sites or len(set(sites)) < len(sites) or set(modules) != set(sites):
        return f"sites are {sites!r}, modules are {modules!r:.80}"
    layers = set(modules[sites[0]])
    if not layers or any(set(of_site) != layers for of_site in modules.values()):
        return f"modules are {modules!r:.80}"
    if wrong := sorted(layer for layer in layers if not LAYER.fullmatch(layer)):
        return f"a layer is {wrong[0]!r:.80}"
    if metadata["dtype"] not in DTYPES:
        return f"dtype is {metadata['dtype']!r:.80}"
    if metadata["hidden_size"] < 0:
        return f"hidden_size is {metadata['hidden_size']}"
    return _gap(metadata["shards"])


def _gap(shards: list[ShardEntry]) -> str | None:
    """What is wrong with the list of a store's shards, or None: they are all the rows, each once, in files of this
    folder."""
    first_row = 0
    for number, shard in enumerate(shards):
        for name, expected in (("file", shard_name(number)), ("first_row", first_row)):
            if shard[name] != expected:
                return f"shards[{number}].{name} is {shard[name]!r:.80}, {expected!r} follows from the others"
        if shard["rows"] < 0 or not DIGEST.fullmatch(shard["sha256"]):
            return f"shards[{number}] is {shard!r:.160}"
        first_row += shard["rows"]
    return None


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
