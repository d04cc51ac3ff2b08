"""What an edit changes, spans joined, and factors of dense projections."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_edit.functional.subspaces import CANCELLED, SAME_DIRECTION, change, factor_projection, join, low_rank


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


def test_joined_spans_contain_each_and_nothing_else():
    a, b = basis(4), basis(6, seed=1)
    for both in (join([a, b]), join([b, a])):
        assert_basis(both)
        assert len(both) == 10
        for rows in (a, b):
            torch.testing.assert_close(rows @ both.T @ both, rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(join([a, a]).T @ join([a, a]), a.T @ a, rtol=0, atol=1e-12)
    assert join([a, a[:0]]).shape == a.shape and join([a[:0], a[:0]]).shape == (0, D)


@pytest.mark.parametrize(("sine", "rank"), [(0.9 * SAME_DIRECTION, 1), (1.1 * SAME_DIRECTION, 2)])
def test_nearly_equal_directions_count_once(sine, rank):
    u, v = basis(2)
    assert len(join([u[None], ((1 - sine**2) ** 0.5 * u + sine * v)[None]])) == rank


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
