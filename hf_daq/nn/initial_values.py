"""Initial bounds and scales of layers that read the same tensors, from what calibration has seen of these."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import DaqConfig
from ..errors import CalibrationError
from .base import weight_problem
from .init import activation_bounds, start_from_weight
from .layers import QuantizedLayer
from .matching import OutputMatch, usual_weights
from .observers import LayerInputs, Statistics
from .quantizers import ActivationQuantizer, WeightQuantizer
from .smoothing import best, candidates, statistics
from .token import TokenQuantizer


@dataclass
class Values:
    """Quantizers of one layer with their initial values, before they are written to the layer."""

    w_quant: WeightQuantizer
    a_quant: ActivationQuantizer | TokenQuantizer | None

    def write(self, layer: QuantizedLayer) -> None:
        layer.w_quant.load_state_dict(self.w_quant.state_dict())
        if layer.a_quant is not None and self.a_quant is not None and layer.input_owner is None:
            layer.a_quant.load_state_dict(self.a_quant.state_dict())


@dataclass
class _InFloat:
    """Of a layer: its weight, and for each sample the outputs, and `usual_weights` of these."""

    weight: Tensor
    outputs: list[Tensor]
    usual: list[Tensor]


def values_of_table(name: str, layer: QuantizedLayer, config: DaqConfig) -> Values:
    """Of the weight alone: an embedding's inputs are no numbers."""
    return _from_weight(layer, _checked_weight(name, layer), config)


def initial_values(
    layers: Mapping[str, QuantizedLayer], inputs: Mapping[str, LayerInputs], config: DaqConfig
) -> dict[str, Values]:
    """Of layers that read the same tensors, or of one layer.

    Raises:
        CalibrationError: a layer was not reached, or its inputs or weight are not finite.
    """
    found = {}
    for name, layer in layers.items():
        inputs[name].statistics.reduce()
        _check(name, inputs[name].statistics)
        weight = _checked_weight(name, layer)
        outputs = inputs[name].outputs(weight)
        found[name] = _InFloat(weight, outputs, [usual_weights(output) for output in outputs])
    weights, sample = [in_float.weight for in_float in found.values()], inputs[name].samples[0]
    tried = candidates(layers.values(), weights, sample) if config.smooth else ()
    return best(partial(_fitted, layers, inputs, found, config), tried)


def _checked_weight(name: str, layer: QuantizedLayer) -> Tensor:
    """What the float layer computes with."""
    weight = layer.unsmoothed_weight(layer.float_weight())
    if problem := weight_problem(weight):
        raise CalibrationError(f"the weight of layer {name!r} has {problem}")
    return weight


def _from_weight(layer: QuantizedLayer, weight: Tensor, config: DaqConfig) -> Values:
    values = Values(copy.deepcopy(layer.w_quant), copy.deepcopy(layer.a_quant))
    start_from_weight(values.w_quant, weight, config.weight_init)
    return values


def _fitted(
    layers: Mapping[str, QuantizedLayer],
    inputs: Mapping[str, LayerInputs],
    found: Mapping[str, _InFloat],
    config: DaqConfig,
    factors: Tensor | None,
) -> tuple[dict[str, Values], float]:
    """Values for inputs that are divided by these factors, and the logarithm of the error of the outputs."""
    weights = {
        name: in_float.weight if factors is None else in_float.weight * factors.to(in_float.weight.dtype)
        for name, in_float in found.items()
    }
    values = {name: _from_weight(layer, weights[name], config) for name, layer in layers.items()}
    a_quant = next(iter(values.values())).a_quant
    if isinstance(a_quant, ActivationQuantizer):
        a_quant.smooth = factors
        lower, upper = _input_bounds(weights, inputs, found, a_quant, config.activation_init)
        a_quant.lower.fill_(lower)
        a_quant.upper.fill_(upper)
        a_quant.finish()
    errors = [
        _match(weights[name], values[name].w_quant, a_quant, inputs[name], in_float, config)
        for name, in_float in found.items()
    ]
    return values, sum(errors) / len(errors)


def _match(
    weight: Tensor,
    w_quant: WeightQuantizer,
    a_quant: ActivationQuantizer | TokenQuantizer | None,
    inputs: LayerInputs,
    found: _InFloat,
    config: DaqConfig,
) -> float:
    """Set scale and shift so that the outputs of the layer are those in float. Returns the logarithm of the error that is left,
    the mean over samples, all positions and the typical one."""
    samples = inputs.samples
    if a_quant is not None:
        w_quant.scale.mul_(a_quant.span)
    quantized = inputs.outputs(w_quant(weight), a_quant)
    shares = [sample.share for sample in samples]
    one_scale = w_quant.scale.numel() == len(samples)
    ratios, shifts, errors = zip(
        *(
            OutputMatch(*sums).fit(one_scale, w_quant.shift is not None, config.weight_init == "3std")
            for sums in zip(found.outputs, quantized, found.usual, shares, strict=True)
        ),
        strict=True,
    )
    w_quant.scale.mul_(torch.cat(ratios).repeat_interleave(w_quant.groups))
    if w_quant.shift is not None:
        w_quant.shift.copy_(torch.cat(shifts))
    return float(torch.stack(errors).log().mean())


def _check(name: str, found: Statistics) -> None:
    if not math.isfinite(found.squares):
        raise CalibrationError(
            f"the inputs of layer {name!r} have NaN or infinite values (from {found.low} to {found.high})"
        )


def _input_bounds(
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, LayerInputs],
    in_float: Mapping[str, _InFloat],
    a_quant: ActivationQuantizer,
    init: str,
) -> tuple[float, float]:
    """For inputs that are the same for all of these layers, and where each of them is most sensitive to noise."""
    name = next(iter(weights))
    found = inputs[name].statistics
    if a_quant.smooth is not None:
        found = statistics(inputs[name].samples[0], a_quant.smooth)
    low, high = found.low, found.high
    if low == 0 and high == 0:
        warnings.warn(f"layer {name!r} saw only zeros in calibration; its input bounds start at 0 and 1", stacklevel=7)
        return 0.0, 1.0
    if init == "3std":
        reach = 3 * found.deviation or high
        return -reach if low < 0 else 0.0, reach
    histograms = []
    for name, weight in weights.items():
        samples, parts = inputs[name].samples, inputs[name].parts(weight)
        importance = [
            sample.share * typical.view(-1, *[1] * (sample.rows.ndim - 1)) * sample.reach(part)
            for sample, typical, part in zip(samples, in_float[name].usual, parts, strict=True)
        ]
        weighted = [
            found.weighted(a_quant.smoothed(sample.rows), own) for sample, own in zip(samples, importance, strict=True)
        ]
        histograms += [found.histogram, torch.stack(weighted).sum(0)]
    return activation_bounds(found.centers(), torch.stack(histograms), low, high, a_quant.bits)
