"""ONNX files of quantized models, in integers that ONNX Runtime and OpenVINO compute with."""

from __future__ import annotations

import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CalibrationError, ExportError
from .fileformat import replace_file
from .integers import Integers, integer_arithmetic, integers
from .layers import QuantizedLayer
from .packed import daq_layers

_RUNTIMES = ("onnxruntime", "openvino")
_REFERENCE = "integers, PyTorch"
_BATCH = 16
_LARGEST_FILE = 2**31 - 2**20
_LARGEST_SUM = 2**15 - 1
_INT8 = 127
_BLOCK_SIZES = {16, 32, 64, 128, 256}


@dataclass(frozen=True)
class Agreement:
    """A runtime against PyTorch, over all rows of the inputs.

    top1: share of equal argmax over the last dimension of the first output. flips: how many are not equal.
    error: RMS of the difference of the outputs over the RMS of PyTorch's. largest: the largest absolute difference.
    """

    top1: float
    flips: int
    predictions: int
    error: float
    largest: float


@dataclass
class Report:
    """What was written, and how it compares with the model in PyTorch.

    bytes: size of the file. rows: rows of the inputs compared. runtimes: by name; empty without verification.
    layers: layer -> share of the codes of its input that differ in ONNX Runtime, in the order of computation.
    int8_outputs: whether outputs of convolutions were rounded to 8 bits.
    """

    path: Path
    bytes: int
    weights: str
    int8_outputs: bool
    rows: int = 0
    runtimes: dict[str, Agreement] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        title = f"{self.path}: {self.bytes / 2**20:.2f} MiB, {self.weights} weights"
        lines = [title + (", outputs of convolutions in 8 bits" if self.int8_outputs else "")]
        if self.runtimes:
            lines.append(
                f"{'against PyTorch':<20}{'equal top-1':>12}{'RMS error':>12}{'largest':>12}   {self.rows} rows"
            )
        for name, found in self.runtimes.items():
            lines.append(f"{name:<20}{found.top1:>12.2%}{found.error:>12.2e}{found.largest:>12.2e}")
        if self.layers:
            width = max(map(len, [*self.layers, "layer"])) + 2
            lines.append(f"{'layer':<{width}}different input codes")
            lines += [f"{name:<{width}}{share:>21.4%}" for name, share in self.layers.items()]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    weights: str = "int8",
    runtime: str = "onnxruntime",
    int8_outputs: bool = False,
    opset: int = 21,
    verify: bool = True,
    runtimes: Sequence[str] | None = None,
    min_agreement: float = 0.995,
    max_error: float = 0.1,
) -> Report:
    """Write a calibrated, trained or packed model as an ONNX file, and compare the file with the model.

    Layers are written as QuantizeLinear and DequantizeLinear around convolutions and matrix products, with unsigned codes
    of 8 bits for inputs and signed integers for weights; runtimes turn these into integer kernels, whose sums are exact.
    Weights of 1 to 7 bits are held as they are. Of 8 bits, odd integers up to 255 do not fit int8: held are `q - 128`,
    and the missing half step is the sum of the inputs under the kernel times a constant for each channel, which takes
    some time. Sums of codes below 8 bits do not saturate the 16-bit accumulators of processors without VNNI. Layers
    without a quantized input, and groups of columns, have integers in the file and compute in float; but for linear
    layers with groups of 16, 32, 64, 128 or 256 columns ONNX Runtime has a kernel of its own that rounds inputs to 8
    bits, an error of some 0.3 %, unless its session option `session.qdq_matmulnbits_accuracy_level` is "1".

    Needs `pip install onnx onnxscript`, and onnxruntime for `verify` and `int8_outputs`.

    Args:
        model: in float32. It is traced in evaluation and left as it was.
        path: of the file; replaced once everything has passed.
        inputs: real data, float32 images or integer tokens: a tensor, a tuple or a mapping, each tensor with the same
            number of rows, 2 at least. Two rows are traced; the number of rows stays free in the file, and the length
            of token sequences too where the model allows. All are used to verify and for the ranges of `int8_outputs`;
            a few hundred are enough.
        weights: "int8", or "int4": weights of up to 3 bits take half a byte in the file and run like int8.
        runtime: the one the file is for. Both run either file. "onnxruntime": convolutions without groups are written as
            products of gathered codes with a matrix, because ONNX Runtime has no fast integer convolution with a float
            output; the height and width of images are fixed. "openvino": convolutions stay what they are.
        int8_outputs: convolutions stay what they are; outputs of convolutions that no quantizer follows are rounded to 8
            bits, 8-bit weights of convolutions to 255 values, and biases to int32. Not exact: expect some percent of
            other top-1 predictions. For ONNX Runtime and networks with depthwise convolutions, which it computes
            slowly otherwise.
        opset: 21 or higher.
        verify: run all inputs through every runtime and compare.
        runtimes: those to compare with, of "onnxruntime" and "openvino"; None for those installed. If `runtime` is among
            them, it alone has to pass.
        min_agreement: smallest share of equal top-1. One different prediction is always allowed: among fewer than 200 a
            single one would decide.
        max_error: largest RMS of the difference of outputs, over the RMS of the outputs. A file that misses one of the two
            passes all the same if it is as close to the model as the reference, `integer_arithmetic`, is on these
            inputs: a network may be that sensitive to inputs between two codes.

    Returns:
        A `Report`; print it.

    Raises:
        ExportError: a package is missing, the model cannot be exported, or verification fails; there is no new file at
            `path`. CalibrationError: a layer is not calibrated.
    """
    path, batch, layers = Path(path), _Inputs(inputs), daq_layers(model)
    chosen = _chosen_runtimes(runtimes) if verify else ()
    _require("onnx", "onnxscript", *(["onnxruntime"] if int8_outputs else []), *chosen)
    _check(model, layers, weights, runtime, opset)
    batch.to(next(model.parameters()).device)
    with _inference(model):
        proto = _exported(model, layers, batch, opset, int8_outputs and weights == "int8")
        _rewrite(proto, batch, weights, int8_outputs, runtime)
        _check_size(proto.ByteSize())
        report = Report(path, proto.ByteSize(), weights, int8_outputs)
        if verify:
            _verify(report, model, layers, proto, batch, chosen)
            _judge(report, model, batch, runtime, min_agreement, max_error)
    contents = proto.SerializeToString()
    replace_file(path, lambda temporary: temporary.write_bytes(contents))
    return report


