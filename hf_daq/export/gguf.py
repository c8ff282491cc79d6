"""`export_gguf`: a decoder of transformers in the format GGUF, for llama.cpp and what is built on it.

Codes stay what they are. A scale becomes the step of a block in float16, which `DaqConfig(scale_dtype="float16")` has trained
with: then the weights in the file are the ones of the model, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..files.atomic import replace_file
from ..model.unchanged import check_unchanged
from ..nn.base import check_calibrated
from ..nn.formula import center
from ..nn.functional import dequantize_weight
from ..nn.integers import integers
from ..nn.packed import daq_layers
from ..version import __version__
from .gguf_blocks import F16, ODD, TERNARY, WHOLE, Array, BlockType, decode, encode
from .gguf_model import Family, check_config, family_of, write_config
from .gguf_tokenizer import add_tokenizer
from .guards import layers_to_export, library, refuse_sharded

FloatType = Literal["f32", "f16", "q8_0"]
_TOLERANCE = {"F32": 0.0, "F16": 1e-3, "Q8_0": 2e-2}  # of what is not quantized
_TOLERANCE_OF_CODES = 2e-3  # a step and a smallest value, each rounded to float16


@dataclass(frozen=True)
class Report:
    """What `export_gguf` wrote. `print(report)` shows it.

    size: bytes of the file.
    types: how many quantized layers there are of each number of bits and type, {"4-bit weights as Q4_1": 168}.
    layers, exact: how many layers are quantized, and how many of them have the very weights of the model.
    error: of the weight of a layer, the largest: root mean square of the difference, divided by that of the weight.
    """

    path: Path
    size: int
    types: dict[str, int]
    layers: int
    exact: int
    error: float

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size / 2**20:.2f} MiB"]
        lines += [f"  {count} layers: {kind}" for kind, count in self.types.items()]
        if self.exact == self.layers:
            return "\n".join([*lines, "  all weights are those of the model, bit for bit"])
        lines += [
            f"  {self.exact} of {self.layers} layers have the weights of the model bit for bit; relative error of the others "
            f"up to {self.error:.1g}, from scales in float16"
        ]
        if _kind(8, F16.name) in self.types:
            lines += ["  8 bits do not fit the 8-bit type exactly: such weights take 16 bits each"]
        return "\n".join(lines)


def _kind(bits: int, name: str) -> str:
    return f"{bits}-bit weights as {name}"


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file. expected: what it stands for, float32, in the order of the file."""

    kind: str
    data: Array
    expected: Callable[[], Array]
    bits: int | None = None


@torch.no_grad()
def export_gguf(model: nn.Module, path: str | Path, tokenizer: Any = None, *, embeddings: FloatType = "f16") -> Report:
    """Write a file that llama.cpp opens.

        print(hf_daq.export_gguf(model, "model.gguf", tokenizer))

    For `...ForCausalLM` of Llama, Mistral, Qwen2, Qwen3 and Gemma 1 to 3, with quantized weights and inputs in full
    precision. Weights of 1 bit become Q1_0, 2 bits Q2_K, 3 bits Q4_0, 4 bits Q4_1, 5 bits Q5_1, 6 and 7 bits Q8_0. Weights
    of 8 bits, which lie between the values of Q8_0, are written as F16. On the grid "integer" 4 bits become Q4_0, 5 bits
    Q5_0 and 8 bits Q8_0. Layers in full precision, embeddings and the output embedding follow `embeddings` (quantized embeddings
    as the values they are quantized to); norms and biases are float32.

    Q1_0 has a scale for 128 columns and Q2_K for 256, the others for 32, F16 any: `group_size` must be a multiple of that.

    Before the file takes its place, each of its tensors is read by the package gguf (Q1_0, which it does not read, by a
    reader of ours) and compared with the model's.

    Args:
        model: calibrated or trained, or a packed one. It is left as it was.
        path: of the file.
        tokenizer: a folder with a tokenizer.json, or the tokenizer. Without it the file has none, and llama.cpp takes and
            gives ids of tokens.
        embeddings: "f32", "f16" or "q8_0".

    Raises:
        ExportError: another model, quantized inputs, columns or groups that a type cannot hold, a tokenizer that llama.cpp
            has no form of, or a tensor that is not what it should be. Nothing is then written.
        CalibrationError: not calibrated.
    """
    if embeddings not in get_args(FloatType):
        raise ExportError(f"embeddings={embeddings!r} is not one of {', '.join(map(repr, get_args(FloatType)))}")
    gguf, family = check_gguf(model)
    check_tokenizer(model, tokenizer, gguf, family)
    check_calibrated(daq_layers(model), "the export")
    config: Any = model.config
    target = Path(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], config.num_hidden_layers)
    stored: dict[str, _Stored] = {}
    for name, tensor in _tensors(model, family, embeddings.upper(), gguf):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"llama.cpp has no tensor for {name!r} in its models of the kind {family.architecture}")
        stored[found] = tensor
    stored |= {name: _float32(value) for name, value in family.extra_tensors(model).items()}
    reports: list[Report] = []

    def write(temporary: Path) -> None:
        _write(gguf, temporary, stored, family, config, tokenizer)
        reports.append(_compare(gguf, temporary, stored, target))

    replace_file(target, write)
    return reports[0]


