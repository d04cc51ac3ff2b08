"""Load a base model, its structure alone, or its tokenizer, by its name on the Hub, its folder or its GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..arguments import Argument, ArgumentError, one_line
from .kind import REMEDY, why_not_causal


@dataclass(frozen=True)
class BaseModel:
    """Where a base model comes from.

    Attributes:
        name: id on the Hub, or folder.
        revision: of the repository on the Hub; None for main.
        trust_remote_code: run the model's own code, where it has some, as Transformers does it.
        gguf_file: name of the GGUF file that holds the weights, which Transformers de-quantises; None for others.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None

    def check_local(self) -> None:
        """Raise ValueError for a folder without the model, and for what can only be a folder and is none."""
        if self.gguf_file is None and self.name.lower().endswith(".gguf") and Path(self.name).is_file():
            path = Path(self.name)
            raise ArgumentError(
                f"{path} is a GGUF file: pass its folder, {path.parent}, and ", Argument("gguf_file", path.name)
            )
        check_local(self.name, self.gguf_file or "config.json")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of Transformers' `from_pretrained`. Code that is not trusted is refused, never asked about."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code, **gguf}


def load_model(base: BaseModel, **options: Any) -> PreTrainedModel:
    """A base model with its weights, in evaluation mode. Those of a GGUF file are plain weights afterwards.

    Args:
        base: where it comes from.
        options: of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, lacks tensors, or is no causal language model.
    """
    auto, _ = auto_class(base)
    gguf_config = getattr(transformers, "GgufConfig", None)  # newer releases can also keep the weights packed
    if base.gguf_file is not None and gguf_config is not None:
        options["quantization_config"] = gguf_config(dequantize=True)
    with _plain_errors(base):
        model, found = auto.from_pretrained(base.name, **base.options, **options, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing and not getattr(model, "is_quantized", False):  # whose own tensors have other names
        raise ValueError(
            f"{base.name} has {len(missing)} tensors too few, the first is {missing[0]}, which would be random: "
            f"{REMEDY}"
        )
    if base.gguf_file is not None:
        _forget_quantization(model)
    return model.eval()


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; raises ValueError where it cannot be loaded."""
    with _plain_errors(base, "the tokenizer of "):
        return AutoTokenizer.from_pretrained(base.name, **base.options)


def auto_class(base: BaseModel) -> tuple[type, PretrainedConfig]:
    """The class of Transformers that loads a base model, and its configuration: of causal language models, else of
    vision-language models, whose text towers are edited.

    Raises:
        ValueError: the model is of another kind, or its configuration cannot be loaded.
    """
    base.check_local()
    with _plain_errors(base):
        config = AutoConfig.from_pretrained(base.name, **base.options)
    if (reason := why_not_causal(config)) is not None:
        raise ValueError(f"{base.name} is a {config.model_type} model, {reason}: {REMEDY}")
    own = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in own:
            return auto, config
    raise ValueError(f"{base.name} is a {config.model_type} model, which is no language model: {REMEDY}")


def load_structure(base: BaseModel | str) -> PreTrainedModel:
    """The base model on the meta device: its modules without their weights, for what trains or looks at an adapter.

    Of a GGUF file the weights are loaded too, as nothing else tells such a model from others.
    """
    base = BaseModel(base) if isinstance(base, str) else base
    if base.gguf_file is not None:
        return load_model(base)
    auto, config = auto_class(base)
    with torch.device("meta"), _plain_errors(base):
        return auto.from_config(config, trust_remote_code=base.trust_remote_code)


def check_vocabulary_of_base(model: PreTrainedModel, doing: str) -> None:
    """Raise ValueError where the embeddings of a model were resized since it was loaded, so that what is made of an
    adapter alone, and loads on the model's files, lacks them. Looks at files on this machine only.

    Args:
        model: without a `PeftModel` around it.
        doing: what leaves the embeddings out, "an export as LoRA".
    """
    name, now = model.config._name_or_path, model.config.get_text_config().vocab_size
    try:
        saved = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # a model that has no files here, or code of its own
        return
    before = getattr(saved.get_text_config(), "vocab_size", now)
    if before != now:
        raise ValueError(
            f"the model's embeddings were resized from {before} to {now} ids, and {doing} leaves them out: save the "
            "base model with them first (unload().save_pretrained(folder)), and load the adapter on it"
        )


def check_local(name: str, file: str) -> None:
    """Raise ValueError for what can only be a folder and lacks a file, before the Hub is asked for it."""
    path = Path(name)
    if path.is_dir() and not (path / file).exists():
        gguf = sorted(found.name for found in path.glob("*.gguf"))
        if gguf and (file == "config.json" or file.endswith(".gguf")):
            raise ArgumentError(
                f"the folder {name} has no {file}, but {', '.join(gguf)}: pass ", Argument("gguf_file", gguf[0])
            )
        raise ValueError(f"the folder {name} has no {file}: pass the folder that was saved")
    if path.is_file():
        raise ValueError(f"{name} is a file: pass the folder that was saved")
    outside = path.is_absolute() or name.startswith((".", "~"))
    if not path.exists() and (outside or name.endswith("/") or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}")


def _forget_quantization(model: PreTrainedModel) -> None:
    """Let Transformers and PEFT take a de-quantised model for what it is: saved, merged and trained like others."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None


@contextmanager
def _plain_errors(base: BaseModel, what: str = "") -> Iterator[None]:
    """Say in one line what Transformers says in several, or in the words of other libraries."""
    try:
        yield
    except (ArgumentError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ValueError(f"the weights of {base.name} are damaged ({error}): download or save them again") from error
    # a model's own code and its files may raise anything
    except Exception as error:
        if base.gguf_file is not None and isinstance(error, ImportError) and "gguf" in str(error):
            raise ArgumentError(
                *(Argument("gguf_file"), " needs the package gguf, which is not installed: "),
                "pip install 'peft-edit[gguf]'",
            ) from error
        if not base.trust_remote_code and "trust_remote_code" in str(error):
            raise ArgumentError(
                f"{what}{base.name} has code of its own, which loading it would run: read it, and where you trust it "
                "pass ",
                Argument("trust_remote_code", True),
            ) from error
        kind = type(error) if type(error) in (FileNotFoundError, PermissionError) else ValueError
        raise kind(f"{what}{base.name} cannot be loaded: {_reason(error)}{_remedy(base, error)}") from error


def _reason(error: Exception) -> str:
    """What an error says in its first line, all of it where that is a headline; advice comes after it."""
    first = str(error).strip().split("\n", 1)[0].strip()
    text = one_line(error) if first.endswith(":") else first
    told = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    return (text if told else f"{type(error).__name__}: {text}").rstrip(".")


def _remedy(base: BaseModel, error: Exception) -> str:
    if isinstance(error, ImportError):
        return ""  # it says what to install
    if Path(base.name).exists():
        return ": save or download it again, or pass another"
    return ": check the name, the connection and, for private models, the token (hf auth login)"
