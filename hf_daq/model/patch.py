"""Patch a model in place and undo it: the part of `apply_daq` and `remove_daq` that any `nn.Module` shares."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..config import DaqConfig, pattern_matches
from ..errors import CalibrationError, ModelError
from ..nn.attention import allocate, join, release, split, switch_fast_paths
from ..nn.base import DaqLayer, check_calibrated, check_finite, weight_problem
from ..nn.init import start_from_weight
from ..nn.layers import LAYER_TYPES, QuantizedLayer, quantize_layer, quantized_layers, restore_layer
from ..nn.leaf import ONLOAD
from ..nn.packed import daq_layers, pack_layer, packed_layers, unpack_layer
from ..nn.quantizers import is_shard
from ..nn.siblings import groups_left, link, regroup
from ..nn.split_experts import join_experts, split_experts
from ..nn.swap import hides_forward, uninterrupted
from ..nn.tied import tie_layer, unpack_tied
from ..nn.weight_norm import give_norms_back, hold_norms
from .guards import ORDER, refuse_wrapped, watch
from .plan import Plan, plan
from .roles import computed_weights, kept_computed_weights, refuse_computed, refuse_scripted
from .shares import too_little
from .unchanged import check_unchanged, quantized_parts

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "DeepSpeedEngine",
)
logger = logging.getLogger("hf_daq")


def patch(model: nn.Module, config: DaqConfig) -> None:
    """Give the planned layers their quantized classes (or packed ones), with quantizers without values, and keep
    the resolved config as `model.daq_config`. The model may be on the meta device. On an error it is left as it was."""
    check_float_model(model)
    _check_computed_weights(model, config)
    planned = plan(model, config)
    if not planned.quantized:
        raise ModelError(f"nothing to quantize in {type(model).__name__}:\n{planned}")
    holders = _holders(model, planned.quantized)
    _check_forwards(holders)
    split_experts(holders.values())
    hold_norms(holders.values())
    split(model.get_submodule(name.rpartition(".")[0]) for name in planned.quantized)
    for name, row in planned.quantized.items():
        assert row.weight_bits is not None
        layer: Any = model.get_submodule(name)
        if row.tied_to is not None:
            continue
        quantize_layer(layer, name, config, row.weight_bits, row.activation_bits)
        if not layer._sources()[0].requires_grad:
            for quantizer in layer.quantizers.values():
                quantizer.requires_grad_(False)
    for name, row in planned.quantized.items():
        if row.tied_to is not None:
            tie_layer(model.get_submodule(name), model.get_submodule(row.tied_to), name, config)  # type: ignore[arg-type]
    link(quantized_layers(model), config.layers or {})
    if config.packed:
        for layer in _tied_first(quantized_layers(model)):
            pack_layer(layer, values=False)
        release(model)
    _use_qkv_as_a_layer(model)
    switch_fast_paths(model, False, DaqLayer)
    bits = {
        name: {
            **(config.layers or {}).get(name, {}),
            "weight_bits": row.weight_bits,
            "activation_bits": row.activation_bits,
        }
        for name, row in planned.quantized.items()
    }
    set_config(model, config.replace(layers=bits))
    watch(model)
    if config.layers is None:
        _warn(planned)


def _warn(planned: Plan) -> None:
    """One message of what stays in float although nothing asks for it."""
    found, share = [], planned.totals["share_of_parameters"]
    if planned.unsupported:
        kinds = {f"{row.kind}: {row.reason}" for row in planned.unsupported.values()}
        found.append(
            f"{len(planned.unsupported)} modules with weights stay in full precision although nothing asks for it "
            f"({'; '.join(sorted(kinds))})"
        )
    if too_little(planned.in_float, planned.parameters):
        found.append(f"{share:.1%} of the parameters are quantized; the rest: {planned.rest}")
    if found:
        logger.warning("%s; hf_daq.plan(model, ...) lists them", ". ".join(found))


def start_weights(model: nn.Module) -> None:
    """Set the weight quantizers from the float weights. Layers without values (on the meta device) are left out."""
    config: DaqConfig = model.daq_config  # type: ignore[assignment]
    for layer in quantized_layers(model).values():
        if layer.owner is None and not layer.weight.is_meta:
            start_from_weight(layer.w_quant, layer.float_weight(), config.weight_init)


def _tied_first(layers: Mapping[str, Any]) -> list[Any]:
    return sorted(layers.values(), key=lambda layer: layer.owner is None)


def restart_weights(model: nn.Module) -> None:
    """Set the weight quantizers of a calibrated model from its weights; refuses before anything is changed."""
    layers = quantized_layers(model)
    if not layers:
        state = "packed: hf_daq.unpack(model) comes first" if packed_layers(model) else "not quantized, or wrapped"
        raise ModelError(f"restart needs the model that apply_daq returned; this one is {state}")
    _refuse_part(model, "restart")
    _refuse_offloaded(model)
    for name, layer in layers.items():
        if is_shard(layer.first_parameter):
            raise ModelError("restart needs whole weights, and the model is sharded: restart before it is prepared")
        if not layer.calibrated:
            raise CalibrationError(f"layer {name!r} is not calibrated: `with hf_daq.calibrate(model): model(batch)`")
        if problem := weight_problem(layer.float_weight()):
            raise CalibrationError(f"the weight of layer {name!r} has {problem}")
    with uninterrupted():
        for layer in layers.values():
            if layer.owner is None:
                start_layer(layer, model.daq_config)  # type: ignore[arg-type]


def start_layer(layer: QuantizedLayer, config: DaqConfig) -> None:
    """Set the weight quantizer of a layer from its float weight, for the input bounds that it has."""
    start_from_weight(layer.w_quant, layer.float_weight(), config.weight_init)
    if layer.a_quant is not None:
        with torch.no_grad():
            layer.w_quant.scale.mul_(layer.a_quant.span)


def quantize_replaced(model: nn.Module, before: dict[str, DaqLayer]) -> None:
    """Quantize the layers that took the places of quantized ones, with the bits and input bounds of those; places where
    nothing of the kind is left, and the layers of a packed model, are float from now on."""
    config: DaqConfig = model.daq_config  # type: ignore[assignment]
    assert config.layers is not None
    modules, bits, replaced = dict(model.named_modules()), dict(config.layers), []
    for name in config.layers:
        layer: Any = modules.get(name)
        if isinstance(layer, DaqLayer):
            continue
        hold_norms(() if layer is None or config.packed else (layer,))
        if type(layer) not in LAYER_TYPES or config.packed:
            del bits[name]
            continue
        quantize_layer(layer, name, config, bits[name]["weight_bits"], None)
        replaced.append(layer)
    quantizers = {name: layer.a_quant for name, layer in before.items()}
    left = {name: layer for name, layer in daq_layers(model).items() if name in bits}
    regroup(left, groups_left(before, left), quantizers)
    for layer in replaced:
        if layer.smooth is not None and len(layer.smooth) != layer.weight_shape()[1]:
            layer.a_quant.smooth = None
    for layer in replaced:
        if not layer.weight.is_meta:
            start_layer(layer, config)
    set_config(model, config.replace(layers=bits | {name: layer.entry for name, layer in left.items()}))


def set_config(model: nn.Module, config: DaqConfig | None) -> None:
    """Write `daq_config`, or take it away."""
    if config is None:
        vars(model).pop("daq_config", None)
    else:
        model.daq_config = config  # type: ignore[assignment]
    if isinstance(model, GraphModule):  # a copy of one has no other attributes
        kept = model.meta.setdefault("_user_preserved_attributes", {})
        kept.pop("daq_config", None)
        if config is not None:
            kept["daq_config"] = config


def unpatch(model: nn.Module, quantized: bool = False) -> None:
    """Give back the float layers; with `quantized` with the quantized weights in them."""
    if quantized and packed_layers(model):
        unpack_layers(model)
    layers = quantized_layers(model)
    if not layers:
        raise ModelError(
            "the model is packed and has no float weights; write remove_daq(model, weights='quantized')"
            if packed_layers(model)
            else "the model is not quantized: there is nothing to remove"
        )
    _refuse_part(model, "remove_daq")
    refuse_computed(model, "" if quantized else "parametrize")
    if quantized:
        _refuse_offloaded(model)
        values = {name: layer.as_parameter(_dequantized_weight(name, layer)) for name, layer in layers.items()}
        gained = [name for name, layer in layers.items() if layer.bias is None and layer.w_quant.shift is not None]
        if gained:
            logger.warning(
                "%d layers gain a bias, the correction of their outputs (%s...); a model built anew does not load it. "
                "DaqConfig(bias_correction=False) has none",
                len(gained),
                gained[0],
            )
        with torch.no_grad():
            for name, layer in layers.items():
                bias = layer.quantized_bias()
                if bias is not None and layer.w_quant.shift is not None:
                    layer.bias = nn.Parameter(bias.clone())
                layer.write_weight(values[name])
    for layer in layers.values():
        restore_layer(layer)
    join_experts(model)
    join(model)
    give_norms_back(model)
    switch_fast_paths(model, True)
    for module in model.modules():
        if hasattr(module, "daq_qkv_bias_separate"):
            module.qkv_bias_separate = module.daq_qkv_bias_separate
            del module.daq_qkv_bias_separate
    set_config(model, None)


def pack_layers(model: nn.Module) -> None:
    """Replace float weights by codes; refuses before anything is changed."""
    layers, config = quantized_layers(model), getattr(model, "daq_config", None)
    if not layers or config is None:
        state = "packed already" if packed_layers(model) else "not quantized, or wrapped"
        raise ModelError(f"pack needs the model that apply_daq returned, after training; this one is {state}")
    refuse_wrapped(model)
    check_unchanged(model)
    for layer in layers.values():
        if is_shard(layer.first_parameter):
            raise ModelError("the model is sharded; gather and save it, open it again, then pack it")
        if layer.weight.is_meta:
            raise ModelError(f"the model is offloaded; {ONLOAD}")
    check_calibrated(layers, "pack")
    check_finite(layers)
    for layer in _tied_first(layers):
        pack_layer(layer)
    release(model)
    set_config(model, config.replace(packed=True))


def unpack_layers(model: nn.Module) -> None:
    """Give float weights back, on the codes; refuses before anything is changed."""
    layers, config = packed_layers(model), getattr(model, "daq_config", None)
    if not layers or config is None:
        raise ModelError("unpack needs a packed model, from pack or from a packed checkpoint")
    _refuse_offloaded(model)
    if any(tensor.is_inference() for tensor in model.state_dict().values()):
        raise ModelError(
            "the model was opened or packed inside torch.inference_mode(), whose tensors never train; open it outside of that"
        )
    for name, layer in layers.items():
        if layer.standardizes:
            raise ModelError(
                f"layer {name!r} standardizes its weight in every forward, so its codes are no weights to train; "
                "keep the checkpoint from before packing to train on"
            )
    config = config.replace(packed=False)
    set_config(model, config)
    allocate(model)
    for layer in reversed(_tied_first(layers)):
        if layer.owner is None:
            unpack_layer(layer, config)
        else:
            unpack_tied(layer, config)


@torch.no_grad()
def _dequantized_weight(name: str, layer: QuantizedLayer) -> Tensor:
    if layer.standardizes:
        raise ModelError(
            f"layer {name!r} ({layer.float_class.__name__}) standardizes its weight in every forward, so quantized "
            "values cannot be stored in it; use remove_daq(model, weights='float')"
        )
    check_calibrated({name: layer}, "its quantized weights are stored")
    weight: Tensor = layer.w_quant(layer.float_weight())
    # The scale of a layer turns quantized inputs, which span one unit, into outputs.
    return weight if layer.a_quant is None else weight / layer.a_quant.span


def check_float_model(model: nn.Module) -> None:
    """Refuse what `apply_daq` cannot change."""
    name = type(model).__name__
    if any(base.__name__ in _WRAPPERS for base in type(model).__mro__):
        raise ModelError(f"the model is wrapped in {name}; the order is: {ORDER}")
    refuse_scripted(model)
    refuse_wrapped(model)
    if daq_layers(model) or hasattr(model, "daq_config"):
        part = next((f".get_submodule({name!r})" for name in quantized_parts(model)), "")
        raise ModelError(f"the model is already quantized; hf_daq.remove_daq(model{part}) first to choose other bits")
    _refuse_offloaded(model)
    for parameter_name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"parameter {parameter_name!r} has no shape yet; run one forward first: model(batch), then apply_daq"
            )
        if type(parameter) is not nn.Parameter or is_shard(parameter):
            raise ModelError(
                f"parameter {parameter_name!r} is a {type(parameter).__name__}: the model is sharded or already "
                f"quantized by another library; apply_daq on the plain float model. The order is: {ORDER}"
            )


def _refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model whose weights Accelerate brings for each forward alone."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked and any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ModelError(f"the model is offloaded; {ONLOAD}")


def _refuse_part(model: nn.Module, what: str) -> None:
    """Refuse a model of which a part is the one that `apply_daq` returned, as of one that is wrapped."""
    if not hasattr(model, "daq_config"):
        for name in quantized_parts(model)[:1]:
            raise ModelError(
                f"{what} needs the model that apply_daq returned, which is a part of this {type(model).__name__}: write "
                f"hf_daq.{what}(model.get_submodule({name!r}))"
            )


def _holders(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers by name; for those that are no modules yet, the experts that will be split."""
    modules = dict(model.named_modules())
    return {name: modules.get(name) or modules[name.rpartition(".")[0]] for name in names}


