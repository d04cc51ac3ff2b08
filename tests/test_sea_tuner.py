"""SEA as a PEFT method: registration, configuration, the edit inside a model, several adapters, strength."""

import copy
import functools
import importlib
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from tiny import FAMILIES, base_logits, logits, tiny_model, token_ids, vivid_model
from torch.utils._python_dispatch import TorchDispatchMode

import peft_edit
from peft_edit import SEAConfig, edit_strength
from peft_edit.adapters.match import replace_config
from peft_edit.models.sites import find_sites, unwrap
from peft_edit.tuners.sea import SEALayer


SITES = ("mlp", "block")
HIDDEN = 32
REPOSITORY = Path(__file__).resolve().parents[1]
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


def two_adapters(family="llama", site="mlp"):
    """Adapters "default" at every layer and "other" at the last two."""
    model = edited_model(family, site)
    model.add_adapter("other", SEAConfig(site=site, layers_to_transform=[1, 2]))
    return write_edit(model, "other", seed=1)


def sea_layers(model):
    return [module for module in model.modules() if isinstance(module, SEALayer)]


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def site_output(model, index, site, ids=None):
    """The output of one site as any later forward hook of the module sees it."""
    seen = []

    def keep(out):  # a copy: Falcon adds the attention's output to the MLP's in place
        seen.append((out[0] if isinstance(out, tuple) else out).clone())

    module = unwrap(model).get_submodule(find_sites(model, site)[index])
    handle = module.register_forward_hook(lambda module, args, out: keep(out))
    logits(model, ids)
    handle.remove()
    return seen[0]


# Registration


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    members, classes = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(peft_edit)
    importlib.import_module("peft_edit")
    assert list(PeftType) == members
    assert classes == PEFT_TYPE_TO_CONFIG_MAPPING
    assert [member.value for member in members].count("SEA") == 1


def test_peft_type_is_a_real_member():
    member = PeftType.SEA
    assert isinstance(member, PeftType) and isinstance(member, str)
    for same in (
        PeftType("SEA"),
        PeftType["SEA"],
        pickle.loads(pickle.dumps(member)),
        copy.copy(member),
        copy.deepcopy(member),
        PeftType(json.loads(json.dumps(member))),
    ):
        assert same is member
    assert member == "SEA" and member.name == member.value == "SEA" and member in PeftType and member in list(PeftType)
    assert {member: 1}[PeftType.SEA] == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    edited_model().save_pretrained(folder)
    return folder


def test_peft_finds_the_configuration_class(saved):
    config = PeftConfig.from_pretrained(saved)
    assert type(config) is SEAConfig and config.peft_type is PeftType.SEA
    assert peft.get_peft_config(config.to_dict()) == config


def test_peft_knows_the_method_only_after_our_import(saved):
    """PEFT has no plug-in point: without the import a saved adapter is unknown to it."""
    code = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(saved)!r})
except KeyError as error:
    print("KeyError:", error)
import peft_edit
print(type(PeftConfig.from_pretrained({str(saved)!r})).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["KeyError: 'SEA'", "SEAConfig"]


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
    "strength": 0.5,
    "rank_pattern": {"model.layers.1": [2, 3]},
    "fit_statistics": {"model.layers.1": {"rms": 0.1 + 0.2, "strength": 1.0}},
    "base_model_fingerprint": "0123456789abcdef",
    "fitted_on": {"data": "truthful_qa", "questions": 367, "demonstrations": 400},
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
    "layers, expected",
    [(None, None), (2, [2]), (0, [0]), (range(2), [0, 1]), ([3, 1, 3], [1, 3]), ({2, 0}, [0, 2]), ((1,), [1])],
)
def test_layers_become_a_sorted_list(layers, expected):
    assert SEAConfig(layers_to_transform=layers).layers_to_transform == expected


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
        ({"layers_to_transform": -1}, ["layers", "0 or more", "-1"]),
        ({"layers_to_transform": []}, ["layers", "[]"]),
        ({"layers_to_transform": [True]}, ["layers", "True"]),
        ({"layers_to_transform": 1.5}, ["layers", "1.5"]),
        ({"layers_to_transform": "all"}, ["layers", "all"]),
        ({"layers_to_transform": ["1"]}, ["layers", "'1'"]),
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


