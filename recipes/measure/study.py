"""What estimators.py runs: a study, as its YAML file says it, and the runs of its grids."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from measure.estimator_table import best


@dataclass(frozen=True)
class Study:
    network: str
    estimators: dict[str, dict[str, Any]]
    """Fields of DaqConfig; `rate`: what the learning rate of quantized weights is multiplied by; `ewgs`: its delta; `lsq` or
    `paretoq`: true for the quantizers of these papers; `brevitas`: true for layers of that library, where it is installed;
    `reconstruct`: true to start from `hf_daq.reconstruct`; `distill`: share of the comparison with the float network in the
    loss; `features`: factor of the distance of its last features; `ema`: decay of averages of the weights, which are
    evaluated; `reestimate`: batches that the last network's BatchNorm is estimated from anew; `dampening`: its factor in the
    loss at the end; `transitions`: target of TransitionScheduler; of ingredients.py `kurtosis`,
    `cauchy_schwarz` and `ranges`: factors in the loss, `freeze`: how often a weight oscillates before it is frozen, `inputs_first`: epochs
    before weights are quantized."""
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
    dtype: str = "bfloat16"
    """Of products in training and in evaluation (autocast); "float32" for none, on processors that have no bfloat16."""


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
    """0 for the network before training, of which neither the learning rate nor the seed changes anything."""
    seed: int
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def file(self) -> str:
        return f"{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.pt"

    @property
    def network_key(self) -> str:
        """Runs that begin with the same network have the same one."""
        return json.dumps([self.network, self.bits, self.settings], sort_keys=True)

    def __str__(self) -> str:
        return f"{self.bits} {self.estimator} {self.optimizer} lr {self.lr:g} x {self.epochs} seed {self.seed}"


def float_run(study: Study) -> Run:
    return Run(study.network, "float", "float", {}, "sgd", study.float_lr, study.float_epochs, 0, study.dtype)


def runs_of(study: Study, grid: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Seeds outermost and estimators innermost, so that early results compare. `lr: best` is the best of what is measured."""
    outer = grid["seeds"], grid["bits"], grid["epochs"], [None] if grid["lr"] == "best" else grid["lr"]
    for seed, bits, epochs, lr in itertools.product(*outer):
        for name in grid["estimators"]:
            settings = study.estimators[name]
            run = Run(study.network, bits, name, settings, grid["optimizer"], lr or 0.0, epochs, seed, study.dtype)
            yield run if lr else dataclasses.replace(run, lr=best_rate(run, rows))


def best_rate(run: Run, rows: list[dict[str, Any]]) -> float:
    """The learning rate with the best accuracy on held-out images in runs of the same estimator that are as long, or else in
    the longest of the shorter ones."""
    same = "network", "bits", "estimator", "optimizer", "dtype"
    alike = [row for row in rows if all(row[key] == getattr(run, key) for key in same) and row["epochs"] <= run.epochs]
    if not alike:
        raise SystemExit(f"lr: best, but no other run of {run.estimator} at {run.bits} with {run.optimizer} is there")
    longest = max(row["epochs"] for row in alike)
    return best([row for row in alike if row["epochs"] == longest])[0]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: dict[str, Any]) -> Run:
    return Run(**{entry.name: row[entry.name] for entry in dataclasses.fields(Run)})


def key_of(row: dict[str, Any]) -> str:
    return run_of(row).key
