"""The quantizers against the paper's definition composed by autograd: bounds, scale, zero point and their gradients."""

import oracle
import pytest
import torch

from hf_daq.nn.quantizers import ActivationQuantizer, WeightQuantizer


def weight_quantizer(bits, normalization="standardize", per_channel=False, rounding="daq", bound=2.5):
    quantizer = WeightQuantizer(
        bits,
        (6, 20),
        granularity="channel" if per_channel else "tensor",
        normalization=normalization,
        rounding=rounding,
        sigma=1.0,
    )
    with torch.no_grad():
        size = quantizer.lower.shape
        quantizer.lower.copy_(-bound - 0.1 * torch.rand(size))
        quantizer.upper.copy_(bound + 0.1 * torch.rand(size))
        quantizer.scale.copy_(-0.3 - torch.rand(size))  # |scale| is used
    quantizer.finish()
    return quantizer.double()


def activation_quantizer(bits, lower, upper, rounding="daq"):
    quantizer = ActivationQuantizer(bits, rounding=rounding)
    with torch.no_grad():
        quantizer.lower.fill_(lower)
        quantizer.upper.fill_(upper)
    quantizer.finish()
    return quantizer.double()


@pytest.mark.parametrize("normalization", ["standardize", "scale"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_weights_equal_the_definition_with_statistics_that_are_constants(bits, per_channel, normalization):
    torch.manual_seed(bits)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    quantizer = weight_quantizer(bits, normalization, per_channel)
    twin = [tensor.detach().clone().requires_grad_() for tensor in (weight, *quantizer.parameters())]
    w, lower, upper, scale = (twin[0], *(tensor.view(-1, 1, 1, 1) for tensor in twin[1:]))
    rows = w.detach().flatten(1) if per_channel else w.detach().reshape(1, -1)
    if normalization == "standardize":
        offset, unit = rows.mean(1), rows.std(1)
    else:
        offset, unit = torch.zeros(len(rows), dtype=torch.float64), rows.square().mean(1).sqrt()
    x = (w - offset.view(-1, 1, 1, 1)) / unit.view(-1, 1, 1, 1)
    levels = 2**bits - 1
    code = oracle.dasr(oracle.normalize(x, lower.expand_as(x), upper.expand_as(x), levels), 2.0, 1.0, None)
    expected = scale.abs() * (2 * code - levels) / levels

    output = quantizer(weight)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    seed = torch.randn_like(output)
    output.backward(seed)
    expected.backward(seed)
    for got, want in zip((weight, *quantizer.parameters()), twin, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-7, atol=1e-9)


def test_weight_values_are_symmetric_and_without_zero():
    for bits in (1, 2, 3):
        quantizer = weight_quantizer(bits)
        values = quantizer(torch.randn(6, 5000, dtype=torch.float64)).detach().unique()
        assert len(values) == 2**bits
        torch.testing.assert_close(values, -values.flip(0))
        assert not (values == 0).any()


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_inputs_are_the_papers(bits):
    quantizer = activation_quantizer(bits, 0.0, 1.7)
    assert not quantizer.signed
    assert not quantizer.lower.requires_grad
    x = (torch.rand(500, dtype=torch.float64) * 2).requires_grad_()
    twin, upper = (
        x.detach().clone().requires_grad_(),
        torch.tensor([1.7], dtype=torch.float32).double().requires_grad_(),
    )
    levels = 2**bits - 1
    expected = oracle.dasr(oracle.normalize(twin, torch.zeros(1).double(), upper, levels), 2.0, 2.0, None) / levels
    output = quantizer(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    assert quantizer(torch.zeros(3).double()).eq(0).all()
    seed = torch.randn_like(output)
    output.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(quantizer.upper.grad, upper.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_inputs_hold_the_real_zero_and_both_bounds_learn_through_the_zero_point(bits):
    quantizer = activation_quantizer(bits, -0.83, 2.1)
    assert quantizer.signed
    x = (torch.randn(800, dtype=torch.float64) * 1.5).requires_grad_()
    twin, lower, upper = (
        tensor.detach().double().clone().requires_grad_() for tensor in (x, quantizer.lower, quantizer.upper)
    )
    levels = 2**bits - 1
    scale = (upper - lower) / levels
    exact = -lower / scale
    zero_point = exact + (exact.round() - exact).detach()
    v = oracle.normalize(
        twin / scale + zero_point, torch.zeros(1).double(), torch.full((1,), float(levels)).double(), levels
    )
    expected = (oracle.dasr(v, 2.0, 2.0, None) - zero_point) / levels

    output = quantizer(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    assert quantizer(torch.tensor([0.0, -0.0], dtype=torch.float64)).eq(0).all()
    codes = output.detach() * levels + zero_point.detach()
    torch.testing.assert_close(codes, codes.round().clamp(0, levels), rtol=0, atol=1e-9)
    seed = torch.randn_like(output)
    output.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(quantizer.lower.grad, lower.grad, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(quantizer.upper.grad, upper.grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rounding", ["daq", "ste"])
def test_training_and_evaluation_have_one_forward(rounding):
    x = torch.randn(400, dtype=torch.float64)
    for quantizer in (activation_quantizer(3, -1.0, 2.0, rounding), weight_quantizer(3, rounding=rounding)):
        value = x.view(8, 50)[:6] if isinstance(quantizer, WeightQuantizer) else x
        assert torch.equal(quantizer.train()(value), quantizer.eval()(value))


def test_the_soft_quantizer_trains_one_function_and_deploys_another():
    x = torch.rand(400, dtype=torch.float64) * 2
    soft, hard = activation_quantizer(2, 0.0, 2.0, "soft"), activation_quantizer(2, 0.0, 2.0)
    assert torch.equal(soft.eval()(x), hard(x))
    assert (soft.train()(x) - hard(x)).abs().max() > 0.05
    assert len(soft.train()(x).unique()) > 4


def test_ste_passes_the_gradient_inside_the_bounds_and_nothing_outside():
    quantizer = activation_quantizer(2, 0.0, 1.0, "ste")
    x = torch.tensor([-0.1, 0.0, 0.4, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 1, 0])


def test_parameters_of_degenerate_weights_stay_finite():
    for weight in (torch.zeros(6, 3), torch.ones(6, 1), torch.full((6, 2, 1, 1), 1e-30)):
        for normalization in ("standardize", "scale"):
            for per_channel in (False, True):
                quantizer = weight_quantizer(2, normalization, per_channel)
                value = weight.double().requires_grad_()
                output = quantizer(value)
                output.sum().backward()
                assert output.isfinite().all()
                assert value.grad.isfinite().all()


def test_autocast_and_half_weights_are_computed_in_float32():
    torch.manual_seed(0)
    quantizer = weight_quantizer(3).float()
    weight = torch.randn(6, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(weight)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantizer(weight.float()).bfloat16())


@pytest.mark.parametrize(
    ("values", "calibrated"),
    [
        ((-1.0, 1.0, 0.5), True),
        ((-1.0, 1.0, -0.5), False),
        ((-1.0, 1.0, 0.0), False),
        ((0.0, 0.0, 0.0), False),
        ((-1.0, torch.inf, 1.0), False),
    ],
)
def test_memory_that_nobody_has_set_is_no_calibration(values, calibrated):
    with torch.device("meta"):
        quantizer = WeightQuantizer(4, (6, 20))
    quantizer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, value in zip((quantizer.lower, quantizer.upper, quantizer.scale), values, strict=True):
            parameter.fill_(value)
    assert quantizer.calibrated is calibrated
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.calibrated is calibrated


def test_a_scale_of_either_sign_loads():
    quantizer = WeightQuantizer(4, (6, 20))
    quantizer.load_state_dict(
        {"lower": torch.tensor([-1.0]), "upper": torch.tensor([1.0]), "scale": torch.tensor([-1.0])}
    )
    assert quantizer.calibrated
