"""The search for the bounds of float weights: by native.cpp where it can be compiled, else in torch.

Candidates are 64 bounds for each row, from the one that clips nothing downward. Of those whose squared error is, at the scale
of least squares, within TOLERANCE of the smallest, the widest is taken. Tried are those that are likely for normal weights,
and below them as long as the error falls: first some of them, then all around the best, and all around the widest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codes import in_memory, threads
from .native import library
from .trust import agrees

if TYPE_CHECKING:
    from .init import Grid

# Values outside the bounds get no gradient, so of all bounds whose squared error is within this share of the smallest,
# the widest are taken.
TOLERANCE = 0.05
CANDIDATES = 64
_NARROWEST = -1.5  # the last candidate, as a share of the first: a power of ten
_NOISE = 1e-7  # of the energy of the weights: smaller differences of errors mean nothing in float32
_COARSE = 8  # candidates that are tried first, if that many are likely
_AT_ONCE = 4
_USUAL = {1: 0.8, 2: 1.22, 3: 1.49, 7: 2.05, 15: 2.51, 31: 2.91, 63: 3.28, 127: 3.61, 255: 3.93}
"""The best bounds of normal weights by the last code, of symmetric codes, in standard deviations."""
_LOWEST = 0.75  # of the usual bound: what is likely
_SMALL = 2**14  # weights up to which nothing is compiled: torch is as fast
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def shares(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The candidates, as shares of the first: shape (64,)."""
    return torch.logspace(0, _NARROWEST, CANDIDATES, device=device, dtype=dtype)


def _lowest(grid: Grid) -> float:
    """The narrowest bound that is likely, in units."""
    return _LOWEST * _USUAL[grid.levels] * 2 * grid.center / grid.levels


# ------------------------------------------------------------------------------------------------------------ in torch


