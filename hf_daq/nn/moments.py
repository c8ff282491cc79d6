"""Second moments of what goes into a layer, in the quantized network and in the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .init import spread
from .layers import CONVOLUTIONS, TRANSPOSED
from .matching import usual_weights
from .observers import all_reduce, depthwise_rows_at, grid, padded, rows_at
from .rounding import NARROW, Centered, refit
from .sums import finite

_WIDE = 2048  # columns from which sums are float32, which is twice as fast and half as large
_POSITIONS, _PER_COLUMN = 2**15, 8
_SIZE = 2**25  # numbers in the rows of a layer
_SAMPLE, _SAMPLE_PER_COLUMN, _SAMPLE_SIZE = 2**12, 3, 2**23
_SAMPLE_COLUMNS = 2**10  # of layers that have more than twice as many
_WHOLE = 256  # columns of products that are not split
_CHUNK = (
    2**21
)  # numbers that are unfolded at once: memory of this size is used again, larger blocks come from the system anew


class Sums:
    """Sums over positions of products of a layer's inputs: of the quantized ones with one another, and of what the float weight misses
    with them, its output of the float inputs less that of the quantized ones.

    weight: of the float layer, shape (groups, outputs, columns). Columns are those of a row of `float_weight`, flattened.
    quantized: shape (groups, columns + 1, columns + 1); the last column is 1, so that means and the count are among the products.
    missing: of missing outputs, or, where these are not many fewer than inputs, of missing inputs, with the quantized ones and 1, shape
        (groups, outputs or columns, columns + 1).
    away: of missing inputs and of their squares, shape (2, groups, columns).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups, outputs, columns = weight.shape
        self.weight = weight
        self.by_output = 2 * outputs < columns
        self.quantized = torch.zeros(groups, columns + 1, columns + 1, device=weight.device, dtype=dtype)
        self.missing = self.quantized.new_zeros(groups, outputs if self.by_output else columns, columns + 1)
        self.away = self.quantized.new_zeros(2, groups, columns)

    def add(self, q: Tensor, f: Tensor, root: Tensor | None) -> None:
        """Rows of shape (groups, positions, columns) of the quantized and of the float network, and the roots of the positions'
        weights, shape (positions, 1), None where all count alike."""
        away = f - q
        if root is not None:
            q, away = q * root, away.mul_(root)
        missing = _output(away, self.weight) if self.by_output else away
        self.quantized[:, :-1, :-1] += _gram(q)
        sums = _sums(q, root)
        self.quantized[:, :-1, -1] += sums
        self.quantized[:, -1, :-1] += sums
        self.quantized[:, -1, -1] += q.shape[1] if root is None else root.square().sum()
        self.missing[..., :-1] += missing.mT @ q
        self.missing[..., -1] += _sums(missing, root)
        self.away[0] += _sums(away, root)
        self.away[1] += away.square_().sum(1)

    def __add__(self, other: Sums) -> Sums:
        found = copy(self)
        found.quantized, found.missing, found.away = (a + b for a, b in zip(self._all(), other._all(), strict=True))
        return found

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantized, self.missing, self.away

    def reduce(self) -> None:
        """Join the sums of all ranks."""
        for total in self._all():
            all_reduce(total, dist.ReduceOp.SUM)

    @property
    def count(self) -> float:
        """Of positions, or their weights together."""
        return float(self.quantized[0, -1, -1])

    @property
    def finite(self) -> bool:
        return all(map(finite, self._all()))

    def centered(self, center: bool) -> Centered:
        """Covariances, or products around zero."""
        count = self.quantized[:1, -1:, -1:].clamp_min(1)
        quantized, missing, (away, noise) = self.quantized / count, self.missing / count, self.away / count[0]
        if not self.by_output:
            missing = self.weight.to(missing.dtype) @ missing
        q_mean, mean = quantized[:, :-1, -1], missing[..., -1]
        quantized, missing = quantized[:, :-1, :-1], missing[..., :-1]
        if center:
            quantized = quantized - q_mean[:, :, None] * q_mean[:, None]
            missing = missing - mean[:, :, None] * q_mean[:, None]
            noise = noise - away.square()
        noise = (noise / quantized.diagonal(dim1=1, dim2=2).clamp_min(1e-20)).clamp(1e-8, 1e8)
        usual = noise.median(1, keepdim=True).values
        return Centered(quantized, missing, q_mean, mean, (usual / noise).clamp_max(1.0))


