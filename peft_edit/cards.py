"""Adapter and results -> model card, the README.md of an adapter's folder and of its repository on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig

from .sites import layer_index


README = "README.md"
# Stands in a card for a repository that is not known yet, see `for_repository`.
UNKNOWN_REPOSITORY = "your-name/your-adapter"
# The hash is of the rest of the card: whoever edits a card owns it.
MARKER = "<!-- Written by peft_edit, and written anew with the adapter until somebody edits it. {} -->"
MARKER_LINE = re.compile(re.escape(MARKER).replace(r"\{\}", r"([0-9a-f]{16})"))

# Names that `load_contrast_set` knows -> data sets on the Hub.
DATASETS = {"truthful_qa": "truthfulqa/truthful_qa"}
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")
# Fields of the configurations that say how an adapter edits; and those that say how SEA was fitted, which are no more
# than defaults in an adapter that was not fitted here.
SETTINGS = {
    "SEA": ("site", "feature_map", "feature_space", "input_scale", "rescale", "projections", "strength"),
    "HPR": ("rotation", "alpha", "gate", "token_scope", "num_angle_layers", "angle_hidden_size"),
}
FIT_SETTINGS = ("positive_energy", "negative_energy", "centered")
# Statistics of a site that are shown where all sites have them.
SITE_STATISTICS = ("mean_rescale", "relative_error")
# Measure -> its name in tables, the factor there and the decimals. Others are shown by their own names.
MEASURES = {"mc1": ("MC1 %", 100, 1), "mc2": ("MC2 %", 100, 1), "perplexity": ("perplexity", 1, 3)}
SIDE_EFFECTS = ("perplexity",)

Results = Mapping[str, Any] | str | os.PathLike


def model_card(config: PeftConfig, *, base_model: str | None = None, results: Iterable[Results] = ()) -> ModelCard:
    """The model card of a SEA or HPR adapter. What is not known is left out.

    Args:
        config: of the adapter; what its fit or training wrote there becomes the card.
        base_model: id of the base model on the Hub, where the configuration names a local folder.
        results: what `peft-edit evaluate --json` wrote, as files or dictionaries: of the base model (before), and with
            this adapter (after).

    Raises:
        ValueError: results of another kind, or a base model that can be no id on the Hub.
    """
    if base_model is not None and not _is_hub_id(base_model):
        raise ValueError(f"base_model must be an id on the Hub such as user/model, got {base_model!r}")
    method = config.peft_type.value
    name = base_model or config.base_model_name_or_path
    base_id = name if name and _is_hub_id(name) else None
    title = _title(config, name)
    read = [_read_results(result) for result in results]
    measured = _eval_results(read)
    layers = _sea_layers(config) if method == "SEA" else _hpr_layers(config)
    fitted_on = config.fitted_on
    data_id = _data_id(fitted_on.get("data"))
    data = ModelCardData(
        base_model=base_id,
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        tags=[method.lower(), "activation-editing", "representation-engineering", "peft-edit"],
        datasets=[data_id] if data_id else None,
        model_name=title if measured else None,
        eval_results=measured or None,
    )
    text = _template(f"{method.lower()}.md").render(
        title=title,
        method=method,
        config=config,
        base_id=base_id,
        base_text=_link(base_id, "") if base_id else f"`{Path(name).name}`" if name else "its base model",
        settings=_settings(config, method),
        layers=layers,
        has_statistics=all(set(SITE_STATISTICS) <= set(layer) for layer in layers),
        fitted_on=fitted_on if {"demonstrations", "token_pairs"} & set(fitted_on) else {},
        data_text=_link(data_id, "datasets/") if data_id else f"`{fitted_on['data']}`" if "data" in fitted_on else None,
        results=[
            (heading, tables)
            for heading, side in (("Results", False), ("Side effects", True))
            if (tables := _tables(read, side))
        ],
        repository=UNKNOWN_REPOSITORY,
    )
    # Blocks that are left out leave blank lines.
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\n{{ text }}", text=text)
    return ModelCard(_with_marker(str(card)))


def write_card(folder: str | os.PathLike, config: PeftConfig, **kwargs: Any) -> bool:
    """Write the card of an adapter into its folder, unless somebody has written the README.md there, or edited it.

    Args:
        folder: of the adapter.
        config: of the adapter.
        kwargs: see `model_card`.

    Returns:
        Whether the card was written.
    """
    if has_own_readme(Path(folder)):
        return False
    path = Path(folder) / README
    temporary = path.with_name(f".{README}.tmp")
    model_card(config, **kwargs).save(temporary)
    os.replace(temporary, path)
    return True


def has_own_readme(folder: Path) -> bool:
    """Whether somebody has written the README.md in a folder, or edited it."""
    path = folder / README
    return path.exists() and not may_replace(path.read_text(encoding="utf-8", errors="replace"))


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
    return _with_marker(text.replace(f'"{UNKNOWN_REPOSITORY}"', place))


def index_card(configs: Mapping[str, PeftConfig]) -> ModelCard:
    """The card of a repository whose adapters are in folders: folder to configuration."""
    cards = {folder: model_card(config) for folder, config in configs.items() if config.peft_type.value in SETTINGS}
    bases = {card.data.base_model for card in cards.values()} - {None}
    data = ModelCardData(
        base_model=sorted(bases) or None,
        library_name="peft",
        tags=sorted({tag for card in cards.values() for tag in card.data.tags}),
    )
    text = "# Adapters\n\n" + "\n".join(
        f"- [{folder}]({folder}/{README}): {_title(configs[folder])}" if folder in cards else f"- {folder}"
        for folder in configs
    )
    card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\n{{ text }}", text=f"{text}\n")
    return ModelCard(_with_marker(str(card)))


def _with_marker(text: str) -> str:
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
    """Whether a README.md has no line but those of the template of the Hub's client and what is filled in there by PEFT
    and Transformers."""
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    known = {line.strip() for line in template} | {"### Framework versions"}
    filled_in = re.compile(r"- PEFT [\w.]+|This is the model card of a .* transformers model that has been pushed .*")
    lines = (line.strip() for line in REGEX_YAML_BLOCK.sub("", text, count=1).splitlines())
    return all(line in known or filled_in.fullmatch(line) for line in lines)


def _title(config: PeftConfig, base_model: str | None = None) -> str:
    name = base_model or config.base_model_name_or_path
    return f"{config.peft_type.value} adapter{f' for {Path(name).name}' if name else ''}"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template(name)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _data_id(name: str | None) -> str | None:
    """The id on the Hub of a data set; None where it is none, or not known."""
    if name is None or name in DATASETS:
        return DATASETS.get(name)
    return name if "/" in name and not name.endswith(DATA_FILES) and _is_hub_id(name) else None


def _link(repo_id: str, prefix: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})"


def _settings(config: PeftConfig, method: str) -> list[tuple[str, str]]:
    names = [*SETTINGS[method], *(FIT_SETTINGS if method == "SEA" and config.fitted_on else ())]
    if method == "SEA" and config.feature_map is None:
        names = [name for name in names if name not in ("feature_map", "feature_space", "input_scale")]
    if method == "HPR" and config.angle_hidden_size is None:
        names.remove("angle_hidden_size")
    return [(f"`{name}`", f"`{json.dumps(getattr(config, name))}`") for name in names]


def _sea_layers(config: PeftConfig) -> list[dict[str, Any]]:
    # In a file the sites are sorted as texts.
    return [
        {"index": layer_index(site), "site": site, "ranks": ranks, **config.fit_statistics.get(site, {})}
        for site, ranks in sorted(config.rank_pattern.items(), key=lambda item: (layer_index(item[0]) or 0, item[0]))
    ]


def _hpr_layers(config: PeftConfig) -> list[dict[str, Any]]:
    accuracies = sorted((int(index), value) for index, value in config.probe_accuracy.items())
    return [{"index": i, "accuracy": value, "edits": config.edits(i)} for i, value in accuracies]


def _read_results(results: Results) -> dict[str, Any]:
    """Results of one evaluation, without the scores of each question."""
    where = "results"
    if not isinstance(results, Mapping):
        where = str(results)
        try:
            results = json.loads(Path(results).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}): pass what peft-edit evaluate --json wrote") from error
    given = results if isinstance(results, Mapping) else {}
    measures = {name: value for name, value in given.items() if isinstance(value, float) and name != "strength"}
    if "adapter" not in given or not measures:
        raise ValueError(f"{where} must be what peft-edit evaluate --json wrote, with adapter and mc1 or the like")
    data, questions = given.get("data") or {}, given.get("questions")  # the scores of each, or their number
    return {
        "edited": given["adapter"] is not None,
        "strength": given.get("strength", 1.0),
        "data": data_name(data["name"]) if data.get("name") else None,
        "split": data.get("split"),
        "questions": len(questions) if isinstance(questions, list) else questions,
        "measures": measures,
    }


def data_name(name: str) -> str:
    """Name of a data set for the public: of a local file without its folders."""
    return Path(name).name if Path(name).exists() or name.endswith(DATA_FILES) else name


def _eval_results(read: list[dict[str, Any]]) -> list[EvalResult]:
    """The metadata's results: those with the adapter as it is, on data whose name is known."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_data_id(result["data"]) or result["data"],
            dataset_name=result["data"],
            dataset_split=result["split"],
            metric_type=name,
            metric_name=name.upper() if name in ("mc1", "mc2") else name,
            metric_value=round(value, 4),
        )
        for result in read
        if result["edited"] and result["strength"] == 1 and result["data"] is not None
        for name, value in result["measures"].items()
        if name not in SIDE_EFFECTS  # which is of other text
    ]