def _chosen_runtimes(runtimes: Sequence[str] | None) -> Sequence[str]:
    if runtimes is None:
        return [name for name in _RUNTIMES if name == "onnxruntime" or importlib.util.find_spec(name)]
    for name in runtimes:
        if name not in _RUNTIMES:
            raise ExportError(f"runtimes: {name!r} is not one of {', '.join(_RUNTIMES)}")
    return runtimes


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export_onnx needs packages that are not installed: pip install {' '.join(missing)}")


def _check(model: nn.Module, layers: Mapping[str, Any], weights: str, runtime: str, opset: int) -> None:
    if not layers:
        raise ExportError("export_onnx needs a quantized model: apply_daq and calibrate come first")
    if weights not in ("int8", "int4"):
        raise ExportError(f'weights={weights!r}: write "int8" or "int4"')
    if runtime not in _RUNTIMES:
        raise ExportError(f"runtime={runtime!r}: write one of {', '.join(_RUNTIMES)}")
    if opset < 21:
        raise ExportError(f"opset={opset}: write 21 or higher")
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLayer) and not layer.calibrated:
            raise CalibrationError(f"layer {name!r} is not calibrated; run hf_daq.calibrate(model) before exporting")
    other = {value.dtype for value in model.parameters() if value.is_floating_point()} - {torch.float32}
    if other:
        raise ExportError(f"the model has parameters in {', '.join(map(str, other))}; export model.float()")


def _check_size(size: int) -> None:
    if size > _LARGEST_FILE:
        raise ExportError(f"the file would have {size / 2**30:.1f} GiB; one ONNX file holds 2 GiB at most")


