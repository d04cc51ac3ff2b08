from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import common
from .options import Run


def card(
    folder: common.Folder,
    results: Annotated[
        list[Path] | None,
        {
            "help": "What evaluate --json wrote, of the base model and with the adapter. May be repeated.",
            "repeated": True,
        },
    ] = None,
    base_model: Annotated[
        str | None, {"help": "Id of the base model on the Hub, where the adapter names a local folder."}
    ] = None,
) -> None:
    """Write the model card of an adapter, README.md in its folder, with results. Your own README.md is left alone.

    Example: peft-edit card sea-truthful --results base.json --results edited.json
    """
    from ..adapters import card as cards
    from ..adapters import hub

    config = hub.read_edit_config(folder)
    if not cards.write_card(folder, config, base_model=base_model, results=results or ()):
        raise ValueError(f"{folder / cards.README} is not a generated card: move it away to get one")
    print(f"Card: {folder / cards.README}")


def push(
    folder: common.Folder,
    repo_id: Annotated[str, {"help": "Repository on the Hub, user/name.", "positional": True}],
    output: common.Output,
    run: Run,
    private: Annotated[bool, {"help": "Make a new repository private."}] = False,
    revision: Annotated[str | None, {"help": "Branch, created where it is missing. Default: main."}] = None,
    create_pr: Annotated[bool, {"help": "Open a pull request instead."}] = False,
    message: Annotated[str | None, {"help": "Of the commit.", "arguments": ("commit_message",)}] = None,
    token: Annotated[str | None, {"help": "Default: that of hf auth login, or of HF_TOKEN.", "secret": True}] = None,
) -> None:
    """Upload an adapter with its model card to the Hub, in one commit.

    Example: peft-edit push sea-truthful user/llama2-7b-sea-truthful --private
    """
    from ..adapters import hub

    commit = hub.push_folder(
        folder,
        repo_id,
        commit_message=message,
        private=True if private else None,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )
    results = {"repository": str(commit.repo_url.repo_id), "commit": commit.oid, "url": commit.commit_url}
    output.write(run.record(results | {"pull_request": commit.pr_url}))
    print(f"Pull request: {commit.pr_url}" if commit.pr_url else f"Commit: {commit.commit_url}")


COMMANDS = [card, push]
