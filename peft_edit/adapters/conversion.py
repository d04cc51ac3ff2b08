"""What both conversions share."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar


Result = TypeVar("Result", bound="Conversion")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """Result of a method's `convert`, which may have a class of its own that says more.

    Attributes:
        method: name of the method.
        layers: indices of the decoder blocks that the adapter edits.
        notes: what differs from the published behaviour.
    """

    method: str
    layers: list[int]
    notes: list[str]

    def table(self) -> tuple[list[str], list[list[str]]] | None:
        """Header and rows, one for each layer; None where there is nothing to tell of each."""
        return None

    def remarks(self) -> list[str]:
        """Sentences for people, of the whole adapter."""
        return [f"Layers: {', '.join(map(str, self.layers))}"]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def finish(conversion: Result) -> Result:
    """Log the notes."""
    for note in conversion.notes:
        logger.warning("%s", note)
    return conversion


def read_json(path: Path) -> dict[str, Any] | None:
    """An object of a file of the published code; None where there is no such file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}: it is no file of the published code")
    return value