class _Inputs:
    """The inputs of a model as a tuple or a mapping of tensors."""

    def __init__(self, inputs: Any) -> None:
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        self.named = isinstance(inputs, Mapping)
        if not isinstance(inputs, Mapping | Sequence):
            raise ExportError(f"inputs must be a tensor, a tuple or a mapping of tensors, not {type(inputs).__name__}")
        self.tensors: dict[Any, Tensor] = dict(inputs if self.named else enumerate(inputs))
        if not self.tensors or not all(isinstance(value, Tensor) and value.ndim for value in self.tensors.values()):
            raise ExportError("inputs must be a tensor, a tuple or a mapping of tensors, the first dimension rows")
        counts = {len(value) for value in self.tensors.values()}
        if len(counts) > 1 or min(counts) < 2:
            raise ExportError(f"inputs need two rows at least, the same number in each; they have {sorted(counts)}")
        self.rows = counts.pop()

    def to(self, device: torch.device) -> None:
        self.tensors = {key: value.detach().to(device) for key, value in self.tensors.items()}

    def part(self, rows: slice) -> list[Tensor]:
        return [value[rows] for value in self.tensors.values()]

    def batches(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.rows, _BATCH):
            yield self.part(slice(start, start + _BATCH))

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), dict(zip(self.tensors, tensors, strict=True))) if self.named else (tuple(tensors), {})

    def shapes(self, sequence: bool) -> Any:
        """Free dimensions: the rows, and with `sequence` the columns of tokens."""
        rows, columns = torch.export.Dim("batch"), torch.export.Dim("sequence")
        shapes = {
            key: {0: rows, 1: columns} if sequence and _are_tokens(value) else {0: rows}
            for key, value in self.tensors.items()
        }
        return shapes if self.named else tuple(shapes.values())

    @property
    def tokens(self) -> bool:
        return any(map(_are_tokens, self.tensors.values()))


