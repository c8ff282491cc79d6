"""`report`: a quantized model on one page, for people who would rather look than read."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..model.batch import examples_in, on_device_of
from ..nn.packed import daq_layers
from ..text import SMOOTH_NOTE, bits_text, marked, printable, shape_text
from ..version import __version__
from . import sentences
from .compare import Comparison, both, compare, without_labels
from .drawings import HistogramDrawing, draw_depth, draw_histogram
from .examples import Words, examples_that_differ
from .health import Health, examine
from .histograms import histogram_of_weights, histograms_of_inputs
from .summary import LayerSummary, Summary
from .summary import summary as summarize

_MOST_LAYERS = 4  # whose weights and inputs are drawn


def report(
    model: nn.Module,
    reference: nn.Module | None,
    batches: Iterable[Any],
    path: str | Path,
    *,
    labels: Tensor | None = None,
    names: Sequence[str] | Mapping[int, str] | None = None,
    processor: Any = None,
    shown: Sequence[Any] | None = None,
    comparison: Comparison | None = None,
    health: Health | None = None,
    title: str | None = None,
    steps: Sequence[str] = (),
    saved: str | Path = "PATH",
    progress: bool | None = None,
) -> Path:
    """Write a page of HTML about a quantized model: what was done, how near it is to the float model, bits and noise by depth, its
    noisiest layers, findings with advice, and examples that both answer differently.

        float_model = hf_daq.remove_daq(copy.deepcopy(model))  # or a copy from before apply_daq
        hf_daq.report(model, float_model, [images], "report.html")

    The page is one file that needs no network and no JavaScript. It shows some of the inputs: pictures, sentences.

    Args:
        model: calibrated or packed; computes in evaluation mode and is left as it was.
        reference, batches, labels, progress: as in `compare`. The first batch is the one of `health` and of the figures of layers.
        path: of the file; folders are made, and a file that is there is replaced.
        names: of the classes; None: those that the model's config knows.
        processor: tokenizer or image processor of transformers: to show sentences, or pictures as they were before their
            normalization. Models of timm know theirs.
        shown: for each example over all batches its picture (a `Path`, or an image of PIL) or its sentence, to show instead of the
            inputs; None or empty: the inputs themselves.
        comparison: of `compare` on the same batches, if it is there already. health: of `health`.
        title: name of the model; None: what its config says.
        steps: what was done after `apply_daq`, a sentence each.
        saved: folder or repository of the model, which the code that loads it names.

    Returns:
        The path.

    Raises:
        ModelError: nothing in the model is quantized, or `compare` refuses batches, labels or reference. CalibrationError: a layer
        is not calibrated. ConfigError: shown has not one entry for each example.
    """
    path, kept = Path(path), _batches(batches, shown)
    inputs = [without_labels(batch)[0] for batch in kept]
    first = on_device_of(model, inputs[0])
    found = summarize(model, first)
    compared = comparison or compare(model, reference, kept, labels=labels, progress=progress)
    words = Words(model, names, processor, shown)
    with both(model, reference) as run:

        def outputs(inputs: Any) -> tuple[Tensor, Tensor]:
            (answer, _), (expected, _) = run(inputs)
            return answer.cpu(), expected.cpu()

        examples = examples_that_differ(outputs, inputs, compared, words)
    page = {
        "title": f"{title or _name(model)}, {sentences.widths_of(found)}",
        "summary": found,
        "comparison": compared,
        "health": health or examine(model, first),
        "verdict": sentences.verdict(found, compared),
        "tiles": sentences.tiles(found, compared),
        "done": [*sentences.what_was_done(model, found), *steps],
        "kept": sentences.kept_by_reason(model, reference, found),
        "code": sentences.code_that_loads(model, str(saved)),
        "figures": sentences.figures(compared),
        "explanation": sentences.explanation(compared),
        "smooth_note": SMOOTH_NOTE,
        "depth": draw_depth(found.layers),
        "worst": _noisiest(model, first, found),
        "examples": examples,
        "about_examples": sentences.about_examples(compared, len(examples), words.following),
        "versions": _versions(),
    }
    text = _html(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _html(page: dict[str, Any]) -> str:
    """The template with these values; whatever comes from a model or from data is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, finalize=clean, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bits": bits_text,
        "counted": sentences.counted,
        "decibels": _decibels,
        "folded": _folded,
        "marked": marked,
        "number": _number,
        "percent": _percent,
        "shape": shape_text,
        "size": sentences.size,
    }
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return environment.from_string(template).render(page)


@dataclass(frozen=True)
class WorstLayer:
    """A layer whose weights and inputs are drawn. index: its place in the summary."""

    index: int
    layer: LayerSummary
    weights: HistogramDrawing
    inputs: HistogramDrawing | None


def _batches(batches: Iterable[Any], shown: Sequence[Any] | None) -> list[Any]:
    kept = [batches] if isinstance(batches, Tensor | Mapping) else list(batches)
    if isinstance(batches, Tensor | Mapping) or not kept:
        raise ModelError('report needs a list of batches: hf_daq.report(model, reference, [batch], "report.html")')
    examples = sum(map(examples_in, kept))
    if shown and len(shown) != examples:
        raise ConfigError(f"shown has {len(shown)} entries, and there are {examples} examples: pass one for each")
    return kept


def _versions() -> dict[str, str]:
    found = {"hf_daq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "Python": platform.python_version()}


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        return str(config["architecture"])
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(str(name)).name or type(model).__name__


def _noisiest(model: nn.Module, batch: Any, found: Summary) -> list[WorstLayer]:
    """Those with the noisiest outputs; where that is not known, as in a packed model, some over the depth."""
    rows, layers = found.layers, daq_layers(model)
    noise = {index: row.output_sqnr for index, row in enumerate(rows) if row.output_sqnr is not None}
    finite = [index for index, value in noise.items() if math.isfinite(value)]
    reached = [index for index, row in enumerate(rows) if row.macs is not None]
    spread = reached[:: max(1, -(-len(reached) // _MOST_LAYERS))]
    chosen = sorted(finite, key=noise.__getitem__)[:_MOST_LAYERS] if finite else spread
    names = [rows[index].name for index in chosen]
    with_inputs = {name: layers[name] for name in names if layers[name].a_quant is not None}
    histograms = histograms_of_inputs(model, batch, with_inputs)
    inputs = {histogram.name: draw_histogram(histogram, logarithmic=True) for histogram in histograms}
    return [
        WorstLayer(
            index, rows[index], draw_histogram(histogram_of_weights(name, layers[name]), False), inputs.get(name)
        )
        for index, name in zip(chosen, names, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------- texts


def _decibels(value: float | None) -> str:
    return "-" if value is None else "exact" if value == math.inf else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float) -> str:
    """A figure of an axis, in three digits."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _folded(name: str) -> Any:
    """A name of a layer that may be broken after its points."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(map(escape, re.findall(r"[^.]*\.?", printable(name))[:-1]))
