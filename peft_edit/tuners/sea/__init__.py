"""SEA, Spectral Editing of Activations (NeurIPS 2024, arXiv 2405.09719). `method.py` says what it has."""

from ..method import register
from .combine import combine_sea
from .config import SEAConfig
from .convert import convert_sea
from .export_lora import sea_to_lora
from .fit import fit_sea
from .layer import SEABlock, SEALayer, SEALinear  # noqa: F401
from .method import METHOD
from .model import SEAModel


__all__ = ["SEAConfig", "SEAModel", "combine_sea", "convert_sea", "fit_sea", "sea_to_lora"]

register(METHOD)
