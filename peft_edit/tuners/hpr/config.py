from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Literal, get_args

from ...arguments import check_choice
from ...models.sites import check_names, normalise_layers
from ..config import EditConfig
from ..registration import peft_type


Rotation = Literal["angle", "reflection"]
TokenScope = Literal["all", "last"]


@dataclass
class HPRConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`HPRModel`]. HPR (Householder Pseudo-Rotation) is
    proposed in https://aclanthology.org/2024.emnlp-main.761.

    Args:
        target_modules (`list[str] | str | None`):
            Names of the modules whose outputs are edited, matched as in every PEFT method. By default the decoder
            blocks.
        exclude_modules (`list[str] | str | None`):
            Names of modules that are not edited, matched in the same way.
        layers_to_transform (`list[int] | int | None`):
            Indices of the decoder blocks that get a probe and an angle network, 0 the first. By default all.
        num_angle_layers (`int`):
            Number of linear layers in an angle network, with GELU between them.
        angle_hidden_size (`int | None`):
            Width of its hidden layers. By default each is half as wide as the one before: d, d/2, d/4, ..., 1.
        alpha (`float`):
            Factor on the angle of rotation, which is then cut off at pi.
        gate (`float`):
            Tokens are rotated where the probe gives them at most this probability of being positive, in [0, 1]. 0
            rotates none, 1 all.
        rotation (`Literal["angle", "reflection"]`):
            "angle" rotates by the predicted angle; "reflection" reflects at the probe's hyperplane, the paper's
            ablation.
        token_scope (`Literal["all", "last"]`):
            Which tokens of a forward pass are edited. "last" edits new tokens only during generation; its result
            depends on padding.
        selected_layers (`list[int] | None`):
            The blocks that edit, of those that have modules. None: all of them; []: none. When it is set, only these
            are created and saved.
        probe_accuracy (`dict[str, float]`):
            Written by the selection: block index to the accuracy of its probe on held-out activations, in [0, 1].
        base_model_fingerprint (`str | None`):
            Written by the training: `fingerprint` of the model whose activations it was trained on.
        fitted_on (`dict[str, Any]`):
            Written by the training: the name of the data where it is known, the numbers of questions and token pairs.
        init_weights (`bool`):
            Leave this `True`: a probe of zeros, which edits nothing. `False` draws it at random, for tests.
        modules_to_save (`list[str] | None`):
            List of modules apart from HPR layers to be set as trainable and saved in the final checkpoint.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the edited modules. Default: the decoder blocks."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder blocks with modules. Default: all."}
    )
    num_angle_layers: int = field(default=4, metadata={"help": "Linear layers in an angle network."})
    angle_hidden_size: int | None = field(
        default=None,
        metadata={"help": "Width of the hidden layers of an angle network. Default: halved."},
    )
    alpha: float = field(default=1.0, metadata={"help": "Factor on the angle."})
    gate: float = field(default=0.5, metadata={"help": "Rotate where the probe's probability is at most this."})
    rotation: Rotation = field(default="angle", metadata={"help": "'angle' or 'reflection'."})
    token_scope: TokenScope = field(default="all", metadata={"help": "'all' or 'last' token of a forward pass."})
    selected_layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks that edit. None: all that have modules; []: none."}
    )
    probe_accuracy: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Block index to accuracy of its probe. Written by the selection."}
    )
    base_model_fingerprint: str | None = field(
        default=None, metadata={"help": "Model whose activations it was trained on. Written by the training."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Leave this True. False draws the probes at random, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from HPR layers to be trained and saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("HPR")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        check_names("target_modules", self.target_modules)
        check_names("exclude_modules", self.exclude_modules)
        self.layers_to_transform = normalise_layers(self.layers_to_transform)
        if self.selected_layers is not None:
            empty = isinstance(self.selected_layers, Sized) and len(self.selected_layers) == 0
            self.selected_layers = [] if empty else normalise_layers(self.selected_layers)
            outside = set(self.selected_layers) - set(self.layers_to_transform or self.selected_layers)
            if outside:
                raise ValueError(
                    f"selected_layers must be in layers_to_transform {self.layers_to_transform}, got {sorted(outside)}"
                )
        for name, choices in (("rotation", get_args(Rotation)), ("token_scope", get_args(TokenScope))):
            check_choice(name, getattr(self, name), choices)
        for name in ("alpha", "gate"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.gate <= 1:
            raise ValueError(f"gate must be a probability in [0, 1], got {self.gate}")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be 0 or more and finite, got {self.alpha}")
        for name in ("num_angle_layers", "angle_hidden_size"):
            value = getattr(self, name)
            optional = name == "angle_hidden_size" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def edits(self, layer: int | None) -> bool:
        """Whether the block with this index is among those that edit."""
        return self.selected_layers is None or layer in self.selected_layers
