"""Monitor: its numbers against counting by hand, nothing changed in training, wrapped models, Trainer and the recipes."""

import copy
import itertools
import json

import accelerate
import pytest
import torch
import transformers
from models import images, small_net, small_timm
from recipe_runs import _datasets_cache, _fresh_accelerate, reviews, run, run_text, text_float, tiny_bert  # noqa: F401
from text_models import calibrated, tokens
from text_models import tiny_bert as bert
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainers import arguments, trainer_of

import hf_daq
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.nn.layers import quantized_layers

KEYS = {
    *("flip_rate", "oscillating", "weights_clipped", "inputs_clipped", "weight_lower", "weight_upper", "weight_scale"),
    *("input_lower", "input_upper"),
}
VALUES = torch.tensor([-1.5, -0.5, 0.5, 1.5])  # what the weights below are; with bounds at +-1.6 of 0 to 3 the codes
UNIT = 1.25**0.5  # their root mean square
LAYERS = {"1": (8, 4), "2": (2, 8)}


def network(activation_bits=2, **options) -> nn.Module:
    """Two layers of 2 bits whose codes are known, between two of float."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2))
    hf_daq.apply_daq(model, weight_bits=2, activation_bits=activation_bits, **options)
    with hf_daq.calibrate(model):
        model(torch.randn(8, 4))
    for layer in quantized_layers(model).values():
        layer.w_quant.lower.data.fill_(-1.6 / UNIT)
        layer.w_quant.upper.data.fill_(1.6 / UNIT)
        write(layer, torch.arange(layer.weight.numel()) % 4)
    return model.train()


def write(layer, codes) -> None:
    """As an optimizer step would. Codes in another order leave the root mean square as it is."""
    layer.weight.data.copy_(VALUES[codes].view_as(layer.weight))
    assert torch.equal(layer.w_quant.codes(layer.weight).flatten().long(), codes)


def small(seed=0) -> nn.Module:
    model = hf_daq.apply_daq(small_net(seed), weight_bits=3, activation_bits=4)
    with hf_daq.calibrate(model):
        model(images())
    return model.train()


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def steps_of(model, count, monitor=None, forward=None, lr=0.3):
    """Train, and what the monitor returned after each step."""
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=lr, quantizer_lr=1e-3), momentum=0.9)
    found = []
    for step in range(count):
        output = (model if forward is None else forward)(images(seed=step))
        nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(monitor.step() if monitor else None)
    return found


# By hand ----------------------------------------------------------------------------------------------------------


def test_a_flip_there_and_back_oscillates_and_one_way_does_not():
    model = network()
    first = model[1]
    monitor = hf_daq.Monitor(model, every=4)
    codes = [torch.arange(32) % 4 for _ in range(4)]
    codes[0][[8, 9]] = codes[0][[9, 8]]  # before the window: not seen
    codes[2][[0, 1]] = codes[2][[1, 0]]  # 0 and 1 there, and in the next step back
    codes[3][[4, 6]] = codes[3][[6, 4]]  # 4 and 6 one way
    for step in range(4):
        assert monitor.history == []
        write(first, codes[step])
        values = monitor.step()
        assert bool(values) == (step == 3)
    layers = monitor.history[0]["layers"]
    assert monitor.history[0]["step"] == 4
    assert layers["1"]["flip_rate"] == pytest.approx((2 + 4) / 2 / 32)
    assert layers["1"]["oscillating"] == pytest.approx(2 / 32)
    assert layers["2"]["flip_rate"] == layers["2"]["oscillating"] == 0
    assert values["daq/flip_rate/1"] == layers["1"]["flip_rate"]
    assert values["daq/flip_rate"] == pytest.approx(3 / (32 + 16))
    assert values["daq/oscillating"] == pytest.approx(2 / (32 + 16))


@pytest.mark.parametrize("window", [2, 5])
def test_flips_and_oscillations_are_those_of_plain_counting(window):
    model = network(weight_granularity="group", group_size=3)  # the last group of a channel is shorter
    generator = torch.Generator().manual_seed(window)
    monitor = hf_daq.Monitor(model, every=window + 3, window=window)
    states = {name: [] for name in LAYERS}
    for _ in range(2 * (window + 3)):
        for name, layer in quantized_layers(model).items():
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator))
            states[name].append(layer.w_quant.codes(layer.weight).flatten().tolist())
        values = monitor.step()
    assert [entry["step"] for entry in monitor.history] == [window + 3, 2 * (window + 3)]
    for entry in monitor.history:
        for name, layer in quantized_layers(model).items():
            flips = oscillating = 0
            for series in zip(*states[name][entry["step"] - window - 1 : entry["step"]], strict=True):
                changes = [b - a for a, b in itertools.pairwise(series) if a != b]
                flips += len(changes)
                oscillating += any(a * b < 0 for a, b in itertools.pairwise(changes))
            assert flips > 0
            assert entry["layers"][name]["flip_rate"] == pytest.approx(flips / window / layer.weight.numel())
            assert entry["layers"][name]["oscillating"] == pytest.approx(oscillating / layer.weight.numel())
    assert values["daq/flip_rate/2"] == monitor.history[1]["layers"]["2"]["flip_rate"]


@pytest.mark.parametrize("options", [{}, {"weight_granularity": "group", "group_size": 3}])
def test_clipped_weights_bounds_and_scale(options):
    """In groups of 3 of 4 columns there is padding, whose zeros are outside of these bounds and do not count."""
    model = network(**options)
    for bound, value in ((model[2].w_quant.lower, -9.0), (model[2].w_quant.upper, 9.0)):
        bound.data.fill_(value)
    quantizer = model[1].w_quant
    rows = quantizer.rows(model[1].weight.detach())
    quantizer.lower.data.fill_(0.1)
    quantizer.upper.data.fill_(1.6 / UNIT)
    quantizer.scale.data.copy_(torch.linspace(-2, 1, len(quantizer.scale)))
    quantizer.lower.data[-1], quantizer.upper.data[-1] = 0.05, 2.0
    unit = [row[row != 0].square().mean().sqrt() for row in rows] if options else [rows.square().mean().sqrt()] * 8
    bounds = zip(quantizer.lower.expand(len(unit)), quantizer.upper.expand(len(unit)), strict=True)
    inside = sum(
        int(lower * size <= weight <= upper * size)
        for row, size, (lower, upper) in zip(rows, unit, bounds, strict=True)
        for weight in row
        if weight != 0
    )
    monitor = hf_daq.Monitor(model, every=3)
    values = [monitor.step() for _ in range(3)][-1]
    assert 0 < inside < 32
    assert values["daq/weights_clipped/1"] == pytest.approx(1 - inside / 32)
    assert values["daq/weights_clipped/2"] == 0
    assert values["daq/weights_clipped"] == pytest.approx((32 - inside) / (32 + 16))
    assert values["daq/weight_lower/1"] == pytest.approx(0.05)
    assert values["daq/weight_upper/1"] == pytest.approx(2.0)
    assert values["daq/weight_scale/1"] == pytest.approx(quantizer.scale.abs().mean().item())


def test_clipped_inputs_of_both_kinds_of_bounds():
    model = network()
    signed, unsigned = model[1].a_quant, model[2].a_quant
    for quantizer, bounds in ((signed, (-0.9, 2.1)), (unsigned, (0.0, 1.0))):
        quantizer.lower.data.fill_(bounds[0])
        quantizer.upper.data.fill_(bounds[1])
        quantizer.finish()
    monitor = hf_daq.Monitor(model, every=3)
    monitor.step()
    model[1](torch.full((9, 4), 99.0))  # not the last step
    monitor.step()
    # Moved so that zero is a code, the bounds are -1 and 2: -0.95 is inside although below `lower`, 2.05 outside.
    signed(torch.tensor([[-0.95, 2.05, 0.0, 1.99], [-1.05, 1.0, 2.0, -1.0]]))
    unsigned(torch.tensor([-0.1, 0.0, 1.0, 1.1, 0.5], dtype=torch.bfloat16))
    unsigned(torch.tensor([7.0]))  # accumulated, or a layer that is used twice
    unsigned(torch.empty(0))
    model.eval()
    model(torch.full((9, 4), 99.0))
    model.train()
    values = monitor.step()
    assert values["daq/inputs_clipped/1"] == 2 / 8
    assert values["daq/inputs_clipped/2"] == 3 / 6
    assert values["daq/inputs_clipped"] == pytest.approx(5 / 14)
    assert values["daq/input_lower/1"] == pytest.approx(-0.9)
    assert values["daq/input_upper/2"] == 1.0
    [monitor.step() for _ in range(3)]
    assert monitor.history[1]["layers"]["1"]["inputs_clipped"] is None  # no forward


def test_weights_only_have_no_inputs():
    model = network(activation_bits=None)
    monitor = hf_daq.Monitor(model, every=3)
    values = [(model(torch.randn(2, 4)), monitor.step())[1] for _ in range(3)][-1]
    assert {key for key in values if key.startswith("daq/input")} == set()
    for found in monitor.history[0]["layers"].values():
        assert {key for key, value in found.items() if value is None} == {
            "inputs_clipped",
            "input_lower",
            "input_upper",
        }


# In training ------------------------------------------------------------------------------------------------------


def test_values_come_every_so_often_and_hooks_are_there_in_one_step_alone():
    model = small()
    monitor = hf_daq.Monitor(model, every=4)
    seen = []
    for _ in range(8):
        before = hooks(model)
        (values,) = steps_of(model, 1, monitor)
        seen.append((before, bool(values), hooks(model)))
    layers = quantized_layers(model)
    none, hooked = (0, False, 0), (0, False, len(layers))
    assert seen == [none, none, hooked, (len(layers), True, 0)] * 2
    assert [entry["step"] for entry in monitor.history] == [4, 8]
    assert json.loads(json.dumps(monitor.history)) == monitor.history
    for entry in monitor.history:
        assert entry["layers"].keys() == layers.keys()
        for name, found in entry["layers"].items():
            assert found.keys() == KEYS
            assert {type(value) for value in found.values()} == {float}
            assert values[f"daq/inputs_clipped/{name}"] >= 0
    last = {f"daq/{key}/{name}": value for name, found in entry["layers"].items() for key, value in found.items()}
    means = {f"daq/{key}" for key in ("flip_rate", "oscillating", "weights_clipped", "inputs_clipped")}
    assert values.keys() == last.keys() | means
    assert {key: values[key] for key in last} == last
    assert values["daq/flip_rate"] > 0


def test_means_alone():
    model = small()
    *_, values = steps_of(model, 3, hf_daq.Monitor(model, every=3, per_layer=False))
    assert set(values) == {"daq/flip_rate", "daq/oscillating", "daq/weights_clipped", "daq/inputs_clipped"}


@pytest.mark.parametrize("low_memory", [False, True])
def test_training_is_the_same_bit_for_bit(low_memory):
    ended = []
    for monitored in (False, True):
        model = hf_daq.apply_daq(small_timm("test_vit", img_size=32, drop_rate=0.1), bits=3, low_memory=low_memory)
        with hf_daq.calibrate(model):
            model(images(4, 32))
        model.train()
        torch.manual_seed(1)
        monitor = hf_daq.Monitor(model, every=3) if monitored else None
        steps_of(model, 7, monitor, forward=lambda x, model=model: model(x.repeat(1, 1, 2, 2)))
        ended.append((model.state_dict(), torch.get_rng_state()))
    assert len(monitor.history) == 2
    assert torch.equal(ended[0][1], ended[1][1])
    assert ended[0][0].keys() == ended[1][0].keys()
    for name, tensor in ended[0][0].items():
        assert torch.equal(tensor, ended[1][0][name]), name


def test_close_ends_a_window_and_the_next_comes():
    model = small()
    with hf_daq.Monitor(model, every=3) as monitor:
        steps_of(model, 2, monitor)
        assert hooks(model) > 0
        assert hooks(copy.deepcopy(model)) > 0
        monitor.close()
        assert hooks(model) == 0
        assert steps_of(model, 1, monitor) == [{}]
        assert len([values for values in steps_of(model, 3, monitor) if values]) == 1
        steps_of(model, 2, monitor)
    assert hooks(model) == 0
    assert [entry["step"] for entry in monitor.history] == [6]


# Wrapped ----------------------------------------------------------------------------------------------------------


def compiled_in_place(model):
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.conv, mesh=mesh)  # the others with the outermost module
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "sharded": sharded,
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "compiled in place": compiled_in_place,
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="aot_eager")),
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
}


@pytest.mark.parametrize(
    "wrapper", [pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in WRAPPERS]
)
def test_names_and_numbers_of_a_wrapped_model(wrapper, group):
    plain = small()
    reference = hf_daq.Monitor(plain, every=3)
    steps_of(plain, 3, reference)
    model = small()
    wrapped = WRAPPERS[wrapper](model)
    before = hooks(model)  # those of the wrapper
    monitor = hf_daq.Monitor(wrapped, every=3)
    steps_of(model, 3, monitor, forward=wrapped)
    assert hooks(model) == before
    found, expected = (m.history[0]["layers"] for m in (monitor, reference))
    assert found.keys() == expected.keys() == quantized_layers(model).keys()
    assert any(layer["flip_rate"] > 0 for layer in expected.values())
    for name, layer in expected.items():
        if "compiled" in wrapper:
            assert found[name]["inputs_clipped"] is None
            layer = layer | {"inputs_clipped": None}
        assert found[name] == pytest.approx(layer, abs=1e-5), name


def test_compiled_blocks_keep_their_names():
    model = small()
    names = list(quantized_layers(model))
    model.hidden = torch.compile(model.hidden, backend="eager")
    assert list(hf_daq.Monitor(model).layers) == names


@pytest.mark.slow
def test_compiling_in_a_window_leaves_the_hook_out():
    torch.compiler.reset()
    model = network()
    monitor = hf_daq.Monitor(model, every=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    monitor.step()
    monitor.step()
    x = torch.randn(3, 4)
    assert torch.equal(compiled(x), model(x))  # the second call is seen, once
    monitor.step()
    assert monitor.history[0]["layers"]["1"]["inputs_clipped"] is not None
    assert torch.equal(compiled(x), model(x))


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2}, "every=2: .* make every=3 the least"),
        ({"every": 5, "window": 5}, "every=5: .* make every=6 the least"),
        ({"every": 0}, "every=0"),
        ({"window": 1}, "window=1: an oscillation takes 2 steps or more"),
    ],
)
def test_windows_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        hf_daq.Monitor(network(), **options)


def test_models_without_codes_that_change():
    with pytest.raises(ModelError, match="found no quantized layer that trains in SmallNet: apply_daq first"):
        hf_daq.Monitor(small_net())
    with pytest.raises(ModelError, match=r"hf_daq\.unpack\(model\) makes a packed one trainable"):
        hf_daq.Monitor(hf_daq.pack(small()))
    with pytest.raises(
        CalibrationError, match="layer 'conv' is not calibrated; the order is: apply_daq, then calibrate"
    ):
        hf_daq.Monitor(hf_daq.apply_daq(small_net(), bits=3))


def test_weights_that_nothing_gathers():
    model = small()
    monitor = hf_daq.Monitor(model, every=3)
    model.hidden.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ModelError, match="'hidden' is sharded in another way: shard with FSDP2"):
        monitor.step()
    with pytest.raises(ModelError, match="'hidden' is sharded in another way"):
        hf_daq.Monitor(model)


# Trainer ----------------------------------------------------------------------------------------------------------


class Recorder(transformers.TrainerCallback):
    """What any tracker of transformers gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def monitored(tmp_path, per_layer=False, **options):
    trainer = trainer_of(calibrated(bert()), arguments(tmp_path, **options), callbacks=[recorder := Recorder()])
    callback = hf_daq.MonitorCallback(trainer, every=3, per_layer=per_layer)
    trainer.add_callback(callback)
    return trainer, callback, recorder


