"""The jobs of recipes/jobs run from the data to the answer, small."""

import re
from itertools import islice
from pathlib import Path

import pytest
import timm
import torch
from jobs import generate, images, own_module, sentences
from PIL import Image
from recipe_runs import reviews, tiny_bert  # noqa: F401  fixtures
from sklearn.datasets import load_digits

import hf_daq
from hf_daq.nn.packed import packed_layers


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's reader leaves it to the collector
def test_a_folder_of_jpegs_becomes_an_onnx_file_that_answers(tmp_path, capsys):
    for pixels, label in islice(zip(*load_digits(return_X_y=True, n_class=2), strict=True), 160):
        folder = tmp_path / "photos" / f"digit{label}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).resize((40, 40))
        picture.save(folder / f"{len(list(folder.iterdir()))}.jpg")
    timm.models.save_for_hf(timm.create_model("test_resnet"), "pretrained", safe_serialization=True)
    images.main("photos", "local-dir:pretrained", epochs=2, image_size=32)
    said = capsys.readouterr().out
    assert re.search(r"one image: digit[01], really digit[01]", said)
    assert "top-1" in said
    assert hf_daq.inspect("out/images").config.weight_bits == 4


def test_a_module_of_ones_own_is_trained_saved_and_opened(capsys, caplog):
    own_module.main(epochs=4)
    assert "nothing asks for it" not in caplog.text
    said = capsys.readouterr().out
    (same,) = re.findall(r"^([\d.]+) % of the answers are those before packing$", said, re.MULTILINE)
    assert float(same) > 99
    assert all(float(value) > 60 for value in re.findall(r"^([\d.]+) %$", said, re.MULTILINE))
    assert all(re.search(rf"{name} +W4A4", said) for name in (r"conv\.2", r"hidden\.0"))
    assert re.search(r"conv\.0 +float", said)


def test_a_sentence_classifier_answers_in_a_pipeline(reviews, tiny_bert, capsys):
    small = {"max_steps": 2, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 8}
    sentences.main(str(reviews / "train.tsv"), str(tiny_bert), **small, disable_tqdm=True)
    assert re.search(r"\[\{'label': '(negative|positive)', 'score': 0\.\d+\}\]", capsys.readouterr().out)
    assert packed_layers(hf_daq.from_pretrained("out/sentences"))


def test_a_llama_of_2_bits_writes(capsys):
    generate.main(Path(hf_daq.__file__).parents[1] / "LICENSE", steps=9, width=64, prompt="The Licensor")
    said = capsys.readouterr().out
    assert re.search(r"loss [\d.]+\nloss [\d.]+\nThe Licensor.+", said, re.DOTALL)
    assert hf_daq.inspect("out/generate").config.weight_bits == 2
