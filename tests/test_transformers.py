"""transformers models: what its users expect of a quantization method, and the places where transformers fails in silence
unless the library takes care."""

import copy
import importlib
import json
import pickle

import pytest
import timm
import torch
import transformers
from models import images, small_timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import CONFIG, calibrated, logits, same_state, tiny_bert, tiny_llama, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Cache,
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, CheckpointError, ConfigError, ModelError
from hf_daq.nn.layers import quantized_layers


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    transformers.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def float_dir(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def saved(tmp_path):
    """A calibrated model and the folder it was saved to."""
    model = calibrated(tiny_bert())
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


# ----------------------------------------------------------------------------------------------------------- loading


def test_registering_twice_is_harmless(float_dir):
    importlib.reload(hf_daq.integrations.transformers)
    model = AutoModelForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG)
    assert quantized_layers(model)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.to_dict()], ids=["object", "dict"])
def test_from_pretrained_with_a_config_and_apply_daq_end_in_the_same_state(float_dir, config):
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        float_dir, quantization_config=config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    applied = hf_daq.apply_daq(AutoModelForSequenceClassification.from_pretrained(float_dir), CONFIG)
    same_state(loaded, applied)
    assert loaded.daq_config == applied.daq_config == loaded.config.quantization_config
    assert loaded.config.to_dict() == applied.config.to_dict()
    own = {key for key in loaded.__dict__ if key not in tiny_bert().__dict__}
    assert own == {key for key in applied.__dict__ if key not in tiny_bert().__dict__}
    assert "save_pretrained" in own
    for model in (loaded, applied):
        assert model.is_quantized
        assert model.quantization_method == "daq"
        assert model.hf_quantizer.is_trainable
        assert model.hf_quantizer.is_qat_trainable
        assert model._keys_to_ignore_on_load_missing == tiny_bert()._keys_to_ignore_on_load_missing
        with pytest.raises(CalibrationError, match=r"layer 'bert.encoder.layer.0.attention.self.query'"):
            model(input_ids=tokens())


def test_weights_only_needs_no_calibration(float_dir):
    model = AutoModelForSequenceClassification.from_pretrained(float_dir, quantization_config=DaqConfig(weight_bits=8))
    torch.testing.assert_close(logits(model), logits(tiny_bert()), rtol=0, atol=2e-3)
    coarse = AutoModelForSequenceClassification.from_pretrained(float_dir, quantization_config=DaqConfig(weight_bits=2))
    assert (logits(coarse) - logits(tiny_bert())).abs().max() > (logits(model) - logits(tiny_bert())).abs().max()


def test_a_reloaded_model_is_bit_exact_and_trainable(saved):
    model, folder = saved
    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.daq_config == model.daq_config
    assert torch.equal(logits(hf_daq.from_pretrained(folder)), logits(model))
    with pytest.raises(ModelError, match=r"opened by its class: BertForSequenceClassification.from_pretrained\("):
        hf_daq.from_pretrained(folder, model=tiny_bert())
    loaded(input_ids=tokens(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    for group in hf_daq.param_groups(loaded, lr=0.1):
        assert all(parameter.grad is not None for parameter in group["params"])


def test_a_frozen_lower_bound_is_frozen_again(tmp_path):
    """transformers makes every parameter it loads trainable."""
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: output.abs())
    calibrated(model)
    bounds = {name: p for name, p in model.named_parameters() if name.endswith("a_quant.lower")}
    frozen = {name for name, p in bounds.items() if not p.requires_grad}
    assert frozen == {"model.layers.0.mlp.down_proj.a_quant.lower"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen
    assert not loaded.model.layers[0].mlp.down_proj.a_quant.signed


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
def test_half_precision_keeps_quantizers_in_float32(tmp_path, dtype):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=CONFIG)
    with hf_daq.calibrate(model):
        model(input_ids=tokens())
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "_quant." in name else torch.bfloat16), name
    assert torch.equal(logits(loaded), logits(model))


def test_tied_embeddings_stay_tied_and_in_full_precision(tmp_path):
    model = calibrated(tiny_llama(tie_word_embeddings=True))
    reason = hf_daq.plan(tiny_llama(tie_word_embeddings=True), CONFIG).kept["lm_head"].reason
    assert reason == "shares its weight with model.embed_tokens"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))
    # While transformers loads, nothing is tied yet: the outcome must be the same.
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    rules = [{"pattern": "lm_head", "bits": 8}]
    through_config = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=CONFIG.replace(rules=rules)
    )
    assert "lm_head" not in through_config.daq_config.layers


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(saved, device_map):
    model, folder = saved
    assert torch.equal(
        logits(AutoModelForSequenceClassification.from_pretrained(folder, device_map=device_map)), logits(model)
    )


