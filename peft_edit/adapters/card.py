"""Adapter and results -> model card, the README.md of an adapter's folder and of its repository on the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import PeftConfig
from peft.utils import load_peft_weights

from ..arguments import Argument, ArgumentError
from ..data.names import data_id, is_hub_id
from ..evaluation.comparing import check_adapter, check_comparable
from ..evaluation.results import Results, read_results
from ..files import write_text
from ..models.fingerprint import adapter_record
from ..tuners.config import EditConfig
from ..tuners.method import method_of
from .card_results import eval_results_of, tables_of
from .exported import Exported, read_exported
from .markdown import cell, code, plain


logger = logging.getLogger(__name__)

README = "README.md"
# Stands in a card for a repository that is not known yet, see `for_repository`.
UNKNOWN_REPOSITORY = "your-name/your-adapter"
# The hash is of the rest of the card: whoever edits a card owns it.
MARKER = "<!-- Written by peft_edit, and written anew with the adapter until somebody edits it. {} -->"
MARKER_LINE = re.compile(re.escape(MARKER).replace(r"\{\}", r"([0-9a-f]{16})"))

# Results as they are given: JSON values, or a file of them.
GivenResults = Mapping[str, Any] | str | os.PathLike

# Metadata that PEFT and Transformers write.
STUB_METADATA = ("base_model", "library_name", "pipeline_tag", "tags")


def model_card(
    config: PeftConfig,
    *,
    base_model: str | None = None,
    results: Iterable[GivenResults] = (),
    folder: Path | None = None,
) -> ModelCard:
    """The model card of an adapter that edits, or of the LoRA adapter that one was exported to. What is not known is
    left out.

    Args:
        config: of the adapter; what its fit or training wrote there becomes the card.
        base_model: id of the base model on the Hub, where the configuration names a local folder.
        results: what `peft-edit evaluate --json` wrote, as files or dictionaries: of the base model (before), and with
            this adapter (after).
        folder: of the adapter, where it is saved: with its tensors results are compared, and what it was exported from
            stands there.

    Raises:
        ValueError: results of another kind, that do not match each other or the adapter, or a base model that can be no
            id on the Hub.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ArgumentError(Argument("base_model"), f" must be an id on the Hub such as user/model, got {base_model!r}")
    name = base_model or config.base_model_name_or_path
    base_id = name if name and is_hub_id(name) else None
    exported = None if folder is None else read_exported(folder, config)
    edit = config if exported is None else exported.config
    read = [read_results(result) for result in results]
    check_results(read, config, edit, folder)
    title = _title(edit, name, exported)
    text = _template(method_of(edit).folder, "card.md" if exported is None else "lora.md").render(
        title=title,
        method=edit.peft_type.value,
        base_id=base_id,
        base_text=_link(base_id, "") if base_id else code(Path(name).name) if name else "its base model",
        results=[
            (heading, tables)
            for heading, side in (("Results", False), ("Side effects", True))
            if (tables := tables_of(read, side))
        ],
        repository=UNKNOWN_REPOSITORY,
        export=exported and exported.record,
        **_of_config(edit),
    )
    # Blocks that are left out leave blank lines.
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return _card(_metadata(config, edit, base_id, title, eval_results_of(read)), text)


def check_results(read: list[Results], config: PeftConfig, edit: EditConfig, folder: Path | None) -> None:
    """Raise ValueError unless results match each other and the adapter."""
    if not read:
        return
    check_comparable(read)
    where = "this adapter" if folder is None else str(folder)
    known = adapter_record(config, {} if folder is None else load_peft_weights(str(folder), device="cpu"))
    if folder is None:
        del known["weights"]
    for result in read:
        check_adapter(result, known, where, edit.base_model_fingerprint)


