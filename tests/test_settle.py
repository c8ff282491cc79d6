"""What is saved means the same codes on every device, in every dtype, compiled or not."""

import pytest
import torch
from models import images, small_timm
from safetensors.torch import load_file
from text_models import tiny_llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import hf_daq
from hf_daq.nn.kernels import Kernels
from hf_daq.nn.layers import StandardizedConv, quantized_layers
from hf_daq.nn.parts import codes_in_parts
from hf_daq.nn.quantizers import WeightQuantizer
from hf_daq.nn.settle import settled


def planted(bits, granularity="tensor", dtype=torch.float32, size=(24, 32)):
    """A layer with a third of its weights within a few units in the last place of a threshold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size[1], size[0]), nn.Linear(size[0], 3)).to(dtype)
    group = 10 if granularity == "group" else None
    hf_daq.apply_daq(
        model,
        weight_bits=bits,
        weight_granularity=granularity,
        group_size=group,
        modules_to_not_convert=["1"],
        first_last_bits=bits,
    )
    layer = model[0]
    quantizer = layer.w_quant
    for _ in range(20):  # moving weights moves their statistics
        with torch.no_grad():
            weight = layer.weight.double()
            positions = quantizer.positions(weight)
            start, end = quantizer.bounds(weight)
            step = quantizer.unrows(
                ((end - start) / (2**bits - 1)).expand_as(quantizer.rows(weight)).contiguous(), weight.shape
            )
            threshold = (positions.floor() + 0.5).clamp(0.5, 2**bits - 1.5)
            chosen = torch.arange(weight.numel()).view_as(weight) % 3 == 0
            layer.weight.copy_(torch.where(chosen, weight + (threshold - positions) * step, weight))
    return model


def perturbed_codes(quantizer, weight, monkeypatch):
    """The codes in float64, and with statistics and weights that are some units in the last place off."""
    found = [quantizer.codes(weight.double())]
    statistics = WeightQuantizer.statistics
    for ulps in (-6, 6):

        def off(self, rows, ulps=ulps):
            offset, unit = statistics(self, rows)
            return offset, unit * (1 + ulps * torch.finfo(torch.float32).eps)

        monkeypatch.setattr(WeightQuantizer, "statistics", off)
        found.append(quantizer.codes(weight))
        monkeypatch.setattr(WeightQuantizer, "statistics", statistics)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-4, 5, weight.shape, generator=generator) * torch.finfo(torch.float32).eps
    found.append(quantizer.codes(weight.float() * (1 + noise)))
    order = torch.randperm(weight.shape[1], generator=generator)
    if quantizer.groups == 1:
        found.append(quantizer.codes(weight[:, order])[:, order.argsort()])
    return found


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_survive_other_arithmetic(bits, granularity, monkeypatch):
    model = planted(bits, granularity)
    layer = model[0]
    codes = layer.w_quant.codes(layer.weight)
    before = layer.weight.detach().clone()
    assert any(not torch.equal(other, codes) for other in perturbed_codes(layer.w_quant, before, monkeypatch))
    weight = settled(model, dict(model.state_dict()))["0.weight"]
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.w_quant.codes(weight), codes)
    for other in perturbed_codes(layer.w_quant, weight, monkeypatch):
        assert torch.equal(other, codes)
    assert torch.equal(layer.w_quant(weight), layer.w_quant(before))
    start, end = layer.w_quant.bounds(before)
    step = ((end - start) / (2**bits - 1)).max()
    assert (weight - before).abs().max() < 5e-3 * step


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_of_narrow_dtypes_go_to_their_next_value(bits):
    model = planted(bits, dtype=torch.bfloat16)
    weight = settled(model, dict(model.state_dict()))["0.weight"]
    assert weight.dtype == torch.bfloat16
    layer = model[0]
    assert torch.equal(layer.w_quant.codes(weight), layer.w_quant.codes(layer.weight))
    assert torch.equal(layer.w_quant.codes(weight.double()), layer.w_quant.codes(layer.weight))


@pytest.mark.parametrize("processes", [1, 2])
def test_files_hold_settled_weights_and_a_model_that_is_alone_equals_its_file(tmp_path, monkeypatch, processes):
    model = planted(2)
    before = model.state_dict()["0.weight"].clone()
    codes = model[0].w_quant.codes(before)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    hf_daq.save_pretrained(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")["0.weight"]
    assert not torch.equal(saved, before)
    assert torch.equal(model[0].w_quant.codes(saved.double()), codes)
    assert torch.equal(model[0].weight, saved if processes == 1 else before)
    model[0].weight.data.copy_(saved)
    assert torch.equal(settled(model)["0.weight"], saved)  # nothing is moved twice


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_rows_are_settled_apart_as_they_would_be_together(granularity, monkeypatch):
    model = planted(4, granularity, size=(64, 100))
    layer = model[0]
    with torch.no_grad():
        layer.weight[5:40] = layer.weight[4]  # many rows in which nothing is near a threshold, or the same is
        layer.weight[5:40] += 1e-3 * layer.weight[5:40].std()
    together = settled(model, dict(model.state_dict()))["0.weight"]
    monkeypatch.setattr("hf_daq.nn.parts._AT_ONCE", 100)
    apart = settled(model, dict(model.state_dict()))["0.weight"]
    assert torch.equal(together, apart)
    assert not torch.equal(apart, layer.weight)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_part_by_part_are_those_of_the_whole(granularity, dtype, monkeypatch):
    model = planted(4, granularity, dtype)
    layer, whole = model[0], model[0].codes()
    monkeypatch.setattr("hf_daq.nn.parts._AT_ONCE", 100)
    assert torch.equal(codes_in_parts(layer.w_quant, layer.weight), whole)
    assert torch.equal(hf_daq.pack(model)[0].codes(), whole)


def test_packing_and_saving_compile_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_daq.nn.kernels.available", lambda device: True)
    monkeypatch.setattr(Kernels, "_compiled", lambda *_: pytest.fail("compiled"))
    model = hf_daq.apply_daq(nn.Sequential(nn.Linear(256, 300)), weight_bits=4, group_size=128, first_last_bits=4)
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)


def test_a_row_that_cannot_be_settled_keeps_no_other_from_it(monkeypatch):
    model = planted(2, "channel")
    layer, moved = model[0], hf_daq.nn.settle._moved
    stuck = layer.weight[3].clone()

    def losing(quantizer, weight, codes):  # the codes of this row
        result = moved(quantizer, weight, codes)
        return torch.where((weight == stuck).all(1, keepdim=True), -result, result)

    monkeypatch.setattr("hf_daq.nn.settle._moved", losing)
    monkeypatch.setattr("hf_daq.nn.parts._AT_ONCE", 1)
    weight = settled(model, dict(model.state_dict()))["0.weight"]
    changed = (weight != layer.weight).any(1)
    assert not changed[3]
    assert changed.sum() == len(weight) - 1


def test_transformers_saves_them_too_and_a_checkpoint_to_resume_from_is_exact(tmp_path):
    model = hf_daq.apply_daq(tiny_llama(), weight_bits=2)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for _ in range(10):
            start, end = (bound.item() for bound in layer.w_quant.bounds(layer.weight.double()))
            layer.weight[0, 0] = start + (end - start) / 6  # the first threshold
    before = layer.weight.detach().clone()
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(layer.weight, before)
    model.save_pretrained(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_file(tmp_path / "checkpoint-3" / "model.safetensors")[name], before)
    assert not torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], before)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(opened(tokens()).logits, model(tokens()).logits)


def test_standardized_convolutions_are_settled_through_their_standardization():
    model = small_timm("test_nfnet")
    hf_daq.apply_daq(model, weight_bits=8)
    assert any(isinstance(layer, StandardizedConv) for layer in quantized_layers(model).values())
    tensors = settled(model, dict(model.state_dict()))
    twin = small_timm("test_nfnet")
    hf_daq.apply_daq(twin, weight_bits=8)
    twin.load_state_dict(tensors)
    moved = 0
    for name, layer in quantized_layers(model).items():
        other = twin.get_submodule(name)
        codes = layer.w_quant.codes(layer.float_weight())
        assert torch.equal(other.w_quant.codes(other.float_weight()), codes)
        moved += int((layer.weight != other.weight).sum())
        positions = other.w_quant.positions(other.float_weight().double())
        if layer.float_weight().any():  # a gain of 0 makes weights that nothing can move
            inside = (positions > 0) & (positions < 255)
            assert (positions - positions.floor() - 0.5).abs()[inside].min() > 2e-4
    assert moved
    x = images(2, 64)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


def test_a_gain_of_zero_keeps_the_parameter_under_it(tmp_path):
    model = hf_daq.apply_daq(small_timm("test_nfnet"), weight_bits=1, group_size=7)
    layers = [layer for layer in quantized_layers(model).values() if not layer.float_weight().any()]
    before = [layer.weight.detach().clone() for layer in layers]
    hf_daq.save_pretrained(model, tmp_path)
    assert layers
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_layers_that_fsdp2_shards_one_by_one_are_saved_from_a_gathered_state(group, tmp_path):
    x = torch.randn(40, 8)
    torch.manual_seed(0)
    model = hf_daq.apply_daq(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), bits=3
    )
    with hf_daq.calibrate(model, check=False):
        model(x)
    expected = model.eval()(x)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = {
        name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in model.state_dict().items()
    }
    hf_daq.save_pretrained(model, tmp_path, state_dict=whole)
    opened = hf_daq.from_pretrained(
        tmp_path, model=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    )
    assert torch.allclose(opened(x), expected, atol=1e-5)
