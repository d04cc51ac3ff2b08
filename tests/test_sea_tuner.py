"""What is SEA's own as a PEFT method; the rest is in test_methods.py."""

from dataclasses import fields

import pytest
import torch
from edits import outputs
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import FAMILIES, logits, relative, vivid_model

from peft_edit import SEAConfig, edit_strength
from peft_edit.tuners.sea import SEALayer


SITES = ("mlp", "block")
HIDDEN = 32
every_family = pytest.mark.parametrize("family", FAMILIES)
every_site = pytest.mark.parametrize("site", SITES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def write_edit(model, adapter="default", seed=0, ranks=(3, 5)):
    """Random factors at every site of an adapter, as a fit would write them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.peft_config[adapter]
    for layer in sea_layers(model):
        if layer.has_adapter(adapter):
            factors = [torch.linalg.qr(torch.randn(HIDDEN, k, generator=generator))[0].T.contiguous() for k in ranks]
            layer.set_factors(adapter, *factors)
            config.rank_pattern[layer.site] = list(ranks)
            config.fit_statistics[layer.site] = {
                "rms": 0.5,
                "mean_rescale": 1.1,
                "mean_rescale_deviation": 0.1,
                "relative_error": 0.1,
                "strength": config.statistics_strength,
            }
    return model


def edited_model(family="llama", site="mlp", seed=0, **fields):
    model = get_peft_model(vivid_model(family), SEAConfig(site=site, **fields)).eval()
    return write_edit(model, seed=seed)


@pytest.fixture
def llama():
    return vivid_model()


def sea_layers(model):
    return [module for module in model.modules() if isinstance(module, SEALayer)]


# Configuration

EVERY_FIELD = {
    "site": "block",
    "target_modules": {"down_proj", "c_proj"},
    "exclude_modules": {"lm_head"},
    "layers_to_transform": range(1, 3),
    "positive_energy": 0.9,
    "negative_energy": 1,
    "centered": True,
    "feature_map": "tanh",
    "feature_space": "feature",
    "input_scale": 3.0,
    "rescale": "mean",
    "projections": "exchanged",
    "retain_energy": 0.95,
    "strength": 0.5,
    "rank_pattern": {"model.layers.1": [2, 3]},
    "fit_statistics": {"model.layers.1": {"rms": 0.1 + 0.2, "strength": 1.0}},
    "base_model_fingerprint": "0123456789abcdef",
    "fitted_on": {"data": "truthful_qa", "questions": 367, "demonstrations": 400},
    "calibration": {"dial": "strength", "value": 0.5, "kl_p95": 0.4, "budget": 0.5, "texts": "01ab", "tokens": 70},
    "init_weights": False,
    "modules_to_save": ["lm_head"],
}


def test_every_field_survives_json(tmp_path):
    own = {field.name for field in fields(SEAConfig)} - {field.name for field in fields(PeftConfig)}
    assert set(EVERY_FIELD) == own
    config = SEAConfig(**EVERY_FIELD, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(tmp_path)
    again = SEAConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.layers_to_transform == [1, 2]
    assert again.target_modules == {"down_proj", "c_proj"}
    assert again.fit_statistics == EVERY_FIELD["fit_statistics"]
    assert SEAConfig(**{**again.to_dict(), "peft_type": "SEA"}) == config


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"site": "attention"}, ["site", "'mlp'", "'block'", "'attention'"]),
        ({"feature_map": "relu"}, ["feature_map", "None", "'tanh'", "'squared_exponential'", "'elu'", "'relu'"]),
        ({"feature_space": "both"}, ["feature_space", "'activation'", "'feature'", "'both'"]),
        ({"rescale": True}, ["rescale", "'token'", "'none'", "'mean'", "'average'", "True"]),
        ({"projections": ["both"]}, ["projections", "'positive'", "'negative'", "'exchanged'", "['both']"]),
        ({"positive_energy": 99.8}, ["positive_energy", "(0, 1]", "99.8", "0.998"]),
        ({"negative_energy": 0}, ["negative_energy", "(0, 1]", "0"]),
        ({"negative_energy": -0.5}, ["negative_energy", "(0, 1]", "-0.5"]),
        ({"positive_energy": float("nan")}, ["positive_energy", "(0, 1]", "nan"]),
        ({"positive_energy": "high"}, ["positive_energy", "high"]),
        ({"negative_energy": None}, ["negative_energy", "None"]),
        ({"input_scale": 0.0, "feature_map": "tanh"}, ["input_scale", "above 0", "0.0"]),
        ({"input_scale": float("inf"), "feature_map": "tanh"}, ["input_scale", "above 0", "inf"]),
        ({"input_scale": "3", "feature_map": "tanh"}, ["input_scale", "above 0", "'3'"]),
        ({"input_scale": 3.0}, ["input_scale", "feature_map"]),
        ({"rescale": "average", "projections": "positive"}, ["rescale='average'", "'positive'", "'both'"]),
        ({"strength": -0.1}, ["strength", "0 or more", "-0.1"]),
        ({"strength": float("inf")}, ["strength", "finite", "inf"]),
        ({"strength": "full"}, ["strength", "0 or more", "full"]),
    ],
)
def test_bad_values_raise_one_clear_line(fields, parts):
    with pytest.raises(ValueError) as error:
        SEAConfig(**fields)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("ranks", [[1], [1, 2, 3], [-1, 1], None, ["1", 2], [1.5, 1], [True, 1], 3, [float("inf"), 1]])
def test_bad_ranks_are_refused_by_name(ranks):
    with pytest.raises(ValueError, match=r"^rank_pattern\['model.layers.1.mlp.down_proj'\] must be two ranks.*got"):
        SEAConfig(rank_pattern={"model.layers.1.mlp.down_proj": ranks})


def test_ranks_of_other_programs(tmp_path):
    """JSON has no integers: some programs write 1.0."""
    assert SEAConfig(rank_pattern={"a": [1.0, 2]}).rank_pattern == {"a": [1, 2]}
    config = SEAConfig(rank_pattern={"model.layers.1.mlp.down_proj": [1, HIDDEN + 1]})
    with pytest.raises(ValueError, match=r"rank_pattern\['model.layers.1.mlp.down_proj'\] must be two ranks.*32"):
        get_peft_model(vivid_model(), config)


# The edit


@every_family
@every_site
def test_edit_changes_the_site_and_keeps_its_norms(family, site):
    base = vivid_model(family)
    before = outputs(base, site)[1]
    base_logits = logits(base)
    model = edited_model(family, site, layers_to_transform=1)
    after = outputs(model, site)[1]
    assert relative(after, before) > 0.1
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert relative(logits(model), base_logits) > 1e-3
    h = before.reshape(-1, HIDDEN)
    layer = next(layer for layer in sea_layers(model) if layer.has_adapter("default"))
    positive, negative = layer.sea_positive["default"].weight, layer.sea_negative["default"].weight
    y = h + h @ positive.T @ positive - h @ negative.T @ negative
    torch.testing.assert_close(after.reshape(-1, HIDDEN), y * h.norm(dim=1, keepdim=True) / y.norm(dim=1, keepdim=True))


@every_site
@pytest.mark.parametrize(
    "fields",
    [
        {"rescale": "none"},
        {"rescale": "mean"},
        {"rescale": "average"},
        {"projections": "positive"},
        {"projections": "negative"},
        {"projections": "exchanged"},
        {"feature_map": "tanh", "input_scale": 3.0},
        {"feature_map": "squared_exponential", "feature_space": "feature"},
        {"feature_map": "elu", "input_scale": 1.0},
        {"strength": 0.5},
    ],
    ids=str,
)
def test_every_mode_edits(site, fields):
    expected = logits(edited_model(site=site))
    actual = logits(edited_model(site=site, **fields))
    assert actual.isfinite().all() and relative(actual, expected) > 1e-4


def test_mean_rescale_without_statistics_is_refused():
    model = edited_model(rescale="mean")
    del model.peft_config["default"].fit_statistics["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"^fit_statistics\['model.layers.1.mlp.down_proj'\] has no .*fit this"):
        logits(model)


# With LoRA


def test_lora_below_and_edit_above(llama):
    """The edit acts on what LoRA makes of the layer's output."""
    llama.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "lora")
    lora = logits(llama)
    h = outputs(llama, "mlp")[2]
    llama.add_adapter(SEAConfig(init_weights=False, layers_to_transform=2), "sea")
    llama.set_adapter(["lora", "sea"])
    (layer,) = sea_layers(llama)
    torch.testing.assert_close(outputs(llama, "mlp")[2], layer.edit(h, "sea"))
    assert relative(logits(llama), lora) > 1e-4
    llama.set_adapter("lora")
    assert torch.equal(logits(llama), lora)
    llama.set_adapter(["lora", "sea"])
    llama.delete_adapter("sea")
    assert torch.equal(logits(llama), lora)


