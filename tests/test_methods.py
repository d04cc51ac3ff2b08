"""What every method of the registry does alike, as a PEFT method and inside a model, at every site that it offers."""

import contextlib
import copy
import functools
import importlib
import itertools
import json
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import peft
import pytest
import torch
from edits import (
    EDITS,
    METHOD_OF,
    at,
    edited_model,
    layers_of,
    merges,
    outputs,
    own_parameters,
    refusal,
    trains,
    two_adapters,
)
from loading import PATHS, bare_tensors, base_of, link_base, saved_tensors, with_peft
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from stores import write_pair_store
from tiny import FAMILIES, LargestNew, agree, base_logits, logits, relative, token_ids, vivid_model

import peft_edit
from peft_edit import ActivationStore, edit_strength, select_layers
from peft_edit.adapters.match import replace_config
from peft_edit.arguments import choices_of
from peft_edit.models.sites import find_sites
from peft_edit.tuners.layer import edit_layers
from peft_edit.tuners.method import methods
from peft_edit.tuners.registration import register_with_peft


HIDDEN = 32
REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = methods()
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_edit = pytest.mark.parametrize("edit", EDITS)


def every_pair(name, values):
    """Parametrises with each edit in each family, and takes turns with the values of a further parameter: each edit
    meets all values, and so does each family. What a value changes depends on one of the two at most."""
    turns = [
        (edit, family, list(values)[(i + j) % len(values)])
        for i, edit in enumerate(EDITS)
        for j, family in enumerate(FAMILIES)
    ]
    return pytest.mark.parametrize(f"edit, family, {name}", turns)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def llama():
    return vivid_model()


def two(edit, family="llama"):
    """Adapters "default" at every block and "other" at the last two."""
    return two_adapters(edit, family, second={"layers_to_transform": [1, 2]})


def fresh(edit, **changes):
    """A configuration of a new adapter, which is the identity."""
    return EDITS[edit](init_weights=True, **changes)


# Registration


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    members, classes, known = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), methods()
    importlib.reload(peft_edit)
    importlib.import_module("peft_edit")
    assert list(PeftType) == members and classes == PEFT_TYPE_TO_CONFIG_MAPPING and methods() == known
    assert all([member.value for member in members].count(name) == 1 for name in METHODS)


@every_method
def test_another_method_of_the_name_is_refused(method):
    class Other(method.config):
        pass

    with pytest.raises(ValueError, match=rf"PEFT has a method {method.name} already \(peft_edit.tuners"):
        register_with_peft(Other, method.model)


@every_method
def test_peft_type_is_a_real_member(method):
    member = getattr(PeftType, method.name)
    assert isinstance(member, PeftType) and isinstance(member, str)
    for same in (
        PeftType(method.name),
        PeftType[method.name],
        pickle.loads(pickle.dumps(member)),
        copy.copy(member),
        copy.deepcopy(member),
        PeftType(json.loads(json.dumps(member))),
    ):
        assert same is member
    assert member == method.name == member.name == member.value and member in PeftType and member in list(PeftType)
    assert {member: 1}[PeftType(method.name)] == 1


def test_peft_knows_the_methods_only_after_our_import(tmp_path):
    """PEFT has no plug-in point: without the import a saved adapter is unknown to it."""
    for method in METHODS.values():
        method.config().save_pretrained(tmp_path / method.name)
    code = f"""
from peft import PeftConfig
for name in {list(METHODS)}:
    try:
        PeftConfig.from_pretrained({str(tmp_path)!r} + "/" + name)
    except KeyError as error:
        print("KeyError:", error)
import peft_edit
for name in {list(METHODS)}:
    print(type(PeftConfig.from_pretrained({str(tmp_path)!r} + "/" + name)).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    unknown = [f"KeyError: {name!r}" for name in METHODS]
    assert result.stdout.splitlines() == unknown + [method.config.__name__ for method in METHODS.values()]


# Configuration

SHARED = {
    "target_modules": {"down_proj", "c_proj"},
    "exclude_modules": {"lm_head"},
    "layers_to_transform": range(1, 3),
    "base_model_fingerprint": "0123456789abcdef",
    "fitted_on": {"data": "truthful_qa", "questions": 367},
    "calibration": {"kl_p95": 0.4, "budget": 0.5, "texts": "01ab", "tokens": 70},
    "init_weights": False,
    "modules_to_save": ["lm_head"],
}


def other_values(config_cls):
    """Values, not the default ones, of a configuration's choices, flags and numbers."""
    hints = get_type_hints(config_cls)
    for field in fields(config_cls):
        if field.name in SHARED or field.name in {own.name for own in fields(PeftConfig)}:
            continue
        values = [not field.default] if isinstance(field.default, bool) else choices_of(hints[field.name])
        if not values and isinstance(field.default, (int, float)):
            values = [type(field.default)(0.9 * field.default + 1)] if isinstance(field.default, int) else [0.1 + 0.2]
        yield from ((field.name, value) for value in values if value != field.default)


