"""A small Hub on loopback: it answers what huggingface_hub sends over HTTP, so that uploads and downloads are tested for real.

New processes find it by `hub.environment(home)`; the fixture `hub` also connects this process (`connect`). Files are sent
by Git LFS, not by Xet. Models only. Everything lives in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_protocol import Handler, RefusalError
from hub_repository import File, Repository, is_lfs


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away
            super().handle_error(request, client_address)


class LoopbackHub:
    """A Hub with one user and one token, on a free port of 127.0.0.1, from `with` to its end.

    Attributes:
        endpoint: the address, for HF_ENDPOINT.
        requests: (method, path) of every request so far, without queries.
        problems: tracebacks of errors within this server; a test should find none.
    """

    def __init__(self, token: str = "hf_test_loopback", user: str = "user") -> None:
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.tampered: dict[tuple[str, str], bytes] = {}
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self._secret = secrets.token_hex()
        self._cuts: list[int] = []
        self._failures: list[tuple[int, str]] = []

    def __enter__(self) -> LoopbackHub:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)  # seconds
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on the Hub cannot be reached."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self.connections):  # kept alive by clients
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def owns(self, repo: str) -> bool:
        return repo.split("/")[0] == self.user

    def sign(self, repo: str, oid: str, size: int) -> str:
        return hashlib.sha256(f"{self._secret} {repo} {oid} {size}".encode()).hexdigest()

    def put(self, repo: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Adds files to `main` of a repository of any user, made if there is none. Returns the commit.

        private, gated: of a new repository.
        """
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(repo, private, gated))
            made = {path: File(content, is_lfs(path, len(content), content[:512])) for path, content in files.items()}
            repository.objects |= {file.sha256: file.content for file in made.values() if file.lfs}
            return repository.commit("main", repository.commits[repository.heads["main"]] | made, "put")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file at a branch, a commit or refs/pr/N."""
        repository = self.repositories[repo]
        snapshot = repository.commits[repository.heads.get(revision, revision)]
        return {path: file.content for path, file in snapshot.items()}

    def tamper(self, repo: str, path: str, content: bytes) -> None:
        """From now on downloads of this file give `content`, under the old size and hash."""
        self.tampered[repo, path] = content

    def break_after(self, size: int, times: int = 1) -> None:
        """The next uploads to LFS lose their connection after `size` bytes. The client tries up to 6 times."""
        self._cuts += [size] * times

    def next_cut(self) -> int | None:
        with self.lock:
            return self._cuts.pop(0) if self._cuts else None

    def fail(self, status: int = 500, times: int = 1, path: str = "") -> None:
        """The next requests whose path has the regular expression `path` in it are answered by `status`.

        The client tries again after 408, 429 and 500 to 504, and gives up at once after another status, as 400.
        """
        self._failures += [(status, path)] * times

    def raise_next_failure(self, path: str) -> None:
        for failure in self._failures:
            if re.search(failure[1], path):
                self._failures.remove(failure)
                raise RefusalError(failure[0], "A failure on demand")

    def environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """What a new process needs beside `os.environ` to use this server, with its cache in the folder `home`."""
        on = ["HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"]
        on += ["HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION"]
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **dict.fromkeys(on, "1"),
        }


def connect(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connects huggingface_hub, and with it timm and transformers, in this process; call it again for an empty cache.

    What copied the address when it was imported, as `datasets.config`, stays as it was: use a new process for it.
    Offline from here on: `monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)`.
    """
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, name, True)
    paths = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens"}
    for name, folder in paths.items():
        monkeypatch.setattr(constants, name, str(home / folder))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made at the first use, with the address of then
    for repeating in (_http.http_backoff, _http.http_stream_backoff):
        monkeypatch.setitem(_defaults(repeating), "base_wait_time", 0.01)  # seconds between tries, instead of 1 to 8
        monkeypatch.setitem(_defaults(repeating), "max_wait_time", 0.01)


def _defaults(function: Any) -> dict[str, Any]:
    found: dict[str, Any] = getattr(function, "__wrapped__", function).__kwdefaults__
    return found


@pytest.fixture(name="hub")
def connected_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub of this test alone, to which this process is connected, with an empty cache in `tmp_path / "home"`."""
    from huggingface_hub import close_session

    with LoopbackHub() as server:
        connect(server, tmp_path / "home", monkeypatch)
        warnings.filterwarnings("ignore", "Use 'content=<...>'", DeprecationWarning)  # of huggingface_hub, for LFS
        close_session()
        yield server
        close_session()
    assert not server.problems, "\n".join(server.problems)
