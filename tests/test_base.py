"""A quantized layer and its packed form say the same of themselves."""

import copy
import dataclasses

import pytest
import torch
from models import images, small_net

import hf_daq
from hf_daq.errors import CalibrationError
from hf_daq.nn.base import check_calibrated
from hf_daq.nn.integers import integers
from hf_daq.nn.layers import StandardizedConv
from hf_daq.nn.packed import PACKED_TYPES, daq_layers

WORDS = (
    "float_class",
    "standardizes",
    "weight_bits",
    "input_bits",
    "weight_dtype",
    "group_size",
    "has_bias",
    "weight_grid",
)


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 3},
        {"weight_bits": 4, "activation_bits": None, "group_size": 5},
        {"bits": 5, "bias_correction": False, "weight_granularity": "channel"},
        {"bits": 4, "weight_grid": "integer"},
    ],
    ids=str,
)
def test_both_forms_say_the_same(config):
    model = hf_daq.apply_daq(small_net(), **config)
    with hf_daq.calibrate(model):
        model(images())
    packed = daq_layers(hf_daq.pack(copy.deepcopy(model)))
    for name, layer in daq_layers(model).items():
        other = packed[name]
        assert [getattr(layer, word) for word in WORDS] == [getattr(other, word) for word in WORDS]
        assert layer.weight_shape() == other.weight_shape() == tuple(layer.weight.shape)
        assert layer.has_bias == (name != "conv")
        assert layer.calibrated
        assert other.calibrated
        torch.testing.assert_close(layer.span, other.span, rtol=0, atol=0)
        for got, want in (
            (layer.codes(), other.codes()),
            (layer.weight_scale, other.weight_scale),
            (layer.quantized_bias(), other.quantized_bias()),
            (layer.quantized_weight(), other.quantized_weight()),
        ):
            assert got is want is None or torch.equal(got, want)
        pairs = zip(*(dataclasses.astuple(integers(form)) for form in (layer, other)), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_packed_classes_know_which_weights_are_standardized():
    for quantized, packed in PACKED_TYPES.items():
        assert packed.standardizes is quantized.standardizes is issubclass(quantized, StandardizedConv)


def test_layers_without_values_are_named():
    layers = daq_layers(hf_daq.apply_daq(small_net(), bits=3))
    with pytest.raises(
        CalibrationError, match=r"'conv' is not calibrated; run hf_daq.calibrate\(model\) before saving"
    ):
        check_calibrated(layers, "saving")
