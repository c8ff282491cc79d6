"""Train an image classifier, then quantize it to a few bits with DAQ. One file, read from the top downwards.

    python recipes/image_classification.py                              # digits: seconds on a CPU, no network
    python recipes/image_classification.py --config recipes/configs/cifar10_resnet20_w1a1.yaml --dataset DIR_OR_ID
    accelerate launch recipes/image_classification.py --config recipes/configs/resnet18_w3a3.yaml --daq.rounding ste

A run has two phases. The float phase (`float_epochs`; 0 when the network comes from `pretrained` or `checkpoint`)
trains the network as it is; the DAQ phase (`epochs`) starts from those float weights. The best network of each phase
is saved to output_dir/float and output_dir/quantized, and opens with
timm.create_model("local-dir:...", pretrained=True); the numbers of the run are in output_dir/results.json.

Every field of `Config` is a key of the YAML file and a command-line option (`--daq.weight_bits 2 --epochs 3`); the
command line wins. `--resume` continues a run that was stopped, bit for bit as if it had not been (with the same
number of processes and threads).

Accuracy is top-1 on `eval_split`, by default the test split. `quantized_last` is of the last epoch; `quantized` and
`float` are of the best epoch, picked on the very images they are measured on.
"""

import contextlib
import copy
import dataclasses
import difflib
import itertools
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import accelerate
import cifar_resnet  # noqa: F401  registers resnet20_cifar and resnet8_cifar with timm
import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

import hf_daq

# ---------------------------------------------------------------------------------------------------------- knobs


@dataclass
class Distillation:
    """Loss = (1 - alpha) * cross-entropy + alpha * temperature^2 * KL to the float network's outputs (DAQ phase)."""

    alpha: float = 0.0
    temperature: float = 4.0


@dataclass
class Config:
    """The defaults are the digits experiment (configs/digits_w3a3.yaml)."""

    # data: "digits", a Hub id, a folder of images or of parquet files
    dataset: str = "digits"
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    image_column: str | None = None  # None: found by the type of the columns
    label_column: str | None = None
    pipeline: str = "auto"  # "memory": decoded once, crop and flip of whole batches; "timm": timm's transforms; "auto"
    image_size: int | None = None  # None: that of the images (memory) or of the model (timm)
    crop_padding: int = 1  # memory pipeline
    hflip: float = 0.0
    transform_kwargs: dict = field(default_factory=dict)  # timm pipeline: more arguments of create_transform, training
    num_workers: int = 4  # of the timm pipeline

    # model
    model: str = "resnet8_cifar"
    model_kwargs: dict = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None  # folder with config.json, or weights file

    # float phase
    float_epochs: int = 12
    float_lr: float = 0.1
    float_weight_decay: float = 5e-4

    # DAQ phase; `daq` holds the fields of hf_daq.DaqConfig, or `preset: paper` and those of DaqConfig.paper
    daq: dict = field(default_factory=lambda: {"weight_bits": 3, "activation_bits": 3})
    epochs: int = 12
    lr: float = 0.005
    weight_decay: float = 1e-4
    quantizer_lr: float = 1e-3
    calibration_batches: int = 4
    distillation: Distillation = field(default_factory=Distillation)

    # both phases
    optimizer: str = "sgd"  # or "adamw"
    momentum: float = 0.9
    nesterov: bool = True
    warmup_epochs: float = 1.0
    batch_size: int = 64  # per process
    accumulation: int = 1  # batches per update
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    mixed_precision: str = "no"  # or "bf16"
    channels_last: bool = False
    compile: bool = False
    max_steps: int | None = None  # updates per phase, for a quick look

    # run
    seed: int = 0
    output_dir: str = "output"
    checkpoint_every: int = 0  # updates; 0: none
    resume: bool = False
    tracker: str = "none"  # "tensorboard", "trackio"
    log_every: int = 50


CHOICES = {
    "pipeline": ("auto", "memory", "timm"),
    "optimizer": ("sgd", "adamw"),
    "mixed_precision": ("no", "bf16"),
    "tracker": ("none", "tensorboard", "trackio"),
}
# What may differ between a run and its continuation.
FREE_ON_RESUME = {"dataset", "output_dir", "checkpoint_every", "resume", "tracker", "log_every", "num_workers"}


