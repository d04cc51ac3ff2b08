"""Arguments and steps that several commands share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from .. import files


Model = Annotated[str, typer.Argument(help="Base model: id on the Hub or local folder.", show_default=False)]
Data = Annotated[
    str,
    typer.Argument(help="Contrast set: known name, id on the Hub, or .jsonl/.csv/.parquet file.", show_default=False),
]
DataFiles = Annotated[str | None, typer.Option(help="Local copy of a known data set: a file or a folder.")]
Subset = Annotated[str | None, typer.Option(help="Part of a known data set, or configuration of one on the Hub.")]
DataRevision = Annotated[str | None, typer.Option(help="Revision of the data set on the Hub.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set.")]
Limit = Annotated[int | None, typer.Option(help="Use so many rows only.", min=1)]
Skip = Annotated[int, typer.Option(help="Leave out so many first rows.", min=0)]
Layers = Annotated[str | None, typer.Option(help="Decoder blocks, such as 0-3,7. Default: all.")]
PromptFormat = Annotated[str, typer.Option(help="auto, chat, plain, few_shot_qa or lettered_choices.")]
Adapter = Annotated[
    str | None, typer.Option(help="Adapter to load: local folder, or id on the Hub, user/name or user/name@revision.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of the base model on the Hub.")]
Dtype = Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str, typer.Option(help="Where the model runs: auto (several GPUs too), cpu, cuda:1, ...")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-fingerprint-mismatch", help="Go on although the files say they are of another model.")
]
DTYPES = ("auto", "float32", "bfloat16", "float16")


# What the messages of the Python functions advise, in the words of the command line.
OPTIONS = {
    "allow_fingerprint_mismatch=True": "--allow-fingerprint-mismatch",
    "resume=False": "--no-resume",
    "truncate=True": "--truncate",
    "centered=False": "--no-centered",
    "layers_to_transform": "--layers",
    "target_modules": "--target-modules",
    "data_files=": "--data-files ",
    "prompt_format=": "--prompt-format ",
    "base_model must": "--base-model must",
    "max_new_tokens": "--max-new-tokens",
    "num_angle_layers": "--num-angle-layers",
    "angle_hidden_size": "--angle-hidden-size",
    "use_cpu": "--cpu",
    "device must be": "--device must be",
    "device is '": "--device is '",
    "token_scope must": "--token-scope must",
    "add one with HPRConfig": "pass one that train-hpr made",
    "add one with SEAConfig": "pass one that fit-sea made",
    "site='block'": "--site block",
    "tokens='answer'": "--tokens answer",
    "set token_scope='all' in its configuration": "pass it through select with --token-scope all",
    "top_k=": "--top-k ",
    "threshold=": "--threshold ",
    "top_k": "--top-k",
    "rescale='none'": "--rescale none",
    "pass layers": "pass --layers",
    "token_scope='last'": "select --token-scope last",
}


def in_options(message: str) -> str:
    """A message of a Python function in the words of the command line."""
    for argument, option in OPTIONS.items():
        message = message.replace(argument, option)
    return message


def load_model(name: str, *, revision: str | None = None, dtype: str = "auto", device_map: str = "auto"):
    """The base model and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from ..adapters.read import auto_class
    from ..processes import processes

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device_map.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device-map is {device_map!r} and this machine has no CUDA device: pass auto or cpu")
    auto, _ = auto_class(name, revision)
    # Each of several processes has the whole model on a device of its own.
    own_device = processes().device
    if device_map == "auto" and own_device is not None:
        device_map = str(own_device)
    try:
        model = auto.from_pretrained(
            name,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
        )
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are damaged ({error}): download or save them again") from error
    return model.eval(), AutoTokenizer.from_pretrained(name, revision=revision)


def load_structure(name: str, revision: str | None = None):
    """The base model on the meta device, see `loading.load_structure`."""
    from ..adapters.read import load_structure

    return load_structure(name, revision)


def load_adapter(model, adapter: str, allow_fingerprint_mismatch: bool = False):
    """The base model with an adapter, see `loading.load_adapter`."""
    from ..adapters.read import load_adapter

    return load_adapter(model, adapter, allow_fingerprint_mismatch)


def check_local(name: str, file: str) -> None:
    """Raise ValueError for what can only be a folder and lacks a file."""
    from ..adapters.read import check_local

    check_local(name, file)


def check_json(path: Path | None) -> None:
    """Raise ValueError where results could not be written, before the work is done."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json must be a file, {path} is a folder")
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise ValueError(f"--json {path} lies below a file: choose another path")
    if not os.access(next(parent for parent in path.absolute().parents if parent.exists()), os.W_OK):
        raise ValueError(f"--json {path} cannot be written there: choose another path")


def load_data(
    name: str,
    data_files: str | None,
    subset: str | None,
    split: str | None,
    limit: int | None = None,
    skip: int = 0,
    revision: str | None = None,
):
    """A contrast set, or some of its rows: `limit` of those after the first `skip`."""
    from ..data import load_contrast_set

    data = load_contrast_set(name, data_files=data_files, subset=subset, split=split, revision=revision)
    if skip >= len(data):
        raise ValueError(f"--skip {skip} leaves none of the {len(data)} rows of {name}: lower it")
    stop = len(data) if limit is None else min(skip + limit, len(data))
    return data.select(range(skip, stop)) if (skip, stop) != (0, len(data)) else data


def parse_layers(text: str | None) -> list[int] | None:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise ValueError(f"--layers must be numbers and rising ranges such as 0-3,7, got {text!r}")
        layers.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return sorted(layers)


def format_layers(layers: list[int]) -> str:
    """[0, 1, 2, 3, 7] -> "0-3,7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results, completely or not at all; nothing for None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, results)


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
