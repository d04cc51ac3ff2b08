"""ITI, Inference-Time Intervention (NeurIPS 2023, arXiv 2306.03341). `method.py` says what it has."""

from ..method import register
from .config import ITIConfig
from .fit import fit_iti
from .layer import ITILayer  # noqa: F401
from .method import METHOD
from .model import ITIModel


__all__ = ["ITIConfig", "ITIModel", "fit_iti"]

register(METHOD)
