"""Merging a SEA edit of a mixture of experts into the output weights of its experts."""

import warnings

import pytest
import torch
from mixtures import MIXTURES, tiny_mixture
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import logits
from torch import nn

from peft_edit import HPRConfig, SEAConfig
from peft_edit.models import outputs
from peft_edit.tuners.hpr import HPRLayer
from peft_edit.tuners.sea import SEABlock, SEALayer


HIDDEN = 32
every_mixture = pytest.mark.parametrize("family", MIXTURES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def write_edit(model, adapter="default", seed=0):
    """Random factors and statistics, as a fit would write them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.peft_config[adapter]
    for layer in model.modules():
        if isinstance(layer, SEALayer) and layer.has_adapter(adapter):
            factors = [torch.linalg.qr(torch.randn(HIDDEN, k, generator=generator))[0].T.contiguous() for k in (3, 5)]
            layer.set_factors(adapter, *factors)
            config.rank_pattern[layer.site] = [3, 5]
            statistics = {"rms": 0.5, "mean_rescale": 1.1, "mean_rescale_deviation": 0.1, "relative_error": 0.25}
            config.fit_statistics[layer.site] = {**statistics, "strength": config.statistics_strength}
    return model


def edited(family="mixtral", model=None, **fields):
    base = tiny_mixture(family) if model is None else model
    return write_edit(get_peft_model(base, SEAConfig(**{"rescale": "none"} | fields)).eval())


def mixtures_of(model):
    return [layer for layer in model.modules() if isinstance(layer, SEABlock)]


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "sea_" not in name}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@every_mixture
@pytest.mark.parametrize("fields", [{}, {"rescale": "mean", "strength": 0.5}, {"rescale": "average"}])
def test_linear_edits_merge_exactly(family, fields):
    model = edited(family, **fields)
    assert mixtures_of(model)
    expected = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), expected) > 1e-2
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, SEALayer) for module in merged.modules())
    assert not any(module._forward_hooks for name, module in merged.named_modules() if name.endswith("mlp"))
    assert all(parameter.is_contiguous() for parameter in merged.parameters())
    # Norms in float32 are between the float64 products.
    assert relative(logits(merged), expected) < 1e-6


@every_mixture
def test_merged_mixture_puts_out_the_edited_output(family):
    """In float64 throughout, for tokens that between them go to every expert."""
    model = edited(family)
    x = torch.randn(1, 64, HIDDEN, dtype=torch.float64)
    for layer in mixtures_of(model):
        block = layer.get_base_layer()
        raw = model.base_model.model.get_submodule(layer.site)
        expected = outputs._first(raw(x))
        layer.merge()
        assert relative(outputs._first(block(x)), expected) < 1e-10
        with_edit = outputs._first(block(x))
        layer.unmerge()
        layer.enable_adapters(False)
        assert relative(outputs._first(block(x)), with_edit) > 1e-2


@every_mixture
def test_unmerging_restores_every_bit(family):
    model = edited(family, projections="negative")
    before, expected = weights(model), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert not same(before, weights(model))
        assert {tuple(status.merged_adapters) for status in model.get_layer_status()} == {("default",)}
        model.unmerge_adapter()
        assert same(before, weights(model)) and torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert relative(logits(model), expected) > 1e-2
        assert same(before, weights(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_dtype(dtype):
    model = edited(model=tiny_mixture(dtype=dtype))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert relative(logits(merged), expected) < (1e-5 if dtype == torch.float32 else 0.1)


def test_experts_merge_as_if_each_were_alone():
    """So that a checkpoint with a tensor for each expert gets the same bits."""
    model = edited(model=tiny_mixture(dtype=torch.float32))
    for layer in mixtures_of(model):
        stacked = layer.output_tensors()["experts.down_proj"].parameter.clone()
        layer.merge()
        merged = layer.output_tensors()["experts.down_proj"].parameter
        for expert, expected in zip(stacked, merged, strict=True):
            out = torch.empty_like(expert)
            layer.merge_into(expert.clone(), 0, "default", out)
            assert torch.equal(out, expected)


def test_two_adapters_merge_in_their_order():
    model = edited()
    model.add_adapter("other", SEAConfig(rescale="mean", layers_to_transform=[1]))
    write_edit(model, "other", seed=1)
    before = weights(model)
    results = []
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        expected = logits(model)
        model.merge_adapter()
        results.append(logits(model))
        assert relative(results[-1], expected) < 1e-6
        model.unmerge_adapter()
        assert same(before, weights(model))
    assert relative(*results) > 1e-3


def test_rows_of_adapters_are_refused_while_merged():
    model = edited()
    model.merge_adapter()
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        logits(model, adapter_names=["default", "__base__"])


def test_token_merges_as_its_mean_and_warns():
    model = edited(rescale="token")
    expected = logits(edited(rescale="mean"))
    with pytest.warns(UserWarning, match=r"relative error 0\.250 on average"):
        merged = model.merge_and_unload()
    assert relative(logits(merged), expected) < 1e-6


def test_safe_merge_finds_nan_in_an_expert():
    model = edited()
    model.base_model.model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    before = weights(model)
    layer = mixtures_of(model)[1]
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    ):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert all(torch.equal(tensor.nan_to_num(), weights(model)[name].nan_to_num()) for name, tensor in before.items())


# Refused


def with_class(change):
    """A mixture whose blocks put out something else."""
    model = tiny_mixture()
    for layer in model.model.layers:
        mixture = layer.mlp
        mixture.__class__ = type("Changed", (type(mixture),), {"forward": change(type(mixture).forward)})
    return model


def normed(forward):
    return lambda self, x: nn.functional.rms_norm(forward(self, x), (HIDDEN,))


def plus_input(forward):
    return lambda self, x: forward(self, x) + x


def clamped(forward):
    return lambda self, x: forward(self, x).clamp(-0.01, 0.01)


def needs_more(forward):
    return lambda self, x, token_ids: forward(self, x)


@pytest.mark.parametrize("change", [normed, plus_input, clamped])
def test_what_is_no_weighted_sum_of_experts_is_refused(change):
    model = edited(model=with_class(change))
    before, expected = weights(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"output of model\.layers\.0\.mlp, and that is more than a weighted sum"
        ) as error:
            merge()
        assert "\n" not in str(error.value)
        assert same(before, weights(model)) and torch.equal(logits(model), expected)


def test_mixtures_that_cannot_be_tried_are_refused():
    model = edited(model=with_class(needs_more))
    with pytest.raises(ValueError, match=r"a trial of it alone fails \(TypeError: .*token_ids"):
        model.merge_adapter()


def test_feature_maps_are_refused():
    with pytest.raises(ValueError, match="its feature map 'tanh' is not linear"):
        edited(feature_map="tanh").merge_adapter()


def test_an_adapter_inside_is_refused():
    base = inject_adapter_in_model(LoraConfig(target_modules=["shared_expert.down_proj"]), tiny_mixture("qwen2_moe"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the second tuner
        model = edited(model=base.double())
    with pytest.raises(ValueError, match=r"at model\.layers\.0\.mlp: another adapter, Linear, lies inside it"):
        model.merge_adapter()


def test_other_edits_of_the_same_output_are_refused():
    """What they do comes before this edit, and would come after the merged one."""
    match = r"at model\.layers\.0\.mlp: another adapter, \w+, lies inside it"
    with pytest.raises(ValueError, match=match):
        edited("qwen2_moe", target_modules=["mlp.shared_expert", "mlp"]).merge_adapter()
    model = edited()
    block = mixtures_of(model)[0].get_base_layer()
    block.add_module("hpr", HPRLayer(block, "hpr", HPRConfig(), "model.layers.0.mlp", HIDDEN))
    with pytest.raises(ValueError, match=match):
        mixtures_of(model)[0].merge()


# The trial


def test_each_structure_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(outputs, "_REASONS", {})
    monkeypatch.setattr(outputs, "_try", lambda *arguments: tried.append(arguments))
    for _ in range(2):
        model = edited()
        model.merge_adapter()
        model.unmerge_adapter()
    assert len(tried) == 1
    edited("qwen2_moe").merge_adapter()
    assert len(tried) == 2


def test_the_trial_changes_nothing_and_needs_no_weights():
    model = edited()
    layer = mixtures_of(model)[0]
    before, state = weights(model), torch.get_rng_state()
    assert outputs._try(layer.get_base_layer(), layer.output_tensors()) is None
    assert same(before, weights(model)) and torch.equal(torch.get_rng_state(), state)
    assert len(layer.get_base_layer()._forward_hooks) == 1
    with torch.device("meta"):
        skeleton = type(tiny_mixture())(tiny_mixture().config)
    block = skeleton.model.layers[0].mlp
    assert outputs._try(block, outputs.mixture_outputs(block, HIDDEN)) is None


def test_large_weights_of_the_trial_repeat_one_row():
    values = outputs._random(torch.Size((64, 4096, 1024)), 1, torch.Generator().manual_seed(0))
    assert values.shape == (64, 4096, 1024) and values.untyped_storage().nbytes() == 4 * 4096
    assert len(values[0, :, 0].unique()) > 4000
    mixed = outputs._mix(values, 1)
    assert mixed.shape == values.shape and mixed.untyped_storage().nbytes() == 4 * 4096
    assert torch.equal(mixed[5, :, 7], 2 * values[0, :, 0] - values[0, :, 0].flip(0))


@pytest.mark.parametrize("wrong", ["axis", "left out", "stranger"])
def test_wrong_outputs_are_noticed(wrong):
    block = tiny_mixture("qwen2_moe").model.layers[0].mlp
    found = outputs.mixture_outputs(block, HIDDEN)
    assert set(found) == {"experts.down_proj", "shared_expert.down_proj.weight"}
    if wrong == "axis":
        found["experts.down_proj"] = outputs.OutputTensor(block.experts, "down_proj", 2, stacked=True)
    elif wrong == "left out":
        del found["shared_expert.down_proj.weight"]
    else:
        found["gate"] = outputs.OutputTensor(block.gate, "weight", 1)
    assert outputs._try(block, found)
