"""The only reader of an adapter's folder, local or in the Hub's cache: its configuration, and the adapter itself onto a
base model or its structure alone, stricter than PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ..arguments import Argument, ArgumentError, one_line
from ..json_files import read_json
from ..models.dtypes import dtype_name, is_quantised
from ..models.fingerprint import fingerprint
from ..models.load import check_local
from .hub_errors import plain_errors


# Why what only takes the edit refuses an adapter with embeddings, and the way round.
EMBEDDINGS = (
    "saved because they were resized or with save_embedding_layers: load it on its base model in Python, save it again "
    "with save_embedding_layers=False and unload().save_pretrained(folder), and pass both; without that they would be "
    "lost when it is "
)


class ConfigFile(TypedDict, total=False):
    """What the configurations of PEFT's methods have in common. The fields of our own check themselves."""

    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    auto_mapping: dict[str, Any] | None
    peft_version: str | None
    modules_to_save: list[str] | None


def read_config(folder: Path, name: str | None = None) -> PeftConfig:
    """The configuration of the adapter in a folder.

    Args:
        folder: with `adapter_config.json`.
        name: what to call the adapter in messages; None for its file.

    Raises:
        ValueError: it is none that PEFT or this package reads.
    """
    what = f"{CONFIG_NAME} of {name}" if name else str(folder / CONFIG_NAME)
    read_json(folder / CONFIG_NAME, ConfigFile, "none that PEFT or peft_edit reads", "save the adapter again")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} is none that PEFT or peft_edit reads: {one_line(error)}") from error
    if config.peft_type is None:
        raise ValueError(f"{what} has no peft_type: save the adapter again")
    return config


def load_adapter_config(adapter: str) -> PeftConfig:
    """Configuration of an adapter, see `local_adapter`; raises ValueError for what is none."""
    return read_config(Path(local_adapter(adapter)), adapter)


def load_adapter(
    model: PreTrainedModel,
    adapter: str,
    allow_fingerprint_mismatch: bool = False,
    *,
    edit_only: str | None = None,
    name: str = "default",
) -> PeftModel:
    """The base model with an adapter; stricter than PEFT: an adapter of another model and extra tensors are refused.

    Args:
        model: the base model, or its structure on the meta device.
        adapter: see `local_adapter`.
        allow_fingerprint_mismatch: accept an adapter of a model with other weights.
        edit_only: what is to be done with it that leaves out whatever the adapter carries besides its edit, "merged";
            then an adapter that carries embeddings is refused.
        name: of the adapter in the model.
    """
    folder = local_adapter(adapter)
    config = read_config(Path(folder), adapter)
    weights = read_weights(folder, adapter)
    embeddings = carried_embeddings(model, weights)
    own = getattr(config, "modules_to_save", None) or ()  # PEFT's own matter, and part of the adapter
    besides = sorted(tensor for tensor in embeddings if tensor.split(".")[-2] not in own)
    if besides and edit_only is not None:
        raise ValueError(f"{adapter} also carries embeddings ({', '.join(besides)}), {EMBEDDINGS}{edit_only}")
    _check_rows(adapter, weights, embeddings)
    of_adapter, of_model = getattr(config, "base_model_fingerprint", None), fingerprint(model)
    if not embeddings and not allow_fingerprint_mismatch:
        _check_fingerprint(adapter, of_adapter, of_model)
    adapted = _with_adapter(model, folder, adapter, name)
    if embeddings and not allow_fingerprint_mismatch and of_adapter != of_model:
        # It may be of the model with the embeddings that came with it.
        _check_fingerprint(adapter, of_adapter, fingerprint(adapted))
    tensors = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    saved, expected = set(weights), set(tensors)
    expected |= saved & set(embeddings)
    for what, names in (("extra", saved - expected), ("missing", expected - saved)):
        if names:
            raise ValueError(
                f"{adapter} has {len(names)} {what} tensors, the first is {min(names)}: "
                "the file does not belong to its adapter_config.json; save the adapter again"
            )
    return adapted


