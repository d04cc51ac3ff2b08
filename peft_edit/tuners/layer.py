"""What the layers of every editing method share: they change a module's output, not its weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError


class EditLayer(BaseTunerLayer):
    """Applies the active adapters, in their order, to the output of a module."""

    # Name of that module in the model, and the width of its output.
    site: str
    features: int
    # Factor on the strength of every adapter, see `edit_strength`.
    strength_factor: float = 1.0
    # Whether that is going on, also at a factor of 1: what is temporary must not be merged.
    in_edit_strength: bool = False
    # Adapter of each row of the batch while `adapter_names` is given to the model, else None.
    row_adapters: list[str] | None = None

    @abstractmethod
    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        """Edit h, (..., d), by one adapter of this layer."""

    @abstractmethod
    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter."""

    def depends_on_padding(self, adapter_name: str) -> bool:
        """Whether padding on the right changes what the adapter does to a sequence."""
        return False

    def edit_output(self, output: Tensor | tuple | list) -> Tensor | tuple | list:
        """Edit a module's output: a tensor, (..., d), or a tuple or list that begins with one."""
        if type(output) in (tuple, list):
            return type(output)((self.edit_output(output[0]), *output[1:]))
        if self.disable_adapters:
            return output
        # Some blocks (DeepSeek-V4, Gemma 3n) give several streams at once, or a whole structure (Reformer).
        if not isinstance(output, Tensor) or output.dim() > 3 or output.shape[-1] != self.features:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ArgumentError(
                f"the edit at {self.site} needs one tensor of width {self.features}, the module gives {found}: "
                "choose another ",
                *(Argument("site"), " or ", Argument("target_modules")),
            )
        if self.row_adapters is not None:
            return self._edit_rows(output, self.row_adapters)
        for name in self.active_adapters:
            if self.has_adapter(name):
                output = self.edit(output, name)
        return output

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
                rows[chosen] = self.edit(rows[chosen], name)
        return rows.reshape(output.shape)

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


class BlockEditLayer(EditLayer):
    """An edit of the output of any module: a child of that module and a forward hook on it."""

    def attach(self, block: nn.Module) -> None:
        """Hook the edit to the block whose child this layer becomes."""
        # In a tuple, so that the block does not become a child of its own child.
        self._block = (block,)
        # First of the hooks, so that what records hidden states sees the edit.
        self._hook = block.register_forward_hook(partial(edit_block_output, type(self)), prepend=True)

    def detach(self) -> None:
        """Take the hook off the block."""
        self._hook.remove()

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    @abstractmethod
    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError with the reason why an adapter that edits here cannot be merged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if self.has_adapter(name):
                self.check_mergeable(name)

    def unmerge(self) -> None:
        """Nothing to restore: a block never merges."""


def check_not_on_disk(model: nn.Module, block: nn.Module, name: str) -> None:
    """Raise ValueError for a block with weights offloaded to disk: its edit could not be a child of it."""
    device_map = getattr(model, "hf_device_map", None) or {}
    parts = [key for key, device in device_map.items() if device == "disk"]
    by_map = any(not key or f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in parts)
    hooks = (getattr(module, "_hf_hook", None) for module in block.modules())
    # PEFT drops the device map of some models, but not the hooks.
    by_hook = any(torch.device("meta") in (getattr(hook, "original_devices", None) or {}).values() for hook in hooks)
    if by_map or by_hook:
        raise ArgumentError(
            f"{name} is offloaded to disk, where the output of a whole block cannot be edited: use ",
            *(Argument("site", "mlp"), ", or a ", Argument("device_map"), " without disk"),
        )


def edit_block_output(
    kind: type, block: nn.Module, args: tuple, output: Tensor | tuple | list
) -> Tensor | tuple | list:
    """Forward hook of a module whose edits are children and not wrappers, so that its attributes and key names stay.

    Each method has a layer of its own kind and a hook here. The hook of the oldest edits for all, in the order in which
    they were added.
    """
    layers = [child for child in block.children() if isinstance(child, BlockEditLayer)]
    if layers and type(layers[0]) is kind:
        for layer in layers:
            output = layer.edit_output(output)
    return output


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


@contextmanager
def edit_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the strength of every active edit of `model` inside the `with` block.

    Args:
        model: a model with SEA or HPR adapters.
        strength: 0 is the base model, 1 the edit as configured, more is allowed.

    Raises:
        ValueError: strength below 0, not finite, or a model without edits or with merged ones. Merging inside the
            block is refused.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise ArgumentError(Argument("strength"), f" must be a number of 0 or more and finite, got {strength!r}")
    layers = edit_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SEA or HPR adapter whose strength could be set")
    if any(layer.merged for layer in layers):
        raise ValueError("cannot change the strength of merged adapters: call unmerge_adapter first")
    before = [(layer.strength_factor, layer.in_edit_strength) for layer in layers]
    try:
        for layer in layers:
            layer.strength_factor, layer.in_edit_strength = layer.strength_factor * strength, True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.strength_factor, layer.in_edit_strength = state
