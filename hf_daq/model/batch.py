"""How a batch is given to a model, and its outputs taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportError, ModelError


class Call(NamedTuple):
    """A call of a module that was recorded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module


class Calls(tuple[Call, ...]):
    """Calls of a model or of its parts, one after the other."""


def run(model: nn.Module, batch: Any) -> None:
    """A forward of a tensor, a mapping or a tuple, or recorded calls."""
    if isinstance(batch, Calls):
        for call in batch:
            call.module(*call.args, **call.kwargs)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, tuple) else (batch,)))


def examples_in(batch: Any) -> int:
    """Length of the first tensor."""
    if not isinstance(batch, Tensor | Mapping | tuple):
        raise ModelError(
            f"batch is a {type(batch).__name__}; pass a tensor, a mapping of tensors as tokenizers give it, or a tuple of "
            "positional arguments"
        )
    if isinstance(batch, Calls):
        return max(examples_in((*call.args, *call.kwargs.values())) for call in batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


_BATCH = 16


class Inputs:
    """The inputs of a model as a tuple or a mapping of tensors."""

    def __init__(self, inputs: Any) -> None:
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        self.named = isinstance(inputs, Mapping)
        if not isinstance(inputs, Mapping | Sequence):
            raise ExportError(f"inputs must be a tensor, a tuple or a mapping of tensors, not {type(inputs).__name__}")
        self.tensors: dict[Any, Tensor] = dict(inputs if self.named else enumerate(inputs))
        if not self.tensors or not all(isinstance(value, Tensor) and value.ndim for value in self.tensors.values()):
            raise ExportError("inputs must be a tensor, a tuple or a mapping of tensors, the first dimension rows")
        counts = {len(value) for value in self.tensors.values()}
        if len(counts) > 1 or min(counts) < 2:
            raise ExportError(f"inputs need two rows at least, the same number in each; they have {sorted(counts)}")
        self.rows = counts.pop()

    def to(self, device: torch.device) -> None:
        self.tensors = {key: value.detach().to(device) for key, value in self.tensors.items()}

    def part(self, rows: slice) -> list[Tensor]:
        return [value[rows] for value in self.tensors.values()]

    def batches(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.rows, _BATCH):
            yield self.part(slice(start, start + _BATCH))

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), dict(zip(self.tensors, tensors, strict=True))) if self.named else (tuple(tensors), {})

    def shapes(self, sequence: bool) -> Any:
        """Free dimensions: the rows, and with `sequence` the columns of tokens."""
        rows, columns = torch.export.Dim("batch"), torch.export.Dim("sequence")
        shapes = {
            key: {0: rows, 1: columns} if sequence and _are_tokens(value) else {0: rows}
            for key, value in self.tensors.items()
        }
        return shapes if self.named else tuple(shapes.values())

    @property
    def tokens(self) -> bool:
        return any(map(_are_tokens, self.tensors.values()))


def _are_tokens(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


def outputs_of(model: nn.Module, batch: Inputs, tensors: list[Tensor]) -> list[Tensor]:
    args, kwargs = batch.arguments(tensors)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
