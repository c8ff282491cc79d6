"""Train a causal language model, then quantize it to a few bits with DAQ. One file, read from the top downwards.

    python recipes/language_modeling.py                      # the Python language reference: a minute on a CPU, no network
    python recipes/language_modeling.py --config recipes/configs/tinyshakespeare_llama_w2.yaml --dataset FILE
    accelerate launch recipes/language_modeling.py --model HuggingFaceTB/SmolLM2-135M --float_epochs 0 --dataset DIR_OR_ID

A run has two phases. The float phase (`float_epochs`; 0 when the network comes from `model` or `checkpoint`) trains the
network as it is; the DAQ phase (`epochs`) starts from those float weights and by default quantizes weights only. The best
network of each phase is saved with its tokenizer to output_dir/float and output_dir/quantized, and opens with
AutoModelForCausalLM.from_pretrained (after `import hf_daq`); the numbers of the run and a text that each network wrote
are in output_dir/results.json.

Every field of `Config` is a key of the YAML file and a command-line option (`--daq.weight_bits 2 --epochs 3`); the
command line wins. `--resume` continues a run that was stopped, bit for bit as if it had not been (with the same
number of processes and threads).

Loss is the mean cross-entropy of a token of the evaluation text in nats, perplexity its exponential; a block of text is
predicted without what precedes it. `quantized_last` is of the last epoch; `quantized` and `float` are of the best epoch,
picked on the very text they are measured on.
"""

import dataclasses
import itertools
import math
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import hf_daq
from shared import finish, loop, options
from shared.data import closest_name, load_splits
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
    """The defaults are the Python documentation experiment (configs/python_docs_llama_w4.yaml)."""

    dataset: str = "python_docs"
    """`python_docs`, `python_library`, a Hub id, a text file, or a folder of text files."""
    dataset_config: str | None = None
    """Configuration of the data set on the Hub."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of load_dataset."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on; null for the end of the training text."""
    eval_fraction: float = 0.1
    """Share of the training text that is its end, without eval_split."""
    text_column: str = "text"
    """Column of texts."""
    separator: str = "\n"
    """What joins the rows of a data set."""
    block_size: int = 128
    """Tokens of an example."""

    model: str | None = None
    """A folder or Hub id of a transformers checkpoint; null trains `model_config` from scratch."""
    model_config: dict[str, Any] = field(
        default_factory=lambda: {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
        }
    )
    """Arguments of the transformers config of a network from scratch."""
    vocab_size: int = 512
    """Tokens of the byte-level BPE of a network from scratch."""
    checkpoint: str | None = None
    """output_dir/float of an earlier run to start from."""

    float_epochs: int = 2
    """Epochs of the float phase."""
    float_lr: float = 3e-3
    """Learning rate of the float phase."""

    daq: dict[str, Any] = field(default_factory=lambda: {"weight_bits": 4, "group_size": 64})
    """Fields of hf_daq.DaqConfig (daq.bits, daq.rounding, ...), or `preset: paper` and those of DaqConfig.paper."""
    epochs: int = 1
    """Epochs of the DAQ phase."""
    lr: float = 1e-3
    """Learning rate of weights in the DAQ phase."""
    quantizer_lr: float = 1e-3
    """Learning rate of bounds and scales."""
    calibration_batches: int = 8
    """Training batches to calibrate on, in each process."""
    distillation: Distillation = field(default_factory=Distillation)
    weight_decay: float = 0.1
    """Weight decay of both phases."""

    warmup_epochs: float = 0.2
    batch_size: int = 16
    clip_grad: float | None = 1.0

    prompt: str = "The "
    """Beginning of the text that each network writes."""
    sample_tokens: int = 100
    """Tokens of that text."""
    sample_temperature: float = 0.8
    """Temperature of that text."""


def parse(argv: list[str]) -> Config:
    return options.parse(Config, argv, __doc__)


# ----------------------------------------------------------------------------------------------------------- data


@dataclass
class Texts:
    """The two texts, in pieces of many lines."""

    train: list[str]
    eval: list[str]


def read_texts(cfg: Config) -> Texts:
    kind = {"data_files": cfg.dataset} if Path(cfg.dataset).is_file() else {}
    source = dataclasses.replace(cfg, dataset="text") if kind else cfg
    splits = load_splits(
        source, {"python_docs": python_docs, "python_library": python_library}, **kind, **cfg.dataset_kwargs
    )
    for split in (cfg.train_split, cfg.eval_split or cfg.train_split):
        if split not in splits:
            raise SystemExit(f"{cfg.dataset} has no split {split!r}; it has {', '.join(splits)}")
    columns = splits[cfg.train_split].column_names
    if cfg.text_column not in columns:
        raise SystemExit(f"no column {cfg.text_column!r}; name it with --text_column. The columns are {columns}")
    train = list(splits[cfg.train_split][cfg.text_column])
    if cfg.eval_split:
        evaluation = list(splits[cfg.eval_split][cfg.text_column])
    else:
        count = math.ceil(len(train) * cfg.eval_fraction)
        train, evaluation = train[:-count], train[-count:]
    return Texts(join(train, cfg.separator), join(evaluation, cfg.separator))


