"""timm models: what `plan` keeps, the layer types, and the whole way for a dozen families."""

import pytest
import timm
import timm.layers
import torch
from scan_timm import check_architecture

import hf_daq

FAMILIES = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_nfnet",
    "test_mambaout",
    "test_maxvit",
    "tf_mobilenetv3_small_minimal_100",
    "regnety_002",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "swinv2_tiny_window8_256",
    "beit_base_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "tf_efficientnet_cc_b0_4e",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_calibrate_train_save_reload_remove(name):
    assert check_architecture(name).problems == []


@pytest.mark.parametrize(
    "config", [{"weight_bits": 2, "weight_granularity": "channel"}, {"bits": 8, "first_last_bits": 8}]
)
def test_other_settings_go_the_whole_way(config):
    problems = check_architecture("test_resnet", **config).problems
    expected = (
        ["nothing is kept as first layer", "nothing is kept as classifier"] if "first_last_bits" in config else []
    )
    assert problems == expected


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def kept(model, **config):
    return {name: layer.reason for name, layer in hf_daq.plan(model, bits=4, **config).kept.items()}
