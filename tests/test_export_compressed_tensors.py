"""Models in the format compressed-tensors: what transformers opens without hf_daq is what was exported."""

import json
import sys

import pytest
import tiny
import torch
import transformers
from models import images, small_timm
from processes import Program
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, ExportError
from hf_daq.export import compressed_tensors as export_compressed
from hf_daq.export.compressed_tensors import export_compressed_tensors
from hf_daq.nn.integers import integers
from hf_daq.nn.packed import daq_layers

pytest.importorskip("compressed_tensors")

GRANULARITIES = {"tensor": {}, "channel": {"weight_granularity": "channel"}, "group": {"group_size": 16}}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    transformers.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def batch(seed=2):
    return {"input_ids": torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed))}


def calibrated(name="llama", *, weight_bits=3, **config):
    model = hf_daq.apply_daq(tiny.build(name), DaqConfig(weight_bits=weight_bits, **({"smooth": False} | config)))
    with hf_daq.calibrate(model):
        model(**batch(seed=1))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def described(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def relative_error(one, other):
    return ((one - other).norm() / other.norm()).item()


def same_values(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("granularity", "bits", "grid"),
    [
        *(("group", bits, "odd") for bits in range(1, 9)),
        *(("tensor", bits, "odd") for bits in (1, 4, 8)),
        ("channel", 2, "odd"),
        ("channel", 7, "odd"),
        ("group", 4, "integer"),
        ("channel", 8, "integer"),
    ],
)
def test_weights_are_the_exact_ones_at_every_number_of_bits(granularity, bits, grid, tmp_path):
    model = calibrated(weight_bits=bits, weight_grid=grid, **GRANULARITIES[granularity])
    report = export_compressed_tensors(model, tmp_path, batch())
    if grid == "integer":
        assert {(kind.bits, kind.width, kind.halves) for kind in report.containers} == {(bits, bits, False)}
    assert report.layer_error < 1e-6
    assert report.relative_error < 1e-5
    assert report.agreement == 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(opened), logits(model)) < 1e-5
    for name, layer in daq_layers(model).items():
        found = integers(layer)
        step = found.weight_scale.expand(len(found.weight), -1)
        if found.group_size is not None:
            step = step.repeat_interleave(found.group_size, dim=1)[:, : found.weight.shape[1]]
        torch.testing.assert_close(opened.get_submodule(name).weight, found.weight * step, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("bits", "activation_bits"), [(1, 8), (4, 8), (7, 8), (8, 8), (4, 4), (8, 4), (1, 1)])
@pytest.mark.parametrize("grid", [pytest.param("odd", marks=pytest.mark.slow), "integer"])
def test_quantized_inputs(grid, bits, activation_bits, tmp_path):
    config = {"weight_bits": bits, "activation_bits": activation_bits, "weight_granularity": "channel"}
    model = calibrated("bert", weight_grid=grid, **config)
    report = export_compressed_tensors(model, tmp_path, batch())
    assert report.layer_error < 1e-2
    assert report.relative_error < 2e-2
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert relative_error(logits(opened), logits(model)) < 2e-2


def test_inputs_that_are_never_negative(tmp_path):
    model = calibrated("opt", activation_bits=8)  # its second linear layer follows a ReLU
    layers = daq_layers(model)
    assert any(layer.a_quant.zero_point == 0 for layer in layers.values())
    assert export_compressed_tensors(model, tmp_path, batch()).layer_error < 1e-2
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        assert stored[f"{name}.input_zero_point"].tolist() == [layer.a_quant.zero_point - 128]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_half_precision_keeps_its_dtype(dtype, allowed, tmp_path):
    model = calibrated().to(dtype)
    report = export_compressed_tensors(model, tmp_path, batch())
    assert report.relative_error < allowed
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(opened).dtype == opened.dtype == dtype


def test_a_shorter_last_group(tmp_path):
    model = calibrated(group_size=32)  # 44 columns are 32 and 12, which is 8 and 3 groups of 4
    assert export_compressed_tensors(model, tmp_path, batch()).relative_error < 1e-5
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (32, 11)
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (44, 1)


def test_a_packed_model_gives_the_same_files(tmp_path):
    model = calibrated(activation_bits=8, group_size=16)
    export_compressed_tensors(model, tmp_path / "one", batch())
    export_compressed_tensors(hf_daq.pack(model), tmp_path / "other", batch())
    same_values(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "other")))
    assert described(tmp_path / "one") == described(tmp_path / "other")


# ------------------------------------------------------------------------------------------------------- opening


def test_it_opens_without_hf_daq(tmp_path):
    model = calibrated("bert", activation_bits=8)
    export_compressed_tensors(model, tmp_path, batch())
    code = """if True:
        import sys, torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
        with torch.no_grad():
            save_file({"logits": model(torch.load(sys.argv[2])).logits}, sys.argv[3])
        assert not any(name.startswith("hf_daq") for name in sys.modules)
    """
    torch.save(batch()["input_ids"], tmp_path / "ids.pt")
    paths = [str(tmp_path), str(tmp_path / "ids.pt"), str(tmp_path / "logits.safetensors")]
    (tmp_path / "open.py").write_text(code)
    Program(tmp_path / "open.py", *paths).finish()
    assert relative_error(load_file(paths[-1])["logits"], logits(model)) < 1e-2


