"""Layers that read the same tensor, as query, key and value do, share one quantizer, and what it gives is computed once.

The first of them, the owner, has the quantizer as its module; files have it there alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .base import DaqLayer, set_input_quantizer
from .quantizers import is_shard


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
    if owner.input_readers == 1:
        return compute(x)
    bounds: tuple[Tensor, ...] = tuple(owner.a_quant._parameters.values())
    if owner.a_quant.smooth is not None:
        bounds = *bounds, owner.a_quant.smooth
    if owner is not layer and any(map(is_shard, bounds)):
        raise ModelError(
            f"layer {layer.daq_name!r} uses the input bounds of layer {owner.daq_name!r}, which is sharded by itself; shard the block "
            "that holds both: fully_shard(block)"
        )
    if not _can_tell(x, *bounds):
        return compute(x)
    state = _state(owner.a_quant, bounds, x)
    known: SharedResult | None = owner.__dict__.pop("_shared_result", None)
    # A layer that comes again has another input, even if nothing tells so.
    if known is None or id(layer) in known.served or not known.fits(x, state):
        known = SharedResult(x, state, compute(x))
    (result,) = known.results
    known.served.add(id(layer))
    if len(known.served) < owner.input_readers:
        owner.__dict__["_shared_result"] = known
    return result


def _can_tell(x: Tensor, *bounds: Tensor) -> bool:
    """Whether it can be known that nothing was written to a tensor. While torch compiles, its compiler joins what is
    computed twice."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    plain = type(x) is Tensor and (x.is_cpu or x.is_cuda) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and not any(tensor.is_inference() for tensor in (x, *bounds))


def _state(quantizer: Any, bounds: tuple[Tensor, ...], x: Tensor) -> tuple[Any, ...]:
    """All that decides over the result besides the numbers of `x`."""
    tensors = x, *bounds
    learning = torch.is_grad_enabled(), *(tensor.requires_grad for tensor in tensors)
    # What is saved for the backward inside of a checkpoint belongs there.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    written = x.data_ptr(), *(tensor._version for tensor in tensors)
    kind = quantizer.result_dtype(x), quantizer.training, stream
    return *bounds, *written, *learning, *(hooks or (None, None)), *kind


def share_input(layer: Any, owner: Any) -> None:
    """Let a layer use the quantizer of another one, in place of its own."""
    layer._modules.pop("a_quant", None)
    layer.input_owners = (owner,)
    owner.input_readers += 1


def link(layers: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Let layers share the quantizers that the entries of a config name, which has checked them, and give quantizers a place
    for what they divide channels by."""
    for name, entry in entries.items():
        if "smooth" in entry and name in layers:
            quantizer = layers[name].a_quant
            quantizer.smooth = torch.ones(
                layers[name].weight_shape()[1], device=quantizer.lower.device, dtype=torch.float32
            )
        if "same_input_as" in entry and name in layers:
            share_input(layers[name], layers[entry["same_input_as"]])


def regroup(layers: Mapping[str, Any], groups: Iterable[Sequence[str]], quantizers: Mapping[str, Any]) -> None:
    """Let the layers of each group share the quantizer of its first one."""
    for first, *others in groups:
        for name in (first, *others):
            for key in ("input_owners", "input_readers", "_shared_result"):
                layers[name].__dict__.pop(key, None)
            set_input_quantizer(layers[name], quantizers[name])
        for name in others:
            share_input(layers[name], layers[first])


def groups_left(before: Mapping[str, Any], layers: Mapping[str, Any]) -> list[list[str]]:
    """The groups there were, of the layers that are left of them."""
    groups: dict[Any, list[str]] = {}
    for name, layer in before.items():
        if name in layers and layer.a_quant is not None:
            groups.setdefault(layer.input_owner or layer, []).append(name)
    return list(groups.values())
