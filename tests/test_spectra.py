import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_edit.tuners.sea import spectra
from peft_edit.tuners.sea.spectra import LeftFactor


SHAPES = [(40, 90), (64, 64), (90, 40)]
RATIOS = [0.5, 0.9, 0.998, 0.9999, 0.9999999, 1.0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size, k, seed=0):
    """(size, k), orthonormal columns."""
    return torch.linalg.qr(normal(size, k, seed=seed))[0]


def planted(n, d, singular_values, share=0.5):
    """X and Y, (n, d) each, for which X^T Y / n has these singular values; X carries their power `share`."""
    s = torch.as_tensor(singular_values, dtype=torch.float64)
    samples = n**0.5 * orthonormal(n, len(s), seed=1)
    x = samples * s**share @ orthonormal(d, len(s), seed=2).T
    y = samples * s ** (1 - share) @ orthonormal(d, len(s), seed=3).T
    return x, y


def correlated(n, d, features=None, mean=0.0, seed=0):
    """X and Y share features of decreasing strength, and a mean; each has noise of its own."""
    features = features or d
    strength = torch.arange(1, features + 1, dtype=torch.float64) ** -1
    directions = orthonormal(d, features, seed=seed).T * strength[:, None]
    shared = normal(n, features, seed=seed + 1)
    common = mean * normal(features, seed=seed + 2)
    return tuple((shared + common + 0.3 * normal(n, features, seed=seed + 3 + i)) @ directions for i in range(2))


def centred(n, d):
    return tuple(m - m.mean(dim=0) for m in correlated(n, d, mean=3))


