"""Ways to generate in which a forward pass has other last tokens than decoding one token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin

from ..arguments import Argument, ArgumentError
from .layer import EditLayer


# Arguments of `generate` with which several tokens go through the model at once, or all of them again.
SEVERAL_TOKENS = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size"),
)


def check_generation(model: nn.Module, layers: Iterable[EditLayer], arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a call of `generate` in which an edit of the last token of a forward pass would leave new
    tokens unedited: the answer would be another than with plain decoding.

    Args:
        model: of Transformers.
        layers: its edits.
        arguments: of the call, which may be that of a forward pass: nothing is said of those.
    """
    if not arguments.keys() & _only_generate(model):
        return
    names = arguments.get("adapter_names")
    last = {
        name
        for layer in layers
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


def _only_generate(model: nn.Module) -> set[str]:
    """Names of arguments that `generate` takes and a forward pass of the model does not."""
    of_generate = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig()), *SEVERAL_TOKENS}
    return of_generate - {*inspect.signature(type(model).forward).parameters, "self", "kwargs"}
