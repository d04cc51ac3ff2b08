"""The mathematics of HPR: angles, the rotation, the edit of negative activations, the loss."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from peft_edit.tuners.angle import angle_between
from peft_edit.tuners.hpr.maths import edit, is_negative, loss, reflection_angle, rotate


GOLDEN = Path(__file__).parent / "fixtures" / "hpr_edit.safetensors"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Allowed relative error of a norm: of the arithmetic, or of rounding the result.
NORM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
D = 24
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
wide_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
half_dtypes = pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
edit_in_python = partial(edit, in_python=True)
every_edit = pytest.mark.parametrize("edit", [edit, edit_in_python], ids=["tensors", "python"])
angles = st.floats(0, math.pi)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def across(w, seed=5):
    """A unit vector at a right angle to w."""
    x = normal(len(w), seed=seed)
    return unit(x - (x @ unit(w)) * unit(w))


def reflect(a, w):
    n = unit(w)
    return a - 2 * (a @ n).unsqueeze(-1) * n


def constant(angle_rad):
    return lambda a: torch.full(a.shape[:-1], angle_rad, dtype=torch.promote_types(a.dtype, torch.float32))


def negatives(n=10, d=D, seed=0, dtype=torch.float64):
    """Generic activations and a probe that calls them all negative."""
    a, w = normal(n, d, seed=seed), normal(d, seed=seed + 100)
    return torch.where((a @ w).unsqueeze(-1) > 0, -a, a).to(dtype), w.to(dtype)


def householder(a, w, angle_rad):
    """Equation 12 of the paper, literally, with the dense matrix."""
    n = unit(w)
    reflected = a @ (torch.eye(len(w), dtype=a.dtype) - 2 * n.outer(n))
    between = torch.acos((unit(a) * unit(reflected)).sum(dim=-1, keepdim=True))
    g = angle_rad.unsqueeze(-1)
    return (torch.sin(g) * reflected + torch.sin(between - g) * a) / torch.sin(between)


class Shapes(TorchDispatchMode):
    """Shapes of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(x)}
        return out


# ------------------------------------------------------------------------------------------------ the published code


def golden(dtype):
    tensors = load_file(GOLDEN)
    weights = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("state.angle")}

    def angle(a):
        x = a.double()
        for i in (0, 2, 4, 6):
            x = x if i == 0 else torch.nn.functional.gelu(x)
            layer = f"state.angle_model.model.{i}"
            x = torch.nn.functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        return math.pi * torch.sigmoid(x.squeeze(-1)).to(torch.promote_types(a.dtype, torch.float32))

    probe = tensors["state.lr_model.weight"][0].to(dtype)
    return tensors, edit(tensors["activation"].to(dtype), probe, angle), angle


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_edit_equals_the_published_one(dtype, allowed):
    tensors, out, angle = golden(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), tensors["out.f64.alpha1.0"], rtol=0, atol=allowed)
    torch.testing.assert_close(angle(tensors["activation"].to(dtype)).double(), tensors["angle_f64"][..., 0])
    a, w = tensors["activation"].to(dtype), tensors["state.lr_model.weight"][0].to(dtype)
    negative = is_negative(a, w)
    assert torch.equal(negative, tensors["lr_prob_f64"][..., 0] <= 0.5) and negative.sum() == 5
    torch.testing.assert_close(reflection_angle(a, w).double(), tensors["gamma2_f64"][..., 0], rtol=0, atol=1e-5)


@half_dtypes
def test_half_precision_is_near_the_published_edit(dtype):
    tensors, out, _ = golden(dtype)
    expected = tensors["out.f64.alpha1.0"]
    assert out.dtype == dtype and out.isfinite().all()
    errors = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.02