def test_trainer_logs_values_and_its_own(tmp_path):
    often = {"logging_strategy": "steps", "logging_steps": 3}
    trainer, callback, recorder = monitored(tmp_path / "monitored", **often)
    trainer.train()
    logs = [(step, values) for step, values in recorder.logs if "daq/flip_rate" in values]
    assert [step for step, _ in logs] == [3, 6] == [entry["step"] for entry in callback.monitor.history]
    means = {"daq/flip_rate", "daq/oscillating", "daq/weights_clipped", "daq/inputs_clipped"}
    assert all(values.keys() == means | {"epoch"} for _, values in logs)
    assert [step for step, values in recorder.logs if "loss" in values] == [3, 6]
    assert callback.monitor.history[0]["layers"].keys() == quantized_layers(trainer.model).keys()
    assert hooks(trainer.model) == 0
    assert [entry["step"] for entry in trainer.state.log_history if "daq/flip_rate" in entry] == [3, 6]
    alone = trainer_of(calibrated(bert()), arguments(tmp_path / "alone", **often))
    alone.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, alone.model.state_dict()[name]), name


def test_trainer_logs_each_layer_on_request_and_goes_on_counting(tmp_path):
    often = {"save_strategy": "steps", "save_steps": 4}
    monitored(tmp_path, **often)[0].train()
    trainer, callback, recorder = monitored(tmp_path, per_layer=True, **often)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.monitor.history == []  # the window of step 6 began at step 4
    trainer, callback, recorder = monitored(tmp_path, per_layer=True, **often, max_steps=9)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["step"] for entry in callback.monitor.history] == [9]
    (values,) = [values for _, values in recorder.logs if "daq/flip_rate" in values]
    assert "daq/flip_rate/bert.encoder.layer.0.attention.self.query" in values


