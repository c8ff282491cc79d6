"""Where bounds and scales start: from the weights, and from histograms of layer inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import round_half_down_
from .quantizers import WeightQuantizer

# Values outside the bounds get no gradient, so of all bounds whose squared error is within this share of the smallest,
# the widest are taken.
TOLERANCE = 0.05
_CANDIDATES = 64
_SAMPLES = 2**16


@torch.no_grad()
def weight_bounds(quantizer: WeightQuantizer, weight: Tensor, init: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds in the units of the quantizer, and the scale at which quantized weights are closest to `weight`.

    Args:
        weight: shape (channels, ...), finite.
        init: "mse" or "3std".

    Returns:
        lower, upper, scale: float32, shape (1,) or (channels,).
    """
    levels = 2**quantizer.bits - 1
    offset, unit = quantizer.statistics(weight)
    weight = weight.float()
    rows = quantizer.lower.numel()
    x = ((weight - offset) / unit).reshape(rows, -1)
    largest = x.abs().amax(1, keepdim=True).clamp_min(1e-3)
    chosen = torch.full_like(largest, 3.0)
    if init == "mse":
        shrink = torch.logspace(0, -1.5, _CANDIDATES, device=x.device)
        sample = x[:, :: (x.shape[1] // max(1024, _SAMPLES // rows)) | 1]
        errors = torch.cat([_fit(sample, sample, factor * largest, levels)[1] for factor in shrink], 1)
        best = errors.amin(1, keepdim=True)
        widest = (errors <= best * (1 + TOLERANCE)).int().argmax(1)
        chosen = shrink[widest, None] * largest
    scale, _ = _fit(x, weight.reshape(rows, -1), chosen, levels)
    bound = chosen.flatten()
    return -bound, bound, scale.flatten().clamp_min(1e-8)


def _fit(x: Tensor, target: Tensor, bound: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Least-squares scale of the codes of `x` against `target`, and the squared error; per row, shape (rows, 1)."""
    code = (x + bound).mul_(levels / (2 * bound)).clamp_(0, levels)
    code = round_half_down_(code).mul_(2 / levels).sub_(1)
    scale = (code * target).sum(1, keepdim=True) / code.square().sum(1, keepdim=True)
    return scale, (target - scale * code).square_().sum(1, keepdim=True)


def activation_bounds(centers: Tensor, counts: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """Bounds of the smallest squared error for inputs with this histogram.

    Args:
        centers, counts: float64, shape (bins,).
        low, high: the smallest and largest value seen.

    Returns:
        lower, upper: lower is 0 where `low` is not negative, else below 0, with 0 inside the bounds.
    """
    levels = 2**bits - 1
    seen = counts > 0
    centers, counts = centers[seen], counts[seen]
    shrink = torch.logspace(0, -1.5, _CANDIDATES, device=centers.device, dtype=torch.float64)
    upper = max(high, 0.0) * shrink
    lower = torch.zeros_like(upper)
    if low < 0:
        coarse = shrink[::2]
        lower, upper = (grid.flatten() for grid in torch.meshgrid(low * coarse, max(high, 0.0) * coarse, indexing="ij"))
    step = ((upper - lower) / levels)[:, None]
    zero_point = (-lower[:, None] / step).round()
    code = round_half_down_(centers / step + zero_point).clamp_(0, levels)
    errors = ((code - zero_point) * step - centers).square_().mul_(counts).sum(1)
    close = errors <= errors.min() * (1 + TOLERANCE)
    widest = torch.where(close, upper - lower, -1.0).argmax()
    return float(lower[widest]), float(upper[widest])
