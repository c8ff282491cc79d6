"""`nn.MultiheadAttention`: quantized projections, its masks and options, and none of torch's fast paths."""

import copy

import pytest
import torch
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ConfigError
from hf_daq.nn.integers import integer_arithmetic
from hf_daq.nn.packed import daq_layers, packed_layers

NAMES = ["q_proj", "k_proj", "v_proj", "out_proj"]
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "widths": {"kdim": 6, "vdim": 10},
    "extra_keys": {"add_bias_kv": True, "add_zero_attn": True},
}


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query, key=None, value=None, **masks):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **masks)


def tensors(name, rows=3):
    options = OPTIONS[name]
    generator = torch.Generator().manual_seed(0)
    widths = 8, options.get("kdim", 8), options.get("vdim", 8)
    return [torch.randn(rows, 3, width, generator=generator) for width in widths]


def built(name, bits=8, **config):
    torch.manual_seed(0)
    model = Attention(**OPTIONS[name]).eval()
    before = copy.deepcopy(model)
    hf_daq.apply_daq(model, DaqConfig(bits=bits, first_last_bits=bits, **config))
    with hf_daq.calibrate(model):
        model(*tensors(name))
    return model, before


def masks():
    padding = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    yield {}
    yield {"need_weights": False}
    yield {"key_padding_mask": padding, "average_attn_weights": False}
    yield {"attn_mask": causal, "is_causal": True, "need_weights": False}
    yield {"attn_mask": torch.randn(6, 3, 3), "key_padding_mask": padding.float()}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_computes_what_the_float_attention_does_with_that_weight(name):
    model, _ = built(name, weight_granularity="channel")
    assert list(daq_layers(model)) == [f"attention.{part}" for part in NAMES]
    weights_only, before = built(name)
    for layer in daq_layers(weights_only).values():
        layer.a_quant = None
        layer.w_quant.scale.data.copy_(torch.rand_like(layer.w_quant.scale) + 0.5)
    plain = hf_daq.remove_daq(copy.deepcopy(weights_only), weights="quantized")
    assert type(plain.attention) is nn.MultiheadAttention
    assert plain.state_dict().keys() == before.state_dict().keys()
    arguments = tensors(name)
    for options in masks():
        torch.testing.assert_close(weights_only(*arguments, **options), plain(*arguments, **options))
    unbatched = [x[:, 0] if not plain.attention.batch_first else x[0] for x in arguments]
    torch.testing.assert_close(weights_only(*unbatched), plain(*unbatched))
    for got, expected in zip(model(*arguments), before(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_options_that_torch_refuses_are_refused():
    model, _ = built("plain")
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        model(*tensors("plain"), is_causal=True)


def test_the_output_alone_can_be_quantized(tmp_path):
    rule = {"pattern": r"re:attention\.[qkv]_proj", "skip": True}
    model, before = built("plain", bits=4, rules=[rule])
    arguments = tensors("plain")
    assert list(daq_layers(model)) == ["attention.out_proj"]
    expected = model(*arguments)
    assert not torch.allclose(expected[0], before(*arguments)[0])
    for packed in (False, True):
        hf_daq.save_pretrained(model, tmp_path, packed=packed)
        opened = hf_daq.from_pretrained(tmp_path, model=Attention()).eval()
        torch.testing.assert_close(opened(*arguments), expected)
    plain = hf_daq.remove_daq(opened, weights="quantized")
    assert type(plain.attention) is nn.MultiheadAttention
    assert plain.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("name", ["plain", "no_bias", "widths"])
def test_all_forms_are_the_same(name, tmp_path):
    model, _ = built(name, bits=4)
    arguments, state = tensors(name), model.state_dict()
    expected = model(*arguments)
    with integer_arithmetic(model):
        torch.testing.assert_close(model(*arguments), expected, rtol=1e-3, atol=1e-4)
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    for folder in ("trainable", "packed"):
        opened = hf_daq.from_pretrained(tmp_path / folder, model=Attention(**OPTIONS[name])).eval()
        torch.testing.assert_close(opened(*arguments), expected)
    assert len(packed_layers(opened)) == 4
    assert not any("in_proj" in key for key in opened.state_dict())
    assert (opened.attention.in_proj_weight is None) == (name == "widths")
    again = hf_daq.unpack(copy.deepcopy(opened))
    assert again.state_dict().keys() == state.keys()
    torch.testing.assert_close(again(*arguments), expected)
    hf_daq.pack(again)
    torch.testing.assert_close(again(*arguments), expected)
    plain = hf_daq.remove_daq(opened, weights="quantized")
    assert type(plain.attention) is nn.MultiheadAttention


def test_it_trains_and_its_parameters_stay_what_they_were():
    model, before = built("plain", bits=3)
    assert set(before.state_dict()) < set(model.state_dict())
    more = model.state_dict().keys() - before.state_dict().keys()
    assert all(key.rsplit(".", 2)[1] in ("w_quant", "a_quant") for key in more)
    weight = model.attention.in_proj_weight
    assert sum(value is weight for value in model.parameters()) == 1
    optimizer = torch.optim.SGD(hf_daq.param_groups(model.train(), lr=0.1))
    arguments = tensors("plain")
    first = model(*arguments)[0].square().mean()
    first.backward()
    assert all(value.grad is not None for value in model.parameters())
    assert (weight.grad.view(3, -1) != 0).any(1).all()
    optimizer.step()
    assert model(*arguments)[0].square().mean() < first
    model.eval()
    with torch.no_grad():
        kept = [model(*arguments)[0] for _ in range(3)][-1]
        weight.copy_(torch.randn_like(weight))
        assert not torch.equal(model(*arguments)[0], kept)  # a quantized weight is not kept when its source changes


def test_a_pattern_names_the_attention():
    model = Attention()
    plan = hf_daq.plan(model, bits=4, first_last_bits=8, rules=[{"pattern": "attention", "bits": 5}])
    assert {name: row.weight_bits for name, row in plan.quantized.items()} == {f"attention.{name}": 5 for name in NAMES}
    assert type(model.attention) is nn.MultiheadAttention
    assert plan.totals["weights_quantized"] == 4 * 64
    assert plan.packed_bytes == 4 * (40 + 4 + 8 + 8 * 4)
    with pytest.raises(ConfigError, match="a part of the projections of attention 'attention'.*name the attention"):
        hf_daq.plan(model, bits=4, first_last_bits=8, modules_to_not_convert=["attention.k_proj"])
    kept = hf_daq.plan(model, bits=4, first_last_bits=8, modules_to_not_convert=["re:.*[qkv]_proj"])
    assert kept.quantized.keys() == {"attention.out_proj"}


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_layers_of_torch_take_no_fast_path(packed):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(4, 5, 16), torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    assert not hf_daq.plan(model, bits=2, first_last_bits=2).unsupported
    before = copy.deepcopy(model)
    hf_daq.apply_daq(model, bits=2, first_last_bits=2)
    with hf_daq.calibrate(model):
        model(x)
    expected = model(x, src_key_padding_mask=padding)  # with gradients there is no fast path
    model.requires_grad_(False)
    if packed:
        hf_daq.pack(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        assert (model(x) - before(x)).square().sum() > 1e-2  # of 2 bits
    if not packed:
        plain = hf_daq.remove_daq(model)
        assert plain.layers[0].activation_relu_or_gelu == 1
        assert plain.use_nested_tensor is True


def test_an_encoder_whose_attention_stays_takes_no_fast_path_either():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x, before = torch.randn(4, 5, 16), copy.deepcopy(model)
    hf_daq.apply_daq(model, weight_bits=2, first_last_bits=2, modules_to_not_convert=["self_attn"])
    assert daq_layers(model).keys() == {"linear1", "linear2"}
    with torch.no_grad():
        assert (model(x) - before(x)).square().sum() > 1e-2


def test_onnx(tmp_path):
    class Net(Attention):
        def forward(self, x):
            return super().forward(x, need_weights=False)[0]

    model = Net(batch_first=True).eval()
    x = torch.randn(16, 5, 8)
    hf_daq.apply_daq(model, bits=8, first_last_bits=8)
    with hf_daq.calibrate(model):
        model(x)
    assert hf_daq.export_onnx(model, tmp_path / "model.onnx", x).passed


def test_the_summary_counts_the_projections():
    model, before = built("batch_first")
    found = hf_daq.summary(model, tuple(tensors("batch_first")))
    assert {row.name: row.macs for row in found.layers} == {f"attention.{name}": 3 * 64 for name in NAMES}
    assert not found.kept
    floats = sum(value.nbytes for value in before.state_dict().values())
    assert found.totals["bytes_before"] == floats
    part = Attention(batch_first=True)
    hf_daq.apply_daq(part, weight_bits=8, first_last_bits=8, modules_to_not_convert=["re:.*[qkv]_proj"])
    assert hf_daq.summary(part, tuple(tensors("batch_first"))).kept[0].macs == 3 * 3 * 64


def test_reconstruct():
    model, before = built("batch_first", bits=3)
    x = tuple(tensors("batch_first", rows=64))
    wanted, first = before(*x)[0], model(*x)[0]
    hf_daq.reconstruct(model, [x], progress=False)
    assert (model(*x)[0] - wanted).norm() < (first - wanted).norm()


class Named(nn.Linear):
    """Changes nothing."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_that_compute_what_their_base_does_are_quantized(tmp_path):
    def net():
        return nn.Sequential(Named(8, 8), Doubled(8, 8), Named(8, 8), nn.Linear(8, 8))

    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 8)
    plan = hf_daq.plan(model, bits=4, first_last_bits=4)
    assert plan.quantized.keys() == {"0", "2", "3"}
    assert plan.unsupported["1"].reason == "no quantized form of Doubled"
    hf_daq.apply_daq(model, bits=4, first_last_bits=4)
    with hf_daq.calibrate(model):
        model(x)
    expected = model(x)
    assert isinstance(model[0], Named)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    opened = hf_daq.from_pretrained(tmp_path, model=net())
    torch.testing.assert_close(copy.deepcopy(opened)(x), expected)
    assert type(hf_daq.remove_daq(model)[2]) is Named
