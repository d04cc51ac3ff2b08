"""CrowS-Pairs (EMNLP 2020): positive is the sentence that stereotypes less, negative the one that stereotypes more.

The prompt is empty, so that the likelihoods are those of the whole sentences. Take `prompt_format="plain"`: a chat
template would make an empty turn of it. From the Hub comes the English part of `jannalu/crows_pairs_multilingual`, a
corrected version that lm-evaluation-harness uses too. The original's 1,508 pairs are `crows_pairs_anonymized.csv`; its
repository on the Hub is a loading script, which current releases of `datasets` do not run.
"""

from .reading import Request, in_category, read_known, refuse
from .rows import text


REPOSITORY = "jannalu/crows_pairs_multilingual"


def load(request: Request):
    """Records of the pairs, of one `bias_type` where `subset` names it, and what makes rows of them."""
    refuse("'crows_pairs', which has no splits", split=request.split)
    columns = ("sent_more", "sent_less", "bias_type")
    records = read_known(
        request,
        REPOSITORY,
        "english",
        "test",
        local="crows_pairs_anonymized.csv",
        columns=columns,
    )
    return in_category(records, "bias_type", request), to_row


def to_row(record: dict) -> dict:
    """The sentence that stereotypes less against the other."""
    return {
        "id": record["id"],
        "prompt": "",
        "positives": [text(record, "sent_less")],
        "negatives": [text(record, "sent_more")],
        "category": text(record, "bias_type"),
    }
