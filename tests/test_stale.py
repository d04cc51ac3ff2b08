"""State that changes after an adapter was made: its configuration, its strength, adapters that come and go."""

import functools
import re
from dataclasses import fields

import pytest
import torch
from edits import EDITS, METHOD_OF, at, edited_model, layers_of, merges, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import logits, tiny_model, token_ids, vivid_model
from transformers import GenerationConfig

from peft_edit import (
    ActivationStore,
    HPRConfig,
    MeanDifferenceConfig,
    SEAConfig,
    edit_strength,
    fingerprint,
    fit_mean_difference,
    fit_sea,
    perplexity,
    push_to_hub,
)
from peft_edit.arguments import choices_of, hints_of
from peft_edit.data.prompts import EncodedAnswer
from peft_edit.evaluation.likelihood import answer_log_likelihoods
from peft_edit.models.fingerprint import adapters_fingerprint
from peft_edit.models.sites import decoder_blocks, find_sites, unwrap


every_edit = pytest.mark.parametrize("edit", EDITS)
SCOPED = [edit for edit in EDITS if hasattr(EDITS[edit](), "token_scope")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# The configuration at run time: a change acts, or is refused

# Other values of fields than a random edit has them; what a value needs beside it.
OTHER = {
    "layers_to_transform": [0, 1],
    "exclude_modules": ["0.mlp.down_proj"],
    "target_modules": ["mlp.gate_proj"],
    "init_weights": True,
    "gate": 0.9,
    "alpha": 0.3,
    "strength": 0.3,
    "num_angle_layers": 2,
    "angle_hidden_size": 7,
    "num_layers": 2,
    "hidden_size": 7,
    "selected_layers": [1],
    "input_scale": 0.5,
}
BESIDE = {
    "input_scale": {"feature_map": "tanh"},
    "feature_space": {"feature_map": "tanh"},
    "rotation": {"gate": 0.9},
}
# What a fit does next time, and what it writes.
OF_A_FIT = {
    *("positive_energy", "negative_energy", "centered", "retain_energy", "scale_to_rms", "num_heads"),
    *("base_model_fingerprint", "fitted_on", "calibration"),
}
WRITTEN = {"rank_pattern", "fit_statistics", "probe_accuracy", "modules_to_save"}


def changes_of(edit):
    config = EDITS[edit]()
    own = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)}
    for name in sorted(own - OF_A_FIT - WRITTEN):
        choices = [value for value in choices_of(hints_of(type(config))[name]) if value != getattr(config, name)]
        yield from ((name, value) for value in choices or [OTHER[name]])


CHANGES = [(edit, name, value) for edit in EDITS for name, value in changes_of(edit)]


@pytest.mark.parametrize("edit, name, value", CHANGES, ids=str)
def test_a_later_change_acts_as_if_it_was_there_from_the_start_or_is_refused(edit, name, value):
    model = edited_model(edit, **BESIDE.get(name, {}))
    config, before = model.peft_config["default"], logits(model)
    message = refusal(setattr, config, name, value)
    if message is not None:
        assert message.startswith(f"{name} ") and "\n" not in message and getattr(config, name) != value
        assert torch.equal(logits(model), before)
        return
    assert not torch.equal(logits(model), before) or value == "mean"  # whose constant is 1 for a random edit
    if name != "selected_layers":  # of a new adapter only these have modules, and so other weights
        assert torch.equal(logits(model), logits(edited_model(edit, **BESIDE.get(name, {}), **{name: value})))


def test_the_list_of_changes_has_what_matters():
    acted = {(METHOD_OF[edit].name, name) for edit, name, _ in CHANGES}
    assert {("HPR", "rotation"), ("HPR", "gate"), ("SEA", "site"), ("SEA", "feature_map")} <= acted


@pytest.mark.parametrize("name, value", [("num_angle_layers", 2), ("site", "mlp"), ("layers_to_transform", 1)])
def test_what_modules_follow_from_cannot_change(name, value):
    kind = HPRConfig if name == "num_angle_layers" else MeanDifferenceConfig
    config = kind()
    setattr(config, name, value)  # in no model yet
    config = kind()
    model = get_peft_model(vivid_model(), config)
    with pytest.raises(ValueError, match=f"^{name} is .* for the modules .* add another adapter with {name}="):
        setattr(config, name, value)
    setattr(config, name, getattr(config, name))
    assert model.peft_config["default"] is config


