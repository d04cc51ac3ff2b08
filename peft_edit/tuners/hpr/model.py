from __future__ import annotations

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ...arguments import Argument, ArgumentError
from ...models.sites import find_sites, layer_index
from ..model import EditModel
from ..registration import register_with_peft
from .config import HPRConfig
from .layer import HPRLayer


class HPRModel(EditModel):
    """
    Creates a HPR (Householder Pseudo-Rotation) model from a pretrained transformer model.

    The method is described in detail in https://aclanthology.org/2024.emnlp-main.761. A new adapter is the identity;
    `HPRTrainer` trains it on stored activations, and `select_layers` keeps the blocks that edit best.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`HPRConfig`]): The configuration of the HPR model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The HPR model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_edit import HPRConfig, HPRTrainer, HPRTrainingArguments, select_layers

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, HPRConfig())
        >>> HPRTrainer(model, HPRTrainingArguments("out"), train_dataset=store, eval_dataset=held_out_store).train()
        >>> select_layers(model, held_out_store, top_k=5, prune=True)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`HPRConfig`]): The configuration of the HPR model.
    """

    prefix: str = "hpr_"
    tuner_layer_cls = HPRLayer
    block_layer_cls = HPRLayer

    def _prepare_model(self, peft_config: HPRConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            sites = find_sites(model, peft_config.site, layers=peft_config.layers_to_transform)
            outside = set(peft_config.selected_layers or ()) - set(sites)
            if outside:
                raise ArgumentError(
                    Argument("selected_layers"),
                    f" {sorted(outside)} are not among the blocks {sorted(sites)} of the model",
                )
        super()._prepare_model(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        if config.selected_layers != []:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        # An adapter of no layers is PEFT's "dummy": it would take it for a mistake otherwise.
        self._prepare_model(config, model)
        # Not by assignment: the configuration may be that of another adapter too, whose targets do not change.
        target_modules = config.target_modules
        vars(config)["target_modules"] = DUMMY_TARGET_MODULES
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            vars(config)["target_modules"] = target_modules

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: HPRConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        *args,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return {key: value for key, value in tensors.items() if config.edits(layer_index(key))}


register_with_peft(HPRConfig, HPRModel)
