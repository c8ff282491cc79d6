"""Calibration: every batch counts, every rank agrees, and nothing else about the model changes."""

import copy
import math

import pytest
import torch
from models import images, small_net, small_timm
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, ModelError
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.observers import Statistics


def quantizer_values(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "_quant." in name}


def calibrated(model, batches, *args, **kwargs):
    hf_daq.apply_daq(model, *args, **kwargs)
    with hf_daq.calibrate(model):
        for batch in batches:
            model(batch)
    return model


def test_all_batches_count_and_their_split_and_order_do_not():
    batches = [images(4, seed=seed) * 2.0**seed for seed in range(4)]
    want = quantizer_values(calibrated(small_net(), batches, bits=4))
    last_only = quantizer_values(calibrated(small_net(), batches[-1:], bits=4))
    for other in (batches[::-1], [torch.cat(batches)], [half for batch in batches for half in batch.split(2)]):
        got = quantizer_values(calibrated(small_net(), other, bits=4))
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=2e-3, atol=0)
    assert any(not torch.allclose(value, last_only[name], rtol=2e-3) for name, value in want.items())


def test_a_buffer_that_the_loader_reuses_does_not_matter():
    batches = [images(seed=seed) for seed in range(3)]
    want = quantizer_values(calibrated(small_net(), batches, bits=4))
    model = hf_daq.apply_daq(small_net(), bits=4)
    buffer = torch.empty_like(batches[0])
    with hf_daq.calibrate(model):
        for batch in batches:
            model(buffer.copy_(batch))
    assert all(torch.equal(value, want[name]) for name, value in quantizer_values(model).items())


