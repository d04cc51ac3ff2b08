"""What is HPR's own as a PEFT method; the rest is in test_methods.py."""

import copy
import functools
import json
import math
from dataclasses import fields

import pytest
import torch
from edits import outputs, two_adapters
from loading import PATHS, as_second_adapter, bare_tensors, base_of, link_base, saved_tensors
from peft import (
    LoraConfig,
    PeftConfig,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from tiny import FAMILIES, LargestNew, agree, base_logits, logits, relative, token_ids, vivid_model

from peft_edit import HPRConfig, SEAConfig, edit_strength
from peft_edit.models.sites import find_sites
from peft_edit.tuners.hpr import HPRLayer


HIDDEN = 32
BLOCKS = (0, 1, 2)
# A random probe that turns every token: the edit is sure to show.
VISIBLE = {"init_weights": False, "gate": 1.0}
# Linear layers of the default angle network, and where they stand between the GELUs.
WIDTHS = {0: (32, 16), 2: (16, 8), 4: (8, 4), 6: (4, 1)}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def edited_model(family="llama", seed=0, dtype=torch.float32, **fields):
    base = vivid_model(family).to(dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, HPRConfig(**{**VISIBLE, **fields})).eval()


@pytest.fixture
def llama():
    return vivid_model()


def hpr_layers(model):
    return [module for module in model.modules() if isinstance(module, HPRLayer)]


def parameter_names(model, **wanted):
    return {n for n, p in model.named_parameters() if all(getattr(p, k) == value for k, value in wanted.items())}


def expected_names(family, blocks, adapter="default"):
    """Names of all that an adapter holds, in a `PeftModel`."""
    sites = find_sites(vivid_model(family), "block")
    adapter = f".{adapter}" if adapter else ""
    return {
        f"base_model.model.{sites[i]}.hpr.{name}"
        for i in blocks
        for name in (
            f"hpr_probe{adapter}.weight",
            *(f"hpr_angle{adapter}.{k}.{part}" for k in WIDTHS for part in ("weight", "bias")),
        )
    }


# Configuration

EVERY_FIELD = {
    "target_modules": {"1", "2"},
    "exclude_modules": {"lm_head"},
    "layers_to_transform": range(1, 3),
    "num_angle_layers": 2,
    "angle_hidden_size": 7,
    "alpha": 0.1 + 0.2,
    "gate": 0.25,
    "rotation": "reflection",
    "token_scope": "last",
    "selected_layers": (2, 1, 2),
    "probe_accuracy": {"1": 0.1 + 0.7, "2": 1.0},
    "base_model_fingerprint": "0123456789abcdef",
    "fitted_on": {"data": "truthful_qa", "questions": 367, "token_pairs": 5000},
    "calibration": {"dial": "gate", "value": 0.25, "kl_p95": 0.4, "budget": 0.5, "texts": "01ab", "tokens": 70},
    "init_weights": False,
    "modules_to_save": ["lm_head"],
}


def test_every_field_survives_json(tmp_path):
    own = {field.name for field in fields(HPRConfig)} - {field.name for field in fields(PeftConfig)}
    assert set(EVERY_FIELD) == own
    config = HPRConfig(**EVERY_FIELD, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(tmp_path)
    for again in (HPRConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(again) is HPRConfig and again == config
        assert again.peft_type is PeftType.HPR
    assert again.layers_to_transform == again.selected_layers == [1, 2]
    assert again.target_modules == {"1", "2"} and again.probe_accuracy == EVERY_FIELD["probe_accuracy"]
    assert HPRConfig(**{**again.to_dict(), "peft_type": "HPR"}) == config


@pytest.mark.parametrize(
    "layers, expected",
    [(None, None), ([], []), (range(0), []), (2, [2]), (0, [0]), (range(2), [0, 1]), ([3, 1, 3], [1, 3])],
)
def test_selected_layers_become_a_sorted_list(layers, expected):
    assert HPRConfig(selected_layers=layers).selected_layers == expected


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"rotation": "mirror"}, ["rotation", "'angle'", "'reflection'", "'mirror'"]),
        ({"token_scope": ["all"]}, ["token_scope", "'all'", "'last'", "['all']"]),
        ({"gate": 50}, ["gate", "[0, 1]", "50"]),
        ({"gate": -0.1}, ["gate", "[0, 1]", "-0.1"]),
        ({"gate": float("nan")}, ["gate", "[0, 1]", "nan"]),
        ({"gate": "half"}, ["gate", "number", "'half'"]),
        ({"gate": True}, ["gate", "number", "True"]),
        ({"alpha": -1}, ["alpha", "0 or more", "-1"]),
        ({"alpha": float("inf")}, ["alpha", "finite", "inf"]),
        ({"alpha": None}, ["alpha", "number", "None"]),
        ({"num_angle_layers": 0}, ["num_angle_layers", "from 1 to 1,000", "0"]),
        ({"num_angle_layers": 4.0}, ["num_angle_layers", "integer", "4.0"]),
        ({"num_angle_layers": None}, ["num_angle_layers", "integer", "None"]),
        ({"angle_hidden_size": -3}, ["angle_hidden_size", "from 1 to 1,000,000", "-3"]),
        ({"angle_hidden_size": True}, ["angle_hidden_size", "integer", "True"]),
        ({"selected_layers": -1}, ["layers", "0 or more", "-1"]),
        ({"selected_layers": ["1"]}, ["layers", "'1'"]),
        ({"selected_layers": "5"}, ["layers", "'5'"]),
        ({"selected_layers": 1.5}, ["layers", "1.5"]),
        ({"selected_layers": [-1]}, ["selected_layers must be", "[-1]"]),
        ({"selected_layers": [1, 5], "layers_to_transform": [0, 1]}, ["selected_layers", "[0, 1]", "[5]"]),
    ],
)
def test_bad_values_raise_one_clear_line(fields, parts):
    with pytest.raises(ValueError) as error:
        HPRConfig(**fields)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_selected_layers_that_the_model_lacks_are_named(llama):
    with pytest.raises(ValueError, match=r"\b3\b") as error:
        get_peft_model(llama, HPRConfig(selected_layers=[1, 3]))
    assert "\n" not in str(error.value)


