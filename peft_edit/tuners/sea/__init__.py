from .config import SEAConfig
from .layer import SEABlock, SEALayer, SEALinear
from .model import SEAModel


__all__ = ["SEABlock", "SEAConfig", "SEALayer", "SEALinear", "SEAModel"]
