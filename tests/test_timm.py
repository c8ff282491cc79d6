"""timm models: what `plan` keeps, every layer type, and the whole way for models of many families."""

import pytest
import timm
import torch
from models import images, quantized_timm
from scan_timm import check_architecture
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq.errors import CheckpointError, ModelError
from hf_daq.nn.layers import LAYER_TYPES, quantized_layers

FAMILIES = [
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "tf_mobilenetv3_small_minimal_100",
]
MORE_FAMILIES = [
    "test_maxvit",
    "beit_base_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "test_convnext",
    "test_nfnet",
    "test_mambaout",
    "regnety_002",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "swinv2_tiny_window8_256",
    "tf_efficientnet_cc_b0_4e",
]


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)])
def test_apply_calibrate_train_save_reload_remove(name):
    assert check_architecture(name).problems == []


def test_weights_only_and_first_last_bits_go_the_same_way():
    problems = check_architecture(
        "test_resnet", weight_bits=2, weight_granularity="channel", first_last_bits=8
    ).problems
    assert problems == ["nothing is kept as first layer", "nothing is kept as classifier"]


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def kept(model):
    return {name: layer.reason for name, layer in hf_daq.plan(model, bits=4).kept.items()}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("crossvit_9_240", ["patch_embed.0.proj", "patch_embed.1.proj"], ["head.0", "head.1"]),
        ("deit_tiny_distilled_patch16_224", ["patch_embed.proj"], ["head", "head_dist"]),
        ("vit_tiny_r_s16_p8_224", ["patch_embed.backbone.conv"], ["head"]),
        ("mobileone_s0", ["stem.conv_kxk.0.conv", "stem.conv_scale.conv"], ["head.fc"]),
        ("levit_128s", ["stem.conv1.linear"], ["head.linear", "head_dist.linear"]),
        ("xcit_nano_12_p16_224", ["patch_embed.proj.0.0"], ["head"]),
        ("tresnet_m", ["body.conv1.conv"], ["head.fc"]),
        # All of a classifier with a hidden layer.
        ("caformer_s18", ["stem.conv"], ["head.fc.fc1", "head.fc.fc2"]),
        # Reads a discrete cosine transform of the image, one convolution a color channel.
        ("csatv2", ["stem_dct.conv_y", "stem_dct.conv_cb", "stem_dct.conv_cr"], ["head.fc"]),
        # No classifier: the last layer is one like any other.
        ("vit_small_patch14_dinov2", ["patch_embed.proj"], []),
    ],
)
def test_what_reads_the_image_and_what_gives_the_classes_is_kept(name, first, last):
    assert kept(on_meta(name)) == dict.fromkeys(first, "first layer") | dict.fromkeys(last, "classifier")


def test_a_patch_embedding_that_resizes_its_own_weight_is_kept():
    assert kept(on_meta("naflexvit_base_patch16_gap")) == {
        "embeds.proj": "NaFlexEmbeds reads its weight directly",
        "head": "classifier",
    }


def test_a_weight_that_only_an_unused_path_reads_is_quantized():
    planned = hf_daq.plan(on_meta("mobilevitv2_050"), bits=4)
    assert not planned.unsupported
    assert any(name.endswith("qkv_proj") for name in planned.quantized)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet18", ["conv1"]),
        ("convnext_atto", ["stem_0"]),
        ("fastvit_t8", ["stem_0.conv_kxk.0.conv", "stem_0.conv_scale.conv"]),
        ("crossvit_9_240", ["model.patch_embed.0.proj", "model.patch_embed.1.proj"]),
    ],
)
def test_feature_extractors_keep_their_first_layers_whatever_timm_calls_them(name, first):
    assert kept(on_meta(name, features_only=True)) == dict.fromkeys(first, "first layer")