def read_weights(folder: str, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter; raises ValueError for a damaged file, and for what are no weights."""
    try:
        weights = load_peft_weights(folder, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"the tensors of {adapter} are damaged ({error}): save the adapter again") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and is_quantised(tensor.dtype):
            raise ValueError(
                f"{name} of {adapter} is of {dtype_name(tensor.dtype)}, in which nothing can be computed: save the "
                "adapter in float32, float16 or bfloat16"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} of {adapter} has values of {tensor.dtype}, which are no weights: save it again")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of {adapter} is not finite: fit or train the adapter again")
    return weights


def _with_adapter(model: PreTrainedModel, folder: str, adapter: str, name: str) -> PeftModel:
    """What PEFT makes of a model and an adapter; raises ValueError, in one line, where the two do not fit."""
    try:
        with warnings.catch_warnings():
            # which the caller checks, or was told to allow
            warnings.filterwarnings("ignore", "this .* adapter was learnt on another model")
            # To the model's device, and not by way of a GPU where it has none of it.
            device = "cpu" if model.device.type == "meta" else str(model.device)
            return PeftModel.from_pretrained(model, folder, adapter_name=name, torch_device=device)
    except RuntimeError as error:  # torch's collected errors of load_state_dict, a headline before them
        first, *more = str(error).splitlines()[1:] or [str(error)]
        count = f" ({len(more)} more like this)" if more else ""
        raise ValueError(f"{adapter} does not fit the model: {first.strip()}{count}") from error
    except ArgumentError:
        raise
    except KeyError as error:
        raise ValueError(f"{adapter} has no tensor {error}: the file does not belong to its {CONFIG_NAME}") from error
    except (ValueError, TypeError, AttributeError) as error:
        reason = one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{adapter} does not fit the model: {reason}") from error


def carried_embeddings(model: PreTrainedModel, names: Iterable[str]) -> dict[str, int]:
    """Which tensors of an adapter are embeddings or the LM head of a model, and how many ids the model has there.

    PEFT saves them with an adapter where they were resized, and with `save_embedding_layers=True`.

    Args:
        model: the base model.
        names: of the adapter's tensors.
    """
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    rows = {
        f"base_model.model.{name}{inside}.{part}": len(parameter)
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
        for inside in ("", ".base_layer")  # the latter where LoRA is around it
        for part, parameter in module.named_parameters()
    }
    return {name: rows[name] for name in names if name in rows}


def _check_rows(adapter: str, weights: Mapping[str, Tensor], embeddings: Mapping[str, int]) -> None:
    """Raise ValueError where the embeddings that an adapter carries are of more or fewer ids than the model's."""
    for name, rows in embeddings.items():
        if len(weights[name]) != rows:
            raise ValueError(
                f"{adapter} carries embeddings of {len(weights[name])} ids ({name}), the model has {rows}: load the "
                f"model in Python, call resize_token_embeddings({len(weights[name])}), save it, and pass that folder"
            )


def _check_fingerprint(adapter: str, of_adapter: str | None, of_model: str | None) -> None:
    """Raise ArgumentError where an adapter was fitted on a model with other weights."""
    if None not in (of_adapter, of_model) and of_adapter != of_model:
        raise ArgumentError(
            f"{adapter} was fitted on another model (fingerprint {of_adapter}, this model has {of_model}): "
            "load its base model, or pass ",
            Argument("allow_fingerprint_mismatch", True),
        )


def local_adapter(adapter: str) -> str:
    """The folder with an adapter's configuration and tensors: the given one, or in the Hub's cache for an id there,
    "user/name" or "user/name@revision"."""
    # A folder may have an @ in its name.
    name, _, revision = (adapter, "", "") if Path(adapter).exists() else adapter.partition("@")
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        check_local(name, file)
    return name if Path(name).is_dir() else str(download_adapter(name, revision or None))


def download_adapter(repo_id: str, revision: str | None = None) -> Path:
    """The folder in the Hub's cache with an adapter's configuration and tensors, both of one commit, downloaded unless
    they are there.

    Args:
        repo_id: "user/name".
        revision: branch, tag or commit; None for main.

    Raises:
        FileNotFoundError: no such repository or revision, or one without an adapter.
        PermissionError, ConnectionError, OSError: as for `push_folder`.
    """
    with plain_errors(f"{repo_id} cannot be loaded", repo_id, revision):
        folder = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision)).parent
        hf_hub_download(repo_id, SAFETENSORS_WEIGHTS_NAME, revision=folder.name)
    return folder
