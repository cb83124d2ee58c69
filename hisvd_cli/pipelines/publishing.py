"""Uploads folders to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from hisvd_cli.export.own_files import written_files
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint, open_checkpoint
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE
from hisvd_cli.modeling.sources.companions import companions, is_own_file
from hisvd_cli.modeling.sources.weights import open_weights
from hisvd_cli.utils.errors import OutputError, SourceError, UsageError, reason
from hisvd_cli.utils.files.atomic import TEMPORARY
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from hisvd_cli.pipelines.conversion import Target

# Left by interrupted runs and editors.
_LEFTOVERS = [TEMPORARY, "*.part", "*.lock", ".*.partial*", "__pycache__"]
_SHOWN = 5
_LOGIN = "Set HF_TOKEN, or run 'hf auth login', with a token that has write access."


@dataclass(frozen=True)
class Hub:
    """The target on the Hub.

    Attributes:
        repo: ``OWNER/NAME``.
        private: make a new repository private; an existing one is not changed.
        revision: the branch; None for the default branch.
    """

    repo: str
    private: bool = False
    revision: str | None = None


def check_request(
    checkpoint: Path, to: Target | None, output: Path | None, hub: Hub | None
) -> None:
    """Check before any work that the arguments of ``hisvd convert`` are complete, and that the
    upload is possible.

    Raises:
        UsageError: arguments contradict each other, or the repository name is invalid.
        SourceError: the folder to upload was not written by hisvd.
        OutputError: the token is missing or rejected, or there is no network.
    """
    if (to is None) != (output is None):
        given, lacking = ("`output`", "`to`") if to is None else ("`to`", "`output`")
        raise UsageError(f"{given} without {lacking}.", f"Add {lacking}, or leave out {given}.")
    if hub is None:
        if to is None:
            raise UsageError("No target is given.", "Add `to` and `output`, or `push-to-hub`.")
        return
    if to == "pt":
        raise UsageError(
            "`push-to-hub` uploads folders, but `to` pt writes a file.",
            "Use `to` hf or `to` dense.",
        )
    if to is None:
        _check_publishable(checkpoint)
    _check_repo(hub.repo)


def _check_publishable(folder: Path) -> None:
    """Check that a folder can be uploaded. Raises SourceError: hisvd did not write it, or a weight
    file is missing."""
    if not folder.is_dir():
        raise SourceError(
            f"'{folder}' is not a folder, and only folders can be uploaded.",
            "Give a checkpoint folder, or write one with `to` hf and `output`.",
        )
    if not is_checkpoint(folder) and not (folder / PROVENANCE).is_file():
        raise SourceError(
            f"{folder} is not an hisvd checkpoint.", "Give a folder that 'hisvd compress' wrote."
        )
    open_weights(folder)


def _check_repo(repo: str) -> None:
    """Check before any work the repository name, and that the Hub accepts the token.

    Raises:
        UsageError: the repository name is invalid.
        OutputError: the token is missing or rejected, or there is no network.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"`push-to-hub={repo}` is not a valid repository name.", "Write OWNER/NAME or NAME."
        ) from error
    if not get_token():
        raise OutputError("There is no token for the Hub.", _LOGIN)
    with _hub_errors(repo):
        HfApi().whoami()


def publish(folder: Path, hub: Hub, reporter: Reporter) -> str:
    """Upload a folder in one commit, and return its URL. Repository and branch are created if they
    do not exist. Files that are not part of a model are not uploaded; a warning lists them.

    Raises:
        SourceError: see :func:`check_request`.
        OutputError: the Hub rejects the upload, or cannot be reached.
    """
    from huggingface_hub import HfApi

    _check_publishable(folder)
    files = published_files(folder)
    _warn_of_others(folder, files, reporter)
    api = HfApi()
    with _hub_errors(hub.repo):
        url = api.create_repo(hub.repo, private=hub.private or None, exist_ok=True)
        if hub.revision is not None:
            api.create_branch(url.repo_id, branch=hub.revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=hub.revision,
            allow_patterns=files,
            commit_message="Upload a model compressed with hisvd",
        )
    return f"{url}/tree/{hub.revision}" if hub.revision else str(url)


def published_files(folder: Path) -> list[str]:
    """Return the names of the files to upload: weights, other files that hisvd writes, and
    companion files of the model.

    Raises:
        SourceError: a weight file is a link to another folder, or the model needs its own code.
    """
    if is_checkpoint(folder):
        open_checkpoint(folder).refuse_own_code()
    weights = open_weights(folder).files
    for path in weights:
        if not is_own_file(path):
            raise SourceError(
                f"{path} links to a file outside its folder.", "Put the file itself there."
            )
    own = written_files()
    beside = [name for name in own if is_own_file(folder / name)]
    travelling = [path.name for path in companions(folder)]
    return sorted({*(path.name for path in weights), *beside, *travelling})


def _warn_of_others(folder: Path, files: Collection[str], reporter: Reporter) -> None:
    names = (path.name for path in folder.iterdir() if path.name not in files)
    left = sorted(n for n in names if not any(fnmatch(n, pattern) for pattern in _LEFTOVERS))
    if left:
        shown = ", ".join(left[:_SHOWN]) + f" and {len(left) - _SHOWN} more" * (len(left) > _SHOWN)
        reporter.warn(f"Not uploaded, because not part of a model: {shown}.")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into OutputError."""
    # WireError is the base error of the HTTP library that huggingface_hub uses.
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as WireError  # type: ignore[attr-defined]

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OutputError(
            "HF_HUB_OFFLINE is set, so nothing is uploaded.", "Unset it and try again."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo) from error
    except (WireError, OSError) as error:
        raise OutputError(
            f"The Hub cannot be reached: {reason(error)}", "Check the network and try again."
        ) from error


def _refusal(error: OSError, repo: str) -> OutputError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return OutputError("The Hub rejected the token.", _LOGIN)
    if status == 403:
        return OutputError(
            f"The Hub does not allow this token to write to {repo}.",
            "Check the owner's name, and use a token with write access to it.",
        )
    return OutputError(
        f"The Hub rejected {repo} ({status}): {reason(error)}", "Check the name and try again."
    )
