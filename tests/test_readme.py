"""What the READMEs show is run, as it stands, with a pretrained network on disk in place of the one on the Hub."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from accelerate import Accelerator
from hub_server import LoopbackHub, connect, connected_hub  # noqa: F401
from models import images, quantized_timm, small_timm
from PIL import Image
from safetensors.torch import save_file
from text_models import calibrated, logits, tiny_bert, tokens
from timm.models import save_for_hf
from typer.testing import CliRunner

import hf_daq
from hf_daq.cli.main import app
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import packed_layers

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "README.md"
READMES = sorted(
    [MAIN, *(path for folder in ("hf_daq", "recipes", "tests") for path in (ROOT / folder).rglob("README.md"))]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in READMES]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path):
    return re.findall(r"^hf-daq .*$", path.read_text(encoding="utf-8"), re.MULTILINE)


def links(path):
    """What a README links to, on this disk: (path, heading or "")."""
    return re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8"))


def anchors(path):
    """The headings of a file as links name them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_block_goes_from_a_pretrained_model_to_a_reloaded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet18"), "pretrained", safe_serialization=True)
    first = blocks(MAIN)[0]
    code = first.replace("resnet18.a1_in1k", "local-dir:pretrained")
    assert code != first
    scope = {"images": images(2, 64), "loader": [(images(2, 64, seed=seed), torch.tensor([1, 2])) for seed in range(2)]}
    before, after = code.split("hf_daq.save_pretrained")
    exec(before, scope)
    trained = scope["model"]
    assert trained.training
    exec("hf_daq.save_pretrained" + after, scope)
    assert scope["model"] is not trained
    assert scope["model"].daq_config.weight_bits == 3
    assert torch.equal(scope["model"].eval()(images(1, 64)), trained.eval()(images(1, 64)))


def test_the_second_block_does_the_same_with_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("pretrained")
    rows = [{"input_ids": row, "labels": torch.tensor(1)} for row in tokens(8)]
    scope = {"batch": {"input_ids": tokens(), "labels": torch.ones(4, dtype=torch.int64)}, "data": rows}
    code = (
        blocks(MAIN)[1].replace("bert-base-uncased", "pretrained").replace("1000", "2, report_to='none', use_cpu=True")
    )
    before, after = code.split('model = transformers.AutoModelForSequenceClassification.from_pretrained("out")')
    exec(before, scope)
    exec('loaded = transformers.AutoModelForSequenceClassification.from_pretrained("out")' + after, scope)
    assert scope["trainer"].state.global_step == 2
    assert scope["loaded"].daq_config.activation_bits == 8
    assert torch.equal(logits(scope["loaded"]), logits(scope["model"]))


