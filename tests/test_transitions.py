"""The rate of quantized weights follows their changes of codes; dampening draws weights to their codes."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from text_models import tiny_llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

import hf_daq
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.nn.layers import quantized_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from shared.distillation import Distillation, distill, divergence, last_features

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def network(**config):
    torch.manual_seed(0)
    layers = nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    return calibrated(nn.Sequential(*layers), **config)


def calibrated(model, **config):
    hf_daq.apply_daq(model, **({"bits": 2} | config))
    with hf_daq.calibrate(model, check=False):
        model(X)
    return model


def optimizer_of(model, lr=0.05):
    return torch.optim.SGD(hf_daq.param_groups(model, lr=0.05, quantized_lr=lr), momentum=0.9)


def update(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_quantized_weights_are_a_group_of_their_own():
    model = network()
    assert [group["name"] for group in hf_daq.param_groups(model, lr=0.05)] == ["decay", "no_decay", "quantizer"]
    groups = {group["name"]: group for group in hf_daq.param_groups(model, lr=0.1, quantized_lr=0.2, weight_decay=0.3)}
    assert list(groups) == ["decay", "no_decay", "quantized", "quantizer"]
    (weight,) = groups["quantized"]["params"]
    assert weight is model[2].weight
    assert (groups["quantized"]["lr"], groups["quantized"]["weight_decay"]) == (0.2, 0.3)


def test_weights_of_experts_are_among_them():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_local_experts": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    hf_daq.apply_daq(model, weight_bits=2)
    with hf_daq.calibrate(model, check=False):
        model(tokens(2))
    found = {
        group["name"]: {id(p) for p in group["params"]} for group in hf_daq.param_groups(model, 0.1, quantized_lr=0.1)
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found["quantized"]}
    assert names >= {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}


def test_the_rate_is_that_of_the_equation():
    model = network()
    optimizer = optimizer_of(model)
    scheduler = hf_daq.TransitionScheduler(model, optimizer, 40, 0.02, momentum=0.9, eta=0.1, every=2)
    lr, rate, layer = 0.05, None, model[2]
    for step in range(1, 11):
        before = layer.codes()
        update(model, optimizer)
        changed = (layer.codes() != before).float().mean().item()
        scheduler.step()
        if step % 2 == 0:
            rate = changed if rate is None else 0.81 * rate + 0.19 * changed
            target = 0.02 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 40))).item()
            lr = max(0.0, lr + 2 * 0.1 * (target - rate))
        assert scheduler.lr == pytest.approx(lr, rel=1e-5)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, scheduler.lr, 1e-3]
    assert scheduler.rate == pytest.approx(rate, rel=1e-5)
    assert rate > 0


@pytest.mark.parametrize(("start", "target", "way"), [(1e-4, 0.05, 1), (1.0, 1e-4, -1)])
def test_the_rate_goes_where_the_share_comes_near_the_target(start, target, way):
    model = network()
    optimizer = optimizer_of(model, start)
    scheduler = hf_daq.TransitionScheduler(
        model, optimizer, 1000, target, every=2, momentum=0.9, eta=start / target / 20
    )
    for _ in range(20):
        update(model, optimizer)
        scheduler.step()
    assert (scheduler.lr - start) * way > 0
    assert (target - scheduler.rate) * way > 0


@pytest.mark.parametrize("stop", [9, 12])
def test_it_is_saved_and_goes_on_bit_for_bit(stop):
    model = network()
    optimizer = optimizer_of(model)
    scheduler = hf_daq.TransitionScheduler(model, optimizer, 100)
    for step in range(1, 31):
        update(model, optimizer)
        scheduler.step()
        if step == stop:
            saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)])
    again = network()
    resumed = optimizer_of(again)
    other = hf_daq.TransitionScheduler(again, resumed, 100)
    for part, state in zip((again, resumed, other), saved, strict=True):
        part.load_state_dict(state)
    for _ in range(stop, 30):
        update(again, resumed)
        other.step()
    assert other.state_dict() == scheduler.state_dict()
    assert torch.equal(again[2].weight, model[2].weight)


def test_shards_have_the_rate_of_the_whole(group):
    rates = []
    for sharded in (False, True):
        model = network()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = optimizer_of(model)
        scheduler = hf_daq.TransitionScheduler(model, optimizer, 100, every=2)
        for _ in range(6):
            update(model, optimizer)
            scheduler.step()
        rates.append(scheduler.rate)
    assert rates[0] == pytest.approx(rates[1])
    with pytest.raises(ModelError, match="dampening needs whole weights.*DistributedDataParallel"):
        hf_daq.dampening(model)


@pytest.mark.parametrize(
    "config", [{}, {"weight_granularity": "channel"}, {"group_size": 5}, {"weight_grid": "integer"}], ids=str
)
def test_dampening_draws_weights_to_the_places_of_their_codes(config):
    layer = network(**config)[2]
    model = nn.Sequential(layer)
    codes, lower, before = layer.codes(), layer.w_quant.lower.clone(), layer.weight.detach().clone()
    positions = layer.w_quant.positions(layer.weight)
    inside = (positions >= 0) & (positions <= layer.w_quant.levels)
    first = hf_daq.dampening(model)
    first.backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["0.weight"]
    assert not layer.weight.grad[~inside].any()
    assert (layer.weight.grad[inside] != 0).float().mean() > 0.8
    with torch.no_grad():
        layer.weight -= 0.5 * layer.weight.grad  # the gradient is twice the distance
    # Their statistics changed with them; the places of the codes before are where all of them are now.
    assert not torch.equal(layer.weight, before)
    start, end = (value.broadcast_to(layer.w_quant.rows(before).shape) for value in layer.w_quant.bounds(before))
    rows = layer.w_quant.rows(layer.weight.detach())
    at = layer.w_quant.unrows((rows - start) / (end - start) * layer.w_quant.levels, before.shape)
    torch.testing.assert_close(at[inside], codes[inside].float(), atol=1e-4, rtol=0)
    assert torch.equal(layer.w_quant.lower, lower)


def test_what_is_refused():
    model = network()
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.05))
    with pytest.raises(ConfigError, match=r"no group \"quantized\".*quantized_lr=lr"):
        hf_daq.TransitionScheduler(model, optimizer, 10)
    for options in ({"target": 0.0}, {"momentum": 1.0}, {"every": 1}, {"updates": 0}):
        with pytest.raises(ConfigError, match=r"allowed are updates from 1, a target above 0"):
            hf_daq.TransitionScheduler(model, optimizer_of(model), **({"updates": 10} | options))
    for use in (hf_daq.dampening, lambda model: hf_daq.TransitionScheduler(model, optimizer, 10)):
        with pytest.raises(ModelError, match="Sequential has no quantized layer that trains: apply_daq first"):
            use(nn.Sequential(nn.Linear(2, 2)))
    fresh = hf_daq.apply_daq(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)), bits=2)
    with pytest.raises(CalibrationError, match="is not calibrated; the order is: apply_daq, then calibrate or load"):
        hf_daq.TransitionScheduler(fresh, optimizer, 10)
    llama = hf_daq.apply_daq(tiny_llama(), weight_bits=2)
    with hf_daq.calibrate(llama, check=False):
        llama(tokens(2))
    adapted = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="daq"))
    uses = {"dampened": hf_daq.dampening, "scheduled": lambda model: hf_daq.TransitionScheduler(model, optimizer, 10)}
    for what, use in uses.items():
        with pytest.raises(ModelError, match=f"cannot be {what} as it is"):
            use(adapted)


def test_features_of_student_and_teacher_are_compared():
    student, teacher = network(), nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    loss = torch.tensor(2.0)
    for settings in (Distillation(features=0.5), Distillation(alpha=0.25, temperature=1.0, features=0.5)):
        with last_features(settings, student, teacher) as features:
            logits, lesson = student(X), teacher(X)
        found = distill(loss, logits, lesson, settings, features)
        expected = 0.5 * (student[:-1](X) - teacher[:-1](X)).square().mean() + (1 - settings.alpha) * 2
        expected = expected + settings.alpha * divergence(logits, lesson)
        torch.testing.assert_close(found, expected)
    with last_features(Distillation(alpha=1.0), student, teacher) as features:
        student(X)
    assert features == []
    assert not student[-1]._forward_pre_hooks
    assert len(quantized_layers(student)) == 1


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("change", [hf_daq.pack, hf_daq.remove_daq])
@pytest.mark.parametrize("kind", ["scheduler", "monitor"])
def test_a_model_that_does_not_train_any_more_is_refused(kind, change, steps):
    model = network()
    optimizer = optimizer_of(model)
    watch = (
        hf_daq.TransitionScheduler(model, optimizer, 9, every=4)
        if kind == "scheduler"
        else hf_daq.Monitor(model, every=4)
    )
    for _ in range(steps):
        watch.step()
    change(model)
    with pytest.raises(ModelError, match="codes do not change any more"):
        for _ in range(4):
            watch.step()