def parse(argv: list[str]) -> Config:
    """YAML file (`--config`) plus overrides (`--key value`, `--key.sub value`, `--key=value`, `--flag`) -> Config."""
    if "-h" in argv or "--help" in argv:
        print(__doc__ + "\nKeys and defaults:\n\n" + yaml.safe_dump(dataclasses.asdict(Config()), sort_keys=False))
        raise SystemExit(0)
    overrides: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise SystemExit(f"unexpected argument {token!r}; options are written --key value")
        key, equals, text = token[2:].partition("=")
        if not equals:
            text = tokens.pop(0) if tokens and not tokens[0].startswith("--") else "true"
        overrides[key] = yaml.safe_load(text)
    values: dict[str, Any] = {}
    if config := overrides.pop("config", None):
        values = yaml.safe_load(Path(config).read_text()) or {}
    if "daq.bits" in overrides:  # replaces both numbers of the file
        overrides["daq.weight_bits"] = overrides["daq.activation_bits"] = overrides.pop("daq.bits")
    defaults = dataclasses.asdict(Config())
    for dotted, value in overrides.items():
        parent, dot, key = dotted.rpartition(".")
        target = values.setdefault(parent, defaults.get(parent, {})) if dot else values
        if not isinstance(target, dict):
            raise SystemExit(f"unknown key {dotted!r}: {parent} is a single value")
        target[key] = value
    return fill(Config, values)


