"""Channels of inputs that are outliers are divided by powers of two, and the columns of weights multiplied with them."""

import copy
import importlib.util
import re

import onnx
import peft
import pytest
import torch
from processor import CUTS_OFF
from torch import nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hf_daq
from hf_daq.errors import CheckpointError, ConfigError, ExportError
from hf_daq.files.inspect import every_layer
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit
from hf_daq.nn.smoothing import half_of
from hf_daq.text import SMOOTH_NOTE, as_text

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return self.q(x).sigmoid() * self.k(x) + self.v(x)


class Network(nn.Module):
    """Normalizes its input, with one large channel, as transformers do, for layers and a residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(32), Attention(), nn.Linear(32, 3)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[7] = 60, 30

    def forward(self, x):
        x = self.norm(x)
        return self.head((self.attention(x) + x).clamp(-3, 3))


def images(seed=0, count=64):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def network(model=None, inputs=None, **config):
    torch.manual_seed(0)
    model = Network().eval() if model is None else model
    hf_daq.apply_daq(model, **({"bits": 8, "first_last_bits": 8, "weight_granularity": "channel"} | config))
    with hf_daq.calibrate(model, check=False):
        model(images() if inputs is None else inputs)
    return model


def tokens(seed=0):
    return torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(seed))


def gpt2(**config):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[5] = 60
    return network(model, tokens(), **config)


def bert(**config):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertForSequenceClassification.config_class(**BERT)).eval()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[5] = 60
    return network(model, tokens(), **config)


def smoothed(model):
    return [name for name, entry in model.daq_config.layers.items() if "smooth" in entry]


def error(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


# ------------------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("bits", [{"bits": 8}, {"bits": None, "weight_bits": 4, "activation_bits": 8}])
def test_it_brings_outputs_nearer_to_float(bits):
    torch.manual_seed(0)
    wanted, x = Network().eval()(images(1)), images(1)
    found = {smooth: error(network(**bits, smooth=smooth)(x), wanted) for smooth in (False, True)}
    assert found[True] < 0.8 * found[False]


def test_it_divides_by_powers_of_two_where_a_channel_is_an_outlier_and_nowhere_else():
    model = network()
    assert smoothed(model) == ["attention.q"]
    smooth = model.attention.q.a_quant.smooth
    assert model.attention.v.smooth is smooth
    assert smooth[3] > smooth.median()
    assert torch.equal(smooth.log2(), smooth.log2().round())
    assert "head.a_quant.smooth" not in model.state_dict()


def test_without_outliers_and_without_the_option_nothing_changes():
    def values(**config):
        torch.manual_seed(0)
        model = Network().eval()
        nn.init.ones_(model.norm.weight)
        return network(model, **config)

    model, without = values(), values(smooth=False)
    assert not smoothed(model)
    assert model.state_dict().keys() == without.state_dict().keys()
    assert all(torch.equal(value, without.state_dict()[key]) for key, value in model.state_dict().items())
    assert not smoothed(network(smooth=False))
    assert not smoothed(network(activation_scale="token"))


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_what_a_few_rows_have_alone_is_no_outlier(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    rows_of_long_tails = torch.distributions.Laplace(0.0, 1.0).sample((rows, 64))
    assert not smoothed(network(model, rows_of_long_tails, modules_to_not_convert=["1"]))


def test_a_dict_of_parameters_alone_lacks_the_factors():
    model = network(bits=4)
    assert smoothed(model)
    best = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = images(seed=1)
    with torch.no_grad():
        wanted = model(x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*a_quant.smooth"):
        model.load_state_dict(best)
    missing = model.load_state_dict(best, strict=False).missing_keys
    assert [name for name in missing if "smooth" in name] == [f"{name}.a_quant.smooth" for name in smoothed(model)]
    assert torch.equal(model(x).detach(), wanted)


def test_calibration_finds_it_anew():
    model = network()
    with torch.no_grad():
        model.norm.weight.fill_(1)
    with hf_daq.calibrate(model, check=False):
        model(images())
    assert not smoothed(model)
    torch.manual_seed(0)
    fresh = Network().eval()
    nn.init.ones_(fresh.norm.weight)
    assert torch.equal(model(images(1)), network(fresh)(images(1)))


def test_the_float_network_stays_what_it_is():
    torch.manual_seed(0)
    plain, x = Network().eval(), images(1)
    model = network(copy.deepcopy(plain))
    assert torch.equal(model.attention.q.weight, plain.attention.q.weight)
    hf_daq.remove_daq(copy.deepcopy(model)).load_state_dict(plain.state_dict())
    assert torch.equal(hf_daq.remove_daq(copy.deepcopy(model))(x), plain(x))
    rounded = hf_daq.remove_daq(model, weights="quantized")
    assert error(rounded(x), plain(x)) < 0.02


def test_gradients_are_those_of_the_function():
    """Of what is rounded with the straight-through estimator, in float64."""
    model = network(rounding="ste").double().train()
    layer, x = model.attention.q, model.norm(images(1).double()).detach().requires_grad_()
    layer(x).square().sum().backward()
    a, w, smooth = layer.a_quant, layer.w_quant, layer.a_quant.smooth.double()
    plain_x, weight = x.detach().requires_grad_(), layer.weight.detach().requires_grad_()
    span, levels = a.span.detach(), a.levels
    ends = -span * a.zero_point / levels, span * (1 - a.zero_point / levels)
    inside = (plain_x / smooth).clamp(*ends) / span
    rounded = inside + (a(x) - inside).detach()
    start, end = w.bounds(weight.detach() * smooth)
    clipped = (weight * smooth).clamp(start, end) * (w.scale.detach()[:, None] / -start)
    quantized = clipped + (layer.quantized_weight() - clipped).detach()
    nn.functional.linear(rounded, quantized, layer.quantized_bias()).square().sum().backward()
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"low_memory": True}, {"rounding": "soft"}])
def test_training_ways_agree(options):
    one, other = (
        network(**options).train(),
        network(**{key: value for key, value in options.items() if key != "low_memory"}).train(),
    )
    for model in (one, other):
        model(images(1)).square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
        if p.grad is not None
    )


# ------------------------------------------------------------------------------------------------ the ways it is computed


@pytest.mark.parametrize("kind", [network, gpt2, bert])
def test_packed_unpacked_saved_and_opened_models_compute_the_same(kind, tmp_path):
    model, x = kind(), images(1) if kind is network else tokens(1)
    assert smoothed(model)
    output = (lambda m: m(x)) if kind is network else (lambda m: m(x).logits)
    with torch.no_grad():
        wanted = output(model)
        packed = hf_daq.pack(copy.deepcopy(model))
        with bit_for_bit():
            assert torch.equal(output(packed), wanted)
        assert error(output(packed), wanted) < 1e-2
        for name, layer in packed_layers(packed).items():
            assert error(layer.weight.as_subclass(torch.Tensor), model.get_submodule(name).weight) < 0.05
        unpacked = hf_daq.unpack(copy.deepcopy(packed))
        assert error(output(unpacked), wanted) < 1e-2
        for packs in (False, True):
            hf_daq.save_pretrained(model, tmp_path / str(packs), packed=packs, probe=None)
            if kind is network:
                opened = hf_daq.from_pretrained(tmp_path / str(packs), Network())
            else:
                opened = type(model).from_pretrained(tmp_path / str(packs))
            with bit_for_bit():
                assert torch.equal(output(opened), wanted)
            assert smoothed(opened) == smoothed(model)


def test_integers_of_the_reference():
    model = network().double()
    with torch.no_grad():
        wanted = model(images(1).double())
        with hf_daq.integer_arithmetic(model):
            assert error(model(images(1).double()), wanted) < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed):
    model = network()
    model = hf_daq.pack(model) if packed else model
    with torch.no_grad():
        wanted = model(images(1))
        found = torch.compile(model, backend="eager", fullgraph=True)(images(1))
        assert error(found, wanted) < 1e-2


def test_files_for_other_runtimes(tmp_path):
    """Each layer is compared with the integers of the model."""
    runtime = "onnxruntime" if CUTS_OFF or importlib.util.find_spec("openvino") is None else "openvino"
    report = hf_daq.export_onnx(network(), tmp_path / "model.onnx", images(1), runtime=runtime)
    assert report.passed
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Div") == 1  # of the layers that share their input


def test_compressed_tensors_have_no_place_for_it(tmp_path):
    with pytest.raises(ExportError, match="divides the channels of its input.*smooth=False"):
        hf_daq.export_compressed_tensors(bert(), tmp_path)


def test_reconstruction_gains_and_stays_exact():
    torch.manual_seed(0)
    plain, x = Network().eval(), images(2, 512)
    model = network(copy.deepcopy(plain), weight_bits=3, activation_bits=8, bits=None)
    before = error(model(x), plain(x))
    hf_daq.reconstruct(model, [images(0, 256), images(1, 256)])
    assert error(model(x), plain(x)) < before
    with torch.no_grad(), bit_for_bit():
        assert torch.equal(hf_daq.pack(copy.deepcopy(model))(x), model(x))
    assert error(model.attention.q.weight, plain.attention.q.weight) < 0.3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_inside(packed):
    model = gpt2(weight_bits=4, activation_bits=8, bits=None)
    model = hf_daq.pack(model) if packed else model
    wanted, x = model(tokens(1)).logits, tokens(1)
    config = peft.LoraConfig(init_lora_weights="daq", target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, config)
    assert error(adapted(x).logits, wanted) < 1e-2
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    adapted.eval()
    with torch.no_grad():
        found = adapted(x).logits
        assert error(found, wanted) > 1e-2
        merged = adapted.merge_and_unload()
        assert error(merged(x).logits, found) < 1e-2


# --------------------------------------------------------------------------------------------------------- what is shown of it


def test_what_is_shown_of_a_model_says_which_layers_divide_channels(tmp_path):
    model, divided = network(), [f"attention.{name}" for name in "qkv"]
    figures = hf_daq.summary(model, images())
    assert {layer.name: layer.smooth for layer in figures.layers if layer.smooth} == dict.fromkeys(
        divided, float(model.attention.q.smooth.max())
    )
    hf_daq.save_pretrained(model, tmp_path / "small", packed=True)
    found, path = hf_daq.inspect(tmp_path / "small"), tmp_path / "report.html"
    assert [layer.name for layer in found.layers if layer.smooth] == divided
    hf_daq.report(model, hf_daq.remove_daq(copy.deepcopy(model)), [images()], path)
    texts = [str(figures), figures.to_text(wide=True), str(found), path.read_text()]
    assert all(text.count(SMOOTH_NOTE) == 1 for text in texts)
    for text in (*texts, as_text(every_layer(found))):
        assert len(re.findall(r"8\*(?=[ <])", text)) == 3
    card = (tmp_path / "small" / "README.md").read_text()
    assert "powers of two before they are rounded in `attention.q`, `attention.k`, `attention.v`.\n" in card


def test_where_nothing_is_divided_nothing_is_said_of_it(tmp_path):
    model = network(smooth=False)
    hf_daq.save_pretrained(model, tmp_path)
    for text in (str(hf_daq.summary(model)), str(hf_daq.inspect(tmp_path)), (tmp_path / "README.md").read_text()):
        assert "*" not in text
        assert "powers of two" not in text


# ----------------------------------------------------------------------------------------------------- state dicts and configs


def test_state_dicts_say_what_is_divided(tmp_path):
    model = network()
    fresh = hf_daq.apply_daq(Network(), model.daq_config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images(1)), model(images(1)))
    entries = {
        name: {key: value for key, value in entry.items() if key != "smooth"}
        for name, entry in model.daq_config.layers.items()
    }
    without = hf_daq.apply_daq(Network(), model.daq_config.replace(layers=entries))
    without.load_state_dict(model.state_dict())
    assert torch.equal(without.eval()(images(1)), model(images(1)))
    hf_daq.save_pretrained(without, tmp_path / "with")
    assert without.daq_config.layers == model.daq_config.layers
    opened = hf_daq.from_pretrained(tmp_path / "with", Network())
    assert torch.equal(opened.eval()(images(1)), model(images(1)))
    plain = network(smooth=False)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.eval()(images(1)), plain(images(1)))
    hf_daq.save_pretrained(fresh, tmp_path / "without")
    assert "smooth" not in str(fresh.daq_config.layers)


def test_factors_stay_whole_in_narrow_dtypes():
    model = network()
    smooth = model.attention.q.a_quant.smooth.clone()
    model.to(torch.bfloat16)
    assert model.attention.q.a_quant.smooth.dtype == torch.float32
    assert torch.equal(model.attention.q.a_quant.smooth, smooth)
    assert model(images(1).bfloat16()).dtype == torch.bfloat16


def test_other_factors_are_noticed():
    """What a layer keeps while nothing learns, and what siblings share."""
    model, x = network(), images(1)
    with torch.no_grad():
        model(x), model(x)
        model.attention.q.a_quant.smooth[0] *= 4
        found = model(x)
    for layer in quantized_layers(model).values():
        layer._forget()
    assert torch.equal(model(x), found)


def test_files_with_other_factors_are_refused(tmp_path):
    model = network()
    model.attention.q.a_quant.smooth[0] = 3
    with pytest.raises(CheckpointError, match="smooth has other values than powers of two"):
        hf_daq.save_pretrained(model, tmp_path)


def test_configs_are_checked():
    layers = network().daq_config.layers
    for wrong in ({"smooth": 1}, {"smooth": True, "same_input_as": "head"}):
        with pytest.raises(ConfigError, match="smooth=.* must be True"):
            hf_daq.DaqConfig(
                bits=8, layers={**layers, "attention.q": {"weight_bits": 8, "activation_bits": 8, **wrong}}
            )
    entry = {"weight_bits": 8, "activation_bits": 8, "smooth": True}
    with pytest.raises(ConfigError, match="'0', a Conv2d, and it is for linear layers"):
        hf_daq.apply_daq(nn.Sequential(nn.Conv2d(3, 4, 3)), hf_daq.DaqConfig(bits=8, layers={"0": entry}))


def test_the_rows_that_choose_factors_do_not_depend_on_their_order():
    rows = torch.randn(101, 16, generator=torch.Generator().manual_seed(0))
    chosen = half_of(rows)
    assert 30 < len(chosen) < 70
    other = half_of(rows.flip(0))
    assert torch.equal(other.flip(0), chosen)
    same = torch.ones(3, 4)
    assert torch.equal(half_of(same), same)
    assert torch.equal(half_of(torch.tensor([[0.0, 1.0]])), torch.tensor([[0.0, 1.0]]))  # no half is there