@pytest.fixture
def scope(tmp_path, monkeypatch, hub):
    """What the blocks take for granted: a quantized model, its optimizer, inputs."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        Path("photographs", str(number % 3)).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50 + number).save(f"photographs/{number % 3}/{number}.png")
    model = quantized_timm(bits=3)
    return {
        "timm": timm,
        "torch": torch,
        "hf_daq": hf_daq,
        "model": model,
        "images": images(8, 64),
        "loader": [(images(2, 64), torch.tensor([1, 2]))] * 100,
        "optimizer": torch.optim.SGD(hf_daq.param_groups(model, lr=1e-3)),
        "bert": calibrated(tiny_bert()),
        "batch": {"input_ids": tokens() % tiny.VOCABULARY},
        "llama": hf_daq.apply_daq(tiny.build("llama"), weight_bits=8, weight_grid="odd"),
        "accelerator": Accelerator(),
        "float_model": small_timm().eval(),
        "pretrained": small_timm().eval(),
        "labels": torch.arange(8),
        "accuracy": 0.7,
        "float_accuracy": 0.8,
    }


LONGER = {"hf_daq/export/README.md", "hf_daq/report/README.md"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=pytest.mark.slow if name in LONGER else ())
        for path, name in zip(READMES, NAMES, strict=True)
    ],
)
def test_the_blocks_run(path, scope, capsys, tmp_path, hub):
    for block in blocks(path)[2 if path == MAIN else 0 :]:
        exec(block, scope)
        check(block, scope, capsys.readouterr().out, tmp_path, hub)


def check(block, scope, printed, folder, hub):
    """What a block shows, by what it does."""
    if "hf_daq.plan(" in block:
        assert re.search(r"layer1.0.conv1 +Conv2d +64x64x3x3 +4 +8 +rule layer1\.\*", printed)
        assert "rule re:.*downsample.*" in printed
    if "hf_daq.unpack(" in block:
        assert packed_layers(hf_daq.from_pretrained("packed"))
        assert quantized_layers(scope["model"]).keys() == quantized_layers(hf_daq.from_pretrained("trainable")).keys()
    if "weights[name] =" in block:
        check_weights(scope)
    if ".upper.data.mul_(100)" in block:
        assert re.search(r"layer2.0.conv1: dead-input-codes\n +its inputs use 1 of 8 codes", printed)
    if "monitor.step()" in block:
        assert scope["monitor"].history
    if "savefig" in block:
        pictures = [path for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
        assert {path.stem for path in pictures} == {"weights", "inputs", "gamma", "depth", "flips"}
    if "hf_daq.report(" in block:
        assert "Calibrated with 128 images." in Path("report.html").read_text(encoding="utf-8")
    if "export_onnx" in block:
        assert Path("model.onnx").exists()
    if "export_gguf" in block:
        assert Path("model.gguf").read_bytes().startswith(b"GGUF")
    if "push_to_hub" in block:
        assert "model.safetensors" in hub.files("user/resnet-w3")
        assert packed_layers(scope["shared"])


def check_weights(scope):
    """As another program reads them."""
    layers = quantized_layers(scope["model"])  # unpacked
    assert scope["weights"].keys() == layers.keys()
    for name, weight in scope["weights"].items():
        want = layers[name].w_quant(layers[name].weight).detach().numpy()
        assert np.allclose(weight, want, rtol=1e-6, atol=0)


def test_the_commands_run(scope, hub):
    lines = [line for path in READMES for line in commands(path)]
    assert {shlex.split(line)[1] for line in lines} >= {
        "plan",
        "inspect",
        "card",
        "pack",
        "push",
        "export",
        "summary",
        "quantize",
        "evaluate",
    }
    hf_daq.save_pretrained(scope["model"], "trainable")
    save_file({"x": scope["images"]}, "inputs.safetensors")
    save_for_hf(small_timm(), Path("resnet18"), safe_serialization=True)
    for command in lines:
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0 or "--health" in command, (command, result.output)
    assert Path("model.onnx").exists()
    assert packed_layers(hf_daq.from_pretrained("small"))
    assert "model.safetensors" in hub.files("user/resnet-w3")


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_the_files_and_headings_it_names_are_there(path):
    for target, heading in links(path):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not heading or heading in anchors(file), (target, heading)
    text = path.read_text(encoding="utf-8")
    for script in re.findall(r"(?:recipes|tests)(?:/\w+)+\.(?:py|yaml)", text):
        assert (ROOT / script).exists(), script
    for script in re.findall(r"`(\.ci/\w+)`", text):
        assert (ROOT / script).exists(), script


def test_the_main_page_is_short():
    lines = MAIN.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert lines.index("## Choose") <= 41  # the first screen


@pytest.mark.parametrize(
    ("extra", "run"), [("dev", "pytest -n 2 --dist loadfile"), ("recipes", "python recipes/minimal.py")]
)
def test_the_two_install_lines_are_there(extra, run):
    line = f'python -m venv .venv && .venv/bin/pip install -q -e ".[{extra}]" -c constraints.txt && .venv/bin/{run}'
    assert f"```bash\n{line}\n```" in MAIN.read_text(encoding="utf-8")