# The identity until it is fitted


@every_family
@every_site
def test_unfitted_adapter_is_the_identity(family, site):
    expected = base_logits(family)
    model = get_peft_model(vivid_model(family), SEAConfig(site=site))
    assert torch.equal(logits(model), expected)
    assert len(sea_layers(model)) == 3
    model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_site
def test_unfitted_adapter_is_the_identity_in_bfloat16_with_autocast(site):
    base = vivid_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(base)
        model = get_peft_model(base, SEAConfig(site=site))
        assert torch.equal(logits(model), expected)
    assert trainable(model) == 0


@every_site
def test_nothing_is_ever_trainable(site, capsys):
    model = two_adapters(site=site)
    model.print_trainable_parameters()
    assert "trainable params: 0 ||" in capsys.readouterr().out
    steps = (
        lambda: model.set_adapter("other"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.set_requires_grad("default", True),
        lambda: model.delete_adapter("other"),
        lambda: model.train(),
        lambda: model.add_adapter("third", SEAConfig(site=site, init_weights=False)),
    )
    for step in steps:
        step()
        assert trainable(model) == 0
    half = get_peft_model(vivid_model().to(torch.bfloat16), SEAConfig(site=site, init_weights=False))
    assert trainable(half) == 0
    assert all(p.dtype == torch.float32 for n, p in half.named_parameters() if "sea_" in n)


@every_site
def test_status_shows_the_adapters(site):
    model = two_adapters(site=site)
    layers = model.get_layer_status()
    assert [status.name for status in layers] == [name.removeprefix("base_model.") for name in site_names(model)]
    assert [status.available_adapters for status in layers] == [["default"], ["default", "other"], ["default", "other"]]
    assert all(status.enabled and status.merged_adapters == [] for status in layers)
    assert not any(flag for status in layers for flag in status.requires_grad.values())
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "SEAModel")
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3)
    assert status.available_adapters == ["default", "other"] and status.trainable_params == 0


def site_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, SEALayer)]


# The edit


@every_family
@every_site
def test_edit_changes_the_site_and_keeps_its_norms(family, site):
    base = vivid_model(family)
    before = site_output(base, 1, site)
    base_logits = logits(base)
    model = edited_model(family, site, layers_to_transform=1)
    after = site_output(model, 1, site)
    assert relative(after, before) > 0.1
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert relative(logits(model), base_logits) > 1e-3
    h = before.reshape(-1, HIDDEN)
    layer = next(layer for layer in sea_layers(model) if layer.has_adapter("default"))
    positive, negative = layer.sea_positive["default"].weight, layer.sea_negative["default"].weight
    y = h + h @ positive.T @ positive - h @ negative.T @ negative
    torch.testing.assert_close(after.reshape(-1, HIDDEN), y * h.norm(dim=1, keepdim=True) / y.norm(dim=1, keepdim=True))


@every_family
def test_hidden_states_show_the_edit_of_a_block(family):
    before = vivid_model(family)(token_ids(), output_hidden_states=True).hidden_states
    model = edited_model(family, "block", layers_to_transform=1)
    after = model(input_ids=token_ids(), output_hidden_states=True).hidden_states
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    torch.testing.assert_close(after[2], site_output(model, 1, "block"))
    assert relative(after[2], before[2]) > 0.1


@every_family
def test_earlier_hooks_of_a_block_see_the_edit(family):
    model = vivid_model(family)
    seen = []
    model.get_submodule(find_sites(model, "block")[1]).register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model = write_edit(get_peft_model(model, SEAConfig(site="block", layers_to_transform=1)).eval())
    after = site_output(model, 1, "block")
    assert torch.equal(seen[0], after) and relative(after, site_output(vivid_model(family), 1, "block")) > 0.1


