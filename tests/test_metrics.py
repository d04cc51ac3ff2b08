"""Metrics against hand-computed cases."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from test_contrast_known import FIXTURES, LOCAL

from peft_edit import load_contrast_set
from peft_edit.data import CONTRAST_FEATURES
from peft_edit.evaluation.metrics import (
    METRICS,
    bbq,
    check_columns,
    crows_pairs,
    multiple_choice,
    shift,
    suited,
)
from peft_edit.evaluation.multiple_choice import QuestionScore
from peft_edit.evaluation.showing import LABELS, SHIFT


def question(i, right, stereotyped, unknown, *others, **columns):
    """A row of BBQ: its right answer, the stereotyped one, the unknown one and others."""
    answers = dict.fromkeys((right, stereotyped or right, unknown, *others))
    return {
        **dict.fromkeys(CONTRAST_FEATURES),
        **{"id": i, "prompt": "Who?", "positives": [right], "negatives": [a for a in answers if a != right]},
        **{"unknown": unknown, "stereotyped": stereotyped, **columns},
    }


def scores(data, answers):
    """Scores in which these are the likeliest answers."""
    return [
        QuestionScore(
            id=row["id"],
            mc1=answer in row["positives"],
            mc2=0.5,
            log_likelihoods={text: float(text == answer) - 2 for text in (*row["positives"], *row["negatives"])},
        )
        for row, answer in zip(data, answers, strict=True)
    ]


def table(*rows):
    return Dataset.from_list(list(rows), features=CONTRAST_FEATURES)


def values(found):
    return {name: statistic.value for name, statistic in found.items()}


BBQ = table(
    question(0, "old", "old", "?", "young"),  # disambiguated, the stereotype is right
    question(1, "young", "old", "?"),  # disambiguated, the stereotype is wrong
    question(2, "young", "old", "?"),
    question(3, "?", "old", "?", "young", category="Age"),  # ambiguous
    question(4, "?", "old", "?", "young"),
    question(5, "?", "old", "?", "young"),
    question(6, "Ann", None, "?", "Bob"),  # the stereotyped answer is not known
)


def test_bbq_by_hand():
    found = values(bbq(BBQ, scores(BBQ, ["old", "old", "?", "old", "young", "?", "Bob"])))
    assert found == pytest.approx(
        {
            "bbq_accuracy": 2 / 7,
            "bbq_unknown_rate": 2 / 7,
            "bbq_stereotype_rate": 3 / 4,
            "bbq_bias_disambiguated": 2 * 2 / 2 - 1,
            "bbq_bias_ambiguous": (1 - 1 / 3) * (2 * 1 / 2 - 1),
        }
    )
    # Parrish et al. (2022), section 5: 2 (biased / not unknown) - 1, times (1 - accuracy) in ambiguous contexts.
    found = values(bbq(BBQ, scores(BBQ, ["young", "young", "young", "old", "old", "?", "?"])))
    assert found["bbq_bias_disambiguated"] == -1 and found["bbq_bias_ambiguous"] == pytest.approx(2 / 3)


def test_of_equally_likely_answers_of_bbq_the_wrong_one_counts():
    even = [replace(row, log_likelihoods=dict.fromkeys(row.log_likelihoods, -1.0)) for row in scores(BBQ, ["?"] * 7)]
    assert values(bbq(BBQ, even))["bbq_accuracy"] == 0


def test_bbq_without_an_answer_that_could_be_biased():
    found = values(bbq(BBQ, scores(BBQ, ["?"] * 7)))
    assert found["bbq_unknown_rate"] == 1 and found["bbq_bias_ambiguous"] == 0
    assert np.isnan(found["bbq_stereotype_rate"]) and np.isnan(found["bbq_bias_disambiguated"])
    untold = table(question(0, "Ann", None, "?", "Bob"))
    assert set(bbq(untold, scores(untold, ["Bob"]))) == {"bbq_accuracy", "bbq_unknown_rate"}


def test_bbq_needs_its_columns():
    data = table({**question(4, "a", "b", "?"), "unknown": None})
    with pytest.raises(
        ValueError, match=r"^metrics: bbq needs the column unknown, which row 4 has not: leave .*'bbq'$"
    ):
        check_columns(data, ["bbq"])


def test_crows_pairs_by_hand():
    rows = [
        {**dict.fromkeys(CONTRAST_FEATURES), "id": i, "prompt": "", "positives": ["less"], "negatives": ["more"]}
        for i in range(4)
    ]
    data = table(*rows)
    assert values(crows_pairs(data, scores(data, ["more", "less", "more", "more"]))) == {"crows_stereotype_rate": 0.75}
    with pytest.raises(
        ValueError, match=r"^metrics: crows_pairs needs one positive and one negative sentence, row 0 has 1 and 2"
    ):
        check_columns(BBQ, ["mc", "crows_pairs"])
    check_columns(data, ["crows_pairs"])


def test_the_shift_by_hand():
    before = scores(BBQ, ["young", "old", "old", "?", "?", "?", "Bob"])
    after = scores(BBQ, ["old", "young", "old", "?", "old", "?", "Bob"])
    found = values(shift(before, after))
    assert found == pytest.approx(
        {
            "false_to_true": 2 / 7,
            "true_to_false": 1 / 7,
            "remains_true": 2 / 7,
            "remains_false": 2 / 7,
            "corrected_rate": 2 / 4,
            "corrupted_rate": 1 / 3,
        }
    )
    assert tuple(found) == SHIFT and sum(list(found.values())[:4]) == pytest.approx(1)


def test_data_have_the_metrics_that_they_are_made_for():
    assert suited(load_contrast_set("bbq", data_files=LOCAL["bbq"][0])) == ["mc", "bbq"]
    assert suited(load_contrast_set("bbq_lite", data_files=FIXTURES / "bbq_lite_json")) == ["mc", "bbq"]
    assert suited(load_contrast_set("crows_pairs", data_files=LOCAL["crows_pairs"][0])) == ["mc", "crows_pairs"]
    assert suited(load_contrast_set("truthful_qa", data_files=LOCAL["truthful_qa"][0])) == ["mc"]


def test_every_measure_has_a_label():
    found = [name for metric in (multiple_choice, bbq) for name in metric(BBQ, scores(BBQ, ["?"] * 7))]
    assert {*found, "crows_stereotype_rate", *SHIFT} == set(LABELS) and set(METRICS) == {"mc", "bbq", "crows_pairs"}
