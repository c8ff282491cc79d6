"""Layers that read the same tensor share a quantizer, and quantize it once."""

import copy
import gc
import pickle
import weakref

import onnx
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification, LlamaForCausalLM, T5ForConditionalGeneration

import hf_daq
from hf_daq.errors import ConfigError, ModelError
from hf_daq.model.patch import quantize_replaced
from hf_daq.nn import layers as layers_module
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import daq_layers

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
LLAMA = BERT | {"num_key_value_heads": 1}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}


def text_model(kind, sizes):
    torch.manual_seed(0)
    return kind(kind.config_class(**sizes)).eval()


def tokens(seed=0):
    return torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(seed))


def calibrated(model, *batches, **config):
    hf_daq.apply_daq(model, **({"bits": 4} | config))
    with hf_daq.calibrate(model, check=False):
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return model


def bert(**config):
    return calibrated(text_model(BertForSequenceClassification, BERT), tokens(), **config)


class Attention(nn.Module):
    """Query, key and value; `between` is called with the input after the query."""

    def __init__(self, between=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        return q, self.k(x), self.v(x)


class Network(nn.Module):
    def __init__(self, between=None):
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(8), Attention(between), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(torch.cat(self.attention(self.norm(x)), -1))


def network(**config):
    torch.manual_seed(0)
    return calibrated(Network(), torch.randn(32, 8), **({"first_last_bits": 4} | config))


def sharing(model):
    return {name: e["same_input_as"] for name, e in model.daq_config.layers.items() if "same_input_as" in e}


def alone(model):
    """A copy in which nothing is shared, with the same values."""
    model = copy.deepcopy(model)
    for layer in daq_layers(model).values():
        if layer.input_owner is not None:
            layer.a_quant, layer.input_owners = copy.deepcopy(layer.a_quant), ()
        layer.input_readers = 1
    entries = model.daq_config.layers.items()
    model.daq_config = model.daq_config.replace(
        layers={name: {key: e[key] for key in ("weight_bits", "activation_bits")} for name, e in entries}
    )
    return model


def calls(model, *args, **kwargs):
    """How many times a quantizer of inputs ran in a forward."""
    count = []
    quantizers = {layer.a_quant for layer in daq_layers(model).values() if layer.a_quant is not None}
    hooks = [quantizer.register_forward_hook(lambda *_: count.append(1)) for quantizer in quantizers]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return len(count)


def test_query_key_and_value_share_one_quantizer_which_runs_once():
    model = bert()
    inside = "bert.encoder.layer.{}.attention.self.{}"
    assert sharing(model) == {
        inside.format(block, part): inside.format(block, "query") for block in (0, 1) for part in ("key", "value")
    }
    names = [name for name in model.state_dict() if "a_quant" in name]
    assert inside.format(0, "query") + ".a_quant.lower" in names
    assert not [name for name in names if ".key." in name or ".value." in name]
    assert calls(model, tokens()) == 9  # of 13 layers
    (group,) = [group for group in hf_daq.param_groups(model, 1e-4) if group["name"] == "quantizer"]
    assert len(set(map(id, group["params"]))) == len(group["params"])


def test_cross_attention_shares_in_its_own_block_alone():
    model = text_model(T5ForConditionalGeneration, T5)
    calibrated(model, {"input_ids": tokens(), "decoder_input_ids": tokens(1)})
    cross = "decoder.block.{}.layer.1.EncDecAttention.{}"
    found = {name: owner for name, owner in sharing(model).items() if "EncDec" in name}
    assert found == {cross.format(block, "v"): cross.format(block, "k") for block in (0, 1)}


def test_gate_and_up_share_and_the_packed_model_does_too():
    model = calibrated(text_model(LlamaForCausalLM, LLAMA), tokens())
    assert sharing(model)["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
    ids = tokens(3)
    before = model(ids).logits
    hf_daq.pack(model)
    assert all(layer.input_owner.a_quant is layer.a_quant for layer in daq_layers(model).values() if layer.input_owner)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    hf_daq.unpack(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    float_model = hf_daq.remove_daq(model)
    assert not any("input_" in key for module in float_model.modules() for key in vars(module))


class Branches(nn.Module):
    """Two branches of the same input, of which every other call takes one, and two that run always."""

    def __init__(self):
        super().__init__()
        self.even, self.odd, self.one, self.other, self.after = (nn.Linear(8, 8) for _ in range(5))
        self.listed = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        part = (self.even if self.calls % 2 == 0 else self.odd)(x)
        y = part + self.one(x) + self.other(x) + sum(layer(x) for layer in self.listed)
        return self.after(x.mul_(2)) + y


def test_only_layers_of_one_block_that_read_the_same_in_every_call_share():
    torch.manual_seed(0)
    model = calibrated(Branches(), *(torch.randn(16, 8) for _ in range(4)), rules=[{"pattern": "*", "bits": 4}])
    assert sharing(model) == {"other": "one"}
    with hf_daq.calibrate(model, check=False):  # in which it reads what the other does not
        model(torch.randn(16, 8))
        model.other(torch.randn(16, 8))
        model(torch.randn(16, 8))
    assert sharing(model) == {}
    assert model.other.a_quant is not model.one.a_quant
    assert model.one.input_readers == 1


def test_layers_of_other_bits_or_that_do_not_learn_have_their_own():
    model = bert(rules=[{"pattern": "*.key", "bits": 8}])
    assert all(name.endswith("value") for name in sharing(model))
    frozen = text_model(BertForSequenceClassification, BERT)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not name.endswith("value.weight"))
    assert all(name.endswith("key") for name in sharing(calibrated(frozen, tokens())))


def gradients(model, x):
    model.zero_grad()
    loss = model(x).logits.square().sum() if hasattr(model, "config") else model(x).square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("config", [{}, {"low_memory": True}, {"rounding": "soft"}], ids=str)
def test_gradients_are_the_sums_of_those_of_layers_with_their_own(config):
    model = bert(**config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    separate = alone(model)
    found, expected = gradients(model, tokens(5)), gradients(separate, tokens(5))
    owners = {name: sharing(model).get(name, name) for name in model.daq_config.layers}
    sums = {}
    for name, grad in expected.items():
        layer, part, key = name.partition(".a_quant.")
        name = owners.get(layer, layer) + part + key
        sums[name] = sums.get(name, 0) + grad
    assert found.keys() == sums.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, sums[name], rtol=1e-4, atol=1e-5)


def expected_outputs(model, x):
    return [layer.compute(layer.a_quant(x), layer.quantized_weight(), layer.quantized_bias()) for layer in
            (model.q, model.k, model.v)]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.detach().mul_(2),
        lambda x: x.requires_grad_(),
        lambda x: setattr(x, "data", torch.ones(4, 8)),
    ],
    ids=["in place", "of a view", "requires_grad", "data"],
)
def test_what_changes_the_input_between_two_layers_is_seen(change):
    attention = network().attention
    attention.between = change
    x = torch.randn(4, 8)
    before = expected_outputs(attention, x)
    found = attention(x)
    after = expected_outputs(attention, x)
    assert torch.equal(found[0], before[0])
    assert torch.equal(found[1], after[1])
    assert torch.equal(found[2], after[2])
    assert "_shared_result" not in vars(attention.k)


