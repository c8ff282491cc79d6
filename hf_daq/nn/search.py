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
    stride = ((likely + _COARSE - 2) / (_COARSE - 1)).floor().nan_to_num(1)
    errors.attempt(stride * torch.arange(_COARSE, device=x.device, dtype=torch.float32))
    tried = _COARSE
    while bool((lowest := errors.best() == stride * (tried - 1)).any()):
        errors.attempt(stride * torch.arange(tried, tried + _AT_ONCE, device=x.device, dtype=torch.float32), lowest)
        tried += _AT_ONCE
    best, widest_stride = errors.best(), int(stride.max())
    for away in range(1, widest_stride):
        errors.attempt(torch.cat([best - away, best + away], 1), stride > away)
    first = errors.widest()
    for away in range(1, widest_stride):
        errors.attempt(first - away, stride > away)
    return errors.shares[errors.widest().long()] * largest


class _Errors:
    """The squared errors of the candidates that were tried, in parts of shape (rows, some); infinite in rows without them."""

    def __init__(self, x: Tensor, largest: Tensor, grid: Grid, weights: Tensor | None) -> None:
        self.x, self.largest, self.grid, self.weights = x, largest, grid, weights
        self.shares, self.buffer = shares(x.device), torch.empty_like(x)
        self.energy = (x.square() if weights is None else x.square().mul_(weights)).sum(1, keepdim=True)
        self.tried: list[Tensor] = []
        self.found: list[Tensor] = []

    def best(self) -> Tensor:
        """The number of the candidate, in floating point, which is faster here; shape (rows, 1)."""
        found = torch.cat(self.found, 1)
        return self._first(found, found.amin(1, keepdim=True))

    def widest(self) -> Tensor:
        """Shape (rows, 1)."""
        found = torch.cat(self.found, 1)
        return self._first(found, found.amin(1, keepdim=True) * (1 + TOLERANCE) + _NOISE * self.energy)

    def _first(self, found: Tensor, limit: Tensor) -> Tensor:
        return torch.where(found <= limit, torch.cat(self.tried, 1), CANDIDATES - 1.0).amin(1, keepdim=True)

    def attempt(self, candidates: Tensor, rows: Tensor | None = None) -> None:
        """Try candidates of each row, shape (rows, some); only where `rows` is true, shape (rows, 1)."""
        candidates = candidates.clamp(0, CANDIDATES - 1)
        part = slice(None) if rows is None else rows.nonzero()[:, 0]
        x, weights = self.x[part], None if self.weights is None else self.weights[part]
        bounds = self.shares[candidates[part].long()] * self.largest[part]
        pairs = [
            sums(x, x, bounds[:, one, None], self.grid, weights, self.buffer[: len(x)])
            for one in range(bounds.shape[1])
        ]
        along, energy = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        found = (self.energy[part] - along.square_() / energy.clamp_min_(1e-30)).clamp_min_(0)
        if rows is not None:
            here, found = found, found.new_full(candidates.shape, torch.inf)
            found[part] = here
        self.tried.append(candidates)
        self.found.append(found)


def sums(
    x: Tensor, target: Tensor, bound: Tensor, grid: Grid, weights: Tensor | None, code: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the centered codes k of x: the sums of k times the target, and of k squared, per row, shape (rows, 1). `code` is
    written over."""
    torch.mul(x, grid.center / bound, out=code)
    # Ties go to the lower code. Codes are whole numbers, or all halfway between two.
    code = code.ceil_().sub_(0.5) if grid.center % 1 else code.sub_(0.5).ceil_()
    code.clamp_(-grid.center, grid.levels - grid.center)
    if weights is None:
        squares = torch.linalg.vector_norm(code, dim=1, keepdim=True).square_()
        return code.mul_(target).sum(1, keepdim=True), squares
    weighted = code * weights
    return (weighted * target).sum(1, keepdim=True), weighted.mul_(code).sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------- in native.cpp


def in_native(rows: Tensor, grid: Grid) -> bool:
    """Whether native.cpp searches for these rows."""
    if rows.numel() <= _SMALL or rows.dtype == torch.float64 or not in_memory(rows) or library() is None:
        return False
    sample = torch.randn(8, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    offset, unit = sample.new_full((8, 1), 0.1), sample.new_full((8, 1), 0.9)

    def found() -> Tensor:
        return torch.cat(native_bounds(sample, offset, unit, grid, 1, 0, None), 1)

    def expected() -> Tensor:
        x = (sample - offset) / unit
        bound = widest_bound(x, grid.outermost(x), grid, None)
        kx, kk = sums(x, sample, bound, grid, None, torch.empty_like(x))
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
