"""Second moments of what goes into a layer, in the quantized network and in the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .init import spread
from .layers import CONVOLUTIONS, TRANSPOSED
from .matching import usual_weights
from .observers import all_reduce, grid, padded, rows_at
from .rounding import NARROW, Centered, centered, refit

_WIDE = 2048  # columns from which sums are float32, which is twice as fast and half as large
_POSITIONS, _PER_COLUMN = 2**15, 16
_SIZE = 2**27  # numbers in the rows of a layer
_SAMPLE, _SAMPLE_PER_COLUMN, _SAMPLE_SIZE = 2**12, 3, 2**23
_CHUNK = 2**24  # numbers that are unfolded at once


class Moments:
    """Sums over positions of products of a layer's inputs: of the quantized ones with one another, and of the float ones
    with the quantized ones, at the same positions. There are two halves, of different examples.

    quantized, mixed: shape (halves, groups, columns + 1, columns + 1); the last column is 1, so that means and the count are
        among the products. Columns are those of a row of `float_weight`, flattened.
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, CONVOLUTIONS + TRANSPOSED) else 1
        self.columns = math.prod(shape[1:])
        dtype = torch.float64 if self.columns < _WIDE else torch.float32
        size = self.columns + 1
        self.quantized = torch.zeros(2, self.groups, size, size, device=layer.weight.device, dtype=dtype)
        self.mixed = torch.zeros_like(self.quantized)
        self.in_float = torch.zeros(2, self.groups, self.columns, device=layer.weight.device, dtype=dtype)

    @torch.no_grad()
    def add(self, half: int, quantized: Tensor, in_float: Tensor, limit: int) -> None:
        """At most `limit` positions of inputs: of images before padding, of tokens any shape that ends with the columns."""
        for q, f, root in _rows(self.layer, quantized, in_float, limit):
            q, f = _with_ones(q) * root, _with_ones(f) * root
            self.quantized[half] += q.mT @ q
            self.mixed[half] += f.mT @ q
            self.in_float[half] += f[:, :, :-1].square().sum(1)

    @property
    def limit(self) -> int:
        """How many positions are worth their time."""
        return max(_PER_COLUMN * self.columns, min(_POSITIONS, _SIZE // (self.columns * self.groups)))

    @property
    def count(self) -> float:
        """Of positions, or their weights together."""
        return float(self.quantized[:, 0, -1, -1].sum())

    def reduce(self) -> None:
        """Join the sums of all ranks."""
        all_reduce(self.quantized, dist.ReduceOp.SUM)
        all_reduce(self.mixed, dist.ReduceOp.SUM)
        all_reduce(self.in_float, dist.ReduceOp.SUM)


class Sample:
    """Some positions of a layer's inputs in both networks, which are kept: moments for any way to quantize them.

    groups, columns: as of `Moments`.
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, CONVOLUTIONS + TRANSPOSED) else 1
        self.columns = math.prod(shape[1:])
        self._parts: tuple[list[tuple[Tensor, ...]], ...] = [], []

    def add(self, half: int, x: Tensor, in_float: Tensor, limit: int) -> None:
        """Arguments as of `Moments`, but not quantized yet."""
        self._parts[half].extend(
            (x, _with_ones(f) * root, root) for x, f, root in _rows(self.layer, x, in_float, limit)
        )

    @property
    def limit(self) -> int:
        """How many positions are worth their time."""
        return max(_SAMPLE_PER_COLUMN * self.columns, min(_SAMPLE, _SAMPLE_SIZE // (self.columns * self.groups)))

    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest input, over all ranks."""
        found = torch.full((2,), -math.inf, device=self.layer.weight.device)
        for x, _, _ in (*self._parts[0], *self._parts[1]):
            low, high = x.aminmax()
            found = torch.maximum(found, torch.stack([-low, high]))
        all_reduce(found, dist.ReduceOp.MAX)
        return -float(found[0]), float(found[1])

    def lopsided(self) -> bool:
        """Whether a half is empty, over all ranks."""
        counts = torch.tensor([sum(len(rows[0][0]) for rows in part) for part in self._parts])
        counts = counts.to(self.layer.weight.device)
        all_reduce(counts, dist.ReduceOp.SUM)
        return bool((counts == 0).any())

    def error(self, quantize: Callable[[Tensor], Tensor], weight: Tensor, damping: float, center: bool) -> float:
        """The mean squared error of the output of the refit to one half, on the other. Of narrow layers the two take turns, and it
        is the sum."""
        total = 0.0
        one, other = ([(f, _with_ones(quantize(x)) * root) for x, f, root in part] for part in self._parts)
        for fit, rest in ((one, other), (other, one))[: 2 if self.columns <= NARROW else 1]:
            found = refit(weight, self._centered(fit, center), damping)
            total += self._missing(rest, weight, found, center)
        return total

    def _missing(self, rows: list[tuple[Tensor, Tensor]], weight: Tensor, found: Tensor, center: bool) -> float:
        sums = torch.zeros(2 + weight[..., 0].numel(), device=weight.device, dtype=torch.float64)
        for f, q in rows:
            y = f[:, :, :-1] @ weight.mT - q[:, :, :-1] @ found.mT
            root = f[:, :, -1:]
            sums += torch.cat([y.square().sum().view(1), root[0].square().sum().view(1), (y * root).sum(1).flatten()])
        all_reduce(sums, dist.ReduceOp.SUM)
        means = sums[2:] / sums[1]
        return float(sums[0] / sums[1] - (means.square().sum() if center else 0))

    def _centered(self, rows: list[tuple[Tensor, Tensor]], center: bool) -> Centered:
        size = self.columns + 1
        quantized = torch.zeros(self.groups, size, size, device=self.layer.weight.device)
        mixed, in_float = torch.zeros_like(quantized), quantized.new_zeros(self.groups, self.columns)
        for f, q in rows:
            quantized += q.mT @ q
            mixed += f.mT @ q
            in_float += f[:, :, :-1].square().sum(1)
        for total in (quantized, mixed, in_float):
            all_reduce(total, dist.ReduceOp.SUM)
        return centered(quantized, mixed, in_float, center)


def _rows(layer: Any, quantized: Tensor, in_float: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows at no more than `limit` positions, each of shape (groups, positions, columns), and the roots of their weights.
    Tokens are weighted by about the inverse energy of the float output. What comes after makes tokens alike by a
    normalization, and the few with massive activations would decide alone."""
    convolution = isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    if convolution:
        dims = len(layer.kernel_size) + 2
        quantized, in_float = (padded(layer, x if x.ndim == dims else x[None]) for x in (quantized, in_float))
    count = math.prod(grid(layer, quantized))
    columns = math.prod(layer.weight_shape()[1:])
    groups = layer.groups if convolution else 1
    chosen = spread(count, min(limit, count), quantized.device)
    for part in torch.split(chosen, max(1, _CHUNK // (columns * groups))):
        q, f = (
            rows_at(layer, x, part).float().reshape(len(part), groups, columns).transpose(0, 1)
            for x in (quantized, in_float)
        )
        root = q.new_ones(1, 1)
        if not convolution:
            root = usual_weights(f[0] @ layer.float_weight().float().mT, all_ranks=False).sqrt().to(q.dtype)[:, None]
        yield q, f, root


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
