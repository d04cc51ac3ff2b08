"""SEA, Spectral Editing of Activations (NeurIPS 2024, arXiv 2405.09719). `method.py` says what it has."""

from typing import TYPE_CHECKING

from ...importing import on_first_use


if TYPE_CHECKING:
    from .combine import combine_sea
    from .config import SEAConfig
    from .convert import convert_sea
    from .export_lora import sea_to_lora
    from .fit import fit_sea
    from .layer import SEABlock, SEALayer, SEALinear
    from .model import SEAModel

__getattr__, __dir__, __all__ = on_first_use(__name__)
