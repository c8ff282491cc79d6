"""`quantize`: from a float model and the name of a data set to a quantized model, and how near to float it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from torch import nn

from .apply import apply_daq, remove_daq
from .calibration import calibrate
from .config import DaqConfig
from .integrations.examples import Examples, read_examples
from .model.batch import run
from .reconstruction import reconstruct
from .report.compare import Comparison, compare, without_labels
from .report.health import Health, health
from .report.page import report as write_report
from .report.summary import summary
from .text import COLUMNS, as_text, cell, plain


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did. `print(result)` shows it.

    comparison: with the float model, on examples that were held back.
    health: of the quantized model, on the same.
    examples, held_back: how many calibrated, and how many were compared.
    float_bytes, bytes: of all parameters and persistent buffers in float, and packed.
    seconds: of "calibrate" and "reconstruct".
    inputs: a batch of those held back, for exports. processor: the tokenizer or image processor of transformers.
    """

    comparison: Comparison
    health: Health
    examples: int
    held_back: int
    float_bytes: int
    bytes: int
    seconds: dict[str, float]
    inputs: Any = field(repr=False)
    processor: Any = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        kept = {name: getattr(self, name) for name in ("examples", "held_back", "float_bytes", "bytes", "seconds")}
        return {"comparison": self.comparison.to_dict(), "health": self.health.to_dict(), **plain(kept)}

    def __rich__(self) -> Group:
        spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in self.seconds.items())
        size = f"{self.float_bytes / 1e6:.2f} MB in float, {self.bytes / 1e6:.2f} MB packed"
        alarms = [cell(f"{finding.layer}: {finding.message}") for finding in self.health.alarms]
        return Group(
            self.comparison,  # type: ignore[arg-type]
            cell(f"{self.examples} examples, {self.held_back} others to compare; {spent}"),
            cell(f"size: {size}, {self.float_bytes / self.bytes:.1f} times smaller"),
            *alarms,
        )

    def __str__(self) -> str:
        return as_text(self, COLUMNS)


def quantize(
    model: nn.Module,
    data: Any,
    config: DaqConfig | None = None,
    *,
    examples: int = 256,
    max_minutes: float | None = None,
    processor: Any = None,
    length: int | None = None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    report: str | Path | None = None,
    saved: str | Path = "PATH",
    progress: bool | None = None,
    **kwargs: Any,
) -> Quantized:
    """Quantize a float model of timm or transformers, in place, with examples of a data set: `apply_daq`, `calibrate`,
    `reconstruct`, and a comparison with the float model on examples that were held back.

        print(hf_daq.quantize(model, "photographs", weight_bits=4, activation_bits=8))
        hf_daq.save_pretrained(model, "out", packed=True)

    Examples are prepared as the model was trained: by timm's transform, the image processor or the tokenizer. Labels are
    used to measure accuracy, and for nothing else. On an error the model is float again.

    Args:
        model: a float model as for `apply_daq`; a model that is none of timm or transformers goes through `calibrate` and
            `reconstruct` with batches of its own.
        data: a folder of images, with subfolders for classes or with `labels.tsv` (file, tab, class); a text file; a
            Parquet, CSV, TSV or JSON Lines file or a folder of them; a data set of the Hub; a `datasets.Dataset`.
        config: a `DaqConfig`, or its arguments as keywords.
        examples: how many calibrate, blocks of tokens for a language model. As many others are held back to compare. Where
            there are fewer, each gets half.
        max_minutes: of `reconstruct`, which stops after the layer in work; 0: only calibrate; None: as long as it takes.
        processor: tokenizer or image processor; None: the one beside the model's weights.
        length: tokens of a block, by default 512, or at most of a sentence, by default 128.
        column: of the images or texts. subset, split: of a data set of the Hub. seed: of the order of examples.
        report: HTML file to write about it, see `hf_daq.report`. saved: folder or repository whose name its code loads.
        progress: show bars; None: if the standard error is a terminal.

    Raises:
        DataError: the data cannot be opened, or is not what the model takes. Others as of `apply_daq`, `calibrate` and
        `reconstruct`.
    """
    options = {"processor": processor, "length": length, "column": column, "subset": subset, "split": split}
    known, held_back = read_examples(model, data, (examples, examples), seed=seed, **options)
    batches = [without_labels(batch)[0] for batch in known.batches]  # no loss is needed
    first, _ = without_labels(held_back.batches[0])
    reference = copy.deepcopy(model).eval()
    apply_daq(model, config, **kwargs)
    seconds: dict[str, float] = {}
    try:
        with _timed("calibrate", seconds), calibrate(model, check=False):
            for batch in batches:
                run(model, batch)
        if max_minutes != 0:
            with _timed("reconstruct", seconds):
                reconstruct(model, batches, max_minutes=max_minutes, progress=progress)
    except BaseException:
        remove_daq(model)
        model.load_state_dict(reference.state_dict())
        raise
    compared = compare(model, reference, held_back.batches, labels=held_back.labels, progress=progress)
    checked = health(model, first)
    if report is not None:
        write_report(
            model,
            reference,
            held_back.batches,
            report,
            processor=held_back.processor,
            shown=held_back.shown,
            comparison=compared,
            health=checked,
            steps=_steps(known, seconds),
            saved=saved,
        )
    totals = summary(model).totals
    return Quantized(
        comparison=compared,
        health=checked,
        examples=len(known),
        held_back=len(held_back),
        float_bytes=totals["bytes_before"],
        bytes=totals["bytes_after"],
        seconds=seconds,
        inputs=first,
        processor=held_back.processor,
    )


def _steps(known: Examples, seconds: dict[str, float]) -> list[str]:
    """For the report."""
    what = {"images": "images", "sentences": "sentences", "text": "blocks of tokens"}[known.kind]
    lines = {
        "calibrate": f"Bounds calibrated with {len(known)} {what}",
        "reconstruct": "Codes, scales and shifts chosen again layer by layer, to fit the outputs of the float model on the same",
    }
    return [f"{lines[step]}, in {spent:.0f} s." for step, spent in seconds.items()]


@contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 1)
