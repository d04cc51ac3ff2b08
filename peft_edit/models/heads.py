"""The attention heads of a model, as its configuration gives them."""

from __future__ import annotations

from torch import nn

from .sites import text_config


def attention_heads(model: nn.Module, width: int) -> tuple[int, int]:
    """Number of attention heads whose outputs lie side by side in activations, and the width of each.

    Args:
        model: of Transformers.
        width: of the activations, the input of an attention's output projection.

    Raises:
        ValueError: the configuration says of no heads, or of others.
    """
    config = text_config(model)
    count = _number(config, "num_attention_heads")
    if count is None:
        raise ValueError(f"the configuration of {type(model).__name__} has no number of attention heads to edit")
    head = next(filter(None, (_number(config, name) for name in ("v_head_dim", "head_dim"))), None)
    head = config.hidden_size // count if head is None else head  # as Transformers takes it
    if count * head != width:
        raise ValueError(
            f"the attention of {type(model).__name__} puts out {width} features, {count} heads of {head} have "
            f"{count * head}: its heads cannot be told apart; edit layers where they can, or another site"
        )
    return count, head


def _number(config, name: str) -> int | None:
    """A number of a configuration; None where it has none. Raises ValueError where each layer has its own (Gemma 4)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError as error:  # of a class that not all versions of Transformers have
        raise ValueError(
            f"{type(config).__name__} has a {name} of its own for each layer, so that the attention's heads cannot be "
            "told apart: use another model or another site"
        ) from error
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
