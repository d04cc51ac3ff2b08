"""Adapters whose files lie: one field of adapter_config.json, or the tensors."""

import json
import shutil

import pytest
import torch
from damage import changed, damages, one_line, places, write
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_sea_mixtures import write_edit
from tiny import tiny_model

from peft_edit import HPRConfig, MeanDifferenceConfig, SEAConfig
from peft_edit.adapters.card import write_card
from peft_edit.adapters.hub import read_edit_config
from peft_edit.adapters.read import load_adapter
from peft_edit.models.load import load_structure
from peft_edit.tuners.layer import edit_layers


FITTED_ON = {"data": "truthful_qa", "questions": 3}
WEIGHTS = "adapter_model.safetensors"


def fitted(kind):
    """A model with an adapter whose configuration has all that a fit, a training and a selection write."""
    fields = {"task_type": "CAUSAL_LM", "init_weights": False}
    if kind == "SEA":
        config = SEAConfig(**fields, rescale="none", fitted_on=FITTED_ON | {"demonstrations": 4})
        return write_edit(get_peft_model(tiny_model(), config))
    if kind == "HPR":
        accuracy = {"0": 0.5, "2": 1.0}
        config = HPRConfig(**fields, probe_accuracy=accuracy, fitted_on=FITTED_ON | {"token_pairs": 4})
        return get_peft_model(tiny_model(), config)
    config = MeanDifferenceConfig(**fields, fitted_on=FITTED_ON | {"token_pairs": 4})
    model = get_peft_model(tiny_model(), config)
    statistics = {layer.site: {"norm": 1.0, "rms": 2} for layer in edit_layers(model)}
    model.peft_config["default"].fit_statistics = statistics
    return model


KINDS = ("SEA", "HPR", "mean difference")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model, and adapters of it."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "base")
    for kind in KINDS:
        fitted(kind).save_pretrained(root / kind)
    return root


def outcome(saved, adapter):
    """The tensors of an adapter as it loads, and whether it has a card; or the error's message."""
    try:
        config = read_edit_config(adapter)
        model = load_adapter(load_structure(str(saved / "base")), str(adapter))
        assert write_card(adapter, config)
    except ValueError as error:
        assert one_line(error)
        return str(error)
    return get_peft_model_state_dict(model)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40)
def test_one_field_of_the_configuration_that_lies(saved, tmp_path_factory, kind, data):
    """The adapter loads with the tensors of its file, or one line says why it does not."""
    adapter = tmp_path_factory.mktemp("damaged") / "adapter"
    shutil.copytree(saved / kind, adapter)
    before = json.loads((adapter / "adapter_config.json").read_text())
    write(adapter / "adapter_config.json", data.draw(damages(before)))
    found = outcome(saved, adapter)
    if not isinstance(found, str):
        expected = load_file(saved / kind / WEIGHTS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.rmtree(adapter.parent)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"SEA"', "{}", "{", "[" * 100_000, "\xff"], ids=lambda c: c[:5])
def test_what_is_no_configuration(saved, tmp_path, content):
    shutil.copytree(saved / "SEA", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(content, encoding="latin-1")
    assert "adapter_config.json" in outcome(saved, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("kind", "place", "value", "expected"),
    [
        ("SEA", ("modules_to_save",), 5, "modules_to_save must be a list or null, got 5"),
        ("SEA", ("modules_to_save",), "lm_head", "modules_to_save must be a list or null, got 'lm_head'"),
        ("SEA", ("modules_to_save",), ["lm_head"], "has no tensor 'base_model.model.lm_head.weight'"),
        ("SEA", ("fitted_on", "demonstrations"), "4", "fitted_on.demonstrations must be an integer, got '4'"),
        ("SEA", ("fit_statistics",), [], "fit_statistics must be a dict of JSON values, got []"),
        ("HPR", ("probe_accuracy", "0"), None, "probe_accuracy['0'] must be a number, got None"),
        ("HPR", ("angle_hidden_size",), 10**30, "angle_hidden_size must be an integer from 1 to 1,000,000"),
        ("HPR", ("num_angle_layers",), 10**9, "num_angle_layers must be an integer from 1 to 1,000"),
        (
            "mean difference",
            ("fit_statistics", "model.layers.0"),
            {"norm": 1.0},
            "no fit_statistics['model.layers.0'].rms",
        ),
        ("mean difference", ("inference_mode",), "yes", "inference_mode must be true or false, got 'yes'"),
    ],
)
def test_fields_that_are_named(saved, tmp_path, kind, place, value, expected):
    shutil.copytree(saved / kind, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert place in places(config)
    write(tmp_path / "adapter" / "adapter_config.json", changed(config, place, value))
    assert expected in outcome(saved, tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda tensor: torch.full_like(tensor, torch.nan), ("is not finite", "holds NaN or infinite values")),
        (
            lambda tensor: tensor.index_fill(-1, torch.tensor([0]), torch.inf),
            ("is not finite", "holds NaN or infinite"),
        ),
        (lambda tensor: tensor.to(torch.int64), ("has values of torch.int64", "holds values of torch.int64")),
    ],
    ids=["all NaN", "one infinite", "integers"],
)
def test_tensors_that_are_no_weights(saved, tmp_path, kind, damage, expected):
    """Whichever way the adapter is loaded; a weight that is there, and NaN, was loaded."""
    shutil.copytree(saved / kind, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = min(name for name, tensor in tensors.items() if tensor.numel())
    save_file(tensors | {name: damage(tensors[name])}, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    message = outcome(saved, tmp_path / "adapter")
    assert name in message and expected[0] in message
    with pytest.raises(RuntimeError, match=expected[1]) as error:
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert "was not loaded" not in str(error.value)
