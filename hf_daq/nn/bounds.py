"""Bounds of a layer's inputs that are best for its output, once its weight may make good what they clip and round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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


@torch.no_grad()
def fit_input_bounds(layers: Sequence[QuantizedLayer], samples: Sequence[Sample]) -> None:
    """Move the bounds of what these layers read, which share one quantizer, step by step, for as long as the error of their outputs
    falls: that of the refit to one half of the sample, on the other, the geometric mean over layers. Their scales follow, so that the
    rest of each means what it meant."""
    quantizer = layers[0].a_quant
    if not isinstance(quantizer, ActivationQuantizer) or any(layer.standardizes for layer in layers):
        return
    if quantizer.bits == 1:  # the best lie so far inside that training would get no gradient from most inputs
        return
    if any(sample.lopsided() for sample in samples):
        return
    lower, upper = quantizer.lower.item(), quantizer.upper.item()
    lowest, highest = samples[0].extremes()
    if not math.isfinite(highest - lowest):
        return

    def at(place: _Place) -> tuple[float, float]:
        return lower * _STEP**place.lower, upper * _STEP**place.upper

    def errors_at(place: _Place, dampings: Sequence[Sequence[float]]) -> list[list[float]]:
        below, above = at(place)
        quantizer.lower.fill_(below)
        quantizer.upper.fill_(above)
        return [
            sample.errors(lambda x: quantizer.rounded(x) * quantizer.span.to(x.dtype), of_layer)
            for sample, of_layer in zip(samples, dampings, strict=True)
        ]

    @cache
    def error(place: _Place) -> float:
        return _mean(found for (found,) in errors_at(place, best))

    def useful(place: _Place) -> bool:
        """One step beyond what was seen is as far as it may go."""
        below, above = at(place)
        return (place.lower >= 0 or below * _STEP > lowest) and (place.upper >= 0 or above * _STEP < highest)

    try:
        first = errors_at(_Place(0, 0), [_DAMPINGS] * len(samples))
        # What rounding and clipping here add to the error is all that other bounds could take away.
        exact = _mean(sample.errors(lambda x: x, (1.0,))[0] for sample in samples)
        if not exact < _mean(found[_DAMPINGS.index(1.0)] for found in first) * (1 - _GAIN):
            return
        best = [(_DAMPINGS[found.index(min(found))],) for found in first]
        place = _descend(error, useful, signed=lower < 0)
    finally:
        quantizer.lower.fill_(lower)
        quantizer.upper.fill_(upper)
    below, above = at(place)
    quantizer.lower.fill_(below)
    quantizer.upper.fill_(above)
    for layer in layers:
        layer.w_quant.scale.mul_((above - below) / (upper - lower))


def _mean(errors: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(max(error, 1e-30)) for error in errors]
    return math.exp(sum(logs) / len(logs))


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
