"""Which families of causal language models SEA and HPR can edit, tried on a tiny random model of each.

    python examples/architectures.py               # every family in the installed Transformers: the table
    python examples/architectures.py llama gpt2    # the rows of some of them
    python examples/architectures.py --write       # every family: writes the page examples/architectures.md

Expect a minute or two on one core. A "yes" was seen to work; otherwise the table holds the reason. What was seen, the
page says, whose text is `PAGE` below.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import tempfile
import warnings
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from peft_edit import HPRConfig, SEAConfig
from peft_edit.models.sites import decoder_blocks, find_sites


# Vision-language models whose text tower has no class of its own among the causal language models.
VISION_LANGUAGE = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "paligemma")

# Families of the causal language models that are no rows of the table, with the reason.
NOT_TRIED = {
    "blt": "bytes, patches of them and several models in a row",
    "dots3_note": "its text model is dots3_note_text",
    "gemma3n": "its vision tower needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "drafts from another model's keys and values",
    "gemma4_unified_assistant": "drafts from another model's keys and values",
    "musicgen": "a decoder of audio codes",
    "musicgen_melody": "a decoder of audio codes",
}
FAMILIES = [name for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VISION_LANGUAGE) if name not in NOT_TRIED]

# The page. `page` fills in the `version` of Transformers, `table` and `not_tried`.
PAGE = """\
# Architectures

```bash
python examples/architectures.py --write     # makes this page
python examples/architectures.py llama gpt2  # prints the rows of these families
```

The script tries every family of causal language models in Transformers, here {version}, and the text towers of some
vision-language models. It makes a tiny random model of each family, with a random edit at every decoder block. A "yes"
means:

- The logits with the edit are finite, and differ from those of the base model.
- With the adapter switched off, and after `unload`, the logits are those of the frozen base model to
  the last bit.
- The adapter, saved and loaded into a fresh copy, gives the edited logits to the last bit.
- SEA merges: the merged model gives the edited logits to rounding.

Any other entry is the reason why the edit, or the merging, is refused. "-" means that there was nothing to try.

- The sites are found by the structure of a model.
- In a mixture of experts, the edit at the MLP is of the output of the whole mixture.
- Where SEA at the MLP is refused, pass `site="block"`, `layers_to_transform` or `target_modules`.
- Where blocks hand on several streams at once (hyper-connections, AltUp), edit at the MLP.

{table}

## Not tried

{not_tried}
"""

# Field of a configuration, as families name it, to its tiny value.
SIZES = {
    field: value
    for value, fields in {
        64: """
            vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input ngram_vocab_size_base
            max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions
            max_source_positions original_max_position_embeddings encoder_hash_byte_group_vocab shape_vocab_size
            pronunciation_vocab_size intermediate_size mamba_d_ssm
        """,
        48: """
            ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_ff d_inner
            moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
            expert_ffn_hidden_size dense_intermediate_size feed_forward_size shared_experts_intermediate_size
            moe_shared_expert_intermediate_size
        """,
        32: """
            hidden_size d_model n_embd embed_dim word_embed_proj_dim emb_dim embedding_size input_embedding_size
            output_embedding_size backbone_hidden_size lru_width embedding_dim dim_model_base
        """,
        16: """
            qk_head_dim shape_embed_dim pronunciation_embed_dim image_size router_hidden_size index_head_dim
            hidden_size_per_layer_input hc_lowrank ple_embed_dim split_ngram_parts mamba_d_head mamba_head_dim
        """,
        8: """
            head_dim dim_head d_head kv_channels attention_head_dim v_head_dim swa_head_dim linear_head_dim
            attention_head_size global_head_dim q_lora_rank kv_lora_rank o_lora_rank qk_rope_head_dim qk_nope_head_dim
            rotary_dim linear_key_head_dim linear_value_head_dim state_size mamba_d_state ssm_state_size patch_size
            adapter_rank laurel_rank
        """,
        4: """
            num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads
            num_decoder_attention_heads num_encoder_attention_heads num_heads swa_num_attention_heads num_experts
            num_local_experts n_routed_experts moe_num_experts linear_num_key_heads linear_num_value_heads
            mamba_n_heads mamba_num_heads linear_num_heads index_topk
        """,
        2: """
            num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
            num_encoder_layers num_blocks max_window_layers depth num_key_value_heads num_kv_heads
            swa_num_key_value_heads num_query_groups num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k
            index_n_heads n_group topk_group num_expert_group
        """,
        0: "pad_token_id num_kv_shared_layers num_nextn_predict_layers zero_expert_num",
        1: "bos_token_id",
        3: "eos_token_id",
    }.items()
    for field in fields.split()
}
MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
DOTS3 = {
    "per_layer_config": {
        i: {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
        for i in range(2)
    }
}
# What a family needs besides.
OTHERWISE: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 24)},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Names of a configuration's list of kinds of layers.
LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration with two decoder blocks, or one of each kind that the family has."""
    cls = CONFIG_MAPPING[family]
    return cls(**_tiny_fields(cls(), OTHERWISE.get(family, {})))


def _tiny_fields(default: PreTrainedConfig, otherwise: dict) -> dict:
    fields = {name: SIZES[name] for name in SIZES if isinstance(vars(default).get(name), int)}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has as many as of the others
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name in LAYER_TYPES:
        kinds = list(dict.fromkeys(vars(default).get(name) or ()))
        if len(kinds) > 1:
            fields |= {name: kinds, "num_hidden_layers": len(kinds)}
    for name in default.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            fields[name] = type(part)(**_tiny_fields(part, otherwise.get(name, {})))
    return fields | {name: value for name, value in otherwise.items() if name not in default.sub_configs}