def check_gguf(model: nn.Module) -> tuple[Any, Family]:
    """Refuse what no GGUF file holds, of a model that may have no weights yet: the library, and the model's family."""
    gguf, family = library("gguf", "gguf"), family_of(model)
    layers = layers_to_export(model)
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            raise ExportError(
                f"layer {name!r} is a {layer.float_class.__name__}, and this export writes linear layers only; leave it in full "
                f"precision, DaqConfig(..., modules_to_not_convert=[{name!r}, ...])"
            )
        if layer.a_quant is not None:
            raise ExportError(
                f"the input of layer {name!r} is quantized to {layer.input_bits} bits, and llama.cpp has no such inputs; train "
                "weights alone, DaqConfig(weight_bits=4), or write hf_daq.export_compressed_tensors(model, directory)"
            )
        refuse_sharded(layer)
        if isinstance(layer, nn.Linear) and layer.owner is None:
            _type_of(name, layer)
    if "daq_config" in vars(model):
        check_unchanged(model)
    config: Any = model.config
    check_config(config, family)
    return gguf, family


def check_tokenizer(model: nn.Module, tokenizer: Any, gguf: Any, family: Family) -> None:
    """Refuse one that llama.cpp has no form of, by writing it to nowhere; None is none."""
    config: Any = model.config
    if tokenizer is not None:
        add_tokenizer(gguf.GGUFWriter(None, family.architecture), gguf, tokenizer, config.vocab_size)


# ------------------------------------------------------------------------------------------------------ tensors


def _tensors(model: nn.Module, family: Family, kind: str, gguf: Any) -> Iterator[tuple[str, _Stored]]:
    """The tensors by their names in transformers; of tied ones the first."""
    layers = daq_layers(model)
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if any(part in layers for part in (owner, owner.rpartition(".")[0])):
            continue
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        value = family.arranged(name, value.detach().float().cpu(), model.config)
        yield name, _float32(value) if value.ndim == 1 else _float(name, value, kind, gguf)
    for name, layer in layers.items():
        if layer.owner is not None:  # which llama.cpp has from the embedding
            continue
        if isinstance(layer, nn.Embedding):
            table = layer.quantized_weight().float().cpu()  # type: ignore[operator]
            yield f"{name}.weight", _float(name, family.arranged(f"{name}.weight", table, model.config), kind, gguf)
            continue
        yield f"{name}.weight", _quantized(name, layer, family, model.config)
        bias = layer.quantized_bias()
        if bias is not None:
            yield f"{name}.bias", _float32(family.arranged(f"{name}.bias", bias.float().cpu(), model.config))


def _float32(value: Tensor) -> _Stored:
    array = value.float().numpy()
    return _Stored("F32", array, lambda: array)


def _float(name: str, value: Tensor, kind: str, gguf: Any) -> _Stored:
    array = value.numpy()
    if kind == "Q8_0" and array.shape[1] % 32:
        raise ExportError(
            f"{name!r} has {array.shape[1]} columns, and Q8_0 holds multiples of 32; write embeddings='f16'"
        )
    with np.errstate(over="ignore"):  # the check finds infinities
        data = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    return _Stored(kind, data, lambda: array)


