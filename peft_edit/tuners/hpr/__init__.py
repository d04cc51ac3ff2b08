"""HPR, Householder Pseudo-Rotation (EMNLP 2024, 2024.emnlp-main.761). `method.py` says what it has."""

from ..method import register
from .config import HPRConfig
from .convert import convert_hpr
from .layer import HPRLayer  # noqa: F401
from .method import METHOD
from .model import HPRModel
from .select import select_layers
from .train import HPRTrainer, HPRTrainingArguments


__all__ = ["HPRConfig", "HPRModel", "HPRTrainer", "HPRTrainingArguments", "convert_hpr", "select_layers"]

register(METHOD)
