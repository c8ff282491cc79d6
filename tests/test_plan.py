"""`plan`: which layers, and the sizes it promises, which are those of the file."""

import copy
import itertools

import pytest
import tiny
import torch
from models import images, small_net, small_timm
from safetensors.torch import load_file
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ConfigError


def test_first_and_last_layer_stay_in_full_precision_or_get_their_own_bits():
    plan = hf_daq.plan(small_net(), bits=3)
    assert list(plan.kept) == ["stem", "head"]
    plan = hf_daq.plan(small_net(), bits=3, first_last_bits=8)
    assert (plan.quantized["stem"].weight_bits, plan.quantized["head"].activation_bits) == (8, 8)
    text = str(plan)
    assert "depthwise" in text
    assert "6 layers quantized, 0 kept" in text


class Own(nn.Conv1d):
    """A class that has no quantized form."""

    def forward(self, x):
        return super().forward(x).relu()


class OwnAttention(nn.MultiheadAttention):
    """Another that has none."""


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(0, 4), "has no weights"),
        (torch.ones(4, 4, dtype=torch.cfloat), "has a weight of torch.complex64"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), "has a weight of torch.float8_e4m3fn"),
        (torch.ones(4, 4, dtype=torch.int8), "has a weight of torch.int8"),
    ],
)
def test_weights_that_have_no_codes_stay_as_they_are(weight, reason):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    assert hf_daq.plan(model, bits=4).unsupported["1"].reason == reason
    hf_daq.apply_daq(model, bits=4)
    assert type(model[1]) is nn.Linear


def test_layer_types_without_a_quantized_form_are_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4)
            self.own = Own(4, 4, 3)
            self.lstm, self.attention = nn.LSTM(4, 4), OwnAttention(4, 1)
            self.last_one = nn.Linear(4, 2)

    kept = hf_daq.plan(Odd(), bits=4).kept
    for name, kind in [
        ("own", "Own"),
        ("lstm", "LSTM"),
        ("attention", "OwnAttention"),
    ]:
        assert kept[name].reason == f"no quantized form of {kind}"
    assert kept["attention.out_proj"].reason == "OwnAttention reads its weight directly"


def test_a_plan_prints_its_totals_and_marks_what_it_cannot_quantize():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), Own(4, 4, 1), nn.Linear(4, 2))
    plan = hf_daq.plan(model, weight_bits=2)
    numbers = 16 + 4 + 16 + 16 + 4 + 8 + 2
    assert plan.totals == {
        "layers_quantized": 1,
        "layers_kept": 3,
        "layers_unsupported": 1,
        "weights_quantized": 16,
        "parameters": numbers,
        "share_of_parameters": 16 / numbers,
        "macs": None,
        "share_of_macs": None,
        "float_bytes": 4 * numbers,
        "packed_bytes": 4 * (numbers - 16) + 16 * 2 // 8 + 4,
    }
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "type", "weight", "shape", "W", "A", "why"]
    assert lines[2].split() == ["1", "Linear", "4x4", "2", "float"]
    assert lines[-1] == (
        "1 layers quantized, 3 kept in full precision, 1 unsupported; 0.00 MB in float, 0.00 MB packed; 16 of 66 parameters "
        "quantized (24.2%); the rest: first layers 30.3% (first_last_bits=8 quantizes them), Own (no quantized form of Own) "
        "30.3%, heads 15.2% (first_last_bits=8 quantizes them)"
    )


def net_with_a_conv1d():
    return nn.ModuleDict(
        {
            "res": nn.ModuleDict({"c1": Own(4, 4, 1), "fc": nn.Linear(4, 4)}),
            "tokens": nn.Embedding(8, 4, max_norm=1.0),
        }
    )


@pytest.mark.parametrize("rule", [{"bits": 4}, {"weight_bits": 4}, {"activation_bits": None}])
@pytest.mark.parametrize(("pattern", "named"), [("res.c1", r"'res.c1' \(Own\)"), ("re:t.*", r"'tokens' \(Embedding\)")])
def test_a_rule_that_gives_bits_to_what_cannot_be_quantized_is_refused(pattern, named, rule):
    model = net_with_a_conv1d()
    for function in (hf_daq.plan, hf_daq.apply_daq):
        with pytest.raises(ConfigError, match=f"gives bits to {named}, which have no quantized form"):
            function(model, bits=3, first_last_bits=8, rules=[{"pattern": pattern, **rule}])
    assert type(model["res"]["fc"]) is nn.Linear
    with pytest.raises(ConfigError, match=r"'2' \(Own\) and 1 more"):
        hf_daq.plan(nn.Sequential(*(Own(4, 4, 1) for _ in range(4))), bits=3, rules=[{"pattern": "*", **rule}])


def test_a_rule_may_skip_or_match_more_than_what_cannot_be_quantized():
    rules = [{"pattern": "tokens", "skip": True}, {"pattern": "res.*", "bits": 5}]
    plan = hf_daq.plan(net_with_a_conv1d(), bits=3, first_last_bits=8, rules=rules)
    assert [(name, layer.weight_bits) for name, layer in plan.quantized.items()] == [("res.fc", 5)]
    assert plan.kept["res.c1"].reason == "no quantized form of Own"


GRANULARITIES = {
    "tensor": {"weight_bits": 3, "activation_bits": 5},
    "channel": {"weight_bits": 2, "weight_granularity": "channel", "first_last_bits": 8},
    "group": {"weight_bits": 1, "activation_bits": 4, "group_size": 7, "bias_correction": False},
}
ALL = list(itertools.product(["test_resnet", "test_nfnet", "test_convnext", "bert", "gpt2", "vit"], GRANULARITIES))
USUAL = [("test_resnet", "tensor"), ("test_convnext", "group"), ("gpt2", "channel")]


