"""The recipes: every shipped config runs, a stopped run continues exactly, mistakes have names."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import accelerate
import datasets
import image_classification as recipe
import language_modeling
import minimal
import numpy as np
import post_training
import pytest
import text_classification
import timm
import torch
import transformers
from PIL import Image
from recipe_runs import (  # noqa: F401  fixtures
    NO_HEADER,
    RECIPES,
    WORDS,
    _datasets_cache,
    _fresh_accelerate,
    reviews,
    run,
    run_text,
    text_float,
    tiny_bert,
)
from safetensors.torch import load_file

import hf_daq
from measure import adapters, deploy, peers, weights_only
from shared import loop, options
from shared.finish import dataset_name

STUDY = "estimators"  # test_estimators.py reads these
CONFIGS = sorted(path.name for path in (RECIPES / "configs").glob("*.yaml") if not path.name.startswith(STUDY))
SMALL = "--max_steps 3 --batch_size 8 --checkpoint_every 0 --calibration_batches 2 --num_workers 0"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """A folder in the layout of a Hub data set: 10 classes of 32x32 images, told apart by their color."""
    folder = tmp_path_factory.mktemp("parquet")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 10
        pixels = generator.integers(0, 60, (count, 32, 32, 3)) + (labels * 19)[:, None, None, None]
        columns = {"img": list(pixels.astype(np.uint8)), "label": labels.tolist(), "extra": labels.tolist()}
        features = datasets.Features(
            {
                "img": datasets.Image(),
                "label": datasets.ClassLabel(names=[f"class{i}" for i in range(10)]),
                "extra": datasets.Value("int64"),
            }
        )
        whole = datasets.Dataset.from_dict(columns, features=features)
        whole.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("imagefolder")
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def float_folder(parquet, tmp_path_factory) -> Path:
    """Output of the float config, which the others start from."""
    output = tmp_path_factory.mktemp("float")
    config = RECIPES / "configs" / "cifar10_resnet20_float.yaml"
    run("--config", config, "--dataset", parquet, "--output_dir", output, "--float_epochs", 1, *SMALL.split())
    return output / "float"


# Configs ----------------------------------------------------------------------------------------------------------


def test_the_default_run_is_the_digits_config():
    assert recipe.parse(["--config", str(RECIPES / "configs" / "digits_w3a3.yaml")]) == recipe.parse([])


@pytest.mark.parametrize("name", CONFIGS)
def test_first_line_of_a_config_launches_it(name):
    first = (RECIPES / "configs" / name).read_text().splitlines()[0]
    launched = {"sst2": text_classification, "tinyshakespeare": language_modeling, "python": language_modeling}
    module = launched.get(name.partition("_")[0], recipe)
    assert first.startswith("# ")
    assert f"recipes/{module.__name__}.py --config recipes/configs/{name}" in first
    args = ["--config", str(RECIPES / "configs" / name), "--dataset", "x", "--model", "x"]
    options.daq_config(module.parse(args).daq)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "w1a1" in name or "w4a4" in name else pytest.mark.slow)
        for name in CONFIGS
        if name.startswith("cifar10_resnet20_w")
    ],
)
def test_cifar_configs_run(name, parquet, float_folder, tmp_path):
    results = run(
        *("--config", RECIPES / "configs" / name, "--dataset", parquet, "--checkpoint", float_folder),
        *("--output_dir", tmp_path, *SMALL.split()),
    )
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    bits = {tuple(layer.values()) for layer in config["model_args"]["quantization_config"]["layers"].values()}
    weight, activation = name.removesuffix(".yaml").split("_w")[1].split("a")
    assert bits == {(int(weight), None if activation == "32" else int(activation))}
    assert results["quantized"] >= results["quantized_last"]


def test_resnet18_config_runs(imagefolder, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), weights)
    results = run(
        *("--config", RECIPES / "configs" / "resnet18_w3a3.yaml", "--dataset", imagefolder, "--eval_split", "test"),
        *(
            "--pretrained",
            "false",
            "--checkpoint",
            weights,
            "--image_size",
            32,
            "--output_dir",
            tmp_path,
            *SMALL.split(),
        ),
    )
    assert results["quantized"] >= 0


def test_a_data_set_is_named_by_the_part_of_its_path_that_says_something(tmp_path, monkeypatch):
    flowers = tmp_path / "flowers"
    (flowers / "data" / "split").mkdir(parents=True)
    (flowers / "train.tsv").write_text("")
    monkeypatch.chdir(flowers / "data")
    assert {dataset_name(str(path)) for path in (flowers, flowers / "data" / "split", "split", ".")} == {"flowers"}
    assert dataset_name(str(flowers / "train.tsv")) == "flowers"
    assert dataset_name("user/name") == "user/name"
    assert dataset_name("/") == ""


def assert_card(output, metric, results, split, dataset):
    """The card of output/quantized has what was measured, and nothing of this machine."""
    facts = hf_daq.inspect(output / "quantized").facts
    assert facts.results == (hf_daq.Result(metric, results["quantized"], results["float"], dataset, split),)
    assert facts.command.startswith("python recipes/")
    assert facts.seed == 0
    assert facts.recipe["daq"]
    text = (output / "quantized" / "README.md").read_text()
    assert f"| {results['float']:g} | {results['quantized']:g} |" in text
    assert str(output) not in text


def test_digits_start_better_from_reconstructed_weights(tmp_path):
    run("--output_dir", tmp_path / "float", "--float_epochs", 4, "--epochs", 0)
    args = [
        "--float_epochs",
        0,
        "--checkpoint",
        tmp_path / "float" / "float",
        "--epochs",
        1,
        "--max_steps",
        1,
        "--daq.bits",
        2,
    ]
    calibrated = run(*args, "--output_dir", tmp_path / "calibrated")
    reconstructed = run(*args, "--output_dir", tmp_path / "reconstructed", "--reconstruct")
    assert "calibrated" not in reconstructed
    assert reconstructed["reconstructed"] > calibrated["calibrated"]


def test_digits_results_and_folders(tmp_path):
    results = run("--output_dir", tmp_path, "--float_epochs", 4, "--epochs", 1, "--daq.bits", 4)
    assert results["float"] > 80
    assert results["calibrated"] > 60
    assert results["quantized"] > 80
    assert_card(tmp_path, "accuracy", results, "test", "digits")

    report = json.loads((tmp_path / "results.json").read_text())
    assert report["results"] == results
    assert set(results) >= {"float_seconds", "quantized_seconds", "quantized_last", "calibrated", "float_last"}
    assert report["seed"] == 0
    assert report["device"]
    assert report["config"]["daq"] == {"weight_bits": 4, "activation_bits": 4}
    assert set(report["versions"]) == {"python", "torch", "timm", "accelerate", "datasets", "hf_daq"}
    assert [entry["phase"] for entry in report["history"]] == ["float"] * 4 + ["quantized"]

    cfg = recipe.parse(["--output_dir", str(tmp_path)])
    images = recipe.read_images(cfg)
    for phase in ("float", "quantized"):
        model = timm.create_model(f"local-dir:{tmp_path / phase}", pretrained=True).eval()
        assert model.pretrained_cfg["input_size"] == [3, 8, 8]
        assert list(model.pretrained_cfg["label_names"]) == [str(i) for i in range(10)]
        _, loader = recipe.make_loaders(images, cfg, model.pretrained_cfg, in_memory=True)
        with torch.no_grad():
            hits = torch.cat([model(batch).argmax(1) == labels for batch, labels in loader])
        assert 100 * hits.float().mean().item() == pytest.approx(results[phase])


# Folders of images ------------------------------------------------------------------------------------------------


def top1_through_timm(folder: Path, split: datasets.Dataset) -> float:
    """As anybody would evaluate it who has the saved folder alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    batch = torch.stack([transform(image.convert("RGB")) for image in split["image"]])
    with torch.no_grad():
        return 100 * (model(batch).argmax(1) == torch.tensor(split["label"])).float().mean().item()


