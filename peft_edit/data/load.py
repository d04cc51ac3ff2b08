"""A data set by its name, or preference data -> a contrast set."""

import logging
import os
from collections.abc import Iterable, Sequence

from datasets import Dataset, NamedSplit
from tqdm.auto import tqdm

from . import preferences
from .known import KNOWN
from .reading import Request, describe, unformatted
from .rows import CONTRAST_FEATURES, checked, drop_shared_answers, select
from .source import file_names, source_info


logger = logging.getLogger(__name__)


def load_contrast_set(
    name: str | os.PathLike | Dataset,
    *,
    subset: str | None = None,
    data_files: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    split: str | None = None,
    ids: Iterable[int] | None = None,
    revision: str | None = None,
) -> Dataset:
    """Loads questions with their positive and negative answers.

    The module of a known data set in `peft_edit.data` says what is positive and what is negative in it.

    Preference data have the columns `prompt`, `chosen`, `rejected`: text, or conversations in TRL's format. `prompt`
    may be missing where `chosen` and `rejected` begin with the same messages, or are dialogues in one text, as in
    Anthropic/hh-rlhf. Of a conversation, `messages` keeps the prompt's turns and `prompt` their contents, joined by new
    lines. Files and data sets that already have `prompt`, `positives`, `negatives` are taken as contrast sets; their
    other columns are optional.

    Args:
        name: a known data set, `"truthful_qa"`, `"halueval"`, `"bbq"`, `"bbq_lite"`, `"simple_ethical_questions"`,
            `"toxigen"` or `"crows_pairs"`; or preference data or a contrast set as a .json, .jsonl, .csv or .parquet
            file, as the id of a data set on the Hub ("user/name"), or as a `Dataset`.
        subset: a part of a known data set. Of `"truthful_qa"` one of its forms: `"generation"` (best, correct and
            incorrect answers), `"mc1"` (one correct choice and the false ones) or `"mc2"` (all true and false choices);
            None takes the answers of mc2 and, as `mc1_choices`, those of mc1. Of `"bbq"` and `"bbq_lite"`: `"ambig"`,
            `"disambig"`, a category, or both ("age_ambig"). Of `"crows_pairs"` a `bias_type`, of `"toxigen"` a
            `target_group`. For other data sets on the Hub, their configuration.
        data_files: local copy of a known data set: a file, several, or a folder, in the authors' layout or the Hub's;
            for a data set on the Hub, files in it.
        split: for `"truthful_qa"`, the questions of the HPR paper: `"train"` (367), `"eval"` (41) or `"test"` (409),
            in the paper's order. These ids number the rows of the Hub's `multiple_choice` configuration; on the CSV,
            which is in another order, they give splits of the same sizes with other questions. For `"toxigen"`,
            `"train"` or `"test"`. For a data set on the Hub, its split; needed where it has several. None takes all
            rows.
        ids: keep the rows with these ids, in this order; with `split` or `subset`, they must be in it.
        revision: branch, tag or commit of the data set on the Hub.

    Returns:
        A data set with the columns `CONTRAST_FEATURES`. `id` is the row in the source; a contrast set's own `id` is
        kept where there is one. Within a row, answers that are repeated are kept once, and those that stand in both
        lists are dropped from both, with a count in the log; so are rows of a known data set that have no answers left.

    Raises:
        ValueError: the name, split, subset, revision or an option has no meaning, columns are missing, ids are unknown
            or repeated, or a row (which is named by its id) holds something else than text, an empty answer, or no
            answer on one side.
        FileNotFoundError: there is no such file or data set.
        ConnectionError: a known data set is to come from the Hub, which cannot be reached.
    """
    request, known = Request(name, subset, data_files, split, revision), isinstance(name, str) and name in KNOWN
    if known:
        records, to_row = KNOWN[name].load(request)
    else:
        records, to_row = preferences.load(request, list(KNOWN)), preferences.to_row
    parts = [f"{option} {value!r}" for option, value in (("split", split), ("subset", subset)) if value is not None]
    found = len(records)
    records = select(records, ids, " and ".join(parts) or "the rows")
    progress = tqdm(records, desc=f"reading {describe(name)}", unit="row", leave=None, delay=2)
    rows = drop_shared_answers([checked(to_row(record), describe(name)) for record in progress], known)
    if not rows:
        raise ValueError(f"no rows to load from {describe(name)}: it is empty, or ids is")
    # Stores and model cards say what the demonstrations were.
    source = None if isinstance(name, Dataset) else os.fspath(name)
    source = os.path.basename(source) if source and os.path.isfile(source) else source
    info = source_info(source, subset, file_names(data_files), split, len(rows) if ids is None else found)
    return Dataset.from_list(rows, info=info, split=None if split is None else NamedSplit(split))


def check_contrast_set(data: Dataset) -> Dataset:
    """A contrast set as it is collected and evaluated: in Python's own types, whatever its format is, each row with an
    id of its own. Where ids repeat, as after `concatenate_datasets`, the rows are numbered anew, with a warning.

    Raises:
        ValueError: it lacks rows or columns of a contrast set, or has a transform.
    """
    missing = [name for name in CONTRAST_FEATURES if name not in (getattr(data, "column_names", None) or ())]
    if missing or not isinstance(data, Dataset):
        lacks = f"the columns {', '.join(missing)}" if missing else f"its rows at hand, got a {type(data).__name__}"
        raise ValueError(f"a contrast set needs {lacks} too: load it with load_contrast_set(data)")
    if len(data) == 0:
        raise ValueError("the contrast set is empty: nothing to do")
    data = unformatted(data)
    repeated = len(data) - len(set(data["id"]))
    if not repeated:
        return data
    logger.warning(
        "%d of the %d rows have the id of another row, as after concatenate_datasets: they count as questions of their "
        "own, and the rows are numbered anew",
        repeated,
        len(data),
    )
    return data.remove_columns("id").add_column("id", list(range(len(data))), feature=CONTRAST_FEATURES["id"])