def fill(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build the dataclass from plain values, refusing what it does not know."""
    hints = get_type_hints(cls)
    known = {}
    for key, value in values.items():
        if key not in hints:
            closest = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise SystemExit(f"unknown key {prefix + key!r}; the closest is {prefix + closest!r} (--help lists all)")
        known[key] = convert(prefix + key, value, hints[key])
    return cls(**known)


def convert(key: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    kind = kinds[0]
    if value is None and type(None) in kinds:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return fill(kind, value, key + ".")
    if key == "mixed_precision" and value is False:
        value = "no"  # as YAML reads it without quotes
    if key in CHOICES and value not in CHOICES[key]:
        raise SystemExit(f"{key} is {value!r}; allowed are {', '.join(CHOICES[key])}")
    if kind is dict and isinstance(value, dict):
        return {k: as_number(v) for k, v in value.items()}
    if kind is float and not isinstance(value, bool) and isinstance(as_number(value), int | float):
        return float(as_number(value))
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        raise SystemExit(f"{key} is {value!r}; a value of type {kind.__name__} is wanted")
    return value


def as_number(value: Any) -> Any:
    """YAML reads `1e-4` (no dot) as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def daq_config(values: dict[str, Any]) -> hf_daq.DaqConfig:
    values = dict(values)
    preset = values.pop("preset", None)
    if preset not in (None, "paper"):
        raise SystemExit(f"daq.preset is {preset!r}; allowed is 'paper', or leave it out")
    return hf_daq.DaqConfig.paper(**values) if preset else hf_daq.DaqConfig.from_dict(values)


# ----------------------------------------------------------------------------------------------------------- data


@dataclass
class Images:
    """The two splits as read, before any decoding."""

    train: datasets.Dataset
    eval: datasets.Dataset
    image_column: str
    label_column: str
    label_names: list[str]


def read_images(cfg: Config) -> Images:
    splits = digits() if cfg.dataset == "digits" else datasets.load_dataset(cfg.dataset, cfg.dataset_config)
    for split in (cfg.train_split, cfg.eval_split):
        if split not in splits:
            raise SystemExit(f"{cfg.dataset} has no split {split!r}; it has {', '.join(splits)}")
    features = splits[cfg.train_split].features
    image = column(features, cfg.image_column, datasets.Image, "image_column")
    label = column(features, cfg.label_column, (datasets.ClassLabel, datasets.Value), "label_column")
    if isinstance(features[label], datasets.ClassLabel):
        names = features[label].names
    elif features[label].dtype.startswith("int"):
        names = [str(i) for i in range(max(splits[cfg.train_split][label]) + 1)]
    else:
        raise SystemExit(f"label column {label!r} holds {features[label].dtype}; integers or a ClassLabel are wanted")
    return Images(splits[cfg.train_split], splits[cfg.eval_split], image, label, names)


def column(features: datasets.Features, name: str | None, kinds: type | tuple, option: str) -> str:
    """The named column, else the only one whose type fits (of several labels, the ClassLabel)."""
    found = [name] if name else [key for key, feature in features.items() if isinstance(feature, kinds)]
    if len(found) > 1:
        found = [key for key in found if isinstance(features[key], datasets.ClassLabel)]
    if len(found) != 1 or found[0] not in features:
        raise SystemExit(f"no single column fits; name it with --{option}. The columns are {dict(features)}")
    return found[0]


def digits() -> datasets.DatasetDict:
    """The 1797 handwritten digits (8x8) that scikit-learn ships, a fifth of them for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = [Image.fromarray(image) for image in (pixels.reshape(-1, 8, 8) * 15.9375).astype(np.uint8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    whole = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return whole.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


class MemoryImages(Dataset):
    """A small data set decoded once; a batch is cropped, flipped and normalised as one tensor.

    Crop and flip of an image follow from (seed, epoch, index) alone, so a continued epoch sees what it would have seen.
    """

    def __init__(self, split: datasets.Dataset, images: Images, size: int, mean: tuple, std: tuple, cfg: Config | None):
        decoded = (row[images.image_column].convert("RGB") for row in split)
        resized = (image if image.size == (size, size) else image.resize((size, size), 3) for image in decoded)
        self.pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
        self.labels = torch.tensor(split[images.label_column])
        self.mean, self.std = torch.tensor(mean) * 255, torch.tensor(std) * 255
        self.augment = cfg
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        if self.augment:
            generator = torch.Generator().manual_seed(seed_of(self.augment.seed, epoch))
            self.shift = torch.randint(0, 2 * self.augment.crop_padding + 1, (len(self), 2), generator=generator)
            self.flip = torch.rand(len(self), generator=generator) < self.augment.hflip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        pixels = self.pixels[indices]
        if self.augment:
            count, height, width, _ = pixels.shape
            padding = self.augment.crop_padding
            rows = torch.arange(height) + self.shift[indices, :1]
            columns = torch.arange(width).expand(count, width)
            columns = torch.where(self.flip[indices, None], columns.flip(1), columns) + self.shift[indices, 1:]
            padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
            pixels = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2), self.labels[indices]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch


class TransformedImages(Dataset):
    """Images read when asked for, through timm's transforms, whose randomness follows from (seed, epoch, index)."""

    collate = None

    def __init__(self, split: datasets.Dataset, images: Images, transform: Callable, seed: int):
        self.split, self.images, self.transform, self.seed = split, images, transform, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.split[index]
        with seeded(seed_of(self.seed, self.epoch, index)):
            image = self.transform(row[self.images.image_column].convert("RGB"))
        return image, row[self.images.label_column]


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the three random number generators that transforms draw from seeded, then put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class EpochShuffle(Sampler):
    """A permutation that follows from (seed, epoch) alone, equal in every process."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, 1))
        return iter(torch.randperm(self.size, generator=generator).tolist())


def make_loaders(images: Images, cfg: Config, data_config: dict, in_memory: bool) -> tuple[DataLoader, DataLoader]:
    mean, std, (_, size, _) = data_config["mean"], data_config["std"], data_config["input_size"]
    if in_memory:
        train = MemoryImages(images.train, images, size, mean, std, cfg)
        test = MemoryImages(images.eval, images, size, mean, std, None)
    else:
        transform = create_transform(**data_config, is_training=True, hflip=cfg.hflip, **cfg.transform_kwargs)
        train = TransformedImages(images.train, images, transform, cfg.seed)
        test = TransformedImages(images.eval, images, create_transform(**data_config), cfg.seed)
    if len(train) < cfg.batch_size:
        raise SystemExit(f"batch_size is {cfg.batch_size}, but the training split has only {len(train)} images")
    # A loader draws a seed for its workers when an epoch begins. From a generator of its own, or else a continued run,
    # which begins its epoch once more, would be one number ahead in the global one.
    options = {
        "batch_size": cfg.batch_size,
        "collate_fn": train.collate,
        "num_workers": 0 if in_memory else cfg.num_workers,
        "generator": torch.Generator(),
    }
    shuffle = EpochShuffle(len(train), cfg.seed)
    return DataLoader(train, sampler=shuffle, drop_last=True, **options), DataLoader(test, **options)


# ------------------------------------------------------------------------------------------- model and optimizers


def create_float_model(cfg: Config, images: Images, size: int | None, checkpoint: str | None) -> nn.Module:
    """The timm model with the weights of `checkpoint` (or `pretrained`), which knows image size and label names."""
    overlay: dict[str, Any] = {"label_names": images.label_names}
    if size:
        overlay["input_size"] = (3, size, size)
    options = {"num_classes": len(images.label_names), **cfg.model_kwargs}
    path = Path(checkpoint) if checkpoint else None
    if path and not path.exists():
        raise SystemExit(f"checkpoint {path} does not exist: train the float network first, or name another")
    if path and path.is_dir():
        saved = json.loads((path / "config.json").read_text())["architecture"]
        if saved != cfg.model.partition(".")[0]:
            raise SystemExit(f"checkpoint {path} holds a {saved}, and --model is {cfg.model}")
        model = timm.create_model(f"local-dir:{path}", pretrained=True, **options)
    else:
        model = timm.create_model(cfg.model, pretrained=cfg.pretrained and not path, **options)
        if path:
            timm.models.load_checkpoint(model, str(path))
    model.pretrained_cfg.update(overlay)
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


def weight_optimizer(groups: list[dict], cfg: Config, lr: float) -> torch.optim.Optimizer:
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov)


class CosineSchedule:
    """Linear warm-up, then a cosine to 0. A function of the update alone: there is no state to save."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], updates: int, warmup: int):
        self.optimizers, self.updates, self.warmup = optimizers, updates, warmup
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def set(self, update: int) -> None:
        if update < self.warmup:
            factor = (update + 1) / self.warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (update - self.warmup) / (self.updates - self.warmup)))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor


