"""`summary`: every figure against a computation of its own, and the model left as it was."""

import copy
import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import tiny
import torch
from models import images, quantized_timm, small_net, small_timm
from rich.console import Console
from text_models import tiny_bert, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq.errors import CalibrationError, ModelError
from hf_daq.model.roles import saved_tensors
from hf_daq.nn.layers import quantized_layers
from hf_daq.report.summary import LayerSummary, summary


def calibrated(model, x=None, **config):
    x = images(8) if x is None else x
    hf_daq.apply_daq(model, **config)
    with hf_daq.calibrate(model):
        model(x)
    return model


def layer_inputs(model, *args, **kwargs):
    """What each quantized layer gets and gives, as arrays."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
        for name, layer in quantized_layers(model).items()
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def by_name(found):
    return {layer.name: layer for layer in found.layers}


def decibels(signal, difference):
    return 10 * math.log10((signal.astype(np.float64) ** 2).sum() / (difference.astype(np.float64) ** 2).sum())


def share_outside(values, lower, upper):
    """Values on a bound are inside, as after calibration the largest weight often is."""
    margin = 1e-6 * (upper - lower)
    return ((values < lower - margin) | (values > upper + margin)).mean()


def linear_by_hand(layer, x, y):
    """Figures of a linear layer quantized by tensor or channel, from its parameters alone."""
    values = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    weight = values["weight"].T if isinstance(layer, Conv1D) else values["weight"]
    x, y = x.double().numpy(), y.detach().double().numpy()
    size = len(values["w_quant.scale"])
    levels, rows = 2**layer.w_quant.bits - 1, weight.reshape(size, -1)
    unit = np.sqrt((rows**2).mean(1, keepdims=True))
    lower, upper = (unit * values[f"w_quant.{side}"][:, None] for side in ("lower", "upper"))
    codes = np.ceil((np.clip(rows, lower, upper) - lower) / (upper - lower) * levels - 0.5)
    span = 1.0
    found = {}
    if layer.a_quant is not None:
        low, high, top = values["a_quant.lower"][0], values["a_quant.upper"][0], 2**layer.a_quant.bits - 1
        span, step = high - low, (high - low) / top
        zero = round(-low / step)
        input_codes = np.ceil(np.clip(x / step + zero, 0, top) - 0.5)
        outside = share_outside(x, -zero * step, (top - zero) * step)
        found |= {"input_lower": low, "input_upper": high, "zero_point": zero, "inputs_clipped": outside}
        found |= {"input_codes": len(np.unique(input_codes))}
    bits = layer.w_quant.bits
    center = 2 ** (bits - 1) if bits > 2 else levels / 2
    quantized = np.abs(values["w_quant.scale"][:, None]) * (codes - center) / center / span
    return found | {
        "weight_lower": lower.min(),
        "weight_upper": upper.max(),
        "weight_scale": np.abs(values["w_quant.scale"]).mean(),
        "weights_clipped": share_outside(rows, lower, upper),
        "weight_codes": len(np.unique(codes)),
        "weight_sqnr": decibels(rows, rows - quantized),
        "output_sqnr": decibels(x @ weight.T + values["bias"], x @ weight.T + values["bias"] - y),
    }


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [{"bits": 3}, {"weight_bits": 2, "activation_bits": 8}, {"weight_bits": 4}])
def test_the_figures_of_a_linear_layer_are_those_computed_by_hand(bits, granularity):
    x = torch.randn(8, 6, 24, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), Conv1D(32, 24), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4))
    calibrated(model, x / 2, **bits, weight_granularity=granularity)
    inputs = layer_inputs(model, x)
    found = by_name(summary(model, x))
    assert list(found) == ["1", "3"]
    for name, row in found.items():
        layer = model[int(name)]
        for key, value in linear_by_hand(layer, *inputs[name]).items():
            assert getattr(row, key) == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)
        assert row.kind == ("Conv1D" if name == "1" else "Linear")
        assert row.shape == ((32, 24) if name == "1" else (16, 32))
        assert row.parameters == math.prod(row.shape)
        assert row.macs == 6 * row.parameters
        assert row.float_bytes == 4 * row.parameters
        scales = 1 if granularity == "tensor" else row.shape[0]
        assert row.bytes == row.parameters * row.weight_bits / 8 + 4 * scales
        if layer.a_quant is None:
            assert (row.activation_bits, row.input_lower, row.inputs_clipped, row.input_codes) == (None,) * 4


def test_rows_have_the_fields_that_others_build_on():
    names = [field.name for field in dataclasses.fields(LayerSummary)]
    want = """name kind shape weight_bits activation_bits smooth parameters weight_lower weight_upper weight_scale input_lower input_upper
    zero_point weights_clipped inputs_clipped weight_codes input_codes weight_sqnr output_sqnr float_bytes bytes macs path path_error"""
    assert names == want.split()


def test_macs_of_strided_and_grouped_convolutions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2), groups=4),
        nn.ConvTranspose2d(16, 6, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 16 * 16, 10),
    )
    found = summary(calibrated(model, bits=4, first_last_bits=8), images(5))
    assert found.layers[0].macs == 16 * 16 * 8 * 3 * 9
    assert found.layers[1].macs == 8 * 8 * 16 * (8 // 4) * 15
    assert found.layers[1].shape == (16, 2, 3, 5)
    transposed = found.layers[2]
    assert (transposed.name, transposed.kind, transposed.macs) == ("2", "ConvTranspose2d", 8 * 8 * 16 * 6 * 4)
    assert found.layers[3].macs == 6 * 16 * 16 * 10
    assert found.totals["macs"] == {
        "W8A8": found.layers[0].macs + found.layers[3].macs,
        "W4A4": found.layers[1].macs + transposed.macs,
        "float": 0,
    }


class Odd(nn.Module):
    """One layer that runs twice, and one that never does."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x, y=None):
        x = x if y is None else x + y
        return self.last(self.twice(self.twice(x).relu()))


