"""Faults to plant into the layer "hidden" of a quantized network, what `health` calls them, and what it says."""

import math

import torch
from torch import nn

HIDDEN = "hidden"


@torch.no_grad()
def fill(parameter, value):
    parameter.fill_(value)


def bounds(quantizer, lower, upper):
    fill(quantizer.lower, lower)
    fill(quantizer.upper, upper)


def narrow_weights(model):
    bounds(model.hidden.w_quant, -1e-3, 1e-3)


def wide_weights(model):
    bounds(model.hidden.w_quant, -60, 60)


def narrow_inputs(model):
    bounds(model.hidden.a_quant, -1e-5, 1e-5)


def wide_inputs(model):
    bounds(model.hidden.a_quant, -500, 500)


def unsigned_inputs(model):
    fill(model.hidden.a_quant.lower, 0)


def forgotten_quantizer(model):
    bounds(model.hidden.a_quant, math.nan, math.nan)
    model.hidden.a_quant._calibrated = False


def bounds_of_nan(model):
    fill(model.hidden.w_quant.upper, math.nan)


def infinite_scale(model):
    fill(model.hidden.w_quant.scale, math.inf)


def crossed_bounds(model):
    bounds(model.hidden.w_quant, 3, 2)


def weights_of_nan(model):
    fill(model.hidden.weight[0, :4], math.nan)


def inputs_of_nan(model):
    fill(model.stem.bias[0], math.nan)


def outputs_of_nan(model):
    fill(model.hidden.bias, math.inf)


def weights_not_quantized(model):
    model.hidden.w_quant.forward = lambda weight: weight


def inputs_not_quantized(model):
    model.hidden.a_quant.register_forward_hook(lambda _, args, output: args[0])


def layer_not_quantized(model):
    layer = model.hidden
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


FAULTS = [
    (
        narrow_weights,
        "clipped-weights",
        HIDDEN,
        r"(9\d\.\d|100\.0)% of its weights .* smaller quantizer_lr.*'weight_bits': 8",
    ),
    (wide_weights, "dead-weight-codes", HIDDEN, r"use 2 of 16 codes.*calibrate again.*'weight_bits': 8"),
    (
        narrow_inputs,
        "clipped-inputs",
        HIDDEN,
        r"% of its inputs are outside of their bounds \[-1e-05, 1e-05\].*'activation_bits': None",
    ),
    (wide_inputs, "dead-input-codes", HIDDEN, r"use 1 of 16 codes.*'pattern': 'hidden', 'activation_bits': None"),
    (unsigned_inputs, "negative-inputs", HIDDEN, r"% of its inputs are negative.*calibrate again"),
    (
        forgotten_quantizer,
        "not-calibrated",
        HIDDEN,
        r"2 of its 53 bounds, scales and shifts have no value yet.*hf_daq\.calibrate",
    ),
    (bounds_of_nan, "non-finite-bounds", HIDDEN, r"1 of its 53 bounds, scales and shifts are NaN.*calibrate again"),
    (infinite_scale, "non-finite-bounds", HIDDEN, r"1 of its 53 bounds, scales and shifts are NaN"),
    (crossed_bounds, "crossed-bounds", HIDDEN, r"1 of its 2 lower bounds are not below"),
    (weights_of_nan, "non-finite-weights", HIDDEN, r"0\.52% of its weights are NaN.*earlier checkpoint"),
    (inputs_of_nan, "non-finite-inputs", "conv", r"12\.50% of its inputs are NaN.*first layer of the pass"),
    (outputs_of_nan, "non-finite-outputs", HIDDEN, r"100\.00% of its outputs are NaN.*range of float32"),
    (weights_not_quantized, "unquantized-weights", HIDDEN, r"768 distinct weights.*4 bits have 16.*apply_daq again"),
    (inputs_not_quantized, "unquantized-inputs", HIDDEN, r"2\d\d distinct inputs.*4 bits have 16"),
    (layer_not_quantized, "unquantized-outputs", HIDDEN, r"its output is that of the float layer \(SQNR inf dB\)"),
]
