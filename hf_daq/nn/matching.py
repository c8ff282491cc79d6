"""How a quantized layer's output is matched to the float one's: by the scale of its weight, and by a shift."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .observers import all_reduce

_CHUNK = 2**20
_FIRM = 0.01  # of the energy of the output: how firmly the scale stays where it started beside a shift
_GAIN = 0.05  # of the logarithms of both errors: for less, every channel keeps the mean of the float layer


def usual_weights(y: Tensor, all_ranks: bool = True) -> Tensor:
    """Weights of positions by which a mean of squared errors tells of the typical position, where the plain mean may tell
    of a few large ones only: about the inverse energy of the outputs y, shape (positions, channels). Float64, 0 to 1.
    Typical are the positions of all ranks, or those in y."""
    energy = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).square()
    logs = energy[energy > 0].log()
    total = torch.stack([logs.sum(), logs.new_tensor(len(logs))])
    if all_ranks:
        all_reduce(total, dist.ReduceOp.SUM)
    usual: Tensor = (total[0] / total[1].clamp_min(1)).exp()  # the geometric mean, which a few large ones hardly move
    weights: Tensor = usual / (energy + usual)
    return weights


class OutputMatch:
    """Sums over positions of the float output y and the quantized output q, from which the squared error of every scale
    and shift follows, per output channel: row 0 over all positions alike, row 1 with the weights of the typical one.

    Args:
        y, q: shape (positions, channels), without bias.
        usual: `usual_weights` of y. share: how many positions each one stands for.
    """

    def __init__(self, y: Tensor, q: Tensor, usual: Tensor, share: float) -> None:
        weights = torch.stack([torch.ones_like(usual), usual]) * share
        self.sums = torch.zeros(2, 7, y.shape[1], device=y.device, dtype=torch.float64)
        step = max(1, _CHUNK // y.shape[1])
        for start in range(0, len(y), step):
            part = slice(start, start + step)
            a, b = y[part].double(), q[part].double()
            own = weights[:, part]
            self.sums += torch.stack([own @ x for x in (a, b, a * a, a * b, b * b, a.abs(), b.abs())], 1)
        self.counts = torch.stack([weights.sum(1), weights.square().sum(1)], 1)
        all_reduce(self.sums, dist.ReduceOp.SUM)
        all_reduce(self.counts, dist.ReduceOp.SUM)

    def fit(self, per_layer: bool, shift: bool, paper: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Factor of the scale, shape (1,) or (channels,), and shift, shape (channels,), that lower the squared error the
        most, of all positions and of the typical one; 1 and 0 where nothing lowers both. And these two errors.

        Args:
            per_layer: one factor for the layer. shift: whether there may be one.
            paper: the factor gives the quantized output the mean absolute value of the float one.
        """
        channels = self.sums.shape[2]
        none = torch.zeros(channels, device=self.sums.device, dtype=torch.float64)
        start = self._equal_means(per_layer) if paper else torch.ones_like(none[: 1 if per_layer else None])
        best, least = (start, none), self._errors(start, none, 0.0)
        limit = least
        for sums, counts, gain in zip(self.sums, self.counts, (0.0, _GAIN), strict=True):
            reached = least.log().sum() - gain
            for ratio, offset, parameters in self._candidates(sums, counts, start, per_layer, shift, paper):
                errors = self._errors(ratio, offset, parameters)
                if bool((errors <= limit).all()) and errors.log().sum() < min(reached, least.log().sum()):
                    best, least = (ratio, offset), errors
        return *best, least

    @staticmethod
    def _candidates(
        sums: Tensor, counts: Tensor, start: Tensor, per_layer: bool, shift: bool, paper: bool
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Factor, shift, and how many numbers of them were fitted, per channel; least squares for one row of the sums."""
        free = 1 / sums.shape[1] if per_layer else 1.0
        y, q, _, yq, qq, _, _ = sums
        mean_y, mean_q = y / counts[0], q / counts[0]
        if shift:
            yield start, mean_y - start * mean_q, 1.0
        if not paper:
            yield _ratio(yq, qq, per_layer), torch.zeros_like(y), free
            if shift:
                # Where all positions are nearly alike, the shift explains them, and what is left tells little of the scale.
                firm = _FIRM * qq
                ratio = _ratio(yq - y * mean_q + firm, qq - q * mean_q + firm, per_layer)
                yield ratio, mean_y - ratio * mean_q, 1.0 + free

    def _equal_means(self, per_layer: bool) -> Tensor:
        return _ratio(self.sums[0, 5], self.sums[0, 6], per_layer)

    def _errors(self, ratio: Tensor, shift: Tensor, parameters: float) -> Tensor:
        """The two squared errors, shape (2,), as expected for positions that were not looked at (Akaike's final prediction
        error)."""
        y, q, yy, yq, qq, _, _ = self.sums.unbind(1)
        count = self.counts[:, :1]
        errors = yy - 2 * ratio * yq + ratio**2 * qq - 2 * shift * (y - ratio * q) + shift**2 * count
        positions = self.counts[:, 0] ** 2 / self.counts[:, 1]
        growth = (positions + parameters) / (positions - parameters)
        growth = torch.where(positions > parameters, growth, torch.inf)
        return errors.sum(1).clamp_min(1e-12 * yy.sum(1)).clamp_min(1e-30) * growth


def _ratio(over: Tensor, under: Tensor, per_layer: bool) -> Tensor:
    """over / under where that is a positive number, else 1."""
    if per_layer:
        over, under = over.sum(0, keepdim=True), under.sum(0, keepdim=True)
    usable = (over > 0) & (under > 0)
    return torch.where(usable, over / torch.where(usable, under, 1.0), 1.0)
