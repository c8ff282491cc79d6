"""Layers of Brevitas (https://github.com/Xilinx/brevitas), one of the peers that hf_daq is measured beside."""

from typing import Any

import torch
from torch import Tensor, nn


def brevitas_layer(layer: Any, bits: tuple[int, int | None], signed: bool = True, batches: int = 1) -> nn.Module:
    """A learned scale for inputs, the largest value for weights, both per tensor: what its documentation begins with.

    Args:
        bits: of weights and inputs; None for inputs in float.
        signed: whether inputs may be negative.
        batches: of statistics that inputs start from, 300 where nothing is said.
    """
    import brevitas.nn
    from brevitas.quant import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

    options: dict[str, Any] = {"weight_bit_width": bits[0], "bias": layer.bias is not None}
    if bits[1] is not None:
        options |= {
            "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            "input_bit_width": bits[1],
        }
        options["input_collect_stats_steps"] = batches
    if isinstance(layer, nn.Conv2d):
        shape = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        quantized = brevitas.nn.QuantConv2d(**{key: getattr(layer, key) for key in shape}, **options)
    else:
        quantized = brevitas.nn.QuantLinear(layer.in_features, layer.out_features, **options)
    quantized.weight, quantized.bias = layer.weight, layer.bias
    return quantized.to(layer.weight.device)


def use_brevitas(model: nn.Module, names: list[str], bits: tuple[int, int | None], batches: list[Tensor]) -> None:
    """Put them in the place of these layers, whose inputs are never negative, and let their inputs start from these batches."""
    for name in names:
        model.set_submodule(
            name, brevitas_layer(model.get_submodule(name), bits, signed=False, batches=len(batches) - 1)
        )
    with torch.no_grad():
        for batch in batches:  # the last one ends the statistics
            model.train()(batch)
