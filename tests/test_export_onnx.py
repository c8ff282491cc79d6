"""Exported ONNX files compute what the model computes."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import timm
import timm.layers
import torch
from models import images, small_net
from processor import needs_vnni
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq.apply import pack
from hf_daq.errors import CalibrationError, ExportError
from hf_daq.export.onnx import Report, export_onnx
from hf_daq.export.onnx_metadata import write_metadata
from hf_daq.export.onnx_verify import class_axis
from hf_daq.files.weights_file import fingerprint
from hf_daq.model.batch import Inputs
from hf_daq.nn.integers import integers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def quantized(model, x, **config):
    config = (
        config
        if "bits" in config
        else {"weight_bits": 4, "activation_bits": 4, "weight_granularity": "channel"} | config
    )
    hf_daq.apply_daq(model.eval(), **config)
    with hf_daq.calibrate(model):
        model(**x) if isinstance(x, dict) else model(x)
    return model.eval()


def exported(model, path, x, **options):
    return export_onnx(model, path, x, runtimes=["onnxruntime"], **options)


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def check(model, path, x, max_error=1e-4, **options):
    report = exported(model, path, x, max_error=max_error, **options)
    assert report.runtimes["onnxruntime"].error < max_error, report
    assert path.stat().st_size == report.bytes
    return report


KINDS = {
    "plain": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 8, (3, 2), stride=2, padding=(1, 0), dilation=(2, 1), bias=False),
    "pointwise": lambda: nn.Conv2d(8, 8, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
    "same": lambda: timm.layers.Conv2dSame(8, 8, 3, stride=2),
    "standardized": lambda: timm.layers.StdConv2dSame(8, 8, 3, stride=2),
}


class Branch(nn.Module):
    """A convolution, BatchNorm with negative and zero factors, ReLU6, and a convolution."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.last = KINDS[kind](), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.norm.weight.data = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.3, 2.0, 1e-6, -2.0])
        self.norm.bias.data = torch.linspace(-1, 1, 8)
        self.norm.running_mean.data.normal_()
        self.norm.running_var.data.uniform_(0.5, 2)

    def forward(self, x):
        return self.last(nn.functional.relu6(self.norm(self.conv(x)))).mean((2, 3))


class Convolutions(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branches = nn.ModuleList(Branch(kind) for kind in kinds)
        self.head = nn.Linear(4 * len(kinds), 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


@pytest.mark.parametrize(
    ("runtime", "bits"),
    [
        ("onnxruntime", 1),
        pytest.param("openvino", 8, marks=pytest.mark.slow),
        pytest.param("onnxruntime", 8, marks=pytest.mark.slow),
        pytest.param("openvino", 2, marks=pytest.mark.slow),
    ],
)
def test_convolutions(runtime, bits, tmp_path):
    model = quantized(Convolutions(*KINDS), images(8), weight_bits=bits, activation_bits=bits, weight_grid="odd")
    report = check(model, tmp_path / "a.onnx", images(8), runtime=runtime)
    assert report.large_sums == (bits == 8) == ("session.x64quantprecision=1" in str(report))
    if bits == 8:  # the first layers of all branches quantize the same values alike
        assert len(report.layers) == 1 + len(KINDS)
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert "BatchNormalization" not in [node.op_type for node in graph.node]
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    zero_points = [
        node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    assert len(set(zero_points)) == len(zero_points)  # ONNX Runtime writes each anew, where it is told to add exactly


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "granularity", "grid"),
    [
        (3, 4, "tensor", "odd"),
        pytest.param(8, 8, "tensor", "odd", marks=pytest.mark.slow),
        pytest.param(4, None, "channel", "odd", marks=pytest.mark.slow),
        (8, None, "tensor", "odd"),
        (4, 8, "channel", "integer"),
        (8, 8, "tensor", "integer"),
        (8, None, "channel", "integer"),
    ],
)
def test_small_network(weight_bits, activation_bits, granularity, grid, tmp_path):
    config = {"weight_bits": weight_bits, "activation_bits": activation_bits, "weight_granularity": granularity}
    config["weight_grid"] = grid
    model = quantized(small_net(), images(8), **config)
    report = check(model, tmp_path / "a.onnx", images(8))
    assert list(report.layers) == ([] if activation_bits is None else ["conv", "depthwise", "grouped", "hidden"])
    assert all(share < 1e-3 for share in report.layers.values())


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_of_matrices_one_after_the_other(bits, tmp_path):
    """ONNX Runtime rounds a bias that it takes into a product of matrices, where the output is quantized."""
    torch.manual_seed(0)
    first = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32)]
    model, x = nn.Sequential(*first, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 8)
    check(quantized(model, x, bits=bits, weight_granularity="tensor"), tmp_path / "a.onnx", x, max_error=1e-5)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "group_size", "grid"),
    [
        (3, 8, 16, "odd"),
        (3, None, 16, "odd"),
        (8, 8, 5, "odd"),
        (8, None, 16, "odd"),
        (2, None, 5, "odd"),
        (4, None, 16, "integer"),
    ],
)
def test_groups(group_size, activation_bits, weight_bits, grid, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 6))
    x, config = torch.randn(8, 32), {"weight_granularity": "group", "group_size": group_size}
    quantized(model, x, weight_bits=weight_bits, activation_bits=activation_bits, weight_grid=grid, **config)
    check(model, tmp_path / "a.onnx", x, weights="int4")


