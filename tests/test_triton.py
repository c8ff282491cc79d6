"""The kernels for a GPU in Triton's interpreter: what they give is what torch gives."""

import os
import subprocess
import sys

import pytest
import torch

from hf_daq.config import stored_bits
from hf_daq.nn import gpu
from hf_daq.nn.bitpack import pack_bits
from hf_daq.nn.codes import Coded
from hf_daq.nn.formula import center

kernels = pytest.importorskip("hf_daq.nn.triton_kernels", exc_type=ModuleNotFoundError)
CASES = [
    ("odd", 1, "tensor", 96),
    ("odd", 3, "group", 96),
    ("odd", 5, "group", 77),
    ("integer", 4, "channel", 77),
    ("odd", 8, "channel", 96),
    ("ternary", 2, "group", 77),
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which Triton reads when it is imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="is that process")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize(("grid", "bits", "granularity", "columns"), CASES)
def test_weights_and_products_are_computed_from_codes(grid, bits, granularity, columns):
    torch.manual_seed(bits)
    rows, size = 5, 32
    codes = torch.randint(3 if grid == "ternary" else 2**bits, (rows, columns), dtype=torch.uint8)
    count = {"tensor": 1, "channel": rows, "group": rows * -(-columns // size)}[granularity]
    stream, group_size = pack_bits(codes, stored_bits(bits, grid)), size if granularity == "group" else None
    coded = Coded(stream, torch.rand(count) + 0.1, bits, grid, group_size, (rows, columns))
    step, zero = gpu._step(coded), center(bits, grid)
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off
        assert torch.equal(kernels.weights(coded, step, zero, dtype), coded.weight_of(codes, dtype))
    if columns % 8 == 0 and grid != "ternary":
        x, bias = torch.randn(1, columns), torch.randn(rows)
        expected = coded.weight_of(codes, torch.float64) @ x[0].double() + bias
        found = kernels.one_row(x, coded, step, zero, bias)[0]
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@interpreted
@pytest.mark.parametrize(("count", "columns", "outputs", "halves"), [(3, 37, 11, True), (70, 272, 130, False)])
def test_products_of_whole_numbers(count, columns, outputs, halves):
    torch.manual_seed(0)
    x, bias = torch.randn(count, columns), torch.randn(outputs)
    weight = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8)
    layer = gpu.int8(weight, torch.rand(outputs), torch.tensor([-0.7, 10, 0, 255]), 7, halves)
    parts = kernels.codes(x, layer.rows, layer.weight.shape[1])
    filled = torch.nn.functional.pad(x, (0, layer.weight.shape[1] - columns))
    assert all(torch.equal(one, other) for one, other in zip(parts, gpu._rounded(filled, layer.rows), strict=True))
    expected = gpu._by_torch(x, layer, None, bias, torch.float32)
    assert (kernels.linear(parts, layer, bias, torch.float32) - expected).norm() <= 1e-6 * expected.norm()
    x[0, 3] = torch.nan
    parts = kernels.codes(x, layer.rows, layer.weight.shape[1])
    assert kernels.linear(parts, layer, None, torch.float32).isnan().any(1).tolist() == [True] + [False] * (count - 1)