def test_the_base_model_opens_too_and_another_head_on_it(tmp_path):
    model = calibrated("bert")
    export_compressed_tensors(model, tmp_path / "head", batch())
    base = AutoModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        hidden = model.bert(**batch()).last_hidden_state
        assert relative_error(base(**batch()).last_hidden_state, hidden) < 1e-5
    hf_daq.remove_daq(model)
    inner = hf_daq.apply_daq(model.bert, DaqConfig(weight_bits=3))
    with hf_daq.calibrate(inner):
        inner(**batch())
    report = export_compressed_tensors(inner, tmp_path / "base", batch()["input_ids"])
    assert report.relative_error < 1e-5
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        hidden = inner(**batch()).last_hidden_state
        assert relative_error(headed(**batch(), output_hidden_states=True).hidden_states[-1], hidden) < 1e-5
    assert not hasattr(headed.classifier, "quantization_scheme")


def test_tied_and_full_precision_layers_stay(tmp_path):
    model = calibrated("llama_tied", modules_to_not_convert=["*.0.mlp.up_proj"])
    export_compressed_tensors(model, tmp_path, batch())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    kept = "model.layers.0.mlp.up_proj"
    assert torch.equal(opened.get_submodule(kept).weight, model.get_submodule(kept).weight)
    assert described(tmp_path)["ignore"] == [r"re:(model\.)?layers\.0\.mlp\.up_proj$", r"re:(model\.)?lm_head$"]
    stored = load_file(tmp_path / "model.safetensors")
    assert f"{kept}.weight" in stored
    assert "lm_head.weight" not in stored
    assert not any(name.endswith(".bias") for name in stored)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "albert", "bart"])
def test_architectures(name, tmp_path):
    model = hf_daq.apply_daq(tiny.build(name), DaqConfig(weight_bits=3))
    with hf_daq.calibrate(model):
        model(**tiny.inputs(name))
    assert export_compressed_tensors(model, tmp_path, tiny.inputs(name, seed=5)).relative_error < 1e-5


# -------------------------------------------------------------------------------------------------------- layout


def test_layout_of_packed_weights(tmp_path):
    model = calibrated(weight_bits=4, group_size=16)
    report = export_compressed_tensors(model, tmp_path, batch())
    stored = load_file(tmp_path / "model.safetensors")
    layer = {name.rpartition(".")[2]: value for name, value in stored.items() if "layers.0.self_attn.q_proj" in name}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in layer.items()} == {
        "weight_packed": (torch.int32, (32, 4)),
        "weight_shape": (torch.int64, (2,)),
        "weight_scale": (torch.float32, (32, 2)),
    }
    described_weights = described(tmp_path)["config_groups"]["group_0"]["weights"]
    assert described_weights == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "dynamic": False,
    }
    assert described(tmp_path)["format"] == "pack-quantized"
    assert report.size == (tmp_path / "model.safetensors").stat().st_size
    assert "12 layers: 4-bit weights as int4, pack-quantized, a scale for 16 columns" in str(report)


