"""Layers that read the same tensor, as query, key and value do, share one quantizer, and what it gives is computed once.

The first of them, the owner, has the quantizer as its module; files have it there alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ModelError
from .base import DaqLayer
from .observers import all_reduce
from .quantizers import is_shard, processes

_LISTS = (nn.ModuleList, nn.ModuleDict)


class SharedResult:
    """What was computed from a tensor for layers that have not all asked for it yet. Nothing keeps the tensor alive, and
    with it goes the result."""

    def __init__(self, x: Tensor, state: tuple[Any, ...], result: Tensor) -> None:
        self.state, self.results = state, [result]
        self.served: set[int] = set()
        self.source = weakref.ref(x, partial(_clear, self.results))

    def fits(self, x: Tensor, state: tuple[Any, ...]) -> bool:
        """Whether the result is that of this very tensor, to which nothing was written since, and of nothing else."""
        return self.source() is x and len(state) == len(self.state) and all(map(_same, state, self.state))


def _clear(results: list[Tensor], _: Any) -> None:
    results.clear()


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, Tensor) and bool(one == other))


def once(layer: DaqLayer, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(x)`, which the layers that share a quantizer compute in the first of them."""
    owner = layer.input_owner or layer
    if owner is not layer and is_shard(owner.a_quant.lower):
        raise ModelError(
            f"layer {layer.daq_name!r} uses the input bounds of layer {owner.daq_name!r}, which is sharded by itself; shard the block "
            "that holds both: fully_shard(block)"
        )
    if owner.input_readers == 1 or not _can_tell(x, owner.a_quant.lower):
        return compute(x)
    state = _state(owner.a_quant, x)
    known: SharedResult | None = owner.__dict__.pop("_shared_result", None)
    # A layer that comes again has another input, even if nothing tells so.
    if known is None or id(layer) in known.served or not known.fits(x, state):
        known = SharedResult(x, state, compute(x))
    (result,) = known.results
    known.served.add(id(layer))
    if len(known.served) < owner.input_readers:
        owner.__dict__["_shared_result"] = known
    return result


def _can_tell(x: Tensor, bound: Tensor) -> bool:
    """Whether it can be known that nothing was written to a tensor. While torch compiles, its compiler joins what is
    computed twice."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    plain = type(x) is Tensor and (x.is_cpu or x.is_cuda) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and not x.is_inference() and not bound.is_inference()


def _state(quantizer: Any, x: Tensor) -> tuple[Any, ...]:
    """All that decides over the result besides the numbers of `x`."""
    lower, upper = quantizer.lower, quantizer.upper
    learning = torch.is_grad_enabled(), x.requires_grad, lower.requires_grad, upper.requires_grad
    # What is saved for the backward inside of a checkpoint belongs there.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    numbers = x._version, x.data_ptr(), lower._version, upper._version
    return (
        lower,
        upper,
        *numbers,
        *learning,
        *(hooks or (None, None)),
        quantizer.result_dtype(x),
        quantizer.training,
        stream,
    )


def share_input(layer: Any, owner: Any) -> None:
    """Let a layer use the quantizer of another one, in place of its own."""
    layer._modules.pop("a_quant", None)
    layer.input_owners = (owner,)
    owner.input_readers += 1


class Readers:
    """Which layers read the same tensors, from what goes through them, in the order of calls.

    sequences: layer -> a number that stands for the tensors it has read.
    """

    def __init__(self) -> None:
        self.sequences: dict[str, int] = {}
        self._count = 0
        self._alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def read(self, name: str, x: Tensor) -> None:
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
    alike; each layer with quantized inputs is in one of them, in the order of the model."""
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


def link(layers: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Let layers share the quantizers that the entries of a config name, which has checked them."""
    for name, entry in entries.items():
        if "same_input_as" in entry and name in layers:
            share_input(layers[name], layers[entry["same_input_as"]])


def regroup(
    layers: Mapping[str, Any], groups: Iterable[Sequence[str]], quantizers: Mapping[str, Any]
) -> dict[str, str]:
    """Let the layers of each group share the quantizer of its first one.

    Returns:
        layer -> the one whose quantizer it uses, by their names in the model that was quantized.
    """
    owners = {}
    for first, *others in groups:
        for name in (first, *others):
            for key in ("input_owners", "input_readers", "_shared_result"):
                layers[name].__dict__.pop(key, None)
            layers[name]._modules["a_quant"] = quantizers[name]
        for name in others:
            share_input(layers[name], layers[first])
            owners[layers[name].daq_name] = layers[first].daq_name
    return owners


def groups_left(before: Mapping[str, Any], layers: Mapping[str, Any]) -> list[list[str]]:
    """The groups there were, of the layers that are left of them."""
    groups: dict[Any, list[str]] = {}
    for name, layer in before.items():
        if name in layers and layer.a_quant is not None:
            groups.setdefault(layer.input_owner or layer, []).append(name)
    return list(groups.values())


def with_owners(entries: Mapping[str, Mapping[str, Any]], owners: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The entries of a config with these layers sharing quantizers, and no others."""
    changed = {name: {key: entry[key] for key in ("weight_bits", "activation_bits")} for name, entry in entries.items()}
    for name, owner in owners.items():
        changed[name]["same_input_as"] = owner
    return changed
