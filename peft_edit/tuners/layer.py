"""What the layers of every editing method share: they change a module's output or input, not its weights."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from ..models.dtypes import as_written, dtype_name, is_finite, is_quantised
from ..models.outputs import OutputTensor
from ..models.parts import is_linear
from ..models.sites import layer_index
from .config import EditConfig


@dataclass(eq=False)
class StrengthScope:
    """An `edit_strength` block: the factor, and the decoder blocks that go on to edit, None for all."""

    strength: float
    layers: frozenset[int] | None = None

    def at(self, layer: int | None) -> float:
        """The factor in a decoder block; None for a module outside all blocks."""
        return self.strength if self.layers is None or layer in self.layers else 0.0


class EditLayer(BaseTunerLayer):
    """Applies the active adapters, in their order, to the output of a module, or to its input.

    A method's layers keep what they learn in `ModuleDict`s, adapter name to module, whose names are
    `adapter_layer_names`.
    """

    other_param_names: tuple[str, ...] = ("configs",)

    # Whether the input of the module is edited, and not its output.
    of_input: ClassVar[bool] = False
    # Name of that module in the model, and the width of what is edited.
    site: str
    features: int
    # Configuration of each adapter, the very object of the model's `peft_config`.
    configs: dict[str, EditConfig]
    # The `edit_strength` blocks that are going on, the outer ones first, and the factor that they make for the strength
    # of every adapter.
    strength_scopes: tuple[StrengthScope, ...] = ()
    strength_factor: float = 1.0
    # Adapter of each row of the batch while `adapter_names` is given to the model, else None.
    row_adapters: list[str] | None = None
    # Sees this layer, and what it was given and gives, (..., d) each, in every forward pass, see `observed_edits`.
    observer: Callable[[EditLayer, Tensor, Tensor], None] | None = None

    def begin(self, adapter_name: str, site: str, features: int) -> None:
        """Make an empty layer, to which `update_layer` adds adapters."""
        self.site, self.features = site, features
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ModuleDict())
        self.configs = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self._unmerged: dict[str, Tensor] = {}

    def set_strength_scopes(self, scopes: tuple[StrengthScope, ...]) -> None:
        """Say which `edit_strength` blocks are going on."""
        self.strength_scopes = scopes
        self.strength_factor = math.prod(scope.at(layer_index(self.site)) for scope in scopes)

    @abstractmethod
    def make_modules(self, adapter_name: str, config: EditConfig) -> None:
        """Make, or replace, the modules of an adapter in this layer."""

    def update_layer(self, adapter_name: str, config: EditConfig) -> None:
        """Add or replace an adapter."""
        self.make_modules(adapter_name, config)
        self.set_config(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_config(self, adapter_name: str, config: EditConfig) -> None:
        """Let an adapter have a configuration."""
        self.configs[adapter_name] = config
        config.sites_in_use.add(self.site)

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter."""
        return adapter_name in self.configs

    def is_fitted(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter and it edits here."""
        return self.has_adapter(adapter_name)

    def is_finite(self, adapter_name: str) -> bool:
        """Whether the weights of an adapter in this layer hold neither NaN nor infinite values, as far as they are
        loaded; also where they are offloaded."""
        modules = (m for part in self.adapter_layer_names for m in getattr(self, part)[adapter_name].modules())
        for module in modules:
            with align_module_device(module):
                if not all(p.is_meta or is_finite(p) for p in module.parameters(recurse=False)):
                    return False
        return True

    @abstractmethod
    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        """Edit h, (..., d), by one adapter of this layer. Autocast is off while `edit_output` calls it."""

    def depends_on_padding(self, adapter_name: str) -> bool:
        """Whether padding on the right changes what the adapter does to a sequence."""
        return getattr(self.configs[adapter_name], "token_scope", "all") == "last"

    def edit_output(self, output: Tensor | tuple | list) -> Tensor | tuple | list:
        """Edit a module's output: a tensor, (..., d), or a tuple or list that begins with one, as arguments are."""
        if self.merged and self.row_adapters is None:
            return output
        if type(output) in (tuple, list):
            return type(output)((self.edit_output(output[0]), *output[1:]))
        if self.disable_adapters:
            return output
        # Some blocks (DeepSeek-V4, Gemma 3n) give several streams at once, or a whole structure (Reformer).
        if not isinstance(output, Tensor) or output.dim() > 3 or output.shape[-1] != self.features:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ArgumentError(
                f"the edit at {self.site} needs one tensor of width {self.features}, the module "
                f"{'takes' if self.of_input else 'gives'} {found}: "
                "choose another ",
                *(Argument("site"), " or ", Argument("target_modules")),
            )
        edited = self._edit_active(output) if self.row_adapters is None else self._edit_rows(output, self.row_adapters)
        if self.observer is not None:
            self.observer(self, output, edited)
        return edited

    def gate_probability(self, h: Tensor, adapter_name: str) -> Tensor | None:
        """The probability by which an adapter decides of each activation, (..., d), whether it is edited, (...);
        None where it edits all, or none."""
        return None

    @property
    def active_here(self) -> list[str]:
        """The active adapters that this layer holds, in the order in which they edit."""
        return [name for name in self.active_adapters if self.has_adapter(name)]

    def _edit_active(self, h: Tensor) -> Tensor:
        for name in self.active_here:
            h = self.edit_scope(h, name)
        return h

    def edit_scope(self, h: Tensor, adapter_name: str) -> Tensor:
        """Edit all tokens, or the last of each sequence, as the adapter's configuration says."""
        with as_written(h):
            if self.depends_on_padding(adapter_name) and h.dim() > 2:
                return torch.cat((h[..., :-1, :], self.edit(h[..., -1:, :], adapter_name)), dim=-2)
            return self.edit(h, adapter_name)

    def _edit_rows(self, output: Tensor, names: list[str]) -> Tensor:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        # Some models (OPT) flatten batch and sequence before the site, and beam search repeats rows: both keep the rows
        # of one input together. A sequence stays one: an edit may look for its last token.
        rows = output.reshape(len(names), -1, *output.shape[1:]).clone()
        for name in dict.fromkeys(names):
            if self.has_adapter(name):  # "__base__" is no adapter
                # Indices and not a mask, whose number of rows would be known on the device alone.
                chosen = torch.tensor([i for i, n in enumerate(names) if n == name], device=output.device)
                rows[chosen] = self.edit_scope(rows[chosen], name)
        return rows.reshape(output.shape)

    def output_tensors(self) -> dict[str, OutputTensor]:
        """The parameters that an edit merges into, by their names in the base layer."""
        return {}

    @abstractmethod
    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError, with the reason, for an adapter that edits here and cannot be merged.

        A method that merges says its own reasons, and calls this too.
        """
        if self.strength_scopes:  # also at a factor of 1: what is temporary must not be merged
            raise ValueError(
                "cannot merge inside edit_strength: set the strength in the configuration and merge outside"
            )

    def merge_error(self, adapter_name: str) -> float | None:
        """Relative error of merging an adapter here, as its fit measured it; None where merging is exact."""
        return None

    @property
    def merge_reads(self) -> tuple[str, ...]:
        """Names of parameters of the base layer that merging reads, besides those that it changes."""
        return ()

    def merge_into(self, tensor: Tensor, axis: int, adapter_name: str, out: Tensor, **beside: Tensor) -> None:
        """Merge an adapter into a parameter of this site, or of one of its experts, wherever that is.

        Args:
            tensor: one of `output_tensors`, or the part of one expert.
            axis: of the features of the output, of length d.
            adapter_name: an adapter that is fitted here.
            out: receives the result, may be `tensor`.
            beside: the parameters that `merge_reads` names, on the device of `tensor`.
        """
        raise TypeError(f"{type(self).__name__} merges nothing")  # where `check_mergeable` lets nothing pass

    def check_weights(self, adapter_name: str) -> None:
        """Raise ValueError for weights of the base layer that nothing can be merged into."""
        read = (getattr(self.get_base_layer(), name) for name in self.merge_reads)
        for parameter in (*read, *(output.parameter for output in self.output_tensors().values())):
            tensor = parameter.data
            # torchao's and sharded weights are subclasses.
            if is_quantised(tensor.dtype) or type(tensor) is not Tensor:
                kind = dtype_name(tensor.dtype) if type(tensor) is Tensor else type(tensor).__name__
                raise ValueError(
                    f"adapter {adapter_name!r} cannot be merged: the weights of {self.site} are quantised or sharded "
                    f"({kind}); keep it as an adapter, or merge into a plain model"
                )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert an adapter here: to merge it changes the weight of one linear
        layer, exactly, and no bias, which that function leaves out."""
        outputs = self.output_tensors()
        if set(outputs) != {"weight"} or not is_linear(self.get_base_layer()) or self.merged:
            return False
        if outputs["weight"].parameter.is_meta:
            return False
        if not self.is_fitted(adapter_name):
            return True  # it changes nothing here
        try:
            self.check_mergeable(adapter_name)
        except ValueError:
            return False
        return self.merge_error(adapter_name) is None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds to the weight of the linear layer, in its shape and in float32 or wider, for
        `peft.convert_to_lora`. Zero where the adapter does not edit.

        Raises:
            ValueError: the adapter cannot be converted, see `supports_lora_conversion`.
        """
        if not self.supports_lora_conversion(adapter_name):
            raise ValueError(
                f"adapter {adapter_name!r} adds no weights to {self.site} that PEFT could convert: "
                "merge it where that can be done, or keep it as an adapter"
            )
        (output,) = self.output_tensors().values()
        weight = output.parameter.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if not self.is_fitted(adapter_name):
            return torch.zeros_like(weight)
        merged = torch.empty_like(weight)
        self.merge_into(weight, output.axis, adapter_name, merged)
        return merged - weight

    def set_scale(self, adapter: str, scale: float) -> NoReturn:
        """Refused, as `scale_layer` and `unscale_layer` are: an edit has a strength, see `edit_strength`.

        Raises:
            TypeError: with what to do instead.
        """
        self._refuse_scale("set_scale")

    def scale_layer(self, scale: float) -> NoReturn:
        """Refused, see `set_scale`."""
        self._refuse_scale("scale_layer")

    def unscale_layer(self, scale: float | None = None) -> NoReturn:
        """Refused, see `set_scale`."""
        self._refuse_scale("unscale_layer")

    def _refuse_scale(self, name: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} does not support {name}: an edit has a strength and no scaling; use "
            "`with peft_edit.edit_strength(model, ...)`, or set the strength in its configuration"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*):
                If `True`, check the merged weights for NaN and infinite values before they replace the originals.
            adapter_names (`list[str]`, *optional*):
                The list of adapter names that should be merged, in this order: two edits may not commute. If `None`,
                all active adapters will be merged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.is_fitted(name):
                continue
            self.check_mergeable(name)
            outputs = self.output_tensors()
            originals = {key: output.parameter.data for key, output in outputs.items()}
            merged, beside = {}, {key: getattr(self.get_base_layer(), key).data for key in self.merge_reads}
            for key, output in outputs.items():
                out = torch.empty_like(originals[key], memory_format=torch.contiguous_format)
                pairs = zip(originals[key], out, strict=True) if output.stacked else [(originals[key], out)]
                for tensor, target in pairs:
                    with as_written(tensor):
                        self.merge_into(tensor, output.axis - output.stacked, name, target, **beside)
                merged[key] = out
            if safe_merge and not all(value.isfinite().all() for value in merged.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if not self.merged:
                # A merged edit may be singular, so unmerging cannot undo it by arithmetic.
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

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        """Device for the adapter's tensors. The dtype stays that of the adapter: rounding the factors of an edit to the
        model's half precision would change what is saved and merged."""
        for module in base_layer.modules():
            hook = getattr(module, "_hf_hook", None)
            if getattr(hook, "offload", False):  # the weights are on meta between two forward passes
                return torch.device(hook.execution_device), None
        parameter = next(base_layer.parameters(), None)
        # Adapters of a model on meta have tensors all the same: they are fitted and trained without the model.
        return (None if parameter is None or parameter.is_meta else parameter.device), None


def edit_layers(model: nn.Module) -> list[EditLayer]:
    return [module for module in model.modules() if isinstance(module, EditLayer)]


def check_independent_of_padding(model: nn.Module) -> None:
    """Raise ValueError where an active edit gives other results in a batch than alone."""
    for layer in edit_layers(model):
        for name in () if layer.disable_adapters else layer.active_adapters:
            if layer.has_adapter(name) and layer.depends_on_padding(name):
                raise ArgumentError(
                    f"adapter {name!r} edits the last token of a forward pass only, so that its result depends on "
                    "padding: set ",
                    *(Argument("token_scope", "all"), " in its configuration, or by select"),
                )
