"""Merging SEA into the weights: W' = c M W, bias' = c M bias; unmerging; unloading."""

import functools
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, token_ids, vivid_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_edit import SEAConfig, edit_strength
from peft_edit.tuners.sea import SEABlock, SEALayer, SEALinear


HIDDEN = 32
MEAN_RESCALES = (1.2, 0.9, 1.05)
ERRORS = (0.1, 0.4, 0.2)
every_family = pytest.mark.parametrize("family", FAMILIES)
linear_modes = pytest.mark.parametrize("rescale", ["none", "mean", "average"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def base_model(family="llama"):
    return vivid_model(family, torch.float64)


def logits(model):
    return model(input_ids=token_ids()).logits


@functools.cache
def base_logits(family="llama"):
    return logits(base_model(family))


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def write_edit(model, adapter="default", seed=0, layers=range(3)):
    """Random factors, as a fit would write them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.peft_config[adapter]
    found = [layer for layer in model.modules() if isinstance(layer, SEALayer) and layer.has_adapter(adapter)]
    for index, layer in enumerate(found):
        if index in layers:
            factors = [torch.linalg.qr(torch.randn(HIDDEN, k, generator=generator))[0].T.contiguous() for k in (3, 5)]
            layer.set_factors(adapter, *factors)
            config.rank_pattern[layer.site] = [3, 5]
            config.fit_statistics[layer.site] = {
                "rms": 0.5,
                "mean_rescale": MEAN_RESCALES[index],
                "mean_rescale_deviation": 0.1,
                "relative_error": ERRORS[index],
                "strength": config.statistics_strength,
            }
    return model


def edited_model(family="llama", seed=0, layers=range(3), **fields):
    config = SEAConfig(**{"rescale": "none"} | fields)
    return write_edit(get_peft_model(base_model(family), config).eval(), seed=seed, layers=layers)


def weights(model):
    """The model's own tensors by the names that they have without adapters."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "sea_" not in name and "lora_" not in name
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def merge_quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merging adapter")
        return model.merge_adapter(*args, **kwargs)


# Linear edits merge exactly


@every_family
@linear_modes
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_linear_edits_merge_exactly(family, rescale, strength):
    model = edited_model(family, rescale=rescale, strength=strength)
    expected = logits(model)
    assert relative(expected, base_logits(family)) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert type(merged) is type(base_model(family))
    assert not any(isinstance(module, SEALayer) for module in merged.modules())
    assert all(parameter.is_contiguous() for parameter in merged.parameters())
    assert relative(logits(merged), expected) < 1e-10


@every_family
@pytest.mark.parametrize("projections", ["positive", "negative", "exchanged"])
@pytest.mark.parametrize("rescale, strength", [("none", 1.0), ("mean", 0.5)])
def test_every_choice_of_projections_merges_exactly(family, projections, rescale, strength):
    model = edited_model(family, rescale=rescale, projections=projections, strength=strength)
    expected = logits(model)
    assert relative(expected, logits(edited_model(family, rescale=rescale, strength=strength))) > 1e-3
    assert relative(logits(model.merge_and_unload(safe_merge=True)), expected) < 1e-10


def test_exchanged_average_merges_exactly():
    model = edited_model(rescale="average", projections="exchanged")
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) < 1e-10


@every_family
def test_merged_weights_are_the_papers_matrix(family):
    """Linear and Conv1D, with and without bias."""
    model = edited_model(family, rescale="mean", strength=0.5)
    before = weights(model)
    layers = [layer for layer in model.modules() if isinstance(layer, SEALayer)]
    model.merge_adapter()
    after = weights(model)
    identity = torch.eye(HIDDEN, dtype=torch.float64)
    expected = dict(before)
    for index, layer in enumerate(layers):
        positive, negative = (factor["default"].weight.double() for factor in (layer.sea_positive, layer.sea_negative))
        matrix = identity + positive.T @ positive - negative.T @ negative
        matrix = identity + 0.5 * (MEAN_RESCALES[index] * matrix - identity)
        weight = before[f"{layer.site}.weight"]
        expected[f"{layer.site}.weight"] = weight @ matrix if family == "gpt2" else matrix @ weight
        if (bias := before.get(f"{layer.site}.bias")) is not None:
            assert bias.abs().max() > 0.01
            expected[f"{layer.site}.bias"] = matrix @ bias
    assert expected.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-14)
    assert sum(not torch.equal(after[name], before[name]) for name in before) == (6 if family in ("gpt2", "opt") else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_the_dtype(dtype):
    model = edited_model().to(dtype)
    expected = logits(edited_model())
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    allowed = relative(logits(base_model().to(dtype)).double(), base_logits())
    assert relative(logits(merged).double(), expected) < 3 * allowed + 1e-6


def test_unfitted_sites_are_unchanged():
    model = edited_model(layers=[1])
    expected = logits(model)
    before = weights(model)
    model.merge_adapter()
    after = weights(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    assert relative(logits(model), expected) < 1e-10
    unfitted = get_peft_model(base_model(), SEAConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(unfitted.merge_and_unload()), base_logits())


# The token's own rescale becomes the mean


@every_family
def test_token_merges_as_its_mean_and_warns_once(family):
    expected = logits(edited_model(family, rescale="mean"))
    model = edited_model(family, rescale="token")
    with pytest.warns(UserWarning) as caught:
        merged = model.merge_and_unload()
    messages = [str(w.message) for w in caught if "Merging adapter" in str(w.message)]
    assert len(messages) == len(caught) == 1
    worst = sorted(SEAConfig(**model.peft_config["default"].to_dict()).rank_pattern)[1]
    assert "'default'" in messages[0] and "error 0.233 on average" in messages[0] and f"0.400 at {worst}" in messages[0]
    assert "\n" not in messages[0] and caught[0].filename == __file__
    assert relative(logits(merged), expected) < 1e-10


def test_merge_adapter_warns_once_too():
    model = edited_model(rescale="token")
    with pytest.warns(UserWarning) as caught:
        model.merge_adapter()
    assert len(caught) == 1 and "0.400 at model.layers.1" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_and_unload()
    assert {str(warning.message) for warning in caught} == {"All adapters are already merged, nothing to do."}


# Unmerging


@every_family
def test_unmerging_restores_every_bit(family):
    model = edited_model(family, projections="negative")  # singular: cannot be undone by a product
    before, edited = weights(model), logits(model)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert model.base_model.model.get_submodule(next(iter(model.peft_config["default"].rank_pattern))).merged
        assert not same(weights(model), before)
        assert relative(logits(model), edited) < 1e-10
        model.unmerge_adapter()
        assert same(weights(model), before)
        assert torch.equal(logits(model), edited)


@every_family
def test_disabling_unmerges(family):
    model = edited_model(family)
    before, edited = weights(model), logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits(family))
    assert same(weights(model), before)
    assert torch.equal(logits(model), edited)


def test_unmerging_follows_the_model_to_another_dtype():
    model = edited_model()
    expected = {name: tensor.bfloat16() for name, tensor in weights(model).items()}
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert same(weights(model), expected)
    assert logits(model).dtype == torch.bfloat16


def test_status_shows_merged_adapters():
    model = edited_model()
    model.merge_adapter()
    assert [status.merged_adapters for status in model.get_layer_status()] == [["default"]] * 3
    assert model.get_model_status().merged_adapters == ["default"]
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_setting_an_adapter_unmerges():
    model = edited_model()
    edited = logits(model)
    model.add_adapter("other", SEAConfig())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert torch.equal(logits(model), base_logits())
    model.set_adapter("default")
    assert torch.equal(logits(model), edited)


# Two adapters


def two_adapters(family="llama"):
    model = edited_model(family)
    model.add_adapter("other", SEAConfig(rescale="mean", layers_to_transform=[1, 2]))
    return write_edit(model, "other", seed=1)


@every_family
def test_two_adapters_multiply_in_their_order(family):
    results = []
    for order in (["default", "other"], ["other", "default"]):
        model = two_adapters(family)
        model.base_model.set_adapter(order)
        both = logits(model)
        before = weights(model)
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(order[:1])
            model.merge_adapter(order[1:])
        in_turn = weights(model)
        results.append(logits(model))
        assert relative(results[-1], both) < 1e-10
        model.unmerge_adapter()
        assert same(weights(model), before)
        model.merge_adapter()
        assert same(weights(model), in_turn)
        assert relative(logits(model.merge_and_unload(adapter_names=order)), both) < 1e-10
    assert relative(results[0], results[1]) > 1e-3


def test_merging_one_of_two():
    model = two_adapters()
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"])
    assert relative(logits(merged), expected) < 1e-10


# Refused before anything is changed


def refused(model, match, error=ValueError, **kwargs):
    """Whether each way of merging is refused in one line, leaving the model as it was."""
    before, expected = weights(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error, match=match) as caught:
                merge(**kwargs)
        assert "\n" not in str(caught.value)
        assert same(weights(model), before) and torch.equal(logits(model), expected)
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, SEALayer))
        assert sum(isinstance(module, SEALayer) for module in model.modules()) == 3
    return True


