"""The command line, `peft-edit`: one file for each group of commands."""

from __future__ import annotations

import sys
import warnings

import typer
from safetensors import SafetensorError

from ..tuners.hpr import commands as hpr
from ..tuners.sea import commands as sea
from . import activations, common, convert, demo, evaluate, export, hub, merge


app = typer.Typer(
    name="peft-edit",
    help="Edit a language model's activations as Hugging Face PEFT adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("collect")(activations.collect)
app.command("inspect")(activations.inspect)
app.command("fit-sea")(sea.fit_sea)
app.command("train-hpr")(hpr.train_hpr)
app.command("select")(hpr.select)
app.command("evaluate")(evaluate.evaluate)
app.command("convert")(convert.convert)
app.command("export-lora")(export.export_lora)
app.command("merge")(merge.merge)
app.command("card")(hub.card)
app.command("push")(hub.push)


def main() -> None:
    """Run the command line: exit status 0, or 2 with what to change."""
    # PEFT reads an attribute that Transformers 5 deprecates; users cannot do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except (ValueError, OSError, SafetensorError) as error:
        message = common.in_options(" ".join(str(error).split()))
        print(f"peft-edit: {message}", file=sys.stderr)
        sys.exit(2)