def test_rotation_equals_equation_12_of_the_paper():
    a, w = negatives(50)
    g = torch.linspace(0.05, 3.1, 50, dtype=torch.float64)
    torch.testing.assert_close(rotate(a, w, g), householder(a, w, g), rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- the angle


def test_angle_between_equals_the_arc_cosine():
    a, b = normal(40, D), normal(40, D, seed=1)
    expected = torch.acos((unit(a) * unit(b)).sum(dim=-1))
    torch.testing.assert_close(angle_between(a, b), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(angle_between(a.float(), b.float()).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(angle_between(3 * a, 0.1 * b), expected, rtol=0, atol=1e-13)
    assert torch.equal(angle_between(a, b), angle_between(b, a))


@wide_dtypes
@pytest.mark.parametrize("planted", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("end", [0, math.pi])
def test_angle_between_is_accurate_where_the_arc_cosine_is_not(dtype, planted, end):
    w = normal(D)
    u, v = unit(w), across(w)
    a = math.cos(planted) * u + math.sin(planted) * v
    b = u if end == 0 else -u
    actual = angle_between(a.to(dtype), b.to(dtype)).double()
    assert abs(actual - abs(end - planted)) < (1e-14 if dtype == torch.float64 else 1e-6)


@every_dtype
def test_angle_between_at_its_ends(dtype):
    a = normal(5, D, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    zero = torch.zeros_like(a)
    assert angle_between(a, a).dtype == wide
    assert torch.equal(angle_between(a, a), torch.zeros(5, dtype=wide))
    assert torch.equal(angle_between(a, -a), torch.full((5,), math.pi, dtype=wide))
    for x, y in ((a, zero), (zero, a), (zero, zero)):
        assert torch.equal(angle_between(x, y), torch.zeros(5, dtype=wide))


# ----------------------------------------------------------------------------------------------------- the rotation


@settings(max_examples=60)
@given(seed=st.integers(0, 999), angle_rad=angles, scale=st.sampled_from([1e-6, 1.0, 1e6]), d=st.integers(2, 40))
def test_rotation_turns_by_the_angle_towards_the_normal(seed, angle_rad, scale, d):
    a, w = scale * normal(6, d, seed=seed), normal(d, seed=seed + 1)
    g = torch.full((6,), angle_rad, dtype=torch.float64)
    out = rotate(a, w, g)
    torch.testing.assert_close(out.norm(dim=-1), a.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(angle_between(a, out), g, rtol=0, atol=1e-12)
    before = angle_between(a, w.expand_as(a))
    torch.testing.assert_close(angle_between(out, w.expand_as(a)), (before - g).abs(), rtol=0, atol=1e-10)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), first=angles, second=angles)
def test_rotations_in_one_plane_add_up(seed, first, second):
    """As long as the normal is not passed, beyond which the second would turn back."""
    a, w = normal(1, D, seed=seed), normal(D, seed=seed + 1)
    room = float(angle_between(a, w[None])) / math.pi * 0.9
    first, second = (torch.tensor([x * room / 2], dtype=torch.float64) for x in (first, second))
    torch.testing.assert_close(rotate(rotate(a, w, first), w, second), rotate(a, w, first + second))


@every_dtype
@pytest.mark.parametrize("angle_rad", [0.01, 1.0, 3.0, math.pi])
def test_rotation_keeps_norms(dtype, angle_rad):
    a, w = normal(200, D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    out = rotate(a, w, torch.full((200,), angle_rad))
    assert out.dtype == dtype and not torch.equal(out, a)
    ratio = out.double().norm(dim=-1) / a.double().norm(dim=-1)
    assert (ratio - 1).abs().max() < NORM[dtype]


@every_dtype
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("slant", [0.0, 1e-12, 1e-9, 1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_rotation_keeps_norms_next_to_the_normal(dtype, sign, slant):
    for seed in range(10):
        w = normal(D, seed=seed)
        a = (sign * (unit(w) + slant * across(w))).to(dtype)
        out = rotate(a, w.to(dtype), torch.tensor(1.0))
        assert out.isfinite().all()
        ratio = out.double().norm() / a.double().norm()
        assert abs(ratio - 1) < NORM[dtype]
        angle = float(angle_between(a, out))
        # It turns by all of the angle or, where there is no plane to turn in, not at all.
        assert torch.equal(out, a) or abs(angle - 1) < 2 * NORM[dtype]
        if slant <= 1e-9 and dtype == torch.float64:
            assert torch.equal(out, a)
        if slant == 1e-4 and dtype in DTYPES[:2]:
            assert not torch.equal(out, a)


def without_direction(dtype):
    """Name to activation and probe that leave no plane to rotate in."""
    a, w = normal(D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    zero = torch.zeros(D, dtype=dtype)
    return {
        "zero activation": (zero, w),
        "zero probe": (a, zero),
        "both zero": (zero, zero),
        "parallel": (2 * w, w),
        "antiparallel": (-w, w),
        "one axis": (torch.eye(D, dtype=dtype)[3], -torch.eye(D, dtype=dtype)[3]),
        "no negative zero": (-zero, w),
    }


@every_dtype
@pytest.mark.parametrize("case", without_direction(torch.float64))
def test_without_a_direction_nothing_changes(dtype, case):
    a, w = without_direction(dtype)[case]
    for g in (0.0, 0.5, math.pi):
        assert torch.equal(rotate(a, w, torch.tensor(g)), a)
        assert torch.equal(edit(a[None], w, constant(g), gate=1.0), a[None])
    assert torch.equal(edit(a[None], w, lambda x: reflection_angle(x, w), gate=1.0), a[None])
    assert reflection_angle(a, w).isfinite()


@every_dtype
@pytest.mark.parametrize("case", without_direction(torch.float64))
def test_without_a_direction_gradients_are_finite(dtype, case):
    a, w = (x.clone().requires_grad_() for x in without_direction(dtype)[case])
    g = torch.tensor(1.0, requires_grad=True)
    rotate(a, w, g).sum().backward()
    assert all(x.grad.isfinite().all() for x in (a, w, g))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e-15, 1e15, 1e25, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_norms_are_kept(dtype, scale):
    a, w = unit(normal(5, D)) * scale, normal(D, seed=1, dtype=dtype)
    a = a.to(dtype)
    out = rotate(a, w, torch.ones(5))
    assert out.isfinite().all()
    torch.testing.assert_close(out.double().norm(dim=-1), a.double().norm(dim=-1), rtol=NORM[dtype], atol=0)


def test_the_length_of_the_probe_does_not_matter():
    a, w = normal(5, D), normal(D, seed=1)
    g = torch.full((5,), 0.7)
    for scale in (1e-9, 1e-3, 1e6):
        torch.testing.assert_close(rotate(a, scale * w, g), rotate(a, w, g))


@wide_dtypes
def test_rotation_by_the_angle_to_the_reflection_is_the_reflection(dtype):
    a, w = negatives(100)
    out = rotate(a.to(dtype), w.to(dtype), reflection_angle(a.to(dtype), w.to(dtype)))
    allowed = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), reflect(a, w), rtol=0, atol=allowed)


@wide_dtypes
@pytest.mark.parametrize("slant", [1e-4, 1e-3, 1e-2, 1.0])
def test_reflection_is_accurate_next_to_the_normal(dtype, slant):
    w = normal(D)
    a = (-unit(w) + slant * across(w)).to(dtype)
    w = w.to(dtype)
    expected = reflect(a.double(), w.double())
    exact = angle_between(a.double(), expected)
    # A float32 direction is itself no better than 1e-7 of its length.
    allowed = 1e-11 if dtype == torch.float64 else 5e-7
    assert abs(reflection_angle(a, w).double() - exact) < allowed
    out = rotate(a, w, reflection_angle(a, w)).double()
    assert (out - expected).norm() < 3 * allowed * a.double().norm() / min(slant, 1)


# --------------------------------------------------------------------------------------------------- gate and edit


@every_dtype
@every_edit
def test_positive_tokens_stay_bit_for_bit_and_the_others_turn(dtype, edit):
    a, w = normal(4, 25, D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    before = a.clone()
    out = edit(a, w, constant(1.0))
    negative = is_negative(a, w)
    assert 10 < negative.sum() < 90
    assert torch.equal(out[~negative], a[~negative])
    assert (out[negative] != a[negative]).any(dim=-1).all()
    assert out.dtype == dtype and out.shape == a.shape
    ratio = out.double().norm(dim=-1) / a.double().norm(dim=-1)
    assert (ratio - 1).abs().max() < NORM[dtype]
    assert torch.equal(a, before)


@every_dtype
@pytest.mark.parametrize(
    "options", [{"gate": 1.0}, {"gate": 0.0}, {"alpha": 0.0}, {"gate": 0.3, "alpha": 2.0}], ids=str
)
@every_edit
def test_input_is_unchanged(dtype, options, edit):
    a, w = normal(4, 5, D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    before = a.clone(), w.clone()
    edit(a, w, constant(1.0), **options)
    assert torch.equal(a, before[0]) and torch.equal(w, before[1])


@every_dtype
@pytest.mark.parametrize("gate", [0.5, 1.0])
@every_edit
def test_no_angle_is_the_identity(dtype, gate, edit):
    a, w = normal(30, D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    assert torch.equal(edit(a, w, constant(0.0), gate=gate), a)
    assert torch.equal(edit(a, w, constant(1.0), gate=gate, alpha=0.0), a)


@every_edit
def test_edit_by_the_reflection_angle_is_the_reflection_of_negative_tokens(edit):
    a, w = normal(50, D), normal(D, seed=1)
    expected = torch.where((a @ w).unsqueeze(-1) > 0, a, reflect(a, w))
    torch.testing.assert_close(edit(a, w, lambda x: reflection_angle(x, w)), expected, rtol=0, atol=1e-12)


@every_edit
def test_gate_0_turns_none_and_gate_1_all(edit):
    a, w = 100 * normal(50, D, dtype=torch.float32), normal(D, seed=1, dtype=torch.float32)
    assert torch.sigmoid(a @ w).max() == 1  # saturated
    assert not is_negative(a, w, 0.0).any() and is_negative(a, w, 1.0).all()
    assert torch.equal(edit(a, w, constant(1.0), gate=0.0), a)
    assert (edit(a, w, constant(1.0), gate=1.0) != a).any(dim=-1).all()


@settings(max_examples=60)
@given(gate=st.floats(0, 1), seed=st.integers(0, 99))
def test_gate_is_a_probability(gate, seed):
    a, w = normal(30, D, seed=seed), normal(D, seed=seed + 1)
    probability = torch.sigmoid(a @ w)
    clear = (probability - gate).abs() > 1e-12
    assert torch.equal(is_negative(a, w, gate)[clear], (probability <= gate)[clear])


def test_a_stricter_gate_turns_fewer():
    a, w = 0.1 * normal(300, D), normal(D, seed=1)
    counts = [int(is_negative(a, w, gate / 20).sum()) for gate in range(21)]
    assert counts == sorted(counts) and len(set(counts)) > 12


def test_the_threshold_itself_is_negative():
    w = torch.tensor([1.0, 0.0])
    a = torch.tensor([[0.0, 1.0], [-1e-30, 1.0], [1e-30, 1.0]])
    assert is_negative(a, w).tolist() == [True, True, False]


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.5, 100.0])
@every_edit
def test_alpha_scales_the_angle_up_to_half_a_turn(alpha, edit):
    a, w = negatives()
    out = edit(a, w, constant(1.0), alpha=alpha)
    torch.testing.assert_close(
        angle_between(a, out), torch.full((10,), min(alpha, math.pi)).double(), atol=1e-6, rtol=0
    )
    if alpha > math.pi:
        torch.testing.assert_close(out, -a)


@every_edit
def test_the_angle_network_sees_negative_tokens_only(edit):
    a, w = normal(3, 7, D), normal(D, seed=1)
    seen = []

    def angle(x):
        seen.append(x)
        return torch.ones(len(x), dtype=x.dtype)

    edit(a, w, angle)
    edit(a.abs(), torch.ones(D, dtype=a.dtype), angle)
    assert torch.equal(seen[0], a[a @ w <= 0])
    assert sum(map(len, seen[1:])) == 0
    edit(a, w, angle, gate=0.0)
    edit(a, w, angle, alpha=0.0)
    assert len(seen) <= 2


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4), (2, 0), (2, 3, 4)], ids=str)
@every_edit
def test_every_shape(shape, edit):
    a, w = normal(*shape, D), normal(D, seed=1)
    out = edit(a, w, constant(0.8), gate=0.6)
    assert out.shape == a.shape
    rows = [edit(row, w, constant(0.8), gate=0.6) for row in a.reshape(-1, D)]
    torch.testing.assert_close(out.reshape(-1, D), torch.stack(rows) if rows else a.reshape(-1, D))


@every_dtype
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1.0, 1e18, math.inf, math.nan])
@pytest.mark.parametrize("aligned", [False, True])
def test_numbers_in_python_make_the_same_edit(dtype, size, aligned):
    """Also of tokens among which one is of another size, or points along the normal."""
    a, w = normal(6, D, dtype=dtype), normal(D, seed=1, dtype=dtype)
    a[2] = size * (-w if aligned else a[2])
    predicted = 3 * torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=a.dtype).double()

    def angle(tokens):
        return predicted[[next(i for i in range(6) if same(a[i], token)) for token in tokens]]

    def same(x, y):
        return torch.equal(x.nan_to_num(), y.nan_to_num())

    for tokens in (a, a[:3], a[2], a[:2]):
        expected, found = (make(tokens, w, angle, gate=0.9, alpha=1.3) for make in (edit, edit_in_python))
        norms = tokens.double().norm(dim=-1, keepdim=True).nan_to_num(1, 1).clamp_min(1e-30)
        torch.testing.assert_close(
            found.double() / norms, expected.double() / norms, rtol=0, atol=NORM[dtype], equal_nan=True
        )


@pytest.mark.parametrize("cosine", [0.5, 0.89, 0.8999, 0.9001, 0.99])
def test_numbers_in_python_are_accurate_next_to_the_normal(cosine):
    w = normal(512)
    a = 3 * (math.sqrt(1 - cosine**2) * across(w) - cosine * unit(w))
    expected = edit(a, w, constant(0.7))
    found = edit_in_python(a.float(), w.float(), constant(0.7)).double()
    assert (found - expected).norm() < 2e-6 * a.norm()


def test_numbers_in_python_stay_where_the_tokens_are():
    a, w = normal(6, D), normal(D, seed=1)
    expected = edit(a, w, lambda tokens: tokens.new_ones(len(tokens)))
    with torch.device("meta"):
        found = edit_in_python(a, w, lambda tokens: tokens.new_ones(len(tokens)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"gate": 1.0, "alpha": 0.5}, {"gate": 0.0}], ids=str)
