"""Every edit and LoRA in one model: loaded in either order, saved and merged. The adapter added last acts last."""

import functools

import pytest
import torch
from edits import EDITS, METHOD_OF, merges
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import agree, base_logits, logits, vivid_model

from peft_edit import edit_strength
from peft_edit.tuners.sea import SEALinear


SEA = "SEA at the MLP"
# LoRA on the edited layers and on others.
ADAPTERS = {"lora": lambda: LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False, r=2), **EDITS}
# Adapters of one method share a model of PEFT's, see test_methods.py.
PAIRS = [(a, b) for a in ADAPTERS for b in ADAPTERS if METHOD_OF.get(a) is not METHOD_OF.get(b)]
LINEAR = ["lora", *filter(merges, EDITS)]
in_either_order = pytest.mark.parametrize(("first", "second"), PAIRS)
ignore_peft = pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning", "ignore:You are trying:UserWarning")
pytestmark = [ignore_peft, pytest.mark.filterwarnings("ignore:.* adapter .* edits what:UserWarning")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def folder(name, tmp):
    """Saved adapter of a method, and the logits that it gives alone."""
    torch.manual_seed(1)
    model = get_peft_model(vivid_model(), ADAPTERS[name]())
    model.save_pretrained(tmp / name)
    return tmp / name, logits(model)


@pytest.fixture
def saved(tmp_path_factory):
    return functools.partial(folder, tmp=tmp_path_factory.getbasetemp())


def stacked(*folders):
    """A `PeftModel` around the bare model of the one before."""
    model = None
    for name, path in folders:
        bare = vivid_model() if model is None else model.get_base_model()
        model = PeftModel.from_pretrained(bare, path, adapter_name=name)
    return model


def natively(*folders):
    model = vivid_model()
    for name, path in folders:
        model.load_adapter(path, adapter_name=name)
    model.set_adapter([name for name, _ in folders])
    return model


@in_either_order
def test_both_ways_to_load_two_methods_agree(saved, first, second):
    folders = [(name, saved(name)[0]) for name in (first, second)]
    together = logits(stacked(*folders))
    agree(together, logits(natively(*folders)))
    for name in (first, second):
        assert not torch.allclose(together, saved(name)[1], atol=1e-3)


@in_either_order
def test_each_of_two_methods_can_be_switched_off(saved, first, second):
    folders = [(name, saved(name)[0]) for name in (first, second)]
    model = stacked(*folders)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    model = natively(*folders)
    for name in (first, second):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), saved(name)[1], rtol=0, atol=1e-5)


# LoRA on a layer whose output is edited later can no longer be saved, which the edit says.
SAVED = [(a, b) for a, b in PAIRS if (a, b) != ("lora", SEA)]


@pytest.mark.parametrize(("first", "second"), SAVED)
def test_both_are_saved_from_one_model(saved, tmp_path, first, second):
    folders = [(name, saved(name)[0]) for name in (first, second)]
    model = stacked(*folders)
    for name in (first, second):
        model.save_pretrained(tmp_path, selected_adapters=[name])
    again = [(name, tmp_path / name) for name in (first, second)]
    agree(logits(stacked(*again)), logits(model))
    agree(logits(natively(*again)), logits(model))
    for name, path in again:
        alone = PeftModel.from_pretrained(vivid_model(), path)
        torch.testing.assert_close(logits(alone), saved(name)[1], rtol=0, atol=1e-5)


def test_an_edit_around_lora_says_what_peft_can_no_longer_do(saved):
    model = PeftModel.from_pretrained(vivid_model(), saved("lora")[0], adapter_name="lora")
    with pytest.warns(
        UserWarning, match=r"^SEA adapter 'SEA at the MLP' edits what adapters of another method give .* save"
    ):
        model = PeftModel.from_pretrained(model.get_base_model(), saved(SEA)[0], adapter_name=SEA)
    with pytest.raises(ValueError, match="load and merge that one before this one"):
        model.merge_and_unload()


def test_merging_an_edit_below_lora_is_refused(saved):
    model = PeftModel.from_pretrained(vivid_model(), saved(SEA)[0], adapter_name=SEA)
    outer = PeftModel.from_pretrained(model.get_base_model(), saved("lora")[0], adapter_name="lora")
    before = logits(outer)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="lies around the edit; load and merge the edit before that one is loaded"):
            merge()
    assert torch.equal(logits(outer), before)


@pytest.mark.parametrize("names", [(a, b) for a in LINEAR for b in LINEAR if (a, b) != ("lora", "lora")])
def test_linear_methods_merge_one_after_the_other(saved, names):
    paths = [saved(name)[0] for name in names]
    merged = vivid_model()
    for path in paths:
        merged = PeftModel.from_pretrained(merged, path).merge_and_unload()
    if names[0] == names[1]:
        model = PeftModel.from_pretrained(vivid_model(), paths[0], adapter_name="0")
        model.load_adapter(paths[1], "1")
        model.base_model.set_adapter(["0", "1"])
    else:
        model = stacked(*zip(names, paths, strict=True))
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=2e-5)


def test_the_method_added_last_acts_last(saved):
    """On a common linear layer: y = M (W + B A) x, or y = M W x + B A x."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    lora = PeftModel.from_pretrained(vivid_model(), saved("lora")[0]).get_submodule("base_model.model.model.layers.0")
    sea = PeftModel.from_pretrained(vivid_model(), saved(SEA)[0]).get_submodule("base_model.model.model.layers.0")
    lora, sea = lora.mlp.down_proj, sea.mlp.down_proj
    assert isinstance(sea, SEALinear)
    site = "base_model.model.model.layers.0.mlp.down_proj"
    paths = {name: saved(name)[0] for name in ("lora", SEA)}
    outer_sea = stacked(*paths.items()).get_submodule(site)
    outer_lora = stacked(*reversed(paths.items())).get_submodule(site)
    torch.testing.assert_close(outer_sea(x), sea.edit(lora(x), "default"))
    torch.testing.assert_close(outer_lora(x), sea(x) + lora(x) - lora.base_layer(x))


def test_strength_is_that_of_every_edit_and_of_no_lora(saved):
    of_each_method = {METHOD_OF[edit].name: edit for edit in EDITS}.values()
    model = stacked(*((name, saved(name)[0]) for name in ("lora", *of_each_method)))
    with edit_strength(model, 0):
        torch.testing.assert_close(logits(model), saved("lora")[1], rtol=0, atol=1e-5)
