"""`health`: each planted fault is found at its layer and nowhere else, and well models have no findings."""

import copy
import json
import math
import re
from dataclasses import dataclass

import pytest
import torch
from faults import (
    FAULTS,
    HIDDEN,
    crossed_bounds,
    fill,
    layer_not_quantized,
    narrow_inputs,
    wide_inputs,
    wide_weights,
)
from models import images, quantized_timm, small_net
from text_models import tiny_bert, tokens
from torch import nn

import hf_daq
from hf_daq.errors import ModelError
from hf_daq.nn.layers import quantized_layers
from hf_daq.report.health import Finding, Health, health


def network(**config):
    """Quantized at 4 bits; as its layers are small, weights use every code only at few bits."""
    model = small_net()
    model.hidden = nn.Linear(16, 48)
    model.head = nn.Linear(48, 5)
    config = {"bits": 4} | config
    hf_daq.apply_daq(model, **config)
    with hf_daq.calibrate(model):
        model(images(16))
    return model


def problems(model, batch=None):
    return [
        (found.layer, found.problem) for found in health(model, images(16, seed=2) if batch is None else batch).findings
    ]


@pytest.mark.parametrize("bits", [1, 3, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4))])
@pytest.mark.parametrize("granularity", ["tensor", pytest.param("channel", marks=pytest.mark.slow)])
def test_well_models_have_no_findings(bits, granularity):
    model = quantized_timm(bits=bits, weight_granularity=granularity)
    assert health(model, images(8, 64, seed=4)).findings == []
    assert health(hf_daq.pack(model), images(8, 64, seed=4)).ok


@pytest.mark.parametrize(
    "config", [{"bits": 2}, {"weight_bits": 4}, {"weight_bits": 4, "activation_bits": 8, "group_size": 5}]
)
def test_well_transformers_models_have_no_findings(config):
    model = hf_daq.apply_daq(tiny_bert(), **config)
    with hf_daq.calibrate(model):
        model(tokens(16))
    batch = {"input_ids": tokens(16), "attention_mask": torch.ones(16, 7, dtype=torch.int64)}
    assert health(model, batch).findings == []
    assert health(model.bfloat16(), batch).findings == []


@pytest.mark.parametrize(("plant", "problem", "layer", "message"), FAULTS)
def test_a_planted_fault_is_found(plant, problem, layer, message):
    model = network()
    assert problems(model) == []
    plant(model)
    found = health(model, images(16, seed=2))
    assert not found.ok
    assert {finding.layer for finding in found.findings} == {layer}
    finding = next(finding for finding in found.findings if finding.problem == problem)
    assert math.isfinite(finding.value) or problem == "unquantized-outputs"
    assert re.search(message, finding.message), finding.message


def test_a_scale_that_is_off_is_found_against_layers_of_the_same_bits():
    model = quantized_timm(bits=4)
    scale = model.layer2[0].conv1.w_quant.scale
    fill(scale, 6 * scale.item())
    (finding,) = health(model, images(8, 64, seed=4)).findings
    assert (finding.layer, finding.problem) == ("layer2.0.conv1", "low-output-sqnr")
    assert finding.value < 0
    assert re.search(
        r"SQNR of -\d+\.\d dB, the median of layers with as many bits is 2\d\.\d dB.*'bits': 8}\]", finding.message
    )


@pytest.mark.parametrize(
    ("config", "advice"),
    [({"weight_bits": 4}, "'weight_bits': 8"), ({"bits": 8}, "keep it in float: rules=.*'skip': True")],
)
def test_advice_fits_the_bits(config, advice):
    model = quantized_timm(**config)
    fill(model.layer2[0].conv1.w_quant.scale, 40.0)
    findings = {found.problem: found.message for found in health(model, images(8, 64, seed=4)).findings}
    assert re.search(advice, findings["low-output-sqnr"])
    assert "calibrate again" in findings["low-output-sqnr"]


def test_a_model_before_calibration_is_looked_at_too():
    model = hf_daq.apply_daq(small_net(), bits=3)
    assert problems(model) == [(name, "not-calibrated") for name in quantized_layers(model)]
    assert all("forward" not in vars(layer) for layer in quantized_layers(model).values())


def test_layers_behind_a_broken_one_are_looked_at_with_its_float_output():
    model = network()
    fill(model.conv.a_quant.upper, math.nan)
    wide_inputs(model)
    assert problems(model) == [("conv", "non-finite-bounds"), (HIDDEN, "dead-input-codes")]


def test_a_layer_that_is_not_reached_is_found():
    model = network()
    model.forward = lambda x: model.head.bias + model.features(x).mean()
    assert problems(model) == [(HIDDEN, "not-reached")]
    (finding,) = health(model, images()).findings
    assert "modules_to_not_convert=['hidden']" in finding.message


def test_faults_of_packed_models_are_found():
    model = hf_daq.pack(network())
    assert problems(model) == []
    packed = copy.deepcopy(model)
    wide_inputs(packed)
    assert problems(packed) == [(HIDDEN, "dead-input-codes")]
    packed = copy.deepcopy(model)
    packed.hidden.weight_scale.fill_(math.nan)
    assert (HIDDEN, "non-finite-bounds") in problems(packed)
    packed = copy.deepcopy(model)
    packed.hidden.weight_codes.zero_()
    assert problems(packed) == [(HIDDEN, "dead-weight-codes")]
    packed = copy.deepcopy(model)
    weight = torch.randn(48, 16)
    packed.hidden.quantized_weight = lambda dtype=None: weight
    assert problems(packed) == [(HIDDEN, "unquantized-weights")]