def widest_bound(x: Tensor, largest: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
    """The widest bound of each row, shape (rows, 1), whose squared error is within TOLERANCE of the smallest.

    Args:
        x: in units, float32, shape (rows, columns).
        largest: the bound that clips nothing, shape (rows, 1).
        weights: of the columns in the sums, shape as x; None for 1.
    """
    if grid.levels == 1:  # the codes are signs, whatever the bound
        return largest
    errors = _Errors(x, largest, grid, weights)
    likely = (largest / _lowest(grid)).log10().mul_((CANDIDATES - 1) / -_NARROWEST).ceil().clamp_(2, CANDIDATES - 1)
    stride = ((likely + _COARSE - 2) / (_COARSE - 1)).floor().nan_to_num(1).long()
    tried = 0
    while bool((wanted := (stride * tried <= likely) | (errors.best() == stride * (tried - 1))).any()):
        errors.attempt(stride * torch.arange(tried, tried + _AT_ONCE, device=x.device), wanted[:, 0])
        tried += _AT_ONCE
    around = torch.arange(1, int(stride.max()), device=x.device)
    wide_steps = stride[:, 0] > 1
    best = errors.best()
    errors.attempt(torch.cat([best - around, best + around], 1), wide_steps)
    errors.attempt(errors.widest() - around, wide_steps)
    return errors.shares[errors.widest()] * largest


class _Errors:
    """The squared errors of candidates that were tried, shape (rows, candidates); infinite for the others."""

    def __init__(self, x: Tensor, largest: Tensor, grid: Grid, weights: Tensor | None) -> None:
        self.x, self.largest, self.grid, self.weights = x, largest, grid, weights
        self.shares, self.numbers = shares(x.device), torch.arange(float(CANDIDATES), device=x.device)
        squares = x.square() if weights is None else x.square().mul_(weights)
        self.energy = squares.sum(1, keepdim=True)
        self.found = torch.full((len(x), CANDIDATES), torch.inf, device=x.device)
        self.buffers = squares, torch.empty_like(x)

    def best(self) -> Tensor:
        """Shape (rows, 1)."""
        return self._first(self.found.amin(1, keepdim=True))

    def widest(self) -> Tensor:
        """Shape (rows, 1)."""
        return self._first(self.found.amin(1, keepdim=True) * (1 + TOLERANCE) + _NOISE * self.energy)

    def _first(self, limit: Tensor) -> Tensor:
        # argmax and argmin, and whole numbers, take longer than to try a candidate.
        return torch.where(self.found <= limit, self.numbers, CANDIDATES - 1.0).amin(1, keepdim=True).long()

    def attempt(self, candidates: Tensor, rows: Tensor | None = None) -> None:
        """Try candidates of each row, shape (rows, some); of these rows only."""
        candidates = candidates.clamp(0, CANDIDATES - 1)
        part: Tensor | slice = slice(None)
        if rows is not None and not bool(rows.all()):
            part = rows.nonzero()[:, 0]
            if len(part) == 0:
                return
        x, largest, energy, chosen = self.x[part], self.largest[part], self.energy[part], candidates[part]
        weights = None if self.weights is None else self.weights[part]
        buffers = [buffer[: len(x)] for buffer in self.buffers]
        found = [
            energy - kx.square() / kk.clamp_min(1e-30)
            for number in range(chosen.shape[1])
            for kx, kk in [sums(x, x, self.shares[chosen[:, number, None]] * largest, self.grid, weights, *buffers)]
        ]
        if found:
            self.found[part] = self.found[part].scatter(1, chosen, torch.cat(found, 1).clamp_min_(0))


def sums(
    x: Tensor, target: Tensor, bound: Tensor, grid: Grid, weights: Tensor | None, code: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the centered codes k of x: the sums of k times the target, and of k squared, per row, shape (rows, 1). `code` and
    `product` are written over."""
    torch.mul(x, grid.center / bound, out=code)
    # Ties go to the lower code.
    code.add_(grid.center - 0.5).clamp_(-0.5, grid.levels - 0.5).ceil_().sub_(grid.center)
    torch.mul(code, target, out=product)
    if weights is None:
        return product.sum(1, keepdim=True), torch.linalg.vector_norm(code, dim=1, keepdim=True).square_()
    return product.mul_(weights).sum(1, keepdim=True), code.square_().mul_(weights).sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------- in native.cpp


def in_native(rows: Tensor, grid: Grid) -> bool:
    """Whether native.cpp searches for these rows."""
    if rows.numel() <= _SMALL or rows.dtype == torch.float64 or not in_memory(rows) or library() is None:
        return False
    sample = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    offset, unit = torch.full((8, 1), 0.1), torch.full((8, 1), 0.9)

    def found() -> Tensor:
        return torch.cat(native_bounds(sample, offset, unit, grid, 1, 0, None), 1)

    def expected() -> Tensor:
        x = (sample - offset) / unit
        bound = widest_bound(x, grid.outermost(x), grid, None)
        kx, kk = sums(x, sample, bound, grid, None, torch.empty_like(x), torch.empty_like(x))
        return torch.cat([bound, grid.center * kx / kk], 1)

    return agrees(("start", grid), found, expected, 0.1, "the native search for bounds")


def native_bounds(
    rows: Tensor, offset: Tensor, unit: Tensor, grid: Grid, groups: int, missing: int, bound: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bounds in units, and scales of least squares, both of shape (rows, 1); NaN where weights are not finite.

    Args:
        rows: float, shape (rows, columns). The last of each `groups` rows has `missing` columns less.
        offset, unit: shape (rows, 1).
        bound: in units, shape (rows, 1); None for a search.
    """
    rows = rows.contiguous() if rows.dtype in _KINDS else rows.float().contiguous()
    offset, unit = offset.float().contiguous(), unit.float().contiguous()
    bounds = torch.zeros_like(unit) if bound is None else bound.float().clone()
    scales = torch.empty_like(unit)
    count, columns = rows.shape
    if not (offset.shape == unit.shape == bounds.shape == (count, 1) and 0 <= missing < columns):
        raise ValueError(f"statistics of the shape {tuple(unit.shape)} for rows of the shape {tuple(rows.shape)}")
    functions = library()
    assert functions is not None
    sizes = count, columns, groups, missing
    numbers = float(grid.levels), grid.center, _lowest(grid), TOLERANCE, _NOISE
    functions.daq_start(
        *(rows.data_ptr(), _KINDS[rows.dtype], *sizes, offset.data_ptr(), unit.data_ptr(), *numbers),
        *(bounds.data_ptr(), scales.data_ptr(), threads(rows.numel())),
    )
    return bounds, scales
