"""Does the gradient of rounding matter? Estimators beside one another, each at its best learning rate, on several seeds.

    python recipes/measure/estimators.py --dataset cifar10                      # the study, in its order: days of one core
    python recipes/measure/estimators.py --dataset cifar10 --device cuda        # minutes of a GPU
    python recipes/measure/estimators.py --study my.yaml --dataset DIR_OR_ID    # another one
    python recipes/measure/estimators.py --table --report recipes/results       # what is measured so far

A study (configs/estimators.yaml) is a YAML file: the network, names of estimators with fields of `hf_daq.DaqConfig`, and grids of
bits, estimators, optimizer, learning rates, epochs and seeds. One float network is trained once, and kept beside the results; all runs
start from it, with equal bounds. A run is one line of JSON in `--results`; runs that are there are not repeated, and one that was stopped goes on
from its last whole epoch (`--work`), on a CPU bit for bit. Seeds change the order of the images and their crops and flips.

A share of the training images is held out. The table takes the learning rate with the best mean accuracy on them, and reports the
accuracy on the test images, which no choice was made on: mean and standard error over the seeds. A run is evaluated as it would be
deployed; `gap` is what the soft quantizer has more in training, before it is rounded.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_daq.nn.memory import memory_reused
from measure.estimator_table import overall, report, table
from measure.side_by_side import Images, Training, new_model, quantized_model, train
from measure.study import Run, Study, float_run, key_of, read_rows, read_study, run_of, runs_of
from shared.options import warn_of_slow_bf16

RECIPES = Path(__file__).parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", type=Path, default=RECIPES / "configs" / "estimators.yaml")
    add("--dataset", default="cifar10", help="a Hub id, a folder of parquet files, or digits")
    add("--results", type=Path, default=RECIPES / "results" / "estimators.jsonl")
    add("--work", type=Path, default=Path("runs/estimators"), help="folder of checkpoints")
    add("--parts", nargs="+", help="grids of these parts only")
    add("--table", action="store_true", help="print the table of what is there, and run nothing")
    add("--report", type=Path, help="folder for the table and the figure, estimators.md and .png")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="instead of the study's: float32 on processors without bfloat16",
    )
    add("--processes", type=int, help="how many share the work; default: 1 on a CPU, 8 on a GPU")
    add(
        "--side_by_side", type=int, help="runs that a process trains at the same time; default: 1 on a CPU, 12 on a GPU"
    )
    add("--threads", type=int, default=1, help="of each process")
    args = parser.parse_args(argv)
    args.processes = args.processes or {"cpu": 1, "cuda": 8}[args.device]
    args.side_by_side = args.side_by_side or {"cpu": 1, "cuda": 12}[args.device]
    return args


class Worker:
    """Carries out runs; where there are several processes, each has one."""

    def __init__(self, study: Study, images: Images, args: argparse.Namespace):
        torch.set_num_threads(args.threads)
        torch._dynamo.config.recompile_limit = 200  # or else the ninth network would silently run uncompiled
        self.study, self.images, self.work = study, images.to(args.device), args.work
        self.float_file = float_file(study, args)

    @memory_reused()
    def __call__(self, runs: list[Run]) -> list[dict[str, Any]]:
        """The results of runs that are trained at the same time, and start with the same network."""
        start = new_model(self.study, self.images.classes).to(self.images.device)
        teacher = None
        if runs[0].bits != "float":
            state = load_file(self.float_file)
            start.load_state_dict(state)
            start, teacher = quantized_model(self.study, runs[0], self.images, state), start
        trainings = [Training(self.study, run, self.images, copy.deepcopy(start), teacher) for run in runs]
        rows = []
        for training in train(trainings, self.work):
            rows.append(training.result())
            if training.run.bits == "float":
                state = {name: tensor.cpu().contiguous() for name, tensor in training.model.state_dict().items()}
                save_file(state, self.float_file)
        return rows


def float_file(study: Study, args: argparse.Namespace) -> Path:
    """Where the network lies that all runs start from: beside the results."""
    return args.results.parent / f"float-{study.network}.safetensors"


_worker: Worker


def _start(*arguments: Any) -> None:
    global _worker
    _worker = Worker(*arguments)


def _work(runs: list[Run]) -> list[dict[str, Any]]:
    return _worker(runs)


def carry_out(study: Study, args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    arguments = study, Images(study, args.dataset), args
    if args.processes == 1:
        worker = Worker(*arguments)
        in_order(study, args, lambda groups: map(worker, groups))
        return
    fork = multiprocessing.get_context("fork")  # shares the images
    with ProcessPoolExecutor(args.processes, fork, _start, arguments) as pool:
        failed = []

        def give(groups: list[list[Run]]) -> Iterator[list[dict[str, Any]]]:
            """What others finish is kept when one fails, and the next grids are begun."""
            for future in as_completed([pool.submit(_work, group) for group in groups]):
                if error := future.exception():
                    traceback.print_exception(error)
                    failed.append(error)
                else:
                    yield future.result()

        in_order(study, args, give)
        if failed:
            raise SystemExit(f"{len(failed)} groups of runs failed: see above")


def in_order(study: Study, args: argparse.Namespace, give: Callable) -> None:
    """The float network, then all grids; those that take the best rates of earlier ones wait for them."""
    if not float_file(study, args).exists():
        finish([float_run(study)], args, give, anew=True)
    wanted = [grid for grid in study.grids if not args.parts or grid["part"] in args.parts]
    for _, grids in itertools.groupby(wanted, lambda grid: grid["lr"] == "best"):
        rows = read_rows(args.results)
        finish([run for grid in grids for run in runs_of(study, grid, rows)], args, give)


def finish(runs: list[Run], args: argparse.Namespace, give: Callable, anew: bool = False) -> None:
    """Carry out once what is not there yet (`anew`: what is there too) and write it down."""
    known = {key_of(row) for row in read_rows(args.results)}
    runs = list({run.key: run for run in runs if anew or run.key not in known}.values())
    for rows in give(groups_of(runs, args.side_by_side)):
        for row in rows:
            if key_of(row) not in known:
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            (args.work / run_of(row).file).unlink(missing_ok=True)


def groups_of(runs: list[Run], size: int) -> list[list[Run]]:
    """Runs that train at the same time: with the same network to compile, and the longest first where there are several; else in
    their order."""
    if size == 1:
        return [[run] for run in runs]
    alike: dict[tuple[int, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: -run.epochs):
        alike.setdefault((run.epochs, run.network_key), []).append(run)
    return [found[start : start + size] for found in alike.values() for start in range(0, len(found), size)]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.table:
        study = read_study(args.study)
        study = dataclasses.replace(study, dtype=args.dtype or study.dtype)
        warn_of_slow_bf16(study.dtype == "bfloat16", torch.device(args.device), "--dtype float32")
        carry_out(study, args)
    rows = read_rows(args.results)
    print(table(rows), overall(rows), sep="\n\n")
    if args.report:
        report(rows, args.report)


if __name__ == "__main__":
    main()
