"""What papers say helps in training, as estimators.py tries it: regularizers, freezing, and inputs before weights."""

from typing import Any

import torch
from torch import Tensor, nn

import hf_daq
from hf_daq.nn.layers import quantized_layers


def kurtosis(model: nn.Module) -> Tensor:
    """The mean over layers of (kurtosis - 1.8)^2 + skewness^2 of the weights; a uniform distribution has 1.8 and 0 (Shkolnik et
    al., "Robust Quantization: One Model to Rule Them All", NeurIPS 2020; with the skewness as of EQ-Net, ICCV 2023)."""
    found = []
    for layer in quantized_layers(model).values():
        weight = layer.float_weight().float()
        z = (weight - weight.mean()) / weight.std()
        found.append((z.pow(4).mean() - 1.8).square() + z.pow(3).mean().square())
    return torch.stack(found).mean()


def cauchy_schwarz(model: nn.Module) -> Tensor:
    """The mean over output channels of N sum(w^4) / sum(w^2)^2 - 1, which is 0 where all |w| are equal: the binary regularizer
    of Taner, Wang, Studer, "Cauchy-Schwarz Regularizers", ICLR 2025, divided by sum(w^2)^2 so that it has no unit."""
    found = []
    for layer in quantized_layers(model).values():
        squares = layer.float_weight().float().flatten(1).square()
        found.append((squares.square().mean(1) / squares.mean(1).square() - 1).mean())
    return torch.stack(found).mean()


class Ranges:
    """How unlike the channels of the inputs of depthwise convolutions are, which share one quantizer: the mean over these layers of
    the variance over channels of m / mean(m), m the mean |x| of a channel in the last forward. The idea is of Park and Sung,
    "Regularizing Activation Distribution for Ultra Low-bit Quantization-Aware Training of MobileNets", SiPS 2022; its equation may
    be another one."""

    def __init__(self, model: nn.Module) -> None:
        self.channels: dict[str, Tensor] = {}
        for name, layer in quantized_layers(model).items():
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels:
                layer.register_forward_pre_hook(lambda _, args, name=name: self.see(name, args[0]))

    def see(self, name: str, x: Tensor) -> None:
        self.channels[name] = x.float().abs().mean((0, 2, 3))

    def loss(self) -> Tensor:
        return torch.stack([(m / m.mean() - 1).square().mean() for m in self.channels.values()]).mean()


def wait_with_weights(model: nn.Module) -> None:
    """From now on inputs alone are quantized, until `begin_with_weights`."""
    for layer in quantized_layers(model).values():
        layer.quantized_weight = layer.float_weight


def begin_with_weights(model: nn.Module) -> None:
    """Quantize weights too, with bounds that fit them as they are now."""
    for layer in quantized_layers(model).values():
        layer.__dict__.pop("quantized_weight", None)
    hf_daq.restart(model)


class Freezing:
    """Iterative freezing (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, algorithm 1).

    A weight oscillates in a step that changes its code in the other direction than the change before. Where the running mean
    of this is above `threshold`, the weight stays from the moment its code is the rounded running mean of its codes. Call
    `step` after the optimizer's.
    """

    def __init__(self, model: nn.Module, threshold: float, momentum: float = 0.01) -> None:
        self.layers = list(quantized_layers(model).values())
        self.threshold, self.momentum = threshold, momentum
        self.state = [self._start(layer) for layer in self.layers]

    def _start(self, layer: Any) -> dict[str, Tensor]:
        codes, weight = layer.codes().float(), layer.weight.detach().clone()
        zeros = torch.zeros_like(codes)
        known = {"codes": codes, "mean": codes.clone(), "direction": zeros, "often": zeros.clone()}
        return known | {"weight": weight, "frozen": torch.zeros_like(codes, dtype=torch.bool)}

    def restart(self) -> None:
        """From the weights as they are, in the same tensors."""
        for layer, known in zip(self.layers, self.state, strict=True):
            for name, value in self._start(layer).items():
                known[name].copy_(value)

    @torch.no_grad()
    def step(self) -> None:
        for layer, known in zip(self.layers, self.state, strict=True):
            layer.weight.copy_(torch.where(known["frozen"], known["weight"], layer.weight))
            codes = layer.codes().float()
            change = (codes - known["codes"]).sign()
            known["often"].lerp_((change * known["direction"] < 0).float(), self.momentum)
            known["mean"].lerp_(codes, self.momentum)
            known["direction"].copy_(torch.where(change == 0, known["direction"], change))
            known["codes"].copy_(codes)
            known["weight"].copy_(layer.weight)
            known["frozen"] |= (known["often"] > self.threshold) & (codes == known["mean"].round())

    def tensors(self) -> dict[str, Tensor]:
        return {f"{number}.{name}": value for number, known in enumerate(self.state) for name, value in known.items()}
