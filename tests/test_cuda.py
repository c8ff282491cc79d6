"""On a GPU: the same codes as on the CPU, compiled kernels with the values of eager ones, and the whole way there and back."""

import copy

import pytest
import torch
from models import images, small_timm
from text_models import tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq.nn import kernels
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.settle import settled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BITS = {
    "W1A1": {"bits": 1},
    "W3A3": {"bits": 3},
    "W4A8 channel": {"weight_bits": 4, "activation_bits": 8, "weight_granularity": "channel"},
}


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
