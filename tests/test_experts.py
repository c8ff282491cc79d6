"""Fused experts of transformers: quantized layers of all experts, against a copy whose experts are linear layers."""

import pytest
import tiny
import torch
from scan_transformers import quiet
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.nn.experts import SplitExperts, expert_layers
from hf_daq.nn.layers import quantized_layers

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
CONFIG = DaqConfig(weight_bits=3, activation_bits=8, bias_correction=False)
CONFIGS = [CONFIG, CONFIG.replace(weight_granularity="channel"), CONFIG.replace(group_size=20)]


@pytest.fixture(autouse=True)
def no_reports():
    with quiet():
        yield


def calibrated(name, config=CONFIG):
    return calibrate(hf_daq.apply_daq(tiny.build(name), config), name)


def calibrate(model, name):
    with hf_daq.calibrate(model):
        for seed in (1, 2):
            model(**tiny.inputs(name, seed))
    return model


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, SplitExperts)]


class Unfused(nn.Module):
    """The same experts, each with two linear layers."""

    def __init__(self, fused):
        super().__init__()
        self.gate = (fused._apply_gate,)
        for name, parameter in (("first", fused.gate_up_proj), ("second", fused.down_proj)):
            biases = getattr(fused, "gate_up_proj_bias" if name == "first" else "down_proj_bias", None)
            weights = parameter.transpose(1, 2) if fused.is_transposed else parameter
            layers = nn.ModuleList(nn.Linear(*weight.shape[::-1], bias=biases is not None) for weight in weights)
            for number, layer in enumerate(layers):
                layer.weight.data = weights[number].detach().clone()
                if biases is not None:
                    layer.bias.data = biases[number].detach().clone()
            setattr(self, name, layers)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for number, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(token):
                y = second(self.gate[0](first(hidden_states[token])))
                output = output.index_add(0, token, y * top_k_weights[token, place, None])
        return output


def unfused(name, config, like):
    """A quantized model with the values of `like`, whose experts are linear layers."""
    model = tiny.build(name)
    for path, module in list(model.named_modules()):
        if hasattr(module, "has_gate"):
            model.set_submodule(path, Unfused(module))
    hf_daq.apply_daq(model, config)
    own = quantized_layers(like)
    if config.activation_bits is None:
        calibrate(model, name)
    for path, layer in quantized_layers(model).items():
        parts = path.split(".")
        if "first" in parts or "second" in parts:
            number, prefix = int(parts[-1]), ".".join(parts[:-2])
            source = own[f"{prefix}.{'gate_up' if 'first' in parts else 'down'}"]
            values = {
                key: value.view(len(source.weight), -1)[number] for key, value in source.w_quant.state_dict().items()
            }
            if config.activation_bits is None:  # the same weights and inputs
                for key, value in layer.w_quant.state_dict().items():
                    torch.testing.assert_close(value, values[key])
            layer.w_quant.load_state_dict(values)
        else:
            source = own[path]
            layer.w_quant.load_state_dict(source.w_quant.state_dict())
        if source.a_quant is not None:
            layer.a_quant.load_state_dict(source.a_quant.state_dict())
    return model


def loss_of(model, name):
    predicted = tiny.prediction(model(**tiny.inputs(name)))
    return (predicted * torch.randn(predicted.shape, generator=torch.Generator().manual_seed(0))).sum()


def gradients(layers, key, like):
    """Of one parameter of the layers of all experts, as the layer of all has it."""
    found = [layer.get_parameter(key) for layer in layers]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
    return (
        torch.stack(grads).sum(0)
        if key.startswith("a_quant")
        else torch.cat([g[None] for g in grads]).reshape(like.shape)
    )


@pytest.mark.parametrize(
    "config", [*CONFIGS, CONFIG.replace(activation_bits=None)], ids=["tensor", "channel", "group", "weights"]
)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_loss_and_gradients_are_those_of_linear_layers(name, config):
    fused = calibrated(name, config).train()
    # In float64, or sums in another order would move an input of 8 bits across a threshold now and then.
    other = unfused(name, config, fused).train().double()
    fused.double()
    losses = [loss_of(model, name) for model in (fused, other)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    compared = 0
    for path, module in fused.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        linears = other.get_submodule(path)
        for layer, parts in zip(expert_layers(module).values(), (linears.first, linears.second), strict=True):
            weight = layer.weight.grad.transpose(1, 2) if module.is_transposed else layer.weight.grad
            pairs = [(weight, gradients(parts, "weight", weight))]
            if layer.bias is not None:
                pairs.append((layer.bias.grad, gradients(parts, "bias", layer.bias)))
            for key, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    pairs.append((parameter.grad, gradients(parts, key, parameter)))
            for one, wanted in pairs:
                assert wanted.abs().max() > 0
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
                compared += 1
    assert compared >= 2 * 2 * 4
    own = dict(other.named_parameters())
    for key, parameter in fused.named_parameters():
        if "experts" not in key and parameter.grad is not None:
            scale = float(own[key].grad.abs().max())
            torch.testing.assert_close(parameter.grad, own[key].grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
