"""Linear layers with weights alone, in ONNX Runtime's products with few bits."""

import collections
import importlib.util

import pytest
import torch
from models import images, small_net
from text_models import tiny_llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq.errors import ExportError
from hf_daq.export.onnx import export_onnx
from hf_daq.export.onnx_nbits import block_size

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def network():
    """Columns that are and are not a multiple of a block; GPT-2's layer, one without a bias, and a batch of vectors."""
    torch.manual_seed(0)
    layers = nn.Linear(200, 96), nn.GELU(), Conv1D(64, 96), nn.Linear(64, 40, bias=False), nn.Linear(40, 10)
    return nn.Sequential(*layers).eval()


def quantized(model, x, **config):
    """A plain network with its first and last layer."""
    rules = [{"pattern": "*", "weight_bits": config["weight_bits"]}] if isinstance(model, nn.Sequential) else []
    hf_daq.apply_daq(model, rules=rules, **config)
    with hf_daq.calibrate(model):
        model(**x) if isinstance(x, dict) else model(x)
    return model.eval()


def kinds(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("bits", "config"),
    [
        (1, {"weight_granularity": "tensor"}),
        pytest.param(2, {"weight_granularity": "channel"}, marks=pytest.mark.slow),
        (4, {"group_size": 48}),
        pytest.param(3, {"group_size": 16}, marks=pytest.mark.slow),
        pytest.param(8, {"group_size": 32}, marks=pytest.mark.slow),
        pytest.param(2, {"group_size": 16, "weight_grid": "integer"}, marks=pytest.mark.slow),
        (3, {"weight_granularity": "channel", "weight_grid": "integer"}),
        pytest.param(4, {"group_size": 32, "weight_grid": "integer"}, marks=pytest.mark.slow),
    ],
)
def test_weights_alone(bits, config, tmp_path):
    """Exact to rounding in float32; with inputs in 8 bits it is not, and the report says so."""
    x = torch.randn(8, 3, 200)
    model = quantized(network(), x, weight_bits=bits, **config)
    exact = export_onnx(model, tmp_path / "exact.onnx", x)
    assert exact.runtimes["onnxruntime"].error < 1e-6
    fast = export_onnx(model, tmp_path / "fast.onnx", x, int8_inputs=True, min_agreement=0)
    assert 1e-4 < fast.runtimes["onnxruntime"].error < 3e-2
    assert "inputs of layers with weights alone in 8 bits" in str(fast)
    assert "MatMulNBits" in kinds(tmp_path / "fast.onnx")
    assert ("MatMulNBits" in kinds(tmp_path / "exact.onnx")) == (bits <= 4)
    for name in ("exact", "fast"):
        found = ort.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"input": x[:1].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x[:1]).detach(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_file_holds_the_bits_of_the_weights(bits, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 8)), torch.randn(4, 8)
    quantized(model, x, weight_bits=bits, group_size=128)
    size = export_onnx(model, tmp_path / "a.onnx", x, verify=False).bytes
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    assert size < 1.1 * (tmp_path / "packed" / "model.safetensors").stat().st_size


def test_groups_that_the_operator_does_not_take(tmp_path):
    x = torch.randn(8, 200)
    model = quantized(network(), x, weight_bits=3, group_size=20)
    assert export_onnx(model, tmp_path / "a.onnx", x).runtimes["onnxruntime"].error < 1e-6
    assert "MatMulNBits" not in kinds(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [
        (4096, None, 256),
        (4096, 64, 64),
        (96, 48, 16),
        (200, None, 256),
        (40, None, 16),
        (96, 20, None),
        (4096, 512, 256),
    ],
)
def test_block_sizes(columns, group_size, expected):
    assert block_size(columns, group_size, 4) == expected


def test_quantized_inputs_keep_their_codes(tmp_path):
    """Groups of columns compute in float: int8_inputs leaves inputs that are quantized as they are."""
    x = torch.randn(16, 200)
    model = quantized(network(), x, weight_bits=4, activation_bits=8, group_size=16)
    assert export_onnx(model, tmp_path / "a.onnx", x, max_error=1e-4).runtimes["onnxruntime"].error < 1e-4
    assert kinds(tmp_path / "a.onnx")["MatMulNBits"] == 4


@pytest.mark.slow
def test_layers_that_read_one_input_share_its_sums(tmp_path):
    x = {"input_ids": tokens(8)}
    model = quantized(tiny_llama(), x, weight_bits=4, group_size=16, weight_grid="odd")
    export_onnx(model, tmp_path / "a.onnx", x)
    found = kinds(tmp_path / "a.onnx")
    assert found["MatMulNBits"] == 14
    assert found["ReduceSum"] == 8
    assert str(importlib.util.find_spec("transformers").origin).encode() not in (tmp_path / "a.onnx").read_bytes()


def test_int8_inputs_are_refused(tmp_path):
    x, path = torch.randn(8, 200), tmp_path / "a.onnx"
    model = quantized(network(), x, weight_bits=4)
    with pytest.raises(ExportError, match='int8_inputs=True is for runtime="onnxruntime"'):
        export_onnx(model, path, x, runtime="openvino", int8_inputs=True)
    with pytest.raises(ExportError, match="int8_inputs=False is exact"):
        export_onnx(model, path, x, int8_inputs=True, max_error=1e-5)
    with pytest.raises(ExportError, match="activation_bits=None"):
        export_onnx(
            quantized(small_net(), images(8), weight_bits=4, activation_bits=4), path, images(8), int8_inputs=True
        )
    assert not path.exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_files_for_both_runtimes(runtime, tmp_path):
    """What is written for OpenVINO is exact in both; OpenVINO, which rounds the inputs of MatMulNBits, refuses the other."""
    openvino = pytest.importorskip("openvino")
    x = torch.randn(8, 200)
    model = quantized(network(), x, weight_bits=2, group_size=16)
    report = export_onnx(model, tmp_path / "a.onnx", x, runtime=runtime)
    assert all(found.error < 1e-6 for found in report.runtimes.values())
    if runtime == "openvino":
        assert set(report.runtimes) == {"onnxruntime", "openvino"}
    else:
        with pytest.raises(RuntimeError, match="WrittenForOnnxRuntimeAlone"):
            openvino.Core().read_model(tmp_path / "a.onnx")
