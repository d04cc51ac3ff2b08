"""The demonstration: a small model that knows the truth but repeats myths, and edits that change that.

The model has read about a synthetic world (`examples/train_demo_model.py`). It ships with the package, with 400
demonstrations, 60 validation and 180 test questions about disjoint entities, and unrelated text for side effects. What
a method shows is its own, see `Method.evidence`.
"""

from .scene import ASSETS, Evidence, Scene, run


__all__ = ["ASSETS", "Evidence", "Scene", "run"]
