"""Activations on disk: memory-mapped safetensors shards, an index of rows, and meta.json that says what they are.

    meta.json           what was collected, from which model, and the manifest of the shards
    index.safetensors   which row belongs to which demonstration; the token ids that were run
    shard-00000.safetensors, ...   one tensor per site and layer, "mlp.0": (rows of this shard, d)

Each unique sequence is run and stored once; the index refers to its rows as often as it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .sites import normalise_layers


FORMAT_VERSION = 1
META, INDEX = "meta.json", "index.safetensors"
ROW_TOKENS = ("last", "mean", "random")
# What reading needs of meta.json.
REQUIRED = (
    *("complete", "site", "tokens", "hidden_size", "dtype", "modules", "shards"),
    *("model", "fingerprint", "active_adapters"),
)
# A file of a store, or a hidden one that was being written when a run was killed.
STORE_FILE = re.compile(r"(\.)?(meta\.json|(index|shard-\d+)\.safetensors)(?(1)\.tmp)")


class ActivationStore:
    """Reads the activations that `collect_activations` or `ActivationStore.from_tensors` wrote.

    Args:
        path: folder of the store.

    Attributes:
        path: the folder.
        metadata: contents of meta.json.
        site: "mlp" or "block".
        layers: indices of the decoder blocks, in increasing order.
        tokens: which tokens of an answer were kept: "last", "mean", "random" (one row an answer) or "answer" (all).
        hidden_size: d, width of a row.

    `len(store)` is the number of demonstrations, or of token pairs for `tokens="answer"`. Reading is memory-mapped
    and no call loads more than one layer.

    Raises:
        ValueError: the folder is no store, is of another format version, or its collection did not finish.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        if not self.metadata["complete"]:
            raise ValueError(
                f"{self.path} was not collected completely: collect again with the same arguments to finish"
            )
        self.site: str = self.metadata["site"]
        self.tokens: str = self.metadata["tokens"]
        self.hidden_size: int = self.metadata["hidden_size"]
        self.layers: list[int] = sorted(int(layer) for layer in self.metadata["modules"])
        self._index = read_index(self.path)
        self._first_rows = torch.tensor([shard["first_row"] for shard in self.metadata["shards"]], dtype=torch.int64)
        self._dtype = getattr(torch, self.metadata["dtype"])
        # Shard and layer to its tensor: each is memory-mapped once and takes no memory of its own.
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._check()

    def _check(self) -> None:
        """Raise ValueError unless the index and the manifest agree, so that no row is read from nowhere."""
        needed = {"pairs", "question"} if self.tokens == "answer" else {"positive", "negative", "question"}
        if missing := sorted(needed - set(self._index)):
            raise ValueError(f"{self.path / INDEX} is damaged (no {missing[0]}): collect again with resume=False")
        rows = sum(shard["rows"] for shard in self.metadata["shards"])
        shape = tuple(self._index["pairs"].shape) if "pairs" in self._index else (0, 2)
        if len(shape) != 2 or shape[1] != 2:
            raise ValueError(f"{self.path / INDEX} is damaged (pairs are {shape}): collect again with resume=False")
        if wrong := [name for name, numbers in self._index.items() if numbers.is_floating_point()]:
            raise ValueError(
                f"{self.path / INDEX} is damaged ({wrong[0]} is no integer): collect again with resume=False"
            )
        for name in ("positive", "negative", "neutral", "pairs"):
            numbers = self._index.get(name)
            if numbers is not None and numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < rows:
                raise ValueError(
                    f"{self.path / INDEX} is damaged ({name} names rows from {int(numbers.min())} to "
                    f"{int(numbers.max())}, the store has {rows}): collect again with resume=False"
                )

    def __len__(self) -> int:
        return len(self._index["pairs" if self.tokens == "answer" else "positive"])

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}, site={self.site!r}, tokens={self.tokens!r}, "
            f"{len(self)} {'pairs' if self.tokens == 'answer' else 'demonstrations'}, {len(self.layers)} layers, "
            f"hidden_size={self.hidden_size})"
        )

    def positive(self, layer: int) -> Tensor:
        """Activations of the positive answers at a layer, (n, d)."""
        return self._rows(layer, self.pairs()[:, 1] if self.tokens == "answer" else self._index["positive"])

    def negative(self, layer: int) -> Tensor:
        """Activations of the negative answers at a layer, (n, d); row i belongs to row i of `positive`."""
        return self._rows(layer, self.pairs()[:, 0] if self.tokens == "answer" else self._index["negative"])

    def neutral(self, layer: int) -> Tensor:
        """Neutral activations at a layer, (n, d); row i belongs to row i of `positive`."""
        if "neutral" not in self._index:
            raise ValueError(
                f"{self.path} has no neutral activations (tokens={self.tokens!r}): "
                "collect again with tokens='last' and neutral='auto'"
            )
        return self._rows(layer, self._index["neutral"])

    def answer_tokens(self, layer: int) -> Tensor:
        """Activations of every answer token at a layer, (t, d), each unique answer once. Needs `tokens="answer"`."""
        self._require_answer_tokens()
        tensors = [self._map(number, layer) for number in range(len(self.metadata["shards"]))]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def pairs(self) -> Tensor:
        """Rows of `answer_tokens` that belong together, (p, 2) int64: negative token, positive token at the same
        place of its answer. Places before the first differing token are left out. Needs `tokens="answer"`."""
        self._require_answer_tokens()
        return self._index["pairs"]

    def questions(self) -> Tensor:
        """Id of the contrast set's row that each demonstration or pair comes from, (n,) int64."""
        return self._index["question"]

    def _require_answer_tokens(self) -> None:
        if self.tokens != "answer":
            raise ValueError(
                f"{self.path} holds one row an answer (tokens={self.tokens!r}): collect with tokens='answer'"
            )

    def gather(self, rows: Tensor, layers: Iterable[int]) -> Tensor:
        """Activations of single rows, as `pairs` numbers them, at several layers: (number of layers, r, d).

        Of the files only the pages with these rows are read; `rows` is (r,) int64, in any order.
        """
        layers, rows = list(layers), torch.as_tensor(rows).contiguous()
        shard_of = torch.searchsorted(self._first_rows, rows, right=True) - 1
        gathered = torch.empty(len(layers), len(rows), self.hidden_size, dtype=self._dtype)
        for number in shard_of.unique().tolist():
            here = (shard_of == number).nonzero().squeeze(dim=1)
            local = rows[here] - self._first_rows[number]
            for out, layer in zip(gathered, layers, strict=True):
                tensor = self._tensor(number, layer)
                if len(here) == len(rows):
                    torch.index_select(tensor, 0, local, out=out)
                else:
                    out[here] = tensor[local]
        return gathered

    def _rows(self, layer: int, rows: Tensor) -> Tensor:
        return self.gather(rows, [layer])[0]

    def _tensor(self, number: int, layer: int) -> Tensor:
        """Rows of a shard at a layer, mapped once. Not for callers of this class, who may write to what they get."""
        if (number, layer) not in self._tensors:
            self._tensors[number, layer] = self._map(number, layer)
        return self._tensors[number, layer]

    def _map(self, number: int, layer: int) -> Tensor:
        """Rows of a shard at a layer, (rows, d), memory-mapped."""
        if layer not in self.layers:
            raise ValueError(f"{self.path} has layers {self.layers}, got {layer}")
        shard = self.metadata["shards"][number]
        file = self.path / shard["file"]
        try:
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(f"{self.site}.{layer}")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}): collect again with resume=False") from error
        if tensor.shape != (shard["rows"], self.hidden_size) or tensor.dtype != self._dtype:
            raise ValueError(
                f"{file} is damaged: layer {layer} is {tuple(tensor.shape)} {tensor.dtype} there, by the manifest "
                f"{(shard['rows'], self.hidden_size)} {self._dtype}; collect again with resume=False"
            )
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files for themselves.
        return {**self.__dict__, "_tensors": {}}

    @classmethod
    def from_tensors(
        cls,
        path: str | os.PathLike,
        *,
        positive: Mapping[int, Tensor],
        negative: Mapping[int, Tensor],
        neutral: Mapping[int, Tensor],
        site: str = "mlp",
        tokens: str = "last",
        modules: Mapping[int, str] | None = None,
    ) -> ActivationStore:
        """Store row-aligned activations that you already have.

        Args:
            path: folder to write; must not exist or be empty.
            positive, negative, neutral: layer to activations, (n, d), all of one floating dtype; row i of the three is
                one demonstration.
            site: "mlp" or "block".
            tokens: "last", "mean" or "random".
            modules: layer to the name of the module they come from; None where that is the default of the site.

        Raises:
            ValueError: layers, shapes or dtypes differ, an unknown name, or a folder that is not empty.
        """
        if site not in ("mlp", "block"):
            raise ValueError(f"site must be one of 'mlp', 'block', got {site!r}")
        if tokens not in ROW_TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(map(repr, ROW_TOKENS))}, got {tokens!r}")
        layers = normalise_layers(list(positive))
        if not set(layers) == set(negative) == set(neutral):
            raise ValueError(
                "positive, negative and neutral must have the same layers, got "
                f"{layers}, {list(negative)} and {list(neutral)}"
            )
        shape, dtype = positive[layers[0]].shape, positive[layers[0]].dtype
        for name, tensors in (("positive", positive), ("negative", negative), ("neutral", neutral)):
            for layer, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"every value must be a tensor, got {name}[{layer}] of {type(tensor).__name__}")
                if tensor.dim() != 2 or tensor.shape != shape:
                    raise ValueError(
                        f"every tensor must be (demonstrations, hidden size) = {tuple(shape)}, "
                        f"got {name}[{layer}] of shape {tuple(tensor.shape)}"
                    )
                if not tensor.is_floating_point() or tensor.dtype != dtype:
                    raise ValueError(
                        f"every tensor must be of one floating dtype, got {name}[{layer}] of {tensor.dtype} "
                        f"and positive[{layers[0]}] of {dtype}"
                    )
        n, d = shape
        rows = torch.arange(3 * n).view(3, n)
        writer = StoreWriter(
            path,
            {
                "site": site,
                "tokens": tokens,
                "hidden_size": d,
                "modules": {str(layer): (modules or {}).get(layer) for layer in layers},
                "dtype": str(dtype).removeprefix("torch."),
                "model": None,
                "revision": None,
                "fingerprint": None,
                "active_adapters": [],
            },
            {"positive": rows[0], "negative": rows[1], "neutral": rows[2], "question": torch.arange(n)},
        )
        writer.add({f"{site}.{i}": torch.cat((positive[i], negative[i], neutral[i])) for i in layers})
        return writer.finish()