@pytest.mark.parametrize("options", [{}, {"quantization_config": CONFIG}])
def test_offloading_to_disk_is_refused(saved, float_dir, tmp_path, options):
    folder = float_dir if options else saved[1]
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    whole = {"device_map": "auto", "max_memory": {"cpu": 1000}}
    for part, where in ("'bert.encoder'", {"device_map": device_map}), ("all of it", whole):
        with pytest.raises(
            ModelError, match=f"puts {part} on the disk; leave 'disk' out of device_map, or give more max_memory"
        ):
            AutoModelForSequenceClassification.from_pretrained(folder, **where, **options, offload_folder=tmp_path)


def test_modules_to_not_convert_and_the_resolved_layers_are_saved(float_dir, tmp_path):
    config = CONFIG.replace(modules_to_not_convert=["bert.encoder.layer.0", "*.query"])
    model = AutoModelForSequenceClassification.from_pretrained(float_dir, quantization_config=config)
    assert not any("layer.0" in name or "query" in name for name in quantized_layers(model))
    with hf_daq.calibrate(model):
        model(input_ids=tokens())
    model.save_pretrained(tmp_path / "q")
    written = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert set(written["layers"]) == set(quantized_layers(model))
    assert written["quant_method"] == "daq"
    assert "dequantize" not in written
    assert set(quantized_layers(AutoModel.from_pretrained(tmp_path / "q"))) == {
        name.removeprefix("bert.") for name in quantized_layers(model)
    }


def test_weights_that_the_checkpoint_lacks_get_quantizers_too(tmp_path):
    """A head or pooler that transformers initializes itself does not pass through the loading of weights."""
    model = transformers.BertModel(tiny_bert().config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, quantization_config=DaqConfig(4), output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert loaded.pooler.dense.w_quant.calibrated


class RemoteModel(transformers.PreTrainedModel):
    """A model from outside of transformers, whose `_init_weights` writes in place, as many do."""

    config_class = BertConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 2)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(7.0)

    def forward(self, x):
        return self.head(self.body(x))


def test_initialization_of_a_custom_model_does_not_overwrite_its_weights(tmp_path):
    model = RemoteModel(BertConfig())
    nn.init.normal_(model.body[0].weight)
    model.save_pretrained(tmp_path)
    loaded = RemoteModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    assert torch.equal(loaded.body[0].weight, model.body[0].weight)


def test_a_head_checkpoint_in_the_base_model_and_the_other_way(saved, tmp_path):
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    expected = model.bert(input_ids=tokens()).last_hidden_state
    assert torch.equal(base(input_ids=tokens()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert(input_ids=tokens()).last_hidden_state, expected)
    assert again.daq_config == model.daq_config


# ------------------------------------------------------------------------------------- configs, damage, dequantization


def test_the_config_of_a_quantized_checkpoint_wins_with_a_warning(saved):
    model, folder = saved
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=DaqConfig(bits=2))
    assert loaded.daq_config == model.daq_config


def test_dequantize_while_loading_and_afterwards(saved, tmp_path):
    model, folder = saved
    with pytest.warns(UserWarning, match="dequantize"):
        plain = AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=DaqConfig(bits=3, dequantize=True)
        )
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    through_config = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    query = plain.bert.encoder.layer[0].attention.self.query
    assert type(query) is nn.Linear
    assert len(query.weight.unique()) == 8
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-3)
    same_state(plain, through_config)
    for dequantized in (plain, model.dequantize()):
        same_state(dequantized, through_config)
        assert not quantized_layers(dequantized)
        assert not dequantized.is_quantized
        dequantized.save_pretrained(tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
        assert torch.equal(logits(reloaded), logits(plain))


def test_remove_daq_leaves_no_trace(tmp_path):
    model = tiny_bert()
    before = logits(model)
    hf_daq.remove_daq(calibrated(model))
    assert torch.equal(logits(model), before)
    assert not model.is_quantized
    assert model.config.to_dict() == tiny_bert().config.to_dict()
    model.save_pretrained(tmp_path)
    same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path), tiny_bert())