@pytest.mark.parametrize(
    "config, name, value, part",
    [
        (SEAConfig(rescale="average"), "projections", "positive", "rescale='average' needs two projections"),
        (SEAConfig(), "input_scale", 3.0, "input_scale is used by a feature map only"),
        (SEAConfig(), "positive_energy", 99.8, "positive_energy must be in (0, 1], got 99.8"),
        (SEAConfig(), "rank_pattern", {"a": [True, 1]}, "rank_pattern['a'] must be two ranks"),
        (SEAConfig(), "layers_to_transform", [-1], "layers_to_transform must be block indices"),
        (SEAConfig(), "target_modules", "(", "target_modules must be a list of names or a regular expression"),
        (HPRConfig(layers_to_transform=[0, 1]), "selected_layers", [2], "selected_layers must be in"),
        (HPRConfig(), "selected_layers", "1", "selected_layers must be block indices"),
        (HPRConfig(), "rotation", "reflect", "rotation must be one of 'angle', 'reflection', got 'reflect'"),
        (HPRConfig(), "gate", 1.5, "gate must be a number in [0, 1]"),
        (HPRConfig(), "probe_accuracy", [1], "probe_accuracy must be a dict"),
        (MeanDifferenceConfig(), "fit_statistics", {"a": {"rms": 1}}, "fit_statistics has no"),
        (MeanDifferenceConfig(), "strength", float("inf"), "strength must be a number"),
    ],
    ids=str,
)
def test_later_values_are_checked_together_with_the_others(config, name, value, part):
    before = getattr(config, name)
    message = refusal(setattr, config, name, value)
    assert part in message and "\n" not in message and getattr(config, name) == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_later_value_is_taken_as_a_given_one_or_refused_as_one(data):
    method = data.draw(st.sampled_from([EDITS[edit]().__class__ for edit in EDITS]))
    own = sorted({f.name for f in fields(method)} - {f.name for f in fields(PeftConfig)})
    name = data.draw(st.sampled_from(own))
    some = [None, True, 0, 1, 2, -1, 0.5, 1.5, float("nan"), "", "angle", "tanh", "none", [], [1], [0, 2], {}, {"a": 1}]
    value = data.draw(st.sampled_from(some))
    config, given_message = method(), refusal_of_any(lambda: method(**{name: value}))
    before = getattr(config, name)
    later = refusal_of_any(lambda: setattr(config, name, value))
    assert later == given_message
    assert getattr(config, name) == (before if later else getattr(method(**{name: value}), name))


def refusal_of_any(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def test_a_layer_is_selected_only_where_it_has_modules():
    model = edited_model("HPR", selected_layers=[0, 2])
    config = model.peft_config["default"]
    with pytest.raises(ValueError, match=r"^selected_layers \[1\] have no modules .* in \[0, 2\]: load or train"):
        config.selected_layers = [0, 1]
    config.selected_layers = 2
    assert config.selected_layers == [2]
    for layer in layers_of(model):
        if layer.index == 2:
            layer.remove_adapter("default")
    with pytest.raises(ValueError, match=r"have no modules .* in \[0\]"):
        config.selected_layers = [2, 0]


@functools.cache
def rows():
    generator = torch.Generator().manual_seed(0)
    positive = {i: torch.randn(24, 32, generator=generator) for i in range(3)}
    return positive, {i: -h + 0.3 for i, h in positive.items()}, {i: 2 * h - 0.1 for i, h in positive.items()}


def store_at(path, site="mlp"):
    positive, negative, neutral = rows()
    return ActivationStore.from_tensors(path, positive=positive, negative=negative, neutral=neutral, site=site)


def fitted(path, **options):
    model = get_peft_model(vivid_model(), SEAConfig(**options))
    fit_sea(model, store_at(path))
    return model


def test_a_fit_keeps_its_feature_map(tmp_path):
    model = fitted(tmp_path / "store", feature_map="tanh", input_scale=3.0)
    config = model.peft_config["default"]
    for name, value in (("feature_map", "elu"), ("input_scale", 1.0)):
        message = refusal(setattr, config, name, value)
        assert f"was fitted with {name}=" in message and "rank_pattern={}" in message and "\n" not in message
    config.rank_pattern = {}
    config.feature_map = "elu"
    fit_sea(model, tmp_path / "store")
    expected = fitted(tmp_path / "other", feature_map="elu", input_scale=3.0)
    assert torch.equal(logits(model), logits(expected))


def test_ratios_of_other_projections_are_not_used(tmp_path):
    model = fitted(tmp_path / "store", rescale="token")
    config = model.peft_config["default"]
    config.projections = "exchanged"
    assert torch.equal(logits(model), logits(fitted(tmp_path / "other", projections="exchanged")))
    for prepare in (lambda: None, lambda: setattr(config, "rescale", "mean")):
        prepare()
        message = refusal(model.merge_adapter)
        assert "has no number 'strength': fit this adapter again" in message and "\n" not in message
    assert "has no number 'strength'" in refusal(logits, model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path / "adapter")
    assert "has no number 'strength'" in refusal(logits, loaded)
    fit_sea(model, tmp_path / "store")
    assert torch.equal(logits(model), logits(fitted(tmp_path / "third", projections="exchanged", rescale="mean")))


# After the only adapter was deleted


def answers():
    return [[EncodedAnswer(ids, 4) for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11])]]


