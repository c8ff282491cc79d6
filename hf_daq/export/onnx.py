"""ONNX files of quantized models, in integers that ONNX Runtime and OpenVINO compute with."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import DaqError, ExportError
from ..model.batch import Inputs, are_images, without_caches
from ..model.unchanged import check_unchanged
from ..nn.base import check_calibrated, refuse_adapted_weights
from ..nn.integers import exceeds_16_bits
from ..nn.layers import CONVOLUTIONS, TRANSPOSED, evaluating
from ..nn.packed import daq_layers
from .guards import refuse_experts
from .onnx_cache import name_dimensions, with_cache
from .onnx_emission import emitting
from .onnx_exact import check_exact
from .onnx_files import LARGEST_FILE, size_of, write_file
from .onnx_metadata import input_shapes, write_metadata
from .onnx_sizes import check_dynamic_size, check_other_sizes, name_sizes
from .onnx_verify import RUNTIMES, OnnxRuntime, Report, judge, verify_file

_BATCHES = 4
_TALKATIVE = "torch.onnx", "onnxscript", "torch.export", "torch.fx", "torch.utils.cpp_extension"
_CANNOT = (
    "torch.onnx cannot export this model (it must be free of Python branches on values of tensors, and of numpy; "
    "wrap what cannot be traced in a module of its own and export the rest)"
)
_FIXED = "torch.onnx cannot export this model for images of any size: leave dynamic_size=True out"


def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    weights: str = "int8",
    runtime: str = "onnxruntime",
    int8_outputs: bool = False,
    int8_inputs: bool = False,
    cache: bool = False,
    dynamic_size: bool = False,
    opset: int = 21,
    verify: bool = True,
    runtimes: Sequence[str] | None = None,
    min_agreement: float = 0.995,
    max_error: float = 0.1,
) -> Report:
    """Write a calibrated, trained or packed model as an ONNX file, and compare the file with the model.

        report = hf_daq.export_onnx(model, "model.onnx", images)
        print(report)

    Layers are written as QuantizeLinear and DequantizeLinear around convolutions and matrix products, with unsigned codes
    of 8 bits for inputs and signed integers for weights; runtimes turn these into integer kernels, whose sums are exact.
    Weights of 1 to 7 bits are held as they are. Of 8 bits, odd integers up to 255 do not fit int8: held are `q - 128`,
    and the missing half step is the sum of the inputs under the kernel times a constant for each channel, which takes
    some time. Sums of codes below 8 bits do not saturate the 16-bit accumulators of processors without VNNI. Layers
    without a quantized input, and groups of columns, have integers in the file and compute in float.

    The file's metadata say how it is fed: size, mean and std of images, interpolation, labels, as far as they are known.

    Needs `pip install onnx onnxscript`, and onnxruntime for `verify` and `int8_outputs`.

    Args:
        model: in float32. It is traced in evaluation and left as it was.
        path: the file to write; replaced once everything has passed. Above 2 GiB the tensors are in a second file beside
            it, `model.onnx.data`.
        inputs: real data, float32 images or integer tokens: a tensor, a tuple or a mapping, each tensor with the same
            number of rows, 2 at least. Two rows are traced; the number of rows stays free in the file, and the length
            of token sequences too where the model allows. All are used to verify and for the ranges of `int8_outputs`;
            a few hundred are enough.
        weights: "int8", or "int4": weights of up to 3 bits, and of 4 on the grid "integer", take half a byte in the file and run like int8.
        runtime: the one the file is for. "onnxruntime": convolutions without groups are written as products of gathered
            codes with a matrix, because ONNX Runtime has no fast integer convolution with a float output, and those with
            groups as float ones of the codes; the height and width of images are fixed. OpenVINO computes something else
            with these, and with the products of layers with weights alone, so it refuses the file: its error names
            `hf_daq.WrittenForOnnxRuntimeAlone`. Other files are exact in both.
            "openvino": convolutions stay what they are; exact in both, fast in OpenVINO with `INFERENCE_PRECISION_HINT` "f32".
        int8_outputs: convolutions stay what they are; outputs of convolutions that no quantizer follows are rounded to 8
            bits, 8-bit weights of convolutions to 255 values, and biases to int32. Not exact: expect some percent of
            other top-1 predictions. For ONNX Runtime.
        int8_inputs: for ONNX Runtime, linear layers with weights alone: it rounds their inputs to 8 bits, block by block
            of columns, inside of the products. Not exact, with an error of some percent, and several times as fast.
        cache: of a decoder, keys and values are inputs and outputs too, so that the file generates: `input_ids`,
            `attention_mask` of all tokens, `position_ids` where the decoder takes them, `past_key_values.0.key`,
            `past_key_values.0.value`, ... of any length, also 0; and `logits`, `present.0.key`, ...
        dynamic_size: with `runtime="openvino"`, height and width of images are free in the file. It is compared with the model
            at some other sizes too.
        opset: 21 or higher.
        verify: run all inputs through the runtimes and compare.
        runtimes: those to compare with, of "onnxruntime" and "openvino"; None for those that the file is for: ONNX Runtime
            alone, or both, if they are installed, with `runtime="openvino"`.
        min_agreement: smallest share of equal top-1 of the first output (see `Agreement`). One different prediction is
            always allowed: among fewer than 200 a single one would decide.
        max_error: largest RMS of the difference of outputs, over the RMS of the outputs. Without
            `int8_outputs` and `int8_inputs` a file that misses one of the two is compared once more, with the model on the
            codes that the file itself computes: an input next to a threshold is rounded to either code by float32, which
            may move outputs by more than all else. With them, it passes if it is as close to the model as the reference,
            `integer_arithmetic`, is on these inputs. Apart from both, without them, each layer of the file is held
            against the integers of the model on the codes of the file: other codes are allowed at thresholds alone, and
            outputs differ by 0.1 % at most.

    Returns:
        A `Report`; print it.

    Raises:
        ExportError: a package is missing, the model cannot be exported, or verification fails; there is no new file at
            `path`. CalibrationError: a layer is not calibrated.
    """
    path, batch, layers = Path(path), Inputs(inputs), daq_layers(model)
    check_onnx(model)
    refuse_adapted_weights(model, "exported")
    if not path.parent.is_dir() or path.is_dir():
        raise ExportError(f"path={str(path)!r}: name a file in a folder that exists")
    chosen = _chosen_runtimes(runtimes, runtime) if verify else ()
    _require(*(["onnxruntime"] if int8_outputs else []), *chosen)
    _check(model, layers, weights, runtime, opset)
    _check_int8_inputs(layers, int8_inputs, runtime)
    exact = not (int8_outputs or int8_inputs)
    if dynamic_size:
        check_dynamic_size(batch, runtime, exact)
    if "daq_config" in vars(model):
        check_unchanged(model)
    batch.to(next(model.parameters()).device)
    decoder = model
    with _inference(decoder):
        if cache:
            model, batch = with_cache(decoder, batch)
        emitted = emitting(model, layers, int8_outputs and weights == "int8", runtime == "onnxruntime", int8_inputs)
        proto = _exported(model, emitted, batch, opset, dynamic_size)
        with _explained("the traced graph cannot be rewritten; report it, with the model"):
            _rewrite(proto, batch, weights, int8_outputs, runtime)
        if cache:
            name_dimensions(proto)
        size = next((value.shape[1:] for value in batch.tensors.values() if are_images(value)), None)
        if dynamic_size:
            name_sizes(proto)
        write_metadata(proto, decoder, layers, runtime, size)
        large = any(map(exceeds_16_bits, layers.values()))
        shapes = input_shapes(proto)
        report = Report(path, size_of(proto), weights, int8_outputs, int8_inputs, inputs=shapes, large_sums=large)
        if verify:
            with _explained("the file cannot be compared with the model; report it, with the model"):
                verify_file(report, model, layers, proto, batch, chosen)
                check = partial(check_exact, report, model, layers, proto, batch)
                for name in chosen if exact else ():
                    check(name, _BATCHES)
                    if dynamic_size:
                        check_other_sizes(
                            model, batch, partial(check_exact, report, model, layers, proto, runtime=name)
                        )
                judge(report, model, batch, min_agreement, max_error, check if exact else None)
            report.passed = True
    report.bytes = write_file(proto, path)
    return report


def check_onnx(model: nn.Module) -> None:
    """Refuse what no ONNX file holds, of a model that may have no weights yet."""
    _require("onnx", "onnxscript")
    refuse_experts(daq_layers(model))


def _chosen_runtimes(runtimes: Sequence[str] | None, runtime: str) -> Sequence[str]:
    if runtimes is None:
        found = ["onnxruntime", "openvino"] if runtime == "openvino" else ["onnxruntime"]
        return [name for name in found if name == "onnxruntime" or importlib.util.find_spec(name)]
    for name in runtimes:
        if name not in RUNTIMES:
            raise ExportError(f"runtimes: {name!r} is not one of {', '.join(RUNTIMES)}")
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
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime={runtime!r}: write one of {', '.join(RUNTIMES)}")
    if opset < 21:
        raise ExportError(f"opset={opset}: write 21 or higher")
    check_calibrated(layers, "export_onnx")
    other = {value.dtype for value in model.parameters() if value.is_floating_point()} - {torch.float32}
    if other:
        raise ExportError(f"the model has parameters in {', '.join(map(str, other))}; export model.float()")


def _check_int8_inputs(layers: Mapping[str, Any], int8_inputs: bool, runtime: str) -> None:
    if not int8_inputs:
        return
    if runtime != "onnxruntime":
        raise ExportError(f'int8_inputs=True is for runtime="onnxruntime", not {runtime!r}')
    if not any(layer.a_quant is None and not isinstance(layer, CONVOLUTIONS + TRANSPOSED) for layer in layers.values()):
        raise ExportError(
            "int8_inputs=True is for linear layers whose weights alone are quantized (activation_bits=None), and this model "
            "has none: leave it out"
        )


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Inside, the model computes as in evaluation, without gradients and without a cache of keys and values."""
    with without_caches(model), evaluating(model), torch.no_grad():
        yield


