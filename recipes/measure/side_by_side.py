"""The runs of estimators.py: their networks, optimizers and updates. On a GPU an update of a run is one CUDA graph, and many runs
train at the same time, each in a stream of its own: networks this small leave most of a GPU idle. An update that the host has a
part in is no graph, and takes longer.
"""

import copy
import dataclasses
import itertools
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import image_classification
import timm
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import hf_daq
from hf_daq.nn.quantizers import Quantizer
from measure.brevitas_layers import use_brevitas
from measure.ewgs import use_ewgs
from measure.ingredients import Freezing, Ranges, begin_with_weights, cauchy_schwarz, kurtosis, wait_with_weights
from measure.learned_steps import has_steps, use_lsq, use_paretoq
from measure.study import Run, Study
from shared.distillation import Distillation, distill
from shared.loop import EpochShuffle, cosine

OTHER = {
    "rate",
    "ewgs",
    "lsq",
    "paretoq",
    "brevitas",
    "distill",
    "features",
    "ema",
    "reestimate",
    "dampening",
    "transitions",
    "kurtosis",
    "cauchy_schwarz",
    "ranges",
    "freeze",
    "inputs_first",
    "reconstruct",
}
"""Settings of an estimator that are no fields of DaqConfig."""

ON_HOST = {"transitions", "inputs_first"}
"""Of these the host decides something in each update or epoch."""

REGULARIZERS = {"kurtosis": kurtosis, "cauchy_schwarz": cauchy_schwarz}


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
        labels = self.train.labels
        rows = train_test_split(range(len(labels)), test_size=study.heldout, random_state=0, stratify=labels)
        self.train_rows, self.heldout_rows = (torch.tensor(sorted(part)) for part in rows)
        self.classes, self.batch_size = len(images.label_names), study.batch_size
        self.batches = len(self.train_rows) // self.batch_size
        self.device = torch.device("cpu")
        self.dtype = study.dtype

    def to(self, device: str) -> "Images":
        moved = copy.copy(self)
        moved.train, moved.test, moved.device = self.train.to(device), self.test.to(device), torch.device(device)
        return moved

    @property
    def plain(self) -> Any:
        """The images that a run is trained on or chosen by, as they are."""
        plain = copy.copy(self.train)
        plain.augment = None
        return plain

    def order(self, seed: int, epoch: int) -> Tensor:
        """Rows of the training images, shape (batches, batch_size)."""
        shuffle = EpochShuffle(len(self.train_rows), seed)
        shuffle.epoch = epoch
        order = self.train_rows[list(shuffle)][: self.batches * self.batch_size]
        return order.view(self.batches, self.batch_size).to(self.device)

    def first(self, count: int) -> Iterator[Tensor]:
        """Batches to calibrate with, the same for all runs."""
        self.train.augment.seed = 0
        self.train.start_epoch(0)
        for rows in itertools.islice(self.order(0, 0), count):
            yield self.train.__getitems__(rows)[0]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @torch.no_grad()
    def accuracy(self, model: nn.Module, images: Any, rows: Tensor, soft: bool = False) -> float:
        """Top-1 in percent on these rows of `plain` or `test`; with `soft` of the soft quantizer, as in training."""
        model.eval()
        for module in model.modules():
            if soft and isinstance(module, Quantizer):
                module.train()
        hits = torch.zeros((), device=self.device)
        for part in rows.to(self.device).split(500 if self.device.type == "cpu" else 5000):
            batch, labels = images.__getitems__(part)
            with self.autocast():
                hits += (model(batch).argmax(1) == labels).sum()
        return 100 * hits.item() / len(rows)


# ---------------------------------------------------------------------------------------------------------- model