def _are_tokens(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Inside, the model computes as in evaluation, without gradients and without a cache of keys and values."""
    training = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        for module, _ in training:
            module.training = False
        if use_cache:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
            if mode:
                module.__dict__.pop("_kept", None)
        if use_cache:
            config.use_cache = use_cache


def _outputs(model: nn.Module, batch: _Inputs, tensors: list[Tensor]) -> list[Tensor]:
    args, kwargs = batch.arguments(tensors)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _exported(model: nn.Module, layers: Mapping[str, Any], batch: _Inputs, opset: int, multiply: bool) -> Any:
    """The model traced, with its layers in integers."""
    args, kwargs = batch.arguments(batch.part(slice(2)))
    names = _output_names(model(*args, **kwargs))
    with _emitting(layers, multiply), _quiet():
        for sequence in (True, False) if batch.tokens else (False,):
            with suppress(torch.onnx.OnnxExporterError) if sequence else _export_errors():
                program = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=batch.shapes(sequence),
                    output_names=names,
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                )
                break
    assert program is not None
    found: Any = program.model.graph.initializers.values()
    _check_size(sum(value.const_value.nbytes for value in found))
    return program.model_proto


def _output_names(outputs: Any) -> list[str] | None:
    if isinstance(outputs, Tensor):
        return ["output"]
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return list(outputs)
    return None


@contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(f"torch.onnx cannot export this model: {cause[0] if cause else error!r}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _emitting(layers: Mapping[str, Any], multiply: bool) -> Iterator[None]:
    """Inside, quantized layers emit ONNX operators."""
    try:
        for name, layer in layers.items():
            layer.forward = _Emission(layer, name, multiply)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


class _Emission:
    """The forward of a layer while it is traced."""

    def __init__(self, layer: Any, name: str, multiply: bool) -> None:
        self.layer, self.name, found = layer, name, integers(layer)
        self.compute = getattr(layer, "quantized_class", type(layer)).compute
        self.input_bits, self.bias = found.input_bits, found.bias
        device = found.weight.device
        self.input_scale = found.input_scale[0].clone()
        self.zero_point = torch.tensor(found.zero_point, dtype=torch.uint8, device=device)
        self.bounds = [
            torch.tensor(code, dtype=torch.uint8, device=device) for code in (0, 2 ** (self.input_bits or 8) - 1)
        ]
        self.linear = not isinstance(layer, nn.Conv2d)
        self.offset = found.weight_bits == 8
        multiple = _multiple(found) if multiply else 1
        factor = 2 if self.offset else 1 / multiple
        self.scale = found.weight_scale * factor
        codes = (found.weight - 1).div(2, rounding_mode="floor") if self.offset else found.weight * multiple
        self.codes, self.group_size = codes.to(torch.int8), found.group_size
        self.scale = self.scale.expand(len(self.codes), -1).contiguous()
        self.in_integers = self.group_size is None and self.input_bits is not None
        self.blocks = self.linear and not self.in_integers and not self.offset and self._even_blocks()
        if self.linear and (self.in_integers or self.blocks):
            self.codes, self.scale = self.codes.t().contiguous(), self.scale.t().contiguous()
        self.ones = torch.ones(len(self.codes), 1, dtype=torch.int8, device=device)
        self.one = torch.ones((), device=device)
        self._prepare_rows()

    def _even_blocks(self) -> bool:
        # Other sizes, and blocks of weights beside quantized inputs, are refused or computed wrongly by runtimes.
        columns = self.codes.shape[1]
        return self.input_bits is None and self.group_size in _BLOCK_SIZES and columns % self.group_size == 0

    def _prepare_rows(self) -> None:
        """The weight for layers that compute in float: a row of integers for each scale, and what to cut off."""
        self.shape = self.codes.shape
        if self.in_integers or self.blocks:
            return
        flat = self.codes.flatten(1)
        self.columns, size = flat.shape[1], self.group_size or flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, -self.columns % size))
        self.rows = flat.reshape(-1, size).contiguous()
        self.scale = self.scale.reshape(-1)
        self.half = (self.scale / 2).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        x = self._quantized(x)
        if self.in_integers and self.linear:
            return self._product(x)
        if self.in_integers:
            weight = self._dequantized("weight", self.codes, self.scale[:, 0], axis=0)
            output: Tensor = self.compute(self.layer, x, weight, self.bias)
        elif self.blocks:
            weight = self._dequantized("weight", self.codes, self.scale, axis=0, block_size=self.group_size)
            output = torch.matmul(x, weight)
            return output if self.bias is None else output + self.bias
        else:
            output = self.compute(self.layer, x, self._float_weight(), self.bias)
        return output

    def _quantized(self, x: Tensor) -> Tensor:
        if self.input_bits is None:
            return x
        constants, emit = (self.input_scale, self.zero_point), torch.onnx.ops.symbolic
        role = {"hf_daq": f"{self.name}.input_codes"}
        name = role if self.input_bits == 8 else {}
        x = emit("QuantizeLinear", (x, *constants), dtype=torch.uint8, shape=x.shape, metadata_props=name)
        if self.input_bits < 8:
            x = emit("Clip", (x, *self.bounds), dtype=torch.uint8, shape=x.shape, metadata_props=role)
        name = {"hf_daq": f"{self.name}.input"}
        return emit("DequantizeLinear", (x, *constants), dtype=torch.float32, shape=x.shape, metadata_props=name)

    def _dequantized(self, role: str, codes: Tensor, scale: Tensor, **attributes: Any) -> Tensor:
        notes = {"hf_daq": f"{self.name}.{role}"}
        if self.offset and role == "weight":
            notes["hf_daq_offset"] = "1"
        zeros = () if "block_size" in attributes else (torch.zeros_like(scale, dtype=torch.int8),)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, scale, *zeros),
            attributes,
            dtype=torch.float32,
            shape=codes.shape,
            metadata_props=notes,
        )

    def _product(self, x: Tensor) -> Tensor:
        output = torch.matmul(x, self._dequantized("weight", self.codes, self.scale[0], axis=1))
        if self.bias is not None:
            output = output + self.bias
        if self.offset:
            sums = torch.matmul(x, self._dequantized("ones", self.ones, self.one))
            output = output + sums * (self.scale[0] / 2)
        return output

    def _float_weight(self) -> Tensor:
        weight = self._dequantized("weight_rows", self.rows, self.scale, axis=0)
        if self.offset:
            weight = weight + self.half
        if weight.shape != self.shape:
            weight = weight.reshape(len(self.codes), -1)[:, : self.columns].reshape(self.shape)
        return weight


def _multiple(found: Integers) -> int:
    """A factor for the integers of a weight, where outputs have 8 bits. Runtimes round the bias of a convolution to
    multiples of the product of both scales, which is coarse at 1 or 2 bits; and processors without VNNI add pairs of
    products in 16 bits."""
    if found.input_bits is None or found.group_size is not None:
        return 1
    largest = 2**found.weight_bits - 1
    return max(1, min(_INT8, _LARGEST_SUM // (2 * (int(2**found.input_bits) - 1))) // int(largest))


def _rewrite(proto: Any, batch: _Inputs, weights: str, int8_outputs: bool, runtime: str) -> None:
    """What makes the traced graph exact and fast."""
    import onnx

    from . import onnx_graph as passes

    graph = passes.Graph(proto)
    passes.name_values(graph)
    passes.fold_pads(graph)
    passes.fold_batch_norm(graph)
    passes.drop_activations(graph)
    if int8_outputs:
        passes.round_offsets(graph)
        passes.quantize_outputs(graph, _output_ranges(graph, batch))
        passes.drop_activations(graph)
        passes.integer_bias(graph)
    else:
        if runtime == "onnxruntime":
            passes.convolutions_as_products(graph)
        passes.add_offsets(graph)
        passes.separate_bias(graph)
    if weights == "int4":
        passes.store_int4(graph)
    passes.share_constants(graph)
    onnx.checker.check_model(proto)


def _output_ranges(graph: Any, batch: _Inputs) -> dict[str, tuple[float, float]]:
    """For the float outputs of convolutions the range whose 8 bits have the smallest squared error."""
    from onnx import TensorProto

    from .onnx_graph import float_outputs, with_outputs

    names = list(float_outputs(graph))
    if not names:
        return {}
    session = _Session(with_outputs(graph.model, names, TensorProto.FLOAT), names)
    samples: dict[str, list[Any]] = defaultdict(list)
    bounds: dict[str, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))
    generator = np.random.default_rng(0)
    for tensors in batch.batches():
        for name, values in zip(names, session(tensors), strict=True):
            low, high = bounds[name]
            bounds[name] = min(low, float(values.min())), max(high, float(values.max()))
            flat = values.reshape(-1)
            samples[name].append(flat[generator.integers(0, len(flat), 2048)])
    return {name: _best_range(np.concatenate(samples[name]), *bounds[name]) for name in names}


def _best_range(values: Any, low: float, high: float) -> tuple[float, float]:
    def error(part: float) -> float:
        step = max((high - low) * part / 255, 1e-12)
        zero = np.rint(-low * part / step)
        codes = np.clip(np.rint(values / step) + zero, 0, 255)
        return float(np.square((codes - zero) * step - values).mean())

    part = min(np.linspace(1, 0.5, 26), key=error)
    return low * part, high * part


class _Session:
    """A model in ONNX Runtime: tensors in, arrays out."""

    def __init__(self, proto: Any, names: Sequence[str] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.names = names

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        values = [tensor.cpu().numpy() for tensor in tensors]
        found: list[Any] = self.session.run(self.names, dict(zip(self.inputs, values, strict=True)))
        return found


class _OpenVino:
    """A model in OpenVINO: tensors in, arrays out."""

    def __init__(self, proto: Any) -> None:
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.request = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", options)

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        found = self.request([tensor.cpu().numpy() for tensor in tensors])
        return [found[position] for position in range(len(self.request.outputs))]


@dataclass
class _Comparison:
    """Sums over batches behind an `Agreement`."""

    flips: int = 0
    predictions: int = 0
    squares: float = 0.0
    total: float = 0.0
    largest: float = 0.0

    def add(self, expected: list[Any], found: list[Any]) -> None:
        different = expected[0].argmax(-1) != found[0].argmax(-1)
        self.flips += int(different.sum())
        self.predictions += different.size
        for reference, values in zip(expected, found, strict=True):
            difference = values.astype(np.float64) - reference
            self.squares += float(np.square(difference).sum())
            self.total += float(np.square(reference, dtype=np.float64).sum())
            self.largest = max(self.largest, float(np.nan_to_num(np.abs(difference), nan=np.inf).max()))

    def result(self) -> Agreement:
        error = (self.squares / max(self.total, 1e-30)) ** 0.5
        return Agreement(1 - self.flips / self.predictions, self.flips, self.predictions, error, self.largest)


def _verify(
    report: Report, model: nn.Module, layers: Mapping[str, Any], proto: Any, batch: _Inputs, names: Sequence[str]
) -> None:
    """Fill in what the report says of runtimes and layers."""
    from onnx import TensorProto

    from .onnx_graph import input_codes, with_outputs

    builders = {"onnxruntime": _Session, "openvino": _OpenVino}
    runtimes = {name: builders[name](proto) for name in names}
    comparisons = {name: _Comparison() for name in names}
    values = input_codes(proto) if "onnxruntime" in names else []
    layered = _Session(with_outputs(proto, values, TensorProto.UINT8), values) if values else None
    different: dict[str, list[float]] = defaultdict(list)
    with _recorded_codes(layers) as recorded:
        for tensors in batch.batches():
            recorded.clear()
            expected = [value.cpu().numpy() for value in _outputs(model, batch, tensors)]
            for name, runtime in runtimes.items():
                comparisons[name].add(expected, runtime(tensors))
            if layered is not None:
                for value, codes in zip(values, layered(tensors), strict=True):
                    different[value].append(float((codes != recorded[value]).mean()) * len(tensors[0]))
    report.rows = batch.rows
    report.runtimes = {name: comparison.result() for name, comparison in comparisons.items()}
    report.layers = {name.replace(".input_codes", ""): sum(part) / batch.rows for name, part in different.items()}


@contextmanager
def _recorded_codes(layers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside, forwards leave the codes of the inputs of layers in a dictionary, by the names of their values."""
    recorded: dict[str, Any] = {}

    def record(layer: Any, args: Any, kwargs: Any, role: str) -> None:
        number = sum(name == role or name.startswith(f"{role}.") for name in recorded)
        codes = layer.a_quant.codes(args[0] if args else next(iter(kwargs.values())))
        recorded[f"{role}.{number}" if number else role] = codes.cpu().numpy()

    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, role=f"{name}.input_codes": record(module, args, kwargs, role),
            with_kwargs=True,
        )
        for name, layer in layers.items()
        if layer.a_quant is not None
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _judge(
    report: Report, model: nn.Module, batch: _Inputs, runtime: str, min_agreement: float, max_error: float
) -> None:
    """Refuse a file that is not as close as asked, nor as close as the reference."""
    for name, found in list(report.runtimes.items()):
        if runtime in report.runtimes and name != runtime:
            continue
        allowed = max(1, int((1 - min_agreement) * found.predictions))
        if found.flips <= allowed and found.error <= max_error:
            continue
        reference = report.runtimes.setdefault(_REFERENCE, _reference(model, batch))
        if found.flips <= max(allowed, 2 * reference.flips) and found.error <= max(max_error, 2 * reference.error):
            continue
        advice = "int8_outputs=False is exact" if report.int8_outputs else "other limits are yours to set"
        raise ExportError(
            f"{name}: {found.top1:.2%} of its top-1 are PyTorch's, with an RMS error of {found.error:.2e}; "
            f"min_agreement={min_agreement:g}, max_error={max_error:g}; {advice}. Nothing was written.\n{report}"
        )


def _reference(model: nn.Module, batch: _Inputs) -> Agreement:
    """The model in integers, in PyTorch, against itself."""
    comparison = _Comparison()
    for tensors in batch.batches():
        expected = [value.cpu().numpy() for value in _outputs(model, batch, tensors)]
        with integer_arithmetic(model):
            comparison.add(expected, [value.cpu().numpy() for value in _outputs(model, batch, tensors)])
    return comparison.result()
