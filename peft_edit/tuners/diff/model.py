from __future__ import annotations

from ..model import EditModel
from ..registration import register_with_peft
from .config import DiffConfig
from .layer import DiffLayer


class DiffModel(EditModel):
    """
    Creates a Diff model from a pretrained transformer model.

    The method is the baseline of https://aclanthology.org/2024.emnlp-main.761, section 4.1. A new adapter is the
    identity; `DiffTrainer` trains it on stored activations.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`DiffConfig`]): The configuration of the Diff model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The Diff model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_edit import DiffConfig, DiffTrainer, DiffTrainingArguments

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, DiffConfig(layers_to_transform=range(12, 17)))
        >>> DiffTrainer(model, DiffTrainingArguments("out"), train_dataset=store, eval_dataset=held_out_store).train()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`DiffConfig`]): The configuration of the Diff model.
    """

    prefix: str = "diff_"
    tuner_layer_cls = DiffLayer
    block_layer_cls = DiffLayer


register_with_peft(DiffConfig, DiffModel)
