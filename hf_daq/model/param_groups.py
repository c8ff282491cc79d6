"""Optimizer parameter groups for a quantized model, in any loop and in transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CalibrationError, ModelError
from ..nn.layers import quantized_layers
from ..nn.packed import packed_layers
from ..nn.quantizers import Quantizer


def param_groups(
    model: Any,
    lr: float,
    quantizer_lr: float = 1e-3,
    weight_decay: float = 0.0,
    *,
    quantized_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

        groups = hf_daq.param_groups(model, lr=1e-4, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups)

    Args:
        model: a model after `apply_daq` and `calibrate`, or after loading; a packed one with adapters of PEFT.
        lr: learning rate of weights, biases and normalization layers.
        quantizer_lr: learning rate of bounds and scales. They have no weight decay.
        weight_decay: weight decay of all parameters with two or more dimensions, except those that `model.no_weight_decay()` names.
        quantized_lr: learning rate of the weights that are quantized, which are then a group of their own, "quantized"; None
            for `lr`, in one group with the others.

    Returns:
        Groups with the keys "name" ("decay", "no_decay", "quantized", "quantizer"), "params", "lr" and "weight_decay". Frozen
        parameters are left out, and so are empty groups.

    Raises:
        ModelError: the model is not quantized.
        CalibrationError: not calibrated or loaded yet: which bounds learn is known only then.
    """
    layers = quantized_layers(model)
    if not layers and not (packed_layers(model) and hasattr(model, "peft_config")):
        raise ModelError(
            "the model has no quantized layers that can be trained; the order is: apply_daq, calibrate, param_groups, and "
            "a packed model is trained on after hf_daq.unpack(model), or takes adapters: peft.get_peft_model(model, config)"
        )
    for layer_name, layer in layers.items():
        if not layer.calibrated:
            raise CalibrationError(
                f"layer {layer_name!r} is not calibrated; the order is: apply_daq, then calibrate or load, then param_groups"
            )
    quantizer = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Quantizer)  # an adapter may have one of its own
        for parameter in module.parameters()
    }
    quantized: set[int] = set()
    if quantized_lr is not None:
        weights = (
            weight for layer in layers.values() for weight in (*layer._parameters.values(), layer.first_parameter)
        )
        quantized = {id(weight) for weight in weights}  # experts have theirs in the module around them
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "quantized": [], "quantizer": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in quantizer:
            groups["quantizer"].append(parameter)
        elif parameter.ndim <= 1 or name.endswith("bias") or name in undecayed:
            groups["no_decay"].append(parameter)
        elif id(parameter) in quantized:
            groups["quantized"].append(parameter)
        else:
            groups["decay"].append(parameter)
    settings = {
        "decay": (lr, weight_decay),
        "no_decay": (lr, 0.0),
        "quantized": (quantized_lr or 0.0, weight_decay),
        "quantizer": (quantizer_lr, 0.0),
    }
    return [
        {"name": name, "params": params, "lr": settings[name][0], "weight_decay": settings[name][1]}
        for name, params in groups.items()
        if params
    ]
