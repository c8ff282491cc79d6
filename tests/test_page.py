"""The page that `report` writes: one file that asks for nothing, whose figures are those of compare and health."""

import copy
import re
from html.parser import HTMLParser

import pytest
import torch
from models import SmallNet, images, small_net, small_timm
from PIL import Image
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq.errors import CalibrationError, ConfigError, ModelError

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "wbr", "path", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags with their attributes, and the text; every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("dt", "dd", "p", "h3", "td") else ""

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data

    def having(self, key):
        return [attributes[key] for _, attributes in self.tags if key in attributes]


def quantized(model, batch, **kwargs):
    model = hf_daq.apply_daq(copy.deepcopy(model), **(kwargs or {"bits": 2}))
    with hf_daq.calibrate(model, check=False):
        model(**batch) if isinstance(batch, dict) else model(batch)
    return model


@torch.no_grad()
def centered(model, head, batch):
    """With answers of all kinds, as a random network has not."""
    output = model(**batch).logits if isinstance(batch, dict) else model(batch)
    layer = model.get_submodule(head)
    layer.bias -= output.mean(0)
    return model


def timm_pair():
    reference = centered(small_timm(), "fc", images(40, 64, seed=9))
    return quantized(reference, images(8, 64), bits=1), reference


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path):
    model, reference = timm_pair()
    page = Page(hf_daq.report(model, reference, [images(12, 64, seed=3)], tmp_path / "new" / "report.html"))
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.having("src"))
    assert all(target.startswith("#") for target in page.having("href"))
    assert not re.search(r"url\(|@import|https?:", page.source)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert {target[1:] for target in page.having("href")} <= set(page.having("id"))


def test_figures_are_those_of_compare_and_health_and_summary(tmp_path):
    model, reference = timm_pair()
    batches, labels = [images(12, 64, seed=3), images(5, 64, seed=4)], torch.arange(17) % 10
    page = Page(hf_daq.report(model, reference, batches, tmp_path / "report.html", labels=labels))
    compared = hf_daq.compare(model, reference, batches, labels=labels)
    health, summary = hf_daq.health(model, batches[0]), hf_daq.summary(model, batches[0])
    for figure in (f"{compared.kl:.4f}", f"{compared.accuracy:.2f}", f"{compared.reference_accuracy:.2f}"):
        assert figure in page.text
    same = round(compared.agreement * 17 / 100)
    assert f"the same first answer as the float model for {same} of 17 examples" in page.text
    assert f"{summary.totals['compression']:.1f} times smaller" in page.text.lower()
    assert health.as_a_whole() in page.text
    for finding in health.findings:
        assert f"{finding.layer}: {finding.problem}" in page.text
    for layer in summary.layers:
        assert layer.name in page.text
        assert f"{layer.output_sqnr:.1f}" in page.text
    worst = min(summary.layers, key=lambda layer: layer.output_sqnr)
    assert f"1{worst.name} " in page.text


def test_pictures_that_differ_are_shown_with_both_answers(tmp_path):
    model, reference = timm_pair()
    batches = [images(20, 64, seed=3), images(20, 64, seed=4)]
    names = [f"kind {index}" for index in range(10)]
    page = Page(hf_daq.report(model, reference, batches, tmp_path / "report.html", names=names))
    compared = hf_daq.compare(model, reference, batches)
    assert compared.differences
    assert len(page.having("src")) == min(8, len(compared.differences))
    log, target = (network(torch.cat(batches)).log_softmax(1) for network in (model, reference))
    divergence = (target.exp() * (target - log)).sum(1)
    first = max(compared.differences, key=lambda difference: divergence[difference.example])
    shares = [100 * values.exp()[first.example].max().item() for values in (target, log)]
    assert (
        f"float kind {first.reference_answer} {shares[0]:.1f} % quantized kind {first.answer} {shares[1]:.1f} %"
        in page.text
    )


def test_pictures_are_as_they_were_before_their_normalization():
    from hf_daq.report.examples import Words

    model = small_timm()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    picture = torch.zeros(3, 64, 64)
    picture[0, :, :32], picture[2, :, 32:] = 0.8, 0.4
    uri, text = Words(model, None, None, None).of_input(0, ((picture - mean) / std)[None], 0)
    shown = decoded(uri)
    assert text == ""
    assert shown.size == (192, 192)
    assert shown.getpixel((40, 90)) == pytest.approx((204, 0, 0), abs=6)
    assert shown.getpixel((150, 90)) == pytest.approx((0, 0, 102), abs=6)


def decoded(uri):
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_files_and_sentences_are_shown_instead_of_inputs(tmp_path):
    model, reference = timm_pair()
    Image.new("RGB", (300, 100), (250, 10, 10)).save(tmp_path / "red.png")
    shown = [tmp_path / "red.png"] * 20
    page = Page(hf_daq.report(model, reference, [images(20, 64, seed=3)], tmp_path / "page.html", shown=shown))
    assert {decoded(source).size for source in page.having("src")} == {(224, 75)}
    shown = [f"example {number} {EVIL}" for number in range(20)]
    page = Page(hf_daq.report(model, reference, [images(20, 64, seed=3)], tmp_path / "page.html", shown=shown))
    assert page.having("src") == []
    assert EVIL in page.text


class Strange(SmallNet):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.add_module("<script>x", nn.Linear(16, 16))
        self.eval()

    def features(self, x):
        return self.get_submodule("<script>x")(super().features(x).movedim(1, -1)).movedim(-1, 1)


