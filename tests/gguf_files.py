"""A tiny Llama as a GGUF file, with a tokenizer of bytes, as llama.cpp would write it."""

import gguf
import torch
from tiny import tiny_model
from transformers.convert_slow_tokenizer import bytes_to_unicode


TOKENS = [*bytes_to_unicode().values(), "he", "<s>", "</s>"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def byte_llama(**changes):
    """The model that the file holds. Its MLPs are wider than usual here, as blocks of Q8_0 have 32 values."""
    sizes = {"vocab_size": len(TOKENS), "intermediate_size": 64, "max_position_embeddings": 512}
    return tiny_model("llama", **sizes, **changes)


def write_gguf(path, model, quantised=False):
    """Write a model from `byte_llama`, its matrices in 8 bits where that is asked for."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    for name, tensor in model.state_dict().items():
        values = _permuted(name, tensor, config).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and tensor.dim() == 2 else None
        values = values if kind is None else gguf.quantize(values, kind)
        writer.add_tensor(_name(name), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name):
    """`model.layers.0.mlp.down_proj.weight` -> `blk.0.ffn_down.weight`."""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{block}{NAMES['.'.join(parts[2:] if block else parts)]}.weight"


def _permuted(name, tensor, config):
    """llama.cpp keeps the halves of rotary embeddings interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor.contiguous()
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


@torch.no_grad()
def gguf_folder(folder, quantised=False, **changes):
    """A folder with `tiny.gguf`; returns the model that is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = byte_llama(**changes)
    write_gguf(folder / "tiny.gguf", model, quantised)
    return model
