"""`export_compressed_tensors`: a transformers model in the format `compressed-tensors`, which transformers opens without
this library and whose layouts vLLM knows.

The format has signed integers. A weight on the grid "integer" is one, of as many bits. On the grid "odd" a weight of b bits is
an odd integer between -(2**b - 1) and 2**b - 1, times a step, which takes one bit more: 1 to 7 bits a weight are stored in 2 to
8, exactly. 8 bits a weight are stored in 8, with a zero point of -1/2, as the halves of the odd integers lie between two
integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..files.atomic import temporary_folder
from ..files.weights_file import weights_size
from ..model.roles import is_transformers_model
from ..model.unchanged import check_unchanged
from ..nn.attention import DaqMultiheadAttention
from ..nn.base import check_calibrated
from ..nn.experts import ExpertsLinear
from ..nn.integers import integers
from ..nn.packed import daq_layers, shared_copy
from .compressed_experts import check_experts, each_expert, experts_layers, weight_errors
from .compressed_layout import WIDTHS, Container, container_of, library_of, quantization_config, tensors_of
from .guards import layers_to_export, refuse_sharded

_TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# An input that lies between two codes, up to rounding errors, gets either. In a deep model that moves the inputs of the
# layers behind it, so that the outputs differ as they do when the model itself gets an input that is changed by 1e-7.
_TOLERANCE_OF_OUTPUTS = 0.5


@dataclass(frozen=True)
class Report:
    """What `export_compressed_tensors` wrote. `print(report)` shows it.

    size: bytes of the files of weights.
    containers: how many layers are stored how.
    embeddings: how many hold their quantized values in full precision.
    layer_error: the largest of all layers for the same input: root mean square of the difference between the outputs of
        the exported layer and of the model's, divided by that of the outputs.
    relative_error: the same of the outputs of the whole model.
    agreement: share of the outputs whose largest entry is the same.

    The last three are None where nothing was compared.
    """

    directory: Path
    size: int
    containers: dict[Container, int]
    embeddings: int = 0
    layer_error: float | None = None
    relative_error: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.directory}: {self.size / 2**20:.2f} MiB"]
        lines += [f"  {count} layers: {container}" for container, count in self.containers.items()]
        if self.embeddings:
            lines.append(f"  {self.embeddings} embeddings: their quantized values, in full precision")
        if self.layer_error is None:
            return "\n".join([*lines, "  not compared with the model; pass inputs to compare"])
        compared = f"of a layer {self.layer_error:.2g}, of the outputs {self.relative_error:.2g}"
        return "\n".join([*lines, f"  relative error {compared}; same top-1 {self.agreement:.2%}"])


def export_compressed_tensors(
    model: nn.Module,
    directory: str | Path,
    inputs: Mapping[str, Tensor] | Tensor | None = None,
    *,
    verify: bool = True,
    widths: Sequence[int] = WIDTHS,
) -> Report:
    """Write a folder that `AutoModel....from_pretrained` of transformers opens without hf_daq.

    Linear layers only; embeddings, and output embeddings that share their weight, are written as the values they are quantized
    to, in full precision. The others' weights become `weight_packed` (int32) and `weight_shape`, or `weight` (int8), with
    `weight_scale` of shape (out, 1) or (out, groups) in the dtype of the model; static inputs get `input_scale` and
    `input_zero_point` (int8), shape (1,). Layers in full precision stay as they are.

    vLLM has kernels for weights alone (pack-quantized, weights below 8 bits) and for inputs of 8 bits (int-quantized,
    weights below 8 bits without groups). It makes one layer of query, key and value, and of gate and up: such layers
    must have the same number of bits there, and inputs of 8 bits the same bounds. The rest is for transformers.

    Args:
        model: a quantized model of transformers, calibrated or trained, or a packed one. It is left as it was.
        directory: created if needed. Its other files, such as a tokenizer, stay.
        inputs: a batch to compare the folder with the model on: what `model(**inputs)` takes, or token ids.
        verify: before anything appears in `directory`, open what was written and, with `inputs`, compare layers and
            outputs.
        widths: bits a weight may be stored in, where its input is not quantized to 8 bits. `(4, 8)` leaves only
            those that every version of vLLM reads.

    Raises:
        ExportError: not a quantized transformers model, a layer that is not linear, no width for a weight, a folder that
            transformers does not open (T5 looks for float weights while it opens), or a layer whose output differs by
            more than a relative error of 0.01 (float16: 0.03, bfloat16: 0.1). The outputs of the model may differ as
            much, and by 0.5 if inputs are quantized.
        CalibrationError: not calibrated. Nothing is then written.
    """
    check_compressed_tensors(model)
    check_calibrated(daq_layers(model), "the export")
    stored: Any = shared_copy(model)
    containers, experts = _compress(stored, widths)
    with temporary_folder(Path(directory)) as temporary:
        stored.save_pretrained(temporary, state_dict={**stored.state_dict(), **experts})
        del stored
        opened = _open(model, temporary) if verify else None
        compared = () if opened is None or inputs is None else _compare(model, opened, inputs)
        size = weights_size(temporary)
    kinds = list(containers.values())
    embeddings = sum(isinstance(layer, nn.Embedding) for layer in daq_layers(model).values())
    counts = {kind: kinds.count(kind) for kind in kinds}
    return Report(Path(directory), size, counts, embeddings, *compared)


def check_compressed_tensors(model: nn.Module) -> None:
    """Refuse what cannot be exported, of a model that may have no weights yet."""
    library_of("quantization")
    if not is_transformers_model(model):
        raise ExportError(
            f"{type(model).__name__} is no model of transformers, and no other library opens compressed-tensors; "
            "write hf_daq.save_pretrained(model, directory)"
        )
    layers = layers_to_export(model)
    for name, layer in layers.items():
        attention = name.rpartition(".")[0]
        if isinstance(model.get_submodule(attention), DaqMultiheadAttention):
            raise ExportError(
                f"layer {name!r} belongs to a MultiheadAttention, which other libraries compute from float weights; leave it in "
                f"full precision, DaqConfig(..., modules_to_not_convert=[{attention!r}, ...]), or write "
                "hf_daq.save_pretrained(model, directory)"
            )
        if not isinstance(layer, nn.Linear | nn.Embedding | ExpertsLinear):
            kind = layer.float_class.__name__
            raise ExportError(
                f"layer {name!r} is a {kind}, and compressed-tensors holds linear layers only; leave such layers in full "
                f"precision, DaqConfig(..., modules_to_not_convert=[{name!r}, ...]), or write "
                "hf_daq.save_pretrained(model, directory)"
            )
        if layer.smooth is not None:
            raise ExportError(
                f"layer {name!r} divides the channels of its input, for which compressed-tensors has no place: quantize the float "
                "model once more without, DaqConfig(..., smooth=False), or write hf_daq.save_pretrained(model, directory)"
            )
        refuse_sharded(layer)
    check_experts(model)
    if "daq_config" in vars(model):
        check_unchanged(model)


# ------------------------------------------------------------------------------------------------ the other model


@torch.no_grad()
def _compress(model: Any, widths: Sequence[int]) -> tuple[dict[str, Container], dict[str, Tensor]]:
    """Turn a copy into what is saved: its quantized layers hold only the tensors of the format. Those of experts are apart, by
    their names in the file."""
    from ..integrations.transformers import detach

    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    containers, linear, experts = _compress_experts(model, widths)
    for name, layer in daq_layers(model).items():
        if isinstance(layer, nn.Embedding) or layer.owner is not None:
            stored = nn.Module()
            if layer.owner is None:
                stored.register_buffer("weight", layer.quantized_weight().detach())  # type: ignore[operator]
            if layer.has_bias:
                stored.register_buffer("bias", layer.quantized_bias())
            model.set_submodule(name, stored)
            continue
        found = integers(layer)
        containers[name] = container_of(name, found, widths)
        stored = nn.Module()
        for key, value in tensors_of(found, containers[name], layer.weight_dtype).items():
            stored.register_buffer(key, value)
        if found.bias is not None:
            stored.register_buffer("bias", found.bias)
        model.set_submodule(name, stored)
    detach(model)
    # transformers takes the first scheme whose targets name experts for all of them; so theirs comes first.
    linear |= {name: containers.get(name) for name in names}
    model.config.quantization_config = quantization_config(linear, model.base_model_prefix)
    return containers, experts


def _compress_experts(
    model: Any, widths: Sequence[int]
) -> tuple[dict[str, Container], dict[str, Container | None], dict[str, Tensor]]:
    """By layers, and by the layers of single experts in the file; and the tensors of these."""
    containers: dict[str, Container] = {}
    separate: dict[str, Container | None] = {}
    tensors: dict[str, Tensor] = {}
    layers = experts_layers(model)
    columns = math.gcd(*(layer.sizes[-1] for layer in layers.values()))
    for name, layer in layers.items():
        for one, found in each_expert(model, name, layer):
            containers[name] = separate[one] = container_of(name, found, widths, columns)
            own = tensors_of(found, containers[name], layer.weight_dtype)
            tensors |= {f"{one}.{key}": value for key, value in own.items()}
    for name in layers:
        model.set_submodule(name.rpartition(".")[0], nn.Module())
    return containers, separate, tensors


# ---------------------------------------------------------------------------------------------------- the folder


def _open(model: Any, folder: Path) -> Any:
    """What transformers makes of the folder, with nothing missing and nothing left over."""
    try:
        opened, found = type(model).from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise ExportError(
            f"transformers does not open {type(model).__name__} from compressed-tensors: {type(error).__name__}: {error}; "
            "write hf_daq.save_pretrained(model, directory)"
        ) from error
    for kind, what in (("missing_keys", "find {} in"), ("unexpected_keys", "know what to do with {} of")):
        if found[kind]:
            key = repr(sorted(found[kind])[0])
            raise ExportError(f"transformers does not {what.format(key)} the exported folder")
    return opened.to(model.device).eval()


@torch.no_grad()
def _compare(model: Any, opened: Any, inputs: Mapping[str, Tensor] | Tensor) -> tuple[float, float, float]:
    """Layer error, relative error and agreement of an opened folder; refuses one that does not hold the model."""
    reference: Any = shared_copy(model).eval()
    batch = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    batch = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    errors = weight_errors(reference, opened)
    for name, layer in daq_layers(reference).items():
        if name not in errors:
            opened.get_submodule(name).register_forward_hook(_layer_check(name, layer, errors), with_kwargs=True)
    weights = len(errors)
    got = _outputs(opened, batch)
    if len(errors) == weights < len(daq_layers(reference)):
        raise ExportError("the inputs reach no quantized layer; pass what model(**inputs) takes for all of its parts")
    worst = max(errors, key=lambda name: errors[name])
    tolerance = _TOLERANCE.get(model.dtype, 1e-2)
    _refuse(f"layer {worst!r}", errors[worst], tolerance, model.dtype)
    expected = _outputs(reference, batch)
    error = _relative_error(got, expected)
    quantized_inputs = any(layer.a_quant is not None for layer in daq_layers(model).values())
    _refuse("the outputs", error, _TOLERANCE_OF_OUTPUTS if quantized_inputs else tolerance, model.dtype)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(got, expected, strict=True)])
    return errors[worst], error, same.float().mean().item()


def _layer_check(name: str, layer: nn.Module, errors: dict[str, float]) -> Any:
    """A hook that notes the largest error of a layer's outputs."""

    def check(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        errors[name] = max(_relative_error([output], [layer(*args, **named)]), errors.get(name, 0.0))

    return check


def _relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    difference = torch.cat([(a.float() - b.float()).flatten() for a, b in zip(got, expected, strict=True)])
    size = torch.cat([value.float().flatten() for value in expected]).norm().clamp_min(1e-12)
    return float(difference.norm() / size)


def _refuse(what: str, error: float, tolerance: float, dtype: torch.dtype) -> None:
    if not error <= tolerance:
        raise ExportError(
            f"the exported folder does not give what the model gives: {what} with a relative error of {error:.2g}, where "
            f"{tolerance:g} are allowed for {dtype}; export model.float(), or compare on more inputs"
        )


def _outputs(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The logits, or what a model without a head gives first."""
    output = model(**batch, return_dict=True)
    logits = [value for key, value in output.items() if "logits" in key and isinstance(value, Tensor)]
    return logits or [output[0]]
