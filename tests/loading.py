"""Every way that PEFT and Transformers load a saved adapter.

Each is a function of a folder with `base`, a model, and `adapter`, an adapter of it; options go to the base model.
"""

import functools
import tempfile
from pathlib import Path

import torch
from copying import Original
from edits import EDITS, label_of
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny import vivid_model
from transformers import AutoModelForCausalLM


SAVED = tempfile.TemporaryDirectory(prefix="base-models-")


@functools.cache
def _saved(family, dtype):
    folder = Path(SAVED.name, f"{family}-{dtype}")
    vivid_model(family, dtype).save_pretrained(folder)
    return folder


def link_base(path, family="llama", dtype=torch.float32):
    """Make the `base` of a folder a link to a vivid model, which is saved, and loaded, once."""
    (path / "base").symlink_to(_saved(family, dtype))


@functools.cache
def _loaded(folder, **options):
    return Original(AutoModelForCausalLM.from_pretrained(folder, **options))


def base_of(path, **options):
    return _loaded((path / "base").resolve(), **options).copy()


def saved_tensors(path):
    return load_file(path / "adapter" / "adapter_model.safetensors")


def bare_tensors(path):
    """The saved tensors by the names that they have without a `PeftModel`."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in saved_tensors(path).items()}


def with_peft(**adapter_options):
    def load(path, **options):
        return PeftModel.from_pretrained(base_of(path, **options), path / "adapter", **adapter_options)

    return load


def with_load_adapter(path, **options):
    model = base_of(path, **options)
    model.load_adapter(path / "adapter")
    return model


def with_tensors_in_memory(path, **options):
    model = base_of(path, **options)
    model.load_adapter(peft_config=PeftConfig.from_pretrained(path / "adapter"), adapter_state_dict=bare_tensors(path))
    return model


def as_second_adapter(path, first=None, **options):
    config = first or EDITS[label_of(PeftConfig.from_pretrained(path / "adapter"))]()
    model = get_peft_model(base_of(path, **options), config).eval()
    model.load_adapter(path / "adapter", "second")
    model.set_adapter("second")
    return model


def injected(path, by_tensors=False, **options):
    model, tensors = base_of(path, **options), bare_tensors(path)
    config = PeftConfig.from_pretrained(path / "adapter")
    inject_adapter_in_model(config, model, state_dict=tensors if by_tensors else None)
    set_peft_model_state_dict(model, tensors)
    return model


injected_by_tensors = functools.partial(injected, by_tensors=True)
PEFT_PATHS = {
    "PeftModel": with_peft(),
    "low_cpu_mem_usage": with_peft(low_cpu_mem_usage=True),
    "no autocast": with_peft(autocast_adapter_dtype=False),
    "trainable": with_peft(is_trainable=True),
    "named": with_peft(adapter_name="edit"),
    "AutoPeftModel": lambda path, **options: AutoPeftModelForCausalLM.from_pretrained(path / "adapter", **options),
    "second adapter": as_second_adapter,
}
NATIVE_PATHS = {
    "load_adapter": with_load_adapter,
    "load_adapter of tensors": with_tensors_in_memory,
    "AutoModel": lambda path, **options: AutoModelForCausalLM.from_pretrained(path / "adapter", **options),
}
INJECTION = {"inject": injected, "inject by tensors": injected_by_tensors}
PATHS = PEFT_PATHS | NATIVE_PATHS | INJECTION
