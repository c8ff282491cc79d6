"""Small networks are fastest on one thread and without a compiler, and stay fast beside other work on the machine."""

import atexit
import functools
import gc
import os
import sys
from types import FunctionType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads, and for processes the tests start
os.environ.setdefault("HF_DAQ_COMPILE", "0")

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a machine that does other work is no error
settings.load_profile("busy")


def pytest_collection_finish():
    """What the test files have imported is there to stay: half a million objects that no collection need look at again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    if "onnx" in sys.modules:
        _one_table_of_onnx_operators()


def _one_table_of_onnx_operators():
    """torch.onnx.export reads the sources of some hundred operators each time; no export here adds one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """A test draws the same numbers alone and after others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def bit_for_bit():
    """Packed models compute as the quantized ones they were."""
    from hf_daq.nn.paths import bit_for_bit

    with bit_for_bit():
        yield


@pytest.fixture
def ctrl_c():
    """Python's own answer to it, which a process in the background does not have."""
    import signal

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def one_thread():
    """Recipes set the number of threads of this process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def group(tmp_path):
    """This process is all there are of torch.distributed."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def kernels(monkeypatch):
    """`kernels(True)`: compiled kernels for tensors of any size. `kernels(False)`: none."""
    from hf_daq.nn import kernels

    def choose(compiled):
        monkeypatch.setattr(kernels, "_FEW", 0)
        monkeypatch.setattr(kernels, "_FEW_CODES", 0)
        monkeypatch.setattr(kernels, "available", lambda device: compiled)

    yield choose
    for compiled in (value for value in vars(kernels).values() if isinstance(value, kernels.Kernels)):
        for kernel in compiled.found.values():
            assert type(kernel) is not FunctionType, "compiling failed"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where compiled kernels are kept for all tests of all workers."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
