"""Runs of the recipes in the process of the tests, and small texts and a small checkpoint for them."""

from pathlib import Path

import datasets
import image_classification
import numpy as np
import pytest
import text_classification
import tokenizers
import torch
import transformers
from accelerate.state import AcceleratorState

RECIPES = Path(__file__).parents[2] / "recipes"


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
