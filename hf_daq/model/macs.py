"""Multiply-accumulates of layers with weights, from what goes through them. Products inside of attention are not counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn.attention import PROJECTIONS, projections
from ..nn.base import DaqLayer
from ..nn.experts import ExpertsLinear
from ..nn.layers import CONVOLUTIONS, TRANSPOSED, evaluating
from ..nn.split_experts import fused_experts, pair_count
from .batch import examples_in, run
from .roles import largest_weight


def macs_of(layer: Any, x: Tensor | None, output: Any) -> int | None:
    """Those of one call of a layer, float, quantized or packed; 0 for a look-up, None for classes that are not known."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return 0
    if isinstance(layer, ExpertsLinear):
        return int(output.numel()) * layer.weight_shape()[-1]
    size = math.prod(layer.weight_shape() if isinstance(layer, DaqLayer) else largest_weight(layer).shape)
    if isinstance(layer, TRANSPOSED) and x is not None:
        return x.numel() * size // layer.in_channels
    if isinstance(layer, CONVOLUTIONS):
        return int(output.numel()) * size // layer.out_channels
    if isinstance(layer, nn.Linear | Conv1D) and not isinstance(output, Tensor):  # a router, which gives more than one
        return None if x is None else x.numel() * size // x.shape[-1]
    if isinstance(layer, nn.Linear | Conv1D):
        return int(output.numel()) * size // (layer.out_features if isinstance(layer, nn.Linear) else layer.nf)
    return None


def macs_of_projections(attention: nn.MultiheadAttention, args: tuple[Any, ...], named: Mapping[str, Any]) -> list[int]:
    """Those of one call, of queries, keys, values, and of the output."""
    names = ("query", "key", "value")
    read = [*args[:3], *(named[name] for name in names[len(args[:3]) :])]
    return [value.numel() * attention.embed_dim for value in (*read, read[0])]


@torch.no_grad()
def count_macs(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> dict[str, int]:
    """Those for one example of the layers of a float model that a forward in evaluation mode reaches, by name.

    Args:
        layers: by name; also projections and experts, which are no modules of the model.
    """
    macs: dict[str, int] = {}

    def add(name: str, count: int | None) -> None:
        if name in layers and count is not None:
            macs[name] = macs.get(name, 0) + count

    examples = max(examples_in(inputs), 1)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(evaluating(model))
        for name, module in model.named_modules():
            if hasattr(module, "qkv_bias_separate"):  # timm's, which reads the weight of a layer unless told to call it
                stack.callback(setattr, module, "qkv_bias_separate", module.qkv_bias_separate)
                module.qkv_bias_separate = True  # type: ignore[assignment]
            if hook := _hook(name, module, layers, add):
                stack.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        run(model, inputs)
    return {name: round(count / examples) for name, count in macs.items()}


def _hook(
    name: str, module: Any, layers: Mapping[str, nn.Module], add: Callable[[str, int | None], None]
) -> Callable[..., None] | None:
    parts, prefix = fused_experts(module), f"{name}." if name else ""

    def of_experts(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        pairs = pair_count(module, (*args, *named.values()))
        for part, parameter in parts.items():
            add(prefix + part, pairs * math.prod(ExpertsLinear(module, parameter).sizes[1:]))

    def of_attention(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        counts = macs_of_projections(module, args, named)
        for part, count in zip((*PROJECTIONS, "out_proj"), counts, strict=True):
            add(prefix + part, count)

    def of_layer(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        add(name, macs_of(module, first_tensor(args, named), output))

    if parts:
        return of_experts
    if projections(module):
        return of_attention
    return of_layer if name in layers else None


def first_tensor(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """The first of those that a module was called with."""
    return next((value for value in (*args, *named.values()) if isinstance(value, Tensor)), None)
