"""Tiny random models of several architectures, made from configurations."""

import functools

import torch
from copying import Original, made_once
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "gpt2": lambda: GPT2Config(**SIZES, n_positions=64),  # Conv1D with bias
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: Gemma2Config(**GROUPED),
    "opt": lambda: OPTConfig(
        **SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32
    ),  # Linear with bias
    "falcon": lambda: FalconConfig(**SIZES),  # blocks return tuples
}
FAMILIES = tuple(CONFIGS)


@made_once
def tiny_model(family: str = "llama", seed: int = 0, **changes):
    """A model in evaluation mode whose biases, where it has any, are not zero."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@functools.cache
def _vivid(family: str):
    return Original(tiny_model(family, initializer_range=0.2, init_std=0.2))


def vivid_model(family: str = "llama", dtype: torch.dtype = torch.float32):
    """A fresh copy of a tiny model with weights so large that every edit shows in the logits."""
    return _vivid(family).copy().to(dtype)


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """(batch, length) random token ids, none of them special."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None, **kwargs):
    """Of some token ids, by default the same ones."""
    return model(input_ids=token_ids() if ids is None else ids, **kwargs).logits


@functools.cache
def base_logits(family="llama"):
    """Of a vivid model without any adapter."""
    return logits(vivid_model(family))


def agree(actual, expected):
    """Raise unless tensors agree but for rounding, which depends on where a file's tensors begin in memory."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def relative(actual, expected):
    """Distance of a tensor from another, as a share of its norm."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


class LargestNew(TorchDispatchMode):
    """Most elements of a tensor that an operation makes and that is no view of a parameter.

    Bytes of files, of which tensors are made, do not count.
    """

    def __init__(self, model, elements=torch.Tensor.numel):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.elements = elements
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.uint8:
                continue
            if tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, self.elements(tensor))
        return out
