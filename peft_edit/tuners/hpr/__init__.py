"""HPR, Householder Pseudo-Rotation (EMNLP 2024, 2024.emnlp-main.761). `method.py` says what it has."""

from typing import TYPE_CHECKING

from ...importing import on_first_use


if TYPE_CHECKING:
    from .config import HPRConfig
    from .convert import convert_hpr
    from .layer import HPRLayer
    from .model import HPRModel
    from .select import select_layers
    from .train import HPRTrainer, HPRTrainingArguments

__getattr__, __dir__, __all__ = on_first_use(__name__)
