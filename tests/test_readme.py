"""What the README shows is run, as it stands, with a pretrained network on disk in place of the one on the Hub."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from hub_server import LoopbackHub, connect, connected_hub  # noqa: F401
from models import images
from safetensors.torch import save_file
from text_models import logits, tiny_bert, tokens
from typer.testing import CliRunner

import hf_daq
from hf_daq.cli.main import app
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import packed_layers

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = re.findall(r"^hf-daq .*$", README.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_first_block_goes_from_a_pretrained_model_to_a_reloaded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet18"), "pretrained", safe_serialization=True)
    code = BLOCKS[0].replace("resnet18.a1_in1k", "local-dir:pretrained")
    assert code != BLOCKS[0]
    scope = {"loader": [(images(2, 64, seed=seed), torch.tensor([1, 2])) for seed in range(2)]}
    before, after = code.split("hf_daq.save_pretrained")
    exec(before, scope)
    trained = scope["model"]
    exec("hf_daq.save_pretrained" + after, scope)
    assert scope["model"] is not trained
    assert scope["model"].daq_config.weight_bits == 3
    assert torch.equal(scope["model"].eval()(images(1, 64)), trained.eval()(images(1, 64)))


def test_the_second_block_does_the_same_with_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("pretrained")
    rows = [{"input_ids": row, "labels": torch.tensor(1)} for row in tokens(8)]
    scope = {"batches": [{"input_ids": tokens(), "labels": torch.ones(4, dtype=torch.int64)}], "dataset": rows}
    code = BLOCKS[1].replace("bert-base-uncased", "pretrained").replace("1000", "2, report_to='none', use_cpu=True")
    before, after = code.split('model = AutoModelForSequenceClassification.from_pretrained("out")')
    exec(before, scope)
    exec('loaded = AutoModelForSequenceClassification.from_pretrained("out")' + after, scope)
    assert scope["loaded"].daq_config.activation_bits == 8
    assert torch.equal(logits(scope["loaded"]), logits(scope["model"]))


def test_the_other_blocks_and_the_commands_run(capsys, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    scope = {"timm": timm, "torch": torch, "hf_daq": hf_daq, "accuracy": 0.7, "float_accuracy": 0.8}
    scope |= {"accelerator": Accelerator(), "loader": [(images(2, 64), torch.tensor([1, 2]))] * 100}
    for block in BLOCKS[2:]:
        if "monitor.step()" in block:
            scope["optimizer"] = torch.optim.SGD(hf_daq.param_groups(scope["model"].train(), lr=1e-3))
        exec(block, scope)
        if "weights[name] =" in block:
            check_weights(scope)
    printed = capsys.readouterr().out
    assert re.search(r"layer1.0.conv1 +Conv2d +64x64x3x3 +4 +8 +rule layer1\.\*", printed)
    assert "rule re:.*downsample.*" in printed
    assert re.search(r"layer2.0.conv1 +dead-input-codes +its inputs use 1 of 8 codes", printed)
    pictures = [path for path in tmp_path.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
    assert {path.stem for path in pictures} == {"weights", "inputs", "gamma", "depth", "flips"}
    assert "model.safetensors" in hub.files("user/resnet-w3")
    save_file({"x": scope["images"]}, "inputs.safetensors")
    for command in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0 or "--health" in command, (command, result.output)
    assert Path("model.onnx").exists()
    assert packed_layers(hf_daq.from_pretrained("small"))


def check_weights(scope):
    """As another program reads them."""
    layers = quantized_layers(scope["model"])  # unpacked
    assert scope["weights"].keys() == layers.keys()
    for name, weight in scope["weights"].items():
        want = layers[name].w_quant(layers[name].weight).detach().numpy()
        assert np.allclose(weight, want, rtol=1e-6, atol=0)


def test_the_files_it_names_are_there():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text) + re.findall(r"python ([\w/]+\.py)", text):
        assert (README.parent / path).exists(), path
    named = set(re.findall(r"`(\w+\.py)`", text.split("## The house")[1]))
    assert named | {"__init__.py"} == {path.name for path in Path(hf_daq.__file__).parent.glob("*.py")}


@pytest.mark.parametrize("line", ["pytest", "recipes/image_classification.py"])
def test_the_two_install_lines_are_there(line):
    assert re.search(
        rf"python -m venv \.venv && \.venv/bin/pip install .* && \.venv/bin/.*{line}",
        README.read_text(encoding="utf-8"),
    )
