"""The closed form equals the paper's definition: values and gradients, everywhere it is defined."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_daq.errors import ModelError
from hf_daq.nn.formula import round_half_down_
from hf_daq.nn.functional import dequantize_weight, quantize_activation, quantize_weight, snap_scale

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


def leaves(*values):
    return [torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_() for value in values]


def reference_activation(x, lower, upper, *, bits, **options):
    """The paper's definition between bounds that are moved so that zero is a code; autograd does the rest."""
    levels = 2**bits - 1
    unit = (upper - lower) / levels
    exact = -lower / unit
    zero_point = exact + (exact.round().clamp(0, levels) - exact).detach()
    start = -zero_point * unit
    return oracle.quantize(x, start, start + (upper - lower), zero_point, 1 / levels, bits=bits, **options)


def reference_weight(weight, lower, upper, scale, offset, unit, *, bits, grid="odd", **options):
    """The paper's definition of the standardized weight, times the output scale; or with 0 on a code."""
    levels = 2**bits - 1
    center, step = (levels / 2, 2 / levels) if grid == "odd" or bits == 1 else (2 ** (bits - 1), 2.0 ** (1 - bits))
    weight = (weight - offset) / unit
    return scale.abs() * oracle.quantize(weight, lower, upper, center, step, bits=bits, **options)


def assert_same(arguments, twins, options, names, functions, rtol):
    output, expected = (function(*a, **options) for function, a in zip(functions, (arguments, twins), strict=True))
    torch.testing.assert_close(output, expected, rtol=0, atol=rtol)
    seed = torch.linspace(-1, 1, len(output), dtype=torch.float64)
    output.backward(seed)
    expected.backward(seed)
    for got, want, name in zip(arguments, twins, names, strict=True):
        scale = want.grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            got.grad / scale, want.grad / scale, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return output.detach()


@pytest.mark.parametrize("rounding", ["daq", "ste", "soft"])
@pytest.mark.parametrize(("gamma", "sigma"), SETTINGS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_equal_the_papers_definition(bits, gamma, sigma, rounding):
    options = {"bits": bits, "gamma": gamma, "sigma": sigma, "rounding": rounding, "temperature": 3.0}
    # Bounds at which normalizing is exact, so that planted thresholds are thresholds in both evaluations.
    levels = 2**bits - 1
    for zero_point, unit in [(0, 1.0), (levels // 2 + 1, 0.25)]:
        lower = -zero_point * unit
        upper = lower + levels * unit
        x = planted(bits, lower, upper)
        arguments, twins = leaves(x, [lower], [upper]), leaves(x, [lower], [upper])
        functions = quantize_activation, reference_activation
        output = assert_same(arguments, twins, options, ("x", "lower", "upper"), functions, 1e-10)
        if rounding != "soft":
            code = output * levels + zero_point
            torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounding", ["daq", "ste", "soft"])
@pytest.mark.parametrize(("gamma", "sigma"), SETTINGS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_weights_equal_the_papers_definition(grid, bits, gamma, sigma, rounding):
    options = {"bits": bits, "gamma": gamma, "sigma": sigma, "rounding": rounding, "temperature": 3.0, "grid": grid}
    levels = 2**bits - 1
    for bound, scale, offset, unit in [(levels / 2, 0.7, 0.0, 1.0), (levels * 2.0, -3.0, 0.5, 0.25)]:
        weight = planted(bits, -bound, bound) * unit + offset
        values = weight, [-bound], [bound], [scale]
        constants = [torch.tensor([value], dtype=torch.float64) for value in (offset, unit)]
        arguments, twins = leaves(*values), leaves(*values)
        output = assert_same(
            arguments,
            twins,
            options,
            ("weight", "lower", "upper", "scale"),
            [lambda *a, f=f, c=constants, **o: f(*a, *c, **o) for f in (quantize_weight, reference_weight)],
            1e-10,
        )
        if rounding != "soft":
            center = levels / 2 if grid == "odd" or bits == 1 else 2 ** (bits - 1)
            code = output / abs(scale) * center + center
            torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-12)


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
    random = torch.rand(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = random * 1.5 * width + lower - width / 4
    options = {"bits": bits, "gamma": gamma, "sigma": sigma}
    constants = [torch.tensor([value], dtype=torch.float64) for value in (0.3, 1.7)]
    for function, reference, more, last in [
        (quantize_activation, reference_activation, [], []),
        (quantize_weight, reference_weight, [[-2.0]], constants),
    ]:
        values = x, [lower], [lower + width], *more
        arguments, twins = leaves(*values), leaves(*values)
        function(*arguments, *last, **options).sum().backward()
        reference(*twins, *last, **options).sum().backward()
        for got, want in zip(arguments, twins, strict=True):
            scale = want.grad.abs().max().clamp_min(1e-6)
            torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gamma", "sigma", "at_code", "at_threshold"), [(2, 1, 0.362, 0.597), (2, 2, 0.497, 2.217)])
def test_gradient_follows_the_distance(gamma, sigma, at_code, at_threshold):
    x = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0], requires_grad=True)
    bounds = torch.tensor([0.0]), torch.tensor([3.0])
    quantize_activation(x, *bounds, bits=2, gamma=gamma, sigma=sigma).sum().mul(3).backward()
    assert x.grad[0].item() == pytest.approx(at_code, abs=5e-4)
    assert x.grad[2].item() == pytest.approx(at_threshold, abs=5e-4)
    assert x.grad[0] < x.grad[1] < x.grad[2]


def test_ties_go_down():
    v = torch.tensor([-0.0, 0.5, 1.5, 2.5, 0.5000001, 3.0])
    assert round_half_down_(v.clone()).tolist() == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nan_stays_nan_and_infinities_are_the_outermost_codes(kernels, compiled):
    kernels(compiled)
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3], requires_grad=True)
    lower, upper = torch.tensor([0.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    y = quantize_activation(x, lower, upper, bits=2) * 3
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
        half = quantize_activation(x, *bounds, bits=4)
    full = quantize_activation(twin, *bounds, bits=4)
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))
    half.sum().backward()
    full.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, twin.grad.to(dtype))


