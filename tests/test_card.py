"""Model cards say what the files say and what was told, and what a person wrote in them stays."""

import copy
import json
import logging
import re

import huggingface_hub
import pytest
import timm
import torch
import transformers
from models import images, small_timm
from PIL import Image
from safetensors.torch import load_file
from text_models import tiny_bert, tokens

import hf_daq
from hf_daq.errors import CheckpointError
from hf_daq.files.card import is_edited, render, write_card
from hf_daq.files.feeding import _sentences, image_facts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the ONNX exporter

FACTS = hf_daq.CardFacts(
    base_model="timm/test_resnet.r160_in1k",
    license="apache-2.0",
    datasets=("user/data", "some photographs"),
    calibration="512 images",
    results=(hf_daq.Result("accuracy", 83.97, 84.99, "user/data", "test"),),
    command="python train.py --lr 0.1",
    recipe={"lr": 0.1},
    seed=7,
    versions={"torch": "2.9"},
)


def net(name="test_resnet", **config):
    model, size = small_timm(name), 64 if "resnet" in name else 160
    hf_daq.apply_daq(model, **(config or {"bits": 3}))
    with hf_daq.calibrate(model):
        model(images(2, size))
    return model


@pytest.fixture(scope="module")
def model():
    return net(rules=[{"pattern": "layer1*", "weight_bits": 8}], weight_bits=3, activation_bits=4)


def card(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_front_matter_is_what_the_hub_reads(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path, card=FACTS)
    data = card(tmp_path).data
    assert (data.base_model, data.license, data.library_name) == ("timm/test_resnet.r160_in1k", "apache-2.0", "timm")
    assert data.base_model_relation == "quantized"
    assert data.pipeline_tag == "image-classification"
    assert {"hf_daq", "quantization", "test_resnet"} <= set(data.tags)
    assert data.datasets == ["user/data"]  # the other is no id of the Hub
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 83.97, "test")


def test_body_says_what_is_in_the_files(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path, card=FACTS)
    text = card(tmp_path).text
    rows = re.findall(r"^\| `(.+?)` \| (\d) \| (\d) \| (\d+) \| ([\d,]+) \|$", text, re.MULTILINE)
    layers = hf_daq.plan(small_timm(), model.daq_config).quantized
    assert sum(int(row[3]) for row in rows) == len(layers)
    assert {(int(row[1]), int(row[2])) for row in rows} == {(8, 4), (3, 4)}
    assert sum(int(row[4].replace(",", "")) for row in rows) == sum(
        model.get_submodule(name).weight.numel() for name in layers
    )
    assert "| `conv1.0.weight` | f32 |" in text or "conv1.weight" in text
    floats = sum(tensor.numel() * tensor.element_size() for tensor in small_timm().state_dict().values())
    assert f"| float | {floats / 1e6:.2f} |" in text
    total = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    assert f"| this file | {total / 1e6:.2f} |" in text
    for known in (
        "| accuracy | 84.99 | 83.97 | user/data | test |",
        "python train.py --lr 0.1",
        '"lr": 0.1',
        "512 images",
    ):
        assert known in text
    assert "| seed | 7 |" in text
    assert "| torch | 2.9 |" in text


def test_nothing_is_invented(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path)
    found = card(tmp_path)
    assert found.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    for section in ("Results", "Training", "seed", "licen"):
        assert section not in found.text.replace("trained or calibrated", "")
    assert "| hf_daq |" in found.text


