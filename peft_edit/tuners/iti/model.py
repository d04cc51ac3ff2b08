from __future__ import annotations

from ..model import EditModel
from ..registration import register_with_peft
from .config import ITIConfig
from .layer import ITILayer


class ITIModel(EditModel):
    """
    Creates an ITI (Inference-Time Intervention) model from a pretrained transformer model.

    The method is described in https://huggingface.co/papers/2306.03341. A new adapter is the identity; `fit_iti` fits
    it to stored activations of attention heads, there is no training.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`ITIConfig`]): The configuration of the model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The ITI model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_edit import ITIConfig, fit_iti

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, ITIConfig(num_heads=48, alpha=15))
        >>> fit_iti(model, store)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`ITIConfig`]): The configuration of the model.
    """

    prefix: str = "iti_"
    tuner_layer_cls = ITILayer
    block_layer_cls = ITILayer


register_with_peft(ITIConfig, ITIModel)
