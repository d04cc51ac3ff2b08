"""A SEA edit as a LoRA adapter: M W = W + B A."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import cpu_offload
from damage import damages, one_line, write
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_cards import results
from tiny import FAMILIES, SIZES, logits, token_ids, vivid_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from peft_edit import HPRConfig, SEAConfig, edit_strength, sea_to_lora
from peft_edit.adapters import hub
from peft_edit.adapters.card import is_generated, model_card, write_card
from peft_edit.models.fingerprint import adapter_record
from peft_edit.tuners.sea import SEALayer, export_lora
from peft_edit.tuners.sea.export_lora import served_rank


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
for family in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(f"{family}/lora")
    assert type(model.active_peft_config).__name__ == "LoraConfig"
    expected = torch.load(f"{family}/expected.pt")
    with torch.no_grad():
        difference = (model(input_ids=torch.load(f"{family}/ids.pt")).logits - expected).abs().max()
    print(f"DIFFERENCE {float(difference):.3g}")
assert "peft_edit" not in sys.modules and not any(name.startswith("peft_edit") for name in sys.modules)
"""


@pytest.mark.filterwarnings("ignore:the edited layers have a bias")
def test_peft_alone_loads_it_in_a_fresh_process(tmp_path):
    families = ["llama", "gpt2"]
    for family in families:
        folder = tmp_path / family
        vivid_model(family).save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        model = set_random(get_peft_model(base, SEAConfig(rescale="none")), "default")
        sea_to_lora(model, folder / "lora")
        torch.save(logits(model), folder / "expected.pt")
        torch.save(token_ids(), folder / "ids.pt")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS, *families],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    differences = [float(difference) for difference in re.findall("DIFFERENCE (.*)", result.stdout)]
    assert len(differences) == len(families) and max(differences) < 1e-5


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


# Servers, sizes and the card


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 64, 65, 256, 257, 320, 321, 512, 513, 4096])
def test_the_next_rank_that_vllm_takes(rank):
    taken = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    served = served_rank(rank)
    assert served == min((value for value in taken if value >= rank), default=None)


