"""Edits of few tokens on a GPU: what kernels give is what the plain form gives, and the factors that they keep are
those of the adapter. The plain form runs where gradients are recorded; without a GPU it stands on both sides."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from edits import EDITS, edited_model, layers_of

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
        assert fusing.values_alone(h) and not fusing.values_alone(h.to("meta"))
        assert not torch.func.vmap(lambda row: row + fusing.values_alone(row))(torch.zeros(2, 4)).any()


def factors_of(layer):
    weights = [names["default"].weight for names in (layer.sea_positive, layer.sea_negative)]
    return torch.cat(weights), torch.cat((weights[0], -weights[1]))


def kept_by(layer, dtype=torch.float32):
    return layer.sea_positive["default"].stacked_with(layer.sea_negative["default"], dtype)


def test_kept_factors_are_those_of_the_adapter():
    layer = layers_of(edited_model(MLP))[0]
    first = kept_by(layer)
    assert all(map(torch.equal, first, factors_of(layer)))
    assert kept_by(layer)[0] is first[0]
    assert {factor.dtype for factor in kept_by(layer, torch.bfloat16)} == {torch.bfloat16}
    with torch.no_grad():
        layer.sea_negative["default"].weight.mul_(-1)
    assert all(map(torch.equal, kept_by(layer), factors_of(layer)))
    layer.double()
    assert kept_by(layer, torch.float64)[0].dtype == torch.float64
    other = copy.deepcopy(layer)
    other.set_factors("default", *torch.eye(layer.features)[:2].split(1))
    assert all(map(torch.equal, kept_by(other), factors_of(other)))


def test_no_factors_are_kept_of_weights_that_come_and_go():
    layer = layers_of(edited_model(MLP))[0]
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert kept_by(layer) is None
