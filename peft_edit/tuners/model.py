"""What the tuners of every editing method share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from .layer import BlockEditLayer, edit_layers


class EditModel(BaseTuner):
    """What the tuners of every editing method share."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        # Default sites depend on the structure of the model, which only `_prepare_model` is given.
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict=None, **kwargs) -> None:
        # What a fit or a selection writes belongs to this adapter, not to the object that the user may pass again.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if state_dict is not None:
            # PEFT takes what precedes ".sea_" for the target; the edit of a block is a child `sea` of its target.
            child = f".{self.prefix.removesuffix('_')}"
            old, new = f"{child}.{self.prefix}", f".{self.prefix}"
            state_dict = {key.replace(old, new): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        children = {n: m for n, m in self.model.named_modules() if isinstance(m, BlockEditLayer)}
        if merge:
            for layer in children.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name, layer in children.items():
            layer.detach()
            parent, _, child = name.rpartition(".")
            delattr(model.get_submodule(parent), child)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active:
            # PEFT lets each layer choose among the adapters that it holds: layers that hold others would disagree.
            self.active_adapter = active or sorted(self.peft_config)[:1]
            for layer in edit_layers(self.model):
                layer.set_adapter(self.active_adapter)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise ArgumentError(
                Argument("adapter_names"), f" must be a list of strings, one for each input, got {adapter_names!r}"
            )
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        layers = edit_layers(self.model)
        # `generate` gives its inputs here, and repeats them for its beams later; a forward pass of a causal language
        # model does not.
        handles = []
        if not _check_rows(adapter_names, args, kwargs):
            check = partial(_check_forward, adapter_names)
            handles.append(self.model.register_forward_pre_hook(check, with_kwargs=True))
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                mix = partial(_mix_modules_to_save, adapter_names)
                handles.append(module.register_forward_hook(mix, with_kwargs=True))
        try:
            for layer in layers:
                layer.row_adapters = list(adapter_names)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.row_adapters = None


def _check_rows(adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> bool:
    """Raise ValueError unless there is one adapter name for each input. The layers cannot tell, see `_edit_rows`.

    Returns:
        Whether the arguments hold inputs at all.
    """
    names = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids")
    rows = next((len(tensor) for tensor in (*args, *map(kwargs.get, names)) if isinstance(tensor, Tensor)), None)
    if rows not in (None, len(adapter_names)):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {rows} respectively."
        )
    return rows is not None


def _check_forward(adapter_names: list[str], model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model."""
    _check_rows(adapter_names, args, kwargs)


def _mix_modules_to_save(
    adapter_names: list[str], wrapper: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook of a module that adapters have copies of: each row of the batch by its own adapter's copy.

    Not by a pre-hook as in LoRA, where rows of an adapter are lost as long as the active one has no copy.
    """
    if wrapper.disable_adapters:
        return output
    repeats = len(output) // len(adapter_names)  # beam search
    names = [name if name in wrapper._adapters else "__base__" for name in adapter_names for _ in range(repeats)]
    return wrapper._mixed_batch_forward(*args, adapter_names=names, **kwargs)
