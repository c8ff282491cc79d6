"""A checkpoint that two processes wrote in shards, through torch.distributed.checkpoint, opened by other numbers of them."""

from pathlib import Path

import pytest
import sharded_checkpoint
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import merge_fsdp_weights
from processes import Program
from safetensors.torch import load_file
from text_models import logits
from transformers import LlamaForCausalLM

from hf_daq.nn.layers import quantized_layers

SHARDS = Path("checkpoint", "pytorch_model_fsdp_0")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """folder, and what two processes ended with."""
    return finished(tmp_path_factory.mktemp("shards"), 2)


def finished(folder, ranks):
    Program(Path(sharded_checkpoint.__file__), folder, ranks=ranks).finish()
    return folder, torch.load(folder / f"{ranks}.pt")


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_three_processes_open_what_two_wrote_and_go_on(ended):
    folder, two = ended
    _, three = finished(folder, 3)
    equal(two["state"], three["state"])
    assert torch.equal(two["logits"], three["logits"])
    later = "one step later"  # with the state of the optimizer
    assert not torch.equal(two["state"]["lm_head.weight"], two[later]["lm_head.weight"])
    torch.testing.assert_close(two[later], three[later], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # whoever opens it in one process is told
def test_one_process_opens_what_two_wrote(ended):
    folder, two = ended
    model, twin = (LlamaForCausalLM.from_pretrained(folder / "start") for _ in range(2))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / SHARDS)
    model.load_state_dict(state["model"])
    equal(model.state_dict(), two["state"])
    assert torch.equal(logits(model), two["logits"])
    twin.load_state_dict(two["state"])
    layers = zip(quantized_layers(model).values(), quantized_layers(twin).values(), strict=True)
    assert all(torch.equal(one.codes(), other.codes()) for one, other in layers)


def test_shards_become_one_file(ended, tmp_path):
    """With `accelerate merge-weights`."""
    folder, two = ended
    merge_fsdp_weights(str(folder / SHARDS), str(tmp_path))
    equal(load_file(tmp_path / "model.safetensors"), two["state"])
