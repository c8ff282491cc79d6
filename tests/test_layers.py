"""What a quantized layer keeps: its quantized weight in evaluation, and what its backward needs."""

import copy
import functools
import pickle
import signal

import pytest
import timm.layers
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import hf_daq
import hf_daq.plots
from hf_daq.errors import CalibrationError, ModelError
from hf_daq.model import patch
from hf_daq.nn.kept import Fingerprint
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
    "data": lambda m: m[2].weight.data.add_(0.1),
    "one element through data": lambda m: m[2].weight.data[3, 2].neg_(),
    "rows swapped through data": lambda m: m[2].weight.data.copy_(m[2].weight.data.flip(0)),
    "numpy": lambda m: m[2].weight.detach().numpy().__iadd__(0.1),
    "scale through data": lambda m: m[2].w_quant.scale.data.mul_(1.5),
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
@pytest.mark.parametrize(
    "context",
    [
        "plain",
        "autocast",
        "checkpoint",
        "reentrant checkpoint",
        pytest.param("compiled kernels", marks=pytest.mark.slow),
    ],
)
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


# ----------------------------------------------------------------------------------------- writes that nobody announces


WRITES = {
    "all": lambda w: w.add_(0.01),
    "one element": lambda w: w.view(-1)[12345].mul_(1.5),
    "the last element": lambda w: w.view(-1)[-1].neg_(),
    "all signs": lambda w: w.neg_(),
    "rows swapped": lambda w: w.copy_(w.flip(0)),
    "neighbors in another order": lambda w: w.view(-1)[12340:12348].copy_(w.view(-1)[12340:12348].flip(0)),
    "columns moved": lambda w: w.copy_(w.roll(2, 1)),
    "set to zero": lambda w: w[7].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_sees_every_write(write, dtype):
    weight = torch.randn(150, 201, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (weight, weight.view(-1)[1:-200].view(149, 201), weight.view(-1)[:29400].view(100, 6, 7, 7)):
        source = Fingerprint([tensor])
        assert source.fits([tensor])
        before = tensor.clone()
        WRITES[write](tensor.data)
        assert not source.fits([tensor])
        tensor.data.copy_(before)
        assert source.fits([tensor])
    channels_last = weight.view(-1)[:29400].view(100, 6, 7, 7).contiguous(memory_format=torch.channels_last)
    source = Fingerprint([channels_last])
    channels_last.data[99, 5, 6, 6] += 1
    assert not source.fits([channels_last])


def test_generation_in_training_mode_quantizes_each_weight_twice(quantized):
    model = net().train()
    quantized.clear()
    with torch.no_grad():
        for _ in range(5):
            model(X)
    assert len(quantized) == 6


# ------------------------------------------------------------------------------------- forwards that others take along


CALLS = []


def noted(output):
    CALLS.append(output)
    return output


def hooked(layer, kind):
    original = layer.forward
    if kind == "closure":
        layer.forward = lambda x: noted(original(x))
    elif kind == "default":
        layer.forward = lambda x, original=original: noted(original(x))
    elif kind == "partial":
        layer.forward = functools.partial(lambda f, x: noted(f(x)), original)
    elif kind == "object":
        layer.forward = Wrapper(original)
    elif kind == "accelerate":
        add_hook_to_module(layer, Note())


class Wrapper:
    def __init__(self, forward):
        self.inner = forward

    def __call__(self, x):
        return noted(self.inner(x))


class Note(ModelHook):
    def post_forward(self, module, output):
        return noted(output)


KINDS = ["closure", "default", "partial", "object", "accelerate"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_on_the_instance_reaches_what_the_layer_is_now(kind):
    """Put there before or after apply_daq, it follows every change of the layer, and is called."""
    for before in (True, False):
        plain, model = quantize(hf_daq_net()).eval(), hf_daq_net().eval()
        if before:
            hooked(model[2], kind)
        quantize(model)
        if not before:
            hooked(model[2], kind)
            with hf_daq.calibrate(model, check=False):
                model(X)
        for change in (lambda model: model, hf_daq.pack, hf_daq.unpack, hf_daq.remove_daq):
            change(plain), change(model)
            CALLS.clear()
            assert torch.equal(model(X), plain(X))
            assert len(CALLS) == 1


def test_a_method_that_somebody_kept_follows_too():
    model = quantize(hf_daq_net()).eval()
    kept = model[5].forward  # in no attribute of the layer
    x = torch.randn(2, 32)
    before = kept(x)
    hf_daq.pack(model)
    torch.testing.assert_close(kept(x), before)
    hf_daq.remove_daq(model, weights="quantized")
    assert torch.equal(kept(x), nn.functional.linear(x, model[5].weight, model[5].bias))


def test_a_forward_that_calls_nothing_of_the_layer_is_refused():
    model = hf_daq_net()
    model[2].forward = lambda x: nn.functional.conv2d(x, model[2].weight)
    with pytest.raises(ModelError, match=r"layer '2' has a `forward` of its own .* modules_to_not_convert=\['2'\]"):
        hf_daq.apply_daq(model, bits=3)
    assert type(model[5]) is nn.Linear


def hf_daq_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 5)
    )


def quantize(model):
    hf_daq.apply_daq(model, bits=3)
    with hf_daq.calibrate(model, check=False):
        model(X)
    return model


def test_a_layer_built_with_the_class_of_a_quantized_one_is_a_float_layer():
    model = quantize(hf_daq_net())
    twin = type(model[2])(6, 2, kernel_size=3)
    assert type(twin) is nn.Conv2d
    assert twin(torch.randn(1, 6, 4, 4)).shape == (1, 2, 2, 2)
    assert type(copy.deepcopy(model[2])) is type(model[2])


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_bounds_and_scales_are_never_cast_to_less_than_float32(cast):
    model = quantize(hf_daq_net())
    scale = model[2].w_quant.scale.detach().clone()
    model.to(cast)
    assert model[2].weight.dtype == cast
    assert model[2].w_quant.scale.dtype == (torch.float64 if cast == torch.float64 else torch.float32)
    assert torch.equal(model[2].w_quant.scale.float(), scale)
    assert model(X.to(cast)).dtype == cast


def test_restart_fits_the_quantizers_to_merged_weights():
    model = quantize(hf_daq_net()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model[5].weight.add_(3 * model[5].weight.std() * torch.randn(32, 1) @ torch.randn(1, 32))
    fresh = copy.deepcopy(model)

    def error(model):
        x = torch.randn(64, 32).relu() * 0.1
        float_output = nn.functional.linear(x, model[5].weight, model[5].bias)
        return ((model[5](x) - float_output).norm() / float_output.norm()).item()

    hf_daq.restart(fresh)
    assert error(fresh) < 0.7 * error(model)
    with pytest.raises(ModelError, match="restart needs the model that apply_daq returned"):
        hf_daq.restart(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"packed: hf_daq.unpack\(model\) comes first"):
        hf_daq.restart(hf_daq.pack(model))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer.weight, "data", torch.zeros(32, 32)),
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.__iadd__(1),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(32, 32))),
    ],
)
def test_nothing_can_be_written_to_the_weight_of_a_packed_layer(write):
    model = hf_daq.pack(quantize(hf_daq_net()))
    with torch.no_grad(), pytest.raises(ModelError, match=r"first write hf_daq.unpack\(model\)"):
        write(model[5])
    assert type(model[5].weight * 1) is torch.Tensor


