"""Calibration: every batch counts, every rank agrees, and nothing else about the model changes."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import transformers
from models import images, small_net, small_timm
from text_models import tiny_bert
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, ModelError
from hf_daq.model.recording import Recorder
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.observers import InputSample, Statistics, limit_together


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
        pytest.raises(
            CalibrationError,
            match=r"never reached layer 'conv' and 3 more \(depthwise, grouped, hidden\); .*modules_to_not_convert=\['conv', 'dep",
        ),
        hf_daq.calibrate(model),
    ):
        pass
    with pytest.raises(RuntimeError, match="Expected 3D .unbatched. or 4D .batched. input"), hf_daq.calibrate(model):
        model.conv(torch.zeros(4, 8))
    with pytest.raises(CalibrationError, match="inputs of layer 'conv' have NaN or infinite"), hf_daq.calibrate(model):
        model(torch.full((1, 3, 8, 8), math.nan))
    with torch.no_grad():
        model.hidden.weight[0, 0] = 1e30
    with pytest.raises(CalibrationError, match=r"'hidden' has values up to 1e\+30"), hf_daq.calibrate(model):
        model(images())
    with torch.no_grad():
        model.hidden.weight[0, 0] = math.inf
    with pytest.raises(CalibrationError, match="weight of layer 'hidden' has NaN"), hf_daq.calibrate(model):
        model(images())


@pytest.mark.parametrize(
    "call",
    [
        hf_daq.pack,
        hf_daq.remove_daq,
        hf_daq.apply_daq,
        lambda model: hf_daq.save_pretrained(model, "never"),
        copy.deepcopy,
    ],
)
def test_all_else_comes_after_calibration(call):
    model = hf_daq.apply_daq(small_net(), bits=3)
    with pytest.raises(ModelError, match=r"inside of `with hf_daq.calibrate"), hf_daq.calibrate(model):
        model(images())
        call(model, bits=4) if call is hf_daq.apply_daq else call(model)
    with pytest.raises(CalibrationError, match="not calibrated"):
        model(images())


def test_batches_from_several_threads_all_count():
    batches = [images(4, seed=seed) * (seed + 1) for seed in range(16)]
    want = quantizer_values(calibrated(small_net(), batches, bits=4))
    model = hf_daq.apply_daq(small_net(), bits=4)
    with hf_daq.calibrate(model), ThreadPoolExecutor(4) as threads:
        list(threads.map(model, batches))
    for name, value in quantizer_values(model).items():
        torch.testing.assert_close(value, want[name], rtol=2e-3, atol=0)


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
    hf_daq.apply_daq(model, bits=3, modules_to_not_convert=["depthwise"])
    with pytest.warns(UserWarning, match="'conv' saw only zeros") as warned:  # noqa: SIM117
        with hf_daq.calibrate(model):
            model(images())
    assert warned[0].filename == __file__
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


def layouts(channel, width, layout):
    """Inputs of which one channel is 20 times larger, and a network whose layer "0" takes them."""
    torch.manual_seed(0)
    if layout == "rows":
        x = torch.randn(2**21 // width, width)
        x[:, channel] *= 20
        return nn.Linear(width, 16), x
    x = torch.randn(4, width, 16, 2**15 // width)
    x[:, channel] *= 20
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    return nn.Conv2d(width, 16, 1), x


@pytest.mark.parametrize("width", [256, 768, 1000])
@pytest.mark.parametrize("layout", ["rows", "channels_first", "channels_last"])
def test_every_input_channel_is_seen(width, layout):
    errors = []
    for channel in (0, 1, width // 2):
        layer, x = layouts(channel, width, layout)
        want = layer(x).detach()
        model = calibrated(nn.Sequential(layer), [x], bits=8, first_last_bits=8, weight_granularity="channel")
        errors.append(float((model(x).detach() - want).norm() / want.norm()))
    assert max(errors) < 1.2 * min(errors)


@pytest.mark.parametrize("config", [{}, {"weight_granularity": "channel"}, {"group_size": 2304}])
@pytest.mark.parametrize("width", [768, 2304, 4096])
def test_every_column_of_a_weight_is_seen(config, width):
    errors = []
    for column in (0, 1, width // 2):
        torch.manual_seed(0)
        layer = nn.Linear(width, 256 if config else 768)
        with torch.no_grad():
            layer.weight[:, column] *= 8
        quantized = hf_daq.apply_daq(nn.Sequential(layer), weight_bits=8, first_last_bits=8, **config)[0]
        weight = layer.weight.detach()
        errors.append(float((quantized.quantized_weight().detach() - weight).norm() / weight.norm()))
    assert max(errors) < 1.2 * min(errors)


def whole(model, x):
    model(x)


def parts(model, x):
    model.forward_head(model.forward_features(x))


@pytest.mark.parametrize("call", [whole, parts])
def test_whatever_runs_the_layers_calibrates_them(call, caplog):
    x = images(2, 160)
    want = quantizer_values(calibrated(small_timm("test_vit"), [x], bits=8))
    model = hf_daq.apply_daq(small_timm("test_vit"), bits=8)
    with hf_daq.calibrate(model):
        call(model, x)
    assert all(torch.equal(value, want[name]) for name, value in quantizer_values(model).items())
    assert not caplog.records


def test_generate_calibrates_and_no_filled_cache_is_kept(caplog):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44
        )
    ).eval()
    hf_daq.apply_daq(model, weight_bits=8, activation_bits=8)
    prompt = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with hf_daq.calibrate(model):
        model.generate(prompt, **options)
    recorder = Recorder(model, keep_calls=True)
    model.generate(prompt, **options)
    recorder.remove()
    (call,) = recorder.calls
    assert call.kwargs["input_ids"].shape == (2, 7)
    assert all(value.isfinite().all() for value in quantizer_values(model).values())
    assert not caplog.records


@pytest.mark.parametrize("position", ["keyword", "positional"])
def test_padding_tokens_do_not_count(position):
    torch.manual_seed(0)
    tokens = torch.randint(3, 50, (4, 7))
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], 1)
    mask = (padded > 0).long()
    models = [hf_daq.apply_daq(tiny_bert(), bits=8) for _ in range(2)]
    with hf_daq.calibrate(models[0], check=False):
        models[0](tokens, torch.ones_like(tokens))
    with hf_daq.calibrate(models[1], check=False):
        models[1](padded, attention_mask=mask) if position == "keyword" else models[1](padded, mask)
    want, got = map(quantizer_values, models)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [512, 4096])
def test_memory_does_not_grow_with_the_batches(width):
    layer = nn.Linear(width, 8)
    sample = InputSample(layer, (8, width))
    for seed in range(12):
        sample.add(torch.full((2048, width), float(seed)))
    assert sample.rows.numel() <= max(2**22, 1024 * width)
    assert sample.share == 12 * 2048 / len(sample.rows)
    counts = torch.bincount(sample.rows[:, 0].long(), minlength=12).double()
    assert (counts / counts.mean() - 1).abs().max() < 0.5


def test_a_full_sample_is_written_over_and_takes_no_memory_for_further_batches():
    layer = nn.Linear(8, 8)
    sample, positions = InputSample(layer, (8, 8)), torch.arange(1000.0)[:, None].expand(-1, 8)
    sample.limit = 50
    with torch.inference_mode():
        sample.add(positions[:40])
        sample.add(positions[40:200])
    place = sample.rows.data_ptr()
    for part in positions[200:].split(100):
        sample.add(part)
    assert sample.rows.data_ptr() == place
    generator = torch.Generator().manual_seed(0)
    keys = torch.cat([torch.rand(count, generator=generator) for count in (40, 160, *[100] * 8)])
    assert sample.rows[:, 0].sort().values.tolist() == keys.topk(50, largest=False).indices.sort().values.tolist()
    assert torch.equal(keys[sample.rows[:, 0].long()], sample.keys)
    sample.add(positions[:100].double() + 1e-9)  # of a wider dtype
    assert sample.rows.dtype == torch.float64


def test_the_samples_of_many_layers_are_bounded_together(monkeypatch):
    def limits(count):
        widths = [64, 512] * (count // 2)
        samples = [InputSample(nn.Linear(width, 8), (8, width)) for width in widths]
        limit_together(samples)
        return widths, [sample.limit for sample in samples]

    widths, few = limits(8)
    assert few == [2**22 // width for width in widths]
    widths, many = limits(100)  # the longest are shortened
    assert sum(limit * width for limit, width in zip(many, widths, strict=True)) < 2**28
    assert many[0] < few[0]
    assert many[1] == few[1]
    monkeypatch.setattr("hf_daq.nn.observers._TOGETHER", 1)
    assert set(limits(4)[1]) == {256}


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 6, 3, stride=2, padding=(2, 1), dilation=2, groups=3, padding_mode="reflect"),
        nn.Conv2d(6, 12, (1, 3), padding="same", groups=6, padding_mode="circular"),
        timm.layers.Conv2dSame(6, 8, 3, stride=2),
        timm.layers.StdConv2dSame(6, 8, 3, stride=2, padding="same"),
    ],
)
def test_patches_give_the_outputs_of_the_convolution(convolution):
    x = images(6, 9).view(2, 9, 9, 9)[:, :6]
    sample = InputSample(convolution, tuple(convolution.weight.shape))
    sample.add(x)
    model = hf_daq.apply_daq(nn.Sequential(convolution), weight_bits=8, first_last_bits=8)
    want = model[0].compute(x, model[0].float_weight(), None).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(sample.output(sample.rows, model[0].float_weight()), want, rtol=1e-5, atol=1e-5)


def test_an_image_without_a_batch_dimension_counts_as_a_batch_of_one():
    image = images(1)[0]
    one = quantizer_values(calibrated(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), [image], bits=4, first_last_bits=4))
    torch.manual_seed(0)
    assert one["0.w_quant.shift"].shape == (4,)
    for shape in ((3, 16, 16), (1, 3, 16, 16)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin())
        got = quantizer_values(calibrated(model, [image.view(shape)], bits=4, first_last_bits=4))
        one = got if len(shape) == 3 else one
    assert all(torch.equal(value, one[name]) for name, value in got.items())


@pytest.mark.parametrize("order", [(4, 0), (0, 4), (0, 4, 0)])
def test_empty_batches_change_nothing(order, caplog):
    want = quantizer_values(calibrated(small_net(), [images()], bits=8))
    got = quantizer_values(calibrated(small_net(), [images()[:count] for count in order], bits=8))
    assert all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.parametrize("large", [1, 30])
@pytest.mark.parametrize("bits", [{"weight_bits": 4}, {"weight_bits": 4, "activation_bits": 8}])
def test_a_few_massive_tokens_do_not_decide_for_the_others(large, bits):
    """What is written is no worse than leaving it out, at the typical token and over all."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(512, 64)
    x[:4] += large * torch.randn(64)
    want = layer(x).detach()
    model = calibrated(nn.Sequential(layer), [x], first_last_bits=None, **bits, rules=[{"pattern": "0", **bits}])
    errors = (model(x).detach() - want).square().sum(1)
    with torch.no_grad():
        model[0].w_quant.shift.zero_()
    plain = (model(x).detach() - want).square().sum(1)
    assert errors.median() <= 1.01 * plain.median()
    assert errors.sum() <= 1.01 * plain.sum()


def test_what_is_frozen_stays_frozen():
    model = calibrated(small_net(), [images()], bits=4)
    model.conv.w_quant.requires_grad_(False)
    model.grouped.a_quant.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with hf_daq.calibrate(model):
        model(images(seed=5))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_arguments_that_have_no_copy(tmp_path):
    class Logged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x, log):
            return self.net(x)

    model = hf_daq.apply_daq(Logged(), bits=4)
    with (tmp_path / "log").open("w") as file, hf_daq.calibrate(model):
        model(torch.randn(32, 8), log=file)
    assert model.net[2].calibrated


def test_a_model_that_raises_afterwards_is_calibrated(caplog):
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.left = (
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
                1,
            )

        def forward(self, x):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no more")
            return self.net(x)

    model = hf_daq.apply_daq(Once(), bits=4)
    with hf_daq.calibrate(model):
        model(torch.randn(32, 8))
    assert model.net[2].calibrated
    assert "cannot be examined, it raised RuntimeError: no more" in caplog.text
