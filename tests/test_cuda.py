"""On a GPU: the same codes as on the CPU, compiled kernels with the values of eager ones, and the whole way there and back."""

import copy

import pytest
import torch
from models import Masked, images, masked_error, small_timm
from text_models import tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq.nn import kernels, trust
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.paths import bit_for_bit
from hf_daq.nn.settle import settled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BITS = {
    "W1A1": {"bits": 1},
    "W3A3": {"bits": 3},
    "W4A8 channel": {"weight_bits": 4, "activation_bits": 8, "weight_granularity": "channel"},
}


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """With compiled kernels, without which packed layers are unpacked."""
    available = kernels.available
    monkeypatch.setenv("HF_DAQ_COMPILE", "1")
    available.cache_clear()
    yield
    available.cache_clear()


def quantized(device, **config):
    model = small_timm("test_resnet").to(device)
    hf_daq.apply_daq(model, **config)
    with hf_daq.calibrate(model, check=False):
        model(images(4, 64).to(device))
    return model


@pytest.mark.parametrize("config", BITS)
def test_saved_codes_are_those_of_the_cpu(config, tmp_path):
    model = quantized("cuda", **BITS[config])
    hf_daq.save_pretrained(model, tmp_path)
    opened = hf_daq.from_pretrained(tmp_path)
    for name, layer in quantized_layers(model).items():
        other = opened.get_submodule(name)
        codes = layer.w_quant.codes(layer.float_weight())
        assert torch.equal(other.w_quant.codes(other.float_weight()), codes.cpu()), name
        assert torch.equal(other.w_quant.codes(other.float_weight().double()), codes.cpu()), name
    x = images(4, 64)
    with torch.no_grad():
        difference = (model.eval()(x.cuda()).cpu() - opened(x)).norm() / opened(x).norm()
    assert difference < 0.05  # inputs on thresholds get the neighboring code


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_values_of_eager_ones(bits, granularity, dtype, monkeypatch):
    torch.manual_seed(0)
    found = {}
    linear = nn.Linear(768, 512).cuda().to(dtype)
    x = torch.randn(256, 768, device="cuda", dtype=dtype)
    for compiled in (False, True):
        monkeypatch.setattr(kernels, "available", lambda device, compiled=compiled: compiled)
        model = nn.Sequential(copy.deepcopy(linear), nn.Linear(512, 2, device="cuda", dtype=dtype))
        hf_daq.apply_daq(
            model, bits=bits, weight_granularity=granularity, modules_to_not_convert=["1"], first_last_bits=bits
        )
        with hf_daq.calibrate(model, check=False):
            model(x)
        model.load_state_dict(settled(model, dict(model.state_dict())))
        layer = model[0].train()
        input = x.clone().requires_grad_()
        output = layer(input)
        output.float().square().sum().backward()
        found[compiled] = [output, input.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        assert (one.float() - other.float()).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * other.float().norm()


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_goes_to_the_gpu_and_back(packed):
    model = quantized("cpu", bits=4).eval()
    if packed:
        hf_daq.pack(model)
    x = images(2, 64)
    with torch.no_grad():
        before = model(x)
        there = model.cuda()(x.cuda()).cpu()
        assert torch.equal(model.cpu()(x), before)
    assert (there - before).norm() < 0.05 * before.norm()


@torch.no_grad()
def test_evaluation_sees_every_write():
    layer = quantized("cuda", bits=4).eval().layer1[0].conv1
    before = layer.quantized_weight()
    assert layer.quantized_weight() is before
    layer.weight.data[0].mul_(-1.5)
    after = layer.quantized_weight()
    assert not torch.equal(before, after)
    assert torch.equal(copy.deepcopy(layer).quantized_weight(), after)


def test_training_under_autocast_compiled_and_generation():
    model = quantized("cuda", bits=4)
    compiled = torch.compile(model.train())
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01), momentum=0.9)
    x, labels = images(8, 64).cuda(), torch.arange(8, device="cuda")
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    llama = hf_daq.apply_daq(tiny_llama().cuda(), weight_bits=4, group_size=16)
    there = llama.generate(tokens(2, 5).cuda(), max_new_tokens=8, do_sample=False)
    assert torch.equal(
        there.cpu(), hf_daq.pack(llama).generate(tokens(2, 5).cuda(), max_new_tokens=8, do_sample=False).cpu()
    )


def packed_linear(x, dtype=torch.float32, outputs=192, **options):
    model = nn.Sequential(nn.Linear(x.shape[-1], outputs)).cuda().to(dtype)
    hf_daq.apply_daq(model, **options, first_last_bits=options["weight_bits"])
    with hf_daq.calibrate(model, check=False):
        model(x)
    return hf_daq.pack(model)


def plain(model, x):
    with bit_for_bit():
        return model(x)


