"""Each remedy that `health` names is tried on networks with the fault, and brings their outputs nearer to the float ones."""

import ast
import copy
import logging
import math
import re

import pytest
import torch
from faults import FAULTS, HIDDEN, fill, wide_inputs
from models import images, small_net
from text_models import tiny_bert, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_daq
from hf_daq.errors import CalibrationError
from hf_daq.report.health import health


def reference():
    model = small_net()
    model.hidden = nn.Linear(16, 48)
    model.head = nn.Linear(48, 5)
    return model


def quantized(model, x, *, check=False, **config):
    model = hf_daq.apply_daq(copy.deepcopy(model), **config)
    return calibrated(model, x, check)


def calibrated(model, x, check=False):
    with hf_daq.calibrate(model, check=check):
        model(x)
    return model


@torch.no_grad()
def difference(model, want):
    """Energy of the error by that of the output; infinite where there is no output."""
    try:
        error = float((model.eval()(PROBE) - want).square().sum() / want.square().sum())
    except CalibrationError:
        return math.inf
    return error if math.isfinite(error) else math.inf


PROBE = images(16, seed=2)
DAMAGED = [fault[:2] for fault in FAULTS if re.search("codes|clipped|negative|bounds|not-calibrated", fault[1])]


@pytest.mark.parametrize(("plant", "problem"), DAMAGED)
def test_what_a_damaged_layer_is_advised_helps(plant, problem):
    plain = reference()
    want = plain(PROBE).detach()
    model = quantized(plain, images(16), bits=4)
    plant(model)
    (message,) = [found.message for found in health(model, PROBE).findings if found.problem == problem]
    before = difference(model, want)
    tried = 0
    for rules in map(ast.literal_eval, re.findall(r"rules=(\[.*?\])", message)):
        assert difference(quantized(plain, images(16), bits=4, rules=rules), want) < 0.5 * before
        tried += 1
    if "calibrate" in message:
        assert difference(calibrated(model, PROBE), want) < 0.5 * before
        tried += 1
    assert tried == len(message.partition("Try: ")[2].split(";")) or "Try" not in message


def test_bounds_that_training_spoilt_are_well_at_a_smaller_quantizer_lr():
    plain = reference()
    want = plain(PROBE).detach()
    found = {}
    for lr in (3.0, 1e-3):
        model = quantized(plain, PROBE, bits=4).train()
        optimizer = torch.optim.Adam(hf_daq.param_groups(model, lr=0.0, quantizer_lr=lr))
        for _ in range(4):
            (model(PROBE) - want).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        messages = [finding.message for finding in health(model, PROBE).findings]
        assert any("smaller quantizer_lr" in message for message in messages) is (lr == 3.0)
        found[lr] = difference(model, want)
    assert found[1e-3] < 0.1 * found[3.0]


def test_weights_that_are_not_finite_are_well_in_an_earlier_checkpoint_at_a_smaller_learning_rate():
    plain = reference()
    want = plain(PROBE).detach()
    model = quantized(plain, PROBE, bits=4)
    earlier = copy.deepcopy(model.state_dict())
    found = {}
    for lr in (1e30, 1e-3):
        model.load_state_dict(earlier)
        optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=lr))
        for _ in range(2):
            (model(PROBE) - want).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[lr] = difference(model, want), {finding.problem for finding in health(model, PROBE).findings}
    assert found[1e30][0] == math.inf
    assert "non-finite-weights" in found[1e30][1]
    assert found[1e-3][0] < 0.5
    assert not found[1e-3][1]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault[1].startswith("unquantized")])
def test_a_bypassed_layer_is_quantized_after_remove_and_apply(fault):
    model = quantized(reference(), PROBE, bits=4)
    fault[0](model)
    assert not health(model, PROBE).ok
    for part in model.hidden.modules():
        part._forward_hooks.clear()
    hf_daq.remove_daq(model)
    vars(model.hidden).pop("forward", None)  # what went around it
    assert health(quantized(model, PROBE, bits=4), PROBE).findings == []


# ------------------------------------------------------------------------------- networks that quantize badly by nature


