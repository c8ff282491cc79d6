"""Weights moved off the thresholds between codes, so that a file means the same codes on every device and in every dtype.

In long trainings weights gather at thresholds, where the last bit of the arithmetic decides the code. What a layer computes
depends on codes and scale alone: a weight a little further away on its own side means the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import QuantizedLayer, quantized_layers
from .quantizers import WeightQuantizer, processes

_ULPS = 16  # of the outermost code in float32: nearer to a threshold a weight is moved, to twice the distance
_ROUNDS = 3  # moving weights moves their statistics a little


@torch.no_grad()
def settled(model: nn.Module, gathered: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
    """The state dict of a model, or one gathered from its shards, with the weights of quantized layers off their thresholds.

    Codes and outputs stay what they are. A model that is alone gets the same weights, so that it equals its file; one of
    several processes stays as it is, since the others would not know.
    """
    tensors = model.state_dict() if gathered is None else gathered
    alone = gathered is None and processes() == 1
    replaced: dict[int, Tensor] = {}
    for name, layer in quantized_layers(model).items():
        weight = tensors.get(layer.weight_key(name))
        if layer.owner is not None or weight is None or weight.is_meta or not layer.calibrated:
            continue
        moved = _settled_weight(_with_tensors(layer, name, tensors))
        if torch.equal(moved, weight):
            continue
        if alone and not weight.is_inference():
            weight.copy_(moved)  # and so to the tensor of the state dict, without a second model in memory
        else:
            replaced[weight.data_ptr()] = moved
    return {name: replaced.get(tensor.data_ptr(), tensor) for name, tensor in tensors.items()}


def _with_tensors(layer: QuantizedLayer, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of the layer that computes with these tensors."""
    copied, quantizer = copy.copy(layer), copy.copy(layer.w_quant)
    for part, prefix in ((copied, name), (quantizer, f"{name}.w_quant")):
        parameters: dict[str, Any] = {key: tensors.get(f"{prefix}.{key}") for key in part._parameters}
        part._parameters = parameters
    copied._parameters["weight"] = tensors[layer.weight_key(name)]  # type: ignore[assignment]
    copied._modules = layer._modules | {"w_quant": quantizer}
    return copied


def _settled_weight(layer: Any) -> Tensor:
    quantizer: WeightQuantizer = layer.w_quant
    codes = quantizer.codes(layer.float_weight())
    original: Tensor = layer.weight
    weight = original
    for _ in range(_ROUNDS):
        before = layer.float_weight()
        moved = _moved(quantizer, before, codes)
        if torch.equal(moved, before):
            break
        if layer.standardizes:  # affine in each channel of the parameter
            factor = before.flatten(1).std(1) / weight.flatten(1).std(1)
            weight = weight + (moved - before) / factor.view(-1, 1, 1, 1)
        else:
            weight = layer.stored(moved)
        layer._parameters["weight"] = weight
    same = torch.equal(quantizer.codes(layer.float_weight()), codes)
    return weight if same else original


def _moved(quantizer: WeightQuantizer, weight: Tensor, codes: Tensor) -> Tensor:
    """The weight, where it lies nearer to a threshold than the margin, moved to twice that on the side of its code."""
    levels = quantizer.levels
    margin = _ULPS * levels * torch.finfo(torch.float32).eps
    positions = quantizer.positions(weight.double())
    threshold = positions.floor() + 0.5
    near = ((positions - threshold).abs() < margin) & (threshold > 0) & (threshold < levels)
    if not near.any():
        return weight
    side = torch.where(codes > threshold, 1.0, -1.0)
    start, end = quantizer.bounds(weight.double())
    step = quantizer.unrows(((end - start) / levels).expand_as(quantizer.rows(weight)).contiguous(), weight.shape)
    offset = (threshold + side * 2 * margin - positions) * step
    wanted = weight.double() + offset
    # A narrow dtype rounds: take the next value away from the threshold then.
    nearest = wanted.to(weight.dtype)
    further = (wanted + side * wanted.abs() * torch.finfo(weight.dtype).eps).to(weight.dtype)
    short = (nearest.double() - wanted) * side < -0.5 * margin * step
    result = torch.where(near, torch.where(short, further, nearest), weight)
    return torch.where(quantizer.codes(result) == codes, result, weight)
