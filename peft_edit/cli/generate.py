from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from ..answering.options import AnswerOptions
from ..arguments import Argument, ArgumentError
from . import common
from .options import Fields, Run


DATA = Fields(
    changes={"data": {"help": "Contrast set, or file of prompts: .txt, one a line, or .jsonl with {prompt}."}}
)
COLUMNS = {
    "answers": ("answers", "d"),
    "tokens": ("tokens", ".1f"),
    "finished": ("finished", ".2f"),
    "log_likelihood": ("log-likelihood", ".3f"),
    "first_score": ("score of the first", ".3f"),
    "score": ("score", ".3f"),
}


def generate(
    model: common.LoadedModelOptions,
    data: Annotated[common.DataOptions, DATA],
    out: Annotated[Path, {"help": "File of answers, JSON lines.", "positional": True, "output": True}],
    options: AnswerOptions,
    output: common.Output,
    run: Run,
    adapter: common.Adapter = None,
    strength: Annotated[
        float, {"help": "Factor on the adapter's strength.", "minimum": 0, "allowed": "of 0 or more and finite"}
    ] = 1.0,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Answer prompts with a model, with an adapter and without, one JSON line an answer, or the best of several.

    Run it again to go on after an interruption.

    Example: peft-edit generate meta-llama/Llama-2-7b-chat-hf truthful_qa answers.jsonl --adapter hpr-truthful
    """
    from ..answering.generate import generate_answers
    from ..answering.rows import summary
    from ..tuners.strength import edit_strength

    if strength != 1 and adapter is None:
        raise ArgumentError(
            *(Argument("strength"), " needs ", Argument("adapter")),
            ": without an adapter there is nothing to scale",
        )
    prompts = common.load_prompts(data)
    base, tokenizer = common.load_model(model)
    if adapter is not None:
        base = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    with nullcontext() if strength == 1 else edit_strength(base, strength):
        try:
            rows = generate_answers(base, tokenizer, prompts, out=out, **vars(options))
        except KeyboardInterrupt:
            print("peft-edit: interrupted; run the same command again to go on", file=sys.stderr)
            raise
    found = summary(rows)
    output.write(run.record({"run": rows[0]["run"], "models": found}))
    print(_table(found))
    print(f"Answers: {out}")


def _table(found: dict[str, dict[str, Any]]) -> str:
    """Means over the answers of each model."""
    names = [name for name in COLUMNS if any(name in means for means in found.values())]
    rows = [[who, *(format(means[name], COLUMNS[name][1]) for name in names)] for who, means in found.items()]
    return common.table(["model", *(COLUMNS[name][0] for name in names)], rows)


COMMANDS = [generate]
