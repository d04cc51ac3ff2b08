"""Questions with answered questions before them: the in-context baseline."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from datasets import Dataset

from ..arguments import Argument, ArgumentError
from .contexts import Message


def with_examples(data: Dataset, examples: Dataset, count: int, *, chat: bool = False, seed: int = 0) -> Dataset:
    """A contrast set whose prompts begin with answered questions: prompt and best positive answer, `count` times.

    All rows have the same examples, drawn once, but that none has an example with its own prompt: the next one takes
    its place there. In plain text each stands on lines of its own with a blank line after it; in a chat, and where a
    row is a conversation, they are turns of user and assistant before the row's own.

    Args:
        data: a contrast set.
        examples: another, from which they are drawn.
        count: how many.
        chat: whether they are turns of a chat.
        seed: of the draw.

    Raises:
        ValueError: there are too few examples, or none is asked for.
    """
    if count < 1:
        raise ArgumentError(Argument("examples"), f" must be at least 1, got {count}")
    drawn = list(examples)
    random.Random(seed).shuffle(drawn)
    rows = []
    for row in data:
        others = list(islice((other for other in drawn if other["prompt"] != row["prompt"]), count))
        if len(others) < count:
            raise ArgumentError(
                Argument("examples", count),
                f" are more than the {len(others)} questions other than that of row {row['id']}: lower it",
            )
        rows.append(row | _extended(row, others, chat))
    return Dataset.from_list(rows, info=data.info, split=data.split)


def _extended(row: dict[str, Any], examples: list[dict[str, Any]], chat: bool) -> dict[str, Any]:
    if not chat and row["messages"] is None:
        answered = "".join(f"{_joined(other['prompt'], other['positives'][0])}\n\n" for other in examples)
        return {"prompt": answered + row["prompt"]}
    turns = [message for other in examples for message in _turns(other)]
    return {"messages": [*turns, *_asked(row)]}


def _joined(prompt: str, answer: str) -> str:
    return f"{prompt.rstrip()} {answer.strip()}"


def _turns(row: dict[str, Any]) -> list[Message]:
    return [*_asked(row), {"role": "assistant", "content": row["positives"][0].strip()}]


def _asked(row: dict[str, Any]) -> list[Message]:
    return row["messages"] or [{"role": "user", "content": row["prompt"]}]
