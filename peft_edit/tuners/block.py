"""Edits of the output of any module, a decoder block for one, or of its input: children of it, with hooks on it."""

from __future__ import annotations

from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from .layer import EditLayer


class BlockEditLayer(EditLayer):
    """An edit of the output of any module, or of its input: a child of that module and a hook on it."""

    def attach(self, block: nn.Module) -> None:
        """Hook the edit to the block whose child this layer becomes."""
        # In a tuple, so that the block does not become a child of its own child.
        self._block = (block,)
        # First of the hooks, so that what records hidden states sees the edit.
        if self.of_input:
            self._hook = block.register_forward_pre_hook(partial(edit_block_input, type(self)), prepend=True)
        else:
            self._hook = block.register_forward_hook(partial(edit_block_output, type(self)), prepend=True)

    def detach(self) -> None:
        """Take the hook off the block."""
        self._hook.remove()

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def remove_adapter(self, adapter_name: str) -> None:
        """Delete the modules of an adapter here, while it goes on to edit other blocks. A layer that is left without
        any removes itself from its block."""
        for part in self.adapter_layer_names:
            del getattr(self, part)[adapter_name]
        self.configs.pop(adapter_name).sites_in_use.discard(self.site)
        if not self.configs:
            self.detach()
            block = self.get_base_layer()
            delattr(block, next(name for name, child in block.named_children() if child is self))


def check_alone(layer: BlockEditLayer, adapter_name: str) -> None:
    """Raise ValueError where another adapter, or accelerate, has a hand in the weights of a block that is to be merged
    into."""
    for part in layer.get_base_layer().modules():
        if isinstance(part, BaseTunerLayer) and part is not layer:
            raise ValueError(
                f"cannot merge adapter {adapter_name!r} at {layer.site}: another adapter, {type(part).__name__}, "
                "lies inside it; merge that one first"
            )
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"cannot merge adapter {adapter_name!r} at {layer.site}: its weights are offloaded; load the model "
                "without offloading, or merge the checkpoint with peft_edit.merge_checkpoint"
            )


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

    Each method has a layer of its own kind, with a hook of its own. The hook of the first layer runs all edits of the
    block in the order in which they were added; the other hooks do nothing.
    """
    for layer in _led_by(kind, block, of_input=False):
        output = layer.edit_output(output)
    return output


def edit_block_input(kind: type, block: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of a module, the like for edits of its input, which is its first argument without a name."""
    edited = args or None
    for layer in _led_by(kind, block, of_input=True):
        edited = layer.edit_output(edited)
    return edited


def _led_by(kind: type, block: nn.Module, of_input: bool) -> list[BlockEditLayer]:
    """The edits of a module's output or input, in their order, where the first of them is of a kind; else none."""
    layers = [child for child in block.children() if isinstance(child, BlockEditLayer) and child.of_input == of_input]
    return layers if layers and type(layers[0]) is kind else []
