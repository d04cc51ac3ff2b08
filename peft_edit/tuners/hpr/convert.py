from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...adapters.conversion import Conversion, finish, read_json
from ...adapters.save import check_adapter_folder, save_adapter
from ...arguments import Argument, Note
from ...models.load import BaseModel, load_structure
from ...models.sites import text_config
from ...places import normalise_layers
from .config import HPRConfig
from .layer import HPRLayer


GUIDANCE_CONFIG = "guidance_config.json"


def convert_hpr(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    base_model: str | os.PathLike,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> Conversion:
    """Turn guidance modules that the published code of HPR writes into an HPR adapter.

    What differs from the published behaviour is logged and returned.

    Args:
        source_dir: folder with guidance_config.json and guidance.safetensors.
        out_dir: folder of the adapter.
        base_model: id on the Hub, or folder; only its configuration is read, unless it is a GGUF file.
        trust_remote_code: run the base model's own code, where it has some.
        gguf_file: name of the GGUF file that holds the base model, in its folder.

    Raises:
        ValueError: a file is missing or damaged, the modules are of another kind or another model, or a tensor is
            missing, extra, of a wrong shape or not finite.
    """
    source, out = Path(source_dir), Path(out_dir)
    check_adapter_folder(out, "HPR")
    guidance = read_json(source / GUIDANCE_CONFIG)
    if guidance is None:
        raise ValueError(f"{source} has no {GUIDANCE_CONFIG}: pass the folder that the published code of HPR wrote")
    path = source / "guidance.safetensors"
    if not path.exists():
        raise ValueError(f"{source} has no {path.name}: both files of the published code are needed")
    model = load_structure(BaseModel(str(base_model), None, trust_remote_code, gguf_file))
    selected = _check_guidance(guidance, source / GUIDANCE_CONFIG, text_config(model), str(base_model))
    _check_size(guidance, path, text_config(model).hidden_size)
    adapted = get_peft_model(
        model,
        HPRConfig(
            task_type=TaskType.CAUSAL_LM,
            layers_to_transform=guidance["target_layers"],
            num_angle_layers=guidance["num_guidance_module_layers"],
            angle_hidden_size=guidance["guidance_hidden_size"],
            selected_layers=None if selected is None else [int(layer) for layer in selected],
            probe_accuracy=selected if isinstance(selected, dict) else {},
        ),
    )
    layers = _load_guidance(adapted, path, guidance["target_layers"])
    save_adapter(adapted, out)
    return finish(Conversion("HPR", layers, _hpr_notes(guidance, selected, len(layers), str(base_model))))


def _check_guidance(
    guidance: dict[str, Any], path: Path, config, base_model: str
) -> dict[str, float] | list[int] | None:
    """Check the published configuration against the base model, and fill in what it leaves out.

    Returns:
        The selected layers: a dict with their accuracies, a list, or None for all.
    """
    kind = guidance.get("guidance_module_type", "householder")
    if kind != "householder":
        raise ValueError(f"{path} has guidance modules of type {kind!s:.40}, only 'householder' is HPR")
    for name, value in (("hidden_size", config.hidden_size), ("num_hidden_layers", config.num_hidden_layers)):
        found = guidance.get(f"base_model_{name}")
        if found != value:
            raise ValueError(f"{path} is of a model with {name} {found!s:.20}, {base_model} has {value}: pass its own")
    guidance.setdefault("guidance_hidden_size", None)
    guidance.setdefault("num_guidance_module_layers", 4)
    if guidance.get("target_layers") is None:
        guidance["target_layers"] = list(range(config.num_hidden_layers))
    selected = guidance.get("selected_layers")
    try:
        guidance["target_layers"] = normalise_layers(guidance["target_layers"], "target_layers")
        numbers = normalise_layers([int(layer) for layer in selected], "selected_layers") if selected else []
        if isinstance(selected, dict):
            selected = {str(int(layer)): float(accuracy) for layer, accuracy in selected.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has no lists of layers in target_layers and selected_layers: {error}") from error
    if outside := sorted({*numbers, *guidance["target_layers"]} - set(range(config.num_hidden_layers))):
        raise ValueError(f"{path} names layers {outside}, {base_model} has {config.num_hidden_layers}")
    return selected


def _check_size(guidance: dict[str, Any], path: Path, hidden_size: int) -> None:
    """Raise ValueError for networks larger than the file with their weights, before memory is taken for them."""
    size = path.stat().st_size
    for name, least_bytes in (("num_guidance_module_layers", 2), ("guidance_hidden_size", 2 * hidden_size)):
        value = guidance[name]
        if isinstance(value, int) and value * least_bytes > size:
            raise ValueError(
                f"{GUIDANCE_CONFIG} has {name} {value}, for which {path} with its {size} bytes is too small"
            )


def _load_guidance(adapted: PeftModel, path: Path, target_layers: list[int]) -> list[int]:
    """Copy the published tensors into the layers of a new adapter. Returns the layers' indices."""
    parameters: dict[str, Tensor] = {}
    layers: list[int] = []
    for module in adapted.modules():
        if isinstance(module, HPRLayer):
            layers.append(module.index)
            parameters[f"{module.index}.lr_model.weight"] = module.hpr_probe["default"].weight
            for name, parameter in module.hpr_angle["default"].named_parameters():
                parameters[f"{module.index}.angle_model.model.{name}"] = parameter
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            # Of layers that were not selected the file may have tensors, or not.
            extra = {n for n in names if not n.split(".")[0].isdecimal() or int(n.split(".")[0]) not in target_layers}
            extra |= {n for n in names - set(parameters) if n.split(".")[0] in map(str, layers)}
            for what, wrong in (("lacks", set(parameters) - names), ("has more than the guidance modules:", extra)):
                if wrong:
                    raise ValueError(f"{path} {what} {min(wrong)}: it does not belong to its {GUIDANCE_CONFIG}")
            for name, parameter in parameters.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise ValueError(
                        f"{name} in {path} has shape {shape}, by {GUIDANCE_CONFIG} it is {tuple(parameter.shape)}"
                    )
                value = file.get_tensor(name)
                if not value.isfinite().all():
                    raise ValueError(f"{name} in {path} holds NaN or infinite values: the file is damaged")
                parameter.data.copy_(value)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return sorted(layers)


def _hpr_notes(guidance: dict[str, Any], selected, count: int, base_model: str) -> list[str]:
    notes = [
        "the published code rotates by a quotient of sines, off by up to 65 % in float32 and NaN in bfloat16; this "
        "adapter rotates by the same angle in closed form",
        Note(
            "all tokens are edited, as in the published evaluation; its generation mode edits the last token of each "
            "forward pass: ",
            *(Argument("token_scope", "last"), " (select)"),
        ),
    ]
    if selected is None:
        notes.append(f"no layers were selected: all {count} edit; the paper keeps the 5 with the best probes (select)")
    named = guidance.get("base_model_name_or_path")
    if named and named != base_model:
        notes.append(f"the file names the base model {named!s:.100}, not {base_model}, whose size is the same")
    return notes
