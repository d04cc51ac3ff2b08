"""Which setting of a method is taken: benefit and damage of many are measured, and one is chosen by rule."""

from .calibrate import Calibration, calibrate
from .sweep import Sweep, SweepOptions, sweep


__all__ = ["Calibration", "Sweep", "SweepOptions", "calibrate", "sweep"]
