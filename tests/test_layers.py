"""What a quantized layer keeps: its quantized weight in evaluation, and what its backward needs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_daq
from hf_daq.nn.layers import QuantizedLayer, quantized_layers
from hf_daq.nn.quantizers import WeightQuantizer

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(32, 5)
    )
    options = {"rules": [{"pattern": "*", "bits": 3}]} | options
    hf_daq.apply_daq(model, hf_daq.DaqConfig(bits=3, **options))
    with hf_daq.calibrate(model):
        model(X)
    return model


@pytest.fixture
def quantized(monkeypatch):
    """The weights that were quantized since the list was cleared."""
    calls = []
    forward = WeightQuantizer.forward
    monkeypatch.setattr(
        WeightQuantizer, "forward", lambda self, weight: (calls.append(weight), forward(self, weight))[1]
    )
    return calls


# -------------------------------------------------------------------------------------------- weights in evaluation


@torch.no_grad()
def test_evaluation_quantizes_each_weight_once(quantized):
    model = net().eval()
    quantized.clear()
    outputs = [model(X) for _ in range(3)]
    assert len(quantized) == 3
    assert torch.equal(outputs[0], outputs[2])
    with torch.inference_mode():
        assert torch.equal(model(X), outputs[0])
    assert len(quantized) == 3


CHANGES = {
    "optimizer step": lambda m: optimizer_step(m),
    "weight in place": lambda m: m[2].weight.add_(0.1),
    "detached weight": lambda m: m[2].weight.detach().add_(0.1),
    "scale": lambda m: m[2].w_quant.scale.mul_(1.5),
    "bound": lambda m: m[2].w_quant.lower.mul_(0.5),
    "another parameter": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight + 0.1)),
    "state dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "assigned state dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "dtype": lambda m: m.double().float().bfloat16().float(),
    "data, then eval()": lambda m: (m[2].weight.data.add_(0.1), m.eval()),
    "data, in training": lambda m: (m.train(), m[2].weight.data.add_(0.1), m.eval()),
}


def optimizer_step(model):
    with torch.enable_grad():
        model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_parameter_is_seen(change):
    model = net().eval()
    before = model(X)
    CHANGES[change](model)
    after = model(X)
    assert not torch.equal(before, after)
    for layer in quantized_layers(model).values():
        layer._forget()
    assert torch.equal(after, model(X))


@torch.no_grad()
def test_a_copy_has_weights_of_its_own():
    model = net().eval()
    before = model(X)
    model[2].weight.add_(0.1)  # after the weight was kept: a copy must not take the kept one over
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert not torch.equal(twin(X), before)
    assert len(pickle.dumps(model)) == len(pickle.dumps(net().eval()))


def test_autocast_and_a_later_backward_get_what_they_need(quantized):
    model = net().eval()
    with torch.inference_mode():
        model(X)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model[2].quantized_weight().dtype == torch.bfloat16
    quantized.clear()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert len(quantized) == 3
    assert model[2].weight.grad is not None
    model.requires_grad_(False)
    with torch.inference_mode():
        model(X)
    model(x).sum().backward()  # the kept weight is no inference tensor


def test_frozen_weights_are_kept_in_training_and_learning_ones_are_not(quantized):
    model = net().train()
    quantized.clear()
    for _ in range(2):
        model(X)
    with torch.no_grad():  # as the first forward of reentrant checkpointing
        model(X)
    assert len(quantized) == 9
    model.requires_grad_(False)
    quantized.clear()
    for _ in range(2):
        model(X)
    assert len(quantized) == 3


# --------------------------------------------------------------------------------------------------- low memory


def kept_bytes(model, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = model(x)
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), output


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group", "weights only"])
@pytest.mark.parametrize("context", ["plain", "autocast", "checkpoint", "reentrant checkpoint", "compiled kernels"])
def test_low_memory_gives_the_same_gradients(granularity, context, kernels):
    kernels(context == "compiled kernels")
    options = {"group_size": 4} if granularity == "group" else {"weight_granularity": granularity}
    if granularity == "weights only":
        options = {"rules": [{"pattern": "*", "weight_bits": 3, "activation_bits": None}]}
    results = []
    for low_memory in (False, True):
        model = net(low_memory=low_memory, **options)
        x = X.clone().requires_grad_()
        forward = model
        if "checkpoint" in context:
            forward = lambda x, model=model: checkpoint(model, x, use_reentrant="reentrant" in context)  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
            loss = forward(x).float().square().mean()
        loss.backward()
        results.append([loss.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    for usual, low in zip(*results, strict=True):
        assert (usual is None) == (low is None)
        assert usual is None or torch.equal(usual, low)


def test_low_memory_keeps_neither_quantized_inputs_nor_quantized_weights():
    torch.manual_seed(0)
    x = torch.randn(64, 512)
    kept = {}
    for name, options in {"float": None, "usual": {}, "low": {"low_memory": True}}.items():
        model = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 512))
        if options is not None:
            hf_daq.apply_daq(model, hf_daq.DaqConfig(bits=3, rules=[{"pattern": "*", "bits": 3}], **options))
            with hf_daq.calibrate(model):
                model(x)
        model(x)
        kept[name], _ = kept_bytes(model, x)
    inputs, weights = 4 * 64 * (512 + 256), 4 * 2 * 512 * 256
    assert kept["usual"] == pytest.approx(kept["float"] + inputs + weights, abs=1000)
    assert kept["low"] == pytest.approx(kept["float"], abs=1000)


def test_low_memory_is_saved_and_can_be_switched(tmp_path):
    model = net(low_memory=True)
    assert all(layer.low_memory for layer in quantized_layers(model).values())
    hf_daq.save_pretrained(model, tmp_path)
    torch.manual_seed(1)
    twin = hf_daq.remove_daq(net())
    loaded = hf_daq.from_pretrained(tmp_path, model=twin)
    assert loaded.daq_config.low_memory
    assert all(layer.low_memory for layer in quantized_layers(loaded).values())
    with pytest.raises(hf_daq.DaqError, match="low_memory='yes' must be True or False"):
        hf_daq.DaqConfig(bits=3, low_memory="yes")


def test_removing_leaves_nothing_behind():
    model = net(low_memory=True).eval()
    with torch.no_grad():
        model(X)
    hf_daq.remove_daq(model)
    for module in model.modules():
        assert not isinstance(module, QuantizedLayer)
        assert not {"_kept", "_sharded", "low_memory", "daq_name"} & set(vars(module))
