"""A fit that moves activations far says so."""

import math
import warnings

import pytest
from peft import get_peft_model
from test_mean_difference import planted, store_of
from tiny import vivid_model

from peft_edit import ActivationStore, MeanDifferenceConfig, SEAConfig, fit_mean_difference, fit_sea
from peft_edit.adapters.changes import LARGE, warn_of_change


def test_the_largest_change_is_in_the_warning():
    with pytest.warns(
        UserWarning,
        match=r"^the edit changes such rows by up to 30 %, at layer 7: measure .* strength make it milder$",
    ):
        warn_of_change({3: 0.2, 7: 0.3, 8: 0.01}, "such rows")
    with pytest.warns(UserWarning, match=r"by up to nan %, at layer 3"):
        warn_of_change({3: math.nan, 7: 0.3}, "such rows")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_change({3: LARGE}, "such rows")
        warn_of_change({}, "such rows")


def test_a_fit_of_sea_warns_of_its_neutral_demonstrations(tmp_path):
    positive, negative, neutral, _ = planted()
    store = ActivationStore.from_tensors(tmp_path, positive=positive, negative=negative, neutral=neutral, site="block")
    model = get_peft_model(vivid_model(), SEAConfig(site="block", projections="positive", rescale="none"))
    with pytest.warns(UserWarning, match=r"^the edit changes the neutral demonstrations by up to \d+ %") as warned:
        fit = fit_sea(model, store)
    largest = max(fit.layers, key=lambda site: site.change)
    assert f"by up to {100 * largest.change:.0f} %, at layer {largest.layer}" in str(warned[0].message)
    assert warned[0].filename == __file__


def test_the_change_of_a_mean_difference_is_its_length_over_that_of_activations(tmp_path):
    store, _ = store_of(tmp_path)
    model = get_peft_model(vivid_model(), MeanDifferenceConfig(strength=-0.5))
    with pytest.warns(UserWarning, match=r"^the edit changes activations by up to"):
        (site, *_) = fit_mean_difference(model, store).layers
    positive, negative, *_ = planted()
    rows = [row for rows in (positive[0], negative[0]) for row in rows]
    length = math.sqrt(sum(float(row.square().sum()) for row in rows) / len(rows))
    assert site.change == pytest.approx(0.5 * 3.0 / length, rel=0.02)
    model = get_peft_model(vivid_model(), MeanDifferenceConfig(strength=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_mean_difference(model, store)