def tiny_model(family: str) -> nn.Module:
    """A random model in evaluation mode, its weights large enough for every edit to show in the logits."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family in VISION_LANGUAGE else AutoModelForCausalLM
    model = auto.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@dataclass(frozen=True)
class Row:
    """What a family can do: "yes", or the reason why not."""

    mlp: str
    block: str
    hpr: str
    merge: str
    saved: str


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(0)  # Reformer hashes at random
    return model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits


def try_family(family: str) -> Row:
    """Edit, save, load and merge on a tiny model of a family.

    Raises:
        AssertionError: something else than a refusal goes wrong.
    """
    # Frozen, as an adapter leaves it: a weight that requires a gradient makes PyTorch multiply inputs that are not
    # contiguous by another kernel, also under no_grad, and on some processors the two round differently.
    model = tiny_model(family).requires_grad_(False)
    layers, partly = None, ""
    with contextlib.suppress(ValueError):
        blocks = decoder_blocks(model)
        layers = [i for i in blocks if has_mlp(model, i)]
        if 0 < len(layers) < len(blocks):
            partly = ", in the blocks that have an MLP"
    base, results, merge = logits(model), {}, "-"
    sea = SEAConfig(rescale="none", init_weights=False, layers_to_transform=layers if partly else None)
    for name, config in (
        ("mlp", sea),
        ("block", SEAConfig(site="block", init_weights=False)),
        ("hpr", HPRConfig(init_weights=False, gate=1.0)),
    ):
        try:
            loaded, expected = check_edit(model, config, base)
        except ValueError as error:
            results[name] = reason(error)
            continue
        results[name] = "yes"
        if config is sea:
            results[name] += partly
            merge = try_merge(loaded, expected)
    saved = "yes" if any(result.startswith("yes") for result in results.values()) else "-"
    return Row(**results, merge=merge, saved=saved)


def has_mlp(model: nn.Module, layer: int) -> bool:
    try:
        return bool(find_sites(model, "mlp", layers=layer))
    except ValueError:
        return False


def edited(model: nn.Module, config: PeftConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()


def check_edit(model: nn.Module, config: PeftConfig, base: Tensor) -> tuple[PeftModel, Tensor]:
    """The edited model as it is loaded, and its logits.

    Args:
        base: the logits of the model without an edit.
    """
    adapted = edited(model, config)
    expected = logits(adapted)
    assert expected.isfinite().all() and (expected - base).norm() > 1e-3 * base.norm(), "the edit does not show"
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert torch.equal(logits(loaded), expected), "the loaded adapter edits otherwise"
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base), "the base model is changed"
    assert torch.equal(logits(adapted.unload()), base), "something stays of the adapter"
    return loaded, expected


def try_merge(adapted: PeftModel, expected: Tensor) -> str:
    try:
        merged = logits(adapted.merge_and_unload())
    except ValueError as error:
        return reason(error)
    assert (merged - expected).norm() < 1e-4 * expected.norm(), "merging changes the logits"
    return "yes"


def reason(error: ValueError) -> str:
    """What is wrong by a message, without the remedy and the names of this model's modules."""
    text = re.split(r": pass |: choose |; ", str(error).splitlines()[0])[0]
    text = re.sub(r"^adapter 'default' cannot be merged: ", "", text)
    text = re.sub(r"[\w.]+\.\d+(\.[\w.]+)?", "a module", text)
    text = re.sub(r" \(\w+Error: .*\)$", "", text)
    text = re.sub(r" of width \d+, the module gives .*", "", text)
    text = re.sub(r" of layers \[.*?\]", "", text)
    return re.sub(r" of \w+(For|With|LMHead)\w+| \(\d+ layers,.*\)", "", text)


def table(rows: dict[str, Row]) -> str:
    """Markdown: one line for the families with the same results, most families first."""
    groups = defaultdict(list)
    for family, row in rows.items():
        groups[row].append(family)
    lines = [
        "| families | SEA at the MLP | SEA at the block | HPR | SEA merges | saved and loaded |",
        "|---|---|---|---|---|---|",
    ]
    for row, families in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append("| " + " | ".join((", ".join(families), *astuple(row))) + " |")
    return "\n".join(lines)


def page(rows: dict[str, Row], version: str) -> str:
    """The text of examples/architectures.md.

    Args:
        rows: each family to what was found.
        version: of Transformers.
    """
    not_tried = "\n".join(f"- {family}: {why}" for family, why in NOT_TRIED.items())
    return PAGE.format(version=version, table=table(rows), not_tried=not_tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="try these only; default: all")
    parser.add_argument("--write", action="store_true", help="write the page instead of printing the table")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"not among the families: {', '.join(sorted(unknown))}; choose of {', '.join(FAMILIES)}")
    if arguments.write and arguments.families:
        parser.error("the page shows every family: leave out their names, or --write")

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = tqdm(arguments.families or FAMILIES, unit="family", leave=False)
    rows = {family: try_family(family) for family in families}
    if arguments.write:
        path = Path(__file__).with_suffix(".md")
        path.write_text(page(rows, ".".join(transformers.__version__.split(".")[:2])), encoding="utf-8")
        print(f"Page: {path}")
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
