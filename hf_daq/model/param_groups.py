"""Optimizer parameter groups for a quantized model, in any loop and in transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from ..errors import CalibrationError, ConfigError, ModelError
from ..nn.layers import quantized_layers


def param_groups(
    model: Any, lr: float, quantizer_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

    Args:
        model: a model after `apply_daq` and `calibrate`, or after loading.
        lr: learning rate of weights, biases and normalisation layers.
        quantizer_lr: learning rate of bounds and scales; `lr` if None. Never decayed.
        weight_decay: of everything with two or more dimensions, except what `model.no_weight_decay()` names.

    Returns:
        Groups with the keys "name" ("decay", "no_decay", "quantizer"), "params", "lr" and "weight_decay". Frozen
        parameters are left out, and so are empty groups.

    Raises:
        ModelError: the model is not quantized.
        CalibrationError: not calibrated or loaded yet: which bounds learn is known only then.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ModelError(
            "the model has no quantized layers that can be trained; the order is: apply_daq, calibrate, param_groups, and "
            "a packed model is trained on after hf_daq.unpack(model)"
        )
    for layer_name, layer in layers.items():
        if not layer.calibrated:
            raise CalibrationError(
                f"layer {layer_name!r} is not calibrated; the order is: apply_daq, then calibrate or load, then param_groups"
            )
    quantizer = {
        id(parameter)
        for layer in layers.values()
        for module in layer.quantizers.values()
        for parameter in module.parameters()
    }
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "quantizer": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in quantizer:
            groups["quantizer"].append(parameter)
        elif parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed:
            groups["no_decay"].append(parameter)
        else:
            groups["decay"].append(parameter)
    settings = {
        "decay": (lr, weight_decay),
        "no_decay": (lr, 0.0),
        "quantizer": (lr if quantizer_lr is None else quantizer_lr, 0.0),
    }
    return [
        {"name": name, "params": params, "lr": settings[name][0], "weight_decay": settings[name][1]}
        for name, params in groups.items()
        if params
    ]


class TrainerOptimizer:
    """What `Trainer` calls for its optimizer; see `trainer_optimizer`."""

    def __call__(self, model: nn.Module, args: Any, quantizer_lr: float | None) -> torch.optim.Optimizer:
        optimizer_class, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ConfigError(f"optim={args.optim!r} chooses its parameters itself; take one such as 'adamw_torch'")
        groups = param_groups(model, args.learning_rate, quantizer_lr, args.weight_decay)
        return optimizer_class(groups, **kwargs)


def trainer_optimizer(args: Any, quantizer_lr: float | None = None) -> tuple[type, dict[str, Any]]:
    """The optimizer of the training arguments on the groups of `param_groups`: bounds and scales learn at their own rate,
    without weight decay.

        trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=hf_daq.trainer_optimizer(args, 1e-3), ...)

    Args:
        args: `transformers.TrainingArguments`.
        quantizer_lr: learning rate of bounds and scales; that of the arguments if None.
    """
    return TrainerOptimizer, {"args": args, "quantizer_lr": quantizer_lr}
