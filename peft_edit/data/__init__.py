"""Data sets and preference data -> contrast sets.

A contrast set is a `datasets.Dataset` with one row per question and the columns `CONTRAST_FEATURES`, whatever it was
loaded from. A known data set is a module here with a function in `KNOWN`: that takes a `Request` and gives the records
that were asked for, each with its `id`, and the function that makes a row of one of them. Rows are made of the records
that are selected only, so that a broken one can be left out.
"""

from typing import TYPE_CHECKING

from ..importing import on_first_use


if TYPE_CHECKING:
    from .known import KNOWN
    from .load import check_contrast_set, load_contrast_set
    from .rows import CONTRAST_FEATURES
    from .texts import load_texts

__getattr__, __dir__, __all__ = on_first_use(__name__)