@every_family
@every_site
def test_later_tokens_do_not_matter(family, site):
    model = edited_model(family, site)
    ids, other = token_ids(), token_ids()
    other[:, 5:] = token_ids(seed=1)[:, 5:]
    torch.testing.assert_close(logits(model, ids)[:, :5], logits(model, other)[:, :5], rtol=0, atol=1e-5)
    # nor do the neighbours in the batch
    torch.testing.assert_close(logits(model, ids)[:1], logits(model, ids[:1]), rtol=0, atol=1e-5)


@every_family
@every_site
def test_cached_decoding_equals_prefill(family, site):
    model = edited_model(family, site)
    ids = token_ids()
    cache, steps = None, []
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, ids.shape[1]))):
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=0, atol=1e-5)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, full = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, full.sequences) and cached.sequences.shape[1] == ids.shape[1] + 5
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=0, atol=1e-5)


@every_family
@every_site
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, site, side):
    model = edited_model(family, site)
    ids = token_ids(1, 6)
    expected = logits(model, ids)
    filler, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
    order = slice(None, None, 1 if side == "right" else -1)
    padded = torch.cat((ids, filler)[order], dim=1)
    mask = torch.cat((mask, filler)[order], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    actual = logits(model, padded, attention_mask=mask, position_ids=positions)[mask.bool()]
    torch.testing.assert_close(actual[None], expected, rtol=0, atol=1e-5)


@every_family
@every_site
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(family, site, dtype):
    expected = logits(edited_model(family, site))
    model = edited_model(family, site)
    half = write_edit(get_peft_model(vivid_model(family).to(dtype), SEAConfig(site=site)))
    actual = logits(half)
    assert actual.dtype == dtype and actual.isfinite().all()
    allowed = relative(logits(vivid_model(family).to(dtype)), base_logits(family))  # the rounding of the model
    assert relative(actual, expected) < 3 * allowed + 0.01
    whole = logits(model.to(dtype))  # the factors rounded too
    assert whole.dtype == dtype and relative(whole, expected) < 3 * allowed + 0.02


@every_site
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(site, reentrant):
    gradients = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            model = edited_model(site=site)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            embedded = []
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, out, seen=embedded: out.retain_grad() or seen.append(out)
            )
            logits(model).square().sum().backward()
            gradients.append(embedded[0].grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@every_family
@every_site
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_edit_on_their_own(family, site, duplicate):
    model = edited_model(family, site)
    expected = logits(model)
    other = duplicate(model)
    assert torch.equal(logits(other), expected)
    write_edit(other, seed=9)
    other.peft_config["default"].strength = 2.0
    changed = logits(other)
    assert relative(changed, expected) > 1e-3 and torch.equal(logits(model), expected)
    originals = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in originals for parameter in other.parameters())
    bare = other.unload()
    assert torch.equal(logits(bare), base_logits(family))
    assert torch.equal(logits(model), expected)


class LargestNew(TorchDispatchMode):
    """Largest tensor that an operation makes and that is no view of a parameter."""

    def __init__(self, model):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.largest, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return out


@every_family
@every_site
def test_forward_makes_no_square_matrix(family, site):
    model = edited_model(family, site)
    ids = token_ids(1, 3)
    logits(model, ids)  # the first use also checks the factors
    with LargestNew(model) as seen:
        logits(model, ids)
    assert 0 < seen.largest < HIDDEN**2


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


def test_layer_reads_the_configuration_of_the_model():
    model = two_adapters()
    for layer in sea_layers(model):
        for name, config in layer.configs.items():
            assert config is model.peft_config[name]