def test_compiled_edit_equals_the_other(options):
    """In a compiled graph no shape may depend on the data."""
    a, w = normal(3, 7, D), normal(D, seed=1)
    network = torch.nn.Linear(D, 1, dtype=a.dtype).requires_grad_(False)

    def compute(a):
        return edit(a, w, lambda x: math.pi * torch.sigmoid(network(x).squeeze(-1)), **options)

    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a), compute(a))


def test_autocast_changes_nothing():
    a, w = normal(50, D, dtype=torch.float32), normal(D, seed=1, dtype=torch.float32)

    def everything():
        return (
            is_negative(a, w, 0.7),
            reflection_angle(a, w),
            rotate(a, w, torch.ones(50)),
            rotate(-w, w, torch.ones(())),
        )

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        actual = everything()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"gate": 1.0}], ids=str)
def test_no_square_matrix_is_made(options):
    d = 96
    a, w = normal(2, 5, d), normal(d, seed=1)
    with Shapes() as shapes:
        edit(a, w, lambda x: reflection_angle(x, w), **options)
        angle_between(a, a)
    assert shapes.seen and max(math.prod(shape) for shape in shapes.seen) <= a.numel() < d * d


# --------------------------------------------------------------------------------------------------------- the loss


def pairs(batch=9, blocks=()):
    """Logits, angles and targets, as a probe and an angle network would give them."""
    return (
        normal(*blocks, 2, batch, seed=1),
        math.pi * torch.sigmoid(normal(*blocks, 2, batch, seed=2)),
        math.pi * torch.sigmoid(normal(*blocks, batch, seed=3)),
    )


