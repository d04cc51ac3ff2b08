"""The only reader of an adapter's folder, local or in the Hub's cache: its configuration, and the adapter itself onto a
base model or its structure alone, stricter than PEFT."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..arguments import Argument, ArgumentError
from ..models.dtypes import dtype_name, is_quantised
from ..models.fingerprint import fingerprint
from ..models.load import check_local
from .hub_errors import plain_errors


def read_config(folder: Path, name: str | None = None) -> PeftConfig:
    """The configuration of the adapter in a folder.

    Args:
        folder: with `adapter_config.json`.
        name: what to call the adapter in messages; None for its file.

    Raises:
        ValueError: it is none that PEFT or this package reads.
    """
    what = f"{CONFIG_NAME} of {name}" if name else str(folder / CONFIG_NAME)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what} is none that PEFT or peft_edit reads: {error}") from error
    if config.peft_type is None:
        raise ValueError(f"{what} has no peft_type: save the adapter again")
    return config


def load_adapter_config(adapter: str) -> PeftConfig:
    """Configuration of an adapter, see `local_adapter`; raises ValueError for what is none."""
    return read_config(Path(local_adapter(adapter)), adapter)


def load_adapter(model: PreTrainedModel, adapter: str, allow_fingerprint_mismatch: bool = False) -> PeftModel:
    """The base model with an adapter; stricter than PEFT: an adapter of another model and extra tensors are refused."""
    folder = local_adapter(adapter)
    config = read_config(Path(folder), adapter)
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
    if bad := [name for name, tensor in weights.items() if is_quantised(tensor.dtype)]:
        raise ValueError(
            f"{bad[0]} of {adapter} is of {dtype_name(weights[bad[0]].dtype)}, in which nothing can be computed: save "
            "the adapter in float32, float16 or bfloat16"
        )
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
