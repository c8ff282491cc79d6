"""The order of a training script, and its mistakes: an optimizer that was built before the model was quantized would
never train bounds and scales, and a sharded model shows no whole weights."""

from __future__ import annotations

import gc
import logging
import weakref
from functools import cache
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import ModelError
from ..nn.layers import quantized_layers
from ..nn.quantizers import is_shard, processes

logger = logging.getLogger("hf_daq")
ORDER = "build or load the model, apply_daq, calibrate, optimizer, then prepare or wrap"
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that a DistributedDataParallel holds, whoever made it: it reduces the gradients of the parameters
    there were when it was made, so that others would drift apart."""
    if processes() > 1 and _is_wrapped(model):
        raise ModelError(f"a DistributedDataParallel holds this model already; the order is: {ORDER}")


def _is_wrapped(model: nn.Module) -> bool:
    return any(module is model for wrapper in _alive(DistributedDataParallel) for module in wrapper.modules())


def _alive(kind: type) -> list[Any]:
    # `isinstance` asks for `__class__`, which does things in lazy objects, and `issubclass` is slow for abstract classes.
    return [found for found in gc.get_objects() if kind in type(found).__mro__]


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
    models = [
        m for m in list(_models) if any(id(layer.first_parameter) in own for layer in quantized_layers(m).values())
    ]
    for model in models:
        if processes() > 1 and not _is_wrapped(model) and not any(map(is_shard, model.parameters())):
            logger.warning(
                "%d processes train a %s that nothing wraps: if nobody averages its gradients, each trains a model of its "
                "own. accelerator.prepare wraps it, unless the very model was evaluated through Trainer before",
                processes(),
                type(model).__name__,
            )
    missing = {
        f"{name}.{side}": id(parameter)
        for model in models
        for name, layer in quantized_layers(model).items()
        if id(layer.first_parameter) in own
        for side, quantizer in layer.quantizers.items()
        for parameter in quantizer.parameters()
        if parameter.requires_grad and id(parameter) not in own
    }
    if missing:  # another optimizer may have them
        known = set().union(*map(_parameters, _alive(Optimizer)))
        lost = [name for name, number in missing.items() if number not in known]
        if lost:
            raise ModelError(
                f"the optimizer has the weight of a quantized layer, but no optimizer has {lost[0]!r}: was it built before "
                f"apply_daq? The order is: {ORDER}. The optimizer takes hf_daq.param_groups(model, ...) or "
                "model.parameters(); what shall not learn gets requires_grad_(False)"
            )


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
