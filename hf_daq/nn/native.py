"""The machine code of native.cpp and integers.cpp: compiled when it is first needed, and kept in the user's folder of caches.

What is loaded runs with the rights of the user, so the folder and the file must be their own, and writable by nobody else;
the file ends with a hash of what was written. Without such a folder a temporary one serves, and each process compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from .kernels import available, compiler, say

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "integers.cpp"))
_HEADER = Path(__file__).with_name("vectors.h")  # of both
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_MACHINE = (
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)  # the first that the compiler takes
_HASH = hashlib.sha256().digest_size

_whole, _number, _real, _address = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_STREAM, _SCALE = (_address, _whole, _number), (_real, _address, _whole, _whole)
_FUNCTIONS = {
    "daq_linear": (*_STREAM, *_SCALE, _whole, _whole, _whole, _address, _whole, _address, _address, _number, _number),
    "daq_weights": (*_STREAM, *_SCALE, _whole, _whole, _whole, _whole, _address, _number, _number),
    "daq_read_codes": (*_STREAM, _address, _whole),
    "daq_write_codes": (_address, _number, _address, _whole),
    "daq_block": (),
    "daq_pairs": (),
    "daq_whole": (_address, _address),
    "daq_start": (_address, _number, *[_whole] * 4, _address, _address, *[_real] * 5, _address, _address, _number),
}


@cache
def library() -> ctypes.CDLL | None:
    """The functions of both; None where they cannot be compiled: on Windows, without a compiler, with
    `HF_DAQ_COMPILE=0`."""
    found = compiler() if available("cpu") else None
    if found is None:
        return None
    reason = ""
    for machine in _MACHINE:
        try:
            return _declared(_built(found, (*_FLAGS, *machine)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or _reason(error)
    say(f"packed layers are slower, as their kernel cannot be compiled: {reason}")
    return None


def _reason(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or b"").decode(errors="replace") or str(error)
    return next((line for line in text.splitlines() if "error" in line), text.strip().partition("\n")[0])


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _FUNCTIONS.items():
        getattr(functions, name).argtypes = arguments
    return functions


def _built(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """From the cache, or compiled. Raises what the compiler, the system or the loader says."""
    # The macros name the version of the compiler and all that this processor has.
    macros = _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    sources = (source.read_bytes() for source in (_HEADER, *SOURCES))
    name = hashlib.sha256(b"\0".join([*sources, macros, repr(flags).encode()])).hexdigest() + ".so"
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(_compiled(compiler, flags, Path(temporary), name)))
    path = folder / name
    if _is_ours(path) and _is_whole(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # of another system, in a folder that is shared
            pass
    return ctypes.CDLL(str(_compiled(compiler, flags, folder, name)))


def _compiled(compiler: str, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile to a name of this process, then put it in place: others see the whole file or none."""
    say("compiling the kernel of packed layers: some seconds, once; HF_DAQ_COMPILE=0 does without")
    handle, draft = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        _run([compiler, *flags, *map(str, SOURCES), "-o", draft])
        with open(draft, "ab+") as file:
            file.seek(0)
            file.write(hashlib.sha256(file.read()).digest())
        os.chmod(draft, 0o700)
        os.replace(draft, folder / name)
    finally:
        Path(draft).unlink(missing_ok=True)
    return folder / name


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL).stdout


def cache_folder() -> Path | None:
    """Of this user alone, made where there is none; None if others could write to it, or it cannot be made."""
    try:
        usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        root = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (root if root.is_absolute() else usual) / "hf_daq"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft, probe = tempfile.mkstemp(dir=folder)
        os.close(draft)
        os.unlink(probe)
    except (OSError, RuntimeError):  # read-only, full, or no home
        return None
    return folder if _is_ours(folder) else None


def _is_ours(path: Path) -> bool:
    """Whether this is a file or folder, no link, that nobody but this user can change."""
    try:
        found = path.lstat()
    except OSError:
        return False
    real = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return real and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(path: Path) -> bool:
    """Whether the file is what was written: loading a part of one ends the process."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-_HASH]).digest() == content[-_HASH:]
