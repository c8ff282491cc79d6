"""Where machine code is kept, and what is loaded from there."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_daq.nn import native
from hf_daq.nn.kernels import compiler

pytestmark = pytest.mark.skipif(compiler() is None or os.name == "nt", reason="no compiler of C++")
SMALL = 'extern "C" { int daq_linear() { return 7; } int daq_weights() { return 7; } int daq_read_codes() { return 7; } int daq_write_codes() { return 7; } int daq_start() { return 7; } int daq_block() { return 7; } int daq_pairs() { return 7; } int daq_whole() { return 7; } }'


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """The compiler's calls, of a source that compiles at once; the cache is in the test's folder."""
    source, calls, run = tmp_path / "native.cpp", [], native._run
    source.write_text(SMALL)

    def counted(command):
        calls.extend(["compiled"] if str(source) in command else [])
        return run(command)

    monkeypatch.setattr(native, "SOURCES", (source,))
    monkeypatch.setattr(native, "_run", counted)
    monkeypatch.setattr(native, "available", lambda device: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def load():
    functions = native.library.__wrapped__()
    assert functions.daq_read_codes(None, 0, 1, None, 0) == 7
    return functions


def files(tmp_path):
    return list((tmp_path / "cache" / "hf_daq").iterdir())


def test_the_second_process_compiles_nothing_and_another_source_is_another_file(compiled, tmp_path):
    load()
    load()
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
    assert compiled == ["compiled"]
    native.SOURCES[0].write_text(SMALL + "\n")
    load()
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "empty", "no library", "writable", "link"])
def test_a_file_that_is_not_whole_or_not_ours_is_compiled_again(compiled, monkeypatch, tmp_path, damage):
    load()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.rename(tmp_path / "another name")  # the system would give what it loaded under this one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other" / "cache"))
    path = native.cache_folder() / path.name
    if damage == "no library":  # but whole: of a machine with another system
        path.write_bytes(b"text" + native.hashlib.sha256(b"text").digest())
    else:
        path.write_bytes(
            {
                "shorter": content[: len(content) // 2],
                "empty": b"",
                "other bytes": content[:200] + b"x" * 200 + content[400:],
            }.get(damage, content)
        )
    path.chmod(0o722 if damage == "writable" else 0o700)
    if damage == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    load()
    assert compiled == ["compiled"] * 2
    assert list(path.parent.iterdir()) == [path]
    assert native._is_ours(path)
    assert native._is_whole(path)


@pytest.mark.parametrize("place", ["writable", "link", "file", "no home"])
def test_without_a_folder_of_ones_own_nothing_is_kept(compiled, tmp_path, monkeypatch, place):
    folder = tmp_path / "cache" / "hf_daq"
    folder.parent.mkdir()
    if place == "writable":
        folder.mkdir()
        folder.chmod(0o770)
    elif place == "link":
        (tmp_path / "others").mkdir(0o700)
        folder.symlink_to(tmp_path / "others")
    elif place == "file":
        folder.touch()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/dev/null")
    assert native.cache_folder() is None
    load()
    load()
    assert compiled == ["compiled"] * 2
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_of_somebody_else_is_not_used(monkeypatch, tmp_path):
    assert native.cache_folder() == tmp_path / "cache" / "hf_daq"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert native.cache_folder() is None


def test_many_that_compile_at_once_leave_one_whole_file(tmp_path):
    code = "import sys; from pathlib import Path; from hf_daq.nn import native; native.SOURCES = (Path(sys.argv[1]),); native.library().daq_read_codes"
    environment = os.environ | {"HF_DAQ_COMPILE": "1"}

    def start(_):
        return subprocess.run(
            [sys.executable, "-c", code, str(native.SOURCES[0])], env=environment, capture_output=True, text=True
        )

    with ThreadPoolExecutor() as pool:
        for done in pool.map(start, range(2)):
            assert done.returncode == 0, done.stderr
    (path,) = files(tmp_path)
    assert native._is_whole(path)


def test_a_source_or_a_compiler_that_fails_is_said_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("hf_daq.nn.kernels._said", [])
    native.SOURCES[0].write_text("#error not for this machine")
    assert native.library.__wrapped__() is None
    assert native.library.__wrapped__() is None
    found = [message for message in caplog.messages if "cannot be compiled" in message]
    assert len(found) == 1
    assert "not for this machine" in found[0]
    assert not files(tmp_path)
    monkeypatch.setattr(native, "available", lambda device: False)
    assert native.library.__wrapped__() is None


def test_the_sources_are_beside_their_module():
    for name in ("native.cpp", "integers.cpp", "vectors.h"):
        assert Path(native.__file__).with_name(name).is_file()
