"""The quantizer and its gradients as in the paper (Kim, Lee, Ham, "Distance-aware Quantization", ICCV 2021).

With `b` bits and `R = 2**b - 1`, values are normalized to

    v = (clip(x, start, end) - start) / (end - start) * R

and rounded to the nearest code, ties down: the closed form of distance-aware soft rounding with the temperature
controller. The output is `(Q(v) - center) * step`. Everything is computed in float32 (float64 for float64 inputs).

    forward     activation_rows or weight_rows, then quantize; for a scale of each row of the input quantize_rows
    backward    gradients or gradient_of_rows, with daq_gradient_ for dQ/dv

Functions whose names end in `_` write over their first argument. Values go into `Constants` and `Rows`; so one compiled
kernel (kernels.py) serves all bits, every gamma and sigma, activations and weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_SMALLEST_SPAN = 1e-12
_SMALLEST_STEP = torch.finfo(torch.float32).eps  # of rows
# exp(-y) on [0, 1] to 3e-7, the highest power first: a compiled kernel on the CPU calls no function for it.
_EXP = (8.35845826e-4, -7.614024e-3, 0.0411768266, -0.166490286, 0.499969015, -0.999997903, 0.999999976)


def levels(bits: int, grid: str = "odd") -> int:
    """`R = 2**bits - 1`, the last code and the number of steps between the bounds; 2 on the grid "ternary"."""
    return 2 if grid == "ternary" else int(2**bits) - 1


def center(bits: int, grid: str) -> float:
    """The code that a weight of 0 lies on: R / 2, between two codes, on the grid "odd" (paper); `2**(bits - 1)` on "integer",
    from 2 bits on; 1 on "ternary"."""
    if grid == "ternary":
        return 1.0
    return levels(bits) / 2 if grid == "odd" or bits == 1 else float(2 ** (bits - 1))


class Constants(NamedTuple):
    """What is the same for all rows: numbers, or in a compiled kernel tensors of shape ()."""

    zero: Any
    """0, of the type of `levels`: `clamp` takes two numbers or two tensors."""
    levels: Any
    """R."""
    factor: Any
    """`gamma / (2 sinh gamma)`."""
    far: Any
    """`exp(-1 / sigma^2)`, the kernel of the farther code."""
    activation: Any
    """1 for activations, 0 for weights."""
    center: Any
    """Of weights: the code for zero."""


class Rows(NamedTuple):
    """What there is for each row: tensors of shape (rows,), or one that broadcasts to the values."""

    start: Tensor
    """The bounds, in units of x."""
    end: Tensor
    inverse: Tensor
    """`R / (end - start)`, codes per unit of x."""
    center: Tensor
    """The code for zero: the zero point of activations, `center` for weights."""
    step: Tensor
    """The distance of neighbouring outputs."""
    exact: Tensor
    """Of activations: the code for zero before rounding."""
    unit: Tensor
    """Of weights: the unit of their bounds."""
    scale: Tensor
    """Of weights: the output scale."""


class Learned(NamedTuple):
    """The gradients of what learns, shape (rows,)."""

    lower: Tensor
    upper: Tensor
    scale: Tensor
    """Of weights only."""


class Sums(NamedTuple):
    """Sums over the elements of each row, shape (rows,)."""

    gradient: Tensor
    """Of the gradient of v."""
    weighted: Tensor
    """Of the gradient of v times v."""
    outer: Tensor
    """Of the gradient of the output; for weights times `Q(v) - center`."""


Soft = tuple[float, float] | None
"""Sigma and temperature of the soft quantizer; None for the others."""
_Named = TypeVar("_Named", Rows, Learned)


def constants_of(activation: bool, bits: int, gamma: float, sigma: float, grid: str = "odd") -> Constants:
    factor, far = gamma / (2 * math.sinh(gamma)), math.exp(-1 / sigma**2)
    return Constants(0.0, float(levels(bits, grid)), factor, far, float(activation), center(bits, grid))


def activation_rows(lower: Tensor, upper: Tensor, constants: Constants) -> Rows:
    """Bounds are moved so that the real zero is a code. With `lower` = 0, the paper's quantizer: `start` = `center` = 0."""
    span = (upper - lower).clamp_min(_SMALLEST_SPAN)
    step = _divide(span, constants.levels)
    exact = -_divide(lower, step)
    zero_point = exact.round().clamp_(constants.zero, constants.levels)
    start = -(zero_point * step)
    none = span  # these have neither unit nor scale
    return Rows(
        start, start + span, _divide(1, step), zero_point, _full(span, _divide(1, constants.levels)), exact, none, none
    )


def weight_rows(lower: Tensor, upper: Tensor, scale: Any, offset: Any, unit: Any, constants: Constants) -> Rows:
    """Clipping `(w - offset) / unit` to [l, u] is clipping w to `[offset + unit l, offset + unit u]`."""
    start, end = offset + unit * lower, offset + unit * upper
    inverse = _divide(1, (end - start).clamp_min(_SMALLEST_SPAN)) * constants.levels
    none = start  # their code for zero is a constant
    center, step = _full(start, constants.center), _divide(scale.abs(), constants.center)
    return Rows(start, end, inverse, center, step, none, unit, scale)


