"""A model that is no longer what its config says is refused before the first byte, and the folder stays as it was."""

import copy

import peft
import pytest
import timm
import torch
import transformers as tf
from models import images, quantized_timm, small_net, small_timm
from tiny import BERT, LLAMA, MARIAN, VIT
from torch import nn
from torch.nn.utils import prune

import hf_daq
from hf_daq.errors import ModelError

SIZE = 64


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def llama(**kwargs):
    torch.manual_seed(0)
    return hf_daq.apply_daq(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval(), weight_bits=4, **kwargs)


def resnet(**kwargs):
    return quantized_timm(weight_bits=4, **kwargs)


def named_otherwise(model):
    model.later = model.layer2
    del model.layer2


CHANGES = {
    "timm quantized head": (
        lambda: resnet(first_last_bits=8),
        lambda m: m.reset_classifier(5),
        "layer 'fc' is a Linear now",
    ),
    "timm block dropped": (
        lambda: quantized_timm("test_vit", weight_bits=4),
        lambda m: m.blocks.__delitem__(1),
        "layer 'blocks.5.attn.qkv' is gone",
    ),
    "timm module renamed": (resnet, named_otherwise, "layer 'layer2.0.conv1' is gone"),
    "quantized layer pruned": (
        resnet,
        lambda m: prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5),
        r"prune.remove\(layer, 'weight'\)",
    ),
    "quantized embedding of the output": (
        lambda: llama(first_last_bits=8),
        lambda m: m.resize_token_embeddings(70),
        "layer 'lm_head' is a Linear now",
    ),
    "head of another size": (
        llama,
        lambda m: setattr(m, "lm_head", nn.Linear(32, 7, bias=False)),
        "'lm_head.weight' of",
    ),
    "module added": (llama, lambda m: setattr(m, "value", nn.Linear(3, 3)), "has 'value.bias'"),
    "block dropped": (llama, lambda m: m.model.layers.__delitem__(1), "'model.layers.1.self_attn.q_proj' is gone"),
    "layer replaced": (
        llama,
        lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Linear(32, 44, bias=False)),
        "'model.layers.0.mlp.up_proj' is a Linear now",
    ),
    "layer moved": (
        llama,
        lambda m: setattr(m, "copy", m.model.layers[0].mlp.up_proj),
        "'model.layers.0.mlp.up_proj' is 'copy' now|has 'copy",
    ),
    "other bits": (
        llama,
        lambda m: setattr(
            m,
            "daq_config",
            m.daq_config.replace(layers={k: {"weight_bits": 2, "activation_bits": None} for k in m.daq_config.layers}),
        ),
        "is not what model.daq_config says",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_refused_by_every_way_to_save_it(name, tmp_path):
    build, change, message = CHANGES[name]
    model = build()
    hf_daq.save_pretrained(model, tmp_path)
    before = content(tmp_path)
    change(model)
    ways = [
        lambda: hf_daq.save_pretrained(model, tmp_path),
        lambda: hf_daq.save_pretrained(model, tmp_path, packed=True),
    ]
    if isinstance(model, tf.PreTrainedModel):
        ways.append(lambda: model.save_pretrained(tmp_path))
        ways.append(lambda: model.push_to_hub("user/name"))
    for way in ways:
        with pytest.raises(ModelError, match=message):
            way()
        assert content(tmp_path) == before
    hf_daq.remove_daq(model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "fc", nn.Linear(m.fc.in_features, 7)), "it has 'fc.bias' of shape"),
        (lambda m: setattr(m, "more", nn.Linear(3, 3)), "it has 'more.bias'"),
        (lambda m: prune.l1_unstructured(m.bn1, "weight", 0.5), "it lacks 'bn1.weight'"),
    ],
)
def test_what_timm_would_build_otherwise_is_a_file_of_ones_own(change, words, packed, tmp_path, caplog):
    model, again, x = resnet(), small_timm(), images(2)
    change(model)
    change(again)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    assert words in caplog.text
    assert "open it with hf_daq.from_pretrained(directory, model=model)" in caplog.text
    assert torch.allclose(hf_daq.from_pretrained(tmp_path, model=again)(x), model(x), atol=1e-5)


