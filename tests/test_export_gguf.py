"""GGUF files: codes and scales are those of the model, by readers that nobody here wrote: gguf, transformers, llama.cpp."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from models import small_net
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ExportError, ModelError
from hf_daq.export import gguf as export
from hf_daq.export.gguf import export_gguf
from hf_daq.export.gguf_blocks import decode
from hf_daq.export.gguf_tokenizer import SPLITS
from hf_daq.nn.functional import dequantize_weight
from hf_daq.nn.packed import daq_layers

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS = {
    "llama": lambda **more: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES | more)),
    "llama3": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True, rope_parameters=LLAMA3)),
    "mistral": lambda **more: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, head_dim=64, **more)),
    "qwen2": lambda **more: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=True, **more)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=128)),
    "gemma": lambda **more: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=64, **more)),
    "gemma2": lambda **more: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA | more)),
    "gemma3": lambda **more: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA | more)),
}
KINDS = {1: "Q1_0", 2: "Q2_K", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 7: "Q8_0", 8: "F16"}
WHOLE = {2: "Q2_K", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))


def quantized(name="llama", bits=4, build=None, **config):
    torch.manual_seed(0)
    model = (build or DECODERS[name])()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # norms and biases that are worth a comparison
    return hf_daq.apply_daq(
        model, DaqConfig(weight_bits=bits, **{"group_size": 256, "weight_grid": "odd"} | config)
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def relative_error(one, other):
    return ((one - other).norm() / other.norm()).item()


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    tf.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("bits", "grid", "kind"),
    [
        *((bits, "odd", kind) for bits, kind in KINDS.items()),
        *((bits, "integer", kind) for bits, kind in WHOLE.items()),
    ],
)
def test_every_number_of_bits_in_its_type(bits, grid, kind, tmp_path):
    model = quantized(bits=bits, weight_grid=grid)
    exact = quantized(bits=bits, weight_grid=grid, scale_dtype="float16")
    report = export_gguf(model, tmp_path / "model.gguf")
    assert report.types == {f"{bits}-bit weights as {kind}": 14}
    assert 0 < report.error < 1e-3
    report = export_gguf(exact, tmp_path / "exact.gguf")
    if kind == "F16":
        assert "take 16 bits each" in str(report)
    else:
        assert (report.layers, report.exact, report.error) == (14, 14, 0.0)
        assert "bit for bit" in str(report)
    stored = tensors(tmp_path / "exact.gguf")["blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == kind
    layer = exact.model.layers[1].mlp.down_proj
    expected = layer.quantized_weight().detach().numpy()
    np.testing.assert_allclose(decode(stored.data, kind, gguf), expected, rtol=0, atol=5e-5 if kind == "F16" else 0)


@pytest.mark.parametrize(
    ("bits", "config"),
    [
        (1, {"group_size": 128}),
        (2, {"weight_granularity": "channel", "group_size": None}),
        (3, {"weight_granularity": "tensor", "group_size": None}),
        (4, {"group_size": 32}),
        (4, {"group_size": 64, "weight_normalization": "standardize"}),
        (5, {"group_size": 96}),  # 256 columns are two groups and a shorter one
        (4, {"group_size": 128, "scale_dtype": "bfloat16"}),
    ],
)
def test_groups_channels_and_tensors(bits, config, tmp_path):
    model = quantized(bits=bits, **config)
    report = export_gguf(hf_daq.pack(model), tmp_path / "model.gguf")
    assert report.error < 1e-3
    assert (report.error == 0) == ("scale_dtype" in config)
    stored = tensors(tmp_path / "model.gguf")
    for number, name in ((0, "q_proj"), (1, "v_proj")):
        layer = daq_layers(model)[f"model.layers.{number}.self_attn.{name}"]
        tensor = stored[f"blk.{number}.attn_{name[0]}.weight"]
        expected = dequantize_weight(layer.codes(), layer.weight_scale, bits=bits, group_size=layer.group_size).numpy()
        if name == "q_proj":  # neighboring rows of the file are half a head apart in the model
            expected = np.concatenate(
                [expected[start : start + 64].reshape(2, 32, -1) for start in range(0, 256, 64)], 1
            )
            expected = expected.transpose(1, 0, 2).reshape(256, -1)
        np.testing.assert_allclose(
            decode(tensor.data, KINDS[bits], gguf), expected, rtol=0, atol=2e-3 * np.abs(expected).max()
        )


def test_one_reader_of_ours_and_that_of_the_package_agree():
    signs = np.random.default_rng(0).integers(0, 2, (6, 256)) * 2 - 1
    step = np.float32([[0.5], [0.25], [3], [1], [2], [7]])
    blocks = export.encode(export.ODD[1], signs.astype(np.int16), step, None)
    np.testing.assert_array_equal(decode(blocks, "Q1_0", gguf), signs * step)
    assert blocks.shape == (6, 36)
    # The definition: two bytes of float16, then bit j % 8 of byte j // 8 is the sign of column j.
    assert blocks[2, :2].view(np.float16) == 3
    bits = [int(blocks[2, 2 + j // 8]) >> (j % 8) & 1 for j in range(128)]
    assert bits == (signs[2, :128] > 0).tolist()


def test_training_moves_scales_on_the_grid_of_the_file(tmp_path):
    model = quantized(bits=2, scale_dtype="float16").train()
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.1, quantizer_lr=0.1))
    before = daq_layers(model)["model.layers.0.mlp.up_proj"].w_quant.scale.detach().clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(daq_layers(model)["model.layers.0.mlp.up_proj"].w_quant.scale, before)
    hf_daq.save_pretrained(model.eval(), tmp_path / "out", packed=True)
    opened = hf_daq.from_pretrained(tmp_path / "out")
    assert opened.daq_config.scale_dtype == "float16"
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
    assert (
        export_gguf(opened, tmp_path / "packed.gguf").exact == export_gguf(model, tmp_path / "model.gguf").exact == 14
    )
    assert (tmp_path / "packed.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_opens_the_file(name, tmp_path):
    if name == "gemma":
        pytest.skip("transformers does not read GGUF files of the first Gemma")
    model = quantized(name, scale_dtype="float16")
    path = tmp_path / "model.gguf"
    export_gguf(model, path, embeddings="f32")
    config = DECODERS[name]().config if name == "llama3" else None  # transformers does not read this scaling
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config).eval()
    if name == "llama3":
        factors = tensors(path)["rope_freqs.weight"].data
        inverse = 1e4 ** -(np.arange(0, 64, 2) / 64)
        np.testing.assert_allclose(inverse / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert relative_error(logits(opened), logits(model)) < 1e-5


def test_metadata(tmp_path):
    export_gguf(quantized("gemma2"), tmp_path / "model.gguf")
    found = fields(tmp_path / "model.gguf")
    assert found["general.architecture"] == "gemma2"
    assert found["general.quantized_by"] == f"hf_daq {hf_daq.__version__}"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert (found["gemma2.context_length"], found["gemma2.attention.sliding_window"]) == (128, 16)
    assert found["gemma2.attention.sliding_window_pattern"] == [True, False]
    assert (found["gemma2.attn_logit_softcapping"], found["gemma2.final_logit_softcapping"]) == (50.0, 30.0)
    assert found["gemma2.attention.key_length"] == found["gemma2.rope.dimension_count"] == 256
    assert "output.weight" not in tensors(tmp_path / "model.gguf")


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(tmp_path):
    export_gguf(quantized(build=lambda: DECODERS["mistral"](sliding_window=40)), tmp_path / "model.gguf")
    assert fields(tmp_path / "model.gguf")["llama.context_length"] == 40


def test_a_linear_stretch_of_positions(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    export_gguf(quantized(build=lambda: DECODERS["llama"](rope_parameters=rope)), tmp_path / "model.gguf")
    found = fields(tmp_path / "model.gguf")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert found["llama.rope.freq_base"] == 5e5


@pytest.mark.parametrize(("embeddings", "bytes_each"), [("f32", 4), ("f16", 2), ("q8_0", 34 / 32)])
def test_the_type_of_embeddings_and_of_layers_in_full_precision(embeddings, bytes_each, tmp_path):
    model = quantized(rules=[{"pattern": "model.layers.0.*", "skip": True}])
    report = export_gguf(model.to(torch.bfloat16), tmp_path / "model.gguf", embeddings=embeddings)
    assert report.types == {"4-bit weights as Q4_1": 7}
    stored = tensors(tmp_path / "model.gguf")
    for name in ("token_embd", "output", "blk.0.attn_k"):
        assert stored[f"{name}.weight"].n_bytes == stored[f"{name}.weight"].n_elements * bytes_each
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert report.size == (tmp_path / "model.gguf").stat().st_size


# ------------------------------------------------------------------------------------------------------- tokenizers

TEXT = Path(__file__).parent.joinpath("../README.md").read_text()
SENTENCES = [
    "Hello world",
    " a  b\n\nc",
    "It's 1234 o'clock, isn't IT?",
    "naïve café 東京 🙂\t\t.",
    "<eos>x",
    "tab\tand  two",
]


def bpe(pattern, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), cut])
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return wrapped(tokenizer)


def sentencepiece(prefix):
    """As transformers converts it: words in ▁, bytes for what has no token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=["<unk>", "<bos>", "<eos>", *bytes_],
        limit_alphabet=60,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return wrapped(tokenizer)