def test_mean_rescale_without_statistics_is_refused():
    model = edited_model(rescale="mean")
    del model.peft_config["default"].fit_statistics["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"^fit_statistics\['model.layers.1.mlp.down_proj'\] has no .*fit this"):
        logits(model)


# Several adapters


@functools.cache
def alone(family, site, name, rows=2):
    """Logits with one adapter alone, or of the base model."""
    if name == "__base__":
        return logits(vivid_model(family), token_ids(rows))
    model = two_adapters(family, site)
    model.set_adapter(name)
    return logits(model, token_ids(rows))


@every_family
@every_site
def test_switching_adapters(family, site):
    model = two_adapters(family, site)
    expected = {name: alone(family, site, name) for name in ("__base__", "default", "other")}
    assert torch.equal(logits(model), expected["default"])
    model.set_adapter("other")
    assert torch.equal(logits(model), expected["other"])
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["__base__"])
    assert torch.equal(logits(model), expected["other"])
    assert relative(expected["other"], expected["default"]) > 1e-3


@every_family
@every_site
def test_two_active_adapters_edit_in_their_order(family, site):
    h = site_output(vivid_model(family), 2, site)
    results = []
    for names in (["default", "other"], ["other", "default"]):
        model = get_peft_model(vivid_model(family), SEAConfig(site=site, layers_to_transform=2))
        model.add_adapter("other", SEAConfig(site=site, layers_to_transform=2))
        write_edit(write_edit(model), "other", seed=1)
        model.base_model.set_adapter(names)
        (layer,) = sea_layers(model)
        expected = layer.edit(layer.edit(h, names[0]), names[1])
        results.append(site_output(model, 2, site))
        torch.testing.assert_close(results[-1], expected)
    assert relative(results[0], results[1]) > 1e-3


@every_family
@every_site
def test_deleting_an_inactive_adapter(family, site):
    model = two_adapters(family, site)
    expected = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]
    assert not any("other" in name for name in model.state_dict())
    assert all(list(layer.configs) == ["default"] for layer in sea_layers(model))
    with pytest.raises(ValueError, match="other does not exist"):
        model.delete_adapter("other")


@every_family
@every_site
def test_deleting_the_active_adapter(family, site):
    expected = alone(family, site, "other")
    model = two_adapters(family, site)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    assert not any("default" in name for name in model.state_dict())
    model.add_adapter("default", SEAConfig(site=site))  # the name is free again, and unfitted
    model.set_adapter("default")
    assert torch.equal(logits(model), base_logits(family))


def test_deleting_every_adapter_leaves_the_vivid_model(llama):
    expected = logits(llama)
    model = edited_model()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), expected)


ROWS = ["default", "other", "__base__", "default"]


@every_family
@every_site
def test_mixed_batch_equals_each_adapter_alone(family, site):
    model = two_adapters(family, site)
    ids = token_ids(4)
    actual = logits(model, ids, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(actual[row], alone(family, site, name, 4)[row], rtol=0, atol=1e-5)
    assert torch.equal(logits(model, ids), alone(family, site, "default", 4))  # nothing is left behind


@every_site
def test_mixed_batch_within_one_adapter_model_and_base_only(site):
    model = edited_model(site=site)
    torch.testing.assert_close(logits(model, adapter_names=["__base__"] * 2), base_logits(), rtol=0, atol=1e-5)


@every_family
@every_site
def test_mixed_beam_search_equals_each_adapter_alone(family, site):
    model = two_adapters(family, site)
    ids = token_ids(4, 5)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    actual = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=ROWS, **options)
    for row, name in enumerate(ROWS):
        single = model.generate(
            input_ids=ids[row : row + 1],
            attention_mask=torch.ones_like(ids[:1]),
            adapter_names=[name],
            **options,
        )
        assert torch.equal(actual[row], single[0])


