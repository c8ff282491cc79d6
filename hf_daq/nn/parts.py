"""A weight in parts of some rows, each quantized as it is in the whole: few enough weights for the cache, and for quantizers that
need not be compiled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .quantizers import WeightQuantizer

_AT_ONCE = 2**15  # weights


def apart(quantizer: WeightQuantizer, weight: Tensor) -> bool:
    """Whether rows by themselves have the codes that they have in the weight, bit for bit. Sums go by strides, and a compiled
    kernel on a GPU rounds in its own way."""
    return quantizer.granularity != "tensor" and weight.is_contiguous() and weight.device.type == "cpu"


def by_rows(quantizer: WeightQuantizer, weight: Tensor) -> tuple[WeightQuantizer, Tensor]:
    """Both, with groups as the rows of the weight, where they all have as many columns."""
    if quantizer.groups == 1 or quantizer.padding or not apart(quantizer, weight):
        return quantizer, weight
    rows = copy.copy(quantizer)
    rows.granularity, rows.groups = "channel", 1
    return rows, weight.view(-1, quantizer.group_size)


def of_rows(quantizer: WeightQuantizer, rows: slice | Tensor) -> WeightQuantizer:
    """The quantizer for these rows of its weight."""
    if quantizer.granularity == "tensor":
        return quantizer
    part = copy.copy(quantizer)
    values = quantizer.lower, quantizer.upper, quantizer.scale
    lower, upper, scale = (value.view(-1, quantizer.groups)[rows].flatten() for value in values)
    part._parameters = {"lower": lower, "upper": upper, "scale": scale, "shift": None}  # type: ignore[dict-item]
    return part


def parts_of(weight: Tensor) -> list[slice]:
    """Rows that are looked at together."""
    size = max(_AT_ONCE * len(weight) // weight.numel(), 1)
    return [slice(start, start + size) for start in range(0, len(weight), size)]


@torch.no_grad()
def codes_in_parts(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """`quantizer.codes(weight)`, part by part."""
    if not apart(quantizer, weight):
        return quantizer.codes(weight)
    rowwise, rows = by_rows(quantizer, weight)
    codes = torch.cat([of_rows(rowwise, part).codes(rows[part]) for part in parts_of(rows)])
    return codes.view(weight.shape)
