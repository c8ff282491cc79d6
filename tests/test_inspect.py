"""`inspect`: what is in a checkpoint, from its header alone."""

import json
import re

import pytest
import tiny
import torch
from models import quantized_timm, small_net
from safetensors.torch import load_file

import hf_daq
from hf_daq.errors import CheckpointError
from hf_daq.files.card import render
from hf_daq.nn.layers import quantized_layers


@pytest.fixture(scope="module")
def model():
    return quantized_timm(rules=[{"pattern": "layer1*", "weight_bits": 8}], weight_bits=3, activation_bits=4)


def test_inspection_counts_what_is_in_the_file(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path)
    found = hf_daq.inspect(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert found.tensor_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert {layer.name for layer in found.layers} == model.daq_config.layers.keys()
    for layer in found.layers:
        assert layer.shape == tuple(tensors[f"{layer.name}.weight"].shape)
        bits = model.daq_config.layers[layer.name]
        assert (layer.weight_bits, layer.activation_bits) == (bits["weight_bits"], bits["activation_bits"])
    names = {layer.name for layer in found.layers} | {tensor.name for tensor in found.kept}
    assert {
        re.sub(r"\.(weight|[wa]_quant\.\w+)$", "", name) if "_quant." in name else name for name in tensors
    } <= names | {f"{layer.name}.weight" for layer in found.layers}
    assert json.loads(json.dumps(found.to_dict()))["library"] == "timm"
    assert hf_daq.inspect(tmp_path / "model.safetensors").layers == found.layers


def test_inspection_prints_groups(tmp_path):
    hf_daq.save_pretrained(quantized_timm("test_vit"), tmp_path)
    text = str(hf_daq.inspect(tmp_path))
    assert re.search(r"blocks\.\*\.mlp\.fc\* +3 +3 +12 ", text)
    assert "test_vit of timm, trainable" in text
    assert re.search(r"layers quantized; [\d.]+ MB in float, [\d.]+ MB in this file, [\d.]+ MB packed", text)


def test_inspection_of_a_module_of_neither_library(tmp_path):
    model = small_net()
    hf_daq.apply_daq(model, weight_bits=4)
    hf_daq.save_pretrained(model, tmp_path)
    found = hf_daq.inspect(tmp_path)
    assert (found.library, found.architecture) == ("torch", "SmallNet")
    assert "model=model" in render(found)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_transformers_renames_in_the_file(tmp_path, packed):
    model = tiny.ARCHITECTURES["vit"].build()
    hf_daq.apply_daq(model, weight_bits=3)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    found = hf_daq.inspect(tmp_path)
    shapes = {name: tuple(layer.weight.shape) for name, layer in quantized_layers(model).items()}
    assert {layer.name: layer.shape for layer in found.layers} == shapes
    assert f"{found.layers[0].name}.weight" not in load_file(tmp_path / "model.safetensors")
    assert not [tensor for tensor in found.kept if ".layer" in tensor.name and len(tensor.shape) > 1]


def test_names_with_markup_are_printed_as_they_are(tmp_path):
    model = torch.nn.ModuleDict({"[bold]x[/bold]": torch.nn.Linear(8, 8), "y": torch.nn.Linear(8, 8)})
    hf_daq.apply_daq(model, weight_bits=4, first_last_bits=4)
    hf_daq.save_pretrained(model, tmp_path)
    assert "[bold]x[/bold]" in str(hf_daq.inspect(tmp_path))


@pytest.mark.parametrize("name", ["missing", "not/a/repository", "./x/y"])
def test_inspection_of_nothing(name):
    with pytest.raises(CheckpointError, match="neither a folder, a file, nor a repository"):
        hf_daq.inspect(name)


def test_inspection_of_folders_that_are_not_ours(model, tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        hf_daq.inspect(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no DAQ quantization config: it is not a checkpoint of hf_daq"):
        hf_daq.inspect(tmp_path)
    hf_daq.save_pretrained(model, tmp_path / "ours")
    config = tmp_path / "ours" / "config.json"
    config.write_text(config.read_text().replace('"weight_bits": 8', '"weight_bits": 7'))
    with pytest.raises(CheckpointError, match="disagree about the quantization config"):
        hf_daq.inspect(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        hf_daq.inspect(tmp_path / "ours")
