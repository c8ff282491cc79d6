"""LoRA on a language model of few-bit weights: inside the quantizer, beside it and then merged, and in float.

    python recipes/measure/adapters.py runs/shakespeare/float/float --text other.txt --bits 4 2 --steps 100 --seeds 3

The model is fine-tuned on another text than its own: the first 80 % of `--text` train, 10 % choose the learning rate of each row
by its mean over the seeds, and the table has the loss on the last 10 %, in nats a token, with the standard error over the seeds.
A seed is another order of blocks and another start of the adapters. Weights are quantized in groups of columns and calibrated on
the training text; inputs, embeddings and the head stay in float, and only adapters (with "daq_bounds" also bounds and scales)
are trained.

A model with adapters beside its quantizers is `Q(W) x + s B A x`. Merged it is `Q(W + s B A) x`, which was not trained; "restarted"
is after `hf_daq.restart`, which fits bounds and scales to the merged weights.
"""

import argparse
import copy
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import hf_daq

INSIDE = {"inside, merged": "daq", "inside with bounds, merged": "daq_bounds"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder or Hub id of a causal language model")
    add("--text", type=Path, required=True, help="file to fine-tune on")
    add("--bits", type=int, nargs="*", default=[4, 2], help="none: LoRA in float alone")
    add("--group_size", type=int, default=64)
    add("--rank", type=int, default=8)
    add("--lr", type=float, nargs="+", default=[2e-3, 6e-3], help="each row of the table has its best")
    add("--quantizer_lr", type=float, default=1e-3)
    add("--steps", type=int, default=200)
    add("--seeds", type=int, default=3, help="how many")
    add("--batch_size", type=int, default=8)
    add("--block_size", type=int, default=128, help="tokens")
    add("--eval_blocks", type=int, default=64, help="of the validation and of the test part")
    return parser.parse_args(argv)


def read(args: argparse.Namespace) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Blocks to train on, and batches of blocks to choose with and to report."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    blocks = ids[: len(ids) // args.block_size * args.block_size].view(-1, args.block_size)
    tenth = len(blocks) // 10
    if tenth == 0:
        raise SystemExit(
            f"{args.text} has {len(blocks)} blocks of --block_size {args.block_size}; at least 10 are needed"
        )
    train, validation, test = blocks.split([len(blocks) - 2 * tenth, tenth, tenth])
    return train, *(list(part[: args.eval_blocks].split(args.batch_size)) for part in (validation, test))


def loss_of(model: nn.Module, blocks: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction=reduction)


@torch.no_grad()
def loss(model: nn.Module, batches: list[Tensor]) -> float:
    model.eval()
    tokens = sum(blocks[:, 1:].numel() for blocks in batches)
    return sum(loss_of(model, blocks, "sum").item() for blocks in batches) / tokens


def quantize(model: nn.Module, bits: int, train: Tensor, args: argparse.Namespace) -> nn.Module:
    model = copy.deepcopy(model)
    hf_daq.apply_daq(model, weight_bits=bits, group_size=args.group_size)
    with hf_daq.calibrate(model, check=False):
        for blocks in train[: 8 * args.batch_size].split(args.batch_size):
            model(input_ids=blocks, use_cache=False)
    return model


def trained(model: nn.Module, how: str | bool, train: Tensor, lr: float, seed: int, args: argparse.Namespace):
    torch.manual_seed(seed)
    options = {"target_modules": "all-linear", "lora_alpha": 2 * args.rank, "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(model), LoraConfig(r=args.rank, init_lora_weights=how, **options)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if how == "daq_bounds":
        parameters = hf_daq.param_groups(model, lr=lr, quantizer_lr=args.quantizer_lr)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(args.steps // 10, 1), args.steps)
    blocks = args.steps * args.batch_size
    order = torch.cat([torch.randperm(len(train)) for _ in range(1 + blocks // len(train))])[:blocks]
    for rows in tqdm(order.split(args.batch_size), f"{how}, lr {lr:g}, seed {seed}", leave=False):
        loss_of(model, train[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def states(exact: nn.Module, quantized: dict[int, nn.Module], train: Tensor, lr: float, seed: int, args) -> Iterator:
    """(weights, row of the table, model) of one learning rate and seed."""
    model = trained(exact, True, train, lr, seed, args).merge_and_unload()
    yield "float", "LoRA, merged", model
    for bits, base in quantized.items():
        weights = f"W{bits}"
        yield weights, "LoRA in float, then calibrated", quantize(model, bits, train, args)
        beside = trained(base, True, train, lr, seed, args)
        yield weights, "beside", beside
        merged = beside.merge_and_unload()
        yield weights, "beside, merged", merged
        yield weights, "beside, merged, restarted", hf_daq.restart(merged)
        for row, how in INSIDE.items():
            yield weights, row, trained(base, how, train, lr, seed, args).merge_and_unload()


def table_of(found: dict[tuple[str, str], dict], weights: list[str]) -> list[dict]:
    """Each row at the learning rate with the best mean loss on the validation part."""
    table = []
    print("\n| weights | | loss | learning rate |\n|---|---|---|---|")
    for key in sorted(found, key=lambda key: weights.index(key[0])):
        lr, runs = min(found[key].items(), key=lambda item: statistics.mean(run[0] for run in item[1]))
        losses = [run[1] for run in runs]
        row = {"weights": key[0], "row": key[1], "lr": lr, "loss": statistics.mean(losses), "runs": len(runs)}
        row["error"] = statistics.stdev(losses) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
        table.append(row)
        error = f" ± {row['error']:.3f}" if len(runs) > 1 else ""
        print(f"| {key[0]} | {key[1]} | {row['loss']:.3f}{error} | {lr or ''} |", flush=True)
    return table


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    train, validation, test = read(args)
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    quantized = {bits: quantize(exact, bits, train, args) for bits in args.bits}
    weights = ["float", *(f"W{bits}" for bits in args.bits)]
    models = zip(weights, [exact, *quantized.values()], strict=True)
    found: dict = {
        (name, "no training"): {None: [(loss(model, validation), loss(model, test))]} for name, model in models
    }
    for seed in range(args.seeds):
        for lr in args.lr:
            for name, row, model in states(exact, quantized, train, lr, seed, args):
                run = loss(model, validation), loss(model, test)
                found.setdefault((name, row), {}).setdefault(lr, []).append(run)
                print(f"{name}, {row}, {lr:g}, seed {seed}: {run[0]:.4f} {run[1]:.4f}", flush=True)
        table = table_of(found, weights)
    return table


if __name__ == "__main__":
    main()
