"""Layers with a special place in a network: those that stay in full precision unless a rule says otherwise (`outer_layers`),
and those that cannot be quantized by themselves (`tied_layers`, `bypassed_layers`). timm and transformers models are known by their
methods, not by their classes."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ModelError
from ..nn.attention import DaqMultiheadAttention, has_switch, projections
from ..nn.base import DaqLayer
from ..nn.experts import ExpertsLinear
from ..nn.layers import CONVOLUTIONS, LAYER_TYPES, TRANSPOSED
from ..nn.packed import PackedLayer
from ..nn.split_experts import SplitExperts, fused_experts
from ..nn.tied import TIED_TYPES
from ..nn.weight_norm import Normed, normed_type
from .source import Read, weights_read_by
from .traced import likely_ends, traced_ends

_ROUTER_NAMES = ("gate", "shared_expert_gate", "router")


def weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a weight of two or more dimensions: convolutions, linear layers, and all that resembles them. Of
    fused experts, the layers into which they can be split, though they are no modules of the model yet."""
    inside: set[str] = set()  # of layers whose weight is computed
    for name, module in model.named_modules():
        if layers := fused_experts(module):
            yield from ((f"{name}.{key}".lstrip("."), ExpertsLinear(module, own)) for key, own in layers.items())
            continue
        if isinstance(module, ExpertsLinear) and not isinstance(module, PackedLayer):
            yield name, module
        if isinstance(module, ExpertsLinear | SplitExperts):
            continue
        if issubclass(type(module), tuple(LAYER_TYPES)) and parametrize.is_parametrized(module, "weight"):
            yield name, module
            inside.add(f"{name}.parametrizations.weight".lstrip("."))
            continue
        if name in inside:
            continue
        if isinstance(module, DaqMultiheadAttention) and isinstance(
            module.q_proj, DaqLayer
        ):  # the projections are layers
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and (
                "weight" in parameter_name or (parameter.ndim >= 3 and min(parameter.shape) > 1)
            ):
                yield name, module
                break


# --------------------------------------------------------------------------------------- first and last layers


def outer_layers(model: nn.Module) -> dict[str, str]:
    """Names of the layers that read the input or give the output of a network, with the reason.

    timm models say so themselves (`pretrained_cfg`, `get_classifier`). In transformers models they are the convolution or
    patch embedding that reads the image, the output embedding, and all that lies outside of the base model. For others
    they are found by `traced_ends`, and where the forward cannot be traced by `likely_ends`. Where the names of a timm
    model do not fit (it renames layers for `features_only`), they are the first convolution with those beside it that read
    as many channels, or the first layer, where there is none.
    """
    layers = dict(weight_modules(model))
    if is_transformers_model(model):
        return _outer_layers_of_transformers(model, layers)
    if getattr(model, "pretrained_cfg", None) or callable(getattr(model, "get_classifier", None)):
        return _outer_layers_of_timm(model, layers)
    return _outer_layers_of_any(model, layers)