def test_a_checkpoint_without_the_quantizers_that_its_config_names_is_refused(saved, tmp_path):
    """`from_config` of a quantized config builds a float model that keeps the config, and saves it."""
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(saved[1])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no bert.encoder.layer.0.attention.self.query.w_quant.lower"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def change_both_configs(folder, change):
    """Change the quantization config in config.json and in the header of the weights file."""
    description = json.loads((folder / "config.json").read_text())
    change(description["quantization_config"])
    (folder / "config.json").write_text(json.dumps(description))
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["hf_daq"]) | {"quantization_config": description["quantization_config"]}
    save_file(load_file(path), path, metadata=metadata | {"hf_daq": json.dumps(content)})


def test_config_and_header_must_agree(saved):
    path = saved[1] / "config.json"
    path.write_text(path.read_text().replace('"rounding": "daq"', '"rounding": "ste"'))
    with pytest.raises(CheckpointError, match="disagree about the quantization config"):
        AutoModelForSequenceClassification.from_pretrained(saved[1])


def test_a_checkpoint_with_another_head(saved):
    """A layer of a head that was quantized is no layer of a model without that head."""
    more = {"qa_outputs": {"weight_bits": 3, "activation_bits": 8}}
    change_both_configs(saved[1], lambda config: config["layers"].update(more))
    for auto in (AutoModel, AutoModelForSequenceClassification):
        assert len(quantized_layers(auto.from_pretrained(saved[1]))) == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["upper"].fill_(-9), "lower .* is not below upper"),
        (lambda t: t["scale"].fill_(torch.nan), "scale is not finite"),
    ],
)
def test_values_that_no_quantizer_can_have_are_refused(saved, change, message):
    path = saved[1] / "model.safetensors"
    tensors = load_file(path)
    prefix = "bert.encoder.layer.1.output.dense.w_quant."
    change({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(weight_bits=77), ConfigError, "weight_bits=77"),
        (lambda c: c.update(format_version=3), ConfigError, "install a newer hf_daq"),
        (lambda c: c.update(layers=None), CheckpointError, "no resolved layers"),
        (lambda c: c.update(weight_granularity="channel"), (RuntimeError, CheckpointError), "mismatch"),
        (
            lambda c: c["layers"].update({"bert.encoder.layer.7.output.dense": c["layers"].popitem()[1]}),
            ConfigError,
            "'bert.encoder.layer.7.output.dense' that this model does not have",
        ),
        (
            lambda c: c["layers"].update({"bert.embeddings.word_embeddings": {"weight_bits": 2, "activation_bits": 2}}),
            ConfigError,
            "gives activation_bits to layer 'bert.embeddings.word_embeddings'",
        ),
        (
            lambda c: c["layers"].update(
                {"bert.embeddings.word_embeddings": {"weight_bits": 2, "activation_bits": None}}
            ),
            CheckpointError,
            "no bert.embeddings.word_embeddings.w_quant|w_quant: lower is not finite",
        ),
    ],
)
def test_configs_from_strangers_end_in_clear_errors(saved, change, error, message):
    change_both_configs(saved[1], change)
    with pytest.raises(error, match=message):
        AutoModelForSequenceClassification.from_pretrained(saved[1])


def test_a_stranger_cannot_name_a_class_that_is_not_a_model(saved):
    path = saved[1] / "config.json"
    content = json.loads(path.read_text())
    for names in (["pipeline"], ["AutoModel"], ["Trainer"], [], "Bert", [3]):
        path.write_text(json.dumps(content | {"architectures": names}))
        with pytest.raises(CheckpointError, match="names no model of transformers"):
            hf_daq.from_pretrained(saved[1])


# ------------------------------------------------------------------------------------------------------------ saving


def test_save_pretrained_writes_the_tensors_it_is_given(saved, tmp_path):
    """As FSDP and DeepSpeed need it; transformers itself drops the argument where a model has a quantizer."""
    model, _ = saved
    for number, save in enumerate(
        (
            lambda folder, given: model.save_pretrained(folder, state_dict=given),
            lambda folder, given: model.save_pretrained(folder, True, given),
            lambda folder, given: hf_daq.save_pretrained(model, folder, state_dict=given),
            lambda folder, given: copy.deepcopy(model).save_pretrained(folder, state_dict=given),
        )
    ):
        save(tmp_path / str(number), {name: tensor + 1 for name, tensor in model.state_dict().items()})
        written = load_file(tmp_path / str(number) / "model.safetensors")
        assert torch.equal(written["classifier.weight"], model.classifier.weight + 1)
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(
        load_file(tmp_path / "plain" / "model.safetensors")["classifier.weight"], model.classifier.weight
    )


