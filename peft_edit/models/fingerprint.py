"""A short hash that tells one base model from another, so that a store or an adapter of another model is noticed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist

from .checkpoint import Source, find_sources, find_weights
from .sites import decoder_blocks, text_config, unwrap, without_wrappers


SAMPLES_PER_TENSOR = 16
# A prime step spreads the samples over a tensor of any shape.
SAMPLE_STEP = 2_654_435_761
# Smallest normal float16: below it a model that was loaded in float16 has lost bits.
SMALLEST = 2.0**-14
# Of the names in the file of an adapter that a `PeftModel` saved.
WRAPPER = "base_model.model."
# What an adapter's configuration says of where it comes from, and not of what it does.
ORIGIN_FIELDS = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")
CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# Maps the name of a parameter to its values in the checkpoint, or None.
Reader = Callable[[str], "Tensor | StackedTensor | None"]


def fingerprint(model: nn.Module) -> str | None:
    """Hash of a Transformers model's architecture, and of fixed elements of its embeddings and decoder blocks.

    Elements are rounded to bfloat16 first, so that the dtype in which the model was loaded does not matter, with one
    exception: a float32 checkpoint loaded in float16 is rounded twice. Adapters that are injected do not matter either;
    merged ones do. Weights on the meta device are looked up in the files that the model's configuration comes from, its
    folder or the Hub's cache; nothing is downloaded.

    Returns:
        16 hexadecimal digits; None for a model on the meta device whose files are not at hand, or have other tensors.
        Takes well under a second for weights in memory: 16 elements of each tensor are read.
    """
    model = unwrap(model)
    config = text_config(model)
    digest = hashlib.sha256(json.dumps([getattr(config, name, None) for name in CONFIG_FIELDS]).encode())
    read = _checkpoint_reader(model)
    embeddings = model.get_input_embeddings()
    names = [next(name for name, module in model.named_modules() if module is embeddings)]
    for module_name in (*names, *decoder_blocks(model).values()):
        module = model.get_submodule(module_name)
        for name, sample in sorted(_samples(module, lambda name, start=f"{module_name}.": read(start + name))):
            if sample is None:
                return None
            digest.update(name.encode())
            digest.update(sample)
    return digest.hexdigest()[:16]


def is_at_hand(model: nn.Module) -> bool:
    """Whether the weights of a Transformers model that its fingerprint is taken of are plain tensors in memory. Those
    that are quantised have other values, and those that are sharded, offloaded or not loaded take time to read."""
    if not isinstance(model, PreTrainedModel):
        return False
    try:
        blocks = decoder_blocks(model).values()
    except ValueError:  # of such a model none is taken
        return False
    modules = (model.get_input_embeddings(), *map(model.get_submodule, blocks))
    weights = [parameter for module in modules for parameter in module.parameters()]
    return all(
        weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta and type(weight.data) is Tensor
        for weight in weights
    )


def active_adapters(model: nn.Module) -> list[str]:
    """Sorted names of the adapters that take part in a forward pass."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})


def adapters_fingerprint(model: nn.Module) -> str | None:
    """Hash of the configurations, the weights and the strength of the active adapters; None where none is active.

    It tells an adapter from another one of its name, and from itself before further training.
    """
    names = active_adapters(model)
    if not names:
        return None
    model = without_wrappers(model)
    factors = {getattr(module, "site", None): getattr(module, "strength_factor", 1.0) for module in model.modules()}
    of_sites = {site: factor for site, factor in factors.items() if site is not None}
    alike = len(set(of_sites.values())) <= 1
    strengths = sorted(set(factors.values())) if alike else sorted(of_sites.items())
    configs = [
        {key: value for key, value in model.peft_config[name].to_dict().items() if key not in ORIGIN_FIELDS}
        for name in names
    ]
    # Configurations hold sets, and values of their own.
    digest = hashlib.sha256(json.dumps([names, strengths, configs], sort_keys=True, default=_in_order).encode())
    for name, tensor in _adapter_tensors(unwrap(model), set(names)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def adapter_record(config: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes that tell an adapter from another one, the same in memory and on disk, whatever it is called.

    Args:
        config: of the adapter. Where it was made, such as the name of its base model, does not count.
        tensors: those of the adapter's file by their names there, or `tensors_of`. Their dtype does not count, nor do
            embeddings that are saved with it.

    Returns:
        `method`, and the hashes `config` and `weights`, 16 hexadecimal digits each.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in ORIGIN_FIELDS}
    of_config = hashlib.sha256(json.dumps(fields, sort_keys=True, default=_in_order).encode())
    prefix, others = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, ""), set(config.modules_to_save or ())
    of_weights = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        name = name.removeprefix(WRAPPER)
        if prefix in name or others & set(name.split(".")):
            wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous()
            of_weights.update(f"{name} {tuple(wide.shape)}".encode())
            of_weights.update(wide.flatten().view(torch.uint8).numpy())
    return {
        "method": str(getattr(config.peft_type, "value", config.peft_type)),
        "config": of_config.hexdigest()[:16],
        "weights": of_weights.hexdigest()[:16],
    }


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter by the names that they have in its file, without what stands for a `PeftModel`."""
    tensors = {}
    for name, tensor in _adapter_tensors(unwrap(model), {adapter_name}):
        parts = [part for part in name.split(".") if part != "modules_to_save"]
        del parts[len(parts) - 1 - parts[::-1].index(adapter_name)]
        # An adapter of another method that was added later may lie around the layer.
        tensors[".".join(part for part in parts if part != "base_layer")] = tensor
    return tensors


def _adapter_tensors(model: nn.Module, adapters: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of all parameters and buffers of some adapters."""
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for module_name, module in layer.named_modules(prefix=layer_name):
            with align_module_device(module):  # loads what is offloaded
                parameters = module.named_parameters(module_name, recurse=False)
                for name, tensor in itertools.chain(parameters, module.named_buffers(module_name, recurse=False)):
                    parts = set(name.removeprefix(layer_name).split("."))
                    if parts & adapters and not parts & {"base_layer", "original_module"}:
                        yield name, tensor