# What functions take for a store: it or its folder.
Store = ActivationStore | str | os.PathLike


def open_pairs(store: Store) -> ActivationStore:
    """The store, opened; raises ValueError unless it holds token pairs."""
    if not isinstance(store, ActivationStore):
        store = ActivationStore(store)
    if store.tokens != "answer":
        raise ValueError(
            f"{store.path} holds one row an answer (tokens={store.tokens!r}): collect with site='block' and "
            "tokens='answer' for HPR"
        )
    if len(store) == 0:
        raise ValueError(f"{store.path} holds no token pair: no two answers differ in a token that both have")
    return store


class StoreWriter:
    """Writes a store shard by shard. Every file appears under its name complete or not at all, and the manifest lists
    only shards that are on disk, so that a killed run is continued by the next one with the same settings.

    Args:
        path: folder to write; created with its parents.
        settings: JSON values that say what is collected. A store with other settings is not continued.
        index: the tensors of index.safetensors.

    Raises:
        ValueError: the path is taken, see `check_free`.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], index: dict[str, Tensor]):
        self.path = Path(path)
        check_free(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.metadata = {"format_version": FORMAT_VERSION, **settings, "complete": False, "shards": []}
        self._write(INDEX, index)
        self._write_metadata()

    @classmethod
    def resume(cls, path: Path) -> StoreWriter:
        """Continue the store at `path`. Shards in the manifest that are damaged, and all after them, are dropped."""
        writer = cls.__new__(cls)
        writer.path, writer.metadata = path, read_metadata(path)
        shards = writer.metadata["shards"]
        good = next((i for i, s in enumerate(shards) if _checksum(path / s["file"]) != s["sha256"]), len(shards))
        del shards[good:]
        return writer

    @property
    def rows(self) -> int:
        """Number of rows on disk."""
        return sum(shard["rows"] for shard in self.metadata["shards"])

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard: "site.layer" to (rows, d)."""
        file = f"shard-{len(self.metadata['shards']):05d}.safetensors"
        entry = {"file": file, "first_row": self.rows, "rows": len(next(iter(tensors.values())))}
        self._write(file, tensors)
        entry["sha256"] = _checksum(self.path / file)
        self.metadata["shards"].append(entry)
        self._write_metadata()

    def finish(self) -> ActivationStore:
        self.metadata["complete"] = True
        self._write_metadata()
        return ActivationStore(self.path)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        temporary = self.path / f".{name}.tmp"
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        _publish(temporary, self.path / name)

    def _write_metadata(self) -> None:
        temporary = self.path / f".{META}.tmp"
        temporary.write_text(json.dumps(self.metadata, indent=2) + "\n", encoding="utf-8")
        _publish(temporary, self.path / META)


