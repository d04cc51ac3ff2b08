"""What editing costs, counted: operators, elements, bytes, and waits for the device. No seconds, which depend on the
machine. A count that falls is to be lowered here.

Others are counted where they belong: rows and forward passes of an evaluation in `test_evaluation`, of a collection in
`test_collect`, the largest tensor of a forward pass in `test_methods`, of a merge in `test_merging`.
"""

import sys
from collections import Counter
from itertools import pairwise

import pytest
import test_diff
import test_training
import torch
from edits import EDITS, edited_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from stores import write_text_store
from test_fitting import random_store
from tiny import LargestNew, logits, tiny_model, token_ids, vivid_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_edit import SEAConfig, fit_sea
from peft_edit.tuners import fusing


HIDDEN, LAYERS = 32, 3
every_edit = pytest.mark.parametrize("edit", EDITS)


class Operators(TorchDispatchMode):
    """Counts the operators that compute: other views of a tensor cost a device nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view" and isinstance(out, torch.Tensor):
            self.counts[name] += 1
        return out


class Reads(TorchDispatchMode):
    """Counts the operators, other than views, that take a parameter of a model."""

    def __init__(self, model):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if not func.is_view and any(tensor.untyped_storage().data_ptr() in self.known for tensor in taken):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# Of a layer that edits one token, beside those of its base model, without and with what is computed in Python on a CPU.
OPERATORS = {
    "SEA at the MLP": (4, 4),
    "SEA at the block": (10, 7),
    "HPR": (48, 20),
    "MEAN_DIFFERENCE at the MLP": (1, 1),
    "MEAN_DIFFERENCE at the block": (1, 1),
    "ITI": (1, 1),
    "DIFF": (8, 8),
}


@every_edit
@pytest.mark.parametrize("in_python", [False, True])
@torch.no_grad()
def test_operators_of_an_edited_layer_for_one_token(edit, in_python, monkeypatch):
    if in_python:  # which no operators are that a mode could see
        monkeypatch.setattr(fusing, "_followed", lambda: False)
    gate = {"gate": 1.0} if hasattr(EDITS[edit](), "gate") else {}  # so that every token is edited
    model, ids = edited_model(edit, **gate), token_ids(1, 1)
    logits(model, ids)  # the first use also checks the weights
    with Operators() as edited:
        logits(model, ids)
    with Operators() as base, model.disable_adapter():
        logits(model, ids)
    added = edited.counts - base.counts
    assert 0 < added.total() <= LAYERS * OPERATORS[edit][in_python], added


def linear(*widths):
    """Elements of linear layers with biases."""
    return sum(wide * narrow + narrow for wide, narrow in pairwise(widths))


# Elements of a layer's tensors, of an edit with one direction where it has several.
ELEMENTS = {
    "SEA at the MLP": 2 * HIDDEN,
    "SEA at the block": 2 * HIDDEN,
    "HPR": HIDDEN + linear(32, 16, 8, 4, 1),
    "MEAN_DIFFERENCE at the MLP": HIDDEN,
    "MEAN_DIFFERENCE at the block": HIDDEN,
    "ITI": HIDDEN,
    "DIFF": linear(32, 16, 8, 4, 32),
}


@every_edit
def test_an_adapter_is_as_large_as_its_edit_and_is_loaded_without_reading_the_base_model(edit, tmp_path):
    edited_model(edit).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sum(tensor.numel() for tensor in tensors.values()) == LAYERS * ELEMENTS[edit]
    # Tensors are named in the file with their shapes.
    assert 0 < file.stat().st_size - 4 * LAYERS * ELEMENTS[edit] < 200 * (len(tensors) + 1)
    base = vivid_model()
    with Reads(base) as reads, LargestNew(base) as made:
        PeftModel.from_pretrained(base, tmp_path)
    assert reads.counts == Counter()
    assert made.largest == max(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.filterwarnings("ignore::peft_edit.adapters.changes.ChangeWarning")
def test_a_fit_makes_no_square_matrix(tmp_path, site, retained):
    wide = 160  # more than there are rows
    store = random_store(tmp_path / "store", site=site, n=20, d=wide)
    rows = {i: torch.randn(100, wide) for i in range(LAYERS)}
    modules = {"mlp": "model.layers.{}.mlp.down_proj", "block": "model.layers.{}"}[site]
    named = {str(i): modules.format(i) for i in rows}
    retain = write_text_store(tmp_path / "retain", rows, modules=named, site=site) if retained else None
    model = get_peft_model(tiny_model(hidden_size=wide), SEAConfig(site=site))
    with LargestNew(model, elements=lambda tensor: tensor.shape[-2:].numel()) as seen:
        fit_sea(model, store, retain=retain)
    assert 20 * wide <= seen.largest < wide**2


class Waits(TorchDispatchMode):
    """Counts who makes the program wait for the device: by asking for values of tensors. A store is read on the CPU
    anyway."""

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket.__name__.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else ())
        )
        if by_mask or func.overloadpacket.__name__ in self.ASKING:
            asking = self._asking()
            self.counts.update([asking] if asking else [])
        return func(*args, **(kwargs or {}))

    def _asking(self):
        """The innermost function outside torch; None while a batch is read."""
        frame, found = sys._getframe(2), None
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("torch.utils.data"):
                return None
            if found is None and not name.startswith(("torch.", __name__)):
                found = f"{name}.{frame.f_code.co_name}"
            frame = frame.f_back
        return found


def train_hpr(folder, steps, retain):
    model, store = test_training.adapted(), test_training.write_store(folder / "store")
    arguments = test_training.arguments(folder / "out", **settings(steps))
    return test_training.HPRTrainer(model, arguments, train_dataset=store, retain_dataset=retain)


def train_diff(folder, steps, retain):
    store = test_diff.store_of(folder / "store")
    return test_diff.trainer_of(test_diff.adapted(), folder, store, retain=retain, **settings(steps))


def settings(steps):
    return {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "max_steps": steps}


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("train", [train_hpr, train_diff])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_a_training_step_does_not_wait_for_the_device(tmp_path, train, retained):
    rows = {i: torch.randn(100, HIDDEN) for i in range(LAYERS)}
    retain = write_text_store(tmp_path / "retain", rows, modules=test_diff.MODULES) if retained else None
    counts = []
    for steps in (2, 6):
        trainer = train(tmp_path / str(steps), steps, retain)
        with Waits() as waits:
            trainer.train()
        counts.append(waits.counts)
    assert counts[1] - counts[0] == Counter()