@every_family
@pytest.mark.parametrize("feature_map", ["tanh", "squared_exponential", "elu"])
def test_feature_maps_are_refused(family, feature_map):
    model = edited_model(family, feature_map=feature_map)
    assert refused(model, rf"^adapter 'default' cannot be merged: its feature map '{feature_map}' is not linear; keep")


@every_family
def test_blocks_are_refused(family):
    site = {"gpt2": "transformer.h.0", "falcon": "transformer.h.0", "opt": "model.decoder.layers.0"}
    site = site.get(family, "model.layers.0").replace(".", r"\.")
    model = edited_model(family, site="block")
    assert refused(model, rf"^adapter 'default' cannot be merged: it edits the output of {site}, which is no linear")


def test_a_second_adapter_that_cannot_merge_keeps_the_first_out_too():
    model = edited_model()
    model.add_adapter("bent", SEAConfig(feature_map="tanh", layers_to_transform=[1]))
    write_edit(model, "bent")
    model.base_model.set_adapter(["default", "bent"])
    assert refused(model, "'bent' cannot be merged: its feature map 'tanh'")
    model = edited_model()
    model.add_adapter("bent", SEAConfig(site="block", layers_to_transform=[2]))
    write_edit(model, "bent")
    model.base_model.set_adapter(["default", "bent"])
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'bent' cannot be merged: it edits the output of model\.layers\.2,"):
            merge()
        assert same(weights(model), before)
    model.merge_adapter(["default"])  # which is another matter
    assert not same(weights(model), before)