class Embedder(nn.Module):
    """As sentence-transformers has it: its `save` calls `save_pretrained` of the part."""

    def __init__(self):
        super().__init__()
        self.transformer, self.projection = tf.BertModel(tf.BertConfig(**BERT)), nn.Linear(32, 8)

    def forward(self, ids):
        return self.projection(self.transformer(ids).last_hidden_state.mean(1))


def encoder_decoder():
    decoder = tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return tf.EncoderDecoderModel(encoder=tf.BertModel(tf.BertConfig(**BERT)), decoder=decoder)


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (Embedder, "transformer"),
        (encoder_decoder, "encoder"),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=44, num_layers=2)
            ),
            "encoder",
        ),
    ],
)
def test_a_part_of_a_quantized_model_is_refused_if_it_would_open_in_float(build, part, tmp_path):
    model = hf_daq.apply_daq(build().eval(), weight_bits=2)
    for save in (
        model.get_submodule(part).save_pretrained,
        lambda f: hf_daq.save_pretrained(model.get_submodule(part), f),
    ):
        with pytest.raises(ModelError, match=f"is '{part}' of a model that was quantized as a whole"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fuse", "layer", "norm"),
    [
        (nn.utils.fuse_conv_bn_eval, nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        (nn.utils.fusion.fuse_conv_bn_eval, nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        (nn.utils.fuse_linear_bn_eval, nn.Linear(3, 8), nn.BatchNorm1d(8)),
    ],
)
def test_quantized_layers_are_not_fused_with_a_batch_norm(fuse, layer, norm):
    norm.running_var.uniform_(0.01, 0.1)
    model = nn.Sequential(copy.deepcopy(layer), norm).eval()
    x = torch.randn(4, 3, *[2] * (layer.weight.ndim - 2))
    torch.testing.assert_close(fuse(*model)(x), model(x))
    hf_daq.apply_daq(model, weight_bits=4, first_last_bits=4)
    before = model(x)
    with pytest.raises(ModelError, match="fuse the float model, then apply_daq"):
        fuse(*model)
    assert torch.equal(model(x), before)


def test_ultralytics_leaves_quantized_layers_as_they_are():
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model = tasks.DetectionModel("yolov8n.yaml", nc=4, verbose=False).eval()
    x = torch.rand(2, 3, 64, 64)
    layers = len(hf_daq.apply_daq(model, weight_bits=2).daq_config.layers)
    before = model(x)[0]
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert torch.equal(fused(x)[0], before)
    assert sum(hasattr(module, "daq_name") for module in fused.modules()) == layers
    assert not any(isinstance(part, nn.BatchNorm2d) for part in hf_daq.remove_daq(fused).fuse(verbose=False).modules())


def test_quantized_layers_in_another_model_are_refused(tmp_path):
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    other.model = llama().model
    with pytest.raises(ModelError, match="has layers of a model that was quantized as a whole"):
        other.save_pretrained(tmp_path)


def test_the_base_model_of_a_quantized_one_is_saved_as_quantized(tmp_path):
    model, ids = llama(), torch.arange(3, 15).view(2, 6)
    model.model.save_pretrained(tmp_path)
    opened = tf.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(opened(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "function",
    [
        hf_daq.summary,
        hf_daq.pack,
        lambda m: hf_daq.export_compressed_tensors(m, "nowhere"),
        lambda m: hf_daq.export_onnx(m, "nowhere.onnx", torch.ones(2, 4, dtype=torch.long)),
    ],
    ids=["summary", "pack", "compressed_tensors", "onnx"],
)
def test_a_changed_model_is_not_exported_packed_or_summed_up(function):
    model = llama()
    del model.model.layers[1]
    with pytest.raises(ModelError, match="has changed since apply_daq"):
        function(model)


def replaced(model):
    model.reset_classifier(5)
    return model


def grown(model):
    model.resize_token_embeddings(70)
    return model


@pytest.mark.parametrize("change", [replaced, lambda m: m.reset_classifier(0) or m], ids=["5", "0"])
def test_a_float_head_that_timm_replaced_is_saved(change, tmp_path):
    model = change(resnet())
    hf_daq.save_pretrained(model, tmp_path)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(opened(images(2, SIZE)), model(images(2, SIZE)))


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_names_in_the_file_are_those_that_its_header_says(original_format, packed, tmp_path):
    model = tf.ViTForImageClassification(tf.ViTConfig(**VIT)).eval()
    hf_daq.apply_daq(model, weight_bits=8)
    want = model(images(2, 16)).logits
    hf_daq.save_pretrained(model, tmp_path, packed=packed, save_original_format=original_format)
    assert hf_daq.inspect(tmp_path).layers
    assert torch.equal(hf_daq.from_pretrained(tmp_path)(images(2, 16)).logits, want)


def test_grown_embeddings_are_saved(tmp_path):
    model = grown(llama())
    model.save_pretrained(tmp_path)
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_quantized_embeddings_do_not_grow():
    model = hf_daq.apply_daq(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), weight_bits=4, embedding_bits=4)
    model.resize_token_embeddings(70)
    with pytest.raises(ModelError, match="has 70 rows now, and bounds for 61.*remove_daq"):
        model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ModelError, match=r"'model.embed_tokens' has another shape, \(70, 32\)"):
        hf_daq.pack(model)


@pytest.mark.parametrize(
    "other",
    [
        {"weight_grid": "odd"},
        {"weight_normalization": "standardize"},
        {"weight_granularity": "channel"},
        {"weight_granularity": "group", "group_size": 4},
        {"activation_scale": "token"},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_a_model_with_another_config_is_refused(other, packed, tmp_path):
    def quantized(**config):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        hf_daq.apply_daq(model, bits=4, **config)
        with hf_daq.calibrate(model, check=False):
            model(torch.randn(32, 8))
        return hf_daq.pack(model) if packed else model

    model = quantized()
    hf_daq.save_pretrained(model, tmp_path / "same")
    model[2] = quantized(**other)[2]
    with pytest.raises(ModelError, match="layer '2' is not what model.daq_config says: it has"):
        hf_daq.save_pretrained(model, tmp_path / "other")


def test_a_weight_of_another_shape_is_refused():
    model = hf_daq.apply_daq(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), weight_bits=4)
    model[1].weight = nn.Parameter(torch.randn(3, 4))
    model[1].bias = nn.Parameter(torch.randn(3))
    with pytest.raises(ModelError, match=r"'1' has another shape, \(3, 4\)"):
        hf_daq.pack(model)


# ------------------------------------------------------------------------------------------------- parts and wholes


def llava():
    vision = tf.CLIPVisionConfig(**VIT)
    part = hf_daq.apply_daq(tf.LlamaModel(tf.LlamaConfig(**LLAMA)), weight_bits=2)
    config = tf.LlavaConfig(vision_config=vision, text_config=part.config, image_token_index=60)
    model = tf.LlavaForConditionalGeneration(config)
    model.model.language_model = part
    return model, "model.language_model"


def encoder_decoder():
    encoder = hf_daq.apply_daq(tf.BertModel(tf.BertConfig(**BERT)), weight_bits=4)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return tf.EncoderDecoderModel(encoder=encoder, decoder=decoder), "encoder"


def timm_in_transformers():
    config = tf.TimmWrapperConfig(architecture="test_resnet", num_labels=5, initializer_range=0.02)
    model = tf.TimmWrapperForImageClassification(config)
    hf_daq.apply_daq(model.timm_model, weight_bits=4)
    return model, "timm_model"


def timm_in_a_module():
    return nn.Sequential(resnet(), nn.Linear(10, 3)), "0"


@pytest.mark.parametrize("build", [llava, encoder_decoder, timm_in_transformers, timm_in_a_module])
def test_a_whole_of_which_a_part_is_quantized_is_refused_until_all_is(build, tmp_path):
    model, part = build()
    ways = [lambda: hf_daq.save_pretrained(model, tmp_path / "out")]
    if hasattr(model, "save_pretrained"):
        ways.append(lambda: model.save_pretrained(tmp_path / "out"))
    for way in ways:
        with pytest.raises(ModelError, match=f"part '{part}' of this {type(model).__name__} is quantized"):
            way()
        assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=rf"remove_daq\(model.get_submodule\('{part}'\)\)"):
        hf_daq.apply_daq(model, weight_bits=4)
    hf_daq.save_pretrained(model.get_submodule(part), tmp_path / "part")
    hf_daq.remove_daq(model.get_submodule(part))
    hf_daq.save_pretrained(hf_daq.apply_daq(model, weight_bits=4), tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def recent_peft(monkeypatch):
    import transformers.integrations.peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.10.0")


LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])


