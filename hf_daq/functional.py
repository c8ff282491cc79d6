"""Quantization as pure tensor functions, with the gradients of the paper (Kim, Lee, Ham, ICCV 2021).

Values are normalised to `v = (clip(x, lower, upper) - lower) / (upper - lower) * R` with `R = 2**bits - 1` and rounded
to the nearest code, ties down. Everything is computed in float32 (float64 for float64 inputs), whatever autocast says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SMALLEST_SPAN = 1e-12


def round_half_down_(v: Tensor) -> Tensor:
    """Round in place to the nearest integer, ties down: `floor(v) + [frac(v) > 1/2]`."""
    return v.sub_(0.5).ceil_()


def rounding_gradient_(v: Tensor, rounding: str, gamma: float, sigma: float, temperature: float) -> Tensor:
    """Overwrite `v` >= 0 with dQ/dv.

    With `t = frac(v)`:
      "daq"   `gamma / (2 sinh gamma) * coth((|1 - 2t| + 1/sigma^2) / 2)`
      "ste"   1
      "soft"  derivative of `soft_round_`
    """
    if rounding == "ste":
        return v.fill_(1.0)
    if rounding == "daq":
        half_distance = v.frac_().sub_(0.5).abs_().add_(0.5 / sigma**2)
        return half_distance.tanh_().reciprocal_().mul_(gamma / (2 * math.sinh(gamma)))
    t = v.frac_()
    score0, score1 = _scores(t, sigma)
    upper_share = torch.sigmoid(temperature * (score1 - score0))
    return t.copy_(temperature * upper_share * (1 - upper_share) * (score0 + score1))


def soft_round_(v: Tensor, sigma: float, temperature: float) -> Tensor:
    """Distance-aware soft rounding at a fixed temperature, in place: `floor(v) + sigmoid(temperature * (s1 - s0))`
    (the softmax over the two neighbouring codes). Its output is not an integer: the quantizer gap."""
    floor = v.floor()
    score0, score1 = _scores(v.sub_(floor), sigma)
    return v.copy_(floor + torch.sigmoid(temperature * (score1 - score0)))


def _scores(t: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Distance score times kernel for the lower and the upper code; the kernel is 1 for the nearer one, lower on a tie."""
    far = math.exp(-1 / sigma**2)
    upper_is_nearer = t > 0.5
    score0, score1 = torch.exp(-t), torch.exp(t - 1)
    return torch.where(upper_is_nearer, score0 * far, score0), torch.where(upper_is_nearer, score1, score1 * far)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        lower: Tensor,
        upper: Tensor,
        center: Tensor | float,
        step: Tensor | float,
        levels: int,
        rounding: str,
        gamma: float,
        sigma: float,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(
            x,
            lower,
            upper,
            center if isinstance(center, Tensor) else None,
            step if isinstance(step, Tensor) else None,
        )
        ctx.constants = (center, step, levels, rounding, gamma, sigma, temperature)
        v = _normalise(x, lower, upper, levels)
        code = soft_round_(v, sigma, temperature) if rounding == "soft" else round_half_down_(v)
        return code.sub_(center).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lower, upper, center_tensor, step_tensor = ctx.saved_tensors
        center, step, levels, rounding, gamma, sigma, temperature = ctx.constants
        center = center if center_tensor is None else center_tensor
        step = step if step_tensor is None else step_tensor
        needs_x, needs_lower, needs_upper, needs_center, needs_step = ctx.needs_input_grad[:5]
        grad_output = grad_output.to(lower.dtype)
        span = _span(lower, upper)
        v = _normalise(x, lower, upper, levels)

        grad_center = grad_step = grad_lower = grad_upper = None
        if needs_center:
            grad_center = (grad_output * -step).sum_to_size(center.shape)
        if needs_step:
            code = v.clone()
            code = soft_round_(code, sigma, temperature) if rounding == "soft" else round_half_down_(code)
            grad_step = code.sub_(center).mul_(grad_output).sum_to_size(step.shape)

        # Values outside the bounds get no gradient; the bounds themselves are inside. A comparison with the
        # bounds rather than with 0 and R, since normalising may round either way.
        inside = (x >= lower) & (x <= upper)
        gradient = rounding_gradient_(v.clone(), rounding, gamma, sigma, temperature)
        grad_v = torch.where(inside, gradient.mul_(grad_output).mul_(step), 0.0)
        if needs_lower or needs_upper:
            weighted = v.mul_(grad_v).sum_to_size(lower.shape)
            grad_upper = -weighted / span
            grad_lower = (weighted - levels * grad_v.sum_to_size(lower.shape)) / span
        grad_x = grad_v.mul_(levels / span).to(x.dtype) if needs_x else None
        return grad_x, grad_lower, grad_upper, grad_center, grad_step, None, None, None, None, None


def _span(lower: Tensor, upper: Tensor) -> Tensor:
    return (upper - lower).clamp_min(_SMALLEST_SPAN)


def _normalise(x: Tensor, lower: Tensor, upper: Tensor, levels: int) -> Tensor:
    return torch.sub(x, lower).mul_(levels / _span(lower, upper)).clamp_(0, levels)


def quantize(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    center: Tensor | float,
    step: Tensor | float,
    bits: int,
    rounding: str = "daq",
    gamma: float = 2.0,
    sigma: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    """`(Q(v) - center) * step` with `v = (clip(x, lower, upper) - lower) / (upper - lower) * (2**bits - 1)`.

    Args:
        x: float tensor of any shape. Infinities give the outermost codes. NaN gives NaN, also as the gradient of the
            bounds, so that a gradient scaler sees it. Neither gets a gradient itself.
        lower, upper: bounds, broadcastable to `x`, lower < upper.
        center: code that stands for zero: `R / 2` for weights, the zero point for activations. Number or tensor.
        step: distance of two neighbouring values of the output. Number or tensor.
        bits: 1 to 8, `R = 2**bits - 1`.
        rounding: "daq", "ste" or "soft" (see `rounding_gradient_`); "daq" and "ste" have the same forward.
        gamma, sigma, temperature: see `rounding_gradient_`.

    Returns:
        A tensor of the shape and dtype of `x`. Gradients reach every tensor argument.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    lower, upper = lower.to(dtype), upper.to(dtype)
    center = center.to(dtype) if isinstance(center, Tensor) else center
    step = step.to(dtype) if isinstance(step, Tensor) else step
    result: Tensor = _Quantize.apply(  # type: ignore[no-untyped-call]
        x, lower, upper, center, step, 2**bits - 1, rounding, gamma, sigma, temperature
    )
    return result
