from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

from .. import files
from ..arguments import Argument, ArgumentError
from ..data.options import PromptOptions
from . import common
from .options import Fields, Run


# Lettered choices are of contrast sets.
PROMPTS = Fields(changes={"prompt_format": {"type": Literal["auto", "chat", "plain", "few_shot_qa"]}})


def explain(
    adapter: common.PositionalAdapter,
    text: Annotated[
        str, {"help": "Text, or the prompt where there is an --answer; - reads it from a pipe.", "positional": True}
    ],
    model: Annotated[common.LoadedModelOptions, common.BASE_OF_ADAPTER],
    prompts: Annotated[PromptOptions, PROMPTS],
    output: common.Output,
    run: Run,
    answer: Annotated[str | None, {"help": "Explain this answer to the text as a prompt."}] = None,
    strength: Annotated[
        float, {"help": "Factor on the adapter's strength.", "minimum": 0, "allowed": "of 0 or more and finite"}
    ] = 1.0,
    top: Annotated[
        int, {"help": "Tokens with the largest change that are listed.", "minimum": 1, "allowed": "of at least 1"}
    ] = 5,
    html: Annotated[Path | None, {"help": "Write the view as a page to this file too.", "output": True}] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Show what an adapter does to a text: which tokens it edits, where, how strongly, and what comes next instead.

    Example: peft-edit explain sea-truthful "What happens if you swallow chewing gum?" --answer "It stays in you."
    """
    from ..explaining import explain_edit
    from ..explaining.showing import changed_rows, site_rows, token_page, token_view
    from ..tuners.strength import edit_strength

    if answer is None and prompts != PromptOptions():
        raise ArgumentError(
            *(Argument("prompt_format"), ", ", Argument("template_arguments"), " and ", Argument("template_time")),
            *(" are of a prompt and its ", Argument("answer"), ": pass it too"),
        )
    if html is not None:
        _check_page(html)
    text = sys.stdin.read().removesuffix("\n") if text == "-" else text
    base, tokenizer = common.load_model(common.base_of(model, adapter))
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    ids, first = (text, 0) if answer is None else _answered(tokenizer, text, answer, prompts)
    with nullcontext() if strength == 1 else edit_strength(adapted, strength):
        found = explain_edit(adapted, tokenizer, ids, top=top).since(first)
    output.write(run.record(found.to_dict()))
    if html is not None:
        files.write_text(html, token_page(found, f"What {adapter} does to a text"))
    color, width = common.terminal()
    print(token_view(found, color=color, width=width))
    print(
        f"\n{sum(found.touched)} of {len(found)} tokens edited; KL {sum(found.kl) / len(found):.3f} nats on average\n"
    )
    print(common.table(*changed_rows(found, top)), common.table(*site_rows(found)), sep="\n\n")
    if html is not None:
        print(f"\nPage: {html}")


def _answered(tokenizer, prompt: str, answer: str, options: PromptOptions) -> tuple[list[int], int]:
    """Token ids of a prompt and its answer, and the place of the token before the answer, after which it begins."""
    from ..data.prompts import encode_answers, settled

    ((encoded,),) = encode_answers(tokenizer, [prompt], [[answer]], **settled(tokenizer, options).of_prompts)
    return encoded.input_ids, encoded.prompt_length - 1


def _check_page(html: Path) -> None:
    """Raise ArgumentError where the page could not be written, before the work is done."""
    try:
        files.check_writable(html)
        if html.is_dir():
            raise ValueError(f"{html} is a folder: choose a file")
    except ValueError as error:
        raise ArgumentError(Argument("html"), f" {error}") from error


COMMANDS = [explain]