def test_layout_of_int8_weights_and_inputs(tmp_path):
    model = calibrated("bert", weight_bits=4, activation_bits=8)
    export_compressed_tensors(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer = {name.rpartition(".")[2]: value for name, value in stored.items() if "layer.0.intermediate.dense" in name}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in layer.items()} == {
        "weight": (torch.int8, (44, 32)),
        "weight_scale": (torch.float32, (44, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
        "bias": (torch.float32, (44,)),
    }
    group = described(tmp_path)["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert group["weights"]["num_bits"] == group["input_activations"]["num_bits"] == 8
    assert group["input_activations"]["symmetric"] is group["input_activations"]["dynamic"] is False


def test_mixed_bits_are_groups_of_their_own(tmp_path):
    rules = [{"pattern": "*.down_proj", "weight_bits": 8}, {"pattern": "*.0.*.q_proj", "activation_bits": 8}]
    model = calibrated(weight_bits=2, rules=rules)
    report = export_compressed_tensors(model, tmp_path, batch())
    assert report.layer_error < 1e-2
    assert {(kind.bits, kind.width, kind.layout, count) for kind, count in report.containers.items()} == {
        (2, 3, "pack-quantized", 11),
        (8, 8, "int-quantized", 2),
        (2, 8, "int-quantized", 1),
    }
    config = described(tmp_path)
    assert config["format"] == "mixed-precision"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert r"re:(model\.)?layers\.\d+\.mlp\.down_proj$" in targets
    assert r"re:(model\.)?layers\.0\.self_attn\.q_proj$" in targets
    assert r"re:(model\.)?layers\.1\.self_attn\.q_proj$" in targets


def test_widths(tmp_path):
    model = calibrated(weight_bits=2, rules=[{"pattern": "*.down_proj", "weight_bits": 5}])
    report = export_compressed_tensors(model, tmp_path, batch(), widths=(4, 8))
    assert {(kind.bits, kind.width) for kind in report.containers} == {(2, 4), (5, 8)}
    assert report.relative_error < 1e-5


# --------------------------------------------------------------------------------------- the model and the folder


def state_of(model):
    described = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    modes = [module.training for module in model.modules()]
    return described, modes, {name: type(module) for name, module in model.named_modules()}, set(vars(model))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_what_it_was(fails, packed, tmp_path, monkeypatch):
    model = calibrated("bert", activation_bits=8)
    model = hf_daq.pack(model) if packed else model.train()
    before, values = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        monkeypatch.setattr(export_compressed, "_compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_compressed_tensors(model, tmp_path / "out", batch())
        assert not (tmp_path / "out").exists()
    else:
        export_compressed_tensors(model, tmp_path / "out", batch())
    assert state_of(model) == before
    same_values(model.state_dict(), values)
    model.save_pretrained(tmp_path / "daq")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "daq")), logits(model))


def test_other_files_stay_and_a_refused_export_leaves_the_last_one(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    model = calibrated()
    assert "not compared" in str(export_compressed_tensors(model, tmp_path))
    assert export_compressed_tensors(model, tmp_path, batch(), verify=False).relative_error is None
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    written = (tmp_path / "model.safetensors").read_bytes()
    exact = export_compressed.tensors_of

    def wrong(*args):
        tensors = exact(*args)
        return tensors | {"weight_scale": tensors["weight_scale"] * 1.02}

    monkeypatch.setattr(export_compressed, "tensors_of", wrong)
    with pytest.raises(ExportError, match=r"layer 'model.layers.*relative error of 0.02, where 0.01 are allowed"):
        export_compressed_tensors(model, tmp_path, batch())
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "model.safetensors").read_bytes() == written


# ------------------------------------------------------------------------------------------------------ refusals


def test_refusals(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="no quantized layer; export the model that apply_daq"):
        export_compressed_tensors(tiny.build("bert"), out)
    with pytest.raises(CalibrationError, match="'bert.encoder.layer.0.attention.self.query' is not calibrated; run"):
        export_compressed_tensors(hf_daq.apply_daq(tiny.build("bert"), DaqConfig(bits=2)), out)
    with pytest.raises(ExportError, match="c_attn' is a Conv1D, and .* linear layers only; leave such layers in full"):
        export_compressed_tensors(hf_daq.pack(calibrated("gpt2")), out)
    with pytest.raises(ExportError, match=r"weights of 4 bits, which need 5 or more here; widths=\(2, 4\) has none"):
        export_compressed_tensors(calibrated(weight_bits=4, weight_grid="odd"), out, widths=(2, 4))
    with pytest.raises(
        ExportError, match="transformers does not open T5ForConditionalGeneration.*no attribute 'weight'"
    ):
        export_compressed_tensors(hf_daq.apply_daq(tiny.build("t5"), DaqConfig(weight_bits=2)), out)
    timm_model = hf_daq.apply_daq(small_timm(), DaqConfig(weight_bits=2))
    with hf_daq.calibrate(timm_model):
        timm_model(images(size=32))
    with pytest.raises(ExportError, match="is no model of transformers.*write hf_daq.save_pretrained"):
        export_compressed_tensors(timm_model, out)
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(ExportError, match="pip install -U compressed-tensors"):
        export_compressed_tensors(calibrated(), out)
    assert not out.exists()


def test_attentions_of_torch_are_refused_and_stay_where_they_are_in_full_precision(tmp_path):
    x = tiny.inputs("siglip")

    def quantized(**config):
        model = hf_daq.apply_daq(tiny.build("siglip"), DaqConfig(bits=8, **config))
        with hf_daq.calibrate(model):
            model(**x)
        return model

    message = (
        "'vision_model.head.attention.q_proj' belongs to a MultiheadAttention.*_convert=.'vision_model.head.attention'"
    )
    for model in (quantized(), hf_daq.pack(quantized())):
        with pytest.raises(ExportError, match=message):
            export_compressed_tensors(model, tmp_path)
    alone = quantized(rules=[{"pattern": r"re:.*head\.attention\.[qkv]_proj", "skip": True}])
    with pytest.raises(ExportError, match="'vision_model.head.attention.out_proj' belongs to a MultiheadAttention"):
        export_compressed_tensors(alone, tmp_path)
    assert not list(tmp_path.iterdir())
    model = quantized(modules_to_not_convert=["vision_model.head.attention"])
    assert export_compressed_tensors(model, tmp_path, x).layer_error < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "lm_head", torch.nn.Identity()),
            "does not find 'lm_head.weight' in the exported",
        ),
        (
            lambda model: setattr(model, "more", torch.nn.LayerNorm(4)),
            "does not know what to do with 'more.bias' of the",
        ),
    ],
)
def test_a_folder_that_is_not_the_whole_model_is_refused(change, message, tmp_path):
    model = calibrated()
    change(model)
    with pytest.raises(ExportError, match=message):
        export_compressed_tensors(model, tmp_path)