def literal_loss(logits, angles_rad, target_rad):
    """Equations 8 to 10 of the paper on probabilities."""
    probe, angle = 0.0, 0.0
    count = target_rad.numel()
    for i in range(count):
        p_positive, p_negative = torch.sigmoid(logits[:, i])
        probe = probe - torch.log(p_positive) - torch.log(1 - p_negative)
        angle = angle + angles_rad[0, i] ** 2 + (angles_rad[1, i] - target_rad[i]) ** 2
    return probe / (2 * count), angle / (2 * count)


def test_loss_equals_the_literal_one():
    logits, angles_rad, target_rad = pairs()
    actual = loss(logits, angles_rad, target_rad)
    probe, angle = literal_loss(logits, angles_rad, target_rad)
    torch.testing.assert_close(actual.probe, probe, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.angle, angle, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.total, actual.probe + actual.angle)


def test_each_block_has_its_own_loss():
    tensors = pairs(blocks=(4,))
    together = loss(*tensors)
    for i in range(4):
        alone = loss(*(tensor[i] for tensor in tensors))
        for name in ("probe", "angle", "total"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name))
            assert getattr(together, name).shape == (4,)


def test_loss_is_zero_for_perfect_predictions():
    target = torch.tensor([0.3, 2.0])
    angles_rad = torch.stack((torch.zeros(2), target))
    result = loss(torch.tensor([[50.0, 60.0], [-50.0, -60.0]]), angles_rad, target)
    assert result.total < 1e-20


