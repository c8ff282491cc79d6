"""Models that save themselves by huggingface_hub's mixin or diffusers' are opened as they were saved, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_daq
from hf_daq.errors import CalibrationError, CheckpointError, ModelError


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x))


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def quantized(**options):
    torch.manual_seed(0)
    model = hf_daq.apply_daq(Net(width=24).eval(), bits=2, first_last_bits=4, **options)
    with hf_daq.calibrate(model, check=False):
        model(X)
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_granularity": "channel", "bias_correction": False}])
def test_a_mixin_opens_what_it_saved(packed, options, tmp_path):
    model = quantized(**options)
    if packed:
        hf_daq.pack(model)
    model.save_pretrained(tmp_path)
    opened = Net.from_pretrained(tmp_path)
    assert opened.daq_config == model.daq_config
    assert opened.head.in_features == 24  # its own config.json
    assert torch.equal(opened(X), model(X))
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(Net.from_pretrained(tmp_path / "again")(X), model(X))


def test_a_folder_of_the_mixin_is_read_by_hf_daq_too(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path, config={"width": 24, "more": 1})
    opened = hf_daq.from_pretrained(tmp_path, model=Net(width=24))
    assert torch.equal(opened(X), model(X))
    assert hf_daq.inspect(tmp_path).config == model.daq_config
    assert json.loads((tmp_path / "config.json").read_text()).keys() == {"width", "more", "quantization_config"}


def test_a_class_that_takes_any_argument_is_not_given_the_quantization(tmp_path):
    class Any(Net):
        def __init__(self, width: int = 16, **kwargs):
            assert kwargs.keys() <= {"depth"}
            super().__init__(width)

    model = hf_daq.apply_daq(Any(width=12, depth=1), weight_bits=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(Any.from_pretrained(tmp_path)(X), model.eval()(X))


def test_a_folder_of_hf_daq_opens_by_the_mixin_too(tmp_path):
    model = hf_daq.apply_daq(Net().eval(), weight_bits=2)
    hf_daq.save_pretrained(model, tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path)(X), model(X))


def test_float_models_of_the_mixin_are_as_before(tmp_path):
    model = Net(width=12).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path)(X), model(X))
    hf_daq.remove_daq(hf_daq.apply_daq(model, weight_bits=2)).save_pretrained(tmp_path)
    assert not any("quant" in name for name in load_file(tmp_path / "model.safetensors"))


class Pair(nn.Module, PyTorchModelHubMixin):
    def __init__(self, quantize: bool = False):
        super().__init__()
        self.one, self.other = Net(), Net()
        if quantize:
            hf_daq.apply_daq(self.one, weight_bits=3, activation_bits=4)

    def forward(self, x):
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_that_are_quantized_by_themselves_are_opened_so(quantize, packed, tmp_path):
    pair = Pair(quantize).eval()
    if not quantize:
        hf_daq.apply_daq(pair.one, weight_bits=3, activation_bits=4)
    with hf_daq.calibrate(pair.one, check=False):
        pair.one(X)
    if packed:
        hf_daq.pack(pair.one)
    pair.save_pretrained(tmp_path)
    opened = Pair.from_pretrained(tmp_path)
    assert torch.equal(opened(X), pair(X))
    assert opened.one.daq_config == pair.one.daq_config
    with pytest.raises(CheckpointError, match="names parts"):
        Net.from_pretrained(tmp_path)


def test_a_class_that_quantizes_itself_opens_what_it_saved(tmp_path):
    class Own(Net):
        def __init__(self):
            super().__init__()
            hf_daq.apply_daq(self, bits=4)

    model = Own().eval()
    with hf_daq.calibrate(model, check=False):
        model(X)
    model.save_pretrained(tmp_path)
    opened = Own.from_pretrained(tmp_path)
    assert torch.equal(opened(X), model(X))


def test_a_mixin_refuses_what_would_not_open_again(tmp_path):
    pair = hf_daq.apply_daq(Pair(), weight_bits=2)
    with pytest.raises(ModelError, match="this Net is 'other' of a model that was quantized as a whole"):
        pair.other.save_pretrained(tmp_path)
    uncalibrated = hf_daq.apply_daq(Net(), bits=2)
    with pytest.raises(CalibrationError):
        uncalibrated.save_pretrained(tmp_path)
    model = quantized()
    model.body[2] = nn.Linear(24, 24)
    with pytest.raises(ModelError, match="has changed since apply_daq"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_damaged_files_are_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["body.2.w_quant.scale"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"body\.2\.w_quant\.scale"):
        Net.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["test_hub_mixin, hf_daq", "hf_daq, test_hub_mixin"])
def test_the_order_of_imports_does_not_matter(imports, tmp_path):
    quantized().save_pretrained(tmp_path)
    program = f"import {imports}; print(len(test_hub_mixin.Net.from_pretrained({str(tmp_path)!r}).daq_config.layers))"
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "3"


def test_diffusers_refuses_what_it_would_open_in_float(tmp_path):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32)}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(**sizes, **blocks).eval()
    images, step = torch.randn(2, 3, 8, 8), torch.tensor([3])
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model, check=False):
        model(images, step)
    with pytest.raises(ModelError, match=r"hf_daq\.save_pretrained"):
        model.save_pretrained(tmp_path / "quantized")
    hf_daq.save_pretrained(model, tmp_path / "quantized", packed=True)
    opened = hf_daq.from_pretrained(tmp_path / "quantized", model=UNet2DModel.from_config(model.config))
    assert torch.equal(opened(images, step).sample, hf_daq.pack(model)(images, step).sample)
    hf_daq.apply_daq(other := UNet2DModel(**sizes, **blocks).mid_block, weight_bits=4)
    whole = UNet2DModel(**sizes, **blocks)
    whole.mid_block = other
    with pytest.raises(ModelError, match="part 'mid_block' of this UNet2DModel is quantized"):
        whole.save_pretrained(tmp_path / "float")
