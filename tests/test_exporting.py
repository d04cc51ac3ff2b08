"""A SEA edit as a LoRA adapter: M W = W + B A."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, SIZES, logits, token_ids, vivid_model
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_edit import HPRConfig, SEAConfig, edit_strength, sea_to_lora
from peft_edit.tuners.sea import SEALayer


D = 32
RANKS = [(3, 5), (2, 2), (6, 1)]
SITE = "model.layers.{}.mlp.down_proj"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rows(count, generator):
    return torch.linalg.qr(torch.randn(D, count, dtype=torch.float64, generator=generator))[0].T


def fitted(family="llama", dtype=torch.float32, ranks=RANKS, shared=0, name="default", **options):
    """A model whose SEA adapter has random factors, `shared` of their directions in both."""
    model = get_peft_model(vivid_model(family, dtype), SEAConfig(**{"rescale": "none", **options}), adapter_name=name)
    return set_random(model, name, ranks, shared)


def set_random(model, name, ranks=RANKS, shared=0):
    config, generator = model.peft_config[name], torch.Generator().manual_seed(0)
    layers = [m for m in model.modules() if isinstance(m, SEALayer)]
    for i, layer in enumerate(layers):
        k_positive, k_negative = ranks[i]
        both = rows(k_positive + k_negative, generator)
        positive, negative = both[:k_positive], both[k_positive - shared :][:k_negative]
        layer.set_factors(name, positive.float(), negative.float())
        config.rank_pattern[layer.site] = [k_positive, k_negative]
        config.fit_statistics[layer.site] = {
            "rms": 1.0,
            "mean_rescale": 1.25,
            "relative_error": 0.1,
            "unscaled_error": 0.2 + 0.1 * i,
            "strength": config.strength,
        }
    return model


def lora_of(folder, family="llama", dtype=torch.float32):
    return PeftModel.from_pretrained(vivid_model(family, dtype), folder)


def quietly(*args, **kwargs):
    with pytest.warns(UserWarning):
        return sea_to_lora(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"projections": "exchanged", "strength": 0.7}, {"projections": "negative", "strength": 1.5}]
)
@pytest.mark.filterwarnings("ignore:the edited layers have a bias")
def test_equals_the_edited_model(family, options, tmp_path):
    model = fitted(family, **options)
    sea_to_lora(model, tmp_path / "lora")
    with model.disable_adapter():
        base = logits(model)
    assert (logits(model) - base).abs().max() > 0.05
    torch.testing.assert_close(logits(lora_of(tmp_path / "lora", family)), logits(model), rtol=0, atol=1e-5)
    merged = lora_of(tmp_path / "lora", family).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


IN_A_FRESH_PROCESS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("lora")
assert type(model.active_peft_config).__name__ == "LoraConfig"
expected = torch.load("expected.pt")
with torch.no_grad():
    difference = (model(input_ids=torch.load("ids.pt")).logits - expected).abs().max()
assert "peft_edit" not in sys.modules and not any(name.startswith("peft_edit") for name in sys.modules)
print(f"DIFFERENCE {float(difference):.3g}")
"""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:the edited layers have a bias")
def test_peft_alone_loads_it_in_a_fresh_process(family, tmp_path):
    vivid_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = set_random(get_peft_model(base, SEAConfig(rescale="none")), "default")
    sea_to_lora(model, tmp_path / "lora")
    torch.save(logits(model), tmp_path / "expected.pt")
    torch.save(token_ids(), tmp_path / "ids.pt")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert float(re.search("DIFFERENCE (.*)", result.stdout)[1]) < 1e-5


def test_every_layer_has_the_rank_of_the_largest_and_a_scaling_of_one(tmp_path):
    export = sea_to_lora(fitted(), tmp_path)
    assert [site.exact_rank for site in export.sites] == [8, 4, 7] and export.rank == 8 and export.notes == []
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["down_proj"] and config["layers_to_transform"] is None
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config["lora_bias"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"base_model.model.{SITE.format(i)}.lora_{ab}.weight" for i in range(3) for ab in ("A", "B")
    }
    assert {tuple(t.shape) for name, t in tensors.items() if "lora_A" in name} == {(8, 48)}
    for i, rank in enumerate((8, 4, 7)):
        b = tensors[f"base_model.model.{SITE.format(i)}.lora_B.weight"]
        assert b[:, rank:].count_nonzero() == 0 and b[:, :rank].any(dim=0).all()
    assert json.loads((tmp_path / "sea_to_lora.json").read_text()) == export.to_dict()


