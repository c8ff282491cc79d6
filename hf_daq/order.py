"""The order of a training script, and its mistakes: an optimizer that was built before the model was quantized would
never train bounds and scales, and a sharded model shows no whole weights."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .errors import ModelError
from .layers import quantized_layers

ORDER = "build or load the model, apply_daq, calibrate, optimizer, then prepare or wrap"
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def is_shard(tensor: Tensor) -> bool:
    """True for a DTensor, as FSDP2 makes of parameters."""
    return hasattr(tensor, "device_mesh")


def watch(model: nn.Module) -> None:
    """Look at the parameters of every optimizer at its first step from now on."""
    _hook()
    _models.add(model)


@cache
def _hook() -> Any:
    return register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    own = _parameters(optimizer)
    missing = {
        f"{name}.{side}": id(parameter)
        for model in list(_models)
        for name, layer in quantized_layers(model).items()
        if id(layer.weight) in own
        for side, quantizer in layer.quantizers.items()
        for parameter in quantizer.parameters()
        if parameter.requires_grad and id(parameter) not in own
    }
    if missing:  # another optimizer may have them
        others = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]  # no lazy `__class__`
        known = set().union(*map(_parameters, others))
        lost = [name for name, number in missing.items() if number not in known]
        if lost:
            raise ModelError(
                f"the optimizer has the weight of a quantized layer, but no optimizer has {lost[0]!r}: was it built before "
                f"apply_daq? The order is: {ORDER}. The optimizer takes hf_daq.param_groups(model, ...) or "
                "model.parameters(); what shall not learn gets requires_grad_(False)"
            )


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
