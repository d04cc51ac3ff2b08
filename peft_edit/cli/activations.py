from __future__ import annotations

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
    limit: common.Limit = None,
    skip: common.Skip = 0,
    site: Annotated[str, typer.Option(help="mlp or block.")] = "mlp",
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
    """Collect activations of a contrast set into a store.

    Example: peft-edit collect meta-llama/Llama-2-7b-hf truthful_qa store --split train
    """
    from ..activations import collect_activations

    common.check_json(json_file)
    contrast = common.load_data(data, data_files, subset, split, limit, skip)
    base, tokenizer = common.load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    store = collect_activations(
        base,
        tokenizer,
        contrast,
        out,
        site=site,
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
        resume=resume,
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    common.write_json(json_file, {"store": str(out), "bytes": size, "demonstrations": len(store), **store.metadata})
    what = "token pairs" if tokens == "answer" else "demonstrations"
    print(f"{len(store)} {what} of {len(contrast)} questions, {len(store.layers)} layers, {size / 1e6:.1f} MB")
    print(f"Store: {out}")