@every_method
def test_fields_survive_json(method, tmp_path):
    configs = [method.config(**SHARED, task_type="CAUSAL_LM", inference_mode=True)]
    configs += [method.config(**{name: value}) for name, value in other_values(method.config)]
    for config in configs:
        config.save_pretrained(tmp_path)
        for again in (method.config.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert type(again) is method.config and again == config and again.peft_type is PeftType(method.name)
        assert peft.get_peft_config(config.to_dict()) == config
        assert method.config(**{**again.to_dict(), "peft_type": method.name}) == config
    assert configs[0].layers_to_transform == [1, 2] and configs[0].target_modules == SHARED["target_modules"]


@every_method
@pytest.mark.parametrize(
    "layers, expected",
    [(None, None), (2, [2]), (0, [0]), (range(2), [0, 1]), ([3, 1, 3], [1, 3]), ({2, 0}, [0, 2]), ((1,), [1])],
)
def test_layers_become_a_sorted_list(method, layers, expected):
    assert method.config(layers_to_transform=layers).layers_to_transform == expected


NAMES = "must be a list of names or a regular expression, got"


@every_method
@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"layers_to_transform": -1}, ["layers_to_transform must", "0 or more", "-1"]),
        ({"layers_to_transform": []}, ["layers_to_transform must", "[]"]),
        ({"layers_to_transform": [True]}, ["layers_to_transform must", "True"]),
        ({"layers_to_transform": 1.5}, ["layers_to_transform must", "1.5"]),
        ({"layers_to_transform": "all"}, ["layers_to_transform must", "all"]),
        ({"layers_to_transform": ["1"]}, ["layers_to_transform must", "'1'"]),
        ({"init_weights": "no"}, ["init_weights", "True or False", "'no'"]),
        ({"base_model_fingerprint": 1}, ["base_model_fingerprint", "text", "1"]),
        ({"fitted_on": "truthful_qa"}, ["fitted_on must be an object", "'truthful_qa'"]),
        ({"fitted_on": {"data": 5}}, ["fitted_on.data must be text or null, got 5"]),
        ({"base_model_name_or_path": 5}, ["base_model_name_or_path must be text", "5"]),
        *(
            ({field: names}, [field, NAMES])
            for field in ("target_modules", "exclude_modules")
            for names in (5, "(", [1], {"down_proj": 1})
        ),
    ],
    ids=str,
)
def test_bad_values_raise_one_clear_line(method, fields, parts):
    message = refusal(method.config, **fields)
    assert "\n" not in message and all(part in message for part in parts), message


@every_method
def test_bad_values_are_refused_when_they_are_set_later(method):
    """As gate and strength are, at run time."""
    config = method.config()
    for field in fields(method.config):
        choices, number = choices_of(get_type_hints(method.config)[field.name]), type(getattr(config, field.name))
        if field.name in {own.name for own in fields(PeftConfig)} or not (choices or number in (int, float)):
            continue
        before, bad = getattr(config, field.name), "nonsense" if choices else float("nan")
        with pytest.raises(ValueError, match=f"^{field.name} must be .*got {bad!r}"):
            setattr(config, field.name, bad)
        assert getattr(config, field.name) == before


@pytest.mark.parametrize(
    "config, fields",
    [
        (method.config, fields)
        for method in methods().values()
        for fields in (
            {"fit_statistics": {"model.layers.0": 5}},
            {"fit_statistics": {"model.layers.0": {"rms": "x", "norm": None}}},
            {"fit_statistics": []},
            {"rank_pattern": []},
            {"probe_accuracy": [1]},
            {"probe_accuracy": {"0": "x"}},
            {"probe_accuracy": {"first": 0.5}},
        )
        if hasattr(method.config(), next(iter(fields)))
    ],
    ids=str,
)
def test_what_a_fit_writes_is_checked(config, fields):
    message = refusal(config, **fields)
    assert re.match(rf"{next(iter(fields))}(\[[^ ]*\]|\.\w+)* (must be|has no) ", message) and "\n" not in message


@every_edit
def test_layers_that_the_model_lacks_are_named(llama, edit):
    message = refusal(get_peft_model, llama, fresh(edit, layers_to_transform=3))
    assert "\n" not in message and "3" in message


# The identity until it learns


@every_family
@every_edit
def test_new_adapter_is_the_identity(family, edit):
    model = get_peft_model(vivid_model(family), fresh(edit))
    assert torch.equal(logits(model), base_logits(family)) and len(layers_of(model)) == 3
    model.train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == (set(own_parameters(model)) if trains(edit) else set())


