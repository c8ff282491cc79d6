"""Figures show what they say: their data against independent computations, and models left as they were."""

import io
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from models import images, small_net
from PIL import Image
from text_models import tiny_bert, tokens

import hf_daq
from hf_daq import plots
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.nn.layers import quantized_layers
from measure import plots as recipe

LAYERS = ["conv", "depthwise", "grouped", "hidden"]


def quantized(**kwargs):
    model = hf_daq.apply_daq(small_net(), **(kwargs or {"bits": 3}))
    with hf_daq.calibrate(model):
        model(images())
    return model


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("L"))


def lines(axis, label):
    return [line for line in axis.lines if line.get_label() == label]


def places(axis, label):
    return [line.get_xdata()[0] for line in lines(axis, label)]


def stairs(axis):
    (found,) = [patch for patch in axis.patches if type(patch).__name__ == "StepPatch"]
    return found.get_data()


def codes(axis):
    (line,) = lines(axis, "value and share of a code")
    return line.get_xdata(), line.get_ydata()


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state(),
    )


def same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_weights_lie_on_the_grid_of_their_tensor(bits):
    model = quantized(bits=bits)
    figure = plots.weight_histogram(model)
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == LAYERS
    assert figure.get_suptitle() == "Float weights and their codes, all layers"
    for name, axis in zip(LAYERS, figure.axes, strict=True):
        layer = model.get_submodule(name)
        weight, quantizer = layer.weight.detach().double().numpy(), layer.w_quant
        unit = math.sqrt((weight**2).mean())
        start, end = unit * quantizer.lower.item(), unit * quantizer.upper.item()
        step = (end - start) / (2**bits - 1)
        assert places(axis, "bounds") == pytest.approx([start, end], rel=1e-5)
        thresholds = places(axis, "thresholds")
        assert thresholds == pytest.approx([start + (code + 0.5) * step for code in range(2**bits - 1)], abs=1e-6)
        heights, edges, _ = stairs(axis)
        share = heights * np.diff(edges) / step / 100
        assert share.sum() == pytest.approx(1)
        for threshold in thresholds:  # bins end there
            assert share[edges[1:] <= threshold + 1e-6].sum() == pytest.approx((weight < threshold).mean(), abs=2e-3)
        levels, shares = codes(axis)
        values = layer.quantized_weight().detach() / layer.a_quant.span
        present, counts = values.unique(return_counts=True)
        assert levels[shares > 0] == pytest.approx(present.detach().numpy(), rel=1e-4)
        assert shares[shares > 0] == pytest.approx(100 * counts.numpy() / weight.size)
        clipped = (weight < start - 1e-4 * step) | (
            weight > end + 1e-4 * step
        )  # not the weight that the bound came from
        assert axis.get_title() == f"{name}\n{bits} bit{'s'[: bits - 1]}, {100 * clipped.mean():.1f} % clipped"
    assert pixels(figure).std() > 10


def test_bounds_of_channels_and_groups_are_one_grid():
    model = quantized(weight_bits=2, weight_granularity="channel")
    (axis,) = plots.weight_histogram(model, "hidden").axes
    weight, quantizer = model.hidden.weight.detach().numpy(), model.hidden.w_quant
    unit = np.sqrt((weight**2).mean(1, keepdims=True))
    start, end = (unit * bound.detach().numpy()[:, None] for bound in (quantizer.lower, quantizer.upper))
    position = 2 * (weight - start) / (end - start) - 1
    heights, edges, _ = stairs(axis)
    assert axis.get_xlabel() == "weight, channel bounds at ±1"
    assert places(axis, "thresholds") == pytest.approx([-2 / 3, 0, 2 / 3])
    share = heights * np.diff(edges) / (2 / 3) / 100
    assert share.sum() == pytest.approx(1)
    assert share[edges[1:] < 1e-6].sum() == pytest.approx((position < 0).mean())
    levels, shares = codes(axis)
    scale = (quantizer.scale.abs().detach().numpy()[:, None] / ((end - start) / 2)).ravel()
    middle = ((end + start) / (end - start)).ravel()
    assert levels == pytest.approx(np.array([-1, -1 / 3, 1 / 3, 1]) * np.median(scale) - np.median(middle), rel=1e-4)
    assert shares.sum() == pytest.approx(100)

    grouped = quantized(weight_bits=2, group_size=5)  # 16 columns: the last group of a channel has one
    (axis,) = plots.weight_histogram(grouped, ["hidden"]).axes
    heights, edges, _ = stairs(axis)
    assert (heights * np.diff(edges)).sum() / (2 / 3) == pytest.approx(100)
    assert axis.get_xlabel() == "weight, group bounds at ±1"


