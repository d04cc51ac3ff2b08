"""Which models are collected from and evaluated, and adapters that carry embeddings: the right thing, or one line."""

import shutil

import pytest
import torch
from conftest import ASSETS
from edits import EDITS
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from test_cli import refused
from test_cli import run as run  # a fixture
from test_collect import TOKENIZER, contrast
from tiny import GROUPED, SIZES, logits, tiny_model, vivid_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertGenerationConfig,
    BertLMHeadModel,
    CpmAntConfig,
    Gemma3TextConfig,
    LlamaConfig,
    RoFormerConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    XLMConfig,
    XLNetConfig,
)

from peft_edit import (
    SEAConfig,
    collect_activations,
    evaluate_multiple_choice,
    fingerprint,
    merge_checkpoint,
    perplexity,
    sea_to_lora,
)
from peft_edit.adapters.read import load_adapter


BERT = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
CPM = {"vocab_size": 64, "hidden_size": 32, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2}
CPM |= {"num_attention_heads": 4, "prompt_types": 4, "prompt_length": 4, "segment_types": 4}
XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    **{"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64},
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
       {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()},
}  # fmt: skip
ENCODER_DECODER, ENCODER = "is an encoder-decoder, which reads", "is an encoder, whose tokens see those that follow"
NO_HEAD, CANNOT = "has no LM head, which gives tokens their likelihoods", "cannot generate neutral answers"
# Name to what makes the model, and to why it is refused by whatever scores answers.
KINDS = {
    "T5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), ENCODER_DECODER),
    "T5's encoder": (lambda: T5EncoderModel(T5Config(**T5)), ENCODER),
    "BART": (lambda: BartForConditionalGeneration(BartConfig(**BART)), ENCODER_DECODER),
    "BART, classifying": (lambda: BartForSequenceClassification(BartConfig(**BART)), ENCODER_DECODER),
    "BERT": (lambda: AutoModelForMaskedLM.from_config(BertConfig(**BERT)), ENCODER),
    "BERT, loaded as a language model": (lambda: AutoModelForCausalLM.from_config(BertConfig(**BERT)), ENCODER),
    "RoFormer": (lambda: AutoModelForCausalLM.from_config(RoFormerConfig(**BERT)), ENCODER),
    "Gemma, both ways": (
        lambda: AutoModel.from_config(Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True)),
        ENCODER,
    ),
    "BERT generation": (lambda: AutoModelForCausalLM.from_config(BertGenerationConfig(**BERT)), ENCODER),
    "CPM-Ant": (lambda: AutoModelForCausalLM.from_config(CpmAntConfig(**CPM)), ENCODER),
    "XLNet": (lambda: AutoModelForCausalLM.from_config(XLNetConfig(**XLNET)), ENCODER),
    "headless": (lambda: AutoModel.from_config(LlamaConfig(**GROUPED)), NO_HEAD),
    "classifying": (lambda: AutoModelForSequenceClassification.from_config(LlamaConfig(**GROUPED)), NO_HEAD),
    "tagging": (lambda: AutoModelForTokenClassification.from_config(LlamaConfig(**GROUPED)), NO_HEAD),
}
WRAPPERS = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "in a PeftModel": lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "in a compiled PeftModel": lambda model: torch.compile(WRAPPERS["in a PeftModel"](model)),
}
HEADLESS = [name for name, (_, reason) in KINDS.items() if reason is NO_HEAD]


def test_a_causal_model_with_a_cache_of_its_own_is_evaluated():
    config = XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=True, asm=False)
    model, data = AutoModelForCausalLM.from_config(config), contrast()
    whole = evaluate_multiple_choice(model, TOKENIZER, data)
    assert len(whole.questions) == len(data) and perplexity(model, TOKENIZER, ["w3 w4 w5"]) > 1


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_score_answers_is_refused_at_the_entry(kind, wrapper, tmp_path):
    make, reason = KINDS[kind]
    model, data = WRAPPERS[wrapper](make()), contrast(QUESTIONS_WITHOUT_NEUTRAL, ids=[0, 1])
    calls = {
        "evaluate": lambda: evaluate_multiple_choice(model, TOKENIZER, data),
        "perplexity": lambda: perplexity(model, TOKENIZER, ["w3 w4 w5"]),
        "collect": lambda: collect_activations(model, TOKENIZER, data, tmp_path / "store"),
    }
    for name, call in calls.items():
        expected = CANNOT if name == "collect" and reason is NO_HEAD else reason
        with pytest.raises(ValueError) as caught:
            call()
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


