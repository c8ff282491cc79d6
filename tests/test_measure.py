"""The programs that measure: each writes its rows, of small networks here."""

import json
import re
import shutil

import numpy as np
import post_training
import pytest
import timm
import torch
from PIL import Image
from recipe_runs import (  # noqa: F401  fixtures
    _datasets_cache,
    _fresh_accelerate,
    float_folder,
    language_float,
    parquet,
    play,
    reviews,
    text_float,
    tiny_bert,
)

from measure import adapters, deploy, peers, weights_only


@pytest.mark.slow
def test_post_training_measures_every_state_of_a_network(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    small = timm.create_model("test_efficientnet", num_classes=1000).eval()
    assert post_training.load_efficientnet_lite0().conv_stem.weight.std() > 0.1  # the weights of the package fit
    monkeypatch.setattr(post_training, "load_efficientnet_lite0", lambda: small)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.tsv").write_text("".join(f"{number}.png\t{number * 100}\n" for number in range(6)))
    options = f"--dataset {tmp_path} --bits 8/8 --batch_size 2 --calibration_images 4 --finetune_minutes 0.01"
    rows = post_training.main([*options.split(), "--output", str(tmp_path / "out" / "lite0.json")])
    states = ["", "calibrated", "reconstructed", "fine-tuned"]
    assert [(row["network"], row["state"]) for row in rows] == [("float", ""), *(("W8A8", name) for name in states[1:])]
    assert rows[0]["agreement"] == 100
    assert 0 == rows[0]["kl"] <= rows[2]["kl"] < 1
    assert json.loads((tmp_path / "out" / "lite0.json").read_text())["results"] == rows
    rows = post_training.main(f"--dataset {tmp_path} --bits 8/8 --batch_size 2 --folds 3".split())
    assert [row["state"] for row in rows] == states[:3]
    assert "4 photographs to calibrate and reconstruct, 2 others to measure, 3 times" in capsys.readouterr().out


def test_folds_measure_each_photograph_once():
    args = post_training.parse(["--dataset", "photographs", "--folds", "3"])
    splits = post_training.split(7, args)
    assert sorted(index for _, measured in splits for index in measured) == list(range(7))
    for known, measured in splits:
        assert sorted(known + measured) == list(range(7))
    args.folds = 8
    with pytest.raises(SystemExit, match="--folds 8: allowed are 2 to 7 of 7 photographs"):
        post_training.split(7, args)


def test_post_training_allocates_bits():
    torch.manual_seed(0)
    small = timm.create_model("test_efficientnet", num_classes=1000).eval()
    args = post_training.parse(["--dataset", "photographs", "--allocate"])
    model = post_training.calibrated(small, 4, 8, [torch.randn(4, 3, 64, 64)], args)
    sizes = {name: small.get_submodule(name).weight.numel() for name in model.daq_config.layers}
    bits = {name: entry["weight_bits"] for name, entry in model.daq_config.layers.items()}
    assert sum(sizes[name] * bits[name] for name in sizes) <= 4 * sum(sizes.values())
    assert len(set(bits.values())) > 1


def test_photographs_in_subfolders_have_the_classes_of_their_names(tmp_path):
    with pytest.raises(SystemExit, match="neither labels.tsv nor subfolders named 0 to 999"):
        post_training.labelled(tmp_path)
    for label in ("7", "12"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "one.jpg").touch()
    assert post_training.labelled(tmp_path) == [(tmp_path / "12" / "one.jpg", 12), (tmp_path / "7" / "one.jpg", 7)]
    with pytest.raises(SystemExit, match="there are 2 photographs, and some must be left to measure"):
        post_training.main(["--dataset", str(tmp_path), "--calibration_images", "2"])


@pytest.mark.slow
def test_peers_train_from_one_network_and_are_not_run_again(reviews, text_float, tmp_path, capsys, monkeypatch):
    for split in ("train", "dev"):
        shutil.copy(reviews / f"{split}.tsv", tmp_path)
    shutil.copy(reviews / "dev.tsv", tmp_path / "test.tsv")
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    variants, results = ("both", "lsq", "paretoq"), tmp_path / "results" / "peers.jsonl"
    options = f"--model {text_float} --dataset {tmp_path} --bits 2/8 --seeds 0 1 --batch_size 16 --results {results}"
    argv = [*options.split(), "--dtype", "float32", "--variants", *variants, "--lrs", "1e-3", "1e-9"]
    rows = peers.main(argv)
    lines = results.read_text().splitlines()
    assert len(lines) == 3 * 3  # two rates of the first seed, the second at one of them
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for name in variants for seed in (0, 1)]
    assert all(0 <= row["test"] <= 100 and row["step"] > 0 for row in rows)
    assert "| 2/8 | paretoq | " in capsys.readouterr().out
    other = [*options.split(), "--variants", "lsq", "--lrs", "1e-3"]
    assert [row["dtype"] for row in peers.main(other)] == ["bfloat16"] * 2
    lines = results.read_text().splitlines()
    assert len(lines) == 3 * 3 + 2
    monkeypatch.setattr(peers, "train", None)
    assert peers.main(argv) == rows
    assert results.read_text().splitlines() == lines