@every_site
def test_mixed_generation_of_several_answers(site):
    model = two_adapters(site=site)
    ids = token_ids(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(
        input_ids=ids, adapter_names=["default", "other"], do_sample=True, num_return_sequences=3, **options
    )
    assert answers.shape == (6, 8)
    config = copy.deepcopy(model.generation_config)
    config.update(num_beams=4, num_return_sequences=2, do_sample=False)
    kept = model.generate(input_ids=ids, adapter_names=["default", "other"], generation_config=config, **options)
    assert kept.shape == (4, 8)


@pytest.mark.parametrize("family", ["llama", "opt"])
@every_site
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_wrong_number_of_names(family, site, task_type):
    model = get_peft_model(vivid_model(family), SEAConfig(site=site, init_weights=False, task_type=task_type)).eval()
    ids = token_ids(4, 6)
    mask = torch.ones_like(ids)
    model.generation_config.num_beams = 2
    names = ["default", "__base__", "__base__", "default"]
    expected = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=2)
    assert torch.equal(model.generate(ids, attention_mask=mask, adapter_names=names, max_new_tokens=2), expected)
    for length in (1, 2, 3, 5, 8):
        names = ["default"] * length
        for call in (
            lambda names=names: logits(model, ids, adapter_names=names),
            lambda names=names: model.generate(input_ids=ids, attention_mask=mask, adapter_names=names),
            lambda names=names: model.generate(ids, attention_mask=mask, adapter_names=names, num_return_sequences=2),
        ):
            with pytest.raises(ValueError) as error:
                call()
            assert str(error.value) == (
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{length} and 4 respectively."
            )
    assert not model.base_model.model._forward_pre_hooks
    logits(model, ids)


@every_site
def test_other_misuse_of_names(site):
    model = two_adapters(site=site)
    with pytest.raises(ValueError, match=r"^Trying to infer with non-existing adapter\(s\): absent, missing$"):
        logits(model, adapter_names=["missing", "absent"])
    model.train()
    with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when the model is in training mode\.$"):
        logits(model, adapter_names=["default", "other"])
    model.eval()
    if site == "mlp":
        model.peft_config["default"].rescale = "none"
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when there are merged adapters"):
            logits(model, adapter_names=["default", "other"])


def test_mixed_batch_with_embeddings_as_input():
    model = two_adapters()
    embedded = model.get_input_embeddings()(token_ids())
    actual = model(inputs_embeds=embedded, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(actual, logits(model, adapter_names=["other", "default"]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(inputs_embeds=embedded, adapter_names=["other"])


def test_lora_below_and_edit_above(llama):
    """The edit acts on what LoRA makes of the layer's output."""
    llama.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "lora")
    lora = logits(llama)
    h = site_output(llama, 2, "mlp")
    llama.add_adapter(SEAConfig(init_weights=False, layers_to_transform=2), "sea")
    llama.set_adapter(["lora", "sea"])
    (layer,) = sea_layers(llama)
    torch.testing.assert_close(site_output(llama, 2, "mlp"), layer.edit(h, "sea"))
    assert relative(logits(llama), lora) > 1e-4
    llama.set_adapter("lora")
    assert torch.equal(logits(llama), lora)
    llama.set_adapter(["lora", "sea"])
    llama.delete_adapter("sea")
    assert torch.equal(logits(llama), lora)


def test_edit_below_and_lora_above(llama):
    """Where LoRA comes second it adds to what is edited, and merging the edit is still exact."""
    llama.add_adapter(SEAConfig(rescale="none", init_weights=False, layers_to_transform=2), "sea")
    edited = site_output(llama, 2, "mlp")
    h = []
    (layer,) = sea_layers(llama)
    layer.register_forward_hook(lambda module, args, out: h.append(args[0]))
    llama.add_adapter(
        LoraConfig(target_modules=["down_proj"], init_lora_weights=False, layers_to_transform=[2]), "lora"
    )
    llama.set_adapter(["sea", "lora"])
    actual = site_output(llama, 2, "mlp")
    lora = llama.model.layers[2].mlp.down_proj
    added = h[0] @ lora.lora_A["lora"].weight.T @ lora.lora_B["lora"].weight.T * lora.scaling["lora"]
    torch.testing.assert_close(actual, edited + added)
    layer.merge(adapter_names=["sea"])
    torch.testing.assert_close(site_output(llama, 2, "mlp"), actual)


def test_native_adapters(llama):
    """Transformers' own `add_adapter` and its companions, without a `PeftModel`."""
    base = logits(llama)
    llama.add_adapter(SEAConfig())
    assert torch.equal(logits(llama), base)
    llama.add_adapter(SEAConfig(site="block"), "block")
    write_edit(write_edit(llama), "block", seed=1)
    assert llama.active_adapters() == ["block"]
    torch.testing.assert_close(logits(llama), logits(edited_model(site="block", seed=1)))
    llama.set_adapter("default")
    torch.testing.assert_close(logits(llama), logits(edited_model()))
    llama.disable_adapters()
    assert torch.equal(logits(llama), base)
    llama.enable_adapters()
    assert trainable(llama) == 0
    llama.delete_adapter(["default", "block"])
    assert torch.equal(logits(llama), base)


# edit_strength


@every_family
@every_site
def test_strength_from_the_base_model_to_more_than_the_edit(family, site):
    base = base_logits(family)
    model = edited_model(family, site)
    edited = logits(model)
    with edit_strength(model, 0):
        assert torch.equal(logits(model), base)
    with edit_strength(model, 1):
        assert torch.equal(logits(model), edited)
    with edit_strength(model, 0.5) as nothing:
        assert nothing is None
        half = logits(model)
    with edit_strength(model, 2.0):
        assert relative(logits(model), edited) > 1e-3
    assert torch.equal(logits(model), edited)
    torch.testing.assert_close(half, logits(edited_model(family, site, strength=0.5)))


@every_site
def test_strengths_multiply_and_are_restored(site):
    model = edited_model(site=site, strength=0.8)
    edited = logits(model)
    with edit_strength(model, 0.5), edit_strength(model, 0.25):
        nested = logits(model)
        norms = site_output(model, 0, site).norm(dim=-1)
    torch.testing.assert_close(nested, logits(edited_model(site=site, strength=0.1)))
    torch.testing.assert_close(norms, site_output(vivid_model(), 0, site).norm(dim=-1))
    with pytest.raises(RuntimeError, match="inside"), edit_strength(model, 0.5):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), edited)


