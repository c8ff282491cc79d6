"""compare: the answers of a model beside those of the float model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import images, small_net, small_timm
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq.errors import ModelError


def quantized(model, batch, **bits):
    hf_daq.apply_daq(model, **bits)
    with hf_daq.calibrate(model, check=False):
        model(**batch) if isinstance(batch, dict) else model(batch)
    return model


def both(bits=2):
    reference = small_timm().eval()
    return quantized(copy.deepcopy(reference), images(16, 64), bits=bits), reference


def test_figures_of_images_are_those_of_the_definitions():
    model, reference = both()
    x = images(40, 64, seed=3)
    with torch.no_grad():
        q, y = (network.eval()(x).double().log_softmax(1) for network in (model, reference))
    labels = torch.where(torch.arange(40) % 2 == 0, y.argmax(1), 0)
    found = hf_daq.compare(model, reference, [x[:25], x[25:]], labels=labels)
    assert found.examples == found.count == 40
    assert found.unit == "example"
    assert found.kl == pytest.approx(F.kl_div(q, y, log_target=True, reduction="batchmean").item(), rel=1e-5)
    same = q.argmax(1) == y.argmax(1)
    assert found.agreement == pytest.approx(100 * same.float().mean().item())
    assert found.accuracy == pytest.approx(100 * (q.argmax(1) == labels).float().mean().item())
    assert found.reference_accuracy == pytest.approx(100 * (y.argmax(1) == labels).float().mean().item())
    assert [entry.example for entry in found.differences] == (~same).nonzero().flatten().tolist()
    for entry in found.differences:
        assert entry.answer == q[entry.example].argmax()
        assert entry.reference_answer == y[entry.example].argmax()
        assert entry.label == labels[entry.example]
    assert found.perplexity is found.cosine is None
    with torch.no_grad():
        outputs = [network.eval()(x).double() for network in (model, reference)]
    noise = (outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum()
    assert found.sqnr == pytest.approx(-10 * noise.log10().item(), abs=1e-3)


def test_a_model_agrees_with_itself():
    _, reference = both()
    found = hf_daq.compare(reference, copy.deepcopy(reference), [images(8, 64)])
    assert (found.agreement, found.differences, found.accuracy) == (100, (), None)
    assert found.sqnr > 100
    assert abs(found.kl) < 1e-6


def test_without_a_reference_the_own_float_weights_are_compared():
    model, reference = both()
    x = images(12, 64, seed=4)
    own, other = hf_daq.compare(model, None, [x]), hf_daq.compare(model, reference, [x])
    assert own.kl == pytest.approx(other.kl, rel=1e-4)
    assert own.agreement == other.agreement
    assert own.kl > 1e-5


def test_language_models_predict_the_next_token():
    reference = tiny_llama().eval()
    ids = tokens(4, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = quantized(copy.deepcopy(reference), {"input_ids": ids}, weight_bits=2)
    found = hf_daq.compare(model, reference, [batch])
    with torch.no_grad():
        loss, float_loss = model.eval()(**batch).loss.item(), reference(**batch).loss.item()
    assert found.unit == "token"
    assert found.count == int(mask[:, 1:].sum())
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(float_loss), rel=1e-5)
    assert found.accuracy is None
    assert found.differences == ()


def test_padding_does_not_count():
    reference = tiny_llama().eval()
    model = quantized(copy.deepcopy(reference), {"input_ids": tokens()}, weight_bits=2)
    ids = tokens(2, 8, seed=5)
    padded = {"input_ids": F.pad(ids, (0, 4)), "attention_mask": F.pad(torch.ones_like(ids), (0, 4))}
    long, short = (hf_daq.compare(model, reference, [batch]) for batch in (padded, {"input_ids": ids}))
    assert long.count == short.count == 16
    assert long.kl == pytest.approx(short.kl, rel=1e-4)


def test_outputs_that_are_no_logits_have_a_cosine():
    reference = small_timm().eval()
    reference.reset_classifier(0)
    model = quantized(copy.deepcopy(reference), images(8, 64), bits=3)
    x = images(8, 64, seed=2)
    found = hf_daq.compare(model, reference, [x])
    with torch.no_grad():
        wanted = F.cosine_similarity(model.eval()(x), reference(x)).mean().item()
    assert found.cosine == pytest.approx(wanted, rel=1e-5)
    assert found.kl is found.agreement is None


def test_a_single_number_has_more_than_a_sign():
    reference = small_timm().eval()
    reference.reset_classifier(1)
    with torch.no_grad():
        reference.get_classifier().bias.fill_(5.0)
    model = quantized(copy.deepcopy(reference), images(8, 64), bits=2)
    x = images(8, 64, seed=2)
    found = hf_daq.compare(model, reference, [x[:3], x[3:]])
    with torch.no_grad():
        y, wanted = model.eval()(x), reference(x)
    assert found.cosine == pytest.approx(1)
    assert found.sqnr == pytest.approx(-20 * ((y - wanted).norm() / wanted.norm()).log10().item(), abs=1e-3)
    assert found.sqnr < 60


def test_models_are_left_as_they_were():
    model, reference = both()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hf_daq.compare(model, reference, [images(4, 64)])
    assert model.training
    assert not reference.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_card_gets_the_figures():
    model, reference = both()
    x = images(8, 64)
    with torch.no_grad():
        found = hf_daq.compare(model, reference, [x], labels=reference(x).argmax(1))
    results = hf_daq.Result.from_comparison(found, "photographs", "held back")
    assert [result.metric for result in results] == ["accuracy", "agreement with float", "KL divergence from float"]
    assert results[0].float_value == 100
    assert hf_daq.CardFacts.from_dict(hf_daq.CardFacts(results=results).to_dict()).results == results


def test_the_table_fits_a_terminal():
    model, reference = both()
    text = str(hf_daq.compare(model, reference, [images(4, 64)], labels=torch.tensor([0, 1, 2, 3])))
    assert "4 examples" in text
    assert "same first answer %" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_cannot_be_compared_is_refused():
    model, reference = both()
    x = images(4, 64)
    with pytest.raises(hf_daq.DaqError, match=r"needs a list of batches"):
        hf_daq.compare(model, reference, x)
    with pytest.raises(hf_daq.DaqError, match=r"labels have the shape \(3,\), and there are 4 examples"):
        hf_daq.compare(model, reference, [x], labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(hf_daq.DaqError, match=r"labels is a list of tensors: write labels=torch.cat"):
        hf_daq.compare(model, reference, [x], labels=[torch.zeros(4, dtype=torch.long)])
    with pytest.raises(hf_daq.DaqError, match=r"does not take batches of 2 values"):
        hf_daq.compare(model, reference, [(x, torch.zeros(4))])
    with pytest.raises(hf_daq.DaqError, match=r"pass the float model, hf_daq.compare\(model, float_model"):
        hf_daq.compare(hf_daq.pack(copy.deepcopy(model)), None, [x])
    with pytest.raises(hf_daq.DaqError, match=r"outputs of the two models have shapes"):
        hf_daq.compare(model, small_net(), [x])
    with pytest.raises(hf_daq.DaqError, match=r"outputs have NaN or infinite values"):
        hf_daq.compare(model, reference, [torch.full_like(x, torch.nan)])
    bert = tiny_bert()
    batch = {"input_ids": tokens(), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(hf_daq.DaqError, match=r"labels have the shape \(3,\), and answers"):
        hf_daq.compare(bert, copy.deepcopy(bert), [batch])


def test_a_model_without_a_tensor_is_refused():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return "words"

    with pytest.raises(hf_daq.DaqError, match=r"no tensor of real numbers"):
        hf_daq.compare(Words(), Words(), [torch.zeros(1, 2)])


def test_labels_that_are_no_classes_are_refused():
    model = small_timm()
    count = model(images(4)).shape[1]
    for label, words in ((count, f"label {count} is none of the {count} classes"), (-1, "label -1 is none")):
        with pytest.raises(hf_daq.DaqError, match=words):
            hf_daq.compare(model, copy.deepcopy(model), [images(4)], labels=torch.full((4,), label))
    with pytest.raises(hf_daq.DaqError, match="numbers of classes are wanted"):
        hf_daq.compare(model, copy.deepcopy(model), [images(4)], labels=torch.zeros(4))
    figures = [
        hf_daq.compare(model, copy.deepcopy(model), [images(4)], labels=labels).accuracy
        for labels in ([0, 1, 0, 1], torch.tensor([0, 1, 0, 1], dtype=torch.uint8))
    ]
    assert figures[0] == figures[1] is not None


class Detector(nn.Module):
    """Boxes of the images, as detectors of torchvision give them; `more` is how many there are besides."""

    def __init__(self, more=0):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.more = more

    def forward(self, x):
        boxes = self.third(self.second(self.first(x).relu()).relu())
        return [{"boxes": boxes[: len(boxes) // 2 + self.more]}, {"boxes": boxes[len(boxes) // 2 :]}]


def test_boxes_of_a_detector_are_no_logits():
    model, x = Detector(), torch.randn(16, 6)
    reference = copy.deepcopy(model)
    hf_daq.apply_daq(model, bits=8)
    with hf_daq.calibrate(model):
        model(x)
    found = hf_daq.compare(model, reference, [x])
    assert "cosine" in str(found)
    assert "KL" not in str(found)
    reference.more = 1
    with pytest.raises(ModelError, match="outputs of the two models have shapes"):
        hf_daq.compare(model, reference, [x])
