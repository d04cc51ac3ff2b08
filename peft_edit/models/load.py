"""Load a base model's class or structure, by its name on the Hub or its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


# What Transformers raises for a configuration that no model has: it checks some of the fields, and trips over others.
UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


def auto_class(name: str, revision: str | None = None):
    """The class of Transformers that loads a base model, and its configuration: of causal language models, else of
    vision-language models, whose text towers are edited.

    Raises:
        ValueError: the model is of another kind, or its config.json is damaged.
    """
    check_local(name, "config.json")
    with _reading_config(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto, config
    raise ValueError(f"{name} is a {config.model_type} model, which is no language model: pass a causal language model")


def load_structure(name: str, revision: str | None = None) -> PreTrainedModel:
    """The base model on the meta device: its modules without their weights, for what trains or looks at an adapter."""
    auto, config = auto_class(name, revision)
    with _reading_config(name), torch.device("meta"):
        return auto.from_config(config)


@contextmanager
def _reading_config(name: str) -> Iterator[None]:
    """Say in one line, as a ValueError, what Transformers cannot read in the configuration of a model."""
    try:
        yield
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"config.json of {name} is none of a model that Transformers knows ({reason:.300}): download or save it "
            "again"
        ) from error


def check_local(name: str, file: str) -> None:
    """Raise ValueError for what can only be a folder and lacks a file, before the Hub is asked for it."""
    path = Path(name)
    if path.is_dir() and not (path / file).exists():
        raise ValueError(f"the folder {name} has no {file}: pass the folder that was saved")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.endswith("/") or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}")
