"""Calibration finds the largest strength within a budget of divergence."""

import json
import math

import pytest
import torch
from edits import EDITS, edited_model
from peft import LoraConfig, PeftConfig, get_peft_model
from test_collect import TOKENIZER, text
from tiny import agree, logits, vivid_model

from peft_edit import calibrate, perplexity, side_effects
from peft_edit.choosing.calibrate import LEAST, bisect


TEXTS = [text(range(i, i + 5 + i % 3)) for i in range(3, 12)]


def kl_p95(model):
    return side_effects(model, TOKENIZER, TEXTS, batch_size=4).kl_p95


@pytest.mark.parametrize("edit", EDITS)
def test_the_strength_meets_the_budget_and_one_percent_more_does_not(edit):
    model = edited_model(edit, layers_to_transform=[1, 2], **({"gate": 1.0} if edit == "HPR" else {}))
    config, dial = model.peft_config["default"], type(model.peft_config["default"]).dials[0]
    budget = kl_p95(model) / 3
    for memory in (1.0, 0.0) if edit == "SEA at the MLP" else (1.0,):
        found = calibrate(model, TOKENIZER, TEXTS, kl_p95=budget, batch_size=4, memory=memory)
        now = model.peft_config["default"]
        assert found.kept_logits == (memory > 0)
        assert (found.dial, found.before, found.limited) == (dial, getattr(config, dial), True)
        assert found.value == getattr(now, dial) == now.calibration["value"]
        assert kl_p95(model) == pytest.approx(found.side_effects.kl_p95, rel=1e-4) and kl_p95(model) <= 1.0001 * budget
        too_large = [value for value, kl in found.tried if kl > budget]
        assert min(too_large) <= found.value / 0.99 * 1.0001
        assert now.calibration["tokens"] == found.side_effects.tokens and now.calibration["budget"] == budget
        json.dumps(found.to_dict())
        setattr(now, dial, getattr(config, dial))
        assert now.calibration == {}


def test_the_configuration_that_was_passed_stays_and_the_record_is_saved(tmp_path):
    own = EDITS["MEAN_DIFFERENCE at the block"](layers_to_transform=1)
    model = get_peft_model(vivid_model(), own)
    budget = kl_p95(model) / 2
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=budget)
    assert own.strength == 1.0 and own.calibration == {}
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert saved.strength == found.value and saved.calibration == model.peft_config["default"].calibration
    assert saved.calibration["dial"] == "strength"
    changed = json.loads((tmp_path / "adapter_config.json").read_text()) | {"strength": 0.123}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    assert PeftConfig.from_pretrained(tmp_path).calibration == {}


def test_an_edit_within_the_budget_stays_as_it_is_unless_more_is_asked_for():
    model = edited_model("SEA at the MLP", strength=0.5)
    full = kl_p95(model)
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=10 * full)
    assert (found.value, found.limited, len(found.tried)) == (0.5, False, 1)
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=1.5 * full, maximum=8)
    assert 0.5 < found.value < 4 and found.limited
    assert full < kl_p95(model) <= 1.5 * full


def test_the_gate_of_hpr():
    model = edited_model("HPR", gate=0.9)
    budget = kl_p95(model) / 2
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=budget, dial="gate")
    config = model.peft_config["default"]
    assert found.dial == "gate" and config.gate == found.value < 0.9 and config.alpha == 1.0
    assert kl_p95(model) <= 1.0001 * budget
    config.gate = 0.9
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=1e6, dial="gate", maximum=5)
    assert found.value == 1.0 and not found.limited


def test_nothing_changes_when_even_little_is_too_much():
    model = edited_model("SEA at the MLP")
    config, before = model.peft_config["default"], logits(model)
    with pytest.raises(
        ValueError, match=r"even with strength=.* raise it, or learn the edit with a retain set"
    ) as error:
        calibrate(model, TOKENIZER, TEXTS, kl_p95=1e-12)
    assert "\n" not in str(error.value)
    assert model.peft_config["default"].strength == config.strength and model.peft_config["default"].calibration == {}
    agree(logits(model), before)


def test_strengths_that_give_nan_are_too_large():
    torch.manual_seed(0)
    model = get_peft_model(vivid_model(), EDITS["MEAN_DIFFERENCE at the block"](strength=3.4e38))
    found = calibrate(model, TOKENIZER, TEXTS, kl_p95=1e6)
    assert found.tried[0] == (3.4e38, None) and 0 < found.value < 3.4e38


def test_a_model_that_gives_nan_whatever_the_strength_is_refused():
    model = edited_model("SEA at the MLP")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinite: load the model in a wider dtype"):
        calibrate(model, TOKENIZER, TEXTS)
    with pytest.raises(ValueError, match=r"NaN or infinite: load the model in a wider dtype"):
        perplexity(model, TOKENIZER, TEXTS)


@pytest.mark.parametrize("maximum, largest", [(1.0, 0.3), (1.0, 1e-3), (8.0, 5.0), (1.0, 1e-5), (2.0, 2.0), (4.0, 0.9)])
def test_bisection(maximum, largest):
    factor, found = bisect(lambda factor: factor if factor <= largest else None, maximum, 0.01)
    if largest < LEAST:
        assert (factor, found) == (0.0, None)
    else:
        assert factor == found and largest * 0.989 <= factor <= largest


def test_bad_input_is_refused():
    model = edited_model("SEA at the MLP")
    for options, message in (
        ({"kl_p95": 0}, "kl_p95 must be a number above 0 and finite, got 0"),
        ({"kl_p95": math.nan}, "kl_p95 must be a number above 0"),
        ({"dial": "gate"}, "dial 'gate' is none of SEA"),
        ({"tolerance": 2}, "tolerance must be"),
        ({"tolerance": 1.0}, "tolerance must be"),  # no value would be tried
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, TOKENIZER, TEXTS, **options)
    with pytest.raises(TypeError, match="did you mean 'kl_p95'"):
        calibrate(model, TOKENIZER, TEXTS, kl_95=0.5)
    with pytest.raises(ValueError, match="texts have 1 predicted tokens, too few for a 95th percentile"):
        calibrate(model, TOKENIZER, ["w3 w4"])
    with pytest.raises(ValueError, match="there are no texts"):
        calibrate(model, TOKENIZER, [])
    model.peft_config["default"].strength = 0
    with pytest.raises(ValueError, match="strength is 0, so that the adapter edits nothing"):
        calibrate(model, TOKENIZER, TEXTS)
    with pytest.raises(ValueError, match="adapters of LORA have no strength that could be calibrated"):
        calibrate(get_peft_model(vivid_model(), LoraConfig(target_modules=["q_proj"])), TOKENIZER, TEXTS)
    model = edited_model("SEA at the MLP")
    model.add_adapter("other", EDITS["SEA at the MLP"]())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter_name='other' must be the only active adapter"):
        calibrate(model, TOKENIZER, TEXTS, adapter_name="other")
