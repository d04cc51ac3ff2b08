"""A fit finds what was planted, edits as the mathematics says, and changes nothing when it fails."""

import copy
import json
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_collect import MLP_OUTPUTS, SITES, TOKENIZER, contrast
from tiny import tiny_model, token_ids

from peft_edit import ActivationStore, SEAConfig, collect_activations, fingerprint, fit_sea
from peft_edit.tuners.sea.fit import RECORDED
from peft_edit.tuners.sea.maths import edit, project


D, N, LAYERS = 32, 200, (0, 1, 2)


def orthonormal(k, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, k, generator=generator, dtype=torch.float64))[0].T


def planted(layers=LAYERS, n=N, seed=0, dtype=torch.float64):
    """Activations of which only 3 directions covary with the positive and 2 with the negative demonstrations."""
    sets = {"positive": {}, "negative": {}, "neutral": {}}
    for layer in layers:
        generator = torch.Generator().manual_seed(100 * seed + layer)
        neutral = torch.randn(n, D, generator=generator, dtype=torch.float64)
        # white: the sample covariance is the identity, so that the planted directions are the exact answer
        neutral = torch.linalg.qr(neutral)[0] * n**0.5 if n > D else neutral
        sets["neutral"][layer] = neutral.to(dtype)
        for sign, k in (("positive", 3), ("negative", 2)):
            basis = orthonormal(k, 1000 * seed + 10 * layer + k)
            sets[sign][layer] = ((neutral @ basis.T) @ basis).to(dtype)
    return sets


def random_store(path, layers=LAYERS, n=20, d=D, **arguments):
    generator = torch.Generator().manual_seed(n)
    sets = {
        sign: {layer: torch.randn(n, d, generator=generator) for layer in layers}
        for sign in ("positive", "negative", "neutral")
    }
    return ActivationStore.from_tensors(path, **sets, **arguments)


