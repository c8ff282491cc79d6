"""quantize, in Python and on the command line: from a float model and a data set to a file, and figures."""

import copy
import json

import datasets
import numpy as np
import pytest
import timm
import tokenizers
import torch
import transformers
from models import images, small_net
from PIL import Image
from sklearn.datasets import load_digits
from text_models import tiny_bert, tiny_llama
from timm.models import save_for_hf
from typer.testing import CliRunner

import hf_daq
from hf_daq.cli.main import app
from hf_daq.cli.options import minutes
from hf_daq.errors import DataError, ExportError, ModelError
from hf_daq.integrations.examples import read_examples, shares
from hf_daq.integrations.rows import rows_of
from hf_daq.nn.layers import quantized_layers
from hf_daq.report.examples import class_names

WORDS = [
    "the",
    "film",
    "is",
    "good",
    "bad",
    "fine",
    "dull",
    "and",
    "it",
    "was",
    "a",
    "very",
    "long",
    "story",
    "of",
    "love",
]


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def net(classes):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=classes).eval()


def word_tokenizer(folder, length=64):
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=length
    )
    fast.save_pretrained(folder)
    return fast


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Float models on disk, and data for them, which no test changes."""
    folder = tmp_path_factory.mktemp("quantize")
    digits = load_digits()
    for label in range(3):
        (folder / "digits" / str(label)).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(digits.images[:60], digits.target[:60], strict=True)):
        if label < 3:
            image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 32)).convert("RGB")
            image.save(folder / "digits" / str(label) / f"{number}.png")
    save_for_hf(net(3), folder / "timm", safe_serialization=True)
    tiny_bert().save_pretrained(folder / "bert")
    tiny_llama(pad_token_id=0).save_pretrained(folder / "llama")
    for name in ("bert", "llama"):
        word_tokenizer(folder / name)
    (folder / "reviews.tsv").write_text("".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences(40))))
    (folder / "story.txt").write_text("\n".join(sentences(200, seed=1)) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------- in Python


def test_three_lines_from_a_timm_model_to_a_file(root, tmp_path):
    model = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True).eval()
    reference = copy.deepcopy(model)
    result = hf_daq.quantize(model, root / "digits", weight_bits=4, activation_bits=8, examples=8)
    hf_daq.save_pretrained(model, tmp_path, packed=True, probe=images(2, 32))
    known, held_back = read_examples(reference, root / "digits", (8, 8))
    assert (result.examples, result.held_back) == (8, 8)
    expected = hf_daq.compare(model, reference, held_back.batches, labels=held_back.labels)
    assert result.comparison == expected
    assert expected.accuracy is not None
    assert result.health.network_sqnr is not None
    assert result.bytes < result.float_bytes / 3
    assert set(result.seconds) == {"calibrate", "reconstruct"}
    text = str(result)
    assert "8 examples, 8 others to compare" in text
    assert max(map(len, text.splitlines())) <= 80

    by_hand = hf_daq.apply_daq(copy.deepcopy(reference), weight_bits=4, activation_bits=8)
    with hf_daq.calibrate(by_hand, check=False):
        by_hand(known.batches[0])
    hf_daq.reconstruct(by_hand, known.batches)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_after_an_error_the_model_is_float_again(root):
    model = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True).eval()
    before = copy.deepcopy(model.state_dict())
    model.conv1.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("enough")))
    with pytest.raises(KeyboardInterrupt, match="enough"):
        hf_daq.quantize(model, root / "digits", bits=4, examples=4)
    assert not quantized_layers(model)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(DataError, match="nowhere is no file or folder"):
        hf_daq.quantize(model, root / "nowhere", bits=4)
    assert not quantized_layers(model)


# ------------------------------------------------------------------------------------------------------- examples


def test_images_come_as_timm_prepares_them(root):
    model = net(3)
    (found,) = read_examples(model, root / "digits", (5,))
    settings = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**settings)
    expected = torch.stack([transform(Image.open(file).convert("RGB")) for file in found.shown])
    assert torch.equal(found.batches[0], expected)
    assert found.labels.tolist() == [int(file.parent.name) for file in found.shown]


def test_parts_share_no_row_and_shrink_with_the_data(root):
    first, second = read_examples(net(3), root / "digits", (100, 50))
    assert not set(first.shown) & set(second.shown)
    assert len(first) == 2 * len(second)
    assert shares((256, 256), 10) == [5, 5]
    assert shares((256, 1), 2) == [1, 1]
    assert shares((3, 4), 100) == [3, 4]


def test_classes_of_the_data_are_numbered_as_the_model_does(root, tmp_path, caplog):
    model = net(3)
    for number, name in enumerate(("zebra", "apple", "mouse")):
        (tmp_path / name).mkdir()
        images_of = Image.fromarray(np.full((8, 8, 3), number * 40, np.uint8))
        images_of.save(tmp_path / name / "0.png")
    (found,) = read_examples(model, tmp_path, (3,))
    order = ["apple", "mouse", "zebra"]
    assert found.labels.tolist() == [order.index(file.parent.name) for file in found.shown]
    assert read_examples(net(7), tmp_path, (3,))[0].labels is None
    assert "are not those of the model, which has 7: accuracy is not measured" in caplog.text

    rows = datasets.Dataset.from_dict({"text": sentences(4), "label": ["bad", "good", "good", "bad"]})
    bert = tiny_bert(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    (found,) = read_examples(bert, rows, (4,), processor=root / "bert")
    given = dict(zip(rows["text"], rows["label"], strict=True))
    assert found.labels.tolist() == [["good", "bad"].index(given[text]) for text in found.shown]
    assert class_names(bert) == ["good", "bad"]
    assert class_names(net(3)) is None


def test_names_of_classes_are_not_guessed_where_the_model_has_its_own(root, caplog):
    def labels(names, of_model, feature=None):
        known = dict(enumerate(of_model)) if of_model else None
        kwargs = {"id2label": known, "label2id": {name: number for number, name in known.items()}} if known else {}
        rows = {"text": sentences(4), "label": names}
        features = feature and datasets.Features({"text": datasets.Value("string"), "label": feature})
        rows = datasets.Dataset.from_dict(rows, features=features)
        model = tiny_bert(num_labels=len(of_model) or 2, **kwargs)
        found = read_examples(model, rows, (4,), processor=root / "bert")[0]
        at = {text: place for place, text in enumerate(rows["text"])}
        return found.labels if found.labels is None else [int(found.labels[found.shown.index(text)]) for text in at]

    positive = ["POSITIVE", "NEGATIVE"]
    assert labels(["positive", "negative", "negative", "positive"], positive) == [0, 1, 1, 0]
    assert labels(["pos", "neg", "neg", "pos"], positive) is None
    assert "such as 'pos', are not those of the model, which has 2, such as 'POSITIVE': accuracy is not" in caplog.text
    assert labels(["pos", "neg", "neg", "pos"], []) == [1, 0, 0, 1]
    assert labels([0, 1, 1, 0], positive, datasets.ClassLabel(names=["no", "yes"])) == [0, 1, 1, 0]
    as_text = datasets.ClassLabel(names=["10", "9"])  # in the order of datasets and torchvision
    assert labels([0, 1, 1, 0], [], as_text) == [0, 1, 1, 0]
    assert labels([0, 0, 1, 1], [], datasets.ClassLabel(names=["1", "2"])) == [0, 0, 1, 1]
    assert labels([0, 1, 1, 0], ["9", "10"], as_text) == [1, 0, 0, 1]
    assert labels([[0, 1], [1, 0], [1, 0], [0, 1]], []) is None  # several classes a row
    rows = datasets.Dataset.from_dict({"text": sentences(4), "label": [1, 0, 0, 1]})
    found = [
        read_examples(tiny_bert(), rows.with_format(kind), (4,), processor=root / "bert")[0].labels
        for kind in (None, "numpy", "torch")
    ]
    assert all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.parametrize("first", [1, 1.0, 0.0])
def test_classes_that_are_numbers_keep_their_order(first, root):
    """pandas writes numbers of a column with gaps as floats."""
    labels = {str(number): number for number in range(12)}
    bert = tiny_bert(num_labels=12, id2label={number: name for name, number in labels.items()}, label2id=labels)
    numbers = [first + number % 12 for number in range(24)]
    rows = datasets.Dataset.from_dict({"text": [f"film {number}" for number in range(24)], "label": numbers})
    (found,) = read_examples(bert, rows, (24,), processor=root / "bert")
    assert found.labels.tolist() == [int(text.split()[1]) % 12 for text in found.shown]


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_without_a_class_have_no_accuracy(missing, root, caplog):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": sentences(4), "label": [0, 1, missing, 1]}, features=features)
    assert read_examples(tiny_bert(), rows, (4,), processor=root / "bert")[0].labels is None
    assert "1 of 4 rows have no class" in caplog.text


def test_folders_of_classes_may_be_nested_or_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for folder in ("cat/front", "cat/back", "dog"):
        (elsewhere / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(elsewhere / folder / "0.png")
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(elsewhere / name)
    (elsewhere / "dog" / "again").symlink_to(elsewhere / "dog")
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "split" / "train" / "all").symlink_to(elsewhere)
    for folder, classes in ((elsewhere, {"cat": 0, "dog": 1}), (tmp_path / "linked", {"cat": 0, "dog": 1})):
        (found,) = read_examples(net(2), folder, (3,))
        assert len(found) == 3
        assert found.labels.tolist() == [classes[file.relative_to(folder).parts[0]] for file in found.shown]
    assert read_examples(net(1), tmp_path / "split", (3,))[0].labels.tolist() == [0, 0, 0]
    (elsewhere / "dog").rename(elsewhere / "train")  # a class, as there are others beside it
    assert sorted(read_examples(net(2), elsewhere, (3,))[0].labels.tolist()) == [0, 0, 1]


def test_images_may_be_bytes(root):
    file = next((root / "digits").rglob("*.png"))
    cells = [
        file.read_bytes(),
        {"bytes": file.read_bytes(), "path": None},
        {"bytes": None, "path": str(file)},
        str(file),
    ]
    batches = []
    for cell in cells:
        batches += read_examples(net(3), datasets.Dataset.from_dict({"image": [cell, cell]}), (2,))[0].batches
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_labels_of_a_table_beside_the_images(tmp_path):
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.tsv").write_text("".join(f"{number}.png\t{number % 3}\n" for number in range(4)))
    (found,) = read_examples(net(3), tmp_path, (4,))
    assert found.labels.tolist() == [int(file.stem) % 3 for file in found.shown]
    (tmp_path / "labels.tsv").write_text("0.png\t0\n")
    with pytest.raises(DataError, match=r"labels.tsv has no line for 3 of 4 images, such as 1.png"):
        read_examples(net(3), tmp_path, (4,))


def test_sentences_and_text_go_through_the_tokenizer(root, tmp_path):
    bert = tiny_bert()
    (found,) = read_examples(bert, root / "reviews.tsv", (6,), processor=root / "bert", length=4)
    assert found.kind == "sentences"
    assert found.batches[0]["input_ids"].shape == (6, 4)
    assert set(found.labels.tolist()) <= {0, 1}
    llama = tiny_llama()
    first, second = read_examples(llama, root / "story.txt", (6, 2), processor=root / "llama", length=16)
    assert first.kind == "text"
    assert [batch["input_ids"].shape for batch in first.batches] == [(4, 16), (2, 16)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "llama")
    expected = tokenizer((root / "story.txt").read_text())["input_ids"][: 8 * 16]
    blocks = torch.cat([batch["input_ids"] for part in (first, second) for batch in part.batches])
    assert blocks.flatten().tolist() == expected
    rows = datasets.Dataset.from_dict({"text": sentences(5), "label": [0, 1, 0, 1, 1]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.jsonl")
    for name in ("rows.parquet", "rows.csv", "rows.jsonl"):
        (found,) = read_examples(bert, tmp_path / name, (5,), processor=root / "bert")
        assert sorted(found.shown) == sorted(rows["text"])
        assert sorted(found.labels.tolist()) == [0, 0, 1, 1, 1]


def test_data_that_does_not_fit_says_what_to_do(root, tmp_path):
    bert, image_model = tiny_bert(), net(3)
    with pytest.raises(ModelError, match="how inputs of a SmallNet are made"):
        read_examples(small_net(), root / "digits", (4,))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration are not images, sentences or text alone"):
        config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        read_examples(transformers.T5ForConditionalGeneration(config), root / "story.txt", (4,))
    with pytest.raises(DataError, match="there is no tokenizer of the model at"):
        read_examples(bert, root / "reviews.tsv", (4,), processor=tmp_path)
    with pytest.raises(DataError, match="data is a list; a path"):
        read_examples(bert, ["a"], (1,))
    with pytest.raises(DataError, match="has 1 rows; two are needed"):
        read_examples(bert, datasets.Dataset.from_dict({"text": ["a"]}), (4,), processor=root / "bert")
    with pytest.raises(DataError, match="length is -1; it must be at least 1"):
        read_examples(bert, root / "reviews.tsv", (4,), processor=root / "bert", length=-1)
    with pytest.raises(DataError, match="examples is 0; it must be at least 1"):
        read_examples(bert, root / "reviews.tsv", (0, 0), processor=root / "bert")
    rows = datasets.Dataset.from_dict({"words": ["a", "b"]})
    with pytest.raises(DataError, match="no column text or sentence with sentences; name one of words"):
        read_examples(bert, rows, (2,), processor=root / "bert")
    with pytest.raises(DataError, match=r"no column 'word' \(did you mean 'words'\?\); it has words"):
        read_examples(bert, rows, (2,), processor=root / "bert", column="word")
    with pytest.raises(DataError, match="is no file of a kind that is read here"):
        (tmp_path / "rows.doc").write_text("a")
        read_examples(bert, tmp_path / "rows.doc", (2,), processor=root / "bert")
    with pytest.raises(DataError, match=r"has \d+ tokens; two blocks of 512 are needed at least"):
        read_examples(tiny_llama(), root / "reviews.tsv", (2,), processor=root / "llama")
    rows.to_parquet(tmp_path / "tables" / "train.parquet")
    with pytest.raises(DataError, match=r"has no split 'trein' \(did you mean 'train'\?\); it has train"):
        read_examples(bert, tmp_path / "tables", (2,), processor=root / "bert", split="trein")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    (tmp_path / "broken" / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"[ab].png is no image that can be read"):
        read_examples(image_model, tmp_path / "broken", (2,))
    whole = next((root / "digits").rglob("*.png")).read_bytes()
    for name in ("a.png", "b.png"):
        (tmp_path / "broken" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"[ab].png is no image that can be read"):
        read_examples(image_model, tmp_path / "broken", (2,))
    for texts in ([None, "a"], [1, 2]):
        with pytest.raises(DataError, match=r"has (None|[12]) where a text is wanted"):
            read_examples(bert, datasets.Dataset.from_dict({"text": texts}), (2,), processor=root / "bert")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(DataError, match="JSON parse error"):
        read_examples(bert, tmp_path / "bad.jsonl", (2,), processor=root / "bert")
    with pytest.raises(DataError, match="timm has no processor"):
        read_examples(image_model, root / "digits", (2,), processor=root / "bert")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin1") * 2)
    (tmp_path / "utf16.txt").write_text("one\ntwo\n", encoding="utf-16")
    for name, code in (("latin.txt", "latin1"), ("utf16.txt", "utf-16")):
        with pytest.raises(DataError, match=rf"{name} is no text in UTF-8 .* iconv -f {code} "):
            read_examples(bert, tmp_path / name, (2,), processor=root / "bert")


def test_data_that_is_empty_or_streamed_says_so(root, tmp_path):
    (tmp_path / "empty.json").touch()
    with pytest.raises(DataError, match=r"empty\.json is empty"):
        read_examples(tiny_bert(), tmp_path / "empty.json", (2,), processor=root / "bert")
    stream = datasets.Dataset.from_dict({"text": ["a"] * 4}).to_iterable_dataset()
    with pytest.raises(DataError, match="read as a stream, and has no length: take some rows"):
        read_examples(tiny_bert(), stream, (2,), processor=root / "bert")
    with pytest.raises(DataError, match="has None where an image is wanted: drop such rows"):
        read_examples(net(3), datasets.Dataset.from_dict({"image": [None, None]}), (2,))


@pytest.mark.parametrize(
    ("text", "column", "names"),
    [
        ('"text","label"\n"a, b",1\n"c",0\n', None, ["text", "label"]),
        ("Review Text,Sentiment\nfilm,1\nplay,0\n", None, ["Review Text", "Sentiment"]),
        ("Review Text,Sentiment\na film,good\nb film,bad\nc film,good\n", None, ["Review Text", "Sentiment"]),
        ("my text,my class\na film,good\n", "my text", ["my text", "my class"]),
        ("text,label\na film,good\n", None, ["text", "label"]),
        ("a film,1\nb film,0\n", None, None),
        ('"a film","1"\n"b film","0"\n', None, None),
        ("good,positive\nbad,negative\nfine,positive\n", None, None),
        ("a film,good\nb film,bad\nc film,good\n", None, None),
        ("one sentence,its other\na film,a play\nb film,b play\n", None, None),
    ],
)
def test_the_first_line_of_a_table_has_names_or_is_a_row(text, column, names, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    found = rows_of(tmp_path / "rows.csv", None, None, column)
    assert found.column_names == (names or ["text", "label"])
    assert len(found) == len(text.splitlines()) - (names is not None)


def test_cells_are_what_is_written(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nNone,1\nNA,0\n,1\n")
    assert list(rows_of(tmp_path / "rows.csv", None, None)["text"]) == ["None", "NA", None]
    (tmp_path / "rows.csv").write_text("text,label\nGood film, but long,1\n")
    with pytest.raises(
        DataError, match="a row of 3 cells, and its first one has 2: .*write a text with commas in quotes"
    ):
        rows_of(tmp_path / "rows.csv", None, None)
    (tmp_path / "rows.txt").write_text("one\x0cpage\u2028of it\r\ntwo\n", encoding="utf-8")
    assert rows_of(tmp_path / "rows.txt", None, None)["text"] == ["one\x0cpage\u2028of it", "two"]


def test_marks_of_editors_are_no_text(root, tmp_path):
    rows = "text,label\r\n" + "".join(f'"{text}",{index % 2}\r\n' for index, text in enumerate(sentences(4)))
    for name, text in (("rows.csv", rows), ("rows.txt", "\r\n".join(sentences(4)))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        (found,) = read_examples(tiny_bert(), tmp_path / name, (4,), processor=root / "bert")
        assert sorted(found.shown) == sorted(sentences(4))


def test_images_of_16_bits_keep_their_range(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for name, pixels in (("narrow", (values * 4).astype(np.uint8)), ("wide", values * 4 * 256 + 77)):
        (tmp_path / name).mkdir()
        for file in ("a.png", "b.png"):
            Image.fromarray(pixels).save(tmp_path / name / file)
    narrow, wide = (read_examples(net(3), tmp_path / name, (2,))[0].batches[0] for name in ("narrow", "wide"))
    assert torch.equal(narrow, wide)


def test_images_come_the_right_side_up_and_others_are_refused(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for name in ("turned", "upright"):
        (tmp_path / name).mkdir()
        for file in ("a.png", "b.png"):
            exif = Image.Exif()
            exif[274] = 6 if name == "turned" else 1  # to be shown turned to the right
            image = Image.fromarray(np.rot90(pixels) if name == "turned" else pixels)
            image.save(tmp_path / name / file, exif=exif)
    turned, upright = (read_examples(net(3), tmp_path / name, (2,))[0].batches[0] for name in ("turned", "upright"))
    assert torch.equal(turned, upright)
    for kind, message in ((np.float32, "floating-point numbers"), (np.int32, "more than 16 bits")):
        Image.fromarray(pixels.astype(kind) * 1000).save(tmp_path / "upright" / "c.tiff")
        with pytest.raises(DataError, match=f"c.tiff is no image that can be read: its pixels .*{message}"):
            read_examples(net(3), tmp_path / "upright", (3,))


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_quantizes_images(root, tmp_path):
    out = tmp_path / "small"
    bits = ("--weight-bits", 4, "--activation-bits", 8)
    bits += ("--report", tmp_path / "report.html")
    text, _ = run("quantize", root / "timm", "--data", root / "digits", *bits, "--examples", 8, "--output", out)
    assert "accuracy %" in text
    assert "times smaller" in text
    assert f"wrote {out}" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Bounds calibrated with 8 images, in" in page
    assert "to fit the outputs of the float model on the same, in" in page
    assert "hf_daq.from_pretrained(&#34;small&#34;)" in page
    assert str(tmp_path) not in page
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert hf_daq.inspect(out).packed
    card = (out / "README.md").read_text()
    assert "8 of digits" in card
    assert "agreement with float" in card
    assert str(tmp_path) not in card
    assert str(root) not in card
    found, said = run("evaluate", out, "--data", root / "digits", "--float", root / "timm", "--json")
    assert "8 of digits calibrated this model, and may be among these" in said
    found = json.loads(found)
    (all_of_them,) = read_examples(model, root / "digits", (1000,))
    with torch.no_grad():
        right = torch.cat([model(batch) for batch in all_of_them.batches]).argmax(1) == all_of_them.labels
    assert found["accuracy"] == pytest.approx(100 * right.float().mean().item())
    args = ("--data", root / "digits", "--report", tmp_path / "alone.html", "--json")
    alone = json.loads(run("evaluate", out, *args)[0])
    assert f"{alone['accuracy']:.2f}" in (tmp_path / "alone.html").read_text(encoding="utf-8")
    assert alone["accuracy"] == found["accuracy"]
    assert "kl" not in alone


@pytest.mark.parametrize(
    ("to", "file"), [("trainable", "model.safetensors"), pytest.param("onnx", "model.onnx", marks=pytest.mark.slow)]
)
def test_the_command_quantizes_a_text_classifier(root, tmp_path, to, file):
    data = ("--data", root / "reviews.tsv", "--examples", 12)
    text, _ = run("quantize", root / "bert", *data, "--bits", 8, "--to", to, "--reconstruct", "1m", "-o", tmp_path)
    assert "24" not in text.splitlines()[0]
    assert "12 examples, 12 others" in text
    assert (tmp_path / file).is_file()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token == "[PAD]"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.daq_config.packed == (to != "trainable")
    assert "accuracy" in run("evaluate", tmp_path, *data)[0]


def test_an_export_that_fails_leaves_the_folder_as_it_was(root, tmp_path, monkeypatch):
    transformers.BertForSequenceClassification.from_pretrained(root / "bert").bfloat16().save_pretrained(
        tmp_path / "bert"
    )
    word_tokenizer(tmp_path / "bert")
    command = ("quantize", tmp_path / "bert", "--data", root / "reviews.tsv", "--examples", 12, "--reconstruct", 0)
    command += ("--to", "onnx", "-o", tmp_path / "out")
    assert "in float32, which the ONNX file computes in" in run(*command, "--bits", 8)[1]

    def contents():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fails(*args, **kwargs):
        raise ExportError("it differs")

    before = contents()
    assert "model.onnx" in before
    assert transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.float32
    monkeypatch.setattr(hf_daq, "export_onnx", fails)
    assert "it differs" in run(*command, "--bits", 4, code=1)[1]
    assert contents() == before


def test_exports_of_an_earlier_model_do_not_stay_in_the_folder(root, tmp_path):
    data = ("--data", root / "story.txt", "--length", 16, "--examples", 8, "--reconstruct", 0)
    command = ("quantize", root / "llama", *data, "-o", tmp_path, "--weight-bits")
    exports = [tmp_path / name for name in ("model.gguf", "model.onnx", "model.onnx.data")]
    for to, weight_bits in (("packed", 4), ("compressed-tensors", 8)):
        for file in exports:
            file.write_bytes(b"")
        run(*command, weight_bits, "--to", to)
        assert not any(file.exists() for file in exports)
        assert (tmp_path / "README.md").exists() == (to == "packed")
    (tmp_path / "README.md").write_text("Mine.")
    assert "README.md stays as it is" in run(*command, 8, "--to", "compressed-tensors")[1]
    assert (tmp_path / "README.md").read_text() == "Mine."
    assert "perplexity" in run("evaluate", tmp_path, *data[:-2], "--float", root / "llama")[0]


def test_models_that_take_other_inputs_cannot_be_compared(root, tmp_path):
    run("quantize", root / "timm", "--data", root / "digits", "--bits", 8, "--reconstruct", 0, "-o", tmp_path)
    other = ("--data", root / "digits", "--float", root / "bert")
    assert "does not take the inputs of" in run("evaluate", tmp_path, *other, code=1)[1]


def test_the_command_quantizes_a_language_model(root, tmp_path):
    data = ("--data", root / "story.txt", "--length", 16, "--examples", 8)
    bits = ("--weight-bits", 4, "--group-size", 16, "--reconstruct", 0)
    found = json.loads(run("quantize", root / "llama", *data, *bits, "--output", tmp_path, "--json")[0])
    assert found["seconds"].keys() == {"calibrate"}
    assert found["comparison"]["perplexity"] > 1
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).daq_config.group_size == 16
    assert "perplexity" in run("evaluate", root / "llama", *data)[0]


def test_wrong_usage_of_the_command(root, tmp_path):
    model, data = root / "timm", ("--data", root / "digits", "-o", tmp_path / "out")
    assert "how many bits?" in run("quantize", model, *data, code=2)[1]
    assert (
        "--runtime is for --to onnx" in run("quantize", model, *data, "--bits", 4, "--runtime", "openvino", code=2)[1]
    )
    assert "is no time such as 5m" in run("quantize", model, *data, "--bits", 4, "--reconstruct", "soon", code=2)[1]
    same = ("--data", root / "digits", "-o", model)
    assert "is the folder that is read" in run("quantize", model, *same, "--bits", 4, code=2)[1]
    below = ("--data", root / "digits", "-o", "/proc/out", "--bits", 4)
    assert "/proc/out cannot be written" in run("quantize", model, *below, code=2)[1]
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(unlabelled / name)
    report = ("--report", tmp_path / "report.html")
    assert (
        "is about a model that hf_daq quantized"
        in run("evaluate", model, "--data", root / "digits", *report, code=2)[1]
    )
    assert "--float MODEL compares it" in run("evaluate", model, "--data", unlabelled, code=1)[1]
    file = ("quantize", model, *data)
    assert "is not a decoder" in run(*file, "--weight-bits", 4, "--to", "gguf", code=1)[1]
    assert "is no model of transformers" in run(*file, "--bits", 4, "--to", "compressed-tensors", code=1)[1]
    file = ("quantize", root / "llama", *data, "--to", "gguf")
    assert "llama.cpp has no such inputs" in run(*file, "--bits", 4, code=1)[1]
    assert "holds multiples of 32" in run(*file, "--weight-bits", 4, code=1)[1]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    decoder.save_pretrained(tmp_path / "words")
    word_tokenizer(tmp_path / "words")
    file = ("quantize", tmp_path / "words", *data, "--to", "gguf")
    assert "holds a tokenizer 'WordLevel'" in run(*file, "--weight-bits", 4, code=1)[1]
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    assert "no weights in safetensors format" in run("quantize", tmp_path / "pickled", *data, "--bits", 4, code=1)[1]
    assert not (tmp_path / "out").exists()


def test_times():
    assert [minutes(text) for text in ("5m", "90s", "2h", "3", "0.5m", None)] == [5, 1.5, 120, 3, 0.5, None]
