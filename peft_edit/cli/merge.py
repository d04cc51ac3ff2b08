from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from . import common


def merge(
    base: Annotated[str, typer.Argument(help="Base model: id on the Hub or local folder.", show_default=False)],
    adapter: Annotated[str, typer.Argument(help="SEA adapter: id on the Hub or local folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the merged checkpoint.", show_default=False)],
    device: Annotated[str, typer.Option(help="Where products are computed: auto, cpu, cuda, cuda:1, ...")] = "auto",
    push: Annotated[str | None, typer.Option(help="Upload it to this repository on the Hub, user/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    json_file: common.Json = None,
) -> None:
    """Merge a SEA adapter into a checkpoint, file by file, without loading the model. Goes on after an interruption.

    Example: peft-edit merge meta-llama/Llama-2-7b-hf sea-truthful llama2-7b-truthful --device cuda
    """
    from .. import merging
    from ..adapters import hub

    common.check_json(json_file)
    if private and push is None:
        raise ValueError("--private needs --push: it is about the repository")
    if push is not None:
        hub.check_token(push)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *details: print(f"Warning: {message}", file=sys.stderr)
        result = merging.merge_checkpoint(
            base,
            adapter,
            out,
            device=device,
            revision=revision,
            allow_fingerprint_mismatch=allow_fingerprint_mismatch,
        )
    common.write_json(json_file, result.to_dict())
    print(
        f"Merged into {len(result.edited)} of {result.tensors} tensors; {result.files} files, {result.bytes / 1e9:.2f} "
        f"GB: {out}"
    )
    if push is not None:
        print(f"Uploaded: {hub.push_checkpoint(out, push, private=private)}")
