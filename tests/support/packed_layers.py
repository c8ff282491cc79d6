"""Small packed layers with quantized inputs, and the machine code of packed layers in several builds."""

import os

import pytest
import timm.layers
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq.nn import native
from hf_daq.nn.bitpack import pack_bits
from hf_daq.nn.kernels import compiler
from hf_daq.nn.paths import bit_for_bit

BUILDS = {
    "native": ("-march=native", "-fopenmp"),
    "avx2": ("-mavx2", "-mbmi2", "-mfma"),
    "baseline": (),
}
USUAL = ["native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "baseline"))]
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (2, 3, 37)),
    "one row": (lambda: timm.layers.Linear(37, 11, bias=False), (37,)),
    "Conv1D": (lambda: Conv1D(11, 37), (5, 37)),
    "strides": (lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), (1, 2), 2), (3, 6, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 5, 1, 2, 2, 8, bias=False), (1, 8, 7, 7)),
    "same": (lambda: timm.layers.Conv2dSame(5, 7, 3, 2), (2, 5, 8, 9)),
    "one-sided": (lambda: nn.Conv2d(5, 7, (2, 3), padding="same"), (2, 5, 8, 9)),
    "standardized": (lambda: timm.layers.ScaledStdConv2dSame(4, 6, 3, 2), (2, 4, 8, 8)),
    "one pixel": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 1, 1)),
}


def packed(layer, x, weight_bits=4, activation_bits=4, granularity="channel"):
    """The layer, calibrated on x and packed, in a model of its own."""
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    model = nn.Sequential(layer).eval()
    hf_daq.apply_daq(model, **bits, weight_granularity=granularity, rules=[{"pattern": "0", **bits}])
    with hf_daq.calibrate(model, check=False):
        model(x)
    return hf_daq.pack(model)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    x = torch.randn(4, 6)
    return packed(nn.Linear(6, 5), x, **options), x


def plain(model, x):
    with bit_for_bit():
        return model(x)


def close(one, other, tolerance=1e-6):
    return one.shape == other.shape and (one - other).norm() <= tolerance * other.norm()


def write(layer, weight_bits, activation_bits, granularity, signed):
    """Other codes, scales and bounds of other bits."""
    count = layer.shape[0] if granularity == "channel" else 1
    codes = torch.randint(2**weight_bits, layer.shape, dtype=torch.uint8)
    layer.weight_bits, layer.a_quant.bits = weight_bits, activation_bits
    layer.weight_codes, layer.weight_scale = pack_bits(codes, weight_bits), torch.rand(count) + 0.1
    layer.a_quant.upper.data.uniform_(0.5, 2)
    layer.a_quant.lower.data.uniform_(-2, -0.2).mul_(signed)


def load(folder, build):
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        return native._built(compiler(), (*native._FLAGS[:1], "-O2", *native._FLAGS[2:], *BUILDS[build]))
    finally:
        del os.environ["XDG_CACHE_HOME"]
