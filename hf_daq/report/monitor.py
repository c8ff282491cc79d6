"""`Monitor`: how many weights change their code while a model trains, how many oscillate, how much is clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CalibrationError, ConfigError, ModelError
from ..nn.base import refuse_adapted_weights
from ..nn.layers import QuantizedLayer, quantized_layers
from ..nn.packed import packed_layers
from ..nn.quantizers import is_shard

_OF_WEIGHTS = ("flip_rate", "oscillating", "weights_clipped")


class Monitor:
    """Looks at the quantized layers of a model in training, every so many steps, and changes nothing.

        monitor = hf_daq.Monitor(model, every=100)
        for images, labels in loader:
            ...
            optimizer.step()
            if values := monitor.step():  # empty but every 100th time
                accelerator.log(values, step=step)

    Of each `every` optimizer steps the last `window` are looked at. Outside of them it holds no tensors and no hooks;
    inside, three bytes for each weight. What it finds for a layer, in plain numbers:

        flip_rate                   share of the weights whose code one optimizer step changed, mean over the window
        oscillating                 share of the weights whose code changed in one direction and, as its next change in
                                    the window, in the other (Nagel et al., ICML 2022)
        weights_clipped             share of the weights outside the bounds
        inputs_clipped              share of the layer's inputs outside the bounds, in the forwards of the window's last step.
                                    None with weights only, where the layer was not reached in training mode, and
                                    inside `torch.compile`, which does not run the hooks
        weight_lower, weight_upper  lowest and highest bound, in units of the weight's standard deviation or root mean square
        weight_scale                mean of its absolute value
        input_lower, input_upper    bounds of the input, in its own units; None with weights only

    Under DistributedDataParallel weights are equal on all ranks, and inputs are those of this rank. Under FSDP2 too, where
    every rank has to call `step`: it gathers the weights of one layer after the other, and keeps codes of its share.

    Args:
        model: a calibrated model after `apply_daq`, before or after it is wrapped, prepared or compiled.
        every: steps from one result to the next, more than `window`.
        window: consecutive steps that are looked at, 2 or more.
        per_layer: whether `step` returns the numbers of each layer too, or only the shares of the whole model.

    Attributes:
        history: list of all results, `{"step": int, "layers": {name: {"flip_rate": float, ...}}}`, with all names above.
        steps: optimizer steps so far; set it where training goes on from a checkpoint.

    Raises:
        ModelError: the model is not quantized, packed, or sharded in another way than by FSDP2 (also when a window begins).
        CalibrationError: not calibrated or loaded yet.
        ConfigError: `every` or `window` is too small.
    """

    def __init__(self, model: nn.Module, every: int = 100, *, window: int = 2, per_layer: bool = True) -> None:
        if window < 2:
            raise ConfigError(f"window={window}: an oscillation takes 2 steps or more; write window=2")
        if every <= window:
            raise ConfigError(
                f"every={every}: the {window} steps of a window and the one before it make every={window + 1} the least"
            )
        refuse_adapted_weights(model, "monitored")
        self.every, self.window, self.per_layer = every, window, per_layer
        layers = quantized_layers(model).items()
        self.layers = {_plain(name): layer for name, layer in layers if layer.owner is None}
        if not self.layers:
            packed = "hf_daq.unpack(model) makes a packed one trainable" if packed_layers(model) else "apply_daq first"
            raise ModelError(f"Monitor found no quantized layer that trains in {type(model).__name__}: {packed}")
        check_monitored(self.layers)
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self._open: dict[str, CodeWindow] = {}

    def step(self) -> dict[str, float]:
        """Call once after each `optimizer.step()`, of accumulated gradients too.

        Returns:
            Nothing but every `every`-th time; then names for a tracker and their values: "daq/flip_rate" and the other
            shares, of all weights or inputs together, and with `per_layer` "daq/flip_rate/layer1.0.conv1" and so on.
        """
        self.steps += 1
        left = -self.steps % self.every
        if left == self.window:
            self.close()
            check_monitored(self.layers)
            self._open = {name: CodeWindow(layer) for name, layer in self.layers.items()}
        elif self._open:
            for window in self._open.values():
                window.compare()
        if left == 1:
            for window in self._open.values():
                window.watch_inputs()
        return self._result() if left == 0 and self._open else {}

    def close(self) -> None:
        """End a window that is open, with its hooks. Steps go on counting, and the next window opens as usual."""
        for window in self._open.values():
            window.close()
        self._open = {}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _result(self) -> dict[str, float]:
        layers = {name: window.values(self.window) for name, window in self._open.items()}
        weights = {name: window.weights for name, window in self._open.items()}
        inputs = {name: window.inputs for name, window in self._open.items()}
        self.close()
        self.history.append({"step": self.steps, "layers": layers})
        found = {f"daq/{key}": _mean(layers, key, weights) for key in _OF_WEIGHTS}
        if any(inputs.values()):
            found["daq/inputs_clipped"] = _mean(layers, "inputs_clipped", inputs)
        if self.per_layer:
            for name, values in layers.items():
                found |= {f"daq/{key}/{name}": value for key, value in values.items() if value is not None}
        return found


class CodeWindow:
    """What is known of one layer while a window is open. Of a sharded layer each rank keeps a part of the codes."""

    def __init__(self, layer: QuantizedLayer) -> None:
        _check_trains(layer)
        self.layer = layer
        self.weights = math.prod(layer.weight_shape())
        self.mesh = getattr(layer.first_parameter, "device_mesh", None)
        self.codes = self.own_codes()
        self.direction = torch.zeros_like(self.codes, dtype=torch.int8)  # of the last change
        self.oscillated = torch.zeros_like(self.codes, dtype=torch.bool)
        self.flips = torch.zeros((), device=self.codes.device, dtype=torch.float32)
        self.inputs = 0
        self.clipped: list[tuple[Tensor, int]] = []
        self.hook: RemovableHandle | None = None

    def own_codes(self) -> Tensor:
        _check_trains(self.layer)
        with _gathered(self.layer):
            codes = self.layer.codes()
        if self.mesh is None:
            return codes
        last = self.mesh.ndim - 1  # a dimension before it repeats the shards
        own: Tensor = codes.flatten().tensor_split(self.mesh.size(last))[self.mesh.get_local_rank(last)]
        return own.clone()

    @torch.no_grad()
    def compare(self) -> None:
        """Compare the codes with those of the step before."""
        codes = self.own_codes()
        change = (codes > self.codes).to(torch.int8) - (codes < self.codes).to(torch.int8)
        self.flips += change.count_nonzero() / self.weights
        self.oscillated |= change * self.direction < 0
        self.direction = torch.where(change == 0, self.direction, change)
        self.codes = codes

    def watch_inputs(self) -> None:
        if self.layer.a_quant is not None:
            self.hook = self.layer.a_quant.register_forward_pre_hook(self.look)

    @torch.no_grad()
    def look(self, quantizer: Any, args: tuple[Tensor, ...]) -> None:
        """The hook. It gets the replica of the quantizer where there are some."""
        if not torch.compiler.is_compiling() and quantizer.training and args[0].numel():
            clipped = quantizer.outside(quantizer.positions(args[0])).count_nonzero()
            self.clipped.append((clipped, args[0].numel()))

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()

    @torch.no_grad()
    def values(self, window: int) -> dict[str, float | None]:
        """All numbers of the layer, with one look at the device for the weights."""
        w_quant, a_quant = self.layer.w_quant, self.layer.quantizers.get("a_quant")
        changes = torch.stack([self.flips / window, self.oscillated.count_nonzero() / self.weights])
        if self.mesh is not None:
            dist.all_reduce(changes, group=self.mesh.get_group(self.mesh.ndim - 1))
        with _gathered(self.layer):
            clipped = w_quant.outside(w_quant.positions(self.layer.float_weight())).count_nonzero() / self.weights
            found = [clipped, w_quant.lower.min(), w_quant.upper.max(), w_quant.scale.abs().mean()]
            bounds = (None, None) if a_quant is None else (a_quant.lower.item(), a_quant.upper.item())
        flip_rate, oscillating, weights_clipped, lower, upper, scale = torch.cat([changes, torch.stack(found)]).tolist()
        self.inputs = sum(count for _, count in self.clipped)
        inputs_clipped = sum(int(found) for found, _ in self.clipped)
        return {
            "flip_rate": flip_rate,
            "oscillating": oscillating,
            "weights_clipped": weights_clipped,
            "inputs_clipped": inputs_clipped / self.inputs if self.inputs else None,
            "weight_lower": lower,
            "weight_upper": upper,
            "weight_scale": scale,
            "input_lower": bounds[0],
            "input_upper": bounds[1],
        }


@contextmanager
def _gathered(layer: QuantizedLayer) -> Iterator[None]:
    """Inside, a layer that FSDP2 shards has whole weights and bounds. All ranks have to come here."""
    modules: dict[nn.Module, None] = dict.fromkeys([*layer.modules(), *layer.quantizers.values()])
    kept = [(module, dict(module._parameters)) for module in modules]
    around = len(layer.parameter_names) == 1  # experts have it in the module around them
    found: dict[str, Any] = {"weight": layer.weight} if around else {}
    try:
        for module, parameters in kept:
            for name, value in (parameters | (found if module is layer else {})).items():
                if value is not None and is_shard(value):
                    module._parameters[name] = nn.Parameter(value.detach().full_tensor(), requires_grad=False)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.clear()
            module._parameters.update(parameters)


def _mean(layers: Mapping[str, Mapping[str, float | None]], key: str, counts: Mapping[str, int]) -> float:
    """Of the layers that have the number, weighted by these counts."""
    found = [(values[key], counts[name]) for name, values in layers.items()]
    return sum(value * count for value, count in found if value is not None) / sum(counts.values())


def _plain(name: str) -> str:
    """The name in the model that was wrapped or compiled."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _check_trains(layer: Any) -> None:
    if not isinstance(layer, QuantizedLayer):
        raise ModelError(
            f"a layer is a {type(layer).__name__} now, packed or float, so its codes do not change any more: make a new Monitor or "
            "TransitionScheduler for a model that trains"
        )


def check_monitored(layers: Mapping[str, QuantizedLayer]) -> None:
    for name, layer in layers.items():
        _check_trains(layer)
        if layer.first_parameter.ndim < 2:  # FSDP1 and ZeRO-3 leave vectors
            raise ModelError(
                f"Monitor can gather what FSDP2 shards, and {name!r} is sharded in another way: shard with FSDP2 "
                "(fsdp_version: 2 for Accelerate), or leave the monitor out of this run"
            )
        if not layer.calibrated:
            raise CalibrationError(
                f"layer {name!r} is not calibrated; the order is: apply_daq, then calibrate or load, then Monitor"
            )
