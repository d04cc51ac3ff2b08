"""Options of prompts and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, get_args

from ..arguments import Argument, ArgumentError, check_options


PromptFormat = Literal["auto", "chat", "plain", "few_shot_qa", "lettered_choices"]
PROMPT_FORMATS = get_args(PromptFormat)


@dataclass(kw_only=True)
class PromptOptions:
    """
    How a prompt and its answer become tokens, see `encode_answers`.

    Args:
        prompt_format (`str`):
            "auto" (chat where the tokenizer has a template, else plain), "chat", "plain", "few_shot_qa" or
            "lettered_choices".
        template_arguments (`dict`, *optional*):
            Of the chat template, such as {"enable_thinking": False}.
        template_time (`str`, *optional*):
            That a chat template which writes the date is told, in ISO format. By default today, 0:00.
    """

    prompt_format: PromptFormat = field(default="auto", metadata={"help": "How prompt and answer become tokens."})
    template_arguments: dict[str, Any] | None = field(
        default=None, metadata={"help": "Of the chat template, as JSON, such as '{\"enable_thinking\": false}'."}
    )
    template_time: str | None = field(
        default=None,
        metadata={"help": "Time told to a template that writes the date, such as 2026-01-31. Default: today."},
    )

    def __post_init__(self):
        check_options(self, tuple(f.name for f in fields(PromptOptions)))
        try:
            json.dumps(self.template_arguments, allow_nan=False)
        except ValueError:
            raise ArgumentError(
                Argument("template_arguments"), f" must be a dict of JSON values, got {self.template_arguments!r}"
            ) from None
        if self.template_time is not None:
            try:
                datetime.fromisoformat(self.template_time)
            except ValueError:
                raise ArgumentError(
                    Argument("template_time"),
                    f" must be a time in ISO format such as 2026-01-31T12:00, got {self.template_time!r}",
                ) from None

    @property
    def of_prompts(self) -> dict[str, Any]:
        """These options by name, without those of a subclass."""
        return {option.name: getattr(self, option.name) for option in fields(PromptOptions)}