QUESTIONS_WITHOUT_NEUTRAL = [([3, 4], [[5]], [[6]], None), ([7], [[8]], [[9, 10]], None)]


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_causal_decoder_needs_no_head_where_nothing_is_generated(kind, tmp_path):
    """Rows are those of the decoder, whatever stands on it."""
    model = KINDS[kind][0]().eval()
    store = collect_activations(model, TOKENIZER, contrast(), tmp_path / "store", neutral="text", site="block")
    whole = tiny_model("llama").eval()
    whole.model.load_state_dict((model if kind == "headless" else model.model).state_dict())
    expected = collect_activations(whole, TOKENIZER, contrast(), tmp_path / "whole", neutral="text", site="block")
    for layer in store.layers:
        torch.testing.assert_close(store.positive(layer), expected.positive(layer))


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
        lambda: BartForCausalLM(BartConfig(**BART)),
        lambda: AutoModelForCausalLM.from_config(RoFormerConfig(**BERT, is_decoder=True)),
    ],
    ids=["BERT", "BART", "RoFormer"],
)
def test_encoders_that_are_configured_as_decoders_pass(make):
    """They are causal: what follows an answer's token does not change its likelihood."""
    model = make().eval()
    assert perplexity(model, TOKENIZER, ["w3 w4 w5"]) > 0
    a, b = logits(model, torch.tensor([[3, 4, 5, 6]])), logits(model, torch.tensor([[3, 4, 5, 7]]))
    torch.testing.assert_close(a[:, :3], b[:, :3])


@pytest.mark.parametrize("kind", ["T5", "BART", "BERT", "headless", "classifying"])
def test_commands_refuse_other_kinds_by_their_files(kind, run, tmp_path):
    """BART's own configuration would load as a decoder whose encoder is left out, a classifier with a random head."""
    model = KINDS[kind][0]()
    model.save_pretrained(tmp_path / "model")
    shutil.copy(ASSETS / "model" / "tokenizer.json", tmp_path / "model")
    shutil.copy(ASSETS / "model" / "tokenizer_config.json", tmp_path / "model")
    line = refused(run, "evaluate", tmp_path / "model", ASSETS / "test.jsonl")
    if kind in HEADLESS:
        assert "has 1 tensors too few, the first is lm_head.weight, which would be random" in line
    else:
        assert f"a {model.config.model_type} model, {KINDS[kind][1].removeprefix('is ').split(',')[0]}" in line


# Token ids beyond the embeddings


@given(known=st.integers(5, 63), used=st.integers(5, 63), batch_size=st.sampled_from([1, 16]))
@settings(max_examples=15)
def test_a_token_without_an_embedding_is_named_by_its_row_everywhere(known, used, batch_size, tmp_path_factory):
    model = tiny_model("llama")
    model.resize_token_embeddings(known)
    data = contrast([([3], [[4]], [[3]], [4]), ([4], [[used]], [[3]], [4])], ids=[10, 20])
    path = tmp_path_factory.mktemp("store") / "store"
    calls = {
        "row 20": [
            lambda: evaluate_multiple_choice(model, TOKENIZER, data, batch_size=batch_size),
            lambda: collect_activations(model, TOKENIZER, data, path),
        ],
        "text 1": [lambda: perplexity(model, TOKENIZER, ["w3 w4", f"w3 w{used}"], batch_size=batch_size)],
    }
    for what, of_what in calls.items():
        for call in of_what:
            if used < known:
                call()
                continue
            with pytest.raises(
                ValueError, match=f"{what}: the tokenizer gives the id {used}, .* for {known} ids: pass"
            ):
                call()


# Adapters that carry embeddings


