"""Quantization as pure tensor functions, with the gradients of the paper.

formula.py has the mathematics, kernels.py how it runs. Here is what users call, and what autograd keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelError
from .formula import Constants, Soft, center, constants_of, levels, token_scale
from .kernels import run_backward, run_forward, run_rows_backward, run_rows_forward


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        values, ctx.options = args[:5], args[5:]
        constants, _, soft, dtype = ctx.options
        result, stack = run_forward(x, values, constants, soft, dtype)
        ctx.save_for_backward(x, stack, *values)
        ctx.unpacked = None
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative(grad_output)
        x, stack, *_ = _unpacked(ctx)
        ctx.unpacked = None
        constants, rounding, soft, _ = ctx.options
        needs_x, needs_lower, _, needs_scale, *_ = ctx.needs_input_grad
        needs_outer = needs_lower if constants.activation else needs_scale
        grad_x, learned = run_backward(x, grad_output, stack, constants, rounding, soft, needs_outer)
        needs = ctx.needs_input_grad[1:4]
        lower_upper_scale = (value if needed else None for value, needed in zip(learned, needs, strict=True))
        return grad_x if needs_x else None, *lower_upper_scale, *(None,) * 6


class _QuantizeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, *options: Any) -> Tensor:  # type: ignore[override]
        constants, _, soft, dtype = ctx.options = options
        ctx.save_for_backward(x, scale)
        ctx.unpacked = None
        return run_rows_forward(x, scale, constants, soft, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative(grad_output)
        x, scale = _unpacked(ctx)
        ctx.unpacked = None
        constants, rounding, soft, _ = ctx.options
        return run_rows_backward(x, grad_output, scale, constants, rounding, soft), *(None,) * 5


def refuse_second_derivative(grad_output: Tensor) -> None:
    """torch's `once_differentiable` leaves it out in silence where a gradient is asked for that it is only a part of."""
    if not torch.compiler.is_compiling() and grad_output.requires_grad:
        raise ModelError(
            "quantizers have no second derivative: leave out create_graph=True, or take penalties of gradients and Hessians of "
            "the float model"
        )


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """What was saved. `recomputed` and the backward take it one after the other, and checkpointing gives it out once."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    unpacked: tuple[Any, ...] = ctx.unpacked
    return unpacked


def recomputed(node: Any) -> Tensor:
    """The output of `quantize_activation`, `quantize_weight` or `quantize_tokens` once more, from its node in the autograd
    graph."""
    x, scale, *values = _unpacked(node)
    constants, _, soft, dtype = node.options
    with torch.no_grad():
        if not values:
            return run_rows_forward(x, scale, constants, soft, dtype)
        return run_forward(x, tuple(values), constants, soft, dtype)[0]


def node_of(quantized: Tensor) -> Any:
    """The node for `recomputed` of a quantized tensor or a view of it; None for all others, and without a gradient."""
    node = (quantized if quantized._base is None else quantized._base).grad_fn
    return node if isinstance(node, _NODES) else None


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
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    options = _options(True, bits, rounding, gamma, sigma, temperature)
    result: Tensor = _Quantize.apply(  # type: ignore[no-untyped-call]
        x, lower.to(wide_dtype), upper.to(wide_dtype), None, None, None, *options, dtype or x.dtype
    )
    return result


_NODES = _Quantize._backward_cls, _QuantizeRows._backward_cls  # type: ignore[attr-defined]


def quantize_tokens(
    x: Tensor,
    *,
    bits: int,
    rounding: str = "daq",
    gamma: float = 2.0,
    sigma: float = 2.0,
    temperature: float = 4.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`scale * clip(round(x / scale), -(R + 1) / 2, (R - 1) / 2)` with `scale = max |x| / (R / 2)` of each row: symmetric
    dynamic quantization as in torchao (`Int8DynamicActivationInt8WeightConfig`) and compressed-tensors (`dynamic`,
    `strategy: token`), value by value those of torchao. Ties go to the even integer, other than in `quantize_activation`.

    Args:
        x: float tensor, shape (..., columns); a row are the values of the last dimension. A row with NaN or an infinity
            becomes NaN.
        bits: 2 to 8, `R = 2**bits - 1`.

    The other arguments are as for `quantize_activation`.

    Returns:
        A tensor of the shape of `x`. In the backward the scale is a constant, as in torchao. No value lies outside of
        bounds, so all get a gradient; torchao gives none to the last code.
    """
    options, scale = _options(True, bits, rounding, gamma, sigma, temperature), token_scale(x.detach(), levels(bits))
    result: Tensor = _QuantizeRows.apply(x, scale, *options, dtype or x.dtype)  # type: ignore[no-untyped-call]
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
    grid: str = "odd",
    rounding: str = "daq",
    gamma: float = 2.0,
    sigma: float = 1.0,
    temperature: float = 4.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`|scale| * (Q(v) - c) / c` with v of `(weight - offset) / unit` between `lower` and `upper`.

    Args:
        weight: float tensor; its first dimension are the rows, if there is more than one.
        lower, upper, scale: shape (rows,), or (1,) for the whole tensor.
        offset, unit: of the same shape; statistics of the weight, constants in the backward.
        grid: "odd": `c = R / 2`, odd multiples of a step on both sides of 0 (paper); "integer": `c = 2**(bits - 1)`, whole
            multiples with 0 among them, one more below than above it. At 1 bit both are -1 and 1. "ternary", 2 bits: -1, 0
            and 1, with `R = 2` and `c = 1`.

    The other arguments and the result are as for `quantize_activation`.
    """
    wide_dtype = torch.promote_types(weight.dtype, torch.float32)
    options = _options(False, bits, rounding, gamma, sigma, temperature, grid)
    values = (value.to(wide_dtype) for value in (lower, upper, scale, offset, unit))
    result: Tensor = _Quantize.apply(weight, *values, *options, dtype or weight.dtype)  # type: ignore[no-untyped-call]
    return result


class _SnapScale(torch.autograd.Function):
    @staticmethod
    def forward(scale: Tensor, zero: float, significant: int, unit: float) -> Tensor:  # type: ignore[override]
        step = scale.abs().float() / zero
        if unit:
            step = torch.where(step < 2**10 * unit, (step / unit).round().clamp_min(1) * unit, step)
        # To the nearest number with so many significant bits, ties to even, in the bits of float32.
        dropped = 24 - significant
        bits = step.view(torch.int32)
        bits = (bits + ((1 << dropped - 1) - 1) + ((bits >> dropped) & 1)) & -(1 << dropped)
        return torch.copysign(bits.view(torch.float32) * zero, scale).to(scale.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None, None


def snap_scale(scale: Tensor, *, bits: int, grid: str = "odd", dtype: str = "float16") -> Tensor:
    """The nearest scale of a weight whose step, the factor of its integers, is a number of `dtype`; the gradient is that
    without rounding.

    On the grid "odd" at 4 and 5 bits the step has 11 - bits significant bits, so that the smallest value, `-R` steps, is a
    number of float16 too: files with an unsigned code have a step and a smallest value.

    Args:
        scale: float tensor.
        dtype: "float16" or "bfloat16".

    Returns:
        A tensor like `scale`. Steps of float16 are at least 2^-24.
    """
    significant, zero = {"float16": 11, "bfloat16": 8}[dtype], center(bits, grid)
    odd = zero % 1 != 0  # then two codes are two steps apart
    if odd and bits in (4, 5):
        significant = min(significant, 11 - bits)
    unit = 0.0 if dtype == "bfloat16" else 2.0**-23 if odd else 2.0**-24
    snapped: Tensor = _SnapScale.apply(scale, zero, significant, unit)  # type: ignore[no-untyped-call]
    return snapped


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    *,
    bits: int,
    grid: str = "odd",
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`|scale| * (q - c) / c`, bit for bit as from `quantize_weight`.

    Args:
        codes: integers q from 0 to R, shape (channels, ...).
        scale: shape (1,), (channels,), or (channels * groups,) with `group_size`.
        bits: 1 to 8, `R = 2**bits - 1`.
        grid: as for `quantize_weight`.
        group_size: columns that share a scale; the last group of a channel may be shorter. None without groups.
        dtype: of the result.
    """
    zero = center(bits, grid)
    wide_dtype = torch.promote_types(dtype, torch.float32)
    step = scale.to(wide_dtype).abs() / zero
    rows, missing = codes, 0
    if group_size is not None:
        missing = -math.prod(codes.shape[1:]) % group_size
        rows = torch.nn.functional.pad(codes.flatten(1), (0, missing)).view(-1, group_size)
    step = step if step.shape[0] == 1 else step.view(-1, *(1,) * (rows.ndim - 1))
    weight = rows.to(wide_dtype).sub_(zero).mul_(step).to(dtype)
    if missing:
        weight = weight.view(codes.shape[0], -1)[:, :-missing]
    return weight.reshape(codes.shape)


def _options(
    activation: bool, bits: int, rounding: str, gamma: float, sigma: float, temperature: float, grid: str = "odd"
) -> tuple[Constants, str, Soft]:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ModelError(
            "quantizers have no transforms of torch.func (vmap, grad, jvp, jacrev): write torch.autograd.grad, and a loop over "
            "examples or models for vmap"
        )
    soft = (sigma, temperature) if rounding == "soft" else None
    return constants_of(activation, bits, gamma, sigma, grid), rounding, soft