@every_edit
def test_new_adapter_is_the_identity_in_bfloat16_with_autocast(edit):
    base = vivid_model(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(base)
        assert torch.equal(logits(get_peft_model(base, fresh(edit))), expected)


# What an adapter is made of


@every_family
@every_edit
def test_base_key_names_and_attributes_stay(family, edit):
    """Of what is edited by a hook; a layer that is replaced keeps its name and has the base layer below."""
    base = vivid_model(family)
    names, attributes = set(base.state_dict()), [sorted(vars(base.get_submodule(n))) for n in sites_of(base)]
    inner = edited_model(edit, family).get_base_model()
    prefix = METHOD_OF[edit].model.prefix
    kept = {name.replace(".base_layer.", ".") for name in inner.state_dict() if f".{prefix}" not in name}
    assert kept == names
    assert [sorted(vars(inner.get_submodule(name))) for name in sites_of(inner)] == attributes


def sites_of(model):
    return find_sites(model, "block").values()


@every_edit
def test_names_of_what_is_saved_begin_with_the_methods(edit):
    model = edited_model(edit, layers_to_transform=[0, 2])
    sites, prefix = find_sites(vivid_model(), at(edit)), METHOD_OF[edit].model.prefix
    names = get_peft_model_state_dict(model)
    assert names and "default" not in " ".join(names)
    for name in names:
        site, own, _ = name.removeprefix("base_model.model.").rpartition(f".{prefix}")
        assert own and site.removesuffix(f".{prefix.removesuffix('_')}") in (sites[0], sites[2]), name


@every_edit
def test_status_shows_the_adapters(edit):
    model = two(edit)
    layers = model.get_layer_status()
    names = [name for name, module in model.named_modules() if isinstance(module, METHOD_OF[edit].layer)]
    assert [status.name for status in layers] == [name.removeprefix("base_model.") for name in names]
    assert [status.available_adapters for status in layers] == [["default"], ["default", "other"], ["default", "other"]]
    assert all(status.enabled and status.merged_adapters == [] for status in layers)
    active = {"default": trains(edit)}
    assert [status.requires_grad for status in layers] == [active, *[{**active, "other": False}] * 2]
    status = model.get_model_status()
    tuner = METHOD_OF[edit].model.__name__
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", tuner)
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3)
    assert status.available_adapters == ["default", "other"]
    assert (status.trainable_params > 0) == trains(edit)


@every_edit
def test_gradients_are_those_of_the_active_adapter(edit):
    """Also through all that PEFT does to adapters: what is frozen stays so."""
    model = two(edit)
    steps = (
        (lambda: model.set_adapter("other"), ["other"]),
        (lambda: model.base_model.set_adapter(["default", "other"]), ["default", "other"]),
        (lambda: model.base_model.disable_adapter_layers(), []),
        (lambda: model.base_model.enable_adapter_layers(), ["default", "other"]),
        (lambda: model.set_adapter("default"), ["default"]),
        (lambda: model.delete_adapter("other"), ["default"]),
        (lambda: model.train(), ["default"]),
        (lambda: model.add_adapter("third", EDITS[edit]()), ["default"]),
        (lambda: model.set_requires_grad("default", True), ["default"]),
    )
    for step, active in steps:
        step()
        expected = {n for n in own_parameters(model) if any(f".{name}." in n for name in active)}
        found = {name for name, p in model.named_parameters() if p.requires_grad}
        assert found == (expected if trains(edit) else set())


# The edit


@every_family
@every_edit
def test_edit_changes_its_sites_only(family, edit):
    before, after = outputs(vivid_model(family), edit), outputs(edited_model(edit, family, layers_to_transform=1), edit)
    assert torch.equal(after[0], before[0]) and relative(after[1], before[1]) > 0.1
    model = edited_model(edit, family, layers_to_transform=1)
    (layer,) = layers_of(model)
    torch.testing.assert_close(after[1], layer.edit(before[1], "default"))
    assert relative(logits(model), base_logits(family)) > 1e-3
    # The names that the configuration is given are of this block alone.
    again = get_peft_model(vivid_model(family), model.peft_config["default"])
    assert again.base_model.targeted_module_names == [find_sites(vivid_model(family), at(edit))[1]]


@every_family
@every_edit
def test_hidden_states_show_the_edit(family, edit):
    base = vivid_model(family)
    before = base(token_ids(), output_hidden_states=True).hidden_states  # Transformers' hooks stay from here on
    seen = []
    base.get_submodule(find_sites(base, "block")[1]).register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model = get_peft_model(base, EDITS[edit](layers_to_transform=1))
    after = model(input_ids=token_ids(), output_hidden_states=True).hidden_states
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert torch.equal(after[2], seen[-1]) and torch.equal(after[2], outputs(model)[1])
    assert relative(after[2], before[2]) > 0.01