def test_every_shard_carries_the_quantization(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as file:
            content = json.loads(file.metadata()["hf_daq"])
        assert DaqConfig.from_dict(content["quantization_config"]) == model.daq_config
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_outputs_of_other_weights_do_not_stay_beside_them(tmp_path):
    model = calibrated(tiny_bert())
    hf_daq.save_pretrained(model, tmp_path, probe={"input_ids": tokens()})
    assert (tmp_path / "probe.safetensors").exists()
    model.save_pretrained(tmp_path, variant="other")  # the probe is of the file without a variant
    assert (tmp_path / "probe.safetensors").exists()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "probe.safetensors").exists()


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = hf_daq.apply_daq(tiny_bert(), CONFIG)
    with pytest.raises(CalibrationError, match="is not calibrated; run hf_daq.calibrate"):
        model.save_pretrained(tmp_path)
    calibrated_model = calibrated(tiny_bert())
    with torch.no_grad():
        quantized_layers(calibrated_model)["bert.pooler.dense"].w_quant.upper.fill_(-5)
    with pytest.raises(CheckpointError, match="cannot save: bert.pooler.dense.w_quant: lower"):
        calibrated_model.save_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.classifier.weight.add_(1)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_daq.save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_an_earlier_save_wrote_is_not_loaded_later(tmp_path):
    """transformers takes model.safetensors before shards, also when the shards are newer."""
    first, second = calibrated(tiny_bert()), calibrated(tiny_bert())
    with torch.no_grad():
        second.classifier.weight.add_(1)
    for model, size in ((first, "50GB"), (second, "20KB"), (first, "50GB")):
        hf_daq.save_pretrained(model, tmp_path, max_shard_size=size)
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_variant_of_other_bits_is_not_written_beside(tmp_path):
    """Both have one config.json."""
    first, second = calibrated(tiny_bert()), calibrated(tiny_bert(), DaqConfig(bits=8))
    hf_daq.save_pretrained(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors would stay beside .* save to another folder"):
        hf_daq.save_pretrained(second, tmp_path, variant="other")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    hf_daq.save_pretrained(first, tmp_path, variant="same", max_shard_size="20KB")
    for variant in (None, "same"):
        opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, variant=variant)
        assert torch.equal(logits(opened), logits(first))


