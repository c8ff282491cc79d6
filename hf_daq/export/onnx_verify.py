"""How close an ONNX file is to its model, and whether that is close enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..files.feeding import EXACT_WITHOUT_VNNI
from ..model.batch import Inputs, outputs_of
from ..nn.integers import integer_arithmetic
from .onnx_files import readable

_REFERENCE = "integers, PyTorch"
_SAME_CODES = ", same codes"
_FINE = """\
Different codes are fine here. They come from values next to a threshold, which
float32 rounds to either side, and from such codes before them. Each layer was
held against the model's integers on its own codes, and the outputs passed."""
_FINE_ROUNDED = """\
Different codes are meant here: outputs of convolutions are rounded to 8 bits.
The outputs of the whole network decide, and they passed."""
_LARGE_SUMS = f"""\
x86 processors without VNNI cut off sums of 8-bit products, unless ONNX Runtime's
session has the option {EXACT_WITHOUT_VNNI}=1."""


@dataclass(frozen=True)
class Agreement:
    """A runtime against PyTorch, over all rows of the inputs.

    top1: share of equal predictions of the first output: its argmax over the classes, (rows, classes), (rows, length,
        classes) or (rows, classes, height, width), or the dimension whose size is the model's number of classes; the
        values themselves where they are integers; None where there are no classes, as in regression, (rows,) or
        (rows, 1), and in maps such as depth, (rows, height, width).
    flips: how many are not equal, of `predictions`.
    error: RMS of the difference of the outputs over the RMS of PyTorch's. largest: the largest absolute difference.
    """

    top1: float | None
    flips: int
    predictions: int
    error: float
    largest: float


@dataclass
class Report:
    """What was written, and how it compares with the model in PyTorch.

    bytes: size of the file. rows: rows of the inputs compared. runtimes: by name; empty without verification.
    layers: layer -> share of the codes of its input that differ in ONNX Runtime, in the order of computation.
    int8_outputs: whether outputs of convolutions were rounded to 8 bits. int8_inputs: whether inputs of linear layers
    with weights alone are. inputs: by name, their shapes in the file, with
    names for dimensions that are free. large_sums: whether sums of two products may exceed 16 bits. passed: whether the file was compared and kept.
    """

    path: Path
    bytes: int
    weights: str
    int8_outputs: bool
    int8_inputs: bool = False
    rows: int = 0
    runtimes: dict[str, Agreement] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    large_sums: bool = False
    passed: bool = False

    def __str__(self) -> str:
        title = f"{self.path}: {self.bytes / 2**20:.2f} MiB, {self.weights} weights"
        title += ", outputs of convolutions in 8 bits" if self.int8_outputs else ""
        lines = [title + (", inputs of layers with weights alone in 8 bits" if self.int8_inputs else "")]
        for name, shape in self.inputs.items():
            fixed = "; sizes in numbers are fixed" if any(isinstance(size, int) for size in shape) else ""
            lines.append(f"input {name} ({', '.join(map(str, shape))}){fixed}")
        if self.runtimes:
            lines.append(
                f"{'against PyTorch':<24}{'equal top-1':>12}{'RMS error':>12}{'largest':>12}   {self.rows} rows"
            )
        for name, found in self.runtimes.items():
            lines.append(f"{name:<24}{_percent(found.top1):>12}{found.error:>12.2e}{found.largest:>12.2e}")
        if self.layers:
            width = max(map(len, [*self.layers, "layer"])) + 2
            lines.append(f"{'layer':<{width}}different input codes")
            lines += [f"{name:<{width}}{share:>21.4%}" for name, share in self.layers.items()]
            if self.passed and any(self.layers.values()):
                lines.append(_FINE_ROUNDED if self.int8_outputs else _FINE)
        if self.large_sums and "onnxruntime" in self.runtimes:
            lines.append(_LARGE_SUMS)
        return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


@dataclass
class Comparison:
    """Sums over batches behind an `Agreement`."""

    flips: int = 0
    predictions: int = 0
    squares: float = 0.0
    total: float = 0.0
    largest: float = 0.0

    def add(self, expected: list[Any], found: list[Any], axis: int | None) -> None:
        first, other = expected[0], found[0]
        if axis is not None:
            first, other = first.argmax(axis), other.argmax(axis)
        if axis is not None or first.dtype.kind != "f":
            self.flips += int((first != other).sum())
            self.predictions += first.size
        for reference, values in zip(expected, found, strict=True):
            if reference.dtype.kind == "f" and reference.size:
                difference = values.astype(np.float64) - reference
                self.squares += float(np.square(difference).sum())
                self.total += float(np.square(reference, dtype=np.float64).sum())
                self.largest = max(self.largest, float(np.nan_to_num(np.abs(difference), nan=np.inf).max()))

    def result(self) -> Agreement:
        error = (self.squares / max(self.total, 1e-30)) ** 0.5
        top1 = 1 - self.flips / self.predictions if self.predictions else None
        return Agreement(top1, self.flips, self.predictions, error, self.largest)