class ByKeyword(nn.Module):
    """Calls its layers by the names that the float layers have for their input."""

    def __init__(self):
        super().__init__()
        self.conv, self.same, self.linear = nn.Conv2d(4, 6, 3), timm.layers.Conv2dSame(6, 8, 3), nn.Linear(8, 8)
        self.gpt, self.head = Conv1D(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.same(x=self.conv(input=x).relu()).mean((2, 3))
        return self.head(input=self.gpt(x=self.linear(input=x)))


def test_layers_are_called_by_keyword_as_the_float_ones_are(tmp_path):
    torch.manual_seed(0)
    model = hf_daq.apply_daq(ByKeyword(), bits=8, first_last_bits=8)
    with hf_daq.calibrate(model):
        model(X)
    with torch.no_grad():
        before = model.eval()(X)
        assert hf_daq.summary(model, X).layers[-1].input_codes
        assert hf_daq.health(model, X).layers == 5
        with hf_daq.integer_arithmetic(model):
            assert torch.allclose(model(X), before, atol=1e-2)
        hf_daq.plots.input_histogram(model, X)
        torch.testing.assert_close(hf_daq.pack(model)(X), before, rtol=0, atol=1e-2)


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(()))

    def forward(self, weight):
        return weight + self.delta


@torch.no_grad()
@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_a_weight_that_is_computed_later_is_noticed(how):
    x, model = torch.randn(4, 24), nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))).eval()
    hf_daq.apply_daq(model, weight_bits=4)
    before = [model(x), model(x)][1]
    added = Added()
    if how == "pruned":
        prune.l1_unstructured(model[1], "weight", 0.5)
    else:
        parametrize.register_parametrization(model[1], "weight", added)
        assert torch.equal(model(x), before)
        assert torch.equal(model(x), before)
        added.delta.fill_(0.3)
    found = model(x)
    assert not torch.equal(found, before)
    assert torch.equal(found, model.eval()(x))
    with pytest.raises(ModelError, match="layer '1' computes its weight"):
        hf_daq.remove_daq(model, weights="quantized")
    assert torch.equal(found, model(x))


def test_ctrl_c_waits_for_the_end_of_restart(ctrl_c, monkeypatch):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).eval()
    hf_daq.apply_daq(model, weight_bits=4)
    for layer in model:
        layer.weight.data.mul_(3)
    whole = copy.deepcopy(model)
    hf_daq.restart(whole)
    start = patch.start_from_weight

    def interrupted(quantizer, *args):
        start(quantizer, *args)
        if quantizer is model[2].w_quant:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(patch, "start_from_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_daq.restart(model)
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="the weight of layer '2' has NaN"):
        hf_daq.restart(model)