# What an adapter is made of


@every_family
@pytest.mark.parametrize("layers", [None, 1, [0, 2]], ids=str)
def test_trainable_are_the_probes_and_angle_networks_of_the_chosen_blocks(family, layers):
    model = edited_model(family, layers_to_transform=layers)
    blocks = {None: BLOCKS, 1: (1,)}.get(layers if not isinstance(layers, list) else 0, layers)
    assert parameter_names(model, requires_grad=True) == expected_names(family, blocks)
    sites = find_sites(model, "block")
    assert [layer.site for layer in hpr_layers(model)] == [sites[i] for i in blocks]
    before, after = outputs(vivid_model(family)), outputs(model)
    assert [i for i in BLOCKS if not torch.equal(after[i], before[i])] == list(range(min(blocks), 3))
    config = model.peft_config["default"]  # the regular expression that is saved names these blocks alone
    assert get_peft_model(vivid_model(family), config).base_model.targeted_module_names == [sites[i] for i in blocks]


@pytest.mark.parametrize(
    "fields, widths",
    [
        ({}, [32, 16, 8, 4, 1]),
        ({"num_angle_layers": 1}, [32, 1]),
        ({"num_angle_layers": 8}, [32, 16, 8, 4, 2, 1, 1, 1, 1]),
        ({"num_angle_layers": 3, "angle_hidden_size": 5}, [32, 5, 5, 1]),
    ],
    ids=str,
)
def test_angle_network(fields, widths):
    model = edited_model(**fields)
    network = hpr_layers(model)[0].hpr_angle["default"]
    linear = [module for module in network if isinstance(module, torch.nn.Linear)]
    assert [m.in_features for m in linear] + [1] == widths
    assert [type(module).__name__ for module in network] == ["Linear", "GELU"] * (len(linear) - 1) + ["Linear"]
    angles = hpr_layers(model)[0].angles(torch.randn(2, 5, HIDDEN), "default")
    assert angles.shape == (2, 5) and angles.min() > 0 and angles.max() < math.pi
    assert relative(logits(model), base_logits()) > 1e-3


# The edit


@every_family
def test_edit_turns_each_token_and_keeps_its_norm(family):
    before, after = outputs(vivid_model(family))[1], outputs(edited_model(family, layers_to_transform=1))[1]
    layer = hpr_layers(edited_model(family, layers_to_transform=1))[0]
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    cosine = torch.cosine_similarity(before, after, dim=-1)
    torch.testing.assert_close(torch.acos(cosine), layer.angles(before, "default"), rtol=0, atol=1e-3)


