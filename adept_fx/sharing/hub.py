"""Saved exits on the Hub, by way of ``huggingface_hub``."""

import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from adept_fx.errors import CheckpointError
from adept_fx.sharing.names import CARD, CONFIG, TENSORS
from adept_fx.sharing.writing import files_of


def push_to_hub(
    ee: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload early exits",
    create_pr: bool = False,
) -> str:
    """Uploads what :func:`adept_fx.save` writes, in one commit.

    A card that the repository has already is replaced only if this library wrote it.

    Args:
        ee: A rewritten model.
        repo_id: Repository ``owner/name``; made if it is not there.
        private: Whether a new repository is private.
        token: For the Hub.
        revision: Branch to commit to.
        commit_message: Of the commit.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: As :func:`adept_fx.save`, before anything is uploaded. Errors of the Hub are
            those of ``huggingface_hub``.
        UnsupportedModelError: ``ee`` was not transformed.
    """
    files = files_of(ee, place=repo_id)
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _branch(api, repo_id, revision)
    with tempfile.TemporaryDirectory() as folder:
        _keep_card(api, repo_id, revision, folder)
        files.write(folder)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def fetch(repo_id: str, revision: str | None, token: bool | str | None) -> Path:
    """Downloads saved exits; returns the folder that they are in.

    Raises:
        CheckpointError: There is no such folder and no such repository, or it cannot be had.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=[CONFIG, TENSORS]
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{repo_id!r} is no folder here, and cannot be fetched from the Hub: {said[0]}",
            hint="give the folder that adept_fx.save wrote, or a repository owner/name",
        ) from error
    return Path(folder)


def upload(folder: str, names: list[str], options: dict[str, Any]) -> None:
    """Uploads some of a folder's files in one commit, as ``save_pretrained`` of transformers does.

    Args:
        folder: Where they are.
        names: Which.
        options: What the caller gave ``save_pretrained`` for this: ``repo_id``,
            ``commit_message``, ``create_pr``, and arguments of ``HfApi.create_repo``.
    """
    options = dict(options)
    repo_id = options.pop("repo_id", Path(folder).name)
    message = options.pop("commit_message", None) or "Upload model with early exits"
    create_pr = options.pop("create_pr", False)
    api = huggingface_hub.HfApi(token=options.get("token"))
    repo_id = api.create_repo(repo_id, exist_ok=True, **options).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        commit_message=message,
        create_pr=create_pr,
    )


def _branch(api: Any, repo_id: str, revision: str | None) -> None:
    # A commit does not make its branch.
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _keep_card(api: Any, repo_id: str, revision: str | None, folder: str) -> None:
    """Copies the repository's card to where ours would go: one of a user's own stays."""
    if api.file_exists(repo_id, CARD, revision=revision):
        there = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
        (Path(folder) / CARD).write_bytes(there.read_bytes())
