from __future__ import annotations

import warnings
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...arguments import Argument, ArgumentError
from ...models.sites import out_features
from ..layer import BlockEditLayer, EditLayer
from .config import SEAConfig
from .maths import edit, merge, merge_pieces, project
from .outputs import OutputTensor, linear_outputs, mixture_outputs, why_inexact


# Largest entry of U U^T - I. Factors that went through bfloat16 are off by up to 4e-3, anything else by far less.
ORTHONORMALITY_TOLERANCE = 1e-2


class SEAProjection(nn.Module):
    """Frozen orthogonal projection x -> U U^T x.

    Its weight, (k, d), holds U^T: k orthonormal rows. It is checked when it is loaded, or else at the first use.
    """

    def __init__(self, weight: Tensor, label: str, checked: bool = False):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.label = label
        self.checked = checked

    def forward(self, x: Tensor, columns: bool = False) -> Tensor:
        if not torch.compiler.is_compiling():
            self.check()
        return project(x, self.weight, columns)

    def check(self) -> None:
        """Raise ValueError, naming the site, for a weight that is missing or damaged. Looks once."""
        offloaded = self.weight.is_meta and hasattr(self, "_hf_hook")  # as it is between two uses
        if not self.checked and not offloaded:
            if problem := self._problem(self.weight):
                raise ValueError(problem)
            self.checked = True

    def _problem(self, weight: Tensor) -> str | None:
        # Still on meta where the model was loaded with low_cpu_mem_usage, else still NaN.
        if weight.is_meta or (weight.numel() and weight.isnan().all()):
            return (
                f"the {self.label} was not loaded: the adapter file lacks it, or load_adapter was given an offloaded "
                "model; load the complete adapter with PeftModel.from_pretrained or fit again"
            )
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if not wide.isfinite().all():
            return (
                f"the {self.label} holds NaN or infinite values: the adapter file is damaged; "
                "load it again or fit again"
            )
        error = (wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs()
        if error.numel() and error.max() > ORTHONORMALITY_TOLERANCE:
            return (
                f"the rows of the {self.label} must be orthonormal, got products off by {float(error.max()):.2g} "
                f"(allowed {ORTHONORMALITY_TOLERANCE:g}): the adapter file is damaged; load it again or fit again"
            )
        return None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape != self.weight.shape:
            errors.append(
                f"size mismatch for the {self.label}: {tuple(weight.shape)} in the file, {tuple(self.weight.shape)} by "
                "rank_pattern and the model; load the adapter's own configuration and model, or fit again"
            )
            return
        present = weight is not None and not weight.is_meta
        if present and (problem := self._problem(weight)):
            errors.append(problem)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if present:
            # Copying into a weight on meta does nothing, so that one is still to be looked at.
            self.checked = not self.weight.is_meta

    def extra_repr(self) -> str:
        return f"rank={self.weight.shape[0]}, features={self.weight.shape[1]}"


class SEALayer(EditLayer):
    """
    SEA layer: edits the activations of one site by the projections of each active adapter.

    The weights are frozen for ever: they come from a fit, not from training.
    """

    adapter_layer_names: tuple[str, ...] = ("sea_positive", "sea_negative")
    other_param_names: tuple[str, ...] = ("sea_config",)

    def __init__(self, site: str, features: int) -> None:
        self.site = site
        self.features = features
        self.sea_positive = nn.ModuleDict()
        self.sea_negative = nn.ModuleDict()
        self.sea_config: dict[str, SEAConfig] = {}
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged: dict[str, Tensor] = {}

    def update_layer(self, adapter_name: str, config: SEAConfig) -> None:
        """Add or replace an adapter whose ranks are those of the config, 0 where the site is not fitted."""
        if not config.init_weights and self.site not in config.rank_pattern:
            # A random edit, so that tests see one without a fit.
            config.rank_pattern[self.site] = [1, 1]
            config.fit_statistics[self.site] = {
                "rms": 1.0,
                "mean_rescale": 1.0,
                "mean_rescale_deviation": 0.0,
                "relative_error": 0.0,
                "unscaled_error": 0.0,
                "strength": config.statistics_strength,
            }
            factors = [nn.functional.normalize(torch.randn(1, self.features), dim=1) for _ in range(2)]
        else:
            ranks = config.rank_pattern.get(self.site, (0, 0))
            allowed = range(self.features + 1)
            if not isinstance(ranks, (list, tuple)) or len(ranks) != 2 or any(rank not in allowed for rank in ranks):
                raise ValueError(
                    f"rank_pattern[{self.site!r}] must be two ranks from 0 to {self.features} (the width of the site), "
                    f"got {ranks}: the adapter is of another model or its configuration is damaged"
                )
            # NaN until loaded, so that a factor missing in the file cannot pass for an edit.
            factors = [torch.full((rank, self.features), float("nan")) for rank in ranks]
        self.sea_config[adapter_name] = config
        self.set_factors(adapter_name, *factors)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.sea_positive

    def is_fitted(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter and the fit made an edit for this site."""
        return self.has_adapter(adapter_name) and self.site in self.sea_config[adapter_name].rank_pattern

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        config = self.sea_config[adapter_name]
        strength = config.strength * self.strength_factor
        if strength == 0 or not self.is_fitted(adapter_name):
            return h
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
            mean_rescale=self._mean_rescale(config) if config.rescale == "mean" else 1.0,
            strength=strength,
        )

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError, with the reason, for a fitted adapter that cannot be merged at this site."""
        config = self.sea_config[adapter_name]
        if not config.is_linear:
            raise ArgumentError(
                f"adapter {adapter_name!r} cannot be merged: its feature map {config.feature_map!r} is not linear; "
                "keep it as an adapter or fit with ",
                Argument("feature_map", None),
            )
        if self.in_edit_strength:
            raise ValueError(
                "cannot merge inside edit_strength: set the strength in the configuration and merge outside"
            )
        if config.rescale in ("token", "mean"):
            self._mean_rescale(config)
        self.sea_positive[adapter_name].check()
        self.sea_negative[adapter_name].check()

    @abstractmethod
    def output_tensors(self) -> dict[str, OutputTensor]:
        """The parameters that a linear edit merges into, by their names in the base layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights: W' = c M W, bias' = c M bias.

        Args:
            safe_merge (`bool`, *optional*):
                If `True`, check the merged weights for NaN and infinite values before they replace the originals.
            adapter_names (`list[str]`, *optional*):
                The list of adapter names that should be merged, in this order: two edits do not commute. If `None`, all
                active adapters will be merged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.is_fitted(name):
                continue
            self.check_mergeable(name)
            outputs = self.output_tensors()
            originals = {key: output.parameter.data for key, output in outputs.items()}
            merged = {}
            for key, output in outputs.items():
                out = torch.empty_like(originals[key], memory_format=torch.contiguous_format)
                pairs = zip(originals[key], out, strict=True) if output.stacked else [(originals[key], out)]
                for tensor, target in pairs:
                    self.merge_into(tensor, output.axis - output.stacked, name, target)
                merged[key] = out
            if safe_merge and not all(value.isfinite().all() for value in merged.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if not self.merged:
                # M can be singular, so unmerging cannot divide by it.
                self._unmerged = originals
            for key, value in merged.items():
                outputs[key].parameter.data = value
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        outputs = self.output_tensors()
        for key, value in self._unmerged.items():
            parameter = outputs[key].parameter
            # The model may have been moved or cast since.
            parameter.data = value.to(parameter.device, parameter.dtype)
        self._unmerged = {}
        self.merged_adapters = []

    def merge_into(self, tensor: Tensor, axis: int, adapter_name: str, out: Tensor) -> None:
        """Merge an adapter into a weight or a bias of this site, or of one of its experts, wherever that is.

        Args:
            tensor: weight, (., d) or (d, .), or bias, (d,).
            axis: of the features of the output, of length d.
            adapter_name: an adapter that is fitted here.
            out: receives the result, may be `tensor`.
        """
        config = self.sea_config[adapter_name]
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
        SEALayer.__init__(self, site, out_features(base_layer))
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        h = self.base_layer(x, *args, **kwargs)
        return h if self.merged and self.row_adapters is None else self.edit_output(h)

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
        kind = type(self.weight.data)
        if not self.weight.is_floating_point() or kind is not Tensor:  # torchao's and sharded weights are subclasses
            kind = str(self.weight.dtype) if kind is Tensor else kind.__name__
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: the weights of {self.site} are quantised or sharded "
                f"({kind}); keep it as an adapter, or merge into a plain model"
            )

    def __repr__(self) -> str:
        return "sea." + super().__repr__()


class SEABlock(nn.Module, SEALayer, BlockEditLayer):
    """SEA on the output of any other module, a decoder block or a mixture of experts: a child `sea` of it and a forward
    hook. Only that of a mixture merges, see `why_inexact`."""

    def __init__(self, block: nn.Module, adapter_name: str, config: SEAConfig, site: str, features: int) -> None:
        super().__init__()
        SEALayer.__init__(self, site, features)
        self._active_adapter = adapter_name
        self.attach(block)
        self.update_layer(adapter_name, config)

    def edit_output(self, output: Tensor | tuple) -> Tensor | tuple:
        return output if self.merged and self.row_adapters is None else super().edit_output(output)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def output_tensors(self) -> dict[str, OutputTensor]:
        return mixture_outputs(self.get_base_layer(), self.features)

    def check_mergeable(self, adapter_name: str) -> None:
        if not self.is_fitted(adapter_name):
            return
        if self.sea_config[adapter_name].site == "block":
            raise ArgumentError(
                f"adapter {adapter_name!r} cannot be merged: it edits the output of {self.site}, which is no linear "
                "layer; keep it as an adapter or fit with ",
                Argument("site", "mlp"),
            )
        super().check_mergeable(adapter_name)
        block = self.get_base_layer()
        for part in block.modules():
            if isinstance(part, BaseTunerLayer) and part is not self:
                raise ValueError(
                    f"cannot merge adapter {adapter_name!r} at {self.site}: another adapter, {type(part).__name__}, "
                    "lies inside it; merge that one first"
                )
            if getattr(getattr(part, "_hf_hook", None), "offload", False):
                raise ValueError(
                    f"cannot merge adapter {adapter_name!r} at {self.site}: its weights are offloaded; load the model "
                    "without offloading, or merge the checkpoint with peft_edit.merge_checkpoint"
                )
        outputs = self.output_tensors()
        if not all(output.parameter.is_floating_point() for output in outputs.values()):
            raise ValueError(f"cannot merge adapter {adapter_name!r} into the quantised weights of {self.site}")
        if reason := why_inexact(block, outputs):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: it edits the output of {self.site}, and {reason}; "
                "keep it as an adapter"
            )

    def __repr__(self) -> str:
        return "sea." + super().__repr__()
