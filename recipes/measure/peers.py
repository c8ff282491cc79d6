"""hf_daq beside other libraries on a transformers model: the same float network, batches, schedule, and layers in few bits.

    python recipes/measure/peers.py --model FLOAT_FOLDER --dataset FOLDER --bits 4/8 2/8
    python recipes/measure/peers.py --model FLOAT_FOLDER --dataset FOLDER --bits 2/8 --variants daq lsq --lrs 1e-4 --seeds 0 1 2
    python recipes/measure/peers.py --model LLAMA_FOLDER --dataset python_library --bits 2/32 1.6/32 --group_size 64 --max_steps 100

FLOAT_FOLDER: a fine-tuned classifier of transformers, as text_classification.py writes it. FOLDER: tab-separated files of SST-2, train,
dev and test. LLAMA_FOLDER: a causal language model, as language_modeling.py writes it, for a text as it takes one; its last part is dev and
test. Each variant trains at each learning rate; the one that is best on dev with the first seed is the one whose accuracy on test, or
loss of a token in nats, is told, which nothing is chosen on, with the standard error over the seeds.

    float      the float network, trained on as the others are; --bits 32/32
    daq, ste   hf_daq, weights per channel or in groups, inputs per tensor; ste with a straight-through estimator, all else equal
    reconstruct, distill, both    daq that starts from hf_daq.reconstruct; with half of its loss from the float network; with both
    lsq        Esser et al., ICLR 2020: a learned step for each tensor, which learns at the rate of the network
    paretoq    Liu et al., arXiv 2502.02631: its weights, per channel, with inputs of LSQ
    torchao    QAT of torchao: dynamic ranges, inputs per token, weights per channel or in groups; it has no 1.6 bits
    brevitas   Brevitas' default: a learned scale for inputs, the largest value for weights, both per tensor; not 1.6 bits
    quanto     optimum-quanto: ranges of weights in groups of 128 and inputs per tensor, which do not learn; 2, 4 and 8 bits alone

Inputs of 32 bits are in float, and weights of 1.6 are -1, 0 and 1 times a scale. What is not installed is left out. A run is one line of
JSON in --results; runs that are there are not repeated.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

import hf_daq
from measure.benchmark import torchao
from measure.brevitas_layers import brevitas_layer
from measure.learned_steps import has_steps, use_lsq, use_paretoq
from measure.peer_tasks import Batch, Classification, Text, inputs, task_of
from measure.study import read_rows
from shared.distillation import Distillation, distill
from shared.loop import EpochShuffle, cosine
from shared.options import warn_of_slow_bf16

VARIANTS = ("float", "daq", "ste", "reconstruct", "distill", "both", "lsq", "paretoq", "torchao", "brevitas", "quanto")
LIBRARIES = {"torchao": "torchao", "brevitas": "brevitas", "quanto": "optimum"}
"""And the packages that they are in."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of the float network")
    add("--dataset", required=True, help="folder with train, dev and test files; for a language model a text")
    add("--eval_fraction", type=float, default=0.05, help="of a text: the last part, half of it dev and half test")
    add("--block_size", type=int, default=256, help="tokens of a text that are one row")
    add("--bits", nargs="+", default=["4/8", "2/8"], metavar="W/A", help="of weights / of inputs")
    add("--group_size", type=int, help="columns that share a scale, in hf_daq and torchao; none: one scale a channel")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[1:])
    add("--lrs", nargs="+", type=float, default=[5e-5, 1e-4, 2e-4, 4e-4], help="of weights (AdamW)")
    add("--quantizer_lr", type=float, default=1e-3, help="of hf_daq's bounds and scales")
    add("--weight_decay", type=float, default=0.01)
    add("--epochs", type=int, default=1)
    add("--max_steps", type=int, help="updates of a run, where an epoch is too long")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the order of rows and of dropout")
    add("--batch_size", type=int, default=64)
    add("--calibration_batches", type=int, default=8)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of products in training")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=1)
    add("--results", type=Path, default=Path("runs/peers.jsonl"))
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- model


def widths(bits: str) -> dict[str, Any]:
    """The options of hf_daq for "W/A"."""
    weights, _, activations = bits.partition("/")
    options = {"weight_bits": 2, "weight_grid": "ternary"} if weights == "1.6" else {"weight_bits": int(weights)}
    return options | {"activation_bits": None if activations == "32" else int(activations)}


def quantized(model: nn.Module, run: dict[str, Any], batches: list[Batch]) -> None:
    """Quantize the same layers as hf_daq does, in place, and start bounds from these batches."""
    if run["variant"] == "float":
        return
    variant, options, group_size = run["variant"], widths(run["bits"]), run["group_size"]
    if variant in LIBRARIES:
        names = list(hf_daq.plan(model, bits=2).quantized)
        bits = options["weight_bits"], options["activation_bits"]
        if variant == "torchao":
            torchao(model, names, bits, group_size)
            return
        if variant == "quanto":
            quanto(model, names, bits, batches)
            return
        for name in names:
            layer = brevitas_layer(model.get_submodule(name), bits, batches=len(batches) - 1)
            model.set_submodule(name, layer)
        with torch.no_grad():
            for batch in batches:  # the last one ends the statistics
                model.train()(**batch)
        return
    learned_steps = variant in ("lsq", "paretoq")
    scales = {"group_size": group_size} if group_size and not learned_steps else {"weight_granularity": "channel"}
    rounding = "ste" if variant == "ste" else "daq"
    hf_daq.apply_daq(model, hf_daq.DaqConfig(rounding=rounding, **options, **scales))
    with hf_daq.calibrate(model):
        for batch in batches:
            model(**batch)
    if learned_steps:
        (use_lsq if variant == "lsq" else use_paretoq)(model, batches[0])
    if variant in ("reconstruct", "both"):
        hf_daq.reconstruct(model, batches, progress=False)


