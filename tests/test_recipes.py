"""The recipes for images: every shipped config runs, a stopped run continues exactly, mistakes have names."""

import dataclasses
import json
import re
from pathlib import Path

import accelerate
import datasets
import image_classification as recipe
import language_modeling
import minimal
import numpy as np
import pytest
import text_classification
import timm
import torch
from recipe_runs import (  # noqa: F401  fixtures
    CONFIGS,
    RECIPES,
    SMALL,
    StoppedError,
    _datasets_cache,
    _fresh_accelerate,
    assert_card,
    assert_continues,
    assert_equal,
    float_folder,
    outcome,
    parquet,
    run,
    stop_after,
)

import hf_daq
from shared import loop, options
from shared.finish import dataset_name


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


# Configs --------------------------------------------------------------------------------------------------------------


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
        pytest.param(name, marks=() if "w1a1" in name else pytest.mark.slow)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# Folders of images ----------------------------------------------------------------------------------------------------


def top1_through_timm(folder: Path, split: datasets.Dataset) -> float:
    """As anybody would evaluate it who has the saved folder alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    batch = torch.stack([transform(image.convert("RGB")) for image in split["image"]])
    with torch.no_grad():
        return 100 * (model(batch).argmax(1) == torch.tensor(split["label"])).float().mean().item()


@pytest.mark.parametrize("pipeline", ["memory", pytest.param("timm", marks=pytest.mark.slow)])
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


# Continuing -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [1, 4])
def test_transforms_dropout_and_accumulation_continue_bit_for_bit(checkpoints, imagefolder, tmp_path, monkeypatch):
    """Randomness of timm's transforms, of dropout, of both optimizers; Adam moments; bf16; a half-done accumulation."""
    args = [
        *("--dataset", imagefolder, "--model", "test_resnet", "--image_size", 32, "--hflip", 0.5, "--pipeline", "timm"),
        *("--batch_size", 4, "--accumulation", 2, "--optimizer", "adamw", "--lr", 1e-3, "--float_lr", "1e-3"),
        *("--float_epochs", 2, "--epochs", 2, "--clip_grad", 1, "--num_workers", 0, "--mixed_precision", "bf16"),
        *("--model_kwargs.drop_rate", 0.2, "--checkpoint_every", 2, "--channels_last", "--label_smoothing", 0.1),
    ]
    run(*args, "--output_dir", tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    assert_continues(monkeypatch, checkpoints, whole, run, *args, "--output_dir", tmp_path / "stopped")


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


# Mistakes -------------------------------------------------------------------------------------------------------------


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


# Data -----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