def test_eight_bits_have_no_single_codes_and_packed_layers_have_nothing_else():
    model = quantized(bits=8)
    (axis,) = plots.weight_histogram(model, ["conv"]).axes
    assert not lines(axis, "value and share of a code")
    heights, edges, _ = stairs(axis)
    assert (heights * np.diff(edges)).sum() / (edges[1] - edges[0]) * 5 == pytest.approx(100)
    model = quantized(bits=3)
    want = torch.bincount(model.conv.w_quant.codes(model.conv.weight).flatten().int(), minlength=8)
    figure = plots.weight_histogram(hf_daq.pack(model), ["conv"])
    assert figure.get_suptitle() == "Codes of packed weights, 1 of 4 layers"
    (axis,) = figure.axes
    levels, shares = codes(axis)
    assert levels == pytest.approx(np.arange(-4, 4) / 4)
    assert shares == pytest.approx(100 * want.numpy() / want.sum().item())
    assert not lines(axis, "bounds")
    assert not axis.patches
    assert plots.weight_histogram(hf_daq.pack(quantized(bits=7))).axes[0].lines


def test_inputs_lie_on_their_codes_and_the_model_is_left_as_it_was():
    model = quantized(weight_bits=3, activation_bits=4)
    model.train()
    model.norm.eval()
    batch, before = images(seed=3), state_of(model)
    figure = plots.input_histogram(model, batch, ["conv", "grouped"])
    same(before, state_of(model))
    model.eval()
    seen = {}
    for name in ("conv", "grouped"):
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: args[0].detach()})
        )
        with torch.no_grad():
            model(batch)
        hook.remove()
    for axis, (name, x) in zip(figure.axes, seen.items(), strict=True):
        quantizer = model.get_submodule(name).a_quant
        step, zero_point = quantizer.span.item() / 15, quantizer.zero_point
        assert (zero_point > 0) == (name == "grouped")
        assert axis.get_yscale() == "log"
        assert places(axis, "zero point") == [0.0]
        assert places(axis, "bounds")[0] == pytest.approx(-zero_point * step, abs=1e-6)
        heights, edges, _ = stairs(axis)
        assert (heights * np.diff(edges)).sum() / step == pytest.approx(100)
        levels, shares = codes(axis)
        assert levels == pytest.approx((np.arange(16) - zero_point) * step, abs=1e-6)
        found = torch.clamp(torch.round(x.double() / step) + zero_point, 0, 15)
        want = 100 * np.bincount(found.flatten().int().numpy(), minlength=16) / x.numel()
        assert np.nan_to_num(shares) == pytest.approx(want, abs=0.1)
        position = x.double() / step + zero_point
        clipped = ((position < -1e-4) | (position > 15 + 1e-4)).double().mean().item()
        assert axis.get_title() == f"{name}\n4 bits, {100 * clipped:.1f} % clipped"
    assert pixels(figure).std() > 10


def test_transformers_take_keywords_and_layers_are_spread_over_the_depth():
    model = hf_daq.apply_daq(tiny_bert(), bits=2)
    with hf_daq.calibrate(model):
        model(tokens())
    names = list(quantized_layers(model))
    assert len(names) > 12
    figure = plots.input_histogram(model, {"input_ids": tokens()}, columns=4)
    assert figure.get_suptitle() == f"Layer inputs and their codes, 12 of {len(names)} layers"
    assert len(figure.axes) == 12
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert all(title.startswith("…") and len(title) == 24 for title in titles if title != names[-1])
    assert names[0].endswith(titles[0][1:])
    assert names[-1].endswith(titles[-1].lstrip("…"))
    whole = plots.input_histogram(model, (tokens(),), layers=[names[0]])
    assert whole.get_suptitle().endswith(f"1 of {len(names)} layers")


