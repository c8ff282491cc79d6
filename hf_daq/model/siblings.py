"""Which layers read the same tensors: found from what goes through them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.base import layer_input
from ..nn.observers import all_reduce
from ..nn.quantizers import ActivationQuantizer, processes

_LISTS = (nn.ModuleList, nn.ModuleDict)


class Readers:
    """Which layers read the same tensors, from what goes through them, in the order of calls.

    sequences: layer -> a number that stands for the tensors it has read.
    """

    def __init__(self) -> None:
        self.sequences: dict[str, int] = {}
        self._count, self._lock = 0, Lock()
        self._alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def hook(self, name: str) -> Any:
        """For the forward of a layer."""
        return lambda _, args, kwargs: self.read(name, layer_input(args, kwargs))

    def read(self, name: str, x: Tensor) -> None:
        """Take note of the next input of a layer."""
        with self._lock:
            self.sequences[name] = hash((self.sequences.get(name, 0), self._number(x)))

    def _number(self, x: Tensor) -> int:
        """The same for the same tensor while nothing is written to it."""
        if not x.is_inference():
            source, version, number = self._alive.get(id(x), (lambda: None, 0, 0))
            if source() is x and version == x._version:
                return number
        self._count += 1
        if not x.is_inference():
            key = id(x)
            self._alive[key] = weakref.ref(x), x._version, self._count
        return self._count


def in_one_block(model: nn.Module, one: str, other: str) -> bool:
    """Whether the smallest module with both layers is one block of the network: there is no list of modules between it and
    them, and it is none itself. Blocks may be sharded each by itself, or be on devices of their own."""
    parts, others = one.split("."), other.split(".")
    count = next(index for index, pair in enumerate(zip(parts, others, strict=False)) if pair[0] != pair[1])
    common = model.get_submodule(".".join(parts[:count]))
    if isinstance(common, (*_LISTS, nn.Sequential)):
        return False
    paths = (".".join(path[:size]) for path in (parts, others) for size in range(count + 1, len(path)))
    return not any(isinstance(model.get_submodule(path), _LISTS) for path in paths)


def find_siblings(model: nn.Module, layers: Mapping[str, Any], readers: Readers) -> list[list[str]]:
    """Groups of layers of one block that read the same tensors in every call, on every rank, with quantizers that are
    alike; each layer with bounds of its inputs is in one of them, in the order of the model."""
    names = [name for name, layer in layers.items() if isinstance(layer.a_quant, ActivationQuantizer)]
    found: dict[Any, list[list[str]]] = {}
    for name, sequence in zip(names, _on_all_ranks(names, readers, model), strict=True):
        quantizer = layers[name].a_quant
        kind = sequence, quantizer.bits, quantizer.upper.requires_grad, quantizer.upper.device
        groups = found.setdefault(kind, [])
        group = next((group for group in groups if in_one_block(model, group[0], name)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [group for groups in found.values() for group in groups]


def _on_all_ranks(names: Sequence[str], readers: Readers, model: nn.Module) -> list[tuple[int, ...]]:
    """What each layer has read, on every rank."""
    rank = dist.get_rank() if processes() > 1 else 0
    device = next(model.parameters()).device
    sequences = torch.zeros(processes(), len(names), dtype=torch.int64, device=device)
    sequences[rank] = torch.tensor([readers.sequences.get(name, 0) for name in names], dtype=torch.int64)
    all_reduce(sequences, dist.ReduceOp.SUM)
    return [tuple(column) for column in sequences.T.tolist()]
