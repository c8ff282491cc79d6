"""Does the gradient of rounding matter? Estimators beside one another, each at its best learning rate, on several seeds.

    python recipes/measure/estimators.py --dataset cifar10                      # the study, in its order: days of one core
    python recipes/measure/estimators.py --study my.yaml --dataset DIR_OR_ID    # another one
    python recipes/measure/estimators.py --table --report recipes/results       # what is measured so far

A study (configs/estimators.yaml) is a YAML file: the network, names of estimators with fields of `hf_daq.DaqConfig`, and grids of
bits, estimators, optimizer, learning rates, epochs and seeds. One float network is trained once; all runs start from it, with
equal bounds. A run is one line of JSON in `--results`; runs that are there are not repeated, and one that was stopped goes on
from its last whole epoch (`--work`), bit for bit. Seeds change the order of the images and their crops and flips.

A share of the training images is held out. The table takes the learning rate with the best mean accuracy on them, and reports the
accuracy on the test images, which no choice was made on: mean and standard error over the seeds. A run is evaluated as it would be
deployed; `gap` is what the soft quantizer has more in training, before it is rounded.
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from sklearn.model_selection import train_test_split
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import hf_daq
from hf_daq.nn.quantizers import Quantizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_classification

from measure.estimator_table import best, report, table
from measure.ewgs import use_ewgs
from shared.loop import EpochShuffle, cosine

RECIPES = Path(__file__).parents[1]
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------- knobs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", type=Path, default=RECIPES / "configs" / "estimators.yaml")
    add("--dataset", default="cifar10", help="a Hub id, a folder of parquet files, or digits")
    add("--results", type=Path, default=RECIPES / "results" / "estimators.jsonl")
    add("--work", type=Path, default=Path("runs/estimators"), help="folder of the float network and of checkpoints")
    add("--table", action="store_true", help="print the table of what is there, and run nothing")
    add("--report", type=Path, help="folder for the table and the figure, estimators.md and .png")
    add("--threads", type=int, default=1)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Study:
    network: str
    estimators: dict[str, dict[str, Any]]
    """Fields of DaqConfig, and `rate`: what the learning rate of quantized weights is multiplied by, and `ewgs`: its delta."""
    grids: list[dict[str, Any]]
    float_epochs: int = 15
    float_lr: float = 0.1
    float_weight_decay: float = 5e-4
    weight_decay: float = 1e-4
    quantizer_lr: float = 1e-3
    batch_size: int = 128
    crop_padding: int = 4
    hflip: float = 0.5
    heldout: float = 0.1
    """Share of the training images that no run is trained on."""
    calibration_batches: int = 8
    compile: bool = True


def read_study(path: Path) -> Study:
    return Study(**yaml.safe_load(path.read_text()))


@dataclass(frozen=True)
class Run:
    network: str
    bits: str
    """Of weights and inputs: "1/1", "1/32"; "float" for the network that all start from."""
    estimator: str
    settings: dict[str, Any]
    optimizer: str
    lr: float
    epochs: int
    seed: int

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def file(self) -> str:
        return f"{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.pt"


def float_run(study: Study) -> Run:
    return Run(study.network, "float", "float", {}, "sgd", study.float_lr, study.float_epochs, 0)


def runs_of(study: Study, grid: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Seeds outermost and estimators innermost, so that early results compare. `lr: best` is the best of what is measured."""
    outer = grid["seeds"], grid["bits"], grid["epochs"], [None] if grid["lr"] == "best" else grid["lr"]
    for seed, bits, epochs, lr in itertools.product(*outer):
        for name in grid["estimators"]:
            run = Run(study.network, bits, name, study.estimators[name], grid["optimizer"], lr or 0.0, epochs, seed)
            yield run if lr else dataclasses.replace(run, lr=best_rate(run, rows))


def best_rate(run: Run, rows: list[dict[str, Any]]) -> float:
    """The learning rate with the best accuracy on held-out images in shorter runs of the same estimator."""
    same = "network", "bits", "estimator", "optimizer"
    alike = [row for row in rows if all(row[key] == getattr(run, key) for key in same) and row["epochs"] < run.epochs]
    if not alike:
        raise SystemExit(f"lr: best, but no shorter run of {run.estimator} at {run.bits} with {run.optimizer} is there")
    return best(alike)[0]


# ----------------------------------------------------------------------------------------------------------- data


