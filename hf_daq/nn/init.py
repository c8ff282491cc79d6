"""Where bounds and scales start: from the weights, and from histograms of layer inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .formula import levels, round_half_down_
from .quantizers import WeightQuantizer

# Values outside the bounds get no gradient, so of all bounds whose squared error is within this share of the smallest,
# the widest are taken.
TOLERANCE = 0.05
_CANDIDATES = 64
_SAMPLES = 2**16


@torch.no_grad()
def start_from_weight(quantizer: WeightQuantizer, weight: Tensor, init: str) -> None:
    """Set the bounds for a float weight, the scale at which the quantized weight is closest to it, and a shift of 0.

    Args:
        weight: shape (channels, ...). If it is not finite, neither are bounds and scale.
        init: "mse" or "3std".
    """
    last = quantizer.levels
    rows = quantizer.rows(weight)
    offset, unit = quantizer.statistics(rows)
    count = quantizer.lower.numel()
    target = rows.float().reshape(count, -1)
    x = ((rows - offset) / unit).float().reshape(count, -1)
    valid = quantizer.valid(x.device)
    largest = (x if valid is None else x * valid).abs().amax(1, keepdim=True).clamp_min(1e-3)
    chosen = torch.full_like(largest, 3.0)
    if init == "mse":
        step = (x.shape[1] // max(1024, _SAMPLES // count)) | 1
        sample, sample_valid = x[:, ::step], None if valid is None else valid[:, ::step]
        budget = _SAMPLES if x.device.type == "cpu" else 256 * _SAMPLES
        chunk = max(1, budget // sample.shape[1])  # rows that stay in the cache while all candidates are tried
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            mask = None if sample_valid is None else sample_valid[part]
            chosen[part] = _widest_bound(sample[part].contiguous(), largest[part], last, mask)
    scale, _ = _fit(x, target, chosen, last, valid)
    quantizer.lower.copy_(-chosen.flatten())
    quantizer.upper.copy_(chosen.flatten())
    quantizer.scale.copy_(scale.flatten().clamp_min(1e-8))
    if quantizer.shift is not None:
        quantizer.shift.zero_()
    quantizer.finish()


def _widest_bound(x: Tensor, largest: Tensor, last: int, valid: Tensor | None) -> Tensor:
    """The widest bound of each row, shape (rows, 1), whose squared error is within TOLERANCE of the smallest."""
    shrink = torch.logspace(0, -1.5, _CANDIDATES, device=x.device)
    errors = torch.cat([_fit(x, x, factor * largest, last, valid)[1] for factor in shrink], 1)
    best = errors.amin(1, keepdim=True)
    widest = (errors <= best * (1 + TOLERANCE)).int().argmax(1)
    return shrink[widest, None] * largest


def _fit(x: Tensor, target: Tensor, bound: Tensor, last: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least-squares scale of the codes of `x` against `target`, and the squared error; per row, shape (rows, 1)."""
    code = (x + bound).mul_(last / (2 * bound)).clamp_(0, last)
    code = round_half_down_(code).mul_(2 / last).sub_(1)
    if valid is not None:
        code, target = code.mul_(valid), target * valid
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
    last = levels(bits)
    seen = counts > 0
    centers, counts = centers[seen], counts[seen]
    shrink = torch.logspace(0, -1.5, _CANDIDATES, device=centers.device, dtype=torch.float64)
    upper = max(high, 0.0) * shrink
    lower = torch.zeros_like(upper)
    if low < 0:
        coarse = shrink[::2]
        lower, upper = (grid.flatten() for grid in torch.meshgrid(low * coarse, max(high, 0.0) * coarse, indexing="ij"))
    step = ((upper - lower) / last)[:, None]
    zero_point = (-lower[:, None] / step).round()
    code = round_half_down_(centers / step + zero_point).clamp_(0, last)
    errors = ((code - zero_point) * step - centers).square_().mul_(counts).sum(1)
    close = errors <= errors.min() * (1 + TOLERANCE)
    widest = torch.where(close, upper - lower, -1.0).argmax()
    return float(lower[widest]), float(upper[widest])
