"""Layers of whole numbers in machine code: exact for all bits, shapes and layouts, in every build."""

import itertools
import os

import pytest
import timm.layers
import torch
from packed_layers import LAYERS, USUAL, close, load, packed, plain, tiny, write
from torch import nn
from torch._inductor.utils import run_and_get_code

import hf_daq
from hf_daq.nn import native, onednn, whole
from hf_daq.nn.kernels import compiler

pytestmark = [
    pytest.mark.skipif(compiler() is None or os.name == "nt", reason="no compiler of C++"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
OTHERS = {
    "many outputs": (lambda: nn.Conv2d(12, 130, 3, 1, 1), (2, 12, 5, 9)),
    "groups": (lambda: nn.Conv2d(12, 40, 3, 2, 1, 1, 2), (2, 12, 6, 5)),
    "three channels": (lambda: nn.Conv2d(3, 20, 5, 2, 2), (1, 3, 90, 70)),
    "pixels": (lambda: nn.Conv2d(24, 70, 1), (2, 24, 5, 7)),
    "wide padding": (lambda: nn.Conv2d(4, 6, 1, 10, 3), (2, 4, 1, 1)),
    "unread edge": (lambda: nn.Conv2d(4, 8, 2, 4, 1), (2, 4, 8, 8)),
    "each channel": (lambda: nn.Conv2d(40, 40, 3, 2, 1, 1, 40), (2, 40, 15, 17)),
    "each channel, apart": (lambda: nn.Conv2d(17, 17, 5, 1, 4, 2, 17), (2, 17, 9, 9)),
    "each channel, same": (lambda: timm.layers.Conv2dSame(6, 6, 3, 2, groups=6), (2, 6, 8, 9)),
    "large image": (lambda: nn.Conv2d(64, 64, 3, 1, 1, 1, 64), (1, 64, 50, 50)),
    "many rows": (lambda: nn.Linear(64, 200), (70, 64)),
}
CASES = LAYERS | OTHERS


@pytest.fixture(autouse=True)
def build(request, folder, monkeypatch):
    name = getattr(request, "param", "native")
    functions = native._declared(load(folder, name))
    monkeypatch.setattr(whole, "library", lambda: functions)
    return functions


def in_machine(layer):
    return onednn.prepared(layer).arranged is not None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("build", USUAL, indirect=True)
def test_outputs_are_those_of_integer_arithmetic(build, name):
    make, shape = CASES[name]
    torch.manual_seed(len(name))
    x = torch.randn(shape)
    model = packed(make(), x)
    layer, inputs = model[0], [x] if x.ndim < 4 else [x, x.contiguous(memory_format=torch.channels_last)]
    for weight_bits, activation_bits in [(1, 8), (2, 3), (4, 4), (5, 7), (8, 1), (8, 8)]:
        layer.weight_grid = "odd" if activation_bits % 4 or weight_bits == 8 else "integer"
        write(layer, weight_bits, activation_bits, "tensor" if activation_bits % 3 else "channel", activation_bits % 2)
        if not in_machine(layer):
            assert build.daq_block() == 0
            pytest.skip("this build adds no products in 32 bits")
        with hf_daq.integer_arithmetic(model):
            expected = model(x)
        for one, threads in itertools.product(inputs, (1, 3)):
            assert layer.path(one) == "integers"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(whole, "threads", lambda work, threads=threads: threads)
                found = model(one)
            assert close(found, expected)
            assert found.is_contiguous() >= one.is_contiguous()


@pytest.mark.parametrize("name", ["linear", "many outputs", "each channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype):
    make, shape = CASES[name]
    x = torch.randn(shape)
    model, x = packed(make(), x, 8, 8).to(dtype), x.to(dtype)
    if not in_machine(model[0]):
        pytest.skip("this processor adds no products in 32 bits")
    with hf_daq.integer_arithmetic(model):
        expected = model(x)
    found = model(x)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def with_token_scales(columns, outputs, weight_bits, activation_bits, grid):
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    options = {"activation_scale": "token", "weight_granularity": "channel", "weight_grid": grid}
    model = nn.Sequential(nn.Linear(columns, outputs)).eval()
    return hf_daq.pack(hf_daq.apply_daq(model, **bits, **options, rules=[{"pattern": "0", **bits}]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("columns", "outputs", "rows"), [(37, 11, 1), (64, 70, 7), (3, 1, 5), (1, 1, 4), (2048, 20, 300)]
)
def test_rows_with_scales_of_their_own(columns, outputs, rows, threads, monkeypatch):
    torch.manual_seed(columns)
    monkeypatch.setattr(whole, "threads", lambda work: threads)
    x = torch.randn(rows, columns) * torch.logspace(-6, 3, rows)[:, None]
    x[0, 0] = -x.abs().max() * 2  # the largest of a row is half a step from two codes
    x[rows // 2] = 0
    for weight_bits, activation_bits, grid in [
        (1, 8, "odd"),
        (4, 8, "integer"),
        (8, 8, "odd"),
        (3, 5, "odd"),
        (2, 2, "integer"),
    ]:
        model = with_token_scales(columns, outputs, weight_bits, activation_bits, grid)
        if not in_machine(model[0]):
            pytest.skip("this processor adds no products in 32 bits")
        assert model[0].path(x) == "integers"
        for one, other in zip(model(x), plain(model, x), strict=True):
            assert close(one, other, 2e-6)
        half = x.bfloat16()
        with hf_daq.integer_arithmetic(model.bfloat16()):
            expected = model(half)
        found = model(half)
        assert found.dtype == torch.bfloat16
        assert ((found - expected).abs().amax(1) <= torch.finfo(torch.bfloat16).eps * expected.abs().amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_of_rows_are_those_of_the_quantizer(dtype):
    """The weight is twice the unit matrix less 1, so each output tells the code of one input."""
    model = with_token_scales(16, 16, 8, 8, "integer")
    layer, x = model[0], torch.randn(500, 16).mul(100 * torch.rand(500, 1)).to(dtype)
    x[:, 3] = x.abs().amax(1)
    layer.write_codes(torch.eye(16).to(torch.uint8) + 128, torch.full((16,), 128.0))
    layer.bias.data.zero_()
    codes, scale = layer.a_quant.coded(x)
    assert layer.path(x) == "integers"
    assert in_machine(layer) == (dtype != torch.float16)
    assert torch.equal(onednn.forward(layer, x), ((codes.float() - 128) * scale).to(dtype))


def test_rows_that_are_not_finite():
    model, x = with_token_scales(37, 11, 4, 8, "integer"), torch.randn(6, 37)
    for value, at in ((torch.nan, 36), (torch.inf, 0), (-torch.inf, 20)):
        spoiled = x.clone()
        spoiled[2, at] = value
        found = model(spoiled)
        assert torch.equal(found.isnan().all(1), torch.arange(6) == 2)
        assert close(found[3:], plain(model, x)[3:])


def test_codes_on_and_beside_thresholds_are_those_of_the_quantizer():
    """Each input alone makes one output, which tells its code."""
    model = packed(nn.Conv2d(1, 1, 1, bias=False), torch.randn(1, 1, 4, 4))
    layer = model[0]
    layer.a_quant.upper.data.fill_(0.9)
    thresholds = (torch.arange(-3, 19) - layer.a_quant.zero_point + 0.5) * layer.a_quant.span / 15
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    x = [thresholds, torch.nextafter(thresholds, up), torch.nextafter(thresholds, down), up[None], down[None]]
    x = torch.cat(x).view(1, 1, 2, -1)
    assert in_machine(layer)
    step = layer.quantized_weight().item() / layer.a_quant.levels
    codes = (model(x) / step).round() + layer.a_quant.zero_point
    assert torch.equal(codes, layer.a_quant.codes(x).float())


@pytest.mark.parametrize("name", ["many rows", "many outputs", "each channel", "three channels"])
def test_nan_gives_what_the_quantized_layer_gives(name):
    make, shape = CASES[name]
    x = torch.randn(shape)
    model = packed(make(), x)
    for at in (0, 17, -1):
        spoiled = x.clone()
        spoiled.view(-1)[at] = torch.nan
        assert torch.equal(model(spoiled).isnan(), plain(model, spoiled).isnan())


def test_inputs_of_other_sizes_are_refused_as_by_the_float_layer():
    even = torch.randn(64, 37)
    for x in even, even * torch.linspace(-4, 4, 37).exp():  # channels of these are divided
        model = packed(nn.Linear(37, 11), x)
        for columns in 36, 1:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(torch.randn(4, columns))
    assert model[0].smooth is not None
    model = packed(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6))
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 5, 6, 6))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        model(torch.randn(2, 4, 2, 6))


@pytest.mark.parametrize("dilation", [4, 30])
def test_dilated_convolutions_without_padding(dilation):
    x = torch.randn(2, 8, 64, 65)
    model = packed(nn.Conv2d(8, 5, 3, 2, 0, dilation), x)
    assert in_machine(model[0])
    assert close(model(x), plain(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_graphs_have_the_layer_as_one_operator(last, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    convolutions = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, 1, 8), nn.Conv2d(8, 12, 1)
    x = torch.randn(2, 3, 9, 7)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    model = packed(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(240, 5)), x)
    if not in_machine(model[0][0]):
        pytest.skip("this processor adds no products in 32 bits")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    found, (code,) = run_and_get_code(compiled, x)
    # With VNNI the first one, of more than one pixel, is oneDNN's.
    assert code.count("hf_daq.integer_layer.default(") == 3
    assert torch.equal(found, model(x))
    x[1, 2, 3, 4] = torch.nan
    assert torch.equal(compiled(x)[0], found[0])
    assert compiled(x)[1].isnan().all()


def test_graphs_for_all_sizes():
    model = packed(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)), torch.randn(2, 3, 9, 7))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 9, 7), (5, 3, 12, 8), (3, 3, 10, 31)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(7, 5)], ids=["images", "rows"])