def new_model(study: Study, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(study.network, num_classes=classes).to(memory_format=torch.channels_last)


def quantized_model(study: Study, run: Run, images: Images, state: dict[str, Tensor]) -> nn.Module:
    """The float network with quantizers, calibrated, on the device of the images."""
    model = new_model(study, images.classes)
    model.load_state_dict(state)
    model.to(images.device)
    weight_bits, inputs = map(int, run.bits.split("/"))
    activation_bits = None if inputs == 32 else inputs
    batches = list(images.first(study.calibration_batches))
    if "brevitas" in run.settings:
        names = list(hf_daq.plan(model, bits=2).quantized)
        use_brevitas(model, names, (weight_bits, activation_bits), batches)
        return model
    settings = {key: value for key, value in run.settings.items() if key not in OTHER}
    settings |= {"weight_bits": weight_bits, "activation_bits": activation_bits}
    # The paper's settings at 1 bit, the defaults from 2 bits on: what the recipes train with.
    preset = {"preset": "paper"} if weight_bits == 1 else {}
    hf_daq.apply_daq(model, hf_daq.DaqConfig.from_dict(preset | settings))
    with hf_daq.calibrate(model):
        for batch in batches:
            model(batch)
    if "reconstruct" in run.settings:
        hf_daq.reconstruct(model, batches, progress=False)
    if "ewgs" in run.settings:
        use_ewgs(model, run.settings["ewgs"])
    if "lsq" in run.settings:
        use_lsq(model, batches[0])
    if "paretoq" in run.settings:
        use_paretoq(model, batches[0])
    return model


def optimizers_of(study: Study, run: Run, model: nn.Module) -> list[torch.optim.Optimizer]:
    """All of them take their learning rates as tensors, which a graph reads anew in every update."""
    sgd = {"lr": run.lr, "momentum": 0.9, "nesterov": True, "fused": True}
    if run.bits == "float" or "brevitas" in run.settings:
        decay = study.float_weight_decay if run.bits == "float" else study.weight_decay
        return [torch.optim.SGD(param_groups_weight_decay(model, decay), **sgd)]
    adam = {"fused": True, "capturable": next(model.parameters()).is_cuda}
    # With its rate times r and its decay by r, a weight that gets 1/r of a gradient moves as with all of it.
    rate = run.settings.get("rate", 1.0)
    found = hf_daq.param_groups(model, run.lr, study.quantizer_lr, study.weight_decay, quantized_lr=run.lr * rate)
    named = {group["name"]: group for group in found}
    quantized, bounds = named.pop("quantized"), [named.pop("quantizer")]
    groups = [*named.values()]
    if has_steps(model):  # of LSQ, which learn with the rate of the network, as its paper has it
        groups.append(bounds.pop() | {"lr": run.lr})
    if run.optimizer == "muon":
        muon = MatrixMuon(quantized["params"], run.lr, study.weight_decay)
        return [muon, torch.optim.AdamW([*groups, *bounds], **adam)]
    groups.append(quantized | {"weight_decay": study.weight_decay / rate})
    if run.optimizer == "adamw":
        return [torch.optim.AdamW([*groups, *bounds], **adam)]
    return [torch.optim.SGD(groups, **sgd), *([torch.optim.Adam(bounds, **adam)] if bounds else [])]


class MatrixMuon(torch.optim.Muon):
    """torch's Muon takes matrices: convolutions as (out, height * width * in), views of the same memory. Its learning rate may
    be a tensor: a step is done at the rate 1, and then that share of it is taken."""

    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.weights, self.decay = weights, weight_decay
        self.matrices = [nn.Parameter(weight.detach().permute(0, 2, 3, 1).flatten(1)) for weight in weights]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        lr, group["lr"] = group["lr"], 1.0
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)
        before = [matrix.clone() for matrix in self.matrices]
        super().step()
        for matrix, old in zip(self.matrices, before, strict=True):
            matrix.copy_(old * (1 - lr * self.decay) + lr * (matrix - old))
        group["lr"] = lr


# ------------------------------------------------------------------------------------------------------- training


