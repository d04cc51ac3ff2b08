from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import Argument, ArgumentError
from ..data.prompts import PromptOptions, settled
from . import common
from .options import Run


@dataclass(kw_only=True)
class EvaluateOptions(PromptOptions):
    """What is evaluated, and how."""

    adapter: str | None = field(default=None, metadata=common.ADAPTER)
    strength: float = field(
        default=1.0,
        metadata={"help": "Factor on the adapter's strength.", "minimum": 0, "allowed": "of 0 or more and finite"},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Most answers in a forward pass.", "minimum": 1, "allowed": "of at least 1"}
    )
    perplexity: Path | None = field(default=None, metadata={"help": "Text file, one text a line, for the perplexity."})

    def __post_init__(self):
        super().__post_init__()
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
    """Multiple-choice accuracy, MC1 and MC2, of a model with or without an adapter.

    Example: peft-edit evaluate meta-llama/Llama-2-7b-hf truthful_qa --split test --adapter sea-truthful
    """
    from .. import evaluation
    from ..evaluation.results import record
    from ..tuners.strength import edit_strength

    texts, adapter, strength = None, options.adapter, options.strength
    if (file := options.perplexity) is not None:
        try:
            texts = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text ({error})") from error
    contrast = common.load_data(data)
    base, tokenizer = common.load_model(model)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    options = settled(tokenizer, options)
    with edit_strength(base, strength) if strength != 1 else nullcontext():
        result = evaluation.evaluate_multiple_choice(
            base, tokenizer, contrast, batch_size=options.batch_size, **options.of_prompts
        )
        measured = result.to_dict()
        if texts is not None:
            measured["perplexity"] = evaluation.perplexity(base, tokenizer, texts, batch_size=options.batch_size)
    results = record(
        base,
        tokenizer,
        contrast,
        measured,
        prompts=options,
        strength=strength,
        texts=texts,
        texts_file=options.perplexity,
        names={"default": adapter} if adapter is not None else None,
    )
    output.write(run.record(results))
    print(f"Questions: {len(result.questions)}")
    print(f"Prompt format: {results['prompts']['format']}")
    print(f"MC1: {100 * result.mc1:.2f} %")
    print(f"MC2: {100 * result.mc2:.2f} %")
    if texts is not None:
        print(f"Perplexity: {results['perplexity']:.4f}")
