"""hf_daq beside other libraries on a text classifier: the same float network, batches, schedule, and layers in few bits.

    python recipes/measure/peers.py --model FLOAT_FOLDER --dataset FOLDER --bits 4/8 2/8
    python recipes/measure/peers.py --model FLOAT_FOLDER --dataset FOLDER --bits 2/8 --variants daq lsq --lrs 1e-4 --seeds 0 1 2

FLOAT_FOLDER: a fine-tuned classifier of transformers, as text_classification.py writes it. FOLDER: tab-separated files of SST-2, train,
dev and test. Each variant trains at each learning rate; the one that is best on dev with the first seed is the one whose accuracy on test
is told, which nothing is chosen on, with the standard error over the seeds.

    daq, ste   hf_daq, weights per channel, inputs per tensor; ste with a straight-through estimator, all else equal
    reconstruct, distill, both    daq that starts from hf_daq.reconstruct; with half of its loss from the float network; with both
    lsq        Esser et al., ICLR 2020: a learned step for each tensor, which learns at the rate of the network
    paretoq    Liu et al., arXiv 2502.02631: its weights, per channel, with inputs of LSQ
    torchao    QAT of torchao: dynamic ranges, inputs per token, weights per channel
    brevitas   Brevitas' default: a learned scale for inputs, the largest value for weights, both per tensor

What is not installed is left out. A run is one line of JSON in --results; runs that are there are not repeated.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

import text_classification

import hf_daq
from measure.benchmark import torchao
from measure.brevitas_layers import brevitas_layer
from measure.learned_steps import has_steps, use_lsq, use_paretoq
from measure.study import read_rows
from shared.distillation import Distillation, distill
from shared.loop import EpochShuffle, cosine
from shared.options import warn_of_slow_bf16

SPLITS = {"train": "train", "dev": "validation", "test": "test"}
"""As `datasets` names them."""
VARIANTS = ("daq", "ste", "reconstruct", "distill", "both", "lsq", "paretoq", "torchao", "brevitas")
Batch = dict[str, Tensor]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of the float network")
    add("--dataset", required=True, help="folder with train, dev and test files")
    add("--bits", nargs="+", default=["4/8", "2/8"], metavar="W/A", help="of weights / of inputs")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--lrs", nargs="+", type=float, default=[5e-5, 1e-4, 2e-4, 4e-4], help="of weights (AdamW)")
    add("--quantizer_lr", type=float, default=1e-3, help="of hf_daq's bounds and scales")
    add("--weight_decay", type=float, default=0.01)
    add("--epochs", type=int, default=1)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the order of sentences and of dropout")
    add("--batch_size", type=int, default=64)
    add("--calibration_batches", type=int, default=8)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of products in training")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=1)
    add("--results", type=Path, default=Path("runs/peers.jsonl"))
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------- data


class Sentences:
    """The tokenized split of a data set."""

    def __init__(self, args: argparse.Namespace, split: str):
        self.device = args.device
        data = {"dataset": args.dataset, "eval_split": split.replace("train", "test"), "max_length": 64}
        reading = ["--dataset_kwargs", json.dumps({"names": ["sentence", "label"], "quoting": 3})]
        options = [f"--{key}={value}" for key, value in data.items()]
        cfg = text_classification.parse([*options, *reading, "--checkpoint", args.model, "--float_epochs", "0"])
        self.texts, self.tokenizer = text_classification.read_texts(cfg), AutoTokenizer.from_pretrained(args.model)
        part = self.texts.train if split == "train" else self.texts.eval
        self.rows = text_classification.tokenize(part, self.texts, self.tokenizer, cfg)
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def batches(self, order: list[int], size: int) -> Iterator[Batch]:
        """Sentences of like length together, as Trainer groups them: of 8 batches at a time, in the order of the first of each."""
        for start in range(0, len(order), 8 * size):
            part = sorted(order[start : start + 8 * size], key=lambda index: len(self.rows[index]["input_ids"]))
            groups = [part[first : first + size] for first in range(0, len(part), size)]
            for group in sorted(groups, key=min):
                yield dict(self.collate([self.rows[index] for index in group]).to(self.device))


# ---------------------------------------------------------------------------------------------------------- model


def quantized(model: nn.Module, variant: str, bits: tuple[int, int], batches: list[Batch]) -> None:
    """Quantize the same layers as hf_daq does, in place, and start bounds from these batches."""
    if variant in ("torchao", "brevitas"):
        names = list(hf_daq.plan(model, bits=2).quantized)
        if variant == "torchao":
            torchao(model, names, argparse.Namespace(bits=bits))
            return
        for name in names:
            layer = brevitas_layer(model.get_submodule(name), bits, batches=len(batches) - 1)
            model.set_submodule(name, layer)
        with torch.no_grad():
            for batch in batches:  # the last one ends the statistics
                model.train()(**batch)
        return
    rounding = "ste" if variant == "ste" else "daq"
    options = {"weight_bits": bits[0], "activation_bits": bits[1], "weight_granularity": "channel"}
    hf_daq.apply_daq(model, hf_daq.DaqConfig(rounding=rounding, **options))
    with hf_daq.calibrate(model):
        for batch in batches:
            model(**batch)
    if variant in ("lsq", "paretoq"):
        (use_lsq if variant == "lsq" else use_paretoq)(model, batches[0])
    if variant in ("reconstruct", "both"):
        hf_daq.reconstruct(model, batches, progress=False)


def optimizer_of(model: nn.Module, variant: str, lr: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    if variant in ("torchao", "brevitas"):
        return torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr)
    quantizer_lr = lr if has_steps(model) else args.quantizer_lr
    return torch.optim.AdamW(hf_daq.param_groups(model, lr, quantizer_lr, args.weight_decay))


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def accuracy(model: nn.Module, sentences: Sentences) -> float:
    """Top-1 in percent."""
    model.eval()
    hits = 0
    for batch in sentences.batches(list(range(len(sentences.rows))), 128):
        labels = batch.pop("labels")
        hits += int((model(**batch).logits.argmax(1) == labels).sum())
    return 100 * hits / len(sentences.rows)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train(run: dict[str, Any], splits: dict[str, Sentences], args: argparse.Namespace) -> dict[str, Any]:
    """One run: its accuracies, and the seconds of a step, a CPU's or on a GPU the wall clock's."""
    set_seed(run["seed"])
    size, known = args.batch_size, splits["train"]
    model = text_classification.load_float(args.model, known.texts).to(args.device)
    shuffle = EpochShuffle(len(known.rows), run["seed"])
    first = list(known.batches(list(shuffle)[: args.calibration_batches * size], size))
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in first]
    quantized(model.eval(), run["variant"], tuple(map(int, run["bits"].split("/"))), batches)
    found = {"start": accuracy(model, splits["dev"])}
    optimizer = optimizer_of(model, run["variant"], run["lr"], args)
    distillation = Distillation(alpha=0.5, temperature=1.0)
    teacher = (
        text_classification.load_float(args.model, known.texts).to(args.device).eval()
        if run["variant"] in ("distill", "both")
        else None
    )
    updates, update, seconds = run["epochs"] * math.ceil(len(known.rows) / size), 0, []
    (schedule,) = cosine([optimizer], updates, updates // 10)
    for epoch in range(run["epochs"]):
        shuffle.epoch = epoch
        model.train()
        for batch in known.batches(list(shuffle), size):
            update += 1
            schedule.step_update(update)
            began = clock(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=run["dtype"] == "bfloat16"):
                loss, logits = model(**batch, return_dict=False)
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(**batch).logits
                    loss = distill(loss, logits, wanted, distillation)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(clock(args.device) - began)
    found |= {split: accuracy(model, splits[split]) for split in ("dev", "test")}
    return run | {key: round(value, 3) for key, value in (found | {"step": statistics.median(seconds)}).items()}


def complete(args: argparse.Namespace, splits: dict[str, Sentences]) -> list[dict[str, Any]]:
    """The rows of all runs: the first seed at each rate, and the other seeds at the best one."""
    rows = read_rows(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def row_of(run: dict[str, Any]) -> dict[str, Any]:
        there = [row for row in rows if run.items() <= row.items()]
        if not there:
            rows.append(train(run, splits, args))
            with args.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
        return there[0] if there else rows[-1]

    wanted = []
    for bits in args.bits:
        for variant in args.variants:
            if variant in ("torchao", "brevitas") and importlib.util.find_spec(variant) is None:
                continue
            run = {"variant": variant, "bits": bits, "epochs": args.epochs, "dtype": args.dtype, "device": args.device}
            first = [row_of(run | {"lr": lr, "seed": args.seeds[0]}) for lr in args.lrs]
            lr = max(first, key=lambda row: row["dev"])["lr"]
            wanted += [row_of(run | {"lr": lr, "seed": seed}) for seed in args.seeds]
    return wanted


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| bits | variant | best rate | start, dev | dev | test | s a step |", "|---|---|---|---|---|---|---|"]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["variant"], row["lr"]), []).append(row)
    for (bits, variant, lr), group in groups.items():
        start, dev, test, step = (
            statistics.mean(row[key] for row in group) for key in ("start", "dev", "test", "step")
        )
        error = f" ± {statistics.stdev(row['test'] for row in group) / len(group) ** 0.5:.2f}" if len(group) > 1 else ""
        lines.append(f"| {bits} | {variant} | {lr:g} | {start:.2f} | {dev:.2f} | {test:.2f}{error} | {step:.3g} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    warn_of_slow_bf16(args.dtype == "bfloat16", torch.device(args.device), "--dtype float32")
    splits = {name: Sentences(args, split) for name, split in SPLITS.items()}
    network = text_classification.load_float(args.model, splits["train"].texts).to(args.device)
    print("float: " + ", ".join(f"{name} {accuracy(network, splits[name]):.2f}" for name in ("dev", "test")))
    rows = complete(args, splits)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