def test_shared_directions_take_no_rank(tmp_path):
    model = fitted(ranks=[(3, 5)] * 3, shared=2)
    export = sea_to_lora(model, tmp_path)
    assert [(site.factor_rank, site.exact_rank) for site in export.sites] == [(8, 4)] * 3
    torch.testing.assert_close(logits(lora_of(tmp_path)), logits(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the edited layers have a bias")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_edit_are_named(family, tmp_path):
    model = fitted(family, layers_to_transform=[0, 2])
    sea_to_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = {"gpt2": "mlp.c_proj", "opt": "fc2", "falcon": "dense_4h_to_h"}.get(family, "down_proj")
    assert config["target_modules"] == [name] and config["layers_to_transform"] == [0, 2]
    torch.testing.assert_close(logits(lora_of(tmp_path, family)), logits(model), rtol=0, atol=1e-5)


def test_a_layer_whose_directions_all_cancel_is_not_named(tmp_path):
    model = fitted(ranks=[(3, 3), (2, 2), (1, 1)], shared=0)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.set_factors("default", layer.sea_positive["default"].weight, layer.sea_positive["default"].weight.flip(0))
    assert len(sea_to_lora(model, tmp_path).sites) == 2
    torch.testing.assert_close(logits(lora_of(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_truncation_states_its_error(tmp_path):
    model = fitted("gpt2")
    with pytest.warns(UserWarning) as caught:
        export = sea_to_lora(model, tmp_path / "cut", rank=2)
    assert [str(w.message) for w in caught if "rank" in str(w.message) or "bias" in str(w.message)] == export.notes
    assert export.rank == 2 and [site.rank for site in export.sites] == [2, 2, 2]
    quietly(model, tmp_path / "whole")
    exact = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    cut = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    for site in export.sites:
        name = f"base_model.model.{site.site}"
        whole, part = (t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] for t in (exact, cut))
        error = float((part - whole).norm() / whole.norm())
        assert 0 < error < 1 and site.truncation_error == pytest.approx(error, rel=1e-4)
        torch.testing.assert_close(cut[f"{name}.lora_B.bias"], exact[f"{name}.lora_B.bias"])  # biases stay exact
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"{max(s.truncation_error for s in export.sites):.3g} at transformer.h." in card
    assert quietly(model, tmp_path / "more", rank=50).rank == 8
    assert all(site.truncation_error == 0 for site in quietly(model, tmp_path / "more", rank=8).sites)


@pytest.mark.parametrize(
    ("rescale", "strength", "errors"), [("token", 1.0, (0.2, 0.3, 0.4)), ("mean", 1.0, (0.2,) * 3)]
)
def test_the_rescaling_that_is_left_out_is_stated(tmp_path, rescale, strength, errors):
    model = fitted(rescale=rescale, strength=strength)
    with pytest.warns(UserWarning, match=rf"rescale='{rescale}': relative error .* rescale='none' exports exactly"):
        export = sea_to_lora(model, tmp_path)
    assert tuple(site.rescale_error for site in export.sites) == pytest.approx(errors)
    assert f"{max(errors):.3g} at model.layers." in (tmp_path / "README.md").read_text()
    torch.testing.assert_close(logits(lora_of(tmp_path)), logits(fitted()), rtol=0, atol=1e-5)


def test_half_precision_weights(tmp_path):
    model = fitted(dtype=torch.bfloat16)
    sea_to_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    reference = logits(fitted()).float()
    assert (logits(lora_of(tmp_path, dtype=torch.bfloat16)).float() - reference).norm() < 0.05 * reference.norm()


def test_offloaded_weights(tmp_path):
    model = cpu_offload(fitted(), execution_device=torch.device("cpu"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer.weight.is_meta and layer.sea_positive["default"].weight.is_meta
    sea_to_lora(model, tmp_path)
    assert layer.weight.is_meta and layer.sea_positive["default"].weight.is_meta
    torch.testing.assert_close(logits(lora_of(tmp_path)), logits(fitted()), rtol=0, atol=1e-5)


def test_the_named_adapter_is_exported(tmp_path):
    model = fitted(name="first")
    model.add_adapter("second", SEAConfig(rescale="none"))
    set_random(model, "second", [(1, 1)] * 3)
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="pass adapter_name"):
        sea_to_lora(model, tmp_path)
    assert sea_to_lora(model, tmp_path, adapter_name="second").rank == 2
    model.set_adapter("second")
    torch.testing.assert_close(logits(lora_of(tmp_path)), logits(model), rtol=0, atol=1e-5)


def block_model():
    return fitted(site="block", target_modules=r"model\.layers\.\d+")


def hpr_model():
    return get_peft_model(vivid_model(), HPRConfig())


def mixture():
    config = MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    return get_peft_model(AutoModelForCausalLM.from_config(config), SEAConfig(init_weights=False, rescale="none"))


def merged_model():
    model = fitted()
    model.merge_adapter()
    return model


def around_lora():
    lora = LoraConfig(target_modules=["down_proj"])
    model = get_peft_model(get_peft_model(vivid_model(), lora).get_base_model(), SEAConfig(rescale="none"), "sea")
    return set_random(model, "sea")


def structure():
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(vivid_model().config)
    return set_random(get_peft_model(bare, SEAConfig(rescale="none")), "default")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hpr_model, "^only SEA adapters .* got one of HPR: it rotates each token by an angle of its own"),
        (lambda: get_peft_model(vivid_model(), LoraConfig()), "^only SEA adapters .* got one of LORA$"),
        (lambda: fitted(feature_map="tanh"), "feature map 'tanh' is not linear; fit with feature_map=None"),
        (lambda: fitted(rescale="average"), "rescale='average' halves activations"),
        (lambda: fitted(projections="positive"), "projections='positive' removes all but"),
        (lambda: fitted(modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\] are no part of a LoRA"),
        (block_model, "it edits the outputs of decoder blocks"),
        (mixture, "^cannot export as LoRA: .* edits the output of model.layers.0.mlp, which is no linear layer"),
        (merged_model, "merged: call unmerge_adapter"),
        (around_lora, "^cannot export as LoRA: .*another adapter, Linear, lies between"),
        (structure, r"the weights of model\.layers\.0\.mlp\.down_proj are not loaded"),
        (lambda: get_peft_model(vivid_model(), SEAConfig()), "edits nothing.*fit it, or set"),
        (lambda: fitted(strength=0), "edits nothing"),
    ],
)
def test_what_cannot_be_exported(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sea_to_lora(make(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_rank_must_be_a_number_of_directions(rank, tmp_path):
    with pytest.raises(ValueError, match=r"^rank must be an integer of at least 1, or None for the exact one, got "):
        sea_to_lora(fitted(), tmp_path / "lora", rank=rank)


def test_not_inside_edit_strength(tmp_path):
    model = fitted()
    with edit_strength(model, 0.5), pytest.raises(ValueError, match="inside edit_strength"):
        sea_to_lora(model, tmp_path / "lora")


def test_folders_of_others_are_left_alone(tmp_path):
    model = fitted()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else than an adapter"):
        sea_to_lora(model, tmp_path / "notes")
    get_peft_model(vivid_model(), LoraConfig()).save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="holds a LoRA adapter that is not an export of SEA"):
        sea_to_lora(model, tmp_path / "trained")
    model.save_pretrained(tmp_path / "sea")
    with pytest.raises(ValueError, match="adapter of another method"):
        sea_to_lora(model, tmp_path / "sea")


def test_exporting_again_replaces_the_export_and_keeps_the_users_card(tmp_path):
    model = fitted()
    sea_to_lora(model, tmp_path)
    assert "truncated" not in (tmp_path / "README.md").read_text()
    quietly(model, tmp_path, rank=1)
    assert "truncated to rank 1" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    sea_to_lora(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "sea_to_lora.json",
    }