@pytest.fixture
def store(tmp_path):
    return random_store(tmp_path / "store")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def state(model):
    """Everything that a fit may change."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()},
    )


def same_state(one, other):
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    )


def factors(model, layer, adapter="default"):
    found = model.get_submodule(f"base_model.model.{MLP_OUTPUTS['llama'].format(layer)}")
    return found.sea_positive[adapter].weight, found.sea_negative[adapter].weight


# What is found


@pytest.mark.parametrize("centered", [False, True])
def test_a_planted_subspace_is_recovered(tmp_path, llama, centered):
    store = ActivationStore.from_tensors(tmp_path, **planted())
    model = get_peft_model(llama, SEAConfig(centered=centered, positive_energy=0.9999, negative_energy=0.9999))
    fit = fit_sea(model, store)
    assert (fit.adapter_name, fit.demonstrations, [f.layer for f in fit.layers]) == ("default", N, [0, 1, 2])
    for site in fit.layers:
        assert (site.positive_rank, site.negative_rank) == (3, 2)
        for basis, k in zip(factors(model, site.layer), (3, 2), strict=True):
            assert basis.shape == (k, D) and not basis.requires_grad
            cosines = torch.linalg.svdvals(basis.double() @ orthonormal(k, 10 * site.layer + k).T)
            assert cosines.min() > 0.99
        assert site.site == MLP_OUTPUTS["llama"].format(site.layer)
        assert len(site.positive_spectrum) == 3 and site.positive_spectrum == sorted(site.positive_spectrum)[::-1]
        assert 0.9999 <= site.positive_energy <= 1 + 1e-12


def test_statistics_are_those_of_the_neutral_demonstrations(store, llama):
    model = get_peft_model(llama, SEAConfig())
    for site in fit_sea(model, store).layers:
        h = store.neutral(site.layer).double()
        positive, negative = (basis.double() for basis in factors(model, site.layer))
        y = h @ (torch.eye(D) + positive.T @ positive - negative.T @ negative)
        ratio = h.norm(dim=1) / y.norm(dim=1)
        assert site.rms == pytest.approx(float(h.square().mean().sqrt()))
        assert site.mean_rescale == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert site.mean_rescale_deviation == pytest.approx(float(ratio.std(correction=0)), rel=1e-4)
        assert site.relative_error == pytest.approx(float((ratio.mean() / ratio - 1).square().mean().sqrt()), rel=1e-4)
        assert site.unscaled_error == pytest.approx(float((1 / ratio - 1).square().mean().sqrt()), rel=1e-4)
        assert site.strength == 1


def test_what_is_written_to_the_configuration(tmp_path, llama):
    store = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "store", neutral="text")
    model = get_peft_model(llama, SEAConfig(layers_to_transform=[0, 2]))
    fit = fit_sea(model, store)
    config = model.peft_config["default"]
    assert config.rank_pattern == {f.site: [f.positive_rank, f.negative_rank] for f in fit.layers}
    assert list(config.rank_pattern) == [MLP_OUTPUTS["llama"].format(i) for i in (0, 2)]
    assert config.fit_statistics == {f.site: {name: getattr(f, name) for name in RECORDED} for f in fit.layers}
    assert config.base_model_fingerprint == store.metadata["fingerprint"] == fingerprint(model)
    for values in (config.rank_pattern, config.fit_statistics):
        assert json.loads(json.dumps(values)) == values

    edited = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), edited)


def test_the_result_is_json(store, llama):
    fit = fit_sea(get_peft_model(llama, SEAConfig()), store)
    values = json.loads(json.dumps(fit.to_dict()))
    assert values["adapter_name"] == "default" and values["demonstrations"] == 20
    assert values["layers"][1]["site"] == MLP_OUTPUTS["llama"].format(1)
    assert values == fit.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescale": "none"},
        {"rescale": "mean", "strength": 0.5},
        {"rescale": "average"},
        {"projections": "exchanged", "centered": True},
        {"projections": "positive"},
        {"feature_map": "tanh", "input_scale": 3.0},
        {"feature_map": "elu", "feature_space": "feature"},
    ],
    ids=str,
)
def test_the_model_edits_as_the_mathematics(store, llama, changes):
    config = SEAConfig(positive_energy=0.9, negative_energy=0.9, **changes)
    model = get_peft_model(llama, config)
    fit = fit_sea(model, store)
    expected_model = tiny_model()
    for site in fit.layers:
        positive, negative = (partial(project, basis=basis) for basis in factors(model, site.layer))
        expected_model.get_submodule(site.site).register_forward_hook(
            lambda module, args, h, positive=positive, negative=negative, site=site: edit(
                h,
                positive,
                negative,
                projections=config.projections,
                feature_map=config.feature_map,
                feature_space=config.feature_space,
                scale=1.0 if config.input_scale is None else config.input_scale * site.rms,
                rescale=config.rescale,
                mean_rescale=site.mean_rescale,
                strength=config.strength,
            )
        )
    torch.testing.assert_close(logits(model), logits(expected_model), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-3)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon", "gemma"])
def test_collected_activations_fit_the_model_they_come_from(tmp_path, family, site):
    model = tiny_model(family)
    store = collect_activations(model, TOKENIZER, contrast(), tmp_path, site=site, answers="all", neutral="text")
    before = logits(model)
    adapted = get_peft_model(model, SEAConfig(site=site, centered=True, negative_energy=0.5))
    assert torch.equal(logits(adapted), before)
    fit = fit_sea(adapted, str(tmp_path))
    assert fit.demonstrations == len(store) == 12
    assert not torch.allclose(logits(adapted), before, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize(
    "changes", [{}, {"centered": True}, {"feature_map": "tanh", "feature_space": "feature"}], ids=str
)
def test_identical_demonstrations_make_the_identity(tmp_path, llama, changes):
    sets = planted(dtype=torch.float32, n=20)
    sets["negative"] = sets["positive"]
    before = logits(llama)
    model = get_peft_model(llama, SEAConfig(**changes))
    fit = fit_sea(model, ActivationStore.from_tensors(tmp_path, **sets))
    assert all(f.positive_rank == f.negative_rank > 0 for f in fit.layers)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_one_layer_is_in_memory_at_a_time(tmp_path, llama):
    alive, read = [], []

    class Watched(ActivationStore):
        def _rows(self, layer, rows):
            read.append(layer)
            assert [other for other, tensor in alive if tensor() is not None and other != layer] == []
            tensor = super()._rows(layer, rows)
            alive.append((layer, weakref.ref(tensor)))
            return tensor

    # float64, so that the fit works on the very tensors that the store gives
    ActivationStore.from_tensors(tmp_path, **planted())
    fit_sea(get_peft_model(llama, SEAConfig()), Watched(tmp_path))
    assert read == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [layer for layer, tensor in alive if tensor() is not None] == []


# Again, several adapters, natively added


def test_a_new_fit_replaces_the_old_one(tmp_path, store, llama):
    other = random_store(tmp_path / "other", n=7)
    model = get_peft_model(llama, SEAConfig())
    fit_sea(model, store)
    first = logits(model)
    fit_sea(model, other)
    assert not torch.allclose(logits(model), first, atol=1e-3)
    fresh = get_peft_model(tiny_model(), SEAConfig())
    fit_sea(fresh, other)
    assert same_state(state(model), state(fresh))
    fit_sea(model, store)
    assert torch.equal(logits(model), first)


def test_adapters_are_fitted_separately(tmp_path, store, llama):
    other = random_store(tmp_path / "other", n=7)
    expected = {}
    for name, its in (("a", store), ("b", other)):
        alone = get_peft_model(tiny_model(), SEAConfig(), adapter_name=name)
        fit_sea(alone, its)
        expected[name] = logits(alone)

    model = get_peft_model(llama, SEAConfig(), adapter_name="a")
    model.add_adapter("b", SEAConfig())
    before = logits(model)
    fit = fit_sea(model, other, adapter_name="b")
    assert fit.adapter_name == "b" and model.peft_config["a"].rank_pattern == {}
    assert torch.equal(logits(model), before)  # "a" is active and not fitted
    assert fit_sea(model, store).adapter_name == "a"
    for name in "ab":
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], atol=1e-6, rtol=1e-6)

    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(a, b\): pass adapter_name"):
        fit_sea(model, store)
    assert fit_sea(model, store, adapter_name="a").adapter_name == "a"


def test_adapters_added_by_transformers(store, llama):
    expected = get_peft_model(tiny_model(), SEAConfig())
    fit_sea(expected, store)
    llama.add_adapter(SEAConfig())
    fit = fit_sea(llama, store)
    assert llama.peft_config[fit.adapter_name].rank_pattern == expected.peft_config["default"].rank_pattern
    assert torch.equal(logits(llama), logits(expected))
    llama.add_adapter(SEAConfig(rescale="none"), "second")
    llama.set_adapter([fit.adapter_name, "second"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        fit_sea(llama, store)
    assert fit_sea(llama, store, "second").adapter_name == "second"


# Failures


def one_line_error(model, store, match, **arguments):
    before = state(model) if hasattr(model, "peft_config") else None
    with pytest.raises(ValueError, match=match) as caught:
        fit_sea(model, store, **arguments)
    assert "\n" not in str(caught.value)
    assert before is None or same_state(state(model), before)


@pytest.mark.parametrize("sign", ["positive", "negative", "neutral"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_failing_layer_leaves_everything_as_it_was(tmp_path, store, llama, sign, value, fitted):
    sets = planted(n=9)
    sets[sign][1][4, 5] = sets[sign][1][7, 0] = value
    model = get_peft_model(llama, SEAConfig())
    if fitted:
        fit_sea(model, store)
    bad = ActivationStore.from_tensors(tmp_path / "bad", **sets)
    one_line_error(model, bad, f"layer 1: {sign} activations must be finite: 2 of 9 rows .* row 4")


def test_too_few_demonstrations(tmp_path, llama):
    model = get_peft_model(llama, SEAConfig())
    one_line_error(model, random_store(tmp_path / "1", n=1), "layer 0: a fit needs at least 2 demonstrations, got 1")
    one_line_error(model, random_store(tmp_path / "0", n=0), "layer 0: a fit needs at least 2 demonstrations, got 0")
    # identical rows have no covariance once they are centred
    model.peft_config["default"].centered = True
    sets = {sign: {layer: torch.ones(4, D) for layer in LAYERS} for sign in ("positive", "negative", "neutral")}
    one_line_error(model, ActivationStore.from_tensors(tmp_path / "same", **sets), "layer 0: .* is zero")


def test_stores_that_are_no_store_of_rows(tmp_path, llama):
    model = get_peft_model(llama, SEAConfig())
    one_line_error(model, tmp_path / "nowhere", "is no activation store")
    answers = collect_activations(tiny_model(), TOKENIZER, contrast(), tmp_path / "a", tokens="answer")
    one_line_error(model, answers, "holds every answer token: collect with tokens='last'")
    without = collect_activations(tiny_model(), TOKENIZER, contrast(), tmp_path / "b", neutral=None)
    one_line_error(model, without, "layer 0: .* has no neutral activations")


def test_stores_of_other_sites_layers_and_widths(tmp_path, llama):
    model = get_peft_model(llama, SEAConfig())
    one_line_error(
        model,
        random_store(tmp_path / "a", site="block"),
        "holds the output of 'block', the adapter edits 'mlp': collect that",
    )
    one_line_error(
        model, random_store(tmp_path / "b", layers=(1,)), r"has layers \[1\], the adapter also edits \[0, 2\]"
    )
    one_line_error(model, random_store(tmp_path / "c", d=16), "has hidden size 16, .* has 32: it is of another model")
    other = {i: f"model.layers.{i}.self_attn.o_proj" for i in LAYERS}
    one_line_error(
        model,
        random_store(tmp_path / "d", modules=other),
        r"the output of model\.layers\.0\.self_attn\.o_proj, the adapter edits model\.layers\.0\.mlp\.down_proj: .*"
        "target_modules",
    )
    some = get_peft_model(tiny_model(), SEAConfig(layers_to_transform=1))
    assert [f.layer for f in fit_sea(some, tmp_path / "b").layers] == [1]


def test_other_target_modules_are_fitted_with_a_store_of_them(tmp_path, llama):
    store = collect_activations(
        llama, TOKENIZER, contrast(), tmp_path / "up", target_modules=["up_proj"], neutral="text"
    )
    before = logits(llama)
    model = get_peft_model(llama, SEAConfig(target_modules=["up_proj"], positive_energy=0.9))
    assert [f.site for f in fit_sea(model, store).layers] == [f"model.layers.{i}.mlp.up_proj" for i in LAYERS]
    assert not torch.allclose(logits(model), before, atol=1e-4)
    several = get_peft_model(tiny_model(), SEAConfig(target_modules=["up_proj", "gate_proj"]))
    one_line_error(several, store, "one site in a block")


def test_a_store_of_another_model_is_noticed(tmp_path, llama):
    store = collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="text")
    other = tiny_model(seed=1)
    model = get_peft_model(other, SEAConfig())
    one_line_error(
        model,
        store,
        rf"collected from another model .*fingerprint {fingerprint(llama)}; this model has {fingerprint(other)}",
    )
    fit_sea(model, store, allow_fingerprint_mismatch=True)
    assert model.peft_config["default"].base_model_fingerprint == fingerprint(llama)
    fit_sea(get_peft_model(llama.to(torch.bfloat16), SEAConfig()), store)  # the dtype does not matter


def test_models_without_the_adapter(store, llama):
    one_line_error(torch.nn.Linear(2, 2), store, r"0 adapters are active \(none\)")
    one_line_error(tiny_model(), store, "[Nn]o adapter")
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"]))
    one_line_error(lora, store, r"'default' is no SEA adapter of this model \(adapters: default \(LORA\)\): add one")
    model = get_peft_model(llama, SEAConfig())
    one_line_error(model, store, "'other' is no SEA adapter", adapter_name="other")


def test_merged_adapters(store, llama):
    model = get_peft_model(llama, SEAConfig(rescale="none"))
    fit_sea(model, store)
    model.merge_adapter()
    one_line_error(model, store, "cannot fit while adapters are merged: call unmerge_adapter first")
    model.unmerge_adapter()
    fit_sea(model, store)
