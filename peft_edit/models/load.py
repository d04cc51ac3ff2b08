"""Load a base model's class or structure, by its name on the Hub or its folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


def auto_class(name: str, revision: str | None = None):
    """The class of Transformers that loads a base model, and its configuration: of causal language models, else of
    vision-language models, whose text towers are edited.

    Raises:
        ValueError: the model is of another kind.
    """
    check_local(name, "config.json")
    config = AutoConfig.from_pretrained(name, revision=revision)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto, config
    raise ValueError(f"{name} is a {config.model_type} model, which is no language model: pass a causal language model")


def load_structure(name: str, revision: str | None = None) -> PreTrainedModel:
    """The base model on the meta device: its modules without their weights, for what trains or looks at an adapter."""
    auto, config = auto_class(name, revision)
    with torch.device("meta"):
        return auto.from_config(config)


def check_local(name: str, file: str) -> None:
    """Raise ValueError for what can only be a folder and lacks a file, before the Hub is asked for it."""
    path = Path(name)
    if path.is_dir() and not (path / file).exists():
        raise ValueError(f"the folder {name} has no {file}: pass the folder that was saved")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.endswith("/") or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}")
