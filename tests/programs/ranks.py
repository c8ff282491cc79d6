"""What two processes do in tests/test_distributed.py: `python -m torch.distributed.run --nproc-per-node 2 tests/programs/ranks.py DIR`.

Each scenario writes what its rank ended with to DIR; the tests compare ranks with one another and with one process.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny
from models import images, small_net, small_timm
from peft import LoraConfig, get_peft_model
from text_models import logits, tiny_bert, tiny_llama, tokens
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainers import arguments, trainer_of

import hf_daq
from hf_daq import DaqConfig, DaqError
from hf_daq.nn.layers import quantized_layers

CONFIG = DaqConfig(weight_bits=3, activation_bits=4)
# Of inputs that are rounded, another order of sums moves one across a threshold now and then.
WEIGHTS_ONLY = DaqConfig(weight_bits=3)
STEPS = 3


def vit() -> nn.Module:
    return small_timm("test_vit", img_size=32, depth=2)


def batches(step: int) -> Tensor:
    """The joined batch of all ranks, shape (8, 3, 32, 32)."""
    return images(8, 32, seed=100 + step)


def targets(step: int) -> Tensor:
    return torch.randint(0, 10, (8,), generator=torch.Generator().manual_seed(step))


def share(joined: Tensor, rank: int, world: int) -> Tensor:
    return joined.chunk(world)[rank]


def calibrated_vit(rank: int = 0, world: int = 1) -> nn.Module:
    model = hf_daq.apply_daq(vit(), CONFIG)
    with hf_daq.calibrate(model):
        for step in range(2):
            model(share(batches(step), rank, world))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # SGD keeps rounding errors as small as they are; Adam would turn them into steps where a gradient is almost zero.
    return torch.optim.SGD(hf_daq.param_groups(model, lr=0.05, quantizer_lr=0.01, weight_decay=1e-4), momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    rank: int = 0,
    world: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    model.train()
    for step in steps:
        logits = model(share(batches(step), rank, world))
        backward(nn.functional.cross_entropy(logits, share(targets(step), rank, world)))
        optimizer.step()
        optimizer.zero_grad()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def sharded(model: nn.Module, **kwargs) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


# --------------------------------------------------------------------------------------------------------- scenarios


def calibration(rank: int, world: int) -> dict:
    return {"state": calibrated_vit(rank, world).state_dict()}


def calibration_of_unequal_shares(rank: int, world: int) -> dict:
    """Rank 0 brings both batches, rank 1 none."""
    model = hf_daq.apply_daq(vit(), CONFIG)
    with hf_daq.calibrate(model):
        for step in range(2 if rank == 0 else 0):
            model(batches(step))
    return {"state": model.state_dict()}


SHARES = [((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0, 1, 2, 3), ())]


def calibrated_net(seeds: Iterable[int]) -> nn.Module:
    model = hf_daq.apply_daq(small_net(), bits=3)
    with hf_daq.calibrate(model):
        for seed in seeds:
            model(images(seed=seed) * (seed + 1))
    return model


def calibration_of_shares_unlike_one_another(rank: int, world: int) -> dict:
    return {"states": [calibrated_net(shares[rank]).state_dict() for shares in SHARES]}


def reconstructed_vit(inputs: list[Tensor], rank: int = 0, world: int = 1) -> nn.Module:
    return hf_daq.reconstruct(calibrated_vit(rank, world), inputs)


def reconstruction(rank: int, world: int) -> dict:
    """The ranks share two batches; then rank 1 has none."""
    inputs = [batches(step) for step in range(2)]
    shares = [share(joined, rank, world) for joined in inputs]
    models = [reconstructed_vit(found, rank, world) for found in (shares, inputs if rank == 0 else [])]
    return {"states": [model.state_dict() for model in models]}


def ddp(rank: int, world: int, folder: Path) -> dict:
    accelerator = Accelerator(cpu=True)
    model = calibrated_vit(rank, world)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    states = []
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1), rank, world, accelerator.backward)
        states.append({k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()})
    if rank == 0:
        hf_daq.save_pretrained(accelerator.unwrap_model(model), folder)
    return {"states": states}


def gradient_accumulation(rank: int, world: int) -> dict:
    """Two halves of a share, one update."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = calibrated_vit(rank, world)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    model.train()
    for step in range(STEPS):
        inputs, labels = share(batches(step), rank, world), share(targets(step), rank, world)
        for part, label in zip(inputs.chunk(2), labels.chunk(2), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(part), label))
                optimizer.step()
                optimizer.zero_grad()
    return {"state": accelerator.unwrap_model(model).state_dict()}


