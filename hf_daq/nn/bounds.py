"""Bounds of a layer's inputs that are best for its output, once its weight may make good what they clip and round."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from .layers import QuantizedLayer
from .moments import Sample
from .quantizers import ActivationQuantizer

_STEP = 2**-0.5  # between neighboring candidates
_DAMPINGS = 0.1, 1.0, 10.0
_GAIN = 0.02  # of the error of the output: for less, bounds stay where they are


class _Place(NamedTuple):
    """How many steps the bounds are inside of those of calibration."""

    lower: int
    upper: int


def has_own_bounds(layer: QuantizedLayer) -> bool:
    """Whether the bounds of its inputs can move without another layer, and its weight with them."""
    own = layer.input_owner is None and layer.input_readers == 1
    return isinstance(layer.a_quant, ActivationQuantizer) and own and not layer.standardizes


@torch.no_grad()
def fit_input_bounds(layer: QuantizedLayer, sample: Sample) -> None:
    """Move the bounds of the layer's inputs, step by step, for as long as the error of its output falls: that of the refit to one half of
    the sample, on the other. The scale of the layer follows, so that the rest of it means what it meant."""
    quantizer = layer.a_quant
    if not isinstance(quantizer, ActivationQuantizer) or sample.lopsided():
        return
    lower, upper = quantizer.lower.item(), quantizer.upper.item()
    lowest, highest = sample.extremes()
    if not math.isfinite(highest - lowest):
        return
    weight = layer.float_weight().detach().float().reshape(sample.groups, -1, sample.columns)
    center = layer.w_quant.shift is not None

    def at(place: _Place) -> tuple[float, float]:
        return lower * _STEP**place.lower, upper * _STEP**place.upper

    def error_of(place: _Place, damping: float) -> float:
        below, above = at(place)
        quantizer.lower.fill_(below)
        quantizer.upper.fill_(above)
        return sample.error(lambda x: quantizer(x) * quantizer.span, weight, damping, center)

    @cache
    def error(place: _Place) -> float:
        return error_of(place, damping)

    def useful(place: _Place) -> bool:
        """One step beyond what was seen is as far as it may go."""
        below, above = at(place)
        return (place.lower >= 0 or below * _STEP > lowest) and (place.upper >= 0 or above * _STEP < highest)

    # What rounding and clipping here add to the error is all that other bounds could take away.
    damping, exact = 1.0, sample.error(lambda x: x, weight, 1.0, center)
    try:
        if not exact < error_of(_Place(0, 0), damping) * (1 - _GAIN):
            return
        damping = min(_DAMPINGS, key=lambda damping: error_of(_Place(0, 0), damping))
        place = _descend(error, useful, signed=lower < 0)
    finally:
        quantizer.lower.fill_(lower)
        quantizer.upper.fill_(upper)
    below, above = at(place)
    quantizer.lower.fill_(below)
    quantizer.upper.fill_(above)
    layer.w_quant.scale.mul_((above - below) / (upper - lower))


def _descend(error: Callable[[_Place], float], useful: Callable[[_Place], bool], signed: bool) -> _Place:
    """The place from which no neighbor is better by `_GAIN`: as far as it goes in one direction, then in the next."""
    moves = [(0, 1), (0, -1)]
    if signed:
        moves = [(1, 1), (0, 1), (1, 0), (-1, -1), (0, -1), (-1, 0)]
    place, moved = _Place(0, 0), True
    while moved:
        moved = False
        for down, up in moves:
            while useful(near := _Place(place.lower + down, place.upper + up)):
                if not error(near) < error(place) * (1 - _GAIN):
                    break
                place, moved = near, True
    return place