def _divide(one: Any, other: Any) -> Any:
    """`one / other`, tensors or numbers, rounded once. In float32 a compiled kernel on a GPU is up to two units of the last place
    off, and values beside a threshold would get other codes in training than in the packed layer."""
    tensor = one if isinstance(one, Tensor) else other
    if not isinstance(tensor, Tensor) or not tensor.is_cuda:
        return one / other
    wide = one.double() / other if tensor is one else one / other.double()
    return wide.to(tensor.dtype)


def rows_of(lower: Tensor, upper: Tensor, scale: Any, offset: Any, unit: Any, constants: Constants) -> Rows:
    """`scale`, `offset` and `unit` are those of weights."""
    return _either(
        constants,
        lambda: activation_rows(lower, upper, constants),
        lambda: weight_rows(lower, upper, scale, offset, unit, constants),
    )


def quantize(x: Tensor, rows: Rows, constants: Constants, soft: Soft, dtype: torch.dtype) -> Tensor:
    """`(Q(v) - center) * step`. The rows broadcast to x."""
    code = _round_(normalize(x, rows, constants), soft)
    return code.sub_(rows.center).mul_(rows.step).to(dtype)


def normalize(x: Tensor, rows: Rows, constants: Constants) -> Tensor:
    """v, from 0 to R."""
    return torch.sub(x, rows.start).mul_(rows.inverse).clamp_(constants.zero, constants.levels)


def round_half_down_(v: Tensor) -> Tensor:
    """Round to the nearest integer, ties down: `floor(v) + [frac(v) > 1/2]`."""
    return v.sub_(0.5).ceil_()


def gradients(
    x: Tensor,
    grad: Tensor,
    rows: Rows,
    broadcast: Rows,
    constants: Constants,
    rounding: str,
    soft: Soft,
    needs_outer: bool,
) -> tuple[Tensor, Learned]:
    """The gradient of x, and those of the bounds and the scale.

    Args:
        rows, broadcast: the rows in shape (rows,), and as they broadcast to x.
        rounding: "daq", "ste" or "soft".
        needs_outer: whether the lower bound of activations or the scale of weights needs a gradient.
    """
    grad = grad.to(rows.start.dtype)
    v = normalize(x, broadcast, constants)
    outer = (
        _sums(_outer(v, grad, broadcast, constants, soft), broadcast) if needs_outer else torch.zeros_like(rows.start)
    )
    if rounding == "daq":
        gradient = daq_gradient_(v.clone(), constants).mul_(grad)
    else:
        gradient = grad.clone() if soft is None else _soft_gradient_(v.clone(), *soft).mul_(grad)
    # Values outside the bounds get no gradient; the bounds themselves are inside. A comparison with the
    # bounds rather than with 0 and R, since normalizing may round either way.
    inside = (x >= broadcast.start) & (x <= broadcast.end)
    inner = torch.where(inside, gradient, 0.0)
    sums = Sums(rows.step * _sums(inner, broadcast), rows.step * _sums(v.mul_(inner), broadcast), outer)
    learned = _either(
        constants,
        lambda: _activation_gradients(sums, rows, constants),
        lambda: _weight_gradients(sums, rows, constants),
    )
    return inner.mul_(broadcast.inverse * broadcast.step).to(x.dtype), learned


