"""Mean-difference steering, also known as CAA (arXiv 2312.06681) and DiffMean. `method.py` says what it has."""

from typing import TYPE_CHECKING

from ...importing import on_first_use


if TYPE_CHECKING:
    from .config import MeanDifferenceConfig
    from .fit import fit_mean_difference
    from .layer import MeanDifferenceLayer
    from .model import MeanDifferenceModel

__getattr__, __dir__, __all__ = on_first_use(__name__)
