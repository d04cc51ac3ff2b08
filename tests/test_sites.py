"""Where models are edited, found by structure; the fingerprint of a model."""

import copy
import re
import time

import pytest
import torch
from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, get_peft_model
from tiny import FAMILIES, GROUPED, tiny_model, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen2MoeConfig,
    XLMConfig,
)

from peft_edit import HPRConfig, SEAConfig, fingerprint
from peft_edit.models.sites import decoder_blocks, describe_sites, find_sites, layer_index, unwrap
from peft_edit.tuners.sea import SEALayer


SITES = ("mlp", "block")
BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "qwen3": "model.layers",
    "gemma": "model.layers",
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
}
MLP = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "qwen3": "mlp.down_proj",
    "gemma": "mlp.down_proj",
    "opt": "fc2",
    "falcon": "mlp.dense_4h_to_h",
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_site = pytest.mark.parametrize("site", SITES)


def expected_sites(family, site, layers=range(3)):
    tail = f".{MLP[family]}" if site == "mlp" else ""
    return {i: f"{BLOCKS[family]}.{i}{tail}" for i in layers}


def mixture(config_cls, **fields):
    torch.manual_seed(0)
    sizes = {"num_experts_per_tok": 2, "initializer_range": 0.2, **GROUPED}
    return AutoModelForCausalLM.from_config(config_cls(**sizes, **fields)).eval()


def mixtral():
    return mixture(MixtralConfig, num_local_experts=4)


def qwen2_moe(**fields):
    return mixture(
        Qwen2MoeConfig, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, **fields
    )


def llava():
    """As deep a vision tower as the text model."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(**GROUPED, initializer_range=0.2),
        image_token_index=63,
    )
    return LlavaForConditionalGeneration(config).eval()


def edited_sites(model):
    return {layer_index(layer.site): layer.site for layer in model.modules() if isinstance(layer, SEALayer)}


# Finding sites


@every_family
@every_site
def test_sites_of_every_family(family, site):
    model = tiny_model(family)
    assert find_sites(model, site) == expected_sites(family, site)
    assert decoder_blocks(model) == expected_sites(family, "block")
    for name in find_sites(model, site).values():
        assert isinstance(model.get_submodule(name), nn.Module)


@every_family
@every_site
def test_adapters_do_not_move_the_sites(family, site):
    expected = expected_sites(family, site)
    last = MLP[family].split(".")[-1]
    lora = LoraConfig(target_modules=[last])
    assert find_sites(get_peft_model(tiny_model(family), lora), site) == expected
    model = tiny_model(family)
    model.add_adapter(lora, "lora")
    for of in SITES:
        model.add_adapter(SEAConfig(site=of), of)
        assert find_sites(model, site) == expected
    assert find_sites(get_peft_model(tiny_model(family), SEAConfig(site=site)), site) == expected


@pytest.mark.parametrize(
    "make, mlp",
    [
        (mixtral, ["mlp"] * 3),
        (qwen2_moe, ["mlp"] * 3),
        (lambda: qwen2_moe(mlp_only_layers=[1]), ["mlp", "mlp.down_proj", "mlp"]),
    ],
    ids=["mixtral", "qwen2_moe", "qwen2_moe with a dense layer"],
)
@every_site
def test_mixtures_of_experts(make, mlp, site, tmp_path):
    """The site is the whole mixture, not one expert of it; it edits, saves and loads."""
    expected = {i: f"model.layers.{i}" + (f".{tail}" if site == "mlp" else "") for i, tail in enumerate(mlp)}
    model = make()
    assert find_sites(model, site) == expected
    with torch.no_grad():
        base = model(token_ids()).logits
        model = get_peft_model(model, SEAConfig(site=site, init_weights=False)).eval()
        assert edited_sites(model) == expected
        logits = model(input_ids=token_ids()).logits
        assert (logits - base).norm() > 1e-3 * base.norm()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path)
        assert edited_sites(again) == expected
        assert torch.equal(again(input_ids=token_ids()).logits, logits)
        native = make()
        native.load_adapter(tmp_path)
        assert torch.equal(native(token_ids()).logits, logits)
        assert torch.equal(model.unload()(token_ids()).logits, base)


@every_site
def test_vision_towers_are_left_alone(site):
    model = llava()
    tail = ".mlp.down_proj" if site == "mlp" else ""
    expected = {i: f"model.language_model.layers.{i}{tail}" for i in range(3)}
    assert find_sites(model, site) == expected
    with torch.no_grad():
        base = model(input_ids=token_ids()).logits
        for layers in (None, [1]):
            adapted = get_peft_model(llava(), SEAConfig(site=site, init_weights=False, layers_to_transform=layers))
            assert edited_sites(adapted) == {i: expected[i] for i in layers or range(3)}
            assert (adapted(input_ids=token_ids()).logits - base).norm() > 1e-3 * base.norm()


class WithOtherLinear(nn.Module):
    """A decoder block whose last wide linear layer is not the MLP's, as in Gemma 4."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Linear(32, 32)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(32, 48), "down_proj": nn.Linear(48, 32)})
        self.per_layer_projection = nn.Linear(8, 32)