def test_groups_of_a_convolution(tmp_path):
    config = {"weight_granularity": "group", "group_size": 16}
    model = quantized(Convolutions("plain"), images(8), **config)
    check(model, tmp_path / "a.onnx", images(8))


def test_int4_is_smaller_and_the_same(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 256), nn.Linear(256, 5)), torch.randn(8, 16)
    quantized(model, x, weight_bits=3, activation_bits=8)
    sizes = [check(model, tmp_path / f"{bits}.onnx", x, weights=f"int{bits}").bytes for bits in (8, 4)]
    assert sizes[1] < sizes[0] - 256 * 64 * 0.45
    results = [session(tmp_path / f"{bits}.onnx").run(None, {"input": x.numpy()})[0] for bits in (8, 4)]
    assert (results[0] == results[1]).all()


def test_the_number_of_rows_is_free(tmp_path):
    model = quantized(small_net(), images(8))
    exported(model, tmp_path / "a.onnx", images(8))
    for rows in (1, 5):
        x = images(rows, seed=3)
        found = session(tmp_path / "a.onnx").run(None, {"x": x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-4)


def test_a_packed_model_gives_the_same_file(tmp_path):
    model = quantized(small_net(), images(8))
    exported(model, tmp_path / "a.onnx", images(8))
    check(pack(model), tmp_path / "packed.onnx", images(8))
    results = [session(tmp_path / f"{name}.onnx").run(None, {"x": images().numpy()})[0] for name in ("a", "packed")]
    assert abs(results[0] - results[1]).max() < 1e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_integers_whose_negative_is_no_int8(runtime, tmp_path):
    model = Convolutions("plain")
    branch = model.branches[0]
    branch.norm.weight.data.fill_(-1)
    branch.conv.weight.data[:, 0, 0, 0] = -2.0  # far below the others
    quantized(model, images(8), weight_bits=8, activation_bits=8, weight_grid="integer", weight_init="3std")
    assert (integers(branch.conv).weight == -128).any()
    check(model, tmp_path / "a.onnx", images(8), runtime=runtime)
    rounded = {"int8_outputs": True, "min_agreement": 0.5, "max_error": 0.1}
    exported(model, tmp_path / "b.onnx", images(8), **rounded)
    kinds = [[node.op_type for node in onnx.load(tmp_path / name).graph.node] for name in ("a.onnx", "b.onnx")]
    assert ["BatchNormalization" in found for found in kinds] == [True, False]


def test_int8_outputs(tmp_path):
    x = images(16)
    for bits in (4, 8):
        model = quantized(Convolutions("depthwise"), x, weight_bits=bits, activation_bits=8)
        report = exported(model, tmp_path / "a.onnx", x, int8_outputs=True, min_agreement=0.5, max_error=0.2)
        assert "in 8 bits" in str(report)
        path = tmp_path / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(path)
        ort.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("QLinearConv") == 2


CALLS = {
    "one_norm": lambda m, x, y: (m.norm(m.conv(x)), m.norm(m.conv(y))),
    "two_norms": lambda m, x, y: (m.norm(m.conv(x)), m.other(m.conv(y))),
    "without_norm": lambda m, x, y: (m.conv(x), m.norm(m.conv(y))),
    "same_input": lambda m, x, y: (m.norm(m.conv(x)), m.other(m.conv(x))),
    "one_after_the_other": lambda m, x, y: (x, m.other(m.conv(m.norm(m.conv(x)).relu()))),
    "norm_of_an_output": lambda m, x, y: (seen := m.conv(x), m.norm(seen)),
    "three_calls": lambda m, x, y: (m.conv(x) + m.norm(m.conv(x)), m.other(m.conv(y))),
    "same_padded_input": lambda m, x, y: (m.norm(m.conv(x)), m.norm(m.reflecting(x))),
}


class CalledTwice(nn.Module):
    """A convolution called more than once, on images of two sizes, before BatchNorms with factors of both signs."""

    def __init__(self, calls):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect") if "padded" in calls else None
        self.norm, self.other, self.calls = Branch("plain").norm, Branch("plain").norm, calls

    def forward(self, x):
        x = self.stem(x).relu()
        first, second = CALLS[self.calls](self, x, nn.functional.avg_pool2d(x, 2))
        return self.head(first.relu().mean((2, 3))) + self.head(second.relu().mean((2, 3))), first


class Together(nn.Module):
    """The outputs of several networks of the same input, one after the other."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        outputs = [network(x) for network in self.networks]
        values = [value for output in outputs for value in (output if isinstance(output, tuple) else (output,))]
        return torch.cat([value.flatten(1) for value in values], 1)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        pytest.param(8, {"runtime": "openvino"}, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=needs_vnni),
        pytest.param(8, {"int8_outputs": True, "max_error": 0.02, "min_agreement": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"weights": "int4"}, marks=pytest.mark.slow),
    ],
    ids=["openvino", "onnxruntime", "int8_outputs", "int4"],
)
def test_layers_called_twice(bits, options, tmp_path):
    model = quantized(Together(*map(CalledTwice, CALLS)), images(8), bits=bits)
    check(model, tmp_path / "a.onnx", images(8), **{"max_error": 1e-5} | options)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.head = CalledTwice("without_norm"), nn.Linear(10, 5)

    def forward(self, left, right):
        return self.head(torch.cat([self.tower(left)[0], self.tower(right)[0]], 1))


@needs_vnni
@pytest.mark.parametrize("order", ["positional", "named"])
def test_a_network_called_on_two_inputs(order, tmp_path):
    left, right = images(8), images(8, seed=1)
    model = Siamese().eval()
    hf_daq.apply_daq(model, bits=8)
    with hf_daq.calibrate(model):
        model(left, right)
    inputs = (left, right) if order == "positional" else {"right": right, "left": left}
    check(model, tmp_path / "a.onnx", inputs, max_error=1e-5)


PADDED = {
    "reflect": lambda: nn.Conv2d(8, 8, (3, 2), padding=1, padding_mode="reflect", groups=2),
    "replicate": lambda: nn.Conv2d(8, 8, 3, padding=2, padding_mode="replicate", stride=2),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="circular", dilation=2, bias=False),
    "circular_one_side": lambda: nn.Conv2d(8, 8, (3, 1), padding=(1, 0), padding_mode="circular"),
    "even_kernel": lambda: nn.Conv2d(8, 8, (2, 4), padding="same", padding_mode="reflect"),
    "even_circular": lambda: nn.Conv2d(8, 8, (2, 4), padding="same", padding_mode="circular"),
    "explicit": lambda: nn.Sequential(nn.ReflectionPad2d((1, 2, 0, 1)), nn.Conv2d(8, 8, 3)),
    "explicit_circular": lambda: nn.Sequential(nn.CircularPad2d((2, 0, 1, 1)), nn.Conv2d(8, 8, 2)),
    "constant": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.7), nn.Conv2d(8, 8, 3)),
    "same": lambda: timm.layers.Conv2dSame(8, 8, 3, stride=2),
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"runtime": "openvino", "max_error": 1e-5}, marks=needs_vnni),
        {"runtime": "onnxruntime", "max_error": 1e-5},
        pytest.param({"int8_outputs": True, "max_error": 0.02, "min_agreement": 0.5}, marks=pytest.mark.slow),
    ],
    ids=["openvino", "onnxruntime", "int8_outputs"],
)
def test_padding(options, tmp_path):
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.ReLU(), make(), nn.BatchNorm2d(8)) for make in PADDED.values()]
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Together(*branches), nn.LazyLinear(5)), images(8)[..., :-3]
    model(x)
    report = export_onnx(quantized(model, x, bits=8), tmp_path / "a.onnx", x, **options)
    openvino = options.get("runtime") == "openvino" and importlib.util.find_spec("openvino") is not None
    assert ("openvino" in report.runtimes) == openvino
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]


def test_openvino_refuses_what_is_for_onnx_runtime_alone(tmp_path):
    openvino = pytest.importorskip("openvino")
    model, path = quantized(Convolutions("depthwise"), images(8)), tmp_path / "a.onnx"
    check(model, path, images(8))
    with pytest.raises(RuntimeError, match=r"operations: hf_daq\.WrittenForOnnxRuntimeAlone"):
        openvino.Core().read_model(path)
    with pytest.raises(ExportError, match=r"WrittenForOnnxRuntimeAlone[\s\S]*Write it for the other runtime"):
        export_onnx(model, tmp_path / "b.onnx", images(8), runtimes=["openvino"])
    assert not (tmp_path / "b.onnx").exists()
    kinds = [node.op_type for node in optimized(path, tmp_path).graph.node]
    assert not {"WrittenForOnnxRuntimeAlone", "Identity"} & set(kinds), "it costs nothing"


def optimized(path, folder):
    """The graph that ONNX Runtime computes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    ort.InferenceSession(path, options)
    return onnx.load(folder / "optimized.onnx")


def test_openvino_agrees(tmp_path):
    pytest.importorskip("openvino")
    model = quantized(Convolutions("plain"), images(8))
    report = export_onnx(model, tmp_path / "a.onnx", images(8), runtime="openvino", max_error=1e-4)
    assert set(report.runtimes) == {"onnxruntime", "openvino"}
    assert "openvino" in str(report)


def test_bert(tmp_path):
    x = {"input_ids": tokens(8), "attention_mask": torch.ones(8, 7, dtype=torch.long)}
    model = quantized(tiny_bert(), x, weight_bits=4, activation_bits=8)
    check(model, tmp_path / "a.onnx", x)
    names = [output.name for output in session(tmp_path / "a.onnx").get_outputs()]
    assert names == ["logits"]
    longer = {
        key: value.numpy()
        for key, value in {"input_ids": tokens(3, 11), "attention_mask": x["attention_mask"].new_ones(3, 11)}.items()
    }
    assert session(tmp_path / "a.onnx").run(None, longer)[0].shape == (3, 2)


@pytest.mark.slow  # test_export_cache.py has one by default
@pytest.mark.parametrize("granularity", ["group", "tensor", "channel"])
def test_llama_with_weights_only(granularity, tmp_path):
    config = {"weight_granularity": granularity, "group_size": 16 if granularity == "group" else None}
    model = quantized(tiny_llama(), {"input_ids": tokens(8)}, weight_bits=3, activation_bits=None, **config)
    report = check(model, tmp_path / "a.onnx", {"input_ids": tokens(8)}, weights="int4")
    assert all(agreement.error < 1e-5 for agreement in report.runtimes.values())  # no input is rounded
    assert model.config.use_cache


def state(model):
    return {name: (module.training, set(module.__dict__), type(module)) for name, module in model.named_modules()}


def test_the_model_is_left_as_it_was(tmp_path, monkeypatch):
    model = quantized(small_net(), images(8))
    model.train()
    model.stem.eval()
    before, values = state(model), copy.deepcopy(model.state_dict())
    exported(model, tmp_path / "a.onnx", images(8))
    assert state(model) == before

    def fail(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("no")

    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", fail)
        with pytest.raises(ExportError, match="cannot export"):
            exported(model, tmp_path / "b.onnx", images(8))
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_verification_catches_a_wrong_graph(tmp_path, monkeypatch):
    from hf_daq.export import onnx_passes

    model = quantized(small_net(), images(64))

    def corrupt(graph):
        for tensor in list(graph.graph.initializer):
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-graph.values(tensor.name), tensor.name))

    monkeypatch.setattr(onnx_passes, "share_constants", corrupt)
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(ExportError, match="different input codes"):
        exported(model, tmp_path / "a.onnx", images(64))
    assert (tmp_path / "a.onnx").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("bits", [2, 8])