def test_a_timm_class_built_without_its_factory_keeps_first_layer_and_classifier():
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3)
    assert kept(model) == {"conv1": "first layer", "fc": "classifier"}
    model.reset_classifier(0)
    assert kept(model) == {"conv1": "first layer"}


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("tf_efficientnet_cc_b0_4e", "CondConv2d", 24),
        ("sequencer2d_s", "LSTM", 36),
    ],
)
def test_architectures_report_layers_without_a_quantized_form(name, kind, count):
    reasons = list(kept(on_meta(name)).values())
    assert reasons.count(f"no quantized form of {kind}") == count
    assert len(reasons) == count + 2


@pytest.mark.parametrize(("name", "kind", "count"), [("ecaresnet26t", "Conv1d", 8), ("lambda_resnet26t", "Conv3d", 3)])
def test_convolutions_in_one_and_three_dimensions_are_quantized(name, kind, count):
    plan = hf_daq.plan(on_meta(name), bits=4)
    assert [row.kind for row in plan.quantized.values()].count(kind) == count
    assert len(plan.kept) == 2


def test_layer_types_without_a_quantized_form_are_reported():
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 1),
            "conv1d": nn.Conv1d(4, 4, 3),
            "transposed": nn.ConvTranspose2d(4, 4, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 4),
            "embedding": nn.Embedding(4, 4),
            "custom": type(
                "MyLinear", (nn.Linear,), {"forward": lambda self, x: super(type(self), self).forward(x).relu()}
            )(4, 4),
            "linear": nn.Linear(4, 4),
            "head": nn.Linear(4, 4),
        }
    )
    assert kept(model) == {
        "stem": "first layer by its channels (the forward cannot be traced)",
        "lstm": "no quantized form of LSTM",
        "embedding": "embedding",
        "custom": "no quantized form of MyLinear",
        "head": "last layer by its channels (the forward cannot be traced)",
    }


@pytest.mark.parametrize("name", ["shvit_s1", "efficientvit_m0", "levit_128s", "test_vit"])
def test_a_network_without_a_head_has_a_plan(name):
    assert set(kept(on_meta(name, num_classes=0)).values()) >= {"first layer"}


def layer_of(kind):
    torch.manual_seed(0)
    if issubclass(kind, nn.Linear):
        return kind(16, 24)
    if issubclass(kind, Conv1D):
        return kind(24, 16)
    return kind(16, 24, 3, stride=2, padding=0 if "Same" in kind.__name__ else 1, groups=2)


WITH_INPUTS = [
    kind for kind in LAYER_TYPES if kind.__module__.split(".")[0] != "hf_daq" and not issubclass(kind, nn.Embedding)
]


@pytest.mark.parametrize("kind", WITH_INPUTS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_the_quantized_layer_comes_closer_to_the_float_layer_with_every_bit(kind):
    linear = issubclass(kind, (nn.Linear, Conv1D))
    x = torch.randn(4, 16, *(() if linear else (9,) * len(layer_of(kind).kernel_size)))
    errors = []
    for bits in range(2, 9):
        model = nn.Sequential(layer_of(kind))
        expected = model(x)
        hf_daq.apply_daq(
            model, weight_bits=bits, weight_granularity="channel", rules=[{"pattern": "0", "weight_bits": bits}]
        )
        with hf_daq.calibrate(model):
            model(x)
        assert type(model[0]) is LAYER_TYPES[kind]
        errors.append(((model(x) - expected).norm() / expected.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_attention_that_reads_qkv_weight_itself_calls_the_quantized_layer(name):
    """Calibration reaches qkv, and removing gives back the very numbers: fused and separate bias round differently."""
    sizes = {"depths": (1, 1), "window_size": 4} if name.startswith("swin") else {"depth": 1}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=56 if "14" in name else 64, **sizes).eval()
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None:
            nn.init.normal_(module.q_bias)
            nn.init.normal_(module.v_bias)
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    expected = model(x)
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model):
        torch.testing.assert_close(model(x), expected)
    reached = set()
    for layer_name, layer in quantized_layers(model).items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: reached.add(layer_name))
    model(x)
    assert reached == set(quantized_layers(model))
    assert any(layer_name.endswith("attn.qkv") for layer_name in reached)
    assert torch.equal(hf_daq.remove_daq(model)(x), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"in_chans": 1}, "before apply_daq"),
        ({"img_size": 192}, r"then write model.set_input_size\(img_size=...\)"),
        ({"features_only": True}, "forward_intermediates"),
    ],
)
def test_options_that_change_what_is_saved_say_what_to_write(options, advice, packed, tmp_path):
    hf_daq.save_pretrained(quantized_timm("test_vit", weight_bits=4), tmp_path, packed=packed)
    with pytest.raises(hf_daq.DaqError, match=advice):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_are_found_on_the_meta_device(packed):
    model = quantized_timm("test_vit", bits=4)
    if packed:
        hf_daq.pack(model)
    assert model.to("meta")(torch.empty(3, 3, 160, 160, device="meta")).shape == (3, model.num_classes)