def wide(features, intermediate, rank):
    """A model of one layer with an edit of this rank."""
    config = LlamaConfig(
        **{**SIZES, "hidden_size": features, "num_hidden_layers": 1}, intermediate_size=intermediate, head_dim=8
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), SEAConfig(rescale="none"))
    (layer,) = [m for m in model.modules() if isinstance(m, SEALayer)]
    basis = torch.linalg.qr(torch.randn(features, rank, generator=torch.Generator().manual_seed(0)))[0].T
    layer.set_factors("default", basis[: rank // 2], basis[rank // 2 :])
    model.peft_config["default"].rank_pattern[layer.site] = [rank // 2, rank - rank // 2]
    return model


@pytest.mark.parametrize("rank", [8, 9])
def test_a_rank_that_vllm_does_not_take_is_said(tmp_path, rank, monkeypatch):
    monkeypatch.setattr(export_lora, "SERVED_RANKS", (1, 8))  # in place of ranks up to 512, for a small model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export = sea_to_lora(wide(32, 48, rank), tmp_path)
    notes = [str(w.message) for w in caught if "vLLM" in str(w.message)]
    card = (tmp_path / "README.md").read_text()
    assert export.rank == rank and notes == export.notes
    if rank == 8:
        assert notes == [] and "vLLM takes it with `--max-lora-rank 8`." in card and export.max_lora_rank == 8
    else:
        assert notes == ["rank 9 is above 8, the highest that vLLM takes: merge the edit, or truncate with rank=8"]
        assert "vLLM takes no rank above 512, and not this adapter." in card and export.max_lora_rank is None


@pytest.mark.parametrize(("rank", "warns"), [(19, False), (20, True), (21, True)])
def test_an_export_as_large_as_the_weights_is_said(tmp_path, rank, warns):
    """LoRA of rank r has (d + m) r elements for a weight of d x m: at r = 20 as many for 32 x 53.3."""
    model = wide(32, 53 if rank == 20 else 54, rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export = sea_to_lora(model, tmp_path)
    elements = sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    edited = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").weight.numel()
    notes = [str(w.message) for w in caught if "no fewer than" in str(w.message)]
    assert len(notes) == (elements >= edited) == warns and notes == export.notes
    if warns:
        assert notes[0].startswith(f"the LoRA adapter has {elements:,} elements, no fewer than the {edited:,} of the ")
        assert f"- The LoRA adapter has {elements:,} elements" in (tmp_path / "README.md").read_text()


def test_the_card_has_what_is_known_of_the_edit(tmp_path):
    fitted_on = {"data": "truthful_qa", "split": "train", "demonstrations": 367, "prompt_format": "chat"}
    model = fitted(positive_energy=0.99, centered=True, fitted_on=fitted_on)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    export = sea_to_lora(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    for line in (
        "# SEA edit as a LoRA adapter for base",
        "| `positive_energy` | `0.99` |",
        "| `centered` | `true` |",
        "to 367 demonstrations of [truthfulqa/truthful_qa](",
        "Of the activations: prompt format `chat`.",
        "It has the same effect as the edit, up to rounding.",
        "vLLM takes it with `--max-lora-rank 8`.",
        f"| `{SITE.format(1)}` | 4 | 4 | 4 | 0 | 0 |",
        "@inproceedings{qiu2024spectral",
    ):
        assert line in card.text, line
    assert "import peft_edit" not in card.text and "\n\n\n" not in card.text
    assert card.data.base_model == "user/base" and card.data.datasets == ["truthfulqa/truthful_qa"]
    assert {"lora", "sea", "activation-editing", "peft-edit"} <= set(card.data.tags)
    assert export.source["positive_energy"] == 0.99 and is_generated(card.content)


def test_the_card_of_an_export_takes_results(tmp_path):
    sea_to_lora(fitted(), tmp_path)
    config = hub.read_edit_config(tmp_path)
    adapter = {"name": "lora", **adapter_record(config, load_file(tmp_path / "adapter_model.safetensors"))}
    assert write_card(tmp_path, config, results=[results(), results(adapters=[adapter], mc1=0.65)])
    assert "| this adapter | 65.0 (+25.0) |" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="is of another adapter"):
        write_card(tmp_path, config, results=[results(adapters=[adapter | {"weights": "0" * 16}])])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "lora"
    sea_to_lora(fitted(), folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("{", "Expecting"),
        ("[]", "it must be an object"),
        ({"source": ...}, "no source"),
        ({"source": None}, "source must be an object, got None"),
        ({"source": {}}, "source.peft_type must be 'SEA', got None"),
        ({"source": {"peft_type": "HPR"}}, "source.peft_type must be 'SEA', got 'HPR'"),
        ({"source": {"peft_type": "SEA", "site": "x"}}, "source: site must be"),
        ({"source": {"peft_type": "SEA", "fitted_on": {"combined": [5]}}}, "source: fitted_on"),
        ({"notes": 5}, "notes must be a list, got 5"),
        ({"notes": ["a\n# H"]}, "a note is "),
        ({"sites": "x"}, "sites must be a list, got 'x'"),
        ({"sites": [{}]}, "no sites[0]."),
        ({"sites": []}, "the highest rank of a site is 0, that of the adapter 8"),
        ({"rank": "x"}, "rank must be an integer, got 'x'"),
        ({"rank": 9}, "rank is 9, the adapter has 8"),
        ({"max_lora_rank": 4}, "max_lora_rank is 4, rank is 8"),
        ({"lora_bias": True}, "lora_bias is True, that of the adapter False"),
    ],
    ids=str,
)
def test_a_damaged_record_of_an_export_is_named(exported, tmp_path, changes, expected):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "sea_to_lora.json"
    if isinstance(changes, dict):
        changed = json.loads(record.read_text()) | changes
        changes = json.dumps({name: value for name, value in changed.items() if value is not ...})
    record.write_text(changes)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        hub.read_edit_config(tmp_path)
    assert re.fullmatch(
        r".*sea_to_lora.json is no record of this export \(.*\): export the adapter again", str(error.value)
    )


@given(data=st.data())
@settings(max_examples=60)
def test_one_field_of_the_record_that_lies(exported, tmp_path_factory, data):
    """There is a card, or one line says why not."""
    folder = tmp_path_factory.mktemp("damaged") / "lora"
    shutil.copytree(exported, folder)
    record = json.loads((folder / "sea_to_lora.json").read_text())
    write(folder / "sea_to_lora.json", data.draw(damages(record)))
    try:
        written = model_card(LoraConfig.from_pretrained(folder), folder=folder)
    except ValueError as error:
        assert one_line(error) and "sea_to_lora.json" in str(error)
    else:
        assert "Rank and `lora_alpha` are 8 in every layer" in str(written) and is_generated(str(written))
    shutil.rmtree(folder)


def test_other_lora_adapters_get_no_card(tmp_path):
    get_peft_model(vivid_model(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no SEA, .* adapter, nor one that was exported to LoRA"):
        hub.read_edit_config(tmp_path)