def gradient(v, gamma, sigma):
    """README, "Why DAQ"."""
    t = v - np.floor(v)
    return gamma / (2 * math.sinh(gamma)) / np.tanh((np.abs(1 - 2 * t) + 1 / sigma**2) / 2)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_drawn_quantizer_is_the_closed_form(bits):
    figure = plots.transfer_curve(bits, gamma=[1.0, 2.0], sigma=(1, 3.0))
    left, right = figure.axes
    (rounding,) = lines(left, "exact rounding")
    v, output = (np.asarray(data, dtype=float) for data in rounding.get_data())
    largest = 2**bits - 1
    clipped = v.clip(0, largest)
    assert output == pytest.approx(np.ceil(clipped - 0.5), abs=1e-9)
    inside = (v >= 0) & (v <= largest)
    for gamma in (1.0, 2.0):
        for sigma in (1.0, 3.0):
            (line,) = lines(right, rf"daq, $\gamma$ = {gamma:g}, $\sigma$ = {sigma:g}")
            want = np.where(inside, gradient(v, gamma, sigma), 0)
            assert np.asarray(line.get_ydata()) == pytest.approx(want, rel=1e-5)
    (line,) = lines(right, "ste")
    assert np.asarray(line.get_ydata()) == pytest.approx(inside.astype(float))
    (line,) = lines(right, r"soft, $\sigma$ = 3, temperature 4")
    t = v - np.floor(v)
    far = math.exp(-1 / 9)
    scores = np.exp(-t) * np.where(t > 0.5, far, 1), np.exp(t - 1) * np.where(t > 0.5, 1, far)
    upper = 1 / (1 + np.exp(4 * (scores[0] - scores[1])))
    want = np.where(inside, 4 * upper * (1 - upper) * (scores[0] + scores[1]), 0)
    assert np.asarray(line.get_ydata()) == pytest.approx(want, rel=1e-5)
    assert pixels(figure).std() > 10
    (curve,) = plots.transfer_curve(bits, rounding="daq").axes[1].lines
    assert curve.get_label() == r"daq, $\gamma$ = 2, $\sigma$ = 1"
    assert not lines(plots.transfer_curve(bits, rounding="soft").axes[0], "exact rounding")


@dataclass
class Row:
    name: str
    weight_bits: int
    activation_bits: int | None
    weight_sqnr: float | None
    output_sqnr: float | None


@dataclass
class Table:
    layers: list[Row]


def test_bits_and_noise_by_depth():
    rows = [Row("stem", 8, None, 40.0, math.inf), Row("body", 2, 4, 9.0, 12.5), Row("packed", 2, 4, None, None)]
    figure = plots.by_depth(Table([*rows, Row("head", 3, 8, 15.0, 18.0)]))
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [8, 2, 2, 3, 0, 4, 4, 8]
    assert lines(lower, "SQNR of weights")[0].get_ydata() == pytest.approx([40, 9, math.nan, 15], nan_ok=True)
    assert lines(lower, "SQNR of outputs")[0].get_ydata() == pytest.approx([math.nan, 12.5, math.nan, 18], nan_ok=True)
    assert list(lines(lower, "outputs: exact")[0].get_xdata()) == [0]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["stem", "body", "packed", "head"]
    assert pixels(figure).std() > 10
    many = plots.by_depth(Table([Row("a.very.long.name.of.a.layer.of.depth", 4, None, 20.0, None)] * 100))
    assert len(many.axes[1].get_xticks()) <= 30
    assert len(many.axes[0].patches) == 100
    with pytest.raises(ConfigError, match="no layers; make it of a quantized model"):
        plots.by_depth(Table([]))


HISTORY = [
    {
        "step": 10,
        "layers": {"a": {"flip_rate": 0.04, "oscillating": 0.0}, "b": {"flip_rate": 0.02, "oscillating": 0.01}},
    },
    {"step": 20, "layers": {"a": {"flip_rate": 0.01, "oscillating": 0.02}}},
    {"step": 30, "layers": {}},
]