@every_family
def test_reflection(family):
    before = outputs(vivid_model(family))[1]
    model = edited_model(family, layers_to_transform=1, rotation="reflection", gate=0.5)
    after = outputs(model)[1]
    w = hpr_layers(model)[0].hpr_probe["default"].weight[0]
    n, negative = w / w.norm(), (before @ w).unsqueeze(-1) <= 0
    assert 0 < negative.sum() < negative.numel()
    expected = torch.where(negative, before - 2 * (before @ n).unsqueeze(-1) * n, before)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_gate_and_alpha():
    assert torch.equal(logits(edited_model(gate=0.0)), base_logits())
    assert torch.equal(logits(edited_model(alpha=0.0)), base_logits())
    results = [logits(edited_model(**fields)) for fields in ({}, {"gate": 0.5}, {"alpha": 0.5}, {"alpha": 1.5})]
    assert all(relative(x, y) > 1e-3 for i, x in enumerate(results) for y in results[:i])


def test_layer_reads_the_configuration_of_the_model():
    model = edited_model()
    model.peft_config["default"].alpha = 0.0
    assert torch.equal(logits(model), base_logits())
    model.peft_config["default"].alpha = 1.0
    model.peft_config["default"].selected_layers = [2]
    assert torch.equal(outputs(model)[1], outputs(vivid_model())[1])
    torch.testing.assert_close(logits(model), logits(reference(model, [2])))
    model.peft_config["default"].selected_layers = []
    assert torch.equal(logits(model), base_logits())


def reference(model, blocks):
    """A model with the same weights at these blocks only."""
    other = edited_model(layers_to_transform=blocks)
    other.load_state_dict({n: p for n, p in model.state_dict().items() if n in other.state_dict()})
    return other


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padded(ids, side):
    """Ids with three tokens of padding, their mask and position ids."""
    filler, mask = torch.zeros(len(ids), 3, dtype=torch.long), torch.ones_like(ids)
    order = slice(None, None, 1 if side == "right" else -1)
    mask = torch.cat((mask, filler)[order], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return torch.cat((ids, filler)[order], dim=1), {"attention_mask": mask, "position_ids": positions}


@every_family
def test_scope_last_edits_the_last_token_only(family):
    before = outputs(vivid_model(family))[1]
    every = outputs(edited_model(family, layers_to_transform=1))[1]
    model = edited_model(family, layers_to_transform=1, token_scope="last")
    last = outputs(model)[1]
    assert torch.equal(last[:, :-1], before[:, :-1])
    torch.testing.assert_close(last[:, -1], every[:, -1])
    assert relative(last[:, -1], before[:, -1]) > 0.1
    # Left padding keeps the last token, and its edit.
    more, kwargs = padded(token_ids(), "left")
    torch.testing.assert_close(logits(model, more, **kwargs)[:, -1], logits(model)[:, -1], rtol=0, atol=2e-5)


def test_scope_last_edits_every_new_token_of_a_generation():
    model = edited_model(token_scope="last", layers_to_transform=2)
    ids = token_ids()
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **GREEDY)
    for end in range(ids.shape[1], answer.shape[1]):
        assert torch.equal(logits(model, answer[:, :end])[:, -1].argmax(dim=-1), answer[:, end])


def test_reflection_makes_no_square_matrix():
    model = edited_model(rotation="reflection")
    with LargestNew(model) as seen:
        logits(model, token_ids(1, 3))
    assert 0 < seen.largest < HIDDEN**2


# Training


@every_family
def test_a_training_step_changes_adapter_weights_only(family):
    # In evaluation mode: with dropout (OPT, GPT-2) the loss before and after could not be compared.
    model = edited_model(family, layers_to_transform=[0, 1], selected_layers=None).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.enable_grad():
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == expected_names(family, [0, 1])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert float(model(input_ids=token_ids(), labels=token_ids()).loss) < float(loss)


def test_gradients_of_a_new_adapter_are_finite():
    """A probe of zeros has no direction, and so no gradient through the model: its loss trains it."""
    model = get_peft_model(vivid_model(), HPRConfig()).train()
    with torch.enable_grad():
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Saving and loading

