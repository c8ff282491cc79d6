"""Where bounds and scales start: from the weights, and from histograms of layer inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formula import levels, round_half_down_
from .quantizers import WeightQuantizer

# Values outside the bounds get no gradient, so of all bounds whose squared error is within this share of the smallest,
# the widest are taken.
TOLERANCE = 0.05
_CANDIDATES = 64
_SAMPLES = 2**16
_TOP = 16  # the share of a sample that goes to the largest values


class Grid(NamedTuple):
    """levels: the last code. center: the code of 0."""

    levels: int
    center: float

    def positions(self, values: Tensor, ends: Tensor) -> Tensor:
        """Where values lie between the codes, not clipped; `ends` is the magnitude that the code 0 stands for."""
        return values.div(ends).add_(1).mul_(self.center)

    def codes(self, values: Tensor, ends: Tensor) -> Tensor:
        """The nearest codes, in floating point."""
        return self.positions(values, ends).round_().clamp_(0, self.levels)

    def values(self, codes: Tensor, ends: Tensor) -> Tensor:
        """What codes stand for; they need not be whole."""
        return codes.mul(1 / self.center).sub_(1).mul_(ends)

    def outermost(self, rows: Tensor) -> Tensor:
        """The smallest bound, as the magnitude of the lower one, that clips nothing; shape (rows, 1)."""
        above = self.center / (self.levels - self.center)  # an integer grid ends one step earlier above zero
        return torch.maximum(-rows.amin(1, keepdim=True), rows.amax(1, keepdim=True) * above)


@torch.no_grad()
def start_from_weight(quantizer: WeightQuantizer, weight: Tensor, init: str) -> None:
    """Set the bounds for a float weight, the scale at which the quantized weight is closest to it, and a shift of 0.

    Args:
        weight: shape (channels, ...). If it is not finite, neither are bounds and scale.
        init: "mse" or "3std".
    """
    grid = Grid(quantizer.levels, quantizer.center)
    rows = quantizer.rows(weight)
    offset, unit = quantizer.statistics(rows)
    count = quantizer.lower.numel()
    target = rows.float().reshape(count, -1)
    x = ((rows - offset) / unit).float().reshape(count, -1)
    valid = quantizer.valid(x)
    largest = grid.outermost(x if valid is None else x * valid).clamp_min(1e-3)
    chosen = torch.full_like(largest, 3.0)
    if init == "mse":
        budget = _SAMPLES if x.device.type == "cpu" else 256 * _SAMPLES
        size = max(1024, _SAMPLES // count)
        chunk = max(1, budget // min(size, x.shape[1]))  # rows that stay in the cache while all candidates are tried
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            sample, weights = _sampled(x[part], size, None if valid is None else valid[part])
            chosen[part] = _widest_bound(sample, largest[part], grid, weights)
    scale, _ = _fit(x, target, chosen, grid, valid)
    quantizer.lower.copy_(-chosen.flatten())
    quantizer.upper.copy_(chosen.flatten() * (grid.levels / grid.center - 1))
    quantizer.scale.copy_(scale.flatten().clamp_min(1e-8))
    if quantizer.shift is not None:
        quantizer.shift.zero_()
    quantizer.finish()


def _sampled(x: Tensor, size: int, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Columns for an estimate of sums over rows, and their weights: the largest values of each row, which decide over its
    bounds, all of them, and a sample of the others."""
    columns = x.shape[1]
    if columns <= size:
        return x.contiguous(), weights
    order = x.abs().topk(size // _TOP).indices
    rest = torch.ones_like(x) if weights is None else weights.clone()
    large, large_weights = x.gather(1, order), rest.gather(1, order)
    rest.scatter_(1, order, 0.0)
    chosen = spread(columns, size - order.shape[1], x.device)
    return torch.cat([large, x[:, chosen]], 1), torch.cat([large_weights, rest[:, chosen] * (columns / len(chosen))], 1)


def spread(count: int, number: int, device: torch.device) -> Tensor:
    """Indices below `count`, one at random in each of `number` equal parts: all alike likely, always the same ones."""
    if number >= count:
        return torch.arange(count, device=device)
    places = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices = places.add_(torch.arange(number)).mul_(count / number).long().clamp_(max=count - 1)
    return indices.to(device)


def _widest_bound(x: Tensor, largest: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
    """The widest bound of each row, shape (rows, 1), whose squared error is within TOLERANCE of the smallest."""
    shrink = torch.logspace(0, -1.5, _CANDIDATES, device=x.device)
    errors = torch.cat([_fit(x, x, factor * largest, grid, weights)[1] for factor in shrink], 1)
    best = errors.amin(1, keepdim=True)
    widest = (errors <= best * (1 + TOLERANCE)).int().argmax(1)
    return shrink[widest, None] * largest


def _fit(x: Tensor, target: Tensor, bound: Tensor, grid: Grid, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least-squares scale of the codes of `x` against `target`, and the squared error; per row, shape (rows, 1)."""
    code = (x + bound).mul_(grid.center / bound).clamp_(0, grid.levels)
    code = round_half_down_(code).mul_(1 / grid.center).sub_(1)
    weighted = code if weights is None else code * weights
    # On a grid with a zero a row of zeros has no other code.
    scale = (weighted * target).sum(1, keepdim=True) / (weighted * code).sum(1, keepdim=True).clamp_min(1e-12)
    errors = (target - scale * code).square_()
    return scale, (errors if weights is None else errors.mul_(weights)).sum(1, keepdim=True)


def activation_bounds(centers: Tensor, counts: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """Bounds of the smallest squared error for inputs with these histograms: the smallest product of their errors.

    Args:
        centers: float64, shape (bins,).
        counts: float64, shape (histograms, bins).
        low, high: the smallest and largest value seen.

    Returns:
        lower, upper: lower is 0 where `low` is not negative, else below 0, with 0 inside the bounds.
    """
    last = levels(bits)
    seen = counts.sum(0) > 0
    centers, counts = centers[seen], counts[:, seen]
    shrink = torch.logspace(0, -1.5, _CANDIDATES, device=centers.device, dtype=torch.float64)
    upper = max(high, 0.0) * shrink
    lower = torch.zeros_like(upper)
    if low < 0:
        coarse = shrink[::2]
        lower, upper = (grid.flatten() for grid in torch.meshgrid(low * coarse, max(high, 0.0) * coarse, indexing="ij"))
    step = ((upper - lower) / last)[:, None]
    zero_point = (-lower[:, None] / step).round()
    code = round_half_down_(centers / step + zero_point).clamp_(0, last)
    noise = ((code - zero_point) * step - centers).square_()
    errors = noise @ counts.T
    errors = errors.clamp_min(1e-9 * errors.max()).log().mean(1).exp()
    close = errors <= errors.min() * (1 + TOLERANCE)
    widest = torch.where(close, upper - lower, -1.0).argmax()
    return float(lower[widest]), float(upper[widest])
