"""The blocks with the most accurate probes edit, and pruning the others changes nothing but the memory."""

import copy
import itertools
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from stores import write_pair_store
from test_training import (
    BAD_MODELS,
    BAD_STORES,
    KINDS,
    LAYERS,
    D,
    adapted,
    layers_of,
    native,
    on_meta,
    one_line_error,
    trained,
    weights,
    write_store,
)
from tiny import FAMILIES, LargestNew, tiny_model, token_ids, vivid_model

from peft_edit import HPRConfig, SEAConfig, fingerprint, select_layers
from peft_edit.models.sites import find_sites, unwrap
from peft_edit.tuners.hpr import select as selection


@pytest.fixture
def store(tmp_path):
    """Random rows, some in many pairs and some in none, in shards."""
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(40, D, generator=generator) for layer in LAYERS}
    pairs = torch.randint(0, 40, (70, 2), generator=generator)
    return write_store(tmp_path / "store", rows, pairs, shards=3)


def graded_store(path, right, pairs=10, modules=None):
    """Rows of which the probes along the first coordinate decide this many of 2 * `pairs` rightly, in each layer."""
    rows = {}
    for layer, count in right.items():
        correct = torch.arange(2 * pairs) < count
        positive = torch.arange(2 * pairs) >= pairs
        rows[layer] = torch.zeros(2 * pairs, D)
        rows[layer][:, 0] = torch.where(correct == positive, 1.0, -1.0)
    return write_store(path, rows, torch.arange(2 * pairs).view(2, pairs).T, modules=modules)


def along_first(model, adapter="default"):
    """The same model with probes along the first coordinate."""
    for layer in layers_of(model):
        if layer.has_adapter(adapter):
            weight = layer.hpr_probe[adapter].weight
            weight.data = torch.eye(1, D, dtype=weight.dtype)
    return model


def brute_force(store, model, adapter="default"):
    """Layer to the share of right decisions, counted one by one."""
    found = {}
    for index, layer in enumerate(layers_of(model)):
        w, rows = layer.hpr_probe[adapter].weight.detach()[0].double(), store.answer_tokens(index).double()
        right = [float(rows[p] @ w) > 0 for _, p in store.pairs().tolist()]
        right += [float(rows[n] @ w) <= 0 for n, _ in store.pairs().tolist()]
        found[index] = sum(right) / len(right)
    return found


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()}


def assert_same_state(one, other):
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def vivid(family="llama", **fields):
    """Every token is turned: the edit is sure to show."""
    return adapted(base=vivid_model(family), init_weights=False, gate=1.0, **fields).eval()


# What is selected


@pytest.mark.parametrize("chunk", [1, 7, 40, 16_384])
def test_accuracy_is_the_share_of_right_decisions(store, monkeypatch, chunk):
    monkeypatch.setattr(selection, "CHUNK_ROWS", chunk)
    model = adapted(init_weights=False)
    found = select_layers(model, store, top_k=1)
    expected = brute_force(store, model)
    assert found.accuracy == pytest.approx(expected, abs=1e-12) and len(set(expected.values())) == 3
    assert found.selected == [max(expected, key=expected.get)] and found.adapter_name == "default"


@pytest.mark.parametrize("shard_rows", [None, [150, 7, 143]])
def test_a_layer_is_read_in_chunks(tmp_path, monkeypatch, shard_rows):
    """So that a store of any size takes little memory."""
    generator = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(300, 32, generator=generator) for i in range(3)}
    modules = {str(i): f"model.layers.{i}" for i in range(3)}
    pairs = torch.arange(300).view(2, 150).T
    store = write_pair_store(tmp_path, rows, pairs, modules=modules, shard_rows=shard_rows)
    model = get_peft_model(tiny_model(), HPRConfig(init_weights=False))
    expected = select_layers(model, store, top_k=1).accuracy
    assert torch.equal(torch.cat(list(store.answer_chunks(1, 10))), rows[1])
    assert max(map(len, store.answer_chunks(1, 10))) == 10
    monkeypatch.setattr(selection, "CHUNK_ROWS", 10)
    with LargestNew(model) as new:
        assert select_layers(model, store, top_k=1).accuracy == expected
    assert new.largest < 2 * 300 <= rows[0].numel() / 2
    chunk = next(store.answer_chunks(0, 10))
    chunk.zero_()  # a caller's own
    assert torch.equal(next(store.answer_chunks(0, 10)), rows[0][:10])


