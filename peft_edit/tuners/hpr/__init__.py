from .config import HPRConfig
from .layer import HPRLayer
from .model import HPRModel


__all__ = ["HPRConfig", "HPRLayer", "HPRModel"]