KINDS = {"every block": None, "block 1": [1], "two blocks": [0, 2], "none": []}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes, once, the folder of a base model and of an adapter of it, whose logits it returns too."""

    @functools.cache
    def folder(family="llama", kind="block 1"):
        path = tmp_path_factory.mktemp("saved")
        link_base(path, family)
        torch.manual_seed(0)
        model = get_peft_model(base_of(path), HPRConfig(**VISIBLE)).eval()
        # As the selection does it: every block has modules, and these edit.
        model.peft_config["default"].selected_layers = KINDS[kind]
        model.save_pretrained(path / "adapter")
        return path, logits(model)

    return folder


def beside_sea(path):
    model = base_of(path)
    model.add_adapter(SEAConfig(site="block", layers_to_transform=1, init_weights=False), "sea")
    model.load_adapter(path / "adapter", "hpr")
    model.set_adapter("hpr")
    return model


def second_after_none(path):
    return as_second_adapter(path, HPRConfig(selected_layers=[]))


MORE_PATHS = PATHS | {"second after none": second_after_none, "load_adapter beside SEA": beside_sea}


@every_family
@every_kind
def test_only_the_selected_blocks_are_saved(folder_of, family, kind):
    path, expected = folder_of(family, kind)
    blocks = BLOCKS if KINDS[kind] is None else KINDS[kind]
    tensors = saved_tensors(path)
    assert set(tensors) == expected_names(family, blocks, adapter=None)
    shapes = {"hpr_probe.weight": (1, HIDDEN)}
    for i, (wide, narrow) in WIDTHS.items():
        shapes |= {f"hpr_angle.{i}.weight": (narrow, wide), f"hpr_angle.{i}.bias": (narrow,)}
    assert all(tuple(tensor.shape) == shapes[name.split(".hpr.")[1]] for name, tensor in tensors.items())
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["selected_layers"] == KINDS[kind]
    assert torch.equal(expected, base_logits(family)) == (kind == "none")
    again = PATHS["PeftModel"](path)
    agree(logits(again), expected)
    saved = get_peft_model_state_dict(again)
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in saved)


@every_kind
@pytest.mark.parametrize("load", MORE_PATHS.values(), ids=MORE_PATHS)
def test_every_path_gives_the_saved_model(folder_of, kind, load):
    path, expected = folder_of(kind=kind)
    model = load(path)
    agree(logits(model), expected)
    adapter = list(model.peft_config)[-1]
    layers = [layer for layer in hpr_layers(model) if layer.has_adapter(adapter)]
    blocks = BLOCKS if KINDS[kind] is None else KINDS[kind]
    assert [layer.site for layer in layers] == [f"model.layers.{i}" for i in blocks]


# Several adapters


ROWS = ["default", "other", "__base__", "default"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_mixed_generation_of_scope_last_equals_each_adapter_alone(options):
    model = two_adapters("HPR", first={"token_scope": "last"}, second={"token_scope": "last"})
    ids = token_ids(4, 5)
    mask = torch.ones_like(ids)
    answers = model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=ROWS, max_new_tokens=4, **options, **GREEDY
    )
    for row, name in enumerate(ROWS):
        model.set_adapter(name if name != "__base__" else "default")
        one = {"input_ids": ids[row, None], "attention_mask": mask[:1], "max_new_tokens": 4, **options, **GREEDY}
        if name == "__base__":
            with model.disable_adapter():
                assert torch.equal(model.generate(**one)[0], answers[row])
        else:
            assert torch.equal(model.generate(**one)[0], answers[row])


def test_scope_last_in_a_mixed_batch():
    model = edited_model(token_scope="last", layers_to_transform=1)
    expected = outputs(model)[1]
    torch.testing.assert_close(outputs(model, adapter_names=["default"] * 2)[1], expected)
    base = outputs(vivid_model())[1]
    rows = outputs(model, adapter_names=["default", "__base__"])[1]
    torch.testing.assert_close(rows, torch.stack((expected[0], base[1])))


def test_beams_keep_their_own_last_token():
    """Beam search repeats each input's row: as many last tokens as there are beams."""
    model = edited_model(token_scope="last", layers_to_transform=1)
    h = torch.randn(6, 5, HIDDEN)
    layer = hpr_layers(model)[0]
    expected = layer.edit_output(h)
    layer.row_adapters = ["default"] * 2
    torch.testing.assert_close(layer.edit_output(h), expected)
    assert torch.equal(expected[:, :-1], h[:, :-1]) and (expected[:, -1] != h[:, -1]).any(dim=-1).all()


# With other methods, through Transformers' own `add_adapter`


def lora():
    return LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False)


