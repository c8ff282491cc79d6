"""Sums in parts are those of float64."""

import math

import pytest
import torch

from hf_daq.nn.observers import Statistics
from hf_daq.nn.sums import count_bad, finite, squares, total


def values(count, dtype=torch.float32):
    return (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 3 + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 3 * 512, 100_003])
def test_as_in_float64(count, dtype):
    x = values(count, dtype)
    assert total(x) == pytest.approx(float(x.double().sum()), rel=1e-6, abs=1e-3)
    assert squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-22, 1e-13, 1e19, 1e30, 2e37])
def test_sums_that_float32_does_not_hold(factor):
    x = values(10_000) * factor
    assert squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    assert total(x.abs()) == pytest.approx(float(x.double().abs().sum()), rel=1e-6)


def test_layouts_and_gradients():
    x = values(2 * 5 * 64 * 64).view(2, 5, 64, 64).requires_grad_()
    for same in (x, x.to(memory_format=torch.channels_last), x.mT, x[:, ::2]):
        assert squares(same) == pytest.approx(float(same.detach().double().square().sum()), rel=1e-6)
        assert total(same) == pytest.approx(float(same.detach().double().sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite(bad, dtype):
    x = values(10_000, dtype)
    assert finite(x)
    assert count_bad(x) == 0
    x[[3, 9_999]] = bad
    assert not finite(x)
    assert count_bad(x) == 2
    assert not math.isfinite(squares(x))
    assert not math.isfinite(total(x))


def test_whole_numbers_and_nothing():
    assert squares(torch.zeros(5, dtype=torch.int64)) == total(torch.zeros(0)) == 0
    assert squares(torch.arange(5)) == 30
    assert finite(torch.arange(5))
    assert finite(torch.empty(0, 3))
    assert count_bad(torch.empty(0)) == 0


@pytest.mark.parametrize("largest", [0.0, 1.0, 4.0, 7.9999995])
def test_the_histogram_is_that_of_torch(largest):
    x = values(2**18 + 5).clamp(-largest, largest)
    x[::3] = 0
    found = Statistics(torch.device("cpu"))
    found.add(x)
    edge = 2.0**found.exponent
    assert torch.equal(found.histogram, torch.histc(x, 8192, -edge, edge).double())
    weighted = found.weighted(x.view(-1, 1), torch.ones(len(x), 1, dtype=torch.float64))
    assert torch.equal(weighted, found.histogram)