def test_adapters_are_saved_alone(recent_peft, tmp_path):
    model, inputs = llama(), torch.arange(8).view(2, 4)
    hf_daq.save_pretrained(model, tmp_path / "base")
    model.add_adapter(LORA)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = hf_daq.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    with pytest.raises(ModelError, match="has an adapter.*merge_and_unload"):
        hf_daq.save_pretrained(model, tmp_path / "whole")
    assert hf_daq.summary(model).layers


@pytest.mark.filterwarnings("ignore:The PEFT config")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_a_trainer_saves_the_adapters_of_a_peft_model(tmp_path):
    base = llama()
    model = peft.get_peft_model(copy.deepcopy(base), LORA)
    args = tf.TrainingArguments(tmp_path / "trainer", report_to=[], use_cpu=True)
    tf.Trainer(model=model, args=args).save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter")


# --------------------------------------------------------------------------------------------------- shared configs


@pytest.mark.parametrize(
    "build",
    [
        lambda c: tf.BertForSequenceClassification(c),
        lambda c: tf.MarianMTModel(tf.MarianConfig(**MARIAN)) if c is None else tf.BertModel(c),
    ],
)
def test_a_teacher_with_the_same_config_stays_a_float_model(build, tmp_path):
    config = tf.BertConfig(**BERT)
    teacher, student = build(config), build(config)
    before = config.to_dict()
    hf_daq.apply_daq(student, weight_bits=8)
    hf_daq.save_pretrained(student, tmp_path / "student")
    assert config.to_dict() == before
    assert teacher.config is config
    teacher.save_pretrained(tmp_path / "teacher")
    assert not hasattr(type(teacher).from_pretrained(tmp_path / "teacher"), "daq_config")


