"""A checkpoint folder to the Hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..version import __version__
from .card import is_edited, logger, read_card, render
from .header import CARD_NAME
from .hub import explained
from .inspect import inspect


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    overwrite_card: bool = False,
) -> Any:
    """Upload a checkpoint folder as one commit. Its card is written for this repository. An edited card in the folder is
    uploaded as it is; an edited card in the repository stays, with a warning, unless `overwrite_card`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        CheckpointError: no checkpoint of hf_daq. HubError: not allowed, not reached, interrupted.
    """
    inspection = inspect(folder)
    repo_id = create_repository(repo_id, private, None if create_pr else revision, token)
    own = read_card(folder)
    there = remote_card(repo_id, revision, token)
    card: str | None
    if own is not None and is_edited(own):
        card = own
    else:
        base, known = inspection.facts.base_model, inspection.facts.license
        card = render(inspection, repo_id, license_of(base, token) if base and not known else None)
    if there is not None and there != card and is_edited(there) and not overwrite_card:
        logger.warning(
            "the model card of %s was edited, so it is not replaced; pass overwrite_card=True to replace it", repo_id
        )
        card = None
    return upload(
        folder,
        repo_id,
        card=card,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
        commit_description=commit_description,
    )


_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.png", "*.onnx", "LICENSE*")


_LEFT_OUT = ("trainer_state.json", ".*")


def remote_card(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """README.md of a repository; None where there is none, or no repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with explained(repo_id):
        try:
            path = hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
    return Path(path).read_text(encoding="utf-8", errors="surrogateescape")


def license_of(repo_id: str, token: str | bool | None = None) -> str | None:
    """The license in the card of a repository; None where it is not known."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = model_info(repo_id, token=token).card_data
    except (HfHubHTTPError, OSError):
        return None
    found = data.get("license") if data else None
    return found if isinstance(found, str) else None


def create_repository(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Create a repository and a branch, unless they are there. Returns the full name."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="hf_daq", library_version=__version__)
    with explained(repo_id):
        full_name = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full_name, branch=revision, exist_ok=True)
    return full_name


def upload(
    folder: Path,
    repo_id: str,
    *,
    card: str | None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Upload the files of a checkpoint folder as one commit: an interrupted upload changes nothing in the repository.

    Weights that the repository has from before, and the folder has not, are deleted. Subfolders, pickles and what training
    leaves are not uploaded.

    Args:
        card: content of README.md; None leaves that of the repository.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="hf_daq", library_version=__version__)
    files = [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CARD_NAME and _is_shared(path)
    ]
    operations: list[Any] = [CommitOperationAdd(path.name, str(path)) for path in files]
    if card is not None:
        operations.append(CommitOperationAdd(CARD_NAME, card.encode(errors="surrogateescape")))
    with explained(repo_id):
        names = {path.name for path in files}
        there = api.list_repo_files(repo_id, revision=revision)
        old = [name for name in there if Path(name).match("*.safetensors*") and "/" not in name and name not in names]
        operations += [CommitOperationDelete(name) for name in old]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload model quantized with hf_daq",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _is_shared(path: Path) -> bool:
    return any(map(path.match, _PATTERNS)) and not any(map(path.match, _LEFT_OUT))
