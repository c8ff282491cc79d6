"""`allocate`: bits under a budget."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import BertConfig, BertModel

import hf_daq
from hf_daq.cli.options import merged_config
from hf_daq.errors import ConfigError, ModelError


class Branches(nn.Module):
    """Two layers of the same size, of which one hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)
        self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        y: torch.Tensor = self.last((self.loud(x) + 0.05 * self.quiet(x)).relu())
        return y


class Classes(Branches):
    """Gives nothing that can be compared."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).argmax(1)


def network() -> Branches:
    torch.manual_seed(0)
    return Branches().eval()


def error(model: nn.Module, config: hf_daq.DaqConfig, x: torch.Tensor, wanted: torch.Tensor) -> float:
    model = hf_daq.apply_daq(copy.deepcopy(model), config)
    if config.activation_bits is None:
        with hf_daq.calibrate(model, check=False):
            model(x)
    with torch.no_grad():
        return float((model(x) - wanted).square().sum())


def test_bits_go_where_they_count() -> None:
    model, x = network(), torch.randn(64, 8)
    wanted = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    found = hf_daq.allocate(model, [x[:16], x[16:]], average_bits=4, first_last_bits=8, weight_granularity="channel")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.loud) is nn.Linear
    bits = {layer.name: layer.bits for layer in found.layers}
    assert set(bits) == {"loud", "quiet"}  # first and last have 8
    assert bits["loud"] > 4 > bits["quiet"]
    assert found.average_bits <= 4
    assert found.measured < found.uniform / 2
    planned = hf_daq.plan(model, found.config)
    assert {name: row.weight_bits for name, row in planned.quantized.items()} == {"first": 8, "last": 8, **bits}
    assert planned.packed_bytes == found.packed_bytes
    uniform = found.config.replace(rules=(), weight_bits=4)
    assert found.packed_bytes <= hf_daq.plan(model, uniform).packed_bytes
    assert error(model, found.config, x, wanted) < error(model, uniform, x, wanted) / 2


def test_the_losses_are_those_of_the_network() -> None:
    """With one layer alone, the loss is the error of a network in which that layer is quantized."""
    model, x = network(), torch.randn(32, 8)
    only = {"rules": [{"pattern": "re:(?!loud).*", "skip": True}]}
    found = hf_daq.allocate(model, [x], average_bits=3.5, **only)
    wanted = model(x).detach()
    variance = float((wanted - wanted.mean(0)).square().sum())
    assert [layer.bits for layer in found.layers] == [3]
    alone = hf_daq.DaqConfig(weight_bits=3, bias_correction=False, **only)
    loss = error(model, alone.replace(), x, wanted) / variance
    assert found.measured == found.uniform == pytest.approx(found.layers[0].losses[3])
    assert loss == pytest.approx(found.measured, rel=0.05)  # calibration matches the output a little better
    losses = found.layers[0].losses
    assert list(losses) == list(range(2, 9))
    assert sorted(losses.values(), reverse=True) == list(losses.values())


def test_a_budget_in_bytes_is_kept() -> None:
    model, x = network(), torch.randn(32, 8)
    least, most = (hf_daq.plan(model, weight_bits=bits).packed_bytes for bits in (2, 8))
    for size in (least, (least + most) // 2, 2 * most):
        found = hf_daq.allocate(model, [x], packed_bytes=size)
        assert found.packed_bytes <= size
        assert hf_daq.plan(model, found.config).packed_bytes == found.packed_bytes
        assert found.packed_bytes > size - 64 * 64 // 8 or size > most


def test_a_rule_for_inputs_alone_leaves_the_weights_free() -> None:
    model, x = network(), torch.randn(32, 8)
    config = hf_daq.DaqConfig(weight_bits=4, activation_bits=8, rules=({"pattern": "l*d", "activation_bits": 4},))
    least, most = (hf_daq.plan(model, config.replace(weight_bits=bits)).packed_bytes for bits in (2, 8))
    for size in range(least, most, (most - least) // 6):
        found = hf_daq.allocate(model, [x], config, packed_bytes=size)
        rows = hf_daq.plan(model, found.config).quantized
        assert {layer.name: layer.bits for layer in found.layers} == {
            name: row.weight_bits for name, row in rows.items()
        }
        assert (rows["loud"].activation_bits, rows["quiet"].activation_bits) == (4, 8)
        assert hf_daq.plan(model, found.config).packed_bytes == found.packed_bytes <= size


def test_ternary_weights_count_as_they_are_stored() -> None:
    model, x = network(), torch.randn(32, 8)
    least = hf_daq.plan(model, weight_bits=2, weight_grid="ternary").packed_bytes
    for more in (0, 300, 4000, 10**5):
        found = hf_daq.allocate(model, [x], weight_bits=2, weight_grid="ternary", packed_bytes=least + more)
        twos = [layer for layer in found.layers if layer.bits == 2]
        assert (found.config.weight_grid == "ternary") == bool(twos)
        assert hf_daq.plan(model, found.config).packed_bytes == found.packed_bytes <= least + more
        assert bool(twos) == (more < 4000)


def test_names_are_no_patterns() -> None:
    torch.manual_seed(0)
    names = ("a[0]", "a0", "b*", "bx")
    inside = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inside, self.last = nn.Linear(8, 16), copy.deepcopy(inside), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for weight, name in enumerate(names):
                x = x + weight**2 * self.inside[name](x).relu()
            y: torch.Tensor = self.last(x)
            return y

    model, x = Network(), torch.randn(32, 8)
    for average in (2.3, 2.6, 3.3):
        found = hf_daq.allocate(model, [x], average_bits=average)
        rows = hf_daq.plan(model, found.config).quantized
        assert {layer.name: layer.bits for layer in found.layers} == {
            name: row.weight_bits for name, row in rows.items()
        }


def test_one_example_is_enough() -> None:
    model, x = network(), torch.randn(1, 8)
    found = hf_daq.allocate(model, [x], average_bits=4)
    assert 0 < found.measured <= found.uniform < 1


def test_yaml_and_text(tmp_path: Path) -> None:
    model, x = network(), torch.randn(32, 8)
    found = hf_daq.allocate(model, [x], average_bits=3, activation_bits=8)
    again = hf_daq.DaqConfig.from_dict(yaml.safe_load(found.to_yaml()))
    assert again == found.config
    (tmp_path / "bits.yaml").write_text(found.to_yaml())
    assert merged_config(tmp_path / "bits.yaml", {}) == found.config  # as `hf-daq quantize --config` reads it
    text = str(found)
    assert "bits a weight" in text
    assert f"with {found.uniform_bits} bits everywhere" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_transformers_with_padding_and_rules() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"input_ids": torch.randint(50, (6, 9)), "attention_mask": mask}
    rules = [{"pattern": "encoder.layer.0", "weight_bits": 8}]
    found = hf_daq.allocate(model, [batch], average_bits=3.2, activation_bits=8, rules=rules, embedding_bits=4)
    assert {layer.name.split(".")[2] for layer in found.layers if "layer." in layer.name} == {"1"}
    other = dict(batch, input_ids=torch.where(mask > 0, batch["input_ids"], 7))
    same = hf_daq.allocate(model, [other], average_bits=3.2, activation_bits=8, rules=rules, embedding_bits=4)
    assert same.config == found.config
    assert same.measured == pytest.approx(found.measured, rel=1e-3)
    hf_daq.apply_daq(model, found.config)


def test_errors() -> None:
    model, x = network(), torch.randn(8, 8)
    with pytest.raises(ConfigError, match="one budget"):
        hf_daq.allocate(model, [x])
    with pytest.raises(ConfigError, match="one budget"):
        hf_daq.allocate(model, [x], average_bits=4, packed_bytes=10_000)
    for bits in (1.5, 9, float("nan"), True, "4 bits"):
        with pytest.raises(ConfigError, match="from 2 to 8"):
            hf_daq.allocate(model, [x], average_bits=bits)  # type: ignore[arg-type]
    for size in (100, "5 MB"):
        with pytest.raises(ConfigError, match="out of reach"):
            hf_daq.allocate(model, [x], packed_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="NaN or infinite"):
        hf_daq.allocate(model, [x / 0], average_bits=4)
    with pytest.raises(ModelError, match="no tensor of real numbers"):
        hf_daq.allocate(Classes(), [x], average_bits=4)
    with pytest.raises(ModelError, match="no batches"):
        hf_daq.allocate(model, [], average_bits=4)
    with pytest.raises(ModelError, match="bits are free"):
        hf_daq.allocate(model, [x], average_bits=4, rules=[{"pattern": "*", "weight_bits": 4}])
    with pytest.raises(ModelError, match="already quantized"):
        hf_daq.allocate(hf_daq.apply_daq(network(), bits=4), [x], average_bits=4)


class Survivors(nn.Module):
    """Rows whose first value is above a limit, as detections above a score."""

    limit = -1e9

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.third(self.second(self.first(x).relu()).relu())
        return found[found[:, 0] > self.limit]


def test_outputs_whose_number_depends_on_values_are_refused() -> None:
    torch.manual_seed(0)
    model, x = Survivors(), torch.randn(32, 6)
    model.limit = model(x)[:, 0].median().item() - 1e-6
    with pytest.raises(ModelError, match="rounded, an output has shape .* where it was"):
        hf_daq.allocate(model, [x], average_bits=3)
