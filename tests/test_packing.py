"""Packed models: the same outputs bit for bit, dense codes on disk, and a layout that others can read."""

import copy
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import images, quantized_timm, small_net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import logits, tiny_bert, tokens
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, CheckpointError, ModelError
from hf_daq.nn.bitpack import pack_bits, packed_size, unpack_bits
from hf_daq.nn.packed import PackedLayer, packed_layers

pytestmark = pytest.mark.usefixtures("bit_for_bit")

SETTINGS = [
    ("test_resnet", {"bits": 1}),
    ("test_vit", {"bits": 5, "first_last_bits": 8}),
    ("test_efficientnet", {"weight_bits": 2, "activation_bits": 4, "weight_granularity": "channel"}),
    ("test_convnext", {"weight_bits": 3, "group_size": 5}),
    ("test_mambaout", {"weight_bits": 7, "activation_bits": 8, "weight_normalization": "standardize"}),
    ("test_vit2", {"bits": 6, "bias_correction": False}),
    ("test_resnet", {"bits": 4, "weight_grid": "integer", "first_last_bits": 1}),
    ("test_vit", {"weight_bits": 8, "weight_grid": "integer", "group_size": 6}),
    ("test_vit", {"weight_bits": 4, "group_size": 8, "scale_dtype": "float16"}),
    ("test_resnet", {"weight_bits": 3, "weight_grid": "integer", "scale_dtype": "bfloat16"}),
]


def trained(name, kwargs):
    """A quantized model after a step that moved its weights, bounds and scales, and its outputs."""
    model = quantized_timm(name, **kwargs)
    size = model.pretrained_cfg["input_size"][-1]
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-3), momentum=0.9)
    model.train()(images(2, size)).square().mean().backward()
    optimizer.step()
    probe = images(2, size, seed=3)
    return model.eval(), probe, model(probe).detach()


@given(st.integers(1, 8), st.integers(0, 70), st.randoms(use_true_random=False))
def test_every_code_comes_back_from_dense_bytes(bits, count, random):
    codes = torch.tensor([random.randrange(2**bits) for _ in range(count)], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(count, bits),) == (math.ceil(count * bits / 8),)
    stream = sum(int(code) << (index * bits) for index, code in enumerate(codes))  # the definition
    assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("name", "kwargs"), [*SETTINGS[:4], *(pytest.param(*more, marks=pytest.mark.slow) for more in SETTINGS[4:])]
)
def test_outputs_are_the_same_packed_reloaded_and_unpacked(name, kwargs, tmp_path):
    model, probe, want = trained(name, kwargs)
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True, probe=probe)
    assert torch.equal(model(probe), want)  # still trainable
    assert not packed_layers(model)
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path / 'packed'}", pretrained=True),
        hf_daq.from_pretrained(tmp_path / "packed"),
        hf_daq.pack(model),
    ):
        layers = packed_layers(loaded)
        assert set(layers) == set(loaded.daq_config.layers)
        assert not any(
            name.startswith(tuple(f"{key}.weight" for key in layers)) for name, _ in loaded.named_parameters()
        )
        assert torch.equal(loaded(probe), want)
    hf_daq.unpack(loaded)
    assert torch.equal(loaded(probe), want)
    loaded(probe).sum().backward()
    hf_daq.save_pretrained(loaded, tmp_path / "unpacked")
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'unpacked'}", pretrained=True)(probe), want)


def test_attention_that_reads_the_weight_itself_calls_the_packed_layer(tmp_path):
    # timm's BEiT, EVA and Swin-v2
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=5).eval()
    with hf_daq.calibrate(hf_daq.apply_daq(model, bits=3)):
        model(images(2, 28))
    hf_daq.save_pretrained(model, tmp_path, packed=True, probe=images(2, 28))


