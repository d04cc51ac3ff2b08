import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peft_edit.tuners.sea.maths import (
    FEATURE_MAPS,
    check_energy,
    edit,
    fit,
    merge,
    project,
    rescale_statistics,
    signature,
)


GOLDEN = Path(__file__).parent / "fixtures" / "sea_fit.safetensors"
LINEAR = ["none", "mean", "average"]
RESCALES = ["token", *LINEAR]
PROJECTIONS = ["both", "positive", "negative", "exchanged"]
SPACES = ["activation", "feature"]
STRENGTHS = [0.5, 1.0, 1.5]
C = 1.3  # a mean rescale
# Where phi's inverse is not clamped: eps = 1e-4 inside the ends of its domain.
RANGES = {
    "tanh": (-math.atanh(1 - 1e-4), math.atanh(1 - 1e-4)),
    "squared_exponential": (-math.sqrt(-2 * math.log(1e-4)), math.sqrt(-2 * math.log(1e-4))),
    "elu": (math.log(1e-4), 1e4),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal_rows(k, d, seed=0):
    return torch.linalg.qr(normal(d, k, seed=seed))[0].T.contiguous()


def bases(d, k_positive=5, k_negative=7, shared=2):
    """U+ and U-, (k, d) each, with some directions in common."""
    positive = orthonormal_rows(k_positive, d, seed=10)
    own = normal(k_negative - shared, d, seed=11)
    return positive, torch.linalg.qr(torch.cat((positive[:shared], own)).T)[0].T.contiguous()


def edit_with(h, positive, negative, **options):
    return edit(h, partial(project, basis=positive), partial(project, basis=negative), **options)


def merge_with(rows, positive, negative, **options):
    return merge(rows, partial(project, basis=positive), partial(project, basis=negative), **options)


def demonstrations(n=60, d=24, spread=0.3, seed=0):
    """Neutral, positive and negative, (n, d) each, about a common mean."""
    neutral = normal(n, d, seed=seed) * torch.arange(1, d + 1) ** -1.0 + normal(d, seed=seed + 1)
    return neutral, *(neutral + spread * normal(n, d, seed=seed + 2 + i) for i in range(2))


# --------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize(("tag", "feature_map"), [("r0.998", None), ("tanh_r0.998", "tanh")])
def test_fit_equals_the_published_one(tag, feature_map, layer):
    golden = load_file(GOLDEN)
    fitted = fit(*(golden[name][:, layer] for name in ("bases", "positives", "negatives")), feature_map=feature_map)
    for sign, spectrum in (("pos", fitted.positive), ("neg", fitted.negative)):
        assert len(spectrum.basis) == golden[f"{tag}.k_{sign}"][layer]
        projector = spectrum.basis.T @ spectrum.basis
        if sign == "neg":
            projector = torch.eye(len(projector)) - projector
        torch.testing.assert_close(projector, golden[f"{tag}.uu_{sign}"][layer].double(), rtol=0, atol=1e-6)
        kept = spectrum.singular_values.square()
        shares = (spectrum.energy * kept / kept.sum())[:10]
        published = golden[f"{tag}.ev_{sign}_top10"][layer]
        torch.testing.assert_close(shares, published[: len(shares)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_fit_recovers_a_planted_subspace(sign):
    """Neutral and demonstrations agree on three directions and nowhere else."""
    n, d = 400, 64
    planted = orthonormal_rows(3, d, seed=1)
    shared = normal(n, 3, seed=2) * torch.tensor([3.0, 2.0, 1.5])
    neutral, planted_set = (shared @ planted + 0.1 * normal(n, d, seed=3 + i) for i in range(2))
    other = normal(n, d, seed=5)
    sets = {"positive": other, "negative": other, sign: planted_set}
    spectrum = getattr(fit(neutral, **sets, **{f"{sign}_energy": 0.99}), sign)
    assert len(spectrum.basis) == 3
    assert torch.linalg.svdvals(spectrum.basis @ planted.T).min() > 0.99
    # With strengths so far apart the directions themselves are found, strongest first.
    assert (spectrum.basis * planted).sum(dim=1).abs().min() > 0.99


def test_edit_of_a_planted_fit_removes_the_negative_direction():
    n, d = 400, 64
    positive_direction, negative_direction = orthonormal_rows(2, d, seed=1)
    a, b = normal(n, 2, seed=2).T
    noise = (0.05 * normal(n, d, seed=3 + i) for i in range(3))
    neutral, positive, negative = (
        latent + rest
        for latent, rest in zip(
            (
                a.outer(positive_direction) + b.outer(negative_direction),
                a.outer(positive_direction),
                b.outer(negative_direction),
            ),
            noise,
            strict=True,
        )
    )
    fitted = fit(neutral, positive, negative, positive_energy=0.9, negative_energy=0.9)
    y = edit_with(neutral, fitted.positive.basis, fitted.negative.basis, rescale="none")
    torch.testing.assert_close(y @ positive_direction, 2 * neutral @ positive_direction, rtol=0, atol=0.2)
    torch.testing.assert_close(y @ negative_direction, torch.zeros(n, dtype=y.dtype), rtol=0, atol=0.2)


@pytest.mark.parametrize("feature_map", [None, *FEATURE_MAPS])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(10, 30), (30, 10)], ids=str)
def test_fit_equals_its_definition(shape, centered, feature_map):
    sets = demonstrations(*shape)
    energies = {"positive": 0.9, "negative": 0.99}
    fitted = fit(
        *sets, positive_energy=0.9, negative_energy=0.99, centered=centered, feature_map=feature_map, scale=0.7
    )
    if feature_map is not None:
        sets = [FEATURE_MAPS[feature_map].forward(m / 0.7) for m in sets]
    if centered:
        sets = [m - m.mean(dim=0) for m in sets]
    for sign, demonstration in zip(("positive", "negative"), sets[1:], strict=True):
        u, s, _ = torch.linalg.svd(sets[0].T @ demonstration / len(demonstration))
        energy = s.square().cumsum(dim=0) / s.square().sum()
        k = int((energy < energies[sign]).sum()) + 1
        spectrum = getattr(fitted, sign)
        assert len(spectrum.basis) == k
        torch.testing.assert_close(spectrum.basis.T @ spectrum.basis, u[:, :k] @ u[:, :k].T, rtol=0, atol=1e-10)
        torch.testing.assert_close(spectrum.singular_values, s[:k])
        assert spectrum.energy == pytest.approx(float(energy[k - 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fit_is_in_float64_whatever_the_activations(dtype):
    sets = [m.to(dtype) for m in demonstrations()]
    narrow, wide = fit(*sets, feature_map="tanh"), fit(*(m.double() for m in sets), feature_map="tanh")
    assert narrow.positive.basis.dtype == torch.float64
    assert torch.equal(narrow.positive.basis, wide.positive.basis)
    assert torch.equal(narrow.negative.basis, wide.negative.basis)
    assert narrow.signature == wide.signature


def test_fit_leaves_its_inputs_alone():
    sets = demonstrations()
    before = [m.clone() for m in sets]
    fit(*sets, centered=True, feature_map="elu", scale=2.0)
    assert all(torch.equal(m, kept) for m, kept in zip(sets, before, strict=True))


@pytest.mark.parametrize("shape", [(3, 8), (50, 8)], ids=str)
def test_signature_is_its_definition(shape):
    n = shape[0]
    positive, negative = normal(*shape, seed=1) + 1, normal(*shape, seed=2)
    stacked = torch.cat((positive, negative))
    labels = torch.zeros(2 * n, 2, dtype=torch.float64)
    labels[:n, 0] = labels[n:, 1] = 1
    expected = torch.linalg.svdvals(stacked.T @ labels / n).sum()
    assert signature(positive, negative) == pytest.approx(float(expected), rel=1e-12)
    assert fit(normal(*shape, seed=3), positive, negative, centered=True).signature == pytest.approx(float(expected))


def test_signature_grows_with_the_distance_between_the_behaviours():
    direction, noise = orthonormal_rows(1, 16), 0.1 * normal(40, 16)
    values = [signature(noise + distance * direction, noise - distance * direction) for distance in (0, 0.5, 1, 2)]
    assert values == sorted(values)


def with_rows(tensor, rows, value):
    tensor = tensor.clone()
    tensor[rows, 1] = value
    return tensor


NEUTRAL, POSITIVE, NEGATIVE = demonstrations(n=6, d=4)
VALID = {"neutral": NEUTRAL, "positive": POSITIVE, "negative": NEGATIVE}


REFUSALS = {
    "a percentage": ({"positive_energy": 99.8}, ["positive_energy", "(0, 1]", "99.8", "pass 0.998"]),
    "another percentage": ({"negative_energy": 99.99}, ["negative_energy", "(0, 1]", "99.99", "pass 0.9999"]),
    "no energy": ({"positive_energy": 0.0}, ["positive_energy", "(0, 1]", "got 0.0"]),
    "negative energy": ({"negative_energy": -0.5}, ["negative_energy", "(0, 1]", "got -0.5"]),
    "far too much energy": ({"positive_energy": 998}, ["positive_energy", "(0, 1]", "got 998"]),
    "NaN energy": ({"positive_energy": math.nan}, ["positive_energy", "(0, 1]", "got nan"]),
    "NaN": ({"neutral": with_rows(NEUTRAL, 4, math.nan)}, ["neutral", "finite", "1 of 6", "row 4", "drop"]),
    "inf": ({"positive": with_rows(POSITIVE, [2, 5], math.inf)}, ["positive", "finite", "2 of 6", "row 2", "drop"]),
    "-inf": ({"negative": with_rows(NEGATIVE, 0, -math.inf)}, ["negative", "finite", "1 of 6", "row 0", "dtype"]),
    "one demonstration": ({k: v[:1] for k, v in VALID.items()}, ["at least 2 demonstrations", "got 1"]),
    "no demonstrations": ({k: v[:0] for k, v in VALID.items()}, ["at least 2 demonstrations", "got 0"]),
    "too few positive": ({"positive": POSITIVE[:5]}, ["(demonstrations, hidden size)", "(6, 4)", "(5, 4)"]),
    "too narrow negative": ({"negative": NEGATIVE[:, :3]}, ["(demonstrations, hidden size)", "(6, 4)", "(6, 3)"]),
    "vectors": ({k: v[0] for k, v in VALID.items()}, ["(demonstrations, hidden size)", "(4,)"]),
    "zeros": ({"positive": torch.zeros_like(POSITIVE)}, ["cross-covariance", "zero"]),
    # Sums of float32 values are exact in float64, so that centring leaves nothing.
    "equal rows": ({"neutral": NEUTRAL[:1].float().repeat(6, 1), "centered": True}, ["cross-covariance", "zero"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_fit_refuses(case):
    changes, words = REFUSALS[case]
    with pytest.raises(ValueError) as error:
        fit(**VALID | changes)
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@given(energy=st.floats(0, 1, exclude_min=True))
def test_every_share_is_an_energy(energy):
    check_energy("energy", energy)


# ------------------------------------------------------------------------------------------- the edit, its properties


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rescale", ["token", "none"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_identical_demonstrations_make_the_identity(strength, rescale, dtype):
    neutral, positive, _ = demonstrations()
    fitted = fit(neutral, positive, positive)
    h = neutral.to(dtype)
    out = edit_with(h, fitted.positive.basis, fitted.negative.basis, rescale=rescale, strength=strength)
    assert torch.equal(out, h)


@pytest.mark.parametrize("rescale", ["token", "none"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_identical_demonstrations_make_the_identity_in_feature_space(name, rescale):
    neutral, positive, _ = demonstrations()
    fitted = fit(neutral, positive, positive, feature_map=name, scale=2.0)
    low, high = (2.0 * bound for bound in RANGES[name])
    out = edit_with(
        neutral.clamp(low, min(high, 10)),
        fitted.positive.basis,
        fitted.negative.basis,
        feature_map=name,
        feature_space="feature",
        scale=2.0,
        rescale=rescale,
    )
    torch.testing.assert_close(out, neutral, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5, -1.0])
@pytest.mark.parametrize(("feature_map", "projections"), [(None, p) for p in PROJECTIONS] + [("tanh", "both")])
def test_token_rescale_keeps_norms(feature_map, projections, strength, dtype, tolerance):
    h = 5 * normal(3, 7, 64, dtype=dtype)
    out = edit_with(h, *bases(64), projections=projections, feature_map=feature_map, strength=strength)
    assert not torch.allclose(out, h, rtol=0.05)
    torch.testing.assert_close(out.double().norm(dim=-1), h.double().norm(dim=-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_stays_zero(rescale, dtype):
    """Along the axes products are exact, so that U- removes the second token altogether."""
    axes = torch.eye(8)
    h = torch.zeros(3, 8, dtype=dtype)
    h[1, :2] = torch.tensor([3.0, -4.0])
    h[2] = 1
    out = edit_with(h, axes[4:5], axes[:3], rescale=rescale, mean_rescale=C)
    assert not out[:2].any()
    assert out.isfinite().all() and out[2].any()


@settings(max_examples=40, derandomize=True)
@given(d=st.integers(2, 24), k_positive=st.integers(1, 24), k_negative=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_matrix_is_symmetric_with_eigenvalues_between_zero_and_two(d, k_positive, k_negative, seed):
    positive, negative = (
        orthonormal_rows(min(k_positive, d), d, seed),
        orthonormal_rows(min(k_negative, d), d, seed + 1),
    )
    matrix = edit_with(torch.eye(d, dtype=torch.float64), positive, negative, rescale="none")
    assert (matrix - matrix.T).abs().max() < 1e-12
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() < 2 + 1e-12
    rank = int((torch.linalg.svdvals(matrix - torch.eye(d)) > 1e-9).sum())
    assert rank <= len(positive) + len(negative)


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("feature_map", [None, *FEATURE_MAPS])
def test_a_token_depends_on_no_other(feature_map, rescale):
    h = normal(2, 5, 16)
    positive, negative = bases(16)
    options = {"feature_map": feature_map, "rescale": rescale, "mean_rescale": C}
    apply = partial(edit_with, positive=positive, negative=negative, **options)
    out = apply(h)
    torch.testing.assert_close(apply(h[:1, 2:3]), out[:1, 2:3])
    torch.testing.assert_close(apply(h[0, 2]), out[0, 2])
    torch.testing.assert_close(apply(h.flip(0, 1)).flip(0, 1), out)
    spoilt = h.clone()
    spoilt[0, 3:], spoilt[1, 0] = math.nan, 1e300
    torch.testing.assert_close(apply(spoilt)[0, :3], out[0, :3])


MODES = [
    *({"projections": p, "rescale": r} for p, r in itertools.product(PROJECTIONS, RESCALES)),
    *({"feature_map": m, "feature_space": s} for m, s in itertools.product(FEATURE_MAPS, SPACES)),
]


def mode_id(mode):
    return " ".join(str(value) for value in mode.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_strength_zero_returns_the_activations(mode, dtype):
    h = 10 * normal(2, 6, 16, dtype=dtype)
    h[0, 0] = 0
    assert torch.equal(edit_with(h, *bases(16), **mode, mean_rescale=C, strength=0), h)


@pytest.mark.parametrize("strength", [*STRENGTHS, 2.0, -0.5])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_strength_interpolates(mode, strength):
    """h + s (out - h); with "token" of the edit before it is rescaled, which keeps norms at every strength."""
    h = normal(4, 6, 16)
    mode = {"rescale": "token", **mode}
    apply = partial(edit_with, h, *bases(16), mean_rescale=C)
    out = apply(**mode, strength=strength)
    if mode["rescale"] == "token":
        y = apply(**mode | {"rescale": "none"})
        mixed = h + strength * (y - h)
        mixed = mixed * h.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    else:
        mixed = h + strength * (apply(**mode) - h)
    torch.testing.assert_close(out, mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        *({"rescale": rescale} for rescale in RESCALES),
        *({"feature_map": m, "feature_space": s} for m, s in itertools.product(FEATURE_MAPS, SPACES)),
    ],
    ids=mode_id,
)
def test_exchanged_swaps_the_factors(options, strength):
    h, (positive, negative) = normal(4, 6, 16), bases(16)
    options = {**options, "mean_rescale": C, "strength": strength}
    exchanged = edit_with(h, positive, negative, projections="exchanged", **options)
    assert torch.equal(exchanged, edit_with(h, negative, positive, **options))
    assert not torch.allclose(exchanged, edit_with(h, positive, negative, **options))


# -------------------------------------------------------------------------------- the edit, against dense matrices


def dense_edit(h, positive, negative, projections, feature_map, feature_space, scale, rescale, strength):
    """The equations of the paper with d x d matrices, one token at a time."""
    if projections == "exchanged":
        positive, negative = negative, positive
    p_positive = positive.T @ positive
    p_negative = torch.eye(h.shape[-1], dtype=h.dtype) - negative.T @ negative
    chosen = {"positive": [p_positive], "negative": [p_negative]}.get(projections, [p_positive, p_negative])
    out = torch.empty_like(h)
    for place in itertools.product(*map(range, h.shape[:-1])):
        x = h[place]
        if feature_map is None:
            y = sum(p @ x for p in chosen)
        else:
            phi, inverse = LITERAL_MAPS[feature_map]
            z = phi(x / scale)
            if feature_space == "feature":
                y = inverse(sum(chosen) @ z, x) * scale
            else:
                y = sum(inverse(p @ z, x) for p in chosen) * scale
        y = {"mean": C, "average": 0.5}.get(rescale, 1.0) * y
        y = x + strength * (y - x)
        out[place] = y * x.norm() / y.norm() if rescale == "token" else y
    return out


EPS = 1e-4
LITERAL_MAPS = {
    "tanh": (torch.tanh, lambda z, x: torch.atanh(z.clamp(-1 + EPS, 1 - EPS))),
    "squared_exponential": (
        lambda x: torch.exp(-(x**2) / 2),
        lambda z, x: torch.sign(x) * torch.sqrt(-2 * torch.log(z.clamp(EPS, 1))),
    ),
    "elu": (
        lambda x: torch.where(x >= 0, x, torch.exp(x) - 1),
        lambda z, x: torch.where(z >= 0, z, torch.log(z.clamp(-1 + EPS, 0) + 1)),
    ),
}


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize(
    ("feature_map", "feature_space", "scale"),
    [(None, "activation", 1.0), *itertools.product(FEATURE_MAPS, SPACES, (1.0, 3.0))],
)
def test_edit_equals_the_dense_one(feature_map, feature_space, scale, projections, rescale):
    h, factors = 2 * normal(2, 3, 12), bases(12)
    before = h.clone(), *(factor.clone() for factor in factors)
    for strength in STRENGTHS:
        options = {
            "projections": projections,
            "feature_map": feature_map,
            "feature_space": feature_space,
            "scale": scale,
            "rescale": rescale,
            "strength": strength,
        }
        out = edit_with(h, *factors, mean_rescale=C, **options)
        torch.testing.assert_close(out, dense_edit(h, *factors, **options), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip((h, *factors), before, strict=True))


@pytest.mark.parametrize("feature_space", SPACES)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_input_scale_changes_units(name, feature_space):
    """Scaled activations edited at that scale are the scaled edit."""
    h, factors = normal(5, 12), bases(12)
    apply = partial(edit_with, positive=factors[0], negative=factors[1], feature_map=name, feature_space=feature_space)
    for rescale in RESCALES:
        torch.testing.assert_close(apply(40 * h, scale=40.0, rescale=rescale), 40 * apply(h, rescale=rescale))


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-3)])
def test_inverse_undoes_the_feature_map(name, dtype, tolerance):
    low, high = RANGES[name]
    x = torch.linspace(low * 0.99, min(high, 20) * 0.99, 1001, dtype=dtype)
    assert (x < 0).any() and (x > 0).any()
    phi = FEATURE_MAPS[name]
    torch.testing.assert_close(phi.inverse(phi.forward(x), x), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_inverse_is_finite_outside_its_domain(name):
    x = torch.tensor([-1e6, -30.0, -1.0, 0.0, 1.0, 30.0, 1e6])
    phi = FEATURE_MAPS[name]
    assert phi.inverse(phi.forward(x), x).isfinite().all()
    assert phi.inverse(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]), torch.ones(5)).isfinite().all()


def test_squared_exponential_keeps_the_sign():
    phi = FEATURE_MAPS["squared_exponential"]
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(phi.inverse(phi.forward(x), x), x)


# ------------------------------------------------------------------------------------------------- narrow dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "k_positive", "k_negative"), [(256, 10, 12), (512, 50, 40), (1024, 30, 50)])
@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize(
    ("magnitude", "mean"),
    [(1.0, 0.0), (0.01, 0.1), (600.0, 0.0), (10.0, 100.0)],  # a norm of 600 sqrt(d), squared, overflows float16
    ids=["unit", "small about a mean", "large", "about a large mean"],
)
@pytest.mark.parametrize("rescale", ["token", "none"])
def test_narrow_dtypes_lose_one_percent_at_most(
    rescale, magnitude, mean, projections, d, k_positive, k_negative, dtype
):
    positive, negative = bases(d, k_positive, k_negative, shared=3)
    # The mean lies in both, as it does where the covariances are not centred.
    h = (magnitude * normal(40, d, seed=1) + mean * d**0.5 * positive[0]).to(dtype)
    apply = partial(edit_with, positive=positive, negative=negative, projections=projections)
    out, expected = apply(h, rescale=rescale), apply(h.double(), rescale=rescale)
    assert out.dtype == dtype
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Rounding is a share of the activation: where most of it is removed, it is a larger share of what remains.
    removed = h.double().norm(dim=-1) / apply(h.double(), rescale="none").norm(dim=-1)
    assert (error / removed.clamp_min(1)).max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_dtype_is_the_inputs(mode, dtype):
    h = normal(3, 16, dtype=dtype)
    before = h.clone()
    for strength in STRENGTHS:
        out = edit_with(h, *bases(16), **mode, mean_rescale=C, strength=strength)
        assert out.dtype == dtype
        assert out.shape == h.shape
    assert torch.equal(h, before)


# ------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("strength", [0.0, *STRENGTHS])
@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize("rescale", LINEAR)
def test_merged_linear_equals_the_edit_of_its_output(rescale, projections, strength):
    d_in, d = 9, 16
    weight, bias, x = normal(d, d_in, seed=1), normal(d, seed=2), normal(20, d_in, seed=3)
    options = {"rescale": rescale, "projections": projections, "strength": strength, "mean_rescale": C}
    edited = edit_with(x @ weight.T + bias, *bases(d), **options)
    merged_weight = merge_with(weight.T, *bases(d), **options).T
    merged_bias = merge_with(bias, *bases(d), **options)
    torch.testing.assert_close(x @ merged_weight.T + merged_bias, edited, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("projections", PROJECTIONS)
def test_merging_the_token_rescale_folds_in_the_mean(projections, strength):
    rows, options = normal(9, 16), {"projections": projections, "strength": strength}
    merged = merge_with(rows, *bases(16), rescale="token", mean_rescale=C, **options)
    torch.testing.assert_close(merged, C * edit_with(rows, *bases(16), rescale="none", **options), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rescale", RESCALES)
def test_narrow_weights_merge_in_float32(rescale, dtype):
    rows = normal(9, 64, dtype=dtype)
    before = rows.clone()
    merged = merge_with(rows, *bases(64), rescale=rescale, mean_rescale=C)
    exact = merge_with(rows.double(), *bases(64), rescale=rescale, mean_rescale=C)
    assert merged.dtype == dtype
    assert torch.equal(rows, before)
    # One rounding, that of the result.
    bound = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-5 * (dtype == torch.float32) + 1e-6
    assert ((merged.double() - exact).abs() <= bound).all()


def test_mean_rescale_of_equal_ratios_is_the_token_rescale():
    """Tokens whose norms all shrink by the same factor: merging is exact even for "token"."""
    axes = torch.eye(8, dtype=torch.float64)
    h = normal(10, 8)
    h[:, 0] = h[:, 1:].norm(dim=1) * 0.75
    y = edit_with(h, axes[:0], axes[:1], rescale="none")
    statistics = rescale_statistics(h, y)
    assert statistics.mean == pytest.approx(1.25)
    assert statistics.deviation == pytest.approx(0, abs=1e-12)
    assert statistics.relative_error == pytest.approx(0, abs=1e-12)
    merged = merge_with(h, axes[:0], axes[:1], rescale="token", mean_rescale=statistics.mean)
    torch.testing.assert_close(merged, edit_with(h, axes[:0], axes[:1], rescale="token"))


def test_rescale_statistics_are_their_definition():
    h = normal(200, 16)
    y = edit_with(h, *bases(16), rescale="none")
    statistics = rescale_statistics(h, y)
    ratio = h.norm(dim=1) / y.norm(dim=1)
    c = ratio.mean()
    assert statistics.mean == pytest.approx(float(c), rel=1e-12)
    assert statistics.deviation == pytest.approx(float(((ratio - c) ** 2).mean().sqrt()), rel=1e-9)
    expected = ((c * y.norm(dim=1) / h.norm(dim=1) - 1) ** 2).mean().sqrt()
    assert statistics.relative_error == pytest.approx(float(expected), rel=1e-12)
    # It is the error that replacing "token" by "mean" makes.
    token = edit_with(h, *bases(16), rescale="token")
    mean = edit_with(h, *bases(16), rescale="mean", mean_rescale=float(c))
    made = ((mean - token).norm(dim=1) / token.norm(dim=1)).square().mean().sqrt()
    assert statistics.relative_error == pytest.approx(float(made), rel=1e-9)
    unscaled = ((y - token).norm(dim=1) / token.norm(dim=1)).square().mean().sqrt()
    assert statistics.unscaled_error == pytest.approx(float(unscaled), rel=1e-9)


def test_rescale_statistics_leave_out_rows_without_a_ratio():
    h, y = normal(10, 8), normal(10, 8, seed=1)
    zero = torch.zeros(1, 8, dtype=torch.float64)
    padded = rescale_statistics(torch.cat((h, zero, h[:1])), torch.cat((y, y[:1], zero)))
    assert padded == rescale_statistics(h, y)


def test_rescale_statistics_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="lower negative_energy"):
        rescale_statistics(normal(4, 8), torch.zeros(4, 8))


def test_a_token_that_is_removed_altogether_stays_zero_and_has_gradients():
    """What rounding leaves of it has no direction: "token" must not blow it up to full norm."""
    everything = torch.linalg.qr(normal(16, 16)).Q
    nothing = everything[:0]
    for dtype in (torch.float64, torch.float32):
        h = normal(5, 16).to(dtype).requires_grad_()
        out = edit_with(h, nothing, everything.to(dtype), projections="negative")
        assert not out.any()
    zero = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
    edit_with(zero, everything[:2], everything[2:4]).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("option", ["projections", "feature_map", "feature_space", "rescale"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'unknown'"):
        edit_with(normal(2, 16), *bases(16), **{option: "unknown"})
