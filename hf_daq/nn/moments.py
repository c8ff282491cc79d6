"""Second moments of what goes into a layer, in the quantized network and in the float one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .init import spread
from .layers import CONVOLUTIONS, TRANSPOSED
from .matching import usual_weights
from .observers import all_reduce, grid, padded, rows_at

_WIDE = 2048  # columns from which sums are float32, which is twice as fast and half as large
_POSITIONS, _PER_COLUMN = 2**15, 16
_CHUNK = 2**24  # numbers that are unfolded at once


class Moments:
    """Sums over positions of products of a layer's inputs: of the quantized ones with one another, and of the float ones
    with the quantized ones, at the same positions. There are two halves, of different examples.

    quantized, mixed: shape (halves, groups, columns + 1, columns + 1); the last column is 1, so that means and the count are
        among the products. Columns are those of a row of `float_weight`, flattened.
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.convolution = isinstance(layer, CONVOLUTIONS + TRANSPOSED)
        self.groups = layer.groups if self.convolution else 1
        self.columns = math.prod(shape[1:])
        dtype = torch.float64 if self.columns < _WIDE else torch.float32
        size = self.columns + 1
        self.quantized = torch.zeros(2, self.groups, size, size, device=layer.weight.device, dtype=dtype)
        self.mixed = torch.zeros_like(self.quantized)

    @torch.no_grad()
    def add(self, half: int, quantized: Tensor, in_float: Tensor, limit: int) -> None:
        """At most `limit` positions of inputs: of images before padding, of tokens any shape that ends with the columns."""
        if self.convolution:
            dims = len(self.layer.kernel_size) + 2
            quantized, in_float = (padded(self.layer, x if x.ndim == dims else x[None]) for x in (quantized, in_float))
        count = math.prod(grid(self.layer, quantized))
        chosen = spread(count, min(limit, count), quantized.device)
        for part in torch.split(chosen, max(1, _CHUNK // (self.columns * self.groups))):
            q, f = self._rows(quantized, part), self._rows(in_float, part)
            if not self.convolution:
                q, f = self._typical(q, f)
            self.quantized[half] += q.mT @ q
            self.mixed[half] += f.mT @ q

    def _typical(self, q: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of tokens weighted by about the inverse energy of the float output. What comes after makes tokens alike by a
        normalization, and the few with massive activations would decide alone."""
        y = f[:, :, :-1] @ self.layer.float_weight().float().mT
        root = usual_weights(y[0], all_ranks=False).sqrt().to(q.dtype)[:, None]
        return q * root, f * root

    def _rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Shape (groups, positions, columns + 1)."""
        rows = rows_at(self.layer, x, chosen).float().reshape(len(chosen), self.groups, self.columns)
        return torch.cat([rows, rows.new_ones(len(chosen), self.groups, 1)], 2).transpose(0, 1)

    @property
    def limit(self) -> int:
        """How many positions are worth their time."""
        return max(_POSITIONS, _PER_COLUMN * self.columns)

    @property
    def count(self) -> float:
        """Of positions, or their weights together."""
        return float(self.quantized[:, 0, -1, -1].sum())

    def reduce(self) -> None:
        """Join the sums of all ranks."""
        all_reduce(self.quantized, dist.ReduceOp.SUM)
        all_reduce(self.mixed, dist.ReduceOp.SUM)
