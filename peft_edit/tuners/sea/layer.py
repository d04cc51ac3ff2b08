from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...arguments import Argument, ArgumentError
from ...models.dtypes import as_written
from ...models.outputs import OutputTensor, linear_outputs, mixture_outputs, why_inexact
from ...models.parts import out_features
from .. import fusing
from ..block import BlockEditLayer, check_alone
from ..frozen import FrozenWeight
from ..layer import EditLayer
from .config import SEAConfig
from .maths import edit, edit_at_once, merge, merge_pieces, project


# Statistics of a random edit, for tests.
RANDOM_STATISTICS = {
    "rms": 1.0,
    "mean_rescale": 1.0,
    "mean_rescale_deviation": 0.0,
    "relative_error": 0.0,
    "unscaled_error": 0.0,
}
# Largest entry of U U^T - I. Factors that went through bfloat16 are off by up to 4e-3, anything else by far less.
ORTHONORMALITY_TOLERANCE = 1e-2


def adding_kernel(h: Tensor) -> Callable[..., Tensor] | None:
    """`add` of `edit_at_once` for h; None where no kernel applies."""
    if not fusing.kernels_apply(h):
        return None
    from .kernels import add  # which needs Triton

    return add


class SEAProjection(FrozenWeight):
    """Frozen orthogonal projection x -> U U^T x. Its weight, (k, d), holds U^T: k orthonormal rows."""

    shape_source = "rank_pattern and the model"

    def forward(self, x: Tensor, columns: bool = False) -> Tensor:
        self.check()
        return project(x, self.weight, columns)

    def damage(self, weight: Tensor) -> str | None:
        if found := super().damage(weight):
            return found
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with as_written(wide):
            error = (wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs()
        if error.numel() and error.max() > ORTHONORMALITY_TOLERANCE:
            return (
                f"the rows of the {self.label} must be orthonormal, got products off by {float(error.max()):.2g} "
                f"(allowed {ORTHONORMALITY_TOLERANCE:g}): the adapter file is damaged; load it again or fit again"
            )
        return None

    def extra_repr(self) -> str:
        return f"rank={self.weight.shape[0]}, features={self.weight.shape[1]}"


class SEALayer(EditLayer):
    """
    SEA layer: edits the activations of one site by the projections of each active adapter.

    The weights are frozen for ever: they come from a fit, not from training.
    """

    adapter_layer_names: tuple[str, ...] = ("sea_positive", "sea_negative")

    def begin(self, adapter_name: str, site: str, features: int) -> None:
        super().begin(adapter_name, site, features)
        self.frozen_peft_weight_names = {}

    def make_modules(self, adapter_name: str, config: SEAConfig) -> None:
        # The ranks are those of the config, 0 where the site is not fitted.
        ranks = config.rank_pattern.get(self.site, (0, 0))
        if max(ranks) > self.features:
            raise ValueError(
                f"rank_pattern[{self.site!r}] must be two ranks from 0 to {self.features} (the width of the site), "
                f"got {ranks}: the adapter is of another model or its configuration is damaged"
            )
        # NaN until loaded, so that a factor missing in the file cannot pass for an edit.
        factors = [torch.full((rank, self.features), float("nan")) for rank in ranks]
        if not config.init_weights and self.site not in config.rank_pattern:
            # A random edit, so that tests see one without a fit.
            factors = [nn.functional.normalize(torch.randn(1, self.features), dim=1) for _ in range(2)]
        self.set_factors(adapter_name, *factors)

    def set_factors(self, adapter_name: str, positive: Tensor, negative: Tensor, checked: bool = False) -> None:
        """Replace an adapter's factors, (k, d) with orthonormal rows each."""
        for names, sign, factor in (
            (self.sea_positive, "positive", positive),
            (self.sea_negative, "negative", negative),
        ):
            label = f"{sign} factor of SEA adapter {adapter_name!r} at {self.site}"
            names[adapter_name] = SEAProjection(factor, label, checked)
        self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """An adapter's two factors, (k, d) each, checked, on the CPU, also where they are offloaded."""
        factors = []
        for projection in (self.sea_positive[adapter_name], self.sea_negative[adapter_name]):
            with align_module_device(projection):
                projection.check()
                factors.append(projection.weight.detach().cpu())
        return tuple(factors)

    def is_fitted(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter and the fit made an edit for this site."""
        config = self.configs.get(adapter_name)
        return config is not None and (self.site in config.rank_pattern or not config.init_weights)

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        config = self.configs[adapter_name]
        strength = config.strength * self.strength_factor
        if strength == 0 or not self.is_fitted(adapter_name):
            return h
        mean_rescale = self._mean_rescale(config) if config.rescale == "mean" else 1.0
        if (factors := self._factors_at_hand(h, adapter_name, config)) is not None:
            add = adding_kernel(h)
            if add is not None or h.dtype in (torch.float32, torch.float64):
                return edit_at_once(
                    h,
                    *factors,
                    rescale=config.rescale,
                    mean_rescale=mean_rescale,
                    strength=strength,
                    add=add,
                    in_python=config.rescale == "token" and fusing.numbers_are_faster(h),
                )
        scale = 1.0
        if config.input_scale is not None:
            scale = config.input_scale * self.statistic(config, "rms")
        return edit(
            h,
            self.sea_positive[adapter_name],
            self.sea_negative[adapter_name],
            projections=config.projections,
            feature_map=config.feature_map,
            feature_space=config.feature_space,
            scale=scale,
            rescale=config.rescale,
            mean_rescale=mean_rescale,
            strength=strength,
        )

    def _factors_at_hand(self, h: Tensor, adapter_name: str, config: SEAConfig) -> tuple[Tensor, Tensor] | None:
        """U+^T and U-^T in the dtype of h, exchanged where they are to be; None where `edit_at_once` cannot be used."""
        if config.feature_map is not None or config.projections not in ("both", "exchanged"):
            return None
        if not fusing.values_alone(h):
            return None
        factors = []
        for projection in (self.sea_positive[adapter_name], self.sea_negative[adapter_name]):
            # FSDP's wrappers are other modules.
            if type(projection) is not SEAProjection or not fusing.is_at_hand(projection):
                return None
            projection.check()
            weight = projection.weight
            factors.append(weight if weight.dtype == h.dtype else weight.to(h.dtype))
        return tuple(reversed(factors) if config.projections == "exchanged" else factors)

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError, with the reason, for a fitted adapter that cannot be merged at this site."""
        config = self.configs[adapter_name]
        if not config.is_linear:
            raise ArgumentError(
                f"adapter {adapter_name!r} cannot be merged: its feature map {config.feature_map!r} is not linear; "
                "keep it as an adapter or fit with ",
                Argument("feature_map", None),
            )
        super().check_mergeable(adapter_name)
        if config.rescale in ("token", "mean"):
            self._mean_rescale(config)
        self.sea_positive[adapter_name].check()
        self.sea_negative[adapter_name].check()

    def merge_error(self, adapter_name: str) -> float | None:
        config = self.configs[adapter_name]
        return self.statistic(config, "relative_error") if config.rescale == "token" else None

    def merge_into(self, tensor: Tensor, axis: int, adapter_name: str, out: Tensor) -> None:
        # W' = c M W, bias' = c M bias
        config = self.configs[adapter_name]
        if tensor.dim() == 1:
            tensor, axis, out = tensor.unsqueeze(0), 1, out.unsqueeze(0)
        columns = axis == 0
        merge_piece = partial(
            merge,
            positive=partial(self.sea_positive[adapter_name], columns=columns),
            negative=partial(self.sea_negative[adapter_name], columns=columns),
            projections=config.projections,
            rescale=config.rescale,
            mean_rescale=self._mean_rescale(config) if config.rescale in ("token", "mean") else 1.0,
            strength=config.strength,
        )
        merge_pieces(tensor, columns, merge_piece, out)

    def statistic(self, config: SEAConfig, name: str) -> float:
        """What the fit recorded of this site."""
        if not config.init_weights and self.site not in config.fit_statistics:
            return RANDOM_STATISTICS.get(name, config.statistics_strength)
        try:
            return float(config.fit_statistics[self.site][name])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"fit_statistics[{self.site!r}] has no number {name!r}: fit this adapter again "
                "(or give combine_sea a store)"
            ) from None

    def _mean_rescale(self, config: SEAConfig) -> float:
        taken = self.statistic(config, "strength")
        if taken != config.statistics_strength:
            raise ValueError(
                f"the mean rescale at {self.site} was taken at strength {taken:g}, rescale={config.rescale!r} with "
                f"strength={config.strength:g} needs it at {config.statistics_strength:g}: fit this adapter again"
            )
        return self.statistic(config, "mean_rescale")


class SEALinear(nn.Module, SEALayer):
    """SEA on the output of a linear layer, `nn.Linear` or `Conv1D`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SEAConfig, site: str) -> None:
        super().__init__()
        self.begin(adapter_name, site, out_features(base_layer))
        self.base_layer = base_layer
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.edit_output(self.base_layer(x, *args, **kwargs))

    def output_tensors(self) -> dict[str, OutputTensor]:
        return linear_outputs(self.get_base_layer())

    def check_mergeable(self, adapter_name: str) -> None:
        super().check_mergeable(adapter_name)
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"cannot merge adapter {adapter_name!r} at {self.site}: another adapter, "
                f"{type(self.base_layer).__name__}, lies between it and the weights; load and merge that one before "
                "this one is loaded"
            )
        self.check_weights(adapter_name)

    def __repr__(self) -> str:
        return "sea." + super().__repr__()


class SEABlock(nn.Module, SEALayer, BlockEditLayer):
    """SEA on the output of any other module, a decoder block or a mixture of experts: a child `sea` of it and a forward
    hook. Only that of a mixture merges, see `why_inexact`."""

    def __init__(self, block: nn.Module, adapter_name: str, config: SEAConfig, site: str, features: int) -> None:
        super().__init__()
        self.begin(adapter_name, site, features)
        self.attach(block)
        self.update_layer(adapter_name, config)

    def output_tensors(self) -> dict[str, OutputTensor]:
        return mixture_outputs(self.get_base_layer(), self.features)

    def check_mergeable(self, adapter_name: str) -> None:
        if self.configs[adapter_name].site == "block":
            raise ArgumentError(
                f"adapter {adapter_name!r} cannot be merged: it edits the output of {self.site}, which is no linear "
                "layer; keep it as an adapter or fit with ",
                Argument("site", "mlp"),
            )
        super().check_mergeable(adapter_name)
        block = self.get_base_layer()
        check_alone(self, adapter_name)
        outputs = self.output_tensors()
        self.check_weights(adapter_name)
        if reason := why_inexact(block, outputs):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: it edits the output of {self.site}, and {reason}; "
                "keep it as an adapter"
            )

    def __repr__(self) -> str:
        return "sea." + super().__repr__()
