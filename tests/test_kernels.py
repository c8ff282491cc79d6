"""When kernels are compiled, and what happens where they cannot be."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import hf_daq
from hf_daq.nn import kernels as compiling

TRAIN = """
import torch, hf_daq
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
x = torch.randn(8, 3, 40, 40)
hf_daq.apply_daq(model, bits=3)
with hf_daq.calibrate(model):
    model(x)
optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01), momentum=0.9)
for _ in range(3):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.6f}")
"""


def train(tmp_path, **environment):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | environment
    result = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, result.stderr


def test_a_compiler_that_fails_is_done_without(tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    broken.chmod(0o755)
    usual, notes = train(tmp_path, HF_DAQ_COMPILE="0")
    assert "compil" not in notes
    fallen_back, notes = train(tmp_path, HF_DAQ_COMPILE="1", CXX=str(broken))
    assert notes.count("compiling quantizers") == 1
    assert notes.count("quantizers are not compiled") == 1
    assert usual == fallen_back


def test_a_process_says_once_that_it_compiles_and_learns_the_same(tmp_path):
    usual, _ = train(tmp_path, HF_DAQ_COMPILE="0")
    compiled, notes = train(tmp_path, HF_DAQ_COMPILE="1")
    assert notes.count("compiling quantizers") == 1
    assert "not compiled" not in notes
    assert any(tmp_path.rglob("*.so"))
    assert float(compiled.split()[1]) == pytest.approx(float(usual.split()[1]), rel=1e-4)
    _, notes = train(tmp_path, HF_DAQ_COMPILE="1", LOCAL_RANK="1")
    assert "compiling" not in notes


@pytest.mark.parametrize(
    ("platform", "environment", "there"),
    [
        ("linux", {}, True),
        ("win32", {}, False),
        ("linux", {"HF_DAQ_COMPILE": "0"}, False),
        ("linux", {"PATH": ""}, False),
    ],
)
def test_where_there_is_a_compiler(monkeypatch, tmp_path, platform, environment, there):
    compiler = tmp_path / "g++"
    compiler.touch(0o755)
    for name, value in ({"HF_DAQ_COMPILE": "1", "PATH": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert compiling.available.__wrapped__("cpu") is there


def test_small_tensors_and_other_compilations_do_without(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiling.Kernels, "__call__", refuse)
    monkeypatch.setattr(compiling, "available", lambda device: True)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 300))
    hf_daq.apply_daq(model, bits=3)
    x = torch.randn(4, 300)
    with pytest.raises(AssertionError, match="compiled"), hf_daq.calibrate(model):
        model(x)
    monkeypatch.setattr(compiling, "_FEW", 10**6)
    with hf_daq.calibrate(model):
        model(x)
    model(x).sum().backward()
    monkeypatch.setattr(compiling, "_FEW", 0)
    torch.compile(model, backend="eager", fullgraph=True)(x).sum().backward()
