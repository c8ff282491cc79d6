"""`MonitorCallback`: `Monitor` for transformers' Trainer. In a file of its own, as the import takes a second or two."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import TrainerCallback

from ..errors import ConfigError
from ..model.param_groups import param_groups
from ..report.monitor import Monitor


class MonitorCallback(TrainerCallback):
    """Logs what `Monitor` finds to whatever `report_to` of the training arguments says.

        trainer = Trainer(model=model, args=args, ...)
        trainer.add_callback(hf_daq.MonitorCallback(trainer, every=100))

    The shares also go to `trainer.state.log_history`, and all numbers of all layers to `callback.monitor.history`.

    Args:
        trainer: transformers gives a callback no other way to its trackers.
        every, window: as for `Monitor`.
        per_layer: as for `Monitor`. Trainer prints all that it logs, and keeps it in its checkpoints.

    Attributes:
        monitor: the `Monitor`; None before training starts.

    Raises, when training starts: as `Monitor`.
    """

    def __init__(self, trainer: Any, every: int = 100, *, window: int = 2, per_layer: bool = False) -> None:
        self.trainer, self.every, self.window, self.per_layer = trainer, every, window, per_layer
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.monitor = Monitor(model, self.every, window=self.window, per_layer=self.per_layer)
        self.monitor.steps = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.monitor is not None and (values := self.monitor.step()):
            should_log = control.should_log
            self.trainer.log(values)
            control.should_log = should_log  # `log` takes it for done, but the loss of this step is still to come
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()


class TrainerOptimizer:
    """What `Trainer` calls for its optimizer; see `trainer_optimizer`."""

    def __call__(self, model: nn.Module, args: Any, quantizer_lr: float) -> torch.optim.Optimizer:
        optimizer_class, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ConfigError(f"optim={args.optim!r} chooses its parameters itself; take one such as 'adamw_torch'")
        groups = param_groups(model, args.learning_rate, quantizer_lr, args.weight_decay)
        return optimizer_class(groups, **kwargs)


def trainer_optimizer(args: Any, quantizer_lr: float = 1e-3) -> tuple[type, dict[str, Any]]:
    """The optimizer of the training arguments on the groups of `param_groups`: bounds and scales learn at their own rate,
    without weight decay.

        trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=hf_daq.trainer_optimizer(args, 1e-3), ...)

    Args:
        args: `transformers.TrainingArguments`.
        quantizer_lr: learning rate of bounds and scales.
    """
    return TrainerOptimizer, {"args": args, "quantizer_lr": quantizer_lr}
