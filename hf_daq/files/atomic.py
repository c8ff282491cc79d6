"""Files and folders that take their place only when they are whole."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # without a variant
PROBE_NAME = "probe.safetensors"  # inputs, and what the model beside them gives for these


def replace_file(target: Path, write_to: Callable[[Path], Any]) -> None:
    """Let `write_to` write a temporary file beside `target`, then rename it to `target`."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    try:
        write_to(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def temporary_folder(directory: Path) -> Iterator[Path]:
    """A folder whose files take their places in `directory` at the end, weights before config.json; if something is raised,
    `directory` stays as it was."""
    existed = directory.exists()
    if existed and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; give a folder to save to")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
            yield Path(temporary)
            written = {path.name for path in Path(temporary).iterdir()}
            for name in sorted(written, reverse=True):
                os.replace(Path(temporary) / name, directory / name)
    except BaseException:
        if not existed and not any(directory.iterdir()):
            directory.rmdir()
        raise
    for path in outdated(directory, written):
        path.unlink()


def outdated(directory: Path, written: Iterable[str]) -> list[Path]:
    """Files in `directory` that weights files with these names replace: shards of a larger model, or what shards replace, and outputs
    of other weights."""
    names = set(written)
    if not any(map(_WEIGHTS.fullmatch, names)):
        return []
    others = (path for path in directory.iterdir() if path.name not in names)
    return [path for path in others if _WEIGHTS.fullmatch(path.name) or path.name == PROBE_NAME]
