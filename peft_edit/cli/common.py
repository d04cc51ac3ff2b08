"""Options and steps that several commands share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .. import files
from ..arguments import Argument, ArgumentError, check_options, renamed
from .options import Fields


if TYPE_CHECKING:
    from ..models.load import BaseModel
    from .options import Run

# A base model that need not be given: the adapter names it.
BASE_OF_ADAPTER = Fields(
    changes={
        "model": {"help": "Base model. Default: the one that the adapter names.", "positional": False, "default": None}
    }
)
ADAPTER = {"help": "Adapter to load: local folder, or id on the Hub, user/name or user/name@revision."}
# Fields of configurations that name the edited decoder blocks and modules.
LAYERS = {
    "option": "--layers",
    "help": "Decoder blocks, such as 0-3,7. Default: all.",
    "arguments": ("layers_to_transform",),
}
# The site of a store to which an adapter is fitted.
SITE = {"default": None, "help": "Of a store with several: mlp or block. Default: its first."}
MODULES = {"help": "Comma-separated names of other modules, as given to collect."}

Folder = Annotated[Path, {"help": "Folder of the adapter.", "positional": True}]
OUT = {"help": "Folder of the adapter.", "positional": True, "output": True}
RETAIN = {"help": "Store of texts to leave alone, that collect --texts wrote.", "arguments": ("retain_dataset",)}
MISMATCH = {"help": "Go on although the files say they are of another model.", "last": True}
Out = Annotated[Path, OUT]
Adapter = Annotated[str | None, ADAPTER]
PositionalAdapter = Annotated[str, {"help": "Adapter: id on the Hub or local folder.", "positional": True}]
Retain = Annotated[Path | None, RETAIN]
AllowMismatch = Annotated[bool, MISMATCH]


@dataclass(kw_only=True)
class ModelOptions:
    """The base model."""

    model: str = field(metadata={"help": "Base model: id on the Hub or local folder.", "positional": True})
    revision: str | None = field(
        default=None, metadata={"help": "Revision of the base model on the Hub.", "last": True}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file with the weights, in the model's folder.", "last": True}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the model's own code, where it has some: read it first.", "secret": True, "last": True},
    )

    @property
    def base(self) -> BaseModel:
        """Where the model comes from."""
        from ..models.load import BaseModel

        return BaseModel(self.model, self.revision, self.trust_remote_code, self.gguf_file)


@dataclass(kw_only=True)
class LoadedModelOptions(ModelOptions):
    """The base model with its weights, and where it runs."""

    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the model.", "option": "--dtype", "last": True}
    )
    device_map: str = field(
        default="auto",
        metadata={"help": "Where the model runs: auto (several GPUs too), cpu, cuda:1, ...", "last": True},
    )


@dataclass(kw_only=True)
class DataOptions:
    """A contrast set; `data` is None where a command takes something else in its place."""

    data: str | None = field(
        metadata={
            "help": "Contrast set: known name, id on the Hub, or .jsonl/.csv/.parquet file.",
            "positional": True,
            "arguments": ("name",),
        }
    )
    data_files: str | None = field(
        default=None, metadata={"help": "Local copy of a known data set: a file or a folder."}
    )
    subset: str | None = field(
        default=None, metadata={"help": "Part of a known data set, or configuration of one on the Hub."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of the data set."})
    data_revision: str | None = field(default=None, metadata={"help": "Revision of the data set on the Hub."})
    limit: int | None = field(
        default=None, metadata={"help": "Use so many rows only.", "minimum": 1, "allowed": "of at least 1"}
    )
    shuffle: int | None = field(
        default=None,
        metadata={"help": "Mix the rows, with this seed, first.", "minimum": 0, "allowed": "of at least 0"},
    )
    skip: int = field(
        default=0, metadata={"help": "Leave out so many first rows.", "minimum": 0, "allowed": "of at least 0"}
    )

    def __post_init__(self):
        check_options(self)


@dataclass(kw_only=True)
class Output:
    """Where results go besides standard output."""

    json: Path | None = field(
        default=None, metadata={"help": "Write the results to this file too.", "last": True, "output": True}
    )

    def __post_init__(self):
        if self.json is not None:
            _check_json(self.json)

    def write(self, results: dict[str, Any]) -> None:
        """Write results, completely or not at all."""
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self.json, results)


def _check_json(path: Path) -> None:
    """Raise ArgumentError where results could not be written, before the work is done."""
    if path.exists() and not path.is_file():
        raise ArgumentError(Argument("json"), f" must be a file, {path} is {'a folder' if path.is_dir() else 'none'}")
    try:
        files.check_writable(path)
    except ValueError as error:
        raise ArgumentError(Argument("json"), f" {error}") from error


@contextmanager
def told_warnings(run: Run) -> Iterator[None]:
    """Print warnings inside the `with` block as a command words them, each on one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *details: print(f"Warning: {run.tell(message)}", file=sys.stderr)
        yield