class Images:
    """All images in memory; crops and flips of a batch are those of the recipe for images."""

    def __init__(self, study: Study, dataset: str):
        options = ["--dataset", dataset, "--crop_padding", str(study.crop_padding), "--hflip", str(study.hflip)]
        cfg = image_classification.parse(options)
        images = image_classification.read_images(cfg)
        size = images.train[0][images.image_column].size[0]
        default = timm.get_pretrained_cfg(study.network)
        arguments = images, size, default.mean, default.std
        self.train = image_classification.MemoryImages(images.train, *arguments, cfg)
        self.test = image_classification.MemoryImages(images.eval, *arguments, None)
        self.plain = copy.copy(self.train)
        self.plain.augment = None
        labels = self.train.labels
        rows = train_test_split(range(len(labels)), test_size=study.heldout, random_state=0, stratify=labels)
        self.train_rows, self.heldout_rows = (torch.tensor(sorted(part)) for part in rows)
        self.classes, self.batch_size = len(images.label_names), study.batch_size

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.train.augment.seed = seed
        self.train.start_epoch(epoch)
        shuffle = EpochShuffle(len(self.train_rows), seed)
        shuffle.epoch = epoch
        order = self.train_rows[list(shuffle)]
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            yield self.train.__getitems__(order[start : start + self.batch_size])

    @property
    def batches(self) -> int:
        return len(self.train_rows) // self.batch_size


@torch.no_grad()
def accuracy(model: nn.Module, images: Any, rows: Tensor, soft: bool = False) -> float:
    """Top-1 in percent; with `soft` of the soft quantizer, as in training."""
    model.eval()
    for module in model.modules():
        if soft and isinstance(module, Quantizer):
            module.train()
    hits = 0
    for part in rows.split(500):
        batch, labels = images.__getitems__(part)
        with torch.autocast(**AUTOCAST):
            hits += (model(batch).argmax(1) == labels).sum().item()
    return 100 * hits / len(rows)


# ---------------------------------------------------------------------------------------------------------- model


def new_model(study: Study, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(study.network, num_classes=classes).to(memory_format=torch.channels_last)


def quantized_model(study: Study, run: Run, images: Images, state: dict[str, Tensor]) -> nn.Module:
    model = new_model(study, images.classes)
    model.load_state_dict(state)
    weight_bits, activation_bits = map(int, run.bits.split("/"))
    settings = {key: value for key, value in run.settings.items() if key not in ("rate", "ewgs")}
    settings |= {"weight_bits": weight_bits, "activation_bits": None if activation_bits == 32 else activation_bits}
    # The paper's settings at 1 bit, the defaults from 2 bits on: what the recipes train with.
    preset = {"preset": "paper"} if weight_bits == 1 else {}
    hf_daq.apply_daq(model, hf_daq.DaqConfig.from_dict(preset | settings))
    with hf_daq.calibrate(model):
        for batch, _ in itertools.islice(images.epoch(0, 0), study.calibration_batches):
            model(batch)
    if "ewgs" in run.settings:
        use_ewgs(model, run.settings["ewgs"])
    return model


def optimizers_of(study: Study, run: Run, model: nn.Module) -> list[torch.optim.Optimizer]:
    sgd = {"lr": run.lr, "momentum": 0.9, "nesterov": True}
    if run.bits == "float":
        return [torch.optim.SGD(param_groups_weight_decay(model, study.float_weight_decay), **sgd)]
    *groups, quantizers = hf_daq.param_groups(model, run.lr, study.quantizer_lr, study.weight_decay)
    weights = [model.get_submodule(name).weight for name in model.daq_config.layers]
    known = {id(weight) for weight in weights}
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in known]
    if run.optimizer == "muon":
        return [matrices_muon(weights, run.lr, study.weight_decay), torch.optim.AdamW([*groups, quantizers])]
    # With its rate times r and its decay by r, a weight that gets 1/r of a gradient moves as with all of it.
    rate = run.settings.get("rate", 1.0)
    groups.append({"params": weights, "lr": run.lr * rate, "weight_decay": study.weight_decay / rate})
    if run.optimizer == "adamw":
        return [torch.optim.AdamW([*groups, quantizers])]
    return [torch.optim.SGD(groups, **sgd), torch.optim.Adam([quantizers])]


def matrices_muon(weights: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Muon:
    """torch's Muon takes matrices: convolutions as (out, height * width * in), views of the same memory."""
    matrices = [nn.Parameter(weight.detach().permute(0, 2, 3, 1).flatten(1)) for weight in weights]
    optimizer = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def give_gradients(*_: Any) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)

    optimizer.register_step_pre_hook(give_gradients)
    return optimizer


# ------------------------------------------------------------------------------------------------------- training


