"""What the Hub of the tests keeps: files, commits, branches, and the rules for the metadata of README.md."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def oid(self) -> str:
        """Of the git blob, which is a pointer for files of LFS."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        described = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return described | ({"lfs": lfs} if self.lfs else {})


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file in LFS; `sample`: its first bytes."""
    try:
        binary = "\0" in codecs.getincrementaldecoder("utf-8")().decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        binary = True
    return size > 0 and (path.endswith(".safetensors") or size > 1_000_000 or binary)


@dataclass
class Repository:
    name: str
    private: bool = False
    gated: bool = False
    heads: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": File(_ATTRIBUTES, lfs=False)}, "initial commit")

    def commit(self, ref: str, files: dict[str, File], title: str) -> str:
        tree = [(path, file.oid) for path, file in sorted(files.items())]
        written = json.dumps([self.name, self.heads.get(ref), title, tree])
        sha = hashlib.sha1(written.encode()).hexdigest()
        self.commits[sha], self.heads[ref] = dict(files), sha
        return sha


def front_matter(card: str) -> Any:
    """The YAML block at the head of a README.md; None if there is none. Raises yaml.YAMLError."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(block[1]) if block else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the metadata of a README.md."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    words = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(data.get(key, ""), str)]
    errors = [f'"{key}" must be a string' for key in words]
    tags, index = data.get("tags") or [], data.get("model-index") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    if not isinstance(index, list) or not all(
        isinstance(one, dict) and {"name", "results"} <= one.keys() for one in index
    ):
        errors.append('"model-index" must be an array of objects with "name" and "results"')
    return errors, []
