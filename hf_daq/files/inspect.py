"""What is in a checkpoint, from config.json and the header of its weights file alone: no tensor is read, nothing is built,
torch is not loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import DaqConfig, packed_bytes
from ..errors import CheckpointError
from ..text import SMOOTH_NOTE, add_row, as_text, bits_text, cell, marked, plain_table, shape_text
from . import hub
from .facts import CardFacts
from .header import (
    BYTES,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Header,
    check_agreement,
    described_config,
    describes_timm_model,
    describes_transformers_model,
    joined,
    parse_header,
    read_description,
    read_header,
    weights_files,
)


@dataclass(frozen=True)
class InspectedLayer:
    """A quantized layer of a file. smooth: whether it divides channels of its input by powers of two. bytes: of its weight in this file, codes and scales; float_bytes: of the float weight;
    all 0 for a layer that shares the weight of an embedding, which counts it."""

    name: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int | None
    parameters: int
    bytes: int
    float_bytes: int
    smooth: bool = False

    @property
    def bits(self) -> tuple[str, str]:
        """Of weights and inputs, as tables show them."""
        return str(self.weight_bits), marked(bits_text(self.activation_bits), self.smooth)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is not of a quantized weight: in full precision."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says of itself.

    library: "timm", "transformers", or "torch" for a model of neither. packed_bytes: the size of all tensors with packed
    weights, float_bytes: in float (of a packed file with the biases that its layers gained), tensor_bytes: in this file.
    """

    source: str
    library: str
    architecture: str
    packed: bool
    config: DaqConfig
    version: str
    layers: tuple[InspectedLayer, ...]
    kept: tuple[KeptTensor, ...]
    tensor_bytes: int
    packed_bytes: int
    float_bytes: int
    facts: CardFacts

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self) | {"config": self.config.to_dict(), "facts": self.facts.to_dict()}
        for key in ("layers", "kept"):
            values[key] = [entry | {"shape": list(entry["shape"])} for entry in values[key]]
        return values

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group

        kind = "packed" if self.packed else "trainable"
        title = f"{self.source}: {self.architecture} of {self.library}, {kind}, hf_daq {self.version}"
        table = plain_table("layers", "W", "A", "number", "weights", "float MB", "file MB")
        for group, layers in grouped(self.layers, lambda layer: layer.bits).items():
            count = sum(layer.parameters for layer in layers)
            sizes = [sum(layer.float_bytes for layer in layers), sum(layer.bytes for layer in layers)]
            add_row(
                table,
                "",
                group,
                *layers[0].bits,
                str(len(layers)),
                f"{count:,}",
                *(f"{size / 1e6:.3f}" for size in sizes),
            )
        for group, tensors in grouped(self.matrices, lambda tensor: (tensor.dtype,)).items():
            count = sum(math.prod(tensor.shape) for tensor in tensors)
            size = f"{sum(tensor.bytes for tensor in tensors) / 1e6:.3f}"
            add_row(table, "", group, tensors[0].dtype.lower(), "float", str(len(tensors)), f"{count:,}", size, size)
        note = [cell(SMOOTH_NOTE)] * any(layer.smooth for layer in self.layers)
        lines: list[Any] = [cell(title, "bold"), table, *note, cell(self._sizes())]
        for result in self.facts.results:
            before = "" if result.float_value is None else f" (float {result.float_value:g})"
            where = " ".join(filter(None, (result.dataset, result.split)))
            lines.append(cell(f"{result.metric} {result.value:g}{before}" + (f" on {where}" if where else "")))
        return Group(*lines)

    def _sizes(self) -> str:
        count = len(self.layers)
        sizes = f"{self.float_bytes / 1e6:.2f} MB in float, {self.tensor_bytes / 1e6:.2f} MB in this file"
        packed = "" if self.packed else f", {self.packed_bytes / 1e6:.2f} MB packed"
        return f"{count} layer{'s' * (count != 1)} quantized; {sizes}{packed}"

    @property
    def matrices(self) -> tuple[KeptTensor, ...]:
        """Kept tensors with two or more dimensions: weights in full precision."""
        return tuple(tensor for tensor in self.kept if len(tensor.shape) > 1)