@pytest.mark.parametrize("pipeline", ["memory", "timm"])
def test_the_saved_folder_says_how_it_was_evaluated(pipeline, classes, tmp_path):
    """Images that are not square, a model whose own settings crop 0.95; an eighth of the images is one point of 12.5."""
    args = ["--dataset", classes, "--model", "resnet10t", "--image_size", 32, "--pipeline", pipeline, "--batch_size", 8]
    args += ["--eval_fraction", 0.4, "--num_workers", 0, "--float_epochs", 2, "--epochs", 1, "--float_lr", 0.02]
    results = run(*args, "--output_dir", tmp_path)
    cfg = recipe.parse([str(arg) for arg in args])
    evaluation = recipe.read_images(cfg).eval
    for phase in ("float", "quantized"):
        assert top1_through_timm(tmp_path / phase, evaluation) == pytest.approx(results[phase])
        saved = json.loads((tmp_path / phase / "config.json").read_text())["pretrained_cfg"]
        assert saved["input_size"] == [3, 32, 32]
        assert (saved["crop_pct"] == 1.0) == (pipeline == "memory")
        assert not {"tag", "license", "paper_ids", "hf_hub_id", "origin_url"} & set(saved)
    facts = hf_daq.inspect(tmp_path / "quantized").facts
    assert facts.results[0].split == "40% of train"


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """A folder with a folder of images for each class, 30 and 10 of them, told apart by where they are bright."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for label, count in (("cat", 30), ("dog", 10)):
        (folder / label).mkdir()
        for i in range(count):
            pixels = generator.integers(0, 128, (40, 64, 3), dtype=np.uint8)
            pixels[:, :8] += np.uint8(100 * (label == "dog"))
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def test_a_folder_of_classes_is_split_the_same_way_every_time(classes):
    args = ["--dataset", str(classes), "--eval_fraction", "0.2"]
    images = recipe.read_images(recipe.parse(args))
    assert (len(images.train), len(images.eval), images.label_names) == (32, 8, ["cat", "dog"])
    assert sorted(images.eval["label"]) == [0] * 6 + [1] * 2
    again, other = (recipe.read_images(recipe.parse([*args, "--seed", seed])) for seed in "01")
    pixels = [np.stack([np.asarray(image) for image in part.eval["image"]]) for part in (images, again, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    whole = {image.tobytes() for split in (images.train, images.eval) for image in split["image"]}
    assert len(whole) == 40


def test_mistakes_in_splits_end_the_run_with_a_line(classes, imagefolder, tmp_path):
    for args, message in [
        (
            [classes],
            "has no split 'test'; it has train. Name another with --eval_split, .* --eval_fraction 0.2, or give",
        ),
        ([classes, "--train_split", "training"], "has no split 'training'; it has train"),
        ([classes, "--eval_fraction", 20], "eval_fraction is 20.0; a number between 0 and 1 is wanted"),
        ([classes, "--eval_fraction", 0.01], "eval_fraction 0.01 does not split 40 examples: "),
        ([imagefolder, "--eval_fraction", 0.2], "has the split 'test'; leave eval_fraction out"),
        (
            [f"{classes}s"],
            f"data set .* cannot be opened; the closest name is '{classes}'. It is digits, a Hub id or a",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            run("--dataset", *args, "--output_dir", tmp_path)


def test_the_minimal_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    minimal.main()
    before, after = (float(number) for number in re.findall(r"([\d.]+) %", capsys.readouterr().out))
    assert before > 95
    assert after > 93
    assert hf_daq.inspect(tmp_path / minimal.FOLDER).config.weight_bits == 3


# Continuing -------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def outcome(output: Path) -> tuple:
    report = json.loads((output / "results.json").read_text())
    results = {key: value for key, value in report["results"].items() if not key.endswith("seconds")}
    weights = {phase: load_file(output / phase / "model.safetensors") for phase in ("float", "quantized")}
    untimed = [{k: v for k, v in entry.items() if "second" not in k and "time" not in k} for entry in report["history"]]
    return results, [entry for entry in untimed if "total_flos" not in entry], weights


def assert_equal(a: tuple, b: tuple) -> None:
    assert a[:2] == b[:2]
    for phase in a[2]:
        assert a[2][phase].keys() == b[2][phase].keys()
        for name, tensor in a[2][phase].items():
            assert torch.equal(tensor, b[2][phase][name]), name


@contextlib.contextmanager
def stop_after(monkeypatch, count: int):
    """The run inside is stopped right after it wrote its checkpoint number `count`."""
    calls, save = [], loop.save_checkpoint

    def stop(*_, **__):
        calls.append(1)
        if len(calls) == count:
            raise StoppedError

    def save_then_stop(*args):
        save(*args)
        stop()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_then_stop)
        patch.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_save", stop)
        with pytest.raises(StoppedError):
            yield


# 22 updates an epoch: the run stops within and at the end of an epoch and of a phase.
DIGITS = "--float_epochs 2 --epochs 2 --batch_size 64 --checkpoint_every 11 --distillation.alpha 0.5"
DIGITS += " --distillation.features 0.1 --transition_target 0.01 --dampening 1e-4"


@pytest.fixture(scope="module")
def digits_uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    run(*DIGITS.split(), "--output_dir", output)
    return outcome(output)


@pytest.mark.parametrize("checkpoints", [8, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4, 5, 6))])
def test_a_stopped_run_continues_bit_for_bit(checkpoints, digits_uninterrupted, tmp_path, monkeypatch):
    with stop_after(monkeypatch, checkpoints):
        run(*DIGITS.split(), "--output_dir", tmp_path)
    assert len(loop.list_checkpoints(tmp_path)) <= 2
    torch.manual_seed(checkpoints)
    run(*DIGITS.split(), "--output_dir", tmp_path, "--resume")
    assert_equal(outcome(tmp_path), digits_uninterrupted)


@pytest.mark.parametrize("checkpoints", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_transforms_dropout_and_accumulation_continue_bit_for_bit(checkpoints, imagefolder, tmp_path, monkeypatch):
    """Randomness of timm's transforms, of dropout, of both optimizers; Adam moments; bf16; a half-done accumulation."""
    args = [
        *("--dataset", imagefolder, "--model", "test_resnet", "--image_size", 32, "--hflip", 0.5, "--pipeline", "timm"),
        *("--batch_size", 4, "--accumulation", 2, "--optimizer", "adamw", "--lr", 1e-3, "--float_lr", "1e-3"),
        *("--float_epochs", 2, "--epochs", 2, "--clip_grad", 1, "--num_workers", 0, "--mixed_precision", "bf16"),
        *("--model_kwargs.drop_rate", 0.2, "--checkpoint_every", 2, "--channels_last", "--label_smoothing", 0.1),
    ]
    run(*args, "--output_dir", tmp_path / "whole")
    with stop_after(monkeypatch, checkpoints):
        run(*args, "--output_dir", tmp_path / "stopped")
    run(*args, "--output_dir", tmp_path / "stopped", "--resume")
    assert_equal(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


def test_a_run_killed_while_writing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    args = [*DIGITS.split(), "--output_dir", tmp_path, "--epochs", 0]
    save, calls = accelerate.Accelerator.save_state, []

    def killed_the_third_time(self, folder, **kwargs):
        save(self, folder, **kwargs)
        calls.append(folder)
        if len(calls) == 3:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "save_state", killed_the_third_time)
        with pytest.raises(StoppedError):
            run(*args)
    assert [path.name for path in loop.list_checkpoints(tmp_path)] == ["00000011", "00000022"]
    run(*args, "--resume")
    assert [path.name for path in loop.list_checkpoints(tmp_path)] == ["00000033", "00000044"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_earlier_run_is_neither_mixed_up_nor_overwritten(tmp_path):
    args = ["--output_dir", tmp_path, "--epochs", 0, "--float_epochs", 1, "--checkpoint_every", 10]
    run(*args)
    with pytest.raises(SystemExit, match="holds an earlier run; add --resume"):
        run(*args)
    with pytest.raises(SystemExit, match=r"of a run with float_lr=0\.1; a continued run needs the same settings"):
        run(*args, "--resume", "--float_lr", 0.2)


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epoch", "3"], "unknown key 'epoch'; the closest is 'epochs'"),
        (["--distillation.temprature", "3"], "unknown key 'distillation.temprature'.*'distillation.temperature'"),
        (["--bits", "4"], "unknown key 'bits'; the closest is 'daq.bits'"),
        (["--epochs", "many"], '"epochs": Expected a .*int.* Got value: many'),
        (["--epochs.x", "1"], '"epochs": Expected a .*int'),
        (["--epochs", "--lr", "1"], "argument --epochs: expected one argument"),
        (["--optimiser.lr", "1"], "unknown key 'optimiser.lr'; the closest is 'optimizer'"),
        (["--optimizer", "adam"], "\"optimizer\": Expected .*'sgd', 'adamw'.* Got value: adam"),
        (["--config", "nowhere.yaml"], '"config": File does not exist: .*nowhere.yaml'),
        (["epochs", "3"], "unexpected argument 'epochs 3'; options are written --key value"),
        (["--daq.preset", "papre"], "daq: preset='papre' must be 'paper'"),
        (["--daq.roundign", "ste"], "daq: .*roundign.*rounding"),
        (["--model", "resnet81_cifar"], "timm has no model 'resnet81_cifar'; the closest is 'resnet8_cifar'"),
        (
            ["--dataset", "digit"],
            "data set 'digit' cannot be opened; the closest name is 'digits'. It is digits, a Hub",
        ),
        (["--float_epochs", "0"], "set float_epochs, pretrained or checkpoint"),
        (["--float_epochs", "0", "--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--eval_split", "tset"], "digits has no split 'tset'; it has train, test. .*--eval_fraction 0.2"),
        (["--label_column", "lable"], "no single column fits; name it with --label_column"),
        (["--export", "packed,onxx"], "allowed are packed, onnx, compressed-tensors, gguf, separated by commas"),
        (["--batch_size", "5000"], "batch_size is 5000, but the training split has only 1437 images"),
    ],
)
def test_mistakes_end_the_run_with_a_line(args, message, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # or it waits for the Hub
    with pytest.raises(SystemExit, match=message):
        run(*args, "--output_dir", tmp_path)


def test_unknown_key_in_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("weight_deacy: 0.1")
    with pytest.raises(SystemExit, match="unknown key 'weight_deacy'; the closest is 'weight_decay'"):
        run("--config", tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("distillation: {alhpa: 0.1}")
    with pytest.raises(SystemExit, match="unknown key 'distillation.alhpa'; the closest is 'distillation.alpha'"):
        run("--config", tmp_path / "x.yaml")


def test_options_win_over_the_file_wherever_they_stand(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 1e-4\nmixed_precision: no\nepochs: 3\ndaq: {weight_bits: 2, rounding: ste}\n")
    file, options = ["--config", str(tmp_path / "x.yaml")], ["--epochs", "5", "--daq.weight_bits", "4"]
    for argv in ([*file, *options], [*options, *file], [*options, f"--config={tmp_path / 'x.yaml'}"]):
        cfg = recipe.parse(argv)
        assert (cfg.lr, cfg.mixed_precision, cfg.epochs) == (1e-4, "no", 5)
        assert cfg.daq == {"weight_bits": 4, "rounding": "ste"}


@pytest.mark.parametrize("module", [recipe, text_classification, language_modeling])
def test_help_explains_every_key(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.parse(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    names = [name for name in options.key_names(module.Config) if not name.startswith("daq.")]
    for name in names:
        if name != "distillation":
            assert re.search(rf"--{name} (\S+|{{.*?}}) (?!\(type)\w|--{name} \S+ `", shown), name


def test_checkpoint_of_another_model(float_folder, tmp_path):
    with pytest.raises(SystemExit, match="holds a resnet20_cifar, and --model is resnet8_cifar"):
        run("--float_epochs", 0, "--checkpoint", float_folder, "--output_dir", tmp_path)


def test_parsing_of_values():
    text = "--lr 1e-4 --daq.weight_bits=2 --daq.activation_bits null --resume --tracker none --seed 7"
    cfg = recipe.parse(text.split())
    assert (cfg.lr, cfg.resume, cfg.tracker, cfg.seed) == (1e-4, True, "none", 7)
    assert cfg.daq == {"weight_bits": 2, "activation_bits": None}
    assert recipe.parse(["--daq.rounding", "ste"]).daq == {"weight_bits": 3, "activation_bits": 3, "rounding": "ste"}
    assert dataclasses.asdict(recipe.parse(["--mixed_precision", "no"]))["mixed_precision"] == "no"
    assert options.daq_config({"preset": "paper", "weight_bits": 1}).weight_normalization == "standardize"


# Data -------------------------------------------------------------------------------------------------------------


def test_augmentation_is_a_padded_crop_and_a_flip_of_each_image(parquet):
    """Every image equals one of the (2 * padding + 1)^2 crops of its padded self, flipped or not; and both happen."""
    cfg = recipe.parse(["--dataset", str(parquet), "--crop_padding", "2", "--hflip", "0.5"])
    images = recipe.read_images(cfg)
    assert (images.image_column, images.label_column) == ("img", "label")
    data = recipe.MemoryImages(images.train, images, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), cfg)
    plain = recipe.MemoryImages(images.train, images, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), None)
    indices = [5, 3, 20, 7, 11]
    batch, labels = data.__getitems__(indices)
    assert labels.tolist() == [i % 10 for i in indices]
    black = ((torch.zeros(3) - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4]))[:, None, None]
    seen = set()
    for index, image in zip(indices, batch, strict=True):
        padded = black.expand(3, 36, 36).clone()
        padded[:, 2:34, 2:34] = plain.__getitems__([index])[0][0]
        crops = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)}
        crops |= {(y, x, "flipped"): crop.flip(2) for (y, x), crop in crops.items()}
        found = [place for place, crop in crops.items() if torch.allclose(image, crop)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 1


def test_augmentation_follows_from_seed_epoch_and_index(parquet):
    cfg = recipe.parse(["--dataset", str(parquet), "--crop_padding", "4", "--hflip", "0.5"])
    images = recipe.read_images(cfg)
    data = recipe.MemoryImages(images.train, images, 32, (0.5,) * 3, (0.2,) * 3, cfg)
    first = data.__getitems__([1, 2, 3])[0]
    data.start_epoch(1)
    assert not torch.equal(data.__getitems__([1, 2, 3])[0], first)
    data.start_epoch(0)
    assert torch.equal(data.__getitems__([3, 1, 2])[0], first[[2, 0, 1]])


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet8_cifar"])
def test_cifar_resnet(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)
    assert model.pretrained_cfg["classifier"] == "fc"
    assert model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    if name == "resnet20_cifar":
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == 269_818


def test_cifar_mobilenet_is_itself_when_it_is_opened(tmp_path):
    model = timm.create_model("mobilenetv2_050_cifar", num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.forward_features(x).shape == (2, 1280, 2, 2)
    timm.models.save_for_hf(model, tmp_path / "float")
    opened = timm.create_model(f"local-dir:{tmp_path / 'float'}", pretrained=True).eval()
    assert torch.equal(opened(x), model(x))
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model, check=False):
        model(x)
    hf_daq.save_pretrained(model, tmp_path / "daq")
    assert torch.equal(hf_daq.from_pretrained(tmp_path / "daq").eval()(x), model.eval()(x))


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


# Text classification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("sst2_minilm_w")])
def test_sst2_configs_run(name, reviews, text_float, tmp_path):
    args = ["--config", RECIPES / "configs" / name, "--dataset", reviews, "--checkpoint", text_float]
    results = run_text(*args, "--output_dir", tmp_path, "--training.max_steps", 3)
    start = "reconstructed" if "w2a8" in name or "w3a3" in name else "calibrated"
    assert set(results) == {"float", start, "quantized", "quantized_last", "quantized_seconds"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantized")
    bits = {(layer["weight_bits"], layer["activation_bits"]) for layer in model.daq_config.layers.values()}
    weight, activation = name.removesuffix(".yaml").split("_w")[1].split("a")
    assert bits == {(int(weight), int(activation))}
    assert model.config.id2label == {0: "0", 1: "1"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "quantized")
    assert tokenizer("the film")["input_ids"][0] == 2
    assert_card(tmp_path, "accuracy", results, "validation", reviews.name)


def test_a_reconstructed_text_classifier_trains_and_continues(reviews, text_float, tmp_path, monkeypatch):
    args = [
        "--dataset",
        reviews,
        "--checkpoint",
        text_float,
        "--float_epochs",
        0,
        "--epochs",
        1,
        "--daq.weight_bits",
        2,
    ]
    args += ["--training.max_steps", 3, "--reconstruct", *NO_HEADER]
    calls = []
    monkeypatch.setattr(hf_daq, "reconstruct", lambda *given, done=hf_daq.reconstruct: calls.append(done(*given)))
    results = run_text(*args, "--output_dir", tmp_path)
    assert set(results) == {"float", "reconstructed", "quantized", "quantized_last", "quantized_seconds"}
    (tmp_path / "results.json").unlink()
    run_text(*args, "--output_dir", tmp_path, "--resume")
    assert len(calls) == 1  # the weights are in the checkpoint


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


@pytest.fixture(scope="module")
def trainer_uninterrupted(reviews, tiny_bert, tmp_path_factory):
    """Dropout, both phases, distillation, accumulation; five batches and three updates an epoch."""
    args = [
        *("--dataset", reviews, "--model", tiny_bert, "--float_epochs", 2, "--epochs", 2, *NO_HEADER),
        *("--training.save_strategy", "steps", "--training.save_steps", 2, "--training.eval_strategy", "steps"),
        *("--training.eval_steps", 2, "--training.learning_rate", 1e-3, "--float_training.learning_rate", 2e-3),
        *("--training.gradient_accumulation_steps", 2, "--distillation.alpha", 0.5),
    ]
    output = tmp_path_factory.mktemp("trainer_uninterrupted")
    run_text(*args, "--output_dir", output)
    return args, outcome(output)


@pytest.mark.parametrize("checkpoints", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5))])
def test_a_stopped_trainer_continues_bit_for_bit(checkpoints, trainer_uninterrupted, tmp_path, monkeypatch):
    args, whole = trainer_uninterrupted
    with stop_after(monkeypatch, checkpoints):
        run_text(*args, "--output_dir", tmp_path)
    torch.manual_seed(checkpoints)
    run_text(*args, "--output_dir", tmp_path, "--resume")
    assert_equal(outcome(tmp_path), whole)
    assert run_text(*args, "--output_dir", tmp_path, "--resume")["quantized"] == whole[0]["quantized"]
    with pytest.raises(SystemExit, match="holds an earlier run; add --resume"):
        run_text(*args, "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match=r"of a run with quantizer_lr=0\.001; a continued run needs the same"):
        run_text(*args, "--output_dir", tmp_path, "--resume", "--quantizer_lr", 1)


def test_pairs_of_texts_and_labels_in_words(tiny_bert, tmp_path):
    rows = [
        {"answer": "no", "premise": "a good film", "hypothesis": "dull"},
        {"answer": "yes", "premise": "a", "hypothesis": "a"},
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = "--model x --label_column answer --text_column premise --second_text_column hypothesis --max_length 5"
    cfg = text_classification.parse([*args.split(), "--dataset", str(tmp_path)])
    texts = text_classification.read_texts(cfg)
    assert (texts.columns, texts.label_names) == (["premise", "hypothesis"], ["no", "yes"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    split = text_classification.tokenize(texts.train, texts, tokenizer, cfg)
    assert split["labels"][:] == [0, 1]
    assert [tokenizer.decode(ids) for ids in split["input_ids"]] == [
        "[CLS] a [SEP] dull [SEP]",
        "[CLS] a [SEP] a [SEP]",
    ]
    cfg.text_column = cfg.second_text_column = None
    assert text_classification.read_texts(cfg).columns == ["premise"]


def test_text_mistakes_end_the_run_with_a_line(reviews, tiny_bert, text_float, tmp_path):
    model, data = ["--model", tiny_bert], ["--dataset", reviews, *NO_HEADER]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("good film\t1\n")
    (tmp_path / "data" / "dev.tsv").write_text("bad film\t0\n")
    for args, message in [
        (model, "pass --dataset, a Hub id or a folder"),
        (data, "pass --model, a folder or Hub id"),
        ([*data, "--float_epochs", 0], "set float_epochs or checkpoint"),
        ([*data, "--float_epochs", 0, "--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (
            [*data, *model, "--training.learning_rat", 1],
            "unknown key 'training.learning_rat'; .*training.learning_rate",
        ),
        ([*data, *model, "--eval_split", "test"], "no split 'test'; it has train, validation"),
        ([*data, *model, "--label_column", "sentiment"], "no column 'sentiment'; name it with --label_column"),
        ([*data, *model, "--text_column", "text"], "no such column of text; name it with --text_column"),
        ([*model, "--dataset", tmp_path / "data", *NO_HEADER], r"label 0 is not among those of 'train': \['1'\]"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run_text(*args, "--output_dir", tmp_path)


# Language modeling ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("play") / "input.txt"
    path.write_text("".join(f"{' '.join(generator.choice(WORDS, 8))}\n" for _ in range(1000)))
    return path


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LANGUAGE = [
    *(f"--model_config.{key}={value}" for key, value in TINY.items()),
    *("--block_size", 32, "--vocab_size", 300, "--sample_tokens", 5, "--batch_size", 8, "--calibration_batches", 2),
]


def run_language(*args) -> dict:
    return run(*LANGUAGE, *args, module=language_modeling)


@pytest.fixture(scope="module")
def language_float(play, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("language_float")
    config = RECIPES / "configs" / "tinyshakespeare_llama_float.yaml"
    run_language("--config", config, "--dataset", play, "--output_dir", output, "--max_steps", 3)
    return output / "float"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tinyshakespeare_llama_w")])
def test_tinyshakespeare_configs_run(name, play, language_float, tmp_path):
    args = ["--config", RECIPES / "configs" / name, "--dataset", play, "--checkpoint", language_float]
    results = run_language(*args, "--output_dir", tmp_path, "--max_steps", 3)
    assert results["quantized"] <= results["quantized_last"]
    assert results["quantized_sample"].startswith("ROMEO:\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    weight = int(name.removesuffix(".yaml").split("_w")[1])
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in model.daq_config.layers.values()} == {
        (weight, None)
    }
    assert_card(tmp_path, "loss", results, "last 10% of train", dataset_name(str(play)))


def test_a_reconstructed_language_model_trains(play, language_float, tmp_path):
    args = [
        "--dataset",
        play,
        "--checkpoint",
        language_float,
        "--float_epochs",
        0,
        "--daq.weight_bits",
        2,
        "--max_steps",
        1,
    ]
    reconstructed = run_language(*args, "--output_dir", tmp_path / "reconstructed", "--reconstruct")
    calibrated = run_language(*args, "--output_dir", tmp_path / "calibrated")
    assert "calibrated" not in reconstructed
    assert reconstructed["reconstructed"] != calibrated["calibrated"]


def test_the_default_run_is_the_python_docs_config():
    config = RECIPES / "configs" / "python_docs_llama_w4.yaml"
    assert language_modeling.parse(["--config", str(config)]) == language_modeling.parse([])


def test_the_python_library_is_a_text():
    cfg = language_modeling.parse(["--dataset", "python_library", "--eval_fraction", "0.05"])
    texts = language_modeling.read_texts(cfg)
    assert sum(map(len, texts.train)) > 5e6
    assert "class ZipFile" in "".join(texts.eval)


def test_python_docs_run(tmp_path):
    results = run_language("--output_dir", tmp_path, "--max_steps", 3)
    assert results["float"] > results["quantized"] > 3


@pytest.fixture(scope="module")
def language_uninterrupted(play, tmp_path_factory):
    """Both phases, distillation, accumulation, dropout, bf16; twenty-odd updates an epoch."""
    args = [
        *("--dataset", play, "--float_epochs", 2, "--epochs", 2, "--checkpoint_every", 15, "--accumulation", 2),
        *("--distillation.alpha", 0.5, "--model_config.attention_dropout", 0.1, "--mixed_precision", "bf16"),
    ]
    output = tmp_path_factory.mktemp("language_uninterrupted")
    run_language(*args, "--output_dir", output)
    return args, outcome(output)


@pytest.mark.parametrize("checkpoints", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5))])
def test_a_stopped_language_model_continues_bit_for_bit(checkpoints, language_uninterrupted, tmp_path, monkeypatch):
    args, whole = language_uninterrupted
    with stop_after(monkeypatch, checkpoints):
        run_language(*args, "--output_dir", tmp_path)
    torch.manual_seed(checkpoints)
    run_language(*args, "--output_dir", tmp_path, "--resume")
    assert_equal(outcome(tmp_path), whole)


def test_blocks_cover_the_text_once_and_begin_elsewhere_every_epoch(play):
    cfg = language_modeling.parse(["--dataset", str(play), "--eval_fraction", "0.25", "--vocab_size", "300"])
    texts = language_modeling.read_texts(cfg)
    assert "".join(texts.train + texts.eval) == play.read_text()
    assert sum(piece.count("\n") for piece in texts.eval) == 250
    tokenizer = language_modeling.make_tokenizer(texts, cfg)
    plain = language_modeling.Blocks(texts.eval, tokenizer, 16)
    rows = [plain[i] for i in range(len(plain))]
    assert "".join(texts.eval).startswith(tokenizer.decode(torch.cat([row[:-1] for row in rows])))
    assert len(plain.tokens) - 16 * len(rows) <= 16
    assert all(first[-1] == second[0] for first, second in itertools.pairwise(rows))
    shifted = language_modeling.Blocks(texts.eval, tokenizer, 16, seed=0)
    first = shifted[len(shifted) - 1]
    shifted.start_epoch(1)
    assert len(first) == len(shifted[len(shifted) - 1]) == 17
    assert not torch.equal(first, shifted[len(shifted) - 1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--float_epochs", 0], "set float_epochs, model or checkpoint"),
        (["--float_epochs", 0, "--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--eval_split", "tset"], "python_docs has no split 'tset'; it has train"),
        (["--text_column", "txt"], r"no column 'txt'; name it with --text_column. The columns are \['text'\]"),
        (["--block_size", 1000000], "block_size is 1000000 and batch_size 8, but the training text has only"),
        (["--model_config.model_type", "lama"], "does not describe a causal language model: .*lama"),
    ],
)
def test_language_mistakes_end_the_run_with_a_line(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_language(*args, "--output_dir", tmp_path)


# Exports ----------------------------------------------------------------------------------------------------------


def test_an_image_run_ends_with_its_exports(parquet, float_folder, tmp_path, capsys):
    run(
        *(
            "--config",
            RECIPES / "configs" / "cifar10_resnet20_w4a4.yaml",
            "--dataset",
            parquet,
            "--checkpoint",
            float_folder,
        ),
        *("--output_dir", tmp_path, "--export", "packed,onnx", *SMALL.split()),
    )
    packed = timm.create_model(f"local-dir:{tmp_path / 'packed'}", pretrained=True)
    assert packed.daq_config.packed
    assert hf_daq.inspect(tmp_path / "packed").facts == hf_daq.inspect(tmp_path / "quantized").facts
    assert (tmp_path / "packed" / "probe.safetensors").exists()
    assert (tmp_path / "model.onnx").stat().st_size > 200_000
    printed = capsys.readouterr().out
    assert "computed as before the same outputs bit for bit" in printed
    assert "onnxruntime" in printed


def test_a_text_run_ends_with_its_exports(reviews, text_float, tmp_path):
    args = ["--config", RECIPES / "configs" / "sst2_minilm_w4a8.yaml", "--dataset", reviews, "--checkpoint", text_float]
    run_text(*args, "--output_dir", tmp_path, "--training.max_steps", 3, "--export", "packed, compressed-tensors,onnx")
    for folder in ("packed", "compressed-tensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    assert (tmp_path / "model.onnx").exists()


def test_a_language_run_ends_with_its_exports(play, language_float, tmp_path):
    args = ["--config", RECIPES / "configs" / "tinyshakespeare_llama_w3.yaml", "--dataset", play]
    args += ["--checkpoint", language_float, "--output_dir", tmp_path, "--max_steps", 3]
    run_language(*args, "--export", "packed,compressed-tensors,onnx")
    for folder in ("packed", "compressed-tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert (tmp_path / "model.onnx").exists()


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


@pytest.mark.parametrize(
    "kinds", ["text", pytest.param("image next", marks=pytest.mark.slow)], ids=lambda kinds: kinds.replace(" ", "-")
)
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
        assert row["onnx int4"] < row["onnx int8"]
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
