"""`plan`: which layers, and the sizes it promises, which are those of the file."""

import pytest
import tiny
from models import images, small_net, small_timm
from safetensors.torch import load_file
from torch import nn

import hf_daq
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
        "float_bytes": 4 * numbers,
        "packed_bytes": 4 * (numbers - 16) + 16 * 2 // 8 + 4,
    }
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "type", "weight", "shape", "W", "A", "why"]
    assert lines[2].split() == ["1", "Linear", "4x4", "2", "float"]
    assert lines[-1].startswith("1 layers quantized, 3 kept in full precision, 1 unsupported; 16 of 66 parameters")


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


@pytest.mark.filterwarnings("ignore:layer .* saw only zeros")  # random weights
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet", "test_convnext", "bert", "gpt2", "vit"])
def test_plan_inspect_and_summary_give_the_size_of_the_packed_file(name, granularity, tmp_path):
    of_transformers = name in tiny.ARCHITECTURES
    model = tiny.build(name) if of_transformers else small_timm(name)
    planned = hf_daq.plan(model, **GRANULARITIES[granularity])
    hf_daq.apply_daq(model, **GRANULARITIES[granularity])
    with hf_daq.calibrate(model):
        model(**tiny.inputs(name)) if of_transformers else model(images(2, model.pretrained_cfg["input_size"][-1]))
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "packed" / "model.safetensors").values())
    promised, packed = (hf_daq.inspect(tmp_path / kind) for kind in ("trainable", "packed"))
    totals = hf_daq.summary(model).totals
    assert planned.packed_bytes == promised.packed_bytes == packed.packed_bytes == totals["bytes_after"] == size
    assert planned.float_bytes == promised.float_bytes == totals["bytes_before"]
