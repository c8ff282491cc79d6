"""Whether a model is still what its quantization config says: what is written, exported or shown is checked first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import DaqConfig
from ..errors import ConfigError, ModelError
from ..nn.base import DaqLayer
from ..nn.layers import QuantizedLayer
from ..nn.packed import PACKED_TYPES, daq_layers
from ..nn.token import TokenQuantizer
from .roles import refuse_computed

_AGAIN = "write hf_daq.remove_daq(model), then apply_daq and calibrate anew"


def quantized_parts(model: nn.Module) -> list[str]:
    """Names of the parts to which `apply_daq` was applied by themselves."""
    return [name for name, module in model.named_modules() if name and "daq_config" in vars(module)]


def refusal_of_parts(model: nn.Module) -> str:
    """What to tell someone who saves a model of which only a part was quantized, or a part of one that was quantized as a
    whole; empty if it is neither."""
    kind, parts = type(model).__name__, quantized_parts(model)
    if parts:
        return (
            f"part {parts[0]!r} of this {kind} is quantized, and a file of the whole would not say so: save that "
            f"part, hf_daq.save_pretrained(model.get_submodule({parts[0]!r}), directory), or remove_daq from it and apply_daq on "
            "the whole"
        )
    for name, layer in daq_layers(model).items() if "daq_config" not in vars(model) else ():
        place = layer.daq_name.removesuffix(name).rstrip(".")
        what = f"is {place!r} of a model that was" if place else "has layers of a model that was"
        return (
            f"this {kind} {what} quantized as a whole, and a file of it alone would not say so: save the whole, "
            f"hf_daq.save_pretrained(model, directory), or apply_daq to the float {kind}"
        )
    return ""


def check_unchanged(model: nn.Module, adapters: bool = False) -> None:
    """Refuse a quantized model whose layers are not those of its `daq_config`, and let this say which of them divide channels.

    Args:
        adapters: layers may have adapters of PEFT.

    Raises:
        ModelError: a layer was replaced, dropped, moved or added since `apply_daq`, or its weight is computed from others.
    """
    if "_orig_mod" in model._modules:
        raise ModelError("the model is the one that torch.compile returned; write model._orig_mod in its place")
    config: DaqConfig = model.daq_config  # type: ignore[assignment]
    layers, modules, entries = daq_layers(model), dict(model.named_modules()), cast(dict[str, Any], config.layers or {})
    if adapters:
        layers = {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}
    for name, bits in entries.items():
        layer = layers.get(name)
        if layer is None:
            now = f"is a {type(modules[name]).__name__} now" if name in modules else "is gone"
            if _is_adapter(modules.get(name)):
                raise ModelError(
                    f"layer {name!r} has an adapter: model.save_pretrained of PEFT writes the adapter alone; to save the whole "
                    "model, write model = model.merge_and_unload(), or model.unload(), first, or, after add_adapter of transformers, "
                    "open it once more"
                )
            raise ModelError(f"the model has changed since apply_daq: layer {name!r} {now}; {_AGAIN}")
        if _chosen(layer.entry) != _chosen(bits) or (layer.w_quant is None) is not config.packed:
            raise ModelError(
                f"layer {name!r} is not what model.daq_config says: {bits}, packed={config.packed}; {_AGAIN}"
            )
        if other := _differences(layer, config):
            raise ModelError(f"layer {name!r} is not what model.daq_config says: it has {other}; {_AGAIN}")
    for name, layer in layers.items():
        _check_place(name, layer, layers)
        if name not in entries:
            raise ModelError(
                f"the model has changed since apply_daq: its layer {layer.daq_name!r} is {name!r} now, which model.daq_config "
                f"does not name; {_AGAIN}"
            )
    refuse_computed(model)
    entries.update({name: layer.entry for name, layer in layers.items()})


def _differences(layer: Any, config: DaqConfig) -> str:
    """What the quantizers of a layer have that a model with this config would not have."""
    if layer.owner is not None:
        return ""
    kind: Any = (
        type(layer) if layer.w_quant is not None else next(k for k, v in PACKED_TYPES.items() if v is type(layer))
    )
    config = kind.config_of(config, layer)
    options = vars(layer.w_quant) if layer.w_quant is not None else layer.quantizing | {"grid": layer.weight_grid}
    wanted = {
        "grid": config.grid(layer.weight_bits),
        "granularity": config.weight_granularity,
        "normalization": config.weight_normalization,
    }
    found = {key: options[key] for key, value in wanted.items() if options[key] != value}
    if layer.a_quant is not None:
        scale = "token" if isinstance(layer.a_quant, TokenQuantizer) else "static"
        found |= {"activation_scale": scale} if scale != config.activation_scale else {}
    return ", ".join(f"{key}={value!r}" for key, value in found.items())


def _check_place(name: str, layer: DaqLayer, layers: Mapping[str, DaqLayer]) -> None:
    """Refuse a layer whose weight, or a layer that it shares something with, is another one than when it was quantized."""
    if isinstance(layer, QuantizedLayer) and layer.owner is None and not layer.w_quant.fits(layer.weight_shape()):
        raise ModelError(
            f"the weight of layer {name!r} has another shape, {tuple(layer.weight_shape())}, than when it was quantized; {_AGAIN}"
        )
    if layer.owner is not None and (layers.get(layer.owner.daq_name) is not layer.owner or not _is_tied(layer)):
        raise ModelError(
            f"layer {name!r} does not share its weight with {layer.owner.daq_name!r} any more, as it did when both were "
            f"quantized as one; write model.tie_weights(), or {_AGAIN.removeprefix('write ')}"
        )
    if layer.input_owner is not None and layers.get(layer.input_owner.daq_name) is not layer.input_owner:
        raise ModelError(
            f"layer {name!r} uses the input bounds of layer {layer.input_owner.daq_name!r}, which is not the layer of that name any "
            f"more; {_AGAIN}"
        )


def check_opens(tensors: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
    """Refuse to write tensors that do not fit the model that their description builds.

    Args:
        tensors: name -> tensor.
        build: of the quantized model as it will be opened; called on the meta device.

    Raises:
        ModelError: a name or a shape differs.
    """
    if problem := difference(tensors, build):
        raise ModelError(
            f"the model has changed since it was built, and its file would not open as the same model: {problem}. Change a "
            f"model by its own methods (reset_classifier, resize_token_embeddings) and config, then {_AGAIN}"
        )


def difference(tensors: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> str:
    """How tensors differ from those of the model that their description builds; empty where they do not. Arguments as of
    `check_opens`."""
    with torch.device("meta"):
        try:
            expected = build().state_dict()
        except ConfigError as error:
            return str(error)
        except Exception:  # a class that its description alone does not build: there is nothing to compare with
            return ""
    missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing:
        return f"it lacks {missing[0]!r}"
    if more:
        return f"it has {more[0]!r}, which a model built as it was does not have"
    if shapes:
        name = min(shapes)
        return f"it has {name!r} of shape {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
    return ""


def _chosen(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a state dict that is loaded decides, as `calibrate` does."""
    return {key: value for key, value in entry.items() if key != "smooth"}


def _is_tied(layer: Any) -> bool:
    return layer.w_quant is None or layer.weight is layer.owner.weight


def _is_adapter(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", None), DaqLayer)
