from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from ...arguments import check_choice
from ...models.sites import Site, check_names, normalise_layers
from ..config import EditConfig
from ..registration import peft_type
from .maths import FEATURE_MAPS, FeatureSpace, Projections, Rescale, check_energy


@dataclass
class SEAConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`SEAModel`]. SEA (Spectral Editing of Activations)
    is proposed in https://huggingface.co/papers/2405.09719.

    Args:
        site (`Literal["mlp", "block"]`):
            Which activations are edited: the output of each MLP's output projection, or of each decoder block.
        target_modules (`list[str] | str | None`):
            Names of the modules whose outputs are edited, matched as in every PEFT method. By default the modules of
            the site, found by the architecture of the model.
        exclude_modules (`list[str] | str | None`):
            Names of modules that are not edited, matched in the same way.
        layers_to_transform (`list[int] | int | None`):
            Indices of the decoder blocks to edit, 0 the first. An int, a list or a range. By default all.
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
        projections (`Literal["both", "positive", "negative", "exchanged"]`):
            Which projections edit. "exchanged" swaps them: reverse editing, the negative control.
        strength (`float`):
            0 is the base model, 1 the edit, more is allowed.
        rank_pattern (`dict[str, list[int]]`):
            Written by the fit: site to its two ranks, positive and negative. A site without an entry edits nothing.
        fit_statistics (`dict[str, dict[str, float]]`):
            Written by the fit: site to the RMS of its neutral activations, the mean and standard deviation of the
            rescaling ratio, the relative error of taking its mean and of leaving it out, and the strength at which
            these were taken.
        base_model_fingerprint (`Optional[str]`):
            Written by the fit: the fingerprint of the model that the demonstrations were collected from.
        fitted_on (`dict[str, Any]`):
            Written by the fit: the name of the data where it is known, the numbers of questions and demonstrations.
        init_weights (`bool`):
            Leave this `True`. `False` makes a random edit of rank one at every site, for tests.
        modules_to_save (`Optional[list[str]]`):
            List of modules apart from SEA layers to be set as trainable and saved in the final checkpoint.
    """

    site: Site = field(default="mlp", metadata={"help": "'mlp' (MLP output projections) or 'block' (decoder blocks)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the edited modules. Default: by site and architecture."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the edited decoder blocks. Default: all."}
    )
    positive_energy: float = field(default=0.998, metadata={"help": "Energy of the positive directions, in (0, 1]."})
    negative_energy: float = field(default=0.998, metadata={"help": "Energy of the negative directions, in (0, 1]."})
    centered: bool = field(default=False, metadata={"help": "Centre the demonstrations before the covariances."})
    feature_map: str | None = field(
        default=None, metadata={"help": f"None or one of {', '.join(FEATURE_MAPS)}: non-linear editing."}
    )
    feature_space: FeatureSpace = field(
        default="activation", metadata={"help": "Add the projections in 'activation' or in 'feature' space."}
    )
    input_scale: float | None = field(
        default=None, metadata={"help": "Divide by input_scale times the site's RMS before the feature map."}
    )
    rescale: Rescale = field(default="token", metadata={"help": "'token', 'none', 'mean' or 'average'."})
    projections: Projections = field(
        default="both", metadata={"help": "'both', 'positive', 'negative' or 'exchanged'."}
    )
    strength: float = field(default=1.0, metadata={"help": "0 is the base model, 1 the edit."})
    rank_pattern: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Site to [positive rank, negative rank]. Written by the fit."}
    )
    fit_statistics: dict[str, dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Site to statistics of its activations. Written by the fit."}
    )
    base_model_fingerprint: str | None = field(
        default=None,
        metadata={"help": "Fingerprint of the model that the demonstrations come from. Written by the fit."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Leave this True. False makes a random edit at every site, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from SEA layers to be trained and saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("SEA")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        self.layers_to_transform = normalise_layers(self.layers_to_transform)
        for name, allowed in (
            ("positive_energy", "in (0, 1]"),
            ("negative_energy", "in (0, 1]"),
            ("input_scale", "above 0, or None"),
            ("strength", "of 0 or more"),
        ):
            value = getattr(self, name)
            optional = name == "input_scale" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
        check_names("target_modules", self.target_modules)
        check_names("exclude_modules", self.exclude_modules)
        if not isinstance(self.centered, bool):
            raise ValueError(f"centered must be True or False, got {self.centered!r}")
        for name in ("rank_pattern", "fit_statistics"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict, written by the fit, got {value!r}: fit this adapter again")
        check_energy("positive_energy", self.positive_energy)
        check_energy("negative_energy", self.negative_energy)
        for name, choices in (
            ("site", get_args(Site)),
            ("feature_map", (None, *FEATURE_MAPS)),
            ("feature_space", get_args(FeatureSpace)),
            ("rescale", get_args(Rescale)),
            ("projections", get_args(Projections)),
        ):
            check_choice(name, getattr(self, name), choices)
        if self.rescale == "average" and self.projections not in ("both", "exchanged"):
            raise ValueError(
                f"rescale='average' needs two projections to average, got projections={self.projections!r}: "
                "pass projections='both' or another rescale"
            )
        if self.input_scale is not None and not 0 < self.input_scale < float("inf"):
            raise ValueError(
                f"input_scale must be above 0 and finite, got {self.input_scale}: pass for example 3.0, or None"
            )
        if self.input_scale is not None and self.feature_map is None:
            raise ValueError(
                "input_scale is used by a feature map only: pass feature_map too, or leave input_scale out"
            )
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be 0 or more and finite, got {self.strength}")

    @property
    def is_linear(self) -> bool:
        """Whether the edit without its rescaling is a linear map."""
        return self.feature_map is None

    @property
    def statistics_strength(self) -> float:
        """Strength at which the fit takes the rescaling ratio: "mean" multiplies the full edit, "token" rescales its
        result."""
        return self.strength if self.rescale == "token" else 1.0