def duplicated(n, d, answers):
    """Several answers to every question: the same neutral row as often."""
    x, y = correlated(n, d, mean=3)
    return x[torch.arange(n) // answers], y


DATA = {
    "decaying fast": lambda n, d: planted(n, d, 0.5 ** torch.arange(20)),
    "decaying slowly": lambda n, d: planted(n, d, 0.9 ** torch.arange(min(n, d))),
    "X ill-conditioned": lambda n, d: planted(n, d, 0.7 ** torch.arange(20), share=1.0),
    "Y ill-conditioned": lambda n, d: planted(n, d, 0.7 ** torch.arange(20), share=0.0),
    "correlated": correlated,
    "dominated by its mean": lambda n, d: correlated(n, d, mean=30),
    "centred": centred,
    "of low rank": lambda n, d: correlated(n, d, features=7),
    "with duplicated rows": lambda n, d: duplicated(n, d, answers=3),
    "with few distinct rows": lambda n, d: duplicated(n, d, answers=8),
    "with one duplicated row": lambda n, d: tuple(m[:1].repeat(n, 1) for m in correlated(n, d)),
    "Y large where X has nothing": lambda n, d: (correlated(n, d, features=9)[0], 100 * normal(n, d, seed=9)),
}


@dataclass
class Reference:
    """The dense decomposition that `LeftFactor` avoids."""

    omega: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor

    @classmethod
    def of(cls, x, y):
        omega = x.T @ y / len(x)
        u, s, _ = torch.linalg.svd(omega)
        return cls(omega, u, s)

    def energy(self, k):
        return float(self.s[:k].square().sum() / self.s.square().sum())

    def rank(self, ratio, n):
        if ratio == 1:
            return int((self.s > self.s[0] * max(n, len(self.u)) * torch.finfo(torch.float64).eps).sum())
        return next(k for k in range(1, len(self.s) + 1) if self.energy(k) >= ratio)

    def projector(self, k):
        return self.u[:, :k] @ self.u[:, :k].T


def check(spectrum, reference, ratio, n):
    """All that `LeftFactor.decompose` promises."""
    k = reference.rank(ratio, n)
    assert spectrum.basis.shape == (k, len(reference.u))
    assert spectrum.basis.is_contiguous()
    assert (spectrum.basis @ spectrum.basis.T - torch.eye(k)).abs().max() < 1e-12
    assert (spectrum.basis.T @ spectrum.basis - reference.projector(k)).norm() < 1e-8
    # Each row is a singular vector of its own, not merely one of the span.
    images = spectrum.basis @ reference.omega
    torch.testing.assert_close(
        images @ images.T, spectrum.singular_values.square().diag(), rtol=0, atol=1e-8 * float(reference.s[0] ** 2)
    )
    torch.testing.assert_close(spectrum.singular_values, reference.s[:k], rtol=1e-6, atol=1e-12 * float(reference.s[0]))
    assert spectrum.energy == pytest.approx(reference.energy(k), abs=1e-9)
    if ratio < 1:
        assert spectrum.energy >= ratio * (1 - 1e-12)
        assert spectrum.energy - reference.energy(k) + reference.energy(k - 1) < ratio


def take_krylov_path(patch):
    """Let small matrices take the path of large ones, in blocks to scale and without giving up early."""
    patch.setattr(spectra, "SMALL_CORE", 0)
    patch.setattr(spectra, "BLOCK_WIDTH", 4)
    patch.setattr(spectra, "WIDEST_SHARE", 1.0)
    patch.setattr(spectra, "WIDEST_CARRYING_SHARE", 1.0)


@pytest.fixture(params=["complete", "krylov"])
def path(request, monkeypatch):
    if request.param == "krylov":
        take_krylov_path(monkeypatch)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data", DATA)
def test_equals_the_dense_decomposition(path, data, shape):
    x, y = DATA[data](*shape)
    left, reference = LeftFactor(x), Reference.of(x, y)
    for ratio in RATIOS:
        check(left.decompose(y, ratio), reference, ratio, len(x))


@settings(max_examples=60, derandomize=True)
@given(
    n=st.integers(2, 50),
    d=st.integers(2, 50),
    rank=st.integers(1, 50),
    decay=st.floats(0.3, 1.0),
    ratio=st.one_of(st.floats(0.05, 0.9999999), st.just(1.0)),
    krylov=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_dense_decomposition_of_any_matrices(n, d, rank, decay, ratio, krylov, seed):
    rank = min(n, d, rank)
    scales = decay ** torch.arange(rank, dtype=torch.float64)
    shared = normal(n, rank, seed=seed) * scales
    x, y = (shared @ normal(rank, d, seed=seed + 1 + i) for i in range(2))
    reference = Reference.of(x, y)
    k = reference.rank(ratio, n)
    assume(min(abs(reference.energy(i) - ratio) for i in (k - 1, k)) > 1e-9 or ratio == 1)
    following = float(reference.s[k]) if k < len(reference.s) else 0.0
    assume(float(reference.s[k - 1]) - following > 1e-6 * float(reference.s[0]))  # else the span itself is rounding
    with pytest.MonkeyPatch.context() as patch:
        if krylov:
            take_krylov_path(patch)
        check(LeftFactor(x).decompose(y, ratio), reference, ratio, n)


LARGE = {
    "power law": lambda n, d: planted(n, d, [10.0] + [i**-1.5 for i in range(1, 501)]),
    "with few distinct rows": lambda n, d: duplicated(n, d, answers=20),
}


@pytest.mark.parametrize(
    ("data", "shape", "ratios"),
    [
        ("power law", (600, 1200), (0.9, 0.998, 0.9999)),
        ("power law", (1200, 600), (0.9, 0.998, 0.9999)),
        ("with few distinct rows", (600, 800), (0.9, 0.99)),
        ("with few distinct rows", (800, 600), (0.9, 0.99)),
    ],
    ids=str,
)
def test_large_matrices_need_no_complete_decomposition(data, shape, ratios, monkeypatch):
    x, y = LARGE[data](*shape)
    monkeypatch.setattr(LeftFactor, "_complete", None)
    left, reference = LeftFactor(x), Reference.of(x, y)
    for ratio in ratios:
        check(left.decompose(y, ratio), reference, ratio, len(x))


@pytest.mark.parametrize(("n", "rank"), [(600, 61), (900, 53)])
def test_the_search_goes_on_where_the_energy_is_carried(n, rank):
    """Past a third of n, and past a gap at an early look that is small by accident."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 2049, dtype=torch.float64).pow(-0.62)
    x, _, other = (torch.randn(n, 2048, generator=generator, dtype=torch.float64) * scale for _ in range(3))
    spectrum = LeftFactor(x)._leading(0.8 * x + 0.6 * other, 0.998)
    assert spectrum is not None and len(spectrum.basis) == rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["decaying fast", "of low rank", "with duplicated rows", "with few distinct rows", "dominated by its mean"]
)
def test_krylov_path_is_taken(kind, shape, monkeypatch):
    take_krylov_path(monkeypatch)
    x, y = DATA[kind](*shape)
    spectrum = LeftFactor(x)._leading(y, 0.9)
    assert spectrum is not None
    check(spectrum, Reference.of(x, y), 0.9, len(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("copies", [2, 3, 6, 11])
def test_repeated_singular_values_above_the_cut_all_count(path, copies, shape):
    # A block is 4 wide here and can find no more than 4 copies of one singular value.
    x, y = planted(*shape, [3.0, 2.5] + [2.0] * copies + [1 - 0.02 * i for i in range(25)])
    reference = Reference.of(x, y)
    ratio = (reference.energy(2 + copies + 4) + reference.energy(2 + copies + 5)) / 2
    check(LeftFactor(x).decompose(y, ratio), reference, ratio, len(x))


@pytest.mark.parametrize("shape", [(600, 800), (800, 600)], ids=str)
@pytest.mark.parametrize("spread", [0, 1e-14, 1e-8, 1e-6])
def test_many_close_singular_values_above_the_cut_all_count(spread, shape):
    """Thirty, more than a block has columns, from equal to easily told apart."""
    energies = (
        [100.0, 80.0, 60.0] + [1 + spread * i for i in range(30, 0, -1)] + [0.7 * (1 - i / 60) for i in range(60)]
    )
    singular_values = torch.tensor(energies, dtype=torch.float64).sqrt()
    x, y = planted(*shape, singular_values)
    reference = Reference(x.T @ y / len(x), orthonormal(shape[1], len(energies), seed=2), singular_values)
    for k in (3, 44, 84):
        ratio = (reference.energy(k - 1) + reference.energy(k)) / 2
        check(LeftFactor(x).decompose(y, ratio), reference, ratio, len(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0, 1e-14, 1e-12, 1e-10])
def test_cut_between_equal_singular_values(path, spread, shape):
    """The span is then any of many: it must hold all of the larger directions and none of the smaller ones."""
    x, y = planted(*shape, [3.0, 2.5] + [2.0 + spread * i for i in range(5, 0, -1)] + [1.0, 0.5])
    reference = Reference.of(x, y)
    spectrum = LeftFactor(x).decompose(y, (reference.energy(4) + reference.energy(5)) / 2)
    basis = spectrum.basis
    assert len(basis) == 5
    assert (basis @ basis.T - torch.eye(5)).abs().max() < 1e-12
    assert (basis @ reference.u[:, :2]).norm() ** 2 == pytest.approx(2, abs=1e-10)
    assert (basis @ reference.u[:, :7]).norm() ** 2 == pytest.approx(5, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_falls_back_where_the_gap_is_too_small(shape, monkeypatch):
    """Squared Gram matrices cannot tell apart what a complete decomposition can."""
    take_krylov_path(monkeypatch)
    x, y = planted(*shape, [1.0, 0.5, 1e-4 * (1 + 1e-4), 1e-4, 1e-5])
    reference, ratio = Reference.of(x, y), 1 - 1.2e-8
    assert reference.rank(ratio, len(x)) == 3
    assert LeftFactor(x)._leading(y, ratio) is None
    check(LeftFactor(x).decompose(y, ratio), reference, ratio, len(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("data", "rank"), [("of low rank", 7), ("decaying fast", 20), ("with one duplicated row", 1)])
def test_ratio_one_keeps_the_numerical_rank(path, data, rank, shape):
    x, y = DATA[data](*shape)
    spectrum = LeftFactor(x).decompose(y, 1.0)
    assert len(spectrum.basis) == rank
    assert spectrum.energy == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero", ["X", "Y", "X^T Y"])
def test_zero_covariance_is_an_error(path, zero, shape):
    x, y = correlated(*shape)
    half = len(x) // 2
    x[half if zero == "X^T Y" else 0 :] *= zero == "Y"
    y[: half if zero == "X^T Y" else len(y)] *= zero == "X"
    assert not (x.T @ y).any()
    for ratio in (0.9, 1.0):
        with pytest.raises(ValueError, match="zero"):
            LeftFactor(x).decompose(y, ratio)


@pytest.mark.parametrize("factor", [1e-60, 1e-8, 1e8, 1e60])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_units_do_not_matter(path, shape, factor):
    x, y = correlated(*shape)
    spectrum, scaled = (LeftFactor(c * x).decompose(y, 0.99) for c in (1, factor))
    assert scaled.basis.shape == spectrum.basis.shape
    assert (scaled.basis.T @ scaled.basis - spectrum.basis.T @ spectrum.basis).norm() < 1e-8
    torch.testing.assert_close(scaled.singular_values / factor, spectrum.singular_values)
    assert scaled.energy == pytest.approx(spectrum.energy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes_twice(path, shape):
    x, y = correlated(*shape)
    torch.manual_seed(1)
    first = LeftFactor(x).decompose(y, 0.99)
    torch.manual_seed(2)
    left = LeftFactor(x.clone())
    left.decompose(x, 0.9)  # what was decomposed before leaves no trace
    second = left.decompose(y.clone(), 0.99)
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.singular_values, second.singular_values)
    assert first.energy == second.energy


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # An expanded view counts with what it stores.
                self.elements = max(self.elements, min(leaf.numel(), leaf.untyped_storage().nbytes() // 8))
        return out


@pytest.mark.parametrize("shape", [(40, 200), (200, 40)], ids=str)
@pytest.mark.parametrize("ratio", [0.9, 0.998, 1.0])
def test_no_tensor_is_larger_than_the_data(path, shape, ratio):
    x, y = correlated(*shape, mean=1)
    largest = LargestTensor()
    with largest:
        LeftFactor(x).decompose(y, ratio)
    assert 0 < largest.elements <= max(math.prod(shape), min(shape) ** 2)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40])
def test_gram(n):
    x = normal(n, 7)
    gram = spectra._gram(x)
    torch.testing.assert_close(gram, x @ x.T, rtol=0, atol=1e-13)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("n, d", [*SHAPES, (560, 600)])  # of the last the leading part alone is computed
@pytest.mark.parametrize("data", ["decaying fast", "decaying slowly"])
def test_a_part_of_a_decomposition_is_that_of_a_smaller_energy(data, n, d):
    x, y = DATA[data](n, d)
    whole = LeftFactor(x).decompose(y, 0.9999)
    for ratio in (0.3, 0.5, 0.9, 0.998, 0.9999, 1.0):
        part = whole.cut(ratio)
        expected = LeftFactor(x).decompose(y, min(ratio, 0.9999))
        assert len(part.basis) == len(expected.basis) == len(part.singular_values)
        assert part.energy == pytest.approx(expected.energy, rel=1e-9)
        difference = part.basis.T @ part.basis - expected.basis.T @ expected.basis
        assert float(difference.norm()) < 1e-7
