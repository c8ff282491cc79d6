"""Weight normalization of torch, as a parametrization and in its older form with a hook: the quantizer sees the normalized
weight, and training moves what it is computed from."""

import copy

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize

import hf_daq
from hf_daq.errors import ModelError
from hf_daq.nn.integers import integer_arithmetic
from hf_daq.nn.layers import DaqConv1d, quantized_layers
from hf_daq.nn.packed import packed_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")

NORMS = {"parametrized": nn.utils.parametrizations.weight_norm, "hook": nn.utils.weight_norm}
BITS = {"weight_bits": 4, "activation_bits": 4, "first_last_bits": 8, "weight_granularity": "channel"}
NAMES = {"parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1")}
NAMES["hook"] = ("weight_g", "weight_v")


def built(form, dim=0, norm=True):
    torch.manual_seed(0)

    def made(layer, dim):
        return NORMS[form](layer, dim=dim) if norm else layer

    net = nn.Sequential()
    net.conv, net.act = made(nn.Conv1d(3, 8, 5), dim), nn.GELU()
    net.grouped, net.other = made(nn.Conv1d(8, 8, 3, groups=2, bias=False), 2), nn.GELU()
    net.up, net.flat = made(nn.ConvTranspose1d(8, 6, 3, stride=2, groups=2), dim), nn.Flatten(1)
    net.linear = made(nn.Linear(6 * 19, 7), dim)
    for name, parameter in net.named_parameters():
        if name.endswith(("original0", "weight_g")):  # where it starts, the magnitude is that of the direction
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return net


def inputs():
    return torch.randn(4, 3, 15, generator=torch.Generator().manual_seed(1))


def quantized(form, dim=0, **config):
    net = hf_daq.apply_daq(built(form, dim), **BITS | config)
    with hf_daq.calibrate(net):
        net(inputs())
    return net.eval()


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_files_packing_and_removal_have_the_same_outputs_and_names(form, dim, tmp_path):
    plain, x = built(form, dim), inputs()
    keys, kinds, before = list(plain.state_dict()), [type(layer) for layer in plain], plain(x)
    own = {name: id(parameter) for name, parameter in plain.named_parameters()}
    plan = hf_daq.plan(plain, **BITS)
    assert (len(plan.unsupported), len(plan.quantized)) == (0, 4)
    assert [type(layer) for layer in plain] == kinds
    model = quantized(form, dim)
    expected = model(x)
    assert (expected - before).norm() < 0.1 * before.norm()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True, probe=x)
    for folder in ("trainable", "packed"):
        opened = hf_daq.from_pretrained(tmp_path / folder, model=built(form, dim)).eval()
        torch.testing.assert_close(opened(x), expected, rtol=0, atol=1e-6)
        found = hf_daq.inspect(tmp_path / folder)
        assert [row.shape for row in found.layers] == [(8, 3, 5), (8, 4, 3), (6, 4, 3), (7, 114)]
        assert found.packed_bytes == hf_daq.plan(plain, **BITS).packed_bytes
    codes = {name: layer.codes() for name, layer in packed_layers(opened).items()}
    hf_daq.unpack(opened)
    assert all(torch.equal(layer.codes(), codes[name]) for name, layer in quantized_layers(opened).items())
    assert sorted(opened.state_dict()) == sorted(model.state_dict())
    with integer_arithmetic(model.double()):
        integers = model(x.double())
    torch.testing.assert_close(integers, model(x.double()), rtol=0, atol=1e-12)
    hf_daq.remove_daq(opened)
    assert sorted(opened.state_dict()) == sorted(keys)
    assert [type(layer).__name__ for layer in opened] == [kind.__name__ for kind in kinds]
    hf_daq.apply_daq(plain, **BITS)
    hf_daq.remove_daq(plain)
    assert torch.equal(plain(x), before)
    assert list(plain.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in plain.named_parameters()} == own
    plain.conv.bias.data.add_(1)
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