def with_embeddings(folder, edit="SEA at the MLP", resized=None, **options):
    """Saves a base model and a random edit of it with its embeddings, which are not the base's; returns the model."""
    vivid_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    if resized is not None:
        base.resize_token_embeddings(resized)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.5)
    torch.manual_seed(0)
    model = get_peft_model(base, EDITS[edit](task_type=TaskType.CAUSAL_LM)).eval()
    model.peft_config["default"].base_model_fingerprint = fingerprint(model)
    model.save_pretrained(folder / "adapter", **({} if resized else {"save_embedding_layers": True}))
    assert any("embed_tokens" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    return model


def base_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("resized", [None, 70])
def test_embeddings_come_with_their_adapter(edit, resized, tmp_path):
    """Also where the fingerprint is of the model with them; a base model that was not resized is told to be."""
    expected = logits(with_embeddings(tmp_path, edit, resized))
    base = base_in(tmp_path)
    if resized is not None:
        with pytest.raises(ValueError, match=r"carries embeddings of 70 ids \(.*\), the model has 64: .* resize_token"):
            load_adapter(base, str(tmp_path / "adapter"))
        base.resize_token_embeddings(resized)
    torch.testing.assert_close(logits(load_adapter(base, str(tmp_path / "adapter"))), expected)


def test_another_model_is_noticed_though_embeddings_come_with_the_adapter(tmp_path):
    with_embeddings(tmp_path)
    with pytest.raises(ValueError, match="was fitted on another model"):
        load_adapter(tiny_model("llama", seed=1), str(tmp_path / "adapter"))


@pytest.mark.parametrize("resized", [None, 70])
def test_what_takes_the_edit_alone_refuses_embeddings(resized, tmp_path, run):
    with_embeddings(tmp_path, resized=resized)
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    if resized:  # the base model as its owner would save it
        resized_base = base_in(tmp_path)
        resized_base.resize_token_embeddings(resized)
        resized_base.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / file, base)
    message = (
        r"also carries embeddings \(base_model.model.(lm_head|model.embed_tokens).weight, .*would be lost when it is "
    )
    with pytest.raises(ValueError, match=message + "merged"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    for command in ("merge", "export-lora"):
        assert "would be lost when it is" in refused(run, command, base, adapter, tmp_path / "out")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "out").exists()


def test_selecting_refuses_embeddings(tmp_path, run):
    with_embeddings(tmp_path, "HPR")
    line = refused(
        run, "select", tmp_path / "base", tmp_path / "adapter", tmp_path / "store", tmp_path / "out", "--top-k", 1
    )
    assert "would be lost when it is selected" in line


def test_the_way_round_that_is_told(tmp_path):
    """Edit and embeddings, saved apart, are merged to what both are together."""
    model = with_embeddings(tmp_path)
    expected = logits(model)
    model.save_pretrained(tmp_path / "edit", save_embedding_layers=False)
    model.unload().save_pretrained(tmp_path / "whole")
    merge_checkpoint(tmp_path / "whole", tmp_path / "edit", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_an_export_as_lora_of_a_model_with_resized_embeddings_is_refused(tmp_path):
    model = with_embeddings(tmp_path, resized=70)
    with pytest.raises(ValueError, match=r"resized from 64 to 70 ids, and an export as LoRA leaves them out: save the"):
        sea_to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["trainable_token_indices", "modules_to_save", "LoRA of embeddings"],
)
def test_adapters_of_peft_that_change_embeddings_load_and_do_not_merge_here(options, tmp_path):
    vivid_model().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base_in(tmp_path), LoraConfig(init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(base_in(tmp_path), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert perplexity(loaded, TOKENIZER, ["w3 w4 w5"]) > 0
    with pytest.raises(ValueError, match="is an adapter of another method"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_modules_to_save_that_are_embeddings_stay_part_of_an_edit(tmp_path):
    vivid_model().save_pretrained(tmp_path / "base")
    fields = {"modules_to_save": ["lm_head", "embed_tokens"], "init_weights": False, "rescale": "none"}
    model = get_peft_model(base_in(tmp_path), SEAConfig(**fields)).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(base_in(tmp_path), str(tmp_path / "adapter"), edit_only="selected")
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"holds trained modules \(lm_head, embed_tokens\)"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
