"""The command line of lm-evaluation-harness, as it is, in this process, where the methods of this package are known to
PEFT, with which the harness loads adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import typer
from typer.core import TyperCommand

from ..extras import import_extra
from ..plugin import register


class Untouched(TyperCommand):
    """A command that gets all its arguments as they are: `--help`, and what looks like options, too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the methods of this package: all options are its own.

    Example: peft-edit lm-eval --model hf --model_args pretrained=NAME,peft=sea-truthful --tasks truthfulqa_mc1
    """
    register()
    harness = import_extra("lm_eval.__main__", "eval", "lm-eval")
    with _arguments(context.args), _no_edit_of_padding():
        harness.cli_evaluate()


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Let a program that reads `sys.argv` find these arguments there."""
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _no_edit_of_padding() -> Iterator[None]:
    """Let the harness refuse to take log-likelihoods with an edit of the last token of a forward pass: it pads batches
    on the right, so that the edit would fall on padding, and the figures would be the base model's but for one row."""
    from lm_eval.models.huggingface import HFLM

    from ..tuners.layer import check_independent_of_padding

    unchecked = HFLM._loglikelihood_tokens

    @wraps(unchecked)
    def checked(self, *arguments, **keywords):
        check_independent_of_padding(self.model)
        return unchecked(self, *arguments, **keywords)

    HFLM._loglikelihood_tokens = checked
    try:
        yield
    finally:
        HFLM._loglikelihood_tokens = unchecked


COMMANDS = [lm_eval]
