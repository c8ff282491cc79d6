"""Quantization as pure tensor functions, with the gradients of the paper (Kim, Lee, Ham, ICCV 2021).

Values are normalised to `v = (clip(x, lower, upper) - lower) / (upper - lower) * R` with `R = 2**bits - 1` and rounded
to the nearest code, ties down. Everything is computed in float32 (float64 for float64 inputs), whatever autocast says.

`_forward` and `_backward` hold the mathematics. They run compiled, each as one pass over memory; or eagerly, in place,
where nothing can be compiled or it does not pay. On the CPU both give the same values, bit for bit; gradients differ in
the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import Kernels, available

_SMALLEST_SPAN = 1e-12
# What there is for each row: the bounds, `R / (upper - lower)`, the code for zero, the distance of neighbouring outputs,
# and for activations that code before rounding, for weights their statistic and the output scale.
_START, _END, _INVERSE, _CENTER, _STEP, _EXACT, _SCALE = range(7)
_UNIT = _EXACT
_FEW, _MANY = 2**16, 2**31  # elements between which tensors go to a compiled kernel
# exp(-y) on [0, 1] to 3e-7, the highest power first: a compiled kernel on the CPU calls no function for it.
_EXP = (8.35845826e-4, -7.614024e-3, 0.0411768266, -0.166490286, 0.499969015, -0.999997903, 0.999999976)


class _Constants(NamedTuple):
    """What is no tensor of a quantizer. The compiled kernels get the numbers as a tensor, so that other bits or
    another sigma need no other kernel."""

    zero: float
    levels: float
    factor: float
    """`gamma / (2 sinh gamma)`."""
    far: float
    """`exp(-1 / sigma^2)`, the kernel of the farther code."""
    activation: float
    """1 for activations, 0 for weights."""


_Soft = tuple[float, float] | None


def round_half_down_(v: Tensor) -> Tensor:
    """Round in place to the nearest integer, ties down: `floor(v) + [frac(v) > 1/2]`."""
    return v.sub_(0.5).ceil_()


def _daq_gradient_(v: Tensor, constants: Any) -> Tensor:
    """Overwrite `v` >= 0 with `dQ/dv = gamma / (2 sinh gamma) * coth((|1 - 2t| + 1/sigma^2) / 2)`, `t = frac(v)`."""
    factor, far = constants[2], constants[3]
    distance = v.frac_().sub_(0.5).abs_().mul_(2)
    if isinstance(far, Tensor) and far.device.type == "cpu":
        near = torch.full_like(distance, _EXP[0])
        for coefficient in _EXP[1:]:
            near = near * distance + coefficient
    else:
        near = distance.neg_().exp_()
    # coth(y / 2) = 2 / (1 - exp(-y)) - 1: a hyperbolic function takes several times longer.
    return near.mul_(-far).add_(1).reciprocal_().mul_(2 * factor).sub_(factor)


def _soft_round_(v: Tensor, sigma: float, temperature: float) -> Tensor:
    """Distance-aware soft rounding at a fixed temperature, in place: `floor(v) + sigmoid(temperature * (s1 - s0))`
    (the softmax over the two neighbouring codes). Its output is not an integer: the quantizer gap."""
    floor = v.floor()
    score0, score1 = _scores(v.sub_(floor), sigma)
    return v.copy_(floor + torch.sigmoid(temperature * (score1 - score0)))


def _soft_gradient_(v: Tensor, sigma: float, temperature: float) -> Tensor:
    """Overwrite `v` >= 0 with the derivative of `_soft_round_`."""
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


def _rows(lower: Tensor, upper: Tensor, scale: Any, offset: Any, unit: Any, constants: Any) -> Tensor:
    """What the elements of each row need, shape (7, rows); see `_START` and its neighbours."""
    zero, levels = constants[0], constants[1]

    def of_activation() -> Tensor:
        span = (upper - lower).clamp_min(_SMALLEST_SPAN)
        step = span / levels
        exact = -(lower / step)  # the code of the real zero, before rounding
        zero_point = exact.round().clamp_(zero, levels)
        start = -(zero_point * step)
        return torch.stack([start, start + span, 1 / step, zero_point, _full(span, 1 / levels), exact, start])

    def of_weight() -> Tensor:
        # Clipping (w - offset) / unit to [l, u] is clipping w to [offset + unit l, offset + unit u].
        start, end = offset + unit * lower, offset + unit * upper
        inverse = (1 / (end - start).clamp_min(_SMALLEST_SPAN)) * levels
        return torch.stack([start, end, inverse, _full(start, levels / 2), scale.abs() * (2 / levels), unit, scale])

    return _either(constants[4], of_activation, of_weight)


def _either(flag: Any, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """In a compiled kernel the flag is a tensor: one kernel serves activations and weights."""
    if isinstance(flag, Tensor):
        return torch.where(flag > 0, yes(), no())
    return yes() if flag else no()


def _full(like: Tensor, value: Any) -> Tensor:
    return value.expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)


def _normalise(x: Tensor, rows: Tensor, constants: Any) -> Tensor:
    return torch.sub(x, rows[_START]).mul_(rows[_INVERSE]).clamp_(constants[0], constants[1])


def _broadcastable(rows: Tensor, x: Tensor) -> Tensor:
    return rows if rows.shape[1] == 1 else rows.view(*rows.shape, *(1,) * (x.ndim - 1))


def _forward(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Any,
    offset: Any,
    unit: Any,
    constants: Any,
    soft: _Soft,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`(Q(v) - center) * step`, and the rows for `_backward`. `soft` has sigma and temperature of the soft quantizer."""
    rows = _rows(lower, upper, scale, offset, unit, constants)
    wide = _broadcastable(rows, x)
    v = _normalise(x, wide, constants)
    code = round_half_down_(v) if soft is None else _soft_round_(v, *soft)
    return code.sub_(wide[_CENTER]).mul_(wide[_STEP]).to(dtype), rows


