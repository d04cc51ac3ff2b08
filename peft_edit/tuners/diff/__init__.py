"""Diff, the baseline of the HPR paper (2024.emnlp-main.761, section 4.1). `method.py` says what it has."""

from typing import TYPE_CHECKING

from ...importing import on_first_use


if TYPE_CHECKING:
    from .arguments import DiffTrainingArguments
    from .config import DiffConfig
    from .layer import DiffLayer
    from .model import DiffModel
    from .train import DiffTrainer

__getattr__, __dir__, __all__ = on_first_use(__name__)