def odd():
    torch.manual_seed(0)
    model = hf_daq.apply_daq(Odd(), bits=2, modules_to_not_convert=["last"], first_last_bits=2)
    x = torch.randn(6, 8)
    forward = model.forward
    model.forward = lambda x: forward(x) + model.never(x)[:, :2]
    with hf_daq.calibrate(model):
        model(x)
    del model.forward
    return model, x


def test_a_layer_called_twice_counts_both_and_one_not_reached_has_no_inputs():
    model, x = odd()
    rows = by_name(summary(model, x))
    assert rows["twice"].macs == 2 * 64
    never = rows["never"]
    assert (never.macs, never.inputs_clipped, never.input_codes, never.output_sqnr) == (None,) * 4
    assert never.weight_sqnr > 0
    inputs = []
    hook = model.twice.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(x)
    hook.remove()
    codes = torch.cat([model.twice.a_quant.codes(part).flatten() for part in inputs])
    assert rows["twice"].input_codes == len(codes.unique())


def test_a_batch_is_a_tensor_a_mapping_or_a_tuple():
    model, x = odd()
    want = summary(model, x + x).layers
    assert summary(model, (x, x)).layers == want
    assert summary(model, {"x": x, "y": x}).layers == want
    with pytest.raises(ModelError, match="batch is a list; pass a tensor, a mapping"):
        summary(model, [x])


