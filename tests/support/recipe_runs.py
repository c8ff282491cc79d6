"""Runs of the recipes in the process of the tests, with small data and small checkpoints for them."""

import contextlib
import json
from pathlib import Path

import datasets
import image_classification
import language_modeling
import numpy as np
import pytest
import text_classification
import tokenizers
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import hf_daq
from shared import loop

RECIPES = Path(__file__).parents[2] / "recipes"
STUDY = "estimators"  # test_estimators.py reads these
CONFIGS = sorted(path.name for path in (RECIPES / "configs").glob("*.yaml") if not path.name.startswith(STUDY))
SMALL = "--max_steps 3 --batch_size 8 --checkpoint_every 0 --calibration_batches 2 --num_workers 0"


@pytest.fixture(autouse=True, scope="module")
def _datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Each run of the recipe is a process of its own in life, with threads and Accelerate state of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*args, module=image_classification) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    return module.main([str(arg) for arg in args])


WORDS = [
    "good",
    "great",
    "fine",
    "lovely",
    "bad",
    "awful",
    "poor",
    "dull",
    "film",
    "plot",
    "song",
    "the",
    "a",
    "is",
    "was",
]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A folder of tsv files without a line of column names: good words or bad ones."""
    folder = tmp_path_factory.mktemp("reviews")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("dev", 20)):
        labels = generator.integers(0, 2, count)
        lines = []
        for label in labels:
            words = [*generator.choice(WORDS[4 - 4 * label : 8 - 4 * label], 2), *generator.choice(WORDS[8:], 5)]
            lines.append(f"{' '.join(generator.permutation(words)[: generator.integers(3, 8)])}\t{label}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A random checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


TEXT = ["--training.per_device_train_batch_size", 8, "--training.disable_tqdm", "true", "--calibration_batches", 2]
NO_HEADER = ["--dataset_kwargs.names", "[sentence, label]"]


def run_text(*args) -> dict:
    return run(*TEXT, *args, module=text_classification)


@pytest.fixture(scope="module")
def text_float(reviews, tiny_bert, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("text_float")
    config = RECIPES / "configs" / "sst2_minilm_float.yaml"
    run_text(
        "--config", config, "--dataset", reviews, "--model", tiny_bert, "--output_dir", output, "--float_epochs", 1
    )
    return output / "float"


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
def float_folder(parquet, tmp_path_factory) -> Path:
    """Output of the float config, which the others start from."""
    output = tmp_path_factory.mktemp("float")
    config = RECIPES / "configs" / "cifar10_resnet20_float.yaml"
    run("--config", config, "--dataset", parquet, "--output_dir", output, "--float_epochs", 1, *SMALL.split())
    return output / "float"


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


def assert_continues(monkeypatch, count: int, whole: tuple, run, *args) -> None:
    """Stopped after its checkpoint number `count` and resumed, the run with `args`, the last its output, ends as `whole`."""
    with stop_after(monkeypatch, count):
        run(*args)
    torch.manual_seed(count)
    run(*args, "--resume")
    assert_equal(outcome(args[-1]), whole)


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