class Mlp(nn.Module):
    """Six linear layers. `weight`: factor of one weight of the third, undone by the norm before it, as in transformers.
    `channel`: of an input channel of the network, which hardly counts. `cancel`: of three pairs of input channels that
    cancel out. `spike`: one large input."""

    def __init__(self, weight=1.0, channel=1.0, cancel=None, spike=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(80, 80, bias=False) for _ in range(6))
        self.norm = nn.LayerNorm(80)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(0, 80**-0.5)
            self.layers[2].weight[0, 7] *= weight
            self.norm.weight[7] /= weight
            self.layers[0].weight[:, 5] /= channel
            if cancel:
                self.layers[0].weight[:, 11:17:2] = -self.layers[0].weight[:, 10:16:2] / 1.3

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(self.norm(x) if index == 2 else x)
        return x


def inputs(weight=1.0, channel=1.0, cancel=None, spike=None, seed=0):
    x = torch.randn(256, 80, generator=torch.Generator().manual_seed(seed))
    x[:, 5] *= channel
    if cancel:
        x[:, 10:16:2] *= cancel
        x[:, 11:17:2] = 1.3 * x[:, 10:16:2]
    if spike:
        x[0, 9] = spike
    return x


NATURAL = [
    (
        {"channel": 1000.0},
        {"bits": 5, "first_last_bits": 5, "weight_grid": "odd", "smooth": False},
        "low-output-sqnr",
        "skip",
    ),
    ({"cancel": 100.0}, {"weight_bits": 5, "first_last_bits": 5}, "low-output-sqnr", "weight_bits"),
    ({"cancel": 1000.0}, {"weight_bits": 8, "first_last_bits": 8}, "low-output-sqnr", "skip"),
    ({"weight": 300.0}, {"bits": 5}, "dead-weight-codes", "weight_bits"),
    ({"weight": 300.0}, {"bits": 5}, "dead-weight-codes", "weight_granularity='channel'"),
    ({"weight": 3000.0}, {"bits": 8}, "dead-weight-codes", "skip"),
    (
        {"spike": 3000.0},
        {"bits": 5, "first_last_bits": 5, "modules_to_not_convert": ["layers.1"]},
        "dead-input-codes",
        "activation_bits",
    ),
    ({"channel": 1000.0}, {"bits": 8, "first_last_bits": 8, "smooth": False}, "outlier-channels", "skip"),
]
AGAIN = (
    "calibrate again with batches like this one, and train with a smaller quantizer_lr if training moved its bounds; "
)


@pytest.mark.parametrize(("network", "config", "problem", "remedy"), NATURAL)
def test_what_an_awkward_network_is_advised_right_after_calibration_helps(network, config, problem, remedy, caplog):
    model, x = Mlp(**network), inputs(**network)
    before = quantized(model, x, check=True, **config)
    (found,) = [found for found in health(before, x).findings if found.problem == problem]
    said = found.message.replace(AGAIN, "")
    assert remedy in said
    assert said in [entry.getMessage().partition(": ")[2] for entry in caplog.records]
    if "granularity" in remedy:
        better = {"weight_granularity": "channel"}
    else:
        rules = ast.literal_eval(re.search(r"rules=(\[.*?\])", said)[1])
        better = {"rules": [*rules, *config.get("rules", [])]}
    after = quantized(model, x, **config | better)
    assert health(after, x).network_sqnr > health(before, x).network_sqnr + 0.5
    again = [finding for finding in health(after, x).findings if finding.layer == found.layer]
    assert not again or remedy == "weight_bits"


SETTINGS = [
    ({"bits": 4, "weight_normalization": "standardize", "weight_init": "3std"}, "weight_normalization='scale'"),
    ({"bits": 8, "activation_init": "3std"}, "activation_init='mse'"),
    ({"bits": 3, "bias_correction": False}, "bias_correction=True"),
    ({"bits": 3}, "weight_granularity='channel'"),
]