def trained_by_ddp(rank: int, world: int, change: Callable[[nn.Module], object], **options: str) -> dict:
    """STEPS steps of a calibrated model that `change` did something to, with options of Accelerator."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    model = calibrated_vit(rank, world)
    change(model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    train(model, optimizer, rank=rank, world=world, backward=accelerator.backward)
    AcceleratorState._reset_state()
    return {"state": accelerator.unwrap_model(model, keep_fp32_wrapper=False).state_dict()}


def gradient_checkpointing(rank: int, world: int) -> dict:
    return trained_by_ddp(rank, world, lambda model: model.set_grad_checkpointing())


def ddp_in_bf16(rank: int, world: int) -> dict:
    return trained_by_ddp(rank, world, lambda model: None, mixed_precision="bf16")


def ddp_compiled(rank: int, world: int) -> dict:
    return trained_by_ddp(rank, world, lambda model: model.compile(fullgraph=True, backend="eager"))


def save_and_load_state(rank: int, world: int, folder: Path) -> dict:
    """Four steps; the last two once more, from the state after two."""
    accelerator = Accelerator(cpu=True)
    model = calibrated_vit(rank, world)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    train(model, optimizer, range(2), rank, world, accelerator.backward)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()  # the main process writes the model
    ends = []
    for _ in range(2):
        accelerator.load_state(str(folder))
        train(model, optimizer, range(2, 4), rank, world, accelerator.backward)
        ends.append({k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()})
    return {"ends": ends}


def fsdp(rank: int, world: int, folder: Path) -> dict:
    model = sharded(calibrated_vit(rank, world))
    train(model, optimizer_of(model), rank=rank, world=world)
    state = full_state(model)
    if rank == 0:
        hf_daq.save_pretrained(model, folder, state_dict=state)
    train(model, optimizer_of(model), rank=rank, world=world)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(state), options=options)  # which puts shards into the mapping
    return {"state": state, "loaded": full_state(model), "logits": model.eval()(batches(0))}


def fsdp_in_bf16(rank: int, world: int) -> dict:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(calibrated_vit(rank, world), mp_policy=policy)
    train(model, optimizer_of(model), rank=rank, world=world)
    return {"state": full_state(model)}


def fsdp_of_a_transformers_model(rank: int, world: int, folder: Path) -> dict:
    model = hf_daq.apply_daq(tiny_bert(), CONFIG)
    with hf_daq.calibrate(model):
        model(input_ids=share(tokens(8), rank, world))
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    model.train()
    labels = share(torch.tensor([0, 1] * 4), rank, world)
    model(input_ids=share(tokens(8), rank, world), labels=labels).loss.backward()
    optimizer.step()
    state = full_state(model)
    model.save_pretrained(folder, is_main_process=rank == 0, state_dict=dict(state))
    return {"state": state}


def trained_experts(rank: int, world: int, wrapped: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A mixture of experts, of which each rank's tokens reach some."""
    model = hf_daq.apply_daq(tiny.build("mixtral"), WEIGHTS_ONLY)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    with hf_daq.calibrate(model):
        model(input_ids=share(ids, rank, world))
    model = wrapped(model)
    optimizer = optimizer_of(model)
    for _ in range(2):
        own = share(ids, rank, world)
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _with_sharded_blocks(model: nn.Module) -> nn.Module:
    """That compute their activations once more for the backward."""
    newer = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def experts(rank: int, world: int) -> dict:
    model = trained_experts(rank, world, DistributedDataParallel)
    return {
        "state": model.module.state_dict(),
        "sharded": full_state(trained_experts(rank, world, _with_sharded_blocks)),
    }


ADAPTERS = [("daq", False), ("daq_bounds", True)]


def small_llama(packed: bool, rank: int = 0, world: int = 1) -> nn.Module:
    model = hf_daq.apply_daq(tiny_llama(), WEIGHTS_ONLY)
    with hf_daq.calibrate(model):
        model(input_ids=share(tokens(4), rank, world))
    return hf_daq.pack(model) if packed else model


