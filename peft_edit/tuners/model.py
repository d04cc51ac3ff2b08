"""What the tuners of every editing method share."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NoReturn

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from ..models.fingerprint import fingerprint, is_at_hand
from ..models.sites import (
    find_sites,
    layer_index,
    matches,
    site_width,
    target_modules,
    without_wrappers,
)
from .block import BlockEditLayer, check_not_on_disk
from .config import EditConfig
from .generation import check_generation
from .layer import EditLayer, edit_layers
from .strength import continue_scopes


class EditModel(BaseTuner):
    """What the tuners of every editing method share."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # The layer that edits the output of a module as its child.
    block_layer_cls: type[BlockEditLayer]
    # What to do where PEFT's methods add weighted adapters: their sum is another edit than the edits together.
    combined_by: ClassVar[str] = "activate several at once, or learn one adapter from all demonstrations"

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        # Default sites depend on the structure of the model, which only `_prepare_model` is given.
        return peft_config

    def _prepare_model(self, peft_config: EditConfig, model: nn.Module) -> None:
        if without_wrappers(model) is not model:
            raise ValueError(
                f"the model is compiled or wrapped already ({type(model).__name__}), which changes the names of its "
                "modules: add the adapter to the model inside, and compile or wrap the result"
            )
        _warn_of_another_model(peft_config, model)
        layers = peft_config.layers_to_transform
        if peft_config.target_modules is None:
            names = find_sites(model, peft_config.site, layers=layers).values()
            peft_config.target_modules = target_modules(model, list(names), layers)
        elif layers is not None:
            named = (name for name, _ in model.named_modules())
            found = {layer_index(name) for name in named if matches(name, peft_config.target_modules)}
            # Where nothing matches at all, PEFT says so.
            if (missing := sorted(set(layers) - found)) and found & set(layers):
                raise ArgumentError(
                    Argument("target_modules", peft_config.target_modules),
                    f" match nothing in layers {missing} of ",
                    Argument("layers_to_transform", layers),
                    f": pass layers of {sorted(found - {None})}",
                )

    @staticmethod
    def _check_target_module_exists(peft_config: EditConfig, key: str):
        return matches(
            key,
            peft_config.target_modules,
            peft_config.exclude_modules,
            peft_config.layers_with_modules(),
            peft_config.modules_to_save,
        )

    def _create_and_replace(
        self,
        config: EditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        child = self.prefix.removesuffix("_")
        existing = target if isinstance(target, self.tuner_layer_cls) else getattr(target, child, None)
        if isinstance(existing, self.tuner_layer_cls):
            existing.update_layer(adapter_name, config)
        else:
            self._create(config, adapter_name, target, target_name, parent, current_key)

    def _create(
        self,
        config: EditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Make the first layer of the method at a module: a child of it, see `BlockEditLayer`."""
        check_not_on_disk(self.model, target, current_key)
        features = site_width(self.model, target, self.block_layer_cls.of_input)
        layer = self.block_layer_cls(target, adapter_name, config, site=current_key, features=features)
        target.add_module(self.prefix.removesuffix("_"), layer)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict=None, **kwargs) -> None:
        if state_dict is not None:
            # PEFT takes what precedes ".sea_" for the target; the edit of a block is a child `sea` of its target.
            child = f".{self.prefix.removesuffix('_')}"
            old, new = f"{child}.{self.prefix}", f".{self.prefix}"
            state_dict = {key.replace(old, new): value for key, value in state_dict.items()}
        try:
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise _no_match(type(model).__name__, self.peft_config[adapter_name]) from error
        continue_scopes(edit_layers(model))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT finds the name only next to the end of a key; a network has the layer's number behind it.
        parts = "|".join(map(re.escape, cls.tuner_layer_cls.adapter_layer_names))
        return re.sub(rf"(\.(?:{parts}))\.{re.escape(adapter_name)}\.", r"\1.", key)

    @classmethod
    def _get_adapter_state_dict(cls, *args, **kwargs) -> dict[str, Tensor]:
        # An adapter of another method that was added later may lie around the layer, which the file must not tell.
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        around = re.compile(rf"(\.base_layer)+(?=\.({cls.prefix.removesuffix('_')}\.)?{cls.prefix})")
        return {around.sub("", key): value for key, value in tensors.items()}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.prepare_merge(adapter_names, safe_merge, stacklevel=3)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        children = {n: m for n, m in self.model.named_modules() if isinstance(m, BlockEditLayer)}
        if merge:
            self.prepare_merge(adapter_names, safe_merge, stacklevel=4)
            for layer in children.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name, layer in children.items():
            layer.detach()
            parent, _, child = name.rpartition(".")
            delattr(model.get_submodule(parent), child)
        return model

    def prepare_merge(self, adapter_names: list[str] | None, safe_merge: bool = False, stacklevel: int = 2) -> None:
        """Refuse what cannot be merged before any layer is changed, and warn of what merges inexactly.

        Args:
            adapter_names: which adapters; None for the active ones.
            safe_merge: whether a weight that is not finite is said as PEFT says it.
            stacklevel: of the warnings.

        Raises:
            ValueError: with the reason.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        for module in self.model.modules():
            inner = getattr(module, "base_layer", None) if isinstance(module, BaseTunerLayer) else None
            if isinstance(inner, EditLayer):
                # PEFT merges the outer one first, into the weights that are to be edited, and drops the inner one.
                raise ValueError(
                    f"cannot merge at {inner.site}: another adapter, {type(module).__name__}, lies around the edit; "
                    "load and merge the edit before that one is loaded"
                )
        uses = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.peft_config:
                names = ", ".join(map(repr, self.peft_config))
                raise ValueError(f"cannot merge adapter {name!r}: this model has {names}")
            errors = {}
            for layer in edit_layers(self.model):
                if not isinstance(layer, self.tuner_layer_cls) or not layer.is_fitted(name):
                    continue
                if name in layer.merged_adapters:
                    continue
                broken = not layer.is_finite(name)
                if broken and safe_merge:
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                layer.check_mergeable(name)
                if broken:
                    raise ValueError(
                        f"adapter {name!r} cannot be merged: its weights at {layer.site} hold NaN or infinite values, "
                        "which would stay in the weights of the model; load it again or fit again"
                    )
                if any(uses[id(output.parameter)] > 1 for output in layer.output_tensors().values()):
                    raise ValueError(
                        f"adapter {name!r} cannot be merged: the weights of {layer.site} are shared with another "
                        "module, which would be edited too; keep it as an adapter"
                    )
                if (error := layer.merge_error(name)) is not None:
                    errors[layer.site] = error
            if errors:
                warnings.warn(self.inexact_merge(name, errors), stacklevel=stacklevel)

    def inexact_merge(self, adapter_name: str, errors: dict[str, float]) -> str:
        """What to say of an adapter that merges inexactly.

        Args:
            adapter_name: the adapter.
            errors: site to relative error, see `EditLayer.merge_error`.
        """
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        return (
            f"Merging adapter {adapter_name!r} is inexact: relative error {mean:.3f} on average, "
            f"{errors[worst]:.3f} at {worst}."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an edit is no sum of weights.

        Raises:
            TypeError: as PEFT's own methods raise it, with what to do instead.
        """
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter: {self.combined_by}")

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an edit has no initial weights that the base model would have lost.

        Raises:
            TypeError: with what to do instead.
        """
        raise TypeError(
            f"{type(self).__name__} does not support subtract_mutated_init: an edit leaves the weights of the base "
            "model as they are, so save it without path_initial_model_for_weight_conversion"
        )

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether `peft.convert_to_lora` can make a LoRA adapter of this one, see that of the layers; None for the
        active ones. `PeftModel.supports_lora_conversion` asks about those, whatever name it is given."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        return all(layer.supports_lora_conversion(name) for layer in layers for name in names)

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
        check_generation(self.model, kwargs)
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


def _warn_of_another_model(config: EditConfig, model: nn.Module) -> None:
    """Warn where an adapter is loaded onto another model than that from whose activations it was learnt.

    Not an error: PEFT loads an adapter onto whatever it fits, and that may be meant. Weights that take time to read are
    not looked at, see `is_at_hand`.
    """
    if config.base_model_fingerprint is None or not is_at_hand(model):
        return
    if (of_model := fingerprint(model)) != config.base_model_fingerprint:
        warnings.warn(
            f"this {config.method} adapter was learnt on another model than it is loaded onto (fingerprint "
            f"{config.base_model_fingerprint}, this model has {of_model}), so that its edit means nothing here: load "
            f"it onto its own base model{f', {name}' if (name := config.base_model_name_or_path) else ''}",
            stacklevel=2,
        )


class NoMatchError(ArgumentError, NoMatchingPeftModuleError):
    """PEFT's error for a configuration that no module of a model matches."""


def _no_match(model: str, config: EditConfig) -> NoMatchError:
    given = [
        Argument(name, sorted(value) if isinstance(value := getattr(config, name), set) else value)
        for name in ("target_modules", "layers_to_transform", "exclude_modules")
        if getattr(config, name) is not None
    ]
    between = [part for argument in given for part in (" and ", argument)][1:]
    return NoMatchError(
        f"no module of {model} matches ", *between, ": pass names as in model.named_modules(), or their ends"
    )


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
