"""`apply_daq` and `remove_daq`: patch a float model in place, and undo it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from .config import DaqConfig
from .errors import CalibrationError, ModelError
from .layers import QuantizedLayer, StandardizedConv, quantize_layer, quantized_layers, restore_layer
from .matching import Plan, config_from, plan

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "DeepSpeedEngine",
)


def apply_daq(model: nn.Module, config: DaqConfig | None = None, **kwargs: Any) -> nn.Module:
    """Quantize the layers of a float model in place and return it.

    Float weights keep their Parameter objects and names; every quantized layer gains child modules `w_quant` and
    `a_quant` with the learnable bounds and scales, to be set by `calibrate` or by loading a state dict. The resolved
    config is kept as `model.daq_config`. On an error the model is left as it was.

    Args:
        model: a float model, on any device (meta too), before it is wrapped, sharded or given to an optimizer.
        config: a `DaqConfig`, or its arguments as keywords, e.g. `apply_daq(model, bits=3)`.

    Raises:
        ConfigError: a rule matches nothing.
        ModelError: already quantized, wrapped, sharded or scripted; a shared weight; nothing to quantize.
    """
    config = config_from(config, kwargs)
    _check_float_model(model)
    planned = plan(model, config)
    if not planned.quantized:
        raise ModelError(f"nothing to quantize in {type(model).__name__}:\n{planned}")
    _check_not_tied(model, planned)
    for name, row in planned.quantized.items():
        assert row.weight_bits is not None
        quantize_layer(model.get_submodule(name), name, config, row.weight_bits, row.activation_bits)
    _use_qkv_as_a_layer(model)
    bits = {
        name: {"weight_bits": row.weight_bits, "activation_bits": row.activation_bits}
        for name, row in planned.quantized.items()
    }
    model.daq_config = config.replace(layers=bits)  # type: ignore[assignment]
    return model


def remove_daq(model: nn.Module, weights: Literal["float", "quantized"] = "float") -> nn.Module:
    """Give back the float layers, in place.

    Args:
        weights: "float": the weights that were trained under quantization; "quantized": the values they were quantized
            to, in the units of the float layer, and their bias corrections in the biases, so that only the quantization
            of activations is lost.

    Raises:
        ModelError: the model is not quantized, or a layer standardises its weight in the forward, so that quantized
            values cannot be stored in it.
        CalibrationError: `weights="quantized"` before calibration.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ModelError("the model is not quantized: there is nothing to remove")
    if weights == "quantized":
        values = {name: _dequantized_weight(name, layer) for name, layer in layers.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                bias = layer.w_quant.shifted(layer.bias, layer.weight.dtype)
                layer.bias = None if bias is None else nn.Parameter(bias.clone())
                layer.weight.copy_(values[name])
    elif weights != "float":
        raise ModelError(f"weights={weights!r} must be 'float' or 'quantized'")
    for layer in layers.values():
        restore_layer(layer)
    for module in model.modules():
        if hasattr(module, "daq_qkv_bias_separate"):
            module.qkv_bias_separate = module.daq_qkv_bias_separate
            del module.daq_qkv_bias_separate
    if hasattr(model, "daq_config"):
        del model.daq_config
    return model


@torch.no_grad()
def _dequantized_weight(name: str, layer: QuantizedLayer) -> torch.Tensor:
    if isinstance(layer, StandardizedConv):
        raise ModelError(
            f"layer {name!r} ({layer.float_class.__name__}) standardises its weight in every forward, so quantized "
            "values cannot be stored in it; use remove_daq(model, weights='float')"
        )
    if not layer.calibrated:
        raise CalibrationError(f"layer {name!r} is not calibrated: there are no quantized weights yet")
    weight: torch.Tensor = layer.w_quant(layer.float_weight())
    # The scale of a layer turns quantized inputs, which span one unit, into outputs.
    return weight if layer.a_quant is None else weight / layer.a_quant.span


def _check_float_model(model: nn.Module) -> None:
    name = type(model).__name__
    if any(base.__name__ in _WRAPPERS for base in type(model).__mro__):
        raise ModelError(
            f"the model is wrapped in {name}; the order is: build, apply_daq, calibrate, optimizer, then prepare or wrap"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be changed; apply_daq before scripting")
    if quantized_layers(model) or hasattr(model, "daq_config"):
        raise ModelError("the model is already quantized; hf_daq.remove_daq(model) first to choose other bits")
    for parameter_name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or hasattr(parameter, "device_mesh"):
            raise ModelError(
                f"parameter {parameter_name!r} is a {type(parameter).__name__}: the model is sharded or already "
                "quantized by another library; apply_daq on the plain float model"
            )


def _check_not_tied(model: nn.Module, planned: Plan) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module_name)
    for name in planned.quantized:
        shared = owners[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ModelError(
                f"the weight of {name!r} is shared between {', '.join(map(repr, shared))}; keep it in full precision: "
                f"DaqConfig(..., modules_to_not_convert={[other for other in shared if other in planned.quantized]})"
            )


def _use_qkv_as_a_layer(model: nn.Module) -> None:
    """timm's BEiT, EVA and Swin-v2 attention read `qkv.weight` themselves unless told to call the layer."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), QuantizedLayer) and hasattr(module, "qkv_bias_separate"):
            module.daq_qkv_bias_separate = module.qkv_bias_separate
            module.qkv_bias_separate = True  # type: ignore[assignment]