# ----------------------------------------------------------------------------------------------------------- loop


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides the tensors."""

    phase: str = "float"
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    update: int = 0  # optimizer updates of this phase
    loss_sum: float = 0.0  # over the updates of this epoch, this process
    best: float = -1.0
    seconds: float = 0.0
    total_updates: int = 0
    history: list[dict] = field(default_factory=list)
    results: dict = field(default_factory=dict)

    def start_phase(self, phase: str) -> None:
        self.phase, self.epoch, self.batch, self.update, self.loss_sum = phase, 0, 0, 0, 0.0
        self.best, self.seconds = -1.0, 0.0


@dataclass
class Run:
    """What the two phases share."""

    cfg: Config
    accelerator: Accelerator
    progress: Progress
    train_loader: DataLoader
    eval_loader: DataLoader
    train_set: MemoryImages | TransformedImages
    shuffle: EpochShuffle
    phase_start: float = 0.0

    @property
    def output(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.cfg.channels_last else torch.contiguous_format

    def start_epoch(self, epoch: int) -> None:
        self.train_set.start_epoch(epoch)
        self.shuffle.epoch = epoch

    def seconds(self) -> float:
        return time.perf_counter() - self.phase_start

    def log(self, values: dict[str, float]) -> None:
        named = {f"{self.progress.phase}/{key}": value for key, value in values.items()}
        self.accelerator.log(named, step=self.progress.total_updates)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module) -> float:
    """Top-1 in percent, over all processes."""
    model.eval()
    correct = count = 0
    for images, labels in run.eval_loader:
        with run.accelerator.autocast():
            logits = model(images.contiguous(memory_format=run.memory_format))
        hits = run.accelerator.gather_for_metrics(logits.argmax(1) == labels)
        correct, count = correct + hits.sum().item(), count + len(hits)
    return 100 * correct / count


def train_phase(
    run: Run,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    epochs: int,
    save: Callable[[nn.Module, Path], None],
    checkpoint: Path | None,
    teacher: nn.Module | None = None,
) -> float:
    """Train the prepared model to the end of the phase; the best network goes to output_dir. Returns the last top-1."""
    cfg, accelerator, progress = run.cfg, run.accelerator, run.progress
    per_epoch = math.ceil(len(run.train_loader) / cfg.accumulation)
    updates = min(epochs * per_epoch, cfg.max_steps or sys.maxsize)
    schedule = CosineSchedule(optimizers, updates, min(round(cfg.warmup_epochs * per_epoch), updates // 2))
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    run.phase_start = time.perf_counter() - progress.seconds
    bar = tqdm(total=updates, initial=progress.update, desc=progress.phase, disable=None if run.is_main else True)

    while progress.update < updates or progress.batch:
        loss = train_epoch(run, model, schedule, teacher, bar)
        accuracy = evaluate(run, model)
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        progress.history.append({"phase": progress.phase, "epoch": progress.epoch, "loss": loss, "accuracy": accuracy})
        run.log({"train_loss": loss, "accuracy": accuracy})
        if run.is_main:
            line = f"{progress.phase} epoch {progress.epoch}: loss {loss:.4f}, top-1 {accuracy:.2f}"
            bar.write(f"{line}, {run.seconds():.0f} s")
        if accuracy > progress.best:
            progress.best = accuracy
            if run.is_main:
                with replacing(run.output / progress.phase) as folder:
                    model.to(memory_format=torch.contiguous_format)  # safetensors refuses other strides
                    save(accelerator.unwrap_model(model), folder)
                    model.to(memory_format=run.memory_format)
    bar.close()
    progress.seconds = run.seconds()
    accelerator.wait_for_everyone()
    return progress.history[-1]["accuracy"]


def train_epoch(run: Run, model: nn.Module, schedule: CosineSchedule, teacher: nn.Module | None, bar: tqdm) -> float:
    """Train to the end of the epoch (or of the phase) from where `run.progress` stands. Returns the mean loss."""
    cfg, accelerator, progress = run.cfg, run.accelerator, run.progress
    loss_sum = torch.tensor(progress.loss_sum, device=accelerator.device)
    run.start_epoch(progress.epoch)
    loader = run.train_loader
    if progress.batch:
        loader = accelerate.skip_first_batches(loader, progress.batch)
    model.train()
    for images, labels in loader:
        if progress.update == schedule.updates:
            break
        schedule.set(progress.update)
        images = images.contiguous(memory_format=run.memory_format)
        with accelerator.accumulate(model):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
            if teacher is not None:
                with torch.no_grad(), accelerator.autocast():
                    teacher_logits = teacher(images).float()
                loss = distill(loss, logits, teacher_logits, cfg.distillation)
            accelerator.backward(loss)
            if cfg.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad)
            for optimizer in schedule.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        loss_sum += loss.detach()
        progress.batch += 1
        if not accelerator.sync_gradients:
            continue
        progress.update, progress.total_updates = progress.update + 1, progress.total_updates + 1
        bar.update()
        if progress.update % cfg.log_every == 0:
            lr = schedule.optimizers[0].param_groups[0]["lr"]
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.4f}")
            run.log({"loss": loss.item(), "lr": lr})
        if cfg.checkpoint_every and progress.total_updates % cfg.checkpoint_every == 0:
            loss_sum = accelerator.reduce(loss_sum, "mean")
            progress.loss_sum, progress.seconds = loss_sum.item(), run.seconds()
            save_checkpoint(run)
    return accelerator.reduce(loss_sum, "mean").item() / progress.batch


def distill(loss: Tensor, logits: Tensor, teacher_logits: Tensor, settings: Distillation) -> Tensor:
    alpha, temperature = settings.alpha, settings.temperature
    student, teacher = F.log_softmax(logits.float() / temperature, 1), F.log_softmax(teacher_logits / temperature, 1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - alpha) * loss + alpha * temperature**2 * divergence


# ----------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write to a temporary folder that takes the place of `folder` only when complete."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


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
        saved = {"config": dataclasses.asdict(run.cfg), "progress": dataclasses.asdict(run.progress)}
        (temporary / "progress.json").write_text(json.dumps(saved, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in list_checkpoints(run.output)[:-2]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


def list_checkpoints(output: Path) -> list[Path]:
    return sorted(path for path in (output / "checkpoints").glob("*") if path.name.isdigit())


def find_checkpoint(cfg: Config) -> tuple[Path | None, Progress]:
    """The newest checkpoint if `resume` is set, and the progress it holds."""
    found = list_checkpoints(Path(cfg.output_dir))
    if not found:
        return None, Progress()
    if not cfg.resume:
        raise SystemExit(
            f"{cfg.output_dir}/checkpoints holds an earlier run; add --resume to continue it, "
            "delete it, or choose another --output_dir"
        )
    saved = json.loads((found[-1] / "progress.json").read_text())
    now = dataclasses.asdict(cfg)
    before = dataclasses.asdict(Config()) | saved["config"]
    changed = [key for key in now if key not in FREE_ON_RESUME and before[key] != now[key]]
    if changed:
        was = ", ".join(f"{key}={before[key]}" for key in changed)
        raise SystemExit(f"{found[-1]} is of a run with {was}; a continued run needs the same settings")
    return found[-1], Progress(**saved["progress"])


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    if cfg.epochs and not (cfg.float_epochs or cfg.pretrained or cfg.checkpoint):
        raise SystemExit("the DAQ phase starts from float weights: set float_epochs, pretrained or checkpoint")
    quantization = daq_config(cfg.daq)
    checkpoint, progress = find_checkpoint(cfg)
    accelerator = Accelerator(
        mixed_precision=cfg.mixed_precision,
        gradient_accumulation_steps=cfg.accumulation,
        log_with=None if cfg.tracker == "none" else cfg.tracker,
        project_dir=cfg.output_dir,
    )
    accelerator.init_trackers("hf_daq", config=flat(dataclasses.asdict(cfg)))
    if cfg.resume:
        accelerator.print(f"continues from {checkpoint}" if checkpoint else "no checkpoint yet: starts anew")
    set_seed(cfg.seed)

    # data
    images = read_images(cfg)
    width, height = images.train[0][images.image_column].size
    small = max(width, height) <= 64 and (len(images.train) + len(images.eval)) * width * height * 3 < 2**31
    in_memory = cfg.pipeline == "memory" or (cfg.pipeline == "auto" and small)
    size = cfg.image_size or (max(width, height) if in_memory else None)
    model = create_float_model(cfg, images, size, cfg.checkpoint)
    loaders = make_loaders(images, cfg, resolve_data_config({}, model=model), in_memory)
    train_set, shuffle = loaders[0].dataset, loaders[0].sampler
    run = Run(cfg, accelerator, progress, *accelerator.prepare(*loaders), train_set, shuffle)
    results = progress.results

    if cfg.float_epochs and progress.phase == "float":
        groups = param_groups_weight_decay(model, cfg.float_weight_decay)
        model, optimizers = prepare(accelerator, cfg, model, weight_optimizer(groups, cfg, cfg.float_lr))
        results["float_last"] = train_phase(run, model, optimizers, cfg.float_epochs, save_float, checkpoint)
        results["float"], results["float_seconds"] = progress.best, progress.seconds
        checkpoint = None
        accelerator.free_memory()

    if cfg.epochs:
        if progress.phase == "float":
            progress.start_phase("quantized")
        start = f"{cfg.output_dir}/float" if cfg.float_epochs else cfg.checkpoint
        model = create_float_model(cfg, images, size, start).to(accelerator.device)
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if cfg.distillation.alpha else None
        if checkpoint is None:
            results["float"] = evaluate(run, model)

        # The DAQ part: patch, calibrate, and give the quantizers an optimizer of their own.
        hf_daq.apply_daq(model, quantization)
        if checkpoint:
            load_quantizers(model, checkpoint)
        else:
            run.start_epoch(0)
            with hf_daq.calibrate(model):
                for batch, _ in itertools.islice(run.train_loader, cfg.calibration_batches):
                    model(batch)
        *groups, quantizers = hf_daq.param_groups(model, cfg.lr, cfg.quantizer_lr, cfg.weight_decay)
        weights, bounds = weight_optimizer(groups, cfg, cfg.lr), torch.optim.Adam([quantizers])

        model, optimizers = prepare(accelerator, cfg, model, weights, bounds)
        if checkpoint is None:
            results["calibrated"] = evaluate(run, model)
        save = hf_daq.save_pretrained
        results["quantized_last"] = train_phase(run, model, optimizers, cfg.epochs, save, checkpoint, teacher)
        results["quantized"], results["quantized_seconds"] = progress.best, progress.seconds

    if run.is_main:
        write_results(run)
        print(", ".join(f"{key} {value:.2f}" for key, value in results.items()))
    accelerator.end_training()
    return results


def prepare(
    accelerator: Accelerator, cfg: Config, model: nn.Module, *optimizers: torch.optim.Optimizer
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    if cfg.compile:
        model.compile()  # in place: names of parameters stay
    model, *prepared = accelerator.prepare(model, *optimizers)
    return model, prepared


def load_quantizers(model: nn.Module, checkpoint: Path) -> None:
    """Bounds and scales of a continued run. Their values say which of them learn, so they precede the optimizers."""
    state = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})


def save_float(model: nn.Module, folder: Path) -> None:
    save_for_hf(model, folder, safe_serialization=True)


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys and plain values, as trackers want them."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, bool | int | float) else str(value)
    return out


def write_results(run: Run) -> None:
    versions = {module.__name__: module.__version__ for module in (torch, timm, accelerate, datasets, hf_daq)}
    report = {
        "results": run.progress.results,
        "history": run.progress.history,
        "config": dataclasses.asdict(run.cfg),
        "seed": run.cfg.seed,
        "device": str(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **versions},
    }
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