def test_the_lines_of_the_card_load_the_model(model, tmp_path, monkeypatch):
    hf_daq.save_pretrained(model, tmp_path / "PATH")
    monkeypatch.chdir(tmp_path)
    photo().save("image.jpg")
    code, run = re.findall(r"```python\n(.*?)```", (tmp_path / "PATH" / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert torch.equal(scope["model"](images(1, 64)), model.eval()(images(1, 64)))
    exec(run, scope)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    want = model(transform(Image.open("image.jpg"))[None]).softmax(1)[0]
    assert torch.equal(scope["probabilities"], want)


def photo():
    pixels = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy()).resize((320, 240), Image.Resampling.BICUBIC)


def test_the_card_says_how_images_are_fed(model, tmp_path):
    model = copy.deepcopy(model)
    names = [f"kind {number}" for number in range(model.num_classes)]
    model.pretrained_cfg = (
        model.pretrained_cfg
        | {
            "num_classes": model.num_classes,  # else timm leaves the labels out
            "label_names": [*names[:2], "a`b"],
            "crop_mode": 3,
            "std": [0.5, "x", 1],
        }
    )
    hf_daq.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    size, crop = model.pretrained_cfg["input_size"], model.pretrained_cfg["crop_pct"]
    assert "RGB, {} x {} x {} (channels, height, width)".format(*size) in text
    assert f"resized with `bilinear`, `crop_pct={crop:g}`, crop `center`" in text
    assert "over the std" not in text
    assert "`kind 0`, `kind 1`, `a'b`" in text
    many = " ".join(_sentences({"label_names": [*names, "one", "more"]}))
    assert f"`kind 9` and so on, {len(names) + 2} in all" in many
    assert image_facts("nothing") == {}


@pytest.mark.slow
def test_images_through_an_onnx_file_beside_the_card(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ort = pytest.importorskip("onnxruntime")
    photo().save("image.jpg")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x = transform(Image.open("image.jpg"))[None]
    hf_daq.save_pretrained(model, tmp_path)
    hf_daq.export_onnx(model, "model.onnx", x.repeat(2, 1, 1, 1), verify=False)
    write_card(tmp_path)
    *_, code = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert (scope["x"].transpose(2, 0, 1) - x[0].numpy()).std() < 0.01  # of one
    want = ort.InferenceSession("model.onnx").run(None, {scope["source"].name: x.numpy()})[0]
    assert abs(scope["logits"] - want).max() < 0.2 * want.std()


def test_the_card_leaves_out_the_onnx_file_of_another_model(tmp_path, caplog):
    def quantized(bits):
        model = timm.create_model("test_resnet").eval()
        hf_daq.apply_daq(model, bits=bits)
        with hf_daq.calibrate(model, check=False):
            model(images(4, 64))
        return model

    model = quantized(7)
    hf_daq.export_onnx(model, tmp_path / "model.onnx", images(2, 64), verify=False)
    for packed in (False, True):
        hf_daq.save_pretrained(model, tmp_path, packed=packed)
        assert 'InferenceSession("model.onnx")' in (tmp_path / "README.md").read_text()
    assert "another model" not in caplog.text
    hf_daq.save_pretrained(quantized(2), tmp_path)
    assert "model.onnx" not in (tmp_path / "README.md").read_text()
    assert "model.onnx is of another model than the weights beside it: export it again, or delete it" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_the_card_says_how_8_bits_stay_exact_without_vnni(tmp_path, bits):
    model = hf_daq.apply_daq(tiny_bert(), bits=bits)
    with hf_daq.calibrate(model):
        model(tokens(2))
    hf_daq.save_pretrained(model, tmp_path)
    (tmp_path / "model.onnx").touch()
    write_card(tmp_path)
    assert ("session.x64quantprecision" in (tmp_path / "README.md").read_text()) == (bits == 8)


@pytest.mark.parametrize(
    ("packed", "without"),
    [(False, "loads the float weights, which are not quantized"), (True, "transformers refuses the folder")],
)
def test_cards_of_transformers_models(tmp_path, monkeypatch, packed, without):
    model = tiny_bert()
    hf_daq.apply_daq(model, weight_bits=2)
    hf_daq.save_pretrained(model, tmp_path / "PATH", packed=packed)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "PATH" / "README.md").read_text()
    assert without in text
    assert card(tmp_path / "PATH").data.pipeline_tag == "text-classification"
    assert "with weights of a few bits (W2: bits of weights (W); inputs stay in float)" in text
    assert "A32" not in text
    assert "belongs into the folder" in text
    assert ("On a CPU, linear layers with inputs in float compute from the codes where" in text) == packed
    load, run = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(load, scope)
    with torch.no_grad():
        assert torch.equal(scope["model"](tokens()).logits, model.eval()(tokens()).logits)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence", "."]
    transformers.BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained("PATH")
    write_card(tmp_path / "PATH")
    assert "belongs into the folder" not in (tmp_path / "PATH" / "README.md").read_text()
    exec(run, scope)
    encoded = scope["run"].tokenizer("A sentence.", return_tensors="pt")
    with torch.no_grad():
        best = model(**encoded).logits.softmax(1).max().item()
    assert scope["run"]("A sentence.")[0]["score"] == pytest.approx(best)
    if not packed:
        batch = {name: tensor.repeat(2, 1) for name, tensor in encoded.items()}
        hf_daq.export_onnx(model, "PATH/model.onnx", batch, verify=False)
        write_card(tmp_path / "PATH")
        *_, code = re.findall(r"```python\n(.*?)```", (tmp_path / "PATH" / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path / "PATH")
        (tmp_path / "PATH" / "PATH").symlink_to(tmp_path / "PATH")
        exec(code, scope)
        assert torch.allclose(torch.from_numpy(scope["logits"]), model(**encoded).logits, atol=1e-3)


def test_the_card_names_where_the_tokenizer_is(tmp_path):
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=2)
    hf_daq.save_pretrained(model, tmp_path, card=hf_daq.CardFacts(base_model="user/base"))
    assert 'AutoTokenizer.from_pretrained("user/base")' in (tmp_path / "README.md").read_text()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert 'AutoTokenizer.from_pretrained("user/name")' in render(hf_daq.inspect(tmp_path), "user/name")


def test_a_transformers_model_of_the_hub_names_its_base(tmp_path):
    model = tiny_bert()
    model.config._commit_hash, model.config.name_or_path = "0" * 40, "somebody/bert"  # as from_pretrained sets them
    hf_daq.apply_daq(model, weight_bits=2)
    model.save_pretrained(tmp_path)
    assert card(tmp_path).data.base_model == "somebody/bert"


def test_a_card_that_was_edited_is_kept_with_a_warning(model, tmp_path, caplog):
    hf_daq.save_pretrained(model, tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Size", "## My sizes"))
    with caplog.at_level(logging.WARNING, "hf_daq"):
        hf_daq.save_pretrained(model, tmp_path, card=FACTS, probe=images(1, 64))
    assert "was edited, so it is not replaced" in caplog.text
    assert "## My sizes" in path.read_text()
    hf_daq.update_card(tmp_path, FACTS)
    assert "## My sizes" in path.read_text()
    hf_daq.update_card(tmp_path, FACTS, overwrite=True)
    assert "## My sizes" not in path.read_text()
    assert "83.97" in path.read_text()


def test_a_readme_that_was_there_before_is_kept(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My project")
    model = tiny_bert()
    hf_daq.apply_daq(model, weight_bits=2)
    for save in (model.save_pretrained, lambda folder: hf_daq.save_pretrained(model, folder)):
        save(tmp_path)
        assert (tmp_path / "README.md").read_text() == "# My project"
    assert "was edited" in caplog.text


def test_a_generated_card_is_written_anew(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path)
    assert not is_edited((tmp_path / "README.md").read_text())
    hf_daq.save_pretrained(model, tmp_path, packed=True)
    text = (tmp_path / "README.md").read_text()
    assert "for inference" in text
    assert "On a CPU, layers with quantized inputs compute in integers where processor" in text
    assert is_edited("# anything")


def test_update_card_changes_the_header_and_no_tensor(model, tmp_path):
    hf_daq.save_pretrained(model, tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    hf_daq.update_card(tmp_path, FACTS)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hf_daq.inspect(tmp_path).facts == FACTS
    assert torch.equal(hf_daq.from_pretrained(tmp_path)(images(1, 64)), model.eval()(images(1, 64)))
    hf_daq.update_card(tmp_path, hf_daq.CardFacts(seed=1))
    assert hf_daq.inspect(tmp_path).facts.versions == {"torch": "2.9"}  # of the run that made the weights


def test_update_card_of_shards(tmp_path):
    model = tiny_bert()
    hf_daq.apply_daq(model, weight_bits=2)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    hf_daq.update_card(tmp_path, FACTS)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert hf_daq.inspect(tmp_path).facts == FACTS
    assert hf_daq.from_pretrained(tmp_path).daq_config.weight_bits == 2


def test_update_card_refuses_what_is_not_ours(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        hf_daq.update_card(tmp_path, FACTS)


def test_words_of_others_do_not_break_the_card(model, tmp_path):
    evil = hf_daq.CardFacts(
        datasets=("a | b\n# Title <script>",),
        command="```\nx\n```",
        results=(hf_daq.Result("acc|uracy", 1.0),),
        calibration="`x`",
    )
    hf_daq.save_pretrained(model, tmp_path, card=evil)
    text = (tmp_path / "README.md").read_text()
    assert "| training data | a \\| b # Title &lt;script> |" in text
    assert "````bash\n```\nx\n```\n````" in text
    assert card(tmp_path).data.datasets is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "not a small mapping"),
        ({"recipe": {"x": "y" * 70000}}, "not a small mapping"),
        ({"unknown": 1}, "unknown or a wrong entry: 'unknown'"),
        ({"seed": "seven"}, "wrong entry: 'seed'"),
        ({"datasets": "name"}, "wrong entry: 'datasets'"),
        ({"versions": {"torch": 2}}, "wrong entry: 'versions'"),
        ({"results": [{"metric": "accuracy"}]}, "wrong keys"),
        ({"results": [{"metric": "accuracy", "value": "high"}]}, "wrong value"),
        ({"results": [{"metric": "accuracy", "value": float("nan")}]}, "wrong value"),
    ],
)
def test_facts_from_strangers(facts, message):
    with pytest.raises(CheckpointError, match=message):
        hf_daq.CardFacts.from_dict(facts)


def test_facts_are_plain_json():
    assert hf_daq.CardFacts.from_dict(json.loads(json.dumps(FACTS.to_dict()))) == FACTS
    assert hf_daq.CardFacts().to_dict() == {}


def test_a_card_needs_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        write_card(tmp_path)
