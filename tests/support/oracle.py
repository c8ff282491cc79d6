"""The paper's definition, evaluated literally in float64 with autograd: softmax, kernel, detached temperature.

Kim, Lee, Ham, "Distance-aware Quantization", ICCV 2021. Nothing here is shared with the library.
"""

import math

import torch
from torch import Tensor


class _AbsDistance(torch.autograd.Function):
    """|x| with +1 as its derivative at zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.where(x >= 0, 1.0, -1.0)


class _InclusiveClip(torch.autograd.Function):
    """Clip whose gradient to everything is zero outside the bounds and one at them."""

    @staticmethod
    def forward(ctx, x, lower, upper):
        ctx.save_for_backward((x >= lower) & (x <= upper))
        return torch.minimum(torch.maximum(x, lower), upper)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None


def normalize(x: Tensor, lower: Tensor, upper: Tensor, levels: int) -> Tensor:
    """Section 1: v in [0, R]; outside the bounds there is no gradient to x, lower or upper."""
    inside = (x >= lower) & (x <= upper)
    v = (_InclusiveClip.apply(x, lower.detach(), upper.detach()) - lower) / (upper - lower) * levels
    clipped = torch.where(x > upper, float(levels), 0.0).double()
    return torch.where(inside | x.isnan(), v, clipped)


def dasr(v: Tensor, gamma: float, sigma: float, temperature: float | None) -> Tensor:
    """Sections 2 and 3: soft assignment to the two neighbors; `temperature=None` is the adaptive one."""
    codes = torch.stack([v.detach().floor(), v.detach().floor() + 1])
    scores = torch.exp(-_AbsDistance.apply(v - codes[0])), torch.exp(-_AbsDistance.apply(codes[1] - v))
    distance = torch.stack(scores)
    nearest = torch.where(v.detach() - codes[0] <= codes[1] - v.detach(), codes[0], codes[1])
    kernel = torch.exp(-((codes - nearest) ** 2) / sigma**2)
    score = distance * kernel.detach()
    if temperature is None:
        beta = (gamma / (score[0] - score[1]).abs()).detach()
        stretch = 1 / (math.exp(gamma) - 1)
        codes = torch.stack([codes[0] - stretch, codes[1] + stretch])
    else:
        beta = temperature
    return (torch.softmax(beta * score, 0) * codes).sum(0)


def quantize(x, lower, upper, center, step, *, bits, gamma, sigma, rounding="daq", temperature=4.0, levels=None):
    """`(Q(v) - center) * step`."""
    levels = 2**bits - 1 if levels is None else levels
    v = normalize(x, lower, upper, levels)
    if rounding == "daq":
        code = dasr(v, gamma, sigma, None)
    elif rounding == "soft":
        code = dasr(v, gamma, sigma, temperature)
    else:
        rounded = torch.where(v - v.floor() > 0.5, v.floor() + 1, v.floor())
        code = v + (rounded - v).detach()
    return (code - center) * step
