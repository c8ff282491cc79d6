"""A quantized layer in integers: the specification that exported files are held against.

    output[c] = input_scale * weight_scale[c] * sum_i (code_i - zero_point) * weight[c, i] + bias[c]

with unsigned codes of the input, odd integers `2q - R` for the weight, and one scale a layer, a channel or a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .packed import PackedLayer


@dataclass(frozen=True)
class Integers:
    """What a layer computes with.

    weight: int16, shape (out, in / groups, ...): odd integers from -R to R, `R = 2**weight_bits - 1`.
    weight_scale: float32, shape (1, 1), (out, 1) or (out, groups): one step of `weight`, in units of the float weight. Not
        negative.
    group_size: input columns that share a scale; None without groups.
    bias: shape (out,), or None.
    input_bits: None where the input is not quantized; then `input_scale` is 1 and `zero_point` 0.
    input_scale: float32, shape (1,): one step of the input's codes, in units of the input.
    zero_point: the code of the real zero, from 0 to `2**input_bits - 1`.
    """

    weight: Tensor
    weight_bits: int
    weight_scale: Tensor
    group_size: int | None
    bias: Tensor | None
    input_bits: int | None
    input_scale: Tensor
    zero_point: int


@torch.no_grad()
def integers(layer: Any) -> Integers:
    """The integers of a quantized or a packed layer."""
    if isinstance(layer, PackedLayer):
        codes, scale, bias = layer.codes(), layer.weight_scale, layer.bias
        bits, group_size = layer.bits, layer.group_size
    else:
        quantizer = layer.w_quant
        codes, scale = quantizer.codes(layer.float_weight()), quantizer.scale
        bias = quantizer.shifted(layer.bias, layer.weight.dtype)
        bits, group_size = quantizer.bits, quantizer.group_size if quantizer.groups > 1 else None
    levels = 2**bits - 1
    weight = codes.to(torch.int16) * 2 - levels
    step = scale.float().abs() / levels
    input_bits, input_scale, zero_point = None, torch.ones(1, device=step.device), 0
    if layer.a_quant is not None:
        span, input_bits = layer.a_quant.span.float(), layer.a_quant.bits
        step, input_scale, zero_point = step / span, span / (2**input_bits - 1), layer.a_quant.zero_point
    rows = len(weight) if len(step) > 1 else 1
    bias = None if bias is None else bias.detach().clone()
    return Integers(weight, bits, step.view(rows, -1), group_size, bias, input_bits, input_scale, zero_point)
