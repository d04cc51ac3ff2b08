"""A short hash that tells one base model from another, so that a store or an adapter of another model is noticed."""

from __future__ import annotations

import hashlib
import json

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sites import find_sites, text_config, unwrap


SAMPLES_PER_TENSOR = 64
# A prime step spreads the samples over a tensor of any shape.
SAMPLE_STEP = 2_654_435_761
CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def fingerprint(model: nn.Module) -> str:
    """Hash of a Transformers model's architecture and of fixed elements of its embeddings and MLP output projections.

    Elements are rounded to bfloat16 first, so that the dtype in which the model was loaded does not matter. Adapters
    that are injected do not matter either; merged ones do.

    Returns:
        16 hexadecimal digits. Takes well under a second: 64 elements of each tensor are read.
    """
    model = unwrap(model)
    config = text_config(model)
    digest = hashlib.sha256(json.dumps([getattr(config, name, None) for name in CONFIG_FIELDS]).encode())
    modules = [model.get_input_embeddings(), *(model.get_submodule(name) for name in find_sites(model, "mlp").values())]
    for module in modules:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        with align_module_device(base):
            parameter = next((p for p in base.parameters() if p.dim() > 1), None)
            if parameter is not None:
                digest.update(_sample(parameter))
    return digest.hexdigest()[:16]


def _sample(parameter: torch.Tensor) -> bytes:
    indices = (torch.arange(1, SAMPLES_PER_TENSOR + 1) * SAMPLE_STEP) % parameter.numel()
    values = parameter.detach().view(-1)[indices.to(parameter.device)] if parameter.is_contiguous() else None
    if values is None:
        values = parameter.detach().reshape(-1)[indices.to(parameter.device)]
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