def told_error(error: Exception, spell: Callable[[Argument], str] = str) -> str:
    """An error in one line that says what to do, arguments spelt by a function."""
    if isinstance(error, ArgumentError):
        return error.message(spell)
    if not (isinstance(error, OSError) and error.strerror and error.filename):
        return str(error)
    remedy = "free some space, then run the same again" if error.errno in files.NO_SPACE else "check the path"
    return f"{error.filename}: {error.strerror}; {remedy}"


def load_model(options: LoadedModelOptions):
    """The base model and its tokenizer."""
    import torch

    from ..models import devices, load
    from ..processes import processes

    base, device_map = options.base, options.device_map
    if device_map.startswith("cuda"):
        devices.known_device("device_map", device_map)
    # Each of several processes has the whole model on a device of its own.
    own_device = processes().device
    if device_map == "auto" and own_device is not None:
        device_map = str(own_device)
    dtype = options.model_dtype
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    return load.load_model(base, dtype=dtype, device_map=device_map), load.load_tokenizer(base)


def base_of(options: LoadedModelOptions, adapter: str) -> LoadedModelOptions:
    """The options with the base model that an adapter names, where they name none."""
    from ..adapters.read import load_adapter_config

    if options.model is not None:
        return options
    config = load_adapter_config(adapter)
    if not config.base_model_name_or_path:
        raise ArgumentError(f"{adapter} names no base model: pass it as ", Argument("model"))
    return replace(options, model=config.base_model_name_or_path, revision=options.revision or config.revision)


def terminal() -> tuple[bool, int]:
    """Whether standard output shows colours, and its columns: 80 where it is no terminal. `NO_COLOR` is heeded."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console.is_terminal and console.color_system is not None and not console.no_color, console.width


def load_structure(options: ModelOptions):
    """The base model on the meta device, see `models.load.load_structure`."""
    from ..models.load import load_structure

    return load_structure(options.base)


def load_adapter(
    model, adapter: str, allow_fingerprint_mismatch: bool = False, edit_only: str | None = None, name: str = "default"
):
    """The base model with an adapter, see `adapters.read.load_adapter`."""
    from ..adapters.read import load_adapter

    return load_adapter(model, adapter, allow_fingerprint_mismatch, edit_only=edit_only, name=name)


def load_data(options: DataOptions):
    """A contrast set, or some of its rows: `limit` of those after the first `skip`."""
    from ..data import load_contrast_set

    with renamed(revision="data_revision"):
        data = load_contrast_set(
            options.data,
            data_files=options.data_files,
            subset=options.subset,
            split=options.split,
            revision=options.data_revision,
        )
    return some_rows(data, options, options.data)


def load_prompts(options: DataOptions):
    """A contrast set, or a file of prompts without answers, or some of its rows, see `load_data`."""
    from ..data.prompt_files import is_prompt_file, load_prompts
    from ..data.reading import refuse

    if not is_prompt_file(options.data):
        return load_data(options)
    fields = ("data_files", "subset", "split", "data_revision")
    refuse(f"the file of prompts {options.data}", **{name: getattr(options, name) for name in fields})
    return some_rows(load_prompts(options.data), options, options.data)


def some_rows(data, options: DataOptions, source: str):
    """`limit` of the rows after the first `skip`, in their order or mixed."""
    if options.skip >= len(data):
        raise ArgumentError(
            Argument("skip", options.skip), f" leaves none of the {len(data)} rows of {source}: lower it"
        )
    if options.shuffle is not None:
        data = data.shuffle(seed=options.shuffle)
    stop = len(data) if options.limit is None else min(options.skip + options.limit, len(data))
    return data.select(range(options.skip, stop)) if (options.skip, stop) != (0, len(data)) else data


def size_of(adapter: Path) -> str:
    """Size of an adapter's tensors, to print."""
    return f"{(adapter / 'adapter_model.safetensors').stat().st_size / 1e6:.2f} MB"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )
