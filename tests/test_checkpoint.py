"""Saving and loading: bit for bit the same model, or an error that names what is wrong and a model left as it was."""

import json
import os
import shutil
import struct

import pytest
import timm
import torch
from models import images, quantized_timm, small_net, small_timm
from processes import Program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import calibrated, tiny_bert
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, CheckpointError, DaqError, ModelError
from hf_daq.files import weights_file
from hf_daq.files.header import read_header

SIZE = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    hf_daq.save_pretrained(quantized_timm(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {"bits": 1}),
        ("test_vit", {"bits": 3, "first_last_bits": 8}),
        ("test_efficientnet", {"weight_bits": 2, "activation_bits": 4, "weight_granularity": "channel"}),
        ("test_nfnet", {"weight_bits": 4, "weight_grid": "integer"}),
        ("test_convnext", {"bits": 3, "rules": [{"pattern": "stages.0", "bits": 8}], "rounding": "soft"}),
    ],
)
def test_reload_is_bit_exact_in_a_timm_factory_and_in_ours(name, kwargs, tmp_path):
    model = quantized_timm(name, **kwargs)
    size = model.pretrained_cfg["input_size"][-1]
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-4), momentum=0.9)
    model.train()(images(2, size)).square().mean().backward()
    optimizer.step()
    model.eval()
    want = model(images(2, size, seed=3))
    hf_daq.save_pretrained(model, tmp_path / "a")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    assert torch.equal(reloaded(images(2, size, seed=3)), want)
    assert reloaded.daq_config == model.daq_config
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in reloaded.named_parameters()} == trainable

    hf_daq.save_pretrained(reloaded, tmp_path / "b")
    again = hf_daq.from_pretrained(tmp_path / "b", model=small_timm(name))
    assert torch.equal(again(images(2, size, seed=3)), want)
    headers = [read_header(tmp_path / folder / "model.safetensors") for folder in "ab"]
    descriptions = [(tmp_path / folder / "config.json").read_text() for folder in "ab"]
    assert headers[0] == headers[1]
    assert descriptions[0] == descriptions[1]


def test_any_module_saves_and_loads_into_a_float_twin(tmp_path):
    model = hf_daq.apply_daq(small_net(), bits=2)
    with hf_daq.calibrate(model):
        model(images())
    hf_daq.save_pretrained(model, tmp_path)
    loaded = hf_daq.from_pretrained(tmp_path, model=small_net(7))
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(CheckpointError, match="holds a SmallNet.*from_pretrained\\(path, model=model\\)"):
        hf_daq.from_pretrained(tmp_path)


def test_header_and_config_json_carry_the_same_config_and_version(saved):
    header = read_header(saved / "model.safetensors")
    description = json.loads((saved / "config.json").read_text())
    assert DaqConfig.from_dict(description["model_args"]["quantization_config"]) == header.config
    assert description["hf_daq_version"] == header.version == hf_daq.__version__
    assert header.config.to_dict()["format_version"] == 2


@pytest.mark.slow
def test_a_file_opens_in_a_new_process_after_importing_the_library(saved, tmp_path):
    program = tmp_path / "open.py"
    program.write_text(
        "import sys, timm, hf_daq\n"
        f"model = timm.create_model('local-dir:{saved}', pretrained=True)\n"
        "assert len(hf_daq.plan.__doc__) and model.daq_config.weight_bits == 3\n"
        "assert timm.data.resolve_data_config(model=model)['crop_pct'] == 0.95\n"
    )
    Program(program).finish()


def test_channels_last_models_save_and_load(tmp_path):
    model = quantized_timm().to(memory_format=torch.channels_last)
    hf_daq.save_pretrained(model, tmp_path)
    want = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert all(
        torch.equal(tensor, want[name]) for name, tensor in hf_daq.from_pretrained(tmp_path).state_dict().items()
    )


def test_a_new_number_of_classes_gives_a_new_classifier(saved, tmp_path):
    model = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=4)
    assert model(images(1, SIZE)).shape == (1, 4)
    hf_daq.save_pretrained(model, tmp_path)
    assert torch.equal(hf_daq.from_pretrained(tmp_path)(images(1, SIZE)), model.eval()(images(1, SIZE)))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_new_classifier_in_place_of_a_quantized_one_starts_from_its_weights(granularity, tmp_path):
    saved = quantized_timm(bits=8, first_last_bits=8, weight_granularity=granularity)
    hf_daq.save_pretrained(saved, tmp_path / "eight")
    model = hf_daq.from_pretrained(tmp_path / "eight", num_classes=4)
    assert model.daq_config == saved.daq_config
    features = model.forward_head(model.forward_features(images(4, SIZE)), pre_logits=True)
    want = torch.nn.functional.linear(features, model.fc.weight, model.fc.bias)
    assert (model(images(4, SIZE)) - want).norm() < 0.03 * want.norm()
    assert torch.equal(model.fc.a_quant.upper, saved.fc.a_quant.upper)
    hf_daq.save_pretrained(model, tmp_path / "again")
    assert torch.equal(hf_daq.from_pretrained(tmp_path / "again")(images(4, SIZE)), model(images(4, SIZE)))


