"""By what the channels of a linear layer's input are divided before it is rounded, and the columns of its weight multiplied with:
SmoothQuant (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023),
with powers of two, so that neither rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .observers import InputSample, Statistics, all_reduce
from .quantizers import ActivationQuantizer

_Fitted = TypeVar("_Fitted")
SMOOTHED = nn.Linear, Conv1D
"""Float classes whose inputs may be divided."""
_GAIN = 0.2  # of the error of the output: for less, inputs are not divided
# Alpha, the share of the inputs' magnitudes, and what is added before powers are rounded; first what mostly serves.
_TRIED = (0.75, 0.0), (0.75, 0.5), (0.5, 0.0)
_UNEVEN = 2.0  # the largest channel of inputs, by the median one: below, all are alike
_FURTHEST = 7  # powers of two from the median factor: float16 has place for them


def candidates(layers: Iterable[Any], weights: Sequence[Tensor], sample: InputSample) -> list[Tensor]:
    """Factors worth a try for layers that read the same inputs, each of shape (columns,), 1 and more; none where channels are
    alike.

    Args:
        weights: of the float layers, shape (out, columns). sample: of the inputs, on this rank.
    """
    if not all(isinstance(layer, SMOOTHED) and isinstance(layer.a_quant, ActivationQuantizer) for layer in layers):
        return []
    inputs = sample.rows.new_zeros(sample.width, dtype=torch.float32)
    if len(sample.rows) > 1:
        # Of one half: what only these rows have does harm to the other one, and so the error of all tells.
        inputs = half_of(sample.rows).abs().amax(0).float()
    all_reduce(inputs, dist.ReduceOp.MAX)
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    used = (inputs > 0) & (columns > 0)
    if not bool(used.any()) or inputs.max() < _UNEVEN * inputs[used].median():
        return []
    found: list[Tensor] = []
    for share, offset in _TRIED:
        powers = (share * inputs.log2() - (1 - share) * columns.log2() + offset).round()
        middle = powers[used].median()
        powers = torch.where(used, powers - middle, 0).clamp(-_FURTHEST, _FURTHEST)
        factors = (powers - powers.min()).exp2()
        if not any(torch.equal(factors, other) for other in found):
            found.append(factors)
    return found


def best(fit: Callable[[Tensor | None], tuple[_Fitted, float]], factors: Iterable[Tensor]) -> _Fitted:
    """What `fit` gives, beside the logarithm of the error of the output, for the factors that lower this error most; for None,
    if none of them lowers it by a fifth."""
    found, least = fit(None)
    least, gained = least + math.log(1 - _GAIN), False
    for tried in factors:
        other, error = fit(tried)
        if error < least:
            found, least, gained = other, error, True
        elif not gained:
            break  # the first does most of it
    return found


def half_of(rows: Tensor) -> Tensor:
    """About half of these rows, shape (rows, columns), chosen by what is in them: which rank has a row, and where, makes no
    difference."""
    even = (rows > rows.mean(1, keepdim=True)).sum(1) % 2 == 0
    return rows[even] if even.any() else rows


def statistics(sample: InputSample, factors: Tensor) -> Statistics:
    """Of the sample's rows, divided; over all ranks."""
    found = Statistics(factors.device)
    if len(sample.rows):
        found.add(sample.rows / factors.to(sample.rows.dtype))
        found.sums *= sample.share
        found.histogram *= sample.share
    found.reduce()
    return found