def differ(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("bits", [(4, 8), (8, 8), (2, 2)])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_integers(bits, rows):
    x = torch.randn(rows, 200, device="cuda")
    options = {"weight_bits": bits[0], "activation_bits": bits[1], "weight_granularity": "channel"}
    model = packed_linear(x, **options)
    assert model[0].path(x) == "integers"
    with hf_daq.integer_arithmetic(model):
        expected = model(x)
    assert differ(model(x), expected) < 1e-6
    assert differ(model(x), plain(model, x)) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_integers_of_8_bits_in_bfloat16_with_odd_sizes_and_nan(grid):
    x = torch.randn(3, 7, 205, device="cuda").bfloat16()
    options = {"weight_bits": 8, "activation_bits": 8, "weight_grid": grid}
    model = packed_linear(x, torch.bfloat16, 133, **options)
    assert model[0].path(x) == "integers"
    assert differ(model(x), plain(model, x)) < 0.01
    x[1, 2, 3] = torch.nan
    assert torch.equal(model(x).isnan(), plain(model, x).isnan())


@torch.no_grad()
def test_integers_with_a_scale_for_each_token():
    x = torch.randn(40, 128, device="cuda")
    options = {"weight_bits": 4, "activation_bits": 8, "activation_scale": "token", "weight_granularity": "channel"}
    model = packed_linear(x, **options)
    assert model[0].path(x) == "integers"
    assert differ(model(x), plain(model, x)) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scale", ["static", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_have_the_codes_that_training_rounds_them_to(bits, scale):
    """All of half a million, some of which lie beside a threshold; with a scale for each token the largest lie on one."""
    from hf_daq.nn import triton_kernels

    x = torch.randn(8192, 64, device="cuda")
    options = {"weight_bits": bits, "activation_bits": bits, "activation_scale": scale}
    layer = packed_linear(x, **options)[0]
    assert layer.path(x) == "integers"
    quantizer = layer.a_quant
    if scale == "token":
        codes, factor = quantizer.coded(x)
    else:
        codes = triton_kernels.codes(x, layer._prepared.int8.rows, 64)[0].int() + 128
        factor = 1 / quantizer.levels
    expected = (quantizer(x) / factor).round() + quantizer.zero_point
    assert int((codes != expected).sum()) == 0


@torch.no_grad()
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_kernel(bits, dtype, monkeypatch):
    monkeypatch.setattr(trust, "_agreed", {})
    x = torch.randn(1, 320, device="cuda", dtype=dtype)
    layer = packed_linear(x, dtype, weight_bits=bits, group_size=64)[0]
    expected = layer.coded().weight_of(layer.codes(), dtype)
    assert torch.equal(layer.coded().weight(dtype), expected)
    assert layer.path(x) == "codes"
    assert list(trust._agreed.values()) == [True, True]
    exact = nn.functional.linear(x.double(), layer.coded().weight_of(layer.codes(), torch.float32).double())
    assert differ(layer(x), exact + layer.bias) < (1e-6 if dtype == torch.float32 else 4e-3)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_of_one_kernel_with_ragged_rows_and_three_values(granularity):
    x = torch.randn(1, 333, device="cuda")
    layer = packed_linear(x, weight_bits=2, weight_grid="ternary", weight_granularity=granularity)[0]
    assert torch.equal(layer.coded().weight(torch.float32), layer.coded().weight_of(layer.codes(), torch.float32))
    assert layer.path(x) == "unpacked"


@torch.no_grad()
@pytest.mark.parametrize(("bits", "grid"), [(4, "odd"), (4, "integer"), (3, "odd")])
@pytest.mark.parametrize("size", [None, 32, 128])
def test_scales_in_bfloat16(bits, grid, size):
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    model = packed_linear(x, torch.bfloat16, weight_bits=bits, weight_grid=grid, group_size=size)
    exact = model(x)
    hf_daq.pack(model, fast=True)
    assert model[0].path(x) == "bfloat16 scales"
    assert differ(model(x), exact) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("way", ["integers", "codes", "fast"])
def test_ways_in_compiled_graphs(way):
    torch._dynamo.reset()
    rows = 1 if way == "codes" else 20
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    options = {"weight_bits": 4, **({"activation_bits": 8} if way == "integers" else {"group_size": 64})}
    model = hf_daq.pack(packed_linear(x, torch.bfloat16, **options), fast=way == "fast")
    assert differ(torch.compile(model, fullgraph=True)(x), model(x)) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("bits", [(4, 8), (4, None)])
def test_ways_in_cuda_graphs(bits):
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    model = packed_linear(x, torch.bfloat16, weight_bits=bits[0], activation_bits=bits[1])
    expected = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(x)
    graph.replay()
    assert torch.equal(found, expected)


def test_gradients_of_inputs_in_integers():
    x = torch.randn(20, 64, device="cuda", requires_grad=True)
    model = packed_linear(x.detach(), weight_bits=4, activation_bits=8)
    model(x).sum().backward()
    other = x.detach().clone().requires_grad_()
    plain(model, other).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_reconstruction_draws_the_same_random_numbers_in_both_networks():
    torch.manual_seed(0)
    batches = [torch.randn(256, 32, device="cuda") for _ in range(4)]
    model = Masked().cuda().eval()
    exact = copy.deepcopy(model)
    hf_daq.apply_daq(model, weight_bits=3, activation_bits=4, first_last_bits=4)
    with hf_daq.calibrate(model):
        for batch in batches:
            model(batch)

    before = masked_error(model, exact, batches)
    hf_daq.reconstruct(model, batches)
    assert masked_error(model, exact, batches) < before
