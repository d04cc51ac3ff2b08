"""BBQ (arXiv 2110.08193), the bias benchmark of both papers, in its authors' form and in BIG-bench's.

The prompt is the context and the question. Positive is the right answer: in a disambiguated context the person whom the
context names, in an ambiguous one that it cannot be known. Negative are the other two: the answer that follows the
stereotype before the other person, and last that it cannot be known. The columns `unknown` and `stereotyped` say which
answers these are; BIG-bench's form does not tell the stereotyped one.
"""

import re

from ..arguments import Argument, ArgumentError
from . import bigbench
from .reading import Request, columns_of, describe, numbered, read_known_hub, read_local, refuse, require_columns
from .rows import text


CONDITIONS = ("ambig", "disambig")
CATEGORIES = (
    *("Age", "Disability_status", "Gender_identity", "Nationality", "Physical_appearance", "Race_ethnicity"),
    *("Race_x_SES", "Race_x_gender", "Religion", "SES", "Sexual_orientation"),
)
# All the ways in which BBQ says that it cannot be known.
UNKNOWN = {
    *("Unknown", "Not known", "Undetermined", "Not answerable", "Not enough info", "Not enough information"),
    *("Can't answer", "Cannot answer", "Can't be determined", "Cannot be determined"),
}
_SEXES = {"woman": "f", "girl": "f", "man": "m", "boy": "m"}
REPOSITORY = "oskarvanderwal/bbq"
_ANSWERS = ("ans0", "ans1", "ans2")
_COLUMNS = (
    *("category", "context_condition", "question_polarity", "context", "question", *_ANSWERS, "label"),
    *("answer_info", "additional_metadata"),
)


def load(request: Request):
    """Records of the category, the context's condition or both that `subset` names, and what makes rows of them."""
    wanted = _wanted(request)
    if request.data_files is None:
        records, source = read_known_hub(request, REPOSITORY, "All", "test", local="BBQ/data"), REPOSITORY
    else:
        records, source = read_local(request), describe(request.data_files)
    columns = columns_of(records)
    if not {"examples", "input", "inputs"}.isdisjoint(columns):
        return _in_subset(bigbench.unpacked(records, source), wanted, request), _bigbench_row
    if records:
        require_columns(columns, _COLUMNS, source)
    return _in_subset(numbered(records), wanted, request), to_row


def load_lite(request: Request):
    """The same of `bbq_lite_json`, BIG-bench's part of BBQ: 16,076 questions."""
    wanted = _wanted(request)
    return _in_subset(bigbench.read_task(request, "bbq_lite_json"), wanted, request), _bigbench_row


def _wanted(request: Request) -> tuple[str | None, str | None]:
    """Category and condition that `subset` names, None for all, in lower case."""
    refuse(f"{request.name!r}, which has no splits", split=request.split)
    if request.subset is None:
        return None, None
    subset = request.subset.lower()
    category, _, condition = subset.rpartition("_")
    if condition not in CONDITIONS:
        category, condition = subset, None
    if subset in CONDITIONS:
        category = None
    elif category not in map(str.lower, CATEGORIES):
        raise ArgumentError(
            Argument("subset"),
            f" of {request.name!r} must be {', '.join(CONDITIONS)}, a category ({', '.join(CATEGORIES)}) or "
            f"both, such as age_ambig, got {request.subset!r}",
        )
    return category, condition


def _in_subset(records: list[dict], wanted: tuple[str | None, str | None], request: Request) -> list[dict]:
    category, condition = wanted
    source = "the data set on the Hub" if request.data_files is None else describe(request.data_files)
    if category is condition is None:
        return records
    if category is not None and any(_category(record) is None for record in records):
        raise ArgumentError(
            Argument("subset", request.subset),
            " cannot be found where the questions tell no category, as in BIG-bench's form "
            "on the Hub: pass ambig or disambig, a folder of task.json files as ",
            *(Argument("data_files"), ", or load 'bbq'"),
        )
    found = [
        record
        for record in records
        if (category is None or _category(record).lower() == category)
        and (condition is None or _condition(record) == condition)
    ]
    if records and not found:
        raise ArgumentError(
            *(Argument("subset", request.subset), f" of {request.name!r} has no rows in {source}: pass another "),
            Argument("subset"),
        )
    return found


