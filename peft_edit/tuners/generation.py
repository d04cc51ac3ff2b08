"""Ways to generate in which a forward pass has other last tokens than decoding one token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from ..arguments import Argument, ArgumentError
from .layer import edit_layers


# Arguments of `generate` with which several tokens go through the model at once, or all of them again.
SEVERAL_TOKENS = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size"),
)


def check_generation(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a call of `generate` in which an edit of the last token of a forward pass would leave new
    tokens unedited: the answer would be another than with plain decoding.

    Args:
        model: of Transformers, with edits.
        arguments: of the call, which may be that of a forward pass: nothing is said of those.
    """
    if not _is_of_generate(type(model), tuple(arguments)):
        return
    names = arguments.get("adapter_names")
    last = {
        name
        for layer in edit_layers(model)
        for name in ((() if layer.disable_adapters else layer.active_adapters) if names is None else names)
        if layer.has_adapter(name) and layer.depends_on_padding(name)
    }
    if not last:
        return
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)

    def value(name: str) -> Any:
        return arguments[name] if name in arguments else getattr(config, name, None)

    found = [Argument(name, value(name)) for name in SEVERAL_TOKENS if value(name) not in (None, False)]
    found += [Argument("use_cache", False)] if value("use_cache") is False else []
    if found:
        given = found[0] if found[0].name != "assistant_model" else Argument("assistant_model")
        raise ArgumentError(
            *(f"adapter {min(last)!r} edits the last token of a forward pass only (", Argument("token_scope", "last")),
            *("), and with ", given, " a forward pass has several new tokens: leave it out, or set "),
            Argument("token_scope", "all"),
        )


@torch.compiler.assume_constant_result
def _is_of_generate(model_class: type[nn.Module], names: tuple[str, ...]) -> bool:
    """Whether a call with arguments of these names is one of `generate`. This is asked in every forward pass."""
    return not _only_generate(model_class).isdisjoint(names)


@cache
def _only_generate(model_class: type[nn.Module]) -> frozenset[str]:
    """Names of arguments that `generate` takes and a forward pass of such a model does not."""
    of_generate = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig()), *SEVERAL_TOKENS}
    return frozenset(of_generate - {*inspect.signature(model_class.forward).parameters, "self", "kwargs"})
