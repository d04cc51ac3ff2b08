"""HaluEval QA (arXiv 2305.11747), on which SEA's edit for truthfulness is fitted.

The prompt is the question alone. Positive is the right answer, negative the hallucinated one. The passage `knowledge`
is left out: an edit for truthfulness is of a model that answers from memory.
"""

from .reading import Request, read_known, refuse
from .rows import text


REPOSITORY = "pminervini/HaluEval"


def load(request: Request):
    """Records of the questions, and what makes rows of them."""
    refuse("'halueval', which has neither parts nor splits", subset=request.subset, split=request.split)
    columns = ("question", "right_answer", "hallucinated_answer")
    return read_known(request, REPOSITORY, "qa", "data", local="qa_data.json", columns=columns), to_row


def to_row(record: dict) -> dict:
    """The right answer against the hallucinated one."""
    return {
        "id": record["id"],
        "prompt": text(record, "question"),
        "positives": [text(record, "right_answer")],
        "negatives": [text(record, "hallucinated_answer")],
    }
