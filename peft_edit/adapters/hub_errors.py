"""What goes wrong with the Hub, each in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP library, which is another one in other releases
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME


@contextmanager
def plain_errors(what: str, repo_id: str, revision: str | None, left: Iterable[str] = ()) -> Iterator[None]:
    """Say in one line what the Hub's client says in several, or in the words of its HTTP library."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError) as error:
        kind, reason = _explain(error, repo_id, revision)
        raise kind("; ".join([f"{what}: {reason}", *left])) from error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> tuple[type[Exception], str]:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of the upload of one file
        kind, reason = _explain(error.__cause__, repo_id, revision)
        return kind, f"{str(error).rstrip('.')} ({reason})"
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError, "there is no token: log in (hf auth login)"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError, "HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, LocalEntryNotFoundError):
        return ConnectionError, "the Hub cannot be reached or HF_HUB_OFFLINE is set, and it is not in the cache"
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError, f"{repo_id} has no revision {revision}: pass a branch, tag or commit of it"
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError, f"it has no {CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME}: it is no adapter"
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError, f"there is no {repo_id} on the Hub, or your token may not see it: check both"
    if isinstance(error, HfHubHTTPError):
        status, message = error.response.status_code, " ".join((error.server_message or "").split())
        if status == 401:
            return PermissionError, f"there is no valid token ({message or status}): log in (hf auth login)"
        if status == 403:
            return PermissionError, f"the token may not do that ({message or status}): use another one"
        if status == 412:
            return OSError, f"somebody has changed {repo_id} meanwhile: look at it, and upload again"
        later = ": try again later" if status == 429 or status >= 500 else ""
        return OSError, f"the Hub answers {status} ({message or 'no reason given'}){later}"
    if isinstance(error, HTTPError):
        return ConnectionError, f"the Hub cannot be reached ({str(error) or type(error).__name__}): try again later"
    return ValueError if isinstance(error, ValueError) else OSError, " ".join(str(error).split())
