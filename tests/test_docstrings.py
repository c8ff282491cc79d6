"""The examples in the docstrings run."""

import copy
import inspect
import re
import textwrap

import pytest
import torch
from models import images, small_timm

import hf_daq

NAMES = ("plan", "DaqConfig", "apply_daq", "param_groups", "save_pretrained", "from_pretrained", "export_onnx")
NAMES += ("reconstruct", "reestimate_batch_norm", "report", "allocate")


def example(name):
    """The indented block below the first paragraph of a docstring."""
    doc = inspect.cleandoc(getattr(hf_daq, name).__doc__)
    return textwrap.dedent(re.search(r"\n\n((?:    .+\n)+)", doc)[1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "export_onnx")) for name in NAMES]
)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, batch = small_timm(), images(2, 32)
    if name not in ("plan", "DaqConfig", "apply_daq", "allocate"):
        hf_daq.apply_daq(model, bits=3)
        with hf_daq.calibrate(model):
            model(batch)
    if name == "from_pretrained":
        hf_daq.save_pretrained(model, "out")
    code = example(name)
    assert len(code.splitlines()) == 2
    exec(code, {"hf_daq": hf_daq, "torch": torch, "copy": copy, "model": model, "images": batch})