def grouped(entries: Any, key: Callable[[Any], tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Entries whose names differ in numbers alone and that agree in `key`, under the name with `*` for the numbers."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for entry in entries:
        found.setdefault((_pattern(entry.name), *key(entry)), []).append(entry)
    names: dict[str, list[Any]] = {}
    for (name, *_), group in found.items():
        label = group[0].name if len(group) == 1 else name
        while label in names:  # the same layers in several widths
            label += " "
        names[label] = group
    return names


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def inspect(path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Inspection:
    """What is in a checkpoint: a folder, a weights file, or a repository of the Hub.

    Of a repository only config.json and the headers are asked for; offline it must be in the cache.

    Raises:
        CheckpointError: not a checkpoint of hf_daq, or damaged. HubError: a repository that is not there or not reached.
    """
    path, source = Path(path_or_repo), str(path_or_repo)
    if path.is_file():
        if path.suffix == ".onnx":
            raise CheckpointError(
                f"{path} is an ONNX file: a graph for runtimes such as ONNX Runtime, not a checkpoint. `netron {path}` (pip "
                "install netron) shows its layers; `hf-daq inspect FOLDER` is for the folder that it was exported from"
            )
        header = read_header(path)
        return describe(source, read_description(path.parent), [header])
    if not path.is_dir():
        if not hub.is_repository(source):
            raise CheckpointError(f"{source!r} is neither a folder, a file, nor a repository such as 'user/name'")
        if not hub.is_offline():
            folder, headers = hub.remote_headers(source, revision=revision, token=token)
            parsed = [parse_header(f"{file} of {source}", *content) for file, content in headers.items()]
            return describe(source, read_description(folder), parsed)
        path = hub.download(source, revision=revision, token=token)
    description = read_description(path)
    described_config(description, path / CONFIG_NAME)
    files = weights_files(path)
    if not files:
        raise CheckpointError(f"{path} has no {WEIGHTS_NAME}")
    return describe(source, description, [read_header(file) for file in files])


def describe(source: str, description: Mapping[str, Any], headers: list[Header]) -> Inspection:
    """The inspection of a checkpoint from its config.json and the headers of its weights files."""
    header = joined(headers)
    config = described_config(description, source)
    check_agreement(header, config, f"the weights of {source}")
    library = _library(description)
    entries = config.layers or {}
    divided = {name for name, entry in entries.items() if "smooth" in entries[entry.get("same_input_as", name)]}
    layers = tuple(_layer(name, entry, header, description, name in divided) for name, entry in entries.items())
    keys = ("weight", "weight_codes", "weight_scale")
    own = {f"{header.names.get(layer.name, layer.name)}.{key}" for layer in layers for key in keys}
    own |= {key for keys in header.weights.values() for key in _held(keys, header)}
    own |= {tensor for layer in layers for tensor in _of_attention(header.names.get(layer.name, layer.name))}
    quantizer = re.compile(r".*\.[wa]_quant\.\w+")
    kept = tuple(
        KeptTensor(name, dtype, shape, _size(dtype, shape))
        for name, (dtype, shape) in header.tensors.items()
        if name not in own and not quantizer.fullmatch(name)
    )
    rest = sum(tensor.bytes for tensor in kept)
    total = sum(_size(*entry) for entry in header.tensors.values())
    return Inspection(
        source=source,
        library=library,
        architecture=_architecture(description, library),
        packed=config.packed,
        config=config,
        version=header.version,
        layers=layers,
        kept=kept,
        tensor_bytes=total,
        packed_bytes=total if config.packed else _packed_bytes(layers, kept, header, config),
        float_bytes=rest + sum(layer.float_bytes for layer in layers),
        facts=header.facts,
    )


def _library(description: Mapping[str, Any]) -> str:
    if describes_timm_model(description):
        return "timm"
    return "transformers" if describes_transformers_model(description) else "torch"


def _layer(
    name: str, bits: Mapping[str, Any], header: Header, description: Mapping[str, Any], smooth: bool = False
) -> InspectedLayer:
    weight_bits, activation_bits = bits["weight_bits"], bits["activation_bits"]
    assert weight_bits is not None
    owner = header.tied.get(name)
    if owner is not None and owner != name:
        of_owner = _layer(owner, bits, header, description).shape if owner not in header.tied else ()
        return InspectedLayer(name, of_owner, weight_bits, activation_bits, 0, 0, 0)
    stored = header.names.get(name, name)
    part = _part_of_attention(stored, header)
    found = part or header.tensors.get(f"{stored}.weight")
    if found is None:  # packed
        found = (
            {"float16": "F16", "bfloat16": "BF16"}.get(str(description.get("dtype")), "F32"),
            _checked_shape(name, header),
        )
    dtype, shape = found
    keys = (
        "weight",
        "weight_codes",
        "weight_scale",
        *(f"w_quant.{key}" for key in ("lower", "upper", "scale", "shift")),
    )
    held = [header.tensors[key] for key in _held(header.weights.get(name, []), header)]
    dtype = held[0][0] if held else dtype
    parts = [part, *held, *(header.tensors.get(f"{stored}.{key}") for key in keys)]
    size = sum(_size(*one) for one in parts if one is not None)
    count = math.prod(shape)
    return InspectedLayer(name, shape, weight_bits, activation_bits, count, size, _size(dtype, shape), smooth)


def _part_of_attention(name: str, header: Header) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape of what a projection of `nn.MultiheadAttention` reads of its weight; None for other layers."""
    if f"{name}.weight" in header.tensors:
        return None
    for tensor, parts in _of_attention(name).items():
        if tensor in header.tensors:
            dtype, (rows, *columns) = header.tensors[tensor]
            return dtype, (rows // parts, *columns)
    return None


def _of_attention(name: str) -> dict[str, int]:
    """The tensors in which the weight of a projection may be -> how many projections are in each."""
    parent, _, part = name.rpartition(".")
    if part not in ("q_proj", "k_proj", "v_proj"):
        return {}
    return {f"{parent}.in_proj_weight".lstrip("."): 3, f"{parent}.{part}_weight".lstrip("."): 1}


def _held(names: list[str], header: Header) -> list[str]:
    """The tensors that have these names, in which a * is the last number."""
    return [key for name in names for key in header.by_form.get(name, [])]


def _packed_bytes(
    layers: tuple[InspectedLayer, ...], kept: tuple[KeptTensor, ...], header: Header, config: DaqConfig
) -> int:
    """The size of all tensors of a trainable file after packing."""
    names = [header.names.get(layer.name, layer.name) for layer in layers]
    gone = {(name, "gain") for name in names}  # of standardized convolutions, folded into the codes
    total = sum(tensor.bytes for tensor in kept if tuple(tensor.name.rpartition(".")[::2]) not in gone)
    total += sum(_size(*entry) for name, entry in header.tensors.items() if ".a_quant." in name)
    for name, layer in zip(names, layers, strict=True):
        if layer.name in header.tied:
            continue
        scale = header.tensors.get(f"{name}.w_quant.scale", ("", (0,)))
        total += packed_bytes(layer.parameters, layer.weight_bits, math.prod(scale[1]), config.grid(layer.weight_bits))
        shift = header.tensors.get(f"{name}.w_quant.shift")
        if shift is not None and f"{name}.bias" not in header.tensors:  # the bias that the correction becomes
            total += layer.float_bytes // layer.parameters * math.prod(shift[1])
    return total


def _checked_shape(name: str, header: Header) -> tuple[int, ...]:
    shape = header.shapes.get(name) if isinstance(header.shapes, dict) else None
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise CheckpointError(f"the file has neither a weight of {name!r} nor the shape of one")
    return tuple(shape)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return BYTES.get(dtype, 0) * math.prod(shape)


def _architecture(description: Mapping[str, Any], library: str) -> str:
    if library == "timm":
        return str(description["model_args"].get("base"))
    names = description.get("architectures")
    if library == "transformers" and isinstance(names, list) and names:
        return str(names[0])
    return str(description.get("architecture", "model"))


def every_layer(found: Any) -> Table:
    """A row for each layer of an inspection, instead of its groups."""
    table = plain_table("layer", "weight shape", "W", "A", "float MB", "file MB")
    for layer in found.layers:
        sizes = (f"{size / 1e6:.3f}" for size in (layer.float_bytes, layer.bytes))
        add_row(
            table,
            "",
            layer.name,
            shape_text(layer.shape),
            *layer.bits,
            *sizes,
        )
    for tensor in found.matrices:
        size = f"{tensor.bytes / 1e6:.3f}"
        add_row(table, "dim", tensor.name, shape_text(tensor.shape), tensor.dtype.lower(), "float", size, size)
    return table