@pytest.mark.parametrize("fields", [{"rescale": "token"}, {"rescale": "mean"}])
def test_stale_strength(fields):
    """The mean rescale of "token" is that of one strength; "mean" scales the full edit, at any strength."""
    model = edited_model(**fields, strength=0.8)
    model.peft_config["default"].strength = 0.5
    if fields["rescale"] == "token":
        match = "at strength 0.8, rescale='token' with strength=0.5 needs it at 0.5: fit this adapter again"
        assert refused(model, match)
    else:
        expected = logits(model)
        assert relative(logits(model.merge_and_unload()), expected) < 1e-10


@pytest.mark.parametrize("rescale", ["token", "mean"])
def test_missing_statistics_at_a_later_site(rescale):
    model = edited_model(rescale=rescale)
    expected = logits(model)
    before = weights(model)
    del model.peft_config["default"].fit_statistics["model.layers.2.mlp.down_proj"]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"^fit_statistics\['model\.layers\.2\.mlp\.down_proj'\] has no number 'strength'"
        ):
            merge()
        assert same(weights(model), before)
    if rescale == "token":
        assert torch.equal(logits(model), expected)


def test_inside_edit_strength():
    model = edited_model()
    with edit_strength(model, 0.5):
        assert refused(model, "^cannot merge inside edit_strength")


def test_a_module_of_two_names_is_one():
    """Only weights in two modules are shared; a module that the model has in two places is edited once."""
    model = edited_model(rescale="none")
    expected = logits(model)
    model.get_base_model().again = model.get_base_model().model.layers[1]
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


class Wrapped(torch.Tensor):
    """Of another class and still floating, as torchao's quantised weights and FSDP's sharded ones are."""


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda weight: torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False), "int8"),
        (lambda weight: torch.nn.Parameter(weight.data.as_subclass(Wrapped), requires_grad=False), "Wrapped"),
    ],
    ids=["bytes", "subclass"],
)
def test_weights_that_are_no_plain_tensors(change, kind):
    model = edited_model(rescale="none")
    base = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
    base.weight = change(base.weight)
    match = rf"^adapter 'default' cannot be merged: the weights of model\.layers\.1\.mlp\.down_proj are .*\({kind}\)"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=match):
            merge()
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, SEALayer))


