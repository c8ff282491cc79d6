"""Weights and inputs of a layer counted in bins that fit its codes: what `plots` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..model.batch import examples_in, run
from ..nn.base import layer_input
from ..nn.formula import center, levels
from ..nn.layers import evaluating
from ..nn.quantizers import wide
from ..nn.token import TokenQuantizer

REACH = 3  # spans beyond either bound that bins cover; what lies farther is in the outermost ones
BIN_WIDTH = {1: 1 / 41, 2: 1 / 15, 3: 1 / 7, 4: 1 / 5, 5: 1 / 3, 6: 1, 7: 3, 8: 5}  # in codes, by bits


@dataclass(frozen=True)
class Histogram:
    """Values of one layer.

    name, bits: name of the layer and its number of bits; its codes go from 0 to `2**bits - 1`, of three values to 2.
    bins: counts between the edges of `bin_edges(bits)`; None where there is no float weight.
    codes: counts of each code, shape (2**bits,).
    clipped: share of the values outside of the bounds, 0 to 1; None where there is no float weight.
    origin, step: where code 0 lies on the axis, and how far apart its neighbors; bounds are the codes 0 and R.
    code_values: where the values that codes stand for lie on the axis, shape (2**bits,).
    unit: label of the axis.
    zero: where the zero point lies; None for weights.
    """

    name: str
    bits: int
    bins: np.ndarray | None
    codes: np.ndarray
    clipped: float | None
    origin: float
    step: float
    code_values: np.ndarray
    unit: str
    zero: float | None = None

    def position(self, v: Any) -> Any:
        """Where the code v, which need not be whole, lies on the axis."""
        return self.origin + self.step * v


def bin_edges(bits: int) -> np.ndarray:
    """Edges of bins, in codes. Thresholds lie on edges; codes in the middle of a bin, of several from 7 bits on."""
    width, largest = BIN_WIDTH[bits], levels(bits)
    before, after = math.ceil(REACH * largest / width), math.ceil(((REACH + 1) * largest + 1) / width)
    edges: np.ndarray = -0.5 + width * np.arange(-before, after + 1)
    return edges


@torch.no_grad()
def histogram_of_weights(name: str, layer: Any) -> Histogram:
    """The float weights of a quantized layer, in their own units, or with bounds for each channel or group in units of
    these: -1 and 1 are the bounds, and code_values are their medians. Of a packed layer the codes, in units of the scale."""
    bits = layer.weight_bits
    largest, zero = levels(bits, layer.weight_grid), center(bits, layer.weight_grid)
    code_values = (np.arange(largest + 1) - zero) / zero
    if layer.w_quant is None:
        codes = _code_counts(layer.codes(), bits)[: largest + 1]
        return Histogram(name, bits, None, codes, None, -1.0, 1 / zero, code_values, "weight / scale")
    quantizer, weight = layer.w_quant, wide(layer.float_weight())
    (start, end), v = quantizer.bounds(weight), quantizer.positions(weight)
    scale = layer.weight_scale.abs() / layer.span
    origin, step, axis = -1.0, 2 / largest, f"weight, {quantizer.granularity} bounds at ±1"
    if quantizer.granularity == "tensor":
        origin, step, axis = start.item(), (end - start).item() / largest, "weight"
        code_values = code_values * scale.item()
    else:
        half, middle = (end - start).flatten() / 2, (end + start).flatten() / 2
        slope, shift = (np.median((value / half).cpu().numpy()) for value in (scale, middle))
        code_values = code_values * slope - shift
    codes = _code_counts(quantizer.codes(weight), bits)[: largest + 1]
    return Histogram(
        name,
        bits,
        _counts(v, bits),
        codes,
        int(quantizer.outside(v).count_nonzero()) / v.numel(),
        origin,
        step,
        code_values,
        axis,
    )


def histograms_of_inputs(model: nn.Module, batch: Any, layers: Mapping[str, Any]) -> list[Histogram]:
    """The inputs that layers of the model get in a forward in evaluation mode; each has a quantized input.

    Args:
        batch: a tensor, a mapping of tensors for `model(**batch)`, or a tuple for `model(*batch)`.

    Raises:
        ModelError: another kind of batch, or one that does not reach a layer.
    """
    examples_in(batch)
    observers = {name: _Inputs(layer.a_quant) for name, layer in layers.items()}
    hooks = [
        layers[name].register_forward_pre_hook(observer.add, with_kwargs=True) for name, observer in observers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, observer in observers.items():
        if observer.codes.sum() == 0:
            raise ModelError(f"the batch never reached layer {name!r}; name others: layers=[...]")
    return [observer.histogram(name) for name, observer in observers.items()]


class _Inputs:
    """Counts over all calls of a layer."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer, self.bits, self.zero_point = quantizer, quantizer.bits, quantizer.zero_point
        self.tokens = isinstance(quantizer, TokenQuantizer)
        self.step = 1.0 if self.tokens else (quantizer.span.detach() / quantizer.levels).item()
        self.bins = np.zeros(len(bin_edges(self.bits)) - 1, dtype=np.int64)
        self.codes = np.zeros(2**self.bits, dtype=np.int64)
        self.clipped = 0

    def add(self, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = layer_input(args, named).detach()
        v = self.quantizer.positions(x)
        self.bins += _counts(v, self.bits)
        self.codes += _code_counts(self.quantizer.codes(x), self.bits)
        self.clipped += int(self.quantizer.outside(v).count_nonzero())

    def histogram(self, name: str) -> Histogram:
        origin = -self.zero_point * self.step
        code_values = origin + self.step * np.arange(2**self.bits)
        clipped, axis = self.clipped / self.codes.sum(), "input, in steps of its token" if self.tokens else "input"
        return Histogram(
            name, self.bits, self.bins, self.codes, clipped, origin, self.step, code_values, axis, zero=0.0
        )


def _counts(v: Tensor, bits: int) -> np.ndarray:
    edges = bin_edges(bits)
    values = v.flatten().cpu().numpy().clip(edges[0], edges[-1])
    return np.histogram(values, bins=len(edges) - 1, range=(edges[0], edges[-1]))[0]


def _code_counts(codes: Tensor, bits: int) -> np.ndarray:
    counts: np.ndarray = torch.bincount(codes.flatten().int(), minlength=2**bits).cpu().numpy()
    return counts
