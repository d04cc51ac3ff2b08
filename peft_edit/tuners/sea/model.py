from __future__ import annotations

import re
import warnings
from collections import Counter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...arguments import Argument, ArgumentError, Note
from ...models.sites import find_sites, is_linear, layer_index, matches, target_modules, text_config
from ..layer import check_not_on_disk
from ..model import EditModel
from .config import SEAConfig
from .layer import SEABlock, SEALayer, SEALinear


class SEAModel(EditModel):
    """
    Creates a SEA (Spectral Editing of Activations) model from a pretrained transformer model.

    The method is described in detail in https://huggingface.co/papers/2405.09719. A new adapter is the identity;
    `fit_sea` fits it in closed form, there is no training.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`SEAConfig`]): The configuration of the SEA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The SEA model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_edit import SEAConfig, fit_sea

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, SEAConfig(site="mlp"))
        >>> fit_sea(model, store)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`SEAConfig`]): The configuration of the SEA model.
    """

    prefix: str = "sea_"
    tuner_layer_cls = SEALayer

    def _prepare_model(self, peft_config: SEAConfig, model: nn.Module) -> None:
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
    def _check_target_module_exists(peft_config: SEAConfig, key: str):
        return matches(
            key,
            peft_config.target_modules,
            peft_config.exclude_modules,
            peft_config.layers_to_transform,
            peft_config.modules_to_save,
        )

    def _create_and_replace(
        self,
        sea_config: SEAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        existing = target if isinstance(target, SEALinear) else getattr(target, "sea", None)
        if isinstance(existing, SEALayer):
            existing.update_layer(adapter_name, sea_config)
        elif is_linear(target):
            if isinstance(target, BaseTunerLayer):
                # Without the name of the site, so that Python shows it once.
                warnings.warn(
                    f"SEA adapter {adapter_name!r} edits what adapters of another method give on the same layers. PEFT "
                    "can no longer save or merge those in this model: save, or merge, them before SEA is added.",
                    stacklevel=2,
                )
            # Not by `_replace_module`, which moves the factors to the weights, for offloaded ones to meta.
            setattr(parent, target_name, SEALinear(target, adapter_name, sea_config, site=current_key))
        else:
            check_not_on_disk(self.model, target, current_key)
            features = text_config(self.model).hidden_size
            target.add_module("sea", SEABlock(target, adapter_name, sea_config, site=current_key, features=features))

    @classmethod
    def _get_adapter_state_dict(cls, *args, **kwargs) -> dict[str, torch.Tensor]:
        # An adapter of another method that was added later may lie around the layer, which the file must not tell.
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        return {re.sub(r"(\.base_layer)+(?=\.sea_)", "", key): value for key, value in tensors.items()}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._prepare_merge(adapter_names, stacklevel=3)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._prepare_merge(adapter_names, stacklevel=4)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _prepare_merge(self, adapter_names: list[str] | None, stacklevel: int) -> None:
        """Refuse what cannot be merged before any layer is changed, and warn of what merges inexactly."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        for module in self.model.modules():
            inner = getattr(module, "base_layer", None) if isinstance(module, BaseTunerLayer) else None
            if isinstance(inner, SEALayer):
                # PEFT merges the outer one first, into the weights that are to be edited, and drops the inner one.
                raise ValueError(
                    f"cannot merge at {inner.site}: another adapter, {type(module).__name__}, lies around SEA's; load "
                    "and merge SEA before that one is loaded"
                )
        uses = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.peft_config:
                names = ", ".join(map(repr, self.peft_config))
                raise ValueError(f"cannot merge adapter {name!r}: this model has {names}")
            config = self.peft_config[name]
            errors = {}
            for layer in self.model.modules():
                if isinstance(layer, SEALayer) and layer.is_fitted(name) and name not in layer.merged_adapters:
                    layer.check_mergeable(name)
                    if any(uses[id(output.parameter)] > 1 for output in layer.output_tensors().values()):
                        raise ValueError(
                            f"adapter {name!r} cannot be merged: the weights of {layer.site} are shared with another "
                            "module, which would be edited too; keep it as an adapter"
                        )
                    if config.rescale == "token":
                        errors[layer.site] = layer.statistic(config, "relative_error")
            if errors:
                worst = max(errors, key=errors.get)
                mean = sum(errors.values()) / len(errors)
                note = Note(
                    f"Merging adapter {name!r} replaces its rescale='token' by the mean rescale of each site: relative "
                    f"error {mean:.3f} on average, {errors[worst]:.3f} at {worst}, measured on the fit's neutral "
                    "demonstrations. ",
                    *(Argument("rescale", "none"), " and 'mean' merge exactly."),
                )
                warnings.warn(note, stacklevel=stacklevel)
