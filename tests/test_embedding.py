"""Quantized embeddings: rows are looked up, then quantized."""

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from tiny import BERT, LLAMA, MARIAN, T5
from torch import nn

import hf_daq
import hf_daq.files.header
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.nn.bitpack import pack_bits, unpack_rows
from hf_daq.nn.integers import integer_arithmetic
from hf_daq.nn.packed import daq_layers

GRANULARITIES = {
    "tensor": {},
    "channel": {"weight_granularity": "channel"},
    "groups": {"group_size": 4},
}
IDS = torch.tensor([[3, 1, 3, 0], [10, 2, 3, 9]])


class Net(nn.Module):
    def __init__(self, columns=7, padding_idx=None, **options):
        super().__init__()
        self.tokens = nn.Embedding(11, columns, padding_idx=padding_idx, **options)
        self.middle, self.head = nn.Linear(columns, columns), nn.Linear(columns, 3)

    def forward(self, ids):
        return self.head(self.middle(self.tokens(ids)).relu())


def quantized(model=None, **options):
    torch.manual_seed(0)
    model = model or Net()
    options = {"weight_bits": 3, "embedding_bits": 3} | options
    return hf_daq.apply_daq(model, **options)


@pytest.mark.parametrize("options", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("normalization", ["scale", "standardize"])
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_values_and_gradients_are_those_of_the_whole_table(options, normalization, grid):
    model = quantized(Net(padding_idx=2), weight_normalization=normalization, weight_grid=grid, **options)
    layer = model.tokens
    weights = torch.randn(*IDS.shape, 7)
    found, expected = {}, {}
    for output, gradients in (
        (layer(IDS), found),
        (F.embedding(IDS, layer.w_quant(layer.weight), 2), expected),
    ):
        layer.zero_grad()
        (output * weights).sum().backward()
        gradients |= {name: value.grad for name, value in layer.named_parameters()} | {"": output.detach()}
    assert found.keys() == {"", "weight", "w_quant.lower", "w_quant.upper", "w_quant.scale"}
    torch.testing.assert_close(found.pop(""), expected.pop(""), rtol=0, atol=0)
    torch.testing.assert_close(found, expected)
    assert found["weight"].any(1).nonzero().flatten().tolist() == [0, 1, 3, 9, 10]
    assert len(layer.w_quant.scale) == (22 if "group_size" in options else 11)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [5, 7, 8, 33])
def test_rows_are_unpacked_from_any_bit(bits, columns):
    codes = torch.randint(2**bits, (9, columns), dtype=torch.uint8)
    rows = torch.tensor([8, 0, 3, 3, 7])
    assert torch.equal(unpack_rows(pack_bits(codes, bits), bits, columns, rows), codes[rows])


@pytest.mark.parametrize("options", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_packed_outputs_are_the_same_bits(options, dtype, grid):
    for bits in (1, 3, 4, 8):
        model = quantized(embedding_bits=bits, weight_bits=4, weight_grid=grid, **options).to(dtype).eval()
        expected = model.tokens(IDS)
        packed = hf_daq.pack(copy.deepcopy(model))
        assert packed.tokens.weight_codes.shape == (-(-11 * 7 * bits // 8),)
        assert torch.equal(packed.tokens(IDS), expected)
        assert torch.equal(packed(IDS), model(IDS))
        assert torch.equal(packed.tokens.weight, model.tokens.quantized_weight())
        again = hf_daq.unpack(packed)
        assert torch.equal(again.tokens(IDS), expected)
        assert type(hf_daq.remove_daq(again, weights="quantized").tokens) is nn.Embedding
        assert torch.equal(again.tokens(IDS), expected)


def test_no_indices_and_wrong_ones():
    model = quantized().eval()
    packed = hf_daq.pack(copy.deepcopy(model))
    for layer in (model.tokens, packed.tokens):
        assert layer(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 7)
        assert layer(IDS.int()[0, 0]).shape == (7,)
        for index in (-1, 11):
            with pytest.raises(IndexError, match="out of range"):
                layer(torch.tensor([index]))


def test_autocast_leaves_the_dtype_of_the_table():
    model = quantized().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokens(IDS), model.tokens(IDS).float())
        assert hf_daq.pack(copy.deepcopy(model)).tokens(IDS).dtype == torch.float32


def test_a_step_trains_looked_up_rows_alone():
    model = quantized(Net(padding_idx=3))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.1, quantizer_lr=0.1))
    model(IDS).square().sum().backward()
    optimizer.step()
    for name in ("weight", "w_quant.scale"):
        changed = (model.state_dict()[f"tokens.{name}"] != before[f"tokens.{name}"]).view(11, -1).any(1)
        assert changed.nonzero().flatten().tolist() == [0, 1, 2, 9, 10]


