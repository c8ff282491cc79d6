"""What quantized layers emit while a model is traced for ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.formula import levels
from ..nn.integers import Integers, integers
from ..nn.layers import CONVOLUTIONS, TRANSPOSED, replaced_forwards
from .onnx_nbits import product_of

_LARGEST_SUM = 2**15 - 1
_INT8 = 127


@contextmanager
def emitting(
    model: nn.Module, layers: Mapping[str, Any], multiply: bool, products: bool, int8_inputs: bool
) -> Iterator[None]:
    """Inside, quantized layers emit ONNX operators; with `products`, among them those of ONNX Runtime alone."""
    emissions: dict[nn.Module, Any] = {
        layer: TableEmission(layer)
        if isinstance(layer, nn.Embedding)
        else Emission(layer, name, multiply, products, int8_inputs)
        for name, layer in layers.items()
    }

    def restart(*_: Any) -> None:
        for emission in emissions.values():
            emission.calls = 0

    handle = model.register_forward_pre_hook(restart)
    try:
        with replaced_forwards(emissions):
            yield
    finally:
        handle.remove()


class Emission:
    """The forward of a layer while it is traced. calls: how many there were in this forward of the model; the notes of
    what is emitted end in their number, from the second on."""

    def __init__(self, layer: Any, name: str, multiply: bool, products: bool, int8_inputs: bool) -> None:
        self.layer, self.name, self.calls, found = layer, name, 0, integers(layer)
        self.input_bits, self.bias, self.group_size = found.input_bits, found.bias, found.group_size
        self.tokens = found.tokens
        device = found.weight.device
        self.input_scale = found.input_scale[0].clone()
        self.zero_point = torch.tensor(found.zero_point, dtype=torch.uint8, device=device)
        self.bounds = [
            torch.tensor(code, dtype=torch.uint8, device=device) for code in (0, levels(self.input_bits or 8))
        ]
        self.linear = not isinstance(layer, CONVOLUTIONS + TRANSPOSED)
        # The channels of a transposed convolution with groups lie along no single axis, so that it has no scale for each.
        along_an_axis = self.group_size is None and not isinstance(layer, TRANSPOSED)
        self.in_integers = along_an_axis and self.input_bits is not None
        in_float = self.linear and not self.in_integers
        self.product = product_of(found, int8_inputs) if products and in_float else None
        if self.product is None:
            self._prepare_weight(found, multiply)

    def _prepare_weight(self, found: Integers, multiply: bool) -> None:
        self.offset = found.halves
        multiple = _multiple(found) if multiply else 1
        factor = 2 if self.offset else 1 / multiple
        self.scale = found.weight_scale * factor
        codes = (found.weight - 1).div(2, rounding_mode="floor") if self.offset else found.weight * multiple
        self.codes = codes.to(torch.int8)
        self.scale = self.scale.expand(len(self.codes), -1).contiguous()
        if self.linear and self.in_integers:
            self.codes, self.scale = self.codes.t().contiguous(), self.scale.t().contiguous()
        self.ones = torch.ones(len(self.codes), 1, dtype=torch.int8, device=codes.device)
        self.one = torch.ones((), device=codes.device)
        self._prepare_rows()

    def _prepare_rows(self) -> None:
        """The weight for layers that compute in float: rows of integers with a scale each, and what to cut off. Runtimes
        round the inputs of linear layers to 8 bits where they see a product with integers, of blocks (`block_size`) or of
        whole rows; hence rows of half the length, joined by a Reshape."""
        self.shape = self.codes.shape
        if self.in_integers:
            return
        flat = self.codes.flatten(1)
        self.columns, size = flat.shape[1], self.group_size or flat.shape[1]
        if self.linear and self.group_size is None:
            size = -(-self.columns // 2)
            self.scale = self.scale.repeat(1, -(-self.columns // size))
        flat = torch.nn.functional.pad(flat, (0, -self.columns % size))
        self.rows = flat.reshape(-1, size).contiguous()
        self.scale = self.scale.reshape(-1)
        self.half = (self.scale / 2).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.layer.smoothed(x)
        step = self.layer.a_quant.scale(x) if self.tokens else None
        x = self._quantized(x if step is None else x * (1 / step))
        if self.in_integers and self.linear:
            return self._product(x, step)
        x = x if step is None else x * step
        if self.product is not None:
            return self.product(x, self._note("product")["hf_daq"])
        if self.in_integers:
            weight = self._dequantized("weight", self.codes, self.scale[:, 0], axis=0)
        else:
            weight = self._float_weight()
        output: Tensor = self.layer.compute(x, weight, self.bias)
        return output

    def _note(self, role: str) -> dict[str, str]:
        number = f".{self.calls - 1}" if self.calls > 1 else ""
        return {"hf_daq": f"{self.name}.{role}{number}"}

    def _quantized(self, x: Tensor) -> Tensor:
        if self.input_bits is None:
            return x
        constants, emit = (self.input_scale, self.zero_point), torch.onnx.ops.symbolic
        role = self._note("input_codes")
        name = role if self.input_bits == 8 else {}
        x = emit("QuantizeLinear", (x, *constants), dtype=torch.uint8, shape=x.shape, metadata_props=name)
        if self.input_bits < 8:
            x = emit("Clip", (x, *self.bounds), dtype=torch.uint8, shape=x.shape, metadata_props=role)
        name = self._note("input")
        return emit("DequantizeLinear", (x, *constants), dtype=torch.float32, shape=x.shape, metadata_props=name)

    def _dequantized(self, role: str, codes: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
        notes = self._note(role)
        if self.offset and role == "weight":
            notes["hf_daq_offset"] = "1"
        if role == "weight_rows" and self.input_bits is None:
            notes["hf_daq_float"] = "1"
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, scale, torch.zeros_like(scale, dtype=torch.int8)),
            {"axis": axis} if scale.ndim else {},
            dtype=torch.float32,
            shape=codes.shape,
            metadata_props=notes,
        )

    def _product(self, x: Tensor, step: Tensor | None) -> Tensor:
        output = torch.matmul(x, self._dequantized("weight", self.codes, self.scale[0], axis=1))
        if self.bias is not None and step is None:
            output = output + self.bias
        if self.offset:
            sums = torch.matmul(x, self._dequantized("ones", self.ones, self.one))
            output = output + sums * (self.scale[0] / 2)
        if step is not None:
            output = output * step if self.bias is None else output * step + self.bias
        return output

    def _float_weight(self) -> Tensor:
        weight = self._dequantized("weight_rows", self.rows, self.scale, axis=0)
        if self.offset:
            weight = weight + self.half
        if weight.shape != self.shape:
            weight = weight.reshape(len(self.codes), -1)[:, : self.columns].reshape(self.shape)
        return weight


class TableEmission:
    """The forward of an embedding while it is traced: rows of integers, and their scales."""

    calls = 0

    def __init__(self, layer: Any) -> None:
        self.layer, found = layer, integers(layer)
        halves = found.halves
        codes = (found.weight - 1).div(2, rounding_mode="floor") if halves else found.weight
        self.codes, self.scale = codes.to(torch.int8), found.weight_scale * (2 if halves else 1)
        self.offset = 0.5 if halves else 0.0
        columns = torch.arange(codes.shape[1], device=codes.device)
        self.groups = None if found.group_size is None else columns // found.group_size

    def __call__(self, x: Tensor) -> Tensor:
        rows, scale = nn.functional.embedding(x, self.codes).float(), nn.functional.embedding(x, self.scale)
        rows = rows + self.offset if self.offset else rows
        output: Tensor = self.layer.scaled(rows * (scale if self.groups is None else scale[..., self.groups]))
        return output


def _multiple(found: Integers) -> int:
    """A factor for the integers of a weight, where outputs have 8 bits. Runtimes round the bias of a convolution to
    multiples of the product of both scales, which is coarse at 1 or 2 bits; and processors without VNNI add pairs of
    products in 16 bits."""
    if found.input_bits is None or found.group_size is not None:
        return 1
    return max(1, min(_INT8, _LARGEST_SUM // (2 * levels(found.input_bits))) // found.largest)