def test_a_file_is_as_large_as_its_bits(tmp_path):
    for bits in range(1, 9):
        model = timm.create_model("resnet18", num_classes=10)
        hf_daq.apply_daq(model, weight_bits=bits)
        hf_daq.save_pretrained(model, tmp_path, packed=True)
        names = {f"{name}.weight" for name in model.daq_config.layers}
        state = model.state_dict()
        codes = sum(state[name].numel() for name in names) * bits / 8
        floats = sum(v.nbytes for k, v in state.items() if k not in names and "w_quant" not in k)
        assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(codes + floats, rel=0.03)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_transformers_opens_packed_checkpoints(bits, tmp_path):
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=bits, activation_bits=8)
    with hf_daq.calibrate(model):
        model(tokens())
    want = logits(model)
    hf_daq.save_pretrained(model, tmp_path, packed=True, probe={"input_ids": tokens()})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert packed_layers(loaded)
    assert torch.equal(logits(loaded), want)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(loaded, TrainingArguments(tmp_path / "run", report_to="none"))
    assert packed_layers(AutoModel.from_pretrained(tmp_path))
    assert torch.equal(logits(hf_daq.from_pretrained(tmp_path)), want)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    query = half.bert.encoder.layer[0].attention.self.query
    assert query.weight.dtype == query.bias.dtype == torch.bfloat16
    assert query.weight_scale.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(loaded), logits(model))
    hf_daq.unpack(loaded)
    assert torch.equal(logits(loaded), want)
    assert loaded.hf_quantizer.is_qat_trainable
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        plain = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=DaqConfig(bits=3, dequantize=True)
        )
    assert type(plain.bert.encoder.layer[0].attention.self.query) is nn.Linear
    dequantized = copy.deepcopy(model).dequantize()
    for one, other in zip(plain.parameters(), dequantized.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0)


