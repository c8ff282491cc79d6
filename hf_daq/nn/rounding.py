"""Weights on their grid that give the float layer's output from quantized inputs, from second moments alone.

Shapes: weights (groups, outputs, columns), moments (groups, columns, columns), means (groups, columns), where groups are
those of a convolution.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError
from .init import Grid
from .quantizers import WeightQuantizer
from .sums import finite

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NARROW = 512
ROUNDING_DAMPING = 0.1
_BLOCK = 128
_CANDIDATES = 40


class Centered(NamedTuple):
    """Covariances of the quantized inputs, and with them of what the float weight misses of the float output, around the means; or
    products around zero.

    missing: shape (groups, outputs, columns). missing_mean: of the outputs, shape (groups, outputs).
    firmness: how firmly the weights of each column stay where they are when the others are fitted, 0 to 1, shape (groups,
        columns): less where inputs are further from the float ones than usual, as those that the bounds clip.
    """

    quantized: Tensor
    missing: Tensor
    quantized_mean: Tensor
    missing_mean: Tensor
    firmness: Tensor


def _ridge(moments: Centered, damping: float) -> Tensor:
    """What is added to the diagonal, shape (groups, columns)."""
    diagonal = moments.quantized.diagonal(dim1=1, dim2=2)
    return (damping * diagonal.mean(1, keepdim=True)).clamp_min(1e-20).expand_as(diagonal)


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor. Where rounding errors leave a matrix without one, something is added to its diagonal."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    share = 1e-6
    while bool(failed.any()):
        if not finite(matrix):
            raise CalibrationError("products of a layer's inputs have NaN or infinite values")
        largest = matrix.diagonal(dim1=1, dim2=2).abs().amax(1, keepdim=True).clamp_min(1e-20)
        matrix = matrix + (share * largest).expand(-1, matrix.shape[1]).diag_embed()
        factor, failed = torch.linalg.cholesky_ex(matrix)
        share *= 10
    found: Tensor = factor
    return found


def refit(weight: Tensor, moments: Centered, damping: float) -> Tensor:
    """The weight that gives the float output from quantized inputs with the least squared error, `W + E (H + D)^-1`: E is what the float
    weight W misses, and D the damping."""
    return weight + _correction(moments, damping)


def _correction(moments: Centered, damping: float) -> Tensor:
    factor = _factor(moments.quantized + (_ridge(moments, damping) * moments.firmness).diag_embed())
    return torch.cholesky_solve(moments.missing.mT, factor).mT


def best_damping(halves: tuple[Centered, Centered]) -> float:
    """The damping whose refit to one half has the least error on the other; a strong one where one half is empty."""
    if not all(bool(half.quantized.any()) for half in halves):
        return 1.0
    one, other = (Centered(*(value.float() for value in half)) for half in halves)
    pairs = ((one, other), (other, one)) if one.quantized.shape[2] <= NARROW else ((one, other),)

    @cache
    def error(place: int) -> float:
        total = 0.0
        for fit, rest in pairs:
            found = _correction(fit, DAMPINGS[place])
            total += float(((found @ rest.quantized - 2 * rest.missing) * found).sum())
        return total

    place = DAMPINGS.index(0.3)
    while True:
        near = [at for at in (place - 1, place, place + 1) if 0 <= at < len(DAMPINGS)]
        best = min(near, key=error)
        if best == place:
            return DAMPINGS[place]
        place = best


def best_steps(weight: Tensor, moments: Centered, quantizer: WeightQuantizer) -> Tensor:
    """The outermost value of each row of the quantizer, shape (rows,), at which rounding to the nearest has the least
    error, where columns count by the energy of their inputs."""
    flat = weight.flatten(0, 1)
    energy = moments.quantized.diagonal(dim1=1, dim2=2)[:, None].expand_as(weight).flatten(0, 1)
    count = quantizer.lower.numel()
    rows, weights = (quantizer.rows(value).reshape(count, -1) for value in (flat, energy))
    grid = Grid(quantizer.levels, quantizer.center)
    largest = grid.outermost(rows).clamp_min(1e-12)
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in torch.logspace(0, -1.5, _CANDIDATES, dtype=torch.float32).tolist():
        step = largest * shrink
        value = grid.values(grid.codes(rows, step), step)
        error = value.sub_(rows).square_().mul_(weights).sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best.flatten()


def round_columns(
    weight: Tensor, moments: Centered, steps: Tensor, grid: Grid, damping: float
) -> tuple[Tensor, Tensor]:
    """Codes, and the values that were rounded to them, in floating point: one column after the other, those with the most
    energy first, where the error of each is made good by the columns that come after (GPTQ, Frantar et al. 2023).

    Args:
        steps: the outermost value, shape as the weight.
        grid: of the codes.
        damping: of the moments.
    """
    covariance = moments.quantized + _ridge(moments, damping).diag_embed()
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    along = order[:, None].expand_as(weight)
    values, steps = weight.gather(2, along), steps.gather(2, along)
    covariance = covariance.gather(1, order[:, :, None].expand_as(covariance))
    covariance = covariance.gather(2, order[:, None].expand_as(covariance))
    push = _factor(torch.cholesky_inverse(_factor(covariance))).mT
    codes = torch.empty_like(values)
    columns = weight.shape[2]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty_like(values[:, :, start:end])
        for j in range(start, end):
            value, step = values[:, :, j], steps[:, :, j]
            code = codes[:, :, j] = grid.codes(value, step)
            error = (value - grid.values(code, step)) / push[:, j, j, None]
            errors[:, :, j - start] = error
            values[:, :, j + 1 : end] -= error[:, :, None] * push[:, j, None, j + 1 : end]
        values[:, :, end:] -= errors @ push[:, start:end, end:]
    back = order.argsort(1)[:, None].expand_as(weight)
    return codes.gather(2, back), values.gather(2, back)


def improve_codes(
    codes: Tensor, weight: Tensor, moments: Centered, steps: Tensor, grid: Grid, damping: float
) -> tuple[Tensor, Tensor]:
    """Codes, and the values that were rounded to them, after one more look at every column, at which all others are where
    they are: the squared error does not grow (coordinate descent). Arguments as for `round_columns`."""
    covariance = moments.quantized + _ridge(moments, damping).diag_embed()
    values, rounded = torch.empty_like(weight), grid.values(codes, steps)
    codes = codes.clone()
    gradient = (rounded - weight) @ covariance
    for start in range(0, weight.shape[2], _BLOCK):
        part = slice(start, start + _BLOCK)
        near, inside = gradient[:, :, part].clone(), covariance[:, part, part]
        before = rounded[:, :, part].clone()
        for j in range(near.shape[2]):
            at, step = start + j, steps[:, :, start + j]
            value = rounded[:, :, at] - near[:, :, j] / inside[:, j, j, None]
            code = grid.codes(value, step)
            new = grid.values(code, step)
            near += (new - rounded[:, :, at])[:, :, None] * inside[:, j, None]
            values[:, :, at], codes[:, :, at], rounded[:, :, at] = value, code, new
        gradient += (rounded[:, :, part] - before) @ covariance[:, part]
    return codes, values
