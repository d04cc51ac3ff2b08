from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import common


def collect(
    model: common.Model,
    data: common.Data,
    out: Annotated[Path, typer.Argument(help="Folder of the store.", show_default=False)],
    data_files: common.DataFiles = None,
    subset: common.Subset = None,
    split: common.Split = None,
    data_revision: common.DataRevision = None,
    limit: common.Limit = None,
    skip: common.Skip = 0,
    site: Annotated[str, typer.Option(help="mlp, block, or mlp,block for both in one pass.")] = "mlp",
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names of other modules, one in a block.")
    ] = None,
    layers: common.Layers = None,
    tokens: Annotated[str, typer.Option(help="last, mean, random (SEA) or answer (HPR).")] = "last",
    neutral: Annotated[str, typer.Option(help="auto, generated, prompt, text or none.")] = "auto",
    answers: Annotated[str, typer.Option(help="first, random or all.")] = "first",
    prompt_format: common.PromptFormat = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.")] = 64,
    batch_size: Annotated[int | None, typer.Option(help="Most sequences in a batch.")] = None,
    max_tokens_per_batch: Annotated[int, typer.Option(help="Most tokens in a batch, padding included.")] = 8192,
    store_dtype: Annotated[str, typer.Option(help="Of the store: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of random answers and tokens.")] = 0,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut prompts on the left where a row is more than the model takes.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with a store begun with the same arguments, or replace it.")
    ] = True,
    adapter: common.Adapter = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    dtype: common.Dtype = "auto",
    device_map: common.DeviceMap = "auto",
    json_file: common.Json = None,
) -> None:
    """Collect activations of a contrast set into a store. Run it again to go on after an interruption.

    Example: peft-edit collect meta-llama/Llama-2-7b-hf truthful_qa store --split train

    On several GPUs: accelerate launch --num_processes 4 -m peft_edit.cli collect ...
    """
    from ..activations.collect import collect_activations
    from ..processes import processes

    common.check_json(json_file)
    contrast = common.load_data(data, data_files, subset, split, limit, skip, data_revision)
    base, tokenizer = common.load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    try:
        store = collect_activations(
            base,
            tokenizer,
            contrast,
            out,
            site=site.split(","),
            target_modules=None if target_modules is None else target_modules.split(","),
            layers=common.parse_layers(layers),
            tokens=tokens,
            neutral=None if neutral == "none" else neutral,
            answers=answers,
            prompt_format=prompt_format,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            dtype=store_dtype,
            seed=seed,
            truncate=truncate,
            resume=resume,
        )
    except KeyboardInterrupt:
        print("peft-edit: interrupted; run the same command again to go on", file=sys.stderr)
        raise
    if not processes().is_main:
        return
    size = sum(file.stat().st_size for file in out.iterdir())
    common.write_json(json_file, {"store": str(out), "bytes": size, _what(store): len(store), **store.metadata})
    what = _what(store).replace("_", " ")
    print(f"{len(store)} {what} of {len(contrast)} questions, {len(store.layers)} layers, {size / 1e6:.1f} MB")
    print(f"Store: {out}")


def inspect(
    store: Annotated[Path, typer.Argument(help="Store that collect wrote.", show_default=False)],
    check: Annotated[bool, typer.Option(help="Read all files and compare their checksums.")] = True,
    json_file: common.Json = None,
) -> None:
    """Show what a store holds and check it: exit status 2 where a file is damaged or the collection did not finish.

    Example: peft-edit inspect store
    """
    from tqdm.auto import tqdm

    from ..activations.store import ActivationStore, read_metadata

    common.check_json(json_file)
    metadata = read_metadata(store)
    if not metadata["complete"]:
        written = len(list(store.glob("shard-*.safetensors")))
        raise ValueError(
            f"{store} was not collected completely ({written} shards are written): collect again with the same "
            "arguments to finish"
        )
    opened = ActivationStore(store)
    shards = metadata["shards"]
    size = sum(file.stat().st_size for file in store.iterdir())
    rows = {
        "model": metadata["model"] or "unknown",
        "revision": metadata["revision"],
        "fingerprint": metadata["fingerprint"],
        "active adapters": ", ".join(metadata["active_adapters"]) or None,
        "data": ", ".join(str(value) for value in list((metadata.get("data") or {}).values())[:2] if value) or None,
        "sites": ", ".join(opened.sites),
        "layers": common.format_layers(opened.layers),
        "hidden size": opened.hidden_size,
        "dtype": metadata["dtype"],
        "tokens": opened.tokens,
        "neutral": metadata.get("neutral"),
        "prompt format": metadata.get("prompt_format"),
        "questions": len(opened.questions().unique()),
        _what(opened).replace("_", " "): len(opened),
        "rows": sum(shard["rows"] for shard in shards),
        "size": f"{size / 1e6:,.1f} MB in {len(shards)} shards",
    }
    for name, value in rows.items():
        if value is not None:
            print(f"{name + ':':17}{value}")
    damaged = None
    if check:
        checks = tqdm(opened.check_files(), total=1 + len(shards), desc="checking", unit="file", leave=None)
        damaged = [file for file, whole in checks if not whole]
    counts = {"questions": rows["questions"], _what(opened): len(opened), "rows": rows["rows"]}
    common.write_json(json_file, {"store": str(store), "bytes": size, "damaged": damaged, **counts, **metadata})
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {1 + len(shards)} files of {store} are damaged or missing, the first is {damaged[0]}: "
            "delete those that are there, and collect again with the same arguments"
        )
    if check:
        print("All files are as they were written.")


def _what(store) -> str:
    """What the length of a store counts."""
    return "token_pairs" if store.tokens == "answer" else "demonstrations"
