"""The command `hf-daq`: what it prints, where, and how it ends."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import tokenizers
import torch
import transformers
from hub_server import connected_hub  # noqa: F401
from huggingface_hub import hf_hub_download
from models import images, small_net, small_timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import calibrated, tiny_bert, tiny_llama, tokens
from typer.testing import CliRunner

import hf_daq
from hf_daq.cli.main import app
from hf_daq.integrations import build as skeleton

COMMAND = [sys.executable, "-m", "hf_daq.cli"]
FACTS = hf_daq.CardFacts(base_model="timm/test_resnet", license="mit", recipe={"loss": float("nan")})
EVIL = "\x1b]0;owned\x07\x1b[31m[bold red]evil[/]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints, float models and inputs, which no test changes."""
    root = tmp_path_factory.mktemp("folders")
    model = hf_daq.apply_daq(small_timm(), bits=3)
    with hf_daq.calibrate(model):
        model(images(8, 64))
    hf_daq.save_pretrained(model, root / "timm", card=FACTS)
    hf_daq.save_pretrained(model, root / "probed", probe=images(8, 64, seed=2))
    hf_daq.save_pretrained(calibrated(tiny_bert()), root / "bert")
    (root / "bert" / "vocab.txt").write_text("[PAD]\n")
    tiny_bert().save_pretrained(root / "float_bert")
    save_file({"x": images(8, 64)}, root / "images.safetensors")
    save_file({"input_ids": tokens()}, root / "tokens.safetensors")
    return root


