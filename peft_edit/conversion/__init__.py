"""The formats of the two published codes -> adapters. The base model's weights are not needed, only its configuration.

SEA: https://github.com/yfqiu-nlp/sea-llm at 482a0a0. HPR: https://github.com/VinAIResearch/HPR at f6bf7d6.
"""

from .hpr import GUIDANCE_CONFIG, convert_hpr
from .sea import convert_sea
from .shared import Conversion


__all__ = ["GUIDANCE_CONFIG", "Conversion", "convert_hpr", "convert_sea"]