def test_strength_of_native_and_mixed_adapters(llama):
    base = logits(llama)
    llama.add_adapter(SEAConfig(init_weights=False))
    with edit_strength(llama, 0):
        assert torch.equal(logits(llama), base)
    model = two_adapters()
    with edit_strength(model, 0):
        mixed = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_bad_strengths_are_refused(strength):
    match = f"^strength must be .*0 or more and finite, got {strength}"
    with pytest.raises(ValueError, match=match), edit_strength(edited_model(), strength):
        pass


def test_strength_without_edits_is_refused(llama):
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no edit whose strength"), edit_strength(llama, 0.5):
        pass


def test_strength_and_merging_exclude_each_other():
    model = edited_model(rescale="none")
    expected = logits(model)
    with edit_strength(model, 0.5), pytest.raises(ValueError, match="cannot merge inside edit_strength"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), edit_strength(model, 0.5):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    with edit_strength(model, 0):
        assert torch.equal(logits(model), base_logits())


def test_one_config_serves_several_adapters(llama):
    """What a fit writes belongs to the adapter: a config that is passed again makes an adapter that is not fitted."""
    config = SEAConfig(projections="positive")
    model = get_peft_model(llama, config)
    model.add_adapter("other", config)
    replace_config(model, "default", rank_pattern={"model.layers.0.mlp.down_proj": [1, 1]})
    assert model.peft_config["default"].rank_pattern and model.peft_config["other"] is config
    assert config.rank_pattern == {}
    again = get_peft_model(tiny_model("llama"), config)
    assert torch.equal(again(token_ids()).logits, tiny_model("llama")(token_ids()).logits)


@pytest.mark.parametrize("names", [5, "(", [1], {"down_proj": 1}])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_names_that_cannot_match(field, names):
    with pytest.raises(ValueError, match=f"{field} must be a list of names or a regular expression, got"):
        SEAConfig(**{field: names})
