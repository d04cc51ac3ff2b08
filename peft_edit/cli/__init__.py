"""The command line, `peft-edit`: one file for each group of commands, and in a method's folder those of the method."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from . import common


def method_commands() -> list[Callable]:
    """The functions of the methods' own commands."""
    from ..tuners.method import methods

    return [function for method in methods().values() for function in import_module(method.commands).COMMANDS]


def commands() -> list[Callable]:
    """The functions of all commands, in the order of use."""
    from . import (
        activations,
        chat,
        choose,
        convert,
        demo,
        evaluate,
        explain,
        export,
        generate,
        hub,
        merge,
        report,
        run,
        ui,
    )

    first = [demo.demo, activations.collect, activations.inspect]
    moving_on = [convert.convert, export.export_lora, merge.merge, hub.card, hub.push]
    looking = [evaluate.evaluate, explain.explain, generate.generate, report.report, *chat.COMMANDS, *ui.COMMANDS]
    return [*first, *method_commands(), *choose.COMMANDS, *looking, *moving_on, run.run]


@cache
def application() -> TyperGroup:
    """The command line with all commands, which parses arguments and runs one of them."""
    from . import harness
    from .options import command, command_name, options_of

    app = typer.Typer(
        name="peft-edit",
        help="Edit a language model's activations as Hugging Face PEFT adapters.",
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    functions = commands()
    options = [option for function in functions for option in options_of(function)]
    for function in functions:
        # Wide enough for most options to have one line.
        settings = {"max_content_width": 140}
        app.command(command_name(function), context_settings=settings)(command(function, elsewhere=options))
    app.command(command_name(harness.lm_eval), cls=harness.Untouched)(harness.lm_eval)
    return typer.main.get_command(app)


# What typer raises for what cannot be parsed; it says so in its own words.
UsageError = typer.BadParameter.__base__


def main() -> None:
    """Run the command line: exit status 0, or 2 with what to change."""
    # PEFT reads an attribute that Transformers 5 deprecates; users cannot do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Of what an output without UTF-8 cannot show it gets the code.
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = application()(sys.argv[1:] or ["--help"], prog_name="peft-edit", standalone_mode=False)
    except UsageError as error:
        program = error.ctx.command_path if error.ctx is not None else "peft-edit"
        _fail(f"{error.format_message().rstrip('.')}: see {program} --help")
    except (ValueError, OSError, SafetensorError) as error:
        _fail(common.told_error(error))
    except typer.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    """End with one line. What users gave is in it as they gave it, and what cannot be printed, such as the end of a
    line in a path, as Python escapes it."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message.strip())
    print("peft-edit:", "".join(shown), file=sys.stderr)
    sys.exit(2)
