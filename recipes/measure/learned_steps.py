"""Quantizers with a learned step and a straight-through gradient, for comparison: what estimators.py puts in the place of hf_daq's.

LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 3), v a weight or input, s its step:

    round(clamp(v / s, -n, p)) * s,    n = 2**(b-1), p = n - 1 of weights and of inputs with a sign,    n = 0, p = 2**b - 1 of others

The gradient of s is multiplied by 1 / sqrt(N p), N the number of weights, or of inputs of one example; s starts at
2 mean|v| / sqrt(p).

ParetoQ (Liu et al., arXiv 2502.02631), weights with a step for each output channel: at 1 bit `s * sign(w)`, s from mean|w|; at 2 bits
a stretched grid without zero, s from max|w|; from 3 bits on LSQ:

    s * (floor(clamp(w / s, -1, 1) * k / 2 - 0.5) + 0.5) / k * 2,    k = 2**b

whose rounding is written there with `round`, and with three values, which the paper counts as 1.58 bits, `s * round(1.5 clamp(w / s, -1,
1)) / 1.5`, s from max|w|. Its inputs are LSQ's here. LSQ with three values has n = p = 1.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.quantizers import ActivationQuantizer, WeightQuantizer, wide


def scaled_gradient(step: Tensor, factor: float) -> Tensor:
    return step * factor + (step * (1 - factor)).detach()


def straight_through(v: Tensor, rounded: Tensor) -> Tensor:
    return v + (rounded - v).detach()


def lsq(v: Tensor, step: Tensor, lowest: int, highest: int, count: int) -> Tensor:
    step = scaled_gradient(step, 1 / math.sqrt(count * highest))
    position = (v / step).clamp(lowest, highest)
    return straight_through(position, position.round()) * step


def stretched(weight: Tensor, step: Tensor, bits: int, ternary: bool = False) -> Tensor:
    """ParetoQ's weights below 3 bits; step: shape (channels, 1, ...)."""
    step = scaled_gradient(step, 1 / math.sqrt(weight.numel() * max(2 ** (bits - 1) - 1, 1)))
    position = weight / step
    if bits == 1:
        inside = position.clamp(-1, 1)
        return straight_through(inside, torch.where(position < 0, -1.0, 1.0)) * step
    half, shift = (1.5, 0.0) if ternary else (2 ** (bits - 1), 0.5)
    position = position.clamp(-0.99 if ternary else -1, 0.99) * half - shift
    return (straight_through(position, position.round()) + shift) / half * step


class LearnedWeights(WeightQuantizer):
    step: nn.Parameter
    stretches: bool

    def forward(self, weight: Tensor) -> Tensor:
        x, step, ternary = wide(weight), self.step.view(-1, *(1,) * (weight.ndim - 1)), self.grid == "ternary"
        if self.stretches and self.bits < 3:
            found = stretched(x, step, self.bits, ternary)
        else:
            highest = 2 ** (self.bits - 1) - 1
            found = lsq(x, step, -highest if ternary else -highest - 1, highest, weight.numel())
        return found.to(self.result_dtype(weight))


class LearnedInputs(ActivationQuantizer):
    step: nn.Parameter

    @property
    def reach(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, self.levels)

    def rounded(self, x: Tensor) -> Tensor:
        # The layer's own span is folded away: these quantizers write real values.
        found = lsq(wide(x), self.step, *self.reach, x[0].numel())
        return found.to(self.result_dtype(x))


def use_lsq(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> None:
    """Give the quantizers of a calibrated model LSQ's function, one step a tensor."""
    _learn_steps(model, batch, channels=False)


def use_paretoq(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> None:
    """Give the weights of a calibrated model ParetoQ's function, and its inputs LSQ's."""
    _learn_steps(model, batch, channels=True)


def _learn_steps(model: nn.Module, batch: Tensor | dict[str, Tensor], channels: bool) -> None:
    layers = quantized_layers(model)
    inputs = _mean_inputs(model, batch)
    for name, layer in layers.items():
        quantizer = layer.w_quant
        magnitude = wide(layer.float_weight().detach()).abs()
        dims = tuple(range(1 if channels else 0, magnitude.ndim))
        highest = 2 ** (quantizer.bits - 1) - 1
        if channels and quantizer.bits < 3:
            step = magnitude.mean(dims) if quantizer.bits == 1 else magnitude.amax(dims)
        elif highest == 0:
            raise ValueError("LSQ has no weights of 1 bit")
        else:
            step = 2 * magnitude.mean(dims) / math.sqrt(highest)
        _become(quantizer, LearnedWeights, step.reshape(-1))
        quantizer.stretches = channels
        if isinstance(layer.a_quant, ActivationQuantizer) and not isinstance(layer.a_quant, LearnedInputs):
            levels = 2 ** (layer.a_quant.bits - layer.a_quant.signed) - 1
            _become(layer.a_quant, LearnedInputs, 2 * inputs[name].reshape(1) / math.sqrt(levels))


def _become(quantizer: Any, kind: type, step: Tensor) -> None:
    for parameter in quantizer.parameters():
        parameter.requires_grad_(False)
    quantizer.__class__ = kind
    quantizer.step = nn.Parameter(step.clone())


@torch.no_grad()
def _mean_inputs(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """mean|x| of the input of each quantized layer, before it is quantized."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: found.__setitem__(name, layer.smoothed(args[0]).abs().mean())
        )
        for name, layer in quantized_layers(model).items()
    ]
    model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return found


def has_steps(model: nn.Module) -> bool:
    """Whether the quantizers of a model are of these; then nothing but steps learns in them."""
    return any(isinstance(module, LearnedWeights | LearnedInputs) for module in model.modules())
