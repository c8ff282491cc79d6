"""Repositories of the Hub: download a checkpoint, upload a folder. What goes wrong ends in an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HubError
from .header import CONFIG_NAME, described_config, read_description


def download(repo_id: str, **options: Any) -> Path:
    """The folder in the cache with config.json and weights of a repository, both of one commit.

    Args:
        repo_id: "user/name".
        **options: revision, cache_dir, token, local_files_only of huggingface_hub.

    Raises:
        HubError: not found, not allowed, not reached. CheckpointError: the repository holds no DAQ checkpoint; its weights
        are not downloaded then.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    with explained(repo_id):
        directory = Path(hf_hub_download(repo_id, CONFIG_NAME, **options)).parent
        described_config(read_description(directory), f"{CONFIG_NAME} of {repo_id}")
        patterns = ["model*.safetensors*", "*.json"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options | {"revision": directory.name}))


def remote_headers(
    repo_id: str, **options: Any
) -> tuple[Path, dict[str, tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]]]:
    """The folder with config.json of a repository, and file -> (metadata, tensors) of its weights files, of which only the
    headers are asked for.

    Args:
        **options: revision, token of huggingface_hub.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with explained(repo_id):
        folder = Path(hf_hub_download(repo_id, CONFIG_NAME, **options)).parent
        described_config(read_description(folder), f"{CONFIG_NAME} of {repo_id}")
        try:
            found = HfApi().get_safetensors_metadata(repo_id, revision=folder.name, token=options.get("token"))
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"{repo_id} has no whole safetensors file: {error}") from error
    return folder, {
        name: (file.metadata or {}, {key: (info.dtype, tuple(info.shape)) for key, info in file.tensors.items()})
        for name, file in found.files_metadata.items()
    }


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_repository(name: object) -> bool:
    """Whether this may be the name of a repository, such as "user/name"."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub's client as a `HubError` that says what to do."""
    from huggingface_hub import errors

    connection_error: Any = vars(errors)["HTTPError"]  # of httpx, in one major version or another
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository such as 'user/name': {error}") from error
    except errors.GatedRepoError as error:
        raise HubError(f"{repo_id} is gated: ask for access on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is not there, or is private and your token may not see it; `hf auth login`, or pass token=..."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} is not in the cache, and the Hub was not reached: HF_HUB_OFFLINE or local_files_only is set, or "
            "there is no connection"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{repo_id} lacks a file, so it is no checkpoint of hf_daq: {error}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (errors.OfflineModeIsEnabled, connection_error, ConnectionError) as error:
        raise HubError(f"the Hub was not reached for {repo_id}: {error}") from error
    except RuntimeError as error:  # of an upload of one large file
        if not isinstance(error.__cause__, (connection_error, OSError)):
            raise
        raise HubError(
            f"the upload to {repo_id} was interrupted, and nothing in it has changed; try again: {error.__cause__}"
        ) from error


def _refusal(repo_id: str, error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hub does not know this token ({repo_id}): `hf auth login`, or pass token=..."
    if status == 403:
        return f"this token may not write to {repo_id}: take a repository of your own, or create_pr=True"
    return f"the Hub refused {repo_id}: {error}"
