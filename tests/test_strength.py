"""`edit_strength` in some of the decoder blocks, for every method."""

import pytest
import torch
from edits import EDITS, edited_model, layers_of
from peft import PeftModel
from tiny import base_logits, logits

from peft_edit import edit_strength
from peft_edit.models.fingerprint import adapters_fingerprint
from peft_edit.tuners.observing import observed_edits
from peft_edit.tuners.strength import edited_blocks


every_edit = pytest.mark.parametrize("edit", EDITS)


def changed_blocks(model: PeftModel) -> dict[int, bool]:
    """Block index to whether its edit changes anything in a forward pass."""
    changed = {}
    with observed_edits(model, lambda layer, h, out: changed.update({layer.site: not torch.equal(h, out)})):
        logits(model)
    return {int(site.split(".layers.")[1].split(".")[0]): value for site, value in changed.items()}


@every_edit
@pytest.mark.parametrize("layers", [[1], 2, (0, 2), range(3), []])
def test_only_the_chosen_blocks_edit(edit, layers):
    model = edited_model(edit)
    whole = logits(model)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    with edit_strength(model, layers=layers):
        assert changed_blocks(model) == {block: block in chosen for block in range(3)}
        if len(chosen) == 3:
            assert torch.equal(logits(model), whole)
        if not chosen:
            assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), whole)


@every_edit
def test_blocks_and_strengths_of_nested_blocks_go_together(edit):
    model = edited_model(edit)
    with edit_strength(model, 0.5, layers=[0, 1]), edit_strength(model, 3, layers=[1, 2]):
        assert [layer.strength_factor for layer in layers_of(model)] == [0, 1.5, 0]
    assert {layer.strength_factor for layer in layers_of(model)} == {1}


def test_adapters_that_are_added_inside_edit_in_the_same_blocks():
    model = edited_model("HPR", layers_to_transform=1)
    with edit_strength(model, layers=1):
        model.add_adapter("other", EDITS["HPR"]())
        assert [layer.strength_factor for layer in layers_of(model, "other")] == [0, 1, 0]


def test_the_record_of_active_adapters_tells_the_blocks():
    model = edited_model("HPR")
    seen = {adapters_fingerprint(model)}
    for layers in ([0], [1], [0, 1]):
        with edit_strength(model, layers=layers):
            seen.add(adapters_fingerprint(model))
    assert len(seen) == 4
    with edit_strength(model, layers=[0, 1, 2]):
        assert adapters_fingerprint(model) in seen


@pytest.mark.parametrize("layers, part", [([1, 7], "layers 7 have no edit, the model has them in 0-2"), ("0", "must")])
def test_blocks_without_an_edit_are_refused(layers, part):
    model = edited_model("HPR")
    with pytest.raises(ValueError, match=part), edit_strength(model, layers=layers):
        pass
    assert {layer.strength_factor for layer in layers_of(model)} == {1}


def test_blocks_of_an_adapter_are_those_that_it_was_fitted_in():
    assert edited_blocks(layers_of(edited_model("HPR", layers_to_transform=[0, 2]))) == [0, 2]
    assert edited_blocks(layers_of(edited_model("SEA at the MLP", init_weights=True))) == []
