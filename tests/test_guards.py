"""Loaders of other libraries that drop what a float model does not have refuse quantized files for one, and open them for a
quantized model."""

import accelerate
import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import hf_daq
from hf_daq.errors import CheckpointError

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def quantized():
    torch.manual_seed(0)
    model = hf_daq.apply_daq(net(), bits=2)
    with hf_daq.calibrate(model, check=False):
        model(X)
    return model


LOADERS = {
    "accelerate, folder": lambda model, folder: accelerate.load_checkpoint_in_model(model, folder),
    "accelerate, file": lambda model, folder: accelerate.load_checkpoint_and_dispatch(
        model, str(folder / "model.safetensors")
    ),
    "huggingface_hub": lambda model, folder: huggingface_hub.load_torch_model(model, folder / "model.safetensors"),
    "huggingface_hub, folder": lambda model, folder: huggingface_hub.load_torch_model(model, folder),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_float_model_does_not_take_quantized_files(loader, packed, tmp_path):
    hf_daq.save_pretrained(quantized(), tmp_path, packed=packed)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors is quantized, and the model is not"):
        LOADERS[loader](model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("loader", LOADERS)
def test_nor_those_without_a_header(loader, tmp_path):
    accelerate.Accelerator(cpu=True).save_model(quantized(), tmp_path)
    with pytest.raises(CheckpointError, match="is quantized"):
        LOADERS[loader](net(), tmp_path)


def test_nor_shards(tmp_path):
    model = quantized()
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.raises(CheckpointError, match="is quantized"):
        accelerate.load_checkpoint_in_model(net(), tmp_path / "model.safetensors.index.json")
    opened = hf_daq.apply_daq(net(), bits=2)
    accelerate.load_checkpoint_in_model(opened, tmp_path)
    assert torch.equal(opened(X), model(X))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_quantized_model_takes_them(loader, tmp_path):
    model = quantized()
    hf_daq.save_pretrained(model, tmp_path)
    opened = hf_daq.apply_daq(net(), bits=2)
    LOADERS[loader](opened, tmp_path)
    assert torch.equal(opened(X), model(X))


@pytest.mark.parametrize("loader", LOADERS)
def test_float_files_are_opened_as_ever(loader, tmp_path):
    model = net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    opened = net()
    LOADERS[loader](opened, tmp_path)
    assert torch.equal(opened(X), model(X))


@pytest.mark.parametrize("packed", [False, True])
def test_a_timm_model_with_another_head_does_not_either(packed, tmp_path):
    images = torch.randn(4, 3, 64, 64)
    model = hf_daq.apply_daq(timm.create_model("resnet10t").eval(), bits=4)
    with hf_daq.calibrate(model, check=False):
        model(images)
    hf_daq.save_pretrained(model, tmp_path, packed=packed)
    arguments = {"pretrained": True, "num_classes": 5}
    with pytest.raises(CheckpointError, match="the file of weights is quantized"):
        timm.create_model(
            "resnet10t", pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")}, **arguments
        )
    opened = timm.create_model(f"local-dir:{tmp_path}", **arguments)
    assert torch.equal(opened.forward_features(images), hf_daq.from_pretrained(tmp_path).forward_features(images))
    float_model = timm.create_model("resnet10t")
    save_file(float_model.state_dict(), tmp_path / "float.safetensors")
    opened = timm.create_model(
        "resnet10t", pretrained_cfg_overlay={"file": str(tmp_path / "float.safetensors")}, **arguments
    )
    assert torch.equal(opened.conv1[0].weight, float_model.conv1[0].weight)


@pytest.mark.parametrize("loader", [*LOADERS, "accelerate, device_map"])
@pytest.mark.parametrize("divided", [True, False])
def test_inputs_are_divided_as_in_the_file(divided, loader, tmp_path):
    """Loaders leave out what the model has no name for, and keep what the file does not have."""

    def calibrated(divides):
        torch.manual_seed(0)
        model = hf_daq.apply_daq(net(), bits=8, first_last_bits=8, smooth=False)
        with hf_daq.calibrate(model, check=False):
            model(X)
        model[0].a_quant.smooth = torch.tensor([1.0, 16.0] * 4) if divides else None
        return model

    model, other = calibrated(divided), calibrated(not divided)
    hf_daq.save_pretrained(model, tmp_path)
    if loader in LOADERS:
        LOADERS[loader](other, tmp_path)
    else:
        accelerate.load_checkpoint_and_dispatch(other, str(tmp_path), device_map={"": "cpu"})
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_of_other_bits_does_not_take_them(loader, tmp_path):
    hf_daq.save_pretrained(quantized(), tmp_path)
    model = hf_daq.apply_daq(net(), bits=4)
    with pytest.raises(CheckpointError, match="'2' with 2-bit weights and 2 inputs, the model with 4 and 4"):
        LOADERS[loader](model, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_nor_does_a_packed_one_take_trainable_ones_and_the_other_way(loader, packed, tmp_path):
    hf_daq.save_pretrained(quantized(), tmp_path, packed=packed)
    model = quantized() if packed else hf_daq.pack(quantized())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is packed and .* is not: hf_daq.from_pretrained opens both"):
        LOADERS[loader](model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
