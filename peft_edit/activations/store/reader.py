"""Reading a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...arguments import Argument, ArgumentError
from .layout import AGAIN, INDEX, META, StoreShape, is_whole, read_index, read_metadata
from .shards import shard_digest
from .tensors import write_row_store


# What reading needs of the index; the rest says what was run.
DEMONSTRATIONS = ("positive", "negative", "neutral", "answer_pairs", "texts", "question")
# What it cannot do without, by the tokens that were kept.
NEEDED = {"answer": ("answer_pairs", "question"), "all": ("texts", "question")}
# Columns of those that have several.
COLUMNS = {"answer_pairs": 3, "texts": 2}


class ActivationStore:
    """Reads the activations that `collect_activations` or `ActivationStore.from_tensors` wrote.

    Args:
        path: folder of the store.
        site: "mlp", "block" or "attention"; None for the only or the first one of the store.

    Attributes:
        path: the folder.
        metadata: contents of meta.json.
        sites: the sites that were collected; `site` is the one that is read, see `at`.
        modules: layer to the name of the module that was collected, None where that is the default of the site.
        layers: indices of the decoder blocks, in increasing order.
        tokens: which tokens were kept: of an answer "last", "mean", "random" (one row an answer) or "answer" (all), or
            "all" of plain texts.
        hidden_size: d, width of a row.

    `len(store)` is the number of demonstrations, or of token pairs for `tokens="answer"`, or of tokens for "all".
    Reading is memory-mapped and no call loads more than one layer.

    Raises:
        ValueError: the folder is no store, is of another format version, its collection did not finish, or it does not
            have the site.
    """

    def __init__(self, path: str | os.PathLike, site: str | None = None):
        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        if not self.metadata["complete"]:
            raise ValueError(
                f"{self.path} was not collected completely: collect again with the same arguments to finish"
            )
        self.sites: list[str] = self.metadata["sites"]
        self.site: str = self.sites[0] if site is None else site
        if self.site not in self.sites:
            held = " and ".join(map(repr, self.sites))
            raise ValueError(f"{self.path} holds {held}, asked for is {site!r}: collect that site")
        self.modules: dict[int, str | None] = {int(i): n for i, n in self.metadata["modules"][self.site].items()}
        self.layers: list[int] = sorted(self.modules)
        self.tokens: str = self.metadata["tokens"]
        self.hidden_size: int = self.metadata["hidden_size"]
        self._index = read_index(self.path, DEMONSTRATIONS)
        self._first_rows = torch.tensor([shard["first_row"] for shard in self.metadata["shards"]], dtype=torch.int64)
        self._dtype = StoreShape.of(self.metadata).dtype
        # Shards that are memory-mapped, once each, and by shard and layer their tensors, which take no memory.
        self._files: dict[int, Any] = {}
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._check()

    def _check(self) -> None:
        """Raise ValueError unless the index and the manifest agree, so that no row is read from nowhere."""
        needed = NEEDED.get(self.tokens, ("positive", "negative", "question"))
        if missing := [name for name in needed if name not in self._index]:
            raise self._bad_index(f"no {missing[0]}")
        if wrong := [name for name, numbers in self._index.items() if numbers.dtype != torch.int64]:
            raise self._bad_index(f"{wrong[0]} is no integer")
        shapes = {name: tuple(tensor.shape) for name, tensor in self._index.items()}
        n = len(self._index["question"])
        expected = {name: (n, COLUMNS[name]) if name in COLUMNS else (n,) for name in shapes}
        if shapes != expected:
            raise self._bad_index(f"shapes are {shapes}")
        rows = sum(shard["rows"] for shard in self.metadata["shards"])
        for name, numbers in self._index.items():
            if name == "question" or not n:
                continue
            first, counts = numbers.split((COLUMNS[name] - 1, 1), dim=1) if name in COLUMNS else (numbers, 1)
            # Not the sum, which 64 bits may not hold.
            if int(numbers.min()) < 0 or int(first.max()) > rows or bool((counts > rows - first).any()):
                raise self._bad_index(f"{name} names rows that are not among the {rows} of the store")

    def _bad_index(self, what: str) -> ArgumentError:
        return ArgumentError(f"{self.path / INDEX} is damaged ({what}): ", *AGAIN)

    def __len__(self) -> int:
        name = NEEDED.get(self.tokens, ("positive",))[0]
        return int(self._index[name][:, -1].sum()) if name in COLUMNS else len(self._index[name])

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}, site={self.site!r}, tokens={self.tokens!r}, "
            f"{len(self)} {self.counted}, {len(self.layers)} layers, "
            f"hidden_size={self.hidden_size})"
        )

    @property
    def counted(self) -> str:
        """What the length of the store counts."""
        return {"answer": "token pairs", "all": "text tokens"}.get(self.tokens, "demonstrations")

    def at(self, site: str) -> ActivationStore:
        """This store, reading another of its sites."""
        return self if site == self.site else ActivationStore(self.path, site)

    def positive(self, layer: int) -> Tensor:
        """Activations of the positive answers at a layer, (n, d)."""
        return self._rows(layer, self.rows("positive"))

    def negative(self, layer: int) -> Tensor:
        """Activations of the negative answers at a layer, (n, d); row i belongs to row i of `positive`."""
        return self._rows(layer, self.rows("negative"))

    def rows(self, sign: str) -> Tensor:
        """Rows of the "positive" or "negative" activations, (n,) int64, for `gather`. That of an answer in several
        demonstrations stands as often."""
        if self.tokens == "all":
            raise ArgumentError(
                f"{self.path} holds plain texts, which demonstrate nothing (",
                *(Argument("tokens", "all"), "): collect a contrast set, or pass it as "),
                *(Argument("retain"), ""),
            )
        return self.pairs()[:, int(sign == "positive")] if self.tokens == "answer" else self._index[sign]

    def text_tokens(self) -> Tensor:
        """Rows of all tokens of all texts, in the order of the texts, (t,) int64, for `gather`. A text that stands
        twice counts twice. Needs `tokens="all"`."""
        if self.tokens != "all":
            raise ArgumentError(
                f"{self.path} holds answers (",
                Argument("tokens", self.tokens),
                "): collect plain texts with ",
                Argument("tokens", "all"),
            )
        first, counts = self._index["texts"].T
        starts = counts.cumsum(dim=0) - counts
        return (first - starts).repeat_interleave(counts) + torch.arange(int(counts.sum()))

    @property
    def has_neutral(self) -> bool:
        """Whether it holds neutral activations."""
        return "neutral" in self._index

    def neutral(self, layer: int) -> Tensor:
        """Neutral activations at a layer, (n, d); row i belongs to row i of `positive`."""
        if not self.has_neutral:
            raise ArgumentError(
                *(
                    f"{self.path} has no neutral activations (",
                    Argument("tokens", self.tokens),
                    "): collect again with ",
                ),
                *(Argument("tokens", "last"), " and ", Argument("neutral", "auto")),
            )
        return self._rows(layer, self._index["neutral"])

    def answer_tokens(self, layer: int) -> Tensor:
        """Activations of every answer token at a layer, (t, d), each unique answer once. Needs `tokens="answer"`."""
        self._require_answer_tokens()
        tensors = [self._tensor(number, layer) for number in range(len(self.metadata["shards"]))]
        return torch.cat(tensors)

    def answer_chunks(self, layer: int, size: int) -> Iterator[Tensor]:
        """The rows of `answer_tokens` in their order, at most `size` at a time, of which no more are in memory."""
        self._require_answer_tokens()
        for number in range(len(self.metadata["shards"])):
            for part in self._tensor(number, layer).split(size):
                yield part.clone()

    def pairs(self) -> Tensor:
        """Rows of `answer_tokens` that belong together, (p, 2) int64: negative token, positive token at the same
        place of its answer. Places before the first differing token are left out. Needs `tokens="answer"`."""
        self._require_answer_tokens()
        return self._pairs

    @cached_property
    def _pairs(self) -> Tensor:
        first_rows, places = self._index["answer_pairs"].split((2, 1), dim=1)  # of the two answers, and how many
        starts = (places.cumsum(dim=0) - places).squeeze(dim=1)
        repeats = places.squeeze(dim=1)
        place = torch.arange(int(repeats.sum())) - starts.repeat_interleave(repeats)
        return first_rows.repeat_interleave(repeats, dim=0) + place.unsqueeze(dim=1)

    def questions(self) -> Tensor:
        """Id of the contrast set's row that each demonstration or pair comes from, (n,) int64."""
        name = NEEDED.get(self.tokens, ("positive",))[0]
        question = self._index["question"]
        return question.repeat_interleave(self._index[name][:, -1]) if name in COLUMNS else question

    def _require_answer_tokens(self) -> None:
        if self.tokens != "answer":
            raise ArgumentError(
                *(f"{self.path} holds {self.held} (", Argument("tokens", self.tokens), "): collect with "),
                Argument("tokens", "answer"),
            )

    @property
    def held(self) -> str:
        """What the rows of the store are, for messages."""
        return {"answer": "every answer token", "all": "plain texts"}.get(self.tokens, "one row an answer")

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
        if layer not in self.modules:
            raise ValueError(f"{self.path} has layers {self.layers}, got {layer}")
        shard = self.metadata["shards"][number]
        file = self.path / shard["file"]
        try:
            if number not in self._files:
                self._files[number] = self._open(file)
            tensor = self._files[number].get_tensor(f"{self.site}.{layer}")
        except (OSError, SafetensorError) as error:
            raise ArgumentError(f"{file} cannot be read ({error}): ", *AGAIN) from error
        if tensor.shape != (shard["rows"], self.hidden_size) or tensor.dtype != self._dtype:
            raise ArgumentError(
                f"{file} is damaged: layer {layer} is {tuple(tensor.shape)} {tensor.dtype} there, by the manifest "
                f"{(shard['rows'], self.hidden_size)} {self._dtype}; ",
                *AGAIN,
            )
        return tensor

    def _open(self, file: Path) -> Any:
        """A shard, memory-mapped; raises ArgumentError for one with tensors of other sites and layers."""
        opened, expected = safe_open(file, framework="pt"), set(StoreShape.of(self.metadata).names)
        if differing := sorted(expected ^ set(opened.keys())):
            raise ArgumentError(f"{file} is damaged: it and {META} disagree about {differing[0]}; ", *AGAIN)
        return opened

    def check_files(self) -> Iterator[tuple[str, bool]]:
        """Compare the index and each shard with its checksum: yields its file name, and whether it is whole. Reads all
        of them."""
        shape = StoreShape.of(self.metadata)
        yield INDEX, is_whole(self.path / INDEX)
        for shard in self.metadata["shards"]:
            yield shard["file"], shard_digest(self.path / shard["file"], shape, shard["rows"]) == shard["sha256"]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files for themselves.
        return {**self.__dict__, "_files": {}, "_tensors": {}}

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
            site: "mlp", "block" or "attention".
            tokens: "last", "mean" or "random".
            modules: layer to the name of the module they come from; None where that is the default of the site.

        Raises:
            ValueError: layers, shapes or dtypes differ, an unknown name, or a folder that is not empty.
        """
        path, sets = Path(path), {"positive": positive, "negative": negative, "neutral": neutral}
        write_row_store(path, sets, site=site, tokens=tokens, modules=modules)
        return cls(path)


# What functions take for a store: it or its folder.
Store = ActivationStore | str | os.PathLike


def open_store(store: Store) -> ActivationStore:
    """The store, opened where it is the folder of one."""
    if not isinstance(store, ActivationStore | str | os.PathLike):
        raise ValueError(
            f"a store must be an ActivationStore or its folder, got {type(store).__name__}: pass one of these"
        )
    return store if isinstance(store, ActivationStore) else ActivationStore(store)


def open_pairs(store: Store) -> ActivationStore:
    """The store, opened; raises ValueError unless it holds token pairs."""
    store = open_store(store)
    if store.tokens != "answer":
        raise ArgumentError(
            *(f"{store.path} holds {store.held} (", Argument("tokens", store.tokens), "): collect with "),
            Argument("tokens", "answer"),
        )
    if len(store) == 0:
        raise ValueError(f"{store.path} holds no token pair: no two answers differ in a token that both have")
    return store
