"""How packed layers choose the way in which they compute."""

import logging

import pytest
import torch
from torch import nn

import hf_daq
from hf_daq.nn import trust
from hf_daq.nn.paths import PATHS, Path, bit_for_bit


def test_the_first_way_that_serves_is_taken(monkeypatch):
    model = hf_daq.pack(hf_daq.apply_daq(nn.Sequential(nn.Linear(6, 4)), weight_bits=3, first_last_bits=3))
    layer, x = model[0], torch.randn(2, 6)
    negated = Path(lambda layer, x: len(x) == 2, lambda layer, x: -x[:, :4])
    ways = {"negated": negated, **PATHS}
    monkeypatch.setattr("hf_daq.nn.paths.PATHS", ways)
    assert layer.path(x) == "negated"
    assert torch.equal(model(x), -x[:, :4])
    assert layer.path(x[:1]) == "unpacked"
    with bit_for_bit():
        assert layer.path(x) == "unpacked"
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), -x[:, :4])


@pytest.mark.parametrize(
    "wrong", [lambda: torch.tensor([1.0, 2.1]), lambda: torch.tensor([1.0, torch.nan]), lambda: 1 / 0]
)
def test_a_way_that_gives_other_values_is_named_once_and_not_taken(wrong, monkeypatch, caplog):
    monkeypatch.setattr(trust, "_agreed", {})
    right = torch.tensor([1.0, 2.0])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert trust.agrees("right", lambda: right + 1e-7, lambda: right, 1e-6, "a kernel")
            assert not trust.agrees("wrong", wrong, lambda: right, 1e-6, "a kernel")
    (message,) = caplog.messages
    assert message.startswith("a kernel gives other values on this machine (error ")