def quanto(model: nn.Module, names: list[str], bits: tuple[int, int | None], batches: list[Batch]) -> None:
    """Layers of optimum-quanto (https://github.com/huggingface/optimum-quanto), whose weights are rounded anew in every forward."""
    from optimum.quanto import Calibration, qtypes, quantize

    kinds = {"weights": qtypes[f"qint{bits[0]}"], "activations": bits[1] and qtypes[f"qint{bits[1]}"]}
    quantize(model, include=names, **kinds)
    if bits[1]:
        with torch.no_grad(), Calibration():
            for batch in batches:
                model(**batch)


def optimizer_of(model: nn.Module, variant: str, lr: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    if variant == "float" or variant in LIBRARIES:
        return torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr)
    quantizer_lr = lr if has_steps(model) else args.quantizer_lr
    return torch.optim.AdamW(hf_daq.param_groups(model, lr, quantizer_lr, args.weight_decay))


# ------------------------------------------------------------------------------------------------------- measuring


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train(run: dict[str, Any], task: Classification | Text, args: argparse.Namespace) -> dict[str, Any]:
    """One run: its scores, and the seconds of a step, a CPU's or on a GPU the wall clock's."""
    set_seed(run["seed"])
    size, known, dev = args.batch_size, task.splits["train"], task.splits["dev"]
    model = task.load()
    shuffle = EpochShuffle(len(known.rows), run["seed"])
    first = list(known.batches(list(shuffle)[: args.calibration_batches * size], size))
    quantized(model.eval(), run, [inputs(batch) for batch in first])
    found = {"start": dev.score(model)}
    optimizer = optimizer_of(model, run["variant"], run["lr"], args)
    distillation = Distillation(alpha=0.5, temperature=1.0)
    teacher = task.load().eval() if run["variant"] in ("distill", "both") else None
    an_epoch = math.ceil(len(known.rows) / size)
    updates, update, seconds = min(run["epochs"] * an_epoch, args.max_steps or math.inf), 0, []
    (schedule,) = cosine([optimizer], updates, updates // 10)
    for epoch in range(run["epochs"]):
        shuffle.epoch = epoch
        model.train()
        for batch in itertools.islice(known.batches(list(shuffle), size), updates - update):
            update += 1
            schedule.step_update(update)
            began = clock(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=run["dtype"] == "bfloat16"):
                loss, logits = known.loss(model, batch)
                if teacher is not None:
                    with torch.no_grad():
                        _, wanted = known.loss(teacher, batch)
                    loss = distill(loss, logits, wanted, distillation)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(clock(args.device) - began)
    found |= {split: task.splits[split].score(model) for split in ("dev", "test")}
    digits = 3 if task.higher_is_better else 5
    return (
        run
        | {key: round(value, digits) for key, value in found.items()}
        | {"step": round(statistics.median(seconds), 3)}
    )


def can_run(variant: str, bits: str) -> bool:
    """Whether the library is installed, and has such bits."""
    weights, _, activations = bits.partition("/")
    if variant == "quanto" and (weights not in ("2", "4", "8") or activations not in ("8", "32")):
        return False
    return variant not in LIBRARIES or (weights != "1.6" and importlib.util.find_spec(LIBRARIES[variant]) is not None)


def complete(args: argparse.Namespace, task: Classification | Text) -> list[dict[str, Any]]:
    """The rows of all runs: the first seed at each rate, and the other seeds at the best one."""
    rows = read_rows(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def row_of(run: dict[str, Any]) -> dict[str, Any]:
        there = [row for row in rows if all(row.get(key) == value for key, value in run.items())]
        if not there:
            rows.append(train(run, task, args))
            with args.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
        return there[0] if there else rows[-1]

    wanted = []
    for bits in args.bits:
        for variant in args.variants:
            if not can_run(variant, bits):
                continue
            run = {"variant": variant, "bits": bits, "epochs": args.epochs, "dtype": args.dtype, "device": args.device}
            run |= {"group_size": args.group_size, "max_steps": args.max_steps}
            first = [row_of(run | {"lr": lr, "seed": args.seeds[0]}) for lr in args.lrs]
            best = max if task.higher_is_better else min
            lr = best(first, key=lambda row: row["dev"])["lr"]
            wanted += [row_of(run | {"lr": lr, "seed": seed}) for seed in args.seeds]
    return wanted


def table(rows: list[dict[str, Any]], number: str) -> str:
    lines = ["| bits | variant | best rate | start, dev | dev | test | s a step |", "|---|---|---|---|---|---|---|"]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["variant"], row["lr"]), []).append(row)
    for (bits, variant, lr), group in groups.items():
        start, dev, test, step = (
            statistics.mean(row[key] for row in group) for key in ("start", "dev", "test", "step")
        )
        error = (
            f" ± {statistics.stdev(row['test'] for row in group) / len(group) ** 0.5:{number}}"
            if len(group) > 1
            else ""
        )
        lines.append(
            f"| {bits} | {variant} | {lr:g} | {start:{number}} | {dev:{number}} | {test:{number}}{error} | {step:.3g} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    warn_of_slow_bf16(args.dtype == "bfloat16", torch.device(args.device), "--dtype float32")
    task = task_of(args)
    network, number = task.load(), ".2f" if task.higher_is_better else ".4f"
    floats = (f"{name} {task.splits[name].score(network):{number}}" for name in ("dev", "test"))
    print(f"float, {task.measure}: " + ", ".join(floats), flush=True)
    rows = complete(args, task)
    print(table(rows, number))
    return rows


if __name__ == "__main__":
    main()
