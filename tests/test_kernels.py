"""When kernels are compiled, and what happens where they cannot be."""

import contextlib
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import hf_daq
from hf_daq.nn import kernels as compiling
from hf_daq.nn.functional import quantize_activation, quantize_weight

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


def usual_loss():
    """Printed by TRAIN in this process, which compiles nothing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(TRAIN, {})
    return printed.getvalue()


def in_new_process(tmp_path, **environment):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HF_DAQ_COMPILE": "1"} | environment
    result = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, result.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_done_without(tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    broken.chmod(0o755)
    fallen_back, notes = in_new_process(tmp_path, CXX=str(broken), CUDA_HOME=str(tmp_path))
    assert "No CUDA runtime" not in notes
    assert notes.count("compiling quantizers") == 1
    assert notes.count("quantizers are not compiled") == 1
    assert fallen_back == usual_loss()


@pytest.mark.slow
def test_a_process_says_once_that_it_compiles_and_learns_the_same(tmp_path):
    compiled, notes = in_new_process(tmp_path)
    assert notes.count("compiling quantizers") == 1
    assert "not compiled" not in notes
    assert any(tmp_path.rglob("*.so"))
    assert float(compiled.split()[1]) == pytest.approx(float(usual_loss().split()[1]), rel=1e-4)


def test_one_process_of_a_machine_says_it_once(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "_said", [])
    monkeypatch.setenv("LOCAL_RANK", "1")
    compiling.say("compiling")
    assert not caplog.records
    monkeypatch.setenv("LOCAL_RANK", "0")
    compiling.say("compiling")
    compiling.say("compiling")
    assert caplog.messages == ["compiling"]


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


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "first last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "with gaps": lambda x: torch.stack([x, x], 2)[:, :, 0],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


ALL = list(itertools.product(["daq", "ste"], [("float32", None), ("bfloat16", None), ("float32", "bfloat16")], [1, 6]))
USUAL = [("daq", ("float32", "bfloat16"), 1)]


@pytest.mark.parametrize(
    ("rounding", "dtypes", "rows"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in USUAL)],
    ids=str,
)
def test_compiled_kernels_give_the_same_values_for_every_layout(kernels, rounding, dtypes, rows):
    """Values bit for bit, gradients but for the last bits; compared with the eager form of the contiguous tensor."""
    dtype, result = (None if name is None else getattr(torch, name) for name in dtypes)
    generator = torch.Generator().manual_seed(0)
    for layout, arrange in LAYOUTS.items():
        for shape in [(6, 8, 5, 3), (6, 1, 1, 1), (6, 2, 1, 7)]:
            x = arrange(torch.randn(shape, generator=generator).to(dtype)).detach()
            seed = torch.randn(shape, generator=generator).to(result or dtype)
            values = [torch.rand(rows, generator=generator) + 0.3 for _ in range(5)]
            values[0].neg_()
            found = []
            for compiled in (False, True):
                kernels(compiled)
                inputs = [value.clone().requires_grad_() for value in values[:3]]
                leaf = x.detach().requires_grad_() if compiled else x.contiguous().requires_grad_()
                if rows == 1:
                    inputs.pop()
                    y = quantize_activation(leaf, *inputs, bits=4, rounding=rounding, dtype=result)
                else:
                    y = quantize_weight(leaf, *inputs, *values[3:], bits=4, rounding=rounding, dtype=result)
                y.backward(seed if compiled else seed.contiguous())
                found.append([y.detach(), leaf.grad, *(value.grad for value in inputs)])
            for part, (eager, fast) in enumerate(zip(*found, strict=True)):
                what = f"{layout} {shape} {part}"
                if part == 0:
                    assert torch.equal(eager, fast), what
                    assert eager.dtype == (result or dtype)
                tolerance = 2e-4 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(
                    fast, eager, rtol=tolerance, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}"
                )


def test_other_bits_gamma_and_sigma_need_no_other_kernel(kernels):
    kernels(True)
    bounds = torch.tensor([-1.0]), torch.tensor([1.0])
    quantize_activation(torch.randn(300).requires_grad_(), *bounds, bits=3).sum().backward()
    before = [len(kernels_.found) for kernels_ in (compiling._forward_kernels, compiling._backward_kernels)]
    for bits, size, gamma in [(1, 7, 2.0), (8, 4001, 1.0), (5, 100000, 0.5)]:
        x = torch.randn(size).requires_grad_()
        quantize_activation(x, *bounds, bits=bits, gamma=gamma, sigma=gamma).sum().backward()
    after = [len(kernels_.found) for kernels_ in (compiling._forward_kernels, compiling._backward_kernels)]
    assert after == before


@pytest.mark.slow
def test_a_kernel_sums_over_more_threads_than_there_were_when_it_was_compiled(one_thread):
    """torch's compiler makes room for as many as there are, and with one for each processor does not limit them."""
    kernels, x = compiling.Kernels(lambda x: (x.sum(),)), torch.ones(2**16)
    for threads in (os.cpu_count(), os.cpu_count() + 3):
        torch.set_num_threads(threads)
        (total,) = kernels((x,), (), ((2**20 - 3,),))
        assert total == 2**16