class ExpertsInAttention(nn.Module):
    """A decoder block with experts in its attention too, as in JetMoe."""

    def __init__(self):
        super().__init__()
        self.self_attention = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(32, 32)])})
        self.mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(32, 32)])})


class Attention(nn.Module):
    """Attention by the name of its class alone, as in Nemotron-H."""

    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(32, 32)


class OnlyAttention(nn.Module):
    """A decoder block without an MLP."""

    def __init__(self):
        super().__init__()
        self.mixer = Attention()


class LastByName(nn.Module):
    """A decoder block with a language adapter and attention behind the MLP, as in X-MOD."""

    def __init__(self):
        super().__init__()
        self.output = nn.ModuleDict({"dense": nn.Linear(48, 32), "adapter": nn.Linear(8, 32)})
        self.mixer = Attention()


@pytest.mark.parametrize(
    "block, expected",
    [(WithOtherLinear, "mlp.down_proj"), (ExpertsInAttention, "mlp"), (LastByName, "output.dense")],
)
def test_other_modules_are_not_taken_for_the_mlp(llama, block, expected):
    for i in range(3):
        llama.model.layers[i] = block()
    assert find_sites(llama, "mlp") == {i: f"model.layers.{i}.{expected}" for i in range(3)}


class MixtureBesideMLP(nn.Module):
    """A decoder block that adds the outputs of a mixture of experts and of an MLP, as in Granite's hybrids."""

    def __init__(self):
        super().__init__()
        self.moe = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(32, 32)])})
        self.shared_mlp = nn.Linear(32, 32)


@pytest.mark.parametrize("block", [MixtureBesideMLP, OnlyAttention])
def test_half_of_an_mlp_is_not_taken_for_the_whole(llama, block):
    llama.model.layers[1] = block()
    with pytest.raises(ValueError, match=r"no module of layers \[1\] gives the output of their MLP"):
        find_sites(llama, "mlp")


def test_blocks_of_another_number_than_configured(llama):
    """LongCat counts two layers a block."""
    llama.config.num_hidden_layers = 6
    assert find_sites(llama, "block") == expected_sites("llama", "block")


@every_family
@every_site
@pytest.mark.parametrize("layers", [1, [2, 0], range(1, 3)])
def test_subsets_of_layers(family, site, layers):
    expected = expected_sites(family, site, [1] if layers == 1 else sorted(layers))
    assert find_sites(tiny_model(family), site, layers=layers) == expected
    config = SEAConfig(site=site, layers_to_transform=layers)
    assert edited_sites(get_peft_model(tiny_model(family), config)) == expected


@every_family
@every_site
def test_chosen_modules(family, site):
    names = expected_sites(family, site)
    last = MLP[family].split(".")[-1]
    choices = [list(names.values()), "|".join(map(re.escape, names.values())), describe_sites(names.values())]
    if site == "mlp":
        choices += [[last], {MLP[family]}, rf".*\.{last}" if family != "gpt2" else rf".*mlp\.{last}"]
        if family == "gpt2":
            choices.remove([last])  # the attention has a c_proj too
    for target_modules in choices:
        model = tiny_model(family)
        assert find_sites(model, site, target_modules=target_modules) == names
        one = {1: names[1]}
        assert find_sites(model, site, target_modules=target_modules, layers=[1]) == one
        config = SEAConfig(site=site, target_modules=target_modules, layers_to_transform=[1])
        assert edited_sites(get_peft_model(model, config)) == one


def test_excluded_modules(llama):
    expected = {i: name for i, name in expected_sites("llama", "mlp").items() if i != 1}
    for excluded in (["model.layers.1.mlp.down_proj"], r".*layers\.1\..*"):
        assert find_sites(llama, "mlp", target_modules=["down_proj"], exclude_modules=excluded) == expected
        assert edited_sites(get_peft_model(tiny_model(), SEAConfig(exclude_modules=excluded))) == expected


