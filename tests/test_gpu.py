"""The ways of packed layers on a GPU, on the CPU: the same operators of torch, kernels, choices and checks."""

import copy
import itertools

import pytest
import torch
from packed_layers import close, packed, plain, tiny, write
from torch import nn

import hf_daq
from hf_daq.config import stored_bits
from hf_daq.nn import gpu, trust
from hf_daq.nn.bitpack import pack_bits
from hf_daq.nn.codes import Coded


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "used", lambda tensor: True)
    monkeypatch.setattr(trust, "_agreed", {})


def coded(bits, grid, granularity, rows=133, columns=205, size=64):
    codes = torch.randint(3 if grid == "ternary" else 2**bits, (rows, columns), dtype=torch.uint8)
    count = {"tensor": 1, "channel": rows, "group": rows * -(-columns // size)}[granularity]
    stream, group_size = pack_bits(codes, stored_bits(bits, grid)), size if granularity == "group" else None
    return codes, Coded(stream, torch.rand(count) + 0.1, bits, grid, group_size, (rows, columns))


def check(codes, weight, dtype):
    assert torch.equal(weight.weight(dtype), weight.weight_of(codes, dtype))
    x, bias = torch.randn(1, 205, dtype=dtype), torch.randn(133, dtype=dtype)
    expected = nn.functional.linear(x.double(), weight.weight_of(codes, torch.float32).double(), bias.double())
    assert close(
        gpu.one_row(x, weight, gpu._step(weight), bias).double(), expected, 1e-6 if dtype == torch.float32 else 2**-8
    )


@pytest.mark.parametrize("grid", ["odd", "integer", "ternary"])
def test_weights_and_products_are_computed_from_codes(grid, kernels, monkeypatch):
    kernels(False)
    monkeypatch.setattr(gpu, "_works", lambda coded, dtype: True)
    for bits, granularity in itertools.product(
        [2] if grid == "ternary" else range(1, 9), ["tensor", "channel", "group"]
    ):
        check(*coded(bits, grid, granularity), torch.bfloat16 if bits % 2 else torch.float32)


def test_a_written_scale_is_noticed_in_a_product_of_codes(kernels, monkeypatch):
    kernels(False)
    monkeypatch.setattr(gpu, "_works", lambda coded, dtype: True)
    options = {"weight_bits": 4, "group_size": 64, "first_last_bits": 4}
    model, x = hf_daq.pack(hf_daq.apply_daq(nn.Sequential(nn.Linear(208, 133)), **options)), torch.randn(1, 208)
    with torch.no_grad():
        before = model(x)
        assert model[0].path(x) == "codes"
        assert close(before, plain(model, x))
        assert torch.equal(gpu.at_once(model[0], x), before)
        assert gpu.at_once(model[0], x.repeat(2, 1)) is None
        model[0].weight_scale.mul_(2)
        assert gpu.at_once(model[0], x) is None
        assert not close(model(x), before, 0.1)
        assert close(model(x), plain(model, x))


@pytest.mark.parametrize("shape", [(2, 3, 37), (40, 64), (1, 64), (64,)])
def test_products_of_whole_numbers(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = packed(nn.Linear(shape[-1], 11 if shape[-1] % 8 else 24), x)
    layer = model[0]
    for weight_bits, activation_bits in [(8, 8), (1, 8), (2, 3), (4, 4), (4, 8), (5, 7), (8, 1)]:
        layer.weight_grid = "odd" if activation_bits % 4 or weight_bits == 8 else "integer"
        write(layer, weight_bits, activation_bits, "tensor" if weight_bits == 5 else "channel", activation_bits != 3)
        assert layer.path(x) == "integers"
        with hf_daq.integer_arithmetic(model):
            expected = model(x)
        assert close(model(x), expected)
    half, inputs = copy.deepcopy(model).bfloat16(), x.bfloat16()
    assert close(half(inputs).float(), plain(half, inputs).float(), 0.01)
    assert layer._prepared.int8 is not None
    x.view(-1, shape[-1])[0, 3] = torch.nan
    assert torch.equal(model(x).isnan(), plain(model, x).isnan())


def test_a_scale_for_each_token():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(37, 11)), torch.randn(5, 37)
    options = {"weight_bits": 8, "activation_bits": 8, "activation_scale": "token", "weight_granularity": "channel"}
    hf_daq.pack(hf_daq.apply_daq(model, **options, rules=[{"pattern": "0", "weight_bits": 8, "activation_bits": 8}]))
    assert model[0].path(x) == "integers"
    assert close(model(x), plain(model, x))


def test_what_is_written_is_noticed_and_copies_and_gradients_are_right():
    (model, x), (other, _) = tiny(), tiny(1)
    before = model(x)
    twin = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin[0].a_quant.upper.mul_(0.5)
    assert close(twin(x), plain(twin, x))
    needs = x.clone().requires_grad_()
    model(needs).sum().backward()
    expected = x.clone().requires_grad_()
    plain(model, expected).sum().backward()
    assert torch.equal(needs.grad, expected.grad)


def test_one_compiled_graph_with_either_way():
    model, x = tiny(weight_bits=8, activation_bits=8)
    weights = hf_daq.pack(
        hf_daq.apply_daq(nn.Sequential(nn.Linear(205, 133)), weight_bits=4, group_size=64, first_last_bits=4)
    )
    row = torch.randn(1, 205)
    with torch.no_grad():
        assert weights[0].path(row) == "unpacked"  # nothing is compiled here but by torch.compile
        for network, inputs in [(model, x), (weights, row), (weights, torch.randn(3, 205))]:
            torch._dynamo.reset()
            network(inputs)
            found = torch.compile(network, fullgraph=True, backend="aot_eager")(inputs)
            assert close(found, plain(network, inputs))
    torch._dynamo.reset()


def test_a_product_that_goes_wrong_is_not_trusted(monkeypatch, caplog):
    model, x = tiny()
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: one.int() @ other.int() + 1)
    assert model[0].path(x) == "unpacked"
    assert torch.equal(model(x), plain(model, x))
    assert "a product of whole numbers gives other values on this machine" in caplog.text


@pytest.mark.parametrize(("bits", "grid"), [(4, "odd"), (4, "integer"), (3, "odd"), (2, "ternary")])
@pytest.mark.parametrize("size", [None, 32])
def test_scales_in_bfloat16_are_asked_for(bits, grid, size):
    torch.manual_seed(0)
    options = {"weight_bits": bits, "weight_grid": grid, "group_size": size, "first_last_bits": bits}
    model, x = nn.Sequential(nn.Linear(64, 32)).bfloat16(), torch.randn(3, 64).bfloat16()
    hf_daq.pack(hf_daq.apply_daq(model, **options))
    exact = model(x)
    assert model[0].path(x) != "bfloat16 scales"
    hf_daq.pack(model, fast=True)
    with torch.no_grad():
        assert model[0].path(x) == "bfloat16 scales"
        assert close(model(x).float(), exact.float(), 0.02)
        assert copy.deepcopy(model)[0].path(x) == "bfloat16 scales"
        assert "with bfloat16 scales" in str(hf_daq.summary(model, x))
        assert model[0].path(x.repeat(20, 1)) != "bfloat16 scales"
        if size is None and bits == 4:
            torch._dynamo.reset()
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
            assert torch.equal(found, model(x))
        assert torch.equal(hf_daq.pack(model, fast=False)(x), exact)
    hf_daq.unpack(hf_daq.pack(model, fast=True))
    assert not hf_daq.pack(model)[0].fast
