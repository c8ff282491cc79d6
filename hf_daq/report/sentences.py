"""A report in words: what was done, and what its figures mean."""

from __future__ import annotations

import json
from typing import Any

import transformers
from torch import nn

from ..config import DaqConfig
from ..errors import ConfigError
from ..model.plan import plan
from ..model.roles import is_transformers_model
from ..nn.packed import daq_layers
from .compare import Comparison
from .measure import bits_name
from .summary import Summary

_SCALES = {"tensor": "One scale for all weights of a layer.", "channel": "One scale for each output channel."}
_GRIDS = {"odd": "odd multiples of a step, without zero", "integer": "whole multiples of a step, zero among them"}


def what_was_done(model: nn.Module, found: Summary) -> list[str]:
    """The bits of the layers and the config, a sentence each."""
    pairs = [(row.weight_bits, row.activation_bits) for row in found.layers]
    lines = []
    for weight_bits, input_bits in dict.fromkeys(pairs):
        count = pairs.count((weight_bits, input_bits))
        inputs = "inputs in float" if input_bits is None else f"inputs of {_bits(input_bits)}"
        lines.append(f"{counted(count, 'layer')} with weights of {_bits(weight_bits)} and {inputs}.")
    config: DaqConfig | None = vars(model).get("daq_config")
    if config is None:
        return lines
    groups = f"One scale for every {config.group_size} columns of an output channel."
    lines.append(_SCALES.get(config.weight_granularity, groups))
    widths = sorted({weight_bits for weight_bits, _ in pairs})
    for grid, words in _GRIDS.items():
        own = [str(bits) for bits in widths if config.grid(bits) == grid]
        if own:
            which = "" if len(own) == len(widths) else f" of {' and '.join(own)} bits"
            lines.append(f"Weights{which} are {words}.")
    return [*lines, *["Packed: weights are codes of a few bits, for inference."] * config.packed]


def kept_by_reason(model: nn.Module, reference: nn.Module | None, found: Summary) -> dict[str, list[Any]]:
    """Reason -> layers that stay in float; the reason is "" where it is not known."""
    config: DaqConfig | None = vars(model).get("daq_config")
    reasons: dict[str, str] = {}
    if config is not None and reference is not None and not daq_layers(reference):
        try:
            rows = plan(reference, config.replace(layers=None, packed=False)).kept
        except ConfigError:  # the reference is another network
            rows = {}
        reasons = {name: row.reason for name, row in rows.items()}
    kept: dict[str, list[Any]] = {}
    for row in found.kept:
        kept.setdefault(reasons.get(row.name, ""), []).append(row)
    return kept


def code_that_loads(model: nn.Module, saved: str) -> str:
    where, name = json.dumps(saved, ensure_ascii=False), type(model).__name__
    if is_transformers_model(model) and hasattr(transformers, name):
        return f"import hf_daq\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained({where})"
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return f"import hf_daq\n\nmodel = hf_daq.from_pretrained({where})"
    return (
        f"import hf_daq\n\nmodel = {name}(...)  # the float model\nmodel = hf_daq.from_pretrained({where}, model=model)"
    )


def widths_of(found: Summary) -> str:
    """ "W4A8", or the two most frequent ones."""
    names = [bits_name(row.weight_bits, row.activation_bits) for row in found.layers]
    ordered = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))
    return " and ".join(ordered[:2]) if len(ordered) < 3 else f"{ordered[0]} and others"


def verdict(found: Summary, compared: Comparison) -> str:
    """The page in a sentence."""
    smaller = f"{found.totals['compression']:.1f} times smaller"
    if compared.cosine is not None:
        return f"{smaller.capitalize()}, with outputs whose mean cosine to those of the float model is {compared.cosine:.4f}."
    if compared.agreement is None:
        return f"{smaller.capitalize()}."
    same = round(compared.agreement * compared.count / 100)
    return (
        f"{smaller.capitalize()}, and with the same first answer as the float model for {same:,} of "
        f"{counted(compared.count, compared.unit)}."
    )


def tiles(found: Summary, compared: Comparison) -> list[tuple[str, str, str]]:
    """Name, value and what to compare it with, of the figures that matter most."""
    before, after = found.totals["bytes_before"], found.totals["bytes_after"]
    rows = [("size, packed", size(after), f"float: {size(before)}")]
    if compared.agreement is not None:
        rows.append(
            ("same first answer", f"{compared.agreement:.1f} %", f"of {counted(compared.count, compared.unit)}")
        )
    if compared.accuracy is not None:
        rows.append(("accuracy", f"{compared.accuracy:.1f} %", _of_float(compared.reference_accuracy, ".1f", " %")))
    if compared.perplexity is not None:
        rows.append(("perplexity", f"{compared.perplexity:,.2f}", _of_float(compared.reference_perplexity, ",.2f")))
    if compared.kl is not None:
        rows.append(("KL divergence", f"{compared.kl:.3f}", "nats; 0 is the float model"))
    if compared.cosine is not None:
        rows.append(("cosine", f"{compared.cosine:.4f}", "1 is the float model"))
    return rows


def _of_float(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"float: {format(value, form)}{unit}"


def figures(compared: Comparison) -> list[tuple[str, str, str]]:
    """Name, and the figure of the float and of the quantized model."""
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("accuracy, %", compared.reference_accuracy, compared.accuracy, ".2f"),
        ("perplexity", compared.reference_perplexity, compared.perplexity, ",.2f"),
        ("same first answer, %", None, compared.agreement, ".2f"),
        ("KL divergence, nats", None, compared.kl, ".4f"),
        ("cosine", None, compared.cosine, ".4f"),
        ("SQNR of outputs, dB", None, compared.sqnr, ".1f"),
    ]
    return [
        (name, "" if before is None else format(before, form), format(after, form))
        for name, before, after, form in rows
        if after is not None
    ]


_SQNR = "SQNR: the outputs of the float model beside their difference; more is better."


def explanation(compared: Comparison) -> str:
    """What the figures of the table mean."""
    if compared.cosine is not None:
        return f"Cosine: between the outputs of the two models, mean over {compared.unit}s. {_SQNR}"
    if compared.agreement is None:
        return "Without a float model to compare it with."
    text = (
        "Same first answer: how often both models rank the same class first. KL divergence: from the probabilities of the "
        f"float model to those of the quantized one, mean over {compared.unit}s; 0 where they are equal."
    )
    if compared.perplexity is not None:
        text += " Perplexity: less is better."
    without = compared.accuracy is None and compared.perplexity is None
    text += f" {_SQNR}"
    return f"{text} No labels were given, so nothing is said about right and wrong." if without else text


def about_examples(compared: Comparison, shown: int, following: bool) -> str:
    """What the examples are, in front of them."""
    if compared.cosine is not None:
        return f"Of the first examples, the {shown} with the lowest cosine between the outputs of the two models."
    if compared.unit == "token":
        where = "what comes after the marked token" if following else "the marked token"
        return f"Answers of both models about {where}, with their probabilities: where they differ most, in {counted(shown, 'example')}."
    other = len(compared.differences)
    which = "They are" if shown == other else f"The {shown} that differ most are"
    return (
        f"{counted(other, 'example')} of {compared.examples:,} {'has' if other == 1 else 'have'} another first answer. {which} shown, "
        "with the probabilities of the answers."
    )


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _bits(bits: int) -> str:
    return f"{bits} bit{'' if bits == 1 else 's'}"
