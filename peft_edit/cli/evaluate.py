from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..arguments import Argument, ArgumentError
from ..evaluation.options import EvaluationOptions
from ..evaluation.showing import LABELS, SHIFT, SIDE_EFFECTS, percent, side_effect_cells
from . import common
from .options import Run


@dataclass(kw_only=True)
class EvaluateOptions(EvaluationOptions):
    """What is evaluated, and how."""

    adapter: str | None = field(default=None, metadata=common.ADAPTER)
    strength: float = field(
        default=1.0,
        metadata={"help": "Factor on the adapter's strength.", "minimum": 0, "allowed": "of 0 or more and finite"},
    )
    texts: list[Path] | None = field(
        default=None,
        metadata={"help": "Text file, one text a line, for side effects. May be repeated.", "repeated": True},
    )

    base_results: Path | None = field(
        default=None,
        metadata={"help": "What evaluate --json wrote of the base model on the same questions, used again."},
    )
    examples: int | None = field(
        default=None,
        metadata={
            "help": "So many answered questions before each prompt (in-context learning).",
            "minimum": 1,
            "allowed": "of at least 1",
        },
    )
    examples_split: str | None = field(default=None, metadata={"help": "Split that they are drawn from."})
    examples_data: str | None = field(
        default=None, metadata={"help": "Contrast set that they are drawn from. Default: the same data set."}
    )
    examples_seed: int = field(default=0, metadata={"help": "Of the draw.", "minimum": 0, "allowed": "of at least 0"})

    def __post_init__(self):
        super().__post_init__()
        names = [file.name for file in self.texts or ()]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ArgumentError(
                Argument("texts"), f" must be files of different names, got {repeated[0]} twice: rename one"
            )
        for name in ("examples_split", "examples_data"):
            if getattr(self, name) is not None and self.examples is None:
                raise ArgumentError(Argument(name), " needs ", Argument("examples"), ", their number: pass it too")
        if self.strength != 1 and self.adapter is None:
            raise ArgumentError(
                *(Argument("strength"), " needs ", Argument("adapter")),
                ": without an adapter there is nothing to scale",
            )


def evaluate(
    model: common.LoadedModelOptions,
    data: common.DataOptions,
    options: EvaluateOptions,
    output: common.Output,
    run: Run,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Measure a model, with an adapter and without: multiple choice, bias, side effects on other text, with intervals.

    Example: peft-edit evaluate meta-llama/Llama-2-7b-hf truthful_qa --split test --adapter sea-truthful
    """
    from ..data import load_texts
    from ..evaluation.measuring import evaluate

    texts = {file.name: load_texts(file)["text"] for file in options.texts or ()}
    contrast = common.load_data(data)
    base, tokenizer = common.load_model(model)
    if options.adapter is not None:
        base = common.load_adapter(base, options.adapter, allow_fingerprint_mismatch)
    examples = None
    if options.examples is not None:
        contrast, examples = _with_examples(contrast, data, options, tokenizer)
    settings = {option.name: getattr(options, option.name) for option in fields(EvaluationOptions)}
    results = evaluate(
        base,
        tokenizer,
        contrast,
        texts=texts,
        strength=options.strength,
        names=None if options.adapter is None else {"default": options.adapter},
        examples=examples,
        base_results=options.base_results,
        **settings,
    )
    output.write(run.record(results))
    print(f"Questions: {len(results['questions'])}")
    print(f"Prompt format: {results['prompts']['format']}")
    if examples is not None:
        print(f"Examples in the prompt: {examples['count']}")
    for lines in (_measures(results), _categories(results), _side_effects(results)):
        if lines:
            print(f"\n{lines}")
    if options.adapter is not None and not results["side_effects"]:
        print("\nDamage: not measured. Pass --texts FILE with text that the edit is not meant for.")


def _with_examples(contrast, data: common.DataOptions, options: EvaluateOptions, tokenizer):
    """The questions with answered ones before each, and what is recorded of these."""
    from ..arguments import renamed
    from ..data.in_context import with_examples
    from ..data.prompts import settled
    from ..data.source import source_of

    same = options.examples_data is None
    drawn_from = replace(data, split=options.examples_split, limit=None, skip=0)
    if not same:
        drawn_from = replace(drawn_from, data=options.examples_data, data_files=None, subset=None, data_revision=None)
    with renamed(split="examples_split", **({} if same else {"name": "examples_data"})):
        answered = common.load_data(drawn_from)
    count, seed = options.examples, options.examples_seed
    chat = settled(tokenizer, options).prompt_format == "chat"
    source = source_of(answered)
    return with_examples(contrast, answered, count, chat=chat, seed=seed), {
        "count": count,
        "seed": seed,
        **{name: source[name] for name in ("name", "split")},
    }


def _measures(results: dict[str, Any]) -> str:
    """Measures of all questions, the base model's beside them."""
    measures = results["measures"]
    compared = any(measure["base"] is not None for measure in measures.values())
    header = ["measure", "%", "95 % interval", *(["base", "change", "95 % interval", "p"] if compared else [])]
    rows = []
    for name, measure in measures.items():
        row = [LABELS[name], percent(measure["value"], decimals=2), _interval(measure["low"], measure["high"])]
        if compared:
            p_value = measure["p_value"]
            row += [
                percent(measure["base"], decimals=2),
                percent(measure["difference"], "+", 2),
                _interval(measure["difference_low"], measure["difference_high"], "+"),
                "" if p_value is None else f"{p_value:.2g}",
            ]
        rows.append(row)
    return common.table(header, rows) if rows else ""


def _categories(results: dict[str, Any]) -> str:
    """The measures of each category, with the change from the base model's."""
    categories = results["categories"]
    if len(categories) < 2:
        return ""
    names = [name for name in results["measures"] if name not in SHIFT]
    rows = []
    for category, found in categories.items():
        cells = []
        for name in names:
            value, base = found["measures"][name]["value"], found["measures"][name]["base"]
            change = "" if None in (value, base) else f" ({percent(value - base, '+', 2)})"
            cells.append(f"{percent(value, decimals=2)}{change}")
        rows.append([category, str(found["questions"]), *cells])
    return common.table(["category", "questions", *(LABELS[name] for name in names)], rows)


def _side_effects(results: dict[str, Any]) -> str:
    """What happens to other texts."""
    found = [(effects["texts"]["file"], side_effect_cells(effects)) for effects in results["side_effects"]]
    names = [name for name in SIDE_EFFECTS if any(name in cells for _, cells in found)]
    rows = [[file, *(cells.get(name, "") for name in names)] for file, cells in found]
    return common.table(["texts", *(SIDE_EFFECTS[name][0] for name in names)], rows) if rows else ""


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if None in (low, high) else f"{percent(low, sign, 2)} to {percent(high, sign, 2)}"


COMMANDS = [evaluate]
