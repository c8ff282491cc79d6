"""A quantized layer in integers: the specification that exported files are held against.

    output[c] = input_scale * weight_scale[c] * sum_i (code_i - zero_point) * weight[c, i] + bias[c]

with unsigned codes of the input, integers for the weight, and one scale a layer, a channel or a group. The integers are
odd, `2q - R`, or on the grid "integer" `q - 2**(b - 1)`. Inputs with a scale for each token have no other one:
`input_scale` is 1, and the output is multiplied by the scale of its token before the bias is added. Where channels of the
input are divided (`smooth`), codes are those of the divided input, and integers those of the weight that is multiplied with
the same.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .base import DaqLayer, check_calibrated, refuse_adapted_weights
from .formula import center, levels
from .layers import CONVOLUTIONS, TRANSPOSED, replaced_forwards
from .packed import daq_layers
from .quantizers import wide
from .token import TokenQuantizer


@dataclass(frozen=True)
class Integers:
    """What a layer computes with.

    weight: int16, shape (out, in / groups, ...): odd integers from -R to R, `R = 2**weight_bits - 1`; on the grid "integer"
        all from -2**(weight_bits - 1) to 2**(weight_bits - 1) - 1; on "ternary" -1, 0, 1.
    weight_grid: "odd", "integer" or "ternary".
    weight_scale: float32 (float64 in a float64 model), shape (1, 1), (out, 1) or (out, groups): one step of `weight`, in units of the float weight. Not
        negative.
    group_size: input columns that share a scale; None without groups.
    bias: shape (out,), or None.
    input_bits: None where the input is not quantized; then `input_scale` is 1 and `zero_point` 0.
    input_scale: of the same dtype, shape (1,): one step of the input's codes, in units of the input.
    zero_point: the code of the real zero, from 0 to `2**input_bits - 1`.
    tokens: whether the input has a scale for each row, which is not here.
    """

    weight: Tensor
    weight_bits: int
    weight_grid: str
    weight_scale: Tensor
    group_size: int | None
    bias: Tensor | None
    input_bits: int | None
    input_scale: Tensor
    zero_point: int
    tokens: bool = False

    @property
    def largest(self) -> int:
        """The largest magnitude that integers of `weight` may have."""
        return levels(self.weight_bits) if self.odd else int(center(self.weight_bits, self.weight_grid))

    @property
    def halves(self) -> bool:
        """Whether int8 does not hold them, odd ones of 8 bits: `(weight - 1) / 2` fits, with a zero point of -1/2."""
        return self.odd and self.weight_bits == 8

    @property
    def odd(self) -> bool:
        """Whether all are odd; at 1 bit both grids are."""
        return center(self.weight_bits, self.weight_grid) % 1 != 0


@torch.no_grad()
def integers(layer: DaqLayer) -> Integers:
    """The integers of a quantized or a packed layer."""
    bits, bias = layer.weight_bits, layer.quantized_bias()
    zero, codes = center(bits, layer.weight_grid), layer.codes().to(torch.int16)
    per_code = 1 if zero % 1 == 0 else 2  # the center of odd integers lies between two codes
    weight = codes * per_code - int(per_code * zero)
    step = wide(layer.weight_scale).abs() / (per_code * zero) / layer.span
    input_scale, zero_point = torch.ones_like(step[:1]), 0
    tokens = isinstance(layer.a_quant, TokenQuantizer)
    if layer.a_quant is not None:
        zero_point = layer.a_quant.zero_point
        input_scale = input_scale if tokens else layer.a_quant.span / layer.a_quant.levels
    rows = len(weight) if len(step) > 1 else 1
    bias = None if bias is None else bias.detach().clone()
    scale = step.view(rows, -1)
    return Integers(
        weight,
        bits,
        layer.weight_grid,
        scale,
        layer.group_size,
        bias,
        layer.input_bits,
        input_scale,
        zero_point,
        tokens,
    )


def exceeds_16_bits(layer: DaqLayer) -> bool:
    """Whether sums of two products of a layer may."""
    bits, zero = layer.weight_bits, center(layer.weight_bits, layer.weight_grid)
    largest = 128 if bits == 8 else levels(bits) if zero % 1 else int(zero)  # of odd ones of 8 bits there are halves
    return layer.a_quant is not None and 2 * layer.a_quant.levels * largest >= 2**15


def adds_in_16_bits() -> bool:
    """Whether this processor does, so that oneDNN, ONNX Runtime and OpenVINO cut off larger sums of products of bytes."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()