def run(*args, code=0):
    """What a command printed: stdout, stderr."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result.stdout, result.stderr


def run_json(*args, code=0):
    found = json.loads(run(*args, "--json", code=code)[0], parse_constant=lambda name: pytest.fail(name))
    assert isinstance(found, dict)
    return found


def in_process(*args, **environment):
    environment = os.environ | environment
    return subprocess.run([*COMMAND, *map(str, args)], env=environment, capture_output=True, text=True, timeout=120)


def on_terminal(columns, *args):
    """What a command writes to a terminal that is so wide, and its exit code."""
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"COLUMNS": str(columns), "TERM": "xterm"}
        os.execv(sys.executable, [*COMMAND, *map(str, args)])
    written = b""
    try:
        while data := os.read(terminal, 2**16):
            written += data
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    return written.decode(), os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def without_color(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# ------------------------------------------------------------------------------------------------------- plan


def test_plan_of_a_timm_model():
    found = run_json("plan", "test_resnet", "--bits", 3, "--first-last-bits", 8)
    model = timm.create_model("test_resnet")
    expected = hf_daq.plan(model, bits=3, first_last_bits=8)
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in expected.layers]
    assert [layer["weight_bits"] for layer in found["layers"]] == [layer.weight_bits for layer in expected.layers]
    assert found["config"] == hf_daq.DaqConfig(bits=3, first_last_bits=8).to_dict()
    totals = found["totals"]
    assert totals["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    layers = dict(model.named_modules())
    bits = {name: layer.weight_bits for name, layer in expected.quantized.items()}
    before = sum(value.nbytes for value in model.state_dict().values())
    packed = before - sum(layers[name].weight.numel() * (32 - bits[name]) // 8 for name in bits)
    packed += sum(4 + 8 + (4 * len(layers[name].weight) if layers[name].bias is None else 0) for name in bits)
    assert (totals["float_bytes"], totals["packed_bytes"]) == (before, packed)
    assert totals["layers_quantized"] == len(bits)


def test_plan_prints_every_layer_with_its_reason():
    text, _ = run("plan", "test_resnet", "--weight-bits", 2, "--activation-bits", 4)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines()[2:])
    assert rows["layer1.0.conv1"].split() == ["Conv2d", "32x32x3x3", "2", "4"]
    assert rows["fc"].split() == ["Linear", "1000x96", "float", "float", "classifier"]
    assert "14 layers quantized, 2 kept in full precision" in text


def test_plan_of_a_transformers_config_is_that_of_the_model(folders, tmp_path):
    shutil.copy(folders / "float_bert" / "config.json", tmp_path)  # no weights
    found = run_json("plan", tmp_path, "--bits", 3, "--group-size", 16)
    expected = hf_daq.plan(tiny_bert(), bits=3, group_size=16)
    assert [(layer["name"], layer["reason"]) for layer in found["layers"]] == [
        (layer.name, layer.reason) for layer in expected.layers
    ]


def test_plan_of_a_timm_folder_and_repository(hub, tmp_path):
    description = {"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": {"first_conv": "conv1.0"}}
    (tmp_path / "config.json").write_text(json.dumps(description))
    hub.put("user/float", {"config.json": (tmp_path / "config.json").read_bytes(), "model.safetensors": b"not read"})
    shapes = []
    for name in (tmp_path, f"local-dir:{tmp_path}", "user/float", "hf-hub:user/float"):
        found = run_json("plan", name, "--bits", 3)
        shapes.append({layer["name"]: layer["shape"] for layer in found["layers"]})
    assert shapes[0]["fc"] == [7, 96]
    assert shapes == shapes[:1] * 4
    assert not [path for _, path in hub.requests if "safetensors" in path]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("bits: 3\n", (), {"bits": 3}),
        ('{"weight_bits": 2, "group_size": 16}', ("--activation-bits", 8), {"weight_bits": 2, "activation_bits": 8}),
        ("weight_bits: 2\nactivation_bits: 4\n", ("--bits", 5), {"bits": 5}),
        ("bits: 3\n", ("--weight-bits", 1), {"weight_bits": 1, "activation_bits": 3}),
        ("bits: 3\ngroup_size: 16\n", ("--granularity", "channel"), {"bits": 3, "weight_granularity": "channel"}),
        (
            "lr: 0.1\ndaq:\n  bits: 3\n  rules: [{pattern: fc, bits: 8}]\n",
            (),
            {"bits": 3, "rules": [{"pattern": "fc", "bits": 8}]},
        ),
    ],
)
def test_config_file_and_stronger_options(tmp_path, content, options, expected):
    (tmp_path / "config").write_text(content)
    found = run_json("plan", "test_resnet", "--config", tmp_path / "config", *options)["config"]
    if '"group_size"' in content:
        expected = expected | {"group_size": 16}
    assert found == hf_daq.DaqConfig(**expected).to_dict()


def test_config_file_with_the_settings_of_the_paper(tmp_path):
    (tmp_path / "paper.yaml").write_text("daq: {preset: paper, weight_bits: 1}")
    found = run_json("plan", "test_resnet", "--config", tmp_path / "paper.yaml")["config"]
    assert found == hf_daq.DaqConfig.paper(weight_bits=1).to_dict()


def test_config_of_a_checkpoint_decides_layer_by_layer(folders):
    found = run_json("plan", folders / "float_bert", "--config", folders / "bert" / "config.json")
    bits = {layer["name"]: layer["activation_bits"] for layer in found["layers"] if layer["weight_bits"] == 3}
    assert bits == dict.fromkeys(hf_daq.plan(tiny_bert(), bits=3).quantized, 8)
    assert {layer["reason"] for layer in found["layers"] if layer["name"] in bits} == {"resolved before"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bits: [", "neither YAML nor JSON"),
        ("- 3", "must hold a mapping"),
        ("bits: 12", "out of range"),
        ("bitts: 3", "did you mean"),
        ("preset: old\nbits: 3", "must be 'paper'"),
        ("bits: 3\nrules: [{pattern: nowhere, bits: 8}]", "matches no layer"),
    ],
)
def test_wrong_config_file(tmp_path, content, message):
    (tmp_path / "config").write_text(content)
    out, err = run("plan", "test_resnet", "--config", tmp_path / "config", code=1)
    assert (out, err.startswith("error: ")) == ("", True)
    assert message in err


def test_plan_of_what_is_no_float_model(folders, tmp_path):
    assert "did you mean 'resnet18'" in run("plan", "resnet188", "--bits", 3, code=1)[1]
    assert "cannot build resnet18.nothing" in run("plan", "resnet18.nothing", "--bits", 3, code=1)[1]
    assert "quantized already (daq)" in run("plan", folders / "timm", "--bits", 3, code=1)[1]
    assert "`hf-daq inspect" in run("plan", folders / "bert", "--bits", 3, code=1)[1]
    assert "has no config.json" in run("plan", tmp_path, "--bits", 3, code=1)[1]
    description = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "quantization_config": {"quant_method": "gptq"},
    }
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert "quantized already (gptq)" in run("plan", tmp_path, "--bits", 3, code=1)[1]
    (tmp_path / "config.json").write_text("{}")
    assert "names neither a model of timm nor one of" in run("plan", tmp_path, "--bits", 3, code=1)[1]


def test_plan_runs_no_code_of_a_folder(tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    for description in (
        {"model_type": "mine", "architectures": ["BertModel"], "auto_map": auto_map},
        {"model_type": "bert", "architectures": ["Model"], "auto_map": auto_map},
        {"model_type": "bert", "architectures": ["BertTokenizer"], "auto_map": auto_map},
    ):
        (tmp_path / "config.json").write_text(json.dumps(description))
        _, err = run("plan", tmp_path, "--bits", 3, code=1)
        assert "cannot build" in err or "names no model of transformers" in err
        assert not (tmp_path / "ran").exists()


def test_plan_asks_for_no_kernels_of_a_repository(folders, tmp_path):
    description = json.loads((folders / "float_bert" / "config.json").read_text())
    description |= {"attn_implementation": "kernels-community/flash-attn2"}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert run_json("plan", tmp_path, "--bits", 3)["totals"]["layers_quantized"] == 13


def test_plan_of_an_endless_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(skeleton, "_ROOM", 1000)
    description = json.loads((folders / "float_bert" / "config.json").read_text()) | {"num_hidden_layers": 10**7}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert "more than 1000 parameters" in run("plan", tmp_path, "--bits", 3, code=1)[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "test_resnet"], "how many bits"),
        (["plan", "test_resnet", "--bits", "3", "--weight-bits", "2"], "give it alone"),
        (["plan", "test_resnet", "--bits", "9"], "--bits"),
        (["plan", "test_resnet", "--bits", "3", "--granularity", "row"], "--granularity"),
        (["plan", "test_resnet", "--config", "absent.yaml"], "does not exist"),
        (["plan"], "Missing argument"),
        (["inspekt"], "No such command"),
        (["card", "absent"], "does not exist"),
        (["export", ".", "out", "--to", "tflite"], "--to"),
        (["export", ".", "out", "--to", "compressed-tensors", "--runtime", "openvino"], "--runtime is for --to onnx"),
        (["export", ".", "out", "--to", "gguf", "--cache"], "--cache is for --to onnx"),
        (["export", ".", "out", "--to", "compressed-tensors", "--int8-inputs"], "--int8-inputs is for --to onnx"),
        (
            ["export", ".", "out", "--to", "gguf", "--inputs", __file__],
            "--inputs is for --to onnx and compressed-tensors",
        ),
        (["export", ".", "out", "--to", "gguf", "--dynamic-size"], "--dynamic-size is for --to onnx"),
        (["export", ".", "absent/model.onnx", "--to", "onnx"], "there is no folder"),
        (["pack", ".", "."], "name another one"),
        (["pack", ".", "out", "--probe", "absent.safetensors"], "does not exist"),
    ],
)
def test_wrong_usage(args, message):
    out, err = run(*args, code=2)
    assert out == ""
    assert message in err


# ------------------------------------------------------------------------------------------------------- inspect


def test_inspect(folders):
    text, err = run("inspect", folders / "timm")
    assert f"{folders / 'timm'}: test_resnet of timm, trainable" in text
    assert re.search(r"layer\*\.\*\.conv\* +3 +3 +9 +334,080", text)
    assert err == ""
    found = run_json("inspect", folders / "timm")
    assert {layer["name"] for layer in found["layers"]} == set(timm_layers())
    assert found["facts"]["recipe"] == {"loss": "nan"}
    assert run_json("inspect", folders / "timm" / "model.safetensors")["layers"] == found["layers"]


def test_inspect_lists_every_layer(folders):
    lines = run("inspect", folders / "bert", "--layers")[0].splitlines()
    assert f"{'bert.encoder.layer.1.attention.output.dense':44}  32x32         3    8" in "\n".join(lines)
    with safe_open(folders / "bert" / "model.safetensors", "np") as file:
        matrices = [name for name in file.keys() if len(file.get_slice(name).get_shape()) > 1]  # noqa: SIM118
    named = {line.split()[0] for line in lines[2:-1]}
    assert named == {
        name.removesuffix(".weight") if "layer." in name or "pooler" in name else name for name in matrices
    }


def timm_layers():
    return hf_daq.plan(timm.create_model("test_resnet"), bits=3).quantized


def test_inspect_and_help_load_no_heavy_library(folders):
    code = (
        "import sys\nfrom hf_daq.cli.main import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'huggingface_hub', 'yaml'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    for args in (["inspect", folders / "timm", "--layers"], ["inspect", folders / "bert", "--json"], ["--help"]):
        command = [sys.executable, "-c", code, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert result.stdout


@pytest.mark.parametrize("damage", ["config", "header", "cut", "not json"])
def test_inspect_of_damaged_files(folders, tmp_path, damage):
    shutil.copytree(folders / "timm", tmp_path / "model")
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    if damage == "config":
        config.unlink()
    elif damage == "header":
        save_file(load_file(weights), weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        config.write_text("{")
    message = {
        "config": "has no config",
        "header": "no 'hf_daq' metadata",
        "cut": "not a whole",
        "not json": "cannot be read",
    }
    for more in ([], ["--json"]):
        out, err = run("inspect", tmp_path / "model", *more, code=1)
        assert out == ""
        assert err.startswith("error: ")
        assert message[damage] in err


def test_inspect_of_what_is_nothing():
    assert "neither a folder, a file, nor a repository" in run("inspect", "absent", code=1)[1]


def test_inspect_of_other_files(tmp_path):
    for name, message in ("x.onnx", "is an ONNX file: a graph for runtimes"), ("x.bin", "not a whole safetensors file"):
        (tmp_path / name).write_bytes(b"\x08\x0a\x12\x07pytorch")
        _, err = run("inspect", tmp_path / name, code=1)
        assert err.startswith(f"error: {tmp_path / name} ")
        assert message in err
        assert "has no config.json" not in err
    assert f"`netron {tmp_path / 'x.onnx'}`" in run("inspect", tmp_path / "x.onnx", code=1)[1]


def evil_folder(path):
    """A checkpoint whose layers have names that a terminal, or rich, would obey."""
    model = small_net()
    setattr(model, EVIL, torch.nn.Linear(12, 12))
    hf_daq.apply_daq(model, weight_bits=3)
    hf_daq.save_pretrained(model, path)
    return path


def test_names_from_a_file_are_text(tmp_path):
    folder = evil_folder(tmp_path / "evil")
    text, _ = run("inspect", folder, "--layers")
    assert "\x07" not in text
    assert "[bold red]evil[/]" in text
    assert EVIL in {kept["name"] for kept in run_json("inspect", folder)["layers"]} | {
        kept["name"].removesuffix(".weight") for kept in run_json("inspect", folder)["kept"]
    }
    shown, code = on_terminal(200, "inspect", folder, "--layers")
    assert code == 0
    assert "\x1b]0;" not in shown
    assert "[bold red]evil[/]" in without_color(shown)


def test_messages_have_no_control_characters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": EVIL}))
    _, err = run("plan", tmp_path, "--bits", 3, code=1)
    assert "[bold red]evil[/]" in err
    assert "\x07" not in err


# ------------------------------------------------------------------------------------------------------- terminals, pipes


@pytest.mark.parametrize("columns", [80, 160])
def test_terminal_shows_names_and_figures_whole(folders, columns):
    shown, code = on_terminal(columns, "inspect", folders / "bert", "--layers")
    lines = re.split(r"[\r\n]+", without_color(shown))  # a spinner goes back to the start of its line
    assert code == 0
    assert "\x1b[1m" in shown, "in color"
    assert max(len(line.rstrip()) for line in lines) <= columns
    assert not [line for line in lines if "…" in line]
    names = "".join(line.split()[0] for line in lines if line.strip())
    for name in hf_daq.plan(tiny_bert(), bits=3).quantized:
        assert name in names
    if columns == 160:
        assert any(re.match(r"bert\.encoder\.layer\.1\.attention\.output\.dense +32x32 +3 +8", line) for line in lines)


def test_summary_and_health_in_80_columns(folders, tmp_path):
    model = hf_daq.from_pretrained(folders / "bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.w_quant.scale.mul_(3)
    hf_daq.save_pretrained(model, tmp_path / "broken", probe={"input_ids": tokens()})
    shown, code = on_terminal(80, "summary", tmp_path / "broken", "--health")
    assert code == 1
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", without_color(shown))]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if re.fullmatch(r"bert\.encoder\.layer\.0\.output\.dense +W3A8( +[\d.-]+){6}", line)]
    broken = "bert.encoder.layer.1.output.dense: "
    at = next(i for i, line in enumerate(lines) if line.startswith(broken))
    assert re.fullmatch(r"[a-z-]+", lines[at].removeprefix(broken))
    assert re.match(r"  \w", lines[at + 1])
    assert [line for line in lines[at + 1 :] if "'bert.encoder.layer.1.output.dense'" in line], "a name is on one line"
    for noise in ("compiling", "CUDA", "Loading", "%|"):
        assert noise not in shown


@pytest.mark.parametrize("columns", [40, 67])
def test_narrow_terminal_cuts_no_figures(folders, columns):
    shown, _ = on_terminal(columns, "inspect", folders / "timm")
    wide, _ = run("inspect", folders / "timm")
    rows = [line.split() for line in without_color(shown).splitlines()]
    for line in wide.splitlines():
        if line.startswith(("layers ", "conv*", "fc.weight")):
            assert line.split() in rows


@pytest.mark.slow
def test_pipes_get_neither_color_nor_spinner_nor_cut_names(folders):
    result = in_process("plan", folders / "float_bert", "--bits", 3, COLUMNS="40")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "bert.encoder.layer.1.attention.output.dense  Linear     32x32" in result.stdout


def test_closed_pipe_is_no_error(folders):
    command = " ".join([*COMMAND, "inspect", str(folders / "bert"), "--layers", "|", "true"])
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_version_help_and_completion(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--version")[0] == f"hf-daq {hf_daq.__version__}\n"
    text, _ = run("--help")
    for name in ("plan", "quantize", "evaluate", "inspect", "card", "push", "pack", "unpack", "export", "summary"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
        usage = run(name, "--help")[0]
        assert "Usage: " in usage
        assert max(map(len, usage.splitlines())) <= 80
    assert "  hf-daq plan resnet18 --bits 3 " in text
    assert "..." not in text.split("\n", 1)[1], "no line is cut"
    completed = in_process(_HF_DAQ_COMPLETE="complete_bash", COMP_WORDS="hf-daq ins", COMP_CWORD="1")
    assert completed.stdout.split() == ["inspect"]
    completed = in_process(_HF_DAQ_COMPLETE="complete_bash", COMP_WORDS="hf-daq export --to o", COMP_CWORD="3")
    assert completed.stdout.split() == ["onnx"]
    assert "_HF_DAQ_COMPLETE=complete_bash" in in_process(_HF_DAQ_COMPLETE="source_bash").stdout


def test_debug_shows_the_traceback(tmp_path):
    for args, environment in (("--debug",), {}), ((), {"HF_DAQ_DEBUG": "1"}):
        result = in_process("inspect", tmp_path, *args, **environment)
        assert result.returncode == 1
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" in in_process("--debug", "inspect", tmp_path).stderr
    assert "Traceback" not in in_process("inspect", tmp_path).stderr


def test_interrupt(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # nobody writes to it
    process = subprocess.Popen(
        [*COMMAND, "inspect", tmp_path],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    writer = os.open(tmp_path / "config.json", os.O_WRONLY)  # returns once the command reads
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    os.close(writer)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


# ------------------------------------------------------------------------------------------------------- card and push


def test_card(folders, tmp_path):
    folder = shutil.copytree(folders / "timm", tmp_path / "model")
    card = folder / "README.md"
    card.unlink()
    run("card", folder, "--repo-id", "user/model")
    assert 'timm.create_model("hf-hub:user/model", pretrained=True)' in card.read_text()
    printed, _ = run("card", folder, "--print", "--repo-id", "user/model")
    assert printed == card.read_text() == run_json("card", folder, "--print", "--repo-id", "user/model")["card"]
    facts = {"path": str(card), "facts": json.loads(json.dumps(run_json("inspect", folder)["facts"]))}
    assert facts["facts"]["base_model"] == "timm/test_resnet"
    card.write_text(card.read_text() + "Mine.\n")
    assert "was edited, so it is not replaced" in run("card", folder, code=1)[1]
    assert card.read_text().endswith("Mine.\n")
    assert run_json("card", folder, "--overwrite") == facts
    assert "Mine." not in card.read_text()


def test_push_and_inspect_by_name(hub, folders):
    folder = folders / "timm"
    url = run("push", folder, "user/model", "--private", "--message", "First")[0].strip()
    assert url.startswith(f"{hub.endpoint}/user/model/commit/")
    assert hub.repositories["user/model"].private
    assert {"config.json", "model.safetensors", "README.md"} <= hub.files("user/model").keys()
    assert hub.files("user/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    hub.requests.clear()
    found = run_json("inspect", "user/model")
    assert found["layers"] == run_json("inspect", folder)["layers"]
    assert run("inspect", "user/model")[0].startswith("user/model: test_resnet of timm")
    assert "no such branch" in run("inspect", "user/model", "--revision", "absent", code=1)[1]
    assert hub.repositories["user/model"].heads["main"] == url.rsplit("/")[-1]


def test_push_as_a_pull_request(hub, folders):
    hub.put("someone/model", {"README.md": b"# Theirs\n"})
    found = run_json("push", folders / "timm", "someone/model", "--create-pr")
    assert found["pull_request"] == f"{hub.endpoint}/someone/model/discussions/1"
    assert "model.safetensors" in hub.files("someone/model", "refs/pr/1")
    assert "model.safetensors" not in hub.files("someone/model")


def test_push_to_a_branch(hub, folders):
    found = run_json("push", folders / "timm", "user/model", "--revision", "three-bits")
    assert "model.safetensors" in hub.files("user/model", "three-bits")
    assert "model.safetensors" not in hub.files("user/model")
    assert run_json("inspect", "user/model", "--revision", "three-bits")["library"] == "timm"
    assert found["commit_url"].endswith(found["oid"])


def test_push_keeps_an_edited_card(hub, folders):
    hub.put("user/model", {"README.md": b"# Mine\n"})
    _, err = run("push", folders / "timm", "user/model")
    assert err.startswith("warning: the model card of user/model was edited")
    assert hub.files("user/model")["README.md"] == b"# Mine\n"
    run("push", folders / "timm", "user/model", "--overwrite-card")
    assert b"hf_daq" in hub.files("user/model")["README.md"]


def test_push_that_is_refused(hub, folders, tmp_path):
    assert "does not know this token" in run("push", folders / "timm", "user/model", "--token", "hf_wrong", code=1)[1]
    assert "may not write" in run("push", folders / "timm", "someone/model", code=1)[1]
    assert "has no config.json" in run("push", tmp_path, "user/model", code=1)[1]
    assert not hub.repositories


def test_inspect_of_repositories_that_are_not_ours(hub):
    hub.put("user/float", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    hub.put("user/empty", {"notes.txt": b"x"})
    hub.put("someone/secret", {"config.json": b"{}"}, private=True)
    assert "is not a checkpoint of hf_daq" in run("inspect", "user/float", code=1)[1]
    assert "lacks a file" in run("inspect", "user/empty", code=1)[1]
    assert "is not there, or is private" in run("inspect", "someone/secret", code=1)[1]
    assert "is not there, or is private" in run("plan", "user/absent", "--bits", 3, code=1)[1]
    assert "has no config.json" in run("plan", "user/empty", "--bits", 3, code=1)[1]


def test_command_uses_the_hub_in_a_new_process(hub, folders, tmp_path):
    environment = hub.environment(tmp_path / "home")
    result = in_process("push", folders / "timm", "user/model", "--json", **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["oid"] == hub.repositories["user/model"].heads["main"]
    result = in_process("inspect", "user/model", **environment | {"HF_TOKEN": "hf_wrong"})
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert hf_hub_download("user/model", "config.json")


# ------------------------------------------------------------------------------------------------------- pack and export


@pytest.mark.usefixtures("bit_for_bit")
def test_pack_and_unpack_timm(folders, tmp_path):
    inputs = load_file(folders / "images.safetensors")["x"]
    text, _ = run("pack", folders / "timm", tmp_path / "packed", "--probe", folders / "images.safetensors")
    assert "computed as before, are the same, bit for bit" in text
    packed, model = hf_daq.from_pretrained(tmp_path / "packed"), hf_daq.from_pretrained(folders / "timm")
    with torch.no_grad():
        assert torch.equal(packed(inputs), model(inputs))
    assert run_json("inspect", tmp_path / "packed")["facts"] == run_json("inspect", folders / "timm")["facts"]
    assert "timm/test_resnet" in (tmp_path / "packed" / "README.md").read_text()
    assert torch.equal(load_file(tmp_path / "packed" / "probe.safetensors")["input.x"], inputs)
    found = run_json("unpack", tmp_path / "packed", tmp_path / "unpacked")
    assert found["compared_on"] == str(tmp_path / "packed" / "probe.safetensors")
    assert found["bytes"] > 5 * found["bytes_before"]
    unpacked = hf_daq.from_pretrained(tmp_path / "unpacked")
    with torch.no_grad():
        assert torch.equal(unpacked(inputs), model(inputs))
    assert "is packed already" in run("pack", tmp_path / "packed", tmp_path / "again", code=1)[1]
    assert "is trainable already" in run("unpack", folders / "timm", tmp_path / "again", code=1)[1]
    assert not (tmp_path / "again").exists()


@pytest.mark.usefixtures("bit_for_bit")
def test_pack_transformers_with_its_companions(folders, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (folders / "bert").iterdir():
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "model" / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"a pickle")
    found = run_json("pack", tmp_path / "model", tmp_path / "packed", "--probe", folders / "tokens.safetensors")
    assert found["copied"] == ["vocab.txt"]
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "probe.safetensors", "vocab.txt"}
    packed = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    model = transformers.BertForSequenceClassification.from_pretrained(folders / "bert")
    with torch.no_grad():
        assert torch.equal(packed(tokens(seed=5)).logits, model(tokens(seed=5)).logits)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "the model does not take the inputs"),
        ({}, "has no tensor"),
        ({"a": torch.zeros(2, 3, 64, 64), "b": torch.zeros(2)}, "the model does not take the inputs"),
        (None, "is not a whole safetensors file"),
    ],
)
def test_inputs_that_do_not_fit(folders, tmp_path, tensors, message):
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(b"nothing") if tensors is None else save_file(tensors, path)
    assert message in run("pack", folders / "timm", tmp_path / "out", "--probe", path, code=1)[1]
    assert not (tmp_path / "out").exists()


def test_export_onnx(folders, tmp_path):
    pytest.importorskip("onnxruntime")
    found = run_json("export", folders / "probed", tmp_path, "--to", "onnx")
    assert found["path"] == str(tmp_path / "model.onnx")
    assert found["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert found["runtimes"]["onnxruntime"]["top1"] == 1.0
    probe = folders / "probed" / "probe.safetensors"
    assert found["compared_on"] == str(probe)


@pytest.mark.slow
def test_export_onnx_for_another_runtime(folders, tmp_path):
    pytest.importorskip("openvino")
    options = "--to", "onnx", "--inputs", folders / "images.safetensors"
    run("export", folders / "timm", tmp_path / "ort.onnx", *options)
    text, _ = run("export", folders / "timm", tmp_path / "ov.onnx", *options, "--runtime", "openvino")
    assert text.startswith(f"{tmp_path / 'ov.onnx'}: ")
    assert "--inputs FILE" not in text
    assert "sizes in numbers are fixed" in text
    assert (tmp_path / "ov.onnx").read_bytes() != (tmp_path / "ort.onnx").read_bytes()


@pytest.mark.slow
def test_export_onnx_for_images_of_any_size(folders, tmp_path):
    pytest.importorskip("onnxruntime")
    text, _ = run("export", folders / "probed", tmp_path, "--to", "onnx", "--runtime", "openvino", "--dynamic-size")
    assert "height, width" in text


@pytest.mark.slow
def test_export_a_decoder_with_its_cache(tmp_path, monkeypatch):
    """And the lines of the card that its file gets run."""
    pytest.importorskip("onnxruntime")
    model, folder = hf_daq.apply_daq(tiny_llama(), weight_bits=4).eval(), tmp_path / "PATH"
    hf_daq.save_pretrained(model, folder)
    vocabulary = {f"<{number}>": number for number in range(model.config.vocab_size - 2)}
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary | {"A": len(vocabulary), "sentence": len(vocabulary) + 1}, "<0>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<0>").save_pretrained(folder)
    save_file({"input_ids": tokens(4, 9)}, tmp_path / "texts.safetensors")
    more = ("--to", "onnx", "--cache", "--int8-inputs", "--inputs", tmp_path / "texts.safetensors")
    found = run_json("export", folder, folder / "model.onnx", *more)
    assert found["int8_inputs"] is True
    assert found["inputs"]["past_key_values.0.key"][2] == "past_sequence"
    hf_daq.export_onnx(model, folder / "model.onnx", {"input_ids": tokens(4, 9)}, cache=True, verify=False)
    *_, code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    scope = {"__builtins__": __builtins__}
    exec(code.replace('"PATH"', '"."'), scope)
    prompt = torch.tensor([[len(vocabulary), len(vocabulary) + 1]])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert (scope["ids"] == expected.numpy()).all()


def test_commands_do_not_compile_and_say_nothing_but_their_result(folders, tmp_path):
    """In processes of their own, with tensors that are large enough for compiled kernels, and a CUDA_HOME."""
    save_file({"x": images(64, 64)}, tmp_path / "many.safetensors")
    environment = os.environ | {"CUDA_HOME": str(tmp_path)}
    environment.pop("HF_DAQ_COMPILE", None)
    args = ["pack", folders / "timm", tmp_path / "packed", "--probe", tmp_path / "many.safetensors"]
    command = [*COMMAND, *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1


def test_models_that_no_library_builds_name_the_python_call(tmp_path):
    model = hf_daq.apply_daq(small_net(), weight_bits=3)
    hf_daq.save_pretrained(model, tmp_path / "own")
    hf_daq.save_pretrained(model, tmp_path / "own_packed", packed=True)
    opened = f"In Python: model = hf_daq.from_pretrained({str(tmp_path / 'own')!r}, model=SmallNet(...)); "
    out = str(tmp_path / "out")
    for args, then in (
        (("summary",), "print(hf_daq.summary(model, inputs))"),
        (("pack", out), f"hf_daq.save_pretrained(model, {out!r}, packed=True)"),
        (("export", out, "--to", "onnx"), f"hf_daq.export_onnx(model, {out!r}, inputs)"),
        (("export", out, "--to", "gguf"), f"hf_daq.export_gguf(model, {out!r})"),
        (("export", out, "--to", "compressed-tensors"), f"hf_daq.export_compressed_tensors(model, {out!r}, inputs)"),
    ):
        _, err = run(args[0], tmp_path / "own", *args[1:], code=1)
        assert "a SmallNet, a model of neither timm nor transformers" in err
        assert err.endswith(f"{opened}{then}\n")
    _, err = run("unpack", tmp_path / "own_packed", out, code=1)
    assert f"hf_daq.unpack(model); hf_daq.save_pretrained(model, {out!r}, packed=False)" in err
    same = hf_daq.from_pretrained(tmp_path / "own", model=small_net())
    assert "conv" in str(hf_daq.summary(same, images())), "what the message says works"


def test_export_needs_inputs(folders, tmp_path):
    for name, target in ("timm", "onnx"), ("bert", "compressed-tensors"):
        _, err = run("export", folders / name, tmp_path / "out", "--to", target, code=1)
        assert "pass --inputs FILE.safetensors" in err
        assert not (tmp_path / "out").exists()


def test_export_compressed_tensors(folders, tmp_path):
    pytest.importorskip("compressed_tensors")
    more = ("--to", "compressed-tensors", "--inputs", folders / "tokens.safetensors")
    found = run_json("export", folders / "bert", tmp_path / "out", *more)
    assert list(found["containers"].values()) == [13]
    assert found["agreement"] == 1.0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}
    assert found["compared_on"] == str(folders / "tokens.safetensors")
    folder = shutil.copytree(folders / "bert", tmp_path / "probed")
    probe = shutil.copy(folders / "tokens.safetensors", folder / "probe.safetensors")
    text, _ = run("export", folder, tmp_path / "again", "--to", "compressed-tensors")
    assert text.endswith(f"with the inputs in {probe}; --inputs FILE takes others\n")


def test_export_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = hf_daq.apply_daq(transformers.LlamaForCausalLM(config), weight_bits=3, scale_dtype="float16")
    hf_daq.save_pretrained(model, tmp_path / "llama", packed=True)
    found = run_json("export", tmp_path / "llama", tmp_path, "--to", "gguf")
    path = tmp_path / "model.gguf"
    assert (found["path"], found["size"]) == (str(path), path.stat().st_size)
    assert (found["types"], found["exact"]) == ({"3-bit weights as Q4_0": 7}, 7)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "none"
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "llama")
    text, _ = run("export", tmp_path / "llama", tmp_path / "words.gguf", "--to", "gguf")
    assert "all weights are those of the model, bit for bit" in text
    assert gguf.GGUFReader(tmp_path / "words.gguf").fields["tokenizer.ggml.merges"].contents() == ["a b"]


# ------------------------------------------------------------------------------------------------------- summary


def test_summary_and_health(folders):
    found = run_json("summary", folders / "probed", "--health")
    model = hf_daq.from_pretrained(folders / "probed")
    inputs = load_file(folders / "probed" / "probe.safetensors")["input.x"]
    expected = hf_daq.summary(model, inputs).to_dict()
    assert found == expected | {"health": hf_daq.health(model, inputs).to_dict()}
    text, _ = run("summary", folders / "probed", "--health")
    assert "no findings in 14 quantized layers" in text
    assert "layer2.0.downsample.1" in text
    assert f"with the inputs in {folders / 'probed' / 'probe.safetensors'}; --inputs FILE takes others" in text
    assert "48x32x1x1" not in text
    assert "48x32x1x1" in run("summary", folders / "timm", "--wide")[0]
    assert run_json("summary", folders / "timm")["totals"]["macs"] is None
    assert "--health needs real inputs" in run("summary", folders / "timm", "--health", code=1)[1]


def test_health_with_findings_ends_with_one(folders, tmp_path):
    save_file({"x": images(8, 64) / 0}, tmp_path / "infinite.safetensors")
    args = ("summary", folders / "timm", "--inputs", tmp_path / "infinite.safetensors", "--health")
    assert not run_json(*args, code=1)["health"]["ok"]
    assert "non-finite-inputs" in run(*args, code=1)[0]