@pytest.mark.parametrize(("config", "setting"), SETTINGS)
def test_settings_that_the_network_is_advised_help(config, setting, caplog):
    model = nn.Sequential(*(part for index in range(4) for part in (nn.Linear(80, 80), nn.GELU())))
    torch.manual_seed(0)
    x = inputs(seed=1)
    x[:, :3] *= 8
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.normal_(0.02, 0.2).mul_(torch.rand(80, 1) * 3)
    before = health(quantized(model, x, check=True, **config), x)
    assert not before.fine
    assert setting in before.settings
    assert setting in str(before).replace("\n", " ")
    assert before.settings[-1:] == (("more bits",) if config["bits"] < 8 else before.settings[-1:])
    key, value = setting.split("=")
    after = health(quantized(model, x, **config | {key: ast.literal_eval(value)}), x)
    assert after.network_sqnr > before.network_sqnr + 0.3
    assert setting not in after.settings


# -------------------------------------------------------------------------------------------------- the model as a whole


def test_the_figure_of_the_network_is_that_of_its_outputs():
    plain = reference()
    with torch.no_grad():
        plain.head.bias += 10  # the same for all images
    model = quantized(plain, images(16), bits=4)
    with torch.no_grad():
        want, got = plain(PROBE), model(PROBE)
    sqnr = 10 * math.log10((want - want.mean(0)).square().sum() / (got - want).square().sum())
    found = health(model, PROBE)
    assert found.network_sqnr == pytest.approx(sqnr, abs=1e-3)
    assert found.fine is (sqnr >= 14)
    assert health(model, PROBE[:1]).network_sqnr > 30, "of one image nothing is taken away"


def test_a_noisy_layer_in_a_fine_network_is_no_alarm(caplog):
    caplog.set_level(logging.INFO, "hf_daq")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(80, 80), Mlp(weight=300.0)

        def forward(self, x):
            return self.main(x) + 0.05 * self.side(x)

    x = inputs()
    both = quantized(Both(), x, check=True, bits=5)
    found = health(both, x)
    assert [finding.problem for finding in found.findings] == ["dead-weight-codes"]
    assert found.fine
    assert found.ok
    assert found.to_dict()["ok"] is True
    assert "dB against its own float weights, fine; findings about noise do no harm" in str(found).replace("\n", " ")
    assert all(entry.levelno == logging.INFO for entry in caplog.records)
    assert len(caplog.records) == 2
    fill(both.side.layers[2].weight, math.nan)
    assert not health(both, x).ok


@pytest.mark.parametrize("break_it", [hf_daq.pack, lambda model: fill(model.hidden.w_quant.upper, math.nan)])
def test_without_float_weights_or_bounds_nothing_is_compared(break_it):
    model = quantized(reference(), PROBE, bits=4)
    break_it(model)
    found = health(model, PROBE)
    assert found.network_sqnr is None
    assert not found.fine
    assert found.settings == ()
    assert str(found).startswith("network: not compared")


def test_padding_does_not_count():
    model = hf_daq.apply_daq(tiny_bert().bert, bits=8)
    mask = torch.ones(8, 7, dtype=torch.int64)
    mask[:, 4:] = 0
    batch = {"input_ids": tokens(8), "attention_mask": mask}
    with hf_daq.calibrate(model):
        model(**batch)
    other = {**batch, "input_ids": torch.where(mask > 0, batch["input_ids"], 3)}
    assert health(model, batch).network_sqnr == pytest.approx(health(model, other).network_sqnr, abs=1e-4)
    everywhere = {"input_ids": batch["input_ids"]}
    assert health(model, everywhere).network_sqnr != pytest.approx(health(model, batch).network_sqnr, abs=1e-4)


def test_a_decoder_that_generates_in_calibration_is_compared(caplog):
    caplog.set_level(logging.INFO, "hf_daq")
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = hf_daq.apply_daq(LlamaForCausalLM(config).eval(), bits=8)
    with hf_daq.calibrate(model):
        model.generate(tokens(4) % 32, max_new_tokens=3, do_sample=False, pad_token_id=0)
    (said,) = [entry.getMessage() for entry in caplog.records if "network" in entry.getMessage()]
    assert re.search(r"SQNR of its outputs around their mean [1-9]\d\.\d dB", said)


def test_dead_inputs_far_from_the_outputs_are_an_alarm_only_if_they_matter():
    model = quantized(reference(), images(16), bits=4)
    wide_inputs(model)
    found = health(model, PROBE)
    assert found.network_sqnr < 1
    assert [finding.layer for finding in found.alarms] == [HIDDEN]