def wrapped(tokenizer):
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def exported(tokenizer, tmp_path):
    model = quantized(build=lambda: DECODERS["llama"](vocab_size=448, num_hidden_layers=1), scale_dtype="float16")
    export_gguf(model, tmp_path / "model.gguf", tokenizer)
    return fields(tmp_path / "model.gguf")


@pytest.mark.parametrize(("pattern", "name", "ignores"), [(pattern, *found) for pattern, found in SPLITS.items()])
def test_byte_level_tokenizers(pattern, name, ignores, tmp_path):
    tokenizer = bpe(pattern, ignores)
    found = exported(tokenizer, tmp_path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert found["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD447]"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert not found["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_of_sentencepiece_from_a_folder(prefix, tmp_path):
    tokenizer = sentencepiece(prefix)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = exported(str(tmp_path / "tokenizer"), tmp_path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", prefix)
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    first, second = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"][:2]
    assert (scores["".join(first)], scores["".join(second)]) == (0, -1)


def test_tokenizers_that_llama_cpp_has_no_form_of(tmp_path):
    def refuse(tokenizer, match):
        with pytest.raises(ExportError, match=match):
            exported(tokenizer, tmp_path)
        assert not (tmp_path / "model.gguf").exists()

    refuse(3, "neither a folder nor a tokenizer")
    refuse(tmp_path, "has no tokenizer.json")
    refuse(bpe(r"\p{N}|\s+"), "cuts text in a way that is not known.*gpt-2, llama-bpe, qwen2, tekken")
    refuse(bpe(None, ignore_merges=True), "cuts text in a way")
    words = Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1}, unk_token="<bos>"))
    refuse(wrapped(words), "holds a tokenizer 'WordLevel'")
    larger = bpe(None)
    larger.add_tokens([f"token{index}" for index in range(300)])
    refuse(larger, r"has 620 tokens, the model 448; write model.resize_token_embeddings")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    refuse(tmp_path / "broken", "no tokenizer that transformers opens")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("bits", "config", "match"),
    [
        (
            2,
            {"group_size": 64},
            "a scale for 64 columns, and Q2_K, the type for 2 bits, has one for 256; write group_size=256",
        ),
        (1, {"group_size": 64}, "Q1_0, the type for 1 bits, has one for 128"),
        (4, {"group_size": 24}, "Q4_1, the type for 4 bits, has one for 32"),
    ],
)
def test_groups_that_a_type_cannot_hold(bits, config, match, tmp_path):
    with pytest.raises(ExportError, match=match):
        export_gguf(quantized(bits=bits, **config), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_columns_that_a_type_cannot_hold(tmp_path):
    def build():
        return DECODERS["llama"](intermediate_size=352)

    model = quantized(bits=2, build=build, weight_granularity="channel", group_size=None)
    match = r"'model.layers.0.mlp.down_proj' has 352 columns, and Q2_K.*multiples of 256; 352 columns go with 3, 4, 5, 6, 7, 8 bits"
    with pytest.raises(ExportError, match=match):
        export_gguf(model, tmp_path / "model.gguf")
    model = quantized(bits=3, build=lambda: DECODERS["llama"](hidden_size=248, head_dim=64), group_size=8)
    with pytest.raises(ExportError, match="248 columns.*multiples of 32; 248 columns go with 8 bits"):
        export_gguf(model, tmp_path / "model.gguf")
    rules = [{"pattern": "re:.*(q|k|v|gate|up)_proj", "skip": True}]
    model = quantized(bits=3, build=lambda: DECODERS["llama"](hidden_size=248, head_dim=64), group_size=32, rules=rules)
    with pytest.raises(ExportError, match="has 248 columns, and Q8_0 holds multiples of 32; write embeddings='f16'"):
        export_gguf(model, tmp_path / "model.gguf", embeddings="q8_0")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=512, word_embed_proj_dim=256)),
            "OPTForCausalLM is not a decoder",
        ),
        (lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)), "LlamaModel is not a decoder.*LlamaForCausalLM"),
        (lambda: DECODERS["llama"](hidden_act="gelu"), "computes LLAMA with silu, the model with 'gelu'"),
        (
            lambda: DECODERS["llama"](rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rotary embedding of the kind 'dynamic'",
        ),
        (lambda: DECODERS["gemma"](tie_word_embeddings=False), "tie_word_embeddings must be True"),
        (
            lambda: DECODERS["gemma2"](query_pre_attn_scalar=64),
            "query_pre_attn_scalar=64 where llama.cpp computes with 256",
        ),
        (lambda: DECODERS["gemma3"](use_bidirectional_attention=True), "attends in both directions"),
        (lambda: DECODERS["gemma"](attention_bias=True), "reads no biases of attention for GEMMA"),
        (
            lambda: DECODERS["gemma3"](layer_types=["full_attention", "sliding_attention"]),
            "full attention in every layer of number 6 for GEMMA3",
        ),
    ],
)
def test_models_that_llama_cpp_computes_in_another_way(build, match, tmp_path):
    with pytest.raises(ExportError, match=match):
        export_gguf(quantized(build=build), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_models_and_mistakes(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"

    def refuse(model, match, **more):
        with pytest.raises(ExportError, match=match):
            export_gguf(model, path, **more)
        assert not list(tmp_path.iterdir())

    refuse(DECODERS["llama"](), "there is no quantized layer")
    refuse(hf_daq.apply_daq(small_net(), bits=3), "not a decoder")
    refuse(quantized(activation_bits=8), "llama.cpp has no such inputs")
    refuse(quantized(), "embeddings='int8' is not one of 'f32', 'f16', 'q8_0'", embeddings="int8")
    model = quantized()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="up_proj' has NaN or infinite values"):
        export_gguf(model, path)
    model = quantized()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.w_quant.scale.fill_(1e7)
    refuse(
        model,
        r"'blk.0.ffn_up.weight' does not hold what the model has: a relative error.*float16 goes from 6e-8 to 65504",
    )
    model = quantized()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] = 1e5
    refuse(model, "'token_embd.weight' does not hold")
    model = DECODERS["llama"]()
    model.model.extra = torch.nn.Linear(256, 256)
    refuse(hf_daq.apply_daq(model, weight_bits=4), "llama.cpp has no tensor for 'model.extra.weight'")
    model = DECODERS["llama"]()
    model.model.extra = torch.nn.Conv2d(3, 3, 3)
    rules = [{"pattern": "model.extra", "weight_bits": 4}]
    refuse(
        hf_daq.apply_daq(model, weight_bits=4, rules=rules), "layer 'model.extra' is a Conv2d.*modules_to_not_convert"
    )
    model = quantized()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(256, 512)
    with pytest.raises(ModelError, match="the model has changed since apply_daq"):
        export_gguf(model, path)
    monkeypatch.setattr("hf_daq.export.guards.is_shard", lambda parameter: True)
    refuse(quantized(), "the model is sharded; gather and save it")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuse(quantized(), "pip install -U gguf")