class Tokenizer:
    def __call__(self, texts):
        return {"input_ids": [[5, 6, 7, 8] for _ in texts]}


@pytest.mark.parametrize("edit", [*EDITS, "LoRA"])
def test_after_the_only_adapter_was_deleted_a_model_is_its_base_model(edit):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if edit == "LoRA" else EDITS[edit]()
    model, base = get_peft_model(vivid_model(), config), vivid_model()
    model.delete_adapter("default")
    assert fingerprint(model) == fingerprint(base) and adapters_fingerprint(model) is None
    assert find_sites(model, "mlp") == find_sites(base, "mlp") and decoder_blocks(unwrap(model)) == decoder_blocks(base)
    assert answer_log_likelihoods(model, answers()) == answer_log_likelihoods(base, answers())
    assert perplexity(model, Tokenizer(), ["a"]) == perplexity(base, Tokenizer(), ["a"])
    for call in (
        lambda: fit_sea(model, "nowhere"),
        lambda: push_to_hub(model, "user/name"),
        lambda: push_to_hub(base, "user/name"),
    ):
        message = refusal(call)
        assert message and "\n" not in message
    if edit != "LoRA":
        torch.manual_seed(0)
        model.add_adapter("default", EDITS[edit]())
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), logits(edited_model(edit)))


@pytest.mark.parametrize("site", ["head", "MLP", "", None, "mlp.down_proj"])
def test_unknown_sites_are_refused(site):
    model = tiny_model()
    for options in ({}, {"target_modules": ["down_proj"]}):
        with pytest.raises(
            ValueError, match=f"^site must be one of 'mlp', 'block', 'attention', got {re.escape(repr(site))}$"
        ):
            find_sites(model, site, **options)


# Adapters that are added while the strength is another


def native(edit, **fields):
    torch.manual_seed(0)
    model = vivid_model()
    model.add_adapter(EDITS[edit](**fields), "first")
    return model


@every_edit
@pytest.mark.parametrize("how", ["add", "load", "native add", "native load"])
def test_adapters_that_are_added_inside_have_the_strength(tmp_path, edit, how):
    first, second = {"layers_to_transform": [0]}, {"layers_to_transform": [1, 2]}
    source = edited_model(edit, seed=1, **second)
    source.save_pretrained(tmp_path)
    model = native(edit, **first) if how.startswith("native") else edited_model(edit, **first)

    def add(name):
        torch.manual_seed(1)
        if how == "add":
            model.add_adapter(name, EDITS[edit](**second))
        elif how == "native add":
            model.add_adapter(EDITS[edit](**second), name)
        else:
            model.load_adapter(str(tmp_path), name)
        model.set_adapter(name)

    with edit_strength(model, 0.5), edit_strength(model, 0):
        add("second")
        assert torch.equal(logits(model), logits(vivid_model()))
        assert {layer.strength_factor for layer in layers_of(model, "second")} == {0}
        if merges(edit):
            assert "inside edit_strength" in refusal(layers_of(model, "second")[0].check_mergeable, "second")
    torch.testing.assert_close(logits(model), logits(source))
    with edit_strength(model, 0.5):
        add("third")
        model.delete_adapter("second")
        with edit_strength(source, 0.5):
            torch.testing.assert_close(logits(model), logits(source))
    assert all(not layer.strength_scopes and layer.strength_factor == 1 for layer in layers_of(model, "third"))


