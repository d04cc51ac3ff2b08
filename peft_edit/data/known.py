"""The data sets that have names: the only table of them."""

from collections.abc import Callable
from dataclasses import dataclass

from . import bbq, bigbench, crows_pairs, halueval, toxigen, truthful_qa
from .reading import Request


@dataclass(frozen=True)
class Known:
    """A data set that has a name: where it is on the Hub, and what loads it."""

    repository: str
    load: Callable[[Request], tuple[list[dict], Callable[[dict], dict]]]


# Name of each known data set to its repository on the Hub and the function that loads it.
KNOWN = {
    "truthful_qa": Known(truthful_qa.REPOSITORY, truthful_qa.load),
    "halueval": Known(halueval.REPOSITORY, halueval.load),
    "bbq": Known(bbq.REPOSITORY, bbq.load),
    "bbq_lite": Known(bigbench.REPOSITORY, bbq.load_lite),
    "simple_ethical_questions": Known(bigbench.REPOSITORY, bigbench.load_simple_ethical_questions),
    "toxigen": Known(toxigen.REPOSITORY, toxigen.load),
    "crows_pairs": Known(crows_pairs.REPOSITORY, crows_pairs.load),
}
