"""Weights moved off the thresholds between codes, so that a file means the same codes on every device and in every dtype.

In long trainings weights gather at thresholds, where the last bit of the arithmetic decides the code. What a layer computes
depends on codes and scale alone: a weight a little further away on its own side means the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import QuantizedLayer, quantized_layers
from .parts import apart, by_rows, of_rows, parts_of
from .quantizers import WeightQuantizer, processes, wide

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
        weight = tensors.get(layer.weight_keys(name)[0])
        if layer.owner is not None or weight is None or weight.is_meta or not layer.calibrated:
            continue
        moved = _settled_weight(_with_tensors(layer, name, tensors))
        if moved is None:
            continue
        if alone and not weight.is_inference():
            weight.copy_(moved)  # and so to the tensor of the state dict, without a second model in memory
        else:
            replaced[weight.data_ptr()] = moved
    return {name: replaced.get(tensor.data_ptr(), tensor) for name, tensor in tensors.items()}


def _with_tensors(layer: QuantizedLayer, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of the layer that computes with these tensors."""
    copied = _part_with(layer, name, tensors)
    (key, *_), (full, *_) = layer.parameter_names, layer.weight_keys(name)
    if not full.startswith(f"{name}."):  # a parameter of the module around it
        copied._parameters[key] = tensors[full]
    return copied


def _part_with(part: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Any:
    copied: Any = object.__new__(type(part))  # FSDP2 gives modules a `__new__` of its own
    copied.__dict__.update(vars(part))
    copied._parameters = {key: tensors.get(f"{name}.{key}") for key in part._parameters}
    children = part._modules.items()
    copied._modules = {key: child and _part_with(child, f"{name}.{key}", tensors) for key, child in children}
    return copied


def _settled_weight(layer: Any) -> Tensor | None:
    """The weight of a layer in which what was near a threshold has moved; None where nothing was."""
    if layer.slope() is not None:
        return _settled_parameter(layer)
    whole = layer.float_weight()
    quantizer, weight = by_rows(layer.w_quant, whole)
    result = None
    for rows in _touched(quantizer, weight):
        before, own = weight[rows], of_rows(quantizer, rows)
        part, codes = before, own.codes(before)
        for _ in range(_ROUNDS):
            before, part = part, _moved(own, part, codes)
            if part is before:
                break
        if torch.equal(own.codes(part), codes):
            result = weight.clone() if result is None else result
            result[rows] = part
    return None if result is None else layer.as_parameter(result if weight is whole else result.view(whole.shape))


def _settled_parameter(layer: Any) -> Tensor | None:
    """The same where the weight is computed from a parameter of its shape."""
    quantizer: WeightQuantizer = layer.w_quant
    place, _, key = layer.parameter_names[0].rpartition(".")
    parameters = layer.get_submodule(place)._parameters
    parameter = original = parameters[key]
    codes = quantizer.codes(layer.float_weight())
    for _ in range(_ROUNDS):
        before = layer.float_weight()
        moved = _moved(quantizer, before, codes)
        if moved is before:
            break
        step = layer.as_parameter(moved - before) / layer.slope()
        # With a gain of 0, as networks start with, no parameter moves the weight.
        parameters[key] = parameter = parameter + torch.where(step.isfinite(), step, 0)
    same = torch.equal(quantizer.codes(layer.float_weight()), codes)
    return parameter if same and parameter is not original else None


def _touched(quantizer: WeightQuantizer, weight: Tensor) -> Iterable[slice | Tensor]:
    """Rows with a weight near a threshold, as many as are looked at together; all rows where none stands by itself."""
    if not apart(quantizer, weight):
        return [slice(None)] if len(_near(quantizer, weight).steps) else []
    parts = parts_of(weight)
    size = parts[0].stop
    perhaps = torch.cat([_perhaps_near(of_rows(quantizer, part), weight[part]) + part.start for part in parts])
    if len(perhaps) == 0:
        return []
    found = [part[_near(of_rows(quantizer, part), weight[part]).places[0]] for part in torch.split(perhaps, size)]
    rows: Tensor = torch.cat(found).unique()  # type: ignore[no-untyped-call]
    return torch.split(rows, size) if len(rows) else []


def _perhaps_near(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """The numbers of rows that may have a weight near a threshold: in float32, and so with twice the margin."""
    values = wide(weight)
    start, end = quantizer.bounds(values)
    positions = quantizer.rows(values).sub(start).mul_(quantizer.levels / (end - start))
    away = quantizer.unrows(positions, weight.shape).flatten(1).frac_().sub_(0.5).abs_()
    return (away.amin(1) < 2 * _margin(quantizer)).nonzero()[:, 0]


class _Near(NamedTuple):
    """Weights near a threshold.

    places: index into the weight, a tensor for each dimension.
    positions, thresholds, steps: float64, shape (count,): where each lies between the codes, the threshold, and the distance
        of two codes in units of the weight.
    """

    places: tuple[Tensor, ...]
    positions: Tensor
    thresholds: Tensor
    steps: Tensor


def _margin(quantizer: WeightQuantizer) -> float:
    return _ULPS * quantizer.levels * torch.finfo(torch.float32).eps


def _near(quantizer: WeightQuantizer, weight: Tensor) -> _Near:
    exact = weight.double()
    start, end = quantizer.bounds(exact)
    positions = quantizer.rows(exact).sub(start).div_(end - start).mul_(quantizer.levels)
    positions = quantizer.unrows(positions, weight.shape)
    places = (positions.frac().sub_(0.5).abs_() < _margin(quantizer)).nonzero(as_tuple=True)
    inside = (positions[places] > 0) & (positions[places] < quantizer.levels)
    places = tuple(index[inside] for index in places)
    column = torch.zeros_like(places[0])
    for size, index in zip(weight.shape[1:], places[1:], strict=True):
        column = column * size + index
    rows = places[0] * quantizer.groups + column // quantizer.group_size
    steps = ((end - start) / quantizer.levels).flatten()
    found = positions[places]
    return _Near(places, found, found.floor() + 0.5, steps[rows] if len(steps) > 1 else steps.expand_as(found))


def _moved(quantizer: WeightQuantizer, weight: Tensor, codes: Tensor) -> Tensor:
    """The weight, where it lies nearer to a threshold than the margin, moved to twice that on the side of its code; itself
    where nothing moves."""
    margin = _margin(quantizer)
    places, positions, threshold, step = _near(quantizer, weight)
    before, code = weight[places], codes[places]
    side = torch.where(code > threshold, 1.0, -1.0)
    wanted = before.double() + (threshold + side * 2 * margin - positions) * step
    # A narrow dtype rounds: take the next value away from the threshold then.
    nearest = wanted.to(weight.dtype)
    further = (wanted + side * wanted.abs() * torch.finfo(weight.dtype).eps).to(weight.dtype)
    short = (nearest.double() - wanted) * side < -0.5 * margin * step
    after = torch.where(short, further, nearest)
    result = weight.clone()
    result[places] = after
    same = quantizer.codes(result)[places] == code
    result[places] = torch.where(same, after, before)
    return weight if torch.equal(result, weight) else result
