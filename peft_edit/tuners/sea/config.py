from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...arguments import Argument, ArgumentError
from ...places import OutputSite
from ..config import EditConfig
from .maths import FeatureSpace, Projections, Rescale, check_energy


# How it was fitted: no more than defaults in an adapter that was not fitted here.
FIT_SETTINGS = ("positive_energy", "negative_energy", "centered")


@dataclass
class SEAConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`SEAModel`]. SEA (Spectral Editing of Activations)
    is proposed in https://huggingface.co/papers/2405.09719.

    Args:
        site (`Literal["mlp", "block"]`):
            Which activations are edited: the output of each MLP's output projection, or of each decoder block.
        positive_energy, negative_energy (`float`):
            Share of the energy (squared singular values) that the kept directions of the positive and of the negative
            covariance carry, in (0, 1]. The paper takes 0.998 for truthfulness and 0.9999 for bias.
        centered (`bool`):
            Whether to subtract each set's mean over the demonstrations before the covariances. The paper does not.
        feature_map (`Optional[Literal["tanh", "squared_exponential", "elu"]]`):
            Elementwise map for non-linear editing. Such an edit cannot be merged.
        feature_space (`Literal["activation", "feature"]`):
            Where the two projections are added: after the inverse of the feature map, as in the paper, or before it.
        input_scale (`Optional[float]`):
            Divide activations by `input_scale` times their RMS at the site before the feature map. Keeps them where the
            map bends.
        rescale (`Literal["token", "none", "mean", "average"]`):
            How the edited activation is scaled: to each token's own norm, not at all, by one constant per site that
            the fit records, or by one half. All but "token" merge exactly.
        retain_energy (`float`):
            Share of the energy of the retain set's activations whose directions the edit does not touch, in (0, 1].
            Used by a fit with a retain set; the paper has none.
        projections (`Literal["both", "positive", "negative", "exchanged"]`):
            Which projections edit. "exchanged" swaps them: reverse editing, the negative control.
        strength (`float`):
            0 is the base model, 1 the edit, more is allowed.
        rank_pattern (`dict[str, list[int]]`):
            Written by the fit: site to its two ranks, positive and negative. A site without an entry edits nothing.
        fit_statistics (`dict[str, dict[str, float]]`):
            Written by the fit: site to the RMS of its neutral activations, the mean and standard deviation of the
            rescaling ratio, the relative error of taking its mean and of leaving it out, the strength at which these
            were taken, and the relative change of what is to be left alone.

    The other fields are those of [`EditConfig`]. `init_weights=False` makes a random edit of rank one at every site.
    """

    method: ClassVar[str] = "SEA"

    site: OutputSite = field(
        default="mlp", metadata={"help": "'mlp' (MLP output projections) or 'block' (decoder blocks)."}
    )
    positive_energy: float = field(
        default=0.998, metadata={"help": "Energy of the positive directions, in (0, 1].", "allowed": "in (0, 1]"}
    )
    negative_energy: float = field(
        default=0.998, metadata={"help": "Energy of the negative directions, in (0, 1].", "allowed": "in (0, 1]"}
    )
    centered: bool = field(default=False, metadata={"help": "Centre the demonstrations before the covariances."})
    feature_map: Literal["tanh", "squared_exponential", "elu"] | None = field(
        default=None, metadata={"help": "Elementwise map for non-linear editing."}
    )
    feature_space: FeatureSpace = field(
        default="activation", metadata={"help": "Add the projections in 'activation' or in 'feature' space."}
    )
    input_scale: float | None = field(
        default=None,
        metadata={
            "help": "Divide by input_scale times the site's RMS before the feature map.",
            "above": 0,
            "allowed": "above 0 and finite",
            "remedy": "pass for example 3.0",
        },
    )
    rescale: Rescale = field(default="token", metadata={"help": "'token', 'none', 'mean' or 'average'."})
    retain_energy: float = field(
        default=0.99,
        metadata={"help": "Energy of the retain set that is left alone, in (0, 1].", "allowed": "in (0, 1]"},
    )
    projections: Projections = field(
        default="both", metadata={"help": "'both', 'positive', 'negative' or 'exchanged'."}
    )
    strength: float = field(
        default=1.0,
        metadata={"help": "0 is the base model, 1 the edit.", "minimum": 0, "allowed": "of 0 or more and finite"},
    )
    rank_pattern: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Site to [positive rank, negative rank]. Written by the fit."}
    )
    fit_statistics: dict[str, dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Site to statistics of its activations. Written by the fit."}
    )

    def check_fields(self) -> None:
        self.check_written("rank_pattern", dict[str, Any])
        self.check_written("fit_statistics", dict[str, dict[str, float]])
        self.rank_pattern = {site: _ranks(site, ranks) for site, ranks in self.rank_pattern.items()}
        check_energy("positive_energy", self.positive_energy)
        check_energy("negative_energy", self.negative_energy)
        check_energy("retain_energy", self.retain_energy)
        if self.rescale == "average" and self.projections not in ("both", "exchanged"):
            raise ArgumentError(
                Argument("rescale", "average"),
                f" needs two projections to average, got projections={self.projections!r}: pass ",
                Argument("projections", "both"),
                " or another rescale",
            )
        if self.input_scale is not None and self.feature_map is None:
            raise ArgumentError(
                Argument("input_scale"),
                " is used by a feature map only: pass ",
                Argument("feature_map"),
                " too, or leave ",
                Argument("input_scale"),
                " out",
            )

    def check_change(self, name: str, value: Any) -> None:
        super().check_change(name, value)
        if name in ("feature_map", "input_scale") and self.rank_pattern:
            raise ArgumentError(
                *("the adapter was fitted with ", Argument(name, getattr(self, name)), ": fit another one with "),
                *(Argument(name, value), ", or set ", Argument("rank_pattern", {}), " first and fit this one again"),
            )

    def __setattr__(self, name: str, value: Any) -> None:
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if name in ("projections", "feature_space") and "sites_in_use" in vars(self) and getattr(self, name) != before:
            # The ratios that the fit took are those of another edit: what needs them is to be fitted again.
            self.fit_statistics = {
                site: {key: number for key, number in numbers.items() if key == "rms"}
                for site, numbers in self.fit_statistics.items()
            }

    @property
    def is_linear(self) -> bool:
        """Whether the edit without its rescaling is a linear map."""
        return self.feature_map is None

    @property
    def statistics_strength(self) -> float:
        """Strength at which the fit takes the rescaling ratio: "mean" multiplies the full edit, "token" rescales its
        result."""
        return self.strength if self.rescale == "token" else 1.0


def _ranks(site: str, ranks: object) -> list[int]:
    """Two ranks. JSON of other programs may hold 1.0 for 1."""
    listed = list(ranks) if isinstance(ranks, (list, tuple)) else []
    numbers = [rank for rank in listed if isinstance(rank, (int, float)) and not isinstance(rank, bool)]
    whole = [rank for rank in numbers if rank % 1 == 0]
    if len(listed) != 2 or len(whole) != 2 or min(whole) < 0:
        raise ValueError(
            f"rank_pattern[{site!r}] must be two ranks of 0 or more, positive and negative, got {ranks!r}: the "
            "adapter's configuration is damaged; fit it again"
        )
    return [int(rank) for rank in whole]
