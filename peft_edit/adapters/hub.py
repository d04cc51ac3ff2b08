"""Adapters to the Hub, in one commit with their model cards, and from it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..data.names import is_hub_id
from ..models.sites import without_wrappers
from ..tuners.config import EditConfig
from ..tuners.method import names
from .card import README, GivenResults, for_repository, has_own_readme, index_card, is_generated, model_card, write_card
from .exported import read_exported
from .hub_errors import plain_errors
from .read import read_config
from .unfinished import is_unfinished


logger = logging.getLogger(__name__)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    results: Iterable[GivenResults] = (),
) -> CommitInfo:
    """Save the adapters of a model and upload them, with their model card, in one commit.

    `model.push_to_hub` of Transformers uploads the same tensors and replaces the card by a template.

    Args:
        model: a `PeftModel`, whose adapters are all uploaded, those not named "default" to folders of their names; or a
            Transformers model after `add_adapter`, of which the active one is.
        base_model, results: for the card, see `model_card`; they need an adapter named "default".
        repo_id, commit_message, commit_description, private, token, revision, create_pr: see `push_folder`.

    Returns:
        The commit.

    Raises:
        See `push_folder`.
    """
    model = without_wrappers(model)
    if not getattr(model, "peft_config", None):
        raise ValueError(f"{type(model).__name__} has no adapter to upload: add or load one")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if base_model is not None or results:
            write_card(folder, read_edit_config(Path(folder)), base_model=base_model, results=results)
        return push_folder(
            folder,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload the adapter in a folder, and those in folders in it, in one commit. When it fails, the Hub is as before.

    Hidden files, other folders and the checkpoints of a training stay here. A README.md that somebody has written, here
    or in the repository, is not replaced by a generated card.

    Args:
        folder: with `adapter_config.json`, or with folders that have it.
        repo_id: "user/name", or "name" for your own.
        commit_message: by default "Upload NAME adapter", the name of the method.
        commit_description: of the commit.
        private: whether a repository that does not exist yet is made private. None: as is usual for you there.
        token: None for the one that `hf auth login` has stored.
        revision: branch, which is created where it does not exist yet; None for main.
        create_pr: open a pull request instead of changing the branch.

    Returns:
        The commit.

    Raises:
        ValueError: the folder holds no adapter, or a damaged one; the Hub refuses the names or the card.
        PermissionError: the token is wrong or missing, or may not write there.
        FileNotFoundError: no such repository or revision.
        ConnectionError: the Hub cannot be reached, or offline mode is on.
        OSError: the Hub fails otherwise.
    """
    folder = Path(folder)
    configs = _read_adapters(folder)
    left: list[str] = []  # what could not be taken back
    api = HfApi(token=token)
    with plain_errors(f"the upload to {repo_id} failed", repo_id, revision, left):
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        with _prepared(api, repo_id, private, revision, create_pr, left) as head:
            methods = sorted({config.peft_type.value for config in configs.values()})
            commit = api.create_commit(
                repo_id,
                _operations(api, folder, configs, repo_id, head),
                commit_message=commit_message or f"Upload {' and '.join(methods)} adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,  # refused when somebody has changed the branch since its README was looked at
            )
    for base in {config.base_model_name_or_path for config in configs.values()} - {None}:
        if not is_hub_id(base):
            logger.warning(
                "the adapter names %s as its base model, which others do not have: write the model's id on the Hub "
                "into adapter_config.json (base_model_name_or_path) and push again",
                base,
            )
    return commit


def check_token(repo_id: str) -> None:
    """Raise an error as `push_folder` does without a token that the Hub knows, before work whose result goes there."""
    with plain_errors(f"nothing can be uploaded to {repo_id}", repo_id, None):
        validate_repo_id(repo_id)
        HfApi().whoami()


def push_checkpoint(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a merged checkpoint, to a new repository or as one commit to one that is there. When it fails, the Hub is
    as before.

    Args:
        folder: all of it is uploaded.
        repo_id: "user/name".
        private: whether a repository that does not exist yet is made private.

    Returns:
        Address of the commit.

    Raises:
        As `push_folder`.
    """
    left = [f"{folder} is complete: run hf upload {repo_id} {folder}"]
    api = HfApi()
    with (
        plain_errors(f"the upload to {repo_id} failed", repo_id, None, left),
        _prepared(api, repo_id, True if private else None, None, False, left) as head,
    ):
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload merged model", parent_commit=head
        ).commit_url


def read_edit_config(folder: Path) -> EditConfig:
    """The configuration of the adapter in a folder, one that edits or the LoRA adapter that such a one was exported to.

    Raises:
        ValueError: there is none.
    """
    config = _read_adapters(folder).get("")
    if config is None or not _is_edit(folder, config):
        raise ValueError(
            f"{folder} holds no {names()} adapter, nor one that was exported to LoRA: pass the folder that was saved"
        )
    return config


def _is_edit(folder: Path, config: PeftConfig) -> bool:
    return isinstance(config, EditConfig) or read_exported(folder, config) is not None


def _read_adapters(folder: Path) -> dict[str, PeftConfig]:
    """Configurations of the adapter in a folder, "", and of those in folders in it, by their names."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: pass the folder that was saved")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not _stays(path))]
    configs = {}
    for place in places:
        if not (place / CONFIG_NAME).exists():
            continue
        configs["" if place == folder else place.name] = read_config(place)
        _check_weights(place)
    if not configs:
        raise ValueError(f"{folder} holds no adapter (no {CONFIG_NAME}): pass the folder that was saved")
    return configs


