"""The requests of huggingface_hub, and how the Hub answers them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import File, Repository, check_card, front_matter, is_lfs

if TYPE_CHECKING:
    from hub_server import LoopbackHub

_DATE = "2026-01-01T00:00:00.000Z"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


@dataclass
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]


class RefusalError(Exception):
    """An answer that is an error. `code`: X-Error-Code, by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, more: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = in_json({"error": message, **(more or {})}, status, {"X-Error-Message": message})
        if code:
            self.answer.headers["X-Error-Code"] = code


class CutError(Exception):
    """The connection is to be closed without an answer."""


def in_json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Paths are matched as they were sent, so a slash in a revision is still %2F."""
    kinds = {"repo": "[^/]+(?:/[^/]+)?", "revision": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}
    regex = re.compile(re.sub(r"{(\w+)}", lambda found: f"(?P<{found[1]}>{kinds[found[1]]})", pattern))

    def register(answer: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, regex, answer))
        return answer

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            self.body = b"".join(self._receive(self.hub.next_cut() if self.command == "PUT" else None))
            with self.hub.lock:
                self.hub.raise_next_failure(unquote(url.path))
                answer = self._find(url.path)()
        except RefusalError as refusal:
            answer = refusal.answer
        except (CutError, ConnectionError):
            self.close_connection = True
            return
        except Exception:
            self.hub.problems.append(traceback.format_exc())
            answer = in_json({"error": traceback.format_exc()}, 500)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _receive(self, limit: int | None) -> Iterator[bytes]:
        """The parts of the body. Raises CutError after `limit` bytes."""
        for size in self._sizes():
            if limit is not None and size > limit:
                self.rfile.read(limit)
                raise CutError
            limit = None if limit is None else limit - size
            part = self.rfile.read(size)
            if len(part) < size:
                raise CutError
            yield part

    def _sizes(self) -> Iterator[int]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield int(self.headers.get("Content-Length", 0))
            return
        while line := self.rfile.readline().strip():
            size = int(line, 16)
            yield size
            self.rfile.readline()
            if size == 0:
                return
        raise CutError

    def _find(self, path: str) -> Callable[[], Answer]:
        method = "GET" if self.command == "HEAD" else self.command
        for known, regex, answer in _ROUTES:
            if known == method and (found := regex.fullmatch(path)):
                given = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                return lambda: answer(self, **given)
        raise RefusalError(404, f"Not found: {self.command} {path}")

    def _is_user(self) -> bool:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _repository(self, name: str) -> Repository:
        known, repository = self._is_user(), self.hub.repositories.get(name)
        if repository is None or (repository.private and not (known and self.hub.owns(name))):
            status, message = (404, "Repository not found") if known else (401, "Invalid username or password.")
            raise RefusalError(status, message, "RepoNotFound")
        return repository

    def _writable(self, name: str, revision: str | None = None) -> Repository:
        """The repository, if the user may write to this revision; to pull requests every user may."""
        repository = self._repository(name)
        if not self._is_user():
            raise RefusalError(401, "Invalid username or password.")
        request = revision is None or revision.startswith("refs/pr/") or self.query.get("create_pr") == "1"
        if not self.hub.owns(name) and not request:
            raise RefusalError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def _snapshot(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        sha = repository.heads.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in repository.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        if not self._is_user():
            raise RefusalError(401, "Invalid username or password.")
        access = {"displayName": "test", "role": "write"}
        return in_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": access}})

    @route("POST", "/api/repos/create")
    def create(self) -> Answer:
        asked = json.loads(self.body)
        if not self._is_user():
            raise RefusalError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if not self.hub.owns(name):
            space = name.split("/")[0]
            raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{space}"')
        if name in self.hub.repositories:
            raise RefusalError(409, "You already created this model repo", more={"url": url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(name, private)
        return in_json({"url": url, "name": name})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> Answer:
        errors, concerns = check_card(json.loads(self.body)["content"])
        found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in concerns]}
        return in_json(found, 400 if errors else 200)

    @route("GET", "/api/models/{repo}/revision/{revision}")
    @route("GET", "/api/models/{repo}")
    def info(self, repo: str, revision: str = "main") -> Answer:
        repository = self._repository(repo)
        sha, files = self._snapshot(repository, revision)
        data = (front_matter(files["README.md"].content.decode()) or {}) if "README.md" in files else {}
        facts = [data[key] for key in ("library_name", "pipeline_tag") if key in data]
        tags = [*facts, *(data.get("tags") or []), *([f"license:{data['license']}"] if "license" in data else [])]
        sized = bool(self.query.get("blobs"))
        siblings = [
            {"rfilename": path} | ({"size": len(files[path].content)} if sized else {}) for path in sorted(files)
        ]
        described = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": sha, "cardData": data}
        described |= {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
        described |= {
            "siblings": siblings,
            "tags": list(dict.fromkeys(tags)),
            "createdAt": _DATE,
            "lastModified": _DATE,
        }
        return in_json(described | {key: data[key] for key in ("library_name", "pipeline_tag") if key in data})

    @route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
    def tree(self, repo: str, revision: str, path: str = "") -> Answer:
        _, files = self._snapshot(self._repository(repo), revision)
        inside = {name: file for name, file in files.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise RefusalError(404, f"{path} does not exist", "EntryNotFound")
        folders = {str(folder) for name in inside for folder in Path(name).parents} - {".", path}
        listed: list[dict[str, Any]] = [
            *({"type": "directory", "path": one, "oid": "0" * 40, "size": 0} for one in sorted(folders))
        ]
        listed += [file.describe(name) for name, file in sorted(inside.items())]
        if self.query.get("recursive") != "true":
            listed = [one for one in listed if str(Path(one["path"]).parent) == (path or ".")]
        return in_json(listed)

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, repo: str, revision: str) -> Answer:
        _, files = self._snapshot(self._repository(repo), revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return in_json([files[path].describe(path) for path in paths if path in files])

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo: str) -> Answer:
        heads = self._repository(repo).heads
        requests = [
            {"name": name, "ref": name, "targetCommit": heads[name]} for name in heads if name.startswith("refs/")
        ]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": heads[name]}
            for name in heads
            if not name.startswith("refs/")
        ]
        return in_json({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})

    @route("POST", "/api/models/{repo}/branch/{revision}")
    def branch(self, repo: str, revision: str) -> Answer:
        if revision.startswith("refs/"):
            raise RefusalError(400, f"Invalid reference for a branch: {revision}")
        repository = self._writable(repo, revision)
        if revision in repository.heads:
            raise RefusalError(409, f"Reference already exists: refs/heads/{revision}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.heads[revision] = self._snapshot(repository, start)[0]
        return in_json({})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, repo: str, revision: str) -> Answer:
        _, files = self._snapshot(self._writable(repo, revision), revision)
        answered = []
        for file in json.loads(self.body)["files"]:
            path, there = file["path"], files.get(file["path"])
            mode = "lfs" if is_lfs(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            oid = there and (there.sha256 if there.lfs else there.oid)
            answered.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return in_json({"files": answered})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def batch(self, repo: str) -> Answer:
        asked = json.loads(self.body)
        repository = self._writable(repo, asked.get("ref", {}).get("name"))
        answered = []
        for wanted in asked["objects"]:
            answered.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repository.objects:
                signature = self.hub.sign(repo, wanted["oid"], wanted["size"])
                upload = (
                    f"{self.hub.endpoint}/storage/{repo}/{wanted['oid']}?size={wanted['size']}&signature={signature}"
                )
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"
                answered[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return in_json({"transfer": "basic", "objects": answered})

    @route("PUT", "/storage/{repo}/{oid}")
    def store(self, repo: str, oid: str) -> Answer:
        size = int(self.query["size"])
        if self.query["signature"] != self.hub.sign(repo, oid, size):  # the client sends no token to a storage
            raise RefusalError(403, "The request signature does not match")
        if len(self.body) != size or hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(
                400, f"Not the object that was announced: {len(self.body)} bytes, announced {size}, {oid}"
            )
        self.hub.repositories[repo].objects[oid] = self.body
        return Answer(200, b"", {"ETag": f'"{oid}"'})

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def verify(self, repo: str) -> Answer:
        asked, objects = json.loads(self.body), self._repository(repo).objects
        if len(objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusalError(404, f"No such object: {asked['oid']}")
        return in_json({})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, repo: str, revision: str) -> Answer:
        repository = self._writable(repo, revision)
        parent, files = self._snapshot(repository, revision)
        if revision not in repository.heads:
            raise RefusalError(400, f"Commits go to branches and pull requests, not to {revision}")
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        if not parent.startswith(header["value"].get("parentCommit", "")):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for change in changes:
            self._change(repository, files, change["key"], change["value"])
        ref, more = revision, dict[str, Any]()
        if self.query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.heads)
            ref, more = f"refs/pr/{number}", {"pullRequestNum": number}
            more["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
            repository.heads[ref] = parent
        sha = repository.commit(ref, files, header["value"]["summary"])
        return in_json(
            {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", **more}
        )

    def _change(self, repository: Repository, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
            if path == "README.md" and (errors := check_card(files[path].content.decode())[0]):
                raise RefusalError(400, f"Invalid metadata in README.md: {errors}")
        elif kind == "lfsFile":
            if value["oid"] not in repository.objects:
                raise RefusalError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(repository.objects[value["oid"]], lfs=True)
        elif kind in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (kind == "deletedFolder" and name.startswith(path))]
            if not gone:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusalError(400, f"Unknown operation: {kind}")

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        repository = self._repository(repo)
        if repository.gated and not (self._is_user() and self.hub.owns(repo)):
            raise RefusalError(403 if self._is_user() else 401, f"Access to model {repo} is restricted", "GatedRepo")
        sha, files = self._snapshot(repository, revision)
        if path not in files:
            refusal = RefusalError(404, "Entry not found", "EntryNotFound")
            refusal.answer.headers["X-Repo-Commit"] = sha
            raise refusal
        file = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        headers["ETag"] = f'"{file.sha256 if file.lfs else file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        content = file.content if self.command == "HEAD" else self.hub.tampered.get((repo, path), file.content)
        return self._part(content, headers)

    def _part(self, content: bytes, headers: dict[str, str]) -> Answer:
        """What the header `Range` asks for, or everything."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-":
            return Answer(200, content, headers)
        start = int(asked[1]) if asked[1] else max(len(content) - int(asked[2]), 0)
        stop = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
        if start >= stop:
            return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        return Answer(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