def test_parts_of_a_model_share_its_config_as_before_and_get_it_back():
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VIT), text_config=tf.LlamaConfig(**LLAMA))
    model = tf.LlavaForConditionalGeneration(config)
    hf_daq.apply_daq(model, weight_bits=8)
    assert model.config is not config
    assert model.model.config is model.config
    text = model.config.text_config
    assert text is not config.text_config
    assert model.model.language_model.config is text
    assert model.model.language_model.layers[0].self_attn.config is text
    hf_daq.remove_daq(model)
    assert model.config is config
    assert model.model.language_model.layers[0].self_attn.config is config.text_config


def test_a_config_that_changed_meanwhile_keeps_its_changes():
    config = tf.LlamaConfig(**LLAMA)
    model = hf_daq.apply_daq(tf.LlamaForCausalLM(config), weight_bits=8)
    model.resize_token_embeddings(70)
    hf_daq.remove_daq(model)
    assert (model.config.vocab_size, config.vocab_size) == (70, LLAMA["vocab_size"])
    assert not hasattr(model.config, "quantization_config")


def test_a_plain_model_is_checked_against_its_config(tmp_path):
    model = hf_daq.apply_daq(small_net(), weight_bits=4)
    hf_daq.save_pretrained(model, tmp_path)
    before = content(tmp_path)
    model.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    with pytest.raises(ModelError, match="layer 'conv' is a Conv2d now"):
        hf_daq.save_pretrained(model, tmp_path)
    assert content(tmp_path) == before


class NeedsMore(tf.BertModel):
    """A class that its config alone does not build."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def test_a_class_that_its_config_does_not_build_is_saved_all_the_same(tmp_path):
    model = hf_daq.apply_daq(NeedsMore(tf.BertConfig(**BERT), extra=3), weight_bits=4)
    model.save_pretrained(tmp_path)
    opened = NeedsMore.from_pretrained(tmp_path, extra=3)
    assert torch.equal(opened.encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight)