def test_what_changes_between_two_layers_besides_the_input_is_seen():
    attention = network().attention

    def ran(change):
        """Quantizations of a forward in which this happens after the query."""
        attention.between = change
        return calls(attention, torch.randn(4, 8))

    def learn(_):
        with torch.no_grad():
            attention.q.a_quant.upper.mul_(2)

    assert ran(None) == 1
    assert ran(learn) == 2
    assert ran(lambda _: attention.q.a_quant.upper.requires_grad_(False)) == 2
    with torch.no_grad():
        assert ran(lambda _: torch.set_grad_enabled(True)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(lambda _: torch.set_autocast_enabled("cpu", False)) == 2
    with torch.inference_mode():  # where writes leave no trace
        attention.between = None
        assert calls(attention, torch.randn(4, 8)) == 3


def test_a_layer_that_comes_again_quantizes_again():
    attention = network().attention
    x = torch.randn(4, 8)
    attention.q(x)
    x.data.zero_()  # which leaves no trace
    assert torch.equal(attention.q(x), expected_outputs(attention, x)[0])


def test_nothing_is_kept_after_the_forward():
    model = network()
    attention, x = model.attention, torch.randn(4, 8)
    results = []
    hook = attention.q.a_quant.register_forward_hook(lambda _, __, result: results.append(weakref.ref(result)))
    with torch.no_grad():
        model(x)
        attention.q(x)  # the others never come
    hook.remove()
    assert "_shared_result" in vars(attention.q)
    assert results[0]() is None
    assert results[1]() is not None
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert "_shared_result" not in vars(copied.q)
        assert copied.k.a_quant is copied.q.a_quant is not attention.q.a_quant
    gc.disable()
    try:
        del x
        assert results[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_do_not_mix(reentrant, early_stop):
    """A result of one checkpoint is not used in another, which could not compute it again."""
    model = network()
    attention, norm = model.attention, model.norm
    x = torch.randn(4, 8, requires_grad=True)

    def run(forward):
        model.zero_grad()
        x.grad = None
        sum((output * 2).square().sum() for output in forward(norm(x))).backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    def through(layer, y):
        return checkpoint(layer, y, use_reentrant=reentrant)

    expected = run(attention)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        for forward in (
            lambda y: [through(layer, y) for layer in (attention.q, attention.k, attention.v)],
            lambda y: through(attention, y),
        ):
            found = run(forward)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_compiled_models_give_the_same():
    model = network()
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_files_have_the_quantizer_once(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "new")
    opened = BertForSequenceClassification.from_pretrained(tmp_path / "new")
    assert sharing(opened) == sharing(model)
    assert opened.config.quantization_config.layers == model.daq_config.layers
    assert len(list(opened.parameters())) == len(list(model.parameters()))
    assert calls(opened, tokens()) == 9
    assert torch.equal(opened(tokens()).logits, model(tokens()).logits)
    base = type(model.bert).from_pretrained(tmp_path / "new")  # whose layers have other names
    assert sharing(base) == {k.removeprefix("bert."): v.removeprefix("bert.") for k, v in sharing(model).items()}
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True, probe={"input_ids": tokens()})


def test_files_in_which_every_layer_has_its_own_open_as_what_they_are(tmp_path):
    model = network()
    separate = alone(model)
    hf_daq.save_pretrained(separate, tmp_path)
    opened = hf_daq.from_pretrained(tmp_path, model=Network())
    assert sharing(opened) == {}
    assert opened.attention.k.a_quant is not opened.attention.q.a_quant
    x = torch.randn(4, 8)
    assert torch.equal(opened(x), separate(x))
    assert calls(opened, x) == 4
    hf_daq.save_pretrained(model, tmp_path)
    opened = hf_daq.from_pretrained(tmp_path, model=Network())
    assert torch.equal(opened(x), model(x))
    assert calls(opened, x) == 2


@pytest.mark.parametrize("owner", ["nowhere", "b", "a", "c", "d", 3, ["a"]], ids=str)
def test_files_that_share_with_what_they_cannot_are_refused(owner):
    bits = {"weight_bits": 4, "activation_bits": 4}
    layers = {"a": bits | {"same_input_as": owner}, "b": bits | {"same_input_as": "a"}}
    layers |= {"c": bits | {"activation_bits": 8}, "d": bits | {"activation_bits": None}}
    with pytest.raises(ConfigError, match="must name a layer with a quantizer of its own"):
        hf_daq.DaqConfig(bits=4, layers=layers)


def test_a_layer_whose_owner_was_replaced_is_not_saved(tmp_path):
    model = network()
    model.attention.q = copy.deepcopy(model.attention.q)
    with pytest.raises(ModelError, match="uses the input bounds of layer 'attention.q', which is not"):
        hf_daq.save_pretrained(model, tmp_path)


def test_a_shard_of_other_layers_is_refused():
    model = network()
    model.attention.q.a_quant.lower.device_mesh = None  # as FSDP2 leaves it outside of the layer
    with pytest.raises(ModelError, match="shard the block that holds both"):
        model(torch.randn(4, 8))


def test_layers_in_place_of_others_share_what_those_shared():
    model = network()
    x, upper = torch.randn(4, 8), model.attention.q.a_quant.upper
    before = daq_layers(model)
    model.attention.q = nn.Linear(8, 8)
    quantize_replaced(model, before)
    assert model.attention.q.a_quant.upper is upper
    assert model.attention.v.input_owner is model.attention.q
    before = daq_layers(model)
    model.attention.q = nn.Identity()
    quantize_replaced(model, before)
    assert sharing(model) == {"attention.v": "attention.k"}
    assert model.attention.k.a_quant.upper is upper
    assert calls(model, x) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_of_some_layers_change_nothing_for_the_others():
    peft = pytest.importorskip("peft")
    model = bert()
    x = tokens(7)
    expected = model(x).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.5)).eval()
    assert torch.equal(adapted(x).logits, expected)
    adapted.train()
    adapted(x).logits.sum().backward()
    assert sum(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name) == 8


