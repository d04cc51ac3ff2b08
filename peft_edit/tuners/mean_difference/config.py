from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypedDict

from ...places import OutputSite
from ..config import EditConfig


class SiteStatistics(TypedDict):
    """What the fit found at a site."""

    norm: float
    rms: float


@dataclass
class MeanDifferenceConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`MeanDifferenceModel`]. The method adds a vector
    to activations: the difference of the means of positive and negative demonstrations. It is known as CAA, proposed in
    https://huggingface.co/papers/2312.06681, and as DiffMean.

    Args:
        site (`Literal["mlp", "block"]`):
            Which activations are edited: the output of each MLP's output projection, or of each decoder block.
        token_scope (`Literal["all", "last"]`):
            Which tokens of a forward pass are edited. "last" edits new tokens only during generation; its result
            depends on padding.
        scale_to_rms (`bool`):
            Whether the fit scales each vector to the root mean square of the site's activations, so that a strength
            means the same in every layer: 1 adds a vector that is as long as activations are.
        strength (`float`):
            Factor on the vectors, any finite number. 0 is the base model; a negative one steers the other way.
        fit_statistics (`dict[str, dict[str, float]]`):
            Written by the fit: site to the norm of the difference of its means, before any scaling, and the RMS of its
            activations. A site without an entry edits nothing.

    The other fields are those of [`EditConfig`]. `init_weights=False` makes a random vector at every site.
    """

    method: ClassVar[str] = "MEAN_DIFFERENCE"

    site: OutputSite = field(
        default="block", metadata={"help": "'mlp' (MLP output projections) or 'block' (decoder blocks)."}
    )
    token_scope: Literal["all", "last"] = field(
        default="all", metadata={"help": "'all' or 'last' token of a forward pass."}
    )
    scale_to_rms: bool = field(
        default=False, metadata={"help": "Scale each vector to the RMS of the site's activations."}
    )
    strength: float = field(
        default=1.0,
        metadata={"help": "Factor on the vectors, below 0 the other way.", "allowed": "that is finite"},
    )
    fit_statistics: dict[str, dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Site to norm of its difference and RMS. Written by the fit."}
    )

    def check_fields(self) -> None:
        self.check_written("fit_statistics", dict[str, SiteStatistics])
