"""One SEA adapter of several: projections joined, saved, merged and exported as any other."""

import json

import pytest
import test_cli
import torch
from conftest import ASSETS
from peft import LoraConfig, PeftModel, get_peft_model
from test_cli import MODEL, refused
from test_collect import TOKENIZER, contrast
from tiny import logits, vivid_model
from transformers import AutoModelForCausalLM

from peft_edit import (
    ActivationStore,
    HPRConfig,
    SEAConfig,
    collect_activations,
    combine_sea,
    evaluate_multiple_choice,
    fit_sea,
    load_contrast_set,
    sea_to_lora,
)
from peft_edit.tuners.sea import SEALayer


run = test_cli.run
D, LAYERS = 32, 3
SITES = [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def axes(*indices, seed=0):
    """Orthonormal rows: some of the columns of a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator))[0].T[list(indices)].float()


def add(model, name, positive, negative, layers=None, **options):
    """An adapter with the same factors in each of its layers."""
    config = SEAConfig(**{"rescale": "none", "layers_to_transform": layers, **options})
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    for layer in model.modules():
        if isinstance(layer, SEALayer) and layer.has_adapter(name):
            layer.set_factors(name, positive, negative)
            model.peft_config[name].rank_pattern[layer.site] = [len(positive), len(negative)]
    return model


def pair(first, second, **options):
    return add(add(vivid_model(), "a", *first, **options), "b", *second, **options)


def active(model, *names):
    model.base_model.set_adapter(list(names))
    return logits(model)


def factors(model, name, layer=0):
    module = model.get_submodule(f"base_model.model.{SITES[layer]}")
    return module.sea_positive[name].weight, module.sea_negative[name].weight


def same_span(a, b):
    torch.testing.assert_close(a.T @ a, b.T @ b, rtol=0, atol=1e-5)


def test_equal_edits_combine_to_themselves():
    edit = (axes(0, 1, 2), axes(3, 4))
    turned = tuple(torch.linalg.qr(torch.randn(len(f), len(f)))[0] @ f for f in edit)
    model = pair(edit, turned)
    assert combine_sea(model, ["a", "b"]) == "a_and_b"
    assert model.peft_config["a_and_b"].rank_pattern == {site: [3, 2] for site in SITES}
    torch.testing.assert_close(active(model, "a_and_b"), active(model, "a"), rtol=0, atol=1e-5)


def test_orthogonal_edits_commute_and_combine_to_the_one_after_the_other():
    model = pair((axes(0, 1, 2), axes(3, 4)), (axes(5), axes(6, 7)))
    combine_sea(model, ["a", "b"], "joint")
    assert model.peft_config["joint"].rank_pattern == {site: [4, 4] for site in SITES}
    torch.testing.assert_close(active(model, "a", "b"), active(model, "b", "a"), rtol=0, atol=1e-5)
    torch.testing.assert_close(active(model, "joint"), active(model, "a", "b"), rtol=0, atol=1e-5)


def test_the_order_of_the_names_does_not_matter_where_that_of_the_edits_does():
    model = pair((axes(0, 1, 2), axes(3, 4)), (axes(0, 1, seed=1), axes(2, 3, seed=1)))
    combine_sea(model, ["a", "b"], "ab")
    combine_sea(model, ["b", "a"], "ba")
    for first, second in zip(factors(model, "ab"), factors(model, "ba"), strict=True):
        same_span(first, second)
    torch.testing.assert_close(active(model, "ab"), active(model, "ba"), rtol=0, atol=1e-4)
    assert (active(model, "a", "b") - active(model, "b", "a")).abs().max() > 0.05


def test_noisy_edits_of_one_behaviour_combine_to_no_more_than_it():
    """Two fits of one behaviour differ by the noise of their demonstrations, which the joint edit must not add up."""
    noise = 0.05 * torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    first, second = (torch.linalg.qr((axes(0, 1, 2, 3, 4) + part).T)[0].T for part in noise)
    model = pair((first[:3], first[3:]), (second[:3], second[3:]))
    combine_sea(model, ["a", "b"], "joint")
    assert model.peft_config["joint"].rank_pattern == {site: [3, 2] for site in SITES}
    true = axes(0, 1, 2)

    def error(rows):
        return (rows.T @ rows - true.T @ true).norm()

    assert error(factors(model, "joint")[0]) < min(error(first[:3]), error(second[:3]))


def test_what_happens_to_a_direction():
    """Amplified by both: once. Amplified by one and removed by the other: left alone. Removed by both: removed."""
    model = pair((axes(0, 1), axes(2, 3)), (axes(0, 2), axes(1, 3)))
    combine_sea(model, ["a", "b"], "joint")
    layer = model.get_submodule(f"base_model.model.{SITES[0]}")
    gains = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0])
    h = axes(0, 1, 2, 3, 4)
    torch.testing.assert_close(layer.edit(h, "joint"), gains[:, None] * h, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.edit(layer.edit(h, "a"), "b")[0], 4 * h[0], rtol=0, atol=1e-5)


def test_sites_of_one_adapter_keep_its_edit():
    model = add(vivid_model(), "a", axes(0), axes(1), layers=[0, 1])
    model = add(model, "b", axes(2), axes(3), layers=[1, 2])
    combine_sea(model, ["a", "b"], "joint")
    ranks = model.peft_config["joint"].rank_pattern
    assert ranks == {SITES[0]: [1, 1], SITES[1]: [2, 2], SITES[2]: [1, 1]}
    same_span(factors(model, "joint", 0)[0], axes(0))
    same_span(factors(model, "joint", 2)[1], axes(3))
    assert model.peft_config["a"].layers_to_transform == [0, 1]


def test_three_at_once():
    model = add(pair((axes(0), axes(1)), (axes(2), axes(3))), "c", axes(4), axes(5))
    combine_sea(model, ["a", "b", "c"])
    torch.testing.assert_close(active(model, "a_and_b_and_c"), active(model, "a", "b", "c"), rtol=0, atol=1e-5)


def test_saved_loaded_merged_and_exported_as_any_other(tmp_path):
    model = pair((axes(0, 1, 2), axes(3, 4)), (axes(0, 1, seed=1), axes(2, 3, seed=1)))
    before = active(model, "a")
    combine_sea(model, ["a", "b"], "joint")
    assert torch.equal(logits(model), before)  # not active yet
    expected = active(model, "joint")
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path, selected_adapters=["joint"])
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path / "joint")
    assert torch.equal(logits(loaded), expected)
    sea_to_lora(loaded, tmp_path / "lora")
    lora = PeftModel.from_pretrained(vivid_model(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=2e-5)
    model.delete_adapter("a")
    assert torch.equal(active(model, "joint"), expected)
    model.delete_adapter("joint")
    assert list(model.peft_config) == ["b"]


def test_adapters_of_transformers(tmp_path):
    model = pair((axes(0), axes(1)), (axes(2), axes(3)))
    for name in ("a", "b"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
    expected = active(model, "a", "b")
    model = vivid_model()
    for name in ("a", "b"):
        model.load_adapter(tmp_path / name, name)
    model.set_adapter(combine_sea(model, ["a", "b"]))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "joint")
    again = PeftModel.from_pretrained(vivid_model(), tmp_path / "joint")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


@pytest.fixture
def store(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sets = [{i: torch.randn(20, D, generator=generator) for i in range(LAYERS)} for _ in range(3)]
    return ActivationStore.from_tensors(tmp_path / "store", positive=sets[0], negative=sets[1], neutral=sets[2])


@pytest.mark.parametrize("rescale", ["token", "mean"])
def test_statistics_come_from_a_store(store, rescale, tmp_path):
    """They are those that a fit with the joint factors would have recorded."""
    model = get_peft_model(vivid_model(), SEAConfig(rescale=rescale, positive_energy=0.6, negative_energy=0.6), "a")
    model.add_adapter("b", SEAConfig(rescale=rescale, positive_energy=0.6, negative_energy=0.6))
    fit_sea(model, store, "a")
    fit_sea(model, store, "b")
    combine_sea(model, ["a", "b"], "joint", store=store)
    for site, expected in model.peft_config["a"].fit_statistics.items():
        assert model.peft_config["joint"].fit_statistics[site] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(active(model, "joint"), active(model, "a"), rtol=0, atol=1e-4)


def test_statistics_are_those_of_the_site_that_is_edited(tmp_path):
    """Of a store with several sites, whichever it reads by itself."""
    collect_activations(vivid_model(), TOKENIZER, contrast(), tmp_path / "store", site=("mlp", "block"))
    config = {"site": "block", "rescale": "mean", "positive_energy": 0.6, "negative_energy": 0.6}
    model = get_peft_model(vivid_model(), SEAConfig(**config), "a")
    model.add_adapter("b", SEAConfig(**config))
    for name in ("a", "b"):
        fit_sea(model, ActivationStore(tmp_path / "store", "block"), name)
    combine_sea(model, ["a", "b"], "joint", store=tmp_path / "store")
    for site, expected in model.peft_config["a"].fit_statistics.items():
        assert model.peft_config["joint"].fit_statistics[site] == pytest.approx(expected, rel=1e-5)


def test_the_provenance_of_each_adapter_is_kept(tmp_path):
    """In the configuration and in the card, also of an edit that is joined again."""
    model = pair((axes(0), axes(1)), (axes(2), axes(3)))
    add(model, "c", axes(4), axes(5))
    one = {"data": "user/one", "questions": 3, "demonstrations": 5}
    two = {"data": "two.jsonl", "questions": 7, "demonstrations": 7}
    model.peft_config["a"].fitted_on, model.peft_config["a"].positive_energy = one, 0.9
    model.peft_config["b"].fitted_on = two
    combine_sea(model, ["a", "b"], "joint")
    energies = {"negative_energy": 0.998, "centered": False}
    parts = [
        {"adapter": "a", **one, "positive_energy": 0.9, **energies},
        {"adapter": "b", **two, "positive_energy": 0.998, **energies},
    ]
    assert model.peft_config["joint"].fitted_on == {"combined": parts}
    combine_sea(model, ["c", "joint"], "all")
    assert model.peft_config["all"].fitted_on == {"combined": [{"adapter": "c"}, *parts]}
    model.save_pretrained(tmp_path, selected_adapters=["a", "all"])
    card = (tmp_path / "all" / "README.md").read_text()
    assert "datasets:\n- user/one\n" in card and "positive_energy" not in card
    assert (
        "A joint edit of 3 adapters:\n\n- `c`: its data are not known.\n"
        "- `a`: fitted in closed form to 5 demonstrations from 3 questions of "
        "[user/one](https://huggingface.co/datasets/user/one).\n"
        "- `b`: fitted in closed form to 7 demonstrations from 7 questions of `two.jsonl`.\n" in card
    )
    assert "\nFitted in closed form to 5 demonstrations from 3" in (tmp_path / "a" / "README.md").read_text()
    again = SEAConfig.from_pretrained(tmp_path / "all")
    assert again.fitted_on == model.peft_config["all"].fitted_on


def test_adapters_of_unknown_data_combine_to_one_of_unknown_data():
    model = pair((axes(0), axes(1)), (axes(2), axes(3)))
    combine_sea(model, ["a", "b"], "joint")
    assert model.peft_config["joint"].fitted_on == {}


@pytest.mark.parametrize("parts", [3, [3], [{}], [{"adapter": "a", "data": 3}], [{"adapter": "a", "questions": "x"}]])
def test_damaged_provenance_is_refused(parts):
    with pytest.raises(ValueError, match="fitted_on"):
        SEAConfig(fitted_on={"combined": parts})


def test_without_a_store_there_are_no_statistics(store, tmp_path):
    model = pair((axes(0), axes(1)), (axes(2), axes(3)), rescale="token")
    combine_sea(model, ["a", "b"], "joint")
    assert model.peft_config["joint"].fit_statistics == {}
    active(model, "joint")
    model.set_adapter("joint")
    for use in (model.merge_adapter, lambda: sea_to_lora(model, tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"fit_statistics\['model.layers.0.mlp.down_proj'\] has no .* combine_sea"):
            use()
    with pytest.raises(ValueError, match="pass store, with neutral activations"):
        combine_sea(pair((axes(0), axes(1)), (axes(2), axes(3)), rescale="mean"), ["a", "b"])


def mixed(**second):
    return add(add(vivid_model(), "a", axes(0), axes(1)), "b", axes(2), axes(3), **second)


def of_other_models():
    model = mixed()
    for name in ("a", "b"):
        model.peft_config[name].base_model_fingerprint = name * 16
    return model


def merged():
    model = mixed()
    model.set_adapter("b")
    model.merge_adapter()
    return model


def with_hpr():
    model = get_peft_model(vivid_model(), HPRConfig(), adapter_name="b")
    return add(model.get_base_model(), "a", axes(0), axes(1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (mixed, (["a"],), "^adapters must be two or more different names, got "),
        (mixed, ("ab",), "^adapters must be two or more different names, got 'ab'"),
        (mixed, (["a", "b", "a"],), "^adapters must be two or more different names"),
        (mixed, (["a", "z"],), "^'z' is no SEA adapter of this model"),
        (with_hpr, (["a", "b"],), "^'b' is no SEA adapter of this model"),
        (lambda: get_peft_model(vivid_model(), LoraConfig()), (["a", "b"],), "^'a' is no SEA adapter"),
        (mixed, (["a", "b"], "a"), "^the model already has an adapter 'a': pass another"),
        (mixed, (["a", "b"], "a.b"), "^adapter_name must be a name without dots"),
        (lambda: mixed(rescale="token"), (["a", "b"],), "must agree in rescale, got 'none' of 'a' and 'token' of 'b'"),
        (lambda: mixed(strength=0.5), (["a", "b"],), "must agree in strength"),
        (lambda: mixed(projections="positive"), (["a", "b"],), "must agree in projections"),
        (lambda: mixed(site="block"), (["a", "b"],), "must agree in site"),
        (lambda: mixed(feature_map="tanh"), (["a", "b"],), "^adapter 'b' has the feature map 'tanh'.* all behaviours"),
        (lambda: mixed(modules_to_save=["lm_head"]), (["a", "b"],), "^adapter 'b' has modules_to_save"),
        (of_other_models, (["a", "b"],), "^the adapters were fitted on different models"),
        (merged, (["a", "b"],), "merged: call unmerge_adapter"),
    ],
)
def test_what_cannot_be_combined(make, arguments, message):
    model = make()
    names = set(model.peft_config)
    with pytest.raises(ValueError, match=message):
        combine_sea(model, *arguments)
    assert set(model.peft_config) == names


def test_a_store_of_another_model_is_refused(tmp_path):
    tensors = {i: torch.randn(4, D + 1) for i in range(LAYERS)}
    other = ActivationStore.from_tensors(tmp_path / "store", positive=tensors, negative=tensors, neutral=tensors)
    with pytest.raises(ValueError, match="hidden size 33"):
        combine_sea(mixed(), ["a", "b"], store=other)


def demo():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def test_the_command_writes_the_joint_edit(run, tmp_path, demo_tokenizer):
    questions = load_contrast_set(ASSETS / "test.jsonl").select(range(8))
    folders = [tmp_path / "one.first", tmp_path / "other"]
    for skip, folder in zip((0, 12), folders, strict=True):
        rows = [ASSETS / "demonstrations.jsonl", tmp_path / f"store-{skip}", "--skip", skip, "--limit", 12]
        assert run("collect", MODEL, *rows)[0] == 0
        assert run("fit-sea", MODEL, tmp_path / f"store-{skip}", folder, "--rescale", "none")[0] == 0
    adapters = [part for folder in folders for part in ("--adapter", folder)]
    status, out, err = run("combine-sea", MODEL, tmp_path / "joint", *adapters, "--json", tmp_path / "joint.json")
    assert status == 0 and "Adapter of 2 edits" in out, err
    model = PeftModel.from_pretrained(demo(), folders[0], adapter_name="one")
    model.load_adapter(folders[1], adapter_name="other")
    model.set_adapter(combine_sea(model, ["one", "other"]))
    loaded = PeftModel.from_pretrained(demo(), tmp_path / "joint")
    assert "combined" in loaded.peft_config["default"].fitted_on
    scores = [evaluate_multiple_choice(m, demo_tokenizer, questions).to_dict() for m in (model, loaded)]
    assert scores[0] == scores[1]
    assert list(loaded.peft_config) == ["default"] and len(loaded.peft_config["default"].rank_pattern) == 5
    assert json.loads((tmp_path / "joint.json").read_text())["adapters"] == [str(folder) for folder in folders]
    one = ("combine-sea", MODEL, tmp_path / "one-edit", *adapters[:2])
    assert "--adapter must be given twice or more, got 1" in refused(run, *one)
    assert not (tmp_path / "one-edit").exists()