@every_family
@every_edit
def test_later_tokens_and_neighbours_do_not_matter(family, edit):
    model = edited_model(edit, family)
    ids, other = token_ids(), token_ids()
    other[:, 5:] = token_ids(seed=1)[:, 5:]
    torch.testing.assert_close(logits(model, ids)[:, :5], logits(model, other)[:, :5], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model, ids)[:1], logits(model, ids[:1]), rtol=0, atol=2e-5)


@every_family
@every_edit
def test_cached_decoding_equals_prefill(family, edit):
    model = edited_model(edit, family)
    ids = token_ids()
    cache, steps = None, []
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, ids.shape[1]))):
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=0, atol=2e-5)
    options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids), **GREEDY}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, full = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, full.sequences) and cached.sequences.shape[1] == ids.shape[1] + 5
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=0, atol=2e-5)


@every_family
@every_edit
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, edit, side):
    model = edited_model(edit, family)
    ids = token_ids(1, 6)
    filler, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
    order = slice(None, None, 1 if side == "right" else -1)
    padded, mask = torch.cat((ids, filler)[order], dim=1), torch.cat((mask, filler)[order], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    actual = logits(model, padded, attention_mask=mask, position_ids=positions)[mask.bool()]
    torch.testing.assert_close(actual[None], logits(model, ids), rtol=0, atol=2e-5)


@every_pair("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(edit, family, dtype):
    """The adapter stays in float32, and what it does to a site is near; also where it is rounded too."""
    model = edited_model(edit, family, dtype=dtype, layers_to_transform=0)
    assert {p.dtype for p in own_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == dtype and logits(model).isfinite().all()
    before, after = outputs(vivid_model(family, dtype), edit)[0], outputs(model, edit)[0]
    (layer,) = layers_of(model)
    assert relative(after, layer.edit(before.float(), "default")) < 0.01 and relative(after, before) > 0.1
    rounded = outputs(model.to(dtype), edit)[0]
    assert rounded.dtype == dtype and relative(rounded, after) < 0.03


@every_edit
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(edit, reentrant):
    gradients = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            model = edited_model(edit).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            embedded = []
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, out, seen=embedded: out.retain_grad() or seen.append(out)
            )
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
            gradients[-1]["embedded"] = embedded[0].grad
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def scale(model, factor):
    for parameter in own_parameters(model).values():
        parameter.mul_(factor)


@every_pair("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_edit_on_their_own(edit, family, duplicate):
    torch.manual_seed(0)
    model = get_peft_model(vivid_model(family), EDITS[edit]()).eval()  # no copy itself
    expected = logits(model)
    other = duplicate(model)
    assert torch.equal(logits(other), expected)
    layers = edit_layers(other)
    assert all(layer.configs["default"] is other.peft_config["default"] for layer in layers)
    assert not any(layer in edit_layers(model) for layer in layers)
    scale(other, 0.5)
    assert relative(logits(other), expected) > 1e-3 and torch.equal(logits(model), expected)
    originals = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in originals for parameter in other.parameters())
    assert torch.equal(logits(other.unload()), base_logits(family))
    assert torch.equal(logits(model), expected)


@every_family
@every_edit
def test_forward_makes_no_square_matrix(family, edit):
    model = edited_model(edit, family)
    ids = token_ids(1, 3)
    logits(model, ids)  # the first use also checks the weights
    with LargestNew(model) as seen:
        logits(model, ids)
    assert 0 < seen.largest < HIDDEN**2


# Several adapters


@functools.cache
def alone(edit, family, name, rows=2):
    """Logits with one adapter alone, or of the base model."""
    if name == "__base__":
        return logits(vivid_model(family), token_ids(rows))
    model = two(edit, family)
    model.set_adapter(name)
    return logits(model, token_ids(rows))


@every_family
@every_edit
def test_switching_and_disabling(family, edit):
    model = two(edit, family)
    expected = {name: alone(edit, family, name) for name in ("__base__", "default", "other")}
    assert torch.equal(logits(model), expected["default"])
    model.set_adapter("other")
    assert torch.equal(logits(model), expected["other"])
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["__base__"])
    assert torch.equal(logits(model), expected["other"])
    assert relative(expected["other"], expected["default"]) > 1e-3
    assert torch.equal(expected["__base__"], base_logits(family))


@every_family
@every_edit
def test_two_active_adapters_edit_in_their_order(family, edit):
    h = outputs(vivid_model(family), edit)[2]
    only = {"layers_to_transform": 2}
    for names in (["default", "other"], ["other", "default"]):
        model = two_adapters(edit, family, first=only, second=only)
        model.base_model.set_adapter(names)
        (layer,) = layers_of(model)
        once = layer.edit(h, names[0])
        twice = layer.edit(once, names[1])
        torch.testing.assert_close(outputs(model, edit)[2], twice)
        assert relative(twice, once) > 1e-3


@every_family
@every_edit
def test_deleting_adapters(family, edit):
    model = two(edit, family)
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone(edit, family, "default"))
    assert list(model.peft_config) == ["default"] and not any("other" in name for name in model.state_dict())
    assert all(list(layer.configs) == ["default"] for layer in edit_layers(model))
    with pytest.raises(ValueError, match="other does not exist"):
        model.delete_adapter("other")
    model = two(edit, family)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), alone(edit, family, "other"))
    assert not any("default" in name for name in model.state_dict())
    model.add_adapter("default", fresh(edit))  # the name is free again, and new
    model.set_adapter("default")
    assert torch.equal(logits(model), base_logits(family))
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model), base_logits(family))