def token_scale(x: Tensor, levels: float) -> Tensor:
    """One step of the codes of each row, shape (..., 1): the largest magnitude is R / 2 steps. As in torchao and
    compressed-tensors it is a number of the dtype of x, given in float32."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    step = torch.maximum(high, -low).div_(levels / 2).clamp_min_(_SMALLEST_STEP)
    return step.to(torch.promote_types(x.dtype, torch.float32))


def token_positions(x: Tensor, inverse: Tensor, constants: Constants) -> Tensor:
    """Where rows lie between the codes, from 0 to R + 1/2. The code of zero is `(R + 1) / 2`. inverse: `1 / scale`."""
    return torch.mul(x, inverse).add_((constants.levels + 1) / 2)


def quantize_rows(
    x: Tensor, scale: Tensor, inverse: Tensor, constants: Constants, soft: Soft, dtype: torch.dtype
) -> Tensor:
    """`(Q(v) - z) * scale` with the scale of each row of x, shape (..., columns). Ties go to the even integer, as in the
    libraries named above. inverse: `1 / scale`, divided before: the largest value of a row may lie on a tie, and a compiled
    kernel divides less exactly."""
    zero = (constants.levels + 1) / 2
    if soft is None:
        code = torch.mul(x, inverse).round_().clamp_(-zero, zero - 1)
    else:
        code = (
            _soft_round_(token_positions(x, inverse, constants).clamp_(constants.zero, constants.levels), *soft) - zero
        )
    return code.mul_(scale).to(dtype)


def gradient_of_rows(x: Tensor, grad: Tensor, inverse: Tensor, constants: Constants, soft: Soft) -> Tensor:
    """The gradient of x in `quantize_rows`, but with "ste". Scales are constants, and no value lies outside of the bounds."""
    v = token_positions(x, inverse, constants)
    gradient = daq_gradient_(v, constants) if soft is None else _soft_gradient_(v, *soft)
    return gradient.mul_(grad).to(x.dtype)


def daq_gradient_(v: Tensor, constants: Constants) -> Tensor:
    """`dQ/dv = gamma / (2 sinh gamma) * coth((|1 - 2t| + 1/sigma^2) / 2)`, `t = frac(v)`, for v >= 0."""
    far = constants.far
    distance = v.frac_().sub_(0.5).abs_().mul_(2)
    if isinstance(far, Tensor) and far.device.type == "cpu":
        near = torch.full_like(distance, _EXP[0])
        for coefficient in _EXP[1:]:
            near = near * distance + coefficient
    else:
        near = distance.neg_().exp_()
    # coth(y / 2) = 2 / (1 - exp(-y)) - 1: a hyperbolic function takes several times longer.
    return near.mul_(-far).add_(1).reciprocal_().mul_(2 * constants.factor).sub_(constants.factor)


def _activation_gradients(sums: Sums, rows: Rows, constants: Constants) -> Learned:
    # Both bounds move the zero point, by its gradient `zero`, which is that of the code before rounding.
    zero = sums.gradient - sums.outer / constants.levels
    per_span = rows.inverse / constants.levels
    upper = (rows.center * sums.gradient - sums.weighted - rows.exact * zero) * per_span
    return Learned(-zero * rows.inverse - upper, upper, zero)


def _weight_gradients(sums: Sums, rows: Rows, constants: Constants) -> Learned:
    per_unit = rows.unit * (rows.inverse / constants.levels)
    lower = (sums.weighted - constants.levels * sums.gradient) * per_unit
    scale = sums.outer * rows.scale.sign() * (1 / constants.center)
    return Learned(lower, -sums.weighted * per_unit, scale)


def _outer(v: Tensor, grad: Tensor, broadcast: Rows, constants: Constants, soft: Soft) -> Tensor:
    """The gradient of the output, for weights times `Q(v) - center`."""
    activation = constants.activation
    if not isinstance(activation, Tensor) and activation:
        return grad
    code = _round_(v.clone(), soft)
    if isinstance(activation, Tensor):
        return grad * (code * (1 - activation) + torch.where(activation > 0, 1.0, -broadcast.center))
    return code.sub_(broadcast.center).mul_(grad)


def _sums(values: Tensor, broadcast: Rows) -> Tensor:
    sums = values.sum_to_size(broadcast.start.shape).view(-1)
    return sums.clone() if sums.numel() == values.numel() else sums


def _round_(v: Tensor, soft: Soft) -> Tensor:
    return round_half_down_(v) if soft is None else _soft_round_(v, *soft)


def _soft_round_(v: Tensor, sigma: float, temperature: float) -> Tensor:
    """Distance-aware soft rounding at a fixed temperature: `floor(v) + sigmoid(temperature * (s1 - s0))` (the softmax
    over the two neighbouring codes). Its output is not an integer: the quantizer gap."""
    floor = v.floor()
    score0, score1 = _scores(v.sub_(floor), sigma)
    return v.copy_(floor + torch.sigmoid(temperature * (score1 - score0)))


def _soft_gradient_(v: Tensor, sigma: float, temperature: float) -> Tensor:
    """The derivative of `_soft_round_`, for v >= 0."""
    t = v.frac_()
    score0, score1 = _scores(t, sigma)
    upper_share = torch.sigmoid(temperature * (score1 - score0))
    return t.copy_(temperature * upper_share * (1 - upper_share) * (score0 + score1))


def _scores(t: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Distance score times kernel for the lower and the upper code; the kernel is 1 for the nearer one, lower on a tie."""
    far = math.exp(-1 / sigma**2)
    upper_is_nearer = t > 0.5
    score0, score1 = torch.exp(-t), torch.exp(t - 1)
    return torch.where(upper_is_nearer, score0 * far, score0), torch.where(upper_is_nearer, score1, score1 * far)


def _either(constants: Constants, activation: Callable[[], _Named], weight: Callable[[], _Named]) -> _Named:
    """In a compiled kernel the flag is a tensor, and both are computed: one kernel serves activations and weights."""
    flag = constants.activation
    if not isinstance(flag, Tensor):
        return activation() if flag else weight()
    found, other = activation(), weight()
    return type(found)(*(torch.where(flag > 0, yes, no) for yes, no in zip(found, other, strict=True)))


def _full(like: Tensor, value: Any) -> Tensor:
    return value.expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)