def test_gradient_survives_saturated_logits():
    """On probabilities float32 would give 0 or NaN here."""
    logits = torch.tensor([[-200.0], [200.0]], requires_grad=True)
    loss(logits, torch.zeros(2, 1), torch.zeros(1)).total.backward()
    assert torch.equal(logits.grad, torch.tensor([[-0.5], [0.5]]))


def test_gradients_of_the_loss_against_finite_differences():
    logits, angles_rad, target_rad = (tensor.requires_grad_() for tensor in pairs(4, (2,)))
    assert torch.autograd.gradcheck(lambda *tensors: loss(*tensors).total, (logits, angles_rad, target_rad))


def test_gradients_of_the_rotation_against_finite_differences():
    a, w = normal(4, 6), normal(6, seed=1)
    g = torch.tensor([0.2, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(rotate, tuple(x.requires_grad_() for x in (a, w, g)))
    assert torch.autograd.gradcheck(reflection_angle, (a, w))


def test_gradients_of_the_edit_against_finite_differences():
    a, w, v = normal(8, 6), normal(6, seed=1), normal(6, seed=2)

    def function(a, w, v):
        return edit(a, w, lambda x: math.pi * torch.sigmoid(x @ v), gate=0.6, alpha=0.9)

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in (a, w, v)))
