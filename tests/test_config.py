"""`DaqConfig` is a contract: validated on construction, rejecting what it does not know, the same after JSON."""

import copy
import inspect
import json
import pickle

import pytest
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.config import pattern_matches
from hf_daq.errors import ConfigError


def test_bits_sets_both_sides_and_weights_only_is_the_default_without_it():
    both, weights = DaqConfig(bits=3), DaqConfig(weight_bits=3)
    assert (both.weight_bits, both.activation_bits) == (3, 3)
    assert (weights.weight_bits, weights.activation_bits) == (3, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"DaqConfig\(bits=3\)"),
        ({"weight_bits": None}, r"DaqConfig\(bits=3\)"),
        ({"bits": 3, "weight_bits": 2}, "pass either bits"),
        ({"bits": 0}, "weight_bits=0 is out of range.*1 to 8"),
        ({"bits": 9}, "weight_bits=9"),
        ({"bits": True}, "weight_bits=True"),
        ({"weight_bits": 2, "activation_bits": 2.5}, "activation_bits=2.5"),
        ({"bits": 2, "first_last_bits": 16}, "first_last_bits=16"),
        ({"bits": 2, "rounding": "lsq"}, "rounding='lsq' is not one of 'daq', 'ste', 'soft'"),
        ({"bits": 2, "weight_granularity": "row"}, "weight_granularity='row' is not one of .*'group'"),
        ({"bits": 2, "weight_granularity": "channel", "group_size": 64}, "has no groups; leave out group_size=64"),
        ({"bits": 2, "group_size": 1}, "group_size=1 must be a whole number from 2 on"),
        ({"bits": 2, "group_size": True}, "group_size=True"),
        ({"bits": 2, "dequantize": "yes"}, "dequantize='yes' must be True or False"),
        ({"bits": 2, "weight_sigma": 0}, "weight_sigma=0 must be a number above 0"),
        ({"bits": 2, "weight_gamma": float("nan")}, "weight_gamma=nan"),
        ({"bits": 2, "bias_correction": 1}, "bias_correction=1 must be True or False"),
        ({"bits": 2, "rules": "layer1"}, "rules='layer1' must be a list"),
        ({"bits": 2, "rules": [{"bits": 8}]}, "mapping with a pattern"),
        ({"bits": 2, "rules": [{"pattern": "a", "width": 8}]}, "unknown key 'width'"),
        ({"bits": 2, "rules": [{"pattern": "a", "bits": 12}]}, "rule 'a': bits=12"),
        ({"bits": 2, "rules": [{"pattern": "a", "skip": 1}]}, "skip must be True or False"),
        ({"bits": 2, "rules": [{"pattern": "a", "skip": True, "bits": 2}]}, "must say one thing"),
        ({"bits": 2, "rules": [{"pattern": "a"}]}, "must say one thing"),
        ({"bits": 2, "rules": [{"pattern": "re:(", "bits": 2}]}, "not a regular expression"),
        (
            {"weight_bits": 2, "scale_dtype": "float32"},
            "scale_dtype='float32' is not one of 'float16', 'bfloat16', None",
        ),
        (
            {"bits": 2, "scale_dtype": "float16"},
            "weights only.*and activation_bits quantizes inputs to 2 bits; write weight_bits=2",
        ),
        (
            {"weight_bits": 2, "scale_dtype": "float16", "rules": [{"pattern": "a", "bits": 8}]},
            "and rule 'a' quantizes inputs to 8 bits",
        ),
        (
            {
                "weight_bits": 2,
                "scale_dtype": "bfloat16",
                "layers": {"a": {"weight_bits": 2, "activation_bits": 4}},
            },
            r"and layers\['a'\] quantizes inputs to 4 bits",
        ),
        ({"bits": 2, "modules_to_not_convert": [3]}, "pattern 3 must be a glob"),
        ({"bits": 2, "layers": {}}, "must map module names"),
        ({"bits": 2, "layers": {"a": {"weight_bits": 2}}}, "weight_bits and activation_bits"),
        ({"bits": 2, "layers": {"a": {"weight_bits": 99, "activation_bits": None}}}, "weight_bits=99"),
    ],
)
def test_invalid_values_name_the_value_and_the_rule(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DaqConfig(**arguments)


def full_config() -> DaqConfig:
    return DaqConfig(
        weight_bits=2,
        activation_bits=None,
        rounding="soft",
        weight_sigma=3,
        weight_granularity="channel",
        scale_dtype="bfloat16",
        first_last_bits=8,
        rules=[
            {"pattern": "layer1.*", "weight_bits": 4, "activation_bits": None},
            {"pattern": "re:.*down.*", "skip": True},
        ],
        modules_to_not_convert=["layer4"],
        layers={"layer1.0": {"weight_bits": 4, "activation_bits": None}},
    )


@pytest.mark.parametrize("config", [DaqConfig(bits=1), DaqConfig.paper(weight_bits=1), full_config()])
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert DaqConfig.from_dict(values) == config
    assert (values["format_version"], values["quant_method"]) == (2, "daq")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bit": 3}, r"unknown key 'weight_bit' \(did you mean 'weight_bits'"),
        ({"preset": "old"}, "preset='old' must be 'paper'"),
        ({"format_version": 3}, "install a newer hf_daq"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"quant_method": "gptq"}, "not DAQ settings"),
    ],
)
def test_from_dict_rejects_what_it_does_not_know(change, message):
    with pytest.raises(ConfigError, match=message):
        DaqConfig.from_dict(DaqConfig(bits=3).to_dict() | change)


