"""Convolutions in one and three dimensions, and transposed ones: quantized, calibrated, packed and saved like all others."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from processor import CUTS_OFF
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ModelError
from hf_daq.model.patch import computed_weights
from hf_daq.nn.integers import integer_arithmetic
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.observers import InputSample
from hf_daq.nn.packed import daq_layers, packed_layers

LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2),
    "conv1d_same": lambda: nn.Conv1d(6, 4, 4, padding="same", padding_mode="circular", bias=False),
    "conv3d": lambda: nn.Conv3d(6, 8, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), bias=False),
    "up1d": lambda: nn.ConvTranspose1d(6, 4, 5, stride=3, padding=1, output_padding=2, groups=2),
    "up2d": lambda: nn.ConvTranspose2d(6, 9, (2, 4), stride=2, padding=(0, 3), dilation=(2, 1), groups=3),
    "up2d_cropped": lambda: nn.ConvTranspose2d(6, 5, 2, stride=2, padding=(1, 2), bias=False),
    "up3d": lambda: nn.ConvTranspose3d(6, 4, 2, stride=(2, 1, 3), output_padding=(1, 0, 2), bias=False),
}
SIZES = {1: (7,), 2: (5, 7), 3: (4, 5, 6)}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = layer(), layer(), nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x).relu()


def inputs(layer, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, *SIZES[len(layer.kernel_size)], generator=generator)


def built(name, **config):
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[name]())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = inputs(net[0])
    config = {"weight_bits": 8, "activation_bits": 8, "weight_granularity": "channel"} | config
    config["first_last_bits"] = config["weight_bits"]
    hf_daq.apply_daq(net, DaqConfig(**config))
    with hf_daq.calibrate(net):
        net(x)
    return net.eval(), x, before


@pytest.mark.parametrize("config", [{}, {"weight_granularity": "group", "group_size": 4, "activation_bits": None}])
@pytest.mark.parametrize("name", LAYERS)
def test_eight_bits_are_close_to_float_and_all_forms_are_the_same(name, config, tmp_path):
    model, x, state = built(name, **config)
    plain = nn.Sequential(LAYERS[name]())
    plain.load_state_dict(state)
    expected, got = plain(x), model(x)
    assert ((got - expected).norm() / expected.norm()).item() < 0.02
    with integer_arithmetic(model):
        torch.testing.assert_close(model(x), got, rtol=1e-4, atol=1e-5)
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True, probe=x)
    for folder in ("trainable", "packed"):
        opened = hf_daq.from_pretrained(tmp_path / folder, model=nn.Sequential(LAYERS[name]()))
        assert torch.equal(opened.eval()(x), got)
    assert packed_layers(opened)
    torch.testing.assert_close(hf_daq.unpack(opened).eval()(x), got, rtol=1e-4, atol=1e-5)
    hf_daq.remove_daq(model, weights="quantized")
    assert type(model[0]) is type(plain[0])
    if config:  # inputs were not quantized
        torch.testing.assert_close(model(x), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_float_layer_with_that_weight(name):
    model, x, _ = built(name, activation_bits=None, rounding="ste", weight_bits=2)
    layer = model[0]
    weight = layer.stored(layer.quantized_weight().detach()).requires_grad_()
    plain = nn.Sequential(LAYERS[name]())
    bias = layer.quantized_bias()
    output = torch.func.functional_call(
        plain, {"0.weight": weight} | ({"0.bias": bias.detach()} if plain[0].bias is not None else {}), (x,)
    )
    if plain[0].bias is None:
        output = output + bias.detach().view(-1, *(1,) * (x.ndim - 2))
    got = model(x)
    torch.testing.assert_close(got, output)
    seed = torch.randn_like(got)
    got.backward(seed)
    (wanted,) = torch.autograd.grad(output, weight, seed)
    start, end = layer.w_quant.bounds(layer.float_weight())
    inside = (layer.float_weight() >= start) & (layer.float_weight() <= end)
    inside = layer.stored(inside.float()) > 0
    scale = (2 * layer.w_quant.scale.view(-1, *(1,) * (x.ndim - 1)) / (end - start)).expand_as(layer.float_weight())
    torch.testing.assert_close(layer.weight.grad[inside], (wanted * layer.stored(scale))[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_of_positions_gives_the_outputs_there(name):
    torch.manual_seed(0)
    layer = quantized_layers(built(name)[0])["0"]
    x = inputs(layer, rows=2)
    sample = InputSample(layer, layer.weight_shape())
    for image in x:
        sample.add(image)  # without a batch
    output = layer.compute(x, layer.float_weight(), None)
    assert sample.seen == output.numel() // output.shape[1]
    got = sample.output(sample.rows, layer.float_weight())
    torch.testing.assert_close(got, output.movedim(1, -1).reshape(got.shape))
    noise = torch.zeros(sample.rows.shape[1:])
    noise.view(-1)[5] = 1.0
    changed = sample.output(noise[None], layer.float_weight()).square().sum()
    torch.testing.assert_close(sample.reach(layer.float_weight()).flatten()[5].float(), changed)


@pytest.mark.parametrize("name", LAYERS)
def test_macs_in_the_summary(name):
    model, x, _ = built(name)
    layer = daq_layers(model)["0"]
    row = hf_daq.summary(model, x).layers[0]
    places = x.numel() // 6 if "up" in name else model(x).numel() // layer.out_channels
    weights = layer.weight.numel()
    assert row.macs == places * weights // len(x)
    assert row.kind == type(LAYERS[name]()).__name__


def test_a_size_that_a_caller_asks_for_is_refused():
    model, x, _ = built("up1d")
    for layer in (model[0], hf_daq.pack(model)[0]):
        with pytest.raises(ModelError, match=r"layer '0' was called with output_size.*modules_to_not_convert=\['0'\]"):
            layer(x, output_size=[23])
        with pytest.raises(ModelError, match="output_size"):
            layer(x, [23])
    plain = hf_daq.remove_daq(hf_daq.unpack(model))[0]
    assert plain(x, output_size=[22]).shape[-1] == 22


@pytest.mark.parametrize(
    ("name", "grid"),
    [("conv1d", "integer"), ("conv1d_same", "odd"), ("conv3d", "odd"), ("up2d", "odd"), ("up1d", "integer")],
)
def test_onnx_files_agree(name, grid, tmp_path):
    model, x, _ = built(name, weight_grid=grid)
    for runtime in ("onnxruntime", *["openvino"] * (not CUTS_OFF)):
        report = hf_daq.export_onnx(model, tmp_path / f"{runtime}.onnx", x, runtime=runtime)
        assert report.passed
        assert report.runtimes.keys() == {"onnxruntime", runtime}


@pytest.mark.parametrize(
    ("name", "config"),
    [("conv1d", {"activation_bits": None}), ("up2d", {"group_size": 4, "weight_granularity": "group"})],
)
def test_onnx_files_agree_with_weights_alone_and_with_groups(name, config, tmp_path):
    model, x, _ = built(name, weight_bits=3, **config)
    assert hf_daq.export_onnx(model, tmp_path / "model.onnx", x).passed


def test_onnx_with_8_bit_outputs(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 4, 3)
    )
    hf_daq.apply_daq(net, bits=8, first_last_bits=8, weight_granularity="channel")
    x = torch.randn(64, 3, 20)
    with hf_daq.calibrate(net):
        net(x)
    report = hf_daq.export_onnx(net, tmp_path / "model.onnx", x, int8_outputs=True)
    assert report.passed


def test_weights_with_spectral_normalization_stay_in_full_precision_and_are_named():
    old, new = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(old(nn.Conv1d(4, 4, 3)), nn.Conv1d(4, 4, 3), new(nn.Conv1d(4, 4, 3)))
    assert computed_weights(net).keys() == {"0", "2"}
    plan = hf_daq.plan(net, bits=4, first_last_bits=4)
    assert plan.quantized.keys() == {"1"}
    assert plan.unsupported.keys() == {"0", "2"}
    assert "torch.nn.utils.remove_spectral_norm(layer, 'weight') makes it one" in plan.unsupported["0"].reason
    hf_daq.apply_daq(net, bits=4, first_last_bits=4)
    assert quantized_layers(net).keys() == {"1"}


def test_the_first_convolution_of_a_speech_model_stays_and_the_second_does_not():
    config = tf.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=10, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    plan = hf_daq.plan(tf.WhisperForConditionalGeneration(config), weight_bits=4)
    assert plan.kept["model.encoder.conv1"].reason == "first layer"
    assert "model.encoder.conv2" in plan.quantized


def test_an_exchange_is_its_own_inverse():
    layer = built("up2d")[0][0]
    weight = layer.float_weight()
    assert weight.shape == layer.weight_shape() == (9, 2, 2, 4)
    assert torch.equal(layer.stored(weight), layer.weight)
    one = F.conv_transpose2d(inputs(layer)[:, :2], layer.weight[:2], dilation=(2, 1), stride=2, padding=(0, 3))
    assert torch.allclose(
        one,
        F.conv_transpose2d(inputs(layer)[:, :2], weight[:3].transpose(0, 1), dilation=(2, 1), stride=2, padding=(0, 3)),
    )


@pytest.mark.parametrize("name", LAYERS)
def test_reconstruct_brings_the_outputs_nearer_to_float(name):
    def alike(seed):
        x = inputs(model[0], rows=64, seed=seed)
        return x + 3 * x[:, :1]  # channels that go together: errors of one weight can be made good by another

    model, _, state = built(name, weight_bits=2, activation_bits=None)
    plain = nn.Sequential(LAYERS[name]())
    plain.load_state_dict(state)
    x = alike(3)
    expected, before = plain(x), model(x)
    hf_daq.reconstruct(model, [alike(1), alike(2)], progress=False)
    assert (model(x) - expected).norm() < 0.8 * (before - expected).norm()