def _metadata(
    config: PeftConfig, edit: EditConfig, base_id: str | None, title: str, measured: list[EvalResult]
) -> ModelCardData:
    datasets = {data_id(part.get("data"), part.get("files")): None for part in _parts(edit)}
    datasets = [dataset for dataset in datasets if dataset]
    tags = [edit.peft_type.value.lower(), "activation-editing", "representation-engineering", "peft-edit"]
    return ModelCardData(
        base_model=base_id,
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        tags=tags if config is edit else [config.peft_type.value.lower(), *tags],
        datasets=datasets or None,
        model_name=title if measured else None,
        eval_results=measured or None,
    )


def _of_config(config: EditConfig) -> dict[str, Any]:
    """What the templates take from a configuration."""
    method, parts = method_of(config), _parts(config)
    layers = method.card_layers(config)
    # What a method of such tokens counts: a configuration may have numbers of another method.
    counted = {"token_pairs" if tokens == "answer" else "demonstrations" for tokens in method.tokens}
    fitted_on = parts[0] if len(parts) == 1 and counted & set(parts[0]) else {}
    return {
        "config": config,
        "settings": [(name, json.dumps(getattr(config, name))) for name in method.card_settings(config)],
        "layers": layers,
        "fitted_on": fitted_on,
        "data_text": _data_text(parts[0]),
        "retain_text": _data_text(fitted_on.get("retain", {})),
        "collected": [
            (name, fitted_on[key])
            for name, key in (("tokens", "tokens"), ("neutral", "neutral"), ("prompt format", "prompt_format"))
            if key in fitted_on
        ],
        # Of a joint edit the adapters that it was made of.
        "combined": [(part, _data_text(part)) for part in parts] if len(parts) > 1 else [],
    }


def _parts(config: EditConfig) -> list[dict[str, Any]]:
    """What an adapter was fitted on; of one that joins several, what each of them was."""
    return config.fitted_on.get("combined") or [config.fitted_on]


def _data_text(fitted_on: Mapping[str, Any]) -> str | None:
    """What an adapter was fitted to, in a sentence."""
    name, files = fitted_on.get("data"), fitted_on.get("files")
    if not name:
        return None
    dataset = data_id(name, files)
    parts = [f"{key} {code(fitted_on[key])}" for key in ("subset", "split") if fitted_on.get(key)]
    parts += [f"a local copy, {', '.join(map(code, files))}"] if files else []
    return (_link(dataset, "datasets/") if dataset else code(name)) + (f" ({', '.join(parts)})" if parts else "")


def _card(metadata: ModelCardData, text: str) -> ModelCard:
    card = ModelCard.from_template(metadata, template_str="---\n{{ card_data }}\n---\n\n{{ text }}", text=text)
    return ModelCard(with_marker(str(card)))


def write_card(
    folder: str | os.PathLike,
    config: PeftConfig,
    *,
    base_model: str | None = None,
    results: Iterable[GivenResults] = (),
) -> bool:
    """Write the card of an adapter into its folder, unless somebody has written the README.md there, or edited it.

    Args:
        folder: of the adapter, one that edits or the LoRA adapter that such a one was exported to.
        config, base_model, results: see `model_card`.

    Returns:
        Whether the card was written.

    Raises:
        ValueError: as for `model_card`.
    """
    folder = Path(folder)
    if has_own_readme(folder):
        return False
    write_text(folder / README, str(model_card(config, base_model=base_model, results=results, folder=folder)))
    return True


def write_card_of_saved(folder: Path, config: PeftConfig) -> None:
    """Write the card of an adapter that is being saved. Whatever prevents that is logged, and the adapter is saved."""
    try:
        write_card(folder, config)
    except Exception as error:  # an adapter that took hours is worth more than its card
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("the adapter is saved without a model card (%s): mend that, then run peft-edit card", reason)