@dataclass
class Trainer:
    """Runs of one study, one after another."""

    study: Study
    images: Images
    work: Path
    prepared: dict[str, Any] = field(default_factory=dict)
    """Networks, their compiled losses, and where they start: the next run may need the same."""

    def float_state(self) -> dict[str, Tensor]:
        return torch.load(self.work / f"float-{self.study.network}.pt", weights_only=True)

    def model(self, run: Run) -> tuple[nn.Module, Any]:
        """The network where the run starts, and its loss, compiled."""
        key = json.dumps([run.bits, run.settings])
        if key not in self.prepared:
            if run.bits == "float":
                model = new_model(self.study, self.images.classes)
            else:
                model = quantized_model(self.study, run, self.images, self.float_state())
            loss = loss_of(model)
            loss = torch.compile(loss) if self.study.compile else loss
            self.prepared[key] = model, loss, copy.deepcopy(model.state_dict())
        model, loss, start = self.prepared[key]
        model.load_state_dict(start)
        return model, loss

    def __call__(self, run: Run) -> dict[str, Any]:
        began = time.process_time()
        model, loss = self.model(run)
        optimizers = optimizers_of(self.study, run, model)
        updates = run.epochs * self.images.batches
        schedules = cosine(optimizers, updates, min(self.images.batches, updates // 2))
        path, history, before = self.work / run.file, [], 0.0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            history, before = saved["history"], saved["seconds"]
        for epoch in range(len(history), run.epochs):
            value = self.epoch(run, epoch, model, loss, optimizers, schedules)
            held_out = accuracy(model, self.images.plain, self.images.heldout_rows)
            history.append({"loss": round(value, 4), "heldout": round(held_out, 3)})
            seconds = before + time.process_time() - began
            print(f"{label(run)}: epoch {epoch + 1}, {history[-1]}, {seconds:.0f} s", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            write(path, {"model": model.state_dict(), "optimizers": states, "history": history, "seconds": seconds})
        return self.result(run, model, history, before + time.process_time() - began)

    def epoch(self, run: Run, epoch: int, model: nn.Module, loss: Any, optimizers: Any, schedules: Any) -> float:
        """One epoch; returns the mean loss."""
        model.train()
        total, update = torch.zeros(()), epoch * self.images.batches
        for batch, labels in self.images.epoch(run.seed, epoch):
            for schedule in schedules:
                schedule.step_update(update + 1)
            found = loss(batch, labels)
            found.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            total += found.detach()
            update += 1
        return total.item() / self.images.batches

    def result(self, run: Run, model: nn.Module, history: list[dict], seconds: float) -> dict[str, Any]:
        held_out = self.images.plain, self.images.heldout_rows
        found = {
            "heldout": history[-1]["heldout"],
            "test": accuracy(model, self.images.test, torch.arange(len(self.images.test))),
        }
        if run.settings.get("rounding") == "soft":
            found["gap"] = accuracy(model, *held_out, soft=True) - found["heldout"]
        versions = {module.__name__: module.__version__ for module in (torch, timm, hf_daq)}
        return {
            **dataclasses.asdict(run),
            **{name: round(value, 3) for name, value in found.items()},
            "history": history,
            "cpu_seconds": round(seconds, 1),
            "training_images": len(self.images.train_rows),
            "versions": {"python": platform.python_version(), **versions},
        }


def loss_of(model: nn.Module) -> Any:
    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(**AUTOCAST):
            return F.cross_entropy(model(batch), labels)

    return loss


def write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".writing")
    torch.save(value, temporary)
    os.replace(temporary, path)


def label(run: Run) -> str:
    return f"{run.bits} {run.estimator} {run.optimizer} lr {run.lr:g} x {run.epochs} seed {run.seed}"


def carry_out(study: Study, args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(study, Images(study, args.dataset), args.work)
    once(trainer, float_run(study), args.results)
    for grid in study.grids:
        for run in list(runs_of(study, grid, read_rows(args.results))):
            once(trainer, run, args.results)


def once(trainer: Trainer, run: Run, results: Path) -> None:
    """Run it unless it is there."""
    checkpoint, network = trainer.work / run.file, trainer.work / f"float-{run.network}.pt"
    done = run.key in {key_of(row) for row in read_rows(results)}
    if done and (run.bits != "float" or network.exists()):
        return
    row = trainer(run)
    if run.bits == "float":
        write(network, torch.load(checkpoint, weights_only=True)["model"])
    if not done:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    checkpoint.unlink()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(row: dict[str, Any]) -> str:
    return Run(**{entry.name: row[entry.name] for entry in dataclasses.fields(Run)}).key


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 100  # or else the ninth network would silently run uncompiled
    if not args.table:
        carry_out(read_study(args.study), args)
    rows = read_rows(args.results)
    print(table(rows))
    if args.report:
        report(rows, args.report)


if __name__ == "__main__":
    main()