def test_edit_below_and_lora_above(llama):
    """Where LoRA comes second it adds to what is edited, and merging the edit is still exact."""
    llama.add_adapter(SEAConfig(rescale="none", init_weights=False, layers_to_transform=2), "sea")
    edited = outputs(llama, "mlp")[2]
    h = []
    (layer,) = sea_layers(llama)
    layer.register_forward_hook(lambda module, args, out: h.append(args[0]))
    llama.add_adapter(
        LoraConfig(target_modules=["down_proj"], init_lora_weights=False, layers_to_transform=[2]), "lora"
    )
    llama.set_adapter(["sea", "lora"])
    actual = outputs(llama, "mlp")[2]
    lora = llama.model.layers[2].mlp.down_proj
    added = h[0] @ lora.lora_A["lora"].weight.T @ lora.lora_B["lora"].weight.T * lora.scaling["lora"]
    torch.testing.assert_close(actual, edited + added)
    layer.merge(adapter_names=["sea"])
    torch.testing.assert_close(outputs(llama, "mlp")[2], actual)


# edit_strength


@every_site
def test_strengths_multiply_and_norms_are_kept(site):
    model = edited_model(site=site, strength=0.8)
    with edit_strength(model, 0.5), edit_strength(model, 0.25):
        nested = logits(model)
        norms = outputs(model, site)[0].norm(dim=-1)
    torch.testing.assert_close(nested, logits(edited_model(site=site, strength=0.1)))
    torch.testing.assert_close(norms, outputs(vivid_model(), site)[0].norm(dim=-1))