def test_a_file_that_is_wrong_by_a_percent_is_refused(bits, tmp_path, monkeypatch):
    from hf_daq.export import onnx_passes

    model, fold = quantized(small_net(), images(8), bits=bits), onnx_passes.fold_batch_norm

    def wrong(graph, rounded):
        fold(graph, rounded)
        for node in graph.nodes("DequantizeLinear"):
            scale = graph.constant(node.input[1])
            if scale is not None and scale.shape == (8,) and "conv" in node.name:
                node.input[1] = graph.add("wrong", (scale * 1.01).astype("float32"))

    monkeypatch.setattr(onnx_passes, "fold_batch_norm", wrong)
    with pytest.raises(ExportError, match="codes of the input of layer 'depthwise' are others than"):
        exported(model, tmp_path / "a.onnx", images(8), min_agreement=0, max_error=1)
    assert not (tmp_path / "a.onnx").exists()


class Sized(nn.Module):
    """A network that decides by the size of its images what it computes."""

    def __init__(self, decide):
        super().__init__()
        self.first, self.second, self.decide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, 2, 1), decide

    def forward(self, x):
        return self.second(self.decide(self.first(x).relu())).mean((2, 3))


def test_images_of_any_size(tmp_path):
    core = pytest.importorskip("openvino").Core()
    x = images(8, 32)
    model = quantized(small_net(), x)
    report = export_onnx(model, tmp_path / "a.onnx", x, runtime="openvino", dynamic_size=True)
    assert list(report.inputs.values()) == [("batch", 3, "height", "width")]
    proto = onnx.load(tmp_path / "a.onnx")
    assert {entry.key: entry.value for entry in proto.metadata_props}["input_size"] == "[3, 32, 32]"
    file = core.compile_model(tmp_path / "a.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((32, 32), (45, 27), (64, 96)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad(), hf_daq.integer_arithmetic(model):
            expected = model(x)
        assert (torch.from_numpy(file(x.numpy())[0]) - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("decide", "words"),
    [
        (
            lambda x: x * x.new_ones(16, 16),
            "torch.onnx cannot export this model for images of any size: leave dynamic_size",
        ),
        (
            lambda x: x if torch.compiler.is_exporting() else x * (x.shape[2] / 16) ** 8,
            "for images of 17 x 15 the file is not",
        ),
        (
            lambda x: x if torch.compiler.is_exporting() or tuple(x.shape[2:]) == (16, 16) else 1 / 0,
            "images of no other size that was tried",
        ),
    ],
)
def test_networks_of_one_size(decide, words, tmp_path):
    pytest.importorskip("openvino")
    x = images(4)
    model = quantized(Sized(decide), x, weight_bits=4, activation_bits=4, rules=[{"pattern": "*", "bits": 4}])
    with pytest.raises(ExportError, match=words):
        export_onnx(model, tmp_path / "a.onnx", x, runtime="openvino", runtimes=["openvino"], dynamic_size=True)
    assert not list(tmp_path.iterdir())


def beside_ties():
    """A layer, and inputs of which one in each row is half a step from two codes: the file rounds it to the other one."""
    torch.manual_seed(0)
    x = torch.randn(64, 2048)
    rules = [{"pattern": "*", "weight_bits": 4, "activation_bits": 3}]
    model = quantized(nn.Sequential(nn.Linear(2048, 8)), x, rules=rules)
    quantizer = model[0].a_quant
    quantizer.lower.data.fill_(-1.0)
    quantizer.upper.data.fill_(0.75)
    x[:, 5] = 0.375
    assert quantizer.codes(x[0, 5:6]).item() == 5
    return model, x


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_codes_beside_ties_are_no_fault(runtime, tmp_path):
    pytest.importorskip(runtime)
    model, x = beside_ties()
    report = export_onnx(model, tmp_path / "a.onnx", x, max_error=1e-5, runtime=runtime, runtimes=[runtime])
    assert report.runtimes[runtime].error > 1e-3
    assert report.runtimes[f"{runtime}, same codes"].error < 1e-6
    assert f"{runtime}, same codes" in str(report)


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [
        ("weight", 1.0005, "with an RMS error of 5.0.e-04"),
        ("weight", 1.01, "on the codes of the file, outputs differ by .*more than rounding explains"),
        ("input", 1.01, "codes of the input of layer '0' are others than"),
    ],
)
def test_faults_are_found_behind_codes_beside_ties(name, factor, words, tmp_path, monkeypatch):
    from hf_daq.export import onnx_passes

    def wrong(graph):
        kinds = ("DequantizeLinear",) if name == "weight" else ("QuantizeLinear",)
        (node,) = (node for node in graph.nodes(*kinds) if f"0.{name}" in node.name or name == "input")
        node.input[1] = graph.add("wrong", graph.values(node.input[1]) * np.float32(factor))

    model, x = beside_ties()
    monkeypatch.setattr(onnx_passes, "drop_traces", wrong)
    with pytest.raises(ExportError, match=words):
        exported(model, tmp_path / "a.onnx", x, max_error=1e-5)
    assert not (tmp_path / "a.onnx").exists()