@pytest.mark.filterwarnings("ignore:layer .* saw only zeros")  # random weights
@pytest.mark.parametrize(
    ("name", "granularity"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in USUAL)],
)
def test_plan_inspect_and_summary_give_the_size_of_the_packed_file(name, granularity, tmp_path):
    of_transformers = name in tiny.ARCHITECTURES
    model = tiny.build(name) if of_transformers else small_timm(name)
    before = copy.deepcopy(model)
    unknown = hf_daq.plan(model, **GRANULARITIES[granularity]).packed_bytes
    hf_daq.apply_daq(model, **GRANULARITIES[granularity])
    with hf_daq.calibrate(model):
        model(**tiny.inputs(name)) if of_transformers else model(images(2, model.pretrained_cfg["input_size"][-1]))
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "packed" / "model.safetensors").values())
    promised, packed = (hf_daq.inspect(tmp_path / kind) for kind in ("trainable", "packed"))
    totals = hf_daq.summary(model).totals
    planned = hf_daq.plan(before, model.daq_config)
    assert planned.packed_bytes == promised.packed_bytes == packed.packed_bytes == totals["bytes_after"] == size
    assert planned.float_bytes == promised.float_bytes == totals["bytes_before"]
    siblings = sum("same_input_as" in entry for entry in model.daq_config.layers.values())
    assert unknown == planned.packed_bytes + 8 * siblings


# ---------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "siglip", "whisper", "qwen3_moe", "gpt2"])
def test_a_plan_and_a_summary_count_the_same_products(name):
    of_transformers = name in tiny.ARCHITECTURES
    model = tiny.build(name) if of_transformers else small_timm(name)
    batch = tiny.inputs(name) if of_transformers else images(2, model.pretrained_cfg["input_size"][-1])
    random, modes = torch.get_rng_state(), {module: module.training for module in model.modules()}
    state = copy.deepcopy(model.state_dict())
    plan = hf_daq.plan(model, DaqConfig(weight_bits=4), batch)
    assert torch.equal(random, torch.get_rng_state())
    assert {module: module.training for module in model.modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    found = hf_daq.summary(hf_daq.apply_daq(model, weight_bits=4), batch)
    assert {row.name: row.macs for row in plan.quantized.values()} == {row.name: row.macs for row in found.layers}
    assert {row.name: row.macs for row in plan.kept.values()} == {row.name: row.macs for row in found.kept}
    assert plan.totals["macs"] == sum(found.totals["macs"].values()) > 0
    assert plan.totals["share_of_macs"] == found.totals["macs_quantized"]
    assert "million MACs)" in str(plan)


def test_products_of_modules_around_layers_are_counted():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = hf_daq.plan(block, inputs=torch.zeros(2, 3, 8), bits=4)
    macs = {f"self_attn.{name}": 3 * 64 for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert {row.name: row.macs for row in plan.layers} == macs | {"linear1": 3 * 128, "linear2": 3 * 128}
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    assert [row.macs for row in hf_daq.plan(net, inputs=torch.zeros(2, 4), bits=4).layers] == [16, None]


def embedded(**options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(90, 8, **options), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    return net


def test_what_holds_the_parameters_in_float(caplog):
    net = embedded()
    numbers = sum(value.numel() for value in net.parameters())
    plan = hf_daq.plan(net, weight_bits=4)
    assert {part.what: (part.parameters, part.line) for part in plan.in_float} == {
        "embeddings": (720, "embedding_bits=4"),
        "norms, biases and other parameters": (16 + 16, ""),
        "heads": (27, "first_last_bits=8"),
    }
    assert sum(part.parameters for part in plan.in_float) + 128 == numbers
    hf_daq.apply_daq(net, weight_bits=4)
    assert caplog.messages == [
        "14.1% of the parameters are quantized; the rest: embeddings 79.4% (embedding_bits=4 quantizes them), norms, biases and "
        "other parameters 3.5%, heads 3.0% (first_last_bits=8 quantizes them); hf_daq.plan(model, ...) lists them"
    ]
    caplog.clear()
    hf_daq.apply_daq(embedded(), weight_bits=4, embedding_bits=4)
    tables = {"modules_to_not_convert": ["0"]}
    hf_daq.apply_daq(embedded(), weight_bits=4, first_last_bits=8, **tables)
    opened = hf_daq.apply_daq(embedded(), net.daq_config)
    assert opened.daq_config == net.daq_config
    assert not caplog.messages


def test_what_is_shared_is_counted_once():
    plan = hf_daq.plan(tiny.build("gpt2"), weight_bits=4)
    parts = {part.what: part.parameters for part in plan.in_float}
    assert parts["embeddings"] == sum(
        row.shape[0] * row.shape[1] for row in plan.kept.values() if row.kind == "Embedding"
    )
    assert sum(parts.values()) + plan.totals["weights_quantized"] == plan.parameters


def test_one_warning_for_all_that_stays_in_float(caplog):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 40))
    hf_daq.apply_daq(net, weight_bits=4)
    (message,) = caplog.messages
    assert message.startswith("1 modules with weights stay in full precision although nothing asks for it (LSTM: no")
    assert "% of the parameters are quantized; the rest: LSTM (no quantized form of LSTM) 9" in message
