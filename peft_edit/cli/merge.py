from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..arguments import Argument, ArgumentError
from . import common
from .options import Fields, Run


def merge(
    base: Annotated[common.ModelOptions, Fields(changes={"model": {"option": "base"}})],
    adapter: common.PositionalAdapter,
    out: Annotated[Path, {"help": "Folder of the merged checkpoint.", "positional": True, "output": True}],
    output: common.Output,
    run: Run,
    device: Annotated[str, {"help": "Where products are computed: auto, cpu, cuda, cuda:1, ..."}] = "auto",
    push: Annotated[str | None, {"help": "Upload it to this repository on the Hub, user/name."}] = None,
    private: Annotated[bool, {"help": "Make a new repository private."}] = False,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Merge an adapter into a checkpoint, file by file, without loading the model. Goes on after an interruption.

    Example: peft-edit merge meta-llama/Llama-2-7b-hf sea-truthful llama2-7b-truthful --device cuda
    """
    from .. import merging
    from ..adapters import hub

    if base.gguf_file is not None:
        raise ValueError(merging.gguf_refusal(base.model, base.gguf_file))
    if private and push is None:
        raise ArgumentError(Argument("private"), " needs ", Argument("push"), ": it is about the repository")
    if push is not None:
        hub.check_token(push)
    with common.told_warnings(run):
        result = merging.merge_checkpoint(
            base.model,
            adapter,
            out,
            device=device,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            allow_fingerprint_mismatch=allow_fingerprint_mismatch,
        )
    output.write(run.record(result.to_dict()))
    print(
        f"Merged into {len(result.edited)} of {result.tensors} tensors; {result.files} files, {result.bytes / 1e9:.2f} "
        f"GB: {out}"
    )
    if push is not None:
        print(f"Uploaded: {hub.push_checkpoint(out, push, private=private)}")


COMMANDS = [merge]
