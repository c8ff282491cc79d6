"""Decoders exported with their cache generate in ONNX Runtime; large models have their tensors in a second file."""

import numpy as np
import pytest
import torch
from models import images, small_net
from text_models import calibrated, tiny_bert, tiny_llama, tokens
from torch import nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CheckpointError, ExportError
from hf_daq.export import onnx_cache, onnx_files
from hf_daq.export.onnx import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def generate(path, ids, mask, count):
    """Greedy, as a user of ONNX Runtime would write it."""
    session = ort.InferenceSession(path)
    empty = {entry.name: entry.shape for entry in session.get_inputs() if entry.name.startswith("past_key_values")}
    past = {name: np.zeros((len(ids), heads, 0, size), np.float32) for name, (_, heads, _, size) in empty.items()}
    new, found = ids, []
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -new.shape[1] :]
        feed = {"input_ids": new, "attention_mask": mask, "position_ids": positions} | past
        logits, *present = session.run(None, feed)
        new = logits[:, -1:].argmax(-1)
        past = dict(zip(past, present, strict=True))
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        found.append(new)
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    "largest",
    [
        pytest.param(onnx_files.LARGEST_FILE, marks=pytest.mark.slow, id="one file"),
        pytest.param(10_000, id="two files"),
    ],
)
def test_greedy_tokens_are_those_of_pytorch(largest, tmp_path, monkeypatch):
    """Of prompts of two lengths, the shorter one padded."""
    monkeypatch.setattr(onnx_files, "LARGEST_FILE", largest)
    model = calibrated(tiny_llama(), DaqConfig(weight_bits=4, group_size=16)).eval()
    path, ids, mask = tmp_path / "a.onnx", tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    report = export_onnx(model, path, {"input_ids": tokens(4, 9)}, cache=True)
    assert report.runtimes["onnxruntime"].error < 1e-6
    assert report.inputs["attention_mask"] == ("batch", "total_sequence")
    assert report.inputs["past_key_values.1.value"] == ("batch", 1, "past_sequence", 16)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None)[:, 5:]
    assert (generate(path, ids.numpy(), mask.numpy(), 64) == expected.numpy()).all()
    assert model.config.use_cache
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert report.bytes == sum(files.values())
    assert set(files) == ({"a.onnx"} if largest > 10_000 else {"a.onnx", "a.onnx.data"})
    about = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    assert about["bits"] == "W4"
    with pytest.raises(CheckpointError, match="is an ONNX file"):
        hf_daq.inspect(path)


def test_what_has_no_cache_is_refused(tmp_path, monkeypatch):
    path, x = tmp_path / "a.onnx", {"input_ids": tokens(4, 9)}
    llama = calibrated(tiny_llama(), DaqConfig(weight_bits=4)).eval()
    net = hf_daq.apply_daq(small_net(), bits=4)
    with hf_daq.calibrate(net):
        net(images(8))
    with pytest.raises(ExportError, match="is for decoders of transformers, not"):
        export_onnx(net.eval(), path, images(8), cache=True)
    bert = calibrated(tiny_bert(), DaqConfig(weight_bits=4)).eval()
    with pytest.raises(ExportError, match="BertForSequenceClassification"):
        export_onnx(bert, path, x, cache=True)
    for inputs in (tokens(4, 9), {"input_ids": tokens(4, 3)}, x | {"labels": tokens(4, 9)}):
        with pytest.raises(ExportError, match="needs texts of 4 tokens or more"):
            export_onnx(llama, path, inputs, cache=True)
    for present, words in (({}, "filled no cache"), ({"past_key_values.0.key": None}, "keeps its keys and values")):
        monkeypatch.setattr(onnx_cache, "_run", lambda *args, found=present: (None, found))
        with pytest.raises(ExportError, match=words):
            export_onnx(llama, path, x, cache=True)
    assert not list(tmp_path.iterdir())


def test_a_large_model_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LARGEST_FILE", 1000)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3)), torch.randn(8, 16)
    hf_daq.apply_daq(model.eval(), weight_bits=4, activation_bits=8)
    with hf_daq.calibrate(model):
        model(x)
    (tmp_path / "a.onnx").write_text("old")
    report = export_onnx(model, tmp_path / "a.onnx", x, runtime="openvino")
    assert all(found.error < 1e-5 for found in report.runtimes.values())
    found = ort.InferenceSession(tmp_path / "a.onnx").run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
