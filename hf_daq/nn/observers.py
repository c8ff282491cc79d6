"""What calibration sees of a layer: statistics of all its inputs, and a bounded random sample of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from .layers import CONVOLUTIONS, TRANSPOSED
from .quantizers import processes
from .sums import squares, total

_BINS = 8192
_CHUNK = 2**18
_SMALLEST_EXPONENT = -126
_SAMPLE_VALUES, _SAMPLE_ROWS = 2**22, 1024  # of a layer
_EXPERT_ROWS = 64  # of each expert, at least
_TOGETHER, _FEWEST_ROWS = 2**28, 256  # values of all layers, and rows that each may have in any case


def all_reduce(tensor: Tensor, operation: Any) -> None:
    """Reduce over all ranks in place; nothing to do in a process that is alone."""
    if processes() > 1:
        dist.all_reduce(tensor, operation)


class Statistics:
    """Count, range and moments of values, and a histogram over [-2**k, 2**k) that grows with them. Every value counts."""

    def __init__(self, device: torch.device) -> None:
        self.exponent = _SMALLEST_EXPONENT
        self.extremes = torch.full((2,), -math.inf, device=device, dtype=torch.float32)  # -min, max
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)  # count, sum, sum of squares
        self.histogram = torch.zeros(_BINS, device=device, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        x = values.float().flatten()
        low, high = x.aminmax()
        self.extremes = torch.maximum(self.extremes, torch.stack([-low, high]))
        self.sums += self.sums.new_tensor([x.numel(), total(x), squares(x)])
        largest = float(torch.maximum(-low, high))
        if math.isfinite(largest):
            self.grow(math.frexp(largest)[1] if largest > 0 else _SMALLEST_EXPONENT)
            for part in torch.split(x, _CHUNK):
                self.histogram += torch.bincount(self._places(part), minlength=_BINS)

    @property
    def count(self) -> int:
        return int(self.sums[0])

    @property
    def squares(self) -> float:
        """Sum of squares."""
        return float(self.sums[2])

    @property
    def low(self) -> float:
        return -float(self.extremes[0])

    @property
    def high(self) -> float:
        return float(self.extremes[1])

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        count, total, squares = self.sums.tolist()
        return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))

    def grow(self, exponent: int) -> None:
        """Widen the range to [-2**exponent, 2**exponent), merging bins in pairs around the middle."""
        if not self.histogram.any():
            self.exponent = max(self.exponent, exponent)
        while self.exponent < exponent:
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = F.pad(merged, (_BINS // 4, _BINS // 4))
            self.exponent += 1

    def centers(self) -> Tensor:
        edge = 2.0**self.exponent
        steps = torch.arange(_BINS, device=self.histogram.device, dtype=torch.float64) + 0.5
        return steps.mul_(2 * edge / _BINS).sub_(edge)

    def weighted(self, values: Tensor, weights: Tensor) -> Tensor:
        """A histogram of the same range, of other values with weights, over all ranks."""
        histogram = torch.zeros_like(self.histogram)
        for part, weight in zip(*(torch.split(part.flatten(), _CHUNK) for part in (values, weights)), strict=True):
            histogram.index_add_(0, self._places(part.float()), weight)
        all_reduce(histogram, dist.ReduceOp.SUM)
        return histogram

    def _places(self, values: Tensor) -> Tensor:
        """The bins of values, float32; of those outside the first and the last."""
        return (values * 2.0**-self.exponent).add_(1).mul_(_BINS / 2).clamp_(0, _BINS - 1).int()

    def reduce(self) -> None:
        """Join the statistics of all ranks."""
        exponent = torch.tensor(self.exponent, device=self.sums.device)
        all_reduce(exponent, dist.ReduceOp.MAX)
        self.grow(int(exponent))
        all_reduce(self.extremes, dist.ReduceOp.MAX)
        all_reduce(self.sums, dist.ReduceOp.SUM)
        all_reduce(self.histogram, dist.ReduceOp.SUM)


class InputSample:
    """A random sample, without replacement, of what gives one position of a layer's output: the row of a token, or the
    patch under the kernel of a convolution. Memory is bounded whatever comes; few inputs are kept whole.

    rows: shape (positions, in) or (positions, in, size of the kernel...), in the dtype of the inputs. seen: of how
        many positions. width: values of a row. limit: rows that are kept.
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        self.layer, self.seen = layer, 0
        self.convolution = isinstance(layer, CONVOLUTIONS + TRANSPOSED)
        self.width = layer.in_channels * math.prod(layer.kernel_size) if self.convolution else shape[1]
        self.limit = max(_SAMPLE_ROWS, _SAMPLE_VALUES // max(self.width, shape[0]))
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0, dtype=torch.float32)
        kernel = layer.kernel_size if self.convolution else ()
        columns = layer.in_channels if self.convolution else shape[1]
        self.rows = layer.weight.detach().new_empty(0, columns, *kernel)

    @property
    def share(self) -> float:
        """How many positions each one of the sample stands for."""
        return self.seen / max(len(self.keys), 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Every position draws a number; those with the smallest numbers stay."""
        if self.convolution:
            x = padded(self.layer, x if x.ndim == self.rows.ndim else x[None])
        count = math.prod(grid(self.layer, x))
        self.seen += count
        keys = torch.rand(count, generator=self.generator, dtype=torch.float32)
        chosen = keys.topk(self.limit, largest=False).indices if count > self.limit else torch.arange(count)
        if len(self.keys) == self.limit:
            self._replace(x, keys, chosen[keys[chosen] < self.keys.max()])
            return
        rows, keys = rows_at(self.layer, x, chosen.to(x.device)), keys[chosen]
        if len(self.keys):
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        if len(keys) > self.limit:
            kept = keys.topk(self.limit, largest=False).indices
            rows, keys = rows[kept.to(x.device)], keys[kept]
        self.rows, self.keys = rows, keys

    def _replace(self, x: Tensor, keys: Tensor, chosen: Tensor) -> None:
        """Write in the places of those that go: large tensors that come and go with every batch leave holes in memory."""
        stays = torch.zeros(self.limit + len(chosen), dtype=torch.bool)
        stays[torch.cat([self.keys, keys[chosen]]).topk(self.limit, largest=False).indices] = True
        free, chosen = (~stays[: self.limit]).nonzero()[:, 0], chosen[stays[self.limit :]]
        rows = rows_at(self.layer, x, chosen.to(x.device))
        self.rows = self.rows.to(torch.promote_types(self.rows.dtype, rows.dtype))
        self.rows[free.to(x.device)] = rows.to(self.rows.dtype)
        self.keys[free] = keys[chosen]

    def reach(self, weight: Tensor) -> Tensor:
        """By what factor the energy of noise in each column of `rows` comes out of the layer: of the shape of a row."""
        squares = weight.double().square()
        if not self.convolution:
            return squares.sum(0)
        return squares.view(self.layer.groups, -1, *squares.shape[1:]).sum(1).flatten(0, 1)

    def output(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The layer's output at these positions for a weight as from `float_weight`, without a bias: (positions, out)."""
        weight = weight.to(rows.dtype)
        if not self.convolution:
            return F.linear(rows, weight)
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[rows.ndim - 3]
        output: Tensor = function(rows, weight, groups=self.layer.groups).flatten(1)
        return output


class LayerInputs:
    """The inputs of one layer: statistics of all, and a sample."""

    def __init__(self, layer: Any) -> None:
        self.statistics = Statistics(layer.weight.device)
        self.samples = [InputSample(layer, layer.weight_shape())]

    def parts(self, weight: Tensor) -> list[Tensor]:
        """The weight of each sample."""
        return [weight]

    def outputs(self, weight: Tensor, a_quant: nn.Module | None = None) -> list[Tensor]:
        """Of each sample, without a bias."""
        return [
            sample.output(sample.rows if a_quant is None else a_quant(sample.rows), part)
            for sample, part in zip(self.samples, self.parts(weight), strict=True)
        ]


class ExpertsInputs(LayerInputs):
    """The inputs of one layer of all experts: statistics of all, and a sample for each expert."""

    def __init__(self, layer: Any) -> None:
        self.statistics, self.sizes = Statistics(layer.weight.device), layer.sizes
        experts, out, columns = layer.sizes
        self.samples = [InputSample(layer, (out, columns)) for _ in range(experts)]
        for sample in self.samples:
            sample.limit = max(sample.limit // experts, _EXPERT_ROWS)

    def parts(self, weight: Tensor) -> list[Tensor]:
        return list(weight.reshape(self.sizes))


def limit_together(samples: Iterable[InputSample]) -> None:
    """Lower the limits of the longest samples, so that all together do not hold more than a model may cost beside itself."""
    samples = list(samples)
    rows = max((sample.limit for sample in samples), default=0)
    while rows > _FEWEST_ROWS and sum(min(sample.limit, rows) * sample.width for sample in samples) > _TOGETHER:
        rows = max(rows * 15 // 16, _FEWEST_ROWS)
    for sample in samples:
        sample.limit = min(sample.limit, rows)


def grid(layer: Any, x: Tensor) -> tuple[int, ...]:
    """How many positions each dimension of the inputs has; of images that are `padded`."""
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        return tuple(x.shape[:-1])
    sizes = zip(x.shape[2:], layer.kernel_size, _steps(layer), layer.dilation, strict=True)
    return (len(x), *((size - dilation * (kernel - 1) - 1) // step + 1 for size, kernel, step, dilation in sizes))


def rows_at(layer: Any, x: Tensor, chosen: Tensor) -> Tensor:
    """What gives the output at these positions, counted over the `grid`: the inputs of tokens, shape (positions, in), or
    the patches under the kernel, shape (positions, in, size of the kernel...)."""
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        return x.reshape(-1, x.shape[-1])[chosen]
    image, places = _places(layer, x, chosen)
    dims = len(places)
    indices = [
        place.view(-1, *(place.shape[1] if dim == other else 1 for other in range(dims)))
        for dim, place in enumerate(places)
    ]
    where: Any = (image.view(-1, *(1,) * dims), slice(None), *indices)
    return x[where].movedim(-1, 1)


def depthwise_rows_at(layer: Any, x: Tensor, chosen: Tensor) -> Tensor:
    """As `rows_at` of a convolution for ascending positions, each channel in one piece, which products over positions want: shape
    (in, size of the kernel, positions)."""
    image, places = _places(layer, x, chosen)
    index = torch.zeros_like(image)[None]
    for place, size in zip(places, x.shape[2:], strict=True):
        index = (index[:, None] * size + place.mT).flatten(0, 1)
    rows = x.new_empty(x.shape[1], *index.shape)
    counts = image.bincount(minlength=len(x)).tolist()
    # One image after the other: all at once would be a copy of the images with their channels first.
    for pixels, part, found in zip(
        x.flatten(2), torch.split(index, counts, 1), torch.split(rows, counts, 2), strict=True
    ):
        found.copy_(pixels.index_select(1, part.flatten()).view(found.shape))
    return rows


def _places(layer: Any, x: Tensor, chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Which image, and where under the kernel in each dimension, shape (positions, size of the kernel there)."""
    image, *starts = torch.unravel_index(chosen, grid(layer, x))
    places = []
    for start, kernel, step, dilation in zip(starts, layer.kernel_size, _steps(layer), layer.dilation, strict=True):
        place = (start * step)[:, None] + dilation * torch.arange(kernel, device=x.device)
        # A transposed one's kernel lies over what it gives, not over what it reads.
        places.append(place.flip(1) if isinstance(layer, TRANSPOSED) else place)
    return image, places


def _steps(layer: Any) -> Any:
    """By how much the kernel moves over what `padded` gives."""
    return (1,) * len(layer.kernel_size) if isinstance(layer, TRANSPOSED) else layer.stride


def padded(layer: Any, x: Tensor) -> Tensor:
    """The images with the padding the convolution gives them; for a transposed one with zeros between their pixels."""
    if isinstance(layer, TRANSPOSED):
        return _spread(layer, x)
    if isinstance(layer, Conv2dSame) or getattr(layer, "same_pad", False):
        x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    sides = layer._reversed_padding_repeated_twice
    return F.pad(x, sides, mode) if any(sides) else x  # torch copies where there is nothing to pad


def _spread(layer: Any, x: Tensor) -> Tensor:
    sizes = ((size - 1) * stride + 1 for size, stride in zip(x.shape[2:], layer.stride, strict=True))
    spread = x.new_zeros(*x.shape[:2], *sizes)
    where: Any = (..., *(slice(None, None, stride) for stride in layer.stride))
    spread[where] = x
    sides: list[int] = []
    for kernel, dilation, padding, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        side = dilation * (kernel - 1) - padding
        sides = [side, side + more, *sides]
    return F.pad(spread, sides)