@every_family
@every_site
def test_default_targets_are_short_where_that_is_exact(family, site):
    model = get_peft_model(tiny_model(family), SEAConfig(site=site))
    targets = model.peft_config["default"].target_modules
    if site == "block":
        assert targets == rf"{re.escape(BLOCKS[family])}\.(0|1|2)"
    else:
        assert targets == ({"mlp.c_proj"} if family == "gpt2" else {MLP[family].split(".")[-1]})


def test_described_sites_match_exactly_these():
    names = ["a.layers.0.mlp", "a.layers.2.mlp", "a.layers.1.mlp.down_proj", "a.layers.10.mlp"]
    pattern = describe_sites(names)
    others = ["a.layers.1.mlp", "b.a.layers.0.mlp", "a.layers.0.mlp.down_proj", "a.layers.0xmlp", "a.layers.00.mlp"]
    assert all(re.fullmatch(pattern, name) for name in names)
    assert not any(re.fullmatch(pattern, name) for name in others)


# Errors


def one_line(error):
    return "\n" not in str(error.value)


@every_site
@pytest.mark.parametrize("layers", [3, [0, 7], range(2, 4)])
def test_layers_that_the_model_does_not_have(llama, site, layers):
    highest = layers if isinstance(layers, int) else max(layers)
    match = f"^LlamaForCausalLM has layers 0 to 2, got {highest}: lower layers_to_transform$"
    with pytest.raises(ValueError, match=match):
        find_sites(llama, site, layers=layers)
    with pytest.raises(ValueError, match=match):
        get_peft_model(llama, SEAConfig(site=site, layers_to_transform=layers))
    with pytest.raises(ValueError, match=match):
        llama.add_adapter(SEAConfig(site=site, layers_to_transform=layers))


@pytest.mark.parametrize("target_modules", [["down"], ["absent", "wrong"], r"model\.layers\.\d+\.absent", []])
def test_nothing_matches(llama, target_modules):
    with pytest.raises(ValueError, match=r"^no module of LlamaForCausalLM matches target_modules=") as error:
        find_sites(llama, "mlp", target_modules=target_modules)
    assert one_line(error)
    with pytest.raises(ValueError, match=r"(?i)target.modules") as error:
        get_peft_model(llama, SEAConfig(target_modules=target_modules))
    assert isinstance(error.value, NoMatchingPeftModuleError) and one_line(error)


def test_nothing_left_of_the_matches(llama):
    match = r"^no module of LlamaForCausalLM matches target_modules=.'down_proj'. and layers_to_transform=.7."
    with pytest.raises(NoMatchingPeftModuleError, match=match) as error:
        get_peft_model(llama, SEAConfig(target_modules=["down_proj"], layers_to_transform=7))
    assert one_line(error)
    with pytest.raises(NoMatchingPeftModuleError, match=r"exclude_modules=.'down_proj'.: pass names as in") as error:
        get_peft_model(tiny_model(), SEAConfig(exclude_modules=["down_proj"]))
    assert one_line(error)


@pytest.mark.parametrize(
    "target_modules, match",
    [
        (["down_proj", "up_proj"], r"must match one module in each block, got .*\.down_proj and .*\.up_proj$"),
        (["lm_head"], "must match one module in each block, got lm_head outside the blocks$"),
    ],
)
def test_one_site_in_a_block(llama, target_modules, match):
    with pytest.raises(ValueError, match=match):
        find_sites(llama, "mlp", target_modules=target_modules)


@pytest.mark.parametrize("block", [nn.Identity, lambda: nn.Linear(32, 48)])
def test_no_mlp_in_a_block(llama, block):
    llama.model.layers[1] = block()
    match = (
        r"no module of layers \[1\] gives the output of their MLP: pass layers_to_transform without them, target_mod"
    )
    with pytest.raises(ValueError, match=match):
        find_sites(llama, "mlp")
    assert find_sites(llama, "mlp", layers=[0, 2]) == expected_sites("llama", "mlp", [0, 2])


@pytest.mark.parametrize(
    "model, match",
    [
        (nn.Linear(2, 2), "^Linear has no Transformers configuration: pass target_modules$"),
        (
            AutoModelForCausalLM.from_config(XLMConfig(emb_dim=32, n_layers=3, n_heads=4, n_words=64)),
            "cannot tell which modules of XLMWithLMHeadModel are .*blocks .*attentions.*: pass target_modules$",
        ),
    ],
    ids=["no configuration", "lists of layers' parts"],
)
@every_site
def test_models_without_decoder_blocks(model, match, site):
    with pytest.raises(ValueError, match=match) as error:
        find_sites(model, site)
    assert one_line(error)