ROWS = ["default", "other", "__base__", "default"]


@every_family
@every_edit
def test_mixed_batch_equals_each_adapter_alone(family, edit):
    model = two(edit, family)
    ids = token_ids(4)
    actual = logits(model, ids, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(actual[row], alone(edit, family, name, 4)[row], rtol=0, atol=2e-5)
    bare = logits(model, adapter_names=["__base__"] * 2)
    torch.testing.assert_close(bare, base_logits(family), rtol=0, atol=2e-5)
    assert torch.equal(logits(model, ids), alone(edit, family, "default", 4))  # nothing is left behind


@every_pair("beams", [1, 2])
def test_mixed_generation_equals_each_adapter_alone(edit, family, beams):
    model = two(edit, family)
    ids = token_ids(4, 5)
    options = {"max_new_tokens": 3, "num_beams": beams, **GREEDY}
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=ROWS, **options)
    for name in dict.fromkeys(ROWS):
        rows = [row for row, other in enumerate(ROWS) if other == name]
        these = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), **options}
        assert torch.equal(model.generate(adapter_names=[name] * len(rows), **these), mixed[rows])
        model.set_adapter(name if name != "__base__" else "default")
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            assert torch.equal(model.generate(**these), mixed[rows])


@every_edit
def test_mixed_generation_of_several_answers(edit):
    model = two(edit)
    ids = token_ids(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    answers = model.generate(
        input_ids=ids, adapter_names=["default", "other"], do_sample=True, num_return_sequences=3, **options
    )
    assert answers.shape == (6, 8)
    config = copy.deepcopy(model.generation_config)
    config.update(num_beams=4, num_return_sequences=2, do_sample=False)
    kept = model.generate(input_ids=ids, adapter_names=["default", "other"], generation_config=config, **options)
    assert kept.shape == (4, 8)


@pytest.mark.parametrize("family", ["llama", "opt"])
@every_edit
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_wrong_number_of_names(family, edit, task_type):
    model = edited_model(edit, family, task_type=task_type)
    ids = token_ids(4, 6)
    mask = torch.ones_like(ids)
    model.generation_config.num_beams = 2
    names = ["default", "__base__", "__base__", "default"]
    expected = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=2)
    assert torch.equal(model.generate(ids, attention_mask=mask, adapter_names=names, max_new_tokens=2), expected)
    for length in (1, 2, 3, 5, 8):
        names = ["default"] * length
        for message in (
            refusal(logits, model, ids, adapter_names=names),
            refusal(model.generate, input_ids=ids, attention_mask=mask, adapter_names=names),
            refusal(model.generate, ids, attention_mask=mask, adapter_names=names, num_return_sequences=2),
        ):
            assert message == (
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{length} and 4 respectively."
            )
    assert not model.base_model.model._forward_pre_hooks
    logits(model, ids)


@every_edit
def test_other_misuse_of_names(edit):
    model = two(edit)
    with pytest.raises(ValueError, match=r"^Trying to infer with non-existing adapter\(s\): absent, missing$"):
        logits(model, adapter_names=["missing", "absent"])
    model.train()
    with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when the model is in training mode\.$"):
        logits(model, adapter_names=["default", "other"])
    model.eval()
    if merges(edit):
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when there are merged adapters"):
            logits(model, adapter_names=["default", "other"])