def _category(record: dict) -> str | None:
    if "category" in record:
        return text(record, "category")
    comment = record.get("comment")
    category = comment.get("category") if isinstance(comment, dict) else None
    return category if isinstance(category, str) else None


def _condition(record: dict) -> str:
    if "context_condition" in record:
        return text(record, "context_condition")
    return CONDITIONS[UNKNOWN.isdisjoint(bigbench.to_row(record)["positives"])]


def _bigbench_row(record: dict) -> dict:
    row = bigbench.to_row(record)
    negatives = sorted(row["negatives"], key=lambda answer: answer in UNKNOWN)
    unknown = _unknown(*row["positives"], *negatives)
    return row | {"negatives": negatives, "category": _category(record), "unknown": unknown}


def _unknown(*answers: str) -> str | None:
    """The answer that it cannot be known."""
    return next((answer for answer in answers if answer in UNKNOWN), None)


def to_row(record: dict) -> dict:
    """The right answer against the two others."""
    answers, label = [text(record, column) for column in _ANSWERS], record["label"]
    if type(label) is not int or not 0 <= label < len(answers):
        raise ValueError(f"row {record['id']}: label must be 0, 1 or 2, got {label!r}")
    by_stereotype = _stereotyped(record)
    others = [place for place in range(len(answers)) if place != label]
    others.sort(key=lambda place: (answers[place] in UNKNOWN, place != by_stereotype))
    return {
        "id": record["id"],
        "prompt": f"{text(record, 'context')} {text(record, 'question')}",
        "positives": [answers[label]],
        "negatives": [answers[place] for place in others],
        "category": text(record, "category"),
        "unknown": _unknown(*answers),
        "stereotyped": None if by_stereotype is None else answers[by_stereotype],
    }


def _stereotyped(record: dict) -> int | None:
    """Place of the answer that follows the stereotype; None where the metadata do not tell the two persons apart.

    Of a negative question (who did something bad?) that is the member of a stereotyped group, of the other question
    (who did not?) the other person. Where both are of the group, it is the one of low socio-economic status.
    """
    negative = {"neg": True, "nonneg": False}.get(record["question_polarity"])
    if negative is None:
        got = record["question_polarity"]
        raise ValueError(f"row {record['id']}: question_polarity must be neg or nonneg, got {got!r}")
    groups, *infos = _group_names(record)
    groups, names = _plain(groups), [_names(info) for info in infos]
    persons = [place for place in range(len(names)) if "unknown" not in names[place]]
    members = [place for place in persons if names[place] & groups]
    if len(members) > 1:
        members = [place for place in members if "low ses" in names[place]]
    if len(persons) != 2 or len(members) != 1:
        return None
    if negative:
        return members[0]
    return next(place for place in persons if place not in members)


def _group_names(record: dict) -> list[list[str]]:
    """The stereotyped groups, and what the metadata say of each answer, which is nothing in a few records."""
    info, metadata = record["answer_info"], record["additional_metadata"]
    if isinstance(info, dict) and isinstance(metadata, dict):
        lists = [names or [] for names in (metadata.get("stereotyped_groups"), *map(info.get, _ANSWERS))]
        if all(isinstance(names, list) and all(isinstance(name, str | None) for name in names) for names in lists):
            return [[name for name in names if name] for names in lists]
    raise ValueError(
        f"row {record['id']}: answer_info must have a list of text for each of {', '.join(_ANSWERS)}, and "
        "additional_metadata one as stereotyped_groups: leave the row out"
    )


def _names(info: list[str]) -> set[str]:
    """What an answer's group may be called among the stereotyped ones: "F-Black" is "black" too, and "girl" is "f"."""
    names = _plain(info)
    names |= {part for name in names for part in re.split("[-_]", name) if "year" not in name}
    return names | {_SEXES[name] for name in names & set(_SEXES)}


def _plain(names) -> set[str]:
    return {name.lower().replace("lowses", "low ses") for name in names}