def _exported(
    model: nn.Module, emitted: AbstractContextManager[None], batch: Inputs, opset: int, dynamic_size: bool
) -> Any:
    """The model traced, with its layers in integers."""
    args, kwargs = batch.arguments(batch.part(slice(2)))
    with _explained("the model does not run on two rows of these inputs, called as model(*inputs) or model(**inputs)"):
        outputs = model(*args, **kwargs)
    leaves = tree_leaves(outputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ExportError(f"the model returns no tensor but {type(outputs).__name__}: wrap it in a module that does")
    names, failure = _output_names(outputs), _FIXED if dynamic_size else _CANNOT
    with emitted, _quiet():
        for sequence in (True, False) if batch.tokens else (False,):
            with suppress(torch.onnx.OnnxExporterError) if sequence else _explained(failure):
                program = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=batch.shapes(sequence, dynamic_size),
                    input_names=batch.names,
                    output_names=names,
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                )
                break
    assert program is not None
    written = next(entry.version for entry in program.model_proto.opset_import if entry.domain == "")
    if written != opset:  # where it does not know the one that was asked for, torch keeps its own
        raise ExportError(
            f"opset={opset}: torch.onnx and the installed onnx write {written} instead; 21 is the default"
        )
    for name, shape in input_shapes(program.model_proto).items():
        if isinstance(shape[0], int):
            raise ExportError(
                f"the file would take {shape[0]} rows of {name!r} and no other number, as the model makes a number of Python of "
                "them: write x.shape[0] instead of len(x) and int(x.shape[0])"
            )
    return program.model_proto


