"""The model as a whole: its outputs beside those of its own float weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.batch import Calls, copied, tensors_in
from ..nn.layers import QuantizedLayer, replaced_forwards
from ..nn.quantizers import wide
from ..nn.sums import count_bad, squares
from .measure import Measurement, decibels, left_as_it_was

_SAME = 1e-10  # of the energy of the output


@torch.no_grad()
def network_sqnr(model: nn.Module, batch: Any, measured: list[Measurement]) -> float | None:
    """`10 log10(sum |y - mean|^2 / sum |q - y|^2)` in dB: q the output of the model, y that of the same model with every
    quantized layer in float, mean the mean of y over examples and tokens, since what is the same for all of them says
    nothing. Padding tokens do not count. None where there is nothing to compare: packed layers have no float weights, a
    layer has no usable bounds, values are not finite, or all examples have one output."""
    in_float = float_network(measured)
    if in_float is None:
        return None
    quantized = answers(model, batch)
    with in_float:
        reference = answers(model, batch)
    energy = signal = noise = 0.0
    for y, q in zip(reference, quantized, strict=True):
        if y.shape != q.shape or count_bad(y) or count_bad(q):
            return None
        signal += squares(y - y.mean(0) if len(y) > 1 else y)
        noise += squares(q - y)
        energy += squares(y)
    return decibels(signal, noise) if signal > _SAME * energy else None


def float_network(measured: list[Measurement]) -> AbstractContextManager[Any] | None:
    """Inside, every quantized layer computes in float. None where that is not known: packed layers have no float weights,
    and without usable bounds nothing is quantized."""
    layers = [found.layer for found in measured]
    known = all(
        isinstance(found.layer, QuantizedLayer) and found.usable and not found.bad_weights for found in measured
    )
    return replaced_forwards({found.layer: found.float_output for found in measured}) if layers and known else None


def answers(model: nn.Module, batch: Any) -> list[Tensor]:
    """The output of each call, float32 or wider, shape (examples or tokens, values). Every pass has the same random numbers."""
    found = []
    with left_as_it_was(model):
        for module, args, kwargs in calls(model, batch):
            output = prediction(module(*args, **kwargs))
            if output is not None:
                found.append(attended(wide(output), kwargs.get("attention_mask")))
    return found


def calls(model: nn.Module, batch: Any) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The calls that a batch stands for."""
    if isinstance(batch, Calls):
        yield from ((call.module, copied(call.args), copied(call.kwargs)) for call in batch)
    elif isinstance(batch, Mapping):
        yield model, (), copied(dict(batch))
    else:
        yield model, copied(batch if isinstance(batch, tuple) else (batch,)), {}


def prediction(output: Any) -> Tensor | None:
    """`logits`, or else the first tensor with examples in it."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next(
        (leaf for leaf in tensors_in(output) if leaf.is_floating_point() and leaf.ndim > 0 and leaf.numel() > 0), None
    )


def attended(output: Tensor, mask: Any) -> Tensor:
    """A row for each example, or for each token that is no padding."""
    if output.ndim == 3:
        tokens = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == output.shape[:2]
        return output[mask.to(output.device) > 0] if tokens else output.flatten(0, 1)
    return output.reshape(len(output), -1)
