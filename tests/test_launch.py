"""The recipes as they are launched: two processes, sharded ones, and processes that are killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import image_classification as recipe
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from processes import Program
from recipe_runs import RECIPES, reviews, tiny_bert  # noqa: F401  fixtures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shared import loop

TESTS = Path(__file__).parent


VISION = RECIPES / "image_classification.py"
SHARDED = TESTS / "programs" / "sharded_recipe.py"
# No BatchNorm, whose statistics would be of a process; 8 updates of 32 images a phase, 4 checkpoints.
VIT = "--model test_vit --image_size 32 --max_steps 8 --float_epochs 1 --epochs 1 --float_lr 0.02 --daq.bits 4"
VIT += " --batch_size 16 --checkpoint_every 4"


def start(program: Path, *args: object, ranks: int = 2) -> Program:
    return Program(program, *args, ranks=ranks, ACCELERATE_USE_CPU="true")


def alone(*args: object) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    results = recipe.main([str(arg) for arg in args])
    AcceleratorState._reset_state(reset_partial_state=True)
    return results


def weights(output: Path, phase: str = "quantized") -> dict[str, torch.Tensor]:
    return load_file(output / phase / "model.safetensors")


def close(one: dict, other: dict, tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    alone(*VIT.split(), "--accumulation", 2, "--calibration_batches", 8, "--output_dir", output)
    return output


def test_two_processes_train_what_one_does(one_process, tmp_path):
    """With half the accumulation, and calibration on as many images."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(VISION)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command += [*VIT.split(), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    for phase in ("float", "quantized"):
        close(weights(tmp_path, phase), weights(one_process, phase))
    here, there = (json.loads((path / "results.json").read_text()) for path in (tmp_path, one_process))
    assert here["processes"] == 2
    for key in ("float", "calibrated", "quantized"):
        assert here["results"][key] == pytest.approx(there["results"][key], abs=1.0)


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2 processes were launched, and Accelerate sees 1; .*ACCELERATE_USE_CPU=true"):
        alone("--output_dir", tmp_path)


@pytest.mark.slow
def test_sharded_processes_train_what_one_does(tmp_path):
    adamw = [*VIT.split(), "--optimizer", "adamw", "--lr", 1e-3, "--float_lr", 1e-3, "--quantizer_lr", 1e-3]
    alone(*adamw, "--accumulation", 2, "--calibration_batches", 8, "--output_dir", tmp_path / "one")
    start(SHARDED, "image_classification", *adamw, "--output_dir", tmp_path / "sharded").finish()
    close(weights(tmp_path / "sharded", "float"), weights(tmp_path / "one", "float"), 2e-3)
    close(weights(tmp_path / "sharded"), weights(tmp_path / "one"), 1e-2)
    model = timm.create_model(f"local-dir:{tmp_path / 'sharded' / 'quantized'}", pretrained=True)
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    killed = [*adamw, "--output_dir", tmp_path / "killed"]
    start(SHARDED, "image_classification", *killed).kill_when(tmp_path / "killed" / "checkpoints" / "00000012")
    start(SHARDED, "image_classification", *killed, "--resume").finish()
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "sharded"))


@pytest.mark.slow
def test_a_sharded_language_model(tmp_path):
    args = ["--max_steps", 4, "--checkpoint_every", 2, "--batch_size", 8, "--sample_tokens", 5]
    start(SHARDED, "language_modeling", *args, "--output_dir", tmp_path / "sharded").finish()
    start(RECIPES / "language_modeling.py", *args, "--output_dir", tmp_path / "two").finish()
    one, other = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("sharded", "two"))
    for key in ("float", "calibrated", "quantized"):
        assert one[key] == pytest.approx(other[key], abs=2e-3)
    found, expected = weights(tmp_path / "sharded"), weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    bounds = {name for name in expected if ".w_quant." in name}
    close(*({name: value for name, value in of.items() if name not in bounds} for of in (found, expected)), 5e-3)
    for name in bounds:  # those of a row may be the next candidate
        away = (found[name].double() - expected[name].double()).norm()
        assert away <= 5e-3 * expected[name].double().norm(), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "quantized").daq_config.weight_bits == 4


@pytest.mark.slow
def test_a_text_classifier_through_trainer(reviews, tiny_bert, tmp_path):
    bert = shutil.copytree(tiny_bert, tmp_path / "bert")
    settings = json.loads((bert / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bert / "config.json").write_text(json.dumps(settings | dropout))
    args = ["--config", RECIPES / "configs" / "sst2_minilm_w4a8.yaml", "--dataset", reviews, "--model", bert]
    args += ["--checkpoint", "null", "--float_epochs", 1, "--epochs", 1, "--training.bf16", "false"]
    args += ["--training.optim", "sgd", "--training.learning_rate", 0.05, "--training.warmup_steps", 0]
    args += ["--training.per_device_train_batch_size", 4, "--training.train_sampling_strategy", "sequential"]
    start(RECIPES / "text_classification.py", *args, "--output_dir", tmp_path / "two").finish()
    start(
        SHARDED, "text_classification", *args, "--training.fsdp", "full_shard", "--output_dir", tmp_path / "sharded"
    ).finish()
    for phase in ("float", "quantized"):
        close(weights(tmp_path / "sharded", phase), weights(tmp_path / "two", phase))
    for name in ("two", "sharded"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "quantized")
        assert model.daq_config.activation_bits == 8


@pytest.mark.slow
def test_one_process_continues_a_killed_run_of_two(one_process, tmp_path):
    start(VISION, *VIT.split(), "--output_dir", tmp_path).kill_when(tmp_path / "checkpoints" / "00000012")
    with pytest.raises(SystemExit, match="2 processes with 32 examples an update, and here it would be 16; change"):
        alone(*VIT.split(), "--resume", "--output_dir", tmp_path)
    alone(*VIT.split(), "--accumulation", 2, "--resume", "--output_dir", tmp_path)
    close(weights(tmp_path), weights(one_process))


@pytest.mark.slow  # a shorter one is in test_recipes
@pytest.mark.parametrize("when", ["checkpoints/.00000008.writing", "checkpoints/00000004", ".quantized.writing"])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(when, one_process, tmp_path):
    """Killed while it writes a checkpoint or its best network, and while it computes."""
    args = [*VIT.split(), "--accumulation", 2, "--calibration_batches", 8, "--output_dir", tmp_path]
    start(VISION, *args, ranks=0).kill_when(tmp_path / when)
    for folder in loop.list_checkpoints(tmp_path):
        assert json.loads((folder / "progress.json").read_text())["processes"] == 1
        load_file(folder / "model.safetensors")
    alone(*args, "--resume")
    for phase in ("float", "quantized"):
        assert_equal(weights(tmp_path, phase), weights(one_process, phase))
    assert not list(tmp_path.rglob("*.writing"))


def test_the_configs_of_accelerate_are_read():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    for name, kind in kinds.items():
        config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
        assert config.distributed_type == kind
        assert config.mixed_precision == "bf16"
    lines = [line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("accelerate launch ")]
    launches = [launch_command_parser().parse_args(line.split()[2:]) for line in lines]
    assert {(launch.num_machines, launch.num_processes) for launch in launches} == {(None, 8), (2, 16)}
    for launch in launches:
        load_config_from_file(str(RECIPES.parent / launch.config_file))
        assert (RECIPES.parent / launch.training_script).exists()
        assert launch.training_script_args == ["--config", "..."]
    assert accelerate.utils.FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
