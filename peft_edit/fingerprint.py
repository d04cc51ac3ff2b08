"""A short hash that tells one base model from another, so that a store or an adapter of another model is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .sites import decoder_blocks, text_config, unwrap


SAMPLES_PER_TENSOR = 16
# A prime step spreads the samples over a tensor of any shape.
SAMPLE_STEP = 2_654_435_761
# Smallest normal float16: below it a model that was loaded in float16 has lost bits.
SMALLEST = 2.0**-14
CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def fingerprint(model: nn.Module) -> str:
    """Hash of a Transformers model's architecture, and of fixed elements of its embeddings and decoder blocks.

    Elements are rounded to bfloat16 first, so that the dtype in which the model was loaded does not matter, with one
    exception: a float32 checkpoint loaded in float16 is rounded twice. Adapters that are injected do not matter either;
    merged ones do.

    Returns:
        16 hexadecimal digits. Takes well under a second for weights in memory: 16 elements of each tensor are read.
    """
    model = unwrap(model)
    config = text_config(model)
    digest = hashlib.sha256(json.dumps([getattr(config, name, None) for name in CONFIG_FIELDS]).encode())
    blocks = [model.get_submodule(name) for name in decoder_blocks(model).values()]
    for module in (model.get_input_embeddings(), *blocks):
        for name, sample in sorted(_samples(module)):
            digest.update(name.encode())
            digest.update(sample)
    return digest.hexdigest()[:16]


def _samples(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Name in the base model and sampled elements of each parameter, those of adapters left out."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _samples(module.original_module, prefix)
    elif isinstance(module, BaseTunerLayer):
        if hasattr(module, "base_layer"):  # else it is an edit beside the model's own modules
            yield from _samples(module.base_layer, prefix)
    else:
        with align_module_device(module):  # loads what is offloaded
            for name, parameter in module.named_parameters(recurse=False):
                yield prefix + name, _sample(parameter)
        for name, child in module.named_children():
            yield from _samples(child, f"{prefix}{name}.")


def _sample(parameter: torch.Tensor) -> bytes:
    """Shape and fixed elements, rounded to bfloat16."""
    indices = (torch.arange(1, SAMPLES_PER_TENSOR + 1) * SAMPLE_STEP) % parameter.numel()
    values = parameter.detach().reshape(-1)[indices.to(parameter.device)].to(torch.bfloat16).cpu()
    values = torch.where(values.abs() < SMALLEST, 0, values)
    return f"{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes()
