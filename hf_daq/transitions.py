"""Training by what codes do: `TransitionScheduler` sets how many change, `dampening` draws weights to theirs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError, ModelError
from .nn.base import refuse_adapted_weights
from .nn.layers import quantized_layers
from .nn.quantizers import is_shard
from .report.monitor import CodeWindow, check_monitored


class TransitionScheduler:
    """Sets the learning rate of quantized weights so that a target share of them changes its code in a step (Lee, Jeon, Kim,
    Ham, "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025, arXiv 2404.19248):

        K <- m K + (1 - m) k,    lr <- max(0, lr + eta (R - K))

    k is the share of weights whose code the last step changed, K its running mean, and the target R falls from `target` to 0
    by a cosine. The paper looks at every step; here it is every `every`-th, for that many steps at once, so that a GPU is
    waited for once in them.

        groups = hf_daq.param_groups(model, lr=0.01, quantized_lr=0.01)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        scheduler = hf_daq.TransitionScheduler(model, optimizer, updates=1000)
        ...
        optimizer.step()
        scheduler.step()

    Where another scheduler writes the rates of all groups, call `apply` after it. With Accelerate,
    `accelerator.register_for_checkpointing(scheduler)` saves it and goes on with it. Ranks of DistributedDataParallel and FSDP2
    get the same rate.

    Args:
        model: a calibrated model after `apply_daq`, before or after it is wrapped.
        optimizer: with the groups of `param_groups(model, ..., quantized_lr=...)`, which is where the rate starts.
        updates: steps of the training; the target is 0 at its end.
        target: R at the start, from 0 to 1.
        momentum: m, for one step.
        eta: None for 0.01 of the first rate divided by `target`: without any changes of codes the rate doubles in 100 steps.
        every: steps from one look to the next, 2 or more.

    Attributes:
        rate: K; None before the first look.
        lr: of quantized weights.
        steps: so far.

    Raises:
        ConfigError: a number outside of its range, or no group "quantized".
        ModelError, CalibrationError: as `Monitor`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        updates: int,
        target: float = 5e-3,
        *,
        momentum: float = 0.99,
        eta: float | None = None,
        every: int = 10,
    ) -> None:
        if not (updates > 0 and 0 < target <= 1 and 0 <= momentum < 1 and every >= 2):
            raise ConfigError(
                f"updates={updates}, target={target}, momentum={momentum}, every={every}: allowed are updates from 1, a target "
                "above 0 up to 1, a momentum from 0 to below 1, and every from 2"
            )
        refuse_adapted_weights(model, "scheduled")
        self.layers = [layer for layer in quantized_layers(model).values() if layer.owner is None]
        if not self.layers:
            raise ModelError(f"{type(model).__name__} has no quantized layer that trains: apply_daq first")
        check_monitored(quantized_layers(model))
        self.optimizer = optimizer
        if not self._groups():
            raise ConfigError(
                'the optimizer has no group "quantized", whose rate could be set: write groups = '
                "hf_daq.param_groups(model, lr, quantized_lr=lr)"
            )
        self.updates, self.target, self.momentum, self.every = updates, target, momentum, every
        self.lr = float(self._groups()[0]["lr"])
        self.eta = 0.01 * self.lr / target if eta is None else eta
        self.steps = 0
        self.rate: float | None = None
        self._windows: list[CodeWindow] = []

    def step(self) -> None:
        """Call once after each `optimizer.step()`, of accumulated gradients too."""
        self.steps += 1
        left = -self.steps % self.every
        if left == 1:
            self._look()
        elif left == 0 and self._windows:
            changed = self._changed()
            momentum = self.momentum**self.every
            self.rate = changed if self.rate is None else momentum * self.rate + (1 - momentum) * changed
            done = min(1.0, self.steps / self.updates)
            target = self.target * 0.5 * (1 + math.cos(math.pi * done))
            self.lr = max(0.0, self.lr + self.every * self.eta * (target - self.rate))
        self.apply()

    def apply(self) -> None:
        """Write the rate into the groups."""
        for group in self._groups():
            group["lr"] = self.lr

    def _groups(self) -> list[dict[str, Any]]:
        """Anew each time: an optimizer that loads a state gets other ones."""
        return [group for group in self.optimizer.param_groups if group.get("name") == "quantized"]

    def _look(self) -> None:
        self._windows = [CodeWindow(layer) for layer in self.layers]

    def _changed(self) -> float:
        """Share of the weights whose code the last step changed."""
        counts = []
        for window in self._windows:
            window.compare()
            count = window.flips * window.weights
            if window.mesh is not None:
                dist.all_reduce(count, group=window.mesh.get_group(window.mesh.ndim - 1))
            counts.append(count)
        weights = sum(window.weights for window in self._windows)
        self._windows = []
        return float(torch.stack([count.to(counts[0].device) for count in counts]).sum()) / weights

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "rate": self.rate, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After model and optimizer have theirs."""
        self.steps, self.rate, self.lr = state["steps"], state["rate"], state["lr"]
        self._windows = []
        if -self.steps % self.every == 1:
            self._look()
        self.apply()


def dampening(model: nn.Module) -> Tensor:
    """The sum of the squared distances of weights to the places of their codes, `|| w_q - clip(w) ||^2`, to be added to the loss
    (Nagel, Fournarakis, Bondarenko, Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv
    2203.11086). It keeps weights from going to and fro between two codes; the paper lets its factor grow by a
    cosine during training.

        loss = loss + factor * hf_daq.dampening(model)

    Weights outside of the bounds, the bounds themselves and scales get no gradient from it.

    Returns:
        A tensor of shape (), float32.

    Raises:
        ModelError: the model is not quantized, or its weights are sharded.
    """
    layers = [layer for layer in quantized_layers(model).values() if layer.owner is None]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no quantized layer that trains: apply_daq first")
    if any(is_shard(layer.first_parameter) for layer in layers):
        raise ModelError(
            "dampening needs whole weights, and those of this model are sharded; train it with DistributedDataParallel"
        )
    refuse_adapted_weights(model, "dampened")
    distances = [_distance(layer.w_quant, layer.float_weight()) for layer in layers]
    return torch.stack([distance.to(distances[0].device) for distance in distances]).sum()


def _distance(quantizer: Any, weight: Tensor) -> Tensor:
    rows = quantizer.rows(weight).float()
    with torch.no_grad():
        start, end = quantizer.bounds(weight)
        step = (end - start) / quantizer.levels
        codes = ((rows - start) / step - 0.5).ceil()  # ties down
        inside = (rows >= start) & (rows <= end)
        place = torch.where(inside, start + codes * step, rows)
    distance: Tensor = (rows - place).square().sum()
    return distance