@pytest.mark.parametrize("form", NORMS)
def test_gradients_are_those_of_the_weight_through_the_normalization(form):
    model, x, seed = quantized(form, rounding="ste").double().train(), inputs().double(), torch.randn(4, 7).double()
    twin = hf_daq.apply_daq(built(form, norm=False), **BITS | {"rounding": "ste"}).double()
    own = model.state_dict()
    weights = {f"{name}.weight": layer.weight.detach() for name, layer in quantized_layers(model).items()}
    twin.load_state_dict({key: own.get(key, weights.get(key)) for key in twin.state_dict()})
    for net in (model, twin):
        net(x).backward(seed)
    for name, layer in quantized_layers(model).items():
        magnitude, direction = (layer.get_parameter(key) for key in NAMES[form])
        other = twin.get_submodule(name)
        weight = torch._weight_norm(direction, magnitude, layer.norms[0].dim)
        wanted = torch.autograd.grad(weight, (magnitude, direction), other.weight.grad)
        torch.testing.assert_close(magnitude.grad, wanted[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(direction.grad, wanted[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.w_quant.upper.grad, other.w_quant.upper.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", NORMS)
def test_quantized_weights_take_the_place_of_the_float_ones(form):
    model, x = quantized(form, activation_bits=None, bias_correction=False), inputs()
    expected = model(x)
    hf_daq.remove_daq(model, weights="quantized")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert NAMES[form][0] in dict(model.conv.named_parameters())


def test_a_slice_of_zeros_keeps_its_codes_and_can_be_trained():
    model = quantized("parametrized", weight_grid="ternary", weight_bits=2, first_last_bits=2)
    for layer in quantized_layers(model).values():
        layer.parts[0].data.view(-1)[0] = 0
    packed = hf_daq.pack(model)
    codes = {name: layer.codes() for name, layer in packed_layers(packed).items()}
    hf_daq.unpack(packed).train()(inputs()).square().sum().backward()
    for name, layer in quantized_layers(packed).items():
        assert torch.equal(layer.codes(), codes[name])
        assert layer.parts[0].grad.isfinite().all()
        assert layer.parts[0].grad.any()


def test_weights_at_thresholds_leave_them_in_files(tmp_path):
    model = quantized("parametrized", weight_bits=2)
    layer = quantized_layers(model)["grouped"]
    for _ in range(50):  # the norm, and with it the bounds, follow
        start, end = layer.w_quant.bounds(layer.float_weight())
        wanted = layer.float_weight().clone()
        wanted[:2, 0, 0] = (start + (end - start) / 6).flatten()[:2]
        with torch.no_grad():
            layer.parts[1].add_((wanted - layer.float_weight()) / layer.slope())
    codes = layer.codes()
    before = layer.parts[1].clone()
    assert _off_threshold(layer) < 1e-6
    hf_daq.save_pretrained(model, tmp_path)
    assert torch.equal(layer.codes(), codes)
    assert not torch.equal(layer.parts[1], before)
    assert _off_threshold(layer) > 5e-6


def _off_threshold(layer):
    """Of the weight that is nearest to one, in codes."""
    weight = layer.float_weight().double()
    start, end = layer.w_quant.bounds(weight)
    positions = (layer.w_quant.rows(weight) - start) / (end - start) * 3
    return ((positions.frac() - 0.5).abs()).min()


def test_reconstruct_brings_the_outputs_nearer_to_float():
    model, plain = quantized("hook", weight_bits=2, first_last_bits=2), built("hook")
    images, others = torch.randn(2, 256, 3, 15)
    before = (model(others) - plain(others)).norm()
    hf_daq.reconstruct(model, [inputs(), images])
    assert (model(others) - plain(others)).norm() < 0.8 * before


def test_a_state_dict_with_the_older_names_is_read():
    model = tiny.build("wav2vec2")
    hf_daq.apply_daq(model, weight_bits=4)
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for new, old in zip(NAMES["parametrized"], NAMES["hook"], strict=True):
        state[f"{name}.{old}"] = state.pop(f"{name}.{new}") + 1
    model.load_state_dict(state)
    assert torch.equal(model.get_submodule(name).parts[1], state[f"{name}.weight_v"])


def test_adapters_beside_compute_and_merging_is_refused():
    model, x = quantized("parametrized"), inputs()
    expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv", "linear"], r=2)).eval()
    assert torch.equal(adapted(x), expected)
    with pytest.raises(ModelError, match="weight normalization is computed in every forward"):
        adapted.merge_and_unload()
    with pytest.raises(ModelError, match="'conv' normalizes its weight in every forward"):
        peft.get_peft_model(quantized("hook"), peft.LoraConfig(target_modules=["conv"], init_lora_weights="daq"))


def test_monitor_and_optimizer():
    model, x = quantized("parametrized").train(), inputs()
    monitor = hf_daq.Monitor(model, every=3)
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=10.0))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        found = monitor.step()
    assert found["daq/flip_rate"] > 0
    model = built("parametrized")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model):
        model(x)
    model(x).sum().backward()
    with pytest.raises(ModelError, match="built before apply_daq"):
        optimizer.step()


def test_normalization_with_anything_else_is_no_quantized_form():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.flip(0) + weight

    both, other = NORMS["parametrized"](nn.Conv1d(4, 4, 3)), nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 3))
    parametrize.register_parametrization(both, "weight", Symmetric())
    net = nn.Sequential(nn.Conv1d(4, 4, 3), both, other, nn.Conv1d(4, 4, 3))
    plan = hf_daq.plan(net, bits=4, first_last_bits=4)
    assert plan.quantized.keys() == {"0", "3"}
    assert plan.unsupported.keys() == {"1", "2"}
    net = nn.Sequential(NORMS["parametrized"](nn.Conv1d(4, 4, 3)))
    parametrize.register_parametrization(net[0], "bias", Symmetric())
    hf_daq.apply_daq(nn.Sequential(net, nn.Conv1d(4, 4, 3)), bits=4, first_last_bits=4)
    assert not isinstance(net[0], DaqConv1d)