@pytest.mark.parametrize("first", ["lora", "hpr"])
def test_lora_on_the_same_model(llama, first):
    configs = {"lora": lora(), "hpr": HPRConfig(**VISIBLE)}
    base = logits(llama)
    for seed, name in enumerate((first, "hpr" if first == "lora" else "lora")):
        torch.manual_seed(seed)
        llama.add_adapter(configs[name], name)
        llama.set_adapter(name)
        assert relative(logits(llama), base) > 1e-3
    llama.set_adapter("lora")
    with_lora, blocks = logits(llama), outputs(llama)
    llama.set_adapter("hpr")
    with_hpr = logits(llama)
    llama.set_adapter(["lora", "hpr"])
    both = outputs(llama)[0]
    torch.testing.assert_close(both, hpr_layers(llama)[0].edit(blocks[0], "hpr"))  # above what LoRA makes
    llama.disable_adapters()
    assert torch.equal(logits(llama), base)
    llama.enable_adapters()
    llama.delete_adapter("hpr")
    llama.set_adapter("lora")
    assert torch.equal(logits(llama), with_lora)
    torch.manual_seed(0 if first == "hpr" else 1)
    llama.add_adapter(HPRConfig(**VISIBLE), "hpr")
    llama.set_adapter("hpr")
    assert torch.equal(logits(llama), with_hpr)


@pytest.mark.parametrize("first", ["lora", "hpr"])
def test_saved_beside_lora(folder_of, first):
    """Loaded into a model that has LoRA, or before it gets LoRA: the same weights either way."""
    path, expected = folder_of(kind="two blocks")
    model = base_of(path)
    if first == "lora":
        model.add_adapter(lora(), "lora")
    model.load_adapter(path / "adapter", adapter_name="hpr")
    if first == "hpr":
        model.add_adapter(lora(), "lora")
    model.set_adapter("hpr")
    agree(logits(model), expected)
    tensors = model.get_adapter_state_dict("hpr")
    saved = bare_tensors(path)
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in saved)


@every_family
@pytest.mark.parametrize("names", [["sea", "hpr"], ["hpr", "sea"]], ids="-".join)
def test_beside_sea_at_the_same_block(family, names):
    """Each edits once, in the order in which they were added."""
    model = vivid_model(family)
    h = outputs(model)[1]
    configs = {
        "hpr": HPRConfig(**VISIBLE, layers_to_transform=1),
        "sea": SEAConfig(site="block", layers_to_transform=1, init_weights=False),
    }
    for name in names:
        model.add_adapter(configs[name], name)
    block = model.get_submodule(find_sites(model, "block")[1])
    edited = {name: getattr(block, name).edit(h, name) for name in names}
    for name in names:
        model.set_adapter(name)
        torch.testing.assert_close(outputs(model)[1], edited[name])
    both = getattr(block, names[1]).edit(edited[names[0]], names[1])
    assert all(relative(both, single) > 1e-3 for single in edited.values())
    for one in (model, copy.deepcopy(model)):
        one.set_adapter(names)
        torch.testing.assert_close(outputs(one)[1], both)
        one.delete_adapter(names[0])
        torch.testing.assert_close(outputs(one)[1], edited[names[1]])


@every_family
def test_above_sea_at_the_mlp(family):
    """In OPT that is a child of the block, as HPR is."""
    model = vivid_model(family)
    model.add_adapter(SEAConfig(layers_to_transform=1, init_weights=False), "sea")
    h = outputs(model)[1]
    model.add_adapter(HPRConfig(**VISIBLE, layers_to_transform=1), "hpr")
    model.set_adapter(["sea", "hpr"])
    torch.testing.assert_close(outputs(model)[1], hpr_layers(model)[0].edit(h, "hpr"))


# edit_strength


@every_family
def test_strengths_multiply(family):
    model = edited_model(family)
    with edit_strength(model, 0.5):
        torch.testing.assert_close(logits(model), logits(edited_model(family, alpha=0.5)))
    with edit_strength(model, 1.5), edit_strength(model, 0.5):
        torch.testing.assert_close(logits(model), logits(edited_model(family, alpha=0.75)))


@pytest.mark.parametrize("rotation", ["angle", "reflection"])
@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0, 1e6])
def test_norms_are_kept_at_every_strength(rotation, strength):
    before = outputs(vivid_model())[1]
    model = edited_model(rotation=rotation, layers_to_transform=1)
    with edit_strength(model, strength):
        after = outputs(model)[1]
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert relative(after, before) > 0.01
    if strength == 1e6:  # half a turn
        torch.testing.assert_close(after, -before, rtol=1e-4, atol=1e-4)


def test_merging_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"^adapter 'default' cannot be merged: it rotates each token by an angle"):
        edited_model().merge_adapter()


def test_angles_are_not_rounded_by_autocast(llama):
    model = get_peft_model(llama, HPRConfig(init_weights=False))
    layer = model.get_base_model().model.layers[1].hpr
    h = torch.randn(4, 7, 32)
    expected = layer.angles(h, "default"), layer.edit(h, "default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.angles(h, "default"), layer.edit(h, "default")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