def test_signs_are_found_and_modes_weights_and_statistics_are_left_alone():
    model = small_net().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrated(model, [images()], bits=4)
    signed = {name: layer.a_quant.signed for name, layer in quantized_layers(model).items()}
    assert signed == {"conv": False, "depthwise": True, "grouped": True, "hidden": True}
    assert model.conv.a_quant.lower.item() == 0
    assert not model.conv.a_quant.lower.requires_grad
    assert model.grouped.a_quant.lower.item() < 0
    assert model.grouped.a_quant.lower.requires_grad
    assert model.training
    assert model.conv.training
    assert not model.norm.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_inside_the_context_the_model_is_the_float_one():
    model, reference = small_net(), small_net()
    hf_daq.apply_daq(model, bits=1)
    with hf_daq.calibrate(model):
        assert torch.equal(model(images()), reference(images()))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_papers_start_is_three_standard_deviations_and_equal_mean_absolute_outputs(granularity):
    model = calibrated(small_net(), [images()], DaqConfig.paper(bits=2, weight_granularity=granularity))
    layer = model.conv
    inputs = small_net().stem(images()).relu()
    assert (layer.w_quant.lower == -3).all()
    assert (layer.w_quant.upper == 3).all()
    assert layer.a_quant.upper.item() == pytest.approx(3 * inputs.std().item(), rel=1e-4)
    quantized, full = layer(inputs).abs(), torch.nn.functional.conv2d(inputs, layer.weight, padding=1).abs()
    dims = (0, 2, 3) if granularity == "channel" else (0, 1, 2, 3)
    torch.testing.assert_close(quantized.mean(dims), full.mean(dims), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_bias_correction_gives_every_output_channel_the_mean_of_the_float_layer(bits):
    inputs = small_net().stem(images()).relu()
    want = small_net().conv(inputs).mean((0, 2, 3))
    got = calibrated(small_net(), [images()], bits=bits).conv(inputs).mean((0, 2, 3))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    plain = calibrated(small_net(), [images()], bits=bits, bias_correction=False).conv(inputs).mean((0, 2, 3))
    assert (plain - want).abs().max() > 10 * (got - want).abs().max()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_more_bits_come_closer_to_the_float_model_and_eight_are_close(granularity):
    want = small_net().features(images())
    errors = []
    for bits in range(1, 9):
        model = calibrated(small_net(), [images()], bits=bits, weight_granularity=granularity)
        errors.append(((model.features(images()) - want).norm() / want.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_every_channel_has_its_own_bounds_and_scale():
    model = calibrated(small_net(), [images()], bits=3, weight_granularity="channel")
    assert model.conv.w_quant.lower.shape == model.conv.w_quant.scale.shape == (8,)
    assert model.conv.w_quant.scale.unique().numel() == 8


def test_mistakes_are_named():
    with pytest.raises(ModelError, match="the model that apply_daq returned"), hf_daq.calibrate(small_net()):
        pass
    model = hf_daq.apply_daq(small_net(), bits=3)
    with (
        pytest.raises(CalibrationError, match="never reached layer 'conv'.*modules_to_not_convert"),
        hf_daq.calibrate(model),
    ):
        pass
    with pytest.raises(CalibrationError, match="inputs of layer 'conv' have NaN or infinite"), hf_daq.calibrate(model):
        model(torch.full((1, 3, 8, 8), math.nan))
    with torch.no_grad():
        model.hidden.weight[0, 0] = math.inf
    with pytest.raises(CalibrationError, match="weight of layer 'hidden' has NaN"), hf_daq.calibrate(model):
        model(images())


def test_a_failed_calibration_leaves_the_quantizers_and_hooks_as_they_were():
    model = calibrated(small_net(), [images()], bits=3)
    before = quantizer_values(model)
    with pytest.raises(KeyError), hf_daq.calibrate(model):
        model(images(seed=9))
        raise KeyError
    with pytest.raises(CalibrationError), hf_daq.calibrate(model):
        model(images() * math.nan)
    assert all(torch.equal(value, before[name]) for name, value in quantizer_values(model).items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model(images()).isfinite().all()


def test_layers_that_see_only_zeros_warn_and_train():
    model = small_net()
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.bias.zero_()
        model.hidden.weight.zero_()
    with pytest.warns(UserWarning, match="'conv' saw only zeros"):
        calibrated(model, [images()], bits=3, modules_to_not_convert=["depthwise"])
    model.train()(images()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_half_precision_models_calibrate():
    model = small_net().to(torch.bfloat16)
    calibrated(model, [images().bfloat16()], bits=4)
    assert model.conv.w_quant.scale.dtype == torch.float32
    output = model.train()(images().bfloat16())
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert model.conv.weight.grad.dtype == torch.bfloat16


def test_the_histogram_keeps_its_counts_while_it_grows():
    observer = Statistics(torch.device("cpu"))
    chunks = [torch.randn(1000) * 10.0**power for power in (-3, 2, 0)]
    for chunk in chunks:
        observer.add(chunk)
    values = torch.cat(chunks)
    assert observer.histogram.sum() == len(values)
    second_moment = (observer.histogram * observer.centers() ** 2).sum() / len(values)
    assert second_moment.item() == pytest.approx(values.square().mean().item(), rel=1e-2)
    assert observer.sums[1].item() == pytest.approx(values.double().sum().item())


def test_timm_models_of_every_kind_train_a_step_after_calibration():
    for name in ("test_resnet", "test_vit", "test_efficientnet", "test_convnext"):
        model = small_timm(name)
        size = model.pretrained_cfg["input_size"][-1]
        calibrated(model, [images(2, size)], bits=2)
        twin = copy.deepcopy(model)
        model.train()(images(2, size)).sum().backward()
        for layer in quantized_layers(model).values():
            assert layer.weight.grad.isfinite().all()
            assert layer.w_quant.upper.grad.isfinite().all()
            assert layer.a_quant.upper.grad.isfinite().all()
        assert torch.equal(twin.eval()(images(2, size)), twin(images(2, size)))


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(x=x), lambda m, x: m(x, flag=1)])
def test_calibration_ends_with_a_health_check_on_its_last_batch(caplog, call):
    model = hf_daq.apply_daq(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), bits=4, first_last_bits=4)
    model.forward = lambda x, **others: model[1](model[0](x))
    for check, expected in ((False, 0), (True, 1)):
        caplog.clear()
        with hf_daq.calibrate(model, check=check):
            call(model, torch.ones(64, 8))
        found = [record.getMessage() for record in caplog.records if record.name == "hf_daq"]
        assert sum("layer '0': its inputs use 1 of 16 codes" in message for message in found) == expected
