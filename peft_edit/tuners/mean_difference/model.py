from __future__ import annotations

from ..model import EditModel
from ..registration import register_with_peft
from .config import MeanDifferenceConfig
from .layer import MeanDifferenceLayer


class MeanDifferenceModel(EditModel):
    """
    Creates a mean-difference steering model from a pretrained transformer model.

    The method is described in https://huggingface.co/papers/2312.06681 (CAA). A new adapter is the identity;
    `fit_mean_difference` fits it to stored activations, there is no training.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`MeanDifferenceConfig`]): The configuration of the model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The mean-difference model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_edit import MeanDifferenceConfig, fit_mean_difference

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, MeanDifferenceConfig(layers_to_transform=13))
        >>> fit_mean_difference(model, store)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`MeanDifferenceConfig`]): The configuration of the model.
    """

    prefix: str = "mean_difference_"
    tuner_layer_cls = MeanDifferenceLayer
    block_layer_cls = MeanDifferenceLayer


register_with_peft(MeanDifferenceConfig, MeanDifferenceModel)
