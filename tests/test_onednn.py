"""Packed layers that compute in whole numbers: the same outputs as the reference, and never those of old codes."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from packed_layers import LAYERS, close, packed, plain, tiny, write
from processor import needs_vnni
from torch import nn
from torch._inductor.utils import run_and_get_code

import hf_daq
from hf_daq.nn import onednn
from hf_daq.nn.packed import shared_copy


@needs_vnni
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_outputs_are_those_of_integer_arithmetic_with_all_bits(name):
    make, shape = LAYERS[name]
    torch.manual_seed(len(name))
    x = torch.randn(shape)
    model = packed(make(), x)
    layer, inputs = model[0], [x] if x.ndim < 4 else [x, x.contiguous(memory_format=torch.channels_last)]
    for weight_bits, activation_bits in itertools.product(range(1, 9), range(1, 9)):
        granularity = "tensor" if (weight_bits + activation_bits) % 3 else "channel"
        layer.weight_grid = "odd" if activation_bits % 4 else "integer"
        write(layer, weight_bits, activation_bits, granularity, signed=activation_bits % 2)
        with hf_daq.integer_arithmetic(model):
            expected = model(x)
        for one in inputs:
            assert layer.path(one) == "integers"
            found = model(one)
            assert close(found, expected)
            assert found.is_contiguous() >= one.is_contiguous()
        assert torch.equal(onednn.run_codes(x, layer._prepared.rows)[0], layer.a_quant.codes(x))
    assert close(plain(model, x), expected)
    if x.ndim > 1:
        assert model(x[:0]).shape == plain(model, x[:0]).shape


def test_codes_on_and_beside_thresholds_are_those_of_the_quantizer():
    model, _ = tiny()
    layer = model[0]
    layer.a_quant.upper.data.fill_(0.9)
    thresholds = (torch.arange(-3, 19) - layer.a_quant.zero_point + 0.5) * layer.a_quant.span / 15
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    x = torch.cat(
        [thresholds, torch.nextafter(thresholds, up), torch.nextafter(thresholds, down), up[None], down[None]]
    )
    rows = onednn.prepared(layer).rows
    assert torch.equal(onednn.run_codes(x, rows)[0], layer.a_quant.codes(x))


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_what_is_written_to_codes_scale_bias_or_bounds_is_noticed(weight_bits):
    (model, x), (other, _) = tiny(weight_bits=weight_bits), tiny(1, weight_bits=weight_bits)
    before = model(x)
    model.load_state_dict(other.state_dict())
    assert close(model(x), plain(model, x))
    assert not close(model(x), before)

    def change(write):
        before = model(x)
        with torch.no_grad():
            write(model[0])
        assert close(model(x), plain(model, x))
        assert not close(model(x), before, 1e-3)

    change(lambda layer: layer.weight_scale.mul_(2))
    change(lambda layer: layer.weight_codes.bitwise_not_())
    change(lambda layer: layer.bias.add_(1))
    change(lambda layer: layer.a_quant.upper.mul_(3))
    change(lambda layer: layer.a_quant.upper.data.mul_(0.1))
    change(lambda layer: layer.a_quant.lower.sub_(1))
    change(lambda layer: setattr(layer, "weight_scale", layer.weight_scale * 3))


def test_copies_and_casts_and_files_hold_no_prepared_weight():
    model, x = tiny()
    expected = model(x)
    assert model[0]._prepared.weight is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), shared_copy(model)):
        assert other[0]._prepared is None
        assert torch.equal(other(x), expected)
    assert not any("prepared" in key for key in model.state_dict())
    double = copy.deepcopy(model).double()
    assert double[0]._prepared is None
    assert double[0].path(x.double()) == "unpacked"
    assert close(double(x.double()).float(), expected)
    hf_daq.unpack(model)
    assert "_prepared" not in vars(model[0])
    assert close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_half_precision_is_rounded_once(dtype, weight_bits):
    model, x = tiny(weight_bits=weight_bits)
    model, x = model.to(dtype), x.to(dtype)
    assert model[0].path(x) == "integers"
    assert model(x).dtype == dtype
    with hf_daq.integer_arithmetic(model):
        assert torch.equal(model(x), model(x))
        expected = model(x)
    assert (model(x) - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_autocast_gives_its_dtype():
    model, x = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0].path(x) == "integers"
        found, expected = model(x), plain(model, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert close(found.float(), expected.float(), 2e-2)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_gradients_are_those_of_the_quantized_layer(weight_bits):
    model, x = tiny(weight_bits=weight_bits)

    def gradient(run):
        leaf = x.clone().requires_grad_()
        output = run(model, leaf)
        (output.square().sum()).backward()
        return output, leaf.grad

    assert model[0].path(x.clone().requires_grad_()) == "integers"
    (found, of_x), (expected, of_expected) = gradient(lambda model, x: model(x)), gradient(plain)
    assert close(found, expected)
    assert close(of_x, of_expected)
    for name in ("bias", "a_quant.upper"):
        parameter = model[0].get_parameter(name).requires_grad_()
        model(x).square().sum().backward()
        assert parameter.grad.abs().sum() > 0
        parameter.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(gradient(lambda model, x: model(x))[1], gradient(plain)[1])


def test_nan_and_inference_mode():
    model, x = tiny()
    with torch.inference_mode():
        fresh, _ = tiny()
        assert torch.equal(fresh(x), model(x))
    assert torch.equal(fresh(x), model(x))
    spoiled = x.clone()
    spoiled[1, 2] = torch.nan
    assert torch.equal(model(spoiled).isnan().any(1), torch.tensor([False, True, False, False]))


def test_infinite_inputs_of_16_bits_are_nan_as_in_the_quantized_layer():
    model = nn.Sequential(nn.Linear(64, 8))
    hf_daq.apply_daq(model, bits=4, activation_scale="token", rules=[{"pattern": "*", "bits": 4}])
    hf_daq.pack(model).half().eval()
    x = torch.randn(3, 64, dtype=torch.float16)
    x[1, 5] = torch.inf
    with torch.no_grad():
        assert torch.equal(model(x).isnan().all(1), torch.tensor([False, True, False]))


def test_two_threads_call_one_model():
    model, x = tiny(weight_bits=8)
    expected, found = plain(model, x), []

    def call():
        found.extend(model(x) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    assert all(close(output, expected) for output in found)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_layers_with_wrong_sums_compute_in_float(weight_bits, monkeypatch, caplog):
    """As on a processor that adds pairs of products in 16 bits."""
    real = onednn._ops.qlinear_pointwise

    class Saturating:
        def __getattr__(self, name):
            return getattr(torch.ops.onednn, name)

        def qlinear_pointwise(self, codes, *args):
            return real(codes, *args).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(onednn, "_ops", Saturating())
    onednn._say_inexact.cache_clear()
    x = torch.randn(4, 600)
    layer = nn.Linear(600, 5)
    layer.weight.data[:, :] = torch.linspace(0.5, 1, 600)
    model = packed(layer, x, weight_bits, 8)
    assert model[0].path(x) == "unpacked"
    assert torch.equal(model(x), plain(model, x))
    assert len([text for text in caplog.messages if "VNNI" in text]) == 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(70_000, 2), (1, 70_000)), (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6))],
)
def test_what_the_operators_do_not_know_computes_in_float(layer, shape):
    x = torch.randn(shape)
    model = packed(layer, x, 8, 8)
    assert model[0].path(x) == "unpacked"
    assert torch.equal(model(x), plain(model, x))


@pytest.mark.parametrize(
    ("weight_bits", "tiles"),
    [(4, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, False), (8, False), (8, True)])],
)
def test_a_compiled_model_sees_through(weight_bits, tiles, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    layer = packed(nn.Conv2d(4, 6, 3, padding=1), x, weight_bits, 8)
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), plain(model, x))
    assert model[0][0]._prepared is not None
    other = packed(nn.Conv2d(4, 6, 3, padding=1), 3 * x, weight_bits, 8)
    model[0].load_state_dict(other.state_dict())
    assert close(compiled(x), plain(model, x))
    spoiled = x.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    assert compiled(spoiled)[0].isnan().any()
    assert torch.equal(compiled(spoiled)[1], compiled(x)[1])


@pytest.mark.slow
def test_inductor_compiles_the_operators_of_torch_where_these_are_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    convolution = packed(nn.Conv2d(4, 6, 3, padding=1), x)
    linear = packed(nn.Linear(6, 5), torch.randn(8, 6), weight_bits=8)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert close(found, plain(model, x))
        assert close(torch.compile(model, fullgraph=True)(x[:1]), plain(model, x[:1]))
    assert "integer_linear" in code
    assert "qconv" in code


def test_an_exported_program_has_the_quantized_layer():
    model, x = tiny()
    program = torch.export.export(model, (x,))
    assert "onednn" not in str(program.graph)
    assert torch.equal(program.module()(x), plain(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(70, 61), (2, 9, 15, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_codes_of_the_quantizer(kernels, shape, dtype):
    kernels(True)
    model, _ = tiny()
    layer = model[0]
    rows = onednn.prepared(layer).rows
    x = (2 * torch.randn(shape)).to(dtype)
    for one in [x, x.transpose(-1, -2), *([x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [])]:
        codes, has_nan = onednn.run_codes(one, rows)
        assert torch.equal(codes, layer.a_quant.codes(one))
        assert not has_nan
    x.view(-1)[5] = torch.nan
    assert onednn.run_codes(x, rows)[1]


def test_summary_says_how_packed_layers_compute():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    with hf_daq.calibrate(hf_daq.apply_daq(model, bits=4, first_last_bits=8), check=False):
        model(x)
    assert "path" not in hf_daq.summary(model, x).to_text(wide=True)
    assert "packed: " not in str(hf_daq.health(model, x))
    assert hf_daq.health(model, x).paths == {}
    hf_daq.pack(model)
    model[0].group_size = 6  # one layer that cannot go this way
    found = hf_daq.summary(model, x)
    assert [layer.path for layer in found.layers] == ["unpacked", "integers", "integers"]
    assert found.layers[0].path_error == 0
    assert 0 < max(layer.path_error for layer in found.layers) < 1e-6
    assert "\npacked: 2 layers in integers, 1 unpacked; largest error of a layer " in str(found)
    assert "integers" in found.to_text(wide=True).split("W: weights")[0]
    assert "packed: " not in str(hf_daq.summary(model))
    well = hf_daq.health(model, x)
    assert well.to_dict().items() >= {"paths": {"unpacked": 1, "integers": 2}, "path_error": well.path_error}.items()
    assert well.path_error == max(layer.path_error for layer in found.layers)
    assert str(found).splitlines()[-1] == str(well).splitlines()[-2]


@pytest.mark.parametrize("config", [{"bits": 4}, {"bits": 8, "activation_scale": "token"}], ids=["static", "token"])
@pytest.mark.parametrize("shape", [(40, 8), (5, 8, 8)])
def test_what_follows_may_write_to_the_output(config, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).eval()
    hf_daq.apply_daq(model, **config)
    with hf_daq.calibrate(model, check=False):
        model(x)
    hf_daq.pack(model)
    output = model(x)  # the first layer is in float, and wants a gradient
    output.square().sum().backward()
    gradient = model[0].weight.grad.clone()
    model[2].inplace, model[0].weight.grad = False, None
    other = model(x)
    other.square().sum().backward()
    torch.testing.assert_close(output, other)
    torch.testing.assert_close(gradient, model[0].weight.grad)
