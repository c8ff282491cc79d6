"""The benchmark recipe: every part runs, variants are what their names say, mistakes have names."""

import importlib.util
import json
import math
import sys

import pytest
import torch

import hf_daq
from measure import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = ["daq", "ste", "fake_quantize"]
QUICK = ["--quick", "--no-memory", "--device", "cpu"]


def parse(*argv: str):
    return benchmark.parse([*QUICK, *argv])


@pytest.mark.slow
def test_every_part_has_a_row_with_a_ratio_for_each_variant(tmp_path, capsys):
    output = tmp_path / "results.json"
    command = [*QUICK, "--models", "test_resnet", "bert-tiny", "--variants", *VARIANTS, "--output", str(output)]
    benchmark.main(command)
    results = json.loads(output.read_text())
    tables = results["tables"]
    variants = [(row["model"].split(",")[0], row["variant"]) for row in tables["step"]]
    assert variants == [(model, name) for model in ("test_resnet", "bert-tiny") for name in ("float", *VARIANTS)]
    assert variants == [(row["model"].split(",")[0], row["variant"]) for row in tables["eval"]]
    calls = {(row["tensor"], row["call"]) for row in tables["quantizer"]}
    assert len(calls) == 6
    assert [row["variant"] for row in tables["quantizer"]] == ["copy", "clamp", *VARIANTS] * 6
    for row in [row for rows in tables.values() for row in rows]:
        assert 0 < row["lowest"] <= row["ratio"] <= row["highest"] < math.inf
        assert len(row["seconds"]) == 2
        assert all(0 < timing < math.inf for timing in row["seconds"])
        if row["variant"] in ("float", "clamp"):
            assert row["lowest"] == row["ratio"] == row["highest"] == 1
    assert results["where"]["hf_daq"] == hf_daq.__version__
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("|")]) == sum(len(rows) + 2 for rows in tables.values())


def test_variants_are_interleaved_and_ratios_are_taken_within_a_round(monkeypatch):
    # Rounds on a machine that slows down: the ratio of b is 2, then 3, then 4, whatever the round costs.
    timings = {"a": iter([1.0, 10.0, 100.0]), "b": iter([2.0, 30.0, 400.0])}
    order = []

    def seconds(call, count, device):
        order.append(name := call())
        return 1.0 if len(order) <= 4 else next(timings[name])  # each warms up twice

    monkeypatch.setattr(benchmark, "seconds", seconds)
    rows = benchmark.compare({"a": lambda: "a", "b": lambda: "b"}, "a", {}, parse("--rounds", "3"), "")
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert [(row["variant"], row["lowest"], row["ratio"], row["highest"]) for row in rows] == [
        ("a", 1, 1, 1),
        ("b", 2, 3, 4),
    ]


def test_only_another_library_may_fail():
    def fail():
        raise RuntimeError("no kernel | for this\nand more")

    rows = benchmark.compare({"float": list, "nncf": fail}, "float", {}, parse(), "")
    assert [row["variant"] for row in rows] == ["float", "nncf"]
    assert "fails: no kernel / for this |" in benchmark.table(rows, ["variant", "ms", "ratio"])
    with pytest.raises(RuntimeError, match="no kernel"):
        benchmark.compare({"float": list, "daq": fail}, "float", {}, parse(), "")


@pytest.mark.parametrize("model", ["test_resnet", "bert-tiny"])
def test_variants_have_the_bits_and_the_layers_asked_for(model):
    args = parse("--bits", "3/5")
    work = benchmark.workload(model, args)
    planned = set(hf_daq.plan(work.model, weight_bits=3, activation_bits=5).quantized)
    assert planned
    for variant in ("daq", "ste"):
        built = benchmark.build(variant, work, args)
        layers = {name: layer for name, layer in built.named_modules() if hasattr(layer, "w_quant")}
        assert set(layers) == planned
        for layer in layers.values():
            assert (layer.w_quant.bits, layer.a_quant.bits) == (3, 5)
            assert layer.w_quant.rounding == layer.a_quant.rounding == variant
            assert layer.w_quant(layer.float_weight()).unique().numel() <= 8
    fake = benchmark.build("fake_quantize", work, args)
    layers = {name: layer for name, layer in fake.named_modules() if hasattr(layer, "input_quantizer")}
    assert set(layers) == planned
    inputs = torch.linspace(-1, 1, 1000)
    for layer in layers.values():
        assert 2 < layer.weight.unique().numel() <= 8
        scaled = layer.input_quantizer(inputs * 40 * layer.input_quantizer.scale)
        assert 16 < scaled.unique().numel() <= 32
    assert not any(hasattr(layer, "w_quant") for layer in benchmark.build("float", work, args).modules())


def test_quantizers_measured_alone_have_the_bits_asked_for():
    args = parse("--bits", "2/3")
    layer = torch.nn.Conv2d(8, 16, 3)
    for variant in VARIANTS:
        weight = layer.weight.detach()
        quantized = benchmark.quantizer(variant, torch.nn.Conv2d(8, 16, 3), weight, True, args)(weight)
        assert 2 < quantized.unique().numel() <= 4
        x = torch.randn(4, 8, 8, 8)
        quantized = benchmark.quantizer(variant, torch.nn.Conv2d(8, 16, 3), x, False, args)(x)
        assert 4 < quantized.unique().numel() <= 8


def test_kept_memory_counts_what_the_backward_needs_and_not_the_output():
    x = torch.randn(2**20, requires_grad=True)
    assert benchmark.kept_mib(lambda x: x.clamp(0, 1), x) == 0  # its input, which is there anyway
    assert benchmark.kept_mib(lambda x: x.clamp(0, 1).square().sin(), x) == pytest.approx(8)  # inputs of both
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float())

    def hidden(x):
        with packed:
            return x.sin()

    assert benchmark.kept_mib(hidden, x) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_of_a_step_holds_the_gradients():
    args = parse()
    args.argv = QUICK
    parameters = sum(parameter.nbytes for parameter in benchmark.workload("bert-tiny", args).model.parameters()) / 2**20
    peak = benchmark.peak_mib(None, "bert-tiny", "float", args)
    assert parameters < peak < 2 * parameters


@pytest.mark.parametrize("option", ["--variants", "--profile"])
def test_a_missing_library_is_named(monkeypatch, option):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="'brevitas' needs another library: pip install brevitas"):
        parse(option, "brevitas")
    assert parse().variants == ["float", *VARIANTS]


def test_an_unknown_model_is_named():
    with pytest.raises(SystemExit, match="unknown model 'resnet_18': did you mean .*resnet18"):
        parse("--models", "resnet_18")
