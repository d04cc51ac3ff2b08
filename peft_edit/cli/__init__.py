"""The command line, `peft-edit`: one file for each group of commands, and in a method's folder those of the method."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from .listing import HARNESS, Listed, listed_commands


if TYPE_CHECKING:
    from .options import Option

# Wide enough for most options to have one line.
SETTINGS = {"max_content_width": 140}


class Deferred(TyperCommand):
    """A command in the list of all, whose function and options are imported when it is called."""

    def __init__(self, listed: Listed):
        super().__init__(listed.name, help=listed.help, rich_markup_mode=None)
        self.listed = listed

    def make_context(self, *args, **kwargs) -> typer.Context:
        return self.loaded.make_context(*args, **kwargs)

    @cached_property
    def loaded(self) -> TyperCommand:
        """The command itself."""
        from .options import command

        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        function = self.listed.load()
        if self.listed.module == HARNESS:
            from .harness import Untouched

            app.command(self.name, cls=Untouched)(function)
        else:
            app.command(self.name, context_settings=SETTINGS)(command(function, elsewhere=all_options))
        return typer.main.get_command(app)


def commands() -> dict[str, Callable]:
    """Name to function of all commands that have options of this package, in the order of use."""
    return {listed.name: listed.load() for listed in listed_commands() if listed.module != HARNESS}


def all_options() -> list[Option]:
    """The options of all commands."""
    from .options import options_of

    return [option for function in commands().values() for option in options_of(function)]


@cache
def application() -> TyperGroup:
    """The command line with all commands, which parses arguments and runs one of them."""
    return TyperGroup(
        name="peft-edit",
        help="Edit a language model's activations as Hugging Face PEFT adapters.",
        commands={listed.name: Deferred(listed) for listed in listed_commands()},
        rich_markup_mode=None,
        context_settings=SETTINGS,
    )


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
        from .common import told_error

        _fail(told_error(error))
    except typer.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    """End with one line. What users gave is in it as they gave it, and what cannot be printed, such as the end of a
    line in a path, as Python escapes it."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message.strip())
    print("peft-edit:", "".join(shown), file=sys.stderr)
    sys.exit(2)
