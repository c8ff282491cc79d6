"""Where bounds and scales start: from the weights, and from histograms of layer inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formula import levels
from .quantizers import WeightQuantizer
from .search import TOLERANCE, in_native, native_bounds, shares, sums, widest_bound

_SAMPLES = 2**16
_CHUNK = 2**19  # weights whose candidates are tried together; of other devices 128 times as many
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
        weight: shape (channels, ...). If it or the sum of its squares is not finite, neither are bounds and scale.
        init: "mse" or "3std".
    """
    grid = Grid(quantizer.levels, quantizer.center)
    rows = quantizer.rows(weight)
    statistics = quantizer.statistics(rows)
    count = quantizer.lower.numel()
    rows = rows.reshape(count, -1)
    offset, unit = (value.reshape(count, 1) for value in statistics)
    bound = None if init == "mse" else torch.full_like(unit, 3.0)
    if in_native(rows, grid):
        found, scale = native_bounds(rows, offset, unit, grid, quantizer.groups, quantizer.padding, bound)
    else:
        found, scale = _bounds(rows, offset, unit, grid, quantizer.valid(rows), bound)
    found = torch.where(unit.isfinite(), found, torch.nan)
    quantizer.lower.copy_(-found.flatten())
    quantizer.upper.copy_(found.flatten() * (grid.levels / grid.center - 1))
    quantizer.scale.copy_(scale.flatten().clamp_min(1e-8))
    if quantizer.shift is not None:
        quantizer.shift.zero_()
    quantizer.finish()


def _bounds(
    rows: Tensor, offset: Tensor, unit: Tensor, grid: Grid, valid: Tensor | None, bound: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `native_bounds`, which knows from its arguments what is `valid`."""
    count, columns = rows.shape
    size = max(1024, _SAMPLES // count)
    chunk = max(1, (_CHUNK if rows.device.type == "cpu" else 128 * _CHUNK) // columns)
    bounds, scales = [], []
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        target, weights = rows[part].float(), None if valid is None else valid[part]
        x = ((rows[part] - offset[part]) / unit[part]).float()
        if weights is not None:
            x *= weights
        if bound is None:
            sample = _sampled(x, size, weights)
            bounds.append(widest_bound(sample[0], grid.outermost(x).clamp_min_(1e-3), grid, sample[1]))
        else:
            bounds.append(bound[part].float())
        along, energy = sums(x, target, bounds[-1], grid, weights, torch.empty_like(x))
        # On a grid with a zero a row of zeros has no other code.
        scales.append(grid.center * along / energy.clamp_min(1e-12))
    return torch.cat(bounds), torch.cat(scales)


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
    centers, counts = centers.cpu(), counts.cpu()  # small, and the same bounds on every device
    seen = counts.sum(0) > 0
    centers, counts = centers[seen], counts[:, seen]
    shrink = shares(centers.device, torch.float64)
    upper = max(high, 0.0) * shrink
    lower = torch.zeros_like(upper)
    if low < 0:
        coarse = shrink[::2]
        lower, upper = (grid.flatten() for grid in torch.meshgrid(low * coarse, max(high, 0.0) * coarse, indexing="ij"))
    step = ((upper - lower) / last)[:, None]
    zero_point = (-lower[:, None] / step).round()
    values = (torch.arange(last + 1) - zero_point).mul_(step)
    errors = torch.stack([_errors(values, step, centers, one) for one in counts], 1)
    errors = errors.clamp_min(1e-9 * errors.max()).log().mean(1).exp()
    close = errors <= errors.min() * (1 + TOLERANCE)
    widest = torch.where(close, upper - lower, -1.0).argmax()
    return float(lower[widest]), float(upper[widest])


def _errors(values: Tensor, step: Tensor, centers: Tensor, counts: Tensor) -> Tensor:
    """The squared error of a histogram whose bins have the nearest of these values; of two equally near, the lower.

    Args:
        values: ascending in rows, shape (candidates, codes).
        step: between two of them, shape (candidates, 1).
        centers, counts: shape (bins,), ascending.
    """
    # With sums from the first bin on, a code costs as much as a bin would, and there are far fewer codes.
    ends = torch.searchsorted(centers, values[:, :-1] + step / 2, right=True)
    ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=len(centers))
    number, total = (F.pad(found.cumsum(0), (1, 0))[ends].diff(dim=1) for found in (counts, counts * centers))
    return (values * number - 2 * total).mul_(values).sum(1) + (counts * centers.square()).sum()