def test_whatever_comes_from_strangers_is_escaped(tmp_path):
    reference = centered(Strange(), "head", images(40, seed=9))
    model = quantized(reference, images(8), bits=1)
    page = Page(
        hf_daq.report(
            model,
            reference,
            [images(40, seed=5)],
            tmp_path / "report.html",
            names=[EVIL + str(number) for number in range(5)],
            title=EVIL,
            steps=[f"{EVIL} \x1b[31m\u202e"],
            saved=f'{EVIL}" onload="x',
        )
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>x" in page.text
    assert page.text.count(EVIL) >= 4
    assert not {"\x1b", "\u202e"} & set(page.source)
    assert page.having("onload") == []


class Tokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"word{number}" for number in ids)


def test_sentences_and_answers_of_a_classifier(tmp_path):
    reference = tiny_bert(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    reference = centered(reference, "classifier", {"input_ids": tokens(40, seed=9)})
    batches = [{"input_ids": tokens(24, seed=seed), "labels": torch.arange(24) % 2} for seed in (2, 3)]
    batches[0]["attention_mask"] = (torch.arange(7) < 5).long().expand(24, 7)
    model = quantized(reference, {"input_ids": tokens(8)}, bits=1)
    page = Page(hf_daq.report(model, reference, batches, tmp_path / "report.html", processor=Tokenizer()))
    compared = hf_daq.compare(model, reference, batches)
    assert compared.differences
    assert f"{compared.accuracy:.2f}" in page.text
    shown = 0
    for difference in compared.differences:
        batch, row = batches[difference.example // 24], difference.example % 24
        ids = batch["input_ids"][row][: 5 if difference.example < 24 else 7].tolist()
        words, answers = " ".join(f"word{number}" for number in ids), ["bad", "good"]
        first = f"{words} float {answers[difference.reference_answer]} "
        right = "right" if difference.reference_answer == difference.label else "wrong"
        shown += bool(re.search(rf"{first}\d+\.\d % {right} quantized {answers[difference.answer]} ", page.text))
    assert shown == min(8, len(compared.differences))


def test_tokens_of_a_language_model(tmp_path):
    reference = tiny_llama()
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(4, 12, seed=2), tokens(4, 12, seed=3))]
    model = quantized(reference, {"input_ids": tokens(8)}, bits=1)
    page = Page(hf_daq.report(model, reference, batches, tmp_path / "report.html", processor=Tokenizer()))
    compared = hf_daq.compare(model, reference, batches)
    assert f"{compared.perplexity:,.2f}" in page.text
    assert "what comes after the marked token" in page.text
    assert "import LlamaForCausalLM model = LlamaForCausalLM.from_pretrained(" in page.text
    assert "mark" in {tag for tag, _ in page.tags}
    assert re.search(r"word\d+ float word\d+ \d+\.\d % (right|wrong)? ?quantized word\d+ ", page.text)


def test_outputs_that_are_no_answers(tmp_path):
    reference = small_timm()
    reference.reset_classifier(0)
    model = quantized(reference, images(8, 64))
    page = Page(hf_daq.report(model, reference, [images(12, 64, seed=3)], tmp_path / "report.html"))
    found = hf_daq.compare(model, reference, [images(12, 64, seed=3)])
    assert f"{found.cosine:.4f}" in page.text
    assert "The least similar outputs" in page.text
    assert len(page.having("src")) == 8


def test_a_packed_model_and_what_is_there_already(tmp_path, monkeypatch):
    model, reference = timm_pair()
    batch = images(12, 64, seed=3)
    compared, model = hf_daq.compare(model, reference, [batch]), hf_daq.pack(model)
    health = hf_daq.health(model, batch)
    for name in ("compare", "examine"):
        monkeypatch.setitem(hf_daq.report.__globals__, name, None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "report.html"
    page = Page(hf_daq.report(model, reference, [batch], path, comparison=compared, health=health, title="Mine"))
    assert "Mine, W1A1" in page.text
    assert "Some layers" in page.text
    assert "Packed: weights are codes of a few bits" in page.text
    assert "As packed: " in page.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_reference_the_own_float_weights_answer(tmp_path):
    model, reference = timm_pair()
    batches = [images(20, 64, seed=3)]
    one, other = (
        Page(hf_daq.report(model, network, batches, tmp_path / "report.html")) for network in (None, reference)
    )
    assert one.having("src") == other.having("src")


def test_what_is_refused(tmp_path):
    model, reference = timm_pair()
    path = tmp_path / "report.html"
    with pytest.raises(ModelError, match=re.escape("report needs a list of batches: hf_daq.report(model")):
        hf_daq.report(model, reference, images(2, 64), path)
    with pytest.raises(ModelError, match="report needs a list of batches"):
        hf_daq.report(model, reference, [], path)
    with pytest.raises(ConfigError, match="shown has 1 entries, and there are 2 examples: pass one for each"):
        hf_daq.report(model, reference, [images(2, 64)], path, shown=["a"])
    with pytest.raises(ModelError, match="summary needs a quantized or packed model"):
        hf_daq.report(reference, reference, [images(2, 64)], path)
    with pytest.raises(CalibrationError, match="calibrate first"):
        hf_daq.report(hf_daq.apply_daq(small_net(), bits=2), small_net(), [images()], path)
    assert not path.exists()


def test_the_function_stays_where_the_folder_of_its_name_is():
    from hf_daq.report.health import health

    assert callable(hf_daq.report)
    assert hf_daq.health is health
