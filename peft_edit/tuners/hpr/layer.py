from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...models.dtypes import as_written
from .. import fusing
from ..network import feed_forward
from ..trained import TrainedLayer
from .config import HPRConfig
from .maths import edit, positive_probability, reflection_angle


# Why an adapter is no linear update.
OWN_ANGLE = "it rotates each token by an angle of its own"
NO_MERGE = f"{OWN_ANGLE}, which no weight of the model can do"

# So many are edited at once on a GPU, all of them by one kernel: to ask which are negative, and run the angle network
# on these alone, takes longer there than to run it on them all, as the host would wait for the device.
MAX_FUSED_TOKENS = 256


def angle_network(features: int, num_layers: int = 4, hidden_size: int | None = None) -> nn.Sequential:
    """Network f of g(a) = pi sigmoid(f(a)), (..., d) -> (..., 1), see `feed_forward`."""
    return feed_forward(features, 1, num_layers, hidden_size)


class HPRLayer(TrainedLayer):
    """
    HPR layer: a probe and an angle network for each adapter, which edit the output of a decoder block.

    Negative tokens, those that the probe gives at most the gate's probability, are rotated towards the positive side
    by the predicted angle. Norms are kept.
    """

    adapter_layer_names: tuple[str, ...] = ("hpr_probe", "hpr_angle")

    method = "HPR"

    def make_modules(self, adapter_name: str, config: HPRConfig) -> None:
        self.hpr_probe[adapter_name] = nn.Linear(self.features, 1, bias=False)
        self.hpr_angle[adapter_name] = angle_network(self.features, config.num_angle_layers, config.angle_hidden_size)
        if config.init_weights:
            nn.init.zeros_(self.hpr_probe[adapter_name].weight)

    def probe_logits(self, a: Tensor, adapter_name: str) -> Tensor:
        """w . a of activations (..., d): the logit of being positive, (...)."""
        probe = self.hpr_probe[adapter_name]
        with as_written(a):
            return probe(a.to(probe.weight.dtype)).squeeze(-1)

    def gate_probability(self, h: Tensor, adapter_name: str) -> Tensor | None:
        if not self.configs[adapter_name].edits(self.index):
            return None
        with as_written(h):
            return positive_probability(h, self._normal(adapter_name, h))

    def angles(self, a: Tensor, adapter_name: str) -> Tensor:
        """Predicted angles of activations (..., d), in radians in (0, pi), (...)."""
        with as_written(a):
            return math.pi * torch.sigmoid(self._angle_logits(a, adapter_name))

    def _angle_logits(self, a: Tensor, adapter_name: str) -> Tensor:
        network = self.hpr_angle[adapter_name]
        return network(a.to(network[0].weight.dtype)).squeeze(-1)

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        config = self.configs[adapter_name]
        alpha = config.alpha * self.strength_factor
        if alpha == 0 or not config.edits(self.index):
            return h
        return self._rotate(h, adapter_name, config, alpha)

    def _rotate(self, h: Tensor, adapter_name: str, config: HPRConfig, alpha: float) -> Tensor:
        w = self._normal(adapter_name, h)
        angles = config.rotation == "angle" and math.prod(h.shape[:-1]) <= MAX_FUSED_TOKENS
        if angles and config.gate > 0 and fusing.values_alone(h) and fusing.kernels_apply(h):
            from .kernels import edit as edit_fused

            return edit_fused(h, w, self._angle_logits(h, adapter_name), config.gate, alpha)

        def angle(a: Tensor) -> Tensor:
            return reflection_angle(a, w) if config.rotation == "reflection" else self.angles(a, adapter_name)

        in_python = fusing.values_alone(h) and fusing.numbers_are_faster(h)
        return edit(h, w, angle, gate=config.gate, alpha=alpha, in_python=in_python)

    def _normal(self, adapter_name: str, h: Tensor) -> Tensor:
        """The normal of the probe's hyperplane, (d,), also where it is offloaded."""
        probe = self.hpr_probe[adapter_name]
        if hasattr(probe, "_fsdp_wrapped_module"):
            # The angle network runs where there are negative tokens: processes would wait for each other for ever.
            raise ValueError(
                f"the modules of HPR adapter {adapter_name!r} at {self.site} are wrapped by FSDP one by one: "
                "wrap whole decoder blocks, or use fully_shard"
            )
        offloaded = self.check_loaded(probe, adapter_name, h)
        with align_module_device(probe) if offloaded else nullcontext():
            return probe.weight[0]

    def check_mergeable(self, adapter_name: str) -> None:
        raise ValueError(f"adapter {adapter_name!r} cannot be merged: {NO_MERGE}; keep it as an adapter")

    def __repr__(self) -> str:
        return "hpr." + super().__repr__()