@contextmanager
def integer_arithmetic(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every quantized or packed layer computes with integers: integers for weights, unsigned codes of its input, sums
    that fit int32, and one scale at the end (one for each group of columns, where there are groups).

    The reference for exported files, for inference and not for speed. Layers whose input is not quantized have integer
    weights only, and compute in float. Outputs are those of the model up to rounding in float32, but for inputs so
    close to a threshold of the next quantizer that this rounding moves them across. In float64
    (`model.double()`) there are practically none.

    Raises:
        ModelError: not quantized. CalibrationError: not calibrated.
        OverflowError: in a forward whose sums do not fit int32.
    """
    layers = daq_layers(model)
    if not layers:
        raise ModelError("integer_arithmetic needs a model after apply_daq and calibrate, or a packed one")
    check_calibrated(layers, "integer_arithmetic")
    refuse_adapted_weights(model, "computed in integers")
    with replaced_forwards({layer: _IntegerForward(layer) for layer in layers.values()}):
        yield model


class _IntegerForward:
    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.values = integers(layer)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        values = self.values
        if isinstance(self.layer, nn.Embedding):
            return self._rows(x)
        if values.input_bits is None:
            codes = x.double()
        else:
            codes = (self.layer.a_quant.codes(x).to(torch.int32) - values.zero_point).double()
        tokens = self.layer.a_quant.scale(x) if values.tokens else 1.0
        parts = [self._scaled_sums(codes, weight, scale) for weight, scale in _groups(values)]
        output = (torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]) * tokens
        if values.bias is not None:
            output = output + values.bias.view(_per_channel(self.layer, output))
        return output.to(x.dtype)

    def _rows(self, indices: Tensor) -> Tensor:
        weight, scale = (
            nn.functional.embedding(indices, part) for part in (self.values.weight, self.values.weight_scale)
        )
        repeats = self.values.group_size or weight.shape[-1]
        rows = weight * scale.repeat_interleave(repeats, -1)[..., : weight.shape[-1]]
        output: Tensor = self.layer.scaled(rows.to(self.layer.weight_dtype))
        return output

    def _scaled_sums(self, codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        # Whole numbers in float64, exact far beyond int32: torch has no integer convolution on the CPU.
        sums: Tensor = self.layer.compute(codes, weight.double(), None)
        if self.values.input_bits is not None:
            if sums.abs().max() >= 2**31:
                raise OverflowError("the sums of a layer do not fit int32")
            sums = sums.to(torch.int32)
        factor = scale * self.values.input_scale
        return sums.to(factor.dtype) * factor.view(_per_channel(self.layer, sums) if len(factor) > 1 else (1,))


def _groups(values: Integers) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group of columns the weight with zeros elsewhere, and its scales, shape (1,) or (out,)."""
    if values.group_size is None:
        yield values.weight, values.weight_scale[:, 0]
        return
    flat = values.weight.flatten(1)
    for group, start in enumerate(range(0, flat.shape[1], values.group_size)):
        part = torch.zeros_like(flat)
        columns = slice(start, start + values.group_size)
        part[:, columns] = flat[:, columns]
        yield part.view(values.weight.shape), values.weight_scale[:, group]


def _per_channel(layer: Any, output: Tensor) -> tuple[int, ...]:
    """The shape in which a vector of channels meets the output of a layer."""
    return (-1, *(1,) * len(layer.kernel_size)) if isinstance(layer, CONVOLUTIONS + TRANSPOSED) else (-1,)