def _quantized(name: str, layer: Any, family: Family, config: Any) -> _Stored:
    found = integers(layer)
    kind = _type_of(name, layer)
    rows = family.order(f"{name}.weight", len(found.weight), config)
    weight, scale = (value.cpu() for value in (found.weight, found.weight_scale.float()))
    if rows is not None:
        weight, scale = weight[rows], scale if len(scale) == 1 else scale[rows]

    def expected() -> Array:
        values = dequantize_weight(
            layer.codes().cpu(),
            layer.weight_scale.cpu(),
            bits=layer.weight_bits,
            grid=layer.weight_grid,
            group_size=layer.group_size,
        )
        array: Array = (values if rows is None else values[rows]).numpy()
        return array

    data = encode(kind, weight.numpy(), scale.numpy(), found.group_size)
    if kind is F16:
        data = data.view("<f2")
    return _Stored(kind.name, data, expected, found.weight_bits)


def _type_of(name: str, layer: Any) -> BlockType:
    """The type for a layer; refuses columns and groups that it does not hold."""
    bits = layer.weight_bits
    odd = center(bits, layer.weight_grid) % 1 != 0
    kind = TERNARY if layer.weight_grid == "ternary" else (ODD if odd else WHOLE)[bits]
    columns, size = layer.in_features, kind.columns
    if columns % size:
        fitting = [str(number) for number, other in ODD.items() if columns % other.columns == 0]
        raise ExportError(
            f"layer {name!r} has {columns} columns, and {kind.name}, the type for {bits} bits, holds multiples of "
            f"{size}; {columns} columns go with {', '.join(fitting)} bits, e.g. "
            f"rules=[{{'pattern': {name!r}, 'weight_bits': {fitting[-1]}}}]"
        )
    if layer.group_size is not None and layer.group_size % size:
        raise ExportError(
            f"layer {name!r} has a scale for {layer.group_size} columns, and {kind.name}, the type for {bits} bits, "
            f"has one for {size}; write group_size={size}, a multiple of it, or weight_granularity='channel'"
        )
    return kind


# ------------------------------------------------------------------------------------------------------ the file


def _write(gguf: Any, path: Path, stored: dict[str, _Stored], family: Family, config: Any, tokenizer: Any) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.architecture]])
    try:
        writer.add_quantized_by(f"hf_daq {__version__}")
        kinds = Counter(tensor.kind for tensor in stored.values() if tensor.bits is not None)
        writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kinds.most_common(1)[0][0]}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_config(writer, gguf, config, family)
        add_tokenizer(writer, gguf, tokenizer, config.vocab_size)
        for name, tensor in stored.items():
            whole = tensor.kind in ("F32", "F16")
            writer.add_tensor(name, tensor.data, raw_dtype=None if whole else gguf.GGMLQuantizationType[tensor.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _error(got: Array, expected: Array) -> float:
    """Relative; not a number where there are infinities."""
    if np.array_equal(got, expected):
        return 0.0
    return float(np.linalg.norm(got - expected) / max(float(np.linalg.norm(expected)), 1e-30))


@np.errstate(over="ignore", invalid="ignore")
def _compare(gguf: Any, path: Path, stored: dict[str, _Stored], target: Path) -> Report:
    """Read everything once more; refuses a file that does not hold the model."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    missing = sorted(found.keys() ^ stored.keys())
    if missing:
        raise ExportError(f"the file does not have the tensors that were written: {', '.join(missing)}")
    errors = {}
    for name, tensor in stored.items():
        expected = tensor.expected()
        error = _error(decode(found[name].data, found[name].tensor_type.name, gguf).reshape(expected.shape), expected)
        tolerance = _TOLERANCE[tensor.kind] if tensor.bits is None else _TOLERANCE_OF_CODES
        if not error <= tolerance:
            raise ExportError(
                f"{name!r} does not hold what the model has: a relative error of {error:.2g}, where {tolerance:g} are allowed "
                f"for {tensor.kind}; float16 goes from 6e-8 to 65504, and the model has values from "
                f"{np.abs(expected).min():.2g} to {np.abs(expected).max():.2g}"
            )
        if tensor.bits is not None:
            errors[name] = error
    types = Counter(_kind(tensor.bits, tensor.kind) for tensor in stored.values() if tensor.bits is not None)
    exact = sum(error == 0 for error in errors.values())
    size = path.stat().st_size
    return Report(target, size, dict(sorted(types.items())), len(errors), exact, max(errors.values()))