def python_docs() -> datasets.DatasetDict:
    """The language reference that Python's help() shows, half a million characters."""
    from pydoc_data.topics import topics

    lines = [line for name in sorted(topics) for line in topics[name].splitlines()]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": lines}))


def python_library() -> datasets.DatasetDict:
    """The source of Python's standard library without its tests and tables of characters, ten million characters."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file.relative_to(root) for file in sorted(root.rglob("*.py")))
    left_out = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"}
    texts = [(root / file).read_text("utf-8", "replace") for file in files if not left_out & set(file.parts)]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": "".join(texts).splitlines()}))


def join(rows: list[str], separator: str, size: int = 1000) -> list[str]:
    return [separator.join([*rows[start : start + size], ""]) for start in range(0, len(rows), size)]


class Blocks(Dataset):
    """Consecutive blocks of `size` tokens and the one after. With a seed they begin elsewhere every epoch."""

    def __init__(self, pieces: list[str], tokenizer: PreTrainedTokenizerBase, size: int, seed: int | None = None):
        ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokens = torch.tensor(list(itertools.chain(*ids)))
        self.size, self.seed = size, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.offset = 0 if self.seed is None else seed_of(self.seed, epoch, 2) % self.size

    def __len__(self) -> int:
        usable = len(self.tokens) - 1 - (0 if self.seed is None else self.size - 1)
        return max(usable // self.size, 0)

    def __getitem__(self, index: int) -> Tensor:
        start = self.offset + index * self.size
        return self.tokens[start : start + self.size + 1]


def make_loaders(texts: Texts, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> tuple[DataLoader, DataLoader]:
    train = Blocks(texts.train, tokenizer, cfg.block_size, cfg.seed)
    evaluation = Blocks(texts.eval, tokenizer, cfg.block_size)
    if len(train) < cfg.batch_size or len(evaluation) < 1:
        raise SystemExit(
            f"block_size is {cfg.block_size} and batch_size {cfg.batch_size}, but the training text has only "
            f"{len(train.tokens)} tokens and the evaluation text {len(evaluation.tokens)}"
        )
    # A loader draws a seed when an epoch begins. From a generator of its own, or else a continued run, which begins its
    # epoch once more, would be one number ahead in the global one.
    arguments = {"batch_size": cfg.batch_size, "generator": torch.Generator()}
    shuffle = EpochShuffle(len(train), cfg.seed)
    return DataLoader(train, sampler=shuffle, drop_last=True, **arguments), DataLoader(evaluation, **arguments)


# ---------------------------------------------------------------------------------------------- model and tokenizer


def make_tokenizer(texts: Texts, cfg: Config) -> PreTrainedTokenizerBase:
    """That of the model, or for a model from scratch a byte-level BPE trained on the training text."""
    if start := cfg.checkpoint or cfg.model:
        try:
            return AutoTokenizer.from_pretrained(start)
        except (OSError, ValueError) as error:
            line = f"model {start!r} cannot be opened{closest_name(start, ())}: {error}"
            raise SystemExit(line.partition("\n")[0]) from None
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts.train, cfg.vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


def create_float_model(tokenizer: PreTrainedTokenizerBase, cfg: Config, start: str | None) -> PreTrainedModel:
    """The float network with the weights of `start`, or from scratch."""
    if start:
        return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    end = tokenizer.eos_token_id
    own = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": cfg.block_size,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    settings = {**own, **cfg.model_config}
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    except (TypeError, ValueError) as error:
        raise SystemExit(
            f"model_config {cfg.model_config} does not describe a causal language model: {error}"
        ) from None


# ----------------------------------------------------------------------------------------------------------- loop


def forward(model: nn.Module, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the next token at every place, and the losses."""
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits.float()
    return logits, F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")


