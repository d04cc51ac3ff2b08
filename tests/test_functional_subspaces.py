"""What an edit changes, projections joined, and factors of dense projections."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_edit.tuners.sea.subspaces import CANCELLED, change, factor_projection, join, low_rank


GOLDEN = load_file(Path(__file__).parent / "fixtures" / "sea_fit.safetensors")
D = 40


def basis(rank, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64, generator=generator))[0].T.contiguous()


def assert_basis(rows):
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("k_positive", "k_negative"), [(3, 5), (5, 0), (0, 4), (0, 0), (30, 25), (D, D)])
def test_change_is_the_difference_of_the_projections(k_positive, k_negative):
    positive, negative = basis(k_positive), basis(k_negative, seed=1)
    rows, values = change(positive, negative)
    assert_basis(rows)
    torch.testing.assert_close(
        (rows.T * values) @ rows, positive.T @ positive - negative.T @ negative, rtol=0, atol=1e-12
    )
    assert len(rows) <= min(D, k_positive + k_negative)
    assert (values.abs() <= 1 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_directions_cancel(dtype):
    rows = basis(12).to(dtype)
    shared, amplified, removed = rows[:5], rows[5:8], rows[8:]
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0].to(dtype) @ shared
    found, values = change(torch.cat((shared, amplified)), torch.cat((removed, turned)))
    torch.testing.assert_close(values, torch.tensor([-1.0] * 4 + [1.0] * 3).double(), rtol=0, atol=CANCELLED)
    torch.testing.assert_close(found[4:].T @ found[4:], (amplified.T @ amplified).double(), rtol=0, atol=1e-6)
    assert change(shared, turned)[0].shape == (0, D)


def test_equal_spans_join_to_themselves_and_orthogonal_ones_to_their_sum():
    rows = basis(10)
    a, b = rows[:4], rows[4:]
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0] @ a
    for both, expected in ((join([a, turned, a]), a), (join([a, b]), rows), (join([rows, b]), rows)):
        assert_basis(both)
        torch.testing.assert_close(both.T @ both, expected.T @ expected, rtol=0, atol=1e-12)
    assert join([a, a[:0]]).shape == a.shape and join([a[:0], a[:0]]).shape == (0, D)


@pytest.mark.parametrize(("degrees", "rank"), [(0.01, 1), (30, 1), (59, 1), (61, 2), (89, 2)])
def test_directions_that_are_close_become_their_mean(degrees, rank):
    u, v = basis(2)
    angle = math.radians(degrees)
    both = join([u[None], (math.cos(angle) * u + math.sin(angle) * v)[None]])
    assert len(both) == rank
    mean = math.cos(angle / 2) * u + math.sin(angle / 2) * v
    assert abs(both[0] @ mean) == pytest.approx(1)


def test_joined_projection_is_the_nearest_to_the_sum():
    parts = [basis(5), basis(6, seed=1), basis(4, seed=2)]
    total = sum(part.T @ part for part in parts)
    both = join(parts)
    assert_basis(both)
    reversed_order = join(parts[::-1])
    torch.testing.assert_close(both.T @ both, reversed_order.T @ reversed_order, rtol=0, atol=1e-12)
    least = (both.T @ both - total).norm()
    assert least < min((other.T @ other - total).norm() for other in (*parts, both[:-1], basis(len(both), seed=3)))
    _, vectors = torch.linalg.eigh(total)
    for rank in range(D + 1):
        top = vectors[:, D - rank :]
        assert least <= (top @ top.T - total).norm() + 1e-12


@pytest.mark.parametrize("rank", [0, 1, 7, D - 1, D])
def test_factor_of_a_projection(rank):
    rows = basis(rank)
    found, deviation = factor_projection((rows.T @ rows).float())
    assert found.shape == (rank, D) and deviation < 1e-6
    assert_basis(found)
    torch.testing.assert_close(found.T @ found, rows.T @ rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tag", ["r0.998", "tanh_r0.998"])
def test_factors_of_published_projections(tag):
    for layer in range(3):
        for name, matrix in (("pos", GOLDEN[f"{tag}.uu_pos"]), ("neg", torch.eye(64) - GOLDEN[f"{tag}.uu_neg"])):
            rows, deviation = factor_projection(matrix[layer])
            assert deviation < 1e-6 and len(rows) == GOLDEN[f"{tag}.k_{name}"][layer]


@pytest.mark.parametrize(
    "matrix",
    [
        torch.randn(D, D, generator=torch.Generator().manual_seed(0)),
        torch.eye(D) / 2,
        torch.ones(D, D),
        torch.triu(torch.ones(D, D)),
        -torch.eye(D),
        2 * basis(3).T @ basis(3),
    ],
    ids=["random", "half", "ones", "oblique", "negative", "scaled"],
)
def test_deviation_of_what_is_no_projection(matrix):
    assert factor_projection(matrix)[1] > 0.05


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_low_rank_is_the_best_approximation(rank):
    left, right = basis(6).T @ torch.diag(torch.arange(6.0).double() - 2), torch.randn(6, 9, dtype=torch.float64)
    a, b, error = low_rank(left, right, rank)
    whole = left @ right
    tail = torch.linalg.svdvals(whole)[rank:].norm()
    assert a.shape == (D, rank) and b.shape == (rank, 9)
    assert abs(error - float(tail / whole.norm())) < 1e-12
    assert abs(float((a @ b - whole).norm() / whole.norm()) - error) < 1e-12