def read_metadata(path: Path) -> dict[str, Any]:
    """Contents of a store's meta.json, which this release can read."""
    metadata = _manifest(path)
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}: collect again")
    if missing := [name for name in REQUIRED if name not in metadata]:
        raise ValueError(f"{path / META} is damaged (no {missing[0]}): collect again into another folder")
    shards, dtype = metadata["shards"], metadata["dtype"]
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"{path / META} is damaged (dtype is {dtype!r}): collect again into another folder")
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and {"file", "first_row", "rows"} <= set(shard) for shard in shards
    ):
        raise ValueError(f"{path / META} is damaged (shards are {shards!r:.80}): collect again into another folder")
    modules = metadata["modules"]
    if not isinstance(modules, dict) or not modules or not all(layer.isdigit() for layer in modules):
        raise ValueError(f"{path / META} is damaged (modules are {modules!r}): collect again into another folder")
    return metadata


def read_index(path: Path) -> dict[str, Tensor]:
    """Tensors of a store's index.safetensors."""
    try:
        return load_file(path / INDEX)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path / INDEX} cannot be read ({error}): collect again with resume=False") from error


def check_free(path: Path) -> None:
    """Raise ValueError where `path` is a file, or a folder that holds anything but what a run leaves behind that was
    killed before it wrote its manifest."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder")
    if path.exists() and {file.name for file in path.iterdir()} - {INDEX, f".{INDEX}.tmp", f".{META}.tmp"}:
        raise ValueError(f"{path} is not empty: choose another folder")


def store_files(path: Path) -> list[Path]:
    """Files of the store at `path`, the manifest last.

    Raises:
        ValueError: it is no store, or its folder holds other files.
    """
    _manifest(path)
    files = sorted(path.iterdir(), key=lambda file: file.name == META)
    if foreign := sorted(file.name for file in files if not STORE_FILE.fullmatch(file.name)):
        raise ValueError(f"{path} also holds {foreign[0]}, which is no part of a store: choose another folder")
    return files


def remove_store(path: Path) -> None:
    """Delete the store at `path`. Where `store_files` raises, nothing is deleted."""
    for file in store_files(path):
        file.unlink()


def _manifest(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((path / META).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is no activation store: it has no {META}; pass the folder that collect wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path / META} is damaged ({error}): collect again into another folder") from error
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise ValueError(f"{path / META} is damaged (no format_version): collect again into another folder")
    return metadata


def _publish(temporary: Path, final: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


def _checksum(file: Path) -> str | None:
    if not file.exists():
        return None
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