def test_what_the_file_does_not_hold_is_found(tmp_path, monkeypatch):
    right = export.ODD[4]
    wrong = export.BlockType("Q4_1", 32, lambda integers, step: right.encode(integers[:, ::-1], step))
    monkeypatch.setitem(export.ODD, 4, wrong)
    (tmp_path / "model.gguf").write_bytes(b"before")
    with pytest.raises(ExportError, match="does not hold what the model has"):
        export_gguf(quantized(), tmp_path / "model.gguf")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.gguf", b"before")]
    monkeypatch.setitem(export.ODD, 4, right)
    read = gguf.GGUFReader

    def shorter(path):
        reader = read(path)
        reader.tensors = reader.tensors[:-1]
        return reader

    monkeypatch.setattr(gguf, "GGUFReader", shorter)
    with pytest.raises(ExportError, match="does not have the tensors that were written: .*blk.1"):
        export_gguf(quantized(), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"before"


# ------------------------------------------------------------------------------------------------------- llama.cpp


def greedy(path, prompt, count):
    """Tokens that llama.cpp gives, and its logits for the prompt."""
    from llama_cpp import Llama

    opened = Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    opened.eval(prompt)
    first = opened.scores[: len(prompt)].copy()
    tokens = []
    for _ in range(count):
        tokens.append(int(opened.scores[opened.n_tokens - 1].argmax()))
        opened.eval(tokens[-1:])
    return tokens, torch.from_numpy(first)


def expected_tokens(model, prompt, count):
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


def trained_llama(tokenizer, **config):
    """A small Llama that knows a text by heart, so that rounding of inputs in llama.cpp changes no token."""
    torch.manual_seed(0)
    model = DECODERS["llama"](vocab_size=320)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    model = hf_daq.apply_daq(model, DaqConfig(group_size=256, scale_dtype="float16", **config))
    groups = hf_daq.param_groups(model, lr=3e-3, quantizer_lr=1e-3)
    optimizer = torch.optim.Adam(groups)
    for step in range(200):
        start = torch.randint(0, 400, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[i : i + 64] for i in start])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), ids[:400].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [*({"weight_bits": bits} for bits in range(1, 6)), {"weight_bits": 4, "weight_grid": "integer"}]
)
def test_llama_cpp_gives_the_tokens_of_pytorch(config, tmp_path):
    pytest.importorskip("llama_cpp")
    tokenizer = bpe(None)
    model, text = trained_llama(tokenizer, **config)
    assert export_gguf(model, tmp_path / "model.gguf", tokenizer).exact == 14
    prompt = text[40:72]
    tokens, first = greedy(tmp_path / "model.gguf", prompt, 64)
    with torch.no_grad():
        assert relative_error(first, model(torch.tensor([prompt])).logits[0]) < 0.05
    assert tokens == expected_tokens(model, prompt, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_computes_what_every_decoder_computes(name, tmp_path):
    """In F16, the type of 8 bits, for which it rounds no inputs of products."""
    pytest.importorskip("llama_cpp")
    model = quantized(name, bits=8)
    export_gguf(model, tmp_path / "model.gguf", embeddings="f32")
    _, first = greedy(tmp_path / "model.gguf", IDS[0].tolist(), 1)
    assert relative_error(first, logits(model)[0]) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [*SPLITS, True, False])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tokenizer, tmp_path):
    pytest.importorskip("llama_cpp")
    from llama_cpp import Llama

    tokenizer = sentencepiece(tokenizer) if isinstance(tokenizer, bool) else bpe(tokenizer, dict(SPLITS)[tokenizer][1])
    exported(tokenizer, tmp_path)
    opened = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in [*SENTENCES, TEXT]:
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2 is tied
def test_embeddings_are_the_values_they_are_quantized_to(name, tmp_path):
    model = quantized(name, embedding_bits=4)
    report = export_gguf(model, tmp_path / "model.gguf", embeddings="f32")
    assert report.types == {"4-bit weights as Q4_1": 14}
    found = tensors(tmp_path / "model.gguf")
    expected = model.model.embed_tokens.quantized_weight().detach()
    assert np.array_equal(found["token_embd.weight"].data, expected.numpy())
    assert ("output.weight" in found) == (name == "llama")