# Generation in which a forward pass has several new tokens

SEVERAL = {
    "assistant_model": lambda: {"assistant_model": tiny_model()},
    "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 3},
    "prompt_lookup_num_tokens=3": lambda: {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    "prefill_chunk_size": lambda: {"prefill_chunk_size": 2},
    "use_cache=False": lambda: {"use_cache": False},
}


def test_a_forward_pass_does_not_ask_again_what_generate_takes(monkeypatch):
    """Decoding has one for each token."""
    model = edited_model(SCOPED[0], token_scope="last")
    expected = logits(model)
    monkeypatch.setattr("peft_edit.tuners.generation.GenerationConfig", None)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "edit, way, task_type",
    [(e, way, (None, "CAUSAL_LM")[(i + j) % 2]) for i, e in enumerate(SCOPED) for j, way in enumerate(SEVERAL)],
)
def test_an_edit_of_the_last_token_refuses_several_at_once(edit, way, task_type):
    """Each edit and each way with both kinds of PEFT's models."""
    ids = token_ids(1)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    model = edited_model(edit, task_type=task_type, token_scope="last")
    model.generate(**options)
    logits(model, use_cache=False)  # a forward pass has no other meaning
    message = refusal(model.generate, **options, **SEVERAL[way]())
    assert "'default' edits the last token of a forward pass only (token_scope='last')" in message
    assert f"and with {way}" in message and message.endswith("set token_scope='all'") and "\n" not in message
    with model.disable_adapter():
        model.generate(**options, **SEVERAL[way]())
    config = model.peft_config["default"]
    config.token_scope = "all"
    expected = model.generate(**options, return_dict_in_generate=False)
    if way != "prompt_lookup_num_tokens=3":  # with whose configuration other defaults come
        assert torch.equal(model.generate(**options, **SEVERAL[way]()), expected)


@pytest.mark.parametrize("edit", SCOPED)
def test_a_model_that_has_the_adapter_itself_is_not_asked(edit):
    """As examples/hpr.md says."""
    model, ids = native(edit, token_scope="last"), token_ids(1)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("edit", SCOPED)
def test_rows_of_an_adapter_that_edits_the_last_token_too(edit):
    model = edited_model(edit, token_scope="last")
    ids = token_ids(2)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "use_cache": False}
    assert "token_scope" in refusal(model.generate, **options, adapter_names=["__base__", "default"])
    model.generate(**options, adapter_names=["__base__", "__base__"])


# A fit whose result no float32 holds


@pytest.mark.parametrize("options", [{}, {"scale_to_rms": True}], ids=str)
def test_a_difference_beyond_float32_is_refused(tmp_path, options):
    sets = {
        sign: {i: torch.full((4, 32), value, dtype=torch.float64) for i in range(3)}
        for sign, value in (("positive", 1e39), ("negative", -1e39), ("neutral", 0.0))
    }
    store = ActivationStore.from_tensors(tmp_path / "store", **sets, site="block")
    model = get_peft_model(vivid_model(), MeanDifferenceConfig(**options))
    message = refusal(fit_mean_difference, model, store)
    assert message.startswith("layer 0: the activations of ") and "float32" in message and "\n" not in message
    assert model.peft_config["default"].fit_statistics == {}


# Names of modules that match nothing


@every_edit
@pytest.mark.parametrize("names", ["", "(", "absent", ["absent"], [], [""], r"model\.absent", ["("]], ids=str)
def test_names_that_match_nothing_are_one_line_of_ours(edit, names):
    model = tiny_model()
    shown = names if isinstance(names, str) else sorted(names)
    part = (
        "must be a list of names or a regular expression" if names == "(" else "no module of LlamaForCausalLM matches"
    )
    calls = [
        lambda: get_peft_model(tiny_model(), EDITS[edit](target_modules=names)),
        lambda: tiny_model().add_adapter(EDITS[edit](target_modules=names)),
        lambda: find_sites(model, at(edit), target_modules=names),
    ]
    for call in calls:
        message = refusal(call)
        assert part in message and repr(shown) in message and "\n" not in message
        assert "target_modules" in message
