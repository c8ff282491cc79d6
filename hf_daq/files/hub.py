"""Repositories of the Hub: download a checkpoint, upload a folder. What goes wrong ends in an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HubError
from ..version import __version__
from .header import CONFIG_NAME, described_config, read_description

CARD_NAME = "README.md"
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.png", "*.onnx", "LICENSE*")
_LEFT_OUT = ("trainer_state.json", ".*")


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


def licence_of(repo_id: str, token: str | bool | None = None) -> str | None:
    """The licence in the card of a repository; None where it is not known."""
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