def test_in_graphs_only_what_has_a_nan_is_nan(layer):
    x = torch.randn(4, 3, 9, 7)
    compiled = torch.compile(packed(layer, x), backend="aot_eager", fullgraph=True)
    want = compiled(x)
    x[2, 1, 5, 4] = torch.nan
    found, spoiled = compiled(x), torch.zeros(want.shape, dtype=torch.bool)
    spoiled[(2,) if isinstance(layer, nn.Conv2d) else (2, 1, 5)] = True
    assert torch.equal(found.isnan(), spoiled)
    assert torch.equal(found[~spoiled], want[~spoiled])


def test_graphs_of_rows_with_scales_of_their_own():
    model, x = with_token_scales(37, 11, 4, 8, "integer"), torch.randn(6, 37)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    x[2, 0] = torch.inf
    found = compiled(x)
    assert torch.equal(found.isnan().all(1), torch.arange(6) == 2)
    assert close(found[3:], model(x)[3:])


def test_a_layer_whose_sums_are_wrong_goes_another_way(monkeypatch):
    model, x = tiny()
    monkeypatch.setattr(
        whole, "output", lambda layer, kept, x, bias, dtype: layer.compute(x, layer.quantized_weight(), bias)
    )
    assert not in_machine(model[0])
    assert close(model(x), plain(model, x))
