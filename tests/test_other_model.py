"""An adapter says of which model it was learnt: loading it onto another one warns."""

import functools
import warnings

import pytest
import torch
from accelerate import cpu_offload
from edits import EDITS
from loading import PATHS, base_of, link_base
from peft import get_peft_model
from tiny import FAMILIES, logits, tiny_model, vivid_model

from peft_edit import fingerprint


every_edit = pytest.mark.parametrize("edit", EDITS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


OTHER_MODEL = "adapter was learnt on another model than it is loaded onto"


def learnt(folder, edit, of, family="llama", dtype=torch.float32):
    """Folders as of `loading`: an adapter that says it was learnt on the model `of`, and the vivid base model."""
    link_base(folder, family, dtype)
    model = get_peft_model(base_of(folder, dtype=dtype), EDITS[edit](base_model_fingerprint=fingerprint(of)))
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes, once, such folders of an edit that was learnt on its own base model, or on another."""

    @functools.cache
    def folder(edit, own):
        return learnt(tmp_path_factory.mktemp("learnt"), edit, vivid_model() if own else tiny_model(seed=7))

    return folder


@every_edit
@pytest.mark.parametrize("load", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_of_another_model_warns_once_where_it_is_loaded(folder_of, edit, load, own):
    path = folder_of(edit, own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(path)
    lines = [str(warning.message) for warning in caught if OTHER_MODEL in str(warning.message)]
    base = str((path / "base").resolve())
    assert len(lines) == (not own) and all("\n" not in line and base in line for line in lines)
    assert logits(model).isfinite().all()  # it is loaded all the same


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_its_own_model_in_another_dtype_is_no_other_model(tmp_path, family, dtype):
    path = learnt(tmp_path, next(iter(EDITS)), vivid_model(family, torch.bfloat16).float(), family, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{OTHER_MODEL}")
        PATHS["PeftModel"](path, dtype=dtype)


class Sharded(torch.Tensor):
    """Stands for what distributed and quantised weights are: a subclass of a tensor."""


def on_meta(model):
    return model.to("meta")


def as_integers(model):
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.int8)
    return model


def as_subclass(model):
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Sharded), requires_grad=False)
    return model


@every_edit
@pytest.mark.parametrize("change", [on_meta, as_integers, as_subclass, cpu_offload])
def test_weights_that_are_not_at_hand_are_not_looked_at(edit, change, monkeypatch):
    def look(model):
        raise AssertionError("it looked")

    monkeypatch.setattr("peft_edit.tuners.model.fingerprint", look)
    get_peft_model(change(vivid_model()), EDITS[edit](base_model_fingerprint="0" * 16))
    with pytest.raises(AssertionError, match="it looked"):
        get_peft_model(vivid_model(), EDITS[edit](base_model_fingerprint="0" * 16))
