"""Second moments of what goes into a layer, in the quantized network and in the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .init import spread
from .layers import CONVOLUTIONS, TRANSPOSED
from .matching import usual_weights
from .observers import all_reduce, depthwise_rows_at, grid, padded, rows_at
from .rounding import NARROW, Centered, centered, refit

_WIDE = 2048  # columns from which sums are float32, which is twice as fast and half as large
_POSITIONS, _PER_COLUMN = 2**15, 8
_SIZE = 2**25  # numbers in the rows of a layer
_SAMPLE, _SAMPLE_PER_COLUMN, _SAMPLE_SIZE = 2**12, 3, 2**23
_SAMPLE_COLUMNS = 2**10  # of layers that have more than twice as many
_CHUNK = (
    2**21
)  # numbers that are unfolded at once: memory of this size is used again, larger blocks come from the system anew


class Moments:
    """Sums over positions of products of a layer's inputs: of the quantized ones with one another, and of the float ones
    with the quantized ones, at the same positions. There are two halves, of different examples.

    quantized, mixed: shape (halves, groups, columns + 1, columns + 1); the last column is 1, so that means and the count are
        among the products. Columns are those of a row of `float_weight`, flattened.
    outputs: of convolutions, sums of the float output and of its squares, shape (2, groups, outputs).
    positions: how many, shape ().
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
        self.positions = torch.zeros((), device=layer.weight.device, dtype=torch.float64)
        self.outputs: Tensor | None = None
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
            self.weight = self.layer.float_weight().detach().float().reshape(self.groups, -1, self.columns)
            self.outputs = torch.zeros(2, *self.weight.shape[:2], device=layer.weight.device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, half: int, quantized: Tensor, in_float: Tensor, limit: int) -> None:
        """At most `limit` positions of inputs: of images before padding, of tokens any shape that ends with the columns."""
        for q, f, root in _rows(self.layer, quantized, in_float, limit):
            self.positions += q.shape[1]
            _add_products(self.quantized[half], self.mixed[half], self.in_float[half], q, f, root)
            if self.outputs is not None:
                output = _output(f, self.weight)
                self.outputs += torch.stack([output.sum(1), output.square().sum(1)])

    def spread(self, center: bool) -> Tensor | None:
        """Of convolutions, the mean square of each float output around its mean, or around zero, shape (groups, outputs)."""
        if self.outputs is None:
            return None
        mean, square = (self.outputs / max(self.count, 1.0)).unbind()
        found: Tensor = (square - mean.square()).clamp_min(0) if center else square
        return found

    @property
    def limit(self) -> int:
        """How many positions are worth their time."""
        return max(_PER_COLUMN * self.columns, min(_POSITIONS, _SIZE // (self.columns * self.groups)))

    @property
    def count(self) -> float:
        """Of positions, or their weights together."""
        return float(self.quantized[:, 0, -1, -1].sum())

    @property
    def lopsided(self) -> bool:
        """Whether a half is empty."""
        return bool((self.quantized[:, 0, -1, -1] == 0).any())

    def reduce(self) -> None:
        """Join the sums of all ranks."""
        all_reduce(self.quantized, dist.ReduceOp.SUM)
        all_reduce(self.mixed, dist.ReduceOp.SUM)
        all_reduce(self.in_float, dist.ReduceOp.SUM)
        all_reduce(self.positions, dist.ReduceOp.SUM)
        if self.outputs is not None:
            all_reduce(self.outputs, dist.ReduceOp.SUM)


class Sample:
    """Some positions of a layer's inputs in both networks, which are kept: the error of its output for any way to quantize them.

    groups, columns: as of `Moments`. weight: of the float layer, float32, shape (groups, outputs, columns).
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer, self.center = layer, layer.w_quant.shift is not None
        self.groups = layer.groups if isinstance(layer, CONVOLUTIONS + TRANSPOSED) else 1
        self.columns, self.taps = math.prod(shape[1:]), math.prod(shape[2:])
        self.weight = layer.float_weight().detach().float().reshape(self.groups, -1, self.columns)
        self._parts: tuple[list[_Rows], list[_Rows]] = [], []

    @property
    def wide(self) -> bool:
        return self.columns > 2 * _SAMPLE_COLUMNS and self.groups == 1

    def add(self, half: int, x: Tensor, in_float: Tensor, limit: int) -> None:
        """Arguments as of `Moments`, but smoothed and not quantized yet."""
        self._parts[half].extend(
            _Rows(x, f, root, _output(f, self.weight)) for x, f, root in _rows(self.layer, x, in_float, limit)
        )

    def join(self) -> None:
        """Rows that came one after the other become one piece: products of many small ones take longer."""
        for part in self._parts:
            if len(part) > 1:
                part[:] = [_joined(part)]
        if self.wide:
            self._narrow()

    def _narrow(self) -> None:
        """Of a wide layer some channels stand for all: from the one with the most energy to the one with the least every n-th. The
        time grows with the cube of the columns."""
        energy = torch.zeros(self.columns, device=self.weight.device, dtype=torch.float64)
        for rows in (*self._parts[0], *self._parts[1]):
            energy += rows.in_float.square().sum((0, 1))
        all_reduce(energy, dist.ReduceOp.SUM)
        order = energy.view(-1, self.taps).sum(1).argsort(descending=True, stable=True)
        channels = order[:: -(-self.columns // _SAMPLE_COLUMNS)].sort().values
        chosen = (channels[:, None] * self.taps + torch.arange(self.taps, device=channels.device)).flatten()
        self.columns, self.weight = len(chosen), self.weight[..., chosen]
        for part in self._parts:
            part[:] = [
                rows._replace(x=rows.x[..., chosen], in_float=f, wanted=_output(f, self.weight))
                for rows in part
                for f in (rows.in_float[..., chosen],)
            ]

    @property
    def limit(self) -> int:
        """How many positions are worth their time."""
        columns = _SAMPLE_COLUMNS if self.wide else self.columns
        return max(_SAMPLE_PER_COLUMN * columns, min(_SAMPLE, _SAMPLE_SIZE // (columns * self.groups)))

    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest input, over all ranks."""
        found = torch.full((2,), -math.inf, device=self.weight.device, dtype=torch.float32)
        for rows in (*self._parts[0], *self._parts[1]):
            low, high = rows.x.aminmax()
            found = torch.maximum(found, torch.stack([-low, high]))
        all_reduce(found, dist.ReduceOp.MAX)
        return -float(found[0]), float(found[1])

    def lopsided(self) -> bool:
        """Whether a half is empty, over all ranks."""
        counts = torch.tensor([sum(rows.x.shape[1] for rows in part) for part in self._parts])
        counts = counts.to(self.weight.device)
        all_reduce(counts, dist.ReduceOp.SUM)
        return bool((counts == 0).any())

    def errors(self, quantize: Callable[[Tensor], Tensor], dampings: Sequence[float]) -> list[float]:
        """For each damping the mean squared error of the output of the refit to one half, on the other. Of narrow layers the two
        take turns, and it is the sum."""
        totals = [0.0] * len(dampings)
        one, other = ([rows._replace(x=quantize(rows.x)) for rows in part] for part in self._parts)
        for fit, rest in ((one, other), (other, one))[: 2 if self.columns <= NARROW else 1]:
            moments = self._centered(fit)
            for place, damping in enumerate(dampings):
                totals[place] += self._missing(rest, refit(self.weight, moments, damping))
        return totals

    def _missing(self, part: list[_Rows], weight: Tensor) -> float:
        """The mean squared error of the output with this weight."""
        sums = torch.zeros(2 + weight[..., 0].numel(), device=weight.device, dtype=torch.float64)
        for q, _, root, wanted in part:
            away = wanted - _output(q, weight)
            count, means = away.new_tensor(q.shape[1]), away.sum(1)
            if root is not None:
                away = away * root
                count, means = root.square().sum(), (away * root).sum(1)
            sums[0] += torch.linalg.vector_norm(away).square()
            sums[1] += count
            sums[2:] += means.flatten()
        all_reduce(sums, dist.ReduceOp.SUM)
        means = sums[2:] / sums[1]
        return float(sums[0] / sums[1] - (means.square().sum() if self.center else 0))

    def _centered(self, part: list[_Rows]) -> Centered:
        size = self.columns + 1
        quantized = torch.zeros(self.groups, size, size, device=self.weight.device, dtype=torch.float32)
        mixed, in_float = torch.zeros_like(quantized), quantized.new_zeros(self.groups, self.columns)
        for q, f, root, _ in part:
            _add_products(quantized, mixed, in_float, q, f, root)
        for total in (quantized, mixed, in_float):
            all_reduce(total, dist.ReduceOp.SUM)
        return centered(quantized, mixed, in_float, self.center)


class _Rows(NamedTuple):
    """At some positions: inputs in both networks, shape (groups, positions, columns), the roots of the positions' weights, shape
    (positions, 1), None where all count alike, and the outputs of the float layer."""

    x: Tensor
    in_float: Tensor
    root: Tensor | None
    wanted: Tensor


def _joined(part: list[_Rows]) -> _Rows:
    roots = [rows.root for rows in part if rows.root is not None]
    return _Rows(
        x=torch.cat([rows.x for rows in part], 1),
        in_float=torch.cat([rows.in_float for rows in part], 1),
        root=torch.cat(roots) if roots else None,
        wanted=torch.cat([rows.wanted for rows in part], 1),
    )


def _add_products(
    quantized: Tensor, mixed: Tensor, in_float: Tensor, q: Tensor, f: Tensor, root: Tensor | None
) -> None:
    """Add the products of these rows to sums as `Moments` has them, as if the rows ended with a 1."""
    if root is None:
        q_sums, f_sums, count = q.sum(1), f.sum(1), q.new_tensor(q.shape[1])
    else:
        q, f, count = q * root, f * root, root.square().sum()
        q_sums, f_sums = ((x.mT @ root)[..., 0] for x in (q, f))
    quantized[:, :-1, :-1] += q.mT @ q
    quantized[:, :-1, -1] += q_sums
    mixed[:, :-1, :-1] += f.mT @ q
    mixed[:, :-1, -1] += f_sums
    for total in (quantized, mixed):
        total[:, -1, :-1] += q_sums
        total[:, -1, -1] += count
    in_float += f.square().sum(1)


def _output(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows of shape (groups, positions, columns) by a weight of shape (groups, outputs, columns). With one output a group torch is ten
    times as fast the other way round."""
    return rows @ weight.mT if weight.shape[1] > 1 else (weight @ rows.mT).mT


def _rows(
    layer: Any, quantized: Tensor, in_float: Tensor, limit: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
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
    roots = None if convolution else _roots(layer, in_float, chosen)
    size = max(1, _CHUNK // (columns * groups))
    for place, part in enumerate(torch.split(chosen, size)):
        if convolution and groups == layer.in_channels > 1:
            q, f = (depthwise_rows_at(layer, x, part).float().mT for x in (quantized, in_float))
        else:
            q, f = (
                rows_at(layer, x, part).float().reshape(len(part), groups, columns).transpose(0, 1)
                for x in (quantized, in_float)
            )
        yield q, f, None if roots is None else roots[place * size : (place + 1) * size]


def _roots(layer: Any, in_float: Tensor, chosen: Tensor) -> Tensor:
    """Of the weights of these tokens, shape (tokens, 1)."""
    output = rows_at(layer, in_float, chosen).float() @ layer.float_weight().float().mT
    return usual_weights(output, all_ranks=False).sqrt().float()[:, None]
