"""Pictures of a quantized model: weights and inputs on their codes, the quantizer, bits and error by depth, flips.

Each function returns a `matplotlib.figure.Figure`, 800 pixels wide: `figure.savefig("weights.png")`. pyplot is not used
and nothing is shown; a notebook shows figures after `%matplotlib inline`. Needs `pip install "hf-daq[plots]"`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import check_bits, did_you_mean
from .errors import CalibrationError, ConfigError, ModelError
from .nn.base import refuse_adapted_weights
from .nn.formula import levels
from .nn.functional import quantize_activation
from .nn.packed import daq_layers
from .report.histograms import BIN_WIDTH, Histogram, bin_edges, histogram_of_weights, histograms_of_inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 12
_MOST_DRAWN_BITS = 5  # up to which single codes and thresholds can be told apart
_ROUNDINGS = ("daq", "ste", "soft")
# The colors of Okabe and Ito, which all kinds of eyes tell apart.
_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
_BLACK, _DARK, _GRAY, _LIGHT, _PALE_BLUE = "#000000", "#555555", "#8C8C8C", "#E5E5E5", "#BFD7EA"
_SMALL, _TEXT, _TITLE = 8, 9, 11  # points


# ------------------------------------------------------------------------------------------------ weights and inputs


def weight_histogram(model: nn.Module, layers: Iterable[str] | str | None = None, columns: int = 3) -> Figure:
    """A panel for each layer: the histogram of its float weights with bounds and thresholds, and at the value of each code
    the share of weights that get it.

    The histogram is in percent for the width of a code: an inner code is as high as the histogram on average over its
    cell, and the outermost codes also have what is clipped. Where bounds belong to channels or groups, weights are in
    units of theirs, and values of codes are the median. Weights more than three spans beyond the bounds are in the
    outermost bins. Above 5 bits single codes are not drawn. A packed layer has no float weights: only its codes are
    drawn, in units of the scale.

    Args:
        model: calibrated or packed; left as it was.
        layers: names of quantized layers; None for all, or 12 of them spread over the depth.
        columns: panels side by side.

    Raises:
        ModelError: not quantized. CalibrationError: not calibrated. ConfigError: no such layer, or columns below 1.
    """
    refuse_adapted_weights(model, "plotted")
    everything = daq_layers(model)
    names = _chosen(everything, layers, columns, "weight_histogram", "quantized layer")
    panels = [histogram_of_weights(name, everything[name]) for name in names]
    what = "Codes of packed weights" if all(panel.bins is None for panel in panels) else "Float weights and their codes"
    return _histograms(panels, f"{what}, {_share(names, everything)}", "weights", columns, log=False)


def input_histogram(
    model: nn.Module, batch: Any, layers: Iterable[str] | str | None = None, columns: int = 3
) -> Figure:
    """A panel for each layer: the histogram of its inputs with bounds, thresholds and zero point, and the share of inputs
    that get each code. As `weight_histogram`, with a logarithmic axis.

    Args:
        model: calibrated or packed. It computes in evaluation mode and is left as it was.
        batch: real inputs, on the device of the model: a tensor, a mapping of tensors for `model(**batch)`, or a tuple
            for `model(*batch)`.
        layers: names of layers with a quantized input; None for all, or 12 of them spread over the depth.
        columns: panels side by side.

    Raises:
        ModelError: not quantized, no layer has a quantized input, or the batch does not reach one of the layers.
        CalibrationError: not calibrated. ConfigError: no such layer, or columns below 1.
    """
    quantized = daq_layers(model)
    everything = {name: layer for name, layer in quantized.items() if layer.a_quant is not None}
    if quantized and not everything:
        raise ModelError("input_histogram: all inputs are in float here; DaqConfig(activation_bits=8) quantizes them")
    names = _chosen(everything, layers, columns, "input_histogram", "layer with a quantized input")
    panels = histograms_of_inputs(model, batch, {name: everything[name] for name in names})
    title = f"Layer inputs and their codes, {_share(names, everything)}"
    return _histograms(panels, title, "inputs", columns, log=True)


def _chosen(
    everything: Mapping[str, Any], layers: Iterable[str] | str | None, columns: int, caller: str, kind: str
) -> list[str]:
    if not everything:
        raise ModelError(f"{caller} needs a quantized model: hf_daq.apply_daq(model, bits=3), then hf_daq.calibrate")
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ConfigError(f"columns={columns!r} must be a whole number from 1 on")
    known = list(everything)
    if layers is None:
        spread = np.linspace(0, len(known) - 1, min(len(known), _MOST_PANELS)).round().astype(int)
        names = [known[number] for number in spread]
    else:
        names = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
    if not names:
        raise ConfigError("layers is empty; name some, or leave it out for all of them")
    for name in names:
        if name not in everything:
            raise ConfigError(f"{caller}: {name!r} is no {kind}{did_you_mean(str(name), set(known))}")
        if not everything[name].calibrated:
            raise CalibrationError(
                f"layer {name!r} has no bounds to draw: calibrate first, with hf_daq.calibrate(model): model(batch)"
            )
    return names


def _share(names: Sequence[str], everything: Mapping[str, Any]) -> str:
    count = len(everything)
    return f"{len(names)} of {count} layers" if len(names) < count else "all layers" if count > 1 else names[0]


def _histograms(panels: list[Histogram], title: str, what: str, columns: int, log: bool) -> Figure:
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(title, 1.2 + 1.9 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.remove()
            continue
        _draw_histogram(axis, panel, what, log)
        bits = f"{panel.bits} bit{'s' if panel.bits > 1 else ''}"
        note = f"{bits}, packed" if panel.clipped is None else f"{bits}, {100 * panel.clipped:.1f} % clipped"
        axis.set_title(f"{_short(panel.name, 96 // columns)}\n{note}", fontsize=_SMALL)
        _plain(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"% of {what} per code", fontsize=_SMALL)
    _legend(figure, figure.axes)
    return figure


def _draw_histogram(axis: Axes, panel: Histogram, what: str, log: bool) -> None:
    largest, total = len(panel.code_values) - 1, panel.codes.sum()
    shown = [panel.position(-0.5), panel.position(largest + 0.5)]
    if panel.bins is not None:
        heights = 100 * panel.bins / total / BIN_WIDTH[panel.bits]
        edges = panel.position(bin_edges(panel.bits))
        axis.stairs(heights, edges, fill=True, color=_PALE_BLUE, label=what if log else f"float {what}", zorder=1)
        (occupied,) = panel.bins.nonzero()
        shown += [edges[occupied[0]], edges[occupied[-1] + 1]]
        for bound in (0, largest):
            axis.axvline(panel.position(bound), color=_RED, linewidth=1.2, label="bounds", zorder=2)
    if panel.bits <= _MOST_DRAWN_BITS:
        for code in range(largest if panel.bins is not None else 0):
            threshold = panel.position(code + 0.5)
            axis.axvline(threshold, color=_GRAY, linewidth=0.7, linestyle=(0, (3, 2)), label="thresholds", zorder=2)
        shares = np.where(panel.codes > 0, 100 * panel.codes / total, np.nan if log else 0.0)
        axis.vlines(panel.code_values, 0, shares, color=_BLUE, linewidth=1.5, zorder=3)
        axis.plot(
            panel.code_values, shares, "o", color=_BLUE, markersize=3.5, label="value and share of a code", zorder=3
        )
        shown += [panel.code_values[0], panel.code_values[-1]]
    elif panel.bins is None:
        axis.plot(
            panel.code_values,
            100 * panel.codes / total,
            ".",
            color=_BLUE,
            markersize=2,
            label="value and share of a code",
        )
    if panel.zero is not None:
        axis.axvline(panel.zero, color=_BLACK, linewidth=1.2, linestyle=":", label="zero point", zorder=4)
    margin = 0.02 * (max(shown) - min(shown))
    axis.set_xlim(min(shown) - margin, max(shown) + margin)
    axis.set_xlabel(panel.unit, fontsize=_SMALL)
    if log:
        axis.set_yscale("log")
        axis.tick_params(which="minor", labelleft=False)
    else:
        axis.set_ylim(bottom=0)


# ----------------------------------------------------------------------------------------------------- the quantizer


def transfer_curve(
    bits: int = 2,
    gamma: float | Sequence[float] = 2.0,
    sigma: float | Sequence[float] = 1.0,
    rounding: str | Sequence[str] = _ROUNDINGS,
    temperature: float = 4.0,
) -> Figure:
    """The quantizer in units of codes: left its output, right the gradient that training takes.

    "daq" and "ste" share exact rounding; "soft" computes something else in training, and the area between is its gap.

    Args:
        bits: 1 to 8.
        gamma, sigma: settings of the gradient of "daq", sigma of "soft" too; above 0 and at most 100. A list draws a
            curve for each pair.
        rounding: one or several of "daq", "ste", "soft".
        temperature: temperature of "soft".

    Raises:
        ConfigError: a value out of range.
    """
    check_bits("bits", bits)
    gammas, sigmas, (temperature,) = (
        _numbers("gamma", gamma),
        _numbers("sigma", sigma),
        _numbers("temperature", temperature),
    )
    chosen = [rounding] if isinstance(rounding, str) else list(rounding)
    if not chosen or not set(chosen) <= set(_ROUNDINGS):
        raise ConfigError(f"rounding={rounding!r} must be one or several of {', '.join(map(repr, _ROUNDINGS))}")
    figure = _figure(f"The quantizer at {bits} bit{'s' if bits > 1 else ''}", 4.2)
    left, right = figure.subplots(1, 2)
    v = torch.linspace(-0.5, 2**bits - 0.5, 2**bits * max(400 >> bits, 16) * 2 + 1, dtype=torch.float64)
    rounded, _ = _evaluated(v, bits, {"rounding": "ste"})
    if set(chosen) != {"soft"}:
        left.plot(v, rounded, color=_BLACK, linewidth=1.8, label="exact rounding")
    for label, options, style in _curves(chosen, gammas, sigmas, temperature):
        output, gradient = _evaluated(v, bits, options)
        right.plot(v, gradient, label=label, linewidth=1.6, **style)
        if options["rounding"] == "soft":
            left.plot(v, output, linewidth=1.6, **style)
            left.fill_between(v, rounded, output, color=style["color"], alpha=0.2, linewidth=0, label="gap of soft")
    right.set_ylim(bottom=0)
    titles = ("Forward: the output", "output Q(v), codes"), ("Backward: the gradient", "gradient dQ/dv")
    for axis, (title, label) in zip((left, right), titles, strict=True):
        axis.set_xlim(-0.3, 2**bits - 0.7)
        axis.set_title(title, fontsize=_TEXT)
        axis.set_xlabel("value v, codes", fontsize=_TEXT)
        axis.set_ylabel(label, fontsize=_TEXT)
        _whole_ticks(axis.xaxis)
        _plain(axis)
    _whole_ticks(left.yaxis)
    _legend(figure, (left, right), columns=3)
    return figure


def _curves(
    chosen: Sequence[str], gammas: list[float], sigmas: list[float], temperature: float
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, options of the quantizer, and style of the line."""
    if "daq" in chosen:
        styles = itertools.product(("-", ":", (0, (6, 1))), (_BLUE, _RED, _ORANGE, _PURPLE, _SKY))
        pairs = itertools.product(gammas, sigmas)
        for (gamma, sigma), (line, color) in zip(pairs, itertools.cycle(styles), strict=False):
            label = rf"daq, $\gamma$ = {gamma:g}, $\sigma$ = {sigma:g}"
            yield label, {"rounding": "daq", "gamma": gamma, "sigma": sigma}, {"color": color, "linestyle": line}
    if "ste" in chosen:
        yield "ste", {"rounding": "ste"}, {"color": _DARK, "linestyle": "--"}
    if "soft" in chosen:
        for sigma, color in zip(sigmas, itertools.cycle((_GREEN, _PURPLE, _ORANGE, _SKY)), strict=False):
            label = rf"soft, $\sigma$ = {sigma:g}, temperature {temperature:g}"
            options = {"rounding": "soft", "sigma": sigma, "temperature": temperature}
            yield label, options, {"color": color, "linestyle": "-."}