def _in_order(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _samples(module: nn.Module, read: Reader, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
    """Name in the base model and sampled elements of each parameter, those of adapters left out."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _samples(module.original_module, read, prefix)
    elif isinstance(module, BaseTunerLayer):
        if hasattr(module, "base_layer"):  # else it is an edit beside the model's own modules
            yield from _samples(module.base_layer, read, prefix)
    else:
        with align_module_device(module):  # loads what is offloaded
            for name, parameter in module.named_parameters(recurse=False):
                values = read(prefix + name) if parameter.is_meta else parameter
                known = values is not None and values.shape == parameter.shape
                yield prefix + name, _sample(values) if known else None
        for name, child in module.named_children():
            yield from _samples(child, read, f"{prefix}{name}.")


def _sample(parameter: Tensor | StackedTensor) -> bytes:
    """Shape and fixed elements, rounded to bfloat16."""
    indices = (torch.arange(1, SAMPLES_PER_TENSOR + 1) * SAMPLE_STEP) % parameter.shape.numel()
    if isinstance(parameter, StackedTensor):
        values = parameter.take(indices)
    else:
        values = parameter.detach().reshape(-1)[indices.to(parameter.device)]
    values = values.to(torch.bfloat16).cpu()
    values = torch.where(values.abs() < SMALLEST, 0, values)
    return f"{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes()


def _checkpoint_reader(model: PreTrainedModel) -> Reader:
    """Reads parameters from the checkpoint's files, memory-mapped. Files are looked for when the first is asked for."""
    files: dict[str, Path] | None = None
    sources: dict[str, list[Source]] = {}
    base = f"{model.base_model_prefix}."

    def load(key: str) -> Tensor:
        with safe_open(files[key], framework="pt") as tensors:
            return tensors.get_tensor(key)

    def read(name: str) -> Tensor | StackedTensor | None:
        nonlocal files, sources
        if files is None:
            files = _checkpoint_files(model.config)
            sources = find_sources(model, files)
        # Checkpoints of a model without its head lack the prefix; with an adapter in it, the model does not tell.
        found = next((sources[key] for key in (name, name.removeprefix(base), base + name) if key in sources), [])
        if found and all(_stacks(source) for source in found):
            # Sources of one part come in the order of the experts.
            parts = [[load(s.key) for s in found if s.part == part] for part in sorted({s.part for s in found})]
            return StackedTensor(list(zip(*parts, strict=True)))
        return load(found[0].key) if len(found) == 1 and not found[0].operations else None

    return read


def _stacks(source: Source) -> bool:
    """Whether tensors of experts are stacked, after those of one expert were put one below the other."""
    ways = [(type(operation), operation.dim) for operation in source.operations if hasattr(operation, "dim")]
    known = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    return len(ways) == len(source.operations) and ways in known


class StackedTensor:
    """A parameter, (experts, rows, columns), as a checkpoint has it: of each expert its tensors, (., columns), that lie
    one below the other. Elements are read without putting it together."""

    def __init__(self, experts: list[tuple[Tensor, ...]]):
        self.experts = experts
        self.shape = torch.Size((len(experts), sum(len(part) for part in experts[0]), experts[0][0].shape[1]))

    def take(self, indices: Tensor) -> Tensor:
        """Elements at indices of the flat parameter."""
        values = []
        for index in indices.tolist():
            rest, column = divmod(index, self.shape[2])
            expert, row = divmod(rest, self.shape[1])
            for part in self.experts[expert]:
                if row < len(part):
                    break
                row -= len(part)
            values.append(part[row, column])
        return torch.stack(values)


def _checkpoint_files(config) -> dict[str, Path]:
    """Name of each tensor of a checkpoint to the file that holds it; empty where the files are not on this machine."""
    name, revision = config._name_or_path, getattr(config, "_commit_hash", None)

    def find(file: str) -> Path | None:
        if os.path.isdir(name):
            path = Path(name) / file
            return path if path.exists() else None
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:  # no name on the Hub: a folder that is gone, or nothing
            return None
        return Path(path) if isinstance(path, str) else None

    if (weights := find_weights(find)) is None:
        return {}
    _, weight_map, names = weights
    found = {file: path for file in names if (path := find(file)) is not None}
    if weight_map:
        return {key: found[file] for key, file in weight_map.items() if file in found}
    keys: dict[str, Path] = {}
    for path in found.values():
        with safe_open(path, framework="pt") as tensors:
            keys |= dict.fromkeys(tensors.keys(), path)
    return keys
