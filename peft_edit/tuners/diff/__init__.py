"""Diff, the baseline of the HPR paper (2024.emnlp-main.761, section 4.1). `method.py` says what it has."""

from ..method import register
from .arguments import DiffTrainingArguments
from .config import DiffConfig
from .layer import DiffLayer  # noqa: F401
from .method import METHOD
from .model import DiffModel
from .train import DiffTrainer


__all__ = ["DiffConfig", "DiffModel", "DiffTrainer", "DiffTrainingArguments"]

register(METHOD)