def test_wrong_names():
    model = edited_model()
    assert refused(model, "cannot merge adapter 'absent': this model has 'default'", adapter_names=["absent"])
    assert refused(model, "adapter_names should be a list of strings", TypeError, adapter_names="default")


def test_another_tuner_between():
    base = base_model()
    base.add_adapter(LoraConfig(target_modules=["down_proj"], layers_to_transform=[2], init_lora_weights=False))
    base.double()
    with pytest.warns(UserWarning):  # PEFT warns of the second tuner
        model = write_edit(get_peft_model(base, SEAConfig(rescale="none"), adapter_name="sea").eval(), "sea")
    assert relative(logits(model), logits(edited_model())) > 1e-3
    assert refused(
        model, r"^cannot merge adapter 'sea' at model\.layers\.2\.mlp\.down_proj: another adapter, Linear, lies between"
    )


def test_another_tuner_between_on_a_native_model():
    model = base_model()
    model.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "lora")
    model.add_adapter(SEAConfig(rescale="none"), "sea")
    write_edit(model.double(), "sea")
    model.set_adapter(["lora", "sea"])
    expected = logits(model)
    layer = next(module for module in model.modules() if isinstance(module, SEALinear))
    with pytest.raises(ValueError, match="another adapter, Linear, lies between"):
        layer.merge()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("layer", [0, 2])
def test_damaged_factors(layer):
    model = edited_model()
    before = weights(model)
    damaged = [module for module in model.modules() if isinstance(module, SEALayer)][layer]
    damaged.set_factors("default", *(3 * torch.eye(HIDDEN)[:k] for k in (3, 5)))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"at model\.layers\.{layer}\.mlp\.down_proj must be orthonormal"):
            merge()
        assert same(weights(model), before)


NAN_MESSAGE = "NaNs detected in the merged weights. The adapter default seems to be broken"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_finds_nan_of_the_model(family, where, value):
    model = edited_model(family)
    logits(model)  # so that the factors have been looked at
    layer = next(module for module in model.modules() if isinstance(module, SEALayer))
    if where == "bias" and layer.bias is None:
        where = "weight"
    getattr(layer.get_base_layer(), where).view(-1)[3] = value
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError) as error:
            merge(safe_merge=True)
        assert str(error.value) == NAN_MESSAGE
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before.values(), weights(model).values(), strict=True)
    )
    assert not layer.merged
    model.merge_adapter()  # unsafe: merges all the same
    assert layer.merged


# Unloading


@every_family
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_unloading_gives_the_base_model(family, site):
    model = edited_model(family, site=site)
    model.add_adapter("other", SEAConfig(site=site))
    write_edit(model, "other")
    blocks = [module.get_base_layer() for module in model.modules() if isinstance(module, SEABlock)]
    assert len(blocks) == (3 if site == "block" else 0)
    assert all(block._forward_hooks for block in blocks)
    base = model.unload()
    assert torch.equal(logits(base), base_logits(family))
    untouched = base_model(family)
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert same(dict(base.state_dict()), dict(untouched.state_dict()))
    for block in blocks:
        assert not block._forward_hooks and not hasattr(block, "sea")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's call
        again = get_peft_model(base, SEAConfig(site=site, rescale="none"))
    assert torch.equal(logits(write_edit(again)), logits(edited_model(family, site=site)))


def test_unloading_both_sites_at_once():
    model = edited_model()
    model.add_adapter("block", SEAConfig(site="block"))
    write_edit(model, "block")
    base = model.unload()
    assert torch.equal(logits(base), base_logits())
    assert not any(isinstance(module, SEALayer) for module in base.modules())


# No d x d matrix


class NewShapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


@every_family
def test_merging_makes_no_square_matrix(family):
    model = edited_model(family)
    with NewShapes() as seen:
        model.merge_adapter(safe_merge=True)
    assert (HIDDEN, HIDDEN) not in seen.shapes
    assert any(HIDDEN in shape for shape in seen.shapes)
