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
import difflib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import accelerate
import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hf_daq
import networks  # noqa: F401  registers networks for small images with timm
from shared import finish, loop, options
from shared.data import eval_name, load_splits, split_pair
from shared.distillation import Distillation, distill, last_features
from shared.loop import (
    EpochShuffle,
    find_checkpoint,
    prepare,
    seed_of,
    start_accelerator,
    train_phase,
    write_results,
)
from shared.options import LoopOptions, daq_config

# ---------------------------------------------------------------------------------------------------------- knobs


@dataclass
class Config(LoopOptions):
    """The defaults are the digits experiment (configs/digits_w3a3.yaml)."""

    dataset: str = "digits"
    """`digits`, a Hub id, or a folder of images or of parquet files."""
    dataset_config: str | None = None
    """Configuration of the data set on the Hub."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    eval_fraction: float | None = None
    """Share of each class of the training split to evaluate on, for a data set without `eval_split`."""
    image_column: str | None = None
    """Column of images; null finds it by its type."""
    label_column: str | None = None
    """Column of classes; null finds it by its type."""
    pipeline: Literal["auto", "memory", "timm"] = "auto"
    """`memory` decodes images once, and crops and flips whole batches; `timm` uses timm's transforms."""
    image_size: int | None = None
    """Pixels; null for those of the images (memory) or of the model (timm)."""
    crop_padding: int = 1
    """Pixels around an image of which it is cropped again (memory pipeline)."""
    hflip: float = 0.0
    """Probability that an image is flipped."""
    transform_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.data.create_transform in training (timm pipeline)."""
    num_workers: int = 4
    """Processes that read images (timm pipeline)."""

    model: str = "resnet8_cifar"
    """Name of a timm model."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.create_model."""
    pretrained: bool = False
    """Whether to start from timm's pretrained weights."""
    checkpoint: str | None = None
    """Weights to start from: a folder with config.json, or a weights file."""

    float_epochs: int = 12
    """Epochs of the float phase."""
    float_lr: float = 0.1
    """Learning rate of the float phase."""
    float_weight_decay: float = 5e-4
    """Weight decay of the float phase."""

    daq: dict[str, Any] = field(default_factory=lambda: {"weight_bits": 3, "activation_bits": 3})
    """Fields of hf_daq.DaqConfig (daq.bits, daq.rounding, ...), or `preset: paper` and those of DaqConfig.paper."""
    epochs: int = 12
    """Epochs of the DAQ phase."""
    lr: float = 0.005
    """Learning rate of weights in the DAQ phase."""
    weight_decay: float = 1e-4
    """Weight decay of the DAQ phase."""
    quantizer_lr: float = 1e-3
    """Learning rate of bounds and scales."""
    calibration_batches: int = 4
    """Training batches to calibrate on, in each process."""
    distillation: Distillation = field(default_factory=Distillation)

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of weights; fp16, FSDP and DeepSpeed take adamw alone."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Whether it is Nesterov's."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    channels_last: bool = False
    """Whether images and weights lie in memory channels last."""


def parse(argv: list[str]) -> Config:
    return options.parse(Config, argv, __doc__)


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
    splits = load_splits(cfg, {"digits": digits})
    features = next(iter(splits.values())).features
    image = column(features, cfg.image_column, datasets.Image, "image_column")
    label = column(features, cfg.label_column, (datasets.ClassLabel, datasets.Value), "label_column")
    train, evaluation = split_pair(splits, cfg, label)
    if isinstance(features[label], datasets.ClassLabel):
        names = features[label].names
    elif features[label].dtype.startswith("int"):
        names = [str(i) for i in range(max(train[label]) + 1)]
    else:
        raise SystemExit(f"label column {label!r} holds {features[label].dtype}; integers or a ClassLabel are wanted")
    return Images(train, evaluation, image, label, names)


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


# What timm calls the preprocessing of MemoryImages: the whole image, stretched to a square.
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
BICUBIC = 3