def test_monitor_sees_the_inputs_of_every_layer():
    model = bert().train()
    monitor = hf_daq.Monitor(model, every=3)
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, 1e-3))
    for _ in range(3):
        model(tokens()).logits.sum().backward()
        optimizer.step()
        found = monitor.step()
    values = {
        part: found[f"daq/inputs_clipped/bert.encoder.layer.0.attention.self.{part}"] for part in ("query", "key")
    }
    assert values["query"] == values["key"] > 0


def test_once_is_what_layers_call(monkeypatch):
    """Without it a forward quantizes in every layer: what the tests above count is its work."""
    model = network()
    monkeypatch.setattr(layers_module, "once", lambda _, x, compute: compute(x))
    assert calls(model, torch.randn(4, 8)) == len(quantized_layers(model)) == 4


def test_a_state_dict_that_names_no_bounds_of_a_layer_says_which_config_it_needs():
    saved = bert()
    state, config = saved.state_dict(), saved.daq_config
    with pytest.raises(
        RuntimeError, match=r"key.a_quant.upper is missing: .* hf_daq.apply_daq\(model, saved.daq_config\)"
    ):
        hf_daq.apply_daq(text_model(BertForSequenceClassification, BERT), config.replace(layers=None)).load_state_dict(
            state
        )
    twin = hf_daq.apply_daq(text_model(BertForSequenceClassification, BERT), config)
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens()).logits, saved(tokens()).logits)


@pytest.mark.slow
def test_an_onnx_file_quantizes_a_shared_input_once(tmp_path):
    model = bert(weight_granularity="channel")
    layers = quantized_layers(model).values()
    hf_daq.export_onnx(model, tmp_path / "bert.onnx", {"input_ids": tokens()}, min_agreement=0)
    operators = [node.op_type for node in onnx.load(tmp_path / "bert.onnx").graph.node]
    inputs = sum(layer.input_owner is None for layer in layers)
    assert operators.count("QuantizeLinear") == inputs == len(layers) - 2 * BERT["num_hidden_layers"]
