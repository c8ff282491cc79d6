"""The closed form equals the paper's definition: values and gradients, everywhere it is defined."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_daq.functional import quantize, round_half_down_

SETTINGS = [(2.0, 1.0), (2.0, 2.0), (1.0, 0.5), (4.0, 5.0), (0.3, 1.3)]


def planted(bits: int, lower: float, upper: float) -> torch.Tensor:
    """Random values around the range, with codes, thresholds, bounds, signed zeros and outliers among them."""
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(bits)
    random = torch.rand(300, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    codes = torch.arange(levels + 1, dtype=torch.float64)
    thresholds = codes[:-1] + 0.5
    special = torch.cat([codes, thresholds, thresholds + 1e-9, thresholds - 1e-9, codes[1:] - 1e-9]) / levels
    values = torch.cat([random, special]) * (upper - lower) + lower
    outside = torch.tensor(
        [0.0, -0.0, lower, upper, lower - 1e-9, upper + 1e-9, lower - 7, upper + 7, math.inf, -math.inf]
    )
    return torch.cat([values, outside.double()])


def leaves(x, lower, upper, center, step):
    return [
        torch.as_tensor(t, dtype=torch.float64).clone().requires_grad_()
        for t in (x, [lower], [upper], [center], [step])
    ]


@pytest.mark.parametrize("rounding", ["daq", "ste", "soft"])
@pytest.mark.parametrize(("gamma", "sigma"), SETTINGS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_values_and_gradients_equal_the_papers_definition(bits, gamma, sigma, rounding):
    # Bounds at which normalising is exact, so that planted thresholds are thresholds in both evaluations.
    levels = 2**bits - 1
    for lower, upper in [(0.0, float(levels)), (-levels / 2, levels / 2), (-levels * 2.0, levels * 6.0)]:
        x = planted(bits, lower, upper)
        arguments, twins = leaves(x, lower, upper, 1.5, 0.7), leaves(x, lower, upper, 1.5, 0.7)
        options = {"bits": bits, "gamma": gamma, "sigma": sigma, "rounding": rounding, "temperature": 3.0}
        output = quantize(*arguments[:3], center=arguments[3], step=arguments[4], **options)
        expected = oracle.quantize(*twins, **options)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        if rounding != "soft":
            code = output.detach() / 0.7 + 1.5
            torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-12)
        seed = torch.linspace(-1, 1, len(x), dtype=torch.float64)
        output.backward(seed)
        expected.backward(seed)
        for got, want, name in zip(arguments, twins, ("x", "lower", "upper", "center", "step"), strict=True):
            scale = want.grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(
                got.grad / scale, want.grad / scale, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    lower=st.floats(-50, 50),
    width=st.floats(1e-3, 100),
    gamma=st.floats(0.1, 8),
    sigma=st.floats(0.4, 8),
    seed=st.integers(0, 2**31),
)
def test_gradients_equal_the_definition_at_any_bounds(bits, lower, width, gamma, sigma, seed):
    x = (
        torch.rand(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 * width
        + lower
        - width / 4
    )
    arguments, twins = leaves(x, lower, lower + width, 0.5, 2.0), leaves(x, lower, lower + width, 0.5, 2.0)
    options = {"bits": bits, "gamma": gamma, "sigma": sigma}
    quantize(*arguments[:3], center=arguments[3], step=arguments[4], **options).sum().backward()
    oracle.quantize(*twins, **options).sum().backward()
    for got, want in zip(arguments, twins, strict=True):
        scale = want.grad.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gamma", "sigma", "at_code", "at_threshold"), [(2, 1, 0.362, 0.597), (2, 2, 0.497, 2.217)])
def test_gradient_follows_the_distance(gamma, sigma, at_code, at_threshold):
    x = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0], requires_grad=True)
    bounds = torch.tensor([0.0]), torch.tensor([3.0])
    quantize(x, *bounds, center=0.0, step=1.0, bits=2, gamma=gamma, sigma=sigma).sum().backward()
    assert x.grad[0].item() == pytest.approx(at_code, abs=5e-4)
    assert x.grad[2].item() == pytest.approx(at_threshold, abs=5e-4)
    assert x.grad[0] < x.grad[1] < x.grad[2]


def test_ties_go_down():
    v = torch.tensor([-0.0, 0.5, 1.5, 2.5, 0.5000001, 3.0])
    assert round_half_down_(v.clone()).tolist() == [0, 0, 1, 2, 1, 3]


def test_nan_stays_nan_and_infinities_are_the_outermost_codes():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3], requires_grad=True)
    lower, upper = torch.tensor([0.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    y = quantize(x, lower, upper, center=0.0, step=1.0, bits=2)
    assert y[0].isnan()
    assert y[1:].tolist() == [3, 0, 1]
    y[1:].sum().backward()
    assert x.grad[:3].tolist() == [0, 0, 0]
    assert x.grad[3] > 0
    assert upper.grad.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32_and_keep_their_dtype(dtype):
    x = (torch.randn(1000) * 2).to(dtype).requires_grad_()
    twin = x.detach().float().requires_grad_()
    bounds = torch.tensor([-1.7]), torch.tensor([2.3])
    with torch.autocast("cpu", torch.bfloat16):
        half = quantize(x, *bounds, center=7.0, step=1.0, bits=4)
    full = quantize(twin, *bounds, center=7.0, step=1.0, bits=4)
    assert half.dtype == dtype
    assert torch.equal(half.float(), full)
    half.sum().backward()
    full.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, twin.grad.to(dtype))


def test_bounds_per_channel_equal_one_call_a_channel():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    lower = -torch.rand(3, dtype=torch.float64) - 0.5
    upper = torch.rand(3, dtype=torch.float64) + 0.5
    bounds = [lower.clone().requires_grad_(), upper.clone().requires_grad_()]
    quantize(x, bounds[0].view(3, 1, 1), bounds[1].view(3, 1, 1), center=1.5, step=1.0, bits=2).sum().backward()
    for channel in range(3):
        one = [
            lower[channel : channel + 1].clone().requires_grad_(),
            upper[channel : channel + 1].clone().requires_grad_(),
        ]
        quantize(x[channel], *one, center=1.5, step=1.0, bits=2).sum().backward()
        torch.testing.assert_close(bounds[0].grad[channel], one[0].grad[0])
        torch.testing.assert_close(bounds[1].grad[channel], one[1].grad[0])


def test_inputs_with_gaps_and_any_memory_format():
    x = torch.randn(4, 8, 6, 6)
    bounds = torch.tensor([-1.0]), torch.tensor([1.0])
    want = quantize(x, *bounds, center=1.5, step=1.0, bits=2)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)):
        got = quantize(view, *bounds, center=1.5, step=1.0, bits=2)
        assert torch.equal(got, want)
    assert torch.equal(quantize(x[:, ::2], *bounds, center=1.5, step=1.0, bits=2), want[:, ::2])