@every_edit
def test_mixed_batch_with_embeddings_as_input(edit):
    model = two(edit)
    embedded = model.get_input_embeddings()(token_ids())
    actual = model(inputs_embeds=embedded, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(actual, logits(model, adapter_names=["other", "default"]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(inputs_embeds=embedded, adapter_names=["other"])


@every_edit
def test_native_adapters(llama, edit):
    """Transformers' own `add_adapter` and its companions, without a `PeftModel`."""
    expected = {name: alone(edit, "llama", name) for name in ("default", "other")}
    llama.add_adapter(fresh(edit), "new")
    assert torch.equal(logits(llama), base_logits())
    torch.manual_seed(0)
    llama.add_adapter(EDITS[edit]())
    torch.manual_seed(1)
    llama.add_adapter(EDITS[edit](layers_to_transform=[1, 2]), "other")
    for name, result in expected.items():
        llama.set_adapter(name)
        assert llama.active_adapters() == [name]
        agree(logits(llama), result)
    llama.disable_adapters()
    assert torch.equal(logits(llama), base_logits())
    llama.enable_adapters()
    assert any(p.requires_grad for p in own_parameters(llama).values()) == trains(edit)
    llama.delete_adapter(["new", "default", "other"])
    assert torch.equal(logits(llama), base_logits())


# edit_strength


@every_family
@every_edit
def test_strength_from_the_base_model_to_more_than_the_edit(family, edit):
    model = edited_model(edit, family)
    edited = logits(model)
    with edit_strength(model, 0):
        assert torch.equal(logits(model), base_logits(family))
    with edit_strength(model, 1) as nothing:
        assert nothing is None and torch.equal(logits(model), edited)
    with edit_strength(model, 0.75):
        less = logits(model)
    assert relative(less, edited) > 1e-3
    with edit_strength(model, 1.5):
        assert relative(logits(model), edited) > 1e-3
        with edit_strength(model, 0.5):
            agree(logits(model), less)
    with pytest.raises(RuntimeError, match="inside"), edit_strength(model, 0.5):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), edited)


@every_edit
def test_strength_of_native_and_mixed_adapters(llama, edit):
    llama.add_adapter(EDITS[edit]())
    with edit_strength(llama, 0):
        assert torch.equal(logits(llama), base_logits())
    model = two(edit)
    with edit_strength(model, 0):
        mixed = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, base_logits(), rtol=0, atol=2e-5)


@every_edit
@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_bad_strengths_are_refused(edit, strength):
    match = f"^strength must be .*0 or more and finite, got {strength}"
    with pytest.raises(ValueError, match=match), edit_strength(edited_model(edit), strength):
        pass


def test_strength_without_edits_is_refused(llama):
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no edit whose strength"), edit_strength(llama, 0.5):
        pass


# Merging and unloading. In GPT-2 every linear layer has a bias; what merges there may not in Llama.

MERGES = {
    "merge": lambda model, **options: model.merge_adapter(**options),
    "merge by name": lambda model, **options: model.merge_adapter(["default"], **options),
    "merge and unload": lambda model, **options: model.merge_and_unload(**options),
}
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
MERGING = [(edit, family) for edit in EDITS for family in FAMILIES if merges(edit, family)]
REFUSING = [(edit, family) for edit in EDITS for family in FAMILIES if not merges(edit, family)]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    assert not any(layer.merged for layer in edit_layers(model))