def _outer_layers_of_any(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    traced = traced_ends(model, layers)
    rule = "in the traced forward" if traced else "by its channels (the forward cannot be traced)"
    first, last = traced or likely_ends(layers)
    return {**dict.fromkeys(last, f"last layer {rule}"), **dict.fromkeys(first, f"first layer {rule}")}


def is_transformers_model(model: Any) -> bool:
    return hasattr(model, "base_model_prefix") and hasattr(model, "get_output_embeddings") and hasattr(model, "config")


def _outer_layers_of_timm(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    names = list(layers)
    config = getattr(model, "pretrained_cfg", None) or {}
    first = _below(names, _as_names(config.get("first_conv"))) or _first_convolutions(layers) or names[:1]
    last = _below(names, _as_names(config.get("classifier")))
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        try:
            found = get_classifier()
        except AttributeError:  # what some networks of timm raise where they have no head
            found = None
        heads = [id(module) for head in _flatten(found) for module in head.modules()]
        last += [name for name, module in layers.items() if id(module) in heads and name not in last]
    return {**dict.fromkeys(last, "classifier"), **dict.fromkeys(first, "first layer")}


def _outer_layers_of_transformers(model: Any, layers: dict[str, nn.Module]) -> dict[str, str]:
    base = model.base_model_prefix
    if isinstance(getattr(model, base, None), nn.Module):
        heads = [name for name in layers if not name.startswith(base + ".")]
    else:  # the base model itself, or a model without one
        heads = [name for name in layers if "." not in name]
    output = model.get_output_embeddings()
    heads += [name for name, module in layers.items() if module is output]
    outer = dict.fromkeys(heads, "head")
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        named_so = last in _ROUTER_NAMES or parent.endswith("router")
        scores = isinstance(module, nn.Linear) and module.out_features < module.in_features
        if (named_so and scores) or "Router" in type(module).__name__:
            outer[name] = "router"
    kinds = CONVOLUTIONS[1:] if model.main_input_name == "input_ids" else CONVOLUTIONS  # of text they are not the first
    first = [name for name in layers if "patch_embed" in name] or _first_convolutions(layers, kinds)
    outer |= dict.fromkeys(first, "first layer")
    for name, module in model.named_modules():
        if name and getattr(module, "pretrained_cfg", None):  # a timm model in a transformers one
            inside = _outer_layers_of_timm(module, dict(weight_modules(module)))
            outer |= {f"{name}.{key}": reason for key, reason in inside.items()}
    return outer


def _first_convolutions(layers: dict[str, nn.Module], kinds: tuple[Any, ...] = (nn.Conv2d,)) -> list[str]:
    channels: dict[str, Any] = {
        name: module.in_channels for name, module in layers.items() if isinstance(module, kinds)
    }
    if not channels:
        return []
    first = next(iter(channels))
    block = first.partition(".")[0]
    return [name for name in channels if name.partition(".")[0] == block and channels[name] == channels[first]]


# ------------------------------------------------------------------------------- layers that are not only layers


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """Names of layers whose weight a module around them reads without calling the layer, with the reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for path, key in _read_directly(module):
            for child, layer in _at(module, path):
                if type(layer) in LAYER_TYPES and key == "weight":
                    names = [child]
                else:
                    names = [f"{child}.{part}" for part in projections(layer) if key != "weight"]
                reason = f"{type(module).__name__} reads its weight directly"
                found |= {f"{name}.{each}".lstrip("."): reason for each in names}
    return found


def _at(module: nn.Module, path: tuple[str, ...], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what a path leads to, in which "*" is every child."""
    if not path:
        yield name, module
        return
    for child, inside in module.named_children():
        if path[0] in (child, "*"):
            yield from _at(inside, path[1:], f"{name}.{child}".lstrip("."))


def refused_tables(model: nn.Module) -> dict[str, str]:
    """Names of embeddings with an option that quantized ones have not, with the reason."""
    options = ("max_norm", "sparse", "scale_grad_by_freq")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and (
            option := next((key for key in options if getattr(module, key)), None)
        ):
            found[name] = f"has {option}={getattr(module, option)!r}, and no quantized form"
    return found


def bias_tables(model: nn.Module) -> set[str]:
    """Names of embeddings whose rows are added to attention scores, or to outputs: small, and not to be rounded. T5, MPNet and
    WavLM have a column for each head in them."""
    found = set()
    for name, module in model.named_modules():
        for child, table in module.named_children():
            heads = (getattr(module, key, None) for key in ("n_heads", "num_heads", "num_attention_heads"))
            if isinstance(table, nn.Embedding) and ("bias" in child or table.embedding_dim in heads):
                found.add(f"{name}.{child}".lstrip("."))
    return found


def tied_tables(model: nn.Module, refused: Container[str]) -> dict[str, str]:
    """Layers that share one weight, which can be quantized for all of them: name -> the first embedding among them.

    Args:
        refused: names of layers that cannot be quantized.
    """
    modules = dict(model.named_modules())
    groups: dict[str, set[str]] = {}
    for one, other in _tied_pairs(model):
        names = {name.removesuffix(".weight") for name in (one, other)}
        if one.endswith(".weight") and other.endswith(".weight"):
            group = set().union(names, *(groups.get(name, ()) for name in names))
            groups |= dict.fromkeys(group, group)
    found = {}
    for name, group in groups.items():
        tables = [other for other in modules if other in group and isinstance(modules[other], nn.Embedding)]
        fit = all(type(modules.get(other)) in TIED_TYPES and other not in refused for other in group)
        if tables and fit:
            found[name] = tables[0]
    return found


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Names of layers whose weight belongs to another module too, with the reason."""
    tied = {}
    for target, source in _tied_pairs(model):
        for one, other in ((target, source), (source, target)):
            if one.endswith(".weight"):
                tied[one.removesuffix(".weight")] = f"shares its weight with {other.removesuffix('.weight')}"
    return tied


def _tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of parameters that are, or will be, one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    # While transformers loads a model, its weights are not tied yet.
    pairs = list(getattr(model, "all_tied_weights_keys", {}).items())
    pairs += [(name, names[0]) for names in owners.values() for name in names[1:]]
    return pairs


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Layers whose weight or bias is no Parameter but computed from others, as pruning and spectral normalization do it, with the
    call that makes it one again. Weight normalization is no such case: it has a quantized form."""
    found = {}
    for name, module in model.named_modules():
        known = issubclass(type(module), tuple(LAYER_TYPES))
        if known and not isinstance(module, Normed) and normed_type(module) is None:
            for key in ("weight", "bias"):
                if call := _call_to_undo(module, key):
                    found[name] = call
    return found


def refuse_computed(model: nn.Module, by: str = "") -> None:
    """Refuse a model with quantized layers that compute their weight or bias from others by now.

    Args:
        by: "parametrize" for such layers of torch.nn.utils.parametrize alone, to which no other class can be given.
    """
    for name, call in computed_weights(model).items():
        if by in call and isinstance(model.get_submodule(name), DaqLayer):
            raise ModelError(
                f"quantized layer {name!r} computes its weight or bias from other parameters; write {call}, with "
                f"layer = model.get_submodule({name!r})"
            )


def refuse_scripted(model: nn.Module) -> None:
    """Refuse a model that is TorchScript, or has a part that is: no hook sees what runs there."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"part {name!r} of the model" if name else "the model"
            raise ModelError(
                f"{what} is TorchScript, which cannot be changed; put the module there that it was made of"
            )


def kept_computed_weights(model: nn.Module) -> dict[str, str]:
    """Those of `computed_weights` that stay in full precision, with the reason."""
    kinds = (nn.Conv1d, nn.Conv3d, *TRANSPOSED)
    return {
        name: f"its weight is computed; {call} makes it one"
        for name, call in computed_weights(model).items()
        if isinstance(model.get_submodule(name), kinds)
    }


def unusual_weights(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers whose weight has no numbers, or none that are rounded -> why they stay in full precision."""
    found = {}
    for name, module in modules.items():
        if type(module) in LAYER_TYPES:
            weight = largest_weight(module)
            if weight.numel() == 0:
                found[name] = "has no weights"
            elif not weight.is_floating_point() or weight.itemsize < 2:
                found[name] = f"has a weight of {weight.dtype}"
    return found


def _call_to_undo(module: nn.Module, key: str) -> str | None:
    if parametrize.is_parametrized(module, key):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {key!r})"
    if f"{key}_g" in module._parameters:
        return f"torch.nn.utils.remove_weight_norm(layer, {key!r})"
    if f"{key}_orig" not in module._parameters:
        return None
    pruned = f"{key}_mask" in module._buffers
    return f"torch.nn.utils.{'prune.remove' if pruned else 'remove_spectral_norm'}(layer, {key!r})"


def _read_directly(module: nn.Module) -> frozenset[Read]:
    if hasattr(module, "qkv_bias_separate"):  # timm's BEiT, EVA and Swin-v2, which `patch` tells to call the layer
        return frozenset()
    if projections(module) or has_switch(module):  # which get projections as layers, and lose their fast path
        return frozenset()
    if getattr(module, "pretraining_tp", None) == 1:  # Bloom slices its weights only to repeat a parallel training
        return frozenset()
    return frozenset().union(*(weights_read_by(base) for base in type(module).__mro__ if "forward" in vars(base)))


def _below(names: list[str], roots: list[str]) -> list[str]:
    return [name for name in names if any(name == root or name.startswith(root + ".") for root in roots)]


def _as_names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _flatten(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    return [module for item in value for module in _flatten(item)] if isinstance(value, (list, tuple)) else []


def saved_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers, each once."""
    found: dict[int, Tensor] = {id(value): value for value in model.parameters()}
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[id(value)] = value
    return list(found.values())


def largest_weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else max(module.parameters(recurse=False), key=Tensor.numel)