@dataclass
class Run(loop.Run):
    tokenizer: PreTrainedTokenizerBase

    metric, higher_is_better = "loss", False

    def loss(self, model: nn.Module, batch: Tensor, teacher: nn.Module | None) -> Tensor:
        if teacher is None:
            return forward(model, batch)[1].mean()
        settings = self.cfg.distillation
        with last_features(settings, self.accelerator.unwrap_model(model), teacher) as features:
            logits, losses = forward(model, batch)
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits, _ = forward(teacher, batch)
        return distill(losses.mean(), logits, teacher_logits, settings, features)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean loss of a token."""
        model.eval()
        total = count = 0
        for blocks in self.eval_loader:
            with self.accelerator.autocast():
                _, losses = forward(model, blocks)
            losses = self.accelerator.gather_for_metrics(losses.mean(1))
            total, count = total + losses.double().sum().item(), count + len(losses)
        return total / count

    def save(self, model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> None:
        model.save_pretrained(folder, state_dict=tensors)
        self.tokenizer.save_pretrained(folder)


def sample(run: Run, folder: Path) -> str:
    """A text by the saved network. Random numbers of training stay as they are."""
    cfg, device = run.cfg, run.accelerator.device
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    prompt = run.tokenizer(cfg.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    options = {"do_sample": True, "temperature": cfg.sample_temperature, "max_new_tokens": cfg.sample_tokens}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        tokens = model.generate(**prompt, **options, pad_token_id=run.tokenizer.eos_token_id)
    return run.tokenizer.decode(tokens[0], skip_special_tokens=True)


def describe(run: Run) -> None:
    """Add perplexity and a text by the network of this phase to the results."""
    phase = run.progress.phase
    run.progress.results |= {
        f"{phase}_perplexity": math.exp(run.progress.best),
        f"{phase}_sample": sample(run, run.output / phase),
    }


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    cfg = parse(arguments)
    if cfg.epochs and not (cfg.float_epochs or cfg.model or cfg.checkpoint):
        raise SystemExit("the DAQ phase starts from float weights: set float_epochs, model or checkpoint")
    loop.refuse_missing(cfg.checkpoint)
    exports = finish.formats(cfg.export)
    quantization = finish.fitting(daq_config(cfg.daq), exports)
    checkpoint, progress = find_checkpoint(cfg)
    accelerator = start_accelerator(cfg, checkpoint)

    # data
    texts = read_texts(cfg)
    tokenizer = make_tokenizer(texts, cfg)
    loaders = make_loaders(texts, tokenizer, cfg)
    train_set, shuffle = loaders[0].dataset, loaders[0].sampler
    run = Run(cfg, accelerator, progress, *accelerator.prepare(*loaders), train_set, shuffle, tokenizer)
    start = cfg.checkpoint or cfg.model
    results = progress.results

    if cfg.float_epochs and progress.phase == "float":
        model = create_float_model(tokenizer, cfg, start)
        groups = param_groups_weight_decay(model, cfg.weight_decay)
        model, [optimizer] = prepare(accelerator, cfg, model, torch.optim.AdamW(groups, cfg.float_lr, (0.9, 0.95)))
        train_phase(run, model, [optimizer], cfg.float_epochs, checkpoint)
        describe(run)
        checkpoint = None
        accelerator.free_memory()

    if cfg.epochs:
        if progress.phase == "float":
            progress.start_phase("quantized")
        start = f"{cfg.output_dir}/float" if cfg.float_epochs else start
        model = create_float_model(tokenizer, cfg, start).to(accelerator.device)
        teacher = None
        if cfg.distillation.wanted:
            teacher = create_float_model(tokenizer, cfg, start).to(accelerator.device).eval().requires_grad_(False)
        if checkpoint is None:
            results["float"] = run.evaluate(model)

        # The DAQ part: patch, calibrate, and give the quantizers a learning rate of their own. A continued run calibrates
        # too: it settles which bounds learn; their values are in the checkpoint.
        hf_daq.apply_daq(model, quantization)
        run.start_epoch(0)
        batches = list(itertools.islice(run.train_loader, cfg.calibration_batches))
        with hf_daq.calibrate(model):
            for blocks in batches:
                forward(model, blocks)
        if checkpoint is None and cfg.reconstruct:
            hf_daq.reconstruct(model, [{"input_ids": blocks[:, :-1]} for blocks in batches])
        del batches  # training needs the memory
        quantized_lr = cfg.lr if cfg.transition_target else None
        groups = hf_daq.param_groups(model, cfg.lr, cfg.quantizer_lr, cfg.weight_decay, quantized_lr=quantized_lr)

        model, [optimizer] = prepare(accelerator, cfg, model, torch.optim.AdamW(groups, betas=(0.9, 0.95)))
        if checkpoint is None:
            results["reconstructed" if cfg.reconstruct else "calibrated"] = run.evaluate(model)
        train_phase(run, model, [optimizer], cfg.epochs, checkpoint, teacher)
        describe(run)

    if run.is_main:
        versions = write_results(run, torch, transformers, accelerate, datasets, tokenizers, hf_daq)
        if cfg.epochs:
            split = cfg.eval_split or f"last {cfg.eval_fraction:.0%} of {cfg.train_split}"
            base = finish.hub_id(None if cfg.checkpoint else cfg.model)
            folder = run.output / "quantized"
            finish.write_card(folder, __file__, arguments, cfg, run.metric, results, versions, split, base)
        print(", ".join(f"{key} {value:.3f}" for key, value in results.items() if isinstance(value, float)))
        if exports and cfg.epochs:
            finish.export(exports, run.output, {"input_ids": next(iter(loaders[1]))[:, :-1]})
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
