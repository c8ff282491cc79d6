"""Layer inputs with a scale for each token, from the formula to files."""

import copy
import json

import pytest
import tiny
import torch
from models import small_timm
from processor import CUTS_OFF
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ConfigError, ExportError
from hf_daq.nn.functional import quantize_tokens
from hf_daq.nn.integers import integer_arithmetic
from hf_daq.nn.packed import daq_layers, packed_layers

TOKENS = {"bits": 8, "first_last_bits": 8, "activation_scale": "token"}


def torchao(x, bits):
    """What torchao 0.18 computes with `choose_qparams_affine(x, MappingType.SYMMETRIC, block of a row, quant_min, quant_max,
    eps=finfo(float32).eps, scale_dtype=float32)`, as `Int8Tensor.from_hp` calls it for int8, then `_fake_quantize_affine`."""
    quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.max(-low, high) / (float(quant_max - quant_min) / 2)
    scale = torch.clamp(scale, min=torch.finfo(torch.float32).eps).to(torch.float32)
    codes = torch.clamp(torch.round(x * (1.0 / scale)), quant_min, quant_max)
    return (codes * scale).to(x.dtype), codes


def rows(shape=(40, 64), scale=1.0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    x[..., :4] = torch.arange(0.5, 4) * x.abs().amax(-1, keepdim=True) / 127.5  # ties of 8 bits
    x[0] = 0
    return x.to(dtype)


def layers(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), Conv1D(24, 48), nn.ReLU(), nn.Linear(24, 5, bias=False))
    return model, hf_daq.apply_daq(copy.deepcopy(model), **(TOKENS | config))


