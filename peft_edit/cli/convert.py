from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Annotated, Literal

from ..arguments import Argument, ArgumentError
from ..places import LayerIndices
from . import common
from .options import Fields, Run


MODEL = Fields("model", "gguf_file", "trust_remote_code", changes={"model": {"arguments": ("base_model",)}})


def convert(
    model: Annotated[common.ModelOptions, MODEL],
    source: Annotated[Path, {"help": "Folder that the published code wrote.", "positional": True}],
    out: common.Out,
    output: common.Output,
    run: Run,
    layers: Annotated[LayerIndices, common.LAYERS] = None,
    rescale: Annotated[
        Literal["token", "none", "average"] | None,
        {"help": "How the edited activation is scaled, where the files do not tell. Default: token."},
    ] = None,
) -> None:
    """Turn what the published code of a method writes into an adapter. The base model's weights are not loaded.

    The files tell the method. Nothing in them is executed.

    Example: peft-edit convert meta-llama/Llama-2-7b-hf projections/truthful sea-truthful --layers 11-31
    """
    from ..adapters import conversion
    from ..tuners.method import methods, names

    model.base.check_local()
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    known = [method for method in methods().values() if method.published is not None]
    method = next((method for method in known if method.published(source)), None)
    if method is None:
        files = " nor ".join(f"{method.published_files} ({method.short})" for method in known)
        raise ValueError(f"{source} holds neither {files}: pass the folder that the published code wrote")
    given = {name: value for name, value in (("layers", layers), ("rescale", rescale)) if value is not None}
    if foreign := [name for name in given if name not in inspect.signature(method.convert).parameters]:
        takers = names(lambda method: method.convert and foreign[0] in inspect.signature(method.convert).parameters)
        raise ArgumentError(
            Argument(foreign[0]), f" is for {takers}; the files of {method.short} tell it themselves: leave it out"
        )
    own = {"trust_remote_code": model.trust_remote_code, "gguf_file": model.gguf_file}
    logging.getLogger(conversion.__name__).setLevel(logging.ERROR)  # the notes are printed below
    converted = method.convert(source, out, base_model=model.model, **own, **given)
    if (table := converted.table()) is not None:
        print(common.table(*table))
    for remark in converted.remarks():
        print(remark)
    output.write(run.record(converted.to_dict()))
    for note in converted.notes:
        print(f"Note: {run.tell(note)}.")
    print(f"{method.short} adapter, {common.size_of(out)}: {out}")


COMMANDS = [convert]