def _check_weights(place: Path) -> None:
    """Raise ValueError for an adapter without its tensors, before a repository is made of it."""
    file = place / SAFETENSORS_WEIGHTS_NAME
    if (place / WEIGHTS_NAME).exists() and not file.exists():
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): save the adapter again") from error


def _stays(path: Path) -> bool:
    """Whether a file or folder of an adapter's folder is not for others: hidden, or of a run that was interrupted."""
    return path.name.startswith(".") or is_unfinished(path)


def _operations(
    api: HfApi, folder: Path, configs: dict[str, PeftConfig], repo_id: str, head: str
) -> list[CommitOperationAdd]:
    """The files of each adapter and README.md; the generated cards name the repository, and none is for a place where
    its last commit, `head`, has a README.md of somebody."""
    files: dict[str, Path | str] = {README: folder / README} if (folder / README).is_file() else {}
    for place, config in configs.items():
        for path in sorted((folder / place).iterdir()):
            if path.is_file() and not _stays(path):
                files[path.relative_to(folder).as_posix()] = path
        name = f"{place}/{README}" if place else README
        if _is_edit(folder / place, config) and not has_own_readme(folder / place):
            text = files[name].read_text(encoding="utf-8") if name in files else ""
            card = text if is_generated(text) else str(model_card(config, folder=folder / place))
            files[name] = for_repository(card, repo_id, place)
    if "" not in configs and not has_own_readme(folder):
        files[README] = str(index_card(configs))
    for name in [name for name, text in files.items() if isinstance(text, str)]:
        if _repository_has_own_readme(api, repo_id, head, name):
            logger.warning("%s of %s is not a generated card and stays as it is", name, repo_id)
            del files[name]
    return [
        CommitOperationAdd(name, file.encode() if isinstance(file, str) else str(file)) for name, file in files.items()
    ]


def _repository_has_own_readme(api: HfApi, repo_id: str, head: str, name: str) -> bool:
    """Whether somebody has written, or edited, the README.md with this path in the commit `head` of a repository."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            api.hf_hub_download(repo_id, name, revision=head, local_dir=temporary)
        except EntryNotFoundError:
            return False
        return has_own_readme((Path(temporary) / name).parent)


@contextmanager
def _prepared(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool, left: list[str]
) -> Iterator[str | None]:
    """Create the repository and the branch that are missing, and give the commit that is their last. When the block
    fails, take them back; `left` gets what cannot be taken back.

    That needs to know what was there before, which `exist_ok` of the Hub's client does not tell.
    """
    undo: list[tuple[str, Callable[[], None]]] = []
    head = None
    try:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
            undo.append((f"the repository {repo_id}", lambda: api.delete_repo(repo_id)))
        named = revision is not None and not revision.startswith("refs/")
        if named and _create_branch(api, repo_id, revision, create_pr):
            undo.append((f"the branch {revision}", lambda: api.delete_branch(repo_id, branch=revision)))
        head = api.repo_info(repo_id, revision=revision).sha
        yield head
    except BaseException as error:
        what, take_back = undo[0] if undo else ("", None)  # the first has the others in it
        try:
            # Where only the answer was lost, there is a commit.
            if head not in (None, api.repo_info(repo_id, revision=revision).sha):
                left.append(f"{repo_id} has a new commit all the same: look whether it is yours")
            elif take_back is not None:
                take_back()
        except (HTTPError, OSError):
            if take_back is not None:
                left.append(f"{what} was created, is empty and cannot be deleted: delete it, or upload again")
        if left and not isinstance(error, Exception):  # an interrupt has no message to add it to
            logger.warning(left[-1])
        raise


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> bool:
    """Whether a branch was created; False where there is one."""
    try:
        api.create_branch(repo_id, branch=branch)
    except HfHubHTTPError as error:
        # Everybody may open a pull request, but not create a branch.
        if error.response.status_code == 409 or (error.response.status_code == 403 and create_pr):
            return False
        raise
    return True
