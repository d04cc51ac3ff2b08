from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..config import EditConfig


@dataclass
class DiffConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`DiffModel`]. Diff is the baseline of the HPR
    paper, https://aclanthology.org/2024.emnlp-main.761: a network predicts the difference between a positive and a
    negative activation, which is added.

    Args:
        num_layers (`int`):
            Number of linear layers in a network, with GELU between them.
        hidden_size (`int | None`):
            Width of its hidden layers. By default each is half as wide as the one before: d, d/2, d/4, ..., d.
        strength (`float`):
            Factor on what is added, any finite number. 0 is the base model.
        token_scope (`Literal["all", "last"]`):
            Which tokens of a forward pass are edited. "last" edits new tokens only during generation; its result
            depends on padding.

    The other fields are those of [`EditConfig`]. The last layer of a new network is zero, so that it edits nothing;
    `init_weights=False` draws it at random.
    """

    method: ClassVar[str] = "DIFF"
    fixed: ClassVar[tuple[str, ...]] = (*EditConfig.fixed, "num_layers", "hidden_size")

    num_layers: int = field(
        default=4,
        metadata={
            "help": "Linear layers in a network.",
            "minimum": 1,
            "maximum": 1000,
            "allowed": "from 1 to 1,000",
        },
    )
    hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the hidden layers of a network. Default: halved.",
            "minimum": 1,
            "maximum": 1_000_000,
            "allowed": "from 1 to 1,000,000",
        },
    )
    strength: float = field(
        default=1.0, metadata={"help": "Factor on what is added, below 0 the other way.", "allowed": "that is finite"}
    )
    token_scope: Literal["all", "last"] = field(
        default="all", metadata={"help": "'all' or 'last' token of a forward pass."}
    )