def packed_bytes(model):
    return sum(value.numel() * value.itemsize for value in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("test_resnet", {"bits": 3}),
        ("test_vit", {"weight_bits": 2, "activation_bits": 4, "weight_granularity": "channel"}),
        ("test_convnext", {"weight_bits": 4, "activation_bits": 8, "group_size": 7}),
        ("test_nfnet", {"weight_bits": 4}),
        ("test_efficientnet", {"bits": 1}),
    ],
)
def test_totals_are_the_bytes_and_weights_of_the_float_and_of_the_packed_model(name, config):
    float_model, model = small_timm(name), quantized_timm(name, **config)
    before = summary(model, images(2, 32))
    totals = before.totals
    assert totals["bytes_before"] == packed_bytes(float_model)
    parameters = sum(value.numel() for value in float_model.parameters())
    assert sum(totals["weights"].values()) == sum(row.parameters for row in [*before.layers, *before.kept])
    # A gain is folded into the codes of its standardized convolution.
    gains = sum(layer.gain.numel() for layer in quantized_layers(model).values() if hasattr(layer, "gain"))
    assert sum(totals["weights"].values()) + totals["other_parameters"] + gains == parameters
    hf_daq.pack(model)
    assert totals["bytes_after"] == packed_bytes(model)
    assert totals["compression"] == pytest.approx(packed_bytes(float_model) / packed_bytes(model))
    after = summary(model, images(2, 32))
    assert after.totals["bytes_after"] == totals["bytes_after"]
    assert after.totals["weights"] == totals["weights"]
    assert after.totals["macs"] == totals["macs"]
    missing = ("weight_lower", "weight_upper", "weights_clipped", "weight_sqnr", "output_sqnr")
    for one, other in zip(before.layers, after.layers, strict=True):
        assert other.path_error < 1e-6
        path = {"path": other.path, "path_error": other.path_error}
        assert dataclasses.replace(one, **dict.fromkeys(missing), **path) == other


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # without and with biases
@pytest.mark.parametrize(
    "config",
    [
        {"bits": 8},
        {"weight_bits": 4, "weight_granularity": "channel"},
        {"weight_bits": 4, "activation_bits": 8, "rules": [{"pattern": "*.experts.down", "skip": True}]},
    ],
)
def test_experts_count_once(name, config):
    float_model, model = tiny.build(name), tiny.build(name)
    inputs = tiny.inputs(name)
    hf_daq.apply_daq(model, **config)
    with hf_daq.calibrate(model, check=False):
        model(**inputs)
    before = summary(model, inputs).totals
    hf_daq.pack(model)
    after = summary(model, inputs).totals
    for totals in (before, after):
        parameters = sum(value.numel() for value in float_model.parameters())
        assert sum(totals["weights"].values()) + totals["other_parameters"] == parameters
        assert totals["bytes_before"] == sum(map(nbytes, saved_tensors(float_model)))
        assert totals["bytes_after"] == sum(map(nbytes, saved_tensors(model)))


def nbytes(value):
    return value.numel() * value.itemsize


def test_groups_bf16_and_transformers_models():
    model = calibrated(tiny_bert(), tokens(), weight_bits=4, activation_bits=8, group_size=5)
    found = summary(model, {"input_ids": tokens(), "attention_mask": torch.ones(4, 7, dtype=torch.int64)})
    dense = by_name(found)["bert.encoder.layer.0.intermediate.dense"]
    layer = model.bert.encoder.layer[0].intermediate.dense
    rows = layer.weight.detach().double().numpy().reshape(48, 32)
    lower, upper = (
        value.detach().double().numpy().reshape(48, 7) for value in (layer.w_quant.lower, layer.w_quant.upper)
    )
    lowest, outside = [], 0
    for channel in range(48):
        for group in range(7):  # 6 of 5 columns and one of 2
            part = rows[channel, 5 * group : 5 * group + 5]
            unit = np.sqrt((part**2).mean())
            lowest.append(unit * lower[channel, group])
            outside += share_outside(part, lowest[-1], unit * upper[channel, group]) * len(part)
    assert dense.weight_lower == pytest.approx(min(lowest), rel=1e-5)
    assert dense.weights_clipped == pytest.approx(outside / rows.size)
    assert dense.bytes == 32 * 48 // 2 + 4 * 48 * 7
    assert dense.macs == 7 * 32 * 48
    embedding = next(row for row in found.kept if row.kind == "Embedding")
    assert embedding.macs == 0
    half = summary(model.bfloat16(), {"input_ids": tokens()})
    assert by_name(half)[dense.name].float_bytes == 2 * 32 * 48
    assert by_name(half)[dense.name].output_sqnr == pytest.approx(dense.output_sqnr, abs=1)
    only = hf_daq.apply_daq(tiny_bert().bfloat16(), weight_bits=4)
    assert set(summary(only, tokens()).totals["macs"]) == {"W4", "float"}


