"""What both conversions share."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """Result of `convert_sea` and `convert_hpr`.

    Attributes:
        method: name of the method.
        layers: indices of the decoder blocks that the adapter edits.
        ranks: of each layer, where the method has ranks.
        deviation: largest entry of a stored matrix minus what the adapter makes of it; 0 where nothing is rounded.
        notes: what differs from the published behaviour.
    """

    method: str
    layers: list[int]
    ranks: list[list[int]]
    deviation: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def finish(conversion: Conversion) -> Conversion:
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