class MemoryImages(Dataset):
    """A small data set decoded once; a batch is cropped, flipped and normalised as one tensor.

    Crop and flip of an image follow from (seed, epoch, index) alone, so a continued epoch sees what it would have seen.
    """

    def __init__(self, split: datasets.Dataset, images: Images, size: int, mean: tuple, std: tuple, cfg: Config | None):
        decoded = (row[images.image_column].convert("RGB") for row in split)
        resized = (image if image.size == (size, size) else image.resize((size, size), BICUBIC) for image in decoded)
        self.pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
        self.labels = torch.tensor(split[images.label_column])
        self.mean, self.std = torch.tensor(mean) * 255, torch.tensor(std) * 255
        self.augment = cfg
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        if self.augment:
            generator = torch.Generator().manual_seed(seed_of(self.augment.seed, epoch))
            shift = torch.randint(0, 2 * self.augment.crop_padding + 1, (len(self), 2), generator=generator)
            flip = torch.rand(len(self), generator=generator) < self.augment.hflip
            self.shift, self.flip = shift.to(self.pixels.device), flip.to(self.pixels.device)

    def to(self, device: str) -> "MemoryImages":
        """A copy with images and batches on this device."""
        moved = copy.copy(self)
        moved.__dict__ |= {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return moved

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        pixels = self.pixels[indices]
        if self.augment:
            count, height, width, _ = pixels.shape
            padding = self.augment.crop_padding
            device = pixels.device
            rows = torch.arange(height, device=device) + self.shift[indices, :1]
            columns = torch.arange(width, device=device).expand(count, width)
            columns = torch.where(self.flip[indices, None], columns.flip(1), columns) + self.shift[indices, 1:]
            padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
            pixels = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
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
    arguments = {
        "batch_size": cfg.batch_size,
        "collate_fn": train.collate,
        "num_workers": 0 if in_memory else cfg.num_workers,
        "generator": torch.Generator(),
    }
    shuffle = EpochShuffle(len(train), cfg.seed)
    return DataLoader(train, sampler=shuffle, drop_last=True, **arguments), DataLoader(test, **arguments)


# ------------------------------------------------------------------------------------------- model and optimizers


# Entries of timm's description of a network that tell where pretrained weights come from.
SOURCES = ("tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "origin_url", "paper_name", "paper_ids")
SOURCES += ("license", "notes")


def create_float_model(cfg: Config, images: Images, preprocessing: dict, checkpoint: str | None) -> nn.Module:
    """The timm model with the weights of `checkpoint` (or `pretrained`), which knows preprocessing and label names."""
    arguments = {"num_classes": len(images.label_names), **cfg.model_kwargs}
    loop.refuse_missing(checkpoint)
    path = Path(checkpoint) if checkpoint else None
    if path and path.is_dir():
        saved = json.loads((path / "config.json").read_text())["architecture"]
        if saved != cfg.model.partition(".")[0]:
            raise SystemExit(f"checkpoint {path} holds a {saved}, and --model is {cfg.model}")
        model = timm.create_model(f"local-dir:{path}", pretrained=True, **arguments)
    else:
        model = timm.create_model(cfg.model, pretrained=cfg.pretrained and not path, **arguments)
        if path:
            timm.models.load_checkpoint(model, str(path))
        if path or not cfg.pretrained:
            for key in SOURCES:
                model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update(preprocessing, label_names=images.label_names)
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


def refuse_unknown_model(name: str) -> None:
    known = name.partition(".")[0]
    if ":" not in name and not timm.is_model(known):
        closest = difflib.get_close_matches(known, timm.list_models(), n=1, cutoff=0.0)[0]
        raise SystemExit(f"timm has no model {known!r}; the closest is {closest!r}")


def origin(cfg: Config) -> tuple[str | None, str | None]:
    """Hub id and licence of the pretrained network, as far as timm knows them."""
    if not cfg.pretrained:
        return None, None
    if cfg.model.startswith("hf-hub:"):
        return cfg.model.removeprefix("hf-hub:"), None
    pretrained = timm.models.get_pretrained_cfg(cfg.model)
    return (pretrained.hf_hub_id, pretrained.license) if pretrained else (None, None)


def weight_optimizer(groups: list[dict], cfg: Config, lr: float) -> torch.optim.Optimizer:
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov)


# ----------------------------------------------------------------------------------------------------------- loop


class Run(loop.Run):
    metric, higher_is_better = "accuracy", True

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.cfg.channels_last else torch.contiguous_format

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], teacher: nn.Module | None) -> Tensor:
        images, labels = batch
        images = images.contiguous(memory_format=self.memory_format)
        if teacher is None:
            return F.cross_entropy(model(images), labels, label_smoothing=self.cfg.label_smoothing)
        settings = self.cfg.distillation
        with last_features(settings, self.accelerator.unwrap_model(model), teacher) as features:
            logits = model(images)
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = teacher(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.cfg.label_smoothing)
        return distill(loss, logits, teacher_logits, settings, features)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Top-1 in percent."""
        model.eval()
        correct = count = 0
        for images, labels in self.eval_loader:
            with self.accelerator.autocast():
                logits = model(images.contiguous(memory_format=self.memory_format))
            hits = self.accelerator.gather_for_metrics(logits.argmax(1) == labels)
            correct, count = correct + hits.sum().item(), count + len(hits)
        return 100 * correct / count

    def save(self, model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> None:
        if self.progress.phase == "quantized":
            hf_daq.save_pretrained(model, folder, state_dict=tensors)
        else:
            save_config_for_hf(model, str(folder / "config.json"))
            save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    cfg = parse(arguments)
    if cfg.epochs and not (cfg.float_epochs or cfg.pretrained or cfg.checkpoint):
        raise SystemExit("the DAQ phase starts from float weights: set float_epochs, pretrained or checkpoint")
    if cfg.mixed_precision == "fp16" and cfg.optimizer != "adamw":
        raise SystemExit(
            "sgd comes with an Adam for bounds and scales, and fp16 has one loss scale: take bf16 or adamw"
        )
    refuse_unknown_model(cfg.model)
    quantization, exports = daq_config(cfg.daq), finish.formats(cfg.export)
    checkpoint, progress = find_checkpoint(cfg)
    accelerator = start_accelerator(cfg, checkpoint)
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED") and cfg.optimizer != "adamw":
        raise SystemExit("sgd comes with an Adam for bounds and scales; FSDP and DeepSpeed take one: pass adamw")

    # data
    images = read_images(cfg)
    width, height = images.train[0][images.image_column].size
    small = max(width, height) <= 64 and (len(images.train) + len(images.eval)) * width * height * 3 < 2**31
    in_memory = cfg.pipeline == "memory" or (cfg.pipeline == "auto" and small)
    size = cfg.image_size or (max(width, height) if in_memory else None)
    preprocessing: dict[str, Any] = {"input_size": (3, size, size)} if size else {}
    if in_memory:
        preprocessing |= WHOLE
    model = create_float_model(cfg, images, preprocessing, cfg.checkpoint)
    loaders = make_loaders(images, cfg, resolve_data_config({}, model=model), in_memory)
    train_set, shuffle = loaders[0].dataset, loaders[0].sampler
    run = Run(cfg, accelerator, progress, *accelerator.prepare(*loaders), train_set, shuffle)
    results = progress.results

    if cfg.float_epochs and progress.phase == "float":
        groups = param_groups_weight_decay(model, cfg.float_weight_decay)
        model, optimizers = prepare(accelerator, cfg, model, weight_optimizer(groups, cfg, cfg.float_lr))
        train_phase(run, model, optimizers, cfg.float_epochs, checkpoint)
        checkpoint = None
        accelerator.free_memory()

    if cfg.epochs:
        if progress.phase == "float":
            progress.start_phase("quantized")
        start = f"{cfg.output_dir}/float" if cfg.float_epochs else cfg.checkpoint
        model = create_float_model(cfg, images, preprocessing, start).to(accelerator.device)
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if cfg.distillation.wanted else None
        if checkpoint is None:
            results["float"] = run.evaluate(model)

        # The DAQ part: patch, calibrate, and give the quantizers a learning rate of their own. A continued run calibrates
        # too: it settles which bounds learn; their values are in the checkpoint.
        hf_daq.apply_daq(model, quantization)
        run.start_epoch(0)
        batches = [batch for batch, _ in itertools.islice(run.train_loader, cfg.calibration_batches)]
        with hf_daq.calibrate(model):
            for batch in batches:
                model(batch)
        if checkpoint is None and cfg.reconstruct:
            hf_daq.reconstruct(model, batches)
        del batches  # training needs the memory
        quantized_lr = cfg.lr if cfg.transition_target else None
        *groups, quantizers = hf_daq.param_groups(
            model, cfg.lr, cfg.quantizer_lr, cfg.weight_decay, quantized_lr=quantized_lr
        )

        if cfg.optimizer == "adamw":
            optimizers = [weight_optimizer([*groups, quantizers], cfg, cfg.lr)]
        else:
            optimizers = [weight_optimizer(groups, cfg, cfg.lr), torch.optim.Adam([quantizers])]
        model, optimizers = prepare(accelerator, cfg, model, *optimizers)
        if checkpoint is None:
            results["reconstructed" if cfg.reconstruct else "calibrated"] = run.evaluate(model)
        train_phase(run, model, optimizers, cfg.epochs, checkpoint, teacher)

    if run.is_main:
        versions = write_results(run, torch, timm, accelerate, datasets, hf_daq)
        if cfg.epochs:
            base, license = origin(cfg)
            folder = run.output / "quantized"
            finish.write_card(
                folder, __file__, arguments, cfg, run.metric, results, versions, eval_name(cfg), base, license
            )
        print(", ".join(f"{key} {value:.2f}" for key, value in results.items()))
        if exports and cfg.epochs:
            batches = itertools.islice(loaders[1], max(1, 256 // cfg.batch_size))
            finish.export(exports, run.output, torch.cat([batch for batch, _ in batches]))
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
