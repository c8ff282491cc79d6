"""Memory of large tensors, used again by the next ones."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_REUSED = 2**28  # bytes: larger blocks come from the system and go back to it
_USUAL = 2**25  # what glibc comes to by itself
_lock = Lock()
_inside = 0


@contextmanager
def memory_reused() -> Iterator[None]:
    """Inside, glibc keeps freed blocks of up to 256 MiB. It gives those over 32 MiB back to the system, which hands every page
    out anew: forwards of images on a CPU can take three times as long. Nothing happens where malloc is another one or is
    set up by environment variables."""
    malloc = _glibc()
    if malloc is None:
        yield
        return
    _count(malloc, 1)
    try:
        yield
    finally:
        _count(malloc, -1)


def _glibc() -> Any:
    """The C library, where it is glibc with malloc as it comes."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    library = ctypes.CDLL(None)
    return (
        library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    )


def _count(malloc: Any, change: int) -> None:
    """Of those inside; the first one and the last one change malloc."""
    global _inside
    with _lock:
        before, _inside = _inside, _inside + change
        if before and _inside:
            return
        malloc.mallopt(_MMAP_THRESHOLD, _REUSED if _inside else _USUAL)
        malloc.mallopt(_TRIM_THRESHOLD, 2**31 - 1 if _inside else 2 * _USUAL)
        if not _inside:
            malloc.malloc_trim(0)
