"""What a person has set in a conversation: plain values, so that each conversation has its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..answering.options import BASE
from ..arguments import check_options


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """
    How an answer is drawn.

    Args:
        max_new_tokens (`int`):
            Most tokens in an answer.
        temperature (`float`):
            0 takes the most likely token each time, so that base and edited answers differ by the edit alone. Above 0
            tokens are drawn.
        top_p (`float`):
            Draw from the most likely tokens whose probabilities add up to this, in (0, 1].
        seed (`int`):
            Of the draw: each answer starts from it, those of the base model too.
    """

    max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens in an answer.", "minimum": 1, "allowed": "of at least 1"}
    )
    temperature: float = field(
        default=0.0,
        metadata={"help": "Above 0, draw tokens.", "minimum": 0, "maximum": 100, "allowed": "in [0, 100]"},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Draw from the likeliest tokens of this probability, in (0, 1].",
            "above": 0,
            "maximum": 1,
            "allowed": "in (0, 1]",
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Of the draw; base and edited answers have the same.",
            "minimum": 0,
            "maximum": 2**63 - 1,
            "allowed": "of at least 0",
        },
    )

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is set in a conversation. `ChatModels` changes it, and checks what it is changed to.

    Attributes:
        adapter: name of the adapter; None for the base model alone.
        strength: factor on the strength of its edit.
        layers: the decoder blocks that edit; None for all of the adapter.
        dials: names of further fields of its configuration to values that they have instead of the adapter's own.
        sides: who answers, `BASE` first.
        sampling: how answers are drawn.
    """

    adapter: str | None = None
    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    dials: Mapping[str, float] = field(default_factory=dict)
    sides: tuple[str, ...] = (BASE,)
    sampling: Sampling = field(default_factory=Sampling)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)
