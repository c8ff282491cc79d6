"""The recipes for text classifiers and language models: configs run, a stopped run continues exactly, mistakes have names."""

import itertools
import json

import language_modeling
import pytest
import text_classification
import torch
import transformers
from recipe_runs import (  # noqa: F401  fixtures
    CONFIGS,
    NO_HEADER,
    RECIPES,
    _datasets_cache,
    _fresh_accelerate,
    assert_card,
    assert_continues,
    language_float,
    outcome,
    play,
    reviews,
    run_language,
    run_text,
    text_float,
    tiny_bert,
)
from safetensors.torch import load_file

import hf_daq
from shared.finish import dataset_name

# Text classification --------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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


@pytest.mark.parametrize("best", [True, False])
def test_the_accuracy_on_the_card_is_that_of_the_saved_network(best, reviews, text_float, tmp_path, monkeypatch):
    falling = itertools.count(90, -10)  # float, calibrated, and after each epoch
    monkeypatch.setattr(text_classification, "accuracy", lambda _: {"accuracy": float(next(falling))})
    args = ["--dataset", reviews, "--checkpoint", text_float, "--float_epochs", 0, "--epochs", 3, *NO_HEADER]
    args += ["--training.load_best_model_at_end", str(best).lower(), "--training.save_total_limit", 3]
    results = run_text(*args, "--output_dir", tmp_path)
    assert (results["quantized"], results["quantized_last"]) == (70 if best else 50, 50)
    (result,) = hf_daq.inspect(tmp_path / "quantized").facts.results
    assert result.value == results["quantized"]
    checkpoints = sorted((tmp_path / "checkpoints" / "quantized").iterdir(), key=lambda path: int(path.name[11:]))
    saved, first, last = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "quantized", checkpoints[0], checkpoints[-1])
    )
    name = "classifier.weight"
    assert not torch.equal(first[name], last[name])
    assert torch.equal(saved[name], (first if best else last)[name])


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
    assert_continues(monkeypatch, checkpoints, whole, run_text, *args, "--output_dir", tmp_path)
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
    (tmp_path / "three").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "three" / name).write_text("sentence\tlabel\ngood film\t1\nbad film\t0\n")
    for args, message in [
        (model, "pass --dataset, a Hub id or a folder"),
        (data, "pass --model, a folder or Hub id"),
        ([*data, "--float_epochs", 0], "set float_epochs or checkpoint"),
        ([*data, *model, "--checkpoint", text_float], "--checkpoint takes the place of a float phase"),
        (
            ["--dataset", tmp_path / "three", *NO_HEADER, "--float_epochs", 0, "--checkpoint", text_float],
            "has 2 classes, and the data 3: 0, 1, label",
        ),
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


# Language modeling ----------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_the_python_library_is_a_text():
    cfg = language_modeling.parse(["--dataset", "python_library", "--eval_fraction", "0.05"])
    texts = language_modeling.read_texts(cfg)
    assert sum(map(len, texts.train)) > 5e6
    assert "class ZipFile" in "".join(texts.eval)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [1, 3, 5])
def test_a_stopped_language_model_continues_bit_for_bit(checkpoints, language_uninterrupted, tmp_path, monkeypatch):
    args, whole = language_uninterrupted
    assert_continues(monkeypatch, checkpoints, whole, run_language, *args, "--output_dir", tmp_path)


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


# Exports --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_run_ends_with_its_exports(reviews, text_float, tmp_path):
    args = ["--config", RECIPES / "configs" / "sst2_minilm_w4a8.yaml", "--dataset", reviews, "--checkpoint", text_float]
    run_text(*args, "--output_dir", tmp_path, "--training.max_steps", 3, "--export", "packed, compressed-tensors,onnx")
    for folder in ("packed", "compressed-tensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_language_run_ends_with_its_exports(play, language_float, tmp_path):
    args = ["--config", RECIPES / "configs" / "tinyshakespeare_llama_w3.yaml", "--dataset", play]
    args += ["--checkpoint", language_float, "--output_dir", tmp_path, "--max_steps", 3]
    run_language(*args, "--export", "packed,compressed-tensors,onnx")
    for folder in ("packed", "compressed-tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert (tmp_path / "model.onnx").exists()
