"""A checkpoint folder to the Hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import hub
from .card import is_edited, logger, read_card, render
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
    """Upload a checkpoint folder as one commit. Its card is written anew, for this repository; an edited one in the folder
    is uploaded as it is, and an edited one in the repository is kept, with a warning, unless `overwrite_card`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        CheckpointError: no checkpoint of hf_daq. HubError: not allowed, not reached, interrupted.
    """
    inspection = inspect(folder)
    repo_id = hub.create_repository(repo_id, private, None if create_pr else revision, token)
    own = read_card(folder)
    there = hub.remote_card(repo_id, revision, token)
    card: str | None
    if own is not None and is_edited(own):
        card = own
    else:
        base, known = inspection.facts.base_model, inspection.facts.license
        card = render(inspection, repo_id, hub.licence_of(base, token) if base and not known else None)
    if there is not None and there != card and is_edited(there) and not overwrite_card:
        logger.warning(
            "the model card of %s was edited, so it is kept; pass overwrite_card=True to replace it", repo_id
        )
        card = None
    return hub.upload(
        folder,
        repo_id,
        card=card,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
        commit_description=commit_description,
    )
