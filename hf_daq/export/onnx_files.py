"""ONNX files on the disk. One file holds 2 GiB; of larger models the tensors are in a second one beside it, `NAME.onnx.data`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.atomic import replace_file

LARGEST_FILE = 2**31 - 2**20
_SMALL_TENSOR = 1024


def size_of(proto: Any) -> int:
    """Bytes, without the graph where it is large."""
    tensors = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    return tensors if tensors > LARGEST_FILE else int(proto.ByteSize())


def write_file(proto: Any, path: Path) -> int:
    """Write a model, and return how many bytes it takes on the disk. The tensors of a large one are taken out of `proto`."""
    if size_of(proto) <= LARGEST_FILE:
        contents = proto.SerializeToString()
        replace_file(path, lambda temporary: temporary.write_bytes(contents))
        return len(contents)
    import onnx

    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
        _save(proto, Path(folder) / path.name)
        onnx.checker.check_model(Path(folder) / path.name)
        files = [f"{path.name}.data", path.name]
        for name in files:
            os.replace(Path(folder) / name, path.with_name(name))
    return sum(path.with_name(name).stat().st_size for name in files)


def _save(proto: Any, path: Path) -> None:
    import onnx

    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": _SMALL_TENSOR}
    onnx.save_model(proto, path, **options)


@contextmanager
def readable(proto: Any) -> Iterator[bytes | str]:
    """What runtimes open: the bytes, or the path of a large model, which lasts until the end."""
    if size_of(proto) <= LARGEST_FILE:
        yield proto.SerializeToString()
        return
    copy = type(proto)()
    copy.CopyFrom(proto)
    with tempfile.TemporaryDirectory() as folder:
        _save(copy, Path(folder) / "model.onnx")
        yield str(Path(folder) / "model.onnx")