def _backward(
    x: Tensor, grad: Tensor, rows: Tensor, constants: Any, rounding: str, soft: _Soft, third: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and in the shape (3, rows) those of lower, upper and scale. `third`: whether anything needs the
    third sum, for the lower bound of activations and the scale of weights."""
    levels, activation = constants[1], constants[4]
    wide = _broadcastable(rows, x)
    grad = grad.to(rows.dtype)
    v = _normalise(x, wide, constants)
    outer = _sums(_outer(v, grad, wide, activation, soft), wide) if third else torch.zeros_like(rows[0])
    if rounding == "daq":
        gradient = _daq_gradient_(v.clone(), constants).mul_(grad)
    else:
        gradient = grad.clone() if soft is None else _soft_gradient_(v.clone(), *soft).mul_(grad)
    # Values outside the bounds get no gradient; the bounds themselves are inside. A comparison with the
    # bounds rather than with 0 and R, since normalising may round either way.
    inside = (x >= wide[_START]) & (x <= wide[_END])
    inner = torch.where(inside, gradient, 0.0)
    total = rows[_STEP] * _sums(inner, wide)
    weighted = rows[_STEP] * _sums(v.mul_(inner), wide)
    per_span = rows[_INVERSE] / levels

    def of_activation() -> Tensor:
        # Both bounds move the zero point, by its gradient `zero`, which is that of the code before rounding.
        zero = total - outer / levels
        grad_upper = (rows[_CENTER] * total - weighted - rows[_EXACT] * zero) * per_span
        return torch.stack([-zero * rows[_INVERSE] - grad_upper, grad_upper, zero])

    def of_weight() -> Tensor:
        per_unit = rows[_UNIT] * per_span
        grad_scale = outer * rows[_SCALE].sign() * (2 / levels)
        return torch.stack([(weighted - levels * total) * per_unit, -weighted * per_unit, grad_scale])

    return inner.mul_(wide[_INVERSE] * wide[_STEP]).to(x.dtype), _either(activation, of_activation, of_weight)


def _outer(v: Tensor, grad: Tensor, wide: Tensor, activation: Any, soft: _Soft) -> Tensor:
    """The gradient of the output, for weights times `Q(v) - center`."""
    if not isinstance(activation, Tensor) and activation:
        return grad
    code = round_half_down_(v.clone()) if soft is None else _soft_round_(v.clone(), *soft)
    if isinstance(activation, Tensor):
        return grad * (code * (1 - activation) + torch.where(activation > 0, 1.0, -wide[_CENTER]))
    return code.sub_(wide[_CENTER]).mul_(grad)


def _sums(values: Tensor, wide: Tensor) -> Tensor:
    """Sums over each row, shape (rows,)."""
    sums = values.sum_to_size(wide[_START].shape).view(-1)
    return sums.clone() if sums.numel() == values.numel() else sums


_forward_kernels, _backward_kernels = Kernels(_forward), Kernels(_backward)


def _run_forward(
    x: Tensor, values: tuple[Any, ...], constants: _Constants, soft: _Soft, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_forward`, compiled where it pays. `values`: lower, upper, scale, offset, unit."""
    if not _compiles(x, values[0], soft):
        lower, upper, scale, offset, unit = values
        return _forward(x, lower, upper, scale, offset, unit, constants, soft, dtype)
    layout = _Layout(x, values[0])
    absent = _on((1.0,), x.device)
    present = (absent if value is None else value.detach() for value in values)
    tensors = layout.flat(x), *present, _on(constants, x.device)
    flat, rows = _forward_kernels(tensors, (None, dtype), layout.shapes("x", "row", "row", "row", "row", "row"))
    return layout.unflat(flat), rows


def _run_backward(
    x: Tensor, grad: Tensor, rows: Tensor, constants: _Constants, rounding: str, soft: _Soft, third: bool
) -> tuple[Tensor, Tensor]:
    """`_backward`, compiled where it pays."""
    if not _compiles(x, rows, soft):
        return _backward(x, grad, rows, constants, rounding, soft, third)
    layout = _Layout(x, rows[0])
    tensors = layout.flat(x), layout.flat(grad), rows, _on(constants, x.device)
    # The third sum, wanted or not: it costs little in the same pass, and one kernel serves all.
    flat, learned = _backward_kernels(tensors, (rounding, None, True), layout.shapes("x", "x", "rows"))
    return layout.unflat(flat), learned


def _compiles(x: Tensor, value: Tensor, soft: _Soft) -> bool:
    """Whether the compiled kernels serve: many elements and float32 arithmetic. In somebody else's compilation the eager
    form fuses with its neighbours, and a trace shows it."""
    return (
        not torch.compiler.is_compiling()
        and soft is None
        and _FEW < x.numel() < _MANY
        and value.dtype == torch.float32
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        and available(x.device.type)
    )


class _Layout:
    """A dense tensor as its elements lie in memory: shape (numel,), or (rows, numel / rows) with bounds for each row."""

    def __init__(self, x: Tensor, value: Tensor) -> None:
        self.per_row = value.numel() > 1
        self.shape = (len(x), -1) if self.per_row else (-1,)
        self.order = None
        self.ordered = x.shape
        if not x.is_contiguous():
            strides = x.stride()
            self.order = sorted(range(x.ndim), key=lambda dim: (dim > 0 or not self.per_row, -strides[dim], dim))
            self.ordered = torch.Size(x.shape[dim] for dim in self.order)

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements in this order; copied if they lie in another one, or with gaps."""
        tensor = tensor.detach()
        return (tensor if self.order is None else tensor.permute(self.order)).reshape(self.shape).contiguous()

    def unflat(self, flat: Tensor) -> Tensor:
        tensor = flat.view(self.ordered)
        if self.order is None:
            return tensor
        return tensor.permute(sorted(range(len(self.order)), key=self.order.__getitem__))

    def shapes(self, *names: str) -> tuple[tuple[int, ...], ...]:
        """Of tensors and the constants, to compile with: no two sizes by chance equal."""
        shapes = _PER_ROW if self.per_row else _PER_TENSOR
        return (*(shapes[name] for name in names), (len(_Constants._fields),))


_PER_TENSOR: dict[str, tuple[int, ...]] = {"x": (2**20 - 3,), "row": (1,), "rows": (7, 1)}
_PER_ROW: dict[str, tuple[int, ...]] = {"x": (521, 1031), "row": (521,), "rows": (7, 521)}


@cache
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        values, ctx.options = args[:5], args[5:]
        constants, _, soft, dtype = ctx.options
        result, rows = _run_forward(x, values, constants, soft, dtype)
        ctx.save_for_backward(x, rows, *values)
        ctx.unpacked = None
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rows, *_ = _unpacked(ctx)
        ctx.unpacked = None
        constants, rounding, soft, _ = ctx.options
        needs_x, needs_lower, _, needs_scale, *_ = ctx.needs_input_grad
        third = needs_lower if constants.activation else needs_scale
        grad_x, learned = _run_backward(x, grad_output, rows, constants, rounding, soft, third)
        needs = ctx.needs_input_grad[1:4]
        lower_upper_scale = (value if needed else None for value, needed in zip(learned, needs, strict=True))
        return grad_x if needs_x else None, *lower_upper_scale, *(None,) * 6


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """What was saved. `recomputed` and the backward take it one after the other, and checkpointing gives it out once."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    unpacked: tuple[Any, ...] = ctx.unpacked
    return unpacked


def recomputed(node: Any) -> Tensor:
    """The output of `quantize_activation` or `quantize_weight` once more, from its node in the autograd graph."""
    x, _, *values = _unpacked(node)
    constants, _, soft, dtype = node.options
    with torch.no_grad():
        return _run_forward(x, tuple(values), constants, soft, dtype)[0]


def node_of(quantized: Tensor) -> Any:
    """The node for `recomputed` of a quantized tensor or a view of it; None for all others, and without a gradient."""
    node = (quantized if quantized._base is None else quantized._base).grad_fn
    return node if isinstance(node, _Quantize._backward_cls) else None  # type: ignore[attr-defined]


def quantize_activation(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    bits: int,
    rounding: str = "daq",
    gamma: float = 2.0,
    sigma: float = 2.0,
    temperature: float = 4.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(Q(v) - z) / R`, with bounds that are moved so that the real zero is the code
    `z = clip(round(-lower / (upper - lower) * R), 0, R)`, whose gradient is that without rounding.

    Args:
        x: float tensor of any shape. Infinities give the outermost codes. NaN gives NaN, also as the gradient of the
            bounds, so that a gradient scaler sees it. Neither gets a gradient itself.
        lower, upper: bounds, shape (1,), lower < upper. With lower = 0, z = 0: the paper's quantizer.
        bits: 1 to 8, `R = 2**bits - 1`.
        rounding: the gradient of rounding. "daq": the paper's. "ste": 1. "soft": the soft quantizer at a fixed
            temperature, in the forward too; the other two have the same forward.
        gamma, sigma, temperature: numbers of the paper's gradient and of the soft quantizer.
        dtype: of the result; None for that of `x`.

    Returns:
        A tensor of the shape of `x`. Gradients reach every tensor argument, once: there is no second derivative.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    options = _options(True, bits, rounding, gamma, sigma, temperature)
    result: Tensor = _Quantize.apply(  # type: ignore[no-untyped-call]
        x, lower.to(wide), upper.to(wide), None, None, None, *options, dtype or x.dtype
    )
    return result


def quantize_weight(
    weight: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    offset: Tensor,
    unit: Tensor,
    *,
    bits: int,
    rounding: str = "daq",
    gamma: float = 2.0,
    sigma: float = 1.0,
    temperature: float = 4.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`|scale| * (2 Q(v) - R) / R` with v of `(weight - offset) / unit` between `lower` and `upper`.

    Args:
        weight: float tensor; its first dimension are the rows, if there is more than one.
        lower, upper, scale: shape (rows,), or (1,) for the whole tensor.
        offset, unit: of the same shape; statistics of the weight, constants in the backward.

    The other arguments and the result are as for `quantize_activation`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    options = _options(False, bits, rounding, gamma, sigma, temperature)
    values = (value.to(wide) for value in (lower, upper, scale, offset, unit))
    result: Tensor = _Quantize.apply(weight, *values, *options, dtype or weight.dtype)  # type: ignore[no-untyped-call]
    return result


def dequantize_weight(
    codes: Tensor, scale: Tensor, *, bits: int, group_size: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`|scale| * (2q - R) / R`, bit for bit as from `quantize_weight`.

    Args:
        codes: integers q from 0 to R, shape (channels, ...).
        scale: shape (1,), (channels,), or (channels * groups,) with `group_size`.
        bits: 1 to 8, `R = 2**bits - 1`.
        group_size: columns that share a scale; the last group of a channel may be shorter. None without groups.
        dtype: of the result.
    """
    levels = 2**bits - 1
    wide = torch.promote_types(dtype, torch.float32)
    step = scale.to(wide).abs() * (2 / levels)
    rows, missing = codes, 0
    if group_size is not None:
        missing = -(codes.numel() // len(codes)) % group_size
        rows = torch.nn.functional.pad(codes.flatten(1), (0, missing)).view(-1, group_size)
    step = step if len(step) == 1 else step.view(-1, *(1,) * (rows.ndim - 1))
    weight = rows.to(wide).sub_(levels / 2).mul_(step).to(dtype)
    if missing:
        weight = weight.view(len(codes), -1)[:, :-missing]
    return weight.reshape(codes.shape)


def _options(
    activation: bool, bits: int, rounding: str, gamma: float, sigma: float, temperature: float
) -> tuple[_Constants, str, _Soft]:
    factor, far = gamma / (2 * math.sinh(gamma)), math.exp(-1 / sigma**2)
    constants = _Constants(0.0, 2**bits - 1.0, factor, far, float(activation))
    return constants, rounding, (sigma, temperature) if rounding == "soft" else None
