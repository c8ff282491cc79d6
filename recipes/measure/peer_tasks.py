"""What peers.py trains and measures: a classifier on sentences, or a language model on a text."""

import argparse
import json
from collections.abc import Iterator

import language_modeling
import text_classification
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding

SPLITS = {"train": "train", "dev": "validation", "test": "test"}
"""Of sentences, as `datasets` names them."""
Batch = dict[str, Tensor]


def task_of(args: argparse.Namespace) -> "Classification | Text":
    """That of the network in args.model: a language model's or a classifier's."""
    names = AutoConfig.from_pretrained(args.model).architectures or [""]
    return Text(args) if names[0].endswith("ForCausalLM") else Classification(args)


def inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


# ------------------------------------------------------------------------------------------------------ sentences


class Classification:
    measure, higher_is_better = "accuracy", True

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.splits = {name: Sentences(args, split) for name, split in SPLITS.items()}

    def load(self) -> nn.Module:
        return text_classification.load_float(self.args.model, self.splits["train"].texts).to(self.args.device)


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

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = model(**batch, return_dict=False)
        return loss, logits

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Top-1 in percent."""
        model.eval()
        hits = 0
        for batch in self.batches(list(range(len(self.rows))), 128):
            hits += int((model(**inputs(batch)).logits.argmax(1) == batch["labels"]).sum())
        return 100 * hits / len(self.rows)


# ----------------------------------------------------------------------------------------------------------- text


class Text:
    measure, higher_is_better = "loss", False

    def __init__(self, args: argparse.Namespace):
        self.args = args
        options = {"dataset": args.dataset, "eval_fraction": args.eval_fraction, "checkpoint": args.model}
        cfg = language_modeling.parse([f"--{key}={value}" for key, value in options.items()])
        texts, tokenizer = language_modeling.read_texts(cfg), AutoTokenizer.from_pretrained(args.model)
        train, rest = (
            language_modeling.Blocks(part, tokenizer, args.block_size - 1) for part in (texts.train, texts.eval)
        )
        half = len(rest) // 2
        self.splits = {
            "train": TextBlocks(train, range(len(train)), args.device),
            "dev": TextBlocks(rest, range(half), args.device),
            "test": TextBlocks(rest, range(half, len(rest)), args.device),
        }

    def load(self) -> nn.Module:
        return language_modeling.create_float_model(None, None, self.args.model).to(self.args.device)


class TextBlocks:
    def __init__(self, blocks: language_modeling.Blocks, rows: range, device: str):
        self.blocks, self.rows, self.device = blocks, rows, device

    def batches(self, order: list[int], size: int) -> Iterator[Batch]:
        for start in range(0, len(order), size):
            rows = [self.blocks[self.rows[index]] for index in order[start : start + size]]
            yield {"input_ids": torch.stack(rows).to(self.device)}

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        logits = model(**batch, use_cache=False).logits.float()[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction=reduction), logits

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Mean loss of a token in nats."""
        model.eval()
        sums = [self.loss(model, batch, "sum")[0].item() for batch in self.batches(list(range(len(self.rows))), 8)]
        return sum(sums) / len(self.rows) / self.blocks.size
