"""Load an adapter onto a base model, or onto its structure alone; stricter than PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..arguments import Argument, ArgumentError
from ..models.fingerprint import fingerprint
from .hub import download_adapter


def auto_class(name: str, revision: str | None = None):
    """The class of Transformers that loads a base model, and its configuration: of causal language models, else of
    vision-language models, whose text towers are edited.

    Raises:
        ValueError: the model is of another kind.
    """
    check_local(name, "config.json")
    config = AutoConfig.from_pretrained(name, revision=revision)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto, config
    raise ValueError(f"{name} is a {config.model_type} model, which is none of language: pass a causal language model")


def load_structure(name: str, revision: str | None = None) -> PreTrainedModel:
    """The base model on the meta device: its modules without their weights, for what trains or looks at an adapter."""
    auto, config = auto_class(name, revision)
    with torch.device("meta"):
        return auto.from_config(config)


def load_adapter_config(adapter: str) -> PeftConfig:
    """Configuration of an adapter, see `local_adapter`; raises ValueError for what is none."""
    folder = local_adapter(adapter)
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter_config.json of {adapter} is none that PEFT or peft_edit reads: {error}") from error
    if config.peft_type is None:
        raise ValueError(f"adapter_config.json of {adapter} has no peft_type: save the adapter again")
    return config


def load_adapter(model: PreTrainedModel, adapter: str, allow_fingerprint_mismatch: bool = False) -> PeftModel:
    """The base model with an adapter; stricter than PEFT: an adapter of another model and extra tensors are refused."""
    config, folder = load_adapter_config(adapter), local_adapter(adapter)
    of_adapter = getattr(config, "base_model_fingerprint", None)
    of_model = fingerprint(model)
    if not allow_fingerprint_mismatch and None not in (of_adapter, of_model) and of_adapter != of_model:
        raise ArgumentError(
            f"{adapter} was fitted on another model (fingerprint {of_adapter}, this model has {of_model}): "
            "load its base model, or pass ",
            Argument("allow_fingerprint_mismatch", True),
        )
    try:
        weights = load_peft_weights(folder, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"the tensors of {adapter} are damaged ({error}): save the adapter again") from error
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except RuntimeError as error:  # torch's collected errors of load_state_dict, a headline before them
        first, *more = str(error).splitlines()[1:] or [str(error)]
        count = f" ({len(more)} more like this)" if more else ""
        raise ValueError(f"{adapter} does not fit the model: {first.strip()}{count}") from error
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} of {adapter} is not finite: fit or train the adapter again")
    saved, expected = set(weights), set(get_peft_model_state_dict(adapted))
    for what, names in (("extra", saved - expected), ("missing", expected - saved)):
        if names:
            raise ValueError(
                f"{adapter} has {len(names)} {what} tensors, the first is {min(names)}: "
                "the file does not belong to its adapter_config.json; save the adapter again"
            )
    return adapted


def local_adapter(adapter: str) -> str:
    """The folder with an adapter's configuration and tensors: the given one, or in the Hub's cache for an id there,
    "user/name" or "user/name@revision"."""
    # A folder may have an @ in its name.
    name, _, revision = (adapter, "", "") if Path(adapter).exists() else adapter.partition("@")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        check_local(name, file)
    return name if Path(name).is_dir() else str(download_adapter(name, revision or None))


def check_local(name: str, file: str) -> None:
    """Raise ValueError for what can only be a folder and lacks a file, before the Hub is asked for it."""
    path = Path(name)
    if path.is_dir() and not (path / file).exists():
        raise ValueError(f"the folder {name} has no {file}: pass the folder that was saved")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.endswith("/") or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}")
