"""Multiple choice in BIG-bench's form (arXiv 2206.04615), of its `task.json` files or of the Hub.

Simple ethical questions, on which HPR evaluates: positive is the choice with the score 1, which agrees with human
judgement, negative are the others.
"""

import re

from .reading import Request, columns_of, describe, numbered, read_known_hub, read_local, refuse, require_columns
from .rows import text


REPOSITORY = "hails/bigbench"
_HUB_COLUMNS = ("inputs", "multiple_choice_targets", "multiple_choice_scores")
# What BIG-bench writes around an input, its task's prefix included: "Q: ...\n  choice: ...\n  choice: ...\nA:".
_WRITTEN_OUT = re.compile(r"\s*(?:[\w-]+:\s*)?Q: (.*?)(?:\n\s*choice: .*)?\s*\nA:\s*", re.DOTALL)


def load_simple_ethical_questions(request: Request):
    """Records of the questions, and what makes rows of them."""
    refuse("'simple_ethical_questions', which has neither parts nor splits", subset=request.subset, split=request.split)
    return read_task(request, "simple_ethical_questions"), to_row


def read_task(request: Request, task: str) -> list[dict]:
    """Records with `input`, `target_scores` ({choice: score}) and `id`, of the Hub or of task.json files."""
    if request.data_files is None:
        records = read_known_hub(request, REPOSITORY, f"{task}_zero_shot", "default", local="task.json")
        return unpacked(records, REPOSITORY)
    return unpacked(read_local(request), describe(request.data_files))


def unpacked(records: list[dict], source: str) -> list[dict]:
    """The examples of task.json files, or the rows of the Hub, numbered."""
    examples = []
    for record in records:
        # a task of several parts has one more file, which describes them and has no examples
        found = record.get("examples", []) if "keywords" in record else [record]
        if not isinstance(found, list) or not all(isinstance(example, dict) for example in found):
            raise ValueError(f"{source}: the examples of a task must be a list of JSON objects, got {found!r:.60}")
        examples += found
    columns = columns_of(examples)
    if examples:
        require_columns(columns, _HUB_COLUMNS if "inputs" in columns else ("input", "target_scores"), source)
    return numbered(examples)


def to_row(record: dict) -> dict:
    """The choices with the score 1 against those with the score 0."""
    if "inputs" in record:
        record = _from_hub(record)
    scores = record["target_scores"]
    if not isinstance(scores, dict) or any(score not in (0, 1) for score in scores.values()):
        raise ValueError(f"row {record['id']}: target_scores must give each choice the score 0 or 1, got {scores!r}")
    return {
        "id": record["id"],
        "prompt": text(record, "input"),
        "positives": [choice for choice, score in scores.items() if score == 1],
        "negatives": [choice for choice, score in scores.items() if score == 0],
    }


def _from_hub(record: dict) -> dict:
    """A row of the Hub in the form of task.json."""
    plain = _WRITTEN_OUT.fullmatch(text(record, "inputs"))
    choices, scores = record["multiple_choice_targets"], record["multiple_choice_scores"]
    if not (isinstance(choices, list) and isinstance(scores, list) and len(choices) == len(scores)):
        raise ValueError(f"row {record['id']}: {' and '.join(_HUB_COLUMNS[1:])} must be lists of one length")
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"row {record['id']}: multiple_choice_targets must be text, got {choices!r}")
    question = plain[1] if plain else record["inputs"]
    return {"id": record["id"], "input": question, "target_scores": dict(zip(choices, scores, strict=True))}
