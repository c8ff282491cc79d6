"""The training loop of the recipes on Accelerate, and where a run stands (progress, checkpoints)."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

import hf_daq
from shared.options import warn_of_slow_bf16

# What may differ between a run and its continuation.
FREE_ON_RESUME = {
    "dataset",
    "output_dir",
    "checkpoint_every",
    "resume",
    "tracker",
    "log_every",
    "monitor_every",
    "num_workers",
    "export",
}


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochShuffle(Sampler):
    """A permutation that follows from (seed, epoch) alone, equal in every process."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, 1))
        return iter(torch.randperm(self.size, generator=generator).tolist())


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides the tensors."""

    phase: str = "float"
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    update: int = 0  # optimizer updates of this phase
    loss_sum: float = 0.0  # over the updates of this epoch, this process
    best: float | None = None
    seconds: float = 0.0
    total_updates: int = 0
    history: list[dict] = field(default_factory=list)
    results: dict = field(default_factory=dict)
    monitored: list[dict] = field(default_factory=list)  # history of hf_daq.Monitor

    def start_phase(self, phase: str) -> None:
        self.phase, self.epoch, self.batch, self.update, self.loss_sum = phase, 0, 0, 0, 0.0
        self.best, self.seconds = None, 0.0


@dataclass
class Run:
    """One run of a recipe, which says how to compute a loss, how to evaluate and how to save."""

    cfg: Any
    accelerator: Accelerator
    progress: Progress
    train_loader: DataLoader
    eval_loader: DataLoader
    train_set: Any
    shuffle: EpochShuffle
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list, init=False)  # of this phase
    updates: int = field(default=0, init=False)  # of this phase
    phase_start: float = field(default=0.0, init=False)
    monitor: hf_daq.Monitor | None = field(default=None, init=False)
    transitions: hf_daq.TransitionScheduler | None = field(default=None, init=False)

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Tensor:
        """The mean loss of a batch, with the distillation from a teacher if there is one."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> float:
        """The metric over the evaluation split, equal in every process."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the network with these tensors, in the main process."""
        raise NotImplementedError

    @property
    def output(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def start_epoch(self, epoch: int) -> None:
        self.train_set.start_epoch(epoch)
        self.shuffle.epoch = epoch

    def seconds(self) -> float:
        return time.perf_counter() - self.phase_start

    def log(self, values: dict[str, float]) -> None:
        named = {f"{self.progress.phase}/{key}": value for key, value in values.items()}
        self.accelerator.log(named, step=self.progress.total_updates)


def train_phase(
    run: Run,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    epochs: int,
    checkpoint: Path | None,
    teacher: nn.Module | None = None,
) -> None:
    """Train the prepared model to the end of the phase; the best network goes to output_dir, the numbers to results."""
    cfg, accelerator, progress = run.cfg, run.accelerator, run.progress
    per_epoch = math.ceil(len(run.train_loader) / cfg.accumulation)
    updates = min(epochs * per_epoch, cfg.max_steps or sys.maxsize)
    run.optimizers, run.updates = optimizers, updates
    schedules = cosine(optimizers, updates, min(round(cfg.warmup_epochs * per_epoch), updates // 2))
    if cfg.transition_target and progress.phase == "quantized":
        run.transitions = hf_daq.TransitionScheduler(model, optimizers[0], updates, cfg.transition_target)
        accelerator.register_for_checkpointing(run.transitions)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    if cfg.monitor_every and progress.phase == "quantized":
        run.monitor = hf_daq.Monitor(model, cfg.monitor_every)
        run.monitor.steps, run.monitor.history = progress.update, progress.monitored
    run.phase_start = time.perf_counter() - progress.seconds
    bar = tqdm(total=updates, initial=progress.update, desc=progress.phase, disable=None if run.is_main else True)

    while progress.update < updates or progress.batch:
        loss = train_epoch(run, model, schedules, teacher, bar)
        value = run.evaluate(model)
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        entry = {"phase": progress.phase, "epoch": progress.epoch, "train_loss": loss, run.metric: value}
        progress.history.append(entry)
        run.log({"train_loss": loss, f"eval_{run.metric}": value})
        if run.is_main:
            line = f"{progress.phase} epoch {progress.epoch}: training loss {loss:.4f}, {run.metric} {value:.4g}"
            bar.write(f"{line}, {run.seconds():.0f} s")
        if progress.best is None or (value > progress.best if run.higher_is_better else value < progress.best):
            progress.best = value
            tensors = accelerator.get_state_dict(model)  # every process takes part where the model is sharded
            if run.is_main:
                with replacing(run.output / progress.phase) as folder:
                    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                    run.save(accelerator.unwrap_model(model), folder, whole)
    bar.close()
    progress.seconds = run.seconds()
    accelerator.wait_for_everyone()
    progress.results |= {
        progress.phase: progress.best,
        f"{progress.phase}_last": progress.history[-1][run.metric],
        f"{progress.phase}_seconds": progress.seconds,
    }


def cosine(optimizers: list[torch.optim.Optimizer], updates: int, warmup: int) -> list[CosineLRScheduler]:
    """Linear warm-up, then a cosine to 0. Functions of the update alone: there is no state to save."""
    length, settings = updates - warmup + 1, {"warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
    return [CosineLRScheduler(optimizer, length, **settings) for optimizer in optimizers]


def train_epoch(
    run: Run, model: nn.Module, schedules: list[CosineLRScheduler], teacher: nn.Module | None, bar: tqdm
) -> float:
    """Train to the end of the epoch (or of the phase) from where `run.progress` stands. Returns the mean loss."""
    cfg, accelerator, progress = run.cfg, run.accelerator, run.progress
    loss_sum = torch.tensor(progress.loss_sum, device=accelerator.device)
    run.start_epoch(progress.epoch)
    loader = run.train_loader
    if progress.batch:
        loader = accelerate.skip_first_batches(loader, progress.batch)
    model.train()
    for batch in loader:
        if progress.update == run.updates:
            break
        for schedule in schedules:
            schedule.step_update(progress.update + 1)
        if run.transitions:
            run.transitions.apply()
        with accelerator.accumulate(model):
            loss = run.loss(model, batch, teacher)
            if cfg.dampening and progress.phase == "quantized":
                done = progress.update / run.updates
                factor = cfg.dampening * 0.5 * (1 - math.cos(math.pi * done))
                loss = loss + factor * hf_daq.dampening(accelerator.unwrap_model(model))
            accelerator.backward(loss)
            if cfg.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        loss_sum += loss.detach()
        progress.batch += 1
        if not accelerator.sync_gradients:
            continue
        progress.update, progress.total_updates = progress.update + 1, progress.total_updates + 1
        bar.update()
        if run.transitions:
            run.transitions.step()
        if run.monitor and (values := run.monitor.step()):
            run.log(values)
        if progress.update % cfg.log_every == 0:
            lr = run.optimizers[0].param_groups[0]["lr"]
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.5f}")
            run.log({"loss": loss.item(), "lr": lr})
        if cfg.checkpoint_every and progress.total_updates % cfg.checkpoint_every == 0:
            loss_sum = accelerator.reduce(loss_sum, "mean")
            progress.loss_sum, progress.seconds = loss_sum.item(), run.seconds()
            save_checkpoint(run)
    return accelerator.reduce(loss_sum, "mean").item() / progress.batch


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys and plain values, as trackers want them."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, bool | int | float) else str(value)
    return out


def launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def start_accelerator(cfg: Any, checkpoint: Path | None) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=cfg.mixed_precision,
        gradient_accumulation_steps=cfg.accumulation,
        log_with=None if cfg.tracker == "none" else cfg.tracker,
        project_dir=cfg.output_dir,
    )
    if launched_processes() != accelerator.num_processes:
        raise SystemExit(
            f"{launched_processes()} processes were launched, and Accelerate sees {accelerator.num_processes}; without GPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    warn_of_slow_bf16(cfg.mixed_precision == "bf16", accelerator.device, "--mixed_precision no")
    accelerator.init_trackers("hf_daq", config=flat(dataclasses.asdict(cfg)))
    if cfg.resume:
        accelerator.print(f"continues from {checkpoint}" if checkpoint else "no checkpoint yet: starts anew")
    set_seed(cfg.seed)
    return accelerator


def prepare(
    accelerator: Accelerator, cfg: Any, model: nn.Module, *optimizers: torch.optim.Optimizer
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    if cfg.compile:
        model.compile()  # in place: names of parameters stay
    model, *prepared = accelerator.prepare(model, *optimizers)
    return model, prepared


# ----------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write to a temporary folder, whose files take the place of those in `folder` when all are there."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    folder.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        if path.name != "README.md" or not (folder / path.name).exists():  # somebody may have edited it
            os.replace(path, folder / path.name)
    shutil.rmtree(temporary)


def save_checkpoint(run: Run) -> None:
    """accelerator.save_state plus progress.json; the last two are kept. Every process takes part."""
    folder = run.output / "checkpoints" / f"{run.progress.total_updates:08d}"
    temporary = folder.with_name(f".{folder.name}.writing")
    if run.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    run.accelerator.wait_for_everyone()
    run.accelerator.save_state(str(temporary))
    run.accelerator.wait_for_everyone()
    if run.is_main:
        saved = {
            "config": dataclasses.asdict(run.cfg),
            "progress": dataclasses.asdict(run.progress),
            "processes": run.accelerator.num_processes,
        }
        (temporary / "progress.json").write_text(json.dumps(saved, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in list_checkpoints(run.output)[:-2]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


def list_checkpoints(output: Path) -> list[Path]:
    return sorted(path for path in (output / "checkpoints").glob("*") if path.name.isdigit())


def find_checkpoint(cfg: Any) -> tuple[Path | None, Progress]:
    """The newest checkpoint if `resume` is set, and the progress it holds.

    Another number of processes may continue a run if an update is computed from as many examples."""
    found = list_checkpoints(Path(cfg.output_dir))
    if not found:
        return None, Progress()
    if not cfg.resume:
        refuse_to_overwrite(f"{cfg.output_dir}/checkpoints")
    saved = json.loads((found[-1] / "progress.json").read_text())
    before, processes = saved["config"], launched_processes()
    progress = Progress(**saved["progress"])
    if processes != saved["processes"]:
        was, now = (
            (b["batch_size"] * n, b["batch_size"] * b["accumulation"] * n)
            for b, n in ((before, saved["processes"]), (dataclasses.asdict(cfg), processes))
        )
        if was[1] != now[1]:
            raise SystemExit(
                f"{found[-1]} is of {saved['processes']} processes with {was[1]} examples an update, and here it would be "
                f"{now[1]}; change --batch_size or --accumulation"
            )
        progress.batch = progress.batch * was[0] // now[0]
        before = before | {"batch_size": cfg.batch_size, "accumulation": cfg.accumulation}
    refuse_other_settings(cfg, before, found[-1])
    return found[-1], progress


def refuse_missing(checkpoint: str | None) -> None:
    if checkpoint and not Path(checkpoint).exists():
        raise SystemExit(f"checkpoint {checkpoint} does not exist: train the float network first, or name another")


def refuse_to_overwrite(earlier: str) -> None:
    raise SystemExit(
        f"{earlier} holds an earlier run; add --resume to continue it, delete it, or choose another --output_dir"
    )


def refuse_other_settings(cfg: Any, saved: dict[str, Any], path: Path) -> None:
    now, before = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)()) | saved
    changed = [key for key in now if key not in FREE_ON_RESUME and before[key] != now[key]]
    if changed:
        was = ", ".join(f"{key}={before[key]}" for key in changed)
        raise SystemExit(f"{path} is of a run with {was}; a continued run needs the same settings")


def write_results(run: Run, *modules: ModuleType) -> dict[str, str]:
    """Write results.json, and return the versions of the modules."""
    report = {
        "results": run.progress.results,
        "history": run.progress.history,
        "config": dataclasses.asdict(run.cfg),
        "seed": run.cfg.seed,
        "device": str(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "versions": versions(*modules),
    }
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    if run.progress.monitored:
        write_monitored(run.output, run.progress.monitored)
    return versions(*modules)


def write_monitored(output: Path, history: list[dict]) -> None:
    """What hf_daq.Monitor found, all layers, as it keeps it."""
    (output / "monitor.json").write_text(json.dumps(history) + "\n")


def versions(*modules: ModuleType) -> dict[str, str]:
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
