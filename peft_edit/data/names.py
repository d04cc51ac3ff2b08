"""Names of data sets for the public: in model cards, and of what an adapter was fitted on."""

import os
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from .known import KNOWN
from .reading import FILE_TYPES


def is_hub_id(name: str) -> bool:
    """Whether this can be an id on the Hub, and is no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def data_id(name: str | None, files: object = None) -> str | None:
    """The id on the Hub of a data set; None where it is none, where it is not known, and where local `files` were read
    in its place."""
    if name is None or files:
        return None
    if name in KNOWN:
        return KNOWN[name].repository
    return name if "/" in name and not name.endswith(FILE_TYPES) and is_hub_id(name) else None


def data_name(name: str) -> str:
    """Name of a data set for the public: of a local file without its folders."""
    # A name of any length, as a file may give it: Path raises for one that no file can have.
    return Path(name).name if os.path.exists(name) or name.endswith(FILE_TYPES) else name