def test_tied_weights_count_once_in_the_totals():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.middle(self.embedding(x)))

    found = summary(hf_daq.apply_daq(Tied(), weight_bits=4), torch.arange(6).view(2, 3))
    assert [row.macs for row in found.kept] == [0, 3 * 160]
    assert found.totals["weights"] == {"W4": 64, "float": 160}
    assert found.totals["bytes_before"] == 4 * (160 + 64 + 8)


def test_the_model_is_left_as_it_was():
    model = calibrated(small_net(), bits=3)
    model.train()
    model.norm.eval()
    model(images())
    layers = quantized_layers(model)
    own = model.hidden.forward = model.hidden.forward
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    summary(model, images())
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert vars(model.hidden)["forward"] is own
    assert not any("_kept" in vars(layer) for layer in layers.values())
    model.eval()
    with torch.no_grad():
        model(images())
    kept = [vars(layer)["_kept"] for layer in layers.values()]
    summary(model, images())
    assert all(vars(layer)["_kept"] is weight for layer, weight in zip(layers.values(), kept, strict=True))


def test_compiled_models_are_measured_as_the_others():
    model = calibrated(small_net(), bits=3)
    want = summary(model, images()).layers
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images())
    rows = [
        dataclasses.replace(row, name=row.name.removeprefix("_orig_mod.")) for row in summary(compiled, images()).layers
    ]
    assert rows == want


def test_a_model_that_fails_is_left_as_it_was():
    model = calibrated(small_net(), bits=3)
    model.train()
    with pytest.raises(RuntimeError):
        summary(model, torch.ones(2, 5, 4, 4))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_batch_there_are_no_figures_of_inputs():
    found = summary(calibrated(small_net(), bits=3))
    for row in found.layers:
        assert (row.macs, row.inputs_clipped, row.input_codes, row.output_sqnr) == (None,) * 4
        assert row.input_upper > 0
    assert (found.totals["macs"], found.totals["macs_quantized"]) == (None, None)
    assert "MACs: " not in str(found).splitlines()[-1]


def test_equal_outputs_have_an_infinite_ratio_and_json_has_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.0, 1.0]).repeat(4, 2))
    hf_daq.apply_daq(model, weight_bits=1)
    found = summary(model, torch.randn(3, 4))
    assert found.layers[0].weight_sqnr == math.inf
    assert found.layers[0].output_sqnr == math.inf
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["layers"][0]["output_sqnr"] == "inf"
    assert plain["layers"][0]["shape"] == [4, 4]
    assert plain["totals"]["weights"] == {"W1": 16, "float": 24}
    assert [row["name"] for row in plain["kept"]] == ["0", "2"]


def test_a_dataframe_has_a_row_for_each_layer(monkeypatch):
    found = summary(calibrated(small_net(), bits=3), images())
    frame = found.to_dataframe()
    assert list(frame["name"]) == [row.name for row in found.layers]
    assert frame["macs"].sum() == found.totals["macs"]["W3A3"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModelError, match=r"hf-daq\[plots\]"):
        found.to_dataframe()


def test_the_text_is_whole_and_names_are_no_markup():
    model = calibrated(small_net(), bits=3)
    found = summary(model, images())
    name = "[bold red]a[/] :smile: [link=http://x]" + "long" * 60
    layers = [
        dataclasses.replace(found.layers[0], name=name),
        dataclasses.replace(found.layers[1], name="a\x1b[31m\nb"),
    ]
    text = dataclasses.replace(found, layers=layers + found.layers[2:]).to_text(wide=True)
    assert name in text
    assert "a[31m b" in text
    assert "…" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert sum("Conv2d" in line or "Linear" in line for line in lines) == len(found.layers) + len(found.kept)
    assert lines[-1].startswith("MACs: ")
    assert "MB in float" in lines[-2]