class Outputs(nn.Module):
    """A model that knows its number of classes, or does not."""

    def __init__(self, **known):
        super().__init__()
        for key, value in known.items():
            setattr(self, key, value)


@pytest.mark.parametrize(
    ("shape", "given", "known", "axis"),
    [
        ((4, 10), (4, 3, 8, 8), {}, 1),
        ((4,), (4, 8), {}, None),
        ((4, 1), (4, 8), {}, None),
        ((4, 5, 8, 6), (4, 3, 16, 12), {}, 1),
        ((4, 1, 8, 6), (4, 3, 16, 12), {}, None),
        ((4, 8, 6), (4, 3, 16, 12), {}, None),
        ((4, 100, 92), (4, 3, 16, 12), {}, 2),
        ((4, 5, 8, 6), (4, 3, 16, 12), {"num_classes": 6}, 3),
        ((4, 7, 11), (4, 7, 3), {}, 2),
        ((4, 11, 9), (4, 3, 9), {}, 1),
        ((4, 9, 11), (4, 7, 3), {"num_classes": 9}, 1),
    ],
)
def test_the_dimension_of_classes(shape, given, known, axis):
    batch = Inputs(torch.zeros(given))
    assert class_axis(Outputs(**known), batch, torch.zeros(shape).numpy()) == axis
    assert class_axis(Outputs(**known), batch, torch.zeros(shape, dtype=torch.int64).numpy()) is None


