"""Intervals and tests against hand-computed cases and plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_edit.evaluation.statistics import Statistic, interval, mcnemar, mean, resamples, share


BOOLS = st.lists(st.booleans(), min_size=1, max_size=30)


def test_a_mean_and_its_resamples_are_those_of_a_plain_loop():
    values, draw = np.array([0.0, 1.0, 0.5, 0.25]), np.random.default_rng(7)
    counts = draw.multinomial(4, [0.25] * 4, size=50).astype(float)
    statistic = mean(values)
    assert statistic.value == pytest.approx(0.4375)
    plain = [np.repeat(values, row.astype(int)).mean() for row in counts]
    assert statistic.resampled(counts) == pytest.approx(plain)
    assert statistic.of(np.array([True, False, True, False])).value == pytest.approx(0.25)


def test_a_ratio_is_resampled_as_a_ratio():
    summands = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    statistic = Statistic(summands, lambda sums: share(sums[..., 0], sums[..., 1]))
    assert statistic.value == 0.5
    found = statistic.resampled(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]))
    assert found[0] == pytest.approx(2 / 3) and math.isnan(found[1])


def test_resamples_are_seeded_and_of_as_many_questions():
    counts = resamples(9, count=200, seed=3)
    assert counts.shape == (200, 9) and (counts.sum(axis=1) == 9).all()
    assert (counts == resamples(9, count=200, seed=3)).all() and (counts != resamples(9, count=200, seed=4)).any()


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).random(400) < 0.3
    statistic = mean(values)
    low, high = interval(statistic.resampled(resamples(400)))
    error = math.sqrt(statistic.value * (1 - statistic.value) / 400)
    assert low == pytest.approx(statistic.value - 1.96 * error, abs=0.01)
    assert high == pytest.approx(statistic.value + 1.96 * error, abs=0.01)


def test_an_interval_needs_values():
    assert interval(np.array([1.0, 1.0, 1.0])) == (1.0, 1.0)
    assert interval(np.array([1.0, np.nan, 1.0])) is None
    with pytest.raises(ValueError, match=r"^confidence must be between 0 and 1, got 95$"):
        interval(np.ones(3), 95)
    with pytest.raises(ValueError, match=r"^questions must be at least 1, got 0$"):
        resamples(0)


@pytest.mark.parametrize(
    ("gained", "lost", "expected"), [(0, 0, 1.0), (5, 0, 2 / 32), (1, 8, 2 * (1 + 9) / 512), (4, 4, 1.0), (0, 1, 1.0)]
)
def test_mcnemar_by_hand(gained, lost, expected):
    before = np.array([False] * gained + [True] * lost + [True, False])
    after = np.array([True] * gained + [False] * lost + [True, False])
    assert mcnemar(before, after) == pytest.approx(expected)


@given(BOOLS, st.randoms())
def test_mcnemar_is_a_probability_and_two_sided(before, random):
    after = [random.random() < 0.5 for _ in before]
    p_value = mcnemar(before, after)
    assert 0 < p_value <= 1 and p_value == mcnemar(after, before)