def test_a_model_of_timm_replaces_shards(tmp_path):
    hf_daq.save_pretrained(calibrated(tiny_bert()), tmp_path, max_shard_size="20KB")
    model = hf_daq.apply_daq(timm.create_model("test_resnet").eval(), weight_bits=4)
    hf_daq.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(hf_daq.from_pretrained(tmp_path)(images), model(images))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_head_for_other_labels_starts_from_its_weights(granularity, tmp_path):
    config = DaqConfig(bits=8, first_last_bits=8, weight_granularity=granularity)
    model = calibrated(tiny_bert(), config)
    model.save_pretrained(tmp_path / "saved")
    other = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", num_labels=7, ignore_mismatched_sizes=True
    )
    assert other.daq_config == model.daq_config
    assert torch.equal(other.bert.pooler.dense.w_quant.scale, model.bert.pooler.dense.w_quant.scale)
    head, features = other.classifier, other.bert(tokens()).pooler_output
    want = nn.functional.linear(features, head.weight, head.bias)
    assert (head(features) - want).norm() < 0.03 * want.norm()
    other.save_pretrained(tmp_path / "again")
    same_state(other, AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"))


def test_copies_and_pickles_of_a_model_still_work(saved):
    model, _ = saved
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        assert twin.hf_quantizer is not model.hf_quantizer


# ------------------------------------------------------------------------------------------------------ timm inside


def test_a_quantized_timm_checkpoint_opens_in_transformers(tmp_path):
    """Its quantization is in the arguments of the architecture `hf_daq`, so that nothing is quantized twice."""
    model = hf_daq.apply_daq(small_timm(), bits=3)
    with hf_daq.calibrate(model):
        model(images(4, 64))
    hf_daq.save_pretrained(model, tmp_path)
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(wrapper(images(2, 64)).logits, model(images(2, 64)))


def test_a_timm_model_in_transformers_keeps_its_first_layer_and_classifier(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    float_model = transformers.AutoModelForImageClassification.from_config(config).eval()
    float_model.save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    kept = hf_daq.plan(float_model, CONFIG).kept
    assert {name: row.reason for name, row in kept.items()} == {
        "timm_model.conv1.0": "first layer",
        "timm_model.fc": "classifier",
    }
    with hf_daq.calibrate(model):
        model(images(4, 64))
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(images(2, 64)).logits, model(images(2, 64)).logits)


# -------------------------------------------------------------------------------------------- layers and generation


def test_conv1d_of_gpt2_is_quantized_like_a_linear_layer(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    before = logits(model)
    hf_daq.apply_daq(model, weight_bits=8, weight_granularity="channel")
    assert len(quantized_layers(model)) == 8
    assert quantized_layers(model)["transformer.h.0.attn.c_attn"].w_quant.scale.shape == (96,)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=5e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    quantized = logits(model)
    torch.testing.assert_close(logits(hf_daq.remove_daq(model, "quantized")), quantized, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_size", [16, 20, 64])
def test_groups_of_columns(group_size, tmp_path):
    """32 columns, or 48: whole groups, a ragged last one, and one that holds all."""
    model = hf_daq.apply_daq(tiny_llama(), weight_bits=3, group_size=group_size)
    layer = model.model.layers[0].mlp.down_proj
    groups = -(-48 // group_size)
    assert layer.w_quant.lower.shape == (32 * groups,)
    value = layer.w_quant(layer.weight)
    for group in range(groups):
        part = value[:, group * group_size : (group + 1) * group_size]
        assert all(len(row.unique()) <= 8 for row in part)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.daq_config.group_size == group_size
    with hf_daq.calibrate(model):
        model(input_ids=tokens())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_smaller_groups_are_closer_to_the_float_model():
    errors = []
    for options in ({"weight_granularity": "tensor"}, {"weight_granularity": "channel"}, {"group_size": 8}):
        model = tiny_llama()
        layer = model.model.layers[0].mlp.down_proj
        with torch.no_grad():
            layer.weight.mul_(torch.rand(48).mul(3).exp())
        hf_daq.apply_daq(model, weight_bits=3, **options)
        errors.append((layer.w_quant(layer.weight) - layer.weight).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_generation_equals_the_full_forward(activation_bits):
    """With the key-value cache, and for prompts of several lengths in one batch."""
    model = calibrated(tiny_llama(), DaqConfig(weight_bits=4, activation_bits=activation_bits))
    model.generation_config.pad_token_id = 0
    prompts = [tokens(1, length, seed=length) for length in (3, 5)]
    alone = []
    for prompt in prompts:
        sequence = prompt
        for _ in range(8):
            sequence = torch.cat([sequence, model(input_ids=sequence).logits[:, -1:].argmax(-1)], 1)
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert torch.equal(found, sequence)
        alone.append(found[0, prompt.shape[1] :])
    batch = torch.cat([nn.functional.pad(prompts[0], (2, 0)), prompts[1]])
    found = model.generate(batch, attention_mask=(batch > 0).long(), max_new_tokens=8, do_sample=False)
    assert torch.equal(found[:, 5:], torch.stack(alone))


def test_calibration_sees_every_step_of_generate_once_and_checks_the_prompt():
    prompt, lengths = tokens(2, 4), []
    model = hf_daq.apply_daq(tiny_llama(), CONFIG)
    model.generation_config.pad_token_id = 0

    def cached_length(_, args, kwargs):
        (cache,) = (value for value in kwargs.values() if isinstance(value, Cache))  # its keyword differs by release
        lengths.append(cache.get_seq_length())

    model.register_forward_pre_hook(cached_length, with_kwargs=True)
    with hf_daq.calibrate(model):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert lengths == [0, 4, 5, 6, 0, 0, 0]  # observed, and thrice the prompt with the empty cache it had
    assert all(layer.calibrated for layer in quantized_layers(model).values())


@pytest.mark.parametrize("packed", [False, True])
def test_a_config_that_hides_the_quantization_is_refused(packed, tmp_path):
    model = calibrated(tiny_llama())
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    described = AutoConfig.from_pretrained(tmp_path)
    plain = copy.deepcopy(described)
    del plain.quantization_config
    for config in (plain, transformers.LlamaConfig(**plain.to_dict())):
        with pytest.raises(
            (CheckpointError, ValueError), match="config that was given does not say so|weights are packed"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, config=described).eval()
    assert opened.daq_config == AutoModelForCausalLM.from_pretrained(tmp_path).daq_config