@pytest.mark.parametrize(("packed", "num_classes"), [(True, 4), (True, 0), (False, 0)])
def test_where_no_quantized_classifier_can_be_there_is_none(packed, num_classes, tmp_path):
    hf_daq.save_pretrained(quantized_timm(bits=8, first_last_bits=8), tmp_path, packed=packed)
    model = hf_daq.from_pretrained(tmp_path, num_classes=num_classes)
    assert "fc" not in model.daq_config.layers
    assert model(images(1, SIZE)).shape == (1, num_classes or model.num_features)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ModelError, match="the model that apply_daq returned"):
        hf_daq.save_pretrained(small_net(), tmp_path)
    with pytest.raises(CalibrationError, match="'conv' is not calibrated"):
        hf_daq.save_pretrained(hf_daq.apply_daq(small_net(), bits=3), tmp_path)
    model = quantized_timm()
    with torch.no_grad():
        next(iter(model.daq_config.layers))
        model.layer1[0].conv1.w_quant.lower.fill_(9)
    with pytest.raises(CheckpointError, match="layer1.0.conv1.w_quant: lower 9 is not below upper"):
        hf_daq.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    for good in (quantized_timm(), calibrated(tiny_bert())):
        with pytest.raises(CheckpointError, match="file is a file; give a folder"):
            hf_daq.save_pretrained(good, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_save_leaves_the_old_files(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def die(*args, **kwargs):
        (path := args[1]).write_bytes(b"half a file")
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_file, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        hf_daq.save_pretrained(quantized_timm(bits=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_cut_between_its_two_files_is_noticed(folder, tmp_path):
    hf_daq.save_pretrained(quantized_timm(bits=2), tmp_path / "new")
    os.replace(tmp_path / "new" / "model.safetensors", folder / "model.safetensors")
    for load in (hf_daq.from_pretrained, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)):
        with pytest.raises(CheckpointError, match="disagree about the quantization config"):
            load(folder)


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def edit_metadata(folder, change):
    """Change the quantization config in both files, as a hostile author would."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["hf_daq"])
    change(content["quantization_config"])
    save_file(load_file(path), path, metadata=metadata | {"hf_daq": json.dumps(content)})
    description = json.loads((folder / "config.json").read_text())
    change(description["model_args"]["quantization_config"])
    (folder / "config.json").write_text(json.dumps(description))


def edit_description(folder, change):
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))


def truncate(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


LAYER = "layer1.0.conv1"
DAMAGES = {
    "empty": (lambda f: truncate(f, 0), "not a whole safetensors file"),
    "cut in the header": (lambda f: truncate(f, 100), "not a whole safetensors file"),
    "cut in the tensors": (lambda f: truncate(f, -5), "not a whole safetensors file"),
    "huge header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "not a whole safetensors file",
    ),
    "a pickle": (lambda f: torch.save({"a": 1}, f / "model.safetensors"), "not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "not ours": (lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors"), "no 'hf_daq' metadata"),
    "metadata not JSON": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors", metadata={"hf_daq": "{"}),
        "damaged 'hf_daq' metadata",
    ),
    "missing key": (lambda f: edit_tensors(f, lambda t: t.pop("fc.weight")), "1 missing from the file: fc.weight"),
    "missing bounds": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.w_quant.upper")),
        f"missing from the file: {LAYER}.w_quant.upper",
    ),
    "extra key": (lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(2))), "1 not in the model: more"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"fc.bias": torch.zeros(11)})),
        r"fc.bias has shape \(11,\), the model \(10,\)",
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({"fc.bias": torch.zeros(10, dtype=torch.int64)})),
        "fc.bias has dtype I64",
    ),
    "NaN bound": (
        lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.a_quant.upper"].fill_(torch.nan)),
        f"{LAYER}.a_quant: upper is not finite",
    ),
    "infinite scale": (
        lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.w_quant.scale"].fill_(torch.inf)),
        f"{LAYER}.w_quant: scale is not finite",
    ),
    "crossed bounds": (
        lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.w_quant.lower"].fill_(100.0)),
        f"{LAYER}.w_quant: lower 100 is not below upper",
    ),
    "bits out of range": (
        lambda f: edit_metadata(f, lambda c: c["layers"][LAYER].update(weight_bits=64)),
        "weight_bits=64 is out of range",
    ),
    "unknown version": (lambda f: edit_metadata(f, lambda c: c.update(format_version=99)), "install a newer hf_daq"),
    "unknown setting": (lambda f: edit_metadata(f, lambda c: c.update(pickle="yes")), "unknown key 'pickle'"),
    "unknown layer": (
        lambda f: edit_metadata(f, lambda c: c["layers"].update(nope=c["layers"][LAYER])),
        "a layer 'nope' that this model does not have",
    ),
    "no layers": (lambda f: edit_metadata(f, lambda c: c.update(layers=None)), "no resolved layers"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "unknown base": (
        lambda f: edit_description(f, lambda d: d["model_args"].update(base="hf-hub:someone/something")),
        "is not an architecture of this timm",
    ),
    "base is itself": (
        lambda f: edit_description(f, lambda d: d["model_args"].update(base="hf_daq")),
        "is not an architecture",
    ),
    "a checkpoint path": (
        lambda f: edit_description(f, lambda d: d["model_args"]["base_args"].update(checkpoint_path="x.pth")),
        "are not arguments of a model",
    ),
    "a model far larger than the file": (
        lambda f: edit_description(
            f, lambda d: d.update(num_classes=200_000) or d["model_args"]["base_args"].update(num_classes=200_000)
        ),
        r"fc.weight has shape \(10, \d+\), the model \(200000, \d+\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_files_end_in_a_clear_error(folder, damage):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(DaqError, match=message):
        hf_daq.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage", ["missing bounds", "wrong shape", "NaN bound", "bits out of range", "cut in the tensors"]
)
def test_a_failed_load_leaves_the_given_model_as_it_was(folder, damage):
    DAMAGES[damage][0](folder)
    model = small_timm()
    want, text = model(images(1, SIZE)), str(model)
    with pytest.raises(DaqError):
        hf_daq.from_pretrained(folder, model=model)
    assert torch.equal(model(images(1, SIZE)), want)
    assert str(model) == text


def test_a_checkpoint_of_another_architecture_does_not_load(folder):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        hf_daq.from_pretrained(folder, model=small_net())


def test_a_path_that_is_neither_a_folder_nor_a_repository():
    with pytest.raises(CheckpointError, match="neither a folder nor the name of a repository"):
        hf_daq.from_pretrained("./nowhere/at/all")


def test_a_config_without_resolved_layers_builds_the_architecture_without_weights():
    model = timm.create_model("hf_daq", base="test_resnet", quantization_config=DaqConfig(bits=3).to_dict())
    assert model.daq_config.layers
    with pytest.raises(DaqError, match='local-dir:PATH" or "hf-hub:USER/NAME'):
        timm.create_model(
            "hf_daq", pretrained=True, base="test_resnet", quantization_config=DaqConfig(bits=3).to_dict()
        )


class Unusual(nn.Sequential):
    def __init__(self, dtype=torch.complex64, state=None):
        super().__init__(*(nn.Linear(8, 8) for _ in range(3)))
        self.register_buffer(
            "turns", torch.arange(4.0, dtype=dtype) if dtype == torch.float32 else torch.ones(4, dtype=dtype) * 1j
        )
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        assert torch.equal(state, self.state)


@pytest.mark.parametrize("packed", [False, True])
def test_complex_numbers_are_saved_and_opened(packed, tmp_path):
    state = torch.arange(3).to(torch.uint16)
    model = hf_daq.apply_daq(Unusual(state=state), weight_bits=4)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    opened = hf_daq.from_pretrained(tmp_path, model=Unusual(state=state))
    assert torch.equal(opened.turns, model.turns)
    with pytest.raises(CheckpointError, match=r"turns has dtype C64, the model torch.float32"):
        hf_daq.from_pretrained(tmp_path, model=Unusual(torch.float32, state))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"state": {"version": 3}},
            "_extra_state of the state dict is a dict, and a safetensors file holds tensors alone",
        ),
        (
            {"dtype": torch.complex128, "state": torch.ones(1)},
            "turns has the dtype torch.complex128, which a safetensors file",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(arguments, message, tmp_path):
    model = hf_daq.apply_daq(Unusual(**arguments), weight_bits=4)
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=message):
            hf_daq.save_pretrained(model, tmp_path / "out", packed=packed)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_model_without_memory_is_refused(tmp_path):
    hf_daq.save_pretrained(hf_daq.apply_daq(small_net(), weight_bits=4), tmp_path)
    with torch.device("meta"):
        empty = small_net()
    with pytest.raises(CheckpointError, match="the model is on the meta device"):
        hf_daq.from_pretrained(tmp_path, model=empty)
    assert not hasattr(empty, "daq_config")
