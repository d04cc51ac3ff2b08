from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

from ..config import EditConfig


class SiteStatistics(TypedDict):
    """What the fit found at the attention of a block."""

    accuracy: list[float]
    heads: list[int]
    sigma: list[float]


@dataclass
class ITIConfig(EditConfig):
    """
    This is the configuration class to store the configuration of an [`ITIModel`]. ITI (Inference-Time Intervention) is
    proposed in https://huggingface.co/papers/2306.03341.

    Args:
        num_heads (`int`):
            Number K of attention heads that are edited, those whose probes are most accurate on held-out questions. The
            paper takes 48 of the 1,024 of a 7B model.
        alpha (`float`):
            Factor on the standard deviation of the activations along a head's direction, any finite number; 15 in the
            paper. 0 is the base model; a negative one steers the other way. It may be changed after the fit.
        fit_statistics (`dict[str, dict[str, list[float]]]`):
            Written by the fit: site to the held-out accuracy of the probe of each of its heads, the heads that are
            edited, and the standard deviation along the direction of each of these.

    The other fields are those of [`EditConfig`]. `init_weights=False` makes a random vector at every site.
    """

    method: ClassVar[str] = "ITI"
    site: ClassVar[str] = "attention"
    dials: ClassVar[tuple[str, ...]] = ("alpha",)

    num_heads: int = field(
        default=48,
        metadata={"help": "Attention heads that are edited.", "minimum": 1, "allowed": "of at least 1"},
    )
    alpha: float = field(
        default=15.0,
        metadata={
            "help": "Standard deviations that are added, below 0 the other way.",
            "allowed": "that is finite",
        },
    )
    fit_statistics: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Site to accuracies of its heads' probes, and edited heads. Written by the fit."},
    )

    def check_fields(self) -> None:
        self.check_written("fit_statistics", dict[str, SiteStatistics])
