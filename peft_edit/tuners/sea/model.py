from __future__ import annotations

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...arguments import Argument, Note
from ...models.parts import is_linear
from ..model import EditModel
from ..registration import register_with_peft
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
    block_layer_cls = SEABlock
    combined_by = "peft_edit.combine_sea makes one adapter of several"

    def _create(
        self,
        config: SEAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if not is_linear(target):
            super()._create(config, adapter_name, target, target_name, parent, current_key)
            return
        if isinstance(target, BaseTunerLayer):
            # Without the name of the site, so that Python shows it once.
            warnings.warn(
                f"SEA adapter {adapter_name!r} edits what adapters of another method give on the same layers. PEFT "
                "can no longer save or merge those in this model: save, or merge, them before SEA is added.",
                stacklevel=2,
            )
        # Not by `_replace_module`, which moves the factors to the weights, for offloaded ones to meta.
        setattr(parent, target_name, SEALinear(target, adapter_name, config, site=current_key))

    def inexact_merge(self, adapter_name: str, errors: dict[str, float]) -> Note:
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        return Note(
            f"Merging adapter {adapter_name!r} replaces its rescale='token' by the mean rescale of each site: relative "
            f"error {mean:.3f} on average, {errors[worst]:.3f} at {worst}, measured on the fit's neutral "
            "demonstrations. Adapters that are fitted with ",
            *(Argument("rescale", "none"), " or 'mean' merge exactly."),
        )


register_with_peft(SEAConfig, SEAModel)
