"""The command line, `peft-edit`: one file for each group of commands."""

from __future__ import annotations

import sys
import warnings

import typer
from safetensors import SafetensorError

from . import activations, convert, demo, evaluate, export, hpr, hub, merge, sea


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


# What the messages of the Python functions advise, in the words of the command line.
OPTIONS = {
    "allow_fingerprint_mismatch=True": "--allow-fingerprint-mismatch",
    "resume=False": "--no-resume",
    "truncate=True": "--truncate",
    "centered=False": "--no-centered",
    "layers_to_transform": "--layers",
    "target_modules": "--target-modules",
    "data_files=": "--data-files ",
    "prompt_format=": "--prompt-format ",
    "base_model must": "--base-model must",
    "max_new_tokens": "--max-new-tokens",
    "num_angle_layers": "--num-angle-layers",
    "angle_hidden_size": "--angle-hidden-size",
    "use_cpu": "--cpu",
    "device must be": "--device must be",
    "device is '": "--device is '",
    "token_scope must": "--token-scope must",
    "add one with HPRConfig": "pass one that train-hpr made",
    "add one with SEAConfig": "pass one that fit-sea made",
    "site='block'": "--site block",
    "tokens='answer'": "--tokens answer",
    "set token_scope='all' in its configuration": "pass it through select with --token-scope all",
    "top_k=": "--top-k ",
    "threshold=": "--threshold ",
    "top_k": "--top-k",
}


def main() -> None:
    """Run the command line: exit status 0, or 2 with what to change."""
    # PEFT reads an attribute that Transformers 5 deprecates; users cannot do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except (ValueError, OSError, SafetensorError) as error:
        message = " ".join(str(error).split())
        for argument, option in OPTIONS.items():
            message = message.replace(argument, option)
        print(f"peft-edit: {message}", file=sys.stderr)
        sys.exit(2)
