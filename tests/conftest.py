"""Small networks are fastest on one thread and without a compiler, and stay fast beside other work on the machine."""

import os
from types import FunctionType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads, and for processes the tests start
os.environ.setdefault("HF_DAQ_COMPILE", "0")

import pytest


@pytest.fixture
def kernels(monkeypatch):
    """`kernels(True)`: compiled kernels for tensors of any size. `kernels(False)`: none."""
    from hf_daq.nn import functional

    def choose(compiled):
        monkeypatch.setattr(functional, "_FEW", 0)
        monkeypatch.setattr(functional, "available", lambda device: compiled)

    yield choose
    for kernels in (functional._forward_kernels, functional._backward_kernels):
        for kernel in kernels.found.values():
            assert type(kernel) is not FunctionType, "compiling failed"