def adapted(model: nn.Module, how: str) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=how)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def trained_adapters(model: nn.Module, rank: int = 0, world: int = 1) -> dict:
    """Loss and gradients of each step, and at last the logits."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    own, losses, gradients = share(tokens(4), rank, world), [], []
    for _ in range(2):
        loss = model.train()(input_ids=own, labels=own).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: whole(value.grad) for name, value in model.named_parameters() if value.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "gradients": gradients, "logits": logits(model)}


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def adapters(rank: int, world: int, folder: Path) -> dict:
    """Inside the quantizer, in sharded blocks. The last model is saved."""
    ended = {}
    for how, packed in ADAPTERS:
        base = small_llama(packed, rank, world)
        if (how, packed) == ADAPTERS[-1]:
            base.save_pretrained(folder / "base", is_main_process=rank == 0)
        model = adapted(base, how)
        _with_sharded_blocks(model.get_base_model())
        ended[how, packed] = trained_adapters(model, rank, world)
    model.save_pretrained(folder, state_dict=full_state(model), is_main_process=rank == 0)
    return ended | {"merge": message(model.merge_adapter)}


def monitored(rank: int, world: int) -> dict:
    """What Monitor finds in shards, and in the whole weights of a twin."""
    model, twin = (hf_daq.apply_daq(tiny.build("mixtral"), bits=3, group_size=16) for _ in range(2))
    own = share(tokens(4), rank, world) % tiny.VOCABULARY
    for each in (model, twin):
        with hf_daq.calibrate(each):
            each(input_ids=own)
    model = _with_sharded_blocks(model)
    optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.5, quantizer_lr=0.01))
    monitors = [hf_daq.Monitor(each, every=3) for each in (model, twin)]
    for _ in range(3):
        model.train()(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = -group["lr"]  # back again
        optimizer.zero_grad()
        twin.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        values = [monitor.step() for monitor in monitors]
    return {"layers": [monitor.history[0]["layers"] for monitor in monitors], "values": values}


def trained_by_trainer(folder: Path, batch_size: int) -> nn.Module:
    model = hf_daq.apply_daq(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), WEIGHTS_ONLY)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with hf_daq.calibrate(model):
        model(input_ids=tokens()[rank::ranks])
    order = {"train_sampling_strategy": "sequential"}  # shuffled differently by one process and by two
    args = arguments(
        folder, max_steps=4, per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.05, **order
    )
    trainer = trainer_of(model, args)
    trainer.model_accepts_loss_kwargs = False  # or Trainer takes the loss, a mean, for a sum over both processes
    trainer.train()
    trainer.save_model(folder)
    return model


def trainer(rank: int, world: int, folder: Path) -> dict:
    return {"state": trained_by_trainer(folder, 8 // world).state_dict()}


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except DaqError as error:
        return str(error)
    return "no error"


def mistakes(rank: int, world: int) -> dict:
    """Messages of what is refused once a model is wrapped or sharded."""

    def calibrate(model: nn.Module) -> None:
        with hf_daq.calibrate(model):
            model(batches(0))

    class Kept(logging.Handler):
        records: ClassVar[list[str]] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.records.append(record.getMessage())

    logging.getLogger("hf_daq").addHandler(Kept())
    lonely = calibrated_vit(rank, world)
    train(lonely, optimizer_of(lonely), range(1))
    wrapped = nn.parallel.DistributedDataParallel(calibrated_vit(rank, world))
    shards = sharded(calibrated_vit(rank, world))
    late = sharded(vit())
    return {
        "apply_wrapped": message(lambda: hf_daq.apply_daq(nn.parallel.DistributedDataParallel(vit()), CONFIG)),
        "apply_sharded": message(lambda: hf_daq.apply_daq(late, CONFIG)),
        "calibrate_wrapped": message(lambda: calibrate(wrapped)),
        "calibrate_inside": message(lambda: calibrate(wrapped.module)),
        "lonely": Kept.records,
        "calibrate_sharded": message(lambda: calibrate(shards)),
        "health_of_shards": message(lambda: hf_daq.health(shards, batches(0))),
        "save_shards": message(lambda: hf_daq.save_pretrained(shards, "nowhere")),
        "layers": len(quantized_layers(shards)),
    }


SCENARIOS = [
    calibration,
    calibration_of_unequal_shares,
    calibration_of_shares_unlike_one_another,
    reconstruction,
    ddp,
    gradient_accumulation,
    gradient_checkpointing,
    ddp_in_bf16,
    save_and_load_state,
    fsdp,
    fsdp_in_bf16,
    fsdp_of_a_transformers_model,
    experts,
    adapters,
    monitored,
    trainer,
    mistakes,
]
LONGER = [ddp_compiled]


def main(folder: Path, scenarios: list[Callable]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for scenario in scenarios:
        takes_folder = "folder" in scenario.__annotations__
        arguments = [folder / f"{scenario.__name__}_saved"] if takes_folder else []
        torch.save(scenario(rank, world, *arguments), folder / f"{scenario.__name__}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), LONGER if "longer" in sys.argv else SCENARIOS)