# ----------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_values_are_those_of_torchao(bits, dtype):
    for shape, scale in [((40, 64), 1.0), ((2, 3, 33), 1e-3), ((7, 8), 1e4 if dtype != torch.float16 else 1.0)]:
        x = rows(shape, scale, dtype)
        expected, _ = torchao(x, bits)
        assert torch.equal(quantize_tokens(x, bits=bits), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_a_row_and_its_ties_in_float64(bits):
    half = 2 ** (bits - 1)
    places = torch.arange(-2 * half + 1, 2 * half, dtype=torch.float64) / 2  # codes and ties; the largest is a tie
    found = quantize_tokens(places[None] * 0.25, bits=bits)[0] / 0.25
    assert torch.equal(found, places.round().clamp(-half, half - 1))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_gradient_is_that_of_the_paper_with_a_constant_scale(bits):
    x = rows().double().requires_grad_()
    gamma, sigma = 1.7, 1.3
    grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for rounding in ("daq", "ste"):
        x.grad = None
        quantize_tokens(x, bits=bits, rounding=rounding, gamma=gamma, sigma=sigma).backward(grad)
        found[rounding] = x.grad
    v = x.detach() / (x.detach().abs().amax(-1, keepdim=True) / (2**bits - 1) * 2).clamp_min(2.0**-23)
    distance = (1 - 2 * (v - v.floor())).abs()
    slope = gamma / (2 * torch.sinh(torch.tensor(gamma, dtype=torch.float64)))
    slope = slope / torch.tanh((distance + 1 / sigma**2) / 2)
    assert torch.equal(found["ste"], grad)
    torch.testing.assert_close(found["daq"], grad * slope, rtol=1e-9, atol=1e-12)


def test_soft_rounding_is_differentiable_and_rounds_in_evaluation():
    _, model = layers(rounding="soft")
    quantizer, x = model[0].a_quant.train(), torch.rand(1, 301, dtype=torch.float64) * 2 - 1
    x[0, 0] = 1
    x.requires_grad_()
    soft = quantizer(x)
    (of_x,) = torch.autograd.grad(soft.sum(), x)
    inner = x.detach().abs() < 0.99
    moved = quantizer(torch.where(inner, x.detach() + 1e-7, x.detach()))
    close = ((moved - soft.detach()) / 1e-7 - of_x).abs()[inner] < 1e-3
    assert close.float().mean() > 0.98  # the others crossed a threshold
    assert torch.equal(quantizer.eval()(x.detach()), quantize_tokens(x.detach(), bits=8))
    assert not torch.equal(soft.detach(), quantizer(x.detach()))


@pytest.mark.slow
def test_compiled_kernels_give_the_same(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for compiled in (True, False):
            kernels(compiled)
            x = rows((4, 50, 16), dtype=dtype).transpose(0, 1).requires_grad_()
            y = quantize_tokens(x, bits=8)
            y.float().square().sum().backward()
            results.append((y.detach(), x.grad))
        (one, of_one), (other, of_other) = results
        assert torch.equal(one, other)
        torch.testing.assert_close(of_one, of_other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_rows_that_are_not_finite_become_nan_and_others_do_not():
    x = rows((4, 8))
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    assert quantize_tokens(x, bits=8).isnan().all(1).tolist() == [False, True, True, False]


# ------------------------------------------------------------------------------------------------------- the model


def test_a_model_needs_no_calibration_and_trains():
    model, quantized = layers()
    x = rows((6, 7, 32))
    float_output = model(x)
    output = quantized(x)
    assert (output - float_output).norm() < 0.02 * float_output.norm()
    assert not [name for name in quantized.state_dict() if "a_quant" in name]
    optimizer = torch.optim.SGD(hf_daq.param_groups(quantized, lr=0.01))
    before = quantized[2].weight.detach().clone()
    quantized(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, quantized[2].weight)
    assert all(value.grad is not None for value in quantized.parameters())


@pytest.mark.parametrize("granularity", [{}, {"weight_granularity": "channel"}, {"group_size": 16}])
@pytest.mark.parametrize("grid", ["odd", "integer"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 5)])
def test_integers_and_packed_layers_compute_the_same(bits, grid, granularity):
    weight_bits, activation_bits = bits
    config = {"weight_bits": weight_bits, "activation_bits": activation_bits, "bits": None, "weight_grid": grid}
    _, model = layers(**config, **granularity)
    x = rows((3, 5, 32))
    with torch.no_grad():
        inputs = [x]
        for layer in model.eval():
            inputs.append(layer(inputs[-1]))

        def same():  # each layer on its own input: a code at a tie moves what comes after it
            for layer, x, expected in zip(model, inputs, inputs[1:], strict=False):
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)

        with integer_arithmetic(model):
            same()
        hf_daq.pack(model)
        same()
        paths = {layer.path(x) for layer in packed_layers(model).values()}
        assert CUTS_OFF or paths == {"unpacked" if granularity.get("group_size") else "integers"}
        bad = x.clone()
        bad[0, 1, 2] = torch.nan
        assert model(bad).isnan().all(-1).sum() == 1
        hf_daq.unpack(model)
        same()
        quantized = copy.deepcopy(model)
        hf_daq.remove_daq(model, weights="quantized")
        for one, other in zip(model, quantized, strict=True):
            if hasattr(one, "weight"):
                weight = other.stored(other.quantized_weight())
                torch.testing.assert_close(one.weight, weight, rtol=0, atol=0)


def test_low_memory_gives_the_same_gradients():
    gradients, x = [], rows((6, 7, 32))
    for low_memory in (False, True):
        _, model = layers(low_memory=low_memory)
        model(x).square().mean().backward()
        gradients.append([value.grad for value in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_autocast_computes_in_its_dtype():
    _, model = layers()
    x = rows((6, 7, 32))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert model[0].a_quant(x).dtype == torch.bfloat16
        packed = hf_daq.pack(copy.deepcopy(model))(x)
    assert output.dtype == packed.dtype == torch.bfloat16
    assert (output - packed).norm() < 0.02 * output.norm()


def test_calibration_corrects_outputs_and_changes_no_input():
    model, quantized = layers(bits=3)
    x = rows((64, 32))
    before = (quantized(x) - model(x)).square().mean()
    with hf_daq.calibrate(quantized):
        quantized(x)
    assert (quantized(x) - model(x)).square().mean() < before


@pytest.mark.parametrize("packed", [False, True])
def test_save_and_open(packed, tmp_path):
    model = hf_daq.apply_daq(tiny_llama(), **TOKENS)
    if packed:
        hf_daq.pack(model)
    x = {"input_ids": tokens(2)}
    hf_daq.save_pretrained(model, tmp_path)
    opened = hf_daq.from_pretrained(tmp_path)
    assert opened.daq_config.activation_scale == "token"
    assert torch.equal(opened(**x).logits, model.eval()(**x).logits)
    from_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(from_transformers(**x).logits, opened(**x).logits)
    inspected = hf_daq.inspect(tmp_path)
    plan = hf_daq.plan(tiny_llama(), **TOKENS)
    assert inspected.packed_bytes == plan.packed_bytes


def test_reports():
    model = hf_daq.apply_daq(tiny_llama(), **TOKENS)
    x = {"input_ids": tokens(4)}
    summary = hf_daq.summary(model, x)
    assert {layer.inputs_clipped for layer in summary.layers} == {None}
    assert {layer.input_lower for layer in summary.layers} == {None}
    assert min(layer.output_sqnr for layer in summary.layers) > 30
    assert hf_daq.health(model, x).ok
    monitor = hf_daq.Monitor(model)
    model.train()(**x).logits.square().mean().backward()
    monitor.step()
    monitor.close()


def test_inputs_are_drawn_in_steps_of_their_tokens():
    pytest.importorskip("matplotlib")
    model = hf_daq.apply_daq(tiny_llama(), **TOKENS)
    from hf_daq.report.histograms import histograms_of_inputs

    layers = dict(list(daq_layers(model).items())[:1])
    (histogram,) = histograms_of_inputs(model, tokens(2), layers)
    assert histogram.code_values[[0, 128, 255]].tolist() == [-128, 0, 127]
    assert histogram.clipped == 0


# ------------------------------------------------------------------------------------------------------ the config


def test_convolutions_are_refused_with_the_rule_to_write():
    model = small_timm("resnet18")
    with pytest.raises(ConfigError, match=r'activation_scale="token" is for linear layers, and .*activation_bits'):
        hf_daq.apply_daq(model, bits=8, activation_scale="token")
    rules = [{"pattern": "re:.*(conv|downsample).*", "activation_bits": None}]
    planned = hf_daq.plan(model, bits=8, activation_scale="token", rules=rules, first_last_bits=8)
    assert planned.quantized["fc"].activation_bits == 8
    with pytest.raises(ConfigError, match="symmetric, which takes 2 bits or more, and activation_bits gives inputs 1"):
        DaqConfig(weight_bits=4, activation_bits=1, activation_scale="token")
    with pytest.raises(ConfigError, match="activation_scale='row' is not one of 'static', 'token'"):
        DaqConfig(bits=8, activation_scale="row")
    assert DaqConfig(bits=8, activation_scale="token", scale_dtype="bfloat16").scale_dtype == "bfloat16"
    assert DaqConfig.from_dict({"bits": 8}).activation_scale == "static"


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "config",
    [
        {"weight_bits": 8, "activation_bits": 8, "weight_granularity": "channel"},
        {"weight_bits": 8, "activation_bits": 8, "weight_grid": "odd"},
        {"weight_bits": 4, "activation_bits": 8, "group_size": 16},
        {"weight_bits": 4, "activation_bits": 6, "weight_granularity": "channel"},
    ],
)
def test_compressed_tensors_are_dynamic_and_plain_transformers_opens_them(config, tmp_path):
    pytest.importorskip("compressed_tensors")
    from hf_daq.export.compressed_tensors import export_compressed_tensors

    model = hf_daq.apply_daq(tiny.build("llama"), DaqConfig(**config, activation_scale="token")).eval()
    x = {"input_ids": torch.randint(3, tiny.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))}
    report = export_compressed_tensors(model, tmp_path, x)
    assert report.layer_error < 1e-2  # the largest value of a row is at a tie, which rounding errors decide
    assert "with a scale for each token" in str(report)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    inputs = [group["input_activations"] for group in described["config_groups"].values()]
    assert {(one["dynamic"], one["strategy"], one["symmetric"]) for one in inputs} == {(True, "token", True)}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        got, expected = opened(**x).logits, model(**x).logits
    assert (got - expected).norm() < 0.1 * expected.norm()  # such values move those behind them, at 6 bits most


ON_RUNTIMES = [
    {"weight_granularity": "channel"},
    {"weight_grid": "odd"},
    {"bits": None, "weight_bits": 4, "activation_bits": 6},
    {"group_size": 16},
]


@pytest.mark.slow
@pytest.mark.parametrize("config", ON_RUNTIMES, ids=str)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_computes_the_integers(config, runtime, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime", *[runtime] * (runtime == "openvino")):
        pytest.importorskip(package)
    from hf_daq.export.onnx import export_onnx

    model = hf_daq.apply_daq(tiny_bert(), **(TOKENS | config)).eval()
    if CUTS_OFF and runtime == "openvino" and config.keys() & {"weight_granularity", "weight_grid"}:
        with pytest.raises(ExportError, match="no VNNI instructions.*weight_bits=7"):
            export_onnx(model, tmp_path / "model.onnx", tokens(8), runtime=runtime)
        return
    report = export_onnx(model, tmp_path / "model.onnx", tokens(8), runtime=runtime)
    assert set(report.runtimes) >= {runtime}
    assert report.passed  # each layer equals the integers on its own codes, and other codes are at ties
    assert max(found.error for found in report.runtimes.values()) < 2e-2


def test_gguf_has_no_such_inputs(tmp_path):
    pytest.importorskip("gguf")
    from hf_daq.export.gguf import export_gguf

    model = hf_daq.apply_daq(tiny_llama(), bits=8, group_size=32, activation_scale="token")
    with pytest.raises(ExportError, match="llama.cpp has no such inputs"):
        export_gguf(model, tmp_path / "model.gguf")