def test_other_sizes_of_images_after_opening(tmp_path):
    model = quantized_timm("test_vit", bits=8)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    opened, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images(2, 192)
    opened.set_input_size(img_size=192)
    whole = hf_daq.remove_daq(model)
    whole.set_input_size(img_size=192)
    want = whole(x)
    assert (opened(x) - want).norm() < 0.1 * want.norm()
    assert len(opened.forward_intermediates(x, indices=3, intermediates_only=True)) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_vit", {}), ("test_resnet", {"feature_cls": "fx"})]
)
def test_a_network_of_features_is_saved_and_opened_as_a_module_of_ones_own(name, options, packed, tmp_path):
    def new():
        return timm.create_model(name, features_only=True, **options).eval()

    model, x = hf_daq.apply_daq(new(), bits=4), images(2)
    with hf_daq.calibrate(model):
        model(x)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    with pytest.raises(CheckpointError, match="model="):
        hf_daq.from_pretrained(tmp_path)
    opened = hf_daq.from_pretrained(tmp_path, model=new())
    for found, wanted in zip(opened(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_blocks_are_fused_before_they_are_quantized():
    branches = timm.models.fastvit.MobileOneBlock(4, 4, 3).eval()
    model = nn.Sequential(branches, nn.Conv2d(4, 4, 1)).eval()
    fused = timm.utils.reparameterize_model(model)
    assert hf_daq.apply_daq(fused, weight_bits=4, first_last_bits=8).daq_config.layers
    hf_daq.apply_daq(model, weight_bits=4, first_last_bits=8)
    for call in (timm.utils.reparameterize_model, timm.models.reparameterize_model):
        with pytest.raises(ModelError, match=r"would fuse the quantized layer '0.*call it first, model = timm.utils"):
            call(model)
    plain = timm.create_model("test_resnet")
    hf_daq.apply_daq(plain, weight_bits=4, first_last_bits=8)
    assert quantized_layers(timm.utils.reparameterize_model(plain)).keys() == quantized_layers(plain).keys()


def test_a_model_that_timm_would_build_otherwise_is_saved_as_ones_own(tmp_path, caplog):
    """As `reparameterize_model` makes it, or `freeze`, whose BatchNorms are other ones."""

    def fused():
        torch.manual_seed(0)
        return timm.utils.reparameterize_model(timm.create_model("repvgg_a0", num_classes=3).eval())

    model, x = fused(), torch.randn(2, 3, 64, 64)
    hf_daq.apply_daq(model, weight_bits=4)
    for packed in (False, True):
        hf_daq.save_pretrained(model, tmp_path, packed=packed, probe=x)
        assert "timm would build another model than this one (" in caplog.text
        opened = hf_daq.from_pretrained(tmp_path, model=fused())
        assert torch.allclose(opened(x), model(x), atol=1e-6)
        with pytest.raises(
            CheckpointError, match=r"holds a ByobNet, which .* hf_daq.from_pretrained\(path, model=model\)"
        ):
            hf_daq.from_pretrained(tmp_path)