@pytest.mark.parametrize("edit, family", MERGING)
def test_merged_weights_edit_alike(edit, family):
    model = two(edit, family)
    expected, before = logits(model), weights(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        edited = logits(model)
        model.merge_adapter(safe_merge=name == "other")
        torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert_unchanged(model, before)
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert not edit_layers(merged) and set(merged.state_dict()) == set(vivid_model(family).state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edit, family", MERGING)
def test_strength_and_merging_exclude_each_other(edit, family):
    model = edited_model(edit, family)
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
        assert torch.equal(logits(model), base_logits(family))


@pytest.mark.parametrize("edit, family", REFUSING)
def test_merging_is_refused_with_the_reason_and_changes_nothing(edit, family):
    model = two(edit, family)
    names, expected, before = [name for name, _ in model.named_modules()], logits(model), weights(model)
    for merge, safe in itertools.product(MERGES, (False, True)):
        message = refusal(MERGES[merge], model, safe_merge=safe)
        assert message and "\n" not in message, (merge, safe)
        assert "'default' cannot be merged: " in message and "keep it as an adapter" in message
        assert [name for name, _ in model.named_modules()] == names
        assert_unchanged(model, before)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("edit, family", MERGING)
@every_merge
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("used", [False, True])
def test_an_adapter_that_is_broken_is_not_merged(edit, family, merge, value, used):
    """`safe_merge` says it as PEFT does; without it too the weights stay."""
    model = edited_model(edit, family)
    if used:
        logits(model)  # so that the weights have been looked at
    *_, last = own_parameters(model).values()
    last.view(-1)[-1] = value
    before = weights(model)
    assert refusal(merge, model, safe_merge=True) == (
        "NaNs detected in the merged weights. The adapter default seems to be broken"
    )
    message = refusal(merge, model)
    assert "'default'" in message and "NaN or infinite" in message and "\n" not in message
    assert_unchanged(model, before)


@every_family
@every_edit
def test_unloading_restores_the_base_model(family, edit):
    base = vivid_model(family)
    hooks = {name: len(module._forward_hooks) for name, module in base.named_modules()}
    model = get_peft_model(base, EDITS[edit]())
    model.add_adapter("other", fresh(edit, layers_to_transform=[1]))
    assert relative(logits(model), base_logits(family)) > 1e-3
    bare = model.unload()
    assert bare is base and torch.equal(logits(bare), base_logits(family))
    assert {name: len(module._forward_hooks) for name, module in bare.named_modules()} == hooks
    assert set(bare.state_dict()) == set(vivid_model(family).state_dict())
    again = get_peft_model(bare, fresh(edit))
    assert torch.equal(logits(again), base_logits(family)) and len(layers_of(again)) == 3


# Saving and loading


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes, once, the folder of a base model and of an adapter of it, whose logits it returns too."""

    @functools.cache
    def folder(edit, family="llama", dtype=torch.float32):
        path = tmp_path_factory.mktemp("saved")
        link_base(path, family, dtype)
        base = base_of(path, dtype=dtype)
        torch.manual_seed(0)
        model = get_peft_model(base, EDITS[edit](layers_to_transform=[0, 2])).eval()
        model.save_pretrained(path / "adapter")
        return path, logits(model)

    return folder


every_path = pytest.mark.parametrize("load", PATHS.values(), ids=PATHS)


@every_family
@every_edit
def test_saved_files(folder_of, family, edit):
    path, _ = folder_of(edit, family)
    names = sorted(file.name for file in (path / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = saved_tensors(path)
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == METHOD_OF[edit].name
    assert Path(config["base_model_name_or_path"]).samefile(path / "base")


@pytest.mark.parametrize(
    "edit, path_name, family",
    [(e, p, FAMILIES[(i + j) % len(FAMILIES)]) for i, e in enumerate(EDITS) for j, p in enumerate(PATHS)],
)
def test_every_path_gives_the_saved_model(folder_of, edit, path_name, family):
    """Every edit by every path, and every family with all of the edits and by all of the paths."""
    load = PATHS[path_name]
    path, expected = folder_of(edit, family)
    model = load(path)
    agree(logits(model), expected)
    adapter, sites = list(model.peft_config)[-1], find_sites(vivid_model(family), at(edit))
    assert [layer.site for layer in layers_of(model, adapter)] == [sites[0], sites[2]]
    assert all(config is model.peft_config[n] for layer in edit_layers(model) for n, config in layer.configs.items())
    own = own_parameters(model)
    assert not any(parameter.is_meta for parameter in own.values())
    if load is PATHS["trainable"]:
        assert {p.requires_grad for p in own.values()} == {trains(edit)}
    elif load not in (PATHS["inject"], PATHS["inject by tensors"], PATHS["second adapter"]):
        assert not any(parameter.requires_grad for parameter in own.values())


@every_edit
@every_path
def test_bfloat16_base_model(folder_of, edit, load):
    path, expected = folder_of(edit, dtype=torch.bfloat16)
    model = load(path, dtype=torch.bfloat16)
    assert expected.dtype == torch.bfloat16 and relative(logits(model), expected) < 0.01
    assert {p.dtype for p in own_parameters(model).values()} == {torch.float32}


@every_edit
def test_saving_again_writes_the_same(folder_of, tmp_path, edit):
    path, expected = folder_of(edit)
    PATHS["PeftModel"](path).save_pretrained(tmp_path / "adapter")
    first, second = bare_tensors(path), bare_tensors(tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (PeftConfig.from_pretrained(folder / "adapter") for folder in (path, tmp_path))
    assert first == second
    PATHS["load_adapter"](path).save_pretrained(tmp_path / "native")  # Transformers writes the adapter
    agree(logits(PeftModel.from_pretrained(base_of(path), tmp_path / "native")), expected)


@every_edit
def test_only_the_chosen_adapter_is_saved(folder_of, tmp_path, edit):
    path, expected = folder_of(edit)
    model = PATHS["second adapter"](path)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    agree(logits(PeftModel.from_pretrained(base_of(path), tmp_path / "second")), expected)
    assert len(get_peft_model_state_dict(model, adapter_name="second")) == len(saved_tensors(path))


@every_edit
@pytest.mark.parametrize("name", ["sea", "SEA", "mlp", "hpr", "hpr_angle", "0", "a-b", "base_layer", "weight"])
def test_any_adapter_name_can_be_saved(folder_of, tmp_path, edit, name):
    path, expected = folder_of(edit)
    with_peft(adapter_name=name)(path).save_pretrained(tmp_path)
    assert get_peft_model_state_dict(PATHS["PeftModel"](path)).keys() == saved_tensors(path).keys()
    native = base_of(path)
    native.load_adapter(tmp_path / name, adapter_name=name)
    agree(logits(native), expected)


@every_edit
def test_loading_is_quiet(folder_of, edit):
    path, _ = folder_of(edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's call
        for name in ("PeftModel", "low_cpu_mem_usage", "second adapter", "inject", "inject by tensors"):
            PATHS[name](path)


# The configuration is the object that the user gave, as with PEFT's own methods


def lora():
    return LoraConfig(target_modules=["down_proj"], init_lora_weights=False)


CONFIGS = {"LoRA": lora, **EDITS}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_configuration_is_the_users_object(make, tmp_path):
    config = make()
    model = get_peft_model(vivid_model(), config)
    assert model.peft_config["default"] is model.base_model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    second = make()
    loaded.add_adapter("second", second)
    assert loaded.peft_config["second"] is second
    native = vivid_model()
    native.add_adapter(third := make())
    assert native.peft_config["default"] is third
    assert torch.equal(logits(loaded), logits(model))
    for one in (loaded, native):
        configs = [item for layer in edit_layers(one) for item in layer.configs.items()]
        assert all(own is one.peft_config[name] for name, own in configs) and (configs or make is lora)


def learn_by_function(edit):
    """The public function of a method that fits an adapter to a store of rows, found by the name of its command."""
    return getattr(peft_edit, METHOD_OF[edit].learnt_by.replace("-", "_"), None)


def fit(edit, model, folder):
    generator = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(12, HIDDEN, generator=generator) for i in range(3)}
    negative, neutral = ({i: factor * row for i, row in rows.items()} for factor in (-1, 2))
    store = ActivationStore.from_tensors(
        folder / "store", positive=rows, negative=negative, neutral=neutral, site=at(edit)
    )
    learn_by_function(edit)(model, store)


def trainer_of(edit):
    """The public trainer of a method and its arguments, by the method's name; None where it has none."""
    names = (f"{METHOD_OF[edit].short}{what}" for what in ("Trainer", "TrainingArguments"))
    found = [getattr(peft_edit, name, None) for name in names]
    return None if None in found else found


def pairs_in(folder):
    generator = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(12, HIDDEN, generator=generator) for i in range(3)}
    modules = {str(i): f"model.layers.{i}" for i in range(3)}
    return write_pair_store(folder / "pairs", rows, torch.arange(12).view(2, 6).T, modules=modules)


def train(edit, model, folder):
    options = {"max_steps": 1, "eval_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    with torch.enable_grad():
        trainer, arguments = trainer_of(edit)
        trainer(model, arguments(folder / "out", **options), train_dataset=pairs_in(folder)).train()


def select(edit, model, folder):
    select_layers(model, pairs_in(folder), top_k=1)


LEARNING = [
    *((edit, fit) for edit in EDITS if learn_by_function(edit)),
    *((edit, train) for edit in EDITS if trainer_of(edit)),
    ("HPR", select),
]


def test_every_method_is_learnt_by_something():
    assert {edit for edit, _ in LEARNING} == set(EDITS)


@pytest.mark.parametrize("edit, learn", LEARNING)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_learning_leaves_the_users_object_as_it_was(tmp_path, edit, learn):
    """It belongs to the adapter: a configuration that is passed again makes a new adapter."""
    config = fresh(edit)
    model = get_peft_model(vivid_model(), config)
    model.add_adapter("other", config)
    before = copy.deepcopy(config)
    learn(edit, model, tmp_path)
    after = model.peft_config["default"]
    assert config == before and model.peft_config["other"] is config and after is not config and after != config
    assert all(layer.configs == {"default": after, "other": config} for layer in edit_layers(model))
    assert all(layer.configs["default"] is after for layer in edit_layers(model))
    again = get_peft_model(vivid_model(), config)
    assert torch.equal(logits(again), base_logits())


@every_edit
def test_a_new_configuration_is_that_of_one_adapter(llama, edit):
    config = fresh(edit)
    model = get_peft_model(llama, config)
    model.add_adapter("other", config)
    replaced = replace_config(model, "default", fitted_on={"questions": 7})
    assert replaced is model.peft_config["default"] and replaced is not config and config.fitted_on == {}
    for layer in edit_layers(model):
        assert layer.configs["default"] is replaced and layer.configs["other"] is config
