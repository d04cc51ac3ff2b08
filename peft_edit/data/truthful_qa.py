"""TruthfulQA (arXiv 2109.07958): positive are the true answers, negative the false ones."""

import json
import logging
from importlib import resources

from ..arguments import Argument, ArgumentError
from .reading import Request, columns_of, describe, numbered, read_known_hub, read_local, require_columns
from .rows import select, text


logger = logging.getLogger(__name__)

REPOSITORY = "truthfulqa/truthful_qa"
SUBSETS = ("generation", "mc1", "mc2")
_CHOICE_COLUMNS = ("question", "mc1_targets", "mc2_targets")
_GENERATION_COLUMNS = ("category", "question", "best_answer", "correct_answers", "incorrect_answers")
_CSV_COLUMNS = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")


def load(request: Request):
    """Records of the questions that were asked for, and what makes rows of them."""
    if request.subset not in (*SUBSETS, None):
        raise ArgumentError(
            Argument("subset"), f" of 'truthful_qa' must be one of {', '.join(SUBSETS)} or None, got {request.subset!r}"
        )
    split_ids = None
    if request.split is not None:
        split_ids = _paper_splits().get(request.split)
        if split_ids is None:
            known = ", ".join(_paper_splits())
            raise ArgumentError(
                Argument("split"), f" of 'truthful_qa' must be one of {known} or None, got {request.split!r}"
            )
    records = _from_hub(request) if request.data_files is None else _from_file(request)
    columns = columns_of(records)
    records = select(numbered(records), split_ids, "'truthful_qa'")
    if "mc1_targets" in columns and request.subset != "generation":
        return records, lambda record: _multiple_choice_row(record, request.subset)
    if "Best Answer" in columns:
        return records, _csv_row
    answered = [record for record in records if record["best_answer"] is not None]
    if len(answered) < len(records):
        logger.warning("left out %d questions that have no answers in 'generation'", len(records) - len(answered))
    return answered, _generation_row


def _paper_splits() -> dict[str, list[int]]:
    return json.loads(resources.files("peft_edit").joinpath("data/truthfulqa_hpr_splits.json").read_bytes())


def _from_hub(request: Request) -> list[dict]:
    """The rows of `multiple_choice`, with what `generation`, in which they may be in another order, says of them."""
    configurations = ("multiple_choice", "generation")
    questions, generation = (
        read_known_hub(request, REPOSITORY, config, "validation", local="TruthfulQA.csv") for config in configurations
    )
    require_columns(columns_of(questions), _CHOICE_COLUMNS, f"{REPOSITORY} multiple_choice")
    require_columns(columns_of(generation), _GENERATION_COLUMNS, f"{REPOSITORY} generation")
    by_question = {record["question"]: record for record in generation}
    return [by_question.get(record["question"], {}) | record for record in questions]


def _not_in(path: str, request: Request, file: str) -> ArgumentError:
    return ArgumentError(
        *(Argument("subset", request.subset), f" is not in {path}: pass {file}, or leave "),
        *(Argument("data_files"), " out"),
    )


def _from_file(request: Request) -> list[dict]:
    """The rows of `TruthfulQA.csv`, of `mc_task.json`, or of the Hub's files of either configuration."""
    records, path = read_local(request), describe(request.data_files)
    columns = columns_of(records)
    if not records:
        return []
    if "mc1_targets" in columns:
        require_columns(columns, _CHOICE_COLUMNS, path)
        if request.subset == "generation":
            raise _not_in(path, request, "TruthfulQA.csv")
        return records
    if request.subset in ("mc1", "mc2"):
        raise _not_in(path, request, "mc_task.json")
    require_columns(columns, _GENERATION_COLUMNS if "best_answer" in columns else _CSV_COLUMNS, path)
    if request.split is not None:
        logger.warning(
            "split=%r of %s has the size of the HPR paper's split and not its questions: the paper's ids number "
            "the rows of the Hub's multiple_choice configuration, and this file is in another order",
            request.split,
            request.data_files,
        )
    return records


def _csv_row(record: dict) -> dict:
    return {
        "id": record["id"],
        "prompt": text(record, "Question"),
        "positives": [text(record, "Best Answer").strip(), *_split_answers(record, "Correct Answers")],
        "negatives": _split_answers(record, "Incorrect Answers"),
        "category": record["Category"],
    }


def _split_answers(record: dict, column: str) -> list[str]:
    return [answer.strip() for answer in text(record, column).split(";") if answer.strip()]


def _generation_row(record: dict) -> dict:
    for column in ("correct_answers", "incorrect_answers"):
        if not isinstance(record[column], list):
            raise ValueError(f"row {record['id']}: {column} must be a list, got {record[column]!r}")
    return {
        "id": record["id"],
        "prompt": text(record, "question"),
        "positives": [record["best_answer"], *record["correct_answers"]],
        "negatives": record["incorrect_answers"],
        "category": record["category"],
    }


def _multiple_choice_row(record: dict, subset: str | None) -> dict:
    """MC2's answers, the best first, and MC1's choices; of the subsets only what is theirs."""
    (false1, true1), (false2, true2) = (_by_label(record, column) for column in ("mc1_targets", "mc2_targets"))
    if len(true1) != 1:
        raise ValueError(f"row {record['id']}: mc1_targets must have one choice with label 1, got {len(true1)}")
    # a stable sort moves the best answer to the front and leaves the others in their order
    best_first = sorted(true2, key=lambda answer: answer != true1[0])
    return {
        "id": record["id"],
        "prompt": text(record, "question"),
        "positives": true1 if subset == "mc1" else best_first,
        "negatives": false1 if subset == "mc1" else false2,
        "mc1_choices": None if subset == "mc2" else true1 + false1,
        "category": record.get("category"),
    }


def _by_label(record: dict, column: str) -> tuple[list[str], list[str]]:
    """Choices with label 0 and with label 1; of the Hub's two lists, or of the file's {choice: label}."""
    targets = record[column]
    if not isinstance(targets, dict):
        raise ValueError(f"row {record['id']}: {column} must hold choices and labels, got {targets!r}")
    if set(targets) == {"choices", "labels"}:
        choices, labels = targets["choices"], targets["labels"]
    else:
        choices, labels = list(targets), list(targets.values())
    if not (isinstance(choices, list) and isinstance(labels, list)):
        raise ValueError(f"row {record['id']}: choices and labels of {column} must be lists, got {targets!r}")
    if len(choices) != len(labels):
        raise ValueError(f"row {record['id']}: {column} has {len(choices)} choices and {len(labels)} labels")
    return tuple([choice for choice, its in zip(choices, labels, strict=True) if its == label] for label in (0, 1))