class Training:
    """One run, at the end of some epoch.

    `update` needs nothing from outside: the order of the images, their crops, the learning rates and the number of the update
    lie in tensors on the device. `tensors` are all that it changes.
    """

    def __init__(self, study: Study, run: Run, images: Images, model: nn.Module, teacher: nn.Module | None = None):
        self.study, self.run, self.images, self.model = study, run, images, model
        settings = run.settings
        self.distillation = Distillation(settings.get("distill", 0.0), 1.0, settings.get("features", 0.0))
        self.teacher = teacher.eval() if teacher and self.distillation.wanted else None
        self.data = copy.copy(images.train)
        device = images.device
        self.optimizers = optimizers_of(study, run, model)
        updates = self.updates = max(run.epochs, 1) * images.batches
        self.transitions: Any = None
        if "transitions" in settings:
            self.transitions = hf_daq.TransitionScheduler(model, self.optimizers[0], updates, settings["transitions"])
            self.first = self.transitions.state_dict()
        table = rates(self.optimizers, updates, min(images.batches, updates // 2))
        self.rates, self.now = table.to(device), table[0].to(device)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.now, strict=True):
            group["lr"] = rate
        self.done = torch.zeros(1, dtype=torch.long, device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.order = images.order(run.seed, 0)
        self.data.shift, self.data.flip = self.data.shift.clone(), self.data.flip.clone()
        loss = self.loss
        self.compiled_loss = torch.compile(loss) if study.compile else loss
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.graph: Any = None
        self.start = {key: value.clone() for key, value in model.state_dict().items()}
        self.averaged: list[Tensor] = []
        if "ema" in run.settings:
            self.learned = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
            self.averaged = [tensor.detach().clone() for tensor in self.learned]
        self.freezing = Freezing(model, settings["freeze"]) if "freeze" in settings else None
        self.ranges = Ranges(model) if "ranges" in settings else None
        if run.epochs:
            self.prepare()

    def loss(self, batch: Tensor, labels: Tensor) -> Tensor:
        with self.images.autocast():
            features, outputs = outputs_of(self.model, batch)
            loss = F.cross_entropy(outputs, labels)
            if self.teacher is not None:
                with torch.no_grad():
                    known, target = outputs_of(self.teacher, batch)
                both = (features, known) if self.distillation.features else ()
                loss = distill(loss, outputs, target, self.distillation, both)
        return loss

    def update(self) -> None:
        rows = self.order.index_select(0, self.done % self.images.batches)[0]
        self.now.copy_(self.rates.index_select(0, self.done)[0])
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.compiled_loss(*self.data.__getitems__(rows))
        if factor := self.run.settings.get("dampening"):
            share = 0.5 - 0.5 * torch.cos(math.pi * self.done[0] / self.updates)
            loss = loss + factor * share * hf_daq.dampening(self.model)
        for name, regularizer in REGULARIZERS.items():
            if factor := self.run.settings.get(name):
                loss = loss + factor * regularizer(self.model)
        if self.ranges is not None:
            loss = loss + self.run.settings["ranges"] * self.ranges.loss()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.transitions is not None:
            self.transitions.step()
        if self.freezing is not None:
            self.freezing.step()
        self.loss_sum += loss.detach()
        self.done += 1
        if self.averaged:
            torch._foreach_lerp_(
                self.averaged, [tensor.detach() for tensor in self.learned], 1 - self.run.settings["ema"]
            )

    def prepare(self) -> None:
        """Some updates, which compile kernels and give optimizers their state; on a GPU one more, as a graph; and back."""
        self.model.train()
        if self.stream is None:
            self.update()
        else:
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    self.update()
            torch.cuda.synchronize()
            if not ON_HOST & self.run.settings.keys():
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.update()
        self.model.load_state_dict(self.start)
        if self.transitions is not None:
            self.transitions.load_state_dict(self.first)
        for name, tensor in self.tensors().items():
            if not name.startswith(("model.", "averaged.")):
                tensor.zero_()
        for average, tensor in zip(self.averaged, self.learned if self.averaged else [], strict=True):
            average.copy_(tensor.detach())
        if self.freezing is not None:
            self.freezing.restart()

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                for name, tensor in optimizer.state[parameter].items():
                    found[f"optimizer.{number}.{place}.{name}"] = tensor
        found |= {f"averaged.{number}": tensor for number, tensor in enumerate(self.averaged)}
        if self.freezing is not None:
            found |= {f"freezing.{name}": tensor for name, tensor in self.freezing.tensors().items()}
        return found | {"done": self.done}

    def start_epoch(self) -> None:
        epoch = len(self.history)
        source = self.images.train
        source.augment.seed = self.run.seed
        source.start_epoch(epoch)
        self.data.shift.copy_(source.shift)
        self.data.flip.copy_(source.flip)
        self.order.copy_(self.images.order(self.run.seed, epoch))
        self.loss_sum.zero_()
        self.quantize_weights_from(self.run.settings.get("inputs_first", 0), epoch)
        self.model.train()

    def quantize_weights_from(self, first: int, epoch: int) -> None:
        if not first or epoch > first:
            return
        if epoch < first:
            wait_with_weights(self.model)
        else:
            begin_with_weights(self.model)
        torch._dynamo.reset()  # the compiled loss would go on as before

    def advance(self) -> None:
        """One update, or on a GPU its beginning."""
        with torch.cuda.stream(self.stream):  # of no effect without a GPU
            if self.graph is None:
                self.update()
            else:
                self.graph.replay()

    def end_epoch(self) -> None:
        with self.deployed():
            held_out = self.held_out()
        loss = self.loss_sum.item() / self.images.batches
        self.history.append({"loss": round(loss, 4), "heldout": round(held_out, 3)})
        print(f"{self.run}: epoch {len(self.history)}, {self.history[-1]}", flush=True)

    def held_out(self) -> float:
        return self.images.accuracy(self.model, self.images.plain, self.images.heldout_rows)

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Inside, the network has the averages of its weights, and the statistics of its last codes, where the run says so."""
        kept = [tensor.detach().clone() for tensor in (*self.model.parameters(), *self.model.buffers())]
        with torch.no_grad():
            for tensor, average in zip(self.learned if self.averaged else [], self.averaged, strict=True):
                tensor.copy_(average)
        if "reestimate" in self.run.settings and len(self.history) >= self.run.epochs - 1:
            hf_daq.reestimate_batch_norm(self.model, list(self.images.first(self.run.settings["reestimate"])))
        yield
        with torch.no_grad():
            for tensor, old in zip((*self.model.parameters(), *self.model.buffers()), kept, strict=True):
                tensor.copy_(old)

    def save(self, path: Path) -> None:
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        temporary = path.with_suffix(".writing")
        saved = {"tensors": tensors, "history": self.history, "seconds": self.seconds}
        torch.save(saved | ({"transitions": self.transitions.state_dict()} if self.transitions else {}), temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.history, self.seconds = saved["history"], saved["seconds"]
        for name, tensor in self.tensors().items():
            tensor.detach().copy_(saved["tensors"][name])
        if self.transitions is not None:
            self.transitions.load_state_dict(saved["transitions"])

    def result(self) -> dict[str, Any]:
        with self.deployed():
            found = {"heldout": self.history[-1]["heldout"] if self.history else self.held_out()}
            found["test"] = self.images.accuracy(self.model, self.images.test, torch.arange(len(self.images.test)))
            if self.run.settings.get("rounding") == "soft":
                held_out = self.images.plain, self.images.heldout_rows
                found["gap"] = self.images.accuracy(self.model, *held_out, soft=True) - found["heldout"]
        versions = {module.__name__: module.__version__ for module in (torch, timm, hf_daq)}
        device = self.images.device
        return {
            **dataclasses.asdict(self.run),
            **{name: round(value, 3) for name, value in found.items()},
            "history": self.history,
            "seconds": round(self.seconds, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "training_images": len(self.images.train_rows),
            "versions": {"python": platform.python_version(), **versions},
        }


def outputs_of(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the classifier, and what comes out of it."""
    features = model.forward_head(model.forward_features(batch), pre_logits=True)
    return features, model.get_classifier()(features)


def rates(optimizers: list[torch.optim.Optimizer], updates: int, warmup: int) -> Tensor:
    """Learning rates, shape (updates, groups of all optimizers)."""
    schedules = cosine(optimizers, updates, warmup)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    table = torch.empty(updates, len(groups))
    for update in range(updates):
        for schedule in schedules:
            schedule.step_update(update + 1)
        table[update] = torch.tensor([group["lr"] for group in groups])
    return table


def train(trainings: list[Training], work: Path) -> Iterator[Training]:
    """Train them at the same time, to their ends; yields each when it is there. `seconds` are the wall clock's, of all of them
    together by their number; those of a run that was stopped before count."""
    left = list(trainings)
    for training in left:
        path = work / training.run.file
        if path.exists():
            training.load(path)
    while True:
        for training in [training for training in left if len(training.history) >= training.run.epochs]:
            left.remove(training)
            yield training
        if not left:
            return
        began = time.perf_counter()
        for training in left:
            training.start_epoch()
        wait(left)
        for _ in range(left[0].images.batches):
            for training in left:
                training.advance()
        wait(left)
        for training in left:
            training.end_epoch()
        for training in left:
            training.seconds += (time.perf_counter() - began) / len(left)
            training.save(work / training.run.file)


def wait(trainings: list[Training]) -> None:
    if any(training.stream for training in trainings):
        torch.cuda.synchronize()
