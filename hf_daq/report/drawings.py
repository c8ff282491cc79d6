"""Drawings of a report as paths of SVG in a box of 100 by 100, which a page stretches as wide as it is; texts are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nn.formula import levels
from .histograms import BIN_WIDTH, Histogram, bin_edges

_MOST_DRAWN_BITS = 5  # up to which single codes can be told apart
_SMALLEST_SHARE = 1e-5  # of a code, at the bottom of a logarithmic axis


@dataclass(frozen=True)
class HistogramDrawing:
    """Values of a layer as an area, and above each code the share that gets it.

    area, stems, dots: paths; empty where nothing is drawn. bounds: paths of the two bounds. zero: of the zero point.
    left, right: what the edges of the box stand for. top: the share of values for a code at its upper edge, 0 to 1.
    """

    histogram: Histogram
    area: str
    stems: str
    dots: str
    bounds: str
    zero: str
    left: float
    right: float
    top: float
    logarithmic: bool


def draw_histogram(found: Histogram, logarithmic: bool) -> HistogramDrawing:
    """As the figures of `plots`: in shares for the width of a code; of packed weights only codes."""
    largest, total = levels(found.bits), max(int(found.codes.sum()), 1)
    shares = found.codes / total
    with_codes = found.bits <= _MOST_DRAWN_BITS or found.bins is None
    shown = [found.position(-0.5), found.position(largest + 0.5)]
    heights, edges = np.zeros(0), np.zeros(0)
    if found.bins is not None:
        heights, edges = found.bins / total / BIN_WIDTH[found.bits], found.position(bin_edges(found.bits))
        (occupied,) = found.bins.nonzero()
        if len(occupied):
            heights = heights[occupied[0] : occupied[-1] + 1]
            edges = edges[occupied[0] : occupied[-1] + 2]
            shown += [edges[0], edges[-1]]
    if with_codes:
        shown += [found.code_values[0], found.code_values[-1]]
    left, right = float(min(shown)), float(max(shown))
    top = float(max([*heights, *(shares if with_codes else [])], default=0)) or 1.0

    def x(value: Any) -> Any:
        return 100 * (value - left) / (right - left)

    def y(share: Any) -> Any:
        if not logarithmic:
            return 100 - 100 * np.asarray(share) / top
        lowest = math.log10(_SMALLEST_SHARE)
        reached = np.log10(np.maximum(share, _SMALLEST_SHARE)) - lowest
        return 100 - 100 * reached / max(math.log10(top) - lowest, 1e-9)

    used = np.flatnonzero(found.codes) if with_codes else np.zeros(0, dtype=int)
    points = [(x(found.code_values[code]), y(shares[code])) for code in used]
    bounds = "" if found.bins is None else "".join(map(_upright, x(found.position(np.array([0, largest])))))
    return HistogramDrawing(
        found,
        _steps(x(edges), y(heights)),
        "".join(f"M{_n(a)} 100V{_n(b)}" for a, b in points),
        "".join(f"M{_n(a)} {_n(b)}h0" for a, b in points),
        bounds,
        "" if found.zero is None or not left < found.zero < right else _upright(x(found.zero)),
        left,
        right,
        top,
        logarithmic,
    )


@dataclass(frozen=True)
class DepthDrawing:
    """Bits and noise, layer by layer.

    weight_bits, input_bits: paths of bars; most_bits: what the upper edge of their box stands for.
    weights, outputs: paths of lines, of the signal to quantization noise of weights and of outputs, in dB; weight_dots,
    output_dots: of their points. lowest, highest: what the edges of their box stand for; None without a figure. ticks: values
    and their places, in percent from the bottom; grid: lines at these.
    """

    weight_bits: str
    input_bits: str
    most_bits: int
    weights: str
    weight_dots: str
    outputs: str
    output_dots: str
    lowest: float | None
    highest: float | None
    ticks: list[tuple[float, float]]
    grid: str
    layers: Sequence[Any]

    def place(self, index: int) -> tuple[float, float]:
        """Of the output of a layer, in percent from the left and from the bottom of the box."""
        value = self.layers[index].output_sqnr
        return 100 * (index + 0.5) / len(self.layers), 100 - _level(value, self.lowest, self.highest)


def draw_depth(layers: Sequence[Any]) -> DepthDrawing:
    """Of the layers of a `Summary`, of which there is one at least."""
    count = len(layers)
    found = [value for row in layers for value in (row.weight_sqnr, row.output_sqnr) if _finite(value)]
    lowest = min(0.0, 5 * math.floor(min(found) / 5)) if found else None
    highest = max(5.0, 5 * math.ceil(max(found) / 5)) if found else None
    ticks = _ticks(lowest, highest)
    most = max(max(row.weight_bits, row.activation_bits or 0) for row in layers)

    def bars(key: str, start: float) -> str:
        values = [(index, getattr(row, key)) for index, row in enumerate(layers)]
        return "".join(
            f"M{_n(100 * (index + start) / count)} 100V{_n(100 - 100 * bits / most)}h{_n(36 / count)}V100z"
            for index, bits in values
            if bits is not None
        )

    def line(key: str) -> tuple[str, str]:
        parts, dots, pen = [], [], "M"
        for index, row in enumerate(layers):
            value = getattr(row, key)
            if value is None or math.isnan(value):
                pen = "M"
                continue
            place = f"{_n(100 * (index + 0.5) / count)} {_n(_level(value, lowest, highest))}"
            parts.append(f"{pen}{place}")
            dots.append(f"M{place}h0")
            pen = "L"
        return "".join(parts), "".join(dots)

    return DepthDrawing(
        bars("weight_bits", 0.12),
        bars("activation_bits", 0.52),
        most,
        *line("weight_sqnr"),
        *line("output_sqnr"),
        lowest,
        highest,
        ticks,
        "".join(f"M0 {_n(100 - place)}H100" for _, place in ticks),
        layers,
    )


def _level(value: float, lowest: float | None, highest: float | None) -> float:
    """From the top of the box; what is exact is at the top."""
    if lowest is None or highest is None:
        return 0.0
    return 100 - 100 * (min(max(value, lowest), highest) - lowest) / (highest - lowest)


def _ticks(lowest: float | None, highest: float | None) -> list[tuple[float, float]]:
    if lowest is None or highest is None:
        return []
    step = 10 * math.ceil((highest - lowest) / 60)
    values = [float(step * n) for n in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
    return [(value, 100 - _level(value, lowest, highest)) for value in values]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _steps(edges: np.ndarray, heights: np.ndarray) -> str:
    if not len(heights):
        return ""
    parts = [f"M{_n(edges[0])} 100"]
    parts += [f"V{_n(height)}H{_n(edge)}" for height, edge in zip(heights, edges[1:], strict=True)]
    return "".join([*parts, "V100z"])


def _upright(x: float) -> str:
    return f"M{_n(x)} 0V100"


def _n(value: float) -> str:
    """A number with as few signs as 2 decimals need."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
