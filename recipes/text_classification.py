"""Fine-tune a text classifier, then quantize it to a few bits with DAQ. transformers' Trainer; read from the top downwards.

    python recipes/text_classification.py --config recipes/configs/sst2_minilm_float.yaml --model DIR_OR_ID --dataset DIR
    python recipes/text_classification.py --config recipes/configs/sst2_minilm_w4a8.yaml --dataset DIR --daq.rounding ste
    accelerate launch recipes/text_classification.py --model bert-base-uncased --dataset DIR_OR_ID --training.bf16 true

A run has two phases. The float phase (`float_epochs`; 0 when `checkpoint` names the output of an earlier one) fine-tunes
`model`, any checkpoint that AutoModelForSequenceClassification opens; the DAQ phase (`epochs`) starts from those float
weights. The best network of each phase is saved with its tokenizer to output_dir/float and output_dir/quantized, and
opens with AutoModelForSequenceClassification.from_pretrained (after `import hf_daq`); the numbers of the run are in
output_dir/results.json.

Every field of `Config` is a key of the YAML file and a command-line option (`--daq.weight_bits 2 --epochs 3`); the
command line wins. `training` holds arguments of transformers.TrainingArguments for both phases, `float_training` those
that differ in the float phase. `--resume` continues a run that was stopped from the Trainer's last checkpoint, bit for
bit as if it had not been (with the same number of processes and threads).

Accuracy is in percent on `eval_split`. `quantized_last` is of the last epoch; `quantized` and `float` are of the best
epoch, picked on the very texts they are measured on.
"""

import copy
import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_daq
from shared import finish, loop, options
from shared.data import closest_name, eval_name, load_splits, split_pair
from shared.distillation import Distillation, distill, last_features
from shared.options import RunOptions, daq_config

# ---------------------------------------------------------------------------------------------------------- knobs