def has_own_readme(folder: Path) -> bool:
    """Whether somebody has written the README.md in a folder, or edited it. What cannot be read, as it is a folder or
    not for this user, is somebody's."""
    path = folder / README
    if not os.path.lexists(path):
        return False
    try:
        return not may_replace(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return True


def may_replace(text: str) -> bool:
    """Whether nobody has a hand in a README.md: it is a card of ours as we wrote it, or the template of the Hub's
    client as PEFT and Transformers fill it in."""
    return is_generated(text) or _is_stub(text)


def is_generated(text: str) -> bool:
    """Whether this is a card of ours that nobody has edited."""
    marker = MARKER_LINE.search(text)
    return marker is not None and marker[1] == _digest(text)


def for_repository(text: str, repo_id: str, subfolder: str = "") -> str:
    """A card of ours, now that its repository is known, and the folder in it."""
    place = f'"{repo_id}", subfolder="{subfolder}"' if subfolder else f'"{repo_id}"'
    return with_marker(text.replace(f'"{UNKNOWN_REPOSITORY}"', place))


def index_card(configs: Mapping[str, PeftConfig]) -> ModelCard:
    """The card of a repository whose adapters are in folders: folder to configuration."""
    cards = {folder: model_card(config) for folder, config in configs.items() if method_of(config) is not None}
    bases = {card.data.base_model for card in cards.values()} - {None}
    tags = sorted({tag for card in cards.values() for tag in card.data.tags})
    metadata = ModelCardData(base_model=sorted(bases) or None, library_name="peft", tags=tags or None)
    text = "# Adapters\n\n" + "\n".join(
        f"- [{folder}]({folder}/{README}): {_title(configs[folder])}" if folder in cards else f"- {folder}"
        for folder in configs
    )
    return _card(metadata, f"{text}\n")


def with_marker(text: str) -> str:
    """The card with the marker that fits it, in its place below the metadata."""
    marker = MARKER.format(_digest(text))
    if MARKER_LINE.search(text):
        return MARKER_LINE.sub(marker, text)
    _, metadata, body = text.split("---\n", 2)
    return f"---\n{metadata}---\n{marker}\n{body}"


def _digest(text: str) -> str:
    """Of the card without its marker; the ends of lines do not matter, as git may change them."""
    lines = [line.rstrip() for line in MARKER_LINE.sub("", text).splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()[:16]


def _is_stub(text: str) -> bool:
    """Whether a README.md has nothing but the template of the Hub's client and what PEFT and Transformers fill in."""
    known = _lines_of_the_hubs_template() | {"### Framework versions"}
    filled_in = re.compile(r"- PEFT [\w.]+|This is the model card of a .* transformers model that has been pushed .*")
    match = REGEX_YAML_BLOCK.search(text)
    metadata, body = (match[2], text[match.end() :]) if match else ("", text)
    if not set(re.findall(r"^([\w-]+):", metadata, flags=re.MULTILINE)) <= set(STUB_METADATA):
        return False
    lines = (line.strip() for line in body.splitlines())
    return all(line in known or filled_in.fullmatch(line) for line in lines)


@cache
def _lines_of_the_hubs_template() -> frozenset[str]:
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def _title(config: EditConfig, base_model: str | None = None, exported: Exported | None = None) -> str:
    name, short = base_model or config.base_model_name_or_path, method_of(config).short
    what = "adapter" if exported is None else "edit as a LoRA adapter"
    return f"{short[0].upper()}{short[1:]} {what}{f' for {plain(Path(name).name)}' if name else ''}"


@cache
def _template(folder: Path, name: str) -> jinja2.Template:
    """The template of a method's card, `card.md` in its folder, or `lora.md` of an export; both extend the one beside
    this file. Compiled once: that takes longer than all else in writing a card."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PrefixLoader({"method": jinja2.FileSystemLoader(folder)}),
                jinja2.FileSystemLoader(Path(__file__).parent),
            ]
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {"code": code, "cell": cell}
    return environment.get_template(f"method/{name}")


def _link(repo_id: str, prefix: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})"
