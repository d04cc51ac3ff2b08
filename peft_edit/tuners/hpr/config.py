from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...arguments import Argument, ArgumentError
from ...models.sites import layer_index
from ...places import normalise_layers
from ..config import EditConfig


@dataclass
class HPRConfig(EditConfig):
    """
    This is the configuration class to store the configuration of a [`HPRModel`]. HPR (Householder Pseudo-Rotation) is
    proposed in https://aclanthology.org/2024.emnlp-main.761.

    Args:
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

    The other fields are those of [`EditConfig`]. A new probe is zero, which edits nothing; `init_weights=False` draws
    it at random.
    """

    method: ClassVar[str] = "HPR"
    fixed: ClassVar[tuple[str, ...]] = (*EditConfig.fixed, "num_angle_layers", "angle_hidden_size")
    dials: ClassVar[tuple[str, ...]] = ("alpha", "gate")

    num_angle_layers: int = field(
        default=4,
        metadata={
            "help": "Linear layers in an angle network.",
            "minimum": 1,
            "maximum": 1000,
            "allowed": "from 1 to 1,000",
        },
    )
    angle_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the hidden layers of an angle network. Default: halved.",
            "minimum": 1,
            "maximum": 1_000_000,
            "allowed": "from 1 to 1,000,000",
        },
    )
    alpha: float = field(
        default=1.0, metadata={"help": "Factor on the angle.", "minimum": 0, "allowed": "of 0 or more and finite"}
    )
    gate: float = field(
        default=0.5,
        metadata={
            "help": "Rotate where the probe's probability is at most this, in [0, 1].",
            "minimum": 0,
            "maximum": 1,
            "allowed": "in [0, 1], a probability",
        },
    )
    rotation: Literal["angle", "reflection"] = field(default="angle", metadata={"help": "'angle' or 'reflection'."})
    token_scope: Literal["all", "last"] = field(
        default="all", metadata={"help": "'all' or 'last' token of a forward pass."}
    )
    selected_layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks that edit. None: all that have modules; []: none."}
    )
    probe_accuracy: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Block index to accuracy of its probe. Written by the selection."}
    )

    def check_fields(self) -> None:
        self.check_written("probe_accuracy", dict[str, float])
        if bad := [index for index in self.probe_accuracy if not str(index).isdecimal()]:
            raise ArgumentError(Argument("probe_accuracy"), f" must be of indices of layers, got {bad[0]!r}")
        if self.selected_layers is not None:
            empty = isinstance(self.selected_layers, Sized) and len(self.selected_layers) == 0
            self.selected_layers = [] if empty else normalise_layers(self.selected_layers, "selected_layers")
            outside = set(self.selected_layers) - set(self.layers_to_transform or self.selected_layers)
            if outside:
                raise ArgumentError(
                    Argument("selected_layers"),
                    " must be in ",
                    Argument("layers_to_transform"),
                    f" {self.layers_to_transform}, got {sorted(outside)}",
                )

    def check_change(self, name: str, value: Any) -> None:
        super().check_change(name, value)
        if name == "selected_layers" and value and self.sites_in_use:
            there = {layer_index(site) for site in self.sites_in_use}
            if missing := sorted(set(value) - there):
                raise ArgumentError(
                    Argument("selected_layers"),
                    f" {missing} have no modules in this adapter, which has them in {sorted(there)}: load or train an "
                    "adapter with those layers",
                )

    def layers_with_modules(self) -> list[int] | None:
        return self.layers_to_transform if self.selected_layers is None else self.selected_layers

    def edits(self, layer: int | None) -> bool:
        """Whether the block with this index is among those that edit."""
        return self.selected_layers is None or layer in self.selected_layers
