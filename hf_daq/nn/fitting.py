"""One layer fitted to the float one: its weight, bounds, scale and shift, from second moments of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .experts import OneExpert
from .init import Grid
from .layers import QuantizedLayer
from .moments import Moments
from .quantizers import WeightQuantizer, wide
from .rounding import (
    ROUNDING_DAMPING,
    Centered,
    best_damping,
    best_steps,
    improve_codes,
    refit,
    round_columns,
)

_WIDE = 512  # columns from which float32 serves: it is twice as fast
_MARGIN = 0.02  # codes between a weight and the end of its cell


@contextmanager
def whole_or_not(*layers: QuantizedLayer) -> Iterator[None]:
    """Layers whose changes inside are interrupted are as they were."""
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    # Of some the weight is a part of what the module around them has.
    weights = [
        None if layer.parameter_names[0] in state else layer.weight.clone()
        for layer, state in zip(layers, before, strict=True)
    ]
    try:
        yield
    except BaseException:
        for layer, state, weight in zip(layers, before, weights, strict=True):
            layer.load_state_dict(state)
            if weight is not None:
                layer.write_weight(weight)
        raise


@torch.no_grad()
def fit_layer(layer: QuantizedLayer | OneExpert, moments: Moments) -> None:
    """Write to the layer what gives the float output with the least squared error."""
    quantizer = layer.w_quant
    center = quantizer.shift is not None
    one, other = moments.halves
    both = (one + other).centered(center)
    if moments.columns >= _WIDE:
        both = Centered(*(value.float() for value in both))
    weight = wide(layer.float_weight().detach()).to(both.quantized.dtype)
    target = weight.reshape(moments.groups, -1, moments.columns)
    span = 1.0 if layer.a_quant is None else float(layer.a_quant.span)
    kept = (quantizer(layer.float_weight()) / span).to(target.dtype).reshape(target.shape)
    spread = moments.spread(center)
    output = _output(quantizer, target, kept, both, spread)
    if not layer.standardizes:
        wanted = refit(target, both, best_damping((one.centered(center), other.centered(center))))
        grid = Grid(quantizer.levels, quantizer.center)
        steps = best_steps(wanted, both, quantizer)
        ends = _of_each_weight(quantizer, steps, target)
        codes, values = round_columns(wanted, both, ends, grid, ROUNDING_DAMPING)
        codes, values = improve_codes(codes, wanted, both, ends, grid, ROUNDING_DAMPING)
        found = _output(quantizer, target, grid.values(codes, ends), both, spread)
        if found.error <= output.error:
            output = found
            _write_weight(layer, grid, codes, values, ends, steps)
            quantizer.scale.copy_(steps * span)
    quantizer.scale.mul_(output.ratio.flatten().repeat_interleave(quantizer.groups))
    if quantizer.shift is not None:
        quantizer.shift.copy_(output.shift.flatten())


class _Output(NamedTuple):
    """The factor and the shift of the output, and the least squared error that any could have, less a constant.

    Those with the least squared error shrink noisy outputs, more with each layer. So the factor of a convolution, after which a
    BatchNorm or a fixed range mostly comes, makes its output vary as in float.
    """

    ratio: Tensor
    shift: Tensor
    error: Tensor


def _output(
    quantizer: WeightQuantizer, target: Tensor, weight: Tensor, moments: Centered, spread: Tensor | None
) -> _Output:
    mixed = ((target @ moments.quantized + moments.missing) * weight).sum(2)
    energy = ((weight @ moments.quantized) * weight).sum(2)
    if quantizer.granularity == "tensor":
        mixed, energy = mixed.sum().view(1, 1), energy.sum().view(1, 1)
        spread = None if spread is None else spread.sum().view(1, 1)
    usable = (mixed > 0) & (energy > 0)
    inverse = 1 / torch.where(usable, energy, 1.0)
    ratio = torch.where(usable, mixed * inverse, 1.0).clamp(0.25, 4)
    error = (ratio**2 * energy - 2 * ratio * mixed).sum()
    if spread is not None:
        ratio = torch.where(usable, (spread.to(energy.dtype) * inverse).sqrt(), 1.0).clamp(0.25, 4)
    away = target - ratio[..., None] * weight
    shift = moments.missing_mean + (away * moments.quantized_mean[:, None]).sum(2)
    return _Output(ratio, shift, error)


def _of_each_weight(quantizer: WeightQuantizer, steps: Tensor, like: Tensor) -> Tensor:
    """What there is for each row of the quantizer, for each weight."""
    channels, columns = like.shape[0] * like.shape[1], like.shape[2]
    if quantizer.granularity == "tensor":
        return steps.expand(channels, columns).reshape(like.shape)
    rows = steps[:, None].expand(-1, quantizer.group_size)
    return quantizer.unrows(rows.contiguous(), (channels, columns)).reshape(like.shape)


def _write_weight(
    layer: QuantizedLayer | OneExpert, grid: Grid, codes: Tensor, values: Tensor, ends: Tensor, steps: Tensor
) -> None:
    """Values in floating point inside the cells of their codes, and bounds for them; where the dtype of the weight is too
    narrow for that, the middle of the cell."""
    inside, reach = grid.positions(values, ends), 0.5 - _MARGIN
    inside = torch.minimum(torch.maximum(inside, codes - reach), codes + reach).clamp_(0, grid.levels)
    _write_values(layer, grid.values(inside, ends), steps)
    wrong = layer.codes().reshape(codes.shape) != codes
    if bool(wrong.any()):
        _write_values(layer, grid.values(torch.where(wrong, codes, inside), ends), steps)


def _write_values(layer: QuantizedLayer | OneExpert, values: Tensor, steps: Tensor) -> None:
    weight = values.reshape(layer.weight_shape())
    layer.write_weight(layer.as_parameter(weight.to(layer.weight.dtype)))
    layer.w_quant.set_bounds([layer.float_weight()], steps)
