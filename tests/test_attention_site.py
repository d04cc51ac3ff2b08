"""The site "attention": the input of the attention's output projection, found, collected and named in errors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_collect import QUESTIONS, TOKENIZER, contrast
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, JetMoeConfig, MambaConfig, Qwen3NextConfig

from peft_edit import ActivationStore, ITIConfig, MeanDifferenceConfig, SEAConfig, collect_activations
from peft_edit.models.heads import attention_heads
from peft_edit.models.sites import find_sites, site_width


PROJECTIONS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
    "gemma": "model.layers.{}.self_attn.o_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "falcon": "transformer.h.{}.self_attention.dense",
}
every_family = pytest.mark.parametrize("family", FAMILIES)
# Heads that are wider than the model's width over their number.
WIDE = {"head_dim": 16}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def names(family):
    return {i: PROJECTIONS[family].format(i) for i in range(3)}


def inputs_of(model, module, ids):
    """What a module takes for one sequence, (s, d)."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)


@every_family
def test_it_is_found_whatever_adapters_are_there(family):
    model = tiny_model(family)
    assert find_sites(model, "attention") == names(family)
    assert find_sites(model, "attention", layers=[2, 0]) == {i: names(family)[i] for i in (0, 2)}
    lora = LoraConfig(target_modules=[PROJECTIONS[family].split(".")[-1]])
    assert find_sites(get_peft_model(tiny_model(family), lora), "attention") == names(family)
    for config in (
        ITIConfig(),
        SEAConfig(site="block"),
        MeanDifferenceConfig(target_modules=list(names(family).values())),
    ):
        assert find_sites(get_peft_model(tiny_model(family), config), "attention") == names(family)


@every_family
def test_targets_of_an_adapter_are_these_modules(family):
    model = get_peft_model(tiny_model(family), ITIConfig())
    assert set(model.base_model.targeted_module_names) == set(names(family).values())


@every_family
def test_its_width_is_that_of_the_heads(family):
    model = tiny_model(family)
    module = model.get_submodule(names(family)[0])
    assert site_width(model, module, of_input=True) == 32 and attention_heads(model, 32) == (4, 8)


def test_heads_are_as_wide_as_the_configuration_says():
    model = tiny_model("llama", **WIDE)
    module = model.get_submodule(names("llama")[0])
    assert site_width(model, module, of_input=True) == 64 and attention_heads(model, 64) == (4, 16)
    with pytest.raises(ValueError, match=r"puts out 48 features, 4 heads of 16 have 64: .* cannot be told apart"):
        attention_heads(model, 48)


def test_configurations_that_say_of_no_heads_are_named(monkeypatch):
    model = tiny_model()
    model.config.num_attention_heads = 0
    with pytest.raises(ValueError, match=r"^the configuration of LlamaForCausalLM has no number of attention heads"):
        attention_heads(model, 32)
    model = tiny_model()

    def by_layer(self):
        raise RuntimeError("'head_dim' is a per-layer attribute")  # as in Gemma 4

    monkeypatch.setattr(type(model.config), "head_dim", property(by_layer), raising=False)
    del model.config.__dict__["head_dim"]
    with pytest.raises(ValueError, match=r"^LlamaConfig has a head_dim of its own for each layer") as error:
        attention_heads(model, 32)
    assert "\n" not in str(error.value)


@every_family
@pytest.mark.parametrize("tokens", ["last", "answer"])
def test_rows_are_those_of_single_forward_passes(tmp_path, family, tokens):
    model = tiny_model(family)
    store = collect_activations(
        model, TOKENIZER, contrast(), tmp_path, site="attention", tokens=tokens, neutral=None, prompt_format="plain"
    )
    assert store.site == "attention" and store.modules == names(family) and store.hidden_size == 32
    if tokens == "last":
        for i, (prompt, positives, negatives, _) in enumerate(QUESTIONS):
            for sign, answers in (("positive", positives), ("negative", negatives)):
                for layer in range(3):
                    expected = inputs_of(model, names(family)[layer], prompt + answers[0])[-1]
                    torch.testing.assert_close(getattr(store, sign)(layer)[i], expected, rtol=1e-4, atol=1e-5)
    else:
        assert store.answer_tokens(0).any()


