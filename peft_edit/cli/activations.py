from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ..activations.arguments import CollectArguments
from ..arguments import Argument, ArgumentError
from ..places import format_layers
from . import common
from .options import Fields, Run


# Texts take the place of the contrast set.
DATA = Fields(changes={"data": {"default": None}})


def collect(
    model: common.LoadedModelOptions,
    data: Annotated[common.DataOptions, DATA],
    options: Annotated[CollectArguments, Fields(changes={"layers": {"arguments": ("layers_to_transform",)}})],
    output: common.Output,
    run: Run,
    out: Annotated[Path | None, {"help": "Folder of the store.", "positional": True, "output": True}] = None,
    texts: Annotated[
        Path | None,
        {"help": "Collect every token of the texts of this file, one a line or in a column 'text'; without {data}."},
    ] = None,
    adapter: common.Adapter = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Collect activations of a contrast set, or of texts, into a store. Run it again to go on after an interruption.

    Example: peft-edit collect meta-llama/Llama-2-7b-hf truthful_qa store --split train

    Texts to leave alone: peft-edit collect meta-llama/Llama-2-7b-hf retain --texts passages.txt

    On several GPUs: accelerate launch --num_processes 4 -m peft_edit.cli collect ...
    """
    from ..activations.collect import collect_activations
    from ..processes import processes

    if texts is None and data.data is None:
        raise ArgumentError(Argument("data"), " is missing: pass a contrast set, or ", Argument("texts"))
    if texts is None and options.of_texts and out is not None:
        texts, data = Path(data.data), replace(data, data=None)
    if texts is None:
        if out is None:
            raise ArgumentError(Argument("out"), " is missing: pass the folder of the store after the contrast set")
        contrast = common.load_data(data)
    else:
        contrast, out, options = _of_texts(texts, data, out, options)
    base, tokenizer = common.load_model(model)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    try:
        store = collect_activations(base, tokenizer, contrast, out, **vars(options))
    except KeyboardInterrupt:
        print("peft-edit: interrupted; run the same command again to go on", file=sys.stderr)
        raise
    if not processes().is_main:
        return
    size = sum(file.stat().st_size for file in out.iterdir())
    output.write(run.record({"store": str(out), "bytes": size, _what(store): len(store), **store.metadata}))
    what = _what(store).replace("_", " ")
    of_data = f"{len(contrast)} {_rows_of(store)}"
    print(f"{len(store)} {what} of {of_data}, {len(store.layers)} layers, {size / 1e6:.1f} MB")
    print(f"Store: {out}")


def _of_texts(texts: Path, data: common.DataOptions, out: Path | None, options: CollectArguments):
    """The texts, the folder of their store and the options: there is one positional argument less, so that on the
    command line the folder comes where the contrast set is otherwise."""
    from ..data.texts import load_texts

    for name in ("data_files", "subset", "split", "data_revision"):
        if (value := getattr(data, name)) is not None:
            raise ArgumentError(Argument(name, value), " has no meaning with ", Argument("texts"), ": leave it out")
    if None not in (out, data.data):
        raise ArgumentError(
            Argument("texts"), f" takes the place of the contrast set {data.data!r}: pass the folder of the store alone"
        )
    if options.tokens not in ("last", "all"):
        raise ArgumentError(
            Argument("tokens", options.tokens), " has no meaning with ", Argument("texts"), ": leave it out"
        )
    if (folder := out or data.data) is None:
        raise ArgumentError(Argument("out"), " is missing: pass the folder of the store")
    rows = load_texts(texts)
    return common.some_rows(rows, data, str(texts)), Path(folder), replace(options, tokens="all")


def inspect(
    store: Annotated[Path, {"help": "Store that collect wrote.", "positional": True}],
    output: common.Output,
    run: Run,
    check: Annotated[bool, {"help": "Read all files and compare their checksums."}] = True,
) -> None:
    """Show what a store holds and check it: exit status 2 where a file is damaged or the collection did not finish.

    Example: peft-edit inspect store
    """
    from tqdm.auto import tqdm

    from ..activations.store import ActivationStore, read_metadata

    metadata = read_metadata(store)
    if not metadata["complete"]:
        written = len(list(store.glob("shard-*.safetensors")))
        raise ValueError(
            f"{store} was not collected completely ({written} shards are written): collect again with the same "
            "arguments to finish"
        )
    opened = ActivationStore(store)
    files = 1 + len(metadata["shards"])
    size = sum(file.stat().st_size for file in store.iterdir())
    rows = _describe(opened, metadata, size)
    for name, value in rows.items():
        if value is not None:
            print(f"{name + ':':17}{value}")
    damaged = None
    if check:
        checks = tqdm(opened.check_files(), total=files, desc="checking", unit="file", leave=None)
        damaged = [file for file, whole in checks if not whole]
    counts = {_rows_of(opened): rows[_rows_of(opened)], _what(opened): len(opened), "rows": rows["rows"]}
    output.write(run.record({"store": str(store), "bytes": size, "damaged": damaged, **counts, **metadata}))
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {files} files of {store} are damaged or missing, the first is {damaged[0]}: "
            "delete those that are there, and collect again with the same arguments"
        )
    if check:
        print("All files are as they were written.")


def _describe(opened, metadata: dict, size: int) -> dict:
    """What is shown of a store; None for what is not known of it."""
    shards = metadata["shards"]
    return {
        "model": metadata["model"] or "unknown",
        "revision": metadata.get("revision"),
        "fingerprint": metadata["fingerprint"],
        "active adapters": ", ".join(metadata["active_adapters"]) or None,
        "data": _describe_data(metadata.get("data") or {}),
        "sites": ", ".join(opened.sites),
        "layers": format_layers(opened.layers),
        "hidden size": opened.hidden_size,
        "dtype": metadata["dtype"],
        "tokens": opened.tokens,
        "neutral": metadata.get("neutral"),
        "prompt format": metadata.get("prompt_format"),
        _rows_of(opened): len(opened.questions().unique()),
        _what(opened).replace("_", " "): len(opened),
        "rows": sum(shard["rows"] for shard in shards),
        "size": f"{size / 1e6:,.1f} MB in {len(shards)} shards",
    }


def _rows_of(store) -> str:
    """What the rows of the data are that a store was collected from."""
    return "texts" if store.tokens == "all" else "questions"


def _describe_data(source: dict) -> str | None:
    """What is shown of where the rows come from."""
    parts = [*map(source.get, ("name", "subset", "split")), *(source.get("files") or ())]
    rows, total = source.get("rows"), source.get("of_rows")
    part = f"{rows} of {total} rows" if None not in (rows, total) and rows < total else None
    return ", ".join(str(value) for value in (*parts, part) if value is not None) or None


def _what(store) -> str:
    """What the length of a store counts."""
    return store.counted.replace(" ", "_")


COMMANDS = [collect, inspect]