def class_axis(model: nn.Module, batch: Inputs, output: Any) -> int | None:
    """The dimension of an output in which there are classes, or None; `Agreement` says which."""
    shape, config = output.shape, getattr(model, "config", None)
    if len(shape) < 2 or output.dtype.kind != "f":
        return None
    sizes = {getattr(model, "num_classes", None), *(getattr(config, key, None) for key in ("num_labels", "vocab_size"))}
    known = {axis for axis in (1, len(shape) - 1) if shape[axis] in sizes and shape[axis] > 1}
    if len(known) == 1:
        return known.pop()
    given = [tuple(tensor.shape) for tensor in batch.tensors.values() if tensor.is_floating_point()]
    if len(shape) == 3 and any(len(size) == 4 and size[2] * shape[2] == size[3] * shape[1] for size in given):
        return None  # a map of the image
    along = any(len(size) == 3 and size[2] == shape[-1] and size[1] != shape[1] for size in given)
    axis = 1 if len(shape) > 3 or (len(shape) == 3 and along) else len(shape) - 1
    return axis if shape[axis] > 1 else None


def verify_file(
    report: Report, model: nn.Module, layers: Mapping[str, Any], proto: Any, batch: Inputs, names: Sequence[str]
) -> None:
    """Fill in what the report says of runtimes and layers."""
    from onnx import TensorProto

    from .onnx_graph import input_codes, with_outputs

    runtimes = {name: RUNTIMES[name](proto) for name in names}
    comparisons = {name: Comparison() for name in names}
    values = input_codes(proto) if "onnxruntime" in names else []
    layered = OnnxRuntime(with_outputs(proto, values, TensorProto.UINT8), values) if values else None
    different: dict[str, list[float]] = defaultdict(list)
    with _recorded_codes(layers) as recorded:
        for tensors in batch.batches():
            recorded.clear()
            expected = [value.cpu().numpy() for value in outputs_of(model, batch, tensors)]
            for name, runtime in runtimes.items():
                comparisons[name].add(expected, runtime(tensors), class_axis(model, batch, expected[0]))
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


def judge(
    report: Report,
    model: nn.Module,
    batch: Inputs,
    min_agreement: float,
    max_error: float,
    on_codes: Callable[[str], Agreement] | None,
) -> None:
    """Refuse a file that is not as close as asked, where codes at thresholds do not explain it.

    Args:
        on_codes: of files that are to be exact, how close a runtime is to the model that computes with the codes of the
            file. Other files may be as far from the model as the reference.
    """

    def passes(found: Agreement, flips: int = 0, error: float = 0.0) -> bool:
        allowed = max(1, int((1 - min_agreement) * found.predictions), flips)
        return found.flips <= allowed and found.error <= max(max_error, error)

    for name, found in list(report.runtimes.items()):
        if passes(found):
            continue
        if on_codes is not None:
            found = report.runtimes[f"{name}{_SAME_CODES}"] = on_codes(name)
            if passes(found):
                continue
        else:
            if _REFERENCE not in report.runtimes:  # takes a while, and serves both runtimes
                report.runtimes[_REFERENCE] = _reference(model, batch)
            reference = report.runtimes[_REFERENCE]
            if passes(found, 2 * reference.flips, 2 * reference.error):
                continue
        rounded = [name for name in ("int8_outputs", "int8_inputs") if getattr(report, name)]
        advice = f"{rounded[0]}=False is exact" if rounded else "other limits are yours to set"
        raise ExportError(
            f"{name}: {_percent(found.top1)} of its top-1 are PyTorch's, with an RMS error of {found.error:.2e}; "
            f"min_agreement={min_agreement:g}, max_error={max_error:g}; {advice}. Nothing was written.\n{report}"
        )


def _reference(model: nn.Module, batch: Inputs) -> Agreement:
    """The model in integers, in PyTorch, against itself."""
    comparison = Comparison()
    for tensors in batch.batches():
        expected = [value.cpu().numpy() for value in outputs_of(model, batch, tensors)]
        with integer_arithmetic(model):
            found = [value.cpu().numpy() for value in outputs_of(model, batch, tensors)]
        comparison.add(expected, found, class_axis(model, batch, expected[0]))
    return comparison.result()


@contextmanager
def _loading(runtime: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # neither runtime has a class for its errors
        raise ExportError(
            f"{runtime} does not open the file: {str(error).strip()[:500]}\nWrite it for the other runtime "
            '(runtime="onnxruntime" or "openvino"), or name the one to compare with: runtimes=["onnxruntime"]'
        ) from error


class OnnxRuntime:
    """A model in ONNX Runtime: tensors in, arrays out."""

    def __init__(self, proto: Any, names: Sequence[str] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong comes as an error
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(EXACT_WITHOUT_VNNI, "1")
        with _loading("ONNX Runtime"), readable(proto) as source:
            given = {"providers": ["CPUExecutionProvider"]}
            try:
                self.session = onnxruntime.InferenceSession(source, options, **given)
            except Exception:  # it fails to write a weight anew that two products have
                options.add_session_config_entry(EXACT_WITHOUT_VNNI, "0")
                self.session = onnxruntime.InferenceSession(source, options, **given)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.names = names

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        values = [tensor.cpu().numpy() for tensor in tensors]
        found: list[Any] = self.session.run(self.names, dict(zip(self.inputs, values, strict=True)))
        return found


class OpenVino:
    """A model in OpenVINO: tensors in, arrays out."""

    def __init__(self, proto: Any) -> None:
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        with _loading("OpenVINO"), readable(proto) as source:
            self.request = core.compile_model(core.read_model(source), "CPU", options)

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        found = self.request([tensor.cpu().numpy() for tensor in tensors])
        return [found[position] for position in range(len(self.request.outputs))]


RUNTIMES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