def test_rows_equal_one_call_each():
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    values = [torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(5)]
    values[0].neg_()
    learned = [value.clone().requires_grad_() for value in values[:3]]
    whole = quantize_weight(weight, *learned, *values[3:], bits=2)
    whole.sum().backward()
    for row in range(3):
        one = [value[row : row + 1].clone().requires_grad_() for value in values[:3]]
        alone = quantize_weight(weight[row], *one, *(value[row : row + 1] for value in values[3:]), bits=2)
        assert torch.equal(alone, whole[row])
        alone.sum().backward()
        for got, want in zip(learned, one, strict=True):
            torch.testing.assert_close(got.grad[row], want.grad[0])


def test_transforms_of_torch_func_are_refused():
    bounds = torch.tensor([-1.0]), torch.tensor([1.0])
    with pytest.raises(ModelError, match=r"torch\.func.*torch\.autograd\.grad"):
        torch.func.vmap(lambda x: quantize_activation(x, *bounds, bits=4))(torch.randn(2, 3))


def test_there_is_no_second_derivative():
    x = torch.randn(5, requires_grad=True)
    y = quantize_activation(x, torch.tensor([-1.0]), torch.tensor([1.0]), bits=2)
    with pytest.raises(ModelError, match="no second derivative: leave out create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "grid"), [*((bits, "odd") for bits in range(1, 9)), (2, "integer"), (8, "integer")])
def test_weights_with_a_snapped_scale_are_integers_times_a_step_of_that_dtype(bits, grid, dtype):
    generator = torch.Generator().manual_seed(bits)
    scale = 10 ** (torch.rand(2000, generator=generator) * 8 - 6) * torch.randn(2000, generator=generator)
    snapped = snap_scale(scale, bits=bits, grid=grid, dtype=dtype)
    assert torch.equal(snap_scale(snapped, bits=bits, grid=grid, dtype=dtype), snapped)
    assert torch.equal(snapped.sign(), scale.sign())
    codes = torch.arange(2**bits, dtype=torch.uint8)
    weight = dequantize_weight(codes.repeat(len(scale), 1), snapped, bits=bits, grid=grid).double()
    integers = 2 * codes.double() - (2**bits - 1) if grid == "odd" else codes.double() - 2 ** (bits - 1)
    step = snapped.abs().double() / -integers[0]
    assert torch.equal(step, step.to(getattr(torch, dtype)).double())
    assert torch.equal(weight, step[:, None] * integers)  # bit for bit, in float32
    usual = step > 1e-4
    error = ((snapped - scale).abs() / scale.abs())[usual].max().item()
    significant = {"float16": 11, "bfloat16": 8}[dtype]
    if grid == "odd" and bits in (4, 5):
        significant = 11 - bits
        assert torch.equal(snapped[usual], snapped[usual].half().float())  # the smallest value of unsigned codes
    assert 2.0 ** -(significant + 1) < error <= 2.0**-significant


def test_the_gradient_of_a_snapped_scale_is_that_of_the_scale():
    weight, scale = torch.randn(4, 9), torch.rand(4) + 0.1
    lower, upper, offset, unit = -torch.ones(4), torch.ones(4), torch.zeros(4), torch.ones(4)
    snapped = scale.clone().requires_grad_()
    exact = snap_scale(scale, bits=3).requires_grad_()
    for value in (snap_scale(snapped, bits=3), exact):
        quantize_weight(weight, lower, upper, value, offset, unit, bits=3).square().sum().backward()
    assert torch.equal(snapped.grad, exact.grad)
    assert not torch.equal(snapped, exact)
