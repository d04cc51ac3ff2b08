from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.card import write_card
from ..files import give_usual_permissions


@dataclass
class EditConfig(PeftConfig):
    """
    What the configurations of every editing method share. Saving one writes the adapter's model card beside it:
    everything that saves an adapter (PEFT, Transformers, a trainer) saves its configuration last, into its folder.

    Args:
        fitted_on (`dict[str, Any]`):
            Written by the fit or the training: the name of the data (`data`) where it is known, and the numbers of
            `questions` and of `demonstrations` or `token_pairs`.
    """

    fitted_on: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Data and number of demonstrations. Written by the fit or the training."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.fitted_on, dict):
            raise ValueError(f"fitted_on must be a dict, written by the fit, got {self.fitted_on!r}: fit it again")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        # safetensors 0.8 lets nobody else read what it writes: another user would be told that there is no adapter.
        if (weights := Path(save_directory) / SAFETENSORS_WEIGHTS_NAME).exists():
            give_usual_permissions(weights)
        write_card(save_directory, self)