def folded_name(lines):
    """A name that stands in the first cells of some lines."""
    return "".join(line.split()[0] for line in lines if line.strip())


def test_the_text_has_what_matters_in_80_columns():
    found = summary(quantized_timm(), images(2, 64))
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(f"{lines[0]} {lines[1]}".split()) == (
        "clip clip SQNR SQNR packed MACs layer bits W % A % W dB out dB kB 10^6"
    )
    rows = {line.split()[0]: line.split()[1:] for line in lines[3 : 3 + len(found.layers) + len(found.kept)]}
    for layer in found.layers:
        shares = [f"{100 * value:.1f}" for value in (layer.weights_clipped, layer.inputs_clipped)]
        noise = [f"{value:.1f}" for value in (layer.weight_sqnr, layer.output_sqnr)]
        rest = [f"{layer.bytes / 1e3:,.1f}", f"{layer.macs / 1e6:,.2f}"]
        assert rows[layer.name] == ["W3A3", *shares, *noise, *rest]
    assert rows["fc"] == ["float", *"----", "3.8", "0.00"]


def test_long_names_fold_at_points_and_figures_stay_whole():
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=3, activation_bits=8)
    with hf_daq.calibrate(model):
        model(tokens())
    found = summary(model, {"input_ids": tokens()})
    lines = [f"{line} " for line in str(found).splitlines()]
    assert max(map(len, lines)) <= 81
    start = next(i for i, line in enumerate(lines) if line.startswith("bert.encoder.layer.0.attention. "))
    assert folded_name(lines[start : start + 2]) == "bert.encoder.layer.0.attention.self.query"
    assert lines[start].split()[1] == "W3A8"
    text = str(dataclasses.replace(found, layers=[dataclasses.replace(found.layers[0], name="n" * 90)]))
    assert re.search("n{90} +W3A8 ", text), "a name without points makes the text wider"


def test_columns_without_figures_are_left_out():
    lines = str(summary(calibrated(small_net(), bits=3))).splitlines()
    assert lines[1].split() == ["layer", "bits", "W", "%", "W", "dB", "kB"]
    assert "MACs" not in "".join(lines)


def test_wide_text_has_all_figures():
    found = summary(quantized_timm(), images(2, 64))
    text = found.to_text(wide=True)
    assert max(map(len, text.splitlines())) <= 160
    assert sum("Conv2d" in line for line in text.splitlines()) == 15
    assert "48x32x3x3" in text
    assert "lower" in text.splitlines()[0]


@pytest.mark.parametrize("wide", [False, True])
def test_rich_prints_it_whole(wide):
    columns = 160 if wide else 80
    console = Console(width=columns, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = summary(quantized_timm(), images(2, 64))
    console.print(found.to_table(wide=True) if wide else found)
    text = console.export_text()
    assert "…" not in text
    assert [line.rstrip() for line in text.splitlines()] == found.to_text(wide).splitlines()
    console.file.close()


def test_models_without_figures_are_refused():
    with pytest.raises(ModelError, match="no layer of this SmallNet is"):
        summary(small_net(), images())
    with pytest.raises(CalibrationError, match=r"layer 'conv' has no usable bounds: calibrate first"):
        summary(hf_daq.apply_daq(small_net(), bits=3))
    model = calibrated(small_net(), bits=3)
    with torch.no_grad():
        model.hidden.w_quant.lower.fill_(math.nan)
    with pytest.raises(CalibrationError, match=r"layer 'hidden' .*hf_daq\.health"):
        summary(model, images())
    with pytest.raises(ModelError, match="summary needs whole weights, but those of 'conv' are on the meta"):
        summary(calibrated(small_net(), bits=3).to("meta"))