def test_wide_heads_are_collected_and_not_with_other_sites(tmp_path):
    model = tiny_model("llama", **WIDE)
    options = {"neutral": None, "prompt_format": "plain"}
    store = collect_activations(model, TOKENIZER, contrast(), tmp_path / "a", site="attention", **options)
    prompt, positives, _, _ = QUESTIONS[1]
    expected = inputs_of(model, names("llama")[2], prompt + positives[0])[-1]
    assert store.hidden_size == 64
    torch.testing.assert_close(store.positive(2)[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^the sites attention, block are of different widths, \[32, 64\]: collect"):
        collect_activations(model, TOKENIZER, contrast(), tmp_path / "b", site=("attention", "block"), **options)
    assert not (tmp_path / "b").exists()


def test_several_sites_in_one_pass_and_another_site_is_another_store(tmp_path):
    model, options = tiny_model(), {"neutral": None, "prompt_format": "plain"}
    both = collect_activations(model, TOKENIZER, contrast(), tmp_path / "both", site=("block", "attention"), **options)
    one = collect_activations(model, TOKENIZER, contrast(), tmp_path / "one", site="attention", **options)
    assert torch.equal(both.at("attention").positive(1), one.positive(1))
    assert not torch.equal(both.positive(1), one.positive(1))
    with pytest.raises(ValueError, match="site"):
        collect_activations(model, TOKENIZER, contrast(), tmp_path / "one", site="block", **options)
    assert ActivationStore(tmp_path / "one").sites == ["attention"]


@pytest.mark.parametrize("around", [False, True], ids=["alone", "LoRA around it"])
def test_with_an_active_edit_rows_are_what_the_edit_receives(tmp_path, around):
    """Also a second time, as the edit of the block before changes them."""
    model, site = tiny_model(), names("llama")
    model.add_adapter(ITIConfig(init_weights=False, layers_to_transform=[0, 1]), "edit")
    if around:
        model.add_adapter(LoraConfig(target_modules=["o_proj"]), "lora")
        model.set_adapter(["edit", "lora"])
    options = {"site": "attention", "neutral": None, "prompt_format": "plain"}
    edited = collect_activations(model, TOKENIZER, contrast(), tmp_path / "edited", **options)
    plain = collect_activations(tiny_model(), TOKENIZER, contrast(), tmp_path / "plain", **options)
    torch.testing.assert_close(edited.positive(0), plain.positive(0))
    assert not torch.allclose(edited.positive(1), plain.positive(1), atol=1e-2)
    assert edited.modules == site


def no_projection(config_cls, **fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    return AutoModelForCausalLM.from_config(config_cls(**sizes, **fields)).eval()


HYBRID = {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "layer_types": ["linear_attention", "full_attention"],
}
JETMOE = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "make, layers",
    [
        (lambda: no_projection(MambaConfig, state_size=4, expand=1), [0, 1]),
        (lambda: no_projection(JetMoeConfig, **JETMOE), [0, 1]),  # experts put out the heads
        (lambda: no_projection(Qwen3NextConfig, **HYBRID), [0]),
    ],
    ids=["mamba", "jetmoe", "linear attention"],
)
def test_blocks_without_such_a_projection_are_named(make, layers, tmp_path):
    model = make()
    match = rf"^no module of layers {layers} projects the heads of their attention: pass layers_to_transform".replace(
        "[", r"\["
    )
    for call in (
        lambda: find_sites(model, "attention"),
        lambda: get_peft_model(model, ITIConfig()),
        lambda: collect_activations(model, TOKENIZER, contrast(), tmp_path / "out", site="attention", neutral=None),
    ):
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    if layers == [0]:
        assert find_sites(model, "attention", layers=1) == {1: "model.layers.1.self_attn.o_proj"}


def test_methods_that_edit_outputs_do_not_take_it():
    for config in (SEAConfig, MeanDifferenceConfig):
        with pytest.raises(ValueError, match="site must be one of 'mlp', 'block', got 'attention'"):
            config(site="attention")


def test_an_input_that_is_given_by_name_is_refused(tmp_path):
    """A hook on the module's arguments does not see it."""
    model = tiny_model()
    o_proj = type(model.model.layers[0].self_attn.o_proj)

    class Named(o_proj):
        def __call__(self, x):
            return super().__call__(input=x)

    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Named
    expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(ValueError, match=r"o_proj takes NoneType for input of shape .*, not one activation for each"):
        collect_activations(model, TOKENIZER, contrast(), tmp_path, site="attention", neutral=None)
    edited = get_peft_model(model, ITIConfig(init_weights=False))
    match = r"^the edit at .*o_proj needs one tensor of width 32, the module takes NoneType: choose another site"
    with pytest.raises(ValueError, match=match):
        edited(input_ids=torch.tensor([[5, 6, 7]]))
    with edited.disable_adapter():
        assert torch.equal(edited(input_ids=torch.tensor([[5, 6, 7]])).logits, expected)
