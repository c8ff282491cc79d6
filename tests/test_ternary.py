"""Weights of three values, from the formula to files."""

import copy
import itertools

import oracle
import pytest
import torch
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.config import TERNARY
from hf_daq.errors import ConfigError
from hf_daq.nn.bitpack import pack_bits, packed_size, unpack_bits, unpack_rows
from hf_daq.nn.functional import dequantize_weight, quantize_weight
from hf_daq.nn.integers import integer_arithmetic, integers
from hf_daq.nn.packed import daq_layers, packed_layers

THREE = {"weight_bits": 2, "weight_grid": "ternary"}


def network(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5))
    model = hf_daq.apply_daq(model, **(THREE | {"first_last_bits": 2} | config))
    with hf_daq.calibrate(model):
        model(images())
    return model.eval()


def images(seed=1):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounding", ["daq", "ste", "soft"])
@pytest.mark.parametrize(("gamma", "sigma"), [(2.0, 1.0), (1.0, 0.5), (0.3, 1.3)])
def test_values_and_gradients_equal_the_papers_definition(gamma, sigma, rounding):
    options = {"gamma": gamma, "sigma": sigma, "rounding": rounding, "temperature": 3.0}
    for bound, scale, offset, unit in [(1.0, 0.7, 0.0, 1.0), (4.0, -3.0, 0.5, 0.25)]:
        places = torch.cat([torch.linspace(-1.6, 1.6, 333), torch.tensor([-1, -0.5, 0, 0.5, 1, 7])]).double()
        values = places * bound * unit + offset, [-bound], [bound], [scale]
        arguments, twins = ([torch.as_tensor(v).double().clone().requires_grad_() for v in values] for _ in range(2))
        constants = [torch.tensor([value], dtype=torch.float64) for value in (offset, unit)]
        output = quantize_weight(*arguments, *constants, bits=2, grid="ternary", **options)
        weight, lower, upper, twin = twins
        found = oracle.quantize((weight - offset) / unit, lower, upper, 1, 1.0, bits=2, levels=2, **options)
        expected = twin.abs() * found
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        seed = torch.linspace(-1, 1, len(output), dtype=torch.float64)
        output.backward(seed)
        expected.backward(seed)
        for one, other in zip(arguments, twins, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
        if rounding != "soft":
            assert set((output / arguments[3].abs()).detach().round(decimals=9).tolist()) == {-1.0, 0.0, 1.0}
            step = arguments[3].detach()
            codes = (output.detach() / step.abs() + 1).round().to(torch.uint8)
            same = dequantize_weight(codes, step, bits=2, grid="ternary", dtype=torch.float64)
            torch.testing.assert_close(same, output.detach(), rtol=0, atol=1e-12)


def test_every_five_codes_are_one_byte():
    fives = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    packed = pack_bits(fives, TERNARY)
    assert packed.tolist() == [sum(int(code) * 3**place for place, code in enumerate(five)) for five in fives]
    assert torch.equal(unpack_bits(packed, TERNARY, fives.numel()), fives.flatten())
    for count in range(12):
        codes = fives.flatten()[200 : 200 + count]
        packed = pack_bits(codes, TERNARY)
        assert len(packed) == packed_size(count, TERNARY) == -(-count // 5)
        assert torch.equal(unpack_bits(packed, TERNARY, count), codes)
    for columns in (4, 5, 8, 33):
        codes, rows = torch.randint(3, (9, columns), dtype=torch.uint8), torch.tensor([8, 0, 3, 3])
        assert torch.equal(unpack_rows(pack_bits(codes, TERNARY), TERNARY, columns, rows), codes[rows])


@pytest.mark.parametrize("granularity", [{}, {"weight_granularity": "channel"}, {"group_size": 9}])
def test_training_calibration_packing_and_integers(granularity, tmp_path):
    model, x = network(activation_bits=8, **granularity), images(2)
    before = model(x)
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-3))
    model.train()(x).square().mean().backward()
    optimizer.step()
    expected = model.eval()(x).detach()
    assert not torch.equal(before, expected)
    for layer in daq_layers(model).values():
        assert integers(layer).weight.unique().tolist() == [-1, 0, 1]
        assert integers(layer).largest == 1
    with torch.no_grad(), integer_arithmetic(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    planned = hf_daq.plan(hf_daq.remove_daq(copy.deepcopy(model)), model.daq_config.replace(layers=None))
    hf_daq.pack(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)
    for layer in packed_layers(model).values():
        assert len(layer.weight_codes) == -(-layer.weight.numel() // 5)
    summary = hf_daq.summary(model, x)
    assert summary.totals["bytes_after"] == planned.packed_bytes
    hf_daq.unpack(model)
    torch.testing.assert_close(model.eval()(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_save_and_open_with_embeddings(packed, tmp_path):
    model = hf_daq.apply_daq(tiny_llama(tie_word_embeddings=True), **THREE, embedding_bits=2)
    if packed:
        hf_daq.pack(model)
    hf_daq.save_pretrained(model, tmp_path)
    opened = hf_daq.from_pretrained(tmp_path)
    x = tokens(3)
    assert torch.equal(opened(input_ids=x).logits, model.eval()(input_ids=x).logits)
    assert {layer.weight_grid for layer in daq_layers(opened).values()} == {"ternary"}
    planned = hf_daq.plan(tiny_llama(tie_word_embeddings=True), **THREE, embedding_bits=2)
    assert hf_daq.inspect(tmp_path).packed_bytes == planned.packed_bytes
    if packed:
        opened = hf_daq.unpack(opened).eval()
        torch.testing.assert_close(opened(input_ids=x).logits, model(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def test_reconstruct_keeps_three_values():
    model, x = network(), images(3)
    with torch.no_grad():
        hf_daq.reconstruct(model, [x])
    assert {tuple(integers(layer).weight.unique().tolist()) for layer in daq_layers(model).values()} == {(-1, 0, 1)}


def test_other_numbers_of_bits_have_the_grid_of_auto():
    config = DaqConfig(**THREE, rules=[{"pattern": "head", "weight_bits": 8}])
    assert [config.grid(bits) for bits in (1, 2, 3, 8)] == ["odd", "ternary", "integer", "integer"]
    assert DaqConfig.from_dict(config.to_dict()) == config
    with pytest.raises(
        ConfigError, match='weight_grid="ternary" is for weights of 2 bits, and none are: weight_bits=4'
    ):
        DaqConfig(weight_bits=4, weight_grid="ternary")


def test_histograms_have_three_codes():
    pytest.importorskip("matplotlib")
    from hf_daq.plots import weight_histogram
    from hf_daq.report.histograms import histogram_of_weights

    model = network()
    for layer in (*daq_layers(model).values(), *packed_layers(hf_daq.pack(copy.deepcopy(model))).values()):
        found = histogram_of_weights("", layer)
        assert len(found.codes) == len(found.code_values) == 3
        assert found.codes.sum() == layer.weight.numel()
    assert weight_histogram(model) is not None


@pytest.mark.parametrize(
    ("activation_bits", "runtime"),
    [
        (None, "onnxruntime"),
        (8, "openvino"),
        (None, "openvino"),
        (8, "onnxruntime"),
    ],
)
@pytest.mark.slow
def test_onnx(activation_bits, runtime, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime", runtime):
        pytest.importorskip(package)
    from hf_daq.export.onnx import export_onnx

    model = hf_daq.apply_daq(tiny_bert(), **THREE, activation_bits=activation_bits)
    with hf_daq.calibrate(model):
        model(input_ids=tokens(4))
    report = export_onnx(model.eval(), tmp_path / "model.onnx", tokens(8), runtime=runtime)
    assert report.passed
    assert max(found.error for found in report.runtimes.values()) < (1e-5 if activation_bits is None else 2e-2)


def test_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    from hf_daq.export.compressed_tensors import export_compressed_tensors

    model = hf_daq.apply_daq(tiny_llama(), **THREE).eval()
    report = export_compressed_tensors(model, tmp_path, tokens(4))
    assert {(kind.bits, kind.width) for kind in report.containers} == {(2, 2)}
    assert report.layer_error < 1e-6


def test_gguf_has_a_type_of_three_values(tmp_path):
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_daq.export.gguf import export_gguf
    from hf_daq.export.gguf_blocks import decode

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf_daq.apply_daq(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), **THREE, scale_dtype="float16")
    report = export_gguf(model, tmp_path / "model.gguf")
    assert report.types == {"2-bit weights as TQ2_0": 7}
    assert (report.exact, report.error) == (7, 0.0)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    found = decode(stored["blk.0.ffn_down.weight"].data, "TQ2_0", gguf)
    weight = model.model.layers[0].mlp.down_proj.quantized_weight().detach()
    assert torch.equal(torch.from_numpy(found), weight)
