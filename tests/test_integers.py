"""The integer reference: what exported files are held against."""

import pytest
import torch
from models import images, quantized_timm, small_net
from text_models import tiny_bert, tokens

import hf_daq
from hf_daq.errors import CalibrationError, ModelError
from hf_daq.nn.integers import integer_arithmetic, integers
from hf_daq.nn.packed import daq_layers

SETTINGS = [
    ("test_resnet", {"bits": 1}),
    ("test_vit", {"bits": 3, "first_last_bits": 8}),
    ("test_efficientnet", {"weight_bits": 2, "activation_bits": 4, "weight_granularity": "channel"}),
    ("test_convnext", {"bits": 8, "group_size": 7}),
    ("test_convnext", {"weight_bits": 4}),
    ("test_efficientnet", {"bits": 8, "weight_grid": "integer", "weight_granularity": "channel"}),
    ("test_vit", {"weight_bits": 2, "activation_bits": 4, "weight_grid": "integer", "first_last_bits": 1}),
    ("test_nfnet", {"bits": 6, "rules": [{"pattern": "re:.*attn_last", "skip": True}]}),
]


def network(name, kwargs):
    model = quantized_timm(name, **kwargs)
    return model, images(2, model.pretrained_cfg["input_size"][-1] if name == "test_vit" else 64, seed=3)


def run(model, *args):
    """The output, and the input of every layer as values and as codes."""
    inputs, codes = {}, {}

    def keep(layer, args):
        inputs[layer.daq_name] = args[0]
        if layer.a_quant is not None:
            codes[layer.daq_name] = layer.a_quant.codes(args[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in daq_layers(model).values()]
    with torch.no_grad():
        output = model(*args)
    for hook in hooks:
        hook.remove()
    return output, inputs, codes


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kwargs"), SETTINGS)
def test_whole_networks_agree_in_float64_without_a_differing_code(name, kwargs, packed):
    model, x = network(name, kwargs)
    if packed:
        hf_daq.pack(model)
    model.double()
    want, _, want_codes = run(model, x.double())
    with integer_arithmetic(model):
        got, _, codes = run(model, x.double())
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
    assert all(torch.equal(codes[key], want_codes[key]) for key in want_codes)


@pytest.mark.parametrize(("name", "kwargs"), SETTINGS)
def test_each_layer_agrees_in_float32_and_codes_differ_on_thresholds_only(name, kwargs):
    model, x = network(name, kwargs)
    _, inputs, _ = run(model, x)
    layers = daq_layers(model)
    with torch.no_grad():
        want = {key: layer(inputs[key]) for key, layer in layers.items()}
        with integer_arithmetic(model):
            for key, layer in layers.items():
                got = layer(inputs[key])
                assert (got - want[key]).abs().max() <= 1e-5 * want[key].abs().max()
            _, integer_inputs, _ = run(model, x)
    for layer in layers.values():
        if layer.a_quant is None:
            continue
        one, other = inputs[layer.daq_name], integer_inputs[layer.daq_name]
        differ = layer.a_quant.codes(one) != layer.a_quant.codes(other)
        if differ.any():  # the first layer where they do; what comes after it sees another input
            step = layer.a_quant.span / (2**layer.a_quant.bits - 1)
            position = one[differ] / step + layer.a_quant.zero_point
            assert ((position - position.floor() - 0.5).abs() < 1e-3).all()
            break


@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_weights_are_of_their_grid_codes_are_unsigned_and_the_formula_holds(grid):
    bits = {"weight_bits": 3, "activation_bits": 4}
    model = hf_daq.apply_daq(small_net(), **bits, weight_grid=grid, weight_granularity="channel")
    with hf_daq.calibrate(model):
        model(images())
    values = integers(model.hidden)
    assert values.weight.dtype == torch.int16
    assert set(values.weight.unique().tolist()) <= set(range(-7, 8, 2) if grid == "odd" else range(-4, 4))
    assert values.weight_scale.shape == (12, 1)
    assert values.input_bits == 4
    x = torch.randn(5, 16)
    codes = model.hidden.a_quant.codes(x)
    assert codes.dtype == torch.uint8
    assert codes.max() <= 15
    sums = (codes.int() - values.zero_point) @ values.weight.int().t()
    output = sums * (values.input_scale * values.weight_scale[:, 0]) + values.bias
    assert torch.allclose(output, model.hidden(x), rtol=1e-5, atol=1e-6)


def test_a_transformers_model_computes_with_integers_and_is_left_as_it_was():
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=4, activation_bits=8).double()
    with hf_daq.calibrate(model):
        model(tokens())
    want = model(tokens()).logits
    with integer_arithmetic(model):
        assert torch.allclose(model(tokens()).logits, want, rtol=1e-9)
        assert not torch.equal(model(tokens()).logits, want)
    assert torch.equal(model(tokens()).logits, want)
    assert "forward" not in vars(model.bert.encoder.layer[0].output.dense)


def test_a_forward_that_another_library_put_on_a_layer_comes_back():
    model = hf_daq.apply_daq(small_net(), weight_bits=4)
    own = model.hidden.forward = model.hidden.forward
    with integer_arithmetic(model):
        assert model.hidden.forward is not own
    assert vars(model.hidden)["forward"] is own


def test_sums_that_do_not_fit_int32_and_models_without_codes_are_refused():
    model = hf_daq.apply_daq(torch.nn.Sequential(torch.nn.Linear(70_000, 2)), bits=8, first_last_bits=8)
    with (
        pytest.raises(CalibrationError, match=r"run hf_daq.calibrate\(model\) before integer_arithmetic"),
        integer_arithmetic(model),
    ):
        pass
    torch.nn.init.ones_(model[0].weight)
    with hf_daq.calibrate(model):
        model(torch.ones(1, 70_000))
    with integer_arithmetic(model), pytest.raises(OverflowError, match="int32"):
        model(torch.ones(1, 70_000))
    with pytest.raises(ModelError, match="needs a model after apply_daq"), integer_arithmetic(small_net()):
        pass