@pytest.mark.slow
def test_peers_train_a_language_model(play, language_float, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    sizes = "--eval_fraction 0.2 --block_size 16 --batch_size 4 --max_steps 20 --group_size 8 --dtype float32 --seeds 0"
    variants = "--bits 8/32 1.6/32 --lrs 1e-3 --variants daq lsq paretoq both"
    files = ["--model", str(language_float), "--dataset", str(play), "--results", str(tmp_path / "peers.jsonl")]
    rows = peers.main([*files, *sizes.split(), *variants.split()])
    losses = {(row["bits"], row["variant"]): (row["start"], row["dev"]) for row in rows}
    exact = float(re.search(r"float, loss: dev ([\d.]+)", capsys.readouterr().out)[1])
    assert len(losses) == 8
    assert losses["8/32", "daq"][0] == pytest.approx(exact, abs=0.01)
    assert all(exact < losses["1.6/32", name][0] for name in ("daq", "lsq", "paretoq"))
    assert all(trained < start for start, trained in losses.values())


def test_weights_only_measures_every_state_of_a_language_model(play, language_float):
    files = ["--text", str(play), "--eval_text", str(play)]
    sizes = ["--bits", "8", "1", "--group_size", "8", "--block_size", "16", "--blocks", "8", "--eval_blocks", "8"]
    table = weights_only.main([str(language_float), *files, *sizes])
    exact, *rest = (row["perplexity"] for row in table)
    assert [row.get("state") for row in table] == [None, *["calibrated", "reconstructed", "GPTQ"] * 2]
    assert rest[:3] == pytest.approx([exact] * 3, rel=0.01)
    assert exact < rest[4] < rest[3]
    assert rest[5] > exact


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_adapters_are_measured_inside_and_beside_the_quantizer(play, language_float):
    sizes = "--bits 8 1 --group_size 8 --block_size 16 --batch_size 4 --eval_blocks 8 --rank 4 --steps 12 --seeds 1"
    table = adapters.main([str(language_float), "--text", str(play), *sizes.split(), "--lr", "1e-2"])
    found = {(row["weights"], row["row"]): row for row in table}
    beside = ["LoRA in float, then calibrated", "beside", "beside, merged", "beside, merged, restarted"]
    rows = ["no training", *beside, *adapters.INSIDE]
    expected = [("W8", row) for row in rows] + [("W1", row) for row in rows]
    assert list(found) == [("float", "no training"), ("float", "LoRA, merged"), *expected]
    start, trained = found["float", "no training"]["loss"], found["float", "LoRA, merged"]
    gained = start - trained["loss"]
    assert gained > 0.05
    for row in rows[1:]:
        assert found["W8", row]["loss"] == pytest.approx(trained["loss"], abs=0.4 * gained)  # bounds are fixed inside
    assert found["W1", "inside, merged"]["loss"] < found["W1", "no training"]["loss"] - 0.3 * gained
    assert found["W1", "beside"]["loss"] != found["W1", "beside, merged"]["loss"]


def test_adapters_have_the_learning_rate_that_validation_likes(capsys):
    runs = {1e-3: [(3.0, 1.0), (3.0, 2.0)], 3e-3: [(2.5, 4.0), (3.0, 5.0)]}
    found = {("W2", "beside"): runs, ("float", "no training"): {None: [(7.0, 7.5)]}}
    first, second = adapters.table_of(found, ["float", "W2"])
    assert (first["weights"], first["loss"], first["lr"]) == ("float", 7.5, None)
    assert (second["loss"], second["error"], second["lr"]) == (4.5, 0.5, 3e-3)
    assert "| float | no training | 7.500 |  |\n| W2 | beside | 4.500 ± 0.500 | 0.003 |\n" in capsys.readouterr().out


def test_gptq_rounds_to_the_nearest_where_inputs_are_independent_and_makes_good_where_not():
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 12, dtype=torch.float64), torch.randn(200, 12, dtype=torch.float64)
    groups = weight.view(5, 3, 4)
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True).clamp_min(0)
    step = (high - low) / 7
    nearest = (((groups / step).round() + (-low / step).round()).clamp(0, 7) - (-low / step).round()) * step
    found = weights_only.gptq_weight(weight, torch.eye(12, dtype=torch.float64), 3, 4)
    torch.testing.assert_close(found, nearest.view(5, 12))
    inputs = inputs @ torch.randn(12, 12, dtype=torch.float64)
    found = weights_only.gptq_weight(weight, inputs.T @ inputs, 3, 4)
    errors = [(inputs @ (value.view(5, 12) - weight).T).square().sum() for value in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["text", "image next"], ids=lambda kinds: kinds.replace(" ", "-"))