def _output_names(outputs: Any) -> list[str] | None:
    if isinstance(outputs, Tensor):
        return ["output"]
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return list(outputs)
    return None


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """What goes wrong inside, in other libraries, is an ExportError that begins with `failure`."""
    try:
        yield
    except DaqError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, torch.onnx.OnnxExporterError) and error.__cause__ else error
        lines = str(cause).strip().splitlines()
        raise ExportError(f"{failure}: {type(cause).__name__}{': ' + lines[0] if lines else ''}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
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


def _rewrite(proto: Any, batch: Inputs, weights: str, int8_outputs: bool, runtime: str) -> None:
    """What makes the traced graph exact and fast."""
    import onnx

    from . import onnx_passes as passes
    from . import onnx_storage as storage
    from .onnx_graph import Graph, quantized_convolutions
    from .onnx_products import convolutions_as_products, others_in_float, refuse_others

    graph = Graph(proto)
    passes.name_values(graph)
    passes.separate_weights(graph)
    passes.expand_circular_pads(graph)
    passes.fold_pads(graph)
    passes.move_codes(graph)
    passes.fold_batch_norm(graph, rounded=int8_outputs)
    passes.drop_activations(graph)
    if int8_outputs:
        passes.round_offsets(graph)
        passes.quantize_outputs(graph, _output_ranges(graph, batch))
        passes.drop_activations(graph)
        passes.integer_bias(graph)
    else:
        alone = runtime == "onnxruntime" and bool(quantized_convolutions(graph) or graph.nodes("MatMulNBits"))
        if runtime == "onnxruntime":
            convolutions_as_products(graph)
            others_in_float(graph)
        if alone:
            refuse_others(graph)
        passes.add_offsets(graph)
        passes.separate_bias(graph)
        passes.subtract_bias(graph)
    if weights == "int4":
        storage.store_int4(graph)
    if runtime == "onnxruntime":
        storage.store_few_bits(graph)
        storage.store_scales_once(graph)
        storage.dequantize_at_load(graph)
    passes.share_constants(graph)
    passes.separate_zero_points(graph)
    passes.drop_traces(graph)
    if size_of(proto) <= LARGEST_FILE:
        onnx.checker.check_model(proto)


def _output_ranges(graph: Any, batch: Inputs) -> dict[str, tuple[float, float]]:
    """For the float outputs of convolutions the range whose 8 bits have the smallest squared error."""
    from onnx import TensorProto

    from .onnx_graph import with_outputs
    from .onnx_passes import float_outputs

    names = list(float_outputs(graph))
    if not names:
        return {}
    session = OnnxRuntime(with_outputs(graph.model, names, TensorProto.FLOAT), names)
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