class Moments:
    """What positions of a layer's inputs say of its best weight.

    halves: sums of different examples.
    outputs: of convolutions, sums of the float output and of its squares, shape (2, groups, outputs).
    positions: how many, shape ().
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, CONVOLUTIONS + TRANSPOSED) else 1
        self.columns = math.prod(shape[1:])
        weight = layer.float_weight().detach().float().reshape(self.groups, -1, self.columns)
        dtype = torch.float64 if self.columns < _WIDE else torch.float32
        self.halves = Sums(weight, dtype), Sums(weight, dtype)
        self.positions = torch.zeros((), device=weight.device, dtype=torch.float64)
        self.outputs: Tensor | None = None
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
            self.outputs = torch.zeros(2, *weight.shape[:2], device=weight.device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, half: int, quantized: Tensor, in_float: Tensor, limit: int, weights: Tensor | None = None) -> None:
        """At most `limit` positions of inputs: of images before padding, of tokens any shape that ends with the columns.

        Args:
            weights: of a convolution, of each position of its output, shape (examples, positions).
        """
        sums = self.halves[half]
        for q, f, root in _rows(self.layer, quantized, in_float, limit, weights):
            self.positions += q.shape[1]
            sums.add(q, f, root)
            if self.outputs is not None:
                output = _output(f, sums.weight)
                output = output if root is None else output * root
                self.outputs += torch.stack([_sums(output, root), output.square().sum(1)])

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
        return sum(half.count for half in self.halves)

    @property
    def lopsided(self) -> bool:
        """Whether a half is empty."""
        return any(half.count == 0 for half in self.halves)

    def reduce(self) -> None:
        """Join the sums of all ranks."""
        for half in self.halves:
            half.reduce()
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

    def add(self, half: int, x: Tensor, in_float: Tensor, limit: int, weights: Tensor | None = None) -> None:
        """Arguments as of `Moments`, but smoothed and not quantized yet."""
        self._parts[half].extend(
            _Rows(x, f, root, _output(f, self.weight)) for x, f, root in _rows(self.layer, x, in_float, limit, weights)
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
        sums = Sums(self.weight, torch.float32)
        for q, f, root, _ in part:
            sums.add(q, f, root)
        sums.reduce()
        return sums.centered(self.center)


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


def _sums(rows: Tensor, root: Tensor | None) -> Tensor:
    """Over positions, of rows that were multiplied with the roots of their weights, shape (groups, columns)."""
    found: Tensor = rows.sum(1) if root is None else (rows.mT @ root)[..., 0]
    return found


def _gram(rows: Tensor) -> Tensor:
    """`rows.mT @ rows`, whose two halves are the same: blocks beside the diagonal are multiplied once."""
    if rows.shape[2] < _WHOLE:
        return rows.mT @ rows
    one, other = rows.tensor_split(2, 2)
    beside = one.mT @ other
    return torch.cat([torch.cat([_gram(one), beside], 2), torch.cat([beside.mT, _gram(other)], 2)], 1)


def _output(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows of shape (groups, positions, columns) by a weight of shape (groups, outputs, columns). With one output a group torch is ten
    times as fast the other way round."""
    return rows @ weight.mT if weight.shape[1] > 1 else (weight @ rows.mT).mT


def _rows(
    layer: Any, quantized: Tensor, in_float: Tensor, limit: int, weights: Tensor | None
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
    if weights is not None:
        roots = weights.flatten()[chosen].sqrt()[:, None]
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