def test_flips_of_layers_and_their_mean():
    figure = plots.flip_rate(HISTORY)
    flips, oscillating = figure.axes[:2]
    first, second, mean = (line.get_ydata() for line in flips.lines)
    assert first == pytest.approx([4, 1, math.nan], nan_ok=True)
    assert second == pytest.approx([2, math.nan, math.nan], nan_ok=True)
    assert mean == pytest.approx([3, 1, math.nan], nan_ok=True)
    assert oscillating.lines[-1].get_ydata() == pytest.approx([0.5, 2, math.nan], nan_ok=True)
    assert list(flips.lines[0].get_xdata()) == [10, 20, 30]
    assert flips.lines[0].get_color() != flips.lines[1].get_color()
    assert pixels(figure).std() > 10
    for empty in ([], [{"step": 1, "layers": {}}]):
        with pytest.raises(ConfigError, match="history is empty"):
            plots.flip_rate(empty)


def test_what_cannot_be_drawn_says_what_can():
    model = quantized()
    with pytest.raises(ModelError, match=r"weight_histogram needs a quantized model: hf_daq.apply_daq"):
        plots.weight_histogram(small_net())
    with pytest.raises(ModelError, match="input_histogram needs a quantized model"):
        plots.input_histogram(small_net(), images())
    with pytest.raises(CalibrationError, match="'conv' has no bounds to draw: calibrate first"):
        plots.weight_histogram(hf_daq.apply_daq(small_net(), bits=2), "conv")
    with pytest.raises(ConfigError, match=r"'groupd' is no quantized layer \(did you mean 'grouped'"):
        plots.weight_histogram(model, ["conv", "groupd"])
    with pytest.raises(ConfigError, match="'stem' is no layer with a quantized input"):
        plots.input_histogram(model, images(), "stem")
    with pytest.raises(ConfigError, match="layers is empty"):
        plots.weight_histogram(model, [])
    with pytest.raises(ConfigError, match="columns=0 must be a whole number"):
        plots.weight_histogram(model, columns=0)
    with pytest.raises(ModelError, match="all inputs are in float here"):
        plots.input_histogram(hf_daq.apply_daq(small_net(), weight_bits=3), images())
    with pytest.raises(ModelError, match="batch is a list"):
        plots.input_histogram(model, [images()])
    model.forward = model.features
    with pytest.raises(ModelError, match="the batch never reached layer 'hidden'"):
        plots.input_histogram(model, images())
    assert not any(module._forward_pre_hooks for module in quantized_layers(model).values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 9}, "bits=9 is out of range"),
        ({"gamma": 0}, "gamma=0: numbers are above 0"),
        ({"sigma": [1, "2"]}, r"sigma=\[1, '2'\]: numbers are above 0"),
        ({"gamma": []}, r"gamma is empty; write gamma=2.0"),
        ({"temperature": -1.0}, "temperature=-1.0: numbers"),
        ({"rounding": "hard"}, "rounding='hard' must be one or several of 'daq', 'ste', 'soft'"),
        ({"rounding": ()}, r"rounding=\(\) must be one"),
    ],
)
def test_values_out_of_range_are_errors(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        plots.transfer_curve(**kwargs)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModelError, match=r'pip install "hf-daq\[plots\]"'):
        plots.transfer_curve()


@pytest.mark.slow
def test_the_recipe_writes_every_picture(tmp_path):
    torch.manual_seed(0)
    model = hf_daq.apply_daq(timm.create_model("resnet8_cifar"), bits=2)
    with hf_daq.calibrate(model):
        model(images(4, 32))
    hf_daq.save_pretrained(model, tmp_path / "model")
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (60 * number, 90, 120)).save(folder / f"{number}.png")
    common = [str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    recipe.main([*common, "--count", "8", "--history", str(tmp_path / "history.json")])
    names = {"weights.png", "inputs.png", "by_depth.png", "transfer_curve.png", "flip_rate.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width == 800
            assert np.asarray(picture.convert("L")).std() > 10
    recipe.main([*common, "--images", str(folder), "--layers", "layer2.0.conv1"])
    with Image.open(tmp_path / "out" / "inputs.png") as picture:
        assert picture.height < 400
    with pytest.raises(SystemExit, match="no images in"):
        recipe.main([*common, "--images", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="--count is 0"):
        recipe.main([*common, "--count", "0"])