def test_from_dict_takes_a_mapping():
    with pytest.raises(ConfigError, match="must be a mapping, got list"):
        DaqConfig.from_dict([])


def test_from_dict_reads_the_preset_of_the_paper():
    assert DaqConfig.from_dict({"preset": "paper", "bits": 2}) == DaqConfig.paper(2)
    assert DaqConfig.from_dict({"preset": None, "bits": 2}) == DaqConfig(bits=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: DaqConfig(weight_bit=4),
        lambda: DaqConfig.paper(weight_bit=4),
        lambda: DaqConfig(bits=3).replace(weight_bit=4),
        lambda: hf_daq.apply_daq(nn.Linear(4, 4), weight_bit=4),
        lambda: hf_daq.plan(nn.Linear(4, 4), weight_bit=4),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_closest_one(call):
    with pytest.raises(ConfigError, match=r"unknown key 'weight_bit' \(did you mean 'weight_bits'"):
        call()


def test_editors_see_the_fields():
    parameters = inspect.signature(DaqConfig).parameters
    assert list(parameters)[:3] == ["bits", "weight_bits", "activation_bits"]
    assert copy.deepcopy(full_config()) == pickle.loads(pickle.dumps(full_config())) == full_config()


def test_the_papers_settings():
    paper = DaqConfig.paper(weight_bits=1, activation_bits=1, rounding="ste")
    assert (paper.weight_normalization, paper.weight_init, paper.activation_init) == ("standardize", "3std", "3std")
    assert (paper.weight_gamma, paper.weight_sigma, paper.activation_sigma, paper.rounding) == (2, 1, 2, "ste")


def test_replace_validates():
    assert DaqConfig(bits=3).replace(weight_bits=5).weight_bits == 5
    with pytest.raises(ConfigError, match="weight_bits=50"):
        DaqConfig(bits=3).replace(weight_bits=50)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("layer1", "layer1.0.conv1", True),
        ("layer1.*.conv1", "layer1.0.conv1", True),
        ("layer", "layer1.0.conv1", False),
        ("re:layer[12]", "layer2.0.conv1", True),
        ("re:.*conv2", "layer2.0.conv1", False),
        ("*.conv?", "layer2.0.conv1", True),
    ],
)
def test_a_pattern_covers_what_it_names_and_everything_below(pattern, name, matches):
    assert pattern_matches(pattern, name) is matches
