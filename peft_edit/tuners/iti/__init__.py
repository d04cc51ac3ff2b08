"""ITI, Inference-Time Intervention (NeurIPS 2023, arXiv 2306.03341). `method.py` says what it has."""

from typing import TYPE_CHECKING

from ...importing import on_first_use


if TYPE_CHECKING:
    from .config import ITIConfig
    from .fit import fit_iti
    from .layer import ITILayer
    from .model import ITIModel

__getattr__, __dir__, __all__ = on_first_use(__name__)
