"""A checkpoint of shards, through Accelerate's FSDP2: `python -m torch.distributed.run --nproc-per-node N
tests/programs/sharded_checkpoint.py FOLDER`. Two processes train and write it, any other number opens it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from accelerate import Accelerator
from fsdp_on_cpu import launched_with_fsdp2
from text_models import calibrated, logits, tiny_llama, tokens
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaForCausalLM

import hf_daq
from hf_daq import DaqConfig

CONFIG = DaqConfig(weight_bits=4, activation_bits=8, weight_granularity="group", group_size=16)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int) -> None:
    own = tokens(6)[rank::world]
    model.train()(input_ids=own, labels=own).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def main(folder: Path) -> None:
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 2:
        model = calibrated(tiny_llama(), CONFIG)
        model.save_pretrained(folder / "start", is_main_process=rank == 0)
    else:
        model = LlamaForCausalLM.from_pretrained(folder / "start")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(hf_daq.param_groups(model, lr=1e-2)))
    if world == 2:
        step(model, optimizer, rank, world)
        accelerator.save_state(str(folder / "checkpoint"))
    else:
        accelerator.load_state(str(folder / "checkpoint"))
    found = {"state": full_state(model), "logits": logits(model)}
    step(model, optimizer, rank, world)
    found["one step later"] = full_state(model)
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    launched_with_fsdp2("LlamaDecoderLayer", "SHARDED_STATE_DICT")
    main(Path(sys.argv[1]))
