"""Mean-difference steering, also known as CAA (arXiv 2312.06681) and DiffMean. `method.py` says what it has."""

from ..method import register
from .config import MeanDifferenceConfig
from .fit import fit_mean_difference
from .layer import MeanDifferenceLayer  # noqa: F401
from .method import METHOD
from .model import MeanDifferenceModel


__all__ = ["MeanDifferenceConfig", "MeanDifferenceModel", "fit_mean_difference"]

register(METHOD)