def test_opening_a_packed_folder_computes_no_weight(tmp_path, monkeypatch):
    hf_daq.save_pretrained(hf_daq.apply_daq(tiny_bert(), weight_bits=3), tmp_path, packed=True)
    read = []
    weight = PackedLayer.weight.fget
    monkeypatch.setattr(PackedLayer, "weight", property(lambda layer: read.append(layer) or weight(layer)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not read
    assert next(iter(packed_layers(model).values())).weight is not None
    assert len(read) == 1


@pytest.mark.slow
def test_transformers_alone_refuses_a_packed_checkpoint(tmp_path):
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=3)
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    code = """
import sys
from transformers import AutoConfig, AutoModel, BertForSequenceClassification
for loader in (AutoModel, BertForSequenceClassification):
    try:
        loader.from_pretrained(sys.argv[1] + "/packed")
    except ValueError as error:
        assert "the weights are packed, and read after `import hf_daq` alone" in str(error), error
    else:
        raise SystemExit("a model of random weights")
BertForSequenceClassification.from_pretrained(sys.argv[1] + "/trainable")
assert "hf_daq" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_name_that_transformers_refuses_stays_in_the_file(tmp_path):
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=3)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "transformers_weights")
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()).keys() == description.keys()
    hf_daq.unpack(loaded).save_pretrained(tmp_path / "unpacked")
    del description["transformers_weights"]  # a folder that an older version wrote
    assert json.loads((tmp_path / "unpacked" / "config.json").read_text()).keys() == description.keys()
    path.write_text(json.dumps(description))
    older = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(older), logits(model.eval()))


def test_a_packed_transformers_checkpoint_without_its_codes_is_refused(tmp_path):
    hf_daq.save_pretrained(hf_daq.apply_daq(tiny_bert(), weight_bits=3), tmp_path, packed=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for key, message in (
        ("bert.encoder.layer.0.output.dense.weight_codes", "has no bert.*weight_codes"),
        ("bert.encoder.layer.0.output.dense.bias", "has no bert.*bias"),
    ):
        save_file({name: value for name, value in tensors.items() if name != key}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scale = "bert.encoder.layer.0.output.dense.weight_scale"
    save_file(tensors | {scale: tensors[scale] * torch.nan}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="weight_scale is not finite"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_probe_is_a_tensor_or_a_mapping(tmp_path):
    model = quantized_timm("test_resnet", bits=4)
    for probe in ((images(2),), [images(2)]):
        with pytest.raises(ModelError, match=f"probe is a {type(probe).__name__}: give the tensor"):
            hf_daq.save_pretrained(model, tmp_path / "out", probe=probe)
    assert not (tmp_path / "out").exists()


def test_a_probe_is_kept_with_its_outputs_and_a_wrong_file_does_not_take_its_place(tmp_path, monkeypatch):
    model, probe, want = trained("test_resnet", {"bits": 2})
    hf_daq.save_pretrained(model, tmp_path, packed=True, probe=probe)
    kept = load_file(tmp_path / "probe.safetensors")
    assert torch.equal(kept["input.x"], probe)
    assert torch.equal(kept["output.0"], want)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    wrong = hf_daq.apply.pack_layers

    def pack_wrongly(model):
        wrong(model)
        next(iter(packed_layers(model).values())).weight_codes.bitwise_not_()

    monkeypatch.setattr(hf_daq.apply, "pack_layers", pack_wrongly)
    with pytest.raises(CheckpointError, match="gives other outputs than the model: they differ by up to"):
        hf_daq.save_pretrained(model, tmp_path, packed=True, probe=probe)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    hf_daq.save_pretrained(model, tmp_path)
    assert not (tmp_path / "probe.safetensors").exists()


def test_a_model_of_no_library_is_packed_saved_and_loaded_into_a_float_one(tmp_path):
    model = hf_daq.apply_daq(small_net(), weight_bits=3, activation_bits=4)
    with hf_daq.calibrate(model):
        model(images())
    want = model(images(seed=2))
    hf_daq.save_pretrained(model, tmp_path, packed=True, probe=images())
    other = small_net(seed=5)
    assert torch.equal(hf_daq.from_pretrained(tmp_path, model=other)(images(seed=2)), want)


def test_a_packed_file_that_does_not_fit_leaves_the_float_model_as_it_was(tmp_path):
    model = hf_daq.apply_daq(small_net(), weight_bits=3)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"conv.weight_codes": tensors["conv.weight_codes"][:-1]}, path, metadata=metadata)
    other = small_net()
    before = {name: id(value) for name, value in other.state_dict(keep_vars=True).items()}
    want = other(images())
    with pytest.raises(CheckpointError, match=r"conv.weight_codes has shape \(\d+,\), the model"):
        hf_daq.from_pretrained(tmp_path, model=other)
    assert {name: id(value) for name, value in other.state_dict(keep_vars=True).items()} == before
    assert torch.equal(other(images()), want)
    hf_daq.apply_daq(other, weight_bits=2)


def test_the_shapes_of_the_metadata_must_be_those_of_the_model(tmp_path):
    hf_daq.save_pretrained(hf_daq.apply_daq(small_net(), weight_bits=3), tmp_path, packed=True)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["hf_daq"])
    content["shapes"]["conv"][0] += 1
    save_file(load_file(path), path, metadata={"format": "pt", "hf_daq": json.dumps(content)})
    with pytest.raises(CheckpointError, match="shapes of packed weights in its metadata"):
        hf_daq.from_pretrained(tmp_path, model=small_net())


def test_what_cannot_be_packed_or_unpacked_is_refused_and_left_as_it_was():
    with pytest.raises(ModelError, match="not quantized"):
        hf_daq.pack(small_net())
    model = hf_daq.apply_daq(small_net(), bits=3)
    with pytest.raises(CalibrationError, match=r"run hf_daq.calibrate\(model\) before pack"):
        hf_daq.pack(model)
    with pytest.raises(ModelError, match="unpack needs a packed model"):
        hf_daq.unpack(model)
    with hf_daq.calibrate(model):
        model(images())
    value = model.conv.weight[0, 0, 0, 0].item()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = math.nan
        with pytest.raises(ModelError, match="weight of layer 'conv' has NaN"):
            hf_daq.pack(model)
        model.conv.weight[0, 0, 0, 0] = value
    hf_daq.pack(model)
    with pytest.raises(ModelError, match="packed already"):
        hf_daq.pack(model)
    with pytest.raises(ModelError, match=r"remove_daq\(model, weights='quantized'\)"):
        hf_daq.remove_daq(model)
    with pytest.raises(ModelError, match="hf_daq.unpack"):
        hf_daq.param_groups(model, lr=0.1)
    with pytest.raises(ModelError, match="packed"), hf_daq.calibrate(model):
        pass
    with pytest.raises(ModelError, match="already quantized"):
        hf_daq.apply_daq(model, bits=2)
    with pytest.raises(ModelError, match="written by hf_daq.pack"):
        hf_daq.apply_daq(small_net(), DaqConfig(bits=3, packed=True))
    hf_daq.remove_daq(model, weights="quantized")
    assert type(model.conv) is nn.Conv2d


def test_weights_that_the_forward_standardizes_are_packed_but_not_unpacked():
    model, probe, want = trained("test_nfnet", {"weight_bits": 4})
    hf_daq.pack(model)
    assert torch.equal(model(probe), want)
    with pytest.raises(ModelError, match="standardizes its weight"):
        hf_daq.unpack(model)
    assert torch.equal(model(probe), want)


def test_a_packed_layer_is_the_float_class_moves_between_dtypes_and_pickles():
    model, probe, want = trained("test_resnet", {"bits": 4})
    hf_daq.pack(model)
    layer = next(iter(packed_layers(model).values()))
    assert isinstance(layer, PackedLayer)
    assert isinstance(layer, nn.Conv2d)
    assert "bits=4" in repr(layer)
    assert torch.equal(copy.deepcopy(model)(probe), want)
    wide = copy.deepcopy(model).double()
    assert layer.weight.dtype == torch.float32
    assert wide.get_submodule(layer.daq_name).weight.dtype == torch.float64
    assert torch.allclose(wide(probe.double()).float(), want, atol=0.1)


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"bits": 4}, {"bits": 8, "weight_granularity": "channel"}])
def test_scales_that_training_turned_are_packed_and_unpacked(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(136, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)).eval()
    hf_daq.apply_daq(model, **options)
    x = torch.randn(4, 136)
    with hf_daq.calibrate(model, check=False):
        model(x)
    with torch.no_grad():
        model[2].w_quant.scale.neg_()
    want = model(x)
    assert torch.allclose(hf_daq.pack(copy.deepcopy(model))(x), want, atol=1e-6)
    assert torch.allclose(hf_daq.unpack(hf_daq.pack(model))(x), want, atol=1e-6)
    hf_daq.remove_daq(hf_daq.pack(model), weights="quantized")


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.data.copy_(torch.zeros(16, 16)),
        lambda weight: weight.data.__setitem__(0, 1.0),
        lambda weight: weight.detach().view(-1).mul_(2),
        lambda weight: weight.chunk(2)[0].zero_(),
        lambda weight: [row.zero_() for row in weight],
        lambda weight: nn.init.normal_(weight.data),
        lambda weight: torch.add(weight, 1, out=weight.data),
        lambda weight: torch._foreach_mul_([weight.data], 2.0),
    ],
)
def test_nothing_is_written_to_a_packed_weight(write):
    layer = hf_daq.pack(hf_daq.apply_daq(nn.Sequential(nn.Linear(16, 16)), weight_bits=4, first_last_bits=4))[0]
    with pytest.raises(ModelError, match=r"nothing can be written to it; first write hf_daq.unpack\(model\)"):
        write(layer.weight)
    # It is read all the same.
    kept = nn.Parameter(torch.zeros(16, 16))
    kept.data.copy_(layer.weight)
    assert torch.equal(kept, copy.deepcopy(layer.weight))
    assert type(layer.weight.data * 2) is type(layer.weight.clone()) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bit_codes_survive_unpacking_into_half_precision(dtype):
    model = hf_daq.apply_daq(small_net(), weight_bits=8)
    hf_daq.pack(model)
    codes = {name: layer.codes() for name, layer in packed_layers(model).items()}
    hf_daq.unpack(model.to(dtype))
    for name, want in codes.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.w_quant.codes(layer.weight), want)


def test_a_config_that_asks_for_more_layers_than_the_file_has_is_refused_at_once(tmp_path):
    hf_daq.save_pretrained(hf_daq.apply_daq(tiny_bert(), weight_bits=3), tmp_path, packed=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="has more than"):
        hf_daq.from_pretrained(tmp_path)
    hf_daq.save_pretrained(hf_daq.apply_daq(timm.create_model("test_vit"), weight_bits=3), tmp_path, packed=True)
    for depth, message in ((10**9, "not arguments of a model"), (10**5, "has more than")):
        description = json.loads(path.read_text())
        description["model_args"]["base_args"]["depth"] = depth
        path.write_text(json.dumps(description))
        with pytest.raises(CheckpointError, match=message):
            hf_daq.from_pretrained(tmp_path)


def test_what_was_frozen_stays_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    hf_daq.apply_daq(model, bits=4, first_last_bits=8)
    with hf_daq.calibrate(model):
        model(torch.randn(5, 4))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hf_daq.unpack(hf_daq.pack(model))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_codes_are_ordinary_tensors_wherever_a_model_is_packed(tmp_path):
    model, x = quantized_timm(), images(2, 64)
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    with torch.inference_mode():
        hf_daq.pack(model)
        opened = hf_daq.from_pretrained(tmp_path)
    hf_daq.unpack(model).train()(x).sum().backward()
    with torch.no_grad():
        before = opened(x)
    with pytest.raises(
        ModelError, match=r"opened or packed inside torch.inference_mode\(\), whose tensors never train"
    ):
        hf_daq.unpack(opened)
    with torch.no_grad():
        assert torch.equal(opened(x), before)


def test_a_packed_state_of_another_grid_is_refused():
    def packed(**config):
        model = hf_daq.apply_daq(small_net(), bits=4, **config)
        with hf_daq.calibrate(model, check=False):
            model(images())
        return hf_daq.pack(model)

    model, other = packed(), packed(weight_grid="odd")
    model.load_state_dict(packed().state_dict())
    with pytest.raises(RuntimeError, match="is of a packed model with {'bits': 4, 'grid': 'odd'}"):
        model.load_state_dict(other.state_dict())


def test_weights_of_8_bits_in_bfloat16_keep_their_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 8))
    hf_daq.apply_daq(model, bits=8)
    with hf_daq.calibrate(model, check=False):
        model(torch.randn(256, 64))
    model.bfloat16()
    codes = model[2].codes()
    assert torch.equal(hf_daq.unpack(hf_daq.pack(model))[2].codes(), codes)