def test_calibration_starts_a_table_from_its_weight():
    model = quantized(activation_bits=4)
    expected = copy.deepcopy(model.tokens.w_quant.state_dict())
    model.tokens.w_quant.scale.data.fill_(7.0)
    with hf_daq.calibrate(model):
        assert torch.equal(model.tokens(IDS), F.embedding(IDS, model.tokens.weight))
        model(IDS)
    torch.testing.assert_close(dict(model.tokens.w_quant.state_dict()), dict(expected), rtol=0, atol=0)
    assert model.tokens.a_quant is None
    model.tokens.weight.data[4] = torch.nan
    with pytest.raises(CalibrationError, match="weight of layer 'tokens' has NaN"), hf_daq.calibrate(model):
        model(IDS)


def test_a_table_that_is_not_calibrated_says_so():
    with torch.device("meta"):
        model = quantized()
    with pytest.raises(CalibrationError, match="layer 'tokens' is not calibrated"):
        model.tokens(IDS)


def test_plans_with_embeddings():
    net = nn.ModuleDict({"tokens": nn.Embedding(11, 7), "places": nn.Embedding(4, 7), "fc": nn.Linear(7, 7)})

    def bits(**options):
        plan = hf_daq.plan(net, weight_bits=3, first_last_bits=8, **options)
        return {name: plan.quantized[name].weight_bits for name in plan.quantized if name != "fc"}

    assert bits() == {}
    assert bits(embedding_bits=4) == {"tokens": 4, "places": 4}
    assert bits(embedding_bits=4, modules_to_not_convert=["places"]) == {"tokens": 4}
    assert bits(rules=[{"pattern": "re:t.*", "weight_bits": 5}]) == {"tokens": 5}
    assert bits(rules=[{"pattern": "*", "bits": 5}, {"pattern": "tokens", "bits": 6}]) == {"tokens": 6}
    assert bits(embedding_bits=4, rules=[{"pattern": "*", "bits": 5}]) == {"tokens": 5, "places": 5}
    assert bits(embedding_bits=4, rules=[{"pattern": "tokens", "skip": True}]) == {"places": 4}
    assert bits(embedding_bits=4, rules=[{"pattern": "tokens", "activation_bits": 8}]) == {"tokens": 4, "places": 4}
    with pytest.raises(ConfigError, match="embedding_bits=9 is out of range"):
        bits(embedding_bits=9)
    plan = hf_daq.plan(net, weight_bits=3, first_last_bits=8, embedding_bits=4)
    assert [layer.reason for layer in plan.layers] == ["embedding_bits"] * 2 + [plan.quantized["fc"].reason]
    assert plan.packed_bytes == -(-77 * 4 // 8) + 11 * 4 + -(-28 * 4 // 8) + 4 * 4 + 49 + 4 + 7 * 4


HEADS = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("build", "tables"),
    [
        (
            lambda: tiny.build("t5"),
            [f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias" for part in ("encoder", "decoder")],
        ),
        (lambda: tf.MPNetModel(tf.MPNetConfig(**HEADS)), ["encoder.relative_attention_bias"]),
        (lambda: tf.WavLMModel(tf.WavLMConfig(**HEADS)), ["encoder.layers.0.attention.rel_attn_embed"]),
    ],
    ids=["t5", "mpnet", "wavlm"],
)
def test_biases_of_attention_scores_stay_in_float(build, tables):
    model = build()
    plan = hf_daq.plan(model, weight_bits=3, embedding_bits=4)
    assert [row.name for row in plan.kept.values() if row.reason == "table of biases"] == tables
    assert all(row.weight_bits for row in plan.layers if row.kind == "Embedding" and row.name not in tables)
    rules = [{"pattern": tables[0], "bits": 6}]
    assert hf_daq.plan(model, weight_bits=3, rules=rules).quantized[tables[0]].weight_bits == 6
    layers = {tables[0]: {"weight_bits": 5, "activation_bits": None}}
    assert list(hf_daq.plan(model, DaqConfig(weight_bits=3, layers=layers)).quantized) == [tables[0]]


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_without_a_quantized_form_are_named(option):
    (name,) = option
    plan = hf_daq.plan(Net(**option), weight_bits=3, embedding_bits=4)
    assert plan.unsupported["tokens"].reason.startswith(f"has {name}=")
    with pytest.raises(ConfigError, match=r"gives bits to 'tokens' \(Embedding\)"):
        hf_daq.plan(Net(**option), weight_bits=3, rules=[{"pattern": "tokens", "bits": 4}])
    layers = {"tokens": {"weight_bits": 3, "activation_bits": None}}
    with pytest.raises(ConfigError, match=f"'tokens', but in this model it has {name}"):
        hf_daq.plan(Net(**option), DaqConfig(weight_bits=3, layers=layers))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", GRANULARITIES.values(), ids=GRANULARITIES)
def test_files_hold_tables(tmp_path, packed, options):
    model = quantized(first_last_bits=8, **options).eval()
    hf_daq.save_pretrained(model, tmp_path, packed=packed, probe=IDS)
    opened = hf_daq.from_pretrained(tmp_path, Net())
    assert torch.equal(opened(IDS), model(IDS))
    found = hf_daq.inspect(tmp_path)
    assert found.layers[0].shape == (11, 7)
    float_plan = hf_daq.plan(Net(), weight_bits=3, embedding_bits=3, first_last_bits=8, **options)
    assert found.packed_bytes == float_plan.packed_bytes
    assert "tokens" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("options", GRANULARITIES.values(), ids=GRANULARITIES)
def test_reports_of_tables(options):
    model = quantized(first_last_bits=8, **options).eval()
    row = hf_daq.summary(model, IDS).layers[0]
    assert (row.name, row.kind, row.macs, row.activation_bits) == ("tokens", "Embedding", 0, None)
    assert row.output_sqnr > 8
    assert row.bytes == -(-77 * 3 // 8) + 4 * len(model.tokens.w_quant.scale)
    assert hf_daq.health(model, IDS).ok
    sizes = hf_daq.summary(model).totals
    packed = hf_daq.pack(model)
    found = hf_daq.summary(packed, IDS)
    assert found.totals["bytes_after"] == sizes["bytes_after"]
    assert (found.layers[0].path, found.layers[0].path_error) == ("codes", 0.0)
    assert hf_daq.health(packed, IDS).ok


@pytest.mark.parametrize("options", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_integers_of_tables(options, grid):
    model = quantized(embedding_bits=4, weight_grid=grid, **options).double().eval()
    with integer_arithmetic(model):
        found = model(IDS)
    torch.testing.assert_close(found, model(IDS))


def test_the_monitor_sees_codes_change():
    model = quantized()
    monitor = hf_daq.Monitor(model, every=3)
    for _ in range(3):
        model.tokens.weight.data.neg_()
        values = monitor.step()
    assert values["daq/flip_rate/tokens"] > 0.5
    assert set(daq_layers(model)) == {"tokens", "middle"}


# ------------------------------------------------------------------------------------------------------------ tied


class TiedNet(Net):
    def __init__(self, head=nn.Linear):
        super().__init__()
        self.head = head(7, 11)
        self.head.weight = self.tokens.weight


def tied_transformer(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = tf.GPT2Config(
            vocab_size=61, n_positions=16, n_embd=20, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
        return tf.GPT2LMHeadModel(config)
    if kind == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**BERT))
    if kind == "t5":
        return tf.T5ForConditionalGeneration(tf.T5Config(**T5))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True))


TIED = {
    "gpt2": ("transformer.wte", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "llama": ("model.embed_tokens", "lm_head"),
    "t5": ("shared", "lm_head"),
}
TEXT = {"input_ids": torch.tensor([[5, 6, 7, 60, 9], [9, 3, 2, 5, 0]])}


@torch.no_grad()
def logits(model):
    inputs = TEXT | ({"decoder_input_ids": TEXT["input_ids"]} if model.config.is_encoder_decoder else {})
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("packed", [False, True])
def test_tied_transformers_stay_tied(kind, packed, tmp_path):
    model = hf_daq.apply_daq(tied_transformer(kind), weight_bits=4, embedding_bits=3)
    owner, head = (model.get_submodule(name) for name in TIED[kind])
    assert head.weight is owner.weight
    assert head.w_quant is owner.w_quant
    assert model.daq_config.layers[TIED[kind][1]] == {"weight_bits": 3, "activation_bits": None}
    expected = logits(model)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    found = hf_daq.inspect(tmp_path)
    codes = [name for name in hf_daq.files.header.read_header(tmp_path / "model.safetensors").tensors if "head" in name]
    assert not [name for name in codes if "weight" in name or "quant" in name]
    assert found.packed_bytes == hf_daq.plan(tied_transformer(kind), weight_bits=4, embedding_bits=3).packed_bytes
    assert found.float_bytes == hf_daq.plan(tied_transformer(kind), weight_bits=4, embedding_bits=3).float_bytes
    opened = type(model).from_pretrained(tmp_path)
    opened.tie_weights()
    opened = copy.deepcopy(opened)
    assert torch.equal(logits(opened), expected)
    owner, head = (opened.get_submodule(name) for name in TIED[kind])
    assert head.owner is owner
    if packed:
        assert head.weight_codes is owner.weight_codes
        again = hf_daq.unpack(opened)
        torch.testing.assert_close(logits(again), expected)
    assert head.weight is owner.weight
    opened.tie_weights()
    assert head.weight is owner.weight
    plain = hf_daq.remove_daq(opened, weights="quantized")
    torch.testing.assert_close(logits(plain), expected)
    assert type(head) is nn.Linear
    assert head.weight is owner.weight
    plain.save_pretrained(tmp_path / "float")
    torch.testing.assert_close(logits(type(plain).from_pretrained(tmp_path / "float")), expected)


def test_tied_layers_train_one_quantizer():
    model = quantized(TiedNet())
    assert model.head.w_quant is model.tokens.w_quant
    groups = hf_daq.param_groups(model, lr=0.1)
    assert sum(parameter is model.tokens.weight for group in groups for parameter in group["params"]) == 1
    model(IDS).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = model.tokens.w_quant(model.tokens.weight)
    hidden = model.middle(F.embedding(IDS, table)).relu()
    model.zero_grad()
    F.linear(hidden, table, model.head.bias).square().sum().backward()
    torch.testing.assert_close(found, {name: parameter.grad for name, parameter in model.named_parameters()})


class Head(nn.Linear):
    pass


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", [nn.Linear, Head])
def test_tied_networks_of_no_library(head, packed, tmp_path):
    model = quantized(TiedNet(head)).eval()
    totals = hf_daq.summary(model, IDS).totals
    plan = hf_daq.plan(TiedNet(), weight_bits=3, embedding_bits=3)
    assert (totals["bytes_before"], totals["bytes_after"]) == (plan.float_bytes, plan.packed_bytes)
    assert list(totals["weights"].values()) == [plan.totals["weights_quantized"], 0]
    assert plan.totals["weights_quantized"] == 77 + 49
    expected = model(IDS)
    hf_daq.save_pretrained(model, tmp_path, packed=packed, probe=IDS)
    opened = hf_daq.from_pretrained(tmp_path, TiedNet(head))
    assert torch.equal(opened(IDS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(opened)))(IDS), expected)
    assert hf_daq.inspect(tmp_path).packed_bytes == plan.packed_bytes
    assert hf_daq.health(opened, IDS).ok
    assert hf_daq.summary(opened).totals["bytes_after"] == plan.packed_bytes
    with integer_arithmetic(opened):
        torch.testing.assert_close(opened(IDS), expected)


def test_tied_layers_that_parted_are_not_saved(tmp_path):
    model = quantized(TiedNet())
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(ModelError, match="'head' does not share its weight with 'tokens' any more"):
        hf_daq.save_pretrained(model, tmp_path)


def test_plans_with_tied_layers():
    plan = hf_daq.plan(TiedNet(), weight_bits=3, embedding_bits=4)
    assert {name: (row.weight_bits, row.tied_to) for name, row in plan.quantized.items()} == {
        "tokens": (4, None),
        "middle": (3, None),
        "head": (4, "tokens"),
    }
    rules = [{"pattern": "re:tokens|head", "weight_bits": 5}]
    assert hf_daq.plan(TiedNet(), weight_bits=3, rules=rules).quantized["head"].weight_bits == 5
    assert "head" not in hf_daq.plan(TiedNet(), weight_bits=3).quantized
    with pytest.raises(ConfigError, match="'head' in full precision, but it shares its weight with 'tokens'"):
        hf_daq.plan(TiedNet(), weight_bits=3, embedding_bits=4, modules_to_not_convert=["head"])
    layers = {"head": {"weight_bits": 4, "activation_bits": None}}
    with pytest.raises(ConfigError, match="shares its weight with 'tokens', which the config does not quantize alike"):
        hf_daq.plan(TiedNet(), DaqConfig(weight_bits=3, layers=layers))
    layers["tokens"] = {"weight_bits": 5, "activation_bits": None}
    with pytest.raises(ConfigError, match="'head', but in this model it shares its weight with 'tokens', which"):
        hf_daq.plan(TiedNet(), DaqConfig(weight_bits=3, layers=layers))


# ---------------------------------------------------------------------------------------------------------- scaled


def scaled_transformer(kind):
    torch.manual_seed(0)
    if kind == "gemma3":
        return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA, head_dim=8))
    return tf.BartForConditionalGeneration(tf.BartConfig(**MARIAN, scale_embedding=True))


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_in_bfloat16_is_written_and_opened_as_such(tied, tmp_path):
    """Its first parameter is a bound, in float32."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA | {"tie_word_embeddings": tied})).bfloat16().eval()
    hf_daq.apply_daq(model, weight_bits=4, activation_bits=8, embedding_bits=4)
    with hf_daq.calibrate(model, check=False):
        model(IDS)
    want = logits(hf_daq.pack(model))
    assert model.dtype == model.model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert opened.dtype == opened.model.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        logits(opened), want, rtol=0, atol=0.02
    )  # `to` rounds the frequencies of rotary embeddings


@pytest.mark.parametrize("kind", ["gemma3", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_multiply(kind, dtype, tmp_path):
    model = hf_daq.apply_daq(scaled_transformer(kind).to(dtype), weight_bits=4, embedding_bits=3)
    name = {"gemma3": "model.embed_tokens", "bart": "model.encoder.embed_tokens"}[kind]
    layer = model.get_submodule(name)
    scale = layer.embed_scale
    rows = F.embedding(IDS, layer.w_quant(layer.weight)) * (scale.to(dtype) if kind == "gemma3" else scale)
    assert scale != 1
    assert torch.equal(layer(IDS), rows)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    with integer_arithmetic(model):
        torch.testing.assert_close(layer(IDS), rows)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    opened = type(model).from_pretrained(tmp_path)
    assert torch.equal(opened.get_submodule(name)(IDS), rows)
    # `to` rounds the frequencies of rotary embeddings, which a model that is opened has in float32.
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=0 if dtype == torch.float32 else 0.02)
    reread = pickle.loads(pickle.dumps(opened.get_submodule(name)))
    assert torch.equal(reread(IDS), rows)
    plain = hf_daq.remove_daq(model)
    assert type(plain.get_submodule(name)) is type(scaled_transformer(kind).get_submodule(name))


def test_the_report_of_an_embedding_that_multiplies():
    model = hf_daq.apply_daq(scaled_transformer("gemma3"), weight_bits=4, embedding_bits=4)
    row = hf_daq.summary(model, TEXT).layers[0]
    assert row.kind == "Gemma3TextScaledWordEmbedding"
    assert abs(row.output_sqnr - row.weight_sqnr) < 2


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


class Stranger(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.weight


class Same(nn.Embedding):
    pass


def test_subclasses_that_do_anything_else_are_named():
    net = nn.ModuleDict({"a": Shifted(4, 4), "b": Stranger(4, 4), "c": Same(4, 4), "fc": nn.Linear(4, 4)})
    plan = hf_daq.plan(net, weight_bits=3, embedding_bits=4)
    assert {name: row.reason for name, row in plan.unsupported.items()} == {
        "a": "no quantized form of Shifted",
        "b": "no quantized form of Stranger",
    }
    assert plan.quantized["c"].weight_bits == 4


# --------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("options", [{}, {"group_size": 8, "embedding_bits": 8}, {"weight_grid": "integer"}])
def test_onnx_gathers_codes(options, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = quantized(TiedNet(), **{"embedding_bits": 4, "weight_bits": 4} | options).eval()
    report = hf_daq.export_onnx(model, tmp_path / "m.onnx", IDS.repeat(2, 1), runtimes=["onnxruntime"])
    assert report.runtimes["onnxruntime"].error < 1e-5
    graph = onnx.load(tmp_path / "m.onnx").graph
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    tables = {tuple(tensor.dims): tensor.data_type for tensor in graph.initializer if tensor.name in gathered}
    assert tables[11, 7] == onnx.TensorProto.INT8


@pytest.mark.parametrize("tied", [False, True])
def test_compressed_tensors_hold_values_of_embeddings(tied, tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    model = hf_daq.apply_daq(model, weight_bits=4, embedding_bits=3).eval()
    report = hf_daq.export_compressed_tensors(model, tmp_path, TEXT)
    assert report.embeddings == 1
    assert "1 embeddings: their quantized values, in full precision" in str(report)
    assert report.relative_error < 1e-3


def test_a_packed_table_whose_class_writes_to_a_part_of_it(tmp_path):
    """Funnel's `_init_weights` does, when it is opened."""
    config = tf.FunnelConfig(vocab_size=50, d_model=16, n_head=2, block_sizes=[1, 1], pad_token_id=0)
    model = tf.FunnelModel(config).eval()
    hf_daq.apply_daq(model, weight_bits=3, embedding_bits=4)
    ids = torch.randint(2, 50, (2, 6))
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    opened = tf.FunnelModel.from_pretrained(tmp_path)
    assert torch.allclose(opened(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5)
