"""Tiny mixtures of experts, made from configurations."""

import torch
from tiny import GROUPED, SIZES
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)


WITHOUT_HEAD_DIM = {key: value for key, value in GROUPED.items() if key != "head_dim"}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    "mixtral": lambda: MixtralConfig(**GROUPED, **FOUR),  # a tensor for each expert on disk
    "qwen2_moe": lambda: Qwen2MoeConfig(  # with a shared expert and a gate on it
        **WITHOUT_HEAD_DIM,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
    "gpt_oss": lambda: GptOssConfig(**GROUPED, **FOUR),  # (experts, in, out), with biases
    "deepseek_v3": lambda: DeepseekV3Config(  # the first layer is dense
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        num_key_value_heads=4,
    ),
    "granitemoe": lambda: GraniteMoeConfig(**WITHOUT_HEAD_DIM, **FOUR),  # other names on disk
    "llama4": lambda: Llama4TextConfig(  # the router scales the inputs of the experts
        **GROUPED, **{**FOUR, "num_experts_per_tok": 1}, intermediate_size_mlp=40, moe_layers=[0, 2]
    ),
}
MIXTURES = tuple(CONFIGS)


def tiny_mixture(family: str = "mixtral", dtype: torch.dtype = torch.float64):
    """A model with weights so large that every edit shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.to(dtype)
