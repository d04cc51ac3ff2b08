from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from . import common


def evaluate(
    model: common.Model,
    data: common.Data,
    adapter: common.Adapter = None,
    strength: Annotated[float, typer.Option(help="Factor on the adapter's strength.", min=0)] = 1.0,
    data_files: common.DataFiles = None,
    subset: common.Subset = None,
    split: common.Split = None,
    data_revision: common.DataRevision = None,
    limit: common.Limit = None,
    skip: common.Skip = 0,
    prompt_format: common.PromptFormat = "auto",
    batch_size: Annotated[int, typer.Option(help="Most answers in a forward pass.")] = 16,
    perplexity_file: Annotated[
        Path | None, typer.Option("--perplexity", help="Text file, one text a line, for the perplexity.")
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    dtype: common.Dtype = "auto",
    device_map: common.DeviceMap = "auto",
    json_file: common.Json = None,
) -> None:
    """Multiple-choice accuracy, MC1 and MC2, of a model with or without an adapter.

    Example: peft-edit evaluate meta-llama/Llama-2-7b-hf truthful_qa --split test --adapter sea-truthful
    """
    from .. import evaluation
    from ..tuners.layer import edit_strength

    common.check_json(json_file)
    if strength != 1 and adapter is None:
        raise ValueError("--strength needs --adapter: without an adapter there is nothing to scale")
    try:
        texts = None if perplexity_file is None else perplexity_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{perplexity_file} is no UTF-8 text ({error})") from error
    contrast = common.load_data(data, data_files, subset, split, limit, skip, data_revision)
    base, tokenizer = common.load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    with edit_strength(base, strength) if strength != 1 else nullcontext():
        result = evaluation.evaluate_multiple_choice(
            base, tokenizer, contrast, prompt_format=prompt_format, batch_size=batch_size
        )
        of_data = {"name": data, "subset": subset, "split": split}
        results = {"model": model, "adapter": adapter, "strength": strength, "data": of_data, **result.to_dict()}
        if texts is not None:
            results["perplexity"] = evaluation.perplexity(base, tokenizer, texts, batch_size=batch_size)
    common.write_json(json_file, results)
    print(f"Questions: {len(result.questions)}")
    print(f"MC1: {100 * result.mc1:.2f} %")
    print(f"MC2: {100 * result.mc2:.2f} %")
    if texts is not None:
        print(f"Perplexity: {results['perplexity']:.4f}")