class Several(nn.Module):
    """Regression, class numbers, a constant and the input itself beside each other; one input goes unused."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, unused=None, scale=None):
        y = self.last(self.hidden(self.first(x).relu()).relu()) * scale
        return {"value": y[:, 0], "parts": [y, y.argmax(-1), (x, None)]}


def test_outputs_of_several_kinds(tmp_path):
    torch.manual_seed(0)
    x = {"scale": torch.rand(8, 1), "unused": torch.randn(8, 4), "x": torch.randn(8, 8)}
    model = quantized(Several(), x, bits=8)
    report = check(model, tmp_path / "a.onnx", x)
    assert report.runtimes["onnxruntime"].top1 is None
    assert report.runtimes["onnxruntime"].predictions == 0
    assert "%" not in next(line for line in str(report).splitlines() if line.startswith("onnxruntime"))


def test_a_report_without_verification(tmp_path):
    model = quantized(small_net(), images(8))
    report = export_onnx(model, tmp_path / "a.onnx", images(8), verify=False)
    assert isinstance(report, Report)
    assert report.runtimes == {}
    assert "MiB" in str(report)
    shape = tuple(images(8).shape[1:])
    assert report.inputs == {"x": ("batch", *shape)}
    assert f"input x (batch, {', '.join(map(str, shape))}); sizes in numbers are fixed" in str(report)
    about = session(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    assert about == {
        "hf_daq_version": hf_daq.__version__,
        "runtime": "onnxruntime",
        "architecture": type(small_net()).__name__,
        "bits": "W4A4",
        "fingerprint": fingerprint(model),
        "input_size": json.dumps(shape),
    }


@pytest.mark.parametrize(("share", "passed"), [(0.1, True), (0.0, True), (0.1, False)])
@pytest.mark.parametrize(("int8_outputs", "words"), [(False, "Different codes are fine"), (True, "codes are meant")])
def test_the_report_says_whether_different_codes_are_fine(share, passed, int8_outputs, words, tmp_path):
    report = Report(tmp_path, 1, "int8", int8_outputs, layers={"conv": share}, passed=passed)
    assert (words in str(report)) == (passed and share > 0)


def test_a_report_of_a_file_that_passed(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(2, 8)
    report = exported(quantized(model, x, bits=8), tmp_path / "a.onnx", x)
    assert report.passed


def about(model, *shape):
    """The metadata of a file with one input."""
    source = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", *shape])
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [source], []))
    write_metadata(proto, model, {}, "openvino")
    return {entry.key: entry.value for entry in proto.metadata_props}


def test_metadata_of_a_model_of_timm():
    model = timm.create_model("test_resnet", num_classes=2)
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": ["cat", "dog"]}
    found, config = about(model, 3, 64, 48), model.pretrained_cfg
    assert json.loads(found["input_size"]) == [3, 64, 48]
    assert json.loads(found["mean"]) == list(config["mean"])
    assert json.loads(found["std"]) == list(config["std"])
    assert float(found["crop_pct"]) == config["crop_pct"]
    assert (found["interpolation"], found["crop_mode"]) == (config["interpolation"], config["crop_mode"])
    assert (json.loads(found["labels"]), found["channel_order"]) == (["cat", "dog"], "RGB")
    model.reset_classifier(3)
    assert "labels" not in about(model, 3, 64, 48)


def test_metadata_of_a_model_of_transformers():
    model = tiny_bert()
    assert about(model, "sequence").keys() == {"hf_daq_version", "runtime", "architecture", "bits", "fingerprint"}
    model.config.id2label = {1: "good", 0: "bad"}
    model.config.name_or_path = "/home/user/bert"
    assert "tokenizer" not in about(model, "sequence")
    model.config._commit_hash, model.config.name_or_path = "0" * 40, "somebody/bert"
    found = about(model, "sequence")
    assert (json.loads(found["labels"]), found["tokenizer"]) == (["bad", "good"], "somebody/bert")


class Wrapped(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.net, self.change = small_net(), change

    def forward(self, x):
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y if y.sum() > 0 else -y, "cannot export"),
        (lambda y: torch.from_numpy(y.detach().numpy() + 1), "cannot export"),
        (lambda y: {"nothing": y.tolist()}, "returns no tensor"),
    ],
)
def test_models_that_cannot_be_exported(change, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export_onnx(quantized(Wrapped(change), images(8)), tmp_path / "a.onnx", images(8))


def test_what_fails_later_is_explained(tmp_path, monkeypatch):
    from hf_daq.export import onnx_passes, onnx_verify

    model = quantized(small_net(), images(8))

    def fail(*args, **kwargs):
        raise RuntimeError("odd")

    for module, name, words in (
        (ort, "InferenceSession", "does not open the file"),
        (onnx_verify.OnnxRuntime, "__call__", "cannot be compared"),
        (onnx_passes, "fold_pads", "cannot be rewritten"),
    ):
        with monkeypatch.context() as patched, pytest.raises(ExportError, match=f"{words}.*odd"):
            patched.setattr(module, name, fail)
            exported(model, tmp_path / "a.onnx", images(8))


def test_errors(tmp_path, monkeypatch):
    path, x = tmp_path / "a.onnx", images(8)
    model = quantized(small_net(), x)
    for options, words in (
        ({"weights": "int2"}, "int4"),
        ({"opset": 17}, "21 or higher"),
        ({"opset": 99}, "opset=99: torch.onnx and the installed onnx write .* instead"),
        ({"runtime": "tvm"}, "onnxruntime"),
        ({"runtimes": ["tvm"]}, "tvm"),
        ({"dynamic_size": True}, 'for runtime="openvino"'),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, path, x, **options)
    for inputs, words in ((x[:1], "two rows"), ([], "tensors"), (3, "tensors"), ((x, x[:4]), "the same number")):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, path, inputs)
    for wrong in (tmp_path, tmp_path / "none" / "a.onnx"):
        with pytest.raises(ExportError, match="a folder that exists"):
            export_onnx(model, wrong, x)
    for inputs in ({"y": x}, x[:, :2], (x, x)):
        with pytest.raises(ExportError, match="does not run on two rows"):
            export_onnx(model, path, inputs)
    with pytest.raises(ExportError, match="the inputs have none"):
        export_onnx(model, path, x.flatten(1), dynamic_size=True, runtime="openvino")
    with pytest.raises(ExportError, match="apply_daq"):
        export_onnx(small_net(), path, x)
    with pytest.raises(CalibrationError, match="not calibrated"):
        export_onnx(hf_daq.apply_daq(small_net(), bits=4), path, x)
    with pytest.raises(ExportError, match=r"model\.float"):
        export_onnx(copy.deepcopy(model).bfloat16(), path, x)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ExportError, match="pip install onnxscript"):
        export_onnx(model, path, x)
    assert not path.exists()


def test_inputs_without_numbers_are_named(tmp_path):
    x = images(4)
    model = quantized(small_net(), x)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ExportError, match="input 0 has NaN"):
        export_onnx(model, tmp_path / "model.onnx", x)


def test_a_number_of_rows_that_the_model_fixes_is_refused(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x).view(len(x), -1)

    x = images(2)
    model = quantized(Flat(), x)
    with pytest.raises(ExportError, match=r"take 2 rows of 'x' and no other number.*write x.shape\[0\]"):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())
