"""Parts of a decoder block, found by its structure: linear layers, where its MLP ends, and where its attention does."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a (possibly adapted or quantised) linear layer: an edit of its output can be merged."""
    if isinstance(module, BaseTunerLayer):
        return hasattr(module, "base_layer") and is_linear(module.get_base_layer())
    return isinstance(module, (nn.Linear, Conv1D)) or (hasattr(module, "out_features") and hasattr(module, "weight"))


def out_features(module: nn.Module) -> int:
    """Width of a linear layer's output."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base.nf if isinstance(base, Conv1D) else base.out_features


def in_features(module: nn.Module) -> int:
    """Width of a linear layer's input."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base.nx if isinstance(base, Conv1D) else base.in_features


# Children of a decoder block that are no MLP, nor a part of one, by their names or their classes.
_NO_MLP_NAME = re.compile("attn|attention|adapter")
_NO_MLP_CLASS = re.compile("(Attention|Mixer|Norm)$")
_MLP_NAME = re.compile(r"(.*\.)?(\w*mlp|ffn?|feed_?forward|\w*moe)\.")


def mlp_output(block: nn.Module, hidden_size: int) -> str | None:
    """Name within the block of the module whose output is the MLP's, None if there is no such module.

    It is the last linear layer as wide as the model inside the child that is named as an MLP or, without one, outside
    attention. A mixture of experts has no single such layer: there it is the child that holds the experts, unless
    another MLP stands beside it (Granite's shared one), so that no module gives the whole output.
    """
    modules = {n: m for n, m in block.named_modules() if n}
    inside = tuple(
        f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer) or _NO_MLP_CLASS.search(type(m).__name__)
    )
    names = [n for n in modules if not _NO_MLP_NAME.search(n) and not n.startswith(inside)]
    linear = [n for n in names if is_linear(modules[n]) and out_features(modules[n]) == hidden_size]
    if experts := next((n for n in names if re.search(r"(^|\.)\w*experts?($|\.)", n)), None):
        mixture = experts.split(".")[0]
        return None if any(not n.startswith(f"{mixture}.") for n in linear) else mixture
    # Gemma 4 has a further linear layer of that width after the MLP.
    in_mlp = [n for n in linear if _MLP_NAME.match(n)]
    whole = [n for n in names if _MLP_NAME.match(f"{n}.")]  # JetMoe's experts are no linear layers
    return (in_mlp or linear or whole[:1] or [None])[-1]


# Attention by the names of modules or of their classes, and what is none: attention to another sequence, and linear
# attention, which has other heads than the configuration says.
_ATTENTION_NAME = re.compile("attn|attention")
_ATTENTION_CLASS = re.compile("Attention$")
_NO_ATTENTION = re.compile("cross|encoder_at|linear_at|adapter|mlp")
# Linear layers as wide as the model that do not project the heads' outputs: queries, keys and values, gates, and
# halves of a projection of low rank.
_NO_PROJECTION = re.compile(r"(^|\.)([qkvg]|kv|qkv|\w+_[ab])_proj$|gate|indexer")


def attention_output(block: nn.Module, hidden_size: int) -> str | None:
    """Name within the block of the linear layer that projects the heads of its self-attention to the width of the
    model, so that its input are the outputs of the heads. None where there is none, or more than one.

    It is the last linear layer as wide as the model inside the child that is attention by its name or class.
    """
    modules = {n: m for n, m in block.named_modules() if n}
    named = [
        n
        for n, m in modules.items()
        if (_ATTENTION_NAME.search(n) or _ATTENTION_CLASS.search(type(m).__name__)) and not isinstance(m, nn.ModuleList)
    ]
    adapted = tuple(f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer))
    last = {}
    for name, module in modules.items():
        root = next((n for n in named if name.startswith(f"{n}.")), None)
        if root is None or name.startswith(adapted) or _NO_ATTENTION.search(name) or _NO_PROJECTION.search(name):
            continue
        if is_linear(module) and out_features(module) == hidden_size:
            last[root] = name
    return next(iter(last.values())) if len(last) == 1 else None