def _check_forwards(holders: Mapping[str, nn.Module]) -> None:
    for name, module in holders.items():
        if hides_forward(module):
            raise ModelError(
                f"layer {name!r} has a `forward` of its own that does not call the one of its class, so quantization would "
                f"be bypassed; put it there after apply_daq, or leave the layer out: modules_to_not_convert=[{name!r}]"
            )


def _check_computed_weights(model: nn.Module, config: DaqConfig) -> None:
    skipped = [*config.modules_to_not_convert, *(rule["pattern"] for rule in config.rules if rule.get("skip"))]
    left_in_float = kept_computed_weights(model)
    for name, call in computed_weights(model).items():
        if config.layers is not None:
            kept = name not in config.layers
        else:
            kept = any(pattern_matches(pattern, name) for pattern in skipped)
            kept = kept or (isinstance(model.get_submodule(name), nn.Embedding) and config.embedding_bits is None)
        if not kept and name not in left_in_float:
            raise ModelError(
                f"layer {name!r} computes its weight or bias from other parameters; before apply_daq write {call}, with "
                f"layer = model.get_submodule({name!r}), or keep it in full precision: "
                f"DaqConfig(..., modules_to_not_convert=[{name!r}])"
            )


def _use_qkv_as_a_layer(model: nn.Module) -> None:
    """timm's BEiT, EVA and Swin-v2 attention read `qkv.weight` themselves unless told to call the layer."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), DaqLayer) and hasattr(module, "qkv_bias_separate"):
            module.daq_qkv_bias_separate = module.qkv_bias_separate
            module.qkv_bias_separate = True  # type: ignore[assignment]