def test_sizes_and_parity(kinds, parquet, float_folder, reviews, text_float, play, language_float, tmp_path, capsys):
    data = {"image": (float_folder, parquet), "text": (text_float, reviews / "train.tsv")}
    data["next"] = (language_float, play)
    data = dict(data[kind] for kind in kinds.split())
    models = [f"{model}={source}" for model, source in data.items()]
    few = "--bits 3 --steps 2 --rows 8 --batch_size 8 --tokens 16 --threads 1"
    tables = deploy.main([*models, *few.split(), "--output", str(tmp_path / "table.json")])
    assert len(tables["sizes"]) == len(data)
    for row in tables["sizes"]:
        assert row["packed"] < row["trainable"]
        assert row["integers, float64"] < 1e-9
        assert {"onnxruntime: top-1", "openvino: top-1"} <= row.keys()
        assert ("compressed-tensors" in row) == (row["model"] != str(float_folder))
        # Weights alone have 4 bits in either.
        assert (row["onnx int4"] < row["onnx int8"]) == (row["model"] != str(language_float))
        assert ("GGUF" in row) == (row["model"] == str(language_float))
    assert json.loads((tmp_path / "table.json").read_text())["sizes"] == tables["sizes"]
    assert capsys.readouterr().out.count(models[0].partition("=")[0]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")
def test_speed_of_a_text_network_with_a_small_vocabulary(tiny_bert, tmp_path, monkeypatch):
    network = shutil.copytree(tiny_bert, tmp_path / "bert")
    settings = json.loads((network / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    (network / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(deploy, "ratios", lambda sessions, feed: {name: call(feed) for name, call in sessions.items()})
    args = deploy.parse(["--speed", "x", "--threads", "1"])
    row = next(deploy.speed(str(network), 4, "odd", args))
    assert (row["runtime"], row["batch"], row["grid"]) == ("onnxruntime", 1, "odd")
    assert {"float", "exact", "int8_outputs"} <= row.keys()


def test_time_by_operator():
    found = deploy.profiled(torch.nn.Linear(8, 8), torch.ones(2, 8), runs=3)
    assert found["aten::addmm"] > 0
    assert found["all"] == pytest.approx(sum(time for name, time in found.items() if name != "all"))


@pytest.mark.slow
def test_speed_is_measured_in_all_runtimes(capsys):
    rows = deploy.main(["--speed", "test_resnet", "--threads", "1", "--compiled"])["speed"]
    assert [(row["runtime"], row["batch"]) for row in rows] == [
        (runtime, batch) for runtime in ("onnxruntime", "openvino", "PyTorch", "PyTorch, compiled") for batch in (1, 8)
    ]
    assert all(row["exact"] > 0 for row in rows)
    assert all(row["int8_outputs"] > 0 for row in rows[:-4])
    assert 0 < rows[-1]["error of a layer"] < 1e-5
    assert capsys.readouterr().out.count("| runtime |") == 2, "one table of files, one of PyTorch"
