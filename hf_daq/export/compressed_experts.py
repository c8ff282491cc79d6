"""Experts of a mixture in the format compressed-tensors: a layer for each expert and projection, under the names that transformers
has on the disk.

transformers unpacks such weights as it opens a folder, into the parameters of all experts, and reads them as one scheme
with weights alone (`pack-quantized`, no zero point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ..errors import ExportError
from ..nn.experts import ExpertsLinear
from ..nn.integers import Integers, integers
from ..nn.packed import daq_layers
from ..nn.split_experts import SplitExperts, expert_layers, fused_experts

_OTHERWISE = (
    "write hf_daq.save_pretrained(model, directory), or leave the experts in full precision, "
    "DaqConfig(..., modules_to_not_convert=[{!r}])"
)


def experts_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in daq_layers(model).items() if isinstance(layer, ExpertsLinear)}


def place_of(name: str, layer: Any) -> tuple[str, str]:
    """The name of the module of the experts, and of the Parameter that holds the weight."""
    parent = name.rpartition(".")[0]
    return parent, f"{parent}.{layer.place[1]}"


def check_experts(model: nn.Module) -> None:
    """Refuse experts that transformers would not open as they are."""
    alike: dict[Any, str] = {}
    layers = experts_layers(model)
    kept = next(_in_full_precision(model), None)
    if layers and kept is not None:
        raise ExportError(
            f"experts of {kept!r} are in full precision and those of {next(iter(layers))!r} are quantized, and transformers reads "
            "all experts of compressed-tensors alike: quantize all of them, or none"
        )
    for name, layer in layers.items():
        parent, _ = place_of(name, layer)
        otherwise = _OTHERWISE.format(parent)
        if layer.a_quant is not None:
            raise ExportError(
                f"layer {name!r} has quantized inputs, and transformers computes experts of compressed-tensors from unpacked "
                "weights: leave the inputs of experts in full precision, "
                f'rules=[{{"pattern": {parent!r}, "activation_bits": None}}, ...]; or {otherwise}'
            )
        if layer.weight_bits == 8 and layer.weight_grid == "odd":
            raise ExportError(
                f"layer {name!r} has weights of 8 bits on the grid 'odd', which need a zero point, and transformers reads none "
                f'for experts: weight_grid="integer"; or {otherwise}'
            )
        alike.setdefault((layer.weight_bits, layer.weight_grid, layer.group_size), name)
        if len(alike) > 1:
            one, other = alike.values()
            raise ExportError(
                f"layers {one!r} and {other!r} differ in bits, grid or groups, and transformers reads all experts of "
                f"compressed-tensors alike: give them the same; or {otherwise}"
            )
        if not _separate(model, name, layer):
            raise ExportError(
                f"transformers keeps the experts of {type(model).__name__} in one tensor on the disk, where compressed-tensors has "
                f"a layer for each: {otherwise}"
            )


def _in_full_precision(model: nn.Module) -> Iterator[str]:
    """The names of modules with experts of which one projection, or both, are not quantized."""
    for name, module in model.named_modules():
        split = isinstance(module, SplitExperts)
        if fused_experts(module) or (
            split and any(type(layer) is ExpertsLinear for layer in expert_layers(module).values())
        ):
            yield name


def _separate(model: Any, name: str, layer: Any) -> bool:
    _, key = place_of(name, layer)
    experts, out, columns = layer.sizes
    found = revert_weight_conversion(model, {key: torch.empty(experts, out, columns, device="meta")})
    return len(found) % experts == 0 and all(name.endswith(".weight") for name in found)


def each_expert(model: Any, name: str, layer: Any) -> Iterator[tuple[str, Integers]]:
    """The layers of experts by their names on the disk."""
    _, key = place_of(name, layer)
    found, (experts, out, columns) = integers(layer), layer.sizes
    scale = found.weight_scale.view(experts, -1, found.weight_scale.shape[-1]).expand(-1, out, -1)
    weights = _split(model, key, found.weight.view(experts, out, columns))
    scales = _split(model, key, scale.contiguous())
    for other, weight in weights.items():
        yield other.removesuffix(".weight"), replace(found, weight=weight, weight_scale=scales[other])


def _split(model: Any, key: str, tensor: Tensor) -> Mapping[str, Tensor]:
    parts: Mapping[str, Tensor] = revert_weight_conversion(model, {key: tensor})
    return parts


def weight_errors(model: nn.Module, opened: nn.Module) -> dict[str, float]:
    """Layer -> relative error of the weight that was opened."""
    errors = {}
    for name, layer in experts_layers(model).items():
        _, key = place_of(name, layer)
        expected = layer.stored(layer.quantized_weight()).float()
        difference = (opened.get_parameter(key).float() - expected).norm()
        errors[name] = float(difference / expected.norm().clamp_min(1e-12))
    return errors