def test_few_values_say_nothing_about_codes():
    model = network(bits=8)  # hidden has three weights for each code
    wide_weights(model)
    assert (HIDDEN, "dead-weight-codes") not in problems(model)


def test_inputs_of_zeros_are_not_taken_for_a_layer_in_float():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    hf_daq.apply_daq(model, weight_bits=4)
    fill(model[0].weight, 0)
    fill(model[0].bias, 0)
    assert problems(model, torch.randn(4, 8)) == []


def test_the_model_is_left_as_it_was():
    model = network()
    crossed_bounds(model)
    model.train()
    own = model.hidden.forward = model.hidden.forward
    state = copy.deepcopy(model.state_dict())
    assert not health(model, images()).ok
    assert all(module.training for module in model.modules())
    assert vars(model.hidden)["forward"] is own
    assert all("forward" not in vars(layer) for layer in quantized_layers(model).values() if layer is not model.hidden)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_json_and_text():
    model = network()
    layer_not_quantized(model)
    narrow_inputs(model)
    found = health(model, images())
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["ok"] is False
    assert plain["layers"] == 6 - 2
    assert {"layer": HIDDEN, "problem": "unquantized-outputs", "value": "inf"}.items() <= plain["findings"][0].items()
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("network: SQNR of its outputs around their mean ")
    assert lines[lines.index("") + 1] == f"{HIDDEN}: unquantized-outputs"
    assert lines[lines.index("") + 2].startswith("  its output is that of the float layer")
    text = str(found)
    assert "2 findings in 4 quantized layers" in text
    well = health(network(), images())
    assert re.fullmatch(r"network: SQNR .* dB against its own .*\nno findings in 4 quantized layers", str(well), re.S)
    assert well.to_dict().items() >= {"ok": True, "findings": [], "layers": 4}.items()
    assert well.to_dict()["network_sqnr"] == well.network_sqnr


def test_names_are_no_markup_and_nothing_is_cut():
    name = "[bold]a[/bold]\x1b[31m" + "." + "long" * 40
    text = str(Health([Finding(name, "dead-weight-codes", 2.0, f"[red]of {name!r}[/red] " + "many words " * 60)], 3))
    assert "[bold]a[/bold][31m." in text
    assert "[red]of" in text
    assert "\x1b" not in text
    assert text.count("long" * 40) == 2, "names are never broken"
    assert text.split().count("many") == 60
    assert "…" not in text
    assert "1 finding in 3 quantized layers" in text


def test_models_and_batches_it_cannot_look_at_are_refused():
    with pytest.raises(ModelError, match="health needs a quantized or packed model, and no layer of this SmallNet is"):
        health(small_net(), images())
    with pytest.raises(ModelError, match="batch is a NoneType; pass a tensor"):
        health(network(), None)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_channel_a_thousand_times_larger_is_said_and_the_advice_helps(kind, caplog):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.Linear(32, 4)] if kind == "linear" else [nn.Conv2d(64, 32, 3), nn.Conv2d(32, 4, 3)]
    x = torch.randn(256, 64) if kind == "linear" else torch.randn(4, 64, 8, 8)
    x[:, 5] *= 1000
    with torch.no_grad():
        layers[0].weight[:, 5] /= 1000
    reference, errors = nn.Sequential(*layers), []
    want = reference(x).detach()
    for config in ({"smooth": False}, {"rules": [{"pattern": "0", "skip": True}]}, {}):
        if not config and kind == "convolution":
            continue  # whose channels calibration does not divide
        caplog.clear()
        model = hf_daq.apply_daq(copy.deepcopy(reference), bits=8, first_last_bits=8, **config)
        with hf_daq.calibrate(model):
            model(x)
        errors.append(float((model(x).detach() - want).norm() / want.norm()))
        said = [record.getMessage() for record in caplog.records]
        found = [message for message in said if "'0': 63 of its 64 input channels are lost" in message]
        assert found if "smooth" in config else not said
    assert errors[0] > 0.5
    assert max(errors[1:]) < 0.05


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_shift_that_makes_few_positions_exact_is_no_bypass(rows):
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))
    hf_daq.apply_daq(model, weight_bits=8, modules_to_not_convert=["1"], first_last_bits=8)
    x = torch.randn(1, 32).expand(rows, 32)
    with hf_daq.calibrate(model):
        model(x)
    layer = model[0]
    want = nn.functional.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad():
        layer.w_quant.shift.add_((want - layer(x))[0])
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert "unquantized-outputs" not in dict(problems(model, x)).values()


def test_a_batch_without_examples_is_refused():
    with pytest.raises(ModelError, match="the batch has no examples"):
        health(network(), torch.empty(0, 3, 16, 16))


@dataclass
class Answer:
    name: str
    scores: torch.Tensor


def test_a_model_that_answers_with_a_dataclass_is_compared(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return Answer("scores", self.net(x))

    model = hf_daq.apply_daq(Named(), bits=4)
    with hf_daq.calibrate(model):
        model(images(16))
    found = health(model, images(16, seed=2))
    assert found.network_sqnr == pytest.approx(health(model.net, images(16, seed=2)).network_sqnr, abs=1e-3)
