"""How layers are stored in the format compressed-tensors, and what its entry of config.json says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..nn.integers import Integers
from .guards import library

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
PACKED, WHOLE = "pack-quantized", "int-quantized"


def library_of(name: str) -> Any:
    """A module of compressed-tensors."""
    return library(f"compressed_tensors.{name}", "compressed-tensors")


@dataclass(frozen=True)
class Container:
    """How the layers of one group are stored.

    layout: "pack-quantized" (`width` bits a weight, dense, in int32) or "int-quantized" (an int8 a weight).
    group_size: input columns that share a scale; None for one scale an output channel.
    input_bits: number of bits for the layer's input; None where it is not quantized.
    tokens: whether each token has a scale.
    halves: whether the zero point is -1/2.
    """

    bits: int
    width: int
    layout: str
    group_size: int | None
    input_bits: int | None
    halves: bool = False
    tokens: bool = False

    def __str__(self) -> str:
        scales = "a channel" if self.group_size is None else f"{self.group_size} columns"
        zero = ", zero point -1/2" if self.halves else ""
        inputs = "inputs in full precision" if self.input_bits is None else f"inputs of {self.input_bits} bits"
        inputs += " with a scale for each token" if self.tokens else ""
        return f"{self.bits}-bit weights as int{self.width}, {self.layout}{zero}, a scale for {scales}; {inputs}"


def container_of(name: str, found: Integers, widths: Sequence[int], experts: int | None = None) -> Container:
    """experts: a common divisor of the columns of all experts, whose groups have one size; None for other layers."""
    bits, columns = found.weight_bits, experts or found.weight.shape[1]
    # The format has no shorter last group: groups of a common divisor repeat the scales.
    group_size = None if found.group_size is None else math.gcd(found.group_size, columns)
    whole = bits == 8 or (found.input_bits == 8 and group_size is None)  # vLLM computes with inputs in int8 only
    if whole and experts is None:
        return Container(bits, 8, WHOLE, group_size, found.input_bits, found.halves, found.tokens)
    needed = bits + found.odd
    fitting = [width for width in widths if needed <= width <= 8]
    if not fitting:
        raise ExportError(
            f"layer {name!r} has weights of {bits} bits, which need {needed} or more here; widths={tuple(widths)} "
            f"has none from {needed} to 8"
        )
    return Container(bits, min(fitting), PACKED, group_size, found.input_bits, tokens=found.tokens)


def tensors_of(found: Integers, container: Container, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer by their names in the format, without the bias."""
    weight, scale = found.weight, found.weight_scale.expand(len(found.weight), -1)
    if container.group_size is not None and found.group_size is not None:
        repeats = found.group_size // container.group_size
        scale = scale.repeat_interleave(repeats, dim=1)[:, : weight.shape[1] // container.group_size]
    tensors = {}
    if container.halves:
        weight, scale = (weight - 1) // 2, scale * 2
        tensors["weight_zero_point"] = torch.full_like(scale, -0.5, dtype=torch.float32)
    if container.layout == PACKED:
        pack_to_int32 = library_of("compressors.pack_quantized").pack_to_int32
        tensors["weight_packed"] = pack_to_int32(weight.to(torch.int8), container.width)
        tensors["weight_shape"] = torch.tensor(weight.shape)
    else:
        tensors["weight"] = weight.to(torch.int8)
    tensors["weight_scale"] = scale.to(dtype).contiguous()
    if container.input_bits is not None and not container.tokens:
        zero = found.zero_point - 2 ** (container.input_bits - 1)
        tensors["input_scale"] = found.input_scale.to(dtype)
        tensors["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    return tensors


def quantization_config(linear: Mapping[str, Container | None], base: str) -> dict[str, Any]:
    """The entry of config.json for these linear layers; None stands for full precision."""
    stacks: dict[str, set[Container | None]] = {}
    for name, container in linear.items():
        stacks.setdefault(_stack(name), set()).add(container)
    targets: dict[Container | None, dict[str, None]] = {}
    for name, container in linear.items():
        alike = len(stacks[_stack(name)]) == 1
        targets.setdefault(container, {})[_pattern(_stack(name) if alike else re.escape(name), base)] = None
    ignore = list(targets.pop(None, {}))
    layouts = {container.layout for container in targets if container is not None}
    config = library_of("quantization").QuantizationConfig(
        config_groups={
            f"group_{index}": _scheme(container, list(patterns))
            for index, (container, patterns) in enumerate(targets.items())
            if container is not None
        },
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignore,
    )
    return {"version": library_of("version").__version__, **config.model_dump(mode="json")}


def _scheme(container: Container, targets: list[str]) -> Any:
    library = library_of("quantization")
    grouped = container.group_size is not None
    weights: dict[str, Any] = {"strategy": "group" if grouped else "channel", "group_size": container.group_size}
    if container.halves:
        weights |= {"symmetric": False, "zp_dtype": torch.float32}
    inputs = None
    if container.input_bits is not None:
        scales = {"symmetric": True, "strategy": "token", "dynamic": True}
        scales = scales if container.tokens else {"symmetric": False, "strategy": "tensor"}
        inputs = library.QuantizationArgs(num_bits=container.input_bits, **scales)
    return library.QuantizationScheme(
        targets=targets,
        weights=library.QuantizationArgs(num_bits=container.width, **weights),
        input_activations=inputs,
        format=container.layout,
    )


def _stack(name: str) -> str:
    """A pattern of this layer and those with other numbers."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))


def _pattern(pattern: str, base: str) -> str:
    """What names layers in this model, in its base model and in one with another head."""
    prefix = re.escape(f"{base}.")
    return f"re:({prefix})?{pattern.removeprefix(prefix)}$" if base else f"re:{pattern}$"