def _evaluated(v: Tensor, bits: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Q(v) and dQ/dv from the quantizer of layers, between the bounds 0 and R, where a step is 1."""
    largest = levels(bits)
    v = v.clone().requires_grad_()
    output = quantize_activation(v, v.new_zeros(1), v.new_full((1,), largest), bits=bits, **options) * largest
    (gradient,) = torch.autograd.grad(output.sum(), v)
    return output.detach(), gradient


def _numbers(name: str, value: float | Sequence[float]) -> list[float]:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 100:
            raise ConfigError(f"{name}={value!r}: numbers are above 0 and at most 100")
    if not numbers:
        raise ConfigError(f"{name} is empty; write {name}=2.0, or several numbers")
    return numbers


# ---------------------------------------------------------------------------------------------- reports and training


def by_depth(summary: Any) -> Figure:
    """Bits of weights and inputs, and the signal to quantization noise of weights and outputs, layer by layer.

    Args:
        summary: with `layers`, rows in the order of the model that have `name`, `weight_bits`, `activation_bits` (None: in
            float), `weight_sqnr` and `output_sqnr` (dB; None: not measured; inf: exact).

    Raises:
        ConfigError: there are no layers.
    """
    rows = list(summary.layers)
    if not rows:
        raise ConfigError("by_depth: the summary has no layers; make it of a quantized model")
    figure = _figure("Bits and quantization noise by depth", 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    depth = np.arange(len(rows))
    for shift, name, key, color in (
        (-0.2, "weights", "weight_bits", _BLUE),
        (0.2, "inputs", "activation_bits", _ORANGE),
    ):
        bits = [getattr(row, key) or 0 for row in rows]
        if any(bits):
            upper.bar(depth + shift, bits, width=0.38, color=color, label=f"bits of {name}")
    upper.set_ylabel("bits", fontsize=_TEXT)
    upper.margins(y=0.15)
    _whole_ticks(upper.yaxis)
    for name, key, style, color in (("weights", "weight_sqnr", "o-", _BLUE), ("outputs", "output_sqnr", "s--", _RED)):
        _draw_decibels(lower, [getattr(row, key) for row in rows], name, style, color)
    lower.set_ylabel("signal to quantization\nnoise (dB)", fontsize=_TEXT)
    lower.set_xlim(-0.6, len(rows) - 0.4)
    shown = depth[:: math.ceil(len(rows) / 30)]
    lower.set_xticks(shown, [_short(rows[number].name, 26) for number in shown], rotation=90)
    for axis in (upper, lower):
        _plain(axis, grid="y")
    _legend(figure, (upper, lower))
    return figure


def _draw_decibels(axis: Axes, values: list[float | None], name: str, style: str, color: str) -> None:
    decibels = np.array([math.nan if value is None else value for value in values], dtype=float)
    finite = np.where(np.isfinite(decibels), decibels, math.nan)
    if np.isfinite(finite).any():
        axis.plot(finite, style, color=color, markersize=4, linewidth=1.2, label=f"SQNR of {name}")
    (exact,) = np.isposinf(decibels).nonzero()
    if len(exact):
        at_top: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        label = f"{name}: exact"
        axis.plot(exact, np.ones(len(exact)), "^", color=color, markersize=6, label=label, **at_top)


def flip_rate(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Over the steps of training, for each layer, colored by depth, and for their mean: the share of weights whose code
    changed, and the share of weights that oscillate between codes.

    Args:
        history: `{"step": int, "layers": {name: {"flip_rate": share, "oscillating": share}}}` for each measurement, shares
            from 0 to 1, layers in the order of the model. A layer may be missing in some of them.

    Raises:
        ConfigError: the history is empty, or has no layers.
    """
    entries = list(history)
    names = list(dict.fromkeys(name for entry in entries for name in entry["layers"]))
    if not names:
        raise ConfigError("flip_rate: the history is empty; train some steps first, then draw")
    figure = _figure("Codes of weights in training", 4.8)
    axes = figure.subplots(2, 1, sharex=True)
    colors = _depth_bar(figure, axes, names)
    steps = [entry["step"] for entry in entries]
    parts = (("flip_rate", "weights that changed\ntheir code (%)"), ("oscillating", "weights that\noscillate (%)"))
    for axis, (key, label) in zip(axes, parts, strict=True):
        values = [[entry["layers"].get(name, {}).get(key) for entry in entries] for name in names]
        percent = 100 * np.array(values, dtype=float)  # None becomes NaN
        for number, line in enumerate(percent):
            axis.plot(steps, line, color=colors(number / max(len(names) - 1, 1)), linewidth=0.8)
        known = np.isfinite(percent)
        mean = np.where(known, percent, 0).sum(0) / np.where(known.any(0), known.sum(0), math.nan)
        axis.plot(steps, mean, color=_BLACK, linewidth=2.4, label="mean of layers")
        axis.set_ylabel(label, fontsize=_TEXT)
        axis.set_ylim(bottom=0)
        _plain(axis, grid="both")
    axes[1].set_xlabel("step", fontsize=_TEXT)
    _legend(figure, axes)
    return figure


def _depth_bar(figure: Figure, axes: Any, names: list[str]) -> Any:
    """A color bar from the first layer to the last, and its colors."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    bar = figure.colorbar(ScalarMappable(cmap=colors), ax=list(axes), aspect=40, pad=0.015)
    bar.set_ticks([0, 1], labels=[_short(names[0], 20), _short(names[-1], 20)])
    bar.ax.tick_params(labelsize=_SMALL, length=0)
    bar.set_label("depth", fontsize=_TEXT, labelpad=-20)
    return colors


# ------------------------------------------------------------------------------------------------------------ shared


def _figure(title: str, height: float) -> Figure:
    """Eight inches wide, with a layout that keeps texts apart."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModelError('plots need matplotlib: pip install "hf-daq[plots]"') from None
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=_TITLE)
    return figure


def _legend(figure: Figure, axes: Iterable[Axes], columns: int | None = None) -> None:
    """Below all axes, where it covers no data; each label once."""
    found: dict[Any, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns or (len(found) if len(found) <= 5 else 3)}
    figure.legend(found.values(), found.keys(), fontsize=_TEXT, frameon=False, **place)


def _whole_ticks(axis: Any) -> None:
    axis.get_major_locator().set_params(integer=True)


def _plain(axis: Axes, grid: Any = None) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=_SMALL)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(axis=grid, color=_LIGHT, linewidth=0.7)


def _short(name: str, longest: int) -> str:
    """The end of a long name is what tells layers apart."""
    return name if len(name) <= longest else "…" + name[1 - longest :]
