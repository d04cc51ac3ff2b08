"""Edits of few tokens on a GPU: what kernels give is what the plain form gives. The plain form runs where gradients are
recorded; without a GPU the shorter way of a CPU stands on the other side."""

import sys

import pytest
import torch
from edits import EDITS, edited_model, layers_of
from torch.fx.experimental.proxy_tensor import make_fx

from peft_edit.tuners import fusing


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MLP, HPR = "SEA at the MLP", "HPR"
CASES = [
    *((edit, {}) for edit in EDITS),
    *((MLP, {"rescale": rescale, "strength": 0.7}) for rescale in ("token", "none", "average", "mean")),
    *((MLP, {"projections": projections}) for projections in ("exchanged", "positive", "negative")),
    (MLP, {"feature_map": "tanh", "rescale": "token"}),
    *((HPR, {"gate": gate, "alpha": alpha}) for gate, alpha in ((1.0, 1.4), (0.5, 5.0), (0.0, 1.0))),
    (HPR, {"rotation": "reflection"}),
]


def tokens(layer, device, dtype, *shape):
    """Some ordinary ones, one of zeros, and one of huge elements."""
    h = torch.randn(*shape, layer.features, generator=torch.Generator().manual_seed(0))
    h[..., 1, :] = 0
    h[..., 2, :] *= 1000
    return h.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("edit", "fields"), CASES, ids=str)
def test_edits_are_the_same_with_and_without_gradients(edit, fields, dtype, device):
    model = edited_model(edit, **fields).to(device)
    layer = layers_of(model)[-1]
    for h in (tokens(layer, device, dtype, 2, 5), tokens(layer, device, dtype, 4).T.contiguous().T):
        with torch.no_grad():
            found = layer.edit_output(h)
        expected = layer.edit_output(h).detach()
        assert found.dtype == dtype and found.shape == h.shape
        sizes = expected.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
        torch.testing.assert_close(found / sizes, expected / sizes, rtol=0, atol=TOLERANCES[dtype])


def test_the_shorter_way_is_for_values_alone():
    h = torch.ones(2, 4)
    assert not fusing.values_alone(h) and not fusing.kernels_apply(h)
    with torch.no_grad():
        assert fusing.values_alone(h) and not fusing.kernels_apply(h)
        assert not torch.func.vmap(lambda row: row + fusing.values_alone(row))(torch.zeros(2, 4)).any()


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda function, h: make_fx(function)(h)], ids=["jit", "fx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_numbers_are_frozen_into_a_trace(trace):
    layer = layers_of(edited_model("SEA at the block"))[0]
    h = tokens(layer, "cpu", torch.float32, 1, 4)
    with torch.no_grad():
        assert fusing.numbers_are_faster(h)
        layer.edit_output(h)  # the first use also checks the weights
        traced = trace(lambda h: layer.edit(h, "default"), h)
        torch.testing.assert_close(traced(2 * h.flip(1)), layer.edit(2 * h.flip(1), "default"))


def test_the_shorter_way_uses_the_weights_as_they_are():
    layer = layers_of(edited_model(MLP))[0]
    h = tokens(layer, "cpu", torch.float32, 2, 5)

    def agree():
        with torch.no_grad():
            found = layer.edit_output(h)
        torch.testing.assert_close(found, layer.edit_output(h).detach())
        return found

    before, weight = agree(), layer.sea_negative["default"].weight
    weight.data.copy_(weight.flip(0).roll(1, dims=1))
    assert not torch.equal(agree(), before)


@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook"])
def test_modules_that_someone_listens_to_are_called(listen):
    layer, calls = layers_of(edited_model(MLP))[0], []
    getattr(layer.sea_positive["default"], listen)(lambda *arguments: calls.append(1))
    with torch.no_grad():
        layer.edit_output(tokens(layer, "cpu", torch.float32, 2, 5))
    assert calls


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(fusing, "find_spec", lambda name: None)
    assert not fusing.has_triton.__wrapped__(torch.device("cuda"))


def test_where_triton_compiles_nothing_it_is_said(monkeypatch):
    monkeypatch.setattr(fusing, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "peft_edit.tuners.trial_kernel", None)
    with pytest.warns(UserWarning, match=r"compiles nothing for cpu \(ModuleNotFoundError: .*several kernels"):
        assert not fusing.has_triton.__wrapped__(torch.device("cpu"))