@dataclass
class Config(RunOptions):
    """`dataset` and `model` have no default."""

    dataset: str | None = None
    """A Hub id, or a folder of csv, tsv, jsonl or parquet files."""
    dataset_config: str | None = None
    """Configuration of the data set on the Hub, such as `sst2` of `nyu-mll/glue`."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of load_dataset, e.g. {names: [text, label]} for csv files whose first line is a text."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "validation"
    """Split to evaluate on."""
    eval_fraction: float | None = None
    """Share of each class of the training split to evaluate on, for a data set without `eval_split`."""
    text_column: str | None = None
    """Column of texts; null for the first column of text."""
    second_text_column: str | None = None
    """Column of the second texts, for pairs."""
    label_column: str = "label"
    """Column of classes."""
    max_length: int = 128
    """Tokens; longer texts are cut."""

    model: str | None = None
    """A folder or Hub id of a transformers checkpoint."""
    checkpoint: str | None = None
    """output_dir/float of an earlier run, in place of a float phase."""

    float_epochs: float = 3
    """Epochs of the float phase."""
    float_training: dict[str, Any] = field(default_factory=dict)
    """Arguments of transformers.TrainingArguments that differ in the float phase."""

    daq: dict[str, Any] = field(default_factory=lambda: {"weight_bits": 4, "activation_bits": 8})
    """Fields of hf_daq.DaqConfig (daq.bits, daq.rounding, ...), or `preset: paper` and those of DaqConfig.paper."""
    epochs: float = 3
    """Epochs of the DAQ phase."""
    quantizer_lr: float = 1e-3
    """Learning rate of bounds and scales."""
    calibration_batches: int = 8
    """Training batches to calibrate on, in each process."""
    distillation: Distillation = field(default_factory=Distillation)

    training: dict[str, Any] = field(
        default_factory=lambda: {
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "warmup_steps": 0.1,  # share of all
            "lr_scheduler_type": "cosine",
        }
    )
    """Arguments of transformers.TrainingArguments in both phases."""


def parse(argv: list[str]) -> Config:
    cfg = options.parse(Config, argv, __doc__)
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for prefix in ("training", "float_training"):
        for key in getattr(cfg, prefix):
            options.refuse_unknown(key, known, f"{prefix}.")
    if not cfg.dataset:
        raise SystemExit(
            "pass --dataset, a Hub id or a folder of csv, tsv, jsonl or parquet files (--help explains all keys)"
        )
    if cfg.float_epochs and not cfg.model:
        raise SystemExit("pass --model, a folder or Hub id of a transformers checkpoint, e.g. bert-base-uncased")
    if cfg.float_epochs and cfg.checkpoint:
        raise SystemExit("--checkpoint takes the place of a float phase: set --float_epochs 0, or leave it out")
    if not (cfg.float_epochs or cfg.checkpoint):
        raise SystemExit("the DAQ phase starts from fine-tuned float weights: set float_epochs or checkpoint")
    return cfg


# ----------------------------------------------------------------------------------------------------------- data


@dataclass
class Texts:
    """The two splits as read, before any tokenizing."""

    train: datasets.Dataset
    eval: datasets.Dataset
    columns: list[str]
    label_values: list  # as in the label column; the position is the number of the class
    label_names: list[str]


def read_texts(cfg: Config) -> Texts:
    splits = load_splits(cfg, {}, **cfg.dataset_kwargs)
    features = next(iter(splits.values())).features
    if cfg.label_column not in features:
        raise SystemExit(
            f"no column {cfg.label_column!r}; name it with --label_column. The columns are {dict(features)}"
        )
    texts = [
        name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    texts = [name for name in texts if name != cfg.label_column]
    columns = [cfg.text_column or next(iter(texts), None), cfg.second_text_column]
    columns = [name for name in columns if name]
    if not columns or not set(columns) <= set(texts):
        raise SystemExit(f"no such column of text; name it with --text_column. The columns are {dict(features)}")
    train, evaluation = split_pair(splits, cfg, cfg.label_column)
    label = features[cfg.label_column]
    if isinstance(label, datasets.ClassLabel):
        return Texts(train, evaluation, columns, list(range(label.num_classes)), label.names)
    values = sorted(train.unique(cfg.label_column))
    return Texts(train, evaluation, columns, values, [str(value) for value in values])


def tokenize(
    split: datasets.Dataset, texts: Texts, tokenizer: PreTrainedTokenizerBase, cfg: Config
) -> datasets.Dataset:
    """Token ids of different lengths, which the Trainer pads batch by batch, and the number of the class."""
    classes = {value: number for number, value in enumerate(texts.label_values)}

    def convert(batch: dict[str, list]) -> dict[str, list]:
        rows = tokenizer(*(batch[name] for name in texts.columns), truncation=True, max_length=cfg.max_length)
        try:
            return {**rows, "labels": [classes[value] for value in batch[cfg.label_column]]}
        except KeyError as missing:
            raise SystemExit(
                f"label {missing} is not among those of {cfg.train_split!r}: {texts.label_names}"
            ) from None

    return split.map(convert, batched=True, remove_columns=split.column_names, desc="tokenize")


# ---------------------------------------------------------------------------------------------------------- model


def load_float(path: str, texts: Texts) -> PreTrainedModel:
    """The float network, with a new classifier if the checkpoint has none."""
    names = texts.label_names
    config = AutoConfig.from_pretrained(path)
    if config.num_labels != len(names) and any("SequenceClassification" in name for name in config.architectures or ()):
        raise SystemExit(f"{path} has {config.num_labels} classes, and the data {len(names)}: {', '.join(names[:10])}")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **labels)


# ----------------------------------------------------------------------------------------------------------- loop


class DistillationTrainer(Trainer):
    """Trainer whose loss in training also compares with a float network's outputs."""

    def __init__(self, *args: Any, teacher: nn.Module | None = None, distillation: Distillation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.distillation = distillation

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        with last_features(self.distillation, self.accelerator.unwrap_model(model), self.teacher) as features:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(**inputs).logits
        loss = distill(loss, outputs.logits, teacher_logits, self.distillation, features)
        return (loss, outputs) if return_outputs else loss


def accuracy(predictions: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": 100 * float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def training_arguments(cfg: Config, phase: str, epochs: float, **others: Any) -> TrainingArguments:
    """Evaluated and saved every epoch, unless `training` says otherwise."""
    arguments = {
        "output_dir": f"{cfg.output_dir}/checkpoints/{phase}",
        "num_train_epochs": epochs,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "seed": cfg.seed,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **cfg.training,
        **others,
    }
    found = TrainingArguments(**arguments)
    options.warn_of_slow_bf16(found.bf16, found.device, "--training.bf16 false")
    return found


def train_phase(trainer: Trainer, phase: str, report: dict[str, Any], cfg: Config) -> None:
    """Train to the end of the phase, from the last checkpoint if there is one; the best network goes to output_dir, or, where
    `load_best_model_at_end` is false, the last."""
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_checkpoint(cfg, phase))
    report["results"][f"{phase}_seconds"] = time.perf_counter() - start  # since the run was started or continued
    if trainer.args.eval_strategy == "no":
        trainer.evaluate()
    evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    report["results"][f"{phase}_last"] = evaluations[-1]["eval_accuracy"]
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    saved = [entry for entry in evaluations if entry["step"] == best] or evaluations
    report["results"][phase] = saved[-1]["eval_accuracy"]
    report["history"] += [{"phase": phase, **entry} for entry in trainer.state.log_history]
    trainer.save_model(f"{cfg.output_dir}/{phase}")
    if trainer.is_world_process_zero():
        write_report(report, cfg)
    trainer.accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------------------- continuing


def last_checkpoint(cfg: Config, phase: str) -> str | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    found = Path(cfg.output_dir, "checkpoints", phase).glob("checkpoint-*/trainer_state.json")
    return max((str(path.parent) for path in found), key=lambda path: int(path.rpartition("-")[2]), default=None)


def start_report(cfg: Config) -> dict[str, Any]:
    """results.json as far as it goes: of the run that is continued, or empty."""
    earlier = Path(cfg.output_dir, "results.json")
    if Path(cfg.output_dir, "checkpoints").exists() and not cfg.resume:
        loop.refuse_to_overwrite(f"{cfg.output_dir}/checkpoints")
    if cfg.resume and earlier.exists():
        report = json.loads(earlier.read_text())
        loop.refuse_other_settings(cfg, report["config"], earlier)
        return report
    return {"results": {}, "history": []}


def write_report(report: dict[str, Any], cfg: Config) -> None:
    report["config"] = dataclasses.asdict(cfg)
    report["versions"] = loop.versions(torch, transformers, datasets, hf_daq)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    Path(cfg.output_dir, "results.json").write_text(json.dumps(report, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> dict[str, Any]:
    command_line = sys.argv[1:] if argv is None else argv
    cfg = parse(command_line)
    loop.refuse_missing(cfg.checkpoint)
    exports = finish.formats(cfg.export)
    quantization = finish.fitting(daq_config(cfg.daq), exports)
    report = start_report(cfg)
    results = report["results"]
    set_seed(cfg.seed)

    # data
    start = cfg.model if cfg.float_epochs else cfg.checkpoint
    try:
        tokenizer = AutoTokenizer.from_pretrained(start)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"model {start!r} cannot be opened{closest_name(start, ())}: {error}".partition("\n")[0]
        ) from None
    texts = read_texts(cfg)
    train, evaluation = (tokenize(split, texts, tokenizer, cfg) for split in (texts.train, texts.eval))
    shared = {
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
        "compute_metrics": accuracy,
        "distillation": cfg.distillation,
    }

    if cfg.float_epochs and "float" not in results:
        arguments = training_arguments(cfg, "float", cfg.float_epochs, **cfg.float_training)
        if arguments.process_index == 0:
            write_report(report, cfg)
        trainer = DistillationTrainer(load_float(start, texts), arguments, **shared)
        train_phase(trainer, "float", report, cfg)

    if cfg.epochs and "quantized" not in results:
        start = f"{cfg.output_dir}/float" if cfg.float_epochs else cfg.checkpoint
        teacher = load_float(start, texts) if cfg.distillation.wanted else None
        arguments = training_arguments(cfg, "quantized", cfg.epochs)
        model = load_float(start, texts)

        def measure() -> float:
            # A copy: Accelerate does not wrap a model for training that was evaluated before.
            return DistillationTrainer(copy.deepcopy(model), arguments, **shared).evaluate()["eval_accuracy"]

        optimizer = hf_daq.trainer_optimizer(arguments, cfg.quantizer_lr)
        trainer = DistillationTrainer(model, arguments, teacher=teacher, optimizer_cls_and_kwargs=optimizer, **shared)
        # The Trainer evaluates a sharded model only once it has an optimizer.
        measures = last_checkpoint(cfg, "quantized") is None and not (arguments.fsdp or arguments.deepspeed)
        if measures:
            results["float"] = measure()

        # The DAQ part: patch, calibrate; the optimizer gives the quantizers a learning rate of their own. A continued run
        # calibrates too: it settles which bounds learn; their values are in the checkpoint.
        hf_daq.apply_daq(model, quantization)
        batches = list(itertools.islice(trainer.get_train_dataloader(), cfg.calibration_batches))
        with hf_daq.calibrate(model):
            for batch in batches:
                model(**batch)
        if cfg.reconstruct and last_checkpoint(cfg, "quantized") is None:
            hf_daq.reconstruct(model, batches)
        del batches  # training needs the memory
        if measures:
            results["reconstructed" if cfg.reconstruct else "calibrated"] = measure()
        if arguments.process_index == 0:
            write_report(report, cfg)
        if cfg.monitor_every:
            monitor = hf_daq.MonitorCallback(trainer, cfg.monitor_every)
            trainer.add_callback(monitor)
        train_phase(trainer, "quantized", report, cfg)
        if cfg.monitor_every and trainer.is_world_process_zero():
            loop.write_monitored(Path(cfg.output_dir), monitor.monitor.history)  # since it was started or continued

    if PartialState().is_main_process:
        if cfg.epochs:
            base = finish.hub_id(None if cfg.checkpoint else cfg.model)
            folder = Path(cfg.output_dir, "quantized")
            finish.write_card(
                folder, __file__, command_line, cfg, "accuracy", results, report["versions"], eval_name(cfg), base
            )
        print(", ".join(f"{key} {value:.2f}" for key, value in results.items()))
        if exports and cfg.epochs:
            batch = DataCollatorWithPadding(tokenizer)([evaluation[row] for row in range(min(256, len(evaluation)))])
            finish.export(
                exports, Path(cfg.output_dir), {key: batch[key] for key in tokenizer.model_input_names if key in batch}
            )
    return results


if __name__ == "__main__":
    main()