# Fingerprint


@every_family
def test_fingerprint_is_that_of_the_base_model(family):
    expected = fingerprint(tiny_model(family))
    assert re.fullmatch("[0-9a-f]{16}", expected)
    last = MLP[family].split(".")[-1]
    embeddings = {"opt": "embed_tokens", "gpt2": "wte", "falcon": "word_embeddings"}.get(family, "embed_tokens")
    for config in (
        SEAConfig(init_weights=False),
        SEAConfig(site="block", init_weights=False),
        LoraConfig(target_modules=[last, embeddings], init_lora_weights=False),
        LoraConfig(target_modules=[last], modules_to_save=[embeddings]),
    ):
        model = get_peft_model(tiny_model(family), config)
        assert fingerprint(model) == expected == fingerprint(model.get_base_model())
        with model.disable_adapter():
            assert fingerprint(model) == expected
        assert fingerprint(model.unload()) == expected
    native = tiny_model(family)
    native.add_adapter(LoraConfig(target_modules=[last], init_lora_weights=False), "lora")
    native.add_adapter(SEAConfig(init_weights=False), "sea")
    assert fingerprint(native) == expected


@every_family
def test_fingerprint_ignores_the_dtype(family, tmp_path):
    model = tiny_model(family)
    model.bfloat16().save_pretrained(tmp_path)
    of_dtype = {
        dtype: fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert len(set(of_dtype.values())) == 1
    assert fingerprint(tiny_model(family).bfloat16()) == fingerprint(tiny_model(family))


@every_family
def test_fingerprint_tells_models_apart(family):
    model = tiny_model(family)
    others = [tiny_model(family, seed=1), *(tiny_model(other) for other in FAMILIES if other != family)]
    for rescale in ("none", "average"):
        config = SEAConfig(rescale=rescale, init_weights=False)
        others.append(get_peft_model(tiny_model(family), config).merge_and_unload())
    renamed = tiny_model(family)
    renamed.config.vocab_size += 1
    others.append(renamed)
    seen = [fingerprint(other) for other in (model, *others)]
    assert len(set(seen)) == len(seen)


def test_fingerprint_follows_merging():
    model = get_peft_model(tiny_model(), SEAConfig(rescale="none", init_weights=False))
    expected = fingerprint(model)
    model.merge_adapter()
    assert fingerprint(model) != expected
    model.unmerge_adapter()
    assert fingerprint(model) == expected


def test_fingerprint_of_special_models():
    for make in (mixtral, qwen2_moe, llava):
        assert fingerprint(make()) == fingerprint(make())
    assert fingerprint(get_peft_model(mixtral(), SEAConfig(init_weights=False))) == fingerprint(mixtral())
    strided = tiny_model()
    weight = strided.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous() and fingerprint(strided) == fingerprint(tiny_model())


def test_fingerprint_takes_under_a_second():
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=40, num_attention_heads=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    start = time.perf_counter()
    fingerprint(model)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"])
def test_fingerprint_notices_any_weight_of_a_block(llama, name):
    before = fingerprint(llama)
    with torch.no_grad():
        llama.get_parameter(f"model.layers.1.{name}").mul_(1.5)
    assert fingerprint(llama) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fingerprint_of_a_half_precision_checkpoint_is_that_of_any_load(llama, dtype):
    """Also for elements that are not normal numbers in float16."""
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(10 ** torch.empty_like(parameter).uniform_(-8, 0))
    checkpoint = llama.to(dtype)
    assert (
        len({fingerprint(copy.deepcopy(checkpoint).to(d)) for d in (torch.float32, torch.float16, torch.bfloat16)}) == 1
    )


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "DataParallel"])
def test_names_are_those_of_the_model_whatever_is_around_it(wrap):
    model = tiny_model()
    adapted = get_peft_model(tiny_model(), HPRConfig())
    for site in ("mlp", "block"):
        assert find_sites(wrap(model), site) == find_sites(wrap(adapted), site) == find_sites(model, site)
    assert unwrap(wrap(model)) is model and unwrap(wrap(adapted)) is adapted.get_base_model()
    assert fingerprint(wrap(model)) == fingerprint(model)
