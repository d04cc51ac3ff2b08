"""Edits of few tokens on a GPU: what kernels give is what the plain form gives, and the factors that they keep are
those of the adapter. The plain form runs where gradients are recorded; without a GPU it stands on both sides."""

import copy

import pytest
import torch
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


def test_kernels_are_for_a_gpu_and_for_values_alone():
    h = torch.ones(2, 4)
    with torch.no_grad():
        assert not fusing.applies(h)


def factors_of(layer):
    weights = [names["default"].weight for names in (layer.sea_positive, layer.sea_negative)]
    return torch.cat(weights), torch.cat((weights[0], -weights[1]))


def test_kept_factors_are_those_of_the_adapter():
    layer = layers_of(edited_model(MLP))[0]
    first = layer._stacked_factors("default", torch.float32)
    assert all(map(torch.equal, first, factors_of(layer)))
    assert layer._stacked_factors("default", torch.float32)[0] is first[0]
    assert {factor.dtype for factor in layer._stacked_factors("default", torch.bfloat16)} == {torch.bfloat16}
    with torch.no_grad():
        layer.sea_negative["default"].weight.mul_(-1)
    assert all(map(torch.equal, layer._stacked_factors("default", torch.float32), factors_of(layer)))
    layer.double()
    assert layer._stacked_factors("default", torch.float64)[0].dtype == torch.float64
    other = copy.deepcopy(layer)
    other.set_factors("default", *torch.eye(layer.features)[:2].split(1))
    assert all(map(torch.equal, other._stacked_factors("default", torch.float32), factors_of(other)))