def test_gradient_checkpointing_does_not_matter(tmp_path):
    shares = []
    for number, checkpointing in enumerate((False, True)):
        model = calibrated(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        if checkpointing:
            newer = hasattr(model, "activation_checkpointing_enable")
            (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
        monitor = hf_daq.Monitor(model, every=3)
        for _ in range(3):
            model(input_ids=tokens(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            values = monitor.step()
        shares.append({key: value for key, value in values.items() if key.startswith("daq/inputs_clipped/")})
        assert len(shares[number]) == len(quantized_layers(model))
    assert shares[0] == shares[1]
    assert any(shares[0].values())


def test_a_wrong_name_of_the_library():
    with pytest.raises(AttributeError, match="module 'hf_daq' has no attribute 'Monitors'"):
        _ = hf_daq.Monitors


# Recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch):
    """What a recipe gives to `accelerator.log`, which goes on to the tracker: step and values."""
    found, log = [], accelerate.Accelerator.log

    def record(self, values, step=None, **kwargs):
        found.append((step, dict(values)))
        log(self, values, step=step, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "log", record)
    return found


DIGITS = "--float_epochs 1 --epochs 1 --max_steps 10 --checkpoint_every 8 --batch_size 32 --monitor_every 3"


def test_a_recipe_logs_what_is_found_and_keeps_it_over_a_stop(tmp_path, logged):
    run(*DIGITS.split(), "--output_dir", tmp_path)
    found = [(step, values) for step, values in logged if "quantized/daq/flip_rate" in values]
    assert [step for step, _ in found] == [13, 16, 19]
    assert all("quantized/daq/inputs_clipped/layer2.0.conv1" in values for _, values in found)
    assert not any("float/daq" in key for _, values in logged for key in values)
    history = json.loads((tmp_path / "monitor.json").read_text())
    assert [entry["step"] for entry in history] == [3, 6, 9]
    run(*DIGITS.split(), "--output_dir", tmp_path, "--resume", "--monitor_every", 4)  # from update 6 of the phase
    assert [entry["step"] for entry in json.loads((tmp_path / "monitor.json").read_text())] == [3, 6]


def test_the_recipe_for_text_logs_through_the_trainer(tmp_path, reviews, text_float):
    args = ["--dataset", reviews, "--checkpoint", text_float, "--float_epochs", 0, "--training.max_steps", 3]
    names = ["--dataset_kwargs.names", "[sentence, label]"]
    run_text(*args, *names, "--output_dir", tmp_path, "--eval_split", "validation", "--monitor_every", 3)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    assert [entry["step"] for entry in history if "daq/flip_rate" in entry] == [3]
    (entry,) = json.loads((tmp_path / "monitor.json").read_text())
    assert len(entry["layers"]) == 13


def test_too_often_is_refused_before_any_training(tmp_path):
    with pytest.raises(SystemExit, match=r"monitor_every is 2; allowed are 0 \(never\) and 3 or more"):
        run("--monitor_every", 2, "--output_dir", tmp_path)