def _tables(read: list[dict[str, Any]], side_effects: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows for each data set: the base model, then the edits by strength, with their change."""
    tables = []
    for key in dict.fromkeys((r["data"], r["split"], r["questions"]) for r in read):
        of_data = [r for r in read if (r["data"], r["split"], r["questions"]) == key]
        of_data.sort(key=lambda r: (r["edited"], r["strength"]))
        measured = dict.fromkeys(name for r in of_data for name in r["measures"])
        names = [name for name in measured if (name in SIDE_EFFECTS) == side_effects]
        if not names:
            continue
        base = next((r["measures"] for r in of_data if not r["edited"]), {})
        rows = [[_row_name(r), *(_cell(name, r, base) for name in names)] for r in of_data]
        caption = "Perplexity of other text." if side_effects else _caption(*key)
        tables.append((caption, ["model", *(MEASURES.get(name, (name,))[0] for name in names)], rows))
    return tables


def _caption(data: str | None, split: str | None, questions: int | None) -> str:
    parts = (data and f"`{data}`", split and f"split `{split}`", questions and f"{questions} questions")
    return f"Measured on {', '.join(filter(None, parts)) or 'data that are not recorded'}."


def _row_name(result: dict[str, Any]) -> str:
    if not result["edited"]:
        return "base model"
    return "this adapter" if result["strength"] == 1 else f"this adapter, strength {result['strength']:g}"


def _cell(name: str, result: dict[str, Any], base: dict[str, float]) -> str:
    if name not in result["measures"]:
        return ""
    _, factor, decimals = MEASURES.get(name, (name, 1, 4))
    text = f"{factor * result['measures'][name]:.{decimals}f}"
    if not result["edited"] or name not in base:
        return text
    return f"{text} ({factor * (result['measures'][name] - base[name]):+.{decimals}f})"