def test_it_is_the_accuracy_that_the_training_reports(tmp_path, store):
    model = adapted()
    trainer = trained(model, tmp_path / "run", store, num_train_epochs=1)
    metrics = trainer.evaluate(store)
    accuracy = select_layers(model, store, top_k=2).accuracy
    assert accuracy == pytest.approx({i: metrics[f"eval_probe_accuracy_layer_{i}"] for i in LAYERS}, abs=1e-6)


@pytest.mark.parametrize("right", [*itertools.permutations((12, 15, 20)), (15, 15, 15), (12, 15, 15), (15, 12, 15)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_most_accurate_are_taken_and_of_equals_the_lower(tmp_path, right, k):
    store = graded_store(tmp_path / "store", dict(enumerate(right)))
    model = along_first(adapted())
    found = select_layers(model, store, top_k=k)
    assert found.accuracy == {layer: count / 20 for layer, count in enumerate(right)}
    assert found.selected == sorted(sorted(LAYERS, key=lambda layer: (-right[layer], layer))[:k])
    assert model.peft_config["default"].selected_layers == found.selected


@pytest.mark.parametrize(
    "threshold, expected",
    [(0, [0, 1, 2]), (0.6, [0, 1, 2]), (0.61, [1, 2]), (0.75, [1, 2]), (0.76, [2]), (1, [2]), (1.0, [2])],
)
def test_all_that_reach_the_threshold_are_taken(tmp_path, threshold, expected):
    store = graded_store(tmp_path / "store", {0: 12, 1: 15, 2: 20})
    assert select_layers(along_first(adapted()), store, threshold=threshold).selected == expected


def test_a_new_probe_is_right_half_of_the_time(store):
    assert select_layers(adapted(), store, threshold=0.5).accuracy == dict.fromkeys(LAYERS, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stores_and_adapters(tmp_path, store, dtype):
    rows = {layer: store.answer_tokens(layer).to(dtype) for layer in LAYERS}
    half = write_store(tmp_path / "half", rows, store.pairs())
    model = adapted(init_weights=False)
    assert select_layers(model, half, top_k=1).accuracy == pytest.approx(brute_force(half, model))
    assert select_layers(model.to(dtype), half, top_k=1).accuracy == pytest.approx(brute_force(half, model), abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family(tmp_path, family):
    model = along_first(vivid(family))
    sites = {str(layer): name for layer, name in find_sites(model, "block").items()}
    store = graded_store(tmp_path / "store", {0: 20, 1: 12, 2: 15}, modules=sites)
    before = logits(model)
    assert select_layers(model, store, top_k=1, prune=True).selected == [0]
    assert [layer.site for layer in layers_of(model)] == [sites["0"]]
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(vivid_model(family), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


# What is written


def test_the_configuration_survives_saving(tmp_path, store):
    model = adapted(init_weights=False)
    found = select_layers(model, str(store.path), top_k=2)
    config = model.peft_config["default"]
    assert config.selected_layers == found.selected and len(found.selected) == 2
    assert config.probe_accuracy == {str(layer): value for layer, value in found.accuracy.items()}
    assert json.loads(json.dumps(found.to_dict()))["selected"] == found.selected
    assert all(type(layer) is int for layer in config.selected_layers)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    again = HPRConfig.from_pretrained(tmp_path / "adapter")
    for name in ("selected_layers", "probe_accuracy"):
        assert written[name] == getattr(again, name) == getattr(config, name)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert loaded.peft_config["default"].probe_accuracy == config.probe_accuracy


def test_only_selected_layers_are_in_the_file(tmp_path):
    store = graded_store(tmp_path / "store", {0: 15, 1: 12, 2: 20})
    model = along_first(adapted())
    select_layers(model, store, top_k=2)
    assert {name.split(".")[2] for name in weights(model)} == {"0", "1", "2"}
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in tensors} == {"0", "2"} and len(tensors) == 2 * 9
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert {name.split(".")[2] for name in weights(again)} == {"0", "2"}


def test_nothing_else_is_changed(store):
    model = adapted(init_weights=False)
    before = state(model)
    select_layers(model, store, top_k=1)
    after = state(model)
    changed = {name for name in before[1]["default"] if before[1]["default"][name] != after[1]["default"][name]}
    assert changed == {"selected_layers", "probe_accuracy"}
    assert_same_state((before[0], {}), (after[0], {}))


# Pruning


def test_pruning_changes_no_logits_and_no_file(tmp_path):
    store = graded_store(tmp_path / "store", {0: 12, 1: 20, 2: 15})
    folders, outputs = [], []
    for prune in (False, True):
        model = along_first(vivid())
        full = logits(model)
        found = select_layers(model, store, top_k=1, prune=prune)
        assert found.selected == [1] and len(found.accuracy) == 3
        assert len(layers_of(model)) == (1 if prune else 3)
        outputs.append(logits(model))
        folders.append(tmp_path / str(prune))
        model.save_pretrained(folders[-1])
    assert torch.equal(*outputs) and not torch.equal(outputs[0], full)
    one, two = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == two and "adapter_model.safetensors" in one
    for folder in folders:
        assert torch.equal(logits(PeftModel.from_pretrained(vivid_model(), folder)), outputs[0])


def hooks(model):
    return [len(unwrap(model).get_submodule(name)._forward_hooks) for name in find_sites(model, "block").values()]


def test_a_pruned_block_has_neither_child_nor_hook(tmp_path):
    store = graded_store(tmp_path / "store", {0: 12, 1: 20, 2: 15})
    bare = hooks(tiny_model())
    model = along_first(adapted())
    select_layers(model, store, top_k=1, prune=True)
    blocks = [unwrap(model).get_submodule(name) for name in find_sites(model, "block").values()]
    assert [hasattr(block, "hpr") for block in blocks] == [False, True, False]
    assert [n - m for n, m in zip(hooks(model), bare, strict=True)] == [0, 1, 0]
    assert {name.split(".")[4] for name in model.state_dict() if "hpr_" in name} == {"1"}
    assert hooks(model.unload()) == bare


def two_adapters():
    """Adapters "default" and "other", both active, at every block."""
    model = vivid()
    torch.manual_seed(1)
    model.add_adapter("other", HPRConfig(init_weights=False, gate=1.0))
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


@pytest.mark.parametrize("adapter, beside", [("default", "other"), ("other", "default")])
def test_pruning_leaves_other_adapters_alone(tmp_path, adapter, beside):
    store = graded_store(tmp_path / "store", {0: 20, 1: 12, 2: 15})
    outputs = {}
    for prune in (False, True):
        model = along_first(two_adapters(), adapter)
        kept, hooked = weights(model, beside), hooks(model)
        select_layers(model, store, top_k=1, prune=prune, adapter_name=adapter)
        assert all(torch.equal(kept[n], t) for n, t in weights(model, beside).items()) and len(kept) == 27
        assert len(weights(model, beside)) == 27 and len(weights(model, adapter)) == (9 if prune else 27)
        assert hooks(model) == hooked and len(layers_of(model)) == 3
        outputs[prune] = [logits(model)]
        for name in (beside, adapter):
            model.set_adapter(name)
            outputs[prune].append(logits(model))
    assert all(torch.equal(x, y) for x, y in zip(*outputs.values(), strict=True))
    assert not torch.equal(outputs[True][1], outputs[True][2])


def test_pruning_keeps_edits_of_the_other_method(tmp_path):
    store = graded_store(tmp_path / "store", {0: 20, 1: 12, 2: 15})
    outputs = []
    for prune in (False, True):
        model = vivid_model()
        torch.manual_seed(0)
        model.add_adapter(SEAConfig(site="block", init_weights=False), "sea")
        model.add_adapter(HPRConfig(init_weights=False, gate=1.0), "hpr")
        along_first(model, "hpr")
        model.set_adapter(["sea", "hpr"])
        select_layers(model, store, top_k=1, prune=prune, adapter_name="hpr")
        outputs.append(logits(model))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], logits(vivid_model()))


def test_another_selection_may_follow(store):
    model = adapted(init_weights=False)
    first = select_layers(model, store, top_k=1)
    second = select_layers(model, store, top_k=2)
    assert second.accuracy == first.accuracy and set(first.selected) < set(second.selected)
    pruned = select_layers(model, store, top_k=2, prune=True)
    assert pruned == second
    third = select_layers(model, store, top_k=1)
    assert third.selected == first.selected and third.accuracy == {i: first.accuracy[i] for i in second.selected}
    one_line_error(lambda: select_layers(model, store, top_k=3), "top_k", "1 to 2")


def test_training_goes_on_with_the_selected_layers(tmp_path, store):
    model = adapted(init_weights=False)
    found = select_layers(model, store, top_k=2)
    before = weights(model)
    trained(model, tmp_path / "run", store, num_train_epochs=1)
    changed = {name.split(".")[2] for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {str(layer) for layer in found.selected}


# Other models


@pytest.mark.parametrize("prune", [False, True])
def test_a_model_on_meta(tmp_path, store, prune):
    results = []
    for base in (tiny_model(), on_meta()):
        model = adapted(base=base, init_weights=False)
        results.append(select_layers(model, store, top_k=2, prune=prune))
        assert {p.is_meta for name, p in model.named_parameters() if "hpr_" not in name} == {base.device.type == "meta"}
        model.save_pretrained(tmp_path / base.device.type)
    assert results[0] == results[1]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cpu", "meta"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("prune", [False, True])
def test_a_native_model(tmp_path, store, prune):
    native_model, model = native(init_weights=False, gate=1.0), adapted(init_weights=False, gate=1.0)
    one, two = (select_layers(m, store, top_k=1, prune=prune) for m in (native_model, model))
    assert one == two and torch.equal(logits(native_model), logits(model))
    native_model.save_pretrained(tmp_path / "adapter")
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model)) and len(layers_of(loaded)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_that_is_meant(store, kind):
    make, adapter = KINDS[kind]
    model = make(init_weights=False)
    before = {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()}
    found = select_layers(model, store, top_k=2, adapter_name=adapter)
    assert found.adapter_name == adapter and model.peft_config[adapter].selected_layers == found.selected
    assert all(model.peft_config[name].to_dict() == before[name] for name in before if name != adapter)


def test_fingerprints(tmp_path):
    for name, value in (("none", None), ("own", fingerprint(tiny_model()))):
        assert select_layers(adapted(), write_store(tmp_path / name, fingerprint=value), top_k=1).selected == [0]
    other = write_store(tmp_path / "other", fingerprint="0" * 16)
    found = select_layers(adapted(), other, top_k=1, allow_fingerprint_mismatch=True)
    assert found.selected == [0]


# What is refused


@pytest.mark.parametrize("case", BAD_STORES)
@pytest.mark.parametrize("opened", [True, False])
def test_stores_that_do_not_fit_are_refused(tmp_path, case, opened):
    make, parts = BAD_STORES[case]
    made = make(tmp_path / "bad")
    model = adapted(init_weights=False)
    before = state(model)
    one_line_error(lambda: select_layers(model, made if opened else str(tmp_path / "bad"), top_k=1, prune=True), *parts)
    assert_same_state(state(model), before)


@pytest.mark.parametrize(
    "choice, parts",
    [
        ({}, ("top_k", "threshold", "either")),
        ({"top_k": 1, "threshold": 0.5}, ("either", "top_k", "threshold", "both")),
        ({"top_k": 0}, ("top_k", "1 to 3", "got 0")),
        ({"top_k": 4}, ("top_k", "1 to 3", "got 4")),
        ({"top_k": -1}, ("top_k", "1 to 3", "got -1")),
        ({"top_k": True}, ("top_k", "integer", "True")),
        ({"top_k": 2.0}, ("top_k", "integer", "2.0")),
        ({"top_k": "2"}, ("top_k", "integer", "'2'")),
        ({"threshold": 1.01}, ("threshold", "[0, 1]", "1.01")),
        ({"threshold": 90}, ("threshold", "[0, 1]", "90", "0.9")),
        ({"threshold": -0.1}, ("threshold", "[0, 1]", "-0.1")),
        ({"threshold": math.nan}, ("threshold", "[0, 1]", "nan")),
        ({"threshold": "0.9"}, ("threshold", "[0, 1]", "'0.9'")),
        ({"threshold": True}, ("threshold", "[0, 1]", "True")),
        ({"threshold": 0.99}, ("no probe", "0.99", "0.7500 of layer 1", "lower the threshold")),
    ],
    ids=str,
)
def test_bad_choices_are_refused(tmp_path, choice, parts):
    store = graded_store(tmp_path / "store", {0: 12, 1: 15, 2: 10})
    model = along_first(adapted())
    before = state(model)
    one_line_error(lambda: select_layers(model, store, prune=True, **choice), *parts)
    assert_same_state(state(model), before)


def test_there_must_be_held_out_activations():
    one_line_error(lambda: select_layers(adapted(), None, top_k=1), "held-out", "pass the store")


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_without_an_adapter_are_refused(store, case):
    make, options, parts = BAD_MODELS[case]
    parts = ("selected_layers=[]", "nothing to select") if case == "no layers" else parts
    one_line_error(lambda: select_layers(make(), store, top_k=1, **options), *parts)


@pytest.mark.parametrize("prune", [False, True])
def test_probes_that_are_not_finite_are_refused(store, prune):
    model = adapted(init_weights=False)
    layers_of(model)[1].hpr_probe["default"].weight.data[0, 3] = math.nan
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    one_line_error(lambda: select_layers(model, store, top_k=1, prune=prune), "layer 1", "not finite", "train")
    assert model.peft_config["default"].to_dict() == before and len(layers_of(model)) == 3
