"""Questions that an edit answers otherwise than its base model, and what it does to the tokens of the new answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data.prompts import encode_answers, listed_choices
from ..data.source import rows_digest
from ..evaluation.results import Results
from ..explaining import Explanation, explain_edit
from ..tuners.strength import edit_strength


# Whether the base model's answer is right, and the edit's.
DIRECTIONS = {"false to true": (False, True), "true to false": (True, False)}


@dataclass(frozen=True)
class Answer:
    """An answer that can be chosen: whether it is the right one, its log-likelihoods in nats, and who chooses it."""

    text: str
    right: bool
    base: float
    edited: float
    chosen_by: str


@dataclass(frozen=True)
class Flipped:
    """A question whose answer changes.

    Attributes:
        id: of the row.
        direction: a key of `DIRECTIONS`.
        prompt: the question.
        answers: the right one, and those that either model chooses.
        explanation: of the answer that the edited model chooses, from the last token of the prompt on.
    """

    id: int
    direction: str
    prompt: str
    answers: Sequence[Answer]
    explanation: Explanation


def flipped_ids(results: Results, most: int) -> dict[str, list[int]]:
    """Direction to the ids of its questions, at most so many, those whose MC2 changes most first.

    Args:
        results: with the base model's questions.
        most: of each direction.
    """
    pairs = list(zip(results.base_questions, results.questions, strict=True))
    found = {}
    for direction, (before, after) in DIRECTIONS.items():
        changed = [(b, q) for b, q in pairs if (b["mc1"], q["mc1"]) == (before, after)]
        changed.sort(key=lambda pair: -abs(pair[1]["mc2"] - pair[0]["mc2"]))
        found[direction] = [question["id"] for _, question in changed[:most]]
    return found


def best_of(results: Sequence[Results], digest: str) -> Results:
    """Results that can tell which questions flipped: of an edit, with the base model's questions. Where there are such,
    those of rows with a digest, and at the edit's own strength."""
    able = [found for found in results if found.adapters and found.base_questions]
    if not able:
        raise ArgumentError(
            "the questions that flipped are not in these results, which are of a base model alone or of an edit alone: "
            "run peft-edit evaluate with --adapter and without --no-base, or leave ",
            *(Argument("data"), " out"),
        )
    return min(able, key=lambda found: (found.data["digest"] != digest, found.strength != 1))


def flipped_questions(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, results: Results, most: int = 3
) -> list[Flipped]:
    """Questions that flipped, with what the edit does to the tokens of the new answer.

    Args:
        model: with the adapter that the results are of.
        tokenizer: of the model.
        data: the contrast set that the results are of, of the same rows.
        results: see `best_of`.
        most: questions of each direction.

    Raises:
        ArgumentError: the data are other rows.
    """
    if rows_digest(data) != results.data["digest"]:
        raise ArgumentError(
            Argument("data"),
            f" has other rows than {results.where}: pass the data set that these results are of, with the same subset, "
            "split, limit, skip and shuffle, and without examples in the prompt",
        )
    ids = flipped_ids(results, most)
    wanted = [(direction, row_id) for direction, of_direction in ids.items() for row_id in of_direction]
    found = []
    with (
        nullcontext() if results.strength == 1 else edit_strength(model, results.strength),
        tqdm(wanted, desc="explaining", unit="question", leave=None) as progress,
    ):
        for direction, row_id in progress:
            found.append(_flipped(model, tokenizer, data, results, direction, row_id))
    return found


def _flipped(model, tokenizer, data: Dataset, results: Results, direction: str, row_id: int) -> Flipped:
    place = results.ids.index(row_id)
    row = data[place]
    base, edited = (found[place]["log_likelihoods"] for found in (results.base_questions, results.questions))
    right, *others = row["mc1_choices"] or (row["positives"][0], *row["negatives"])
    choices = [*others, right]  # of equally likely ones the wrong one counts
    by_base, by_edit = (max(choices, key=scores.get) for scores in (base, edited))
    answers = [
        Answer(text, text == right, base[text], edited[text], _choosers(text == by_base, text == by_edit))
        for text in dict.fromkeys((right, by_base, by_edit))
    ]
    prompts = results.prompts
    ((encoded,),) = encode_answers(
        tokenizer,
        [row["prompt"]],
        [[by_edit]],
        messages=[row["messages"]],
        prompt_format=prompts["format"],
        template_arguments=prompts.get("template_arguments"),
        template_time=prompts.get("template_time"),
        row_ids=[row_id],
        choices=listed_choices(data.select([place])),
    )
    explanation = explain_edit(model, tokenizer, encoded.input_ids).since(encoded.prompt_length - 1)
    return Flipped(row_id, direction, row["prompt"], answers, explanation)


def _choosers(base: bool, edited: bool) -> str:
    return " and ".join(name for name, chooses in (("base model", base), ("edited model", edited)) if chooses)


def as_rows(flipped: Flipped) -> list[dict[str, Any]]:
    """The answers as a table shows them."""
    return [
        {
            "answer": answer.text,
            "right": "yes" if answer.right else "no",
            "base": f"{answer.base:.2f}",
            "edited": f"{answer.edited:.2f}",
            "chosen": answer.chosen_by,
        }
        for answer in flipped.answers
    ]
